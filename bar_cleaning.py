"""What becomes of the rows of a source: bars, or rows set aside with a reason.

Archives and live feeds deliver rows; `BarSieve` takes them apart by the same
rules, so a nonsense price is treated alike wherever it comes from. Nothing is
repaired and nothing vanishes: a row is a bar, or it is set aside and named.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from config import EARLIEST_TS, LATEST_TS
from domain import Bars, Candles, FloatArray, IntArray

BoolArray: TypeAlias = npt.NDArray[np.bool_]

MINUTE_S: Final = 60

_SPIKE_FACTOR: Final = 8.0  # of a digit too many, leaving the market some room to move meanwhile
MAX_PRICE: Final = 1e12  # of anything, in any currency
MAX_AMOUNT: Final = 1e18  # of anything traded in a bar
MAX_SPIKE_BARS: Final = 3  # a level that lasts longer is no spike
SPIKE: Final = "spike of about ×8 or more that reverts"

_PRICES: Final = ("open", "high", "low", "close")
_COLUMNS: Final = (*_PRICES, "volume", "trades", "taker_volume")


# ---------------------------------------------------------------- rows set aside


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAsideBar:
    """One row of a source that is not used, or a block of rows (see `reason`)."""

    ts: int  # open time as found, Unix seconds
    close: float  # as found; NaN if there was none
    reason: str


def summarise_set_aside(set_aside: Iterable[SetAsideBar]) -> list[str]:
    """One clause per reason with its count and first time, the most frequent first."""
    entries = list(set_aside)
    first = {bar.reason: _readable(bar.ts) for bar in reversed(entries)}
    counts = Counter(bar.reason for bar in entries).most_common()
    return [f"{count} × {reason} (first at {first[reason]})" for reason, count in counts]


def _readable(ts: int) -> str:
    """ISO 8601 where the time is one, else the number that was found."""
    if not EARLIEST_TS <= ts < LATEST_TS:
        return str(ts)
    return datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---------------------------------------------------------------- the sieve


@dataclass(slots=True)
class BarSieve:
    """Rows on their way to bars, and what was set aside on the way; arrays of shape (n,)."""

    ts: IntArray  # open times, Unix seconds
    columns: dict[str, FloatArray]
    set_aside: list[SetAsideBar] = field(default_factory=list)

    @classmethod
    def of(cls, ts: IntArray, columns: Mapping[str, FloatArray]) -> Self:
        """All rows; a missing time is 0, a missing value NaN, and so is a missing column."""
        missing = np.full(len(ts), np.nan)
        return cls(ts=ts, columns={name: columns.get(name, missing) for name in _COLUMNS})

    @property
    def close(self) -> FloatArray:
        """The closes of the rows that are left."""
        return self.columns["close"]

    def drop(self, bad: BoolArray, reason: str) -> None:
        """Set rows aside, one entry each."""
        self.set_aside += [
            SetAsideBar(ts=int(ts), close=float(close), reason=reason)
            for ts, close in zip(self.ts[bad], self.close[bad], strict=True)
        ]
        self.forget(bad)

    def drop_block(self, bad: BoolArray, reason: str) -> None:
        """Set many rows aside under one entry, dated by the first of them."""
        self._note(bad, f"{np.count_nonzero(bad)} {reason}")
        self.forget(bad)

    def forget(self, bad: BoolArray) -> None:
        """Remove rows without a report."""
        if bad.any():
            self._take(np.flatnonzero(~bad))

    def candles(self, *, bar_s: int, feed: str) -> Candles:
        """The rows that can be bars of `bar_s` seconds, in rising time order."""
        in_range = (self.ts >= EARLIEST_TS) & (self.ts < LATEST_TS)
        self.drop(~in_range, "time is not in Unix seconds between the years 2000 and 2100")
        self.drop(self.ts % bar_s != 0, f"time is not on the {bar_s} s grid")
        self.drop(~(np.isfinite(self.close) & (self.close > 0)), "close is not a positive number")
        self.drop(self.close >= MAX_PRICE, "close is too large to be a price")
        self._sort()
        self.drop(np.diff(self.ts, append=-1) == 0, "a later row has the same time")
        self.drop(find_spikes(self.close), SPIKE)
        self._blank_impossible_values()
        prices = {name: self.columns[name] for name in (*_PRICES, "volume")}
        return Candles(
            bars=Bars(open_ts=self.ts, **prices, bar_s=bar_s, feed=feed),
            trades=self.columns["trades"],
            taker_volume=self.columns["taker_volume"],
        )

    def _note(self, rows: BoolArray, reason: str) -> None:
        """Report rows under one entry, dated by the first of them."""
        if rows.any():
            first = int(np.argmax(rows))
            entry = SetAsideBar(
                ts=int(self.ts[first]), close=float(self.close[first]), reason=reason
            )
            self.set_aside.append(entry)

    def _sort(self) -> None:
        """Order rows by time; rows of one time stay in the order they came in."""
        late = self.ts < np.maximum.accumulate(self.ts)
        self._note(late, f"{np.count_nonzero(late)} rows came out of time order and were sorted")
        if late.any():
            self._take(np.argsort(self.ts, kind="stable"))

    def _blank_impossible_values(self) -> None:
        """Make optional values that contradict the close NaN; the bar itself stays."""
        before = np.isfinite(np.array([self.columns[name] for name in _COLUMNS]))
        self.columns |= _possible_values(self.columns)
        after = np.isfinite(np.array([self.columns[name] for name in _COLUMNS]))
        lost = before & ~after
        reason = f"{np.count_nonzero(lost)} impossible values beside the close were ignored"
        self._note(lost.any(axis=0), reason)

    def _take(self, rows: IntArray) -> None:
        self.ts = self.ts[rows]
        self.columns = {name: column[rows] for name, column in self.columns.items()}


def _possible_values(columns: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The optional columns, NaN where a value cannot be true beside the close."""
    close = columns["close"]
    near = {
        name: np.abs(np.log(np.where(columns[name] > 0, columns[name], np.nan)) - np.log(close))
        < np.log(_SPIKE_FACTOR)
        for name in ("open", "high", "low")
    }
    opened = np.where(near["open"], columns["open"], np.nan)
    top, bottom = np.fmax(opened, close), np.fmin(opened, close)
    amounts = {name: _amount(columns[name]) for name in ("volume", "trades", "taker_volume")}
    return {
        "open": opened,
        "high": np.where(near["high"] & (columns["high"] >= top), columns["high"], np.nan),
        "low": np.where(near["low"] & (columns["low"] <= bottom), columns["low"], np.nan),
        **amounts,
        "taker_volume": np.where(
            amounts["taker_volume"] <= amounts["volume"], amounts["taker_volume"], np.nan
        ),
    }


def _amount(values: FloatArray) -> FloatArray:
    """The values, NaN where one is negative or beyond all that is traded."""
    return np.where((values >= 0) & (values < MAX_AMOUNT), values, np.nan)


def is_other_level(price: float, level: float) -> bool:
    """Whether a price lies so far off that no market moved it there from one bar to the next."""
    return bool(abs(np.log(price) - np.log(level)) >= np.log(_SPIKE_FACTOR))


def level_cuts(close: FloatArray) -> IntArray:
    """The rows whose close is at another level than the one before."""
    return np.flatnonzero(np.abs(np.diff(np.log(close))) >= np.log(_SPIKE_FACTOR)) + 1


def find_spikes(close: FloatArray) -> BoolArray:
    """Which closes belong to a short excursion to another price level; shape (n,).

    The series is cut wherever the price jumps by the spike factor. A piece of up
    to three bars that lies that far from the last believed level is a spike, at
    either end of the series too, where the other neighbour is not known yet; a
    longer piece is a change of level.
    """
    spike = np.zeros(len(close), dtype=np.bool_)
    cuts = level_cuts(close)
    if not len(cuts):
        return spike
    pieces = list(pairwise([0, *cuts.tolist(), len(close)]))
    lasting = [piece for piece in pieces if piece[1] - piece[0] > MAX_SPIKE_BARS]
    level = close[(lasting or [max(pieces, key=lambda piece: piece[1] - piece[0])])[0][0]]
    for start, end in pieces:
        if end - start <= MAX_SPIKE_BARS and is_other_level(close[start], level):
            spike[start:end] = True
        else:
            level = close[end - 1]
    return spike


# ---------------------------------------------------------------- coarser bars


def bars_from_minutes(bars: Bars, *, bar_s: int) -> Bars:
    """Build coarser bars on the UTC grid from one-minute bars of the same feed.

    A bar exists if its last minute does, because its close is the price at its
    end and an older price must not pose as that one; a bar without its last
    minute is a gap. Open is that of the first minute at hand; high, low and
    volume gather the minutes that have them and are NaN where none has.

    Raises: ValueError if the bars are not minutes or `bar_s` is not a multiple.
    """
    if bars.bar_s != MINUTE_S or bar_s % MINUTE_S:
        raise ValueError(f"cannot build bars of {bar_s} s from bars of {bars.bar_s} s")
    slot = bars.open_ts // bar_s
    first = np.flatnonzero(np.diff(slot, prepend=-1))
    last = np.append(first[1:], len(bars)) - 1 if len(bars) else first
    has_end = bars.open_ts[last] % bar_s == bar_s - MINUTE_S
    has_volume = np.isfinite(bars.volume)
    volume = _per_group(np.add, np.where(has_volume, bars.volume, 0.0), first)
    traded = _per_group(np.logical_or, has_volume, first)
    return Bars(
        open_ts=(slot[first] * bar_s)[has_end],
        open=bars.open[first][has_end],
        high=_per_group(np.fmax, bars.high, first)[has_end],
        low=_per_group(np.fmin, bars.low, first)[has_end],
        close=bars.close[last][has_end],
        volume=np.where(traded, volume, np.nan)[has_end],
        bar_s=bar_s,
        feed=bars.feed,
    )


def _per_group(reduction: np.ufunc, values: npt.NDArray[np.generic], first: IntArray) -> FloatArray:
    """Reduce each run of rows that begins at an index of `first`; shape (len(first),)."""
    return np.asarray(reduction.reduceat(values, first) if len(first) else values[:0])
