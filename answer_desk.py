"""The one door to the engine, whatever the transport: HTTP, axon, a rehearsal.

Owns what all transports share: identical requests get the same forecast, computed
once and written once in each encoding that is asked for; a request that cannot be
met before its start is refused before any work; the queue is bounded and serves the
highest priority first; every outcome is told to observers. A transport parses,
authenticates and names the encoding; the desk never looks at a body, and the event
loop only waits here.

    desk = AnswerDesk(engine, observers=[keeper(ledger, profile)])
    desk.watch(Metrics(facts, desk.load).observe)
    answer = await desk.answer(
        request, encoder=SHADOW_JSON, caller=Caller(name=hotkey, transport="axon"),
        now=now, priority=stake, budget_s=prompt_budget(request.start_ts, now),
    )
    Response(answer.body)            # or, for a MinerError, refusal_status(error)
"""

import asyncio
import logging
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from typing import Final, Protocol, TypeAlias

from config import ASKED_AHEAD_S
from domain import Diagnostics, Forecast, ForecastRequest
from errors import (
    ChainUnavailable,
    MinerError,
    NoPriceError,
    NotAllowed,
    Overloaded,
    RequestError,
    TooLate,
)
from wire_format import Encoder, format_iso

MAX_AHEAD_S: Final = 3600  # how far in the future a prompt may start
ANSWER_THREADS: Final = 4  # NumPy releases the interpreter lock while it draws
MOST_WAITING: Final = 128  # distinct requests in the queue
# Of forecasts and their encodings: a day takes 2.3 MB, and 1 MB gzipped or 3 MB plain.
CACHE_BYTES: Final = 64 * 1024 * 1024
KEPT_AFTER_START_S: Final = 30.0  # for callers that ask again
# How long before a start, and at most, a forecast is shared: whoever asks earlier must
# not decide what the others get a minute ahead.
SHARED_S: Final = 120.0
DELIVERY_S: Final = 1.0  # of the time to the start, left for the way back

# The work of an answer is its prices, and as much again as this many for the rest.
_FIXED_PRICES: Final = 20_000
_FIRST_GUESS_S: Final = 3e-6  # per price, before anything was measured: 1 s for a day
_MEASURED: Final = 16  # latest answers whose median speed counts

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- what goes in and out


class Answerer(Protocol):
    """What the desk needs of a forecast engine; called from several threads."""

    def now(self) -> int:
        """The present moment, Unix seconds."""

    def assets(self) -> tuple[str, ...]:
        """The assets that can be answered."""

    def answer(self, request: ForecastRequest, *, origin: int | None = None) -> Forecast:
        """Forecast; with `origin`, from what was known then. Raises: MinerError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, as logs and the ledger name it. Never holds a secret."""

    name: str  # hotkey, or the address of an HTTP caller
    transport: str  # "http", "axon"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """An encoded answer and how it came about."""

    body: bytes
    diagnostics: Diagnostics


class Outcome(StrEnum):
    """What became of a request."""

    COMPUTED = "computed"  # the first answer that a forecast is given in
    REPEATED = "repeated"  # the forecast that another caller got
    TOO_LATE = "too_late"
    OVERLOADED = "overloaded"
    REFUSED = "refused"  # the caller can change it
    NO_PRICE = "no_price"
    UNAVAILABLE = "unavailable"  # the caller can only wait
    FAILED = "failed"  # a bug
    LEFT = "left"  # the caller hung up first
    NOT_ALLOWED = "not_allowed"  # for who the caller has proven to be: stake, permit, unread chain
    TURNED_AWAY = "turned_away"  # by the transport, unread: route, signature, body


ANSWERED: Final = frozenset({Outcome.COMPUTED, Outcome.REPEATED})
AT_WILL: Final = frozenset({Outcome.NOT_ALLOWED, Outcome.TURNED_AWAY})  # anybody can cause them
AT_WILL_S: Final = 60.0  # between two log lines of such an outcome


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerRecord:
    """One request and its outcome, as observers see it."""

    at: float  # the caller's `now`, Unix seconds
    caller: Caller
    outcome: Outcome
    ms: float  # from arrival at the desk to the outcome
    request: ForecastRequest | None = None  # None: turned away, or never read
    origin: int | None = None
    format: str | None = None
    diagnostics: Diagnostics | None = None  # None: not answered
    size: int = 0  # bytes of the answer
    reason: str | None = None  # why it was not answered, one sentence
    forecast: Forecast | None = None  # with COMPUTED only, before encoding


# Called on the caller's event loop: it must not block. What it raises is logged.
Observer: TypeAlias = Callable[[AnswerRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskLoad:
    """How busy the desk is."""

    waiting: int  # distinct requests in the queue
    running: int
    cached: int  # forecasts
    cached_bytes: int
    seconds_per_day_answer: float  # estimate for 1000 paths of 289 points


def prompt_budget(start_ts: int, now: float, speed: float = 1.0) -> float:
    """Real seconds until an answer to a prompt that starts at `start_ts` must have arrived.

    `speed`: market seconds per real second. In a rehearsal, whose market passes a
    start long before as many real seconds have passed, a prompt asked the usual
    minute ahead keeps its real minute. Raises: TooLate for a deadline that has
    passed, RequestError for a start too far ahead.
    """
    deadline = start_ts + ASKED_AHEAD_S * (speed - 1)  # in market time
    if deadline < now:
        raise TooLate(
            f"start time {format_iso(start_ts)} has passed, the present is "
            f"{format_iso(int(now))}; ask before the start."
        )
    if start_ts > now + MAX_AHEAD_S:
        raise RequestError(
            f"start time {format_iso(start_ts)} is {start_ts - now:.0f} s ahead; ask at most "
            f"{MAX_AHEAD_S} s ahead."
        )
    return (deadline - now) / speed


def refusal_status(error: MinerError) -> int:
    """The HTTP status of a refusal, the same on every transport.

    408 when the time until the start does not suffice (as axons say it), 400 for
    what else the caller can change, 503 for what it can only wait for.
    """
    if isinstance(error, TooLate):
        return 408
    return 400 if isinstance(error, RequestError) else 503


def _outcome_of(error: BaseException) -> Outcome:
    kinds: tuple[tuple[type[BaseException], Outcome], ...] = (
        (TooLate, Outcome.TOO_LATE),
        (Overloaded, Outcome.OVERLOADED),
        (NoPriceError, Outcome.NO_PRICE),
        (RequestError, Outcome.REFUSED),
        (NotAllowed, Outcome.NOT_ALLOWED),
        (ChainUnavailable, Outcome.NOT_ALLOWED),
        (MinerError, Outcome.UNAVAILABLE),
        (asyncio.CancelledError, Outcome.LEFT),
    )
    return next((outcome for kind, outcome in kinds if isinstance(error, kind)), Outcome.FAILED)


# ---------------------------------------------------------------- jobs, speed, cache

_Key: TypeAlias = tuple[ForecastRequest, int | None]  # and its origin, if it has one


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A forecast that is shared, and what was written of it so far."""

    forecast: Forecast
    answers: Mapping[str, Answer]  # by format; at least one
    until: float  # monotonic seconds
    first: threading.Lock

    @property
    def bytes(self) -> int:
        written = sum(len(answer.body) for answer in self.answers.values())
        return self.forecast.paths.nbytes + written


def _uncancellable() -> "Future[Answer]":
    """A caller that hangs up must not take the answer from the others."""
    done: Future[Answer] = Future()
    done.set_running_or_notify_cancel()
    return done


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """One encoding that callers wait for."""

    encoder: Encoder
    done: "Future[Answer]" = field(default_factory=_uncancellable)


@dataclass(slots=True, eq=False)
class _Job:
    """A distinct request under way; its callers wait for its orders. Guarded by the desk."""

    key: _Key
    arrived: int  # running number
    priority: float
    deadline: float | None  # monotonic seconds; of the most patient caller
    kept_until: float  # monotonic seconds
    forecast: Forecast | None = None  # None: to be computed
    answers: dict[str, Answer] = field(default_factory=dict)  # by format
    orders: dict[str, _Order] = field(default_factory=dict)  # by format
    # Taken by the caller who gets the forecast first: the one who began may have hung up.
    first: threading.Lock = field(default_factory=threading.Lock)

    def join(self, priority: float, deadline: float | None) -> None:
        """Let one more caller wait for it."""
        self.priority = max(self.priority, priority)
        if self.deadline is not None:
            self.deadline = None if deadline is None else max(self.deadline, deadline)

    def order(self, encoder: Encoder) -> _Order:
        """The order that makes this encoding."""
        return self.orders.setdefault(encoder.format, _Order(encoder))

    def next_order(self) -> _Order | None:
        """What is still to be made, in order of arrival."""
        return next((order for order in self.orders.values() if not order.done.done()), None)

    def fail(self, error: BaseException) -> None:
        """Let all who still wait for it raise the error."""
        for order in self.orders.values():
            if not order.done.done():
                order.done.set_exception(error)

    @property
    def work(self) -> int:
        request = self.key[0]
        return request.num_paths * request.n_points + _FIXED_PRICES

    @property
    def rank(self) -> tuple[float, int]:
        """The highest is served first: by priority, then by arrival."""
        return (self.priority, -self.arrived)


class _Speed:
    """Seconds per price of the latest answers, by their median."""

    def __init__(self) -> None:
        self._measured: deque[float] = deque(maxlen=_MEASURED)

    def learn(self, work: int, seconds: float) -> None:
        self._measured.append(seconds / work)

    def estimate(self, work: float) -> float:
        per_price = statistics.median(self._measured) if self._measured else _FIRST_GUESS_S
        return work * per_price

    def at_best(self, work: float) -> float:
        """As fast as the fastest of them, or as a machine is taken to be."""
        return work * min((_FIRST_GUESS_S, *self._measured))


def _shared_for(left_s: float) -> float:
    """For how long a forecast is kept for others that is asked for so long before its start."""
    if left_s > SHARED_S:
        return min(SHARED_S, left_s - SHARED_S)
    return min(SHARED_S, left_s + KEPT_AFTER_START_S)


class _Cache:
    """Forecasts by request, the least recently used dropped first; bounded by bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[_Key, _Made] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: _Key, now: float) -> _Made | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until < now:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return kept

    def put(self, key: _Key, made: _Made, now: float) -> None:
        """Keep it in the place of what was kept for the key before."""
        self.expire(now)
        if key in self._kept:
            self._drop(key)
        self._kept[key] = made
        self.bytes += made.bytes
        while self.bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def expire(self, now: float) -> None:
        """Drop what nobody gets any more."""
        for old in [old for old, kept in self._kept.items() if kept.until < now]:
            self._drop(old)

    def _drop(self, key: _Key) -> None:
        self.bytes -= self._kept.pop(key).bytes


# ---------------------------------------------------------------- the desk


class AnswerDesk:
    """Answers requests of several event loops and threads with a few threads of its own."""

    def __init__(
        self,
        answerer: Answerer,
        *,
        observers: Sequence[Observer] = (),
        threads: int = ANSWER_THREADS,
        most_waiting: int = MOST_WAITING,
        cache_bytes: int = CACHE_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answerer = answerer
        self._observers = tuple(observers)
        self._threads = threads
        self._monotonic = monotonic
        self._told = _RequestLog(monotonic)
        self._most_waiting = most_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="answer")
        self._lock = threading.Lock()  # over everything below; never held while computing
        self._waiting: dict[_Key, _Job] = {}
        self._running: dict[_Key, _Job] = {}
        self._cache = _Cache(cache_bytes)
        self._speed = _Speed()
        self._arrivals = 0
        self._closed = False

    async def answer(
        self,
        request: ForecastRequest,
        *,
        encoder: Encoder,
        caller: Caller,
        now: float,
        priority: float = 0.0,
        origin: int | None = None,
        budget_s: float | None = None,
    ) -> Answer:
        """The encoded answer to a request; the same forecast for everyone who asks the same.

        Equal formats give the same bytes.

        `now`: the present, Unix seconds. `priority`: the higher, the sooner (stake).
        `origin`: answer from what was known then. `budget_s`: real seconds until the
        answer must have arrived (`prompt_budget`); None without a deadline.

        Raises: TooLate before any work if the budget cannot be met, and after it if it
        was not; Overloaded if the queue is full of requests of at least this priority;
        what the engine and the encoder raise.
        """
        began = self._monotonic()
        key: _Key = (request, origin)
        told = AnswerRecord(
            at=now,
            caller=caller,
            outcome=Outcome.FAILED,
            ms=0.0,
            request=request,
            origin=origin,
            format=encoder.format,
        )
        try:
            told, answer = await self._answer(told, key, encoder, priority, budget_s)
        except BaseException as error:
            told = replace(
                told, outcome=_outcome_of(error), reason=str(error) or type(error).__name__
            )
            raise
        finally:
            self._report(replace(told, ms=1e3 * (self._monotonic() - began)))
        return answer

    def watch(self, observer: Observer) -> None:
        """Add an observer, one that needs the desk itself to be made."""
        self._observers = (*self._observers, observer)

    def turn_away(
        self,
        caller: Caller,
        reason: str | MinerError,
        *,
        now: float,
        request: ForecastRequest | None = None,
    ) -> None:
        """Let observers know of a request that a transport refused itself, and why.

        A prompt that was read has the outcome that it has at the desk, and so has who may
        not ask; what was not read is `turned_away`.
        """
        outcome = Outcome.TURNED_AWAY
        if isinstance(reason, RequestError | NotAllowed | ChainUnavailable):
            outcome = _outcome_of(reason)
        self._report(
            AnswerRecord(
                at=now,
                caller=caller,
                outcome=outcome,
                ms=0.0,
                request=request,
                reason=str(reason),
            )
        )

    def load(self) -> DeskLoad:
        """How busy the desk is now."""
        with self._lock:
            return DeskLoad(
                waiting=len(self._waiting),
                running=len(self._running),
                cached=len(self._cache),
                cached_bytes=self._cache.bytes,
                seconds_per_day_answer=self._speed.estimate(1000 * 289 + _FIXED_PRICES),
            )

    def expire(self) -> None:
        """Let go of answers that are kept for nobody any more; the next one does as well."""
        with self._lock:
            self._cache.expire(self._monotonic())

    def close(self) -> None:
        """Refuse what waits and what comes; what is being computed is finished."""
        with self._lock:
            self._closed = True
            left, self._waiting = list(self._waiting.values()), {}
        for job in left:
            job.fail(_closing())
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- admission: on the caller's thread, microseconds

    async def _answer(
        self,
        told: AnswerRecord,
        key: _Key,
        encoder: Encoder,
        priority: float,
        budget_s: float | None,
    ) -> tuple[AnswerRecord, Answer]:
        found = self._find_or_admit(key, encoder, priority, budget_s)
        if isinstance(found, _Made):
            answer = found.answers[encoder.format]
            return _answered(told, answer, found), answer
        job, order = found
        began = self._monotonic()
        answer = await asyncio.wrap_future(order.done)
        if budget_s is not None and (late_s := self._monotonic() - began - budget_s) > 0:
            raise TooLate(f"the answer was ready {late_s:.1f} s after the start; ask earlier.")
        return _answered(told, answer, job), answer

    def _find_or_admit(
        self, key: _Key, encoder: Encoder, priority: float, budget_s: float | None
    ) -> _Made | tuple[_Job, _Order]:
        """What holds the answer already; or the job and order that make it."""
        now = self._monotonic()
        with self._lock:
            if self._closed:
                raise _closing()
            made = self._cache.get(key, now)
            if made is not None and encoder.format in made.answers:
                return made
            deadline = None if budget_s is None else now + budget_s - DELIVERY_S
            job = self._running.get(key) or self._waiting.get(key)
            if job is not None:
                job.join(priority, deadline)
                return job, job.order(encoder)
            if made is None:
                until = now + _shared_for(budget_s or 0.0)
                job = _Job(key, self._arrivals, priority, deadline, until)
            else:  # it is kept no longer for being written once more
                job = _Job(
                    key,
                    self._arrivals,
                    priority,
                    deadline,
                    made.until,
                    forecast=made.forecast,
                    answers=dict(made.answers),
                    first=made.first,
                )
            order = job.order(encoder)
            evicted = self._admit(job, now)
        if evicted is not None:
            evicted.fail(_overloaded(self._most_waiting))
        return job, order

    def _admit(self, job: _Job, now: float) -> _Job | None:
        """Let it wait; the waiting job to refuse instead, if one must go.

        Raises: TooLate, Overloaded.
        """
        self._require_time(job, now)
        evicted = self._make_room(job)
        self._arrivals += 1
        self._waiting[job.key] = job
        self._pool.submit(self._work)  # under the lock: a closing desk refuses or takes it whole
        return evicted

    def _require_time(self, job: _Job, now: float) -> None:
        """Raises: TooLate if what is ahead in the queue and the job itself take too long.

        Where a thread is free the answer is tried unless no machine could be in time: there
        is nobody to keep waiting, and what a slow spell has taught may be over.
        """
        if job.deadline is None:
            return
        ahead = [other for other in self._waiting.values() if other.rank > job.rank]
        ahead += self._running.values()
        queue = sum(other.work for other in ahead) / self._threads
        is_free = len(ahead) < self._threads
        speed = self._speed
        needed = speed.at_best(job.work) if is_free else speed.estimate(job.work + queue)
        if now + needed > job.deadline:
            raise _too_late(job.deadline - now + DELIVERY_S, needed + DELIVERY_S)

    def _make_room(self, job: _Job) -> _Job | None:
        """The waiting job to refuse instead, if the queue is full. Raises: Overloaded."""
        if len(self._waiting) < self._most_waiting:
            return None
        lowest = min(self._waiting.values(), key=lambda other: other.rank)
        if lowest.rank > job.rank:
            raise _overloaded(self._most_waiting)
        return self._waiting.pop(lowest.key)

    # -- work: on the desk's threads

    def _work(self) -> None:
        """Compute the waiting job of the highest rank, if one is left."""
        with self._lock:
            if not self._waiting:
                return  # it was refused meanwhile
            job = max(self._waiting.values(), key=lambda other: other.rank)
            self._running[job.key] = self._waiting.pop(job.key)
        began = self._monotonic()
        try:
            forecast = self._forecast(job, began)
        except BaseException as error:  # noqa: BLE001  # the callers raise it
            _log_bug(error)
            with self._lock:
                del self._running[job.key]
            job.fail(error)
            return
        with self._lock:  # a caller may be ordering another encoding
            order = job.next_order()
        while order is not None:
            order = self._write(job, order, forecast, began)

    def _forecast(self, job: _Job, began: float) -> Forecast:
        if job.deadline is not None and began > job.deadline:  # others went before
            raise _too_late(max(job.deadline - began + DELIVERY_S, 0.0), DELIVERY_S)
        if job.forecast is None:
            request, origin = job.key
            job.forecast = self._answerer.answer(request, origin=origin)
        return job.forecast

    def _write(self, job: _Job, order: _Order, forecast: Forecast, began: float) -> _Order | None:
        """Make one encoding; the next one that somebody waits for, None when the job is done."""
        made: Answer | BaseException
        try:
            made = Answer(body=order.encoder.encode(forecast), diagnostics=forecast.diagnostics)
        except BaseException as error:  # noqa: BLE001  # the callers raise it
            made = error
            _log_bug(error)
        with self._lock:
            if isinstance(made, Answer):
                if not job.answers:
                    self._speed.learn(job.work, self._monotonic() - began)
                job.answers[order.encoder.format] = made
                order.done.set_result(made)
            else:
                order.done.set_exception(made)
            following = job.next_order()
            if following is None:
                self._retire(job, forecast)
        return following

    def _retire(self, job: _Job, forecast: Forecast) -> None:
        """Nobody joins it any more; what it made is kept, unless nothing could be written."""
        del self._running[job.key]
        if job.answers:
            made = _Made(forecast, job.answers, job.kept_until, job.first)
            self._cache.put(job.key, made, self._monotonic())

    # -- telling

    def _report(self, told: AnswerRecord) -> None:
        """One log line, and every observer; none of them can stop an answer."""
        self._told.tell(told)
        for observer in self._observers:
            try:
                observer(told)
            except Exception:
                log.exception("observer failed")


def _answered(told: AnswerRecord, answer: Answer, shared: _Job | _Made) -> AnswerRecord:
    """The record of a caller who gets a forecast; it carries it for the first of them."""
    is_first = shared.first.acquire(blocking=False)  # nobody ever gives it back
    return replace(
        told,
        outcome=Outcome.COMPUTED if is_first else Outcome.REPEATED,
        diagnostics=answer.diagnostics,
        size=len(answer.body),
        forecast=shared.forecast if is_first else None,
    )


class _RequestLog:
    """One log line per request; of those that anybody can send at will, one a minute.

    Strangers must not fill the disk, nor take the time that honest callers wait for.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._untold: dict[Outcome, tuple[float, int]] = {}  # when the last was told, others since

    def tell(self, told: AnswerRecord) -> None:
        """Log it, at once or as one of a number."""
        others = self._others(told.outcome) if told.outcome in AT_WILL else 0
        if others is not None:
            _log(told, {"others_since": others} if others else {})

    def _others(self, outcome: Outcome) -> int | None:
        """How many went untold before this one; None if it does as well."""
        now = self._monotonic()
        with self._lock:
            told_at, others = self._untold.get(outcome, (-inf, 0))
            if now - told_at < AT_WILL_S:
                self._untold[outcome] = told_at, others + 1
                return None
            self._untold[outcome] = now, 0
            return others


def _log(told: AnswerRecord, more: Mapping[str, object]) -> None:
    line: dict[str, object] = {
        "outcome": told.outcome.value,
        "transport": told.caller.transport,
        "caller": told.caller.name,
        "ms": round(told.ms),
    }
    if told.request is not None:
        line |= {"asset": told.request.asset, "start_ts": told.request.start_ts}
    if told.diagnostics is None:
        ours = told.outcome in {Outcome.UNAVAILABLE, Outcome.NO_PRICE, Outcome.OVERLOADED}
        level = logging.WARNING if ours else logging.INFO
        log.log(level, "refused", extra={**line, "reason": told.reason, **more})
        return
    line |= {
        "frequency": told.diagnostics.frequency,
        "rung": told.diagnostics.rung,
        "anchor": told.diagnostics.anchor_source,
        "price_age_s": told.diagnostics.price_age_s,
    }
    log.info("answered", extra=line)


def _log_bug(error: BaseException) -> None:
    if not isinstance(error, MinerError):
        log.error("failed", exc_info=error)


def _too_late(left_s: float, needed_s: float) -> TooLate:
    return TooLate(
        f"{left_s:.1f} s are left until the start and the answer needs about {needed_s:.1f} s; "
        "ask earlier."
    )


def _overloaded(limit: int) -> Overloaded:
    return Overloaded(
        f"{limit} requests of at least this priority are waiting already; ask again in a moment."
    )


def _closing() -> Overloaded:
    return Overloaded("the miner is stopping and takes no more requests; ask again in a minute.")
