"""The doctor: what would keep a miner from answering, found before it starts.

    for finding in examine(Site(settings=settings, operator=operator, clock=clock)):
        print(finding.level, finding.name, finding.sentence)

Every check looks at one thing and says one sentence, with the remedy when something
is wrong. Nothing is changed: no damaged file is moved, no folder is made, and a
miner that runs on the same folders is not disturbed. A check that fails itself is a
failure of its own and keeps none of the others from running.
"""

import json
import logging
import os
import socket
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from errno import EACCES, EADDRINUSE, EADDRNOTAVAIL
from importlib import metadata
from itertools import groupby
from pathlib import Path
from shutil import disk_usage
from typing import Any, Final, TypeAlias

import requests
from packaging.requirements import Requirement

from bar_cleaning import MINUTE_S
from bar_store import BarStore
from clock import Clock
from collector import SETTLE_S, Series, concerns_whole_venue
from config import ANCHOR_MAX_AGE_S, ASSETS, DAY_S, FeedSymbol, Frequency, MarketHours, Venue
from data_fetcher import LiveSource, open_source
from errors import ConfigError, MinerError, ModelError
from feed_plans import FeedPlan, HttpPolicy
from feeds import Feed, open_feeds
from lgbm_predictor import load_model_set
from model_store import published_sets
from operator_flags import AXON_REQUIREMENTS, AxonSettings, OperatorSettings, Transport, page_port
from path_checks import Verdict
from scheduled_events import EVENTS_FILE, known_events
from settings import Settings
from state_store import fault_of, folder_mark
from wire_format import format_iso

log = logging.getLogger(__name__)

OK, WARNING, FAILURE = Verdict.OK, Verdict.WARNING, Verdict.FAILURE
MB: Final = 10**6

CLOCK_WARN_S: Final = 1.0  # the Date headers that it is read from count whole seconds
CLOCK_FAIL_S: Final = 5.0
BAR_WARN_S: Final = 5 * MINUTE_S
BAR_FAIL_S: Final = 10 * MINUTE_S
STALE_CADENCES: Final = 1.5  # a training may take its time
NEGLECTED_CADENCES: Final = 10  # nobody retrains
GAP_DAYS: Final = 3  # what every venue still has, so that the miner can mend it
OLD_BARS_S: Final = DAY_S
AHEAD_S: Final = 300  # a clock that is off by less is judged by the venues'

# Measured with benchmarks/store.py and a year of one-minute bars, rounded up.
BARS_MB: Final = 40  # of an asset in a year: two feeds where the scored one forgets
MODELS_MB: Final = 1  # of an asset at one frequency: two sets
LEDGER_MB: Final = 300
SERVING_MB: Final = 700
TRAINING_MB: Final = 1900

# One attempt: without a network everything must be said within seconds.
PATIENCE: Final = HttpPolicy(connect_s=3, read_s=4, attempt_s=6, attempts=1, budget_s=10)
LOCAL_S: Final = 3.0  # for whoever listens on a port of this machine
_ANSWER_BYTES: Final = 65_536
_AXON_SAYS: Final = "only POST /Simulation is served here."

_HERE: Final = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    level: Verdict
    sentence: str  # with the remedy, unless all is well


_Said: TypeAlias = Mapping[str, Any]  # what a program answers to `/healthz`
Check: TypeAlias = tuple[str, Callable[[], Iterable[Finding]]]


def _free_bytes(folder: Path) -> int:
    return disk_usage(folder).free


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is examined: how the miner would run, and the machine as it shows itself."""

    settings: Settings
    operator: OperatorSettings
    clock: Clock
    policy: HttpPolicy = PATIENCE
    calendar: Path = EVENTS_FILE
    requirements: Path = _HERE
    memory_files: tuple[Path, Path] = (Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"))
    free_bytes: Callable[[Path], int] = field(default=_free_bytes)


def examine(site: Site) -> Iterator[Finding]:
    """All checks in turn. Never raises for what a check meets, bugs in checks included."""
    for name, check in _checks(site):
        try:
            yield from check()
        except MinerError as error:
            yield Finding(name, FAILURE, str(error))
        except Exception as error:
            log.exception("check failed", extra={"check": name})
            yield Finding(
                name,
                FAILURE,
                f"the check itself broke ({type(error).__name__}); its traceback is in the log, "
                "please report it.",
            )


def _checks(site: Site) -> Iterator[Check]:
    settings, operator = site.settings, site.operator
    yield "libraries", lambda: [check_libraries(_required(site), sys.version_info[:3])]
    yield "calendar", lambda: [check_calendar(site.calendar, int(site.clock.now()))]
    yield "memory", lambda: [check_memory(*site.memory_files)]
    yield "state folder", lambda: [check_folder(settings.state_dir, "--state-dir")]
    yield "model folder", lambda: [check_folder(settings.model_dir, "--model-dir")]
    yield "disk", lambda: [check_disk(site)]
    yield "state files", lambda: [check_documents(settings.state_dir)]
    yield "ledger", lambda: check_ledgers(settings.state_dir)
    if operator.transport is Transport.AXON:
        yield "wallet", lambda: [check_wallet(operator.axon)]
    yield "ports", lambda: check_ports(settings, operator)
    yield "models", lambda: check_models(site)
    if settings.source in ("venue", "pyth"):
        yield "bars", lambda: [check_bars(settings, LiveSource(settings, site.clock), site.clock)]
        yield "feeds", lambda: check_feeds(site)
    else:
        yield "source", lambda: [check_source(settings)]


# ---------------------------------------------------------------- program and machine


def _required(site: Site) -> list[Path]:
    files = [site.requirements / "requirements.txt"]
    if site.operator.transport is Transport.AXON:
        files.append(site.requirements / AXON_REQUIREMENTS)
    return files


def check_libraries(files: Sequence[Path], python: tuple[int, ...]) -> Finding:
    """Installed versions against the pins of the requirements files."""
    lines = [line.partition("#")[0].strip() for path in files for line in _lines(path)]
    pins = [Requirement(line) for line in lines if line and not line.startswith("-")]
    misfits = [fault for pin in pins if (fault := _misfit(pin)) is not None]
    if misfits:
        install = " ".join(f"-r {path.name}" for path in files)
        return Finding(
            "libraries", FAILURE, f"{', '.join(misfits)}; run `python -m pip install {install}`."
        )
    version = ".".join(map(str, python))
    return Finding("libraries", OK, f"Python {version} and {len(pins)} libraries fit the pins.")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); restore it from the release."
        ) from None


def _misfit(pin: Requirement) -> str | None:
    try:
        found = metadata.version(pin.name)
    except metadata.PackageNotFoundError:
        return f"{pin.name} is not installed"
    fits = pin.specifier.contains(found, prereleases=True)
    return None if fits else f"{pin.name} is {found} and should be {pin.specifier}"


def check_calendar(file: Path, now: int) -> Finding:
    """Whether the dates of scheduled releases still reach into the future."""
    known, warnings = known_events(now, file)
    if warnings:
        return Finding("calendar", WARNING, " ".join(warnings))
    return Finding("calendar", OK, f"{len(known)} kinds of releases are dated.")


def check_memory(meminfo: Path, limit: Path) -> Finding:
    """What can be had, by the machine and by a container's limit, against what was measured."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        (free_kb,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free_mb = int(free_kb) * 1024 / MB
    except (OSError, ValueError):
        return Finding("memory", WARNING, f"{meminfo} does not say; look with `free -m`.")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        free_mb = min(free_mb, int(limit.read_text(encoding="ascii")) / MB)
    need = SERVING_MB + TRAINING_MB
    found = f"{free_mb:.0f} MB can be had, {SERVING_MB} MB are needed to serve and {need} MB while"
    if free_mb < SERVING_MB:
        return Finding("memory", FAILURE, f"{found} training; stop other programs or add memory.")
    if free_mb < need:
        return Finding(
            "memory",
            WARNING,
            f"{found} training, which may be killed; add memory or swap, or train elsewhere.",
        )
    return Finding("memory", OK, f"{found} training.")


# ---------------------------------------------------------------- folders and files


def check_folder(folder: Path, flag: str) -> Finding:
    """Whether this user can work in it, and nobody else. `flag`: what names it."""
    name = f"{flag.removeprefix('--').removesuffix('-dir')} folder"
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding(
            name,
            FAILURE,
            f"{place} takes no files ({error.strerror}); make it a folder that this user may "
            f"write to, or name another one with {flag}.",
        )
    if place != folder.resolve():
        return Finding(name, OK, f"{folder} is not there yet; the first run makes it.")
    barred = _barred(folder)
    if barred:
        return Finding(
            name,
            FAILURE,
            f"{len(barred)} entries of {folder} are closed to this user, the first is {barred[0]}; "
            f"run `chown -R $USER {folder}` as root.",
        )
    mode = folder.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        what = "change" if mode & (stat.S_IWGRP | stat.S_IWOTH) else "read"
        return Finding(
            name, WARNING, f"others may {what} {folder}; run `chmod -R go-rwx {folder}`."
        )
    return Finding(name, OK, f"{folder} can be read and written, by no other user.")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    for place in (folder, *folder.parents):
        with suppress(OSError):  # it lies in a folder that this user may not enter
            if place.exists():
                return place
    return Path(folder.anchor)


def _barred(folder: Path) -> list[Path]:
    """Entries at any depth that this user cannot read, write or enter."""
    unlisted: list[Path] = []
    barred = []
    for parent, folders, files in os.walk(
        folder, onerror=lambda error: unlisted.append(Path(error.filename))
    ):
        wanted = [(name, os.R_OK | os.W_OK | os.X_OK) for name in folders]
        wanted += [(name, os.R_OK | os.W_OK) for name in files]
        entries = ((Path(parent, name), mode) for name, mode in wanted)
        # A running miner's temporary files may be gone again.
        barred += [path for path, mode in entries if not _may(path, mode) and path.exists()]
    return barred or unlisted


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def check_disk(site: Site) -> Finding:
    """Free space against what a year of bars and all models take, less what is there."""
    settings = site.settings
    frequencies = open_source(settings).frequencies()
    bars_mb = LEDGER_MB + BARS_MB * len(frequencies) * settings.days / 365
    models_mb = MODELS_MB * sum(map(len, frequencies.values()))
    needs: dict[int, float] = {}  # both folders may lie on one disk
    free: dict[int, float] = {}
    for folder, need_mb in ((settings.state_dir, bars_mb), (settings.model_dir, models_mb)):
        place = _existing(folder)
        disk = place.stat().st_dev
        needs[disk] = needs.get(disk, 0) + max(0.0, need_mb - _held_bytes(folder) / MB)
        free[disk] = site.free_bytes(place) / MB
    tight = min(free, key=lambda disk: free[disk] - needs[disk])
    found = f"{free[tight]:.0f} MB are free, {settings.days:.0f} days of bars and the models"
    if free[tight] < needs[tight]:
        return Finding(
            "disk", FAILURE, f"{found} still take {needs[tight]:.0f} MB; free some disk space."
        )
    if free[tight] < 2 * needs[tight]:
        return Finding(
            "disk", WARNING, f"{found} still take {needs[tight]:.0f} MB; free some more."
        )
    return Finding("disk", OK, f"{found} still take {needs[tight]:.0f} MB.")


def _held_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            total += path.stat().st_size
    return total


def check_documents(state_dir: Path) -> Finding:
    """Whether every state file is whole, and whether some were set aside before."""
    name = "state files"
    found = [path for path in state_dir.rglob("*.msgpack") if not path.name.startswith(".")]
    damaged = [fault for path in sorted(found) if (fault := _damage(path)) is not None]
    if damaged:
        return Finding(
            name,
            FAILURE,
            f"{len(damaged)} of {len(found)} files in {state_dir} are damaged ({_few(damaged)}); "
            "restore them from a backup, or start the miner, which sets them aside and fetches "
            "again what the venue still has; check the disk.",
        )
    aside = sorted(path.name for path in state_dir.rglob("*.damaged-*"))
    if aside:
        return Finding(
            name,
            WARNING,
            f"{len(aside)} damaged files were set aside ({_few(aside)}); look into the log of "
            "that time, check the disk, then delete them.",
        )
    return Finding(name, OK, f"{len(found)} files are whole." if found else "there are none yet.")


def _damage(path: Path) -> str | None:
    try:
        fault = fault_of(path)
    except FileNotFoundError:
        return None  # replaced or pruned meanwhile
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    return None if fault is None else f"{path.name} {fault}"


def check_ledgers(state_dir: Path) -> Iterator[Finding]:
    """Whether SQLite finds the files of own answers and scores sound."""
    for path in sorted(state_dir.glob("*.sqlite3")):
        is_open = path.with_name(f"{path.name}-wal").exists()
        # Without a journal nobody writes; read that way, SQLite makes no files of its own.
        mode = "mode=ro" if is_open else "immutable=1"
        try:
            with closing(sqlite3.connect(f"file:{path}?{mode}", uri=True)) as connection:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.Error as error:
            found = str(error)
        if found == "ok":
            yield Finding("ledger", OK, f"{path.name} is sound.")
        else:
            yield Finding(
                "ledger",
                FAILURE,
                f"{path.name} is damaged ({found}); restore it from a backup, or start the miner, "
                "which sets it aside and begins a new one.",
            )


def _few(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- identity and ports


def check_wallet(settings: AxonSettings) -> Finding:
    """Whether the hotkey can be used without a password, and is this user's alone."""
    from axon_adapter import load_wallet  # bittensor takes seconds to import

    wallet = load_wallet(settings)
    address = wallet.hotkey.ss58_address
    path = settings.wallet_path.expanduser() / settings.wallet_name / "hotkeys"
    path /= settings.wallet_hotkey
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding(
            "wallet", WARNING, f"others may use the hotkey {address}; run `chmod 600 {path}`."
        )
    return Finding("wallet", OK, f"hotkey {address} can be used.")


def check_ports(settings: Settings, operator: OperatorSettings) -> Iterator[Finding]:
    """Whether what the miner listens on is free, or its own already.

    An axon tells strangers nothing of itself, so the pages beside it say whose it is.
    """
    mark = folder_mark(settings.state_dir)
    port = page_port(settings, operator)

    def is_ours(said: _Said) -> bool:
        return mark is not None and said.get("miner") == mark

    def has_our_pages(_said: _Said) -> bool:
        return is_ours(_ask(_from_here(settings.host), port))

    if operator.transport is Transport.AXON:
        yield check_port("--axon.port", operator.axon.ip, operator.axon.port, has_our_pages)
    yield check_port("--port", settings.host, port, is_ours)


def check_port(flag: str, address: str, port: int, is_ours: Callable[[_Said], bool]) -> Finding:
    """Whether one can listen there and be reached from this machine, or who listens already.

    `is_ours`: whether a miner that says this to `/healthz` is the one examined.
    """
    name = f"port {port}"
    where = f"{address} port {port}"
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((address, port), family=family) as listener:
            port = listener.getsockname()[1]  # port 0 took a free one
            socket.create_connection((_from_here(address), port), LOCAL_S).close()
    except OSError as error:
        if error.errno == EADDRINUSE:
            return _occupied(flag, _from_here(address), port, is_ours)
        return _closed(name, flag, where, error)
    said = f"{where} is free, and this machine can connect to it"
    if flag == "--axon.port":
        said += "; whether validators can, through firewalls and routers, is not tested here"
    return Finding(name, OK, f"{said}.")


def _closed(name: str, flag: str, where: str, error: OSError) -> Finding:
    reason = f"one cannot listen on {where} ({error.strerror or error})"
    if error.errno == EACCES:
        return Finding(name, FAILURE, f"{reason}; choose a port above 1023 with {flag}.")
    if error.errno == EADDRNOTAVAIL and flag == "--axon.port":
        return Finding(
            name,
            WARNING,
            f"{reason}; the axon will listen on all addresses of this machine, so --axon.ip may go "
            "(what others should connect to is --axon.external_ip).",
        )
    return Finding(name, FAILURE, f"{reason}; choose another address or port.")


def _from_here(address: str) -> str:
    """Where to connect to what listens on all addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104


def _occupied(flag: str, address: str, port: int, is_ours: Callable[[_Said], bool]) -> Finding:
    name, said = f"port {port}", _ask(address, port)
    is_axon = said.get("message") == _AXON_SAYS
    if not (is_axon or {"status", "live", "ready"} <= said.keys()):
        return Finding(
            name,
            FAILURE,
            f"another program listens there; end it (`ss -ltnp 'sport = :{port}'` names it) or "
            f"choose another port with {flag}.",
        )
    if not is_ours(said):
        return Finding(
            name,
            FAILURE,
            "another miner listens there, not one on this --state-dir; choose another port with "
            f"{flag}, or name that miner's folder.",
        )
    if is_axon:
        return Finding(name, OK, "the axon of this miner listens there already.")
    return _health(name, f"http://{address}:{port}/", said)


def _health(name: str, page: str, said: _Said) -> Finding:
    told = [str(entry) for kind in ("reasons", "warnings") for entry in said.get(kind) or ()]
    if said["status"] == "ok":
        return Finding(name, OK, "this miner is running there and well.")
    return Finding(
        name,
        WARNING,
        f"this miner is running there and says {said['status']}: {_few(told)}; see its status "
        f"page, {page}.",
    )


def _ask(address: str, port: int) -> _Said:
    """What a program on this machine says to `/healthz`; nothing if it is no JSON object."""
    host = f"[{address}]" if ":" in address else address
    with requests.Session() as session:
        session.trust_env = False  # no proxy stands before this machine itself
        try:
            with session.get(
                f"http://{host}:{port}/healthz",
                timeout=LOCAL_S,
                stream=True,
                allow_redirects=False,
            ) as answer:
                said = json.loads(answer.raw.read(_ANSWER_BYTES))
        except (requests.RequestException, OSError, ValueError):
            return {}
    return said if isinstance(said, dict) else {}


# ---------------------------------------------------------------- models


def check_models(site: Site) -> Iterator[Finding]:
    """The set in use of every asset and frequency that is served."""
    source = open_source(site.settings)
    now = site.clock.now() if source.live else source.now()
    absent = []
    for asset, frequencies in source.frequencies().items():
        for frequency in frequencies:
            finding = check_model(site.settings, source.name, asset, frequency, now)
            if finding is None:
                absent.append(f"{asset} {frequency.value}")
            else:
                yield finding
    if absent:
        yield Finding(
            "models",
            WARNING,
            f"{len(absent)} sets are not there yet ({_few(absent)}); start the miner, which "
            "trains them and answers more simply meanwhile, or run `python train_models.py`.",
        )


def check_model(
    settings: Settings, source: str, asset: str, frequency: Frequency, now: float
) -> Finding | None:
    """Whether one set loads whole, is of this source, and is not neglected; None: there is none."""
    name = f"models {asset} {frequency.value}"
    command = f"python train_models.py --asset {asset} --{frequency.value}-only --source {source}"
    try:
        folders = published_sets(settings.model_dir, asset, frequency)
        if not folders:
            return None
        models = load_model_set(folders[0])
    except ModelError as error:
        return Finding(name, FAILURE, str(error))
    if models.source != source:
        return Finding(
            name,
            FAILURE,
            f"they were trained on source {models.source}, not {source}, and will not be used; "
            f"run `{command}`.",
        )
    age_days = (now - models.trained_until) / DAY_S
    return _judge_age(name, age_days, settings.retrain_days(frequency), command)


def _judge_age(name: str, age_days: float, every: float, command: str) -> Finding:
    said = f"their training data end {age_days:.1f} days ago"
    if age_days <= STALE_CADENCES * every:
        return Finding(name, OK, f"{said}.")
    said += f", and every {every:g} days is meant"
    if age_days <= NEGLECTED_CADENCES * every:
        return Finding(
            name, WARNING, f"{said}; start the miner, which trains them, or run `{command}`."
        )
    return Finding(
        name,
        FAILURE,
        f"{said}; look for failed trainings in the miner's log, and run `{command}`.",
    )


# ---------------------------------------------------------------- bars and feeds


def check_source(settings: Settings) -> Finding:
    """Whether a source that is no feed can be read."""
    frequencies = open_source(settings).frequencies()
    return Finding("source", OK, f"{settings.source} has bars of {', '.join(frequencies)}.")


def check_bars(settings: Settings, source: LiveSource, clock: Clock) -> Finding:
    """How old the newest stored minutes of the scored feeds are, and what lacks of late."""
    damaged = check_documents(settings.state_dir).level is FAILURE
    if damaged:  # reading them would set them aside
        return Finding("bars", WARNING, "not counted while state files are damaged; mend those.")
    store, now = BarStore(settings.state_dir), int(clock.now())
    settled = now - SETTLE_S  # younger ones may still come
    ends: dict[str, int] = {}
    gaps: dict[str, int] = {}
    for asset, plan in source.plans.items():
        key = Series(asset, plan.scored, MINUTE_S).key
        bars = store.load(*key, start=now - GAP_DAYS * DAY_S)
        if bars is None:
            continue
        ends[asset] = bars.end_ts
        missing = store.missing(*key, int(bars.open_ts[0]), min(bars.end_ts, settled))
        gaps[asset] = sum(high - low for low, high in missing) // MINUTE_S
    return _judge_bars(source.plans, ends, gaps, now)


def _judge_bars(
    plans: Iterable[str], ends: Mapping[str, int], gaps: Mapping[str, int], now: int
) -> Finding:
    absent = [asset for asset in plans if asset not in ends]
    old = [f"{asset} {_ago(now - end)}" for asset, end in ends.items() if now - end > OLD_BARS_S]
    ahead = [f"{asset} {format_iso(end)}" for asset, end in ends.items() if end > now + AHEAD_S]
    holed = [f"{asset} {minutes} min" for asset, minutes in gaps.items() if minutes]
    faults = [
        f"{what} ({_few(names)})"
        for what, names in (
            (f"none of the last {GAP_DAYS} days are stored", absent),
            ("the newest are old", old),
            ("gaps", holed),
            ("the newest are ahead of the clock, which may be wrong", ahead),
        )
        if names
    ]
    if faults:
        return Finding(
            "bars",
            WARNING,
            f"{'; '.join(faults)}; start the miner, which fetches what venues still have: "
            "Hyperliquid forgets minutes after 3.5 days.",
        )
    latest = max((now - end for end in ends.values()), default=0)
    return Finding(
        "bars",
        OK,
        f"{len(ends)} assets without a gap in {GAP_DAYS} days, the newest at most {_ago(latest)} "
        "old.",
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one feed said; ages in seconds."""

    feed: FeedSymbol
    price_age_s: float = 0.0
    bar_age_s: float | None = None  # None: no candle of the last hour
    fault: MinerError | None = None
    spared: FeedSymbol | None = None  # whose failure was its host's, so that this was not asked


def check_feeds(site: Site) -> Iterator[Finding]:
    """The clock, then every scored feed, then the venues that score nothing."""
    plans = LiveSource(site.settings, site.clock).plans
    feeds = open_feeds(site.settings, site.clock, policy=site.policy, quote_policy=site.policy)
    scored = [plan.scored for plan in plans.values()]
    venues = {feed.venue for feed in scored}
    others = [feed for plan in plans.values() for feed in plan.others if feed.venue not in venues]
    spare = list({feed.venue: feed for feed in reversed(others)}.values())
    try:
        readings = _read_all(feeds, [*scored, *spare], site.clock)
        offsets = {
            venue.value: told - site.clock.now()
            for venue, feed in feeds.items()
            if (told := feed.server_time()) is not None
        }
    finally:
        for feed in feeds.values():
            feed.close()
    yield check_clock(offsets)
    names = {symbol: f"feed {symbol.venue.value}" for symbol in spare}
    names |= {plan.scored: f"feed {plan.asset}" for plan in plans.values()}
    for plan in plans.values():
        reading = readings[plan.scored]
        yield _not_asked(reading, names) or check_feed(plan, reading)
    for symbol in spare:
        yield check_spare_feed(readings[symbol])


def _read_all(
    feeds: Mapping[Venue, Feed], symbols: Iterable[FeedSymbol], clock: Clock
) -> dict[FeedSymbol, _Reading]:
    """All readings, venues side by side."""

    def venue_of(symbol: FeedSymbol) -> Venue:
        return symbol.venue

    groups = {
        venue: list(group) for venue, group in groupby(sorted(symbols, key=venue_of), key=venue_of)
    }
    with ThreadPoolExecutor(len(groups) or 1) as pool:
        found = pool.map(lambda venue: _read_venue(feeds[venue], groups[venue], clock), groups)
        return {reading.feed: reading for readings in found for reading in readings}


def _read_venue(feed: Feed, symbols: Sequence[FeedSymbol], clock: Clock) -> list[_Reading]:
    """One venue's readings; a venue that cannot be reached is asked once."""
    readings: list[_Reading] = []
    for symbol in symbols:
        reading = _read(feed, symbol, clock)
        readings.append(reading)
        if reading.fault is not None and concerns_whole_venue(reading.fault):
            break
    last = readings[-1].feed
    return readings + [_Reading(symbol, spared=last) for symbol in symbols[len(readings) :]]


def _not_asked(reading: _Reading, names: Mapping[FeedSymbol, str]) -> Finding | None:
    """A feed whose host had failed before; `names`: how findings call feeds."""
    if reading.spared is None:
        return None
    return Finding(
        names[reading.feed],
        WARNING,
        f"{reading.feed.symbol} was not asked, its host having failed; see "
        f"{names[reading.spared]}.",
    )


def _read(feed: Feed, symbol: FeedSymbol, clock: Clock) -> _Reading:
    try:
        quote = feed.price(symbol.symbol)
        now = int(clock.now())
        candles, _ = feed.candles(symbol.symbol, MINUTE_S, now - 3600, now)
    except MinerError as error:
        return _Reading(symbol, fault=error)
    now_s = clock.now()
    bar_age = now_s - candles.bars.end_ts if len(candles) else None
    return _Reading(symbol, now_s - quote.ts, bar_age)


def check_clock(offsets: Mapping[str, float]) -> Finding:
    """Our clock against those of the venues: seconds that theirs are ahead, by venue."""
    if not offsets:
        return Finding(
            "clock", WARNING, "no feed answered, so nobody confirms it; look with `timedatectl`."
        )
    venue = min(offsets, key=lambda name: abs(offsets[name]))  # one venue alone may be wrong
    off = offsets[venue]
    said = f"{abs(off):.1f} s {'behind' if off > 0 else 'ahead of'} {venue}'s"
    if abs(off) > CLOCK_WARN_S:
        return Finding(
            "clock",
            FAILURE if abs(off) > CLOCK_FAIL_S else WARNING,
            f"this machine's clock is {said}, and deadlines are seconds; synchronise it, e.g. "
            "`timedatectl set-ntp true`.",
        )
    return Finding("clock", OK, f"{said}.")


def check_feed(plan: FeedPlan, reading: _Reading) -> Finding:
    """One scored feed: reached, and fresh."""
    name = f"feed {plan.asset}"
    if reading.fault is not None:
        return Finding(name, FAILURE, f"{plan.scored.symbol}: {reading.fault}")
    said = f"{plan.scored.name}: {_freshness(reading)}"
    bar_age = float("inf") if reading.bar_age_s is None else reading.bar_age_s
    if reading.price_age_s <= ANCHOR_MAX_AGE_S and bar_age <= BAR_WARN_S:
        return Finding(name, OK, f"{said}.")
    if ASSETS[plan.asset].hours is not MarketHours.CONTINUOUS:
        return Finding(
            name, WARNING, f"{said}; its market may be closed, if not look at the venue's status."
        )
    return Finding(
        name,
        FAILURE if bar_age > BAR_FAIL_S else WARNING,
        f"{said}, though this market never closes; look at the venue's status: until it moves, "
        "answers start from another feed or the last bar.",
    )


def check_spare_feed(reading: _Reading) -> Finding:
    """A venue that scores nothing: the miner can do without it for a while."""
    name, use = f"feed {reading.feed.venue.value}", "for history and second opinions"
    if reading.fault is not None:
        return Finding(name, WARNING, f"it is there {use} alone, but: {reading.fault}")
    return Finding(name, OK, f"{reading.feed.name}, {use}: {_freshness(reading)}.")


def _freshness(reading: _Reading) -> str:
    bar = (
        "no candle closed in the last hour"
        if reading.bar_age_s is None
        else f"the last candle closed {_ago(reading.bar_age_s)} ago"
    )
    return f"price {_ago(reading.price_age_s)} old, {bar}"


def _ago(seconds: float) -> str:
    """A length of time in one unit."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 2 * DAY_S else f"{seconds / DAY_S:.0f} days"
