"""The clock of volatility: how much a market usually moves at a time of the week.

Volatility follows the New York wall clock (daylight saving moves it in UTC),
weekday and weekend, sessions and holidays, and scheduled releases. `SeasonalProfile`
holds what was learned of it as a product of factors; dividing it out leaves
returns whose level changes slowly, and multiplying it in puts the clock back on
a forecast.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from typing import Any, Final, Self

import holidays
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d
from scipy.signal import lfilter

from config import DAY_S, MarketHours
from domain import FloatArray, IntArray

SMOOTHING_S: Final = 600  # standard deviation of the smoothing over the day
LEVEL_HALF_LIFE_DAYS: Final = 2.0  # of the level that is divided out before averaging
RECENCY_HALF_LIFE_DAYS: Final = 90.0
SHARP_PRIOR: Final = 150.0  # observations that a single slot must outweigh
WEEKLY_PRIOR: Final = 600.0  # observations that a weekday's part of a day must outweigh
WEEKLY_BLOCK_S: Final = 10_800
FLOOR: Final = 0.02  # of the mean: no hour is taken to be motionless
EVENT_PRIOR_S: Final = 3000  # seconds of bars around releases that a factor must outweigh
PROFILE_POOL_DAYS: Final = 15.0  # of own bars that weigh as much as the pooled profile

_FRIDAY, _SATURDAY, _SUNDAY = 4, 5, 6
_CLOSE_S, _REOPEN_S = 17 * 3600, 18 * 3600  # Friday and Sunday, New York


@cache
def _exchange_holidays(year: int) -> frozenset[date]:
    """Full closing days of the New York Stock Exchange in one year.

    The library's own calendar adds years while it is asked, and would tell a
    second thread that a year is free of holidays before it has filled it in.
    """
    return frozenset(holidays.financial_holidays("NYSE", years=year))


def new_york_seconds(ts: IntArray) -> IntArray:
    """Wall-clock time in New York as seconds since 1970-01-01 00:00 local.

    `ts`: Unix seconds, any shape (n,). Returns the same shape.
    """
    index = pd.DatetimeIndex(ts.astype("datetime64[s]"), tz="UTC")
    local = index.tz_convert("America/New_York").tz_localize(None)
    return local.to_numpy().astype("datetime64[s]").astype(np.int64)


def weekday_of(local: IntArray) -> IntArray:
    """Day of the week, Monday 0, of local seconds (1970-01-01 was a Thursday)."""
    return (local // DAY_S + 3) % 7


def is_closed(local: IntArray, hours: MarketHours) -> IntArray:
    """1 where the underlying market rests, else 0; shape of `local`.

    The weekend of every asset is Friday 17:00 to Sunday 18:00 New York: crypto
    is quieter then too. Exchange holidays count for all but crypto.
    """
    weekday, second = weekday_of(local), local % DAY_S
    closed = (
        (weekday == _SATURDAY)
        | ((weekday == _FRIDAY) & (second >= _CLOSE_S))
        | ((weekday == _SUNDAY) & (second < _REOPEN_S))
    )
    if hours is not MarketHours.CONTINUOUS:
        days, inverse = np.unique(local // DAY_S, return_inverse=True)
        dates = [pd.Timestamp(int(day), unit="D").date() for day in days]
        rest = [day in _exchange_holidays(day.year) for day in dates]
        closed |= np.array(rest, dtype=bool)[inverse]
    return np.asarray(closed, dtype=np.int64)


def open_seconds(hours: MarketHours, start: int, end: int) -> int:
    """How much of a time the asset's market was open, to the minute; looks a day back.

    Crypto rests on no weekend, though it is quieter then.
    """
    if hours is MarketHours.CONTINUOUS:
        return min(end - start, DAY_S)
    minutes = np.arange(max(start, end - DAY_S), end, 60, dtype=np.int64)
    return int(60 * np.count_nonzero(is_closed(new_york_seconds(minutes), hours) == 0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventTimes:
    """When releases of one kind are due, and how the time around them is cut.

    `times` (n,): Unix seconds, rising. `edges_s` (parts + 1,): seconds from a
    release, rising; the parts of neighbouring releases do not overlap.
    """

    name: str
    edges_s: tuple[int, ...]
    times: IntArray

    def part_of(self, ts: IntArray) -> IntArray:
        """The part around a release that each moment falls into, or -1; shape of `ts`."""
        if not len(self.times):
            return np.full(ts.shape, -1)
        latest = np.searchsorted(self.times + self.edges_s[0], ts, "right") - 1
        since = ts - self.times[np.maximum(latest, 0)]
        part = np.searchsorted(np.array(self.edges_s), since, "right") - 1
        inside = (latest >= 0) & (part >= 0) & (part < len(self.edges_s) - 1)
        return np.where(inside, part, -1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventFactor:
    """How much more a market moves around releases; `factor` (parts,)."""

    event: EventTimes
    factor: FloatArray

    def at(self, ts: IntArray) -> FloatArray:
        """The factor at each moment, 1 away from releases; shape of `ts`."""
        return np.append(self.factor, 1.0)[self.event.part_of(ts)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON manifest."""
        return {
            "name": self.event.name,
            "edges_s": list(self.event.edges_s),
            "times": self.event.times.tolist(),
            "factor": np.round(self.factor, 5).tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        event = EventTimes(
            name=values["name"],
            edges_s=tuple(values["edges_s"]),
            times=np.array(values["times"], dtype=np.int64),
        )
        return cls(event=event, factor=np.array(values["factor"], dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeasonalProfile:
    """Relative size of a bar's move by time of the New York week; mean about 1.

    `base` (2, slots per day): open and closed days. `within_hour` (slots per
    hour). `weekly` (7, blocks per day): weekday and part of the day. `events`:
    what scheduled releases add.
    """

    bar_s: int
    hours: MarketHours
    base: FloatArray
    within_hour: FloatArray
    weekly: FloatArray
    events: tuple[EventFactor, ...] = ()

    def at(self, open_ts: IntArray) -> FloatArray:
        """The factor of the bars that open at `open_ts`; shape (n,), dimensionless."""
        local = new_york_seconds(open_ts)
        second = local % DAY_S
        daily = self.base[is_closed(local, self.hours), second // self.bar_s]
        hourly = self.within_hour[second % 3600 // self.bar_s]
        weekly = self.weekly[weekday_of(local), second // WEEKLY_BLOCK_S]
        factor = daily * hourly * weekly
        for event in self.events:
            factor = factor * event.at(open_ts)
        return factor

    def variance_time(self, times: IntArray) -> FloatArray:
        """Seasonal variance accumulated since `times[0]`, in bars of factor 1.

        `times` (n,) rising, Unix seconds, need not lie on the bar grid: a part
        of a bar counts for its share. Returns (n,), starting at 0.
        """
        first = times[0] - times[0] % self.bar_s
        edges = np.arange(first, times[-1] + self.bar_s + 1, self.bar_s, dtype=np.int64)
        clock = np.concatenate(([0.0], np.cumsum(self.at(edges[:-1]) ** 2)))
        elapsed = np.interp(times, edges, clock)
        return np.asarray(elapsed - elapsed[0], dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON manifest."""
        return {
            "bar_s": self.bar_s,
            "hours": self.hours.value,
            "base": np.round(self.base, 5).tolist(),
            "within_hour": np.round(self.within_hour, 5).tolist(),
            "weekly": np.round(self.weekly, 5).tolist(),
            "events": [event.to_dict() for event in self.events],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            bar_s=int(values["bar_s"]),
            hours=MarketHours(values["hours"]),
            base=np.array(values["base"], dtype=np.float64),
            within_hour=np.array(values["within_hour"], dtype=np.float64),
            weekly=np.array(values["weekly"], dtype=np.float64),
            events=tuple(EventFactor.from_dict(event) for event in values["events"]),
        )


def flat_profile(bar_s: int, hours: MarketHours) -> SeasonalProfile:
    """The profile of a market without a clock: 1 at all times."""
    return SeasonalProfile(
        bar_s=bar_s,
        hours=hours,
        base=np.ones((2, DAY_S // bar_s)),
        within_hour=np.ones(3600 // bar_s),
        weekly=np.ones((7, DAY_S // WEEKLY_BLOCK_S)),
    )


def fit_profile(
    open_ts: IntArray,
    size: FloatArray,
    *,
    bar_s: int,
    hours: MarketHours,
    events: Sequence[EventTimes] = (),
) -> SeasonalProfile:
    """Learn the profile from the sizes of past moves.

    `open_ts` (n,): a regular grid of bars. `size` (n,): |return| per bar, in
    any unit, NaN where unknown; a move over a gap is spread evenly over the
    bars it covers, so that a night without bars still has a volatility.

    Averages √(size / local level), which heavy tails disturb less than the
    size itself, and squares the result. Slots are smoothed over the day, and
    single slots deviate from the smooth curve as far as their observations
    outweigh a prior: openings, full hours and releases are sharp. A price that
    never moved has no clock to show, and gets the flat profile.
    """
    if not np.any(size > 0):
        return flat_profile(bar_s, hours)
    root, weight = _level_free_roots(open_ts, size, bar_s)
    local = new_york_seconds(open_ts)
    second = local % DAY_S
    slots = DAY_S // bar_s
    cell = is_closed(local, hours) * slots + second // bar_s
    smooth = _smoothed(cell, root, weight, slots, SMOOTHING_S / bar_s)
    sharp = _shrunk_means(cell, root / smooth[cell], weight, 2 * slots, SHARP_PRIOR)
    base = smooth * sharp
    left = root / base[cell]
    phase = second % 3600 // bar_s
    within = _shrunk_means(phase, left, weight, 3600 // bar_s, SHARP_PRIOR)
    block = weekday_of(local) * (DAY_S // WEEKLY_BLOCK_S) + second // WEEKLY_BLOCK_S
    weekly = _shrunk_means(
        block, left / within[phase], weight, 7 * DAY_S // WEEKLY_BLOCK_S, WEEKLY_PRIOR
    )
    factor = (base[cell] * within[phase] * weekly[block]) ** 2
    mean = float(np.average(factor, weights=weight))
    clock = root / np.sqrt(np.maximum(factor, 1e-12))
    return SeasonalProfile(
        bar_s=bar_s,
        hours=hours,
        base=np.maximum(base**2 / mean, FLOOR).reshape(2, slots),
        within_hour=within**2,
        weekly=weekly.reshape(7, -1) ** 2,
        events=tuple(_event_factor(event, open_ts, clock, weight, bar_s) for event in events),
    )


def _event_factor(
    event: EventTimes, open_ts: IntArray, root: FloatArray, weight: FloatArray, bar_s: int
) -> EventFactor:
    """How far the moves around releases exceed the clock's; a release counts at any age."""
    part = event.part_of(open_ts)
    ratio = root / np.average(root, weights=weight)
    counted = (weight > 0) & (part >= 0)
    cells = len(event.edges_s) - 1
    means = _shrunk_means(
        np.maximum(part, 0), ratio, counted.astype(np.float64), cells, EVENT_PRIOR_S / bar_s
    )
    return EventFactor(event=event, factor=means**2)


def mean_profile(profiles: Sequence[SeasonalProfile], weights: Sequence[float]) -> SeasonalProfile:
    """The weighted geometric mean of profiles of the same bars, hours and events."""
    first = profiles[0]
    return replace(
        first,
        base=_geometric_mean([one.base for one in profiles], weights),
        within_hour=_geometric_mean([one.within_hour for one in profiles], weights),
        weekly=_geometric_mean([one.weekly for one in profiles], weights),
        events=tuple(
            replace(
                event, factor=_geometric_mean([one.events[k].factor for one in profiles], weights)
            )
            for k, event in enumerate(first.events)
        ),
    )


def _geometric_mean(values: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
    logs = np.log(np.maximum(np.stack(values), 1e-6))
    return np.asarray(np.exp(np.average(logs, axis=0, weights=weights)), dtype=np.float64)


def lean_on_pool(own: SeasonalProfile, pooled: SeasonalProfile, days: float) -> SeasonalProfile:
    """A profile learned from `days` of bars, pulled towards one of like markets.

    Releases that only one of them knows keep the factor that they have.
    """
    share = PROFILE_POOL_DAYS / (PROFILE_POOL_DAYS + days)
    theirs = {event.event.name: event.factor for event in pooled.events}
    aligned = replace(
        pooled,
        events=tuple(
            replace(event, factor=theirs.get(event.event.name, event.factor))
            for event in own.events
        ),
    )
    return mean_profile([own, aligned], [1 - share, share])


def _level_free_roots(
    open_ts: IntArray, size: FloatArray, bar_s: int
) -> tuple[FloatArray, FloatArray]:
    """Square roots of size over its local level, and recency weights; both (n,)."""
    known = np.isfinite(size)
    filled = np.where(known, size, 0.0)
    decay = 0.5 ** (bar_s / (LEVEL_HALF_LIFE_DAYS * DAY_S))
    level = np.sqrt(
        _running_mean(filled, known, decay) * _running_mean(filled[::-1], known[::-1], decay)[::-1]
    )
    root = np.sqrt(np.clip(filled / np.maximum(level, 1e-12), 0.0, 16.0))
    age_days = (open_ts[-1] - open_ts) / DAY_S
    return root, np.where(known, 0.5 ** (age_days / RECENCY_HALF_LIFE_DAYS), 0.0)


def _running_mean(values: FloatArray, known: FloatArray, decay: float) -> FloatArray:
    """Exponentially weighted mean of the known values so far; shape (n,)."""
    total = lfilter([1.0], [1.0, -decay], values)
    count = lfilter([1.0], [1.0, -decay], known.astype(np.float64))
    return np.asarray(total / np.maximum(count, 1e-12), dtype=np.float64)


def _smoothed(
    cell: IntArray, values: FloatArray, weight: FloatArray, slots: int, sd_slots: float
) -> FloatArray:
    """Mean by cell, smoothed around the day within open and closed; shape (2·slots,)."""
    overall = float(np.average(values, weights=weight))
    total = np.bincount(cell, weight * values, 2 * slots).reshape(2, slots)
    count = np.bincount(cell, weight, 2 * slots).reshape(2, slots)
    # A thin prior keeps cells that were never seen (no closed days yet) sane.
    prior = 1e-3 * max(float(count.max()), 1e-9)
    blurred = [gaussian_filter1d(part, sd_slots, mode="wrap") for part in (total, count)]
    mean = (blurred[0] + prior * overall) / (blurred[1] + prior)
    return np.maximum(mean.ravel(), 1e-3 * overall)


def _shrunk_means(
    cell: IntArray, ratio: FloatArray, weight: FloatArray, cells: int, prior: float
) -> FloatArray:
    """Mean ratio by cell, pulled towards 1 by `prior` observations; shape (cells,)."""
    total = np.bincount(cell, weight * ratio, cells)
    count = np.bincount(cell, weight, cells)
    return np.asarray((total + prior) / (count + prior), dtype=np.float64)
