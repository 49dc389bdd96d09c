"""The doctor: every planted fault is found and named with its remedy, and no other."""

import logging
import os
import re
import subprocess
import sys
import threading
from argparse import ArgumentParser
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import orjson
import pytest

import preflight
from answer_desk import AnswerDesk
from axon_adapter import AxonServer, bt
from bar_store import BarStore
from caller_rules import CallerPolicy
from chain import StaticChain
from config import Frequency
from data_fetcher import SimulatedSource
from domain import Bars
from errors import StateError
from feed_plans import FeedHost, feed_plans
from forecast_engine import ForecastEngine
from http_service import bind, build_app, server_for
from ledger import Ledger
from lgbm_predictor import load_model_set
from loopback_venues import Fault, FaultRule, serve_venues
from metrics import Metrics
from miner_facts import EngineFacts
from model_store import MANIFEST, SEAL, publish_set, published_sets, seal_manifest
from operator_flags import add_operator_arguments, operator_settings, page_port
from path_checks import Verdict
from preflight import Site
from protocol import protocol_profile
from settings import Settings
from state_store import StateStore, folder_mark
from status_page import RecentLog, RecentRequests, StatusPage

ROOT = Path(__file__).resolve().parent.parent
HERE = "127.0.0.1"
DAY_S = 86_400
NOW = 1_765_800_030  # 2025-12-15, half a minute past noon UTC
MINUTES = 5 * 1440
ASSETS = ("BTC", "XAU")  # a feed of each venue
PLANS = {
    asset: plan
    for asset, plan in feed_plans("venue", protocol_profile("2026-09")).items()
    if asset in ASSETS
}
PAIRS = [(asset, frequency) for asset, plan in PLANS.items() for frequency in plan.frequencies]


@dataclass
class HandClock:
    """A clock that is turned by hand."""

    ts: float = NOW

    def now(self) -> float:
        return self.ts


def minutes(feed, *, until=NOW):
    steps = np.random.default_rng(1).normal(0, 1e-3, MINUTES)
    close = 4000 * np.exp(np.cumsum(steps))
    end = until // 60 * 60 + 60  # the last one still forms
    return Bars(
        open_ts=end - 60 * np.arange(MINUTES, 0, -1, dtype=np.int64),
        open=close,
        high=close,
        low=close,
        close=close,
        volume=np.ones(MINUTES),
        bar_s=60,
        feed=feed,
    )


CLOSED = np.arange(MINUTES) < MINUTES - 1


def store_bars(state_dir, asset, keep=CLOSED):
    plan = PLANS[asset]
    bars = minutes(plan.scored.name)
    columns = {
        name: getattr(bars, name)[keep]
        for name in ("open_ts", "open", "high", "low", "close", "volume")
    }
    BarStore(state_dir).append(
        plan.scored.venue.value, asset, Bars(**columns, bar_s=60, feed=bars.feed)
    )


def publish(trained, model_dir, pair, **changes):
    """The small set of BTC in another's name: a whole one, as far as loading looks."""
    asset, frequency = pair
    files = dict(trained[frequency].files)
    manifest = orjson.loads(files[MANIFEST])
    manifest.pop(SEAL)
    manifest |= {"asset": asset, "source": "venue", "trained_until": NOW - 3600} | changes
    files[MANIFEST] = seal_manifest(manifest)
    publish_set(model_dir, asset, frequency, trained[frequency].model_id, files)


def free_port():
    with bind(HERE, 0) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def wallets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wallets")
    wallet = bt.Wallet(name="miner", hotkey="hot", path=str(folder))
    wallet.create_new_coldkey(use_password=False, overwrite=True, suppress=True)
    wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
    (folder / "miner" / "hotkeys" / "hot").chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def well(trained, wallets, tmp_path_factory):
    """Folders of a miner that is well."""
    base = tmp_path_factory.mktemp("well")
    for pair in PAIRS:
        publish(trained, base / "models", pair)
    for asset in ASSETS:
        store_bars(base / "state", asset)
    StateStore(base / "state").save("market", "venue/BTC_hf", 1, {"level": 1.0})
    Ledger(base / "state" / "ledger.sqlite3").close()
    return base


@pytest.fixture(scope="module")
def served():
    with serve_venues({asset: minutes("test") for asset in ASSETS}, HandClock()) as venues:
        yield venues


@pytest.fixture
def venues(served):
    served.faults.clear()
    return served


def operator(*flags):
    parser = ArgumentParser()
    add_operator_arguments(parser, flags)
    return operator_settings(parser.parse_args(flags))


@pytest.fixture
def site(well, venues, wallets, tmp_path):
    """A miner that is well, on a machine that is well."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    settings = Settings(
        state_dir=well / "state",
        model_dir=well / "models",
        port=free_port(),
        served_assets=ASSETS,
        **venues.urls,
    )
    flags = ("--wallet.name", "miner", "--wallet.hotkey", "hot", "--wallet.path", str(wallets))
    return Site(
        settings=settings,
        operator=operator(*flags, "--axon.port", str(free_port())),
        clock=HandClock(),
        memory_files=(tmp_path / "meminfo", tmp_path / "memory.max"),
    )


def set_up(site, **changes):
    """The site with other settings."""
    return replace(site, settings=replace(site.settings, **changes))


def complaints(site):
    """What is not well: (level, name, sentence)."""
    found = [entry for entry in preflight.examine(site) if entry.level is not Verdict.OK]
    for entry in found:
        assert entry.sentence.endswith(".")
        assert "\n" not in entry.sentence
    return [(entry.level.value, entry.name, entry.sentence) for entry in found]


def only(site, level, name):
    """The sentence of the one complaint there is."""
    ((found_level, found_name, sentence),) = complaints(site)
    assert (found_level, found_name) == (level, name)
    return sentence


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---------------------------------------------------------------- a miner that is well


def test_a_miner_that_is_well_passes_and_nothing_of_it_changes(site, well, wallets):
    before = files_below(well)
    findings = list(preflight.examine(site))
    assert [entry for entry in findings if entry.level is not Verdict.OK] == []
    assert files_below(well) == before
    assert [entry.name for entry in findings] == [
        "libraries", "calendar", "memory", "state folder", "model folder", "disk", "state files",
        "ledger", "wallet", f"port {site.operator.axon.port}", f"port {site.settings.port}",
        "models BTC hf", "models BTC lf", "models XAU lf", "bars", "clock", "feed BTC", "feed XAU",
        "feed pyth",
    ]  # fmt: skip
    said = {entry.name: entry.sentence for entry in findings}
    assert said["feed BTC"] == "binance:BTCUSDT: price 0 s old, the last candle closed 30 s ago."
    assert said["models XAU lf"] == "their training data end 0.0 days ago."
    mnemonic = orjson.loads((wallets / "miner" / "hotkeys" / "hot").read_bytes())["secretPhrase"]
    everything = " ".join(said.values())
    assert bt.Wallet("miner", "hot", str(wallets)).hotkey.ss58_address in everything
    # Single words of it are English, "price" among them; two in a row are the secret's.
    assert [pair for pair in map(" ".join, pairwise(mnemonic.split())) if pair in everything] == []


def test_a_first_start_is_told_what_will_be_made_and_does_not_fail(site, tmp_path):
    fresh = set_up(site, state_dir=tmp_path / "state", model_dir=tmp_path / "models")
    assert [(level, name) for level, name, _ in complaints(fresh)] == [
        ("warning", "models"),
        ("warning", "bars"),
    ]
    assert not (tmp_path / "state").exists()


def test_sources_that_are_no_feeds_are_opened_instead(site, archive_dir, model_dir, tmp_path):
    told = {
        entry.name: (entry.level.value, entry.sentence)
        for entry in preflight.examine(
            set_up(
                site,
                source="archive",
                archive_dir=archive_dir,
                model_dir=model_dir,
                state_dir=tmp_path,
            )
        )
    }
    assert told["source"] == ("ok", "archive has bars of BTC, XAU.")
    assert told["models BTC lf"][0] == "ok"
    assert "XAU lf" in told["models"][1]
    assert "feed BTC" not in told
    assert "clock" not in told
    missing = set_up(site, source="archive", archive_dir=tmp_path / "nowhere")
    assert ("failure", "source") in [entry[:2] for entry in complaints(missing)]


# ---------------------------------------------------------------- planted faults


@pytest.mark.parametrize(
    ("off", "level", "said"),
    [(30, "failure", "29.5 s ahead of"), (-30, "failure", "behind"), (-3, "warning", "behind")],
)
def test_a_wrong_clock_is_found(site, off, level, said):
    found = complaints(replace(site, clock=HandClock(NOW + off)))
    assert found[0][:2] == (level, "clock")
    assert said in found[0][2]
    assert "timedatectl set-ntp true" in found[0][2]


def test_one_venue_with_a_wrong_clock_is_not_ours(venues):
    assert preflight.check_clock({"binance": -40.0, "hyperliquid": 0.2}).level is Verdict.OK


class Stranger(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "somebody else"}')

    def log_message(self, format, *args):  # noqa: A002
        pass


@contextmanager
def stranger():
    server = ThreadingHTTPServer((HERE, 0), Stranger)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_port_that_another_program_holds_is_found(site):
    with stranger() as port:
        sentence = only(set_up(site, port=port), "failure", f"port {port}")
    assert f"ss -ltnp 'sport = :{port}'" in sentence
    assert "--port" in sentence


def test_a_port_whose_holder_says_nothing_is_found_in_time(site, monkeypatch):
    monkeypatch.setattr(preflight, "LOCAL_S", 0.1)
    with bind(HERE, 0) as mute:
        port = mute.getsockname()[1]
        assert "another program" in only(set_up(site, port=port), "failure", f"port {port}")


def test_pages_are_looked_for_where_they_will_be_beside_an_axon_on_their_port(site):
    port = site.operator.axon.port
    there = set_up(site, port=port)
    names = [entry.name for entry in preflight.check_ports(there.settings, there.operator)]
    assert names == [f"port {port}", f"port {page_port(there.settings, there.operator)}"]
    assert len(set(names)) == 2


@pytest.mark.parametrize("address", ["192.0.2.7", "no.such.name.invalid"])
def test_an_address_that_is_not_ours_is_found(site, address):
    sentence = only(set_up(site, host=address), "failure", f"port {site.settings.port}")
    assert "choose another address" in sentence


def test_an_axon_address_that_is_not_ours_is_what_the_miner_can_live_with(site):
    axon = replace(site.operator.axon, ip="192.0.2.7")
    there = replace(site, operator=replace(site.operator, axon=axon))
    assert "--axon.external_ip" in only(there, "warning", f"port {axon.port}")


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (Fault.REFUSE, "check the network first, else name another host with BINANCE_API_HOST"),
        (Fault.BLOCKED, "BINANCE_API_HOST"),
        (Fault.BAD_GATEWAY, "binance"),
    ],
)
def test_a_feed_that_cannot_be_reached_is_found(site, venues, fault, remedy):
    venues.faults.add(FaultRule(fault=fault, host=FeedHost.BINANCE))
    assert remedy in only(site, "failure", "feed BTC")


def test_a_venue_that_fails_as_a_whole_is_asked_once(site, venues):
    venues.faults.add(FaultRule(fault=Fault.REFUSE, host=FeedHost.BINANCE))
    before = venues.count(FeedHost.BINANCE)
    found = complaints(set_up(site, served_assets=("BTC", "ETH", "SOL")))
    assert venues.count(FeedHost.BINANCE) == before + 1
    feeds = {name: sentence for _, name, sentence in found if name.startswith("feed ")}
    assert feeds["feed ETH"] == "ETHUSDT was not asked, its host having failed; see feed BTC."
    assert feeds["feed SOL"] == "SOLUSDT was not asked, its host having failed; see feed BTC."
    assert [name for level, name, _ in found if level == "failure"] == ["feed BTC"]


def test_a_feed_that_stands_still_is_found(site, venues):
    venues.faults.add(FaultRule(fault=Fault.STALE, host=FeedHost.BINANCE))
    sentence = only(site, "failure", "feed BTC")
    assert "last candle closed 14 min ago" in sentence
    assert "look at the venue's status" in sentence


def test_a_market_with_hours_may_stand_still(site, venues):
    venues.faults.add(FaultRule(fault=Fault.STALE, host=FeedHost.HYPERLIQUID))
    assert "may be closed" in only(site, "warning", "feed XAU")


def test_a_history_feed_that_fails_is_a_warning(site, venues):
    venues.faults.add(FaultRule(fault=Fault.ERROR, host=FeedHost.PYTH_LATEST))
    assert "for history and second opinions alone" in only(site, "warning", "feed pyth")


@pytest.mark.parametrize(("free_mb", "level"), [(100, "failure"), (400, "warning")])
def test_a_disk_that_will_be_full_is_found(site, free_mb, level):
    full = replace(site, free_bytes=lambda _: free_mb * 10**6)
    sentence = only(full, level, "disk")
    assert sentence.startswith(f"{free_mb} MB are free")
    assert "free some" in sentence


@pytest.mark.parametrize("flag", ["--state-dir", "--model-dir"])
def test_a_folder_that_takes_no_files_is_found(flag, tmp_path):
    (tmp_path / "file").touch()
    for place in (Path("/proc"), tmp_path / "file", tmp_path / "file" / "below"):
        found = preflight.check_folder(place, flag)
        assert found.level is Verdict.FAILURE
        assert flag in found.sentence


@contextmanager
def somebody_else():
    """Without root's rights, if the tests have them."""
    if os.geteuid():
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_entries_that_are_closed_to_this_user_are_found():
    with TemporaryDirectory() as name:  # pytest's own are closed to everybody else
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "bars").mkdir()
        (folder / "bars" / "day").touch(mode=0)
        with somebody_else():
            found = preflight.check_folder(folder, "--state-dir")
    assert found.level is Verdict.FAILURE
    assert "closed to this user" in found.sentence
    assert "chown" in found.sentence


def test_of_a_free_port_is_said_what_was_tried(site):
    axon, pages = preflight.check_ports(site.settings, site.operator)
    assert axon.sentence.endswith(
        "is free, and this machine can connect to it; whether validators can, through firewalls "
        "and routers, is not tested here."
    )
    assert pages.sentence.endswith("is free, and this machine can connect to it.")


@pytest.mark.parametrize(("mode", "what"), [(0o777, "change"), (0o755, "read"), (0o710, "read")])
def test_a_folder_that_others_may_enter_is_found(tmp_path, mode, what):
    tmp_path.chmod(mode)
    found = preflight.check_folder(tmp_path, "--state-dir")
    assert (found.level, found.sentence) == (
        Verdict.WARNING,
        f"others may {what} {tmp_path}; run `chmod -R go-rwx {tmp_path}`.",
    )


def test_a_missing_wallet_is_found(site):
    axon = replace(site.operator.axon, wallet_hotkey="cold")
    sentence = only(replace(site, operator=replace(site.operator, axon=axon)), "failure", "wallet")
    assert "btcli wallet new_hotkey" in sentence


def test_a_hotkey_that_others_may_use_is_found(site, wallets):
    path = wallets / "miner" / "hotkeys" / "hot"
    path.chmod(0o644)
    try:
        assert f"chmod 600 {path}" in only(site, "warning", "wallet")
    finally:
        path.chmod(0o600)


@pytest.mark.parametrize(
    ("frequency", "days", "level"),
    [
        (Frequency.HF, 1.4, None),
        (Frequency.HF, 2, "warning"),
        (Frequency.LF, 4, None),
        (Frequency.LF, 6, "warning"),
        (Frequency.HF, 11, "failure"),
        (Frequency.LF, 31, "failure"),
    ],
)
def test_models_that_nobody_trains_any_more_are_found(
    site, trained, tmp_path, frequency, days, level
):
    for pair in PAIRS:
        until = NOW - (int(days * DAY_S) if pair == ("BTC", frequency) else 0)
        publish(trained, tmp_path / "models", pair, trained_until=until)
    stale = set_up(site, model_dir=tmp_path / "models")
    if level is None:
        assert complaints(stale) == []
        return
    sentence = only(stale, level, f"models BTC {frequency.value}")
    every = Settings().retrain_days(frequency)
    assert f"end {days}.0 days ago, and every {every} days" in sentence
    assert f"python train_models.py --asset BTC --{frequency.value}-only" in sentence


def test_models_of_another_source_and_damaged_ones_are_found(site, trained, tmp_path):
    for pair in PAIRS[:2]:
        publish(trained, tmp_path / "models", pair, source="archive")
    publish(trained, tmp_path / "models", PAIRS[2])
    (folder, *_) = published_sets(tmp_path / "models", *PAIRS[2])
    (folder / "scale.txt").write_text("nonsense")
    found = complaints(set_up(site, model_dir=tmp_path / "models"))
    assert [entry[:2] for entry in found] == [
        ("failure", "models BTC hf"),
        ("failure", "models BTC lf"),
        ("failure", "models XAU lf"),
    ]
    assert "trained on source archive" in found[0][2]
    assert "train the set again" in found[2][2]


def copied_state(site, well, tmp_path):
    """A copy of the state that may be damaged."""
    subprocess.run(["cp", "-r", well / "state", tmp_path / "state"], check=True)
    return set_up(site, state_dir=tmp_path / "state")


def test_a_damaged_state_file_is_found_and_left_in_place(site, well, tmp_path):
    damaged = copied_state(site, well, tmp_path)
    path = StateStore(tmp_path / "state").path("market", "venue/BTC_hf")
    path.write_bytes(path.read_bytes()[:-9])
    (level, name, sentence), bars = complaints(damaged)
    assert (level, name) == ("failure", "state files")
    assert "BTC_hf.msgpack is truncated" in sentence
    assert "backup" in sentence
    assert bars[:2] == ("warning", "bars")
    assert path.exists()


def test_files_that_were_set_aside_are_remembered(site, well, tmp_path):
    once = copied_state(site, well, tmp_path)
    store = StateStore(tmp_path / "state")
    store.set_aside("market", "venue/BTC_hf", "was bad")
    sentence = only(once, "warning", "state files")
    assert "BTC_hf.msgpack.damaged-" in sentence
    assert "then delete them" in sentence


def test_a_damaged_ledger_is_found(site, well, tmp_path):
    damaged = copied_state(site, well, tmp_path)
    (tmp_path / "state" / "ledger.sqlite3").write_bytes(b"SQLite format 3\0" + bytes(4096))
    assert "backup" in only(damaged, "failure", "ledger")


def test_the_ledger_of_a_running_miner_can_be_read(site, well, tmp_path):
    running = copied_state(site, well, tmp_path)
    with Ledger(tmp_path / "state" / "ledger.sqlite3") as book:
        book.prune(NOW)  # opens it
        assert (tmp_path / "state" / "ledger.sqlite3-wal").exists()
        assert complaints(running) == []


def test_gaps_and_old_bars_are_found(site, tmp_path):
    rows = np.arange(MINUTES)
    store_bars(tmp_path / "state", "BTC", CLOSED & ((rows < 6000) | (rows >= 6030)))
    store_bars(tmp_path / "state", "XAU", rows < MINUTES - 2000)
    sentence = only(set_up(site, state_dir=tmp_path / "state"), "warning", "bars")
    assert "the newest are old (XAU 33 h)" in sentence
    assert "gaps (BTC 30 min)" in sentence


def test_bars_ahead_of_the_clock_are_found(site, well, tmp_path):
    early = replace(copied_state(site, well, tmp_path), clock=HandClock(NOW - 3 * 3600))
    (sentence,) = [said for _, name, said in complaints(early) if name == "bars"]
    assert "the newest are ahead of the clock, which may be wrong (BTC 2" in sentence


def test_an_expired_calendar_is_found(site, tmp_path):
    text = (ROOT / "scheduled_events.toml").read_text()
    file = tmp_path / "calendar.toml"
    file.write_text(re.sub(r"^expires = .*$", "expires = 2025-12-01", text, flags=re.MULTILINE))
    sentence = only(replace(site, calendar=file), "warning", "calendar")
    assert "the dates of fomc in calendar.toml ended" in sentence
    assert "add the next ones" in sentence


@pytest.mark.parametrize(
    ("free_kb", "limit", "level"),
    [
        (100_000, None, "failure"),
        (1_500_000, None, "warning"),
        (8_000_000, "max\n", None),
        (8_000_000, "500000000\n", "failure"),
    ],
)
def test_too_little_memory_is_found(site, free_kb, limit, level):
    meminfo, cgroup = site.memory_files
    meminfo.write_text(f"MemTotal: 9000000 kB\nMemAvailable: {free_kb} kB\n")
    if limit is not None:
        cgroup.write_text(limit)
    if level is None:
        assert complaints(site) == []
    else:
        assert "add memory" in only(site, level, "memory")


def test_libraries_that_miss_their_pins_are_found(site, tmp_path):
    pins = "numpy>=1.26\nscipy>=99  # from the future\nno-such-library==1\n-r other.txt\n"
    (tmp_path / "requirements.txt").write_text(pins)
    (tmp_path / "requirements-axon.txt").write_text("bittensor==1.0\n")
    sentence = only(replace(site, requirements=tmp_path), "failure", "libraries")
    assert "no-such-library is not installed" in sentence
    assert re.search(r"scipy is \S+ and should be >=99", sentence)
    assert "bittensor is 10.0.1 and should be ==1.0" in sentence
    assert "pip install -r requirements.txt -r requirements-axon.txt" in sentence
    assert "numpy" not in sentence


# ---------------------------------------------------------------- a miner that runs already


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("running")
    source = SimulatedSource(days=3, assets=("BTC",))
    settings = Settings(source="simulated", state_dir=folder, model_dir=folder)
    engine = ForecastEngine.open(source, settings)
    opened = AnswerDesk(engine)
    yield opened, engine
    opened.close()


@contextmanager
def running_miner(desk, state_dir, warnings=()):
    """The miner's own web application."""
    opened, engine = desk
    facts = EngineFacts(
        engine, source="simulated", extra=lambda told: replace(told, warnings=warnings)
    )
    page = StatusPage(facts, opened.load, RecentRequests(), RecentLog())
    metrics = Metrics(facts.facts, opened.load)
    mark = folder_mark(state_dir)
    app = build_app(opened, now=engine.now, facts=facts, metrics=metrics, page=page, mark=mark)
    listener, server = bind(HERE, 0), server_for(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


def test_our_own_miner_on_the_port_is_no_fault(site, desk):
    with running_miner(desk, site.settings.state_dir) as port:
        assert complaints(set_up(site, port=port)) == []


def test_another_miner_on_the_port_is_found(site, desk, tmp_path):
    with running_miner(desk, tmp_path) as port:
        there = set_up(site, port=port)
        assert "choose another port with --port" in only(there, "failure", f"port {port}")
        fresh = set_up(there, state_dir=tmp_path / "not_made_yet")
        findings = {entry.name: entry for entry in preflight.examine(fresh)}
        assert "another miner" in findings[f"port {port}"].sentence


def test_our_own_miner_says_what_is_wrong_with_it(site, desk):
    warnings = ("XAU has no bars",)
    with running_miner(desk, site.settings.state_dir, warnings) as port:
        sentence = only(set_up(site, port=port), "warning", f"port {port}")
    assert "says degraded: XAU has no bars; see its status page" in sentence


@contextmanager
def running_axon(site, desk):
    """The site, its axon's port that of an axon that runs."""
    opened, engine = desk
    axon = replace(site.operator.axon, ip=HERE, port=0, external_ip=HERE)
    server = AxonServer(axon)
    try:
        server.start(opened, chain=StaticChain(), policy=CallerPolicy(), now=engine.now)
        there = replace(site.operator, axon=replace(axon, port=server.port))
        yield replace(site, operator=there)
    finally:
        server.stop()


def test_our_own_axon_on_the_port_is_no_fault(site, desk):
    state_dir = site.settings.state_dir
    with running_axon(site, desk) as there, running_miner(desk, state_dir) as port:
        assert complaints(set_up(there, port=port)) == []


def test_another_miners_axon_on_the_port_is_found(site, desk, tmp_path):
    with running_axon(site, desk) as there, running_miner(desk, tmp_path) as port:
        axon = f"port {there.operator.axon.port}"
        assert "choose another port with --axon.port" in only(there, "failure", axon)
        found = complaints(set_up(there, port=port))
        assert [entry[:2] for entry in found] == [("failure", axon), ("failure", f"port {port}")]


# ---------------------------------------------------------------- checks that fail themselves


def test_a_check_that_breaks_is_a_failure_line_and_a_traceback_in_the_log(site, caplog):
    def broken(_):
        raise ZeroDivisionError("a bug")

    caplog.set_level(logging.ERROR)
    assert "ZeroDivisionError" in only(replace(site, free_bytes=broken), "failure", "disk")
    assert caplog.records[0].exc_info is not None


def test_an_expected_failure_in_a_check_is_its_sentence(site, caplog):
    def refused(_):
        raise StateError("the disk is away; mount it.")

    assert only(replace(site, free_bytes=refused), "failure", "disk") == (
        "the disk is away; mount it."
    )
    assert caplog.records == []


# ---------------------------------------------------------------- the command


def preflight_of(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "test_miner.py"), "--preflight", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_a_line_for_each_finding_and_fails_if_one_does(tmp_path):
    dead = f"http://{HERE}:{free_port()}"
    urls = [f'{host.value}_url = "{dead}"' for host in FeedHost]
    (tmp_path / "miner.toml").write_text("\n".join(urls))
    with stranger() as port:
        done = preflight_of("--asset", "BTC", "--source", "venue", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == ""
    *lines, summary = done.stdout.splitlines()
    levels = [line.split()[0] for line in lines]
    assert set(levels) <= {"ok", "warning", "failure"}
    assert summary == ", ".join(
        f"{levels.count(level)} {level}" for level in ("ok", "warning", "failure")
    )
    assert any(re.match(rf"failure  port {port} +another program", line) for line in lines)
    assert any(line.startswith("failure  feed BTC") for line in lines)


def test_the_command_succeeds_where_nothing_fails(archive_dir, model_dir):
    flags = ("--source", "archive", "--archive-dir", str(archive_dir))
    done = preflight_of(*flags, "--model-dir", str(model_dir), "--port", "0", "--netuid", "50")
    assert done.returncode == 0, done.stdout
    assert done.stderr == "these flags have no effect here: --netuid.\n"


def test_a_published_set_in_anothers_name_is_whole(trained, tmp_path):
    """The tests above stand on it."""
    publish(trained, tmp_path, ("XAU", Frequency.LF))
    (folder, *_) = published_sets(tmp_path, "XAU", Frequency.LF)
    assert load_model_set(folder).asset == "XAU"
