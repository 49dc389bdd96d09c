"""Train LightGBM models, one set per asset and frequency.

    python train_models.py                     # all assets, HF and LF
    python train_models.py --hf-only           # only the 1-hour prompts' models
    python train_models.py --asset BTC --asset XAU --source archive --archive-dir bars
    python train_models.py --until 2025-12-01  # as of a moment

With a live source, bars that are missing are fetched first; an interrupt loses
nothing that was fetched. A set becomes visible in one step when it is complete;
the one before it stays for roll-back. Sets that could be trained are kept when
others fail.
"""

import logging
import multiprocessing
import signal
from argparse import ArgumentParser, Namespace
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Final

from bar_cleaning import summarise_set_aside
from config import ASSETS, Frequency, Settings, protocol_profile
from console import (
    Events,
    add_asset_argument,
    add_common_arguments,
    configure_logging,
    moment,
    note,
    run_script,
    script_parser,
    settings_from,
    showing_days,
    showing_progress,
    table,
)
from data_fetcher import BarSource, LiveSource, open_source
from errors import DataError, MinerError
from lgbm_trainer import LeadReport, TrainingResult, fit_window, progress_steps, train
from live_market import LiveMarket
from model_store import publish_set
from pool_store import histories_of, pooled_priors
from state_store import locked

POOL_FOLDER: Final = "pool"  # beside the sets of the assets

log = logging.getLogger("train_models")

Pair = tuple[str, Frequency]

EXAMPLES: Final = (
    "python train_models.py --source archive --archive-dir bars --asset BTC --asset XAU",
    "python train_models.py --source simulated --hf-only",
)


def parser() -> ArgumentParser:
    """The command line."""
    options = script_parser("Train LightGBM models on a source of bars.", examples=EXAMPLES)
    which = options.add_mutually_exclusive_group()
    which.add_argument("--hf-only", action="store_true", help="only the 1-hour models")
    which.add_argument("--lf-only", action="store_true", help="only the 24-hour models")
    add_asset_argument(options, default="every asset that the source has")
    options.add_argument("--days", metavar="D", help="days of history to learn from (default: 365)")
    options.add_argument(
        "--until",
        metavar="TIME",
        type=moment,
        help="train as of this moment, ISO 8601, UTC (default: the end of the bars)",
    )
    options.add_argument(
        "--stored-only",
        action="store_true",
        help="for live sources: train on the bars that are stored, fetch none",
    )
    options.add_argument(
        "--jobs", metavar="N", help="sets trained side by side (default: the number of cores)"
    )
    add_common_arguments(options)
    return options


def main() -> int:
    """Train, publish and report; 0 if every requested set was trained."""
    args = parser().parse_args()
    settings = settings_from(args)
    configure_logging("warning")
    source = open_source(settings)
    pairs, failures = choose_pairs(source, args)
    if isinstance(source, LiveSource) and pairs and not args.stored_only:
        collect_bars(source, settings, list(dict.fromkeys(asset for asset, _ in pairs)))
    results: list[TrainingResult] = []
    if pairs:
        with locked(settings.model_dir, "training"):
            results, failed = train_all(pairs, settings, args.until)
        failures += failed
    _report(results)
    for failure in failures:
        note(failure)
    return 1 if failures else 0


def choose_pairs(source: BarSource, args: Namespace) -> tuple[list[Pair], list[str]]:
    """What to train, and one sentence for everything asked for that cannot be."""
    served = source.frequencies()
    wanted = [
        frequency for frequency in Frequency if not getattr(args, f"{_other(frequency)}_only")
    ]
    assets = list(dict.fromkeys(args.assets)) or list(served)
    failures = [
        f"{asset} is not in this source; it has {', '.join(served) or 'no asset'}."
        for asset in assets
        if asset not in served
    ]
    pairs = []
    for asset in assets:
        possible = [frequency for frequency in wanted if frequency in served.get(asset, ())]
        pairs += [(asset, frequency) for frequency in possible]
        if args.assets and asset in served and not possible:
            failures.append(f"{asset} has no bars for {' or '.join(wanted)} in this source.")
    if not args.assets:
        _name_the_others(source, served)
    if not pairs and not failures:
        failures.append(f"no asset of this source has bars for {' or '.join(wanted)} models.")
    return pairs, failures


def collect_bars(source: LiveSource, settings: Settings, assets: list[str]) -> None:
    """Bring the stored bars of the assets up to now; what is there is not fetched again.

    Raises: SourceUnavailable if a scored feed fails. A feed that only adds history
    may: its absence is named.
    """
    with LiveMarket.open(settings, source, assets) as market:
        with showing_days() as progress:
            done = market.backfill(progress)
        market.require_scored(done)
        done.add(market.collect())
        market.require_scored(done)
    for sentence in dict.fromkeys(done.failures.values()):
        note(sentence)


def _other(frequency: Frequency) -> str:
    return "lf" if frequency is Frequency.HF else "hf"


def _name_the_others(source: BarSource, served: Any) -> None:
    absent = [asset for asset in ASSETS if asset not in served]
    if absent:
        note(f"not in this source: {', '.join(absent)}")
    if source.unknown_assets:
        note(f"in this source but scored by nobody: {', '.join(source.unknown_assets)}")


# ---------------------------------------------------------------- training side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One set to train, in a process of its own."""

    asset: str
    frequency: Frequency
    settings: Settings
    until: int | None

    @property
    def name(self) -> str:
        """How progress bars call it."""
        return f"{self.asset} {self.frequency.value}"


def train_all(
    pairs: list[Pair], settings: Settings, until: int | None
) -> tuple[list[TrainingResult], list[str]]:
    """Train the pairs in processes and publish each as it completes."""
    results: list[TrainingResult] = []
    failures: list[str] = []
    tasks = [
        Task(asset=asset, frequency=frequency, settings=settings, until=until)
        for asset, frequency in pairs
    ]
    context = multiprocessing.get_context("spawn")  # threads of BLAS do not survive a fork
    workers = min(settings.jobs, len(tasks))
    totals = {task.name: progress_steps(task.frequency) for task in tasks}
    with (
        showing_progress(totals, context) as events,
        ProcessPoolExecutor(workers, context, initializer=_end_when_interrupted) as pool,
    ):
        futures = {pool.submit(_run, task, events): task for task in tasks}
        for future in as_completed(futures):
            _collect(futures[future], future, results, failures)
    results.sort(key=lambda result: pairs.index((result.asset, result.frequency)))
    return results, failures


def _end_when_interrupted() -> None:
    """In the worker: an interrupt ends it, where it would else go on to the next set."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(task: Task, events: Events) -> tuple[TrainingResult, list[str]]:
    """In the worker: load the bars, train, report every step."""
    source = open_source(task.settings)
    loaded = source.load(task.asset, task.frequency)
    history = loaded.history if task.until is None else loaded.history.known_at(task.until)
    if not len(history.bars):
        raise DataError(f"{task.name}: no bars are known by --until; choose a later moment.")
    first, last = fit_window(history, task.settings.days)
    peers = histories_of(source, task.frequency)
    result = train(
        history,
        days=task.settings.days,
        seed=task.settings.seed,
        profile=protocol_profile(task.settings.profile),
        priors=pooled_priors(peers, first, last, task.settings.model_dir / POOL_FOLDER),
        progress=lambda step: events.put((task.name, step)),
    )
    return result, [
        f"{task.name}: set aside {line}" for line in summarise_set_aside(loaded.set_aside)
    ]


def _collect(
    task: Task,
    future: "Future[tuple[TrainingResult, list[str]]]",
    results: list[TrainingResult],
    failures: list[str],
) -> None:
    try:
        result, set_aside = future.result()
        publish_set(
            task.settings.model_dir, task.asset, task.frequency, result.model_id, result.files
        )
    except MinerError as error:
        failures.append(str(error))
        return
    except BrokenProcessPool:
        failures.append(
            f"{task.name}: a training process ended abruptly, probably for lack of memory; "
            "try again with fewer --jobs."
        )
        return
    except Exception:
        log.exception("failed", extra={"asset": task.asset, "frequency": task.frequency})
        failures.append(f"{task.name}: the training failed by a fault of the program, see above.")
        return
    results.append(result)
    for line in (*set_aside, *result.warnings):
        note(line)


# ---------------------------------------------------------------- closing table


def _report(results: list[TrainingResult]) -> None:
    columns = ("asset", "freq", "lead", "rows", "iter", "centre", "shrink", "scale", "s")
    rows = [_row(lead, result) for result in results for lead in result.leads]
    if rows:
        table("Trained models", columns, rows)
        print(
            "centre: squared error saved against no drift, out of sample; shrink: its weight "
            "(0 = not used);\nscale: gamma deviance gained on a single EWMA; s: seconds per set."
        )


def _row(lead: LeadReport, result: TrainingResult) -> tuple[Any, ...]:
    first = lead is result.leads[0]
    return (
        lead.asset if first else "",
        lead.frequency.value if first else "",
        f"{lead.lead_s} s",
        lead.rows,
        lead.best_iteration,
        f"{100 * lead.centre_skill:+.2f} %",
        f"{lead.centre_weight:.2f}",
        f"{lead.scale_skill:+.4f}",
        f"{result.seconds:.0f}" if first else "",
    )


if __name__ == "__main__":
    run_script(main)
