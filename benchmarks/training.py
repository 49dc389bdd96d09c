"""What training one asset at HF costs: time beside LightGBM's own, memory, leads.

    python -m benchmarks.training --source archive --archive-dir bars --asset BTC

A bare fit is `lightgbm.train` with the training's own parameters on the training's own
matrices, 28 times as it is: a scale and six centres, for three folds and for good,
binning and early stopping included. Both are done in turn, in seconds of CPU of
one thread. Where the source has less than a year of minutes, a simulated one is trained.
"""

from typing import Final

import numpy as np

from benchmarks.measuring import Row, bench_parser, finish, ratio_row
from benchmarks.one_training import YEAR_DAYS, Cost, train_alone
from config import Settings
from console import run_script, settings_from

TURNS: Final = 2
REACH: Final = 1.35
MEMORY_REACH_MB: Final = 1200.0
LEADS: Final = (6, 12, 24)
LEADS_REACH: Final = 1.6
LEADS_DAYS: Final = 120.0  # of bars, to compare numbers of leads


def main() -> int:
    """Train in turn, print the rows."""
    args = bench_parser("Time training, and its fits by LightGBM alone.", "training").parse_args()
    settings = settings_from(args)
    rows = [*_year(settings, args.asset), *_leads(settings, args.asset)]
    return finish("Training", rows, args.rows)


def _year(settings: Settings, asset: str) -> list[Row]:
    both = [train_alone(settings, asset, bare=True) for _ in range(TURNS)]
    alone = train_alone(settings, asset)
    return [
        ratio_row(
            np.array([cost.seconds / cost.bare_s for cost in both]),
            what=f"training {asset} HF, {YEAR_DAYS} days, {alone.bars} bars",
            against="bare LightGBM fits",
            reach=REACH,
            at_least=False,
            detail=_seconds(*both) + f"; alone {alone.seconds:.0f} s CPU, {alone.wall_s:.0f} s",
        ),
        Row(
            what="its memory, at the peak",
            against="MB",
            value=alone.peak_mb,
            low=alone.peak_mb,
            high=alone.peak_mb,
            reach=MEMORY_REACH_MB,
            at_least=False,
        ),
    ]


def _seconds(*costs: Cost) -> str:
    return ", ".join(f"{cost.seconds:.0f} / {cost.bare_s:.0f}" for cost in costs) + " s"


def _leads(settings: Settings, asset: str) -> list[Row]:
    """Time and rows with more anchor leads, as multiples of those with the fewest."""
    turns = [
        {leads: train_alone(settings, asset, days=LEADS_DAYS, leads=leads) for leads in LEADS}
        for _ in range(TURNS)
    ]
    rows = [turns[0][leads].rows for leads in LEADS]
    seconds = [np.median([turn[leads].seconds for turn in turns]) for leads in LEADS]
    return [
        ratio_row(
            np.array([turn[LEADS[-1]].seconds / turn[LEADS[0]].seconds for turn in turns]),
            what=f"training with {LEADS[-1]} leads, {LEADS_DAYS:g} days",
            against=f"with {LEADS[0]}",
            reach=LEADS_REACH,
            at_least=False,
            detail=" / ".join(f"{each:.1f}" for each in seconds) + f" s with {_listed(LEADS)}",
        ),
        ratio_row(
            np.array([max(rows) / min(rows)]),
            what="its rows",
            against="fewest of all",
            reach=1.01,  # leads of the last horizon have no outcome yet
            at_least=False,
            detail=_listed(rows),
        ),
    ]


def _listed(values: tuple[int, ...] | list[int]) -> str:
    return " / ".join(str(value) for value in values)


if __name__ == "__main__":
    run_script(main)
