"""How far a market moved lately: at the same time of week, in a like state.

The yardstick of the sanity checks. It knows no model: it looks at the same
stretch of the day on each of the last twelve weeks' days (and up to an hour
earlier and later, the clock divided out), leaves out what was closed when the
prompt is open and the other way round, and scales what moved then by how much
livelier or quieter the market is now.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from config import DAY_S, Frequency, MarketHours
from domain import FloatArray, ForecastRequest, IntArray, MarketHistory
from features import fit_standardiser, move_sizes, return_grid
from protocol import IntervalKind, ScoringInterval
from scoring import interval_steps
from seasonality import fit_profile, is_closed, new_york_seconds

MEMORY_DAYS: Final = 84
SHIFTS_S: Final = tuple(range(-3600, 3601, 1200))
MIN_DAYS: Final = 3  # fewer days on which an interval was seen tell nothing
CLOSED_BELOW: Final = 0.1  # of the mean seasonal factor: such bars say nothing about the state
CAP_QUANTILE: Final = 0.999  # one crash must not decide what twelve weeks were like
# What one day's window says about the level of the next is off by this much
# (standard deviation of the log), however alike a few windows happened to be.
LEAST_DAY_ERROR: Final = 0.2

# Elasticities of the mean |return| over a prompt to EWMAs of the past, by
# half-life in bars: pooled regressions over crypto and gold of 2025. They only
# decide what counts as a like state; being 0.1 off moves the yardstick by a
# few per cent in a market whose volatility has just doubled.
STATE_WEIGHTS: Final[dict[Frequency, dict[int, float]]] = {
    Frequency.HF: {12: 0.25, 50: 0.30, 240: 0.15, 1440: 0.25},
    Frequency.LF: {12: 0.10, 48: 0.30, 288: 0.35, 2880: 0.10},
}

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Yardstick:
    """What the past says about one interval.

    `begin`, `end` (m,): point indices of the changes that can be compared, none
    where the market was closed. `expected_bps`: their mean |change|. `error`:
    standard error of its log. `days`: how many past days speak.
    """

    interval: str
    begin: IntArray
    end: IntArray
    expected_bps: float
    error: float
    days: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surroundings:
    """The prompt among past windows like it.

    Row 0 is the prompt itself, further rows are past windows, all (1 + w, n_points):
    `prices` (NaN where unknown, and all of row 0), `variance_time` (seasonal
    variance accumulated, in bars of factor 1) and `unlike` (how many steps so
    far were closed when the prompt's are open, or the other way round).
    `level` (1 + w,): the state of the market when the window was forecast,
    |return| in bps per bar of factor 1.
    """

    prices: FloatArray
    variance_time: FloatArray
    unlike: IntArray
    level: FloatArray
    lead_variance_time: float  # from the anchor to point 0


def survey(request: ForecastRequest, history: MarketHistory, hours: MarketHours) -> Surroundings:
    """Lay the prompt among the past windows like it.

    `history` is what was known when the prompt was answered.
    """
    anchor_ts = history.anchor_ts
    bars = history.bars.between(anchor_ts - (MEMORY_DAYS + 2) * DAY_S, None)
    grid = return_grid(bars)
    profile = fit_profile(grid.open_ts, move_sizes(grid), bar_s=grid.bar_s, hours=hours)
    standardiser = fit_standardiser(grid, profile)
    size = np.abs(standardiser.apply(grid)) * standardiser.unit_bps
    size[profile.at(grid.open_ts) < CLOSED_BELOW] = np.nan

    start_ts = max(request.start_ts + history.scored_lag_s, anchor_ts)
    times = _window_times(request, history)
    known_at = times[:, 0] - max(int(times[0, 0]) - anchor_ts, 0)
    edges = np.arange(grid.open_ts[0] - DAY_S, times.max() + 2 * grid.bar_s, grid.bar_s)
    clock = np.concatenate(([0.0], np.cumsum(profile.at(edges[:-1]) ** 2)))
    variance_time = np.interp(times, edges, clock)
    return Surroundings(
        prices=_prices_at(times, history),
        variance_time=variance_time,
        unlike=_unlike_steps(times, hours),
        level=_level_at(known_at, grid.open_ts + grid.bar_s, size, history.frequency),
        lead_variance_time=float(np.ptp(np.interp((anchor_ts, start_ts), edges, clock))),
    )


def _window_times(request: ForecastRequest, history: MarketHistory) -> IntArray:
    """When the prices of the prompt (row 0) and of its past likes are taken; (1 + w, n_points).

    Windows keep the New York time of day; daylight saving moves them in UTC.
    """
    bar_s = history.price_bars.bar_s
    points = request.grid_ts + history.scored_lag_s
    points -= points % bar_s
    back = DAY_S * np.arange(1, MEMORY_DAYS + 1)[:, None] + np.array(SHIFTS_S)
    start = points[0] - back.ravel()
    start += _utc_offset(points[:1]) - _utc_offset(start)
    first, last = history.price_bars.open_ts[0], history.anchor_ts - (points[-1] - points[0])
    # A day of bars must lie before a window, or its state is anybody's guess.
    start = start[(start >= first + DAY_S) & (start <= last)]
    rows = np.concatenate((points[:1], start))
    return np.asarray(rows[:, None] + (points - points[0]), dtype=np.int64)


def _utc_offset(ts: IntArray) -> IntArray:
    return np.asarray(new_york_seconds(ts) - ts, dtype=np.int64)


def _prices_at(times: IntArray, history: MarketHistory) -> FloatArray:
    """Closes known exactly at `times`, NaN where no bar closed then; shape of `times`."""
    close_ts, close = history.price_bars.close_ts, history.price_bars.close
    at = np.minimum(np.searchsorted(close_ts, times), len(close_ts) - 1)
    return np.where(close_ts[at] == times, close[at], np.nan)


def _unlike_steps(times: IntArray, hours: MarketHours) -> IntArray:
    closed = is_closed(new_york_seconds(times.ravel()), hours).reshape(times.shape)
    unlike = closed[:, :-1] != closed[0, :-1]
    return np.pad(np.cumsum(unlike, axis=1), ((0, 0), (1, 0)))


def _level_at(
    known_at: IntArray, close_ts: IntArray, size: FloatArray, frequency: Frequency
) -> FloatArray:
    """State of the market at each moment; bars without a word are passed over."""
    series = pd.Series(size)
    log_level = np.zeros(len(size))
    for half_life, weight in STATE_WEIGHTS[frequency].items():
        mean = series.ewm(halflife=half_life, ignore_na=True).mean().ffill().to_numpy()
        log_level += weight * np.log(np.maximum(mean, 1e-6))
    rest = 1 - sum(STATE_WEIGHTS[frequency].values())
    log_level += rest * np.log(max(float(np.nanmean(size)), 1e-6))
    at = np.searchsorted(close_ts, known_at, "right") - 1
    return np.asarray(np.exp(log_level[np.maximum(at, 0)]), dtype=np.float64)


def expected_at_start(surroundings: Surroundings) -> float:
    """The mean |change| between the anchor price and point 0, bps."""
    return float(surroundings.level[0] * np.sqrt(surroundings.lead_variance_time))


def measure(
    surroundings: Surroundings, interval: ScoringInterval, request: ForecastRequest
) -> Yardstick:
    """What past windows like the prompt moved over one scored interval."""
    begin, end = _changes(interval, request)
    clock, prices, unlike = (
        surroundings.variance_time,
        surroundings.prices[1:],
        surroundings.unlike[1:],
    )
    move = np.abs(prices[:, end] / prices[:, begin] - 1) * 1e4 / surroundings.level[1:, None]
    unit = np.sqrt(clock[1:][:, end] - clock[1:][:, begin])
    like = (unlike[:, end] == unlike[:, begin]) & (unit > 0)
    valid = like & np.isfinite(move)
    # Just outside a session, windows shifted into it have prices too: under half of them.
    seen = valid.sum(axis=0) >= np.maximum(MIN_DAYS * len(SHIFTS_S), 0.5 * like.sum(axis=0))
    begin, end, move, unit = begin[seen], end[seen], move[:, seen], unit[:, seen]
    pace, error, days = _pace(move, unit, valid[:, seen])
    future = np.sqrt(clock[0, end] - clock[0, begin])
    return Yardstick(
        interval=interval.name,
        begin=begin,
        end=end,
        expected_bps=float(pace * surroundings.level[0] * future.mean()) if len(begin) else 0.0,
        error=error,
        days=days,
    )


def _changes(interval: ScoringInterval, request: ForecastRequest) -> tuple[IntArray, IntArray]:
    """First and last point of every change that the interval is about.

    A scored price is as uncertain as its change since the start.
    """
    steps = interval_steps(interval, request.increment_s, request.n_points)
    end = np.arange(steps, request.n_points, steps, dtype=np.int64)
    if interval.kind is IntervalKind.GAP:
        end = end[:1]
    begin = end - steps if interval.kind is IntervalKind.CHANGE else np.zeros_like(end)
    return begin, end


def _pace(move: FloatArray, unit: FloatArray, valid: BoolArray) -> tuple[float, float, float]:
    """Mean move per expected unit, standard error of its log, and days that speak.

    All inputs (w, m). Windows of one day, an hour apart and less, count as one.
    """
    if not valid.any():
        return 0.0, 0.0, 0.0
    ratio = np.divide(move, unit, out=np.zeros_like(move), where=valid)
    capped = np.where(valid, np.minimum(ratio, np.quantile(ratio[valid], CAP_QUANTILE)), 0.0) * unit
    moved, units = capped.sum(axis=1), np.where(valid, unit, 0.0).sum(axis=1)
    pace = float(moved.sum() / units.sum())
    days = float(units.sum() ** 2 / (units**2).sum()) / len(SHIFTS_S)
    scatter = np.sqrt(((moved - pace * units) ** 2).sum() / (units**2).sum()) / max(pace, 1e-12)
    return pace, float(max(scatter, LEAST_DAY_ERROR) / np.sqrt(days)), days
