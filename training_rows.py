"""Rows to learn from: splits by time, sampled leads, features with their targets.

Stochastic lead sampling: each base time draws its leads at random, evenly over
leads, so the number of training rows does not grow with the number of leads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

import numpy as np
from numpy.random import Generator

from config import DAY_S, FrequencySpec, MarketHours
from domain import FloatArray, IntArray
from features import (
    FeatureFrame,
    ReturnGrid,
    Standardiser,
    bucket_edges,
    bucket_targets,
    feature_frame,
    fit_standardiser,
    initial_state,
    move_sizes,
    trace_ewma,
    window_sums,
)
from pooled_prior import PooledPrior, pooled_clock
from seasonality import EventTimes, fit_profile

FOLDS: Final = 3
VALIDATION_SHARE: Final = 0.24  # of all bars, over all folds together
BURN_IN_DAYS: Final = 2.0  # first bars, whose averages are still empty, train nothing
BURN_IN_SHARE: Final = 0.15  # at most this part of a short history
SESSION_SHARE: Final = 6  # a week with a holiday has four sessions: a sixth of the clock
CENTRE_LIMIT: Final = 5.0  # centre targets are clipped at this many scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Bars before `train_end` may teach; rows `begin` to `end` judge."""

    train_end: int
    begin: int
    end: int


def rolling_splits(n_bars: int, horizon_bars: int) -> tuple[Fold, ...]:
    """Folds by time over the last bars, an embargo of one horizon before each.

    Histories too short for several folds of two horizons get fewer.
    """
    judged = int(VALIDATION_SHARE * n_bars)
    count = max(1, min(FOLDS, judged // (2 * horizon_bars)))
    size = judged // count
    begins = [n_bars - judged + fold * size for fold in range(count)]
    return tuple(
        Fold(train_end=begin - horizon_bars, begin=begin, end=min(begin + size, n_bars))
        for begin in begins
    )


def fewest_bars(spec: FrequencySpec) -> tuple[int, int]:
    """How long a grid must be for training, and how many of its bars must be known."""
    length = spec.minimum_days * spec.bars_per_day
    return ceil(length), ceil(length / SESSION_SHARE)


def sample_leads(rng: Generator, n_base: int, n_leads: int, *, draws: int = 1) -> IntArray:
    """Draw leads for base times: (n_base, draws) indices, distinct within a row.

    Every run of `n_leads` consecutive base times draws each lead equally often,
    so the sampling is even to within one run.
    """
    draws = min(draws, n_leads)
    runs = -(-n_base // n_leads)
    order = rng.permuted(np.tile(np.arange(n_leads), (runs, 1)), axis=1)
    position = (np.arange(n_leads)[:, None] + np.arange(draws)) % n_leads
    return order[:, position].reshape(runs * n_leads, draws)[:n_base]


def jitter_leads(rng: Generator, spec: FrequencySpec, lead: int, n: int) -> IntArray:
    """Leads in bars within anchor `lead`'s bucket; (n,).

    Between the anchor before it and itself: on the sampling grid (every fifth
    minute for HF) where that meets the bucket, else on every bar.
    """
    low = (spec.leads_s[lead - 1] if lead else 0) // spec.bar_s
    high = spec.leads_s[lead] // spec.bar_s
    grid = max(spec.lead_sampling_s // spec.bar_s, 1)
    choices = np.arange(low + 1, high + 1)
    on_grid = choices[choices % grid == 0]
    return rng.choice(on_grid if len(on_grid) else choices, size=n)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Market:
    """All bars of the history as features and targets under one standardiser."""

    spec: FrequencySpec
    grid: ReturnGrid
    standardiser: Standardiser
    frame: FeatureFrame
    targets: FloatArray  # (buckets, n): mean |z| that followed
    z: FloatArray
    seasonal: FloatArray  # (n + 1,): running sum of seasonal variance
    travelled: FloatArray  # (n + 1,): running sum of returns, bps
    known: IntArray  # (n + 1,): running count of bars
    prior: PooledPrior | None  # what markets have in common, as it was known

    def days_known(self, train_end: int) -> float:
        """Days of bars before `train_end`; hours without bars do not count."""
        return float(self.known[train_end]) / self.spec.bars_per_day

    def centre_targets(self, rows: IntArray, lead_bars: IntArray) -> FloatArray:
        """Return over the lead in units of level · √seasonal variance; (n,), NaN unknown."""
        end = rows + 1 + lead_bars
        inside = np.minimum(end, len(self.grid))
        count = self.known[inside] - self.known[rows + 1]
        unit = self.standardiser.unit_bps * self.frame.level[rows]
        scale = unit * np.sqrt(self.seasonal[inside] - self.seasonal[rows + 1])
        move = self.travelled[inside] - self.travelled[rows + 1]
        target = np.clip(move / np.maximum(scale, 1e-12), -CENTRE_LIMIT, CENTRE_LIMIT)
        return np.where((end <= len(self.grid)) & (2 * count >= lead_bars), target, np.nan)


def prepare_market(
    spec: FrequencySpec,
    grid: ReturnGrid,
    warm_up: ReturnGrid,
    hours: MarketHours,
    train_end: int,
    *,
    prior: PooledPrior | None = None,
    events: Sequence[EventTimes] = (),
) -> Market:
    """Learn clock, unit and cap from the bars before `train_end`, apply them to all.

    `prior` and `events` must have been known by then.

    `warm_up` holds the bars right before the grid (or none): averages start from
    them, as they will when the models serve with more history than they learned.
    """
    past = grid.part(0, train_end)
    own = fit_profile(past.open_ts, move_sizes(past), bar_s=spec.bar_s, hours=hours, events=events)
    profile = pooled_clock(own, prior, past.known / spec.bars_per_day)
    standardiser = fit_standardiser(past, profile)
    rows = np.arange(len(grid))
    first = warm_up if len(warm_up) else grid
    start = initial_state(spec, int(first.open_ts[0]))
    state = trace_ewma(spec, standardiser.apply(warm_up), start).state if len(warm_up) else start
    frame = feature_frame(spec, standardiser, grid, state, rows)
    z = standardiser.apply(grid)
    sums = window_sums(z)
    targets = [bucket_targets(spec, sums, rows, b) for b in range(len(spec.bucket_ends))]
    return Market(
        spec=spec,
        grid=grid,
        standardiser=standardiser,
        frame=frame,
        targets=np.stack(targets),
        z=z,
        seasonal=_running(standardiser.profile.at(grid.open_ts) ** 2),
        travelled=_running(np.where(grid.span > 0, grid.returns, 0.0)),
        known=sums.count,
        prior=prior,
    )


def _running(values: FloatArray) -> FloatArray:
    return np.concatenate(([0.0], np.cumsum(values)))


def recency_weights(end_ts: IntArray, now: int, half_life_days: float) -> FloatArray:
    """Exponential sample weights, 1 at `now`; shape of `end_ts`."""
    return np.asarray(0.5 ** ((now - end_ts) / DAY_S / half_life_days), dtype=np.float64)


def training_rows(market: Market, train_end: int) -> IntArray:
    """Base times that may teach: bars before `train_end`, the first ones left out."""
    burn_in = min(BURN_IN_DAYS * market.spec.bars_per_day, BURN_IN_SHARE * train_end)
    return np.arange(int(burn_in), train_end)


def rows_known_by(market: Market, bucket: int, rows: IntArray, train_end: int) -> IntArray:
    """The rows whose target in the bucket ends before `train_end`."""
    end = bucket_edges(market.spec)[bucket][1]
    inside = rows[rows + end < train_end]
    known = np.isfinite(market.targets[bucket, inside])
    return np.asarray(inside[known], dtype=np.int64)
