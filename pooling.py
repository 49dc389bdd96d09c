"""Fitting what markets have in common.

Every asset counts by its days of bars, up to a limit, so that no long history
drowns the others and no short one is taken at its word.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, asset_spec
from domain import FloatArray, MarketHistory
from features import (
    ReturnGrid,
    bucket_targets,
    feature_frame,
    fit_standardiser,
    initial_state,
    move_sizes,
    return_grid,
    window_sums,
)
from pooled_prior import PooledPrior
from seasonality import EventTimes, SeasonalProfile, fit_profile, mean_profile
from training_rows import BURN_IN_DAYS, BURN_IN_SHARE, fewest_bars, recency_weights, sample_leads
from uncertainty_engine import blend_ridge, bucket_rows, fit_log_linear

POOL_HISTORY_DAYS: Final = {Frequency.HF: 120.0, Frequency.LF: 365.0}
LONGEST_DAYS: Final = 120.0  # of bars, by which an asset counts at most
ROWS: Final = 20_000  # base times per asset
LEAST_ASSETS: Final = 2
DRAWS: Final = 3  # lead buckets drawn per base time


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One asset's rows: per bucket features (n, features), target (n,) and weight (n,)."""

    asset: str
    frequency: Frequency
    days: float
    profile: SeasonalProfile
    rows: tuple[tuple[Any, FloatArray, FloatArray], ...]


def pool_window(history: MarketHistory, until: int) -> MarketHistory:
    """The part of a history that a pool at `until` reads: the last bars known by then.

    An asset whose bars ended long before still shows how volatility behaves.
    """
    known = history.known_at(until)
    if not len(known.bars):
        return known
    start = known.bars.end_ts - int(POOL_HISTORY_DAYS[history.frequency] * DAY_S)
    bars = known.bars.between(start, None)
    return replace(known, bars=bars, price_bars=bars)


def fit_pooled_prior(
    histories: Iterable[MarketHistory], until: int, events: Sequence[EventTimes]
) -> PooledPrior | None:
    """Blend and clocks of all the assets together, from bars that closed by `until`.

    The histories are of one frequency, and none is held on to. None if fewer than two
    assets have enough bars by then: a market that leaned on itself would trust its own
    few days.
    """
    parts = [part for history in histories if (part := _part(history, until, events)) is not None]
    if len(parts) < LEAST_ASSETS:
        return None
    frequency = parts[0].frequency
    spec = FREQUENCIES[frequency]
    blend = []
    for bucket in range(len(spec.bucket_ends)):
        x = np.vstack([part.rows[bucket][0] for part in parts])
        y = np.concatenate([part.rows[bucket][1] for part in parts])
        weight = np.concatenate([_weight(part, bucket) for part in parts])
        blend.append(fit_log_linear(x, y, weight, ridge=blend_ridge(spec)))
    hours = {part.profile.hours for part in parts}
    return PooledPrior(
        frequency=frequency,
        until=until,
        assets=tuple(part.asset for part in parts),
        blend=tuple(blend),
        profiles={one: _mean_clock([p for p in parts if p.profile.hours is one]) for one in hours},
    )


def _weight(part: _Part, bucket: int) -> FloatArray:
    weight = part.rows[bucket][2]
    return np.asarray(min(part.days, LONGEST_DAYS) * weight / weight.sum(), dtype=np.float64)


def _mean_clock(parts: Sequence[_Part]) -> SeasonalProfile:
    return mean_profile(
        [part.profile for part in parts], [min(part.days, LONGEST_DAYS) for part in parts]
    )


def _part(history: MarketHistory, until: int, events: Sequence[EventTimes]) -> _Part | None:
    """The asset's rows, or None if it has too few bars for them."""
    spec = FREQUENCIES[history.frequency]
    window = pool_window(history, until)
    if not len(window.bars):
        return None
    grid = return_grid(window.bars)
    length, known = fewest_bars(spec)
    if len(grid) < length or grid.known < known:
        return None
    hours = asset_spec(history.asset).hours
    profile = fit_profile(
        grid.open_ts, move_sizes(grid), bar_s=spec.bar_s, hours=hours, events=events
    )
    rows = _rows(spec, grid, profile)
    if not all(len(target) for _, target, _ in rows):
        return None
    days = grid.known / spec.bars_per_day
    return _Part(
        asset=history.asset, frequency=history.frequency, days=days, profile=profile, rows=rows
    )


def _rows(
    spec: FrequencySpec, grid: ReturnGrid, profile: SeasonalProfile
) -> tuple[tuple[Any, FloatArray, FloatArray], ...]:
    """Design, target and recency weight of the drawn base times, per lead bucket."""
    standardiser = fit_standardiser(grid, profile)
    first = int(min(BURN_IN_DAYS * spec.bars_per_day, BURN_IN_SHARE * len(grid)))
    base = np.arange(first, len(grid), max(1, (len(grid) - first) // ROWS))
    state = initial_state(spec, int(grid.open_ts[0]))
    frame = feature_frame(spec, standardiser, grid, state, base)
    sums = window_sums(standardiser.apply(grid))
    drawn = sample_leads(
        np.random.default_rng(len(grid)), len(base), len(spec.bucket_ends), draws=DRAWS
    )
    weight = recency_weights(frame.end_ts, int(frame.end_ts[-1]), spec.blend_half_life_days)
    rows = []
    for bucket in range(len(spec.bucket_ends)):
        target = bucket_targets(spec, sums, base, bucket)
        keep = np.isfinite(target) & (drawn == bucket).any(axis=1)
        design = bucket_rows(frame, bucket, np.flatnonzero(keep))
        rows.append((design, target[keep], weight[keep]))
    return tuple(rows)
