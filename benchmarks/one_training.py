"""One training of an asset at HF in a process of its own, and what it took.

Benchmarks start it as a worker of `train_models.py` would be, so that neither memory
nor caches of another training are counted.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Final

import lightgbm
from threadpoolctl import threadpool_limits

import lgbm_trainer
from config import DAY_S, FREQUENCIES, Frequency, Settings, protocol_profile
from data_fetcher import SimulatedSource, open_source
from domain import MarketHistory

YEAR_DAYS: Final = 365
SPEC: Final = FREQUENCIES[Frequency.HF]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a training took; seconds of CPU of its thread unless named otherwise."""

    seconds: float  # loading and the fits done twice left out
    bare_s: float  # of the same fits by LightGBM alone; 0 if they were not done
    wall_s: float
    rows: int  # of all final centre models together
    bars: int
    peak_mb: float  # of the whole process


def train_alone(settings: Settings, asset: str, **options: Any) -> Cost:
    """Run `_train` in a process of its own. Raises what it raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_train, settings, asset, **options).result()


def year_of(settings: Settings, asset: str) -> MarketHistory:
    """The last year of the asset's minutes; a simulated one where the source has less."""
    history = open_source(settings).load(asset, Frequency.HF).history
    if history.bars.end_ts - int(history.bars.open_ts[0]) < (YEAR_DAYS - 1) * DAY_S:
        market = SimulatedSource(seed=settings.seed, days=YEAR_DAYS, assets=(asset,))
        history = market.load(asset, Frequency.HF).history
    return history


def _train(
    settings: Settings,
    asset: str,
    *,
    days: float = YEAR_DAYS,
    leads: int = len(SPEC.leads_s),
    bare: bool = False,
) -> Cost:
    """Train on so many days; `leads` anchor leads up to an hour, `bare`: fit everything twice."""
    history = year_of(settings, asset)
    if leads != len(SPEC.leads_s):
        bars = [round(SPEC.horizon_bars * (lead + 1) / leads) for lead in range(leads)]
        changed = replace(SPEC, leads_s=tuple(SPEC.bar_s * each for each in bars))
        setattr(lgbm_trainer, "FREQUENCIES", {Frequency.HF: changed})  # noqa: B010  # not ours to type
    fits = _Fits()
    if bare:
        lightgbm.train = partial(_train_twice, lightgbm.train, fits)
    with threadpool_limits(1):
        begun, wall = thread_time(), perf_counter()
        result = lgbm_trainer.train(
            history, days=days, seed=settings.seed, profile=protocol_profile(settings.profile)
        )
        spent = thread_time() - begun - fits.extra_s, perf_counter() - wall
    return Cost(
        seconds=spent[0],
        bare_s=fits.bare_s,
        wall_s=spent[1],
        rows=sum(lead.rows for lead in result.leads),
        bars=int(min(days * SPEC.bars_per_day, len(history.bars))),
        peak_mb=_peak_mb(),
    )


@dataclass(slots=True)
class _Fits:
    """Time of the fits that were done only to be timed, and of all that went with them."""

    bare_s: float = 0.0
    extra_s: float = 0.0


def _train_twice(
    train: Any,
    fits: _Fits,
    settings: Any,
    data: lightgbm.Dataset,
    num_boost_round: int,
    valid_sets: Any = (),
    callbacks: Any = (),
) -> lightgbm.Booster:
    """`lightgbm.train` on the same matrices, bare and then for the training itself."""
    begun = thread_time()
    copies = [_same(each) for each in (data, *valid_sets)]
    bare = thread_time()
    stop = [lightgbm.early_stopping(lgbm_trainer.PATIENCE, verbose=False)] if callbacks else []
    train(settings, copies[0], num_boost_round, valid_sets=copies[1:], callbacks=stop)
    ended = thread_time()
    fits.bare_s += ended - bare
    fits.extra_s += ended - begun
    booster: lightgbm.Booster = train(
        settings, data, num_boost_round, valid_sets=list(valid_sets), callbacks=list(callbacks)
    )
    return booster


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
