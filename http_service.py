"""The HTTP side: prompts, health, metrics and the status page.

    POST /predict    the shadow-mining contract: a forecast as JSON
    GET  /healthz    200 when answers can be given, else 503, with reasons
    GET  /metrics    for Prometheus
    GET  /           the page that an operator keeps open

Owns the request body, the clock rules of a request, status codes and the server.
Forecasts come from the `AnswerDesk`, facts from whoever wires the miner. The event
loop only reads and writes: pages are rendered on one thread, metrics on another.

Every error is JSON, `{"error": "<one sentence>"}`: 4xx for what the caller can
change, 408 when the time until the start does not suffice, 503 for what the
caller can only wait for, 500 for a bug.
"""

import asyncio
import errno
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, cast

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from answer_desk import AnswerDesk, Caller, prompt_budget, refusal_status
from domain import MAX_HORIZON_S, MAX_PATHS, ForecastRequest
from errors import ConfigError, MinerError, RequestError
from metrics import CONTENT_TYPE, Metrics
from miner_facts import FactSource
from slow_callers import PatientConnection
from status_page import HEADERS, StatusPage
from wire_format import SHADOW_JSON, format_iso, parse_iso_minute

MAX_BODY_BYTES: Final = 64 * 1024
MAX_HEADER_BYTES: Final = 16 * 1024
BODY_S: Final = 10.0  # for the whole body to arrive
GRACE_S: Final = 3  # for answers under way when the server is told to stop

# A caller that is still sending when the connection closes never reads why.
# So this much of a body that is too large is read and dropped before the refusal.
_MAX_DROPPED_BYTES: Final = 16 * 1024 * 1024

log = logging.getLogger(__name__)


def build_app(
    desk: AnswerDesk,
    *,
    now: Callable[[], float],
    facts: FactSource,
    metrics: Metrics,
    page: StatusPage,
    speed: float = 1.0,
    mark: str | None = None,
) -> Starlette:
    """The web application. `now` is the miner's clock, Unix seconds; `speed` its market's.

    `mark`: which miner of this machine it is, see `state_store.folder_mark`.
    The desk is the caller's: it is not closed with the server.
    """
    service = _Service(desk, now, facts, metrics, page, speed, mark)
    app = Starlette(
        routes=[
            Route("/predict", service.predict, methods=["POST"]),
            Route("/healthz", service.healthz, methods=["GET"]),
            Route("/metrics", service.metrics, methods=["GET"]),
            Route("/", service.status_page, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _unknown_route},
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False
    return app


# ---------------------------------------------------------------- request body


class PredictBody(BaseModel):
    """The body of `POST /predict`, by type and size; its times are read later."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    asset: Annotated[str, Field(max_length=32)]
    prompt_start_time: str | None = None
    origin: str | None = None
    horizon_seconds: Annotated[int, Field(ge=1, le=MAX_HORIZON_S)]
    interval_seconds: Annotated[int, Field(ge=1, le=MAX_HORIZON_S)]
    num_paths: Annotated[int, Field(ge=1, le=MAX_PATHS)]
    generated_at: str | None = None  # the caller's note to itself


def read_body(raw: bytes) -> PredictBody:
    """Parse a request body. Raises: RequestError that names the first fault."""
    try:
        return PredictBody.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        raise RequestError(f"field {name!r} is missing from the body.")
    if first["type"] == "extra_forbidden":
        known = ", ".join(PredictBody.model_fields)
        raise RequestError(f"field {_clipped(name)} of the body is unknown; known are {known}.")
    complaint = first["msg"][:1].lower() + first["msg"][1:]
    if not name:
        raise RequestError(f"the body is not a JSON object with an asset and so on: {complaint}.")
    raise RequestError(f"field {name!r}: got {_clipped(first['input'])}; {complaint}.")


def _clipped(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def read_request(
    body: PredictBody, now: float, speed: float = 1.0
) -> tuple[ForecastRequest, int | None, float | None]:
    """The forecast a body asks for at `now`, its origin if any, its budget in seconds if any.

    With an origin the paths start there, at what was known then, and there is
    no deadline. Otherwise they start at `prompt_start_time`, and the answer must
    leave before; or at the next whole minute, whenever it leaves.

    Raises: RequestError, or TooLate for a start that has passed.
    """
    if body.horizon_seconds % body.interval_seconds:
        raise RequestError(
            f"interval_seconds {body.interval_seconds} does not divide horizon_seconds "
            f"{body.horizon_seconds}; use e.g. 300 and 86400."
        )
    start = None if body.prompt_start_time is None else parse_iso_minute(body.prompt_start_time)
    origin = None if body.origin is None else parse_iso_minute(body.origin)
    budget_s = None
    if origin is not None:
        start = _past_origin(origin, now)
    elif start is not None:
        budget_s = prompt_budget(start, now, speed)
    request = ForecastRequest(
        asset=body.asset,
        start_ts=int(-(-now // 60) * 60) if start is None else start,
        increment_s=body.interval_seconds,
        length_s=body.horizon_seconds,
        num_paths=body.num_paths,
    )
    return request, origin, budget_s


def _past_origin(origin: int, now: float) -> int:
    if origin > now:
        raise RequestError(
            f"origin {format_iso(origin)} lies in the future; the present is "
            f"{format_iso(int(now))}, leave origin out to forecast from it."
        )
    return origin


# ---------------------------------------------------------------- endpoints


class _Service:
    """The endpoints, and the threads that render."""

    def __init__(
        self,
        desk: AnswerDesk,
        now: Callable[[], float],
        facts: FactSource,
        metrics: Metrics,
        page: StatusPage,
        speed: float,
        mark: str | None,
    ) -> None:
        self._desk = desk
        self._now = now
        self._speed = speed
        self._mark = mark
        self._facts = facts
        self._metrics = metrics
        self._page = page
        # Apart: a page takes seconds when all pictures are new, a scrape never waits for it.
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._painters = ThreadPoolExecutor(1, thread_name_prefix="painter")

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        for threads in (self._readers, self._painters):
            threads.shutdown(wait=False, cancel_futures=True)

    async def healthz(self, _request: Request) -> Response:
        facts = await asyncio.get_running_loop().run_in_executor(self._readers, self._facts.facts)
        ready = not facts.obstacles
        status = "not ready" if not ready else "degraded" if facts.warnings else "ok"
        told = {
            "status": status,
            "live": True,
            "ready": ready,
            "reasons": list(facts.obstacles),
            "warnings": list(facts.warnings),
            "assets": list(facts.assets),
            "miner": self._mark,
        }
        return JSONResponse(told, status_code=200 if ready else 503)

    async def metrics(self, _request: Request) -> Response:
        text = await asyncio.get_running_loop().run_in_executor(self._readers, self._metrics.page)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def status_page(self, _request: Request) -> Response:
        html = await asyncio.get_running_loop().run_in_executor(self._painters, self._page.render)
        return Response(html, media_type="text/html", headers=HEADERS)

    async def predict(self, request: Request) -> Response:
        caller = Caller(name=request.client.host if request.client else "", transport="http")
        try:
            raw = await _read_limited(request)
        except (ClientDisconnect, TimeoutError) as fault:
            slow = isinstance(fault, TimeoutError)
            sentence = f"the body did not arrive within {BODY_S:.0f} s."
            gone = "the body ended early."  # nobody reads it
            return self._turn_away(caller, *((408, sentence) if slow else (400, gone)))
        if len(raw) > MAX_BODY_BYTES:
            sentence = f"the body is larger than {MAX_BODY_BYTES} bytes; send less."
            return self._turn_away(caller, 413, sentence)
        now = self._now()
        try:
            wanted, origin, budget_s = read_request(read_body(raw), now, self._speed)
        except RequestError as error:
            return self._turn_away(caller, refusal_status(error), error)
        try:
            answer = await self._desk.answer(
                wanted,
                encoder=SHADOW_JSON,
                caller=caller,
                now=now,
                origin=origin,
                budget_s=budget_s,
            )
        except MinerError as error:
            return _error(refusal_status(error), str(error))
        except Exception:  # noqa: BLE001  # the desk has logged it
            return _error(500, "the answer failed by a fault of the miner; its log has more.")
        return Response(answer.body, media_type="application/json")

    def _turn_away(self, caller: Caller, status: int, reason: str | MinerError) -> Response:
        self._desk.turn_away(caller, reason, now=self._now())
        return _error(status, str(reason))


async def _read_limited(request: Request) -> bytes:
    """The body, or its first part if that is already too large.

    Raises: TimeoutError if it is too slow, ClientDisconnect.
    """
    kept = bytearray()
    total = 0
    async with asyncio.timeout(BODY_S):
        async for chunk in request.stream():
            total += len(chunk)
            if len(kept) <= MAX_BODY_BYTES:
                kept += chunk
            if total > _MAX_DROPPED_BYTES:
                break
    return bytes(kept)


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status, headers=headers)


async def _unknown_route(request: Request, error: Exception) -> Response:
    refusal = cast("HTTPException", error)  # 404 or 405: it is registered for no other
    return _error(
        refusal.status_code,
        f"{request.method} {request.url.path[:80]} is not served here; use POST /predict, "
        "GET /healthz, GET /metrics or GET /.",
        refusal.headers,
    )


# ---------------------------------------------------------------- server


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except UnicodeError:
        raise ConfigError(
            f"the pages cannot listen on {host!r}, which is no name of a host; choose another with "
            "--host."
        ) from None
    except OSError as error:
        where = f"the pages cannot listen on {host} port {port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{where}, another program does; choose another port with --port."
            ) from None
        raise ConfigError(
            f"{where} ({error.strerror or error}); choose another with --host and --port."
        ) from None
    # Inherited by every connection; asyncio does it only for sockets it made
    # itself, and without it each answer waits 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_news(record: logging.LogRecord) -> bool:
    """What an end cuts off is no bug, though uvicorn shows its traceback.

    That of the application's own end comes as a text.
    """
    cause = record.exc_info[1] if record.exc_info else None
    told = record.getMessage().rstrip()
    return not isinstance(cause, asyncio.CancelledError) and not told.endswith("CancelledError")


def server_for(app: Starlette) -> uvicorn.Server:
    """A server to be run as `run(sockets=[bind(…)])`.

    On the main thread it stops by SIGINT or SIGTERM, anywhere by
    `should_exit = True`; answers under way get a few seconds, or none by a second SIGINT.
    """
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=PatientConnection,
            ws="none",
            proxy_headers=False,  # who asks is who connects
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            log_config=None,  # the scripts decide where log lines go
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
