"""The chain as the miner keeps it: cadence, outages, restarts, our own address."""

import logging
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import MappingProxyType
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caller_rules import Neuron
from chain import (
    ChainSnapshot,
    Endpoint,
    StaticChain,
    SyncedChain,
    find_external_ip,
)
from errors import ChainUnavailable, SourceUnavailable
from state_store import StateStore

OURS, VALIDATOR = "5Ours", "5Validator"
HOME = Endpoint("198.51.100.7", 8091)


def neuron(uid, stake=1.5, *, permit=False):
    return Neuron(uid=uid, stake=stake, validator_permit=permit)


def snapshot(block=1, published=HOME, **neurons):
    return ChainSnapshot(
        taken_at=time.time(),
        block=block,
        neurons=MappingProxyType(neurons or {OURS: neuron(7), VALIDATOR: neuron(0, 9e5)}),
        published=published,
    )


class Reader:
    """A chain that says what it is told to, and notes what it is asked."""

    def __init__(self, *says):
        self.says = list(says)
        self.published = []
        self.was_read = threading.Semaphore(0)

    def read(self):
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        self.was_read.release()
        if isinstance(said, Exception):
            raise said
        return said

    def publish(self, endpoint):
        self.published.append(endpoint)


DOWN = ChainUnavailable("the chain cannot be read; going on.")


@pytest.fixture
def store(tmp_path):
    return StateStore(tmp_path)


def synced(reader, store, endpoint=HOME, **cadence):
    return SyncedChain(
        reader,
        own_hotkey=OURS,
        endpoint=lambda: endpoint,
        store=store,
        name="finney_50",
        **cadence,
    )


# ---------------------------------------------------------------- snapshots

neurons = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.builds(neuron, st.integers(0, 4096), st.floats(0, 1e12), permit=st.booleans()),
)


@given(
    found=neurons,
    block=st.integers(0, 2**40),
    published=st.none() | st.builds(Endpoint, st.just("192.0.2.1"), st.integers(1, 65_535)),
)
def test_a_snapshot_survives_the_disk(tmp_path, found, block, published):
    before = ChainSnapshot(
        taken_at=1.5, block=block, neurons=MappingProxyType(found), published=published
    )
    store = StateStore(tmp_path)
    store.save("chain", "x", 1, before.to_dict())
    document = store.load("chain", "x", 1)
    assert document is not None
    assert ChainSnapshot.from_dict(document) == before


def test_a_static_chain_knows_nobody():
    assert dict(StaticChain().snapshot().neurons) == {}


# ---------------------------------------------------------------- keeping in step


def test_before_the_first_reading_nothing_is_known(store):
    chain = synced(Reader(DOWN), store)
    assert (chain.snapshot(), chain.age_s(), chain.fault) == (None, None, None)


def test_a_reading_replaces_the_last_one(store):
    first, second = snapshot(1), snapshot(2)
    chain = synced(Reader(first, second), store)
    for expected in (first, second):
        chain.sync()
        assert chain.snapshot() is expected
    assert 0 <= chain.age_s() < 60


def test_an_outage_leaves_the_last_known_one(store, caplog):
    known = snapshot()
    chain = synced(Reader(known, DOWN), store)
    chain.sync()
    with pytest.raises(ChainUnavailable):
        chain.sync()
    assert chain.snapshot() is known
    for _ in range(3):
        assert chain._attempt() is False
    assert chain.fault == str(DOWN)
    assert caplog.text.count("going on") == 1  # an outage is one line


def test_the_end_of_an_outage_is_one_line(store, caplog):
    caplog.set_level(logging.INFO)
    chain = synced(Reader(DOWN, snapshot()), store)
    assert [chain._attempt() for _ in range(3)] == [False, True, True]
    assert chain.fault is None
    assert caplog.text.count("chain is back") == 1


def test_a_restart_without_a_chain_goes_on_with_the_last_known_one(store):
    known = snapshot(41)
    synced(Reader(known), store).sync()
    restarted = synced(Reader(DOWN), store)
    assert restarted.snapshot() == known
    assert restarted.snapshot().neurons[VALIDATOR].stake == 9e5


def test_a_damaged_memory_is_set_aside(store, tmp_path, caplog):
    synced(Reader(snapshot()), store).sync()
    (path,) = tmp_path.rglob("*.msgpack")
    path.write_bytes(b"\x00" + path.read_bytes()[1:])
    assert synced(Reader(DOWN), store).snapshot() is None
    assert "set aside" in caplog.text


def test_a_full_disk_does_not_keep_a_reading_from_counting(store, tmp_path, caplog):
    (tmp_path / "chain").write_text("in the way")
    chain = synced(Reader(snapshot(published=None)), store)
    chain.sync()
    assert chain.snapshot() is not None
    assert "cannot be written" in caplog.text


def test_a_bug_in_a_reading_is_logged_and_survived(store, caplog):
    chain = synced(Reader(ZeroDivisionError("a bug")), store)
    assert chain._attempt() is False
    assert "a bug" in caplog.text
    assert "fault of the miner" in (chain.fault or "")


# ---------------------------------------------------------------- its health


def test_a_chain_that_was_never_read_has_no_age_and_nobody_is_known_to_be_registered(store):
    chain = synced(Reader(DOWN), store)
    chain._attempt()
    health = chain.health()
    assert (health.age_s, health.uid, health.is_registered) == (None, None, None)
    assert health.fault == str(DOWN)


def test_the_health_of_a_chain_names_our_uid_and_outlives_an_outage(store):
    chain = synced(Reader(snapshot(), DOWN), store)
    chain._attempt()
    assert (chain.health().uid, chain.health().fault) == (7, None)
    chain._attempt()
    health = chain.health()
    assert (health.uid, health.is_registered, health.fault) == (7, True, str(DOWN))
    assert health.age_s is not None


def test_a_hotkey_that_the_chain_does_not_list_is_not_registered(store):
    chain = synced(Reader(snapshot(other=neuron(1))), store)
    chain._attempt()
    assert (chain.health().uid, chain.health().is_registered) == (None, False)


def test_a_publication_that_the_chain_refuses_is_a_fault_of_a_chain_that_is_read(store):
    class Refusing(Reader):
        def publish(self, endpoint):
            raise ChainUnavailable(f"the chain did not take our address {endpoint}.")

    chain = synced(Refusing(snapshot(published=None)), store)
    chain._attempt()
    health = chain.health()
    assert (health.uid, health.fault) == (7, f"the chain did not take our address {HOME}.")
    assert health.age_s is not None


# ---------------------------------------------------------------- our own address


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (HOME, []),
        (None, [HOME]),
        (Endpoint("198.51.100.8", 8091), [HOME]),
        (Endpoint("198.51.100.7", 8092), [HOME]),
    ],
)
def test_our_address_is_published_when_the_chain_shows_another(store, shown, expected):
    reader = Reader(snapshot(published=shown))
    synced(reader, store).sync()
    assert reader.published == expected


def test_an_unregistered_hotkey_publishes_nothing_and_is_told_once(store, caplog):
    reader = Reader(snapshot(published=None, other=neuron(1)))
    chain = synced(reader, store)
    for _ in range(3):
        chain.sync()
    assert reader.published == []
    assert caplog.text.count("is not registered on this subnet") == 1


def test_an_address_that_cannot_be_found_leaves_the_reading(store):
    def lost():
        raise SourceUnavailable("nobody told; name it with --axon.external_ip.")

    reader = Reader(snapshot())
    chain = SyncedChain(reader, own_hotkey=OURS, endpoint=lost, store=store, name="x")
    assert chain._attempt() is False
    assert "--axon.external_ip" in (chain.fault or "")
    assert chain.snapshot() is not None


class Lookup(BaseHTTPRequestHandler):
    ANSWERS: ClassVar = {
        "/good": (200, b"198.51.100.7\n"),
        "/page": (200, b"<html>welcome</html>"),
        "/ipv6": (200, b"2001:db8::1"),
        "/down": (503, b"198.51.100.9"),
        "/long": (200, b"1" * 100_000),
    }

    def do_GET(self):
        status, text = self.ANSWERS[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        pass


@contextmanager
def lookups():
    with HTTPServer(("127.0.0.1", 0), Lookup) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_first_service_that_tells_an_address_is_believed():
    with lookups() as base:
        urls = [f"{base}/{name}" for name in ("down", "page", "ipv6", "long", "good")]
        assert find_external_ip(["http://127.0.0.1:1/", *urls]) == "198.51.100.7"
        with pytest.raises(SourceUnavailable, match=r"none of 2 services .*--axon\.external_ip"):
            find_external_ip(urls[:2])


def test_a_proxy_is_not_asked_for_our_address(monkeypatch):
    with lookups() as base:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("NO_PROXY", "")
        assert find_external_ip([f"{base}/good"]) == "198.51.100.7"


# ---------------------------------------------------------------- on its thread


def test_it_reads_on_its_cadence_until_it_is_stopped(store):
    reader = Reader(DOWN, snapshot())
    chain = synced(reader, store, every_s=0.001, retry_s=0.001)
    chain.start()
    for _ in range(5):
        assert reader.was_read.acquire(timeout=10)
    chain.stop()
    assert not chain._thread.is_alive()
    assert chain.snapshot() is not None


def test_a_chain_that_was_never_started_can_be_stopped(store):
    synced(Reader(DOWN), store).stop()
