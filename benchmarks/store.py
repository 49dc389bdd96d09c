"""What a year of collected one-minute bars costs: disk, appends, a live engine's memory.

    python -m benchmarks.store
    python -m benchmarks.store --assets 2 --days 60

Random walks with all columns are written into a temporary folder as the collector
would, then each further minute is appended and read by a live engine that keeps its
usual days in memory. Nothing else on the machine is touched, and no other source read.
"""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from bar_store import BarStore
from benchmarks.measuring import Row, bench_parser, finish, plain_row
from config import DAY_S
from console import run_script, table
from data_fetcher import LiveSource
from domain import Bars, Candles, ForecastRequest
from feed_plans import FeedPlan, feed_plans
from forecast_engine import ForecastEngine
from protocol import protocol_profile
from settings import Settings

END: Final = 1_765_756_800  # 2025-12-15, midnight UTC
APPENDS: Final = 60
BYTES_REACH: Final = 40.0  # a bar: 270 MB for a year of 13 assets
APPEND_REACH_MS: Final = 20.0  # waiting for the disk included


@dataclass
class _Clock:
    time: float

    def now(self) -> float:
        return self.time


def main() -> int:
    """Write, append, read and answer; print what each costs."""
    options = bench_parser(
        "Measure the store of collected bars and a live engine over it.", "store"
    )
    options.add_argument("--assets", type=int, default=13, help="how many (default: 13)")
    options.add_argument("--days", type=int, default=365, help="of history (default: 365)")
    args = options.parse_args()
    plans = list(feed_plans("venue", protocol_profile("2026-09")).values())[: args.assets]
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(Path(folder), plans, args.days)
    return finish("The store", rows, args.rows)


def _measure(folder: Path, plans: list[FeedPlan], days: int) -> list[Row]:
    store = BarStore(folder)
    started = perf_counter()
    for number, plan in enumerate(plans):
        span = (END - days * DAY_S, END)
        candles = _candles(plan, *span, seed=number)
        store.append(plan.scored.venue.value, plan.asset, candles, checked=span)
    wrote_s = perf_counter() - started
    stored = sum(path.stat().st_size for path in folder.rglob("*.msgpack"))
    appends = [_append_ms(store, plans, days_in, days) for days_in in (0, 1)]
    # In a process of its own: this one has held a year of bars.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        live = pool.submit(_live_rows, folder, len(plans)).result()
    table("A live engine over the store", ("what", "cost"), live)
    what = f"{len(plans)} assets, {days} days"
    return [
        plain_row(
            "bars on the disk",
            "bytes a bar",
            [stored / (len(plans) * days * 1440)],
            reach=BYTES_REACH,
            detail=f"{what}: {stored / 1e6:.0f} MB, written in {wrote_s:.0f} s",
        ),
        plain_row(
            "storing a closed minute",
            "ms an asset",
            appends,
            reach=APPEND_REACH_MS,
            detail="of a day that begins, and of one that is nearly full",
        ),
    ]


def _live_rows(folder: Path, n_assets: int) -> list[tuple[str, str]]:
    """What a live engine over the stored bars costs."""
    plans = list(feed_plans("venue", protocol_profile("2026-09")).values())[:n_assets]
    clock = _Clock(END + APPENDS * 60)
    settings = Settings(state_dir=folder, model_dir=folder / "models")
    before = _memory_mb("VmRSS")
    started = perf_counter()
    engine = ForecastEngine.open(LiveSource(settings, clock), settings)
    opened_s = perf_counter() - started
    refresh_ms, answer_ms = _live_ms(engine, BarStore(folder), plans, clock)
    return [
        ("engine opened in", f"{opened_s:.1f} s"),
        ("refresh after a minute of all assets", f"{refresh_ms:.0f} ms"),
        ("LF answer after it", f"{answer_ms:.0f} ms"),
        ("memory without it, with it", f"{before:.0f} MB, {_memory_mb('VmRSS'):.0f} MB"),
        ("at its peak", f"{_memory_mb('VmHWM'):.0f} MB"),
    ]


def _candles(plan: FeedPlan, start: int, end: int, *, seed: int) -> Candles:
    """A walk in ticks, with volumes and trades: about as compressible as real bars."""
    rng = np.random.default_rng(seed)
    n = (end - start) // 60
    level = 10.0 ** (seed % 5)
    close = np.round(level * np.exp(np.cumsum(rng.normal(0, 5e-4, n))) * 1000, 1) / 10
    opened = np.concatenate((close[:1], close[:-1]))
    spread = np.round(np.abs(rng.normal(0, 3e-4, (2, n))) * close, 2)
    volume = np.round(rng.lognormal(1, 1, n), 5)
    bars = Bars(
        open_ts=start + 60 * np.arange(n, dtype=np.int64),
        open=opened,
        high=np.maximum(opened, close) + spread[0],
        low=np.minimum(opened, close) - spread[1],
        close=close,
        volume=volume,
        bar_s=60,
        feed=plan.scored.name,
    )
    trades = np.floor(rng.lognormal(5, 1, n))
    return Candles(bars=bars, trades=trades, taker_volume=np.round(volume / 2, 5))


def _append_ms(store: BarStore, plans: list[FeedPlan], is_late: int, days: int) -> float:
    """Mean milliseconds of appending one minute to a new day, or to one that is nearly full."""
    start = END - is_late * APPENDS * 60 if is_late else END
    spent = 0.0
    for plan in plans:
        candles = _candles(plan, start, start + APPENDS * 60, seed=days)
        for row in range(APPENDS):
            at = start + row * 60
            began = perf_counter()
            store.append(plan.scored.venue.value, plan.asset, candles.between(at, at + 60))
            spent += perf_counter() - began
    return 1000 * spent / (len(plans) * APPENDS)


def _live_ms(
    engine: ForecastEngine, store: BarStore, plans: list[FeedPlan], clock: _Clock
) -> tuple[float, float]:
    """Milliseconds of a refresh after all assets got a bar, and of the first LF answer then."""
    refresh, answer = [], []
    for _ in range(5):
        at = int(clock.time)
        for plan in plans:
            venue = plan.scored.venue.value
            store.append(venue, plan.asset, _candles(plan, at, at + 60, seed=1))
        clock.time += 60
        began = perf_counter()
        engine.refresh()
        refresh.append(perf_counter() - began)
        request = ForecastRequest(
            asset="BTC", start_ts=at + 120, increment_s=300, length_s=86_400, num_paths=1000
        )
        began = perf_counter()
        engine.answer(request)
        answer.append(perf_counter() - began)
    return 1000 * float(np.median(refresh)), 1000 * float(np.median(answer))


def _memory_mb(which: str) -> float:
    """What this process holds, or held at its peak, as Linux counts it."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in status if line.startswith(f"{which}:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    run_script(main)
