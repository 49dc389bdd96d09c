"""How training and storing grow with history: one, three, six and twelve months.

    python -m benchmarks.growth --source archive --archive-dir bars --asset BTC

Training should grow as its bars do, and appending one minute not at all. Seconds are
CPU of one thread. Where the source has less than a year of minutes, a simulated
one is trained.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import thread_time
from typing import Final

import numpy as np

from bar_store import BarStore
from benchmarks.measuring import Row, bench_parser, finish, ratio_row
from benchmarks.one_training import YEAR_DAYS, train_alone, year_of
from config import DAY_S, Settings
from console import run_script, settings_from
from domain import Bars, FloatArray

MONTHS: Final = (1, 3, 6, 12)
APPENDS: Final = 400  # minutes appended to each store, in turn
TURN: Final = 20  # of them at a time
TRAINING_REACH: Final = 1.1  # of proportional growth, from three months to twelve
APPEND_REACH: Final = 1.25


def main() -> int:
    """Train and append, print the rows."""
    args = bench_parser("Time trainings and appends by length of history.", "growth").parse_args()
    settings = settings_from(args)
    bars = year_of(settings, args.asset).price_bars
    rows = [_training(settings, args.asset), _appending(bars)]
    return finish("Growth", rows, args.rows)


def _days(months: int) -> float:
    return YEAR_DAYS * months / 12


def _training(settings: Settings, asset: str) -> Row:
    costs = [train_alone(settings, asset, days=_days(months)) for months in MONTHS]
    per_bar = {months: cost.seconds / cost.bars for months, cost in zip(MONTHS, costs, strict=True)}
    return ratio_row(
        np.array([per_bar[12] / per_bar[3]]),
        what="training per bar, 12 months",
        against="3 months",
        reach=TRAINING_REACH,
        at_least=False,
        detail=" / ".join(f"{cost.seconds:.1f}" for cost in costs) + f" s, {_named()}",
    )


def _named() -> str:
    return "/".join(str(months) for months in MONTHS) + " months"


def _appending(bars: Bars) -> Row:
    """Every store gets the same minutes of a day that is already half full, in turn."""
    last = int(bars.open_ts[-1]) // DAY_S * DAY_S
    with TemporaryDirectory() as name:
        stores = {months: BarStore(Path(name) / str(months)) for months in MONTHS}
        for months, store in stores.items():
            start = last - int(_days(months)) * DAY_S
            store.append("bench", "BTC", bars.between(start, last))
        minutes = [_minute(bars, last + 60 * number) for number in range(APPENDS)]
        seconds = {months: np.zeros(APPENDS // TURN) for months in MONTHS}
        for turn in range(APPENDS // TURN):
            part = minutes[turn * TURN : (turn + 1) * TURN]
            for months, store in stores.items():
                seconds[months][turn] = _append(store, part)
    return _append_row(seconds)


def _minute(bars: Bars, open_ts: int) -> Bars:
    """The first bar, moved to another minute."""
    one = bars.between(int(bars.open_ts[0]), int(bars.close_ts[0]))
    return replace(one, open_ts=np.array([open_ts], dtype=np.int64))


def _append(store: BarStore, minutes: list[Bars]) -> float:
    begun = thread_time()
    for minute in minutes:
        store.append("bench", "BTC", minute)
    return thread_time() - begun


def _append_row(seconds: dict[int, FloatArray]) -> Row:
    medians = [1e3 * float(np.median(seconds[months])) / TURN for months in MONTHS]
    return ratio_row(
        seconds[12] / seconds[1],
        what="appending one minute, 12 months stored",
        against="1 month",
        reach=APPEND_REACH,
        at_least=False,
        detail=" / ".join(f"{each:.2f}" for each in medians) + f" ms, {_named()}",
    )


if __name__ == "__main__":
    run_script(main)
