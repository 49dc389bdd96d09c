"""The gate by itself: what it lets through, in whose words, and how it reads a body."""

import asyncio
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

import axon_gate
from axon_gate import (
    CALL_KEY,
    MAX_BODY_BYTES,
    AxonGate,
    GateKeeper,
    prompt_fields,
    read_prompt,
    status_of,
)
from caller_rules import NS, CallerPolicy
from chain import StaticChain
from domain import MAX_HORIZON_S, MAX_PATHS, ForecastRequest
from errors import (
    ChainUnavailable,
    MinerError,
    NoPriceError,
    NotAllowed,
    NotVerified,
    Overloaded,
    RequestError,
    TooLate,
)

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
ADDRESS = "192.0.2.1"
OURS = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
NOW_NS = 1_766_102_700 * NS
BODY_HASH = "a" * 64
INPUT = {
    "asset": "BTC",
    "start_time": "2025-12-19T00:10:00+00:00",
    "time_increment": 60,
    "time_length": 3600,
    "num_simulations": 3,
}
REQUEST = ForecastRequest(
    asset="BTC", start_ts=1_766_103_000, increment_s=60, length_s=3600, num_paths=3
)
SIGNED = {
    "content-type": "text/plain",
    "timeout": "30",
    "computed_body_hash": BODY_HASH,
    "bt_header_dendrite_hotkey": ALICE,
    "bt_header_dendrite_nonce": str(NOW_NS),
    "bt_header_dendrite_uuid": "u",
    "bt_header_dendrite_signature": f"0x{'ab' * 64}",
    "x-smuggled": "1",
}


class Inner:
    """An application that notes what it is asked."""

    def __init__(self):
        self.asked = []

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.asked.append((scope, message))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


NOBODY = StaticChain().snapshot()


class Known:
    """A chain as it was read; None: never."""

    def __init__(self, snapshot):
        self._snapshot = snapshot

    def snapshot(self):
        return self._snapshot


class Gate:
    """A gate on no network: messages in, messages out."""

    def __init__(self, *, is_signed=True, whitelist=(ALICE,), chain=NOBODY):
        self.inner = Inner()
        self.turned_away: list[tuple[str, str | MinerError]] = []
        self.messages: list[Message] = []
        keeper = GateKeeper(
            own_hotkey=OURS,
            body_hash=BODY_HASH,
            is_signed=lambda claim, message: is_signed,
            chain=Known(chain),
            policy=CallerPolicy(whitelist=frozenset(whitelist)),
            turned_away=lambda who, why: self.turned_away.append((who, why)),
        )
        self.gate = AxonGate(self.inner, keeper, now_ns=lambda: NOW_NS)

    def post(self, *chunks, headers=SIGNED, **scope):
        """The status of a request whose body comes in these chunks; None if unanswered."""
        parts = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        parts[-1:] = [{**parts[-1], "more_body": False}] if parts else []
        return self.exchange(parts, headers, **scope)

    def exchange(self, parts, headers=SIGNED, **scope):
        self.messages = []

        async def receive():
            return parts.pop(0) if parts else {"type": "http.disconnect"}

        async def send(message):
            self.messages.append(message)

        asked = {
            "type": "http",
            "method": "POST",
            "path": "/Simulation",
            "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
            "client": (ADDRESS, 5),
            "query_string": b"a=b",
        } | scope
        asyncio.run(self.gate(asked, receive, send))
        return self.messages[0]["status"] if self.messages else None


def body(**changes):
    return json.dumps({"simulation_input": INPUT | changes}).encode()


# ---------------------------------------------------------------- what comes through


def test_the_inner_application_sees_our_words_only():
    gate = Gate()
    assert gate.post(body(), headers=SIGNED) == 200
    ((scope, message),) = gate.inner.asked
    headers = dict(scope["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"timeout"] == b"30.0"
    assert b"x-smuggled" not in headers
    assert int(headers[b"content-length"]) == len(message["body"])
    assert orjson.loads(message["body"]) == {"simulation_input": INPUT}
    assert scope["query_string"] == b""
    call = scope[CALL_KEY]
    assert (call.request, call.claim.hotkey, call.priority) == (REQUEST, ALICE, 65_000.0)
    assert gate.turned_away == []


def test_a_body_may_come_in_pieces():
    gate, raw = Gate(), body()
    assert gate.post(*(raw[index : index + 1] for index in range(len(raw)))) == 200


def test_a_refused_request_does_not_reach_the_inner_application_and_is_told_of():
    gate = Gate(is_signed=False)
    assert gate.post(body()) == 401
    assert gate.inner.asked == []
    ((who, why),) = gate.turned_away
    assert who == ADDRESS
    assert orjson.loads(gate.messages[1]["body"]) == {"message": str(why)}


@pytest.mark.parametrize(
    ("gate", "parts", "who", "error"),
    [
        ({"whitelist": ()}, (), ALICE, NotAllowed),
        ({"whitelist": (), "chain": None}, (), ALICE, ChainUnavailable),
        ({}, (b"null",), ALICE, RequestError),  # verified and allowed: a prompt was lost
        ({"is_signed": False}, (), ADDRESS, NotVerified),
        ({}, (b" " * (MAX_BODY_BYTES + 1),), ADDRESS, str),
    ],
)
def test_a_verified_caller_is_named_where_it_is_refused_for_itself_or_its_prompt(
    gate, parts, who, error
):
    gate = Gate(**gate)
    assert gate.post(*(parts or (body(),))) >= 400
    ((named, why),) = gate.turned_away
    assert named == who
    assert isinstance(why, error)


def test_a_replay_may_be_anybodys_and_is_named_by_its_address():
    gate = Gate()
    gate.post(body())
    assert gate.post(body()) == 401
    assert [who for who, _ in gate.turned_away] == [ADDRESS]


def test_what_is_refused_leaves_no_trace():
    gate = Gate()
    for refused in (b"null", body(num_simulations=0), body() + b" " * MAX_BODY_BYTES):
        assert gate.post(refused) in {400, 413}
    assert len(gate.gate._answered) == 0
    assert gate.post(body()) == 200
    assert len(gate.gate._answered) == 1
    assert gate.post(body()) == 401


def test_a_caller_that_hangs_up_gets_no_answer():
    gate = Gate()
    begun = {"type": "http.request", "body": b"{", "more_body": True}
    assert gate.exchange([begun]) is None
    assert gate.turned_away == []


def test_an_endless_body_is_neither_kept_nor_read_to_its_end(monkeypatch):
    monkeypatch.setattr(axon_gate, "_MAX_DROPPED_BYTES", 1_000_000)
    parts = [{"type": "http.request", "body": b" " * 50_000, "more_body": True}] * 100
    assert Gate().exchange(parts) == 413
    assert len(parts) > 70


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_what_is_not_http_is_left_to_the_inner_application(kind):
    gate = Gate()
    gate.post(body(), type=kind)
    assert [scope["type"] for scope, _ in gate.inner.asked] == [kind]


# ---------------------------------------------------------------- prompts


def test_a_prompt_is_read_and_written():
    assert read_prompt(body()) == REQUEST
    assert prompt_fields(REQUEST) == INPUT


@given(
    minutes=st.integers(0, 10**7),
    increment=st.integers(1, 400),
    steps=st.integers(1, 1500),
    paths=st.integers(1, MAX_PATHS),
)
def test_every_prompt_within_the_limits_is_read_as_it_was_written(minutes, increment, steps, paths):
    if increment * steps > MAX_HORIZON_S:
        return
    request = ForecastRequest(
        asset="BTC",
        start_ts=60 * minutes,
        increment_s=increment,
        length_s=increment * steps,
        num_paths=paths,
    )
    raw = orjson.dumps({"simulation_input": prompt_fields(request), "axon": {"ip": 5}})
    assert read_prompt(raw) == request


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    raw=st.binary(max_size=200)
    | anything.map(lambda value: json.dumps(value).encode())
    | anything.map(lambda value: json.dumps({"simulation_input": value}).encode())
    | st.dictionaries(st.sampled_from(sorted(INPUT)), anything).map(lambda some: body(**some))
)
def test_no_body_is_more_than_a_bad_request(raw):
    try:
        request = read_prompt(raw)
    except RequestError as error:
        sentence = str(error)
    else:
        assert 1 <= request.num_paths <= MAX_PATHS
        return
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 400


# ---------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotVerified, 401),
        (NotAllowed, 403),
        (RequestError, 400),
        (TooLate, 408),
        (Overloaded, 503),
        (ChainUnavailable, 503),
        (NoPriceError, 503),
    ],
)
def test_every_refusal_has_its_status(error, status):
    assert status_of(error("why.")) == status


@pytest.mark.parametrize(
    ("accepts", "does"),
    [
        ("gzip", True),
        ("GZIP", True),
        ("deflate, gzip", True),
        ("br;q=1.0, gzip;q=0.8, *;q=0.1", True),
        ("gzip; q=0", False),
        ("gzip;q=0.0, *;q=0", False),
        ("", False),
        ("identity", False),
        ("notgzip", False),
    ],
)
def test_who_can_unpack_says_so(accepts, does):
    gate = Gate()
    assert gate.post(body(), headers={**SIGNED, "accept-encoding": accepts}) == 200
    assert gate.inner.asked[0][0][CALL_KEY].accepts_gzip is does
