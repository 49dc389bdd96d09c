"""Replay history with the production forecast and score it like the validator.

    python backtest.py --source archive --archive-dir bars --train-until 2025-11-10
    python backtest.py --source archive --archive-dir bars --asset BTC --frequency hf --prompts 300
    python backtest.py --source archive --archive-dir bars --json now.json --report build/report
    python backtest.py --source archive --archive-dir bars --closed-form --prompts 3000
    python backtest.py compare before.json now.json

With `--train-until`, models learn from the bars before that moment and stay; without
it they are retrained at the cadence of the live miner, always on bars known before the
prompts that they answer. Training happens in a work folder: `models/` and `state/` stay
as they are. What is done is kept there: an interrupted run goes on when it is repeated.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from backtest_results import (
    SCHEMA,
    check_document,
    compare_documents,
    market_entry,
    market_name,
    start_times,
)
from backtest_store import (
    PREDICTIONS,
    differing,
    interrupted_run,
    load_scores,
    note_run,
)
from backtest_tables import print_contest, print_figures
from config import EARLIEST_TS, LATEST_TS, Frequency
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
    showing_progress,
)
from content_keys import program_key
from data_fetcher import BarSource, open_source
from domain import IntArray
from errors import ConfigError, DataError, MinerError, StateError
from garch_baseline import Garch, require_arch
from lgbm_trainer import progress_steps
from state_store import locked, require_file, require_writable, write_atomically
from task_pool import Job, TaskPool, open_pool, tell, work_off
from walk_forward import (
    BASELINES,
    DEFAULT_BASELINES,
    DEFAULT_DAYS,
    WITHOUT_LAW,
    EngineViews,
    Market,
    Plan,
    Prompts,
    Scores,
    plan_market,
    replay_jobs,
    training_job,
)
from wire_format import format_iso

WORK_DIR: Final = Path("build/backtest")
CHUNK_PROMPTS: Final = 8  # fewer are not worth a task of their own
TASKS_EACH: Final = 4  # replays per worker, so that the last ones end together
PROGRAM: Final = "walk_forward"  # the module of the tasks that go to a cluster
EXAMPLES: Final = (
    "python backtest.py --source archive --archive-dir bars --train-until 2025-11-10",
    "python backtest.py --source simulated --train-until 2026-01-10 --asset BTC --frequency hf",
    "python backtest.py compare before.json now.json",
)


# ---------------------------------------------------------------- arguments


def parser() -> ArgumentParser:
    """The command line."""
    options = script_parser(
        "Replay history with the production forecast and score it like the validator.",
        examples=EXAMPLES,
    )
    _add_compare(options)
    add_asset_argument(options, default="every asset that the source has")
    options.add_argument(
        "--frequency", choices=[entry.value for entry in Frequency], help="default: both"
    )
    options.add_argument(
        "--train-until",
        type=moment,
        metavar="TIME",
        help="models learn from bars known at this moment and stay, ISO 8601, UTC (default: "
        "retrained at the cadence of the live miner)",
    )
    _add_prompts(options)
    options.add_argument(
        "--baselines",
        default=",".join(DEFAULT_BASELINES),
        metavar="LIST",
        help=f"out of {','.join(BASELINES)} (default: all but {Garch.name})",
    )
    options.add_argument(
        "--closed-form",
        action="store_true",
        help="score the laws of the forecasts instead of paths drawn from them: thousands of "
        "prompts in the time of dozens (default: no)",
    )
    options.add_argument("--days", metavar="D", help="days of history to learn from (default: 365)")
    _add_outputs(options)
    add_worker_arguments(options)
    add_common_arguments(options)
    return options


def _add_compare(options: ArgumentParser) -> None:
    commands = options.add_subparsers(dest="command", metavar="compare", required=False)
    compare = commands.add_parser(
        "compare",
        help="compare two results that --json wrote, prompt by prompt, and decide",
        description="Compare two results that --json wrote, prompt by prompt, and decide.",
        epilog="example:\n  python backtest.py compare before.json now.json",
    )
    compare.add_argument("champion", type=Path, metavar="A.json", help="what is to be beaten")
    compare.add_argument("challenger", type=Path, metavar="B.json", help="what is new")


def _add_prompts(options: ArgumentParser) -> None:
    options.add_argument(
        "--start",
        type=moment,
        metavar="TIME",
        help=f"first prompt (default: --train-until, or {DEFAULT_DAYS} days before the last bar)",
    )
    options.add_argument(
        "--end", type=moment, metavar="TIME", help="outcomes known by (default: the last bar)"
    )
    which = options.add_mutually_exclusive_group()
    which.add_argument(
        "--prompts",
        type=int,
        default=100,
        metavar="N",
        help="per asset and frequency, evenly spread (default: 100)",
    )
    which.add_argument(
        "--prompt-times",
        type=Path,
        metavar="FILE",
        help="start times of the prompts instead, one Unix second or ISO 8601 time a line",
    )


def _add_outputs(options: ArgumentParser) -> None:
    options.add_argument(
        "--json", type=Path, metavar="FILE", help="write every score of every prompt (default: no)"
    )
    options.add_argument(
        "--export-predictions",
        type=Path,
        metavar="DIR",
        help="write the answers where the official back-tester reads them (default: no)",
    )
    options.add_argument(
        "--report", type=Path, metavar="DIR", help="write a page with figures (default: no)"
    )
    options.add_argument(
        "--work-dir",
        type=Path,
        default=WORK_DIR,
        metavar="DIR",
        help=f"models and scores of this and earlier runs (default: {WORK_DIR})",
    )


# ---------------------------------------------------------------- the run


def main() -> int:
    """Replay and report; 0 if everything asked for was scored."""
    args = parser().parse_args()
    if args.command == "compare":
        return _compare(args.champion, args.challenger)
    configure_logging("warning")
    run = _Run.of(args)
    _require_outputs(args)
    with locked(args.work_dir, "the back-test"):
        with _remembered(args.work_dir, run.settings):
            plans = run.plan()
            run.work_off(plans)
        document = run.document(plans)
        print_figures(document)
        if document["markets"]:
            _write(args, run, document)
    for failure in run.failures:
        note(failure)
    return 1 if run.failures else 0


@contextmanager
def _remembered(work_dir: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Keep note of the run, and say of an interrupted one before it if it was another."""
    before = interrupted_run(work_dir)
    if before is not None and (changed := differing(before, settings)):
        note(
            f"the run before was interrupted and had other settings ({'; '.join(changed)}): its "
            "work is kept for them, and nothing of it is mixed into this one."
        )
    note_run(work_dir, settings, ended=False)
    try:
        yield
    except KeyboardInterrupt:
        note(f"What is done is kept in {work_dir}; repeat the command to go on.")
        raise
    note_run(work_dir, settings, ended=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Everything asked for, and what went wrong on the way."""

    markets: tuple[Market, ...]
    prompts: Prompts
    settings: dict[str, Any]  # as the document and the work folder show them
    jobs: int
    scheduler: str | None
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, args: Namespace) -> "_Run":
        """Check the arguments as a whole. Raises: MinerError."""
        settings = settings_from(args)
        if args.prompts < 1:
            raise ConfigError(f"--prompts {args.prompts} is too few; ask for at least 1.")
        baselines = _baselines(args.baselines)
        if args.closed_form:
            _require_laws(args, baselines)
        if args.scheduler and args.export_predictions:
            raise ConfigError(
                "--export-predictions writes every path of every answer, which do not travel from "
                "a cluster; leave out one of it and --scheduler."
            )
        source = open_source(settings)
        markets = tuple(
            Market(
                asset=asset,
                frequency=frequency,
                settings=settings,
                train_until=args.train_until,
                baselines=baselines,
                work_dir=args.work_dir,
                export_dir=args.export_predictions,
                closed_form=args.closed_form,
            )
            for asset, frequency in _pairs(source, args)
        )
        times = None if args.prompt_times is None else _read_times(args.prompt_times)
        return cls(
            markets=markets,
            prompts=Prompts(start=args.start, end=args.end, count=args.prompts, times=times),
            settings=_shown_settings(args, settings, baselines),
            jobs=settings.jobs,
            scheduler=args.scheduler,
        )

    def plan(self) -> list[Plan]:
        """The markets that can be replayed; the others become failures."""
        plans = []
        for market in self.markets:
            try:
                plans.append(plan_market(market, self.prompts))
            except MinerError as error:
                self.failures.append(str(error))
        return plans

    def work_off(self, plans: list[Plan]) -> None:
        """Train and replay what is missing, side by side; keeps all that was done."""
        waiting = [plan for plan in plans if plan.todo]
        if not waiting:
            return
        scores = {plan.market.name: Scores(plan) for plan in waiting}
        with showing_progress({plan.market.name: _steps(plan) for plan in waiting}) as show:

            def on_step(name: str, step: str, found: Any) -> None:
                show(name, step)
                if found is not None:
                    with suppress(StateError):  # tried again, and then complained of, at the end
                        scores[name].keep(found)

            with open_pool(self.jobs, self.scheduler, PROGRAM, on_step) as pool:
                work_off(pool, self._jobs(pool, waiting, scores), self._failed)

    def _jobs(self, pool: TaskPool, plans: list[Plan], scores: dict[str, Scores]) -> Iterator[Job]:
        """What can be done at once: trainings, and prompts whose models are there."""
        # Every part carries the set that it replays: no more of them than keep all busy.
        most = min(
            pool.size, -(-TASKS_EACH * pool.size // sum(len(plan.missing) for plan in plans))
        )

        def replays(plan: Plan, moment_: int) -> Sequence[Job]:
            parts = max(1, min(most, len(plan.missing[moment_]) // CHUNK_PROMPTS))
            return replay_jobs(plan, moment_, parts, scores[plan.market.name])

        for plan in plans:
            for moment_ in plan.untrained:
                yield training_job(plan.market, moment_, partial(replays, plan, moment_))
        for plan in plans:
            for moment_ in sorted(plan.missing.keys() - set(plan.untrained)):
                yield from replays(plan, moment_)

    def _failed(self, _: Job, error: Exception) -> None:
        """One sentence for what cannot be done; a bug keeps its traceback, and ends it all."""
        if not isinstance(error, MinerError):
            raise error
        if str(error) not in self.failures:
            self.failures.append(str(error))

    def document(self, plans: list[Plan]) -> dict[str, Any]:
        """Everything that was scored, as `--json` writes it."""
        entries = []
        for plan in plans:
            done = load_scores(plan.scores)
            prompts = [done[time] for time in plan.times.tolist() if time in done]
            if len(prompts) < len(plan.times):
                continue  # its failure says why
            market = plan.market
            name = market.competition.name
            entries.append(market_entry(market.asset, market.frequency, name, plan.bars, prompts))
        return {"schema": SCHEMA, "settings": self.settings, "markets": entries}

    def explain(self, document: dict[str, Any]) -> dict[str, Any]:
        """What the report says about why, by market; costs some replays more."""
        from report import EXPLAIN_STEPS  # figures take long to import

        markets = {market.name: market for market in self.markets}
        entries = {market_name(entry): entry for entry in document["markets"]}
        insights: dict[str, Any] = {}

        def keep(name: str, found: Any) -> Sequence[Job]:
            insights[name] = found
            return ()

        jobs = [
            Job(name=name, work=_explain, args=(markets[name], entry), then=partial(keep, name))
            for name, entry in entries.items()
        ]
        with (
            showing_progress(dict.fromkeys(entries, EXPLAIN_STEPS)) as show,
            open_pool(self.jobs, None, PROGRAM, lambda name, step, _: show(name, step)) as pool,
        ):
            work_off(pool, jobs, self._failed)
        return insights


def _explain(market: Market, entry: dict[str, Any]) -> Any:
    """The task, of this machine alone: it reads the work folder."""
    from report import explain_market

    return explain_market(
        market.history(),
        EngineViews(market, start_times(entry)),
        market.competition,
        entry,
        seed=market.settings.seed,
        on_step=lambda: tell(market.name, "report"),
    )


def _steps(plan: Plan) -> int:
    return len(plan.untrained) * progress_steps(plan.market.frequency) + plan.todo


def _baselines(text: str) -> tuple[str, ...]:
    """The baselines named, in their usual order."""
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in BASELINES]
    if unknown:
        raise ConfigError(
            f"baseline {unknown[0]!r} is unknown; --baselines takes any of {','.join(BASELINES)}."
        )
    if Garch.name in wanted:
        require_arch()
    return tuple(name for name in BASELINES if name in wanted)


def _require_laws(args: Namespace, baselines: tuple[str, ...]) -> None:
    """Raises: ConfigError if something asked for needs paths."""
    for flag, value in {
        "--export-predictions": args.export_predictions,
        "--report": args.report,
    }.items():
        if value is not None:
            raise ConfigError(
                f"{flag} needs paths, which --closed-form does not draw; leave out one of the two."
            )
    for name in WITHOUT_LAW:
        if name in baselines:
            raise ConfigError(
                f"baseline {name} has no law in closed form; leave it out of --baselines, or leave "
                "out --closed-form."
            )


def _pairs(source: BarSource, args: Namespace) -> list[tuple[str, Frequency]]:
    served = source.frequencies()
    missing = [asset for asset in args.assets if asset not in served]
    if missing:
        raise DataError(f"{', '.join(missing)} is not in this source; it has {', '.join(served)}.")
    wanted = [Frequency(args.frequency)] if args.frequency else list(Frequency)
    pairs = [
        (asset, frequency)
        for asset in (dict.fromkeys(args.assets) or served)
        for frequency in wanted
        if frequency in served[asset]
    ]
    if not pairs:
        raise DataError(
            f"{', '.join(args.assets) or 'this source'} has no bars for {' or '.join(wanted)}; "
            "ask for another asset or frequency."
        )
    return sorted(pairs, key=lambda pair: wanted.index(pair[1]))


def _read_times(file: Path) -> IntArray:
    """Start times from a file, one a line. Raises: DataError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"prompt times {file} cannot be read: {reason}.") from None
    times = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            times.append(_time_of(text))
        except (ConfigError, ValueError):
            raise DataError(
                f"{file}, line {number}: {text[:40]!r} is no time from 2000 to 2100; write Unix "
                "seconds or ISO 8601, e.g. 2025-12-01T00:00:00Z."
            ) from None
    if not times:
        raise DataError(f"{file} holds no prompt time; write one a line.")
    return np.array(times, dtype=np.int64)


def _time_of(text: str) -> int:
    """Unix seconds of either notation; digits alone may be a date, e.g. 20251201.

    Raises: ConfigError, ValueError.
    """
    if text.isdecimal() and EARLIEST_TS <= (ts := int(text)) < LATEST_TS:
        return ts
    return moment(text)


def _shown_settings(args: Namespace, settings: Any, baselines: tuple[str, ...]) -> dict[str, Any]:
    """What the results depend on; not what they do not, such as the number of processes."""

    def readable(time: int | None) -> str | None:
        return None if time is None else format_iso(time)

    return {
        "source": settings.source,
        "archive_dir": None if settings.archive_dir is None else str(settings.archive_dir),
        "profile": settings.profile,
        "seed": settings.seed,
        "days": settings.days,
        "train_until": readable(args.train_until),
        "start": readable(args.start),
        "end": readable(args.end),
        "prompts": None if args.prompt_times else args.prompts,
        "prompt_times": None if args.prompt_times is None else str(args.prompt_times),
        "assets": list(dict.fromkeys(args.assets)),
        "frequency": args.frequency,
        "baselines": list(baselines),
        "closed_form": args.closed_form,
        "program": program_key("walk_forward"),
    }


# ---------------------------------------------------------------- what is written


def _require_outputs(args: Namespace) -> None:
    """See before the work that its results can be written. Raises: StateError."""
    for flag, folder in (
        ("--export-predictions", args.export_predictions),
        ("--report", args.report),
    ):
        if folder is not None:
            require_writable(folder, flag)
    if args.json is not None:
        require_file(args.json, "--json")


def _write(args: Namespace, run: _Run, document: dict[str, Any]) -> None:
    if args.json is not None:
        write_atomically(args.json, orjson.dumps(document) + b"\n")
        note(f"scores: {args.json}")
    if args.export_predictions is not None:
        note(f"predictions: {args.export_predictions / PREDICTIONS}")
    if args.report is not None:
        from report import write_report

        note(f"report: {write_report(args.report, document, run.explain(document))}")


# ---------------------------------------------------------------- champion and challenger


def _compare(champion: Path, challenger: Path) -> int:
    print_contest(compare_documents(_read_document(champion), _read_document(challenger)))
    return 0


def _read_document(file: Path) -> dict[str, Any]:
    try:
        return check_document(orjson.loads(file.read_bytes()), str(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise DataError(f"{file} is not valid JSON; write it with --json.") from None


if __name__ == "__main__":
    run_script(main)
