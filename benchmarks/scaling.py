"""How tasks scale over the workers of a cluster, and what travels to them and back.

    python -m benchmarks.scaling --source archive --archive-dir bars --asset BTC

One set is trained and then replayed by one and by two workers of a dask cluster of this
machine, in turn; workers know the bars already. Sizes are those of what is sent. With
fewer idle cores than workers the figures say nothing.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

import distributed
import numpy as np
from distributed.protocol import serialize
from distributed.utils import nbytes

from benchmarks.measuring import bench_parser, bench_settings, machine
from config import DAY_S, Frequency
from console import run_script, table
from errors import MinerError
from settings import Settings
from task_pool import Job, Shared, TaskPool, open_pool, work_off
from walk_forward import (
    DEFAULT_BASELINES,
    Market,
    Plan,
    Prompts,
    Scores,
    plan_market,
    replay_jobs,
    training_job,
)

PARTS: Final = 8  # tasks of a replay
SMALL: Final = 2000  # tasks that do nothing, for what one costs the scheduler
KEPT_BACK_DAYS: Final = 3  # of bars, which are replayed
PROGRAM: Final = "walk_forward"
WORKERS: Final = (1, 2)


def main() -> int:
    """Train, replay in turn, print both tables."""
    options = bench_parser("Measure the scaling over workers of a cluster.", "scaling")
    options.add_argument(
        "--prompts", type=int, default=160, metavar="N", help="that are replayed (default: 160)"
    )
    options.add_argument(
        "--turns", type=int, default=3, metavar="N", help="of each number of workers (default: 3)"
    )
    args = options.parse_args()
    print(machine())
    with TemporaryDirectory() as folder:
        for frequency in Frequency:
            _measure(args, bench_settings(args), frequency, Path(folder))
    return 0


def _measure(args: Namespace, settings: Settings, frequency: Frequency, folder: Path) -> None:
    market = Market(
        asset=args.asset,
        frequency=frequency,
        settings=settings,
        train_until=None,
        baselines=DEFAULT_BASELINES,
        work_dir=folder,
    )
    end = market.history().bars.end_ts
    market = replace(market, train_until=end - KEPT_BACK_DAYS * DAY_S)
    asked = Prompts(start=None, end=None, count=args.prompts, times=None)
    plan = plan_market(market, asked)
    (moment,) = plan.untrained
    training = training_job(market, moment, list)
    trained = _Measured.of([training])
    plan = plan_market(market, asked)
    replays = replay_jobs(plan, moment, PARTS, Scores(plan))
    replayed = _Measured.of(replays)
    _show_sizes(market, training, trained, replays, replayed, plan)
    _show_scaling(market, replays, args.turns)


class _Measured:
    """Results of jobs done by one process of this machine, and the CPU seconds they took."""

    def __init__(self, results: list[Any], cpu_s: float) -> None:
        self.results, self.cpu_s = results, cpu_s

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> "_Measured":
        """Do them."""
        results: list[Any] = []
        before = os.times()

        def keep(job: Job, result: Any) -> Iterable[Job]:
            results.append(result)
            return job.then(result)

        with open_pool(1, None, PROGRAM, lambda *_: None) as pool:
            work_off(pool, [_with(job, keep) for job in jobs], _fail)
        after = os.times()
        spent = after.children_user + after.children_system
        return cls(results, spent - before.children_user - before.children_system)


def _with(job: Job, keep: Callable[[Job, Any], Iterable[Job]]) -> Job:
    return replace(job, then=lambda result: keep(job, result))


def _fail(job: Job, error: Exception) -> None:
    raise MinerError(f"{job.name}: {error}") from error


# ---------------------------------------------------------------- what travels


def _show_sizes(
    market: Market,
    training: Job,
    trained: _Measured,
    replays: Sequence[Job],
    replayed: _Measured,
    plan: Plan,
) -> None:
    bars, priors = training.args[0], training.args[1]
    prompts = sum(len(found) for found in replayed.results)
    rows = [
        ("bars, once per worker", f"{len(market.history().price_bars)} bars", _kb(bars.value())),
        ("what assets share, once", f"{len(priors)} pools", _kb([p.value() for p in priors])),
        ("a training, there", f"{trained.cpu_s:.0f} s of CPU", _kb(_own(training))),
        ("a training, back", f"{len(trained.results[0].files)} files", _kb(trained.results[0])),
        (
            f"a replay of {len(replays[0].args[-1])} prompts, there",
            f"{1e3 * replayed.cpu_s / prompts:.0f} ms of CPU a prompt",
            _kb(_own(replays[0])),
        ),
        ("a prompt, back, told and then given", "twice", _kb(replayed.results[0][0])),
    ]
    table(f"What travels, {market.name}, {plan.todo} prompts", ("what", "of", "kB"), rows)


def _own(job: Job) -> list[Any]:
    """What is sent for this job alone."""
    return [
        arg
        for arg in job.args
        if not isinstance(arg, Shared) and not (isinstance(arg, list) and arg)
    ]


def _kb(value: Any) -> str:
    _, frames = serialize(value, serializers=["pickle"])
    return f"{sum(map(nbytes, frames)) / 1e3:.1f}"


# ---------------------------------------------------------------- scaling


def _show_scaling(market: Market, jobs: Sequence[Job], turns: int) -> None:
    seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    overhead = []
    for _ in range(turns):
        for workers in WORKERS:
            with _cluster(workers) as pool:
                _timed(
                    pool, [*jobs[:workers], *jobs[:workers]]
                )  # bars and program are there, from now on
                seconds[workers].append(_timed(pool, jobs))
                if workers == WORKERS[-1]:
                    overhead.append(_timed(pool, _small(SMALL)) / SMALL)
    alone = np.array(seconds[1])
    rows = [
        (
            str(workers),
            f"{np.median(times):.2f}",
            f"{min(times):.2f}-{max(times):.2f}",
            f"{np.median(alone / np.array(times)):.2f}",
        )
        for workers, times in seconds.items()
    ]
    table(f"Replays of {market.name} by workers", ("workers", "s", "range", "speed-up"), rows)
    print(f"a task that does nothing: {1e3 * np.median(overhead):.2f} ms of this machine")


def _timed(pool: TaskPool, jobs: Sequence[Job]) -> float:
    begun = perf_counter()
    work_off(pool, [_with(job, lambda *_: ()) for job in jobs], _fail)
    return perf_counter() - begun


def _small(count: int) -> list[Job]:
    return [Job(name="", work=abs, args=(number,), then=lambda _: ()) for number in range(count)]


@contextmanager
def _cluster(workers: int) -> Iterator[TaskPool]:
    with (
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            silence_logs="ERROR",
        ) as running,
        open_pool(1, running.scheduler_address, PROGRAM, lambda *_: None) as pool,
    ):
        yield pool


if __name__ == "__main__":
    run_script(main)
