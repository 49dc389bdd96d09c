"""The HTTP side: `POST /predict` and `GET /healthz`, for anything that answers.

Owns the request body, the clock rules of a request, status codes and the
server. Forecasts come from an `Answerer`; encoding is `wire_format`'s. The
event loop only reads and writes: answers are computed on a few threads.

Every error is JSON, `{"error": "<one sentence>"}`: 4xx for what the caller can
change, 503 for what the caller can only wait for, 500 for a bug.
"""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Protocol, cast

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from domain import MAX_HORIZON_S, MAX_PATHS, Forecast, ForecastRequest
from errors import ConfigError, MinerError, RequestError, TooLate
from wire_format import encode_shadow_answer, format_iso, parse_iso_minute

MAX_BODY_BYTES: Final = 64 * 1024
MAX_AHEAD_S: Final = 3600  # how far in the future a prompt may start
ANSWER_THREADS: Final = 4  # NumPy releases the interpreter lock while it draws
GRACE_S: Final = 3  # for answers under way when the server is told to stop

# A caller that is still sending when the connection closes never reads why.
# So this much of a body that is too large is read and dropped before the refusal.
_MAX_DROPPED_BYTES: Final = 16 * 1024 * 1024

log = logging.getLogger(__name__)


class Answerer(Protocol):
    """What the service needs of a forecast engine; called from several threads."""

    def now(self) -> int:
        """The present moment, Unix seconds."""

    def assets(self) -> tuple[str, ...]:
        """The assets that can be answered."""

    def answer(self, request: ForecastRequest, *, origin: int | None = None) -> Forecast:
        """Forecast; with `origin`, from what was known then. Raises: MinerError."""


def build_app(answerer: Answerer) -> Starlette:
    """The web application around an engine."""
    service = _Service(answerer)
    app = Starlette(
        routes=[
            Route("/predict", service.predict, methods=["POST"]),
            Route("/healthz", service.healthz, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _unknown_route},
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False
    return app


# ---------------------------------------------------------------- request body


class PredictBody(BaseModel):
    """The body of `POST /predict`, by type and size; its times are read later."""

    model_config = ConfigDict(strict=True, frozen=True)

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
    complaint = first["msg"][:1].lower() + first["msg"][1:]
    if not name:
        raise RequestError(f"the body is not a JSON object with an asset and so on: {complaint}.")
    raise RequestError(f"field {name!r}: got {_clipped(first['input'])}; {complaint}.")


def _clipped(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def read_request(body: PredictBody, now: int) -> tuple[ForecastRequest, int | None]:
    """The forecast a body asks for at `now`, and its origin if it has one.

    With an origin the paths start there, at what was known then, and there is
    no deadline. Otherwise they start at `prompt_start_time`, or at the next
    whole minute, and the answer must leave before.

    Raises: RequestError, or TooLate for a start that has passed.
    """
    start = None if body.prompt_start_time is None else parse_iso_minute(body.prompt_start_time)
    origin = None if body.origin is None else parse_iso_minute(body.origin)
    if origin is not None:
        start = _past_origin(origin, now)
    elif start is not None:
        _refuse_untimely(start, now)
    request = ForecastRequest(
        asset=body.asset,
        start_ts=-(-now // 60) * 60 if start is None else start,
        increment_s=body.interval_seconds,
        length_s=body.horizon_seconds,
        num_paths=body.num_paths,
    )
    return request, origin


def _past_origin(origin: int, now: int) -> int:
    if origin > now:
        raise RequestError(
            f"origin {format_iso(origin)} lies in the future; the present is {format_iso(now)}, "
            "leave origin out to forecast from it."
        )
    return origin


def _refuse_untimely(start: int, now: int) -> None:
    if start < now:
        raise TooLate(
            f"start time {format_iso(start)} has passed, the present is {format_iso(now)}; "
            "give it as origin to replay it."
        )
    if start > now + MAX_AHEAD_S:
        raise RequestError(
            f"start time {format_iso(start)} is {start - now} s ahead; ask at most "
            f"{MAX_AHEAD_S} s ahead."
        )


# ---------------------------------------------------------------- endpoints


class _Service:
    """The endpoints, and the threads that compute."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._threads = ThreadPoolExecutor(ANSWER_THREADS, thread_name_prefix="answer")

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def healthz(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "assets": list(self._answerer.assets())})

    async def predict(self, request: Request) -> Response:
        try:
            raw = await _read_limited(request)
        except ClientDisconnect:
            return _error(400, "the body ended early.")  # nobody is left to read it
        if len(raw) > MAX_BODY_BYTES:
            return _error(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less.")
        try:
            answer = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._answer, raw
            )
        except RequestError as error:
            return _error(400, str(error))
        except MinerError as error:
            return _error(503, str(error))
        except Exception:
            log.exception("failed")
            return _error(500, "the answer failed by a fault of the miner; its log has more.")
        return Response(answer, media_type="application/json")

    def _answer(self, raw: bytes) -> bytes:
        began = time.perf_counter()
        request, origin = read_request(read_body(raw), self._answerer.now())
        forecast = self._answerer.answer(request, origin=origin)
        encoded = encode_shadow_answer(forecast)
        diagnostics = forecast.diagnostics
        log.info(
            "answered",
            extra={
                "asset": request.asset,
                "frequency": diagnostics.frequency,
                "rung": diagnostics.rung,
                "price_age_s": diagnostics.price_age_s,
                "ms": round(1e3 * (time.perf_counter() - began)),
            },
        )
        return encoded


async def _read_limited(request: Request) -> bytes:
    """The body, or its first part if that is already too large."""
    kept = bytearray()
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if len(kept) <= MAX_BODY_BYTES:
            kept += chunk
        if total > _MAX_DROPPED_BYTES:
            break
    return bytes(kept)


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    log.log(
        logging.INFO if status < 500 else logging.WARNING,
        "refused",
        extra={"status": status, "reason": sentence},
    )
    return JSONResponse({"error": sentence}, status_code=status, headers=headers)


async def _unknown_route(request: Request, error: Exception) -> Response:
    refusal = cast("HTTPException", error)  # 404 or 405: it is registered for no other
    return _error(
        refusal.status_code,
        f"{request.method} {request.url.path[:80]} is not served here; use POST /predict or "
        "GET /healthz.",
        refusal.headers,
    )


# ---------------------------------------------------------------- server


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with "
            "--host and --port."
        ) from None
    # Inherited by every connection; asyncio does it only for sockets it made
    # itself, and without it each answer waits 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def server_for(app: Starlette) -> uvicorn.Server:
    """A server to be run as `run(sockets=[bind(…)])`.

    On the main thread it stops by SIGINT or SIGTERM, anywhere by
    `should_exit = True`; answers under way get a few seconds.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,  # the scripts decide where log lines go
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
