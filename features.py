"""Bars to features: one code path for training, replay and live forecasts.

A `ReturnGrid` lays returns on a regular grid where gaps stay gaps; a
`Standardiser` divides the clock and the unit out of them; an `EwmaState`
carries the averages that never forget; `feature_matrix` turns them into rows.

Two rules make every row independent of where the history starts: recursive
averages begin from an `EwmaState` and are advanced in one fixed order of
operations, and windows are sums of integers (`QUANTUM`), which are exact. So a
row computed from the last nine days and a saved state has the same bytes as
one computed from all history.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Self

import numpy as np
from scipy.ndimage import maximum_filter1d, minimum_filter1d
from scipy.signal import lfilter

from config import DAY_S, FrequencySpec, MarketHours
from domain import Bars, FloatArray, IntArray
from seasonality import (
    SeasonalProfile,
    flat_profile,
    is_closed,
    new_york_seconds,
    weekday_of,
)

BPS: Final = 1e4
QUANTUM: Final = 2.0**-20  # windows are summed in whole multiples of this
VARIANCE_QUANTUM: Final = 2.0**-32  # likewise for seasonal variance
MEMORY_DAYS: Final = 8  # the longest window that a feature looks back on
CAP_QUANTILE: Final = 0.9995
EWMA_PRIOR_WEIGHT: Final = 0.05  # of the next slower average, in bars
LOG_FLOOR: Final = 0.05  # added to |z| before a logarithm; mean |z| is 1

CHUNK_BARS: Final = 8192  # whose averages are worked out together

CLOCK_NAMES: Final = ("closed", "day_sin", "day_cos", "weekday")
SHIFTS_DAYS: Final = (1, 2, 3, 5, 7)  # the same window on earlier days


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReturnGrid:
    """Returns on a regular grid.

    `returns[i]` (bps) runs from the last known close before bar i to the close
    of bar i, NaN where bar i is missing; `span[i]` is the number of bars it
    covers: 1 normally, more after a gap, 0 where bar i is missing.
    """

    open_ts: IntArray
    returns: FloatArray
    span: IntArray
    bar_s: int

    def __len__(self) -> int:
        return len(self.open_ts)

    @property
    def known(self) -> int:
        """How many bars of the grid are not missing."""
        return int((self.span > 0).sum())

    def part(self, begin: int, end: int) -> "ReturnGrid":
        """The bars begin ≤ i < end of the grid (a view)."""
        return ReturnGrid(
            open_ts=self.open_ts[begin:end],
            returns=self.returns[begin:end],
            span=self.span[begin:end],
            bar_s=self.bar_s,
        )


def return_grid(bars: Bars, start_ts: int | None = None) -> ReturnGrid:
    """Lay bars on a regular grid, from `start_ts` (default: the first bar) to the last bar.

    A gap that reaches back before `start_ts` keeps its full span.
    """
    first = int(bars.open_ts[0]) if start_ts is None else start_ts
    low = max(int(np.searchsorted(bars.open_ts, first)) - 1, 0)
    index = (bars.open_ts[low:] - first) // bars.bar_s
    n = max(int(index[-1]) + 1, 0)
    returns = np.full(n, np.nan)
    span = np.zeros(n, dtype=np.int64)
    inside = index[1:] >= 0
    returns[index[1:][inside]] = (BPS * np.diff(np.log(bars.close[low:])))[inside]
    span[index[1:][inside]] = np.diff(index)[inside]
    open_ts = first + bars.bar_s * np.arange(n, dtype=np.int64)
    return ReturnGrid(open_ts=open_ts, returns=returns, span=span, bar_s=bars.bar_s)


def move_sizes(grid: ReturnGrid) -> FloatArray:
    """|Return| per bar in bps, moves over gaps spread over the bars they cover; (n,)."""
    size = np.abs(grid.returns) / np.sqrt(np.maximum(grid.span, 1))
    # Walking back from each known bar gives its size to the missing ones before it.
    position = np.where(grid.span > 0, np.arange(len(grid)), len(grid))
    following = np.minimum.accumulate(position[::-1])[::-1]
    padded = np.append(size, np.nan)
    return padded[following]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Standardiser:
    """Divides clock and unit out of returns, and caps the rest.

    z = return / (unit · √seasonal variance of the bars covered), |z| ≤ cap; the
    mean of |z| over the training bars is 1.
    """

    profile: SeasonalProfile
    unit_bps: float
    cap: float

    def apply(self, grid: ReturnGrid) -> FloatArray:
        """Standardised returns; shape (n,), NaN where the bar is missing."""
        variance = self._variance(grid)
        z = grid.returns / (self.unit_bps * np.sqrt(variance))
        return np.clip(z, -self.cap, self.cap)

    def _variance(self, grid: ReturnGrid) -> FloatArray:
        """Seasonal variance of the bars that each return covers; shape (n,)."""
        if not len(grid):
            return np.zeros(0)
        # A gap may have begun before the grid does; the clock starts there.
        before = max(int(np.max(grid.span - np.arange(1, len(grid) + 1), initial=0)), 0)
        early = grid.open_ts[0] - grid.bar_s * np.arange(before, 0, -1, dtype=np.int64)
        variance = self.profile.at(np.concatenate((early, grid.open_ts))) ** 2
        ticks = np.rint(variance / VARIANCE_QUANTUM).astype(np.int64)
        clock = np.concatenate(([0], np.cumsum(ticks)))
        end = np.arange(before + 1, len(variance) + 1)
        return (clock[end] - clock[end - np.maximum(grid.span, 1)]) * VARIANCE_QUANTUM

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON manifest."""
        return {
            "profile": self.profile.to_dict(),
            "unit_bps": self.unit_bps,
            "cap": self.cap,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            profile=SeasonalProfile.from_dict(values["profile"]),
            unit_bps=float(values["unit_bps"]),
            cap=float(values["cap"]),
        )


def fit_standardiser(grid: ReturnGrid, profile: SeasonalProfile) -> Standardiser:
    """Unit and cap that suit the grid; every bar of it counts as past."""
    raw = Standardiser(profile=profile, unit_bps=1.0, cap=np.inf).apply(grid)
    size = np.abs(raw[np.isfinite(raw)])
    cap = float(np.quantile(size, CAP_QUANTILE))
    unit = max(float(np.mean(np.minimum(size, cap))), 1e-6)
    return Standardiser(profile=profile, unit_bps=unit, cap=max(cap / unit, 1.0))


# ---------------------------------------------------------------- recursive averages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EwmaState:
    """Exponentially weighted sums as they stood when a bar closed.

    `sums` (channels, half-lives) and `weights` (half-lives,) decay by clock
    time, bars or not, so a gap ages the past without inventing calm.
    """

    end_ts: int
    sums: FloatArray
    weights: FloatArray


CHANNELS: Final = ("size", "square", "log", "signed", "upward")


def initial_state(spec: FrequencySpec, start_ts: int) -> EwmaState:
    """Nothing seen yet; bars that open at `start_ts` or later come next."""
    half_lives = len(spec.ewma_half_lives)
    return EwmaState(
        end_ts=start_ts,
        sums=np.zeros((len(CHANNELS), half_lives)),
        weights=np.zeros(half_lives),
    )


def _channels(z: FloatArray) -> FloatArray:
    """Observations of every channel, 0 where unknown, then what is known; (channels + 1, n)."""
    known = np.isfinite(z)
    value = np.where(known, z, 0.0)
    size = np.abs(value)
    channels = [size, size**2, np.log(size + LOG_FLOOR), value, np.maximum(value, 0.0)]
    return np.asarray(np.stack([*channels, np.ones(len(z))]) * known, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EwmaTrace:
    """Averages after every bar: `means` (channels, half-lives, n)."""

    means: FloatArray
    state: EwmaState  # after the last bar


def trace_ewma(spec: FrequencySpec, z: FloatArray, state: EwmaState) -> EwmaTrace:
    """Advance the state over the bars `z` (n,) and keep every average on the way.

    Bar by bar or all at once, the operations and so the bytes are the same:
    the filter is `s = x + decay·s`. An average with little weight behind it
    leans on the next slower one, the slowest on the training mean.
    """
    rows = _channels(z)
    before = np.vstack([state.sums, state.weights])
    after = np.empty((len(rows), len(spec.ewma_half_lives), len(z)))
    for h, half_life in enumerate(spec.ewma_half_lives):
        decay = 0.5 ** (1.0 / half_life)
        start = decay * before[:, h : h + 1]
        after[:, h] = lfilter([1.0], [1.0, -decay], rows, axis=1, zi=start)[0]
    sums, weights = after[:-1], after[-1]
    end = EwmaState(
        end_ts=state.end_ts + len(z) * spec.bar_s,
        sums=sums[:, :, -1].copy() if len(z) else state.sums,
        weights=weights[:, -1].copy() if len(z) else state.weights,
    )
    return EwmaTrace(means=_lean_on_slower(sums, weights), state=end)


def _lean_on_slower(sums: FloatArray, weights: FloatArray) -> FloatArray:
    # Means of a standardised series: |z| 1, z² about 2 (heavy tails), the rest neutral.
    prior = np.array([1.0, 2.0, -0.4, 0.0, 0.5])[:, None]
    means = np.empty_like(sums)
    for h in reversed(range(sums.shape[1])):
        means[:, h] = (sums[:, h] + EWMA_PRIOR_WEIGHT * prior) / (weights[h] + EWMA_PRIOR_WEIGHT)
        prior = means[:, h]
    return means


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowSums:
    """Exact running totals of |z|, of its observations and of signed z.

    Each has shape (n + 1,), int64; `size` and `signed` count in `QUANTUM`.
    """

    size: IntArray
    count: IntArray
    signed: IntArray


def window_sums(z: FloatArray) -> WindowSums:
    """Running totals of `z` (n,), whose differences are exact."""
    known = np.isfinite(z)
    whole = np.rint(np.where(known, z, 0.0) / QUANTUM).astype(np.int64)

    def running(values: IntArray) -> IntArray:
        return np.concatenate(([0], np.cumsum(values)))

    return WindowSums(
        size=running(np.abs(whole)), count=running(known.astype(np.int64)), signed=running(whole)
    )


def mean_size(sums: WindowSums, begin: IntArray, end: IntArray, default: float) -> FloatArray:
    """Mean |z| of bars begin ≤ j < end per row, `default` where none is known; (n,).

    Windows are cut at the edges of the data.
    """
    count, total = (
        totals.take(end, mode="clip") - totals.take(begin, mode="clip")
        for totals in (sums.count, sums.size)
    )
    return np.where(count > 0, total * QUANTUM / np.maximum(count, 1), default)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureFrame:
    """Features known when each bar closed.

    `shared` (n, len(names)) float32 serves every lead; `by_bucket`
    (buckets, n, len(bucket_names)) float32 belongs to one lead bucket each.
    `level` (n,): the fallback EWMA of |z|, dimensionless.
    """

    names: tuple[str, ...]
    bucket_names: tuple[str, ...]
    shared: Any
    by_bucket: Any
    level: FloatArray
    end_ts: IntArray

    def take(self, rows: IntArray | slice) -> "FeatureFrame":
        """The frame at some of its rows."""
        return replace(
            self,
            shared=self.shared[rows],
            by_bucket=self.by_bucket[:, rows],
            level=self.level[rows],
            end_ts=self.end_ts[rows],
        )

    def last(self) -> "FeatureFrame":
        """The frame at its last row."""
        return self.take(slice(-1, None))


def feature_frame(
    spec: FrequencySpec,
    standardiser: Standardiser,
    grid: ReturnGrid,
    state: EwmaState,
    rows: IntArray,
) -> FeatureFrame:
    """Features at the closes of the grid's bars `rows`, which rise.

    The grid must start where the state ends, and reach `MEMORY_DAYS` further
    back than the rows for windows to be whole. Averages are worked out chunk by
    chunk: those of a year would be several times as large as the features.
    """
    z = standardiser.apply(grid)
    past = _Past.of(spec, standardiser, grid, z)
    level = np.empty(len(rows))
    buckets = range(len(spec.bucket_ends))
    shared, by_bucket = _Table(len(rows)), _Table(len(buckets), len(rows))
    for begin in range(0, max(len(grid), 1), CHUNK_BARS):
        trace = trace_ewma(spec, z[begin : begin + CHUNK_BARS], state)
        state = trace.state
        low, high = np.searchsorted(rows, (begin, begin + CHUNK_BARS)).tolist()
        chosen = rows[low:high]
        means = trace.means[:, :, _indexing(chosen - begin)]
        level[low:high] = means[0, _fallback(spec)]
        columns = _ewma_columns(spec, means)
        columns |= _recent_columns(past, chosen)
        columns |= _shape_columns(spec, past, chosen)
        columns |= _clock_columns(standardiser, grid, chosen)
        shared.write((slice(low, high),), columns)
        for bucket in buckets:
            columns = _bucket_columns(spec, past, means, chosen, bucket)
            by_bucket.write((bucket, slice(low, high)), columns)
    return FeatureFrame(
        names=shared.names,
        bucket_names=by_bucket.names,
        shared=shared.values,
        by_bucket=by_bucket.values,
        level=level,
        end_ts=grid.open_ts[rows] + spec.bar_s,
    )


def _fallback(spec: FrequencySpec) -> int:
    """Which of the half-lives is the ladder's."""
    return int(np.argmin(np.abs(np.array(spec.ewma_half_lives) - spec.fallback_half_life)))


def _indexing(rows: IntArray) -> IntArray | slice:
    """The same rows without a copy, where they follow each other."""
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


class _Table:
    """Named columns, float32, of rows in one or more dimensions, filled part by part."""

    def __init__(self, *rows: int) -> None:
        self.names: tuple[str, ...] = ()
        self.values: Any = np.empty((*rows, 0), dtype=np.float32)

    def write(self, part: tuple[int | slice, ...], columns: dict[str, FloatArray]) -> None:
        """Set a part of the rows; the columns are the same every time."""
        if not self.names:
            self.names = tuple(columns)
            self.values = np.empty((*self.values.shape[:-1], len(columns)), dtype=np.float32)
        values = self.values[part]
        for place, column in enumerate(columns.values()):
            values[:, place] = column


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Past:
    """What windows look back on, for every bar of the grid."""

    z: FloatArray
    sums: WindowSums
    largest: dict[int, FloatArray]  # |z| over so many bars
    ranges: dict[int, tuple[IntArray, IntArray]]  # high and low of the path over so many hours
    clock: FloatArray  # of the grid's bars and of those that a lead reaches

    @classmethod
    def of(
        cls, spec: FrequencySpec, standardiser: Standardiser, grid: ReturnGrid, z: FloatArray
    ) -> "_Past":
        sums = window_sums(z)
        size = np.where(np.isfinite(z), np.abs(z), 0.0)
        ahead = spec.bar_s * np.arange(len(grid) + spec.bucket_ends[-1], dtype=np.int64)
        return cls(
            z=z,
            sums=sums,
            # The origin shifts the centred filter so that it looks back only.
            largest={
                width: maximum_filter1d(size, width, mode="constant", origin=(width - 1) // 2)
                for width in (5, 15, 60)
            },
            ranges={hours: _range(sums.signed[1:], _width(spec, hours)) for hours in (1, 4, 24)},
            clock=standardiser.profile.at(grid.open_ts[:1] + ahead),
        )


def _width(spec: FrequencySpec, hours: int) -> int:
    return max(hours * 3600 // spec.bar_s, 4)


def _range(path: IntArray, width: int) -> tuple[IntArray, IntArray]:
    """The highest and the lowest point of the path over so many bars back."""
    origin = (width - 1) // 2
    return (
        maximum_filter1d(path, width, mode="nearest", origin=origin),
        minimum_filter1d(path, width, mode="nearest", origin=origin),
    )


@cache
def feature_names(spec: FrequencySpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the shared and of the bucket features, in the order of the columns."""
    grid = ReturnGrid(
        open_ts=spec.bar_s * np.arange(2, dtype=np.int64),
        returns=np.ones(2),
        span=np.ones(2, dtype=np.int64),
        bar_s=spec.bar_s,
    )
    profile = flat_profile(spec.bar_s, MarketHours.CONTINUOUS)
    standardiser = Standardiser(profile=profile, unit_bps=1.0, cap=1.0)
    frame = feature_frame(spec, standardiser, grid, initial_state(spec, 0), np.array([1]))
    return frame.names, frame.bucket_names


def _ewma_columns(spec: FrequencySpec, means: FloatArray) -> dict[str, FloatArray]:
    names = [f"{half_life:g}" for half_life in spec.ewma_half_lives]
    size = np.maximum(means[0], 1e-3)
    log_size = np.log(size)
    columns = {f"log_size_{name}": log_size[h] for h, name in enumerate(names)}
    for h in range(1, len(names), 2):
        # A day and slower, only the size itself forecasts: the rest fits the past.
        if spec.ewma_half_lives[h] >= spec.bars_per_day:
            continue
        square = np.maximum(means[1, h], 1e-6)
        columns[f"log_rms_ratio_{names[h]}"] = 0.5 * np.log(square) - log_size[h]
        columns[f"log_mean_ratio_{names[h]}"] = means[2, h] - np.log(size[h] + LOG_FLOOR)
        drift = means[3, h] / size[h]
        columns[f"drift_{names[h]}"] = drift
        columns[f"absolute_drift_{names[h]}"] = np.abs(drift)
        columns[f"upward_{names[h]}"] = means[4, h] / size[h]
    return columns


def _recent_columns(past: _Past, rows: IntArray) -> dict[str, FloatArray]:
    columns: dict[str, FloatArray] = {}
    for lag in range(5):
        z = past.z[np.maximum(rows - lag, 0)]
        move = np.where(np.isfinite(z), z, 0.0)
        columns[f"log_size_lag_{lag}"] = np.log(np.abs(move) + LOG_FLOOR)
        columns[f"move_lag_{lag}"] = move
    for width, largest in past.largest.items():
        columns[f"log_max_{width}"] = np.log(largest[rows] + LOG_FLOOR)
    return columns


def _shape_columns(spec: FrequencySpec, past: _Past, rows: IntArray) -> dict[str, FloatArray]:
    """How the price travelled: straight or back and forth, inside or out of its range."""
    path = past.sums.signed[1:]
    columns: dict[str, FloatArray] = {}
    for hours, (highest, lowest) in past.ranges.items():
        width = _width(spec, hours)
        scale = np.maximum(_mean_before(past.sums, rows, width), 0.05) * np.sqrt(width)
        before = path[np.maximum(rows - width, 0)]
        high, low = highest[rows], lowest[rows]
        columns[f"log_size_{hours}h"] = np.log(scale / np.sqrt(width))
        columns[f"efficiency_{hours}h"] = np.abs(path[rows] - before) * QUANTUM / scale
        columns[f"range_{hours}h"] = np.log((high - low) * QUANTUM / scale + LOG_FLOOR)
        columns[f"below_high_{hours}h"] = (high - path[rows]) * QUANTUM / scale
        columns[f"above_low_{hours}h"] = (path[rows] - low) * QUANTUM / scale
    return columns


def _mean_before(sums: WindowSums, rows: IntArray, width: int) -> FloatArray:
    return mean_size(sums, rows + 1 - width, rows + 1, 1.0)


def _clock_columns(
    standardiser: Standardiser, grid: ReturnGrid, rows: IntArray
) -> dict[str, FloatArray]:
    local = new_york_seconds(grid.open_ts[rows] + grid.bar_s)
    day = 2 * np.pi * (local % DAY_S) / DAY_S
    closed = is_closed(local, standardiser.profile.hours).astype(np.float64)
    weekday = weekday_of(local).astype(np.float64)
    return dict(zip(CLOCK_NAMES, (closed, np.sin(day), np.cos(day), weekday), strict=True))


def bucket_edges(spec: FrequencySpec) -> tuple[tuple[int, int], ...]:
    """(begin, end] of every lead bucket, in bars after the last known one."""
    return tuple(zip((0, *spec.bucket_ends[:-1]), spec.bucket_ends, strict=True))


def _bucket_columns(
    spec: FrequencySpec, past: _Past, means: FloatArray, rows: IntArray, bucket: int
) -> dict[str, FloatArray]:
    """What the bucket's own hours did on earlier days, and what its clock says."""
    begin, end = bucket_edges(spec)[bucket]
    # A short bucket is widened: one minute of one earlier day says nothing.
    margin = max(0, (15 * 60 // spec.bar_s - (end - begin)) // 2)
    slow = np.maximum(means[0, -2], 1e-3)
    log_slow = np.log(slow + LOG_FLOOR)
    columns: dict[str, FloatArray] = {}
    total = np.zeros(len(rows))
    for days in SHIFTS_DAYS:
        shift = days * spec.bars_per_day
        # Long buckets must not reach past the last known bar.
        first = rows + 1 + begin - shift - margin
        last = np.minimum(rows + 1 + end - shift + margin, rows + 1)
        then = mean_size(past.sums, first, last, np.nan)
        log_then = np.log(np.where(np.isfinite(then), then, slow) + LOG_FLOOR)
        total += log_then
        if days in (1, 7):
            columns[f"log_size_{days}d_ago"] = log_then - log_slow
    columns["log_size_days_ago"] = total / len(SHIFTS_DAYS) - log_slow
    columns["log_profile"] = np.log(past.clock[rows + (begin + end + 1) // 2])
    return columns


def bucket_targets(
    spec: FrequencySpec, sums: WindowSums, rows: IntArray, bucket: int
) -> FloatArray:
    """Mean |z| that followed in the bucket; (n,), NaN unless half of it is known."""
    begin, end = bucket_edges(spec)[bucket]
    first, last = rows + 1 + begin, rows + 1 + end
    n = len(sums.size) - 1
    count = sums.count[np.minimum(last, n)] - sums.count[np.minimum(first, n)]
    known = (last <= n) & (2 * count >= end - begin)
    return np.where(known, mean_size(sums, first, last, np.nan), np.nan)
