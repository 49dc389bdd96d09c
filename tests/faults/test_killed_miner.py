"""The whole miner, killed with all its duties and threads under way, and started again."""

import random
import signal
import time

import httpx
import pytest

from clock import SystemClock
from config import DAY_S, Frequency, Venue
from ledger import LEDGER_FILE, Ledger
from loopback_venues import serve_venues
from rehearsed_miner import write_config
from tests.faults.live_world import Hand, live_settings, live_world, walk
from tests.faults.small_sets import publish_small_set
from tests.faults.tally import count
from tests.test_miner_process import ask, running
from tests.waiting import wait_for

HELD_DAYS = 9
ALIVE_S = 6.0  # the longest life, after its first answer
PROMISE = "A killed miner answers again, and lacks no bar and no record that it had stored"


@pytest.fixture(scope="module")
def market():
    now = int(time.time()) // 60 * 60
    return {"BTC": walk(1, 90_000, now - (HELD_DAYS + 1) * DAY_S, (HELD_DAYS + 2) * 1440)}


@pytest.fixture
def flags(market, tmp_path):
    """A miner of loopback venues that has collected nine days and is trained on them."""
    with serve_venues(market, SystemClock()) as venues:
        settings = live_settings(tmp_path, venues, ("BTC",), days=float(HELD_DAYS))
        with live_world(settings, Hand(time.time())) as world:
            world.collector.backfill()
            for frequency in (Frequency.HF, Frequency.LF):
                publish_small_set(settings.model_dir, world.source.load("BTC", frequency).history)
            world.engine.refresh()
            world.engine.checkpoint()
        config = tmp_path / "miner.toml"
        names = ("days", "memory_days", "served_assets", "model_dir", "state_dir", *venues.urls)
        values = {name: getattr(settings, name) for name in names}
        write_config(config, {name: plain(value) for name, value in values.items()})
        yield settings, ("--config", str(config), "--source", "venue")


def plain(value):
    return value if isinstance(value, float | int | list | tuple) else str(value)


def stored(settings, market):
    """Open times of the bars on the disk, none of which is a lie; and the records."""
    with live_world(settings, Hand(time.time())) as world:
        assert world.lies(market) == []
        bars = set(world.stored((Venue.BINANCE.value, "BTC", 60)))
    with Ledger(settings.state_dir / LEDGER_FILE) as book:
        return bars, len(book.prompts(0))


def live_and_die(flags, dice):
    """One life: answers from the models until it is killed."""
    with running(*flags) as (process, url, _lines):
        wait_for(lambda: ask(url).status_code == 200)
        until = time.monotonic() + dice.uniform(0, ALIVE_S)
        answers: list[httpx.Response] = []
        while time.monotonic() < until:
            answers.append(ask(url, num_paths=1 + len(answers) % 900))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert all(answer.status_code == 200 for answer in answers)
    assert all(answer.json()["model_version"] != "none" for answer in answers)


def test_a_killed_miner_answers_again_and_lacks_nothing(flags, market, size):
    """kill -9 while it answers, collects, checkpoints and keeps records, again and again."""
    settings, command = flags
    dice = random.Random(8)
    bars, records = stored(settings, market)
    for _ in range(size(2, 12)):
        live_and_die(command, dice)
        assert list(settings.state_dir.rglob("*.damaged-*")) == []
        held, kept = stored(settings, market)
        lost = len(bars - held)
        count(PROMISE, cases=1, bars_lost=lost, answers_lost=max(0, records - kept))
        assert lost == 0
        assert kept >= records
        bars, records = held, kept
    assert records  # those of the last half second of a life may be lost
