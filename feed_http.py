"""Asking a host over HTTP for JSON, with bounds on everything that can take long.

A call waits for its share of the host's limit, is made with timeouts that a slow
drip of bytes cannot stretch, reads no more than so many bytes, and is repeated a
few times, with growing and jittered pauses, after those failures alone that may
pass. What goes wrong is told by the errors below `errors.SourceUnavailable` and
`errors.BadAnswer`; nothing is swallowed.
"""

import http.client
import json
import logging
import math
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from statistics import median
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random,
)
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, ReadTimeoutError

from errors import (
    BadAnswer,
    CountryBlocked,
    FeedFailed,
    FeedRefused,
    FeedTimeout,
    FeedUnreachable,
    GarbledAnswer,
    RateLimited,
)
from feed_plans import (
    BINANCE_HOST_VARIABLE,
    BINANCE_OPEN_HOST,
    HOST_LIMITS,
    FeedHost,
    HostLimit,
    HttpPolicy,
)
from settings import address_shown

log = logging.getLogger(__name__)

Sleep = Callable[[float], object]

MAY_PASS: Final = (FeedUnreachable, FeedTimeout, FeedFailed, RateLimited, GarbledAnswer)

CLOCK_ANSWERS: Final = 9  # whose dates tell a host's clock
CLOCK_MEMORY_S: Final = 900.0  # and they are none older: ours may have been set since

_LONGEST_HOLD_S: Final = 3600.0  # a host is asked again after that, whatever it said
_OLDEST_S: Final = 86_400.0  # of an answer; to be older makes no difference
_CONNECTIONS: Final = 16  # kept open per host, for as many threads
_PIECE: Final = 65_536  # bytes


# ---------------------------------------------------------------- limits


class TokenBucket:
    """The weight that a host's limit leaves; threads share it.

    A bucket of capacity C that refills at the rate r lets C + r·W through in a
    window W. A third of the limit as capacity and two thirds as refill therefore
    keep every window within the limit, wherever the host lets it begin.
    """

    def __init__(
        self,
        limit: HostLimit,
        *,
        sleep: Sleep = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = limit.weight / 3
        self._rate = 2 / 3 * limit.weight / limit.window_s
        self._sleep = sleep
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._tokens = self._capacity
        self._filled_at = monotonic()
        self._held_until = -math.inf

    def take(self, weight: float, *, patience_s: float) -> None:
        """Wait for one's turn and spend the weight; first come, first served.

        Raises: RateLimited at once if the wait would be longer than `patience_s`.
        """
        with self._lock:
            now = self._monotonic()
            filled = self._tokens + self._rate * (now - self._filled_at)
            self._tokens, self._filled_at = min(self._capacity, filled), now
            wait_s = max(self._held_until - now, (weight - self._tokens) / self._rate)
            if wait_s > patience_s:
                raise RateLimited(
                    f"its limit leaves no call for {wait_s:.0f} s, which is longer than the "
                    f"{patience_s:.0f} s of patience; ask again later.",
                    retry_after_s=wait_s,
                )
            self._tokens -= weight
        if wait_s > 0:
            self._sleep(wait_s)

    def hold(self, seconds: float) -> None:
        """Let nobody take anything for a while: the host has had enough."""
        with self._lock:
            self._held_until = max(self._held_until, self._monotonic() + seconds)


# ---------------------------------------------------------------- connections


class _PunctualHead:
    """A connection whose answer's head must be there within the read timeout as a whole.

    The timeout of a socket starts anew with every byte, so a head that drips in
    would never run into it; a body is watched piece by piece in `HostClient`.
    """

    sock: socket.socket | None
    timeout: Any

    def getresponse(self) -> Any:
        cut = threading.Event()
        watchdog = threading.Timer(self.timeout, _hang_up, (self.sock, cut))
        watchdog.daemon = True
        watchdog.start()
        try:
            response = super().getresponse()  # type: ignore[misc]
        except (OSError, http.client.HTTPException) as error:
            if cut.is_set():
                raise TimeoutError from error
            raise
        finally:
            watchdog.cancel()
        if cut.is_set():  # half a head may pass for a whole one
            response.close()
            raise TimeoutError
        return response


def _hang_up(sock: socket.socket | None, cut: threading.Event) -> None:
    """End the connection under the reader, who then sees it closed."""
    cut.set()
    if sock is not None:
        with suppress(OSError):  # closed meanwhile: nobody reads any more
            # Past the method of TLS sockets, which would first unwrap under the reader.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _PunctualHTTPConnection(_PunctualHead, HTTPConnection):
    pass


class _PunctualHTTPSConnection(_PunctualHead, HTTPSConnection):
    pass


class _PunctualHTTPPool(HTTPConnectionPool):
    ConnectionCls = _PunctualHTTPConnection


class _PunctualHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _PunctualHTTPSConnection


def _session() -> requests.Session:
    """A session that threads may share: it keeps no cookies and repeats nothing by itself."""
    session = requests.Session()
    session.headers.update({"User-Agent": "lgbm-miner", "Accept-Encoding": "gzip"})
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        adapter = HTTPAdapter(pool_maxsize=_CONNECTIONS)
        adapter.poolmanager.pool_classes_by_scheme = {
            "http": _PunctualHTTPPool,
            "https": _PunctualHTTPSPool,
        }
        session.mount(scheme, adapter)
    return session


# ---------------------------------------------------------------- calls


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """What a host answered."""

    value: Any  # decoded JSON; NaN and Infinity are let through for the caller to judge
    date: float | None  # when, by the host's own clock (header Date), Unix seconds
    age_s: float = 0.0  # for how long it has lain in caches on the way (header Age)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One call, as often as it has to be made."""

    method: str
    path: str
    weight: float
    policy: HttpPolicy
    params: Mapping[str, str | int] | None = None
    body: Any = None


class HostClient:
    """Calls of one host; threads may share it. `now` tells the market's time.

    `sleep` is used for every wait: give an event's `wait` to end waits early. At the
    `speed` of a rehearsal a minute's calls are due every few seconds: its host grants
    them, so the limit counts market time.
    """

    def __init__(
        self,
        host: FeedHost,
        base_url: str,
        *,
        now: Callable[[], float],
        sleep: Sleep = time.sleep,
        speed: float = 1.0,
    ) -> None:
        self._host = host
        self._base_url = base_url.rstrip("/")
        self._now = now
        self._sleep = sleep
        self._limit = HOST_LIMITS[host]
        in_force = replace(self._limit, window_s=self._limit.window_s / speed)
        self._bucket = TokenBucket(in_force, sleep=sleep)
        self._session = _session()
        self._closed = threading.Event()
        # When (monotonic), and the host's clock less ours.
        self._offsets: deque[tuple[float, float]] = deque(maxlen=CLOCK_ANSWERS)

    @property
    def place(self) -> str:
        """The host and its address, to name in messages."""
        return f"{self._host.value} at {address_shown(self._base_url)}"

    def get(
        self, path: str, params: Mapping[str, str | int], *, weight: float, policy: HttpPolicy
    ) -> HttpAnswer:
        """GET as JSON. Raises: SourceUnavailable, BadAnswer and their kinds."""
        return self._repeat(
            _Call(method="GET", path=path, params=params, weight=weight, policy=policy)
        )

    def post(self, path: str, body: Any, *, weight: float, policy: HttpPolicy) -> HttpAnswer:
        """POST JSON for JSON. Raises: SourceUnavailable, BadAnswer and their kinds."""
        return self._repeat(
            _Call(method="POST", path=path, body=body, weight=weight, policy=policy)
        )

    def server_time(self) -> float | None:
        """The host's clock, Unix seconds, or None while no answer of late tells it.

        By the Date headers of the latest answers, so to half a second at best; costs no
        call. It is their median: some may be old, from a cache.
        """
        oldest = time.monotonic() - CLOCK_MEMORY_S
        recent = [offset for at, offset in list(self._offsets) if at >= oldest]
        return self._now() + median(recent) if recent else None

    def close(self) -> None:
        """Close the connections; what is asked from now on is refused at once."""
        self._closed.set()
        self._session.close()

    def _repeat(self, call: _Call) -> HttpAnswer:
        """Attempts until one succeeds or there is no point or no patience left."""
        policy = call.policy
        grow = wait_exponential(policy.first_wait_s, max=policy.longest_wait_s) + wait_random(
            0, policy.first_wait_s
        )

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after_s if isinstance(error, RateLimited) else None
            return (asked or 0.0) + grow(state)

        retrying = Retrying(
            sleep=self._rest,
            stop=stop_after_attempt(policy.attempts) | stop_before_delay(policy.budget_s),
            wait=pause,
            retry=retry_if_exception_type(MAY_PASS),
            before_sleep=_report,
            reraise=True,
        )
        return retrying(self._attempt, call)

    def _rest(self, seconds: float) -> None:
        self._sleep(seconds)

    def _attempt(self, call: _Call) -> HttpAnswer:
        if self._closed.is_set():  # a stop must not wait for further attempts
            raise FeedRefused(f"{self.place} is not asked any more: the miner stops.")
        try:
            self._bucket.take(call.weight, patience_s=call.policy.budget_s)
        except RateLimited as error:
            raise RateLimited(f"{self.place}: {error}", retry_after_s=error.retry_after_s) from None
        started = time.monotonic()
        try:
            with self._session.request(
                call.method,
                f"{self._base_url}/{call.path}",
                params=call.params,
                json=call.body,
                timeout=(call.policy.connect_s, call.policy.read_s),
                stream=True,
                allow_redirects=False,
            ) as response:
                came = self._now()
                body = self._body(response, call.policy, started + call.policy.attempt_s)
        except (requests.Timeout, ReadTimeoutError) as error:
            raise self._timeout(started) from error
        except (requests.RequestException, HTTPError, http.client.HTTPException, OSError) as error:
            raise self._unreachable(error) from error
        date, age_s = _date(response), _age(response)
        self._require_success(response.status_code, body, response.headers.get("Retry-After"), date)
        if date is not None and not age_s:  # else it is a cache's, of some time ago
            # The header counts whole seconds that have passed: the middle is the best guess.
            self._offsets.append((time.monotonic(), date + 0.5 - came))
        return HttpAnswer(value=self._json(body), date=date, age_s=age_s)

    def _unreachable(self, error: BaseException) -> FeedUnreachable:
        cause = _first_cause(error)
        fault, remedy = f"cannot be reached ({_cause(error)})", "check the network"
        if isinstance(cause, socket.gaierror):
            fault, remedy = "has a name that cannot be resolved", "check the network and its DNS"
        return FeedUnreachable(
            f"{self.place} {fault}; {remedy} first, else name another host with {self._setting}."
        )

    @property
    def _setting(self) -> str:
        """What names another address."""
        is_binance = self._host is FeedHost.BINANCE
        return BINANCE_HOST_VARIABLE if is_binance else f"{self._host.value}_url"

    def _timeout(self, started: float) -> FeedTimeout:
        return FeedTimeout(
            f"{self.place} gave no whole answer within {time.monotonic() - started:.1f} s; check "
            "the network, or wait until the host is less busy."
        )

    def _body(self, response: requests.Response, policy: HttpPolicy, deadline: float) -> bytes:
        """The whole body, unpacked, within its time and size."""
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := response.raw.read1(_PIECE, decode_content=False):
                size += len(piece)
                if size > policy.max_bytes:
                    raise self._too_large(policy)
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise FeedTimeout(
                        f"{self.place} drips its answer in, {size} bytes in "
                        f"{policy.attempt_s:g} s; wait until the host is less busy."
                    )
        except ReadTimeoutError:
            raise
        except HTTPError as error:
            raise GarbledAnswer(
                f"{self.place} broke its answer off after {size} bytes ({_cause(error)}); "
                "ask again."
            ) from error
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        return self._unpacked(b"".join(pieces), encoding, policy)

    def _unpacked(self, body: bytes, encoding: str, policy: HttpPolicy) -> bytes:
        if encoding == "identity":
            return body
        if encoding != "gzip":
            raise BadAnswer(f"{self.place} packs its answer as {encoding!r}; gzip was asked for.")
        unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            unpacked = unpacker.decompress(body, policy.max_bytes)
        except zlib.error as error:
            raise GarbledAnswer(
                f"{self.place} sent broken gzip data ({_cause(error)}); ask again."
            ) from error
        if unpacker.unconsumed_tail:
            raise self._too_large(policy)
        if not unpacker.eof:
            raise GarbledAnswer(f"{self.place} sent gzip data that ends too early; ask again.")
        return unpacked

    def _too_large(self, policy: HttpPolicy) -> BadAnswer:
        return BadAnswer(
            f"{self.place} sends more than the {policy.max_bytes} bytes that an answer may "
            "have; see who answers at that address."
        )

    def _require_success(
        self, status: int, body: bytes, retry_after: str | None, date: float | None
    ) -> None:
        """Nothing if the call succeeded. Raises: the error that the HTTP status stands for."""
        if status == http.client.OK:
            return
        said = f"HTTP {status}: {_excerpt(body)}"
        if status in (418, 429):  # 418: Binance's ban of those who do not heed 429
            wait_s = self._wait_asked(retry_after, date)
            self._bucket.hold(wait_s)
            raise RateLimited(
                f"{self.place} wants fewer calls ({said}) and none for {wait_s:.0f} s; stop "
                "other programs that ask it from this address.",
                retry_after_s=wait_s,
            )
        if status == 451:
            remedy = (
                f"set {BINANCE_HOST_VARIABLE}={BINANCE_OPEN_HOST}, which serves the same candles"
                if self._host is FeedHost.BINANCE
                else f"set {self._host.value}_url to a host that does"
            )
            raise CountryBlocked(f"{self.place} does not serve this country (HTTP 451); {remedy}.")
        if status >= 500 or status in (408, 425):
            raise FeedFailed(f"{self.place} reports a fault of its own ({said}); ask again later.")
        raise FeedRefused(
            f"{self.place} refuses the call ({said}); check {self._host.value}_url and the symbol."
        )

    def _wait_asked(self, retry_after: str | None, date: float | None) -> float:
        """For how long not to call: as told, as known of the host, or a sixth of its window."""
        seconds = _seconds_until(retry_after, self._now() if date is None else date)
        limit = self._limit
        return min(seconds or limit.penalty_s or limit.window_s / 6, _LONGEST_HOLD_S)

    def _json(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise GarbledAnswer(
                f"{self.place} sent no JSON but {_excerpt(body)}; see who answers there."
            ) from error


def _report(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.debug("%s (attempt %d; again in %.1f s)", error, state.attempt_number, state.upcoming_sleep)


def _date(response: requests.Response) -> float | None:
    """The Date header as Unix seconds; None if there is none that can be read."""
    try:
        return parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (KeyError, ValueError, OverflowError):
        return None


def _age(response: requests.Response) -> float:
    """The Age header in seconds; 0 without one that can be read."""
    said = response.headers.get("Age", "")
    return min(float(said), _OLDEST_S) if said.isdecimal() else 0.0


def _seconds_until(retry_after: str | None, now: float) -> float | None:
    """A Retry-After header (seconds or a date) as positive seconds, or None."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return seconds if seconds > 0 else None


def _excerpt(body: bytes) -> str:
    """The beginning of a body on one printable line."""
    text = " ".join(body[:400].decode("utf-8", "replace").split())
    return "".join(letter for letter in text if letter.isprintable())[:120] or "nothing"


def _first_cause(error: BaseException) -> BaseException:
    """The first of a chain of errors."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _cause(error: BaseException) -> str:
    """The first of a chain of errors, short."""
    first = _first_cause(error)
    said = getattr(first, "strerror", None) or f"{type(first).__name__}: {first}"
    return _excerpt(said.encode()).rstrip(".")
