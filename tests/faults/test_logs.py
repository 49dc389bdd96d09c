"""A miner whose log goes nowhere: it answers as before, ends as before, and says so on its page."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.faults.tally import count
from tests.test_miner_process import ROOT
from tests.waiting import PATIENCE_S

PROMISE = "A log that nobody reads, whose reader has ended or whose disk is full costs no answer"
STOP_S = 10
ASKED = 600  # a pipe takes the lines of some 300 prompts
OK = 200


@contextmanager
def unread() -> Iterator[int]:
    """A pipe that nobody reads, as of a terminal that is held still."""
    reading, writing = os.pipe()
    yield writing
    os.close(reading)
    os.close(writing)


@contextmanager
def ended() -> Iterator[int]:
    """A pipe whose reader has ended, as of a process manager that was killed."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def full() -> Iterator[int]:
    """A file on a full disk."""
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


@contextmanager
def miner_that_logs_to(stderr, folder):
    """A miner of a simulated market, and where it serves."""
    folders = ["--state-dir", str(folder / "state"), "--model-dir", str(folder / "models")]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "miner.py"), "--port", "0", "--source", "simulated", *folders],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert process.stdout is not None
    try:
        url = re.search(r"http://\S+", process.stdout.readline())
        assert url
        yield process, url.group()
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()


def is_answered(client, number):
    body = {
        "asset": "BTC",
        "prompt_start_time": None,
        "horizon_seconds": 3600,
        "interval_seconds": 60,
        "num_paths": 1 + number % 50,
    }
    try:
        return client.post("/predict", json=body).status_code == OK
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("goes_to", [unread, ended, full])
def test_a_log_that_goes_nowhere_costs_no_answer(tmp_path, goes_to):
    with goes_to() as stderr, miner_that_logs_to(stderr, tmp_path) as (process, url):
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            lost = sum(not is_answered(client, number) for number in range(ASKED))
            page = client.get("/").text
            health = client.get("/healthz").json()
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_S)
    assert (lost, health["status"], code) == (0, "ok", 0)
    assert ("log not written" in page) == (goes_to is not unread)  # that one holds what it has
    count(PROMISE, cases=ASKED, answers_lost=lost)
