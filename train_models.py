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
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final

from bar_cleaning import summarise_set_aside
from config import ASSETS, DAY_S, Frequency
from console import (
    add_asset_argument,
    add_common_arguments,
    add_worker_arguments,
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
from lgbm_trainer import LeadReport, TrainingResult, fit_window, progress_steps
from live_market import LiveMarket
from model_store import publish_set, set_folder
from pool_store import prune_pools
from pooled_prior import POOL_EVERY_S, pool_moments
from set_training import shared_history, shared_pool, stored_pool, train_set
from settings import Settings
from state_store import locked
from task_pool import Job, WorkersLost, open_pool, work_off
from wire_format import format_iso

POOL_FOLDER: Final = "pool"  # beside the sets of the assets
PROGRAM: Final = "set_training"  # the module of the tasks

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
        "--end-with-parent",
        action="store_true",
        help="end with all workers when standard input does: a miner that is killed leaves "
        "no training behind (default: go on)",
    )
    add_worker_arguments(options)
    add_common_arguments(options)
    return options


def main() -> int:
    """Train, publish and report; 0 if every requested set was trained."""
    args = parser().parse_args()
    if args.end_with_parent:
        Thread(target=_end_with_input, name="parent", daemon=True).start()
    settings = settings_from(args)
    configure_logging("warning")
    source = open_source(settings)
    pairs, failures = choose_pairs(source, args)
    if args.until is not None:
        _name_a_late_moment(source, args.until)
    if isinstance(source, LiveSource) and pairs and not args.stored_only:
        collect_bars(source, settings, list(dict.fromkeys(asset for asset, _ in pairs)))
    results: list[TrainingResult] = []
    if pairs:
        with locked(settings.model_dir, "training"):
            results, failed = train_all(pairs, settings, args.until, args.scheduler)
        failures += failed
    _report(results, settings.model_dir)
    for failure in dict.fromkeys(failures):  # a file that serves both frequencies fails twice
        note(failure)
    return 1 if failures else 0


def _end_with_input() -> None:
    """Kill this process and its workers at the end of standard input; what is published stays."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    with suppress(ProcessLookupError):  # not the leader of a group: then workers end by themselves
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


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


def _name_a_late_moment(source: BarSource, until: int) -> None:
    end = source.now()
    if until > end:
        last = "now" if source.live else f"the end of the last bar, {format_iso(end)}"
        note(f"--until {format_iso(until)} lies after {last}; all bars are used.")


# ---------------------------------------------------------------- training side by side


def train_all(
    pairs: list[Pair], settings: Settings, until: int | None, scheduler: str | None = None
) -> tuple[list[TrainingResult], list[str]]:
    """Train the pairs side by side and publish each as it completes.

    On the cluster of `scheduler`, if one is named. Raises: ConfigError, BusyError, if
    that cannot be used.
    """
    batch = _Batch(settings=settings, until=until)
    names = {pair: f"{pair[0]} {pair[1].value}" for pair in pairs}
    with showing_progress({names[pair]: progress_steps(pair[1]) for pair in pairs}) as show:
        jobs = batch.jobs(names)
        if jobs:
            batch.work_off(jobs, scheduler, show)
            batch.prune()
    batch.results.sort(key=lambda result: pairs.index((result.asset, result.frequency)))
    return batch.results, batch.failures


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What is trained together, and what has come of it so far."""

    settings: Settings
    until: int | None
    results: list[TrainingResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    pools: dict[tuple[Frequency, int], Path] = field(default_factory=dict)

    def jobs(self, names: Mapping[Pair, str]) -> list[Job]:
        """One for every pair that can be tried; those that take longest first."""
        source = open_source(self.settings)
        jobs = []
        for asset, frequency in sorted(names, key=lambda pair: list(Frequency).index(pair[1])):
            try:
                jobs.append(self._job(source, asset, frequency, names[asset, frequency]))
            except DataError as error:
                self.failures.append(str(error))
        return jobs

    def _job(self, source: BarSource, asset: str, frequency: Frequency, name: str) -> Job:
        loaded = source.load(asset, frequency)
        history = loaded.history if self.until is None else loaded.history.known_at(self.until)
        if not len(history.bars):
            fault = "the bars make none of its length; collect or import more"
            if self.until is not None:
                fault = "no bars are known by --until; choose a later moment"
            raise DataError(f"{name}: {fault}.")
        window = fit_window(history, self.settings.days)
        args = (
            shared_history(self.settings, asset, frequency),
            [shared_pool(self._pool(frequency, at)) for at in pool_moments(*window)],
            self.settings,
            self.until,
            name,
        )
        lines = [f"{name}: set aside {line}" for line in summarise_set_aside(loaded.set_aside)]
        return Job(name=name, work=train_set, args=args, then=partial(self._keep, lines))

    def _pool(self, frequency: Frequency, at: int) -> Path:
        """One pool for all sets of the run, although bars may be corrected meanwhile."""
        if (frequency, at) not in self.pools:
            folder = self.settings.model_dir / POOL_FOLDER
            self.pools[frequency, at] = stored_pool(self.settings, frequency, at, folder)
        return self.pools[frequency, at]

    def prune(self) -> None:
        """Clear pools away that no set of so many days needs any more."""
        newest = max(at for _, at in self.pools)
        before = newest - POOL_EVERY_S - int(self.settings.days * DAY_S)
        prune_pools(self.settings.model_dir / POOL_FOLDER, before)

    def work_off(
        self, jobs: list[Job], scheduler: str | None, show: Callable[[str, str], None]
    ) -> None:
        """Train side by side; what was trained is kept whatever becomes of the rest."""
        workers = min(self.settings.jobs, len(jobs))
        with open_pool(workers, scheduler, PROGRAM, lambda name, step, _: show(name, step)) as pool:
            try:
                work_off(pool, jobs, self._failed)
            except WorkersLost as error:
                self.failures.append(str(error))

    def _keep(self, set_aside: Sequence[str], result: TrainingResult) -> Sequence[Job]:
        try:
            publish_set(
                self.settings.model_dir,
                result.asset,
                result.frequency,
                result.model_id,
                result.files,
            )
        except MinerError as error:
            self.failures.append(str(error))
            return ()
        self.results.append(result)
        for line in (*set_aside, *result.warnings):
            note(line)
        return ()

    def _failed(self, job: Job, error: Exception) -> None:
        """One sentence for a set that cannot be trained; the others go on."""
        if isinstance(error, MinerError):
            if str(error) not in self.failures:
                self.failures.append(str(error))
            return
        log.error("failed", exc_info=error, extra={"set": job.name})
        self.failures.append(
            f"{job.name}: the training failed by a fault of the program, see above."
        )


# ---------------------------------------------------------------- closing table


def _report(results: list[TrainingResult], model_dir: Path) -> None:
    columns = ("asset", "freq", "lead", "rows", "iter", "centre", "shrink", "scale", "s")
    rows = [_row(lead, result) for result in results for lead in result.leads]
    if rows:
        table("Trained models", columns, rows)
        print(
            "centre: squared error saved against no drift, out of sample; shrink: its weight "
            "(0 = not used);\nscale: gamma deviance gained over a single EWMA; s: seconds per set."
        )
        folders = (set_folder(model_dir, entry.asset, entry.frequency) for entry in results)
        print(f"in use from now on: {', '.join(map(str, folders))}")


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
