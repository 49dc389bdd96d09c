"""The axon as validators see it: bittensor's own dendrite, real HTTP, real signatures."""

import asyncio
import gzip
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import axon_adapter
import axon_gate
import miner
import slow_callers
from answer_desk import AnswerDesk, AnswerRecord, Outcome
from axon_adapter import (
    AxonServer,
    BittensorReader,
    _file_name,
    bt,
    load_wallet,
    serving,
    snapshot_of,
)
from caller_rules import CallerPolicy, Neuron
from chain import ChainSnapshot, Endpoint, StaticChain
from data_fetcher import SimulatedSource
from domain import ForecastRequest
from errors import ChainUnavailable, ConfigError, NoPriceError, RequestError
from feed_plans import FeedHost
from forecast_engine import ForecastEngine
from http_service import bind, server_for
from miner_facts import AxonFacts
from operator_flags import (
    AxonSettings,
    ChainKind,
    ChainSettings,
    OperatorSettings,
    Transport,
)
from settings import Settings
from state_store import StateStore
from tests.waiting import wait_for
from wire_format import format_iso, parse_iso_minute, validate_answer

ExtrinsicResponse = bt.core.types.ExtrinsicResponse
ROOT = Path(__file__).resolve().parent.parent
HERE = "127.0.0.1"


# ---------------------------------------------------------------- as validators define it


class PromptInput(BaseModel):
    asset: str = Field(default="BTC")
    start_time: str = Field(default="2025-12-01T00:00:00")
    time_increment: int = Field(default=300)
    time_length: int = Field(default=86_400)
    num_simulations: int = Field(default=1)


class Simulation(bt.Synapse):  # type: ignore[misc]  # bittensor comes without types
    simulation_input: PromptInput
    simulation_output: tuple[list[float | int] | int, ...] | None = None

    def deserialize(self):
        return self.simulation_output


# ---------------------------------------------------------------- who asks whom


def make_wallet(folder, name):
    wallet = bt.Wallet(name=name, hotkey="hot", path=str(folder))
    wallet.create_new_coldkey(use_password=False, overwrite=True, suppress=True)
    wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
    return wallet


@pytest.fixture(scope="module")
def wallets(tmp_path_factory):
    return tmp_path_factory.mktemp("wallets")


@pytest.fixture(scope="module")
def here(wallets):
    """Where the axon of the tests listens, and as whom."""
    make_wallet(wallets, "miner")
    return AxonSettings(
        wallet_name="miner", wallet_hotkey="hot", wallet_path=wallets, ip=HERE, port=0,
        external_ip=HERE,
    )  # fmt: skip


CALLERS = {
    "validator": bt.Keypair.create_from_uri("//Alice"),
    "second": bt.Keypair.create_from_uri("//Bob"),
    "no permit": bt.Keypair.create_from_uri("//Charlie"),
    "poor": bt.Keypair.create_from_uri("//Dave"),
    "just not enough": bt.Keypair.create_from_uri("//Eve"),
    "stranger": bt.Keypair.create_from_uri("//Ferdie"),
}
VALIDATOR = CALLERS["validator"]


class FixedChain:
    def __init__(self, snapshot):
        self._snapshot = snapshot

    def snapshot(self):
        return self._snapshot


def registered(uid, stake, *, permit=True):
    return Neuron(uid=uid, stake=stake, validator_permit=permit)


SUBNET = ChainSnapshot(
    taken_at=1.0,
    block=1,
    neurons=MappingProxyType(
        {
            CALLERS["validator"].ss58_address: registered(0, 900_000.0),
            CALLERS["second"].ss58_address: registered(1, 70_000.0),
            CALLERS["no permit"].ss58_address: registered(2, 80_000.0, permit=False),
            CALLERS["poor"].ss58_address: registered(3, 12.0),
            CALLERS["just not enough"].ss58_address: registered(4, 65_000.0),
        }
    ),
    published=None,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A real engine on a simulated market; without models it answers from the prior."""
    folder = tmp_path_factory.mktemp("engine")
    source = SimulatedSource(days=3, assets=("BTC",))
    return ForecastEngine.open(
        source, Settings(source="simulated", state_dir=folder, model_dir=folder)
    )


class Desk(AnswerDesk):
    """The desk, and what it told its observers."""

    def __init__(self, engine):
        self.told: list[AnswerRecord] = []
        super().__init__(engine, observers=[self._keep])

    def _keep(self, record: AnswerRecord) -> None:
        self.told.append(replace(record, forecast=None))  # or a flood of them would fill memory


@contextmanager
def listening(here, engine, *, chain=None, **policy):
    desk = Desk(engine)
    server = AxonServer(here)
    try:
        yield (
            server.start(
                desk,
                chain=chain or FixedChain(SUBNET),
                policy=CallerPolicy(**policy),
                now=engine.now,
            ),
            desk,
        )
    finally:
        server.stop()
        desk.close()


@pytest.fixture(scope="module")
def server(here, engine):
    with listening(here, engine) as (opened, _):
        yield opened


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=f"http://{HERE}:{server.port}", timeout=20) as opened:
        yield opened


# ---------------------------------------------------------------- asking


def prompt(engine, minutes=1, **changes):
    values = {
        "asset": "BTC",
        "start_time": format_iso(-(-engine.now() // 60) * 60 + 60 * minutes),
        "time_increment": 60,
        "time_length": 3600,
        "num_simulations": 3,
    }
    return values | changes


def low_frequency(engine, minutes=1):
    return prompt(engine, minutes, time_increment=300, time_length=86_400, num_simulations=1000)


def request_of(asked):
    return ForecastRequest(
        asset=asked["asset"],
        start_ts=parse_iso_minute(asked["start_time"]),
        increment_s=asked["time_increment"],
        length_s=asked["time_length"],
        num_paths=asked["num_simulations"],
    )


BODY_HASH = "a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a"  # sha3-256 of ""


def signed(
    server, keypair=VALIDATOR, *, age_s=0.0, timeout="20.0", uuid="a-uuid", to=None, body_hash=None
):
    """The headers of a dendrite, signed by its hotkey."""
    nonce = time.time_ns() - int(age_s * 1e9)
    hashed = body_hash or BODY_HASH
    hotkey = keypair.ss58_address
    message = f"{nonce}.{hotkey}.{to or server.hotkey}.{uuid}.{hashed}"
    return {
        "name": "Simulation",
        "timeout": timeout,
        "computed_body_hash": hashed,
        "bt_header_axon_hotkey": server.hotkey,
        "bt_header_dendrite_hotkey": hotkey,
        "bt_header_dendrite_nonce": str(nonce),
        "bt_header_dendrite_uuid": uuid,
        "bt_header_dendrite_version": "10000001",
        "bt_header_dendrite_signature": f"0x{keypair.sign(message).hex()}",
        "bt_header_input_obj_simulation_input": "e30=",
    }


def post(client, headers, asked):
    return client.post("/Simulation", headers=headers, json={"simulation_input": asked})


def assert_refused(response, status, words=""):
    assert response.status_code == status, response.text
    answer = response.json()
    assert list(answer) == ["message"]
    sentence = answer["message"]
    assert words in sentence, sentence
    assert sentence.endswith(".")
    assert not re.search(r"\n|\. +[A-Z]", sentence), sentence
    assert len(sentence) < 400


@pytest.fixture
def dendrite(monkeypatch):
    """Makes dendrites; they would look up their own address."""
    monkeypatch.setattr("bittensor.utils.networking.get_external_ip", lambda: "203.0.113.9")
    return lambda keypair=VALIDATOR: bt.Dendrite(wallet=keypair)


def ask(dendrite, server, *prompts):
    """The synapses that come back when one dendrite asks all of it at once.

    The dendrite is held here: one that ends inside a running loop complains.
    """
    return asyncio.run(_ask(dendrite, server, *prompts))


async def _ask(dendrite, server, *prompts):
    target = bt.AxonInfo(
        version=1, ip=HERE, port=server.port, ip_type=4, hotkey=server.hotkey, coldkey=""
    )
    async with dendrite:
        return await asyncio.gather(
            *(
                dendrite.forward(
                    target,
                    Simulation(simulation_input=PromptInput(**asked)),
                    timeout=20.0,
                    deserialize=False,
                )
                for asked in prompts
            )
        )


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("frequency", ["hf", "lf"])
def test_a_dendrite_gets_an_answer_that_validators_accept(server, engine, dendrite, frequency):
    asked = low_frequency(engine) if frequency == "lf" else prompt(engine, num_simulations=1000)
    (synapse,) = ask(dendrite(), server, asked)
    assert synapse.dendrite.status_code == 200, synapse.dendrite.status_message
    assert synapse.axon.hotkey == server.hotkey
    validate_answer(list(synapse.simulation_output), request_of(asked))


def test_several_callers_at_once_get_what_each_of_them_asked(server, engine, dendrite):
    asked = [prompt(engine, minutes, num_simulations=minutes) for minutes in range(1, 7)]

    def one_caller(name):
        return ask(dendrite(CALLERS[name]), server, *asked)

    with ThreadPoolExecutor(3) as callers:
        rounds = list(callers.map(one_caller, ["validator", "second", "no permit"]))
    for synapses in rounds:
        assert [synapse.dendrite.status_code for synapse in synapses] == [200] * 6
        for synapse, one in zip(synapses, asked, strict=True):
            validate_answer(list(synapse.simulation_output), request_of(one))
    first, second, third = ([synapse.simulation_output for synapse in one] for one in rounds)
    assert first == second == third


def test_a_refused_dendrite_reads_why(server, engine, dendrite):
    (synapse,) = ask(dendrite(CALLERS["poor"]), server, prompt(engine))
    assert synapse.simulation_output is None
    assert synapse.dendrite.status_code == 403
    assert "stake of 12" in synapse.dendrite.status_message


@pytest.mark.parametrize(
    ("accepts", "is_packed"),
    [
        ("gzip, deflate", True),
        ("deflate, gzip;q=0.5", True),
        ("*", True),
        ("identity", False),
        ("gzip;q=0, identity", False),
        ("gzip;q=0.000", False),
    ],
)
def test_an_answer_is_packed_for_those_who_can_unpack_it(
    client, server, engine, accepts, is_packed
):
    headers = signed(server) | {"accept-encoding": accepts}
    content = json.dumps({"simulation_input": prompt(engine)})
    with client.stream("POST", "/Simulation", headers=headers, content=content) as response:
        raw = b"".join(response.iter_raw())
    assert response.status_code == 200
    assert response.headers.get("content-encoding") == ("gzip" if is_packed else None)
    answer = json.loads(gzip.decompress(raw) if is_packed else raw)
    assert list(answer) == ["name", "simulation_input", "simulation_output"]
    assert answer["simulation_input"] == prompt(engine)
    validate_answer(answer["simulation_output"], request_of(prompt(engine)))


def test_identical_prompts_get_identical_bytes_whoever_asks(client, server, engine):
    asked = prompt(engine, 20, num_simulations=50)
    bodies = {
        post(client, signed(server, CALLERS[name]), asked).content
        for name in ("validator", "second", "validator")
    }
    assert len(bodies) == 1


class Moving:
    """An engine whose price is another one at every answer."""

    def __init__(self, engine):
        self._engine = engine
        self.assets, self.now = engine.assets, engine.now
        self.computed = 0

    def answer(self, request, *, origin=None):
        self.computed += 1
        forecast = self._engine.answer(request, origin=origin)
        return replace(forecast, paths=forecast.paths * 1.01**self.computed)


def test_a_new_price_between_a_packed_and_a_plain_answer_changes_nothing(here, engine):
    moving, asked = Moving(engine), prompt(engine)
    with (
        listening(here, moving) as (other, _),
        httpx.Client(base_url=f"http://{HERE}:{other.port}", timeout=20) as caller,
    ):
        bodies = [
            post(caller, signed(other) | {"accept-encoding": accepts}, asked).content
            for accepts in ("gzip", "identity", "gzip")
        ]
    assert len(set(bodies)) == 1
    assert moving.computed == 1


def test_the_answer_itself_is_in_the_body_alone(client, server, engine):
    headers = post(client, signed(server), prompt(engine)).headers
    assert headers["bt_header_axon_status_code"] == "200"
    assert headers["bt_header_axon_hotkey"] == server.hotkey
    assert sum(len(text) for text in headers.values()) < 2_000
    assert "signature" not in " ".join(headers)


def test_prompts_that_overtake_each_other_are_both_answered(client, server, engine):
    early, late = signed(server, age_s=2.0), signed(server)
    for headers in (late, early):
        assert post(client, headers, prompt(engine)).status_code == 200


# ---------------------------------------------------------------- abuse: no proof


def without(name):
    return lambda headers, server: {key: text for key, text in headers.items() if key != name}


def with_(**changes):
    renamed = {f"bt_header_dendrite_{name}": text for name, text in changes.items()}
    return lambda headers, server: headers | renamed


def plain(**changes):
    return lambda headers, server: headers | changes


def nonce_in(seconds):
    """Another time in the nonce, nothing else: the signature does not fit any more."""

    def forge(headers, server):
        return headers | {"bt_header_dendrite_nonce": str(time.time_ns() + int(seconds * 1e9))}

    return forge


def signed_in(seconds, **details):
    """Properly signed, by a clock that is off."""
    return lambda headers, server: signed(server, age_s=-seconds, **details)


FORGERIES = {
    "no headers": (lambda headers, server: {}, "is missing"),
    "no signature": (without("bt_header_dendrite_signature"), "signature is missing"),
    "empty signature": (with_(signature=""), "signature is missing"),
    "no hotkey": (without("bt_header_dendrite_hotkey"), "hotkey is missing"),
    "no nonce": (without("bt_header_dendrite_nonce"), "nonce is missing"),
    "no uuid": (without("bt_header_dendrite_uuid"), "uuid is missing"),
    "no body hash": (without("computed_body_hash"), "computed_body_hash is missing"),
    "another body hash": (plain(computed_body_hash="0" * 64), "signature does not fit"),
    "a wrong signature": (with_(signature=f"0x{'11' * 64}"), "signature does not fit"),
    "no curve point": (with_(signature=f"0x{'ff' * 64}"), "signature does not fit"),
    "half a signature": (with_(signature="0x1234"), "has not the form"),
    "another's hotkey": (
        with_(hotkey=CALLERS["second"].ss58_address),
        "signature does not fit",
    ),
    "no address": (with_(hotkey="validator"), "has not the form of an ss58 address"),
    "a nonce an hour ahead": (nonce_in(3600), "in the future"),
    "signed an hour ahead": (signed_in(3600), "s in the future"),
    "signed a minute ago": (signed_in(-60), "s old and 30 s are allowed"),
    "signed long ago, huge timeout": (
        signed_in(-3600, timeout="1e15"),
        "s old and 130 s are allowed",
    ),
    "another nonce": (nonce_in(-1), "signature does not fit"),
    "a nonce that is none": (with_(nonce="now"), "has not the form"),
    "another uuid": (with_(uuid="b-uuid"), "signature does not fit"),
    "signed for another miner": (
        signed_in(0, to=CALLERS["poor"].ss58_address),
        "signature does not fit",
    ),
}


@pytest.mark.parametrize(("forge", "words"), FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_is_refused_and_takes_nothing_from_the_honest_caller(
    client, server, engine, forge, words
):
    honest = signed(server)
    assert_refused(post(client, forge(honest, server), prompt(engine)), 401, words)
    assert post(client, honest, prompt(engine)).status_code == 200


def test_a_body_hash_that_no_simulation_has_is_refused_even_if_signed(client, server, engine):
    headers = signed(server, body_hash="0" * 64)
    assert_refused(post(client, headers, prompt(engine)), 401, "not that of a Simulation")


def test_a_replay_is_refused_also_with_another_body(client, server, engine):
    headers = signed(server)
    assert post(client, headers, prompt(engine)).status_code == 200
    for asked in (prompt(engine), prompt(engine, 2)):
        assert_refused(post(client, headers, asked), 401, "answered before")


def test_a_request_that_is_sent_many_times_at_once_is_answered_once(client, server, engine):
    headers = signed(server)
    with ThreadPoolExecutor(8) as callers:
        sent = callers.map(lambda _: post(client, headers, prompt(engine, 3)), range(8))
    assert sorted(response.status_code for response in sent) == [200] + [401] * 7


# ---------------------------------------------------------------- abuse: not allowed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stranger", "not registered"),
        ("poor", "stake of 12; more than 65000"),
        ("just not enough", "stake of 65000; more than 65000"),
    ],
)
def test_a_caller_without_standing_is_refused(client, server, engine, name, words):
    assert_refused(post(client, signed(server, CALLERS[name]), prompt(engine)), 403, words)


@contextmanager
def answering(here, engine, **options):
    """A function that asks another axon as one of the callers: status and sentence."""
    with (
        listening(here, engine, **options) as (other, desk),
        httpx.Client(base_url=f"http://{HERE}:{other.port}", timeout=20) as caller,
    ):

        def ask_as(name, asked=None):
            response = post(caller, signed(other, CALLERS[name]), asked or prompt(engine))
            return response.status_code, response.json().get("message", "")

        yield ask_as, desk


def test_the_flags_decide_who_may_ask(here, engine):
    with answering(
        here, engine, force_validator_permit=True, allow_non_registered=True, min_stake=10.0
    ) as (ask_as, desk):
        assert ask_as("poor")[0] == ask_as("stranger")[0] == 200
        status, sentence = ask_as("no permit")
        assert (status, "has no validator permit" in sentence) == (403, True)
    told = {(record.caller.name, record.outcome) for record in desk.told}
    assert (CALLERS["stranger"].ss58_address, Outcome.REPEATED) in told
    assert (CALLERS["no permit"].ss58_address, Outcome.NOT_ALLOWED) in told


def test_a_verified_callers_lost_prompt_is_told_with_its_hotkey_and_noise_without(here, engine):
    with (
        listening(here, engine) as (other, desk),
        httpx.Client(base_url=f"http://{HERE}:{other.port}", timeout=20) as caller,
    ):
        asked = prompt(engine)
        post(caller, signed(other, CALLERS["poor"]), asked)
        post(caller, signed(other, CALLERS["stranger"]), asked)
        post(caller, signed(other), prompt(engine, time_increment="60"))
        post(caller, signed(other), prompt(engine, 90))
        caller.get("/wp-login.php")
        post(caller, with_(signature=f"0x{'00' * 64}")(signed(other), other), asked)
    assert [(record.caller.name, record.outcome) for record in desk.told] == [
        (CALLERS["poor"].ss58_address, Outcome.NOT_ALLOWED),
        (CALLERS["stranger"].ss58_address, Outcome.NOT_ALLOWED),
        (VALIDATOR.ss58_address, Outcome.REFUSED),
        (VALIDATOR.ss58_address, Outcome.REFUSED),
        (HERE, Outcome.TURNED_AWAY),
        (HERE, Outcome.TURNED_AWAY),
    ]


def test_without_a_chain_the_named_hotkeys_alone_are_answered(here, engine):
    listed = frozenset({CALLERS["stranger"].ss58_address})
    with answering(here, engine, chain=StaticChain(), whitelist=listed) as (ask_as, _):
        assert ask_as("stranger")[0] == 200
        assert ask_as("validator")[0] == 403


def test_before_the_chain_was_ever_read_only_named_hotkeys_are_answered(here, engine):
    listed = frozenset({CALLERS["stranger"].ss58_address})
    with answering(here, engine, chain=FixedChain(None), whitelist=listed) as (ask_as, _):
        assert ask_as("stranger")[0] == 200
        status, sentence = ask_as("validator")
        assert (status, "the chain has not been read yet" in sentence) == (503, True)


def test_the_stake_of_the_caller_is_its_priority(here, engine):
    seen = []

    class Noting(Desk):
        async def answer(self, request, **details):
            seen.append(details["priority"])
            return await super().answer(request, **details)

    desk = Noting(engine)
    other = AxonServer(here)
    try:
        other.start(desk, chain=FixedChain(SUBNET), policy=CallerPolicy(), now=engine.now)
        with httpx.Client(base_url=f"http://{HERE}:{other.port}") as caller:
            for name in ("validator", "second"):
                post(caller, signed(other, CALLERS[name]), prompt(engine))
    finally:
        other.stop()
        desk.close()
    assert seen == [900_000.0, 70_000.0]


# ---------------------------------------------------------------- abuse: what is asked

BAD_BODIES = {
    "empty": b"",
    "null": b"null",
    "array": b"[]",
    "array of prompts": b'[{"simulation_input": {}}]',
    "number": b"5",
    "text": b'"BTC"',
    "not JSON": b"asset=BTC",
    "bytes": b"\xff\xfe\x00",
    "nested": b"[" * 50_000,
    "nested objects": b'{"simulation_input":' * 3_000,
    "no prompt": b"{}",
    "null prompt": b'{"simulation_input": null}',
    "array prompt": b'{"simulation_input": [1]}',
    "empty prompt": b'{"simulation_input": {}}',
}


@pytest.mark.parametrize("raw", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_no_prompt_is_refused(client, server, engine, raw):
    headers = signed(server)
    assert_refused(client.post("/Simulation", headers=headers, content=raw), 400)
    assert post(client, headers, prompt(engine)).status_code == 200  # nothing was used up


BAD_VALUES = [
    ({"asset": None}, "asset"),
    ({"asset": 5}, "asset"),
    ({"asset": "DOGE"}, "'DOGE'"),
    ({"asset": "Ünï¢ode\n"}, "unknown"),
    ({"asset": "A" * 60_000}, "asset"),
    ({"start_time": None}, "start_time"),
    ({"start_time": 1_766_102_700}, "start_time"),
    ({"start_time": "soon"}, "cannot be read"),
    ({"start_time": "9999-12-31T23:59:00-14:00"}, "cannot be read"),
    ({"time_increment": 0}, "time_increment"),
    ({"time_increment": -60}, "time_increment"),
    ({"time_increment": 7}, "does not divide"),
    ({"time_increment": 1, "time_length": 86_400}, "86401 points"),
    ({"time_increment": "60"}, "time_increment"),
    ({"time_increment": 60.0}, "time_increment"),
    ({"time_length": 10**12}, "time_length"),
    ({"time_length": 10**4000}, "time_length"),
    ({"num_simulations": 0}, "num_simulations"),
    ({"num_simulations": 1001}, "num_simulations"),
    ({"num_simulations": 10**9}, "num_simulations"),
    ({"num_simulations": True}, "num_simulations"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name(client, server, engine, changes, words):
    assert_refused(post(client, signed(server), prompt(engine, **changes)), 400, words)


def test_a_start_that_has_passed_is_too_late_and_told_of(here, engine):
    with answering(here, engine) as (ask_as, desk):
        status, sentence = ask_as("validator", prompt(engine, -1))
    assert (status, "has passed" in sentence) == (408, True)
    (record,) = desk.told
    assert (record.caller.name, record.reason) == (VALIDATOR.ss58_address, sentence)
    assert (record.outcome, record.request.asset) == (Outcome.TOO_LATE, "BTC")


def test_a_start_too_far_ahead_is_refused(client, server, engine):
    assert_refused(post(client, signed(server), prompt(engine, 90)), 400, "s ahead")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([60, 300, 3600, "BTC"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip
KEYS = ("asset", "start_time", "time_increment", "time_length", "num_simulations")


@settings(max_examples=40)
@given(changes=st.dictionaries(st.sampled_from(KEYS), anything, min_size=1))
def test_no_value_makes_the_axon_fail(client, server, engine, changes):
    content = json.dumps({"simulation_input": prompt(engine, **changes)})
    response = client.post("/Simulation", headers=signed(server), content=content)
    if response.status_code != 200:
        assert response.status_code in {400, 408}
        assert_refused(response, response.status_code)


# ---------------------------------------------------------------- abuse: HTTP itself


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/Simulation", 405),
        ("PUT", "/Simulation", 405),
        ("POST", "/Synapse", 404),  # bittensor's own, which answers anybody
        ("POST", "/Simulation/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/", 404),
    ],
)
def test_nothing_but_prompts_is_served(client, server, engine, method, path, status):
    assert_refused(client.request(method, path, headers=signed(server)), status)


@pytest.mark.parametrize("size", [axon_gate.MAX_BODY_BYTES + 1, 3_000_000])
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_a_large_body_is_refused_and_the_caller_reads_why(client, server, size, chunked):
    content = iter([b" " * (size // 3)] * 4) if chunked else b" " * size
    response = client.post("/Simulation", headers=signed(server), content=content)
    assert_refused(response, 413, "larger than 65536 bytes")


def test_a_huge_body_is_refused_before_it_is_sent(server):
    sent = raw_request(server, {**signed(server), "content-length": str(100_000_000)})
    assert b" 413 " in sent.split(b"\r\n")[0]


def test_a_stranger_is_refused_before_its_body_is_read(server):
    sent = raw_request(server, {"transfer-encoding": "chunked"})
    assert b" 401 " in sent.split(b"\r\n")[0]


def raw_request(server, headers, method="POST"):
    """The answer to the head of a request whose body never comes."""
    lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
    with socket.create_connection((HERE, server.port), timeout=10) as caller:
        caller.sendall(f"{method} /Simulation HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode())
        return caller.recv(65_536)


@pytest.mark.parametrize(
    "extra",
    [
        {f"x-{number}": "1" for number in range(100)},
        {"x-long": "a" * 20_000},
        {"x-longer": "a" * 500_000},
        {f"bt_header_dendrite_{number}": "a" * 200 for number in range(300)},
    ],
    ids=["many", "large", "huge", "many and large"],
)
def test_too_many_or_too_large_headers_are_refused(client, server, engine, extra):
    headers = signed(server)
    assert post(client, {**headers, **extra}, prompt(engine)).status_code == 400
    assert post(client, headers, prompt(engine)).status_code == 200


@pytest.mark.parametrize(
    "extra",
    [
        {"bt_header_axon_port": "many"},
        {"bt_header_axon_status_code": "500"},
        {"bt_header_dendrite_version": "1" * 400},
        {"bt_header_input_obj_simulation_input": "!"},
        {"bt_header_input_obj_simulation_input": "W10="},
        {"name": "Other"},
        {"total_size": "large"},
        {"content-type": "text/plain"},
        {"timeout": "never"},
    ],
    ids=str,
)
def test_a_verified_caller_is_answered_whatever_else_its_headers_say(client, server, engine, extra):
    assert post(client, {**signed(server), **extra}, prompt(engine)).status_code == 200


def test_what_is_no_http_is_refused(server):
    with socket.create_connection((HERE, server.port), timeout=10) as caller:
        caller.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b" 400 " in caller.recv(1000).split(b"\r\n")[0]


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(axon_gate, "BODY_S", 0.05)
    sent = raw_request(server, {**signed(server), "content-length": "100"})
    assert b" 408 " in sent.split(b"\r\n")[0]


def test_who_connects_and_asks_nothing_is_hung_up_on(server, monkeypatch):
    monkeypatch.setattr(slow_callers, "HEADERS_S", 0.05)
    with socket.create_connection((HERE, server.port), timeout=10) as caller:
        caller.sendall(b"POST /Simulation HTTP/1.1\r\nhost")
        assert caller.recv(1000) == b""


def test_a_caller_that_hangs_up_leaves_the_axon_well(client, server, engine):
    headers = signed(server)
    with socket.create_connection((HERE, server.port)) as caller:
        lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        caller.sendall(
            f"POST /Simulation HTTP/1.1\r\nhost: x\r\n{lines}content-length: 99\r\n\r\n{{".encode()
        )
    assert post(client, headers, prompt(engine)).status_code == 200


# ---------------------------------------------------------------- faults of our own


class Failing:
    """An engine in trouble."""

    def __init__(self, error, engine):
        self._error, self.now = error, engine.now
        self.release = threading.Event()

    def assets(self):
        return ("BTC",)

    def answer(self, request, *, origin=None):
        if self._error is None:
            assert self.release.wait(20)
            raise NoPriceError("nobody is left to hear it.")
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (NoPriceError("no price of BTC is known; wait for the feed."), 503, "no price of BTC"),
        (ZeroDivisionError("a bug with secrets"), 500, "fault of the miner"),
        (RequestError("“quoted” × ten."), 400, "×"),  # not in the alphabet of headers
    ],
)
def test_a_refusal_of_the_engine_has_its_status_and_sentence(here, engine, error, status, words):
    with answering(here, Failing(error, engine)) as (ask_as, _):
        got, sentence = ask_as("validator", prompt(engine))
    assert got == status
    assert words in sentence
    assert "secrets" not in sentence


def test_an_answer_that_takes_longer_than_its_caller_waits_is_given_up(here, engine):
    failing = Failing(None, engine)
    with (
        listening(here, failing) as (other, _),
        httpx.Client(base_url=f"http://{HERE}:{other.port}", timeout=20) as caller,
    ):
        response = post(caller, signed(other, timeout="0.1"), prompt(engine))
        failing.release.set()
    assert_refused(response, 408, "longer than the 0.1 s")


# ---------------------------------------------------------------- port and wallet


def test_a_busy_port_is_one_sentence_with_a_remedy(here):
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port}, another program.*--axon.port"):
            AxonServer(replace(here, port=port))


@pytest.mark.parametrize(
    ("changed", "words"),
    [({}, "another program does; end it"), ({"--wallet.name": "nobody"}, "does not exist")],
)
def test_an_axon_that_cannot_be_asks_no_venue_however_often_it_is_started(
    here, tmp_path, changed, words
):
    with socket.create_server((HERE, 0)) as taken, socket.create_server((HERE, 0)) as venues:
        venue = f"http://{HERE}:{venues.getsockname()[1]}"
        config = tmp_path / "miner.toml"
        config.write_text("".join(f'{host.value}_url = "{venue}"\n' for host in FeedHost))
        flags = {
            "--wallet.path": here.wallet_path,
            "--wallet.name": here.wallet_name,
            "--wallet.hotkey": here.wallet_hotkey,
            "--axon.ip": HERE,
            "--axon.port": taken.getsockname()[1],
            "--port": 0,
            "--config": config,
        } | changed
        words_of = [str(word) for flag in flags.items() for word in flag]
        run = subprocess.run(
            [sys.executable, str(ROOT / "miner.py"), *words_of],
            capture_output=True,
            text=True,
            check=False,
        )
        venues.settimeout(0)
        with pytest.raises(BlockingIOError):
            venues.accept()
    assert (run.returncode, run.stdout) == (1, "")
    assert words in run.stderr.splitlines()[-1]


def test_an_address_of_another_machine_is_replaced_by_all_of_ours(here, caplog):
    server = AxonServer(replace(here, ip="203.0.113.1"))
    server.stop()
    assert "203.0.113.1 is no address of this machine" in caplog.text


def test_a_stopped_axon_frees_its_port(here, engine):
    with listening(here, engine) as (other, _):
        port = other.port
        assert other.is_serving
    assert not other.is_serving
    assert other.facts() == AxonFacts(port=port, is_up=False, chain=None)
    with socket.create_server((HERE, port)):
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wallet_name": "nobody"}, "does not exist; name it with --wallet.name"),
        ({"wallet_hotkey": "other"}, "does not exist"),
        ({"wallet_hotkey": "broken"}, "cannot be read"),
        ({"wallet_hotkey": "locked"}, "is encrypted"),
    ],
)
def test_a_wallet_that_cannot_be_used_is_one_sentence(here, wallets, changes, words):
    folder = wallets / "miner" / "hotkeys"
    (folder / "broken").write_text('{"secretPhrase": "legal winner thank year"}')
    (folder / "locked").write_bytes(b"$NACL" + b"\x00" * 64)
    with pytest.raises(ConfigError, match=words) as caught:
        load_wallet(replace(here, **changes))
    assert "legal winner" not in str(caught.value)


# ---------------------------------------------------------------- the chain


def metagraph(hotkeys, stakes):
    """A metagraph of bittensor's own class, filled by hand: no chain runs on loopback."""
    found = bt.Metagraph(netuid=50, sync=False)
    count = len(hotkeys)
    found.uids = np.arange(count)
    found.stake = found.total_stake = np.array(stakes, dtype=np.float32)
    found.validator_permit = np.array([True] * count)
    found.block = np.array([77])
    found.axons = [
        bt.AxonInfo(version=1, ip=HERE, port=8000 + uid, ip_type=4, hotkey=hotkey, coldkey=hotkey)
        for uid, hotkey in enumerate(hotkeys)
    ]
    return found


class Subtensor:
    """What the reader uses of a connection."""

    def __init__(self, found, *, success=True):
        self._found, self._success = found, success
        self.served = []

    def metagraph(self, netuid):
        return self._found

    def serve_axon(self, netuid, axon):
        self.served.append((netuid, axon.external_ip, axon.external_port))
        return ExtrinsicResponse(success=self._success, message="too early")

    def close(self):
        pass


ADDRESSES = [keypair.ss58_address for keypair in CALLERS.values()]


def test_a_metagraph_becomes_a_snapshot():
    snapshot = snapshot_of(metagraph(ADDRESSES[:2], [7.5, 8.5]), ADDRESSES[1])
    assert dict(snapshot.neurons) == {
        ADDRESSES[0]: registered(0, 7.5),
        ADDRESSES[1]: registered(1, 8.5),
    }
    assert snapshot.block == 77
    assert snapshot.published == Endpoint(HERE, 8001)
    assert snapshot_of(metagraph(ADDRESSES[:1], [1.0]), ADDRESSES[1]).published is None


@pytest.fixture
def reader(here):
    """A reader of a node that is not there."""
    server = AxonServer(here)
    with socket.create_server((HERE, 0)) as closed:
        port = closed.getsockname()[1]
    yield BittensorReader(server.axon, ChainSettings(network=f"ws://{HERE}:{port}"))
    server.stop()


def test_a_node_that_is_not_there_is_one_sentence(reader):
    with pytest.raises(ChainUnavailable, match=r"subnet 50 of ws://.* cannot be read \(Conn"):
        reader.read()


@pytest.mark.parametrize("key", ["user:s3cret@127.0.0.1:1", "127.0.0.1:1/v3/s3cret?key=s3cret"])
def test_no_message_and_no_file_name_tells_the_key_of_a_node(here, key):
    server = AxonServer(here)
    reader = BittensorReader(server.axon, ChainSettings(network=f"ws://{key}"))
    try:
        with pytest.raises(ChainUnavailable, match=r"subnet 50 of ws://127\.0\.0\.1:1 ") as caught:
            reader.read()
    finally:
        server.stop()
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in _file_name(f"ws://{key}")
    assert _file_name(f"ws://{key}") != _file_name(f"ws://{key}9")
    assert _file_name("finney") == "finney"
    assert _file_name("ws://127.0.0.1:9944") == "ws---127-0-0-1-9944"


def test_the_axon_is_published_under_its_new_address(reader):
    subtensor = reader._subtensor = Subtensor(metagraph(ADDRESSES, range(6)))
    assert reader.read().neurons[ADDRESSES[5]].stake == 5.0
    reader.publish(Endpoint("198.51.100.7", 9000))
    assert subtensor.served == [(50, "198.51.100.7", 9000)]


def test_a_chain_that_does_not_take_the_address_says_why(reader):
    reader._subtensor = Subtensor(metagraph(ADDRESSES, range(6)), success=False)
    with pytest.raises(ChainUnavailable, match=r"did not take our address .*too early"):
        reader.publish(Endpoint("198.51.100.7", 9000))


def operator(here, kind, network="finney", *names):
    return OperatorSettings(
        transport=Transport.AXON,
        axon=here,
        chain=ChainSettings(kind=kind, network=network),
        policy=CallerPolicy(whitelist=frozenset(CALLERS[name].ss58_address for name in names)),
        log_level=None,
        remarks=(),
    )


def test_the_last_known_stakes_serve_while_no_chain_can_be_reached(here, engine, tmp_path):
    before = set(threading.enumerate())
    store = StateStore(tmp_path)
    nowhere = f"ws://{HERE}:1"
    store.save("chain", "ws---127-0-0-1-1_50", 1, SUBNET.to_dict())
    desk = Desk(engine)
    chosen = operator(here, ChainKind.BITTENSOR, nowhere, "stranger")
    with (
        serving(other := AxonServer(chosen.axon), desk, chosen, store, now=engine.now),
        httpx.Client(base_url=f"http://{HERE}:{other.port}") as caller,
    ):
        for name, status in (("validator", 200), ("stranger", 200), ("poor", 403)):
            headers = signed(other, CALLERS[name])
            assert post(caller, headers, prompt(engine)).status_code == status
        chain = wait_for(lambda: (found := other.facts().chain) and found.fault and found)
        assert chain
        assert "cannot be read" in str(chain.fault)
        assert chain.is_registered is False  # the last known subnet does not list us
    desk.close()
    desk._pool.shutdown(wait=True)
    assert set(threading.enumerate()) <= before


def test_a_static_chain_starts_no_thread_for_it(here, engine, tmp_path):
    desk = Desk(engine)
    chosen = operator(here, ChainKind.STATIC, "finney", "stranger")
    other = AxonServer(chosen.axon)
    with serving(other, desk, chosen, StateStore(tmp_path), now=engine.now):
        assert "chain" not in {thread.name for thread in threading.enumerate()}
        assert other.facts() == AxonFacts(port=other.port, is_up=True, chain=None)
    desk.close()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- its health, on our pages


@contextmanager
def pages(here, folder, kind, monkeypatch):
    """A miner with an axon, and a client of its pages; no duty runs."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers])  # the miner adds one for its page
    chosen = Settings(source="simulated", state_dir=folder, model_dir=folder)
    running = miner.Miner(chosen, None, SimulatedSource(days=3, assets=("BTC",)))
    listener, server = bind(HERE, 0), server_for(running.app)
    base = f"http://{HERE}:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    try:
        flags = operator(here, kind, f"ws://{HERE}:1")
        axon = miner._bound_axon(flags)
        assert axon is not None
        with miner._serving(axon, running, flags, chosen):
            thread.start()
            try:
                with httpx.Client(base_url=base, timeout=20) as opened:
                    yield running, opened
            finally:
                server.should_exit = True
                thread.join(20)
    finally:
        listener.close()
        running.close()


def told_of_axon(client):
    text = client.get("/metrics").text
    return dict(
        re.findall(r"^lgbm_miner_(axon_up|chain_age_seconds|registered) (\S+)", text, re.MULTILINE)
    )


def test_a_dead_axon_makes_the_miner_unready_and_the_pages_say_so(here, tmp_path, monkeypatch):
    with pages(here, tmp_path, ChainKind.STATIC, monkeypatch) as (running, client):
        well = client.get("/healthz")
        assert (well.status_code, well.json()["ready"]) == (200, True)
        assert told_of_axon(client) == {"axon_up": "1.0"}
        running.axon.__self__._server.should_exit = True
        wait_for(lambda: not running.axon().is_up)
        dead = client.get("/healthz")
        assert (dead.status_code, dead.json()["status"]) == (503, "not ready")
        assert any("the axon on port" in reason for reason in dead.json()["reasons"])
        assert told_of_axon(client) == {"axon_up": "0.0"}
        assert "has stopped; restart the miner" in client.get("/").text


def test_an_unreachable_chain_leaves_the_miner_ready_and_degraded(here, tmp_path, monkeypatch):
    with pages(here, tmp_path, ChainKind.BITTENSOR, monkeypatch) as (running, client):
        wait_for(lambda: running.axon().chain.fault)
        found = client.get("/healthz")
        assert (found.status_code, found.json()["status"]) == (200, "degraded")
        assert any("cannot be read" in sentence for sentence in found.json()["warnings"])
        assert told_of_axon(client) == {"axon_up": "1.0", "chain_age_seconds": "+Inf"}


# ---------------------------------------------------------------- bittensor in our process


def test_without_bittensor_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bittensor", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-axon\.txt"):
        axon_adapter._import_bittensor()


def test_importing_it_leaves_the_process_as_it_was():
    script = """
import logging, sys
sys.argv = ["miner.py", "--logging.trace", "--help", "--strict"]
ours = logging.getLogger("miner")
ours.setLevel(logging.DEBUG)
ours.addHandler(logging.NullHandler())
logging.basicConfig(level="INFO", format="%(name)s %(message)s")
import axon_adapter
assert ours.level == logging.DEBUG and len(ours.handlers) == 1
assert logging.getLogger("asyncio").level <= logging.WARNING
axon_adapter.bt.logging.warning("heard")
axon_adapter.bt.logging.info("chatter")
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    assert "heard" in ran.stderr
    assert "chatter" not in ran.stderr


def test_no_log_line_holds_a_signature_or_a_seed(client, server, engine, caplog, wallets):
    caplog.set_level(logging.DEBUG)
    headers = signed(server)
    post(client, headers, prompt(engine))
    post(client, headers, prompt(engine))
    seed = json.loads((wallets / "miner" / "hotkeys" / "hot").read_text())
    secrets = [headers["bt_header_dendrite_signature"], *map(str, seed.values())]
    secrets = [secret for secret in secrets if len(secret) > 20 and secret != server.hotkey]
    text = "\n".join(f"{record.__dict__}" for record in caplog.records)
    assert text
    assert not [secret for secret in secrets if secret in text]
