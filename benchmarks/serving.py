"""What the running miner costs with all assets: its start, its memory, a minute of upkeep.

    python -m benchmarks.serving --source simulated --model-dir models

The real `miner.py` runs against simulated venues on loopback, with 62 days of bars of
every asset and the states of a life before on the disk. The models of the one asset that
was trained stand in for those of all: they take as long to load and to run. The start is
timed by the wall clock, as validators feel it; upkeep in CPU seconds of the process,
nobody asking.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import orjson
import requests

from bar_cleaning import bars_from_minutes
from bar_store import BarStore
from benchmarks.measuring import Row, bench_parser, finish
from clock import RehearsalClock
from collector import scored_series
from config import FeedPlan, Frequency, Settings, feed_plans, protocol_profile
from console import run_script, settings_from
from domain import Bars
from errors import MinerError
from loopback_venues import serve_venues
from market_view import Rung
from model_store import MANIFEST, SEAL, publish_set, published_sets, seal_manifest
from rehearsal_plan import Pair, asked_pairs, read_answer, request_body, usual_request
from rehearsed_miner import RehearsedMiner, write_config
from simulated_market import simulate_bars
from wire_format import format_iso

SOURCE: Final = "venue"
DAYS: Final = 62  # of bars, as many as the miner keeps in memory
NOW: Final = 1_768_500_020  # Thursday 2026-01-15, 18:00:20 UTC: all markets are open
SPARE_S: Final = 3600  # of bars that are still to come
STARTS: Final = 3
START_REACH_S: Final = 3.0
MEMORY_REACH_MB: Final = 400.0
UPKEEP_REACH_S: Final = 1.0
SETTLE_S: Final = 60  # after the start, while everything is taken up
UPKEEP_MINUTES: Final = 3
PATIENCE_S: Final = 120


def main() -> int:
    """Build the folders, run the miner, print the rows."""
    args = bench_parser(
        "Time start and upkeep of the miner with all assets.", "serving"
    ).parse_args()
    settings = settings_from(args)
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
            rows = _measure(config, clock, site)
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
            store.append(series.feed.venue.value, asset, replace(kept, feed=series.feed.name))


def _lend_models(settings: Settings, asset: str, model_dir: Path) -> None:
    """The sets of the asset for every pair, as if they had been trained just now."""
    files = {frequency: _set_of(settings, asset, frequency) for frequency in Frequency}
    for name, frequency in _pairs():
        publish_set(model_dir, name, frequency, "lent", files[frequency])


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
        _first_answer_s(miner, clock)
        _wait_for_all(miner)
    starts, cpu = [], []
    for _ in range(STARTS):
        with _life(config, site) as miner:
            starts.append(_first_answer_s(miner, clock))
            cpu.append(_cpu_s(miner.pid))
    with _life(config, site) as miner:
        _first_answer_s(miner, clock)
        first_mb = _peak_mb(miner.pid)
        _wait_for_all(miner)
        for pair in _pairs():
            _ask(miner, pair, clock)
        asked_mb = _peak_mb(miner.pid)
        time.sleep(SETTLE_S)
        upkeep = [_upkeep_s(miner) for _ in range(UPKEEP_MINUTES)]
        later_mb = _peak_mb(miner.pid)
    return [
        _row(
            "start, all assets",
            "s to the first answer",
            starts,
            START_REACH_S,
            detail=f"{np.median(cpu):.2f} CPU s",
        ),
        _row(
            "memory, all assets asked",
            "MB at most",
            [asked_mb],
            MEMORY_REACH_MB,
            detail=f"{first_mb:.0f} at the first answer, {later_mb:.0f} after minutes of upkeep",
        ),
        _row("upkeep, all assets", "CPU s a minute", upkeep, UPKEEP_REACH_S),
    ]


def _row(what: str, unit: str, values: list[float], reach: float, detail: str = "") -> Row:
    return Row(
        what=what,
        against=unit,
        value=float(np.median(values)),
        low=min(values),
        high=max(values),
        reach=reach,
        at_least=False,
        detail=detail,
    )


@contextmanager
def _life(config: Path, site: Path) -> Iterator[RehearsedMiner]:
    miner = RehearsedMiner(config, site / "miner.log", SOURCE)
    try:
        miner.start()
        yield miner
    finally:
        miner.stop()
        miner.end()


def _first_answer_s(miner: RehearsedMiner, clock: RehearsalClock) -> float:
    """Wall seconds from the start of the process to its first answer, to the first pair."""
    miner.wait_until_serving()
    _ask(miner, _pairs()[0], clock)
    return time.monotonic() - miner.began


def _ask(miner: RehearsedMiner, pair: Pair, clock: RehearsalClock) -> None:
    """The usual prompt for the minute after next. Raises: MinerError for a refusal."""
    request = usual_request(*pair, int(clock.now()) // 60 * 60 + 120)
    body = request_body(request) | {"prompt_start_time": format_iso(request.start_ts)}
    answer = requests.post(f"{miner.url}/predict", json=body, timeout=PATIENCE_S)
    reading = read_answer(answer.content, request)
    if reading.fault or reading.rung != Rung.LIGHTGBM:
        raise MinerError(
            f"the answer for {pair[0]} {pair[1].value} counts for nothing here: "
            f"{reading.fault or reading.rung} ({answer.status_code})."
        )


def _wait_for_all(miner: RehearsedMiner) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while set((miner.health() or {}).get("assets", ())) < set(_plans()):
        if time.monotonic() > deadline:
            raise MinerError(f"not all assets were taken up within {PATIENCE_S} s.")
        time.sleep(0.2)


def _upkeep_s(miner: RehearsedMiner) -> float:
    before = _cpu_s(miner.pid)
    time.sleep(60)
    return _cpu_s(miner.pid) - before


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, its children's not."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _peak_mb(pid: int) -> float:
    """The most resident memory that a process ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) / 1024


if __name__ == "__main__":
    run_script(main)
