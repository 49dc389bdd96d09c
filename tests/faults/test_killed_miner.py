"""The whole miner, killed with all its duties and threads under way, and started again."""

import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from bar_store import BarStore
from clock import SystemClock
from config import DAY_S, Frequency, Venue
from forecast_engine import STATE_KIND, STATE_SCHEMA
from ledger import LEDGER_FILE, Ledger
from loopback_venues import serve_venues
from rehearsed_miner import write_config
from state_store import StateStore
from tests.faults.live_world import Hand, live_settings, live_world, walk
from tests.faults.small_sets import publish_small_set
from tests.faults.tally import count
from tests.test_miner_process import ask, running
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
HELD_DAYS = 9
ALIVE_S = 6.0  # the longest life, after its first answer
# The miner with duties that usually come after a minute or an hour: all are under way.
HASTY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import miner
for name in ("CHECKPOINT_S", "LATER_S", "PRUNE_S", "TRIM_S", "REVIEW_S"):
    assert getattr(miner, name) > 0.3
    setattr(miner, name, 0.3)
miner.main()
"""
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


def on_disk(settings):
    """Open times of bars and the number of records that whoever starts now would find."""
    bars = BarStore(settings.state_dir).load(Venue.BINANCE.value, "BTC", 60)
    file = f"file:{settings.state_dir / LEDGER_FILE}?mode=ro"
    with closing(sqlite3.connect(file, uri=True)) as book:
        (records,) = book.execute("SELECT count(*) FROM prompts").fetchone()
    assert bars is not None
    return set(bars.open_ts.tolist()), records


def checkpoints(settings):
    """The newest moment that a state on the disk stands at."""
    store = StateStore(settings.state_dir)
    documents = [store.load(STATE_KIND, f"venue/BTC_{f.value}", STATE_SCHEMA) for f in Frequency]
    return max(document["states"][-1]["until"] for document in documents if document)


def live_and_die(script, flags, settings, dice):
    """One life: answers from the models until it is killed. What was stored just before."""
    with running(*flags, script=script) as (process, url, _lines):
        wait_for(lambda: ask(url).status_code == 200)
        until = time.monotonic() + dice.uniform(0, ALIVE_S)
        answers: list[httpx.Response] = []
        while time.monotonic() < until:
            answers.append(ask(url, num_paths=1 + len(answers) % 900))
        before = on_disk(settings)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert all(answer.status_code == 200 for answer in answers)
    assert all(answer.json()["model_version"] != "none" for answer in answers)
    return before


def test_a_killed_miner_answers_again_and_lacks_nothing(flags, market, size, tmp_path):
    """kill -9 while it answers, collects, checkpoints, scores and prunes, again and again."""
    settings, command = flags
    script, dice = tmp_path / "hasty.py", random.Random(8)
    script.write_text(HASTY)
    began, (ever, records) = checkpoints(settings), stored(settings, market)
    for _ in range(size(2, 12)):
        bars, noted = live_and_die(script, command, settings, dice)
        assert list(settings.state_dir.rglob("*.damaged-*")) == []
        held, kept = stored(settings, market)
        ever |= bars
        lost = len(ever - held)
        count(PROMISE, cases=1, bars_lost=lost, answers_lost=max(0, noted - kept))
        assert lost == 0
        assert kept >= noted >= records
        records = kept
    assert records  # those of the last half second of a life may be lost
    assert checkpoints(settings) > began
