"""The gate before the axon: what comes through is verified, allowed, small and well-formed.

An ASGI application around another one. Nothing of a request reaches the inner
application as it was sent: the headers are written anew from the verified claim,
the body from the validated prompt. So whatever the inner one makes of strange
input, it never sees any. A refusal is `{"message": "<one sentence>"}`, as axons
say it, and changes nothing here.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from answer_desk import refusal_status
from caller_rules import CallerPolicy, Claim, NonceMemory, check_age, priority_of, read_claim
from chain import Chain
from domain import MAX_HORIZON_S, MAX_PATHS, ForecastRequest
from errors import ChainUnavailable, MinerError, NotAllowed, NotVerified, RequestError
from wire_format import format_iso, parse_iso_minute

ROUTE: Final = "/Simulation"
MAX_BODY_BYTES: Final = 64 * 1024  # a prompt has about one
MAX_HEADERS: Final = 64  # a dendrite sends about 25
MAX_HEADER_BYTES: Final = 16 * 1024  # of about 2
BODY_S: Final = 10.0  # for the whole body to arrive
CALL_KEY: Final = "lgbm_miner.call"  # of the scope, where the inner application finds it

# A caller that is still sending when the connection closes never reads why.
# So this much of a body that is too large is read and dropped before the refusal.
_MAX_DROPPED_BYTES: Final = 16 * 1024 * 1024
_EMPTY_INPUT: Final = b"e30="  # `{}` in base64: how dendrites announce an input object
_GZIP: Final = re.compile(r"(^|,)\s*(gzip|x-gzip|\*)\s*(?!;\s*q=0(\.0*)?\s*(,|$))(;|,|$)")

SignatureCheck: TypeAlias = Callable[[Claim, str], bool]  # the message is the second


@dataclass(frozen=True, slots=True, kw_only=True)
class AxonCall:
    """A verified caller's prompt."""

    request: ForecastRequest
    claim: Claim
    priority: float
    accepts_gzip: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GateKeeper:
    """What the gate judges by."""

    own_hotkey: str
    body_hash: str  # of every prompt: validators hash no field of it
    is_signed: SignatureCheck
    chain: Chain
    policy: CallerPolicy
    turned_away: Callable[[str, str | MinerError], None]  # told of each refusal: who, why


class _Refusal(Exception):
    """A request that HTTP alone suffices to refuse."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _HungUp(Exception):
    """Nobody is left to answer."""


def status_of(error: MinerError) -> int:
    """The HTTP status of a refusal on the axon."""
    if isinstance(error, NotVerified):
        return 401
    return 403 if isinstance(error, NotAllowed) else refusal_status(error)


# ---------------------------------------------------------------- the gate


class AxonGate:
    """Lets `POST /Simulation` through to `app`, with an `AxonCall` in the scope."""

    def __init__(
        self, app: ASGIApp, keeper: GateKeeper, *, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._app = app
        self._keeper = keeper
        self._now_ns = now_ns
        self._answered = NonceMemory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's message exchange, as ASGI defines it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        claim: Claim | None = None
        reason: str | MinerError
        try:
            headers = _read_headers(scope)
            claim = self._verified(headers)
            call = await self._admit(claim, headers, receive)
        except _HungUp:
            return
        except _Refusal as refusal:
            status, reason = refusal.status, str(refusal)
        except MinerError as error:
            status, reason = status_of(error), error
        else:
            await self._app(*_rewritten(scope, receive, call, self._keeper), send)
            return
        self._keeper.turned_away(_who(scope, claim, reason), reason)
        await refusal_response(status, str(reason))(scope, receive, send)

    def _verified(self, headers: Mapping[str, str]) -> Claim:
        """Who asks, beyond doubt. Raises: NotVerified."""
        keeper, claim = self._keeper, read_claim(headers)
        check_age(claim, self._now_ns())
        if not keeper.is_signed(claim, claim.message(keeper.own_hotkey)):
            raise NotVerified("the signature does not fit this request, its sender and this miner.")
        if claim.body_hash != keeper.body_hash:
            raise NotVerified("the signed hash is not that of a Simulation's body.")
        return claim

    async def _admit(self, claim: Claim, headers: Mapping[str, str], receive: Receive) -> AxonCall:
        """The other checks, from cheap to dear; the memory of answered requests comes last."""
        priority, is_stranger = self._permission(claim.hotkey)
        request = read_prompt(await _read_body(receive))
        self._answered.admit(claim, self._now_ns(), is_stranger=is_stranger)
        return AxonCall(
            request=request,
            claim=claim,
            priority=priority,
            accepts_gzip=bool(_GZIP.search(headers.get("accept-encoding", "").lower())),
        )

    def _permission(self, hotkey: str) -> tuple[float, bool]:
        """The caller's priority, and whether it is on no list."""
        snapshot, policy = self._keeper.chain.snapshot(), self._keeper.policy
        is_listed = hotkey in policy.whitelist
        if snapshot is None and not is_listed:
            raise ChainUnavailable(
                "the chain has not been read yet, so nobody's stake is known; ask again later."
            )
        neuron = snapshot.neurons.get(hotkey) if snapshot else None
        return priority_of(hotkey, neuron, policy), neuron is None and not is_listed


def refusal_response(status: int, sentence: str) -> Response:
    """A refusal, as axons say it."""
    return Response(orjson.dumps({"message": sentence}), status, media_type="application/json")


def _who(scope: Scope, claim: Claim | None, reason: str | MinerError) -> str:
    """The hotkey of a caller that was verified and then refused for itself or its prompt.

    Else the address: a replay and a body that does not come may be anybody's.
    """
    if claim is not None and isinstance(reason, MinerError) and not isinstance(reason, NotVerified):
        return claim.hotkey
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


# ---------------------------------------------------------------- HTTP


def _read_headers(scope: Scope) -> Mapping[str, str]:
    """The headers by name in lower case. Raises: _Refusal by route, method and size."""
    if scope["path"] != ROUTE:
        raise _Refusal(404, f"only POST {ROUTE} is served here.")
    if scope["method"] != "POST":
        raise _Refusal(405, f"{ROUTE} is asked with POST only.")
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise _Refusal(
            400,
            f"{len(headers)} headers of {size} bytes were sent; the limits are {MAX_HEADERS} and "
            f"{MAX_HEADER_BYTES}.",
        )
    read = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
    length = read.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES + _MAX_DROPPED_BYTES:
        raise _too_large()
    return read


async def _read_body(receive: Receive) -> bytes:
    """The body. Raises: _Refusal if it is too large or too slow, _HungUp."""
    kept = bytearray()
    total = 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in _chunks(receive):
                total += len(chunk)
                if total <= MAX_BODY_BYTES:
                    kept += chunk
                if total > MAX_BODY_BYTES + _MAX_DROPPED_BYTES:
                    break
    except TimeoutError:
        raise _Refusal(408, f"the body did not arrive within {BODY_S:.0f} s.") from None
    if total > MAX_BODY_BYTES:
        raise _too_large()
    return bytes(kept)


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _HungUp
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _too_large() -> _Refusal:
    return _Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less.")


# ---------------------------------------------------------------- the prompt


class _PromptInput(BaseModel):
    """`simulation_input`, by type and size; its time is read later."""

    model_config = ConfigDict(strict=True, frozen=True)

    asset: Annotated[str, Field(max_length=32)]
    start_time: Annotated[str, Field(max_length=64)]
    time_increment: Annotated[int, Field(ge=1, le=MAX_HORIZON_S)]
    time_length: Annotated[int, Field(ge=1, le=MAX_HORIZON_S)]
    num_simulations: Annotated[int, Field(ge=1, le=MAX_PATHS)]


class _PromptBody(BaseModel):
    """A Simulation as JSON; what else a dendrite says in it is not signed and not read."""

    model_config = ConfigDict(strict=True, frozen=True)

    simulation_input: _PromptInput


def read_prompt(raw: bytes) -> ForecastRequest:
    """The prompt in a body. Raises: RequestError that names the first fault."""
    try:
        asked = _PromptBody.model_validate_json(raw).simulation_input
    except ValidationError as error:
        raise RequestError(_complaint(error)) from None
    return ForecastRequest(
        asset=asked.asset,
        start_ts=parse_iso_minute(asked.start_time),
        increment_s=asked.time_increment,
        length_s=asked.time_length,
        num_paths=asked.num_simulations,
    )


def _complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    complaint = first["msg"][:1].lower() + first["msg"][1:].rstrip(".")
    if not name:
        return f"the body is not a JSON object with a simulation_input: {complaint[:200]}."
    return f"field {name!r} of the body: {complaint[:200]}."


# ---------------------------------------------------------------- what comes through


def _rewritten(
    scope: Scope, receive: Receive, call: AxonCall, keeper: GateKeeper
) -> tuple[Scope, Receive]:
    """The same request, said in our own words."""
    claim = call.claim
    body = orjson.dumps({"simulation_input": prompt_fields(call.request)})
    said = {
        "host": "axon",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "name": ROUTE.removeprefix("/"),
        "timeout": str(claim.wait_s),
        "computed_body_hash": claim.body_hash,
        "bt_header_dendrite_hotkey": claim.hotkey,
        "bt_header_dendrite_nonce": str(claim.nonce_ns),
        "bt_header_dendrite_uuid": claim.uuid,
        "bt_header_dendrite_signature": claim.signature,
        "bt_header_axon_hotkey": keeper.own_hotkey,
    }
    headers = [(name.encode(), value.encode()) for name, value in said.items()]
    headers.append((b"bt_header_input_obj_simulation_input", _EMPTY_INPUT))
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return {**scope, "headers": headers, "query_string": b"", CALL_KEY: call}, replay


def prompt_fields(request: ForecastRequest) -> dict[str, object]:
    """`simulation_input` of a request, as the protocol names it."""
    return {
        "asset": request.asset,
        "start_time": format_iso(request.start_ts),
        "time_increment": request.increment_s,
        "time_length": request.length_s,
        "num_simulations": request.num_paths,
    }
