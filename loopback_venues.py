"""All venues on 127.0.0.1: recorded bars, served in the venues' forms, with faults on order.

A real HTTP server answers every request that `feeds` makes, in the exact forms of
the venues, from minute bars and a clock: a candle is there once it has begun, the
newest one still forms, and the ticker moves within the minute. With a rehearsal's
clock that replays any recorded time at any speed. Tests and rehearsals use it; a
`FaultRule` makes it misbehave the way venues do. What was asked is recorded, so
that it can be held against the limits.

Within a minute the price moves along a seeded random bridge from open to close,
which knows as little of the close as a real price would.
"""

import gzip
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from enum import StrEnum
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from math import ceil, floor
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit
from zlib import crc32

import numpy as np

from bar_cleaning import MINUTE_S
from clock import Clock
from config import ASSETS, VENUE_BARS_KEPT, FeedSymbol, Venue
from domain import Bars, FloatArray
from feed_plans import CANDLES_PER_CALL, FeedHost

# ---------------------------------------------------------------- faults


class Fault(StrEnum):
    """One way in which a venue misbehaves."""

    # the connection
    REFUSE = "refuse"  # hangs up without a word
    TIME_OUT = "time_out"  # never answers
    DRIP_HEAD = "drip_head"  # the head comes byte by byte
    DRIP_BODY = "drip_body"  # the body does
    # the status
    RATE_LIMITED = "rate_limited"  # 429, with Retry-After if the rule says so
    BLOCKED = "blocked"  # 451
    NOT_FOUND = "not_found"  # 404
    ERROR = "error"  # 500
    BAD_GATEWAY = "bad_gateway"  # 502 with a page of HTML
    REDIRECT = "redirect"  # 302
    # the body
    HTML = "html"  # a page of HTML under status 200
    TRUNCATED = "truncated"  # fewer bytes than announced
    BROKEN_GZIP = "broken_gzip"
    CUT_GZIP = "cut_gzip"
    TOO_LARGE = "too_large"  # unpacks to 64 MB
    WRONG_SHAPE = "wrong_shape"  # JSON of another form
    # the candles
    EMPTY = "empty"
    DUPLICATED = "duplicated"
    SHUFFLED = "shuffled"
    MISSING = "missing"  # every third candle is not there
    EARLIER = "earlier"  # candles from before the asked time as well
    # the closes, or what the rule names: of every seventh candle and the newest, and of quotes
    NAN = "nan"
    NULL = "null"
    TEXT = "text"
    HUGE = "huge"
    NEGATIVE = "negative"
    ZERO = "zero"
    SPIKE = "spike"  # × 100
    CONTRADICTED = "contradicted"  # those candles once more, × 100
    # the market
    FROZEN = "frozen"  # time goes on, the price does not
    STALE = "stale"  # the answer of a quarter of an hour ago, dated as if it were new
    CACHED = "cached"  # the same, dated as it was, as a cache on the way gives it


_BAD_PRICES: Final[Mapping[Fault, Any]] = {
    Fault.NAN: float("nan"),
    Fault.NULL: None,
    Fault.TEXT: "n/a",
    Fault.HUGE: 1e308,
    Fault.NEGATIVE: -1.0,
    Fault.ZERO: 0.0,
}
_STALE: Final = frozenset({Fault.STALE, Fault.CACHED})
_STALE_S: Final = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRule:
    """When a venue misbehaves, and how. What is None does not matter."""

    fault: Fault
    host: FeedHost | None = None
    symbol: str | None = None  # as the venue spells it; "" for requests that name none
    times: int | None = None  # so often, then never again
    share: float = 1.0  # of the requests that fit, drawn by a seeded generator
    from_ts: float = -np.inf  # market time, Unix seconds
    until_ts: float = np.inf
    retry_after: str | None = None  # header of RATE_LIMITED
    column: str = "close"  # of a candle, what a bad price takes the place of


class FaultPlan:
    """The rules in force; the first one that fits a request decides. Threads share it."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._left: list[tuple[FaultRule, float]] = []

    def add(self, rule: FaultRule) -> None:
        """Put a rule in force."""
        with self._lock:
            self._left.append((rule, np.inf if rule.times is None else rule.times))

    def clear(self) -> None:
        """Behave again."""
        with self._lock:
            self._left.clear()

    def pick(self, host: FeedHost, symbol: str, now: float) -> FaultRule | None:
        """The rule for a request; counts it as used."""
        with self._lock:
            for at, (rule, left) in enumerate(self._left):
                fits = (
                    rule.host in (None, host)
                    and rule.symbol in (None, symbol)
                    and rule.from_ts <= now < rule.until_ts
                    and left > 0
                )
                if fits and (rule.share >= 1 or self._rng.random() < rule.share):
                    self._left[at] = (rule, left - 1)
                    return rule
        return None


# ---------------------------------------------------------------- the market


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candle. Prices are floats unless a fault replaced them."""

    ts: int  # open time, Unix seconds
    open: Any
    high: Any
    low: Any
    close: Any
    volume: float

    @property
    def trades(self) -> int | None:
        """A plausible number of trades; None beside a volume that is not one."""
        return 1 + int(self.volume * 10) % 1000 if 0 <= self.volume < 1e300 else None


class Market:
    """Recorded minute bars as they looked at any moment, by asset or by feed.

    A key is a symbol of `config.ASSETS`, whose bars then serve every feed of the
    asset, or a feed's name such as "pyth:Crypto.BTC/USD", which wins for that feed.
    """

    def __init__(self, bars: Mapping[str, Bars]) -> None:
        for key, entry in bars.items():
            if entry.bar_s != MINUTE_S:
                raise ValueError(f"{key} has bars of {entry.bar_s} s; give bars of one minute")
        self._bars = dict(bars)

    def key(self, feed: FeedSymbol) -> str | None:
        """What the feed's bars are kept under; None if there are none."""
        key = feed.name if feed.name in self._bars else _ASSET_OF.get(feed)
        return key if key in self._bars else None

    def candles(
        self, key: str, bar_s: int, start: int, now: float, end: float = np.inf
    ) -> list[Row]:
        """Candles that open from `start`, before `end`, and had begun by `now`.

        The last may still form. One without any trade is a gap.
        """
        until = end if np.isinf(end) else -(-end // bar_s) * bar_s
        rows = self._minutes(key, start // bar_s * bar_s, now, until)
        if bar_s > MINUTE_S:
            slots = groupby(rows, key=lambda row: row.ts // bar_s * bar_s)
            rows = [_merged(slot, list(minutes)) for slot, minutes in slots]
        return [row for row in rows if start <= row.ts < end]

    def last(self, key: str, now: float) -> tuple[float, int] | None:
        """The newest price and its time, whole Unix seconds; None before the first bar."""
        bars = self._bars[key]
        at = int(np.searchsorted(bars.open_ts, now)) - 1
        if at < 0:
            return None
        (row,) = self._minutes(key, int(bars.open_ts[at]), now)
        return row.close, min(int(now), row.ts + MINUTE_S)

    def _minutes(self, key: str, start: int, now: float, end: float = np.inf) -> list[Row]:
        bars = self._bars[key]
        low, high = np.searchsorted(bars.open_ts, [start, min(now, end)])
        cut = slice(int(low), int(high))
        close = bars.close[cut]
        before = bars.close[max(cut.start - 1, 0) : max(cut.stop - 1, 0)]
        before = before if cut.start else np.concatenate([close[:1], before])
        opened = np.where(np.isfinite(bars.open[cut]), bars.open[cut], before)
        columns = (
            bars.open_ts[cut],
            opened,
            np.fmax(bars.high[cut], np.maximum(opened, close)),
            np.fmin(bars.low[cut], np.minimum(opened, close)),
            close,
            np.nan_to_num(bars.volume[cut]),
        )
        rows = [
            Row(ts=ts, open=first, high=top, low=bottom, close=last, volume=volume)
            for ts, first, top, bottom, last, volume in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]
        if rows and rows[-1].ts + MINUTE_S > now:
            rows[-1] = _forming(rows[-1], int(now) - rows[-1].ts, seed=crc32(key.encode()))
        return rows


def _merged(ts: int, rows: list[Row]) -> Row:
    return Row(
        ts=ts,
        open=rows[0].open,
        high=max(row.high for row in rows),
        low=min(row.low for row in rows),
        close=rows[-1].close,
        volume=sum(row.volume for row in rows),
    )


def _forming(row: Row, past_s: int, seed: int) -> Row:
    """A minute's candle as it was so many seconds after it opened."""
    path = _bridge(seed + row.ts, row.open, row.close, row.low, row.high)[: past_s + 1]
    return replace(
        row,
        high=max(row.open, float(path.max())),
        low=min(row.open, float(path.min())),
        close=float(path[-1]),
        volume=row.volume * past_s / MINUTE_S,
    )


@lru_cache(maxsize=256)
def _bridge(seed: int, opened: float, close: float, bottom: float, top: float) -> FloatArray:
    """Prices at every second from open to close within the range; shape (61,).

    A Brownian bridge; its spread follows from the range (Parkinson 1980, J. of
    Business 53), or from the body where that is all there is.
    """
    spread = max(np.log(top / bottom) / np.sqrt(4 * np.log(2)), abs(np.log(close / opened)))
    steps = np.random.default_rng(seed).normal(0, spread / np.sqrt(MINUTE_S), MINUTE_S)
    walk = np.concatenate([[0.0], np.cumsum(steps)])
    along = np.arange(MINUTE_S + 1) / MINUTE_S
    path = np.log(opened) + walk + along * (np.log(close / opened) - walk[-1])
    return np.asarray(np.clip(np.exp(path), bottom, top))


def _assets_by_feed() -> dict[FeedSymbol, str]:
    """Whose bars a feed shows; a feed of one's own goes before one that only helps out."""
    own = {spec.venue_feed: asset for asset, spec in ASSETS.items()}
    others = {
        FeedSymbol(feed.venue, feed.symbol): asset
        for asset, spec in reversed(list(ASSETS.items()))
        for feed in reversed(spec.backfill)
        if feed.same_price
    }
    return others | own


_ASSET_OF: Final = MappingProxyType(_assets_by_feed())
_SYMBOL_OF_ID: Final = MappingProxyType(
    {spec.pyth_id: spec.pyth_symbol for spec in ASSETS.values() if spec.pyth_id}
)


# ---------------------------------------------------------------- what the venues answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request as the venues count it."""

    host: FeedHost
    symbol: str
    weight: float
    at: float  # real monotonic seconds
    fault: Fault | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """One request, taken apart."""

    host: FeedHost
    path: str
    query: Mapping[str, str]
    body: Any
    now: float  # market time

    @property
    def symbol(self) -> str:
        """The symbol that is asked for, "" if none is."""
        if self.host is FeedHost.HYPERLIQUID:
            asked = self.body.get("req") if isinstance(self.body, dict) else None
            return str(asked.get("coin", "")) if isinstance(asked, dict) else ""
        if self.host is FeedHost.PYTH_LATEST:
            return _SYMBOL_OF_ID.get(self.query.get("ids[]", "")) or ""
        return self.query.get("symbol", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """What a venue answers; `rows` counts candles, for the weight."""

    value: Any
    status: int = 200
    rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """The market as one request sees it, faults of candles and prices included."""

    market: Market
    feed: FeedSymbol
    now: float
    rule: FaultRule | None

    @property
    def key(self) -> str | None:
        """What the feed's bars are kept under; None if there are none."""
        return self.market.key(self.feed)

    def candles(self, bar_s: int, start: int, end: int) -> list[Row]:
        """Candles that open from `start` until before `end`."""
        fault = self.rule.fault if self.rule else None
        if fault is Fault.EMPTY or self.key is None:
            return []
        start -= 5 * bar_s if fault is Fault.EARLIER else 0
        now = self.now - (_STALE_S if fault in _STALE else 0)
        return self._spoiled(self.market.candles(self.key, bar_s, start, now, end), bar_s)

    def last(self) -> tuple[Any, int] | None:
        """The newest price and its time."""
        fault = self.rule.fault if self.rule else None
        now = self.now - (_STALE_S if fault in _STALE else 0)
        found = None if self.key is None else self.market.last(self.key, now)
        if found is None:
            return None
        price, ts = found
        row = Row(ts=ts, open=price, high=price, low=price, close=price, volume=0.0)
        return self._bad_or_frozen(row).close, ts

    def _spoiled(self, rows: list[Row], bar_s: int) -> list[Row]:
        fault = self.rule.fault if self.rule else None
        if fault is Fault.DUPLICATED:
            return rows + rows[: len(rows) // 2]
        if fault is Fault.SHUFFLED:
            return [rows[at] for at in np.random.default_rng(len(rows)).permutation(len(rows))]
        if fault is Fault.MISSING:
            return [row for row in rows if row.ts // bar_s % 3]
        if fault is Fault.FROZEN:
            return [self._bad_or_frozen(row) for row in rows]
        struck = [row.ts // bar_s % 7 == 0 or row is rows[-1] for row in rows]
        if fault is Fault.CONTRADICTED:
            return rows + [_spiked(row) for row, hit in zip(rows, struck, strict=True) if hit]
        return [
            self._bad_or_frozen(row) if hit else row for row, hit in zip(rows, struck, strict=True)
        ]

    def _bad_or_frozen(self, row: Row) -> Row:
        """The row with the value that the fault makes of it."""
        if self.rule is None or self.key is None:
            return row
        fault, column = self.rule.fault, self.rule.column
        if fault is Fault.SPIKE:
            spiked = replace(row, **{column: getattr(row, column) * 100})
            return _spiked(row) if column == "close" else spiked
        if fault in _BAD_PRICES:
            return replace(row, **{column: _BAD_PRICES[fault]})
        if fault is not Fault.FROZEN:
            return row
        since = self.rule.from_ts if np.isfinite(self.rule.from_ts) else self.now // 3600 * 3600
        found = self.market.last(self.key, since)
        if found is None or row.ts < since:
            return row
        price = found[0]
        return replace(row, open=price, high=price, low=price, close=price, volume=0.0)


def _spiked(row: Row) -> Row:
    return replace(row, high=row.high * 100, close=row.close * 100)


def _text(value: Any) -> Any:
    """A number the way venues write it, as text; faults pass as they are."""
    return repr(value) if isinstance(value, float | int) else value


_BAR_S: Final = MappingProxyType({"1m": 60, "5m": 300, "1": 60, "5": 300})
_NO_SUCH_PATH: Final = _Reply(value={"error": "not found"}, status=404)


def _binance(request: _Request, view: _View) -> _Reply:
    if view.key is None:
        return _Reply(value={"code": -1121, "msg": "Invalid symbol."}, status=400)
    if request.path == "api/v3/ticker/price":
        last = view.last()
        price = _text(last[0]) if last else "0"
        return _Reply(value={"symbol": view.feed.symbol, "price": price})
    if request.path != "api/v3/klines":
        return _NO_SUCH_PATH
    query = request.query
    bar_s = _BAR_S[query["interval"]]
    start, end = int(query["startTime"]) / 1000, int(query["endTime"]) / 1000
    rows = view.candles(bar_s, ceil(start), floor(end) + 1)
    limit = min(int(query.get("limit", 500)), CANDLES_PER_CALL[Venue.BINANCE])
    return _Reply(value=[_kline(row, bar_s) for row in rows[:limit]], rows=len(rows))


def _kline(row: Row, bar_s: int) -> list[Any]:
    prices = [_text(value) for value in (row.open, row.high, row.low, row.close)]
    half = _text(row.volume / 2)
    closed_ms = (row.ts + bar_s) * 1000 - 1
    volume = _text(row.volume)
    return [row.ts * 1000, *prices, volume, closed_ms, "0", row.trades, half, "0", "0"]


def _hyperliquid(request: _Request, view: _View) -> _Reply:
    asked = request.body.get("req") if isinstance(request.body, dict) else None
    if request.path != "info" or not isinstance(asked, dict):
        return _Reply(value="Failed to deserialize the JSON body into the target type", status=422)
    if view.key is None:
        return _Reply(value=None, status=500)
    interval = asked["interval"]
    bar_s = _BAR_S[interval]
    kept_from = (int(view.now) // bar_s - VENUE_BARS_KEPT[Venue.HYPERLIQUID] + 1) * bar_s
    start = max(ceil(asked["startTime"] / 1000), kept_from)
    rows = view.candles(bar_s, start, floor(asked["endTime"] / 1000) + 1)
    return _Reply(
        value=[
            {
                "t": row.ts * 1000,
                "T": (row.ts + bar_s) * 1000 - 1,
                "s": view.feed.symbol,
                "i": interval,
                **{key: _text(getattr(row, name)) for key, name in _LETTERS.items()},
                "n": row.trades,
            }
            for row in rows
        ],
        rows=len(rows),
    )


_LETTERS: Final = MappingProxyType(
    {"o": "open", "h": "high", "l": "low", "c": "close", "v": "volume"}
)


def _pyth_history(request: _Request, view: _View) -> _Reply:
    if request.path != "history":
        return _NO_SUCH_PATH
    if view.key is None:
        return _Reply(value={"s": "error", "errmsg": "Symbol not found"})
    bar_s = _BAR_S[request.query["resolution"]]
    start, end = int(request.query["from"]), int(request.query["to"])
    if (end - start) // bar_s > 10_000:
        nothing: dict[str, list[Any]] = {key: [] for key in "tohlcv"}
        return _Reply(value={"s": "error", "errmsg": "too many bars", **nothing})
    rows = view.candles(bar_s, start, end + 1)
    if not rows:
        return _Reply(value={"s": "no_data"})
    lists = {key: [getattr(row, name) for row in rows] for key, name in _LETTERS.items()}
    return _Reply(
        value={"s": "ok", "t": [row.ts for row in rows], **lists, "v": [0.0] * len(rows)},
        rows=len(rows),
    )


def _pyth_latest(request: _Request, view: _View) -> _Reply:
    last = view.last()
    if request.path != "v2/updates/price/latest":
        return _NO_SUCH_PATH
    if last is None:
        return _Reply(value="Price ids not found", status=404)
    price, ts = last
    mantissa = str(round(price * 1e8)) if _is_small_number(price) else _text(price)
    quote = {"price": mantissa, "conf": "1", "expo": -8, "publish_time": ts}
    return _Reply(value={"parsed": [{"id": request.query["ids[]"], "price": quote}]})


def _is_small_number(value: Any) -> bool:
    return isinstance(value, float) and abs(value) < 1e200


_ANSWERS: Final = MappingProxyType(
    {
        FeedHost.BINANCE: (_binance, Venue.BINANCE),
        FeedHost.HYPERLIQUID: (_hyperliquid, Venue.HYPERLIQUID),
        FeedHost.PYTH_HISTORY: (_pyth_history, Venue.PYTH),
        FeedHost.PYTH_ROUTER: (_pyth_history, Venue.PYTH),
        FeedHost.PYTH_LATEST: (_pyth_latest, Venue.PYTH),
    }
)


def _weight(host: FeedHost, rows: int) -> float:
    """What the venue counts for an answer. Source: the venues' documentation."""
    if host is FeedHost.HYPERLIQUID:
        return 20 + ceil(rows / 60)
    return 2 if host is FeedHost.BINANCE else 1


# ---------------------------------------------------------------- serving


class LoopbackVenues:
    """The venues while they are served; made by `serve_venues`."""

    def __init__(self, market: Market, clock: Clock, address: str) -> None:
        self.market = market
        self.clock = clock
        self.address = address
        self.faults = FaultPlan()
        self.asked: list[Asked] = []
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()

    @property
    def urls(self) -> dict[str, Any]:
        """The settings that lead every feed here."""
        return {f"{host.value}_url": f"{self.address}/{host.value}" for host in FeedHost}

    def count(self, host: FeedHost | None = None) -> int:
        """How many requests have come in."""
        return sum(host in (None, entry.host) for entry in list(self.asked))

    def heaviest(self, host: FeedHost, window_s: float) -> float:
        """The most weight that fell into any window of so many real seconds."""
        mine = [entry for entry in list(self.asked) if entry.host is host]
        sums = (
            sum(other.weight for other in mine if 0 <= other.at - entry.at < window_s)
            for entry in mine
        )
        return max(sums, default=0.0)

    def reply(self, request: _Request) -> tuple[_Reply, FaultRule | None]:
        """The venue's answer and the fault that befalls it; counts the request."""
        answer, venue = _ANSWERS[request.host]
        rule = self.faults.pick(request.host, request.symbol, request.now)
        feed = FeedSymbol(venue, request.symbol)
        view = _View(market=self.market, feed=feed, now=request.now, rule=rule)
        reply = answer(request, view)
        self.asked.append(
            Asked(
                host=request.host,
                symbol=request.symbol,
                weight=_weight(request.host, reply.rows),
                at=time.monotonic(),
                fault=rule.fault if rule else None,
            )
        )
        return reply, rule


@contextmanager
def serve_venues(
    bars: Mapping[str, Bars], clock: Clock, *, port: int = 0
) -> Iterator[LoopbackVenues]:
    """Serve minute bars (see `Market`) on 127.0.0.1 for as long as the context lasts.

    Port 0 takes a free one. Raises: ValueError for bars that are not minutes.
    """
    market = Market(bars)
    server = _Server(("127.0.0.1", port), _Handler)
    venues = LoopbackVenues(market, clock, f"http://127.0.0.1:{server.server_port}")
    server.venues = venues
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="loopback-venues")
    thread.start()
    try:
        yield venues
    finally:
        venues.closing.set()
        server.shutdown()
        thread.join()
        for connection in list(venues.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()  # joins the threads of requests


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    venues: LoopbackVenues

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of callers that hang up: faults make them."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        """Remember the connection, to end it when the venues close."""
        super().setup()
        self.server.venues.connections.add(self.connection)

    def finish(self) -> None:
        """Forget the connection."""
        self.server.venues.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: `LoopbackVenues.asked` tells what came in."""

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer(None)

    def do_POST(self) -> None:
        """Answer a POST of JSON."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self._answer(json.loads(body))
        except ValueError:
            self._answer(None)

    def _answer(self, body: Any) -> None:
        parts = urlsplit(self.path)
        prefix, _, path = parts.path.lstrip("/").partition("/")
        if prefix not in set(FeedHost):
            self._send(b"{}", status=404)
            return
        venues = self.server.venues
        request = _Request(
            host=FeedHost(prefix),
            path=path,
            query={key: values[-1] for key, values in parse_qs(parts.query).items()},
            body=body,
            now=venues.clock.now(),
        )
        try:
            reply, rule = venues.reply(request)
        except (KeyError, TypeError, ValueError):
            self._send(b'{"error": "bad request"}', status=400)
            return
        content = json.dumps(reply.value).encode()
        if rule is None:
            self._send(content, status=reply.status)
        else:
            self._misbehave(rule, content, reply.status)

    def _misbehave(self, rule: FaultRule, content: bytes, status: int) -> None:
        """Answer as the rule says; faults of candles are in the content already."""
        fault = rule.fault
        if fault in (Fault.REFUSE, Fault.TIME_OUT):
            self.server.venues.closing.wait(_NEVER_S if fault is Fault.TIME_OUT else 0)
            self.close_connection = True
        elif fault in _STATUSES:
            status, content = _STATUSES[fault]
            headers = {"Retry-After": rule.retry_after} if rule.retry_after else {}
            if fault is Fault.REDIRECT:
                headers["Location"] = "https://elsewhere.example/"
            self._send(content, status=status, headers=headers)
        elif fault is Fault.WRONG_SHAPE:
            self._send(b'{"unexpected": [1, 2, {"deep": null}]}')
        elif fault is Fault.HTML:
            self._send(_PAGE)
        elif fault in (Fault.BROKEN_GZIP, Fault.CUT_GZIP, Fault.TOO_LARGE):
            self._send(_packed_badly(fault, content), headers={"Content-Encoding": "gzip"})
        elif fault in (Fault.TRUNCATED, Fault.DRIP_HEAD, Fault.DRIP_BODY):
            self._send_badly(fault, content)
        elif fault is Fault.CACHED:
            made = self.server.venues.clock.now() - _STALE_S
            headers = {"Date": formatdate(made, usegmt=True), "Age": str(_STALE_S)}
            self._send(content, status=status, headers=headers)
        else:
            self._send(content, status=status)

    def _send(
        self, content: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send an answer; a long one packed and in chunks, as the venues' own servers do."""
        packs = "gzip" in self.headers.get("Accept-Encoding", "")
        if headers or not packs or len(content) < _SHORT:
            self.wfile.write(self._head(len(content), status, headers or {}) + content)
            return
        packed = gzip.compress(content, compresslevel=1)
        form = {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}
        pieces = (packed[at : at + _CHUNK] for at in range(0, len(packed), _CHUNK))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        self.wfile.write(self._head(None, status, form) + chunks + b"0\r\n\r\n")

    def _send_badly(self, fault: Fault, content: bytes) -> None:
        """Send too little, or all of it but much too slowly."""
        head = self._head(len(content), 200, {})
        self.close_connection = True
        if fault is Fault.TRUNCATED:
            self.wfile.write(head + content[: len(content) // 2])
            return
        if fault is Fault.DRIP_BODY:
            self.wfile.write(head)
            head = b""
        for byte in head + content:
            if self.server.venues.closing.wait(_DRIP_S):
                return
            self.wfile.write(bytes([byte]))

    def _head(self, length: int | None, status: int, headers: Mapping[str, str]) -> bytes:
        """Status line and headers; the date is the market's. No length: the body is in chunks."""
        lines = {
            "Date": formatdate(self.server.venues.clock.now(), usegmt=True),
            "Content-Type": "application/json",
            **({} if length is None else {"Content-Length": str(length)}),
            **headers,
        }
        text = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        text += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{text}\r\n".encode("latin-1")


_SHORT: Final = 1000  # bytes; not worth packing
_CHUNK: Final = 10_000  # bytes
_NEVER_S: Final = 600.0
_DRIP_S: Final = 0.02
_PAGE: Final = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head></html>"
_STATUSES: Final[Mapping[Fault, tuple[int, bytes]]] = MappingProxyType(
    {
        Fault.RATE_LIMITED: (429, b'{"code": -1003, "msg": "Too much request weight used."}'),
        Fault.BLOCKED: (451, b'{"code": 0, "msg": "Service unavailable from a restricted place."}'),
        Fault.NOT_FOUND: (404, b'{"error": "not found"}'),
        Fault.ERROR: (500, b"null"),
        Fault.BAD_GATEWAY: (502, _PAGE),
        Fault.REDIRECT: (302, b""),
    }
)


def _packed_badly(fault: Fault, content: bytes) -> bytes:
    """Gzip data that is damaged, cut off, or far larger than it looks."""
    if fault is Fault.TOO_LARGE:
        return gzip.compress(bytes(64 * 2**20), compresslevel=1)
    packed = gzip.compress(content)
    if fault is Fault.CUT_GZIP:
        return packed[:-12]
    return packed[:10] + bytes(byte ^ 0xFF for byte in packed[10:])
