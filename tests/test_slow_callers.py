"""Connections that strangers keep: how long, how many, and how much they leave unread."""

import asyncio
import socket
import threading
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn

import slow_callers
from slow_callers import PatientConnection
from tests.waiting import wait_for

ASK = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
BIG = 32 * 1024 * 1024  # more than a system keeps for a caller that does not read


class Server:
    """A server that answers `/` at once, `/big` with much, `/held` when it is let."""

    def __init__(self):
        self.release = threading.Event()
        self.held = 0
        config = uvicorn.Config(
            self.answer,
            http=PatientConnection,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="critical",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)

    async def answer(self, scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/held":
            self.held += 1
            await asyncio.get_running_loop().run_in_executor(None, self.release.wait, 20)
        body = bytes(BIG) if scope["path"] == "/big" else b"yes"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @property
    def connections(self):
        return list(self.server.server_state.connections)


@contextmanager
def serving():
    held = Server()
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    thread = threading.Thread(target=held.server.run, args=([listener],))
    thread.start()
    wait_for(lambda: held.server.started)
    try:
        yield held, listener.getsockname()
    finally:
        held.release.set()
        held.server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(slow_callers, "MOST_CONNECTIONS", 8)
    with serving() as opened, ExitStack() as callers:
        yield *opened, callers


def caller(server, request=b"", host="127.0.0.1"):
    """A connection from one of this machine's addresses, with something sent."""
    _, address, callers = server
    opened = socket.create_connection(address, timeout=20, source_address=(host, 0))
    callers.enter_context(opened)
    opened.sendall(request)
    return opened


def status(connection):
    """Of a small answer, read whole; 0 if none comes."""
    answer = b""
    try:
        while not answer.endswith(b"yes") and (piece := connection.recv(100_000)):
            answer += piece
    except ConnectionResetError:
        return 0
    return int(answer.split(b" ")[1]) if answer else 0


def at(path):
    return ASK.replace(b" / ", f" {path} ".encode())


def test_who_opens_too_many_connections_closes_his_own_and_nobody_else_s(server):
    """A host of hundreds loses its oldest idle ones; one kept by another host lives on."""
    kept = caller(server, ASK, "127.0.0.2")
    assert status(kept) == 200
    many = [caller(server) for _ in range(20)]
    wait_for(lambda: len(server[0].connections) == slow_callers.MOST_CONNECTIONS)
    assert status(caller(server, ASK, "127.0.0.3")) == 200  # a newcomer is let in
    kept.sendall(ASK)
    assert status(kept) == 200
    assert [status(one) for one in many[:13]] == [0] * 13  # the oldest


def test_a_body_that_drips_is_cut_for_a_newcomer(server):
    for _ in range(slow_callers.MOST_CONNECTIONS):
        caller(server, ASK.replace(b"length: 0", b"length: 9") + b"x")
    assert status(caller(server, ASK, "127.0.0.2")) == 200


def test_while_all_connections_wait_for_answers_newcomers_are_refused_clearly(server):
    """No answer that is being made is given up for a newcomer; he is told to come later."""
    busy = [caller(server, at("/held")) for _ in range(slow_callers.MOST_CONNECTIONS)]
    wait_for(lambda: server[0].held == slow_callers.MOST_CONNECTIONS)
    late = caller(server)
    said = late.recv(10_000)
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in said
    head, _, body = said.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert b"too many connections" in body
    server[0].release.set()
    assert [status(one) for one in busy] == [200] * len(busy)
    assert status(caller(server, ASK)) == 200


@pytest.mark.parametrize("request_", [at("/big"), at("/big") * 3], ids=["one", "pipelined"])
def test_an_answer_that_nobody_reads_is_cut(server, monkeypatch, request_):
    monkeypatch.setattr(slow_callers, "HEADERS_S", 0.1)
    caller(server, request_)
    wait_for(lambda: server[0].connections)
    wait_for(lambda: not server[0].connections)


def test_what_is_unread_in_all_is_bounded_at_the_cost_of_who_reads_least(server, monkeypatch):
    """Of many unread answers of one host the oldest are cut; another host's caller gets his."""
    monkeypatch.setattr(slow_callers, "MOST_UNREAD_BYTES", int(3.5 * BIG))
    for _ in range(7):
        caller(server, at("/big"))

    def unread():
        sizes = [one.transport.get_write_buffer_size() for one in server[0].connections]
        return sum(sizes), len([size for size in sizes if size])

    wait_for(lambda: unread()[1] == 3)
    assert unread()[0] <= slow_callers.MOST_UNREAD_BYTES
    honest = caller(server, at("/big"), "127.0.0.2")
    received = 0
    while received < BIG:
        received += len(honest.recv(1 << 20))
    assert received >= BIG


def test_a_slow_answer_in_the_making_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(slow_callers, "HEADERS_S", 0.05)
    held = caller(server, at("/held"))
    wait_for(lambda: server[0].held)
    again = caller(server)  # hung up on twice in the meantime
    assert status(again) == 0
    server[0].release.set()
    assert status(held) == 200
