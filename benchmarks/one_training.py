"""One training of an asset at HF in a process of its own, and what it took.

Benchmarks start it as a worker of `train_models.py` would be, so that neither memory
nor caches of another training are counted. What it leans on is fitted beforehand, once,
in another process, as `train_models.py` does.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Final, TypeVar

import lightgbm
from threadpoolctl import threadpool_limits

import lgbm_trainer
from config import DAY_S, FREQUENCIES, Frequency
from data_fetcher import SimulatedSource, VersionedSource, open_source
from domain import MarketHistory
from pool_store import pool_file, read_pool
from pooled_prior import PooledPrior, pool_moments
from protocol import protocol_profile
from settings import Settings

YEAR_DAYS: Final = 365
R = TypeVar("R")
SPEC: Final = FREQUENCIES[Frequency.HF]


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """How long something took: CPU of the thread, and by the wall clock; seconds."""

    cpu_s: float
    wall_s: float

    @classmethod
    def now(cls) -> "Time":
        """A moment; only differences mean anything."""
        return cls(cpu_s=thread_time(), wall_s=perf_counter())

    def __add__(self, other: "Time") -> "Time":
        return Time(cpu_s=self.cpu_s + other.cpu_s, wall_s=self.wall_s + other.wall_s)

    def __sub__(self, other: "Time") -> "Time":
        return Time(cpu_s=self.cpu_s - other.cpu_s, wall_s=self.wall_s - other.wall_s)


NOTHING: Final = Time(cpu_s=0.0, wall_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a training took; loading, and the fits done twice, left out."""

    whole: Time
    bare: Time  # the same fits by LightGBM alone; nothing if they were not done
    rows: int  # of all final centre models together
    bars: int
    peak_mb: float  # of the whole process


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """What trainings lean on, fitted; and what that took, loading included."""

    files: tuple[Path, ...]
    assets: tuple[str, ...]  # of the newest one; none where one asset is all there is
    time: Time
    peak_mb: float


def fit_pools(settings: Settings, asset: str, folder: Path) -> Pools:
    """The pools of a training on the last year, in a process of its own, kept in `folder`."""
    return _alone(_fit_pools, settings, asset, folder)


def train_alone(settings: Settings, asset: str, pools: Pools, **options: Any) -> Cost:
    """Run `_train` in a process of its own. Raises what it raises."""
    return _alone(_train, settings, asset, pools, **options)


def year_source(settings: Settings, asset: str) -> VersionedSource:
    """The source of the settings; a simulated one where that has less than a year of minutes."""
    source = open_source(settings)
    bars = source.load(asset, Frequency.HF).history.bars
    if bars.end_ts - int(bars.open_ts[0]) >= (YEAR_DAYS - 1) * DAY_S:
        return source
    assets = tuple(dict.fromkeys((asset, *SimulatedSource(seed=settings.seed).assets)))
    return SimulatedSource(seed=settings.seed, days=YEAR_DAYS, assets=assets)


def year_of(settings: Settings, asset: str) -> MarketHistory:
    """The asset's minutes in `year_source`."""
    return year_source(settings, asset).load(asset, Frequency.HF).history


def _alone(work: Callable[..., R], *args: Any, **options: Any) -> R:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *args, **options).result()


def _fit_pools(settings: Settings, asset: str, folder: Path) -> Pools:
    source = year_source(settings, asset)
    window = lgbm_trainer.fit_window(source.load(asset, Frequency.HF).history, YEAR_DAYS)
    begun = Time.now()
    with threadpool_limits(1):
        files = [pool_file(source, Frequency.HF, at, folder) for at in pool_moments(*window)]
    taken = Time.now() - begun
    newest = read_pool(files[-1])
    return Pools(
        files=tuple(files),
        assets=() if newest is None else newest.assets,
        time=taken,
        peak_mb=_peak_mb(),
    )


def _priors(pools: Pools) -> list[PooledPrior]:
    return [prior for prior in map(read_pool, pools.files) if prior is not None]


# ---------------------------------------------------------------- one training


def _train(
    settings: Settings,
    asset: str,
    pools: Pools,
    *,
    days: float = YEAR_DAYS,
    leads: int = len(SPEC.leads_s),
    bare: bool = False,
) -> Cost:
    """Train on so many days; `leads` anchor leads up to an hour, `bare`: fit everything twice."""
    history, priors = year_of(settings, asset), _priors(pools)
    if leads != len(SPEC.leads_s):
        bars = [round(SPEC.horizon_bars * (lead + 1) / leads) for lead in range(leads)]
        changed = replace(SPEC, leads_s=tuple(SPEC.bar_s * each for each in bars))
        setattr(lgbm_trainer, "FREQUENCIES", {Frequency.HF: changed})  # noqa: B010  # not ours to type
    fits = Fits()
    if bare:
        lightgbm.train = partial(train_twice, lightgbm.train, fits)
    with threadpool_limits(1):
        begun = Time.now()
        result = lgbm_trainer.train(
            history,
            days=days,
            seed=settings.seed,
            profile=protocol_profile(settings.profile),
            priors=priors,
        )
        taken = Time.now() - begun
    return Cost(
        whole=taken - fits.extra,
        bare=fits.bare,
        rows=sum(lead.rows for lead in result.leads),
        bars=int(min(days * SPEC.bars_per_day, len(history.bars))),
        peak_mb=_peak_mb(),
    )


class Fits:
    """Time of the fits that were done only to be timed, and of all that went with them."""

    def __init__(self) -> None:
        self.bare, self.extra = NOTHING, NOTHING
        # Who comes second finds the matrices in the caches.
        self.bare_is_first = cycle((True, False))


def train_twice(
    train: Any,
    fits: Fits,
    settings: Any,
    data: lightgbm.Dataset,
    num_boost_round: int,
    valid_sets: Sequence[lightgbm.Dataset] = (),
    callbacks: Any = (),
) -> lightgbm.Booster:
    """`lightgbm.train` for the training itself, and bare on the same matrices.

    The one or the other comes first, by turns.
    """
    with _counting(fits, "extra"):  # before LightGBM lets go of what it has binned
        copies = [_same(each) for each in (data, *valid_sets)]
    stop = [lightgbm.early_stopping(lgbm_trainer.PATIENCE, verbose=False)] if callbacks else []

    def bare() -> None:
        with _counting(fits, "extra"), _counting(fits, "bare"):
            train(settings, copies[0], num_boost_round, valid_sets=copies[1:], callbacks=stop)

    is_first = next(fits.bare_is_first)
    if is_first:
        bare()
    booster: lightgbm.Booster = train(
        settings, data, num_boost_round, valid_sets=list(valid_sets), callbacks=list(callbacks)
    )
    if not is_first:
        bare()
    return booster


@contextmanager
def _counting(fits: Fits, name: str) -> Iterator[None]:
    begun = Time.now()
    yield
    setattr(fits, name, getattr(fits, name) + (Time.now() - begun))


def _same(data: lightgbm.Dataset) -> lightgbm.Dataset:
    """A data set of the same numbers that LightGBM has not seen yet."""
    return lightgbm.Dataset(
        data.data, label=data.label, weight=data.weight, init_score=data.init_score
    )


def _peak_mb() -> float:
    """What this process held at its peak, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
