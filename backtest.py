"""Replay history with the production forecast and score it like the validator.

    python backtest.py --source archive --archive-dir bars --train-until 2025-11-28
    python backtest.py --source simulated --train-until 2026-01-10 --asset BTC --frequency hf

Models are trained on the bars before `--train-until`, in a work folder of their
own, and then answer prompts that came later. `models/` and `state/` stay as
they are.
"""

import multiprocessing
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from baselines import ConstantSigma, EwmaStudentT, Forecaster
from comparison import PairedComparison, compare_scores
from config import DAY_S, FREQUENCIES, Frequency, Settings, competition_like, protocol_profile
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
    showing_progress,
    table,
)
from data_fetcher import BarSource, open_source
from domain import MarketHistory
from errors import ConfigError, DataError, MinerError
from lgbm_predictor import ModelSet, load_model_set
from lgbm_trainer import progress_steps, train
from market_baselines import Har, Oracle, fit_har
from model_store import publish_set, published_sets
from replay import EngineForecaster, PromptScores, prompt_times, replay
from state_store import locked

WORK_DIR: Final = Path("build/backtest")
EXAMPLES: Final = (
    "python backtest.py --source archive --archive-dir bars --train-until 2025-11-28",
    "python backtest.py --source simulated --train-until 2026-01-10 --asset BTC --frequency hf",
)


def parser() -> ArgumentParser:
    """The command line."""
    options = script_parser(
        "Replay history with the production forecast and score it like the validator.",
        examples=EXAMPLES,
    )
    add_asset_argument(options, default="every asset that the source has")
    options.add_argument(
        "--frequency", choices=[entry.value for entry in Frequency], help="default: both"
    )
    options.add_argument(
        "--train-until",
        type=moment,
        required=True,
        metavar="TIME",
        help="models learn from bars before this moment, ISO 8601, UTC",
    )
    options.add_argument(
        "--start", type=moment, metavar="TIME", help="first prompt (default: --train-until)"
    )
    options.add_argument(
        "--end", type=moment, metavar="TIME", help="outcomes known by (default: the last bar)"
    )
    options.add_argument(
        "--prompts",
        type=int,
        default=100,
        metavar="N",
        help="per asset and frequency, evenly spread (default: 100)",
    )
    options.add_argument("--days", metavar="D", help="days of history to learn from (default: 365)")
    options.add_argument("--jobs", metavar="N", help="processes (default: the number of cores)")
    add_common_arguments(options)
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One asset at one frequency, trained and replayed in a process of its own."""

    asset: str
    frequency: Frequency
    settings: Settings
    train_until: int
    start: int
    end: int | None
    prompts: int

    @property
    def name(self) -> str:
        """How progress and tables call it."""
        return f"{self.asset} {self.frequency.value}"


def main() -> int:
    """Replay and report; 0 if everything asked for was scored."""
    args = parser().parse_args()
    settings = settings_from(args)
    configure_logging("warning")
    tasks = _tasks(open_source(settings), settings, args)
    failures: list[str] = []
    rows = []
    with locked(WORK_DIR, "the back-test"):
        for task, scores in _run_all(tasks, settings.jobs, failures):
            rows.append(_row(task, scores))
    if rows:
        table(
            f"Scores of {len(rows)} markets, lower is better",
            ("market", "prompts", "score", "÷ reference", "÷ ewma_t", "÷ har", "gap closed"),
            rows,
        )
    for failure in failures:
        note(failure)
    return 1 if failures else 0


def _tasks(source: BarSource, settings: Settings, args: Namespace) -> list[Task]:
    if args.prompts < 1:
        raise ConfigError(f"--prompts {args.prompts} is too few; ask for at least 1.")
    served = source.frequencies()
    missing = [asset for asset in args.assets if asset not in served]
    if missing:
        raise DataError(f"{', '.join(missing)} is not in this source; it has {', '.join(served)}.")
    wanted = [Frequency(args.frequency)] if args.frequency else list(Frequency)
    return [
        Task(
            asset=asset,
            frequency=frequency,
            settings=settings,
            train_until=args.train_until,
            start=args.train_until if args.start is None else args.start,
            end=args.end,
            prompts=args.prompts,
        )
        for asset in (args.assets or served)
        for frequency in wanted
        if frequency in served[asset]
    ]


def _run_all(
    tasks: list[Task], jobs: int, failures: list[str]
) -> list[tuple[Task, list[PromptScores]]]:
    context = multiprocessing.get_context("spawn")
    done = []
    totals = {task.name: progress_steps(task.frequency) + task.prompts for task in tasks}
    with (
        showing_progress(totals, context) as events,
        ProcessPoolExecutor(max(1, min(jobs, len(tasks))), mp_context=context) as pool,
    ):
        futures = [pool.submit(_run, task, events) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                done.append((task, future.result()))
            except MinerError as error:
                failures.append(str(error))
    return done


def _run(task: Task, events: Events) -> list[PromptScores]:
    """In the worker: train unless the work folder has the set, then replay."""
    history = open_source(task.settings).load(task.asset, task.frequency).history
    past = history.known_at(task.train_until)
    if not len(past.bars):
        raise DataError(f"{task.name}: no bars are known by --train-until; choose a later moment.")
    profile = protocol_profile(task.settings.profile)
    end = history.bars.end_ts if task.end is None else task.end
    times = prompt_times(history, task.start, end, task.prompts)
    engine = EngineForecaster(_models(task, past, events))
    har = fit_har(past, days=task.settings.days)
    forecasters: list[Forecaster] = [
        engine,
        ConstantSigma(),
        EwmaStudentT.fit(past),
        Har(model=har),
        Oracle(har=Har(model=har), full=history),
    ]
    scores = []
    competition = competition_like(profile, task.asset, task.frequency)
    for prompt in replay(history, forecasters, competition, times, seed=task.settings.seed):
        scores.append(prompt)
        events.put((task.name, "prompts"))
    return scores


def _models(task: Task, past: MarketHistory, events: Events) -> ModelSet:
    folder = WORK_DIR / _training_key(task, past)
    if not published_sets(folder, task.asset, task.frequency):
        result = train(
            past,
            days=task.settings.days,
            seed=task.settings.seed,
            profile=protocol_profile(task.settings.profile),
            progress=lambda step: events.put((task.name, step)),
        )
        publish_set(folder, task.asset, task.frequency, result.model_id, result.files)
    return load_model_set(published_sets(folder, task.asset, task.frequency)[0])


def _training_key(task: Task, past: MarketHistory) -> str:
    """Folder name of everything that a training depends on."""
    bars = past.bars.between(past.bars.end_ts - int(task.settings.days * DAY_S), None)
    content = sha256(bars.open_ts.tobytes() + bars.close.tobytes())
    content.update(repr((task.settings.seed, task.settings.days, task.settings.profile)).encode())
    return content.hexdigest()[:16]


def _row(task: Task, scores: list[PromptScores]) -> tuple[Any, ...]:
    ours = np.array([prompt.scores["engine"].total for prompt in scores])
    versus = {name: _compare(task, scores, name) for name in ("reference", "ewma_t", "har")}
    mean = {
        name: np.mean([prompt.scores[name].total for prompt in scores])
        for name in ("engine", "ewma_t", "oracle")
    }
    gap = (mean["ewma_t"] - mean["engine"]) / (mean["ewma_t"] - mean["oracle"])
    return (
        task.name,
        len(scores),
        f"{ours.mean():.1f}",
        _ratio(versus["reference"]),
        _ratio(versus["ewma_t"]),
        _ratio(versus["har"]),
        f"{100 * gap:.0f} %",
    )


def _compare(task: Task, scores: list[PromptScores], name: str) -> PairedComparison:
    return compare_scores(
        np.array([prompt.scores["engine"].total for prompt in scores]),
        np.array([prompt.scores[name].total for prompt in scores]),
        np.array([prompt.start_ts for prompt in scores]),
        horizon_s=FREQUENCIES[task.frequency].prompt_length_s,
    )


def _ratio(comparison: PairedComparison) -> str:
    return f"{comparison.ratio:.4f} ± {comparison.error:.4f}"


if __name__ == "__main__":
    run_script(main)
