"""How training and storing grow with history: one, three, six and twelve months.

    python -m benchmarks.growth --source archive --archive-dir bars --asset BTC

Training should grow as its bars do, and appending one minute not at all. A training has
costs of its own whatever its length, which would hide what grows faster than its bars: so
its growth is that of the increments, from six months to twelve beside from three to six,
over how many more bars that is. Trainings are timed in CPU seconds of their thread;
appends by the wall clock, for most of an append is waiting for the disk. Where the source
has less than a year of minutes, a simulated one is trained.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

import numpy as np

from bar_store import BarStore
from benchmarks.measuring import Row, bench_parser, bench_settings, finish, ratio_row
from benchmarks.one_training import YEAR_DAYS, Cost, Pools, fit_pools, train_alone, year_of
from config import DAY_S
from console import run_script
from domain import Bars, FloatArray
from settings import Settings

MONTHS: Final = (1, 3, 6, 12)
TRAINED: Final = MONTHS[-3:]
TURNS: Final = 2
APPENDS: Final = 400  # minutes appended to each store, in turn
TRAINING_REACH: Final = 1.1  # of proportional growth
APPEND_REACH: Final = 1.25


def main() -> int:
    """Train and append, print the rows."""
    args = bench_parser("Time trainings and appends by length of history.", "growth").parse_args()
    settings = bench_settings(args)
    with TemporaryDirectory() as folder:
        pools = fit_pools(settings, args.asset, Path(folder))
        training = _training(settings, args.asset, pools)
    rows = [training, _appending(year_of(settings, args.asset).price_bars)]
    return finish("Growth", rows, args.rows)


def _days(months: int) -> float:
    return YEAR_DAYS * months / 12


def _training(settings: Settings, asset: str, pools: Pools) -> Row:
    turns = [
        {months: train_alone(settings, asset, pools, days=_days(months)) for months in TRAINED}
        for _ in range(TURNS)
    ]
    cpu_s = [np.median([turn[months].whole.cpu_s for turn in turns]) for months in TRAINED]
    return ratio_row(
        np.array([_growth(turn) for turn in turns]),
        what=f"training a bar more at {TRAINED[2]} months",
        against=f"at {TRAINED[1]}",
        reach=TRAINING_REACH,
        at_least=False,
        detail=" / ".join(f"{each:.1f}" for each in cpu_s) + f" s, {_named(TRAINED)}",
    )


def _growth(costs: Mapping[int, Cost]) -> float:
    """What a further bar costs in the longer history, beside the shorter one."""
    short, middle, long = (costs[months] for months in TRAINED)
    before, after = (
        (more.whole.cpu_s - less.whole.cpu_s) / (more.bars - less.bars)
        for less, more in ((short, middle), (middle, long))
    )
    return after / before


def _named(lengths: tuple[int, ...]) -> str:
    return "/".join(str(months) for months in lengths) + " months"


def _appending(bars: Bars) -> Row:
    """Every store gets the same minutes of a day of which it has none yet, in turn."""
    last = int(bars.open_ts[-1]) // DAY_S * DAY_S
    with TemporaryDirectory() as name:
        stores = {months: BarStore(Path(name) / str(months)) for months in MONTHS}
        for months, store in stores.items():
            start = last - int(_days(months)) * DAY_S
            store.append("bench", "BTC", bars.between(start, last))
        seconds = {months: np.zeros(APPENDS) for months in MONTHS}
        for number in range(APPENDS):
            minute = _minute(bars, last + 60 * number)
            for months, store in stores.items():
                seconds[months][number] = _append(store, minute)
    return _append_row(seconds)


def _minute(bars: Bars, open_ts: int) -> Bars:
    """The first bar, moved to another minute."""
    one = bars.between(int(bars.open_ts[0]), int(bars.close_ts[0]))
    return replace(one, open_ts=np.array([open_ts], dtype=np.int64))


def _append(store: BarStore, minute: Bars) -> float:
    begun = perf_counter()
    store.append("bench", "BTC", minute)
    return perf_counter() - begun


def _append_row(seconds: dict[int, FloatArray]) -> Row:
    medians = [1e3 * float(np.median(seconds[months])) for months in MONTHS]
    return ratio_row(
        seconds[12] / seconds[1],
        what="appending a minute to 12 months",
        against="to one",
        reach=APPEND_REACH,
        at_least=False,
        detail=" / ".join(f"{each:.2f}" for each in medians) + f" ms, {_named(MONTHS)}",
    )


if __name__ == "__main__":
    run_script(main)
