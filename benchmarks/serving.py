"""What the running miner costs with all assets: its start, its memory, a minute of upkeep.

    python -m benchmarks.serving --source simulated --model-dir models

The real `miner.py` runs against simulated venues on loopback, with 62 days of bars of
every asset and the states of a life before on the disk. The models of the one asset that
was trained stand in for those of all: they take as long to load and to run, for every set
has a path shape of its own, whose tables are made anew. The start is timed by the wall
clock, as validators feel it, to first answers that hold number by number: over HTTP, and
to a dendrite at the axon, which has bittensor to import before it answers. Upkeep is CPU
seconds of the process, nobody asking, while a bar a minute is stored for every asset.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import orjson
import requests

from axon_adapter import Simulation, SimulationInput, bt
from bar_cleaning import bars_from_minutes
from bar_store import BarStore
from benchmarks.measuring import Row, bench_parser, bench_settings, finish, plain_row
from clock import RehearsalClock
from collector import scored_series
from config import NUM_PATHS, Frequency
from console import run_script
from domain import Bars, ForecastRequest
from errors import InvalidAnswer, MinerError
from feed_plans import FeedPlan, feed_plans
from lgbm_predictor import CALIBRATION
from loopback_venues import serve_venues
from market_view import Rung
from model_store import MANIFEST, SEAL, digest, publish_set, published_sets, seal_manifest
from protocol import protocol_profile
from rehearsal_plan import Pair, asked_pairs, read_answer, request_body, usual_request
from rehearsed_miner import RehearsedMiner, write_config
from settings import Settings
from simulated_market import simulate_bars
from wire_format import format_iso, validate_answer

SOURCE: Final = "venue"
DAYS: Final = 62  # of bars, as many as the miner keeps in memory
NOW: Final = 1_768_500_020  # Thursday 2026-01-15, 18:00:20 UTC: all markets are open
SPARE_S: Final = 3600  # of bars that are still to come
STARTS: Final = 3
ANY_WAY_S: Final = 0.02  # between two tries at an axon that is not there yet
START_REACH_S: Final = 3.0
MEMORY_REACH_MB: Final = 400.0
UPKEEP_REACH_S: Final = 1.0
SETTLE_MINUTES: Final = 10  # at most, while the past is fetched and everything taken up
UPKEEP_MINUTES: Final = 3
PATIENCE_S: Final = 120
HERE: Final = "127.0.0.1"


def main() -> int:
    """Build the folders, run the miner, print the rows."""
    args = bench_parser(
        "Time start and upkeep of the miner with all assets.", "serving"
    ).parse_args()
    settings = bench_settings(args)
    with TemporaryDirectory() as name:
        site = Path(name)
        clock = RehearsalClock(start=NOW, origin=time.time(), speed=1.0)
        bars = {
            asset: simulate_bars(asset, end_ts=NOW + SPARE_S, days=DAYS, seed=settings.seed)
            for asset in _plans()
        }
        _store_bars(site / "state", bars)
        _lend_models(settings, args.asset, site / "models")
        with serve_venues(bars, clock) as venues:
            config = _write_settings(site, clock, venues.urls)
            rows = [*_measure(config, clock, site), _axon_start(config, clock, site)]
    return finish("Serving", rows, args.rows)


def _plans() -> Mapping[str, FeedPlan]:
    return feed_plans(SOURCE, protocol_profile(Settings().profile))


def _pairs() -> list[Pair]:
    return asked_pairs(protocol_profile(Settings().profile), list(_plans()))


# ---------------------------------------------------------------- what is on the disk


def _store_bars(state_dir: Path, bars: Mapping[str, Bars]) -> None:
    """What the collector would have stored by now, of the feeds that are scored."""
    store = BarStore(state_dir)
    for asset, plan in _plans().items():
        for series in scored_series(plan):
            known = bars[asset].between(None, NOW // 60 * 60)
            if series.bar_s != known.bar_s:
                known = bars_from_minutes(known, bar_s=series.bar_s)
            kept = known.between(series.oldest(NOW, DAYS), None)
            # Of a past that was fetched whole: else its back-fill holds up what is measured.
            store.append(
                series.feed.venue.value,
                asset,
                replace(kept, feed=series.feed.name),
                checked=(series.oldest(NOW, DAYS), NOW // series.bar_s * series.bar_s),
            )


def _lend_models(settings: Settings, asset: str, model_dir: Path) -> None:
    """The sets of the asset for every pair, as if they had been trained just now."""
    files = {frequency: _set_of(settings, asset, frequency) for frequency in Frequency}
    for number, (name, frequency) in enumerate(_pairs()):
        own = _with_own_shape(files[frequency], number)
        publish_set(model_dir, name, frequency, "lent", own)


def _set_of(settings: Settings, asset: str, frequency: Frequency) -> dict[str, bytes]:
    folders = published_sets(settings.model_dir, asset, frequency)
    if not folders:
        raise MinerError(
            f"{settings.model_dir} has no {frequency.value} models of {asset}; train them first."
        )
    files = {path.name: path.read_bytes() for path in folders[0].iterdir()}
    manifest = orjson.loads(files[MANIFEST])
    del manifest[SEAL]
    files[MANIFEST] = seal_manifest({**manifest, "source": SOURCE, "trained_until": NOW})
    return files


def _with_own_shape(files: Mapping[str, bytes], number: int) -> dict[str, bytes]:
    """The set with paths a little different: a miner keeps tables once for equal shapes."""
    calibration, manifest = orjson.loads(files[CALIBRATION]), orjson.loads(files[MANIFEST])
    shape = calibration["path_shape"]
    shape["path_sd"] += 1e-3 * number
    changed = orjson.dumps(calibration)
    manifest["path_shape"] = shape
    manifest["files"][CALIBRATION] = digest(changed)
    del manifest[SEAL]
    return {**files, CALIBRATION: changed, MANIFEST: seal_manifest(manifest)}


def _write_settings(site: Path, clock: RehearsalClock, urls: Mapping[str, str]) -> Path:
    values = {
        "state_dir": str(site / "state"),
        "model_dir": str(site / "models"),
        "days": DAYS,
        "rehearsal": str(clock),
        "port": 0,
        **urls,
    }
    file = site / "miner.toml"
    write_config(file, values)
    return file


# ---------------------------------------------------------------- what is measured


def _measure(config: Path, clock: RehearsalClock, site: Path) -> list[Row]:
    with _life(config, site) as miner:  # leaves the states that a restart finds
        _first_answers_s(miner, clock)
        _wait_for_all(miner)
    starts, cpu = [], []
    for _ in range(STARTS):
        with _life(config, site) as miner:
            starts.append(_first_answers_s(miner, clock))
            cpu.append(_cpu_s(miner.pid))
    return [*_start_rows(starts, cpu), *_long_life(config, clock, site)]


def _start_rows(starts: Sequence[Mapping[Frequency, float]], cpu: Sequence[float]) -> list[Row]:
    return [
        plain_row(
            f"start to the first {frequency.value.upper()} answer",
            "seconds",
            [start[frequency] for start in starts],
            reach=START_REACH_S,
            detail=f"{np.median(cpu):.2f} CPU s to both",
        )
        for frequency in starts[0]
    ]


def _long_life(config: Path, clock: RehearsalClock, site: Path) -> list[Row]:
    with _life(config, site) as miner:
        _first_answers_s(miner, clock)
        first_mb = _peak_mb(miner.pid)
        _wait_for_all(miner)
        for pair in _pairs():
            _check(*_ask(miner, pair, clock))
        asked_mb = _peak_mb(miner.pid)
        _settle(clock, site / "state")
        upkeep = [_upkeep_s(miner, site / "state") for _ in range(UPKEEP_MINUTES)]
        later_mb = _peak_mb(miner.pid)
    return [
        plain_row(
            "memory, all assets asked",
            "MB",
            [asked_mb],
            reach=MEMORY_REACH_MB,
            detail=f"{first_mb:.0f} at the first answers, {later_mb:.0f} after minutes of upkeep",
        ),
        plain_row("a minute of upkeep", "CPU s", upkeep, reach=UPKEEP_REACH_S),
    ]


@contextmanager
def _life(config: Path, site: Path, flags: Sequence[str] = ()) -> Iterator[RehearsedMiner]:
    miner = RehearsedMiner(config, site / "miner.log", SOURCE, flags)
    try:
        miner.start()
        yield miner
    finally:
        miner.stop()
        miner.end()


def _first_answers_s(miner: RehearsedMiner, clock: RehearsalClock) -> dict[Frequency, float]:
    """Wall seconds from the start of the process to answers of both kinds, one after the other."""
    miner.wait_until_serving()
    seconds, answers = {}, []
    for pair in _first_pairs():
        answers.append(_ask(miner, pair, clock))
        seconds[pair[1]] = time.monotonic() - miner.began
    for answer in answers:  # a judge takes a second for a day
        _check(*answer, thoroughly=True)
    return seconds


def _first_pairs() -> list[Pair]:
    """Both kinds of prompt for the first asset that has both, HF first."""
    pairs = _pairs()
    asset = next(asset for asset, frequency in pairs if (asset, Frequency.LF) in pairs)
    return [(asset, frequency) for frequency in (Frequency.HF, Frequency.LF)]


def _request(pair: Pair, clock: RehearsalClock) -> ForecastRequest:
    """The usual prompt for the minute after next."""
    return usual_request(*pair, int(clock.now()) // 60 * 60 + 120)


def _ask(
    miner: RehearsedMiner, pair: Pair, clock: RehearsalClock
) -> tuple[ForecastRequest, requests.Response]:
    request = _request(pair, clock)
    body = request_body(request) | {"prompt_start_time": format_iso(request.start_ts)}
    return request, requests.post(f"{miner.url}/predict", json=body, timeout=PATIENCE_S)


def _check(
    request: ForecastRequest, answer: requests.Response, *, thoroughly: bool = False
) -> None:
    """Raises: MinerError for a refusal, or an answer that no validator would score."""
    reading = read_answer(answer.content, request, thoroughly=thoroughly)
    if reading.fault or reading.rung != Rung.LIGHTGBM:
        raise MinerError(
            f"an answer for {request.asset} counts for nothing here: "
            f"{reading.fault or reading.rung} ({answer.status_code})."
        )


def _wait_for_all(miner: RehearsedMiner) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while set((miner.health() or {}).get("assets", ())) < set(_plans()):
        if time.monotonic() > deadline:
            raise MinerError(f"not all assets were taken up within {PATIENCE_S} s.")
        time.sleep(0.2)


def _settle(clock: RehearsalClock, state_dir: Path) -> None:
    """Until half past a minute at which every asset has all its bars: they come early in one."""
    for _ in range(SETTLE_MINUTES):
        time.sleep((30 - clock.now()) % 60 or 60)
        closed = int(clock.now()) // 60 - NOW // 60
        if set(_bars_stored(state_dir).values()) == {closed}:
            return
    raise MinerError(f"bars did not arrive minute by minute within {SETTLE_MINUTES} minutes.")


def _upkeep_s(miner: RehearsedMiner, state_dir: Path) -> float:
    """CPU of a minute. Raises: MinerError if not every asset got its bar meanwhile."""
    before, bars = _cpu_s(miner.pid), _bars_stored(state_dir)
    time.sleep(60)
    spent = _cpu_s(miner.pid) - before
    later = _bars_stored(state_dir)
    if without := [asset for asset in bars if later[asset] != bars[asset] + 1]:
        raise MinerError(
            f"no bar or several were stored in a minute for {', '.join(without)}: "
            "what was measured is not a minute of upkeep."
        )
    return spent


def _bars_stored(state_dir: Path) -> dict[str, int]:
    """Minutes of the scored feed since the benchmark's beginning, by asset."""
    store = BarStore(state_dir)
    counts = {}
    for asset, plan in _plans().items():
        series = scored_series(plan)[0]
        found = store.load(series.feed.venue.value, asset, series.bar_s, start=NOW // 60 * 60)
        counts[asset] = 0 if found is None else len(found)
    return counts


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, its children's not."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _peak_mb(pid: int) -> float:
    """The most resident memory that a process ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) / 1024


# ---------------------------------------------------------------- at the axon


def _axon_start(config: Path, clock: RehearsalClock, site: Path) -> Row:
    """From the start of the process to a dendrite's first answers, as validators ask."""
    wallet = bt.Wallet(name="bench", hotkey="bench", path=str(site / "wallets"))
    wallet.create_new_coldkey(use_password=False, overwrite=True, suppress=True)
    wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
    bt.utils.networking.get_external_ip = lambda: HERE  # dendrites look theirs up
    importing = _importing_s()
    seconds = [
        asyncio.run(_axon_answer_s(wallet, config, clock, site, pair))
        for _ in range(STARTS)
        for pair in _first_pairs()
    ]
    row = plain_row(
        "start to a dendrite's answer",
        "seconds",
        seconds,
        reach=START_REACH_S,
        detail=f"importing bittensor alone: {importing:.1f} s",
    )
    ours = row.value - importing
    if ours > START_REACH_S:
        return row
    return replace(row, limit=f"{importing:.1f} s to import bittensor, {ours:.1f} s beside it")


def _importing_s() -> float:
    """Wall seconds of a process that imports bittensor and what it needs, nothing else."""
    environment = {**os.environ, "BT_NO_PARSE_CLI_ARGS": "1"}
    command = [sys.executable, "-c", "import bittensor"]
    seconds = []
    for _ in range(STARTS):
        begun = time.monotonic()
        subprocess.run(command, env=environment, check=True)  # noqa: S603  # our own command
        seconds.append(time.monotonic() - begun)
    return float(np.median(seconds))


async def _axon_answer_s(
    wallet: Any, config: Path, clock: RehearsalClock, site: Path, pair: Pair
) -> float:
    port = _free_port()
    flags = _axon_flags(wallet, site, port)
    target = bt.AxonInfo(
        version=1,
        ip=HERE,
        port=port,
        ip_type=4,
        hotkey=wallet.hotkey.ss58_address,
        coldkey=wallet.coldkeypub.ss58_address,
    )
    with _life(config, site, flags) as miner:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            request = _request(pair, clock)
            async with bt.Dendrite(wallet=wallet) as dendrite:
                answer = await dendrite.forward(
                    target, _simulation(request), timeout=PATIENCE_S, deserialize=False
                )
            if answer.dendrite.status_code == 200:
                seconds = time.monotonic() - miner.began
                _check_synapse(answer, request)
                return seconds
            await asyncio.sleep(ANY_WAY_S)
    raise MinerError(
        f"the axon did not answer within {PATIENCE_S} s: {answer.dendrite.status_message}."
    )


def _axon_flags(wallet: Any, site: Path, port: int) -> list[str]:
    return [
        f"--wallet.path={site / 'wallets'}",
        f"--wallet.name={wallet.name}",
        f"--wallet.hotkey={wallet.hotkey_str}",
        f"--axon.ip={HERE}",
        f"--axon.external_ip={HERE}",
        f"--axon.port={port}",
        "--chain=static",
        f"--whitelist.hotkeys={wallet.hotkey.ss58_address}",
    ]


def _simulation(request: ForecastRequest) -> Any:
    asked = SimulationInput(
        asset=request.asset,
        start_time=format_iso(request.start_ts),
        time_increment=request.increment_s,
        time_length=request.length_s,
        num_simulations=NUM_PATHS,
    )
    return Simulation(simulation_input=asked)


def _check_synapse(answer: Any, request: ForecastRequest) -> None:
    try:
        validate_answer(answer.simulation_output, request)
    except InvalidAnswer as error:
        raise MinerError(f"the axon's answer for {request.asset}: {error}") from None


def _free_port() -> int:
    with socket.create_server((HERE, 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    run_script(main)
