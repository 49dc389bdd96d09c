"""What training one asset at HF costs: time beside LightGBM's own, memory, leads.

    python -m benchmarks.training --source archive --archive-dir bars --asset BTC

A bare fit is `lightgbm.train` with the training's own parameters on the training's own
matrices, 28 times as it is: a scale and six centres, for three folds and for good,
binning and early stopping included. Fit by fit the one or the other comes first. The
training leans on pools as that of `train_models.py` does; they serve all assets and are
fitted beforehand. Where the source has less than a year of minutes, a simulated one is
trained.

Both sides are one thread, so alone on a machine their CPU seconds are what the wall clock
says. On one that others use, wall seconds count the others' work too: the rows hold CPU,
and the ratio by the wall clock stands beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from benchmarks.measuring import Row, bench_parser, bench_settings, finish, plain_row, ratio_row
from benchmarks.one_training import YEAR_DAYS, Cost, Pools, fit_pools, train_alone
from console import run_script
from settings import Settings

TURNS: Final = 3
ALONE: Final = 2  # trainings of a year as they are, for their memory
REACH: Final = 1.35
MEMORY_REACH_MB: Final = 1200.0
LEADS: Final = (6, 12, 24)
LEADS_TURNS: Final = 2
LEADS_REACH: Final = 1.6
LEADS_DAYS: Final = 120.0  # of bars, to compare numbers of leads


def main() -> int:
    """Train in turn, print the rows."""
    parser = bench_parser("Time training, and its fits by LightGBM alone.", "training")
    parser.add_argument(
        "--days",
        type=float,
        default=float(YEAR_DAYS),
        metavar="D",
        help=f"days of history of the first row (default: {YEAR_DAYS})",
    )
    args = parser.parse_args()
    settings = bench_settings(args)
    with TemporaryDirectory() as folder:
        pools = fit_pools(settings, args.asset, Path(folder))
        rows = [
            *_year(settings, args.asset, pools, args.days),
            *_leads(settings, args.asset, pools, min(LEADS_DAYS, args.days)),
        ]
    return finish("Training", rows, args.rows)


def _year(settings: Settings, asset: str, pools: Pools, days: float) -> list[Row]:
    both = [train_alone(settings, asset, pools, days=days, bare=True) for _ in range(TURNS)]
    alone = [train_alone(settings, asset, pools, days=days) for _ in range(ALONE)]
    by_clock = np.median([cost.whole.wall_s / cost.bare.wall_s for cost in both])
    return [
        ratio_row(
            np.array([cost.whole.cpu_s / cost.bare.cpu_s for cost in both]),
            what=f"training {asset} HF",
            against="bare LightGBM fits, CPU",
            reach=REACH,
            at_least=False,
            detail=f"{days:g} days, {both[0].bars} bars: {_seconds(both)}; "
            f"{by_clock:.2f} by the wall clock",
        ),
        plain_row(
            "its memory, at the peak",
            "MB",
            [cost.peak_mb for cost in alone],
            reach=MEMORY_REACH_MB,
            detail=_pooled(pools),
        ),
    ]


def _seconds(costs: Sequence[Cost]) -> str:
    pairs = (f"{cost.whole.cpu_s:.0f} / {cost.bare.cpu_s:.0f}" for cost in costs)
    return ", ".join(pairs) + " s"


def _pooled(pools: Pools) -> str:
    if not pools.assets:
        return "without pools: the source has one asset"
    return (
        f"{len(pools.files)} pools of {len(pools.assets)} assets: {pools.time.cpu_s:.0f} s of CPU, "
        f"{pools.peak_mb:.0f} MB, once for all"
    )


def _leads(settings: Settings, asset: str, pools: Pools, days: float) -> list[Row]:
    """Time and rows with more anchor leads, as multiples of those with the fewest."""
    turns = [
        {leads: train_alone(settings, asset, pools, days=days, leads=leads) for leads in LEADS}
        for _ in range(LEADS_TURNS)
    ]
    rows = [turns[0][leads].rows for leads in LEADS]
    cpu_s = [np.median([turn[leads].whole.cpu_s for turn in turns]) for leads in LEADS]
    return [
        ratio_row(
            np.array([turn[LEADS[-1]].whole.cpu_s / turn[LEADS[0]].whole.cpu_s for turn in turns]),
            what=f"training with {LEADS[-1]} leads",
            against=f"with {LEADS[0]}, CPU",
            reach=LEADS_REACH,
            at_least=False,
            detail=f"{days:g} days: "
            + " / ".join(f"{each:.1f}" for each in cpu_s)
            + f" s with {_listed(LEADS)}",
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


def _listed(values: Sequence[int]) -> str:
    return " / ".join(str(value) for value in values)


if __name__ == "__main__":
    run_script(main)
