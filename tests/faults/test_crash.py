"""Killed at any moment: what was acknowledged is there, and nothing half-written is seen."""

import os
import random

import numpy as np
import pytest

from bar_store import BarStore
from config import DAY_S, Frequency
from errors import ModelError
from forecast_engine import STATE_KIND, STATE_SCHEMA
from ledger import LEDGER_FILE, Ledger
from lgbm_predictor import load_model_set
from model_store import published_sets
from settings import Settings
from state_store import StateStore, locked
from tests.faults import victims
from tests.faults.tally import count

HF, LF = Frequency.HF, Frequency.LF
WINDOW_DAYS = 12  # of bars that a miner holds; averages stand ten days back
# How often a process is killed at its work, in the slice and in the full run.
KILLS = {
    "append": (15, 80),
    "checkpoint": (4, 50),
    "publish": (8, 50),
    "flush": (6, 40),
    "train": (4, 40),
}


def test_a_full_run_kills_two_hundred_times_and_more():
    """What is promised of a full run is what it does."""
    assert sum(full for name, (_, full) in KILLS.items() if name != "flush") >= 200


def set_aside(root):
    return [path.name for path in root.rglob("*.damaged-*")]


def test_no_acknowledged_bar_is_lost_to_a_kill(tmp_path, size):
    """A bar whose storing was acknowledged is there after a kill, whole, and no other."""
    dice, first = random.Random(1), 0
    for _ in range(size(*KILLS["append"])):
        acknowledged = victims.killed(
            victims.append_bars, tmp_path, first, dice=dice, spread_s=0.05
        )
        stored = BarStore(tmp_path).load_candles("binance", "BTC", 60)
        assert stored is not None
        held = len(stored)
        lost = max(0, acknowledged - held)
        count("Acknowledged bars outlive a kill", cases=1, bars_lost=lost)
        assert lost == 0
        expected = victims.truth(0, held)
        for name in ("open_ts", "open", "high", "low", "close", "volume"):
            np.testing.assert_array_equal(getattr(stored.bars, name), getattr(expected, name))
        assert set_aside(tmp_path) == []
        first = held
    for left in tmp_path.rglob(".*~"):  # half-written, by those that were killed
        os.utime(left, (0, 0))
    BarStore(tmp_path).append("binance", "BTC", victims.truth(first, 1))
    assert not list(tmp_path.rglob(".*~"))
    count("What killed writers left half-written is swept away", cases=1)


@pytest.fixture
def settings(model_dir, tmp_path):
    return Settings(source="archive", model_dir=model_dir, state_dir=tmp_path / "state")


def newest_state(settings):
    """The state that answers go on from; before it lie those of whatever was answered before."""
    document = StateStore(settings.state_dir).load(STATE_KIND, "archive/BTC_hf", STATE_SCHEMA)
    assert document is not None
    return document["states"][-1]


def run_through(archive_dir, settings, *moments):
    """One engine on a window that is never stopped, and saves at the end."""
    first, *later = moments
    source, engine = victims.growing_engine(archive_dir, settings, first, WINDOW_DAYS)
    for moment in later:
        source.moment = moment
        engine.refresh()
    engine.checkpoint()


def test_averages_and_calibration_go_on_exactly_after_a_kill(
    archive, archive_dir, settings, tmp_path, size
):
    """EWMA and calibration after kills are, to the last bit, those of an undisturbed run.

    The bars that they began with have left the window meanwhile, so whoever did not
    go on from the saved state, but rebuilt it, comes out elsewhere.
    """
    dice, kills = random.Random(2), size(*KILLS["checkpoint"])
    began, moment = archive.now() - 4 * DAY_S, archive.now() - 2 * DAY_S
    run_through(archive_dir, settings, began)
    before = newest_state(settings)["controller"]["end_ts"]
    acknowledged = moment
    for _ in range(kills):
        acknowledged = victims.killed(
            victims.checkpoint_states,
            *(archive_dir, settings, WINDOW_DAYS, acknowledged, archive.now()),
            dice=dice,
            spread_s=0.3,
        )
        assert acknowledged <= newest_state(settings)["until"] <= acknowledged + 60
        count("Averages and calibration go on exactly after a kill", cases=1)
    reached = newest_state(settings)
    assert reached["controller"]["end_ts"] > before  # the calibration moved, too
    runs = {
        name: Settings(source="archive", model_dir=settings.model_dir, state_dir=tmp_path / name)
        for name in ("undisturbed", "rebuilt")
    }
    run_through(archive_dir, runs["undisturbed"], began, moment, reached["until"])
    np.testing.assert_equal(reached, newest_state(runs["undisturbed"]))
    run_through(archive_dir, runs["rebuilt"], reached["until"])
    rebuilt = newest_state(runs["rebuilt"])
    assert not np.array_equal(rebuilt["ewma"]["sums"], reached["ewma"]["sums"])
    assert set_aside(tmp_path) == []


def test_a_kill_while_publishing_leaves_a_whole_set_in_use(model_dir, tmp_path, size):
    """After a kill while models are published, the old or the new set is in use, whole."""
    (folder, *_) = published_sets(model_dir, "BTC", HF)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    dice, number = random.Random(3), 0
    for _ in range(size(*KILLS["publish"])):
        acknowledged = victims.killed(
            victims.publish_models, tmp_path, files, number, dice=dice, spread_s=0.05
        )
        sets = published_sets(tmp_path, "BTC", HF)
        number = int(sets[0].name.removeprefix("set-"))
        assert acknowledged <= number <= acknowledged + 1
        for found in sets:
            assert load_model_set(found).complete
        with locked(tmp_path, "training"):  # the killed one's lock fell with it
            count("A set in use is whole after a kill while publishing", cases=1)
        number += 1


def test_no_flushed_answer_is_lost_to_a_kill(tmp_path, size):
    """An answer that the ledger flushed is there after a kill, to be scored."""
    path, dice, first = tmp_path / LEDGER_FILE, random.Random(4), 0
    for _ in range(size(*KILLS["flush"])):
        acknowledged = victims.killed(victims.keep_answers, path, first, dice=dice, spread_s=0.9)
        with Ledger(path) as book:
            waiting = book.pending("BTC", "hf", victims.START + DAY_S * 365, limit=500_000)
            assert len(book.prompts(0)) == len(waiting)
        lost = max(0, acknowledged - len(waiting))
        count("Flushed answers outlive a kill", cases=1, answers_lost=lost)
        assert lost == 0
        assert set_aside(tmp_path) == []
        first = len(waiting)


def test_a_killed_training_changes_nothing_and_the_next_one_runs(
    archive_dir, model_dir, tmp_path, size
):
    """A killed training leaves the models as they were, or the new set whole."""
    dice = random.Random(5)
    whole_s = victims.seconds_at_work(victims.train, archive_dir, tmp_path)
    (first, *_) = published_sets(tmp_path, "BTC", LF)
    for _ in range(size(*KILLS["train"])):
        victims.killed(victims.train, archive_dir, tmp_path, dice=dice, spread_s=whole_s)
        try:
            sets = published_sets(tmp_path, "BTC", LF)
        except ModelError as error:  # pragma: no cover - the promise is broken
            pytest.fail(str(error))
        assert sets[0] == first  # the same bars, so the same set, written over itself
        for found in sets:
            assert load_model_set(found).complete
        with locked(tmp_path, "training"):  # the killed one's lock fell with it
            count("A killed training leaves whole models and no lock", cases=1)
    victims.ended(victims.train, archive_dir, tmp_path)
    (latest, *_) = published_sets(tmp_path, "BTC", LF)
    assert load_model_set(latest).complete
