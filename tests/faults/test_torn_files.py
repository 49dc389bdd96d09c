"""Torn and rotten files: found, set aside or replaced, and an answer whatever was damaged."""

import errno
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bar_cleaning import SetAsideBar
from bar_store import BarStore
from config import DAY_S, Frequency
from errors import ModelError, StateError
from forecast_engine import STATE_KIND, STATE_SCHEMA, ForecastEngine
from ledger import LEDGER_FILE, Ledger
from lgbm_predictor import load_model_set
from market_view import Rung
from model_store import POINTER, publish_set, published_sets
from quarantine import Quarantine
from settings import Settings
from state_store import StateStore, locked
from tests.faults import victims
from tests.faults.asking import ask
from tests.faults.tally import count

HF = Frequency.HF
BLOCK = 4096
HEADER = 100  # bytes of an SQLite file's header


def torn(sound, dice, n):
    """The content cut at every block and at random bytes."""
    cuts = {*range(0, len(sound), BLOCK), *(dice.randrange(len(sound)) for _ in range(n))}
    return [sound[:cut] for cut in sorted(cuts)]


def rotten(sound, dice, n):
    """The content with one bit of a random byte flipped, or a block zeroed."""
    found = []
    for _ in range(n):
        damaged = bytearray(sound)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        found.append(bytes(damaged))
    for start in range(0, len(sound), BLOCK):
        damaged = bytearray(sound)
        end = min(start + BLOCK, len(damaged))
        damaged[start:end] = bytes(end - start)
        found.append(bytes(damaged))
    return [damaged for damaged in found if damaged != sound]


def clear(folder):
    for path in folder.glob("*.damaged-*"):
        path.unlink()


# ---------------------------------------------------------------- bars and states


def test_a_torn_or_rotten_day_of_bars_is_set_aside_and_asked_for_anew(tmp_path, size):
    """A damaged day of bars is never read as bars; it is kept aside and fetched again."""
    dice, store = random.Random(1), BarStore(tmp_path)
    span = (victims.START, victims.START + DAY_S)
    store.append("binance", "BTC", victims.truth(0, 2880), checked=span)
    path = min(tmp_path.rglob("*.msgpack"))
    sound, n = path.read_bytes(), size(60, 3000)
    for damaged in [*torn(sound, dice, n), *rotten(sound, dice, n)]:
        path.write_bytes(damaged)
        found = store.load("binance", "BTC", 60)
        assert found is not None
        np.testing.assert_array_equal(found.close, victims.truth(1440, 1440).close)
        (aside,) = path.parent.glob("*.damaged-*")
        assert aside.read_bytes() == damaged
        assert store.missing("binance", "BTC", 60, *span) == [span]
        clear(path.parent)
        count("A torn or rotten day of bars is noticed and asked for anew", cases=1)


@pytest.fixture
def settings(model_dir, tmp_path):
    models = shutil.copytree(model_dir, tmp_path / "models")
    return Settings(source="archive", model_dir=models, state_dir=tmp_path / "state")


def test_a_torn_or_rotten_state_is_rebuilt_from_its_bars(archive, settings, size):
    """A damaged state is set aside and rebuilt: from the same bars the same state and answer."""
    dice, engine = random.Random(2), ForecastEngine.open(archive, settings)
    expected = ask(engine).paths
    engine.checkpoint()
    store = StateStore(settings.state_dir)
    path = store.path("market", "archive/BTC_hf")
    assert store.load(STATE_KIND, "archive/BTC_hf", STATE_SCHEMA) is not None
    sound, n = path.read_bytes(), size(100, 5000)
    cases = [*torn(sound, dice, n), *rotten(sound, dice, n)]
    for damaged in cases:
        path.write_bytes(damaged)
        assert store.load(STATE_KIND, "archive/BTC_hf", STATE_SCHEMA) is None
        clear(path.parent)
    for damaged in dice.sample(cases, size(2, 20)):
        path.write_bytes(damaged)
        again = ForecastEngine.open(archive, settings)
        np.testing.assert_array_equal(ask(again).paths, expected)
        again.checkpoint()
        assert path.read_bytes() == sound
        assert len(list(path.parent.glob("*.damaged-*"))) == 1
        clear(path.parent)
    count(
        "A torn or rotten state is noticed and rebuilt from its bars to the last bit",
        cases=len(cases),
    )


# ---------------------------------------------------------------- models


def files_of(model_dir):
    (folder, *_) = published_sets(model_dir, "BTC", HF)
    return folder, sorted(folder.iterdir())


def test_a_torn_or_rotten_model_file_is_refused(settings, size):
    """A model set with any damaged byte is refused in one sentence."""
    dice, n = random.Random(3), size(15, 400)
    folder, files = files_of(settings.model_dir)
    for path in files:
        sound = path.read_bytes()
        cases = [*torn(sound, dice, n), *rotten(sound, dice, n)]
        for damaged in cases:
            path.write_bytes(damaged)
            with pytest.raises(ModelError) as error:
                load_model_set(folder)
            assert "\n" not in str(error.value)
            count("A model set with any damaged byte is refused", cases=1)
        path.write_bytes(sound)
    assert load_model_set(folder).complete


def test_whatever_file_of_the_models_is_damaged_the_prompt_is_answered(archive, settings, size):
    """With any file of the models damaged the answer is valid, and its rung says so."""
    dice = random.Random(4)
    folder, files = files_of(settings.model_dir)
    pointer = folder.parent / POINTER
    for path in [pointer, *files]:
        sound = path.read_bytes()
        damages = [b"", sound[: len(sound) // 2], *rotten(sound, dice, 3)]
        for damaged in damages[: size(2, 8)]:
            path.write_bytes(damaged)
            lost = 0
            try:
                rung = ask(ForecastEngine.open(archive, settings)).diagnostics.rung
            except Exception:
                lost = 1
                raise
            finally:
                count("With a damaged model file prompts are answered", 1, answers_lost=lost)
            if path != pointer:
                assert rung != Rung.LIGHTGBM
        path.write_bytes(sound)
    assert ask(ForecastEngine.open(archive, settings)).diagnostics.rung == Rung.LIGHTGBM


def test_a_torn_or_rotten_pointer_never_leads_out_and_is_repaired_by_publishing(tmp_path, size):
    """A damaged pointer names a set of the folder, none, or is refused; publishing repairs it."""
    dice, n = random.Random(5), size(100, 3000)
    publish_set(tmp_path, "BTC", HF, "one", {"a.txt": b"1"})
    publish_set(tmp_path, "BTC", HF, "two", {"a.txt": b"2"})
    pointer = tmp_path / "BTC_hf" / POINTER
    sound = pointer.read_bytes()
    for damaged in [*torn(sound, dice, n), *rotten(sound, dice, n)]:
        pointer.write_bytes(damaged)
        try:
            sets = published_sets(tmp_path, "BTC", HF)
        except ModelError as error:
            sets = ()
            sentence = str(error)
            assert "damaged" in sentence
        assert all(found.resolve().parent == pointer.parent.resolve() for found in sets)
        count("A damaged pointer never leads out of its folder", cases=1)
    publish_set(tmp_path, "BTC", HF, "three", {"a.txt": b"3"})
    assert published_sets(tmp_path, "BTC", HF)[0].name == "three"


@contextmanager
def unreadable(file):
    """The disk gives nothing of the file."""
    read = Path.read_bytes

    def refusing(path):
        if path == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", refusing)
        yield


def test_a_disk_that_reads_nothing_costs_no_answer_and_no_file(archive, settings):
    """Whichever file of models or state cannot be read: answered, and nothing is set aside."""
    engine = ForecastEngine.open(archive, settings)
    expected = ask(engine).paths
    engine.checkpoint()
    roots = (settings.model_dir, settings.state_dir)
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.is_file()]
    held = {path: path.read_bytes() for path in files}
    for refused in files:
        with unreadable(refused):
            lost = 1
            try:
                ask(ForecastEngine.open(archive, settings))
                lost = 0
            finally:
                count("A file that cannot be read costs no answer and stays", 1, answers_lost=lost)
    assert {path: path.read_bytes() for path in files} == held
    np.testing.assert_array_equal(ask(ForecastEngine.open(archive, settings)).paths, expected)


def test_a_day_of_bars_that_cannot_be_read_is_kept_and_read_later(tmp_path):
    """An I/O error sets no bars aside: they are back as soon as the disk is."""
    store = BarStore(tmp_path)
    store.append("hyperliquid", "XAU", victims.truth(0, 4320))
    days = sorted(tmp_path.rglob("*.msgpack"))
    for refused in days:
        with unreadable(refused):
            left = store.load("hyperliquid", "XAU", 60)
            assert left is not None
            assert len(left) == 4320 - 1440
        whole = store.load("hyperliquid", "XAU", 60)
        lost = 4320 - (0 if whole is None else len(whole))
        count("A day of bars that cannot be read is kept and read later", 1, bars_lost=lost)
        assert lost == 0
    assert sorted(tmp_path.rglob("*.msgpack*")) == days


def test_a_torn_or_rotten_quarantine_stops_no_refusal(tmp_path, size):
    """Whatever is damaged in the list of refused bars, the next one is noted."""
    dice, n = random.Random(7), size(60, 2000)
    rows = [SetAsideBar(ts=60 * number, close=1.0, reason="spike") for number in range(20)]
    about = "binance:BTCUSDT", "BTC", 60
    Quarantine(tmp_path).add(*about, rows, 1e9)
    path = Quarantine(tmp_path).path(*about)
    sound = path.read_bytes()
    for damaged in [*torn(sound, dice, n), *rotten(sound, dice, n)]:
        path.write_bytes(damaged)
        late = [SetAsideBar(ts=6000, close=1.0, reason="spike")]
        assert Quarantine(tmp_path).add(*about, late, 1e9) == 1
        count("A torn or rotten list of refused bars stops nothing", cases=1)


# ---------------------------------------------------------------- the ledger


JOURNALS = ("", "-wal", "-shm")  # what follows the ledger's name


def fill(book):
    for number in range(12):
        book.keep(*victims.ledger_entry(number))
    book.flush()
    pending = book.pending("BTC", "hf", victims.START + 9 * DAY_S, 100)
    for answer in pending[:4]:
        card = answer.sketch.score(np.full(61, 98_000.0), victims.HOUR)
        book.save_scores([(answer, card, 510.0)], victims.START)


@pytest.fixture(scope="module")
def sound_ledger(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / LEDGER_FILE
    with Ledger(path) as book:
        fill(book)
    return path.read_bytes()


@pytest.fixture(scope="module")
def killed_ledger(tmp_path_factory):
    """The ledger's file and its journals, as a kill leaves them: all that is new is in one."""
    path = tmp_path_factory.mktemp("killed") / LEDGER_FILE
    with Ledger(path) as book:
        fill(book)
        return {end: path.with_name(path.name + end).read_bytes() for end in JOURNALS}


def assert_takes_records(path):
    """No call raises, and soon it takes records again."""
    with Ledger(path) as book:
        ended_by = victims.START + 9 * DAY_S
        for asset, frequency in book.pending_pairs(ended_by):
            book.pending(asset, frequency, ended_by, 100)
        list(book.scored(0))
        book.prompts(0)
        book.prune(ended_by)
        for later in (100, 101):
            book.keep(*victims.ledger_entry(later))
            book.flush()
        assert any(row["start_ts"] == victims.START + 60 * 101 for row in book.prompts(0))


def test_a_torn_or_rotten_ledger_never_raises_and_takes_new_records(tmp_path, sound_ledger, size):
    """Whatever is damaged in the ledger, no call raises, and soon it takes records again."""
    dice, n = random.Random(6), size(60, 2000)
    cases = [*torn(sound_ledger, dice, n), *rotten(sound_ledger, dice, n)]
    for byte in range(HEADER):
        damaged = bytearray(sound_ledger)
        damaged[byte] ^= 1 << dice.randrange(8)
        cases.append(bytes(damaged))
    for number, damaged in enumerate(cases):
        path = tmp_path / str(number) / LEDGER_FILE
        path.parent.mkdir()
        path.write_bytes(damaged)
        assert_takes_records(path)
        shutil.rmtree(path.parent)
        count("A torn or rotten ledger stops nothing", cases=1)


@pytest.mark.parametrize("struck", JOURNALS, ids=["file", "wal", "shm"])
def test_a_ledger_torn_by_a_kill_never_raises_and_takes_new_records(
    tmp_path, killed_ledger, struck, size
):
    """The journals that a kill leaves, torn or rotten, stop nothing either."""
    dice, n = random.Random(9), size(20, 500)
    sound = killed_ledger[struck]
    for number, damaged in enumerate([*torn(sound, dice, n), *rotten(sound, dice, n)]):
        path = tmp_path / str(number) / LEDGER_FILE
        path.parent.mkdir()
        for end, content in {**killed_ledger, struck: damaged}.items():
            path.with_name(path.name + end).write_bytes(content)
        assert_takes_records(path)
        shutil.rmtree(path.parent)
        count("A torn or rotten ledger stops nothing", cases=1)


# ---------------------------------------------------------------- locks


@pytest.mark.parametrize("content", [b"", b"99999\n", bytes(5000)])
def test_a_stale_lock_file_stops_nothing(tmp_path, content):
    """A lock file that a dead process left, whatever it holds, stops nobody."""
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path, "training"):
        count("A stale lock file stops nobody", cases=1)


def test_a_folder_in_the_place_of_a_lock_is_one_sentence(tmp_path):
    """What cannot be locked says so and names a remedy."""
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StateError, match="cannot be locked"), locked(tmp_path, "training"):
        pass
