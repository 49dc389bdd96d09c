"""Whoever sends whatever: honest callers are answered in time, all others refused clearly.

A real engine behind the real HTTP service and the real axon, on loopback. The cases of
single requests are in the fast suite; here are numbers, sizes and speed.
"""

import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

import axon_gate
import http_service
import slow_callers
from allocator import trim
from answer_desk import ANSWER_THREADS, ANSWERED, CACHE_BYTES, MOST_WAITING, Outcome
from axon_gate import MAX_BODY_BYTES
from config import Frequency
from data_fetcher import SimulatedSource
from forecast_engine import ForecastEngine
from market_view import Rung
from operator_flags import AxonSettings
from settings import Settings
from slow_callers import MOST_CONNECTIONS
from tests import test_axon_adapter as axon
from tests import test_http_service as http
from tests.faults.small_sets import publish_small_set
from tests.faults.tally import count
from tests.waiting import wait_for
from wire_format import validate_answer

HERE = "127.0.0.1"
FLOOD = Path(__file__).with_name("flood.py")
QUIET_S = 0.3  # a server that is silent for so long waits for more
END_S = 20.0  # after the caller's last word, for any connection to end
MOST_BYTES_LEFT = 1024  # per request, of memory; noise of a process that does nothing is less
MIB = 1024 * 1024

FUZZ = "Mutilated requests never crash, hang or swell the miner."
BULK = "Requests of 100 MB, 100,000 headers or deep JSON are refused in bounded memory."
DRIP = "Hundreds of connections that drip keep no honest caller waiting, and are closed."
CROWD = "A hundred prompts of one moment are all answered before their start."
QUEUE = "Beyond the queue's bound callers are refused clearly, the lowest stake first."
FLOODED = "An honest caller is answered while one process replays and forges at full speed."


# ---------------------------------------------------------------- who is asked


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    settings = Settings(source="simulated", state_dir=folder, model_dir=folder)
    return ForecastEngine.open(SimulatedSource(days=3, assets=("BTC",)), settings)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    wallets = tmp_path_factory.mktemp("wallets")
    axon.make_wallet(wallets, "miner")
    return AxonSettings(
        wallet_name="miner", wallet_hotkey="hot", wallet_path=wallets, ip=HERE, port=0,
        external_ip=HERE,
    )  # fmt: skip


@dataclass
class Entry:
    """A way into the miner: where it is, and a request that it answers."""

    port: int
    route: str
    headers: dict[str, str]
    body: bytes
    server: object = None

    def raw(self, headers=None, body=None):
        """The request as bytes, for one exchange."""
        body = self.body if body is None else body
        said = {"host": "x", "connection": "close", "content-length": str(len(body))}
        lines = "".join(
            f"{name}: {text}\r\n"
            for name, text in {**said, **self.headers, **(headers or {})}.items()
        )
        return f"POST {self.route} HTTP/1.1\r\n{lines}\r\n".encode() + body

    def honest(self, engine):
        """The same again, if need be signed again."""
        if self.server is None:
            return self.raw()
        return self.raw(axon.signed(self.server, uuid=uuid.uuid4().hex))


@pytest.fixture(scope="module")
def entries(engine, here):
    with ExitStack() as opened:
        url = opened.enter_context(http.serving(engine))
        server, _ = opened.enter_context(axon.listening(here, engine))
        asked = json.dumps({"simulation_input": axon.prompt(engine)}).encode()
        yield {
            "http": Entry(
                int(url.rpartition(":")[2]), "/predict", {}, json.dumps(http.body()).encode()
            ),
            "axon": Entry(server.port, "/Simulation", axon.signed(server), asked, server),
        }


@pytest.fixture(params=["http", "axon"])
def entry(request, entries):
    return entries[request.param]


def exchange(port, raw, patience_s=30.0):
    """The answer's status; 0 if the connection ended without one, None if nothing came."""
    with socket.create_connection((HERE, port), timeout=30) as caller:
        with suppress(OSError):  # refused while we are sending; the answer may be there
            caller.sendall(raw)
        caller.settimeout(patience_s)
        try:
            return status_in(caller.recv(65_536))
        except TimeoutError:
            return None
        except OSError:
            return 0


def status_in(answer):
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found.group(1)) if found else 0


def resident():
    """Bytes of memory that this process holds, server and all."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def needed():
    """The same once what is free was given back, as a miner does every minute."""
    trim()
    return resident()


# ---------------------------------------------------------------- what is sent


def mutilated(raw, rng):
    """A request after a few faults of the wire or of a mind."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        if not data:  # all was cut out
            break
        at = rng.randrange(len(data))
        piece = bytes(data[at : at + rng.randint(1, 80)])
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + len(piece)]
        elif kind == 2:
            data[at:at] = piece * rng.randint(1, 30)
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 20))
        elif kind == 4:
            data[at:at] = rng.choice((b"\r\n", b"\0", b"-1", b"1e999", b"\xff\xfe", b"{", b"[["))
        else:
            data = data[: max(1, at)]
    return bytes(data)


def until_its_end(port, raw):
    """The status; 0 if the connection ended without one, None if it did not end: a hang.

    Whoever is silent waits for more, so it is told that no more will come.
    """
    with socket.create_connection((HERE, port), timeout=30) as caller:
        try:
            caller.sendall(raw)
            caller.settimeout(QUIET_S)
            return status_in(caller.recv(65_536))
        except TimeoutError:
            caller.settimeout(END_S)
        except OSError:
            return 0
        try:
            caller.shutdown(socket.SHUT_WR)
            return status_in(caller.recv(65_536))
        except TimeoutError:
            return None
        except OSError:
            return 0


def assert_harmless(entry, engine, requests):
    """Each comes to an end without an error of ours, and an honest caller is answered after."""
    tried, bad = 0, []
    for raw in requests:
        tried += 1
        status = until_its_end(entry.port, raw)
        if status is None or status >= 500:
            bad.append((status, raw))
    lost = exchange(entry.port, entry.honest(engine)) != 200
    count(FUZZ, cases=tried, answers_lost=int(lost))
    assert not bad
    assert not lost


def test_mutilated_requests_are_refused_or_answered_and_change_nothing(entry, engine, size):
    """Mutilated requests never crash, hang or swell the miner."""
    rng = random.Random(5)
    assert_harmless(
        entry, engine, (mutilated(entry.honest(engine), rng) for _ in range(size(150, 5_000)))
    )


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics"])
def test_mutilated_requests_for_pages_change_nothing(entry, engine, path, size):
    """Mutilated requests never crash, hang or swell the miner."""
    rng = random.Random(6)
    sound = f"GET {path}?a=b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    assert_harmless(entry, engine, (mutilated(sound, rng) for _ in range(size(25, 500))))


def test_mutilated_requests_leave_nothing_behind(entry, engine, size):
    """Mutilated requests never crash, hang or swell the miner.

    Memory is held to a slope over thousands, once what is bounded is full.
    """
    rng, tried = random.Random(7), size(1500, 15_000)
    sent, held = [], []
    for number in range(tried):
        raw = mutilated(entry.honest(engine), rng)
        with socket.create_connection((HERE, entry.port), timeout=30) as caller, suppress(OSError):
            caller.sendall(raw)
            caller.shutdown(socket.SHUT_WR)
            while caller.recv(65_536):
                pass
        if number > tried / 3 and number % 50 == 0:
            sent.append(number)
            held.append(needed())
    slope, _ = np.polyfit(sent, held, 1)
    lost = exchange(entry.port, entry.honest(engine)) != 200
    count(FUZZ, cases=tried, answers_lost=int(lost))
    assert not lost
    assert slope < MOST_BYTES_LEFT


DEEP = 30_000  # brackets that open: closed again they fill the largest body


@pytest.mark.parametrize(
    "text",
    [
        "[" * DEEP,
        "[" * DEEP + "]" * DEEP,
        '{"a":' * (DEEP // 3) + "1" + "}" * (DEEP // 3),
        '{"simulation_input": ' + "[" * DEEP + "]" * DEEP + "}",
        '{"asset": ' + "[" * DEEP + "]" * DEEP + "}",
    ],
    ids=["open", "lists", "objects", "in an axon's field", "in a body's field"],
)
def test_nesting_within_the_size_limit_is_refused_clearly(entry, engine, text):
    """Requests of 100 MB, 100,000 headers or deep JSON are refused in bounded memory."""
    assert len(text) <= MAX_BODY_BYTES
    signed = axon.signed(entry.server, uuid=uuid.uuid4().hex) if entry.server else {}
    status = exchange(entry.port, entry.raw(signed, text.encode()))
    lost = exchange(entry.port, entry.honest(engine)) != 200
    count(BULK, cases=1, answers_lost=int(lost))
    assert status == 400
    assert not lost


def endless(entry, how):
    """A request of a hundred megabytes or as many headers, piece by piece."""
    piece = b" " * MIB
    body, header, head = None, None, {}
    if how == "declared":
        head, body = {"content-length": str(100 * MIB)}, [piece] * 100
    elif how == "chunked":
        head = {"transfer-encoding": "chunked"}
        body = [b"100000\r\n" + piece + b"\r\n"] * 100
    elif how == "brackets":
        head, body = {"content-length": str(20 * MIB)}, [b"[" * MIB] * 20
    elif how == "headers":
        header = [f"x-{number}: 1\r\n".encode() for number in range(100_000)]
    elif how == "one header":
        header = [b"x-long: ", *([piece] * 100)]
    raw = entry.raw(head, b"")
    if head.get("transfer-encoding"):
        raw = raw.replace(b"content-length: 0\r\n", b"")
    if header:
        start, _, _ = raw.partition(b"\r\n\r\n")
        return [start + b"\r\n", *header, b"\r\n"]
    return [raw, *(body or [])]


@pytest.mark.parametrize("how", ["declared", "chunked", "brackets", "headers", "one header"])
def test_enormous_requests_are_refused_in_bounded_memory(entry, engine, how):
    """Requests of 100 MB, 100,000 headers or deep JSON are refused in bounded memory."""
    assert exchange(entry.port, entry.honest(engine)) == 200
    before = resident()
    with socket.create_connection((HERE, entry.port), timeout=30) as caller:
        for piece in endless(entry, how):
            try:
                caller.sendall(piece)
            except OSError:
                break
        try:
            status = status_in(caller.recv(65_536))
        except OSError:  # it has closed upon us, and a reset takes what was unread
            status = 0
    lost = exchange(entry.port, entry.honest(engine)) != 200
    count(BULK, cases=1, answers_lost=int(lost))
    assert status in {0, 400, 401, 408, 413, 431}
    assert not lost
    assert resident() - before < 48 * MIB


def is_closed(caller):
    """Whether the server has hung up, politely or not."""
    try:
        return caller.recv(1000) == b""
    except ConnectionError:
        return True


def test_connections_that_drip_keep_nobody_waiting_and_are_closed(entry, engine, monkeypatch, size):
    """Hundreds of connections that drip keep no honest caller waiting, and are closed.

    More than the server takes, from the honest caller's own address and from another.
    """
    monkeypatch.setattr(slow_callers, "HEADERS_S", 1.5)
    tried = MOST_CONNECTIONS + size(40, 400)
    with ExitStack() as opened:
        slow = [
            opened.enter_context(
                socket.create_connection(
                    (HERE, entry.port), timeout=30, source_address=(f"127.0.0.{1 + n % 2}", 0)
                )
            )
            for n in range(tried)
        ]
        answered = []
        for byte in (b"P", b"O", b"S", b"T"):
            for caller in slow:
                with suppress(ConnectionError):  # hung up on already
                    caller.sendall(byte)
            answered.append(exchange(entry.port, entry.honest(engine)))
        left = [is_closed(caller) for caller in slow]
    lost = sum(status != 200 for status in answered)
    count(DRIP, cases=tried, answers_lost=lost)
    assert lost == 0
    assert all(left)


# ---------------------------------------------------------------- many at once


async def ask_axon(server, prompts, caller="validator"):
    """All prompts at once, one connection each: status, body and seconds of each."""

    async def one(client, asked):
        headers = axon.signed(server, axon.CALLERS[caller], timeout="120.0", uuid=uuid.uuid4().hex)
        began = time.monotonic()
        response = await client.post(
            "/Simulation", headers=headers, json={"simulation_input": asked}
        )
        return response.status_code, response.content, time.monotonic() - began

    limits = httpx.Limits(max_connections=None)
    base = f"http://{HERE}:{server.port}"
    async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, asked) for asked in prompts))


AHEAD_S = 50  # from the asking to the start of an hour's prompt, the closest that there is
CROWD_OF = (
    ("BTC", Frequency.HF), ("BTC", Frequency.LF), ("ETH", Frequency.HF), ("ETH", Frequency.LF),
    ("XAU", Frequency.LF),
)  # fmt: skip


class AMomentLater:
    """The engine a little after its last bar, `AHEAD_S` before the next whole minute."""

    def __init__(self, engine):
        self._engine, self.assets, self.answer = engine, engine.assets, engine.answer

    def now(self):
        return -(-self._engine.now() // 60) * 60 + 60 - AHEAD_S


@pytest.fixture(scope="module")
def trained_engine(tmp_path_factory):
    """Three assets, each with a trained set of its own at every frequency that it is asked at."""
    folder = tmp_path_factory.mktemp("trained")
    source = SimulatedSource(days=12, assets=("BTC", "ETH", "XAU"))
    settings = Settings(source="simulated", state_dir=folder / "s", model_dir=folder / "m")
    for asset, frequency in CROWD_OF:
        publish_small_set(settings.model_dir, source.load(asset, frequency).history)
    engine = ForecastEngine.open(source, settings)
    assert set(CROWD_OF) <= set(engine.trained())
    return AMomentLater(engine)


@pytest.fixture
def two_cores():
    """What is started meanwhile, threads included, has two cores and no more."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    yield
    os.sched_setaffinity(0, before)


def crowd(engine):
    """A hundred prompts for the same start, of all assets and frequencies, no two alike."""
    prompts = []
    for number in range(100):
        asset, frequency = CROWD_OF[number % len(CROWD_OF)]
        kind = axon.low_frequency if frequency is Frequency.LF else axon.prompt
        prompts.append(kind(engine) | {"asset": asset, "num_simulations": 1000 - number})
    return prompts


def settle_crowd(answers):
    lost = sum(status != 200 or took > AHEAD_S for status, _, took in answers)
    count(CROWD, cases=len(answers), answers_lost=lost)
    assert lost == 0, {(status, body[:200]) for status, body, _ in answers if status != 200}


def test_a_hundred_prompts_of_one_moment_are_all_answered_in_time(here, trained_engine, two_cores):
    """A hundred prompts of one moment are all answered before their start."""
    prompts = crowd(trained_engine)
    with axon.listening(here, trained_engine) as (server, desk):
        answers = asyncio.run(ask_axon(server, prompts))
    settle_crowd(answers)
    for (_, body, _), asked in list(zip(answers, prompts, strict=True))[::9]:
        validate_answer(json.loads(body)["simulation_output"], axon.request_of(asked))
    diagnoses = [record.diagnostics for record in desk.told]
    assert {told.rung for told in diagnoses if told} == {Rung.LIGHTGBM.value}
    assert [record.outcome for record in desk.told] == [Outcome.COMPUTED] * len(prompts)


def as_shadow(asked):
    """The same prompt as the shadow-mining contract writes it."""
    return http.body(
        asset=asked["asset"],
        prompt_start_time=asked["start_time"],
        horizon_seconds=asked["time_length"],
        interval_seconds=asked["time_increment"],
        num_paths=asked["num_simulations"],
    )


def test_a_hundred_prompts_over_http_are_all_answered_in_bounded_memory(trained_engine, two_cores):
    """A hundred prompts of one moment are all answered before their start."""
    bodies = [as_shadow(asked) for asked in crowd(trained_engine)]

    async def ask_all(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

            async def one(body):
                began = time.monotonic()
                response = await client.post("/predict", json=body)
                return response.status_code, response.content[:300], time.monotonic() - began

            return await asyncio.gather(*(one(body) for body in bodies))

    with http.serving(trained_engine) as url:
        settle_crowd(asyncio.run(ask_all(url)))  # from now on what is cached and kept is there
        before = resident()
        settle_crowd(asyncio.run(ask_all(url)))
        grown = resident() - before
    assert grown < 256 * MIB


def test_bodies_that_drip_keep_nobody_waiting_and_are_refused(entry, engine, monkeypatch, size):
    """Hundreds of connections that drip keep no honest caller waiting, and are closed."""
    monkeypatch.setattr(http_service, "BODY_S", 1.0)
    monkeypatch.setattr(axon_gate, "BODY_S", 1.0)
    tried = size(100, 400)
    with ExitStack() as opened:
        slow = [
            opened.enter_context(socket.create_connection((HERE, entry.port), timeout=30))
            for _ in range(tried)
        ]
        for caller in slow:
            caller.sendall(entry.raw({"content-length": "1000"}, b"{"))
        lost = exchange(entry.port, entry.honest(engine)) != 200
        left = [status_in(caller.recv(1000)) for caller in slow]
    count(DRIP, cases=tried, answers_lost=int(lost))
    assert not lost
    assert set(left) <= {0, 400, 401, 408}


def test_answers_that_nobody_reads_are_cut_and_keep_nobody_waiting(entry, engine, monkeypatch):
    """Hundreds of connections that drip keep no honest caller waiting, and are closed."""
    monkeypatch.setattr(slow_callers, "HEADERS_S", 0.5)
    monkeypatch.setattr(slow_callers, "MOST_UNREAD_BYTES", 16 * MIB)
    asked = axon.low_frequency(engine)
    large = {"simulation_input": asked} if entry.server else as_shadow(asked)
    body, before = json.dumps(large).encode(), resident()
    with ExitStack() as opened:
        for _ in range(40):
            caller = opened.enter_context(socket.socket())
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect((HERE, entry.port))
            signed = axon.signed(entry.server, uuid=uuid.uuid4().hex) if entry.server else {}
            caller.sendall(entry.raw(signed, body))
        lost = exchange(entry.port, entry.honest(engine)) != 200
        grown = resident() - before
    count(DRIP, cases=40, answers_lost=int(lost))
    assert not lost
    assert grown < 128 * MIB


class Held:
    """The engine, which answers nobody until it is let."""

    def __init__(self, engine):
        self._engine, self.now, self.assets = engine, engine.now, engine.assets
        self.release = threading.Event()

    def answer(self, request, *, origin=None):
        assert self.release.wait(60)
        return self._engine.answer(request, origin=origin)


def test_beyond_its_bound_the_queue_refuses_the_lowest_stake_clearly(here, engine, size):
    """Beyond the queue's bound callers are refused clearly, the lowest stake first."""
    room, beyond, rich = ANSWER_THREADS + MOST_WAITING, size(40, 200), 20
    held = Held(engine)
    crowd = [
        axon.prompt(engine, 1 + number // 300, num_simulations=1 + number % 300)
        for number in range(room + beyond)
    ]
    wealthy = [axon.prompt(engine, 30, num_simulations=1 + number) for number in range(rich)]
    with axon.listening(here, held) as (server, desk), ThreadPoolExecutor(2) as callers:
        poor = callers.submit(lambda: asyncio.run(ask_axon(server, crowd, "second")))
        wait_for(lambda: len(desk.told) >= beyond)
        preferred = callers.submit(lambda: asyncio.run(ask_axon(server, wealthy)))
        wait_for(lambda: len(desk.told) >= beyond + rich)
        waiting = desk.load().waiting
        held.release.set()
        refused = [answer for answer in poor.result() if answer[0] != 200]
        answered = preferred.result()
    lost = sum(status != 200 for status, _, _ in answered)
    count(QUEUE, cases=len(crowd) + rich, answers_lost=lost)
    assert waiting == MOST_WAITING
    assert lost == 0
    assert len(refused) == beyond + rich
    assert {status for status, _, _ in refused} == {503}
    assert all(json.loads(body)["message"].endswith(".") for _, body, _ in refused)


# ---------------------------------------------------------------- replays and forgeries


REPLAYED = "401 this request was answered before; sign a new one."
FORGED = "401 the signature does not fit this request, its sender and this miner."
DEADLINE_S = 50  # of an hour's prompt; a day's has longer


def overheard(entry, headers):
    """What somebody on the line makes of an answered request: the same again, and a forgery."""
    again = {**headers, "connection": "keep-alive"}
    forgery = {**again, "bt_header_dendrite_signature": f"0x{'11' * 64}"}
    return json.dumps([entry.raw(again).decode(), entry.raw(forgery).decode()])


def test_an_honest_caller_is_answered_under_a_flood_of_replays_and_forgeries(here, engine, size):
    """An honest caller is answered while one process replays and forges at full speed.

    What is replayed is what was answered last, so every copy passes for fresh; every
    honest prompt is another one, and computed.
    """
    with axon.listening(here, engine) as (server, desk):
        entry = Entry(server.port, "/Simulation", {}, b"", server)
        before, until = None, time.monotonic() + size(4, 60)
        command = [sys.executable, str(FLOOD), HERE, str(server.port)]
        attacker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        honest: list[int | None] = []
        late = 0
        with attacker:
            assert attacker.stdin
            assert attacker.stdout
            while time.monotonic() < until:
                kind = axon.prompt if len(honest) % 2 else axon.low_frequency
                asked = kind(engine) | {"num_simulations": 1000 - len(honest) // 2 % 999}
                entry.body = json.dumps({"simulation_input": asked}).encode()
                headers = axon.signed(server, uuid=uuid.uuid4().hex)
                began = time.monotonic()
                honest.append(exchange(server.port, entry.raw(headers)))
                late += time.monotonic() - began > DEADLINE_S
                attacker.stdin.write(f"{overheard(entry, headers)}\n")
                before = before or needed()
            attacker.stdin.close()
            told = json.loads(attacker.stdout.read())
    lost = sum(status != 200 for status in honest) + late
    count(FLOODED, cases=sum(told.values()), answers_lost=lost)
    assert len(honest) > 3
    assert lost == 0
    outcomes = [record.outcome for record in desk.told if record.outcome in ANSWERED]
    assert outcomes == [Outcome.COMPUTED] * len(honest)
    assert set(told) == {REPLAYED, FORGED}
    assert min(told.values()) > sum(told.values()) / 4
    assert needed() - before < CACHE_BYTES + 48 * MIB
