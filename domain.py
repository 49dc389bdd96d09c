"""Shared vocabulary: bars, histories, requests and forecasts.

Everything here is a frozen dataclass of plain values and NumPy arrays. Times
are whole Unix seconds (UTC); durations end in `_s`; prices are in quote
currency; returns are logarithmic and in basis points unless a name says
otherwise.

The one rule about time: a bar that opens at `o` and lasts `b` seconds is known
at `o + b`, and its close is the price at `o + b`.
"""

from dataclasses import dataclass, field, replace
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from config import Frequency
from errors import DataError, RequestError

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

MAX_PATHS = 1_000
MAX_POINTS = 10_000
MAX_HORIZON_S = 8 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bars:
    """Closed price bars of one feed, in time order; a missing bar is a gap.

    All arrays have shape (n,). `open`, `high`, `low` and `volume` are NaN where
    the feed has none.
    """

    open_ts: IntArray
    open: FloatArray
    high: FloatArray
    low: FloatArray
    close: FloatArray
    volume: FloatArray
    bar_s: int
    feed: str  # where the prices come from, e.g. "archive:BTC_1m"

    def __post_init__(self) -> None:
        columns = (self.open, self.high, self.low, self.close, self.volume)
        if any(column.shape != self.open_ts.shape for column in columns):
            raise DataError(f"{self.feed}: bar columns differ in length; load the bars again.")
        if np.any(self.open_ts[1:] <= self.open_ts[:-1]):
            raise DataError(f"{self.feed}: bars are not in strictly rising time order; sort them.")

    def __len__(self) -> int:
        return len(self.open_ts)

    @property
    def close_ts(self) -> IntArray:
        """When each bar's close is known; shape (n,), Unix seconds."""
        return self.open_ts + self.bar_s

    @property
    def end_ts(self) -> int:
        """When the last bar closed, Unix seconds. Raises DataError if empty."""
        if not len(self):
            raise DataError(f"{self.feed}: there are no bars; give the source some history.")
        return int(self.open_ts[-1]) + self.bar_s

    def between(self, start: int | None, end: int | None) -> Self:
        """Bars that open at or after `start` and are closed by `end` (a view)."""
        low = 0 if start is None else int(np.searchsorted(self.open_ts, start, "left"))
        high = (
            len(self)
            if end is None
            else int(np.searchsorted(self.open_ts, end - self.bar_s, "right"))
        )
        rows = slice(low, max(low, high))
        if rows == slice(0, len(self)):
            return self  # and years of bars need not be looked through at every answer
        return replace(
            self,
            open_ts=self.open_ts[rows],
            open=self.open[rows],
            high=self.high[rows],
            low=self.low[rows],
            close=self.close[rows],
            volume=self.volume[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candles:
    """Bars as a feed gives them, with how they were traded; arrays of shape (n,).

    `trades` and `taker_volume` are NaN where the feed has none.
    """

    bars: Bars
    trades: FloatArray  # number of trades in the bar
    taker_volume: FloatArray  # bought by takers, in the unit of `bars.volume`

    def __post_init__(self) -> None:
        if not self.trades.shape == self.taker_volume.shape == self.bars.open_ts.shape:
            raise DataError(
                f"{self.bars.feed}: columns of trades differ from the bars in length; "
                "load the candles again."
            )

    def __len__(self) -> int:
        return len(self.bars)

    def between(self, start: int | None, end: int | None) -> Self:
        """Candles that open at or after `start` and are closed by `end` (a view)."""
        bars = self.bars.between(start, end)
        first = int(np.searchsorted(self.bars.open_ts, bars.open_ts[0])) if len(bars) else 0
        rows = slice(first, first + len(bars))
        return replace(
            self, bars=bars, trades=self.trades[rows], taker_volume=self.taker_volume[rows]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceQuote:
    """The price of one symbol at one moment, as its feed gives it."""

    price: float
    ts: int  # when it was the price, Unix seconds
    feed: str  # "<venue>:<symbol>", e.g. "binance:BTCUSDT"

    def __post_init__(self) -> None:
        if not 0 < self.price < float("inf"):
            raise DataError(
                f"{self.feed}: price {self.price} is not a positive number; ask the feed again."
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarketHistory:
    """What is known of one asset at one frequency.

    `bars` lie on the frequency's grid and feed the models. `price_bars` are the
    finest bars of the same feed and give the anchor price: for LF built from
    one-minute bars they are those minutes, otherwise they are `bars`.
    `stand_in` names another feed, of about the same price, that all of them are of
    while none of the scored feed is known.
    """

    asset: str
    frequency: Frequency
    bars: Bars
    price_bars: Bars
    source: str  # "archive", "simulated", "venue", …
    stand_in: str | None = None

    @property
    def scored_lag_s(self) -> int:
        """How long after grid time `g` the network's price for `g` is taken.

        The network scores `g` with the close of the one-minute candle that
        opens at `g`; five-minute archives have no such candle and are scored
        with the price at `g` itself.
        """
        return 60 if self.price_bars.bar_s == 60 else 0

    @property
    def anchor_price(self) -> float:
        """The last known close."""
        return float(self.price_bars.close[-1])

    @property
    def anchor_ts(self) -> int:
        """The time of `anchor_price`, Unix seconds."""
        return self.price_bars.end_ts

    def known_at(self, now: int) -> Self:
        """The same history as it was known at `now`; nothing later is left."""
        return replace(
            self, bars=self.bars.between(None, now), price_bars=self.price_bars.between(None, now)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRequest:
    """One prompt: `num_paths` paths of `n_points` prices from `start_ts`."""

    asset: str
    start_ts: int
    increment_s: int
    length_s: int
    num_paths: int

    def __post_init__(self) -> None:
        if self.start_ts % 60:
            raise RequestError(
                f"start time {self.start_ts} is {self.start_ts % 60} s past a whole minute; "
                "prompts start on whole minutes."
            )
        if self.increment_s <= 0 or self.length_s <= 0:
            raise RequestError(
                f"increment {self.increment_s} s and length {self.length_s} s must both be "
                "positive, e.g. 300 and 86400."
            )
        if self.length_s % self.increment_s:
            raise RequestError(
                f"increment {self.increment_s} s does not divide length {self.length_s} s; "
                "use e.g. 300 and 86400."
            )
        if self.n_points > MAX_POINTS or self.length_s > MAX_HORIZON_S:
            raise RequestError(
                f"{self.n_points} points over {self.length_s} s were asked for; the limits are "
                f"{MAX_POINTS} points and {MAX_HORIZON_S} s."
            )
        if not 1 <= self.num_paths <= MAX_PATHS:
            raise RequestError(f"{self.num_paths} paths were asked for; ask for 1 to {MAX_PATHS}.")

    @property
    def n_points(self) -> int:
        """Points per path, the start included."""
        return self.length_s // self.increment_s + 1

    @property
    def grid_ts(self) -> IntArray:
        """The times of the points; shape (n_points,), Unix seconds."""
        return self.start_ts + self.increment_s * np.arange(self.n_points, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """How an answer came about; goes into logs, metrics and answers."""

    rung: str  # the step of the degradation ladder that answered
    frequency: str
    anchor_price: float
    anchor_ts: int
    price_age_s: int  # now - anchor_ts
    model_id: str | None
    trained_until: int | None
    models_saw_later_bars: bool  # true when a past moment is replayed with newer models
    anchor_source: str = "last_bar"  # the step of the ladder of prices that gave the anchor
    anchor_feed: str | None = None  # the feed it was taken from, where it is a live one
    notes: tuple[str, ...] = field(default=())  # one sentence each: what was missing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """Simulated price paths; `paths` has shape (n_paths, n_points), point 0 first.

    Point 0 is itself a forecast and may differ between paths.
    """

    request: ForecastRequest
    paths: FloatArray
    diagnostics: Diagnostics

    @property
    def anchor_age_s(self) -> int:
        """How old the starting price is when the paths start; the same whenever it is asked."""
        return self.request.start_ts - self.diagnostics.anchor_ts
