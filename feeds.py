"""The venues whose prices are scored, one client each behind one protocol.

Every client asks for candles page by page within its venue's limits, judges each
answer by form (wrong form: the answer is refused) and each row by value (nonsense:
the row is set aside with a reason, by the rules of `bar_cleaning`), and gives only
candles that have closed by our clock and by the venue's. Labels are
`"<venue>:<symbol>"`, e.g. `binance:BTCUSDT`.

The forms of requests and answers are those of the venues' public interfaces:
Binance spot `klines` and `ticker/price`, Hyperliquid `candleSnapshot`, Pyth's
TradingView history and Hermes.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from bar_cleaning import MAX_PRICE, MAX_SPIKE_BARS, MINUTE_S, BarSieve, BoolArray, SetAsideBar
from clock import Clock, market_speed
from config import ASSETS, VENUE_BARS_KEPT, FeedSymbol, Venue
from domain import Candles, FloatArray, IntArray, PriceQuote
from errors import BadAnswer, FeedRefused, MinerError, SourceUnavailable
from feed_http import HostClient, Sleep
from feed_plans import CANDLE_POLICY, CANDLES_PER_CALL, QUOTE_POLICY, FeedHost, HttpPolicy
from settings import Settings

log = logging.getLogger(__name__)

Fetched: TypeAlias = tuple[Candles, tuple[SetAsideBar, ...]]

# Candles before the asked ones, without which a spike in the first is no spike.
_CONTEXT_BARS: Final = 2 * MAX_SPIKE_BARS + 2
_QUOTE_BARS: Final = 60  # a venue whose last trade is older has no price
_AHEAD_S: Final = 120  # of a venue's clock, by which ours may be without a word
LAGGING_S: Final = 180  # a venue whose candles end longer ago than that shows old prices too


class Feed(Protocol):
    """One venue's prices. Threads may share a feed."""

    @property
    def name(self) -> str:
        """The venue, as the labels of bars and quotes spell it."""

    def candles(self, symbol: str, bar_s: int, start_ts: int, end_ts: int) -> Fetched:
        """Closed candles that open at or after `start_ts` and close by `end_ts`.

        `bar_s` is 60 or 300. Gaps stay gaps, and what the venue does not keep is
        not there. With them come the rows of that time that were set aside.
        Raises: SourceUnavailable, BadAnswer and their kinds.
        """

    def price(self, symbol: str) -> PriceQuote:
        """The newest price. Raises: SourceUnavailable, BadAnswer and their kinds."""

    def server_time(self) -> float | None:
        """The venue's clock by its latest answers, Unix seconds; None while none tells it."""

    def close(self) -> None:
        """Close the connections."""


def open_feeds(
    settings: Settings,
    clock: Clock,
    *,
    policy: HttpPolicy = CANDLE_POLICY,
    quote_policy: HttpPolicy = QUOTE_POLICY,
    sleep: Sleep = time.sleep,
) -> Mapping[Venue, Feed]:
    """A client per venue; nothing is asked yet. The caller closes every feed.

    `sleep` makes every wait between and before calls: give an event's `wait` to
    end them early.
    """
    speed = market_speed(clock)
    host = {
        name: HostClient(name, settings.feed_url(name), now=clock.now, sleep=sleep, speed=speed)
        for name in FeedHost
    }
    patience = {"policy": policy, "quote_policy": quote_policy}
    return MappingProxyType(
        {
            Venue.BINANCE: BinanceFeed(host[FeedHost.BINANCE], clock, **patience),
            Venue.HYPERLIQUID: HyperliquidFeed(host[FeedHost.HYPERLIQUID], clock, **patience),
            Venue.PYTH: PythFeed(
                (host[FeedHost.PYTH_HISTORY], host[FeedHost.PYTH_ROUTER]),
                host[FeedHost.PYTH_LATEST],
                clock,
                **patience,
            ),
        }
    )


# ---------------------------------------------------------------- what pages have in common


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """The rows of one answer as found; arrays of shape (n,)."""

    ts: IntArray  # open times, Unix seconds; 0 where there is none
    columns: Mapping[str, FloatArray]  # NaN where there is no number
    is_stranger: BoolArray  # rows that are no candles of the asked length
    date: float | None  # of the answer by the venue's clock


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Candles of one call: those that open from `first` to `last`, Unix seconds."""

    symbol: str
    bar_s: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """How many candles there are at most."""
        return (self.last - self.first) // self.bar_s + 1

    @property
    def first_ms(self) -> int:
        """The first open time in milliseconds."""
        return self.first * 1000

    @property
    def end_ms(self) -> int:
        """The last moment of the last candle in milliseconds."""
        return (self.last + self.bar_s) * 1000 - 1


def _gather(
    fetch: Callable[[_Span], _Page],
    feed: FeedSymbol,
    bar_s: int,
    start_ts: int,
    end_ts: int,
    now: float,
) -> Fetched:
    """All pages of the asked time, judged together.

    A few earlier candles are fetched with them, so that the first ones are judged
    by their neighbours too; nothing of those is given back.
    """
    _interval(bar_s)
    start = -(-start_ts // bar_s) * bar_s
    end = min(end_ts, int(now)) // bar_s * bar_s
    spans = _spans(feed, bar_s, start, end)
    pages = [fetch(span) for span in spans]
    sieve = _sieve(pages)
    if pages:
        first = spans[0].first
        sieve.drop((sieve.ts < first) | (sieve.ts >= end), "outside of the asked time")
        known_by = now if pages[-1].date is None else pages[-1].date
        forming = sieve.ts + bar_s > known_by
        # The newest may well form by the venue's clock, which is right; a clock that is off
        # by more would have closed ones pass for such, and their time for empty.
        sieve.forget(forming & (sieve.ts + bar_s > now - _AHEAD_S))
        sieve.drop(sieve.ts + bar_s > known_by, "still forming by the venue's clock")
    candles = sieve.candles(bar_s=bar_s, feed=feed.name).between(start, None)
    context = range(spans[0].first, start) if spans else range(0)
    return candles, tuple(row for row in sieve.set_aside if row.ts not in context)


def _spans(feed: FeedSymbol, bar_s: int, start: int, end: int) -> list[_Span]:
    """The calls that cover the asked time and a little before, as far as the venue keeps it."""
    if end <= start:
        return []
    first = start - _CONTEXT_BARS * bar_s
    if feed.venue in VENUE_BARS_KEPT:
        first = max(first, end - VENUE_BARS_KEPT[feed.venue] * bar_s)
    step = CANDLES_PER_CALL[feed.venue] * bar_s
    return [
        _Span(symbol=feed.symbol, bar_s=bar_s, first=at, last=min(at + step, end) - bar_s)
        for at in range(first, end, step)
    ]


def _sieve(pages: list[_Page]) -> BarSieve:
    """The rows of all pages; those that are no candles of the asked length are set aside."""
    if not pages:
        return BarSieve.of(np.empty(0, dtype=np.int64), {})
    columns = {
        name: np.concatenate([page.columns[name] for page in pages]) for name in pages[0].columns
    }
    sieve = BarSieve.of(np.concatenate([page.ts for page in pages]), columns)
    strangers = [page.is_stranger for page in pages]
    sieve.drop(np.concatenate(strangers), "it is no candle of the asked length")
    return sieve


_INTERVALS: Final[Mapping[int, str]] = MappingProxyType({60: "1m", 300: "5m"})


def _interval(bar_s: int) -> str:
    """The venues' name of a bar length. Raises: ValueError."""
    if bar_s not in _INTERVALS:
        raise ValueError(f"bars of {bar_s} s are not read; use one of {sorted(_INTERVALS)}")
    return _INTERVALS[bar_s]


def _number(value: Any) -> float:
    """A number or its text as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return float("nan")
    try:
        return float(value)
    except (ValueError, OverflowError):
        return float("nan")


def _numbers(values: list[Any]) -> FloatArray:
    return np.array([_number(value) for value in values], dtype=np.float64)


def _times(values: list[Any], per_second: int) -> IntArray:
    """Whole Unix seconds, shape (n,); 0 for what is no whole second."""
    fit = (
        value if isinstance(value, int) and 0 < value < 2**62 and value % per_second == 0 else 0
        for value in values
    )
    return np.fromiter(fit, dtype=np.int64, count=len(values)) // per_second


def _quote(value: Any, ts: float, feed: FeedSymbol) -> PriceQuote:
    """A price as a quote. Raises: BadAnswer if it is none."""
    price = _number(value)
    if not 0 < price < MAX_PRICE:
        raise BadAnswer(f"{feed.name}: {_short(value)} is no price; ask again or check the venue.")
    return PriceQuote(price=price, ts=int(ts), feed=feed.name)


def _short(value: Any) -> str:
    """A value as found, fit for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _misfit(client: HostClient, wanted: str, got: Any) -> BadAnswer:
    return BadAnswer(
        f"{client.place} should answer with {wanted}, but sent {_short(got)}; check the address, "
        "or whether the venue has changed its interface."
    )


class _VenueFeed(ABC):
    """What the clients have in common: the asked time is gathered page by page."""

    _venue: Venue

    def __init__(self, clock: Clock, *, policy: HttpPolicy, quote_policy: HttpPolicy) -> None:
        self._clock = clock
        self._policy = policy
        self._quote_policy = quote_policy

    @property
    def name(self) -> str:
        """The venue."""
        return self._venue.value

    def candles(self, symbol: str, bar_s: int, start_ts: int, end_ts: int) -> Fetched:
        """As `Feed.candles`."""
        feed = FeedSymbol(self._venue, symbol)
        return _gather(self._page, feed, bar_s, start_ts, end_ts, self._clock.now())

    def server_time(self) -> float | None:
        """As `Feed.server_time`, in the middle of those of its hosts."""
        told = [at for client in self._clients() if (at := client.server_time()) is not None]
        return median(told) if told else None

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients():
            client.close()

    @abstractmethod
    def _clients(self) -> tuple[HostClient, ...]:
        """All hosts of the venue."""

    @abstractmethod
    def _page(self, span: _Span) -> _Page:
        """The candles of one call."""


class _OneHostFeed(_VenueFeed):
    """A venue with one host."""

    def __init__(
        self, client: HostClient, clock: Clock, *, policy: HttpPolicy, quote_policy: HttpPolicy
    ) -> None:
        super().__init__(clock, policy=policy, quote_policy=quote_policy)
        self._client = client

    def _clients(self) -> tuple[HostClient, ...]:
        return (self._client,)


# ---------------------------------------------------------------- Binance


class BinanceFeed(_OneHostFeed):
    """Binance spot: candles with trades and takers' volume, and the ticker's price."""

    _venue = Venue.BINANCE
    _WEIGHT: Final = 2  # of either call

    def __init__(
        self, client: HostClient, clock: Clock, *, policy: HttpPolicy, quote_policy: HttpPolicy
    ) -> None:
        super().__init__(client, clock, policy=policy, quote_policy=quote_policy)
        self._lag_s: dict[str, float] = {}  # by symbol: of the newest candle, when last asked for

    def price(self, symbol: str) -> PriceQuote:
        """The price of the last trade, which the venue does not date.

        It is as old as the answer is by its headers: a cache may have held it. And where
        candles lag behind, so does the ticker, whatever the headers say.
        """
        answer = self._client.get(
            "api/v3/ticker/price",
            {"symbol": symbol},
            weight=self._WEIGHT,
            policy=self._quote_policy,
        )
        ticker = answer.value
        if not isinstance(ticker, dict) or ticker.get("symbol") != symbol or "price" not in ticker:
            raise _misfit(self._client, f"the price of {symbol}", ticker)
        now, lag_s = self._clock.now(), self._lag_s.get(symbol, 0.0)
        made = min(now - answer.age_s, now if answer.date is None else answer.date)
        made = min(made, now - lag_s) if lag_s > LAGGING_S else made
        return _quote(ticker["price"], made, FeedSymbol(Venue.BINANCE, symbol))

    def _page(self, span: _Span) -> _Page:
        query: dict[str, str | int] = {
            "symbol": span.symbol,
            "interval": _interval(span.bar_s),
            "startTime": span.first_ms,
            "endTime": span.end_ms,
            "limit": CANDLES_PER_CALL[Venue.BINANCE],
        }
        answer = self._client.get("api/v3/klines", query, weight=self._WEIGHT, policy=self._policy)
        rows = answer.value
        if not isinstance(rows, list) or not all(_is_kline(row) for row in rows):
            raise _misfit(self._client, "a list of candles of ten values and more", rows)
        opened, closed = _times([row[0] for row in rows], 1), _times([row[6] for row in rows], 1)
        self._note_lag(span, opened // 1000)
        places = {
            "open": 1,
            "high": 2,
            "low": 3,
            "close": 4,
            "volume": 5,
            "trades": 8,
            "taker_volume": 9,
        }
        return _Page(
            ts=_times([row[0] for row in rows], 1000),
            columns={name: _numbers([row[at] for row in rows]) for name, at in places.items()},
            date=answer.date,
            is_stranger=closed - opened != span.bar_s * 1000 - 1,
        )

    def _note_lag(self, span: _Span, opened: IntArray) -> None:
        """Remember how long before now the newest candle ended, if it was asked for.

        Of an answer without any it is only known that there are none in the asked time.
        """
        now = self._clock.now()
        if now - span.last < 2 * span.bar_s:
            ended = int(opened.max()) + span.bar_s if len(opened) else span.first
            self._lag_s[span.symbol] = now - ended


def _is_kline(row: Any) -> bool:
    return isinstance(row, list) and len(row) >= 10


# ---------------------------------------------------------------- Hyperliquid


class HyperliquidFeed(_OneHostFeed):
    """Hyperliquid: candles with trades; its price is the close of the candle that forms.

    The venue keeps the newest 5000 candles of each length: asked for older ones it
    gives those that exist.
    """

    _venue = Venue.HYPERLIQUID
    _WEIGHT: Final = 20  # of a call, and one more for every 60 candles

    def price(self, symbol: str) -> PriceQuote:
        """The close of the newest candle: now if it still forms, else when it closed."""
        feed = FeedSymbol(Venue.HYPERLIQUID, symbol)
        newest = int(self._clock.now()) // MINUTE_S * MINUTE_S
        span = _Span(
            symbol=symbol,
            bar_s=MINUTE_S,
            first=newest - _QUOTE_BARS * MINUTE_S,
            last=newest + MINUTE_S,  # the venue's clock may be ahead of ours
        )
        rows, _ = self._rows(span, self._quote_policy)
        opened = _times([row["t"] for row in rows], 1000)
        if not opened.any():
            raise BadAnswer(
                f"{feed.name}: there is no candle of the last {_QUOTE_BARS} minutes and so no "
                "price; wait until the market trades."
            )
        at = int(np.argmax(opened))
        return _quote(rows[at]["c"], min(self._clock.now(), opened[at] + MINUTE_S), feed)

    def _page(self, span: _Span) -> _Page:
        rows, date = self._rows(span, self._policy)
        opened, closed = (
            _times([row["t"] for row in rows], 1),
            _times([row["T"] for row in rows], 1),
        )
        keys = {"open": "o", "high": "h", "low": "l", "close": "c", "volume": "v", "trades": "n"}
        return _Page(
            ts=_times([row["t"] for row in rows], 1000),
            columns={name: _numbers([row[key] for row in rows]) for name, key in keys.items()},
            date=date,
            is_stranger=closed - opened != span.bar_s * 1000 - 1,
        )

    def _rows(self, span: _Span, policy: HttpPolicy) -> tuple[list[dict[str, Any]], float | None]:
        """The candles of a call in the venue's form, and when it answered."""
        interval = _interval(span.bar_s)
        body = {
            "type": "candleSnapshot",
            "req": {
                "coin": span.symbol,
                "interval": interval,
                "startTime": span.first_ms,
                "endTime": span.end_ms,
            },
        }
        weight = self._WEIGHT + -(-span.count // 60)
        answer = self._client.post("info", body, weight=weight, policy=policy)
        rows = answer.value
        if not isinstance(rows, list) or not all(
            isinstance(row, dict)
            and row.keys() >= set("tTsiohlcvn")
            and (row["s"], row["i"]) == (span.symbol, interval)
            for row in rows
        ):
            raise _misfit(self._client, f"a list of {interval} candles of {span.symbol}", rows)
        return rows, answer.date


# ---------------------------------------------------------------- Pyth

_RESOLUTIONS: Final[Mapping[int, str]] = MappingProxyType({60: "1", 300: "5"})
_HERMES_IDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        spec.pyth_symbol: spec.pyth_id
        for spec in ASSETS.values()
        if spec.pyth_symbol and spec.pyth_id
    }
)


class PythFeed(_VenueFeed):
    """Pyth: candles without trades or volume, from two hosts, and the latest price of Hermes.

    Both history hosts serve the same prices. The one that answered last is asked
    first; the other is asked when it fails.
    """

    _venue = Venue.PYTH

    def __init__(
        self,
        history: tuple[HostClient, HostClient],
        latest: HostClient,
        clock: Clock,
        *,
        policy: HttpPolicy,
        quote_policy: HttpPolicy,
    ) -> None:
        # The other host is the better second attempt.
        patience = replace(policy, attempts=min(2, policy.attempts))
        super().__init__(clock, policy=patience, quote_policy=quote_policy)
        self._history = history
        self._latest = latest

    def _clients(self) -> tuple[HostClient, ...]:
        return (*self._history, self._latest)

    def price(self, symbol: str) -> PriceQuote:
        """The latest aggregate price, dated by its publishers."""
        if symbol not in _HERMES_IDS:
            raise FeedRefused(
                f"{self._latest.place} cannot be asked for {symbol!r}, whose price feed is not "
                f"known; known are {', '.join(_HERMES_IDS)}."
            )
        wanted = _HERMES_IDS[symbol]
        answer = self._latest.get(
            "v2/updates/price/latest", {"ids[]": wanted}, weight=1, policy=self._quote_policy
        )
        try:
            (entry,) = answer.value["parsed"]
            found, price = entry["id"], entry["price"]
            mantissa, exponent, ts = _number(price["price"]), price["expo"], price["publish_time"]
        except (TypeError, KeyError, ValueError):
            raise _misfit(self._latest, f"one price of {wanted}", answer.value) from None
        if found != wanted or not isinstance(exponent, int) or not _times([ts], 1).any():
            raise _misfit(self._latest, f"one price of {wanted}, dated", entry)
        scaled = mantissa * 10.0**exponent if abs(exponent) <= 30 else float("nan")
        return _quote(scaled, ts, FeedSymbol(Venue.PYTH, symbol))

    def _page(self, span: _Span) -> _Page:
        """The candles of a call from the first host that gives them."""
        first, second = self._history
        try:
            return self._page_of(first, span)
        except (SourceUnavailable, BadAnswer) as error:
            failure = error
        try:
            page = self._page_of(second, span)
        except (SourceUnavailable, BadAnswer) as error:
            raise _of_both(failure, error) from error
        log.warning("%s Asking %s from now on.", failure, second.place)
        self._history = (second, first)
        return page

    def _page_of(self, client: HostClient, span: _Span) -> _Page:
        query: dict[str, str | int] = {
            "symbol": span.symbol,
            "resolution": _RESOLUTIONS[span.bar_s],
            "from": span.first,
            "to": span.last,
        }
        answer = client.get("history", query, weight=1, policy=self._policy)
        found = answer.value
        status = found.get("s") if isinstance(found, dict) else None
        if status == "no_data":
            found = {key: [] for key in "tohlc"}
        elif status == "error":
            raise FeedRefused(
                f"{client.place} refuses the call ({_short(found.get('errmsg'))}); check the "
                f"symbol {span.symbol} and how many candles one call may ask for."
            )
        elif status != "ok" or not _has_equal_lists(found):
            raise _misfit(client, "equally long lists t, o, h, l and c", found)
        keys = {"open": "o", "high": "h", "low": "l", "close": "c"}
        return _Page(
            ts=_times(found["t"], 1),
            is_stranger=np.zeros(len(found["t"]), dtype=np.bool_),  # they do not say
            columns={name: _numbers(found[key]) for name, key in keys.items()},
            date=answer.date,
        )


def _of_both(first: MinerError, second: MinerError) -> SourceUnavailable:
    """The failure of both hosts; it is about the symbol alone if both refuse that."""
    refusals = [kind for kind in (type(first), type(second)) if kind is FeedRefused]
    kind = FeedRefused if len(refusals) == 2 else SourceUnavailable
    return kind(
        f"neither host of Pyth's history gives candles: {str(first).rstrip('.')}; and {second}"
    )


def _has_equal_lists(found: dict[str, Any]) -> bool:
    lists = [found.get(key) for key in "tohlc"]
    lengths = {len(entry) if isinstance(entry, list) else -1 for entry in lists}
    return len(lengths) == 1 and -1 not in lengths
