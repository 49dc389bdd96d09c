"""Full, failing and read-only disks: one clear sentence, nothing lost, and it goes on after."""

import errno
import os
import shutil
import threading
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from bar_cleaning import SetAsideBar
from bar_store import BarStore
from config import DAY_S, Frequency
from errors import StateError
from forecast_engine import ForecastEngine
from ledger import LEDGER_FILE, Ledger
from model_store import publish_set, published_sets, roll_back
from quarantine import Quarantine, _read_keys
from settings import Settings
from state_store import StateStore
from tests.faults import victims
from tests.faults.asking import ask
from tests.faults.disk import REFUSALS, filled, read_only, refusing, resize, small_disk
from tests.faults.live_world import Hand, live_settings, live_world, served, walk
from tests.faults.tally import count
from tests.waiting import PATIENCE_S

HF = Frequency.HF
T0 = 1_764_590_400  # 2025-12-01 12:00 UTC
MOST_CALLS = 200
ONE_SENTENCE = "A refused write is one sentence and leaves the old or the new file"


def bars_of(root):
    stored = BarStore(root).load("binance", "BTC", 60)
    return 0 if stored is None else len(stored)


class Bars:
    """Appending to a series over midnight."""

    def prepare(self, root):
        BarStore(root).append("binance", "BTC", victims.truth(0, 1430))

    def change(self, root):
        BarStore(root).append("binance", "BTC", victims.truth(1430, 20))

    def look(self, root):
        stored = BarStore(root).load("binance", "BTC", 60)
        assert stored is not None
        true = victims.truth(0, self.after)
        rows = np.searchsorted(true.open_ts, stored.open_ts)
        np.testing.assert_array_equal(stored.open_ts, true.open_ts[rows])
        np.testing.assert_array_equal(stored.close, true.close[rows])
        assert set(true.open_ts[: self.former]) <= set(stored.open_ts)
        return len(stored)

    former = 1430
    after = 1450
    between = (1440,)  # ten bars of either day: what is refused for one stops not the other


class State:
    """Replacing a state."""

    def prepare(self, root):
        StateStore(root).save("market", "archive/BTC_hf", 1, {"n": 0, "x": np.zeros(2000)})

    def change(self, root):
        StateStore(root).save("market", "archive/BTC_hf", 1, {"n": 1, "x": np.zeros(2000)})

    def look(self, root):
        document = StateStore(root).load("market", "archive/BTC_hf", 1)
        assert document is not None
        return document["n"]

    former, after = 0, 1
    between: Collection[int] = ()


class Models:
    """Publishing a set."""

    def prepare(self, root):
        publish_set(root, "BTC", HF, "one", {"a.txt": b"1" * 9000, "b.txt": b"1"})

    def change(self, root):
        publish_set(root, "BTC", HF, "two", {"a.txt": b"2" * 9000, "b.txt": b"2"})

    def look(self, root):
        name = published_sets(root, "BTC", HF)[0].name
        folder = root / "BTC_hf" / name
        assert {path.read_bytes()[:1] for path in folder.iterdir()} == {
            {"one": b"1", "two": b"2"}[name]
        }
        return name

    former, after = "one", "two"
    between: Collection[str] = ()


class RollBack(Models):
    """Going back to the set before."""

    def prepare(self, root):
        super().prepare(root)
        super().change(root)

    def change(self, root):
        roll_back(root, "BTC", HF, leave="two")

    former, after = "two", "one"


class Refused:
    """Noting a refused row."""

    def prepare(self, root):
        self._add(root, 60)

    def change(self, root):
        self._add(root, 120)

    def _add(self, root, ts):
        rows = [SetAsideBar(ts=ts, close=1.0, reason="spike")]
        Quarantine(root).add("binance:BTCUSDT", "BTC", 60, rows, 1e9)

    def look(self, root):
        """How many rows can be read: half a line is none, and spoils no other."""
        return len(_read_keys(Quarantine(root).path("binance:BTCUSDT", "BTC", 60)))

    former, after = 1, 2
    between: Collection[int] = ()


@pytest.mark.parametrize("what", [Bars, State, Models, RollBack, Refused])
@pytest.mark.parametrize("code", REFUSALS, ids=[os.strerror(code) for code in REFUSALS])
def test_every_refused_call_leaves_the_old_or_the_new(tmp_path, what, code):
    """Whichever call the disk refuses, what is stored is the old or the new, and a retry works."""
    work = what()
    for refused in range(MOST_CALLS):
        root = tmp_path / str(refused)
        work.prepare(root)
        sentences = []
        with refusing(code, refused) as disk:
            try:
                work.change(root)
            except StateError as error:
                sentences.append(str(error))
        if not disk.has_refused:
            break
        assert all(os.strerror(code) in text and "\n" not in text for text in sentences)
        found = work.look(root)
        if sentences:
            assert found in {work.former, work.after, *work.between}
        else:  # what returned as if it had stored has stored
            assert found == work.after
        assert not list(root.rglob(".*~"))  # nothing half-written stays
        work.change(root)  # whatever was refused, the same again is safe
        assert work.look(root) == work.after
        count(ONE_SENTENCE, cases=1)
    assert 0 < refused < MOST_CALLS - 1


def settings_below(model_dir, root):
    return Settings(source="archive", model_dir=model_dir, state_dir=root / "state")


@pytest.mark.parametrize("code", REFUSALS, ids=[os.strerror(code) for code in REFUSALS])
def test_a_checkpoint_that_is_refused_costs_no_answer(archive, model_dir, tmp_path, code):
    """While checkpoints fail, every prompt is answered as if they did not."""
    engine = ForecastEngine.open(archive, settings_below(model_dir, tmp_path))
    expected = ask(engine).paths
    for refused in range(MOST_CALLS):
        with refusing(code, refused) as disk:
            try:
                engine.checkpoint()
            except StateError:
                assert disk.has_refused
            np.testing.assert_array_equal(ask(engine).paths, expected)
        count("While checkpoints fail, prompts are answered the same", cases=1)
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        if not disk.has_refused:
            return
    pytest.fail("no end of calls")


def test_a_disk_that_runs_full_takes_nothing_that_was_stored():
    """On a file system that runs full, every acknowledged bar and answer stays readable."""
    with small_disk(256) as root:
        stored, refusal = 0, ""
        while not refusal:
            assert stored < 200 * 700
            try:
                BarStore(root).append("binance", "BTC", victims.truth(stored, 700))
            except StateError as error:
                refusal = str(error)
            else:
                stored += 700
        assert "free some disk space" in refusal
        assert stored
        lost = max(0, stored - bars_of(root))
        count("Acknowledged bars outlive a full disk", cases=1, bars_lost=lost)
        assert lost == 0
        assert not list(root.rglob(".*~"))


def test_the_ledger_on_a_full_disk_goes_on_when_there_is_room():
    """A ledger on a full disk loses records, says how many, keeps the old, and takes up again."""
    with small_disk(384) as root, Ledger(root / LEDGER_FILE) as book:
        kept = 0
        while not book.lost:
            assert kept < 1000
            book.keep(*victims.ledger_entry(kept))
            book.flush()
            kept += 1
        held = len(book.pending("BTC", "hf", victims.START + 9 * DAY_S, 10_000))
        assert held == kept - book.lost
        resize(root, 4096)
        book.keep(*victims.ledger_entry(5000))
        book.flush()
        after = len(book.pending("BTC", "hf", victims.START + 9 * DAY_S, 10_000))
        assert after == held + 1
        count("A ledger on a full disk keeps what it had", cases=1)


@pytest.mark.parametrize("code", REFUSALS, ids=[os.strerror(code) for code in REFUSALS])
def test_a_ledger_whose_calls_are_refused_takes_up_again(tmp_path, code):
    """Whichever call the disk refuses, the ledger keeps what comes once it refuses no more."""
    for refused in range(MOST_CALLS):
        path = tmp_path / str(refused) / LEDGER_FILE
        with refusing(code, refused) as disk:
            book = Ledger(path)
            book.keep(*victims.ledger_entry(0))
            book.flush()
        with book:
            book.keep(*victims.ledger_entry(1))
            book.flush()
            starts = {row["start_ts"] for row in book.prompts(0)}
        assert victims.START + 60 in starts
        if not disk.has_refused:
            assert refused
            return
        count("A ledger whose calls are refused takes up again", cases=1)
    pytest.fail("no end of calls")


def test_a_ledger_whose_own_writes_fail_keeps_what_it_acknowledged(tmp_path):
    """Whichever write SQLite is refused, what was acknowledged stays and the next is kept."""
    first, second, third = (victims.START + 60 * number for number in range(3))
    with victims.victim(victims.keep_answers_beyond_a_limit, tmp_path, 700) as (told, process):
        found = list(victims.said_by(told))
        process.join()
        assert process.exitcode == 0
    lost = 0
    for is_acknowledged, prompts, answers, names in found:
        lost += len(({first, second, third} if is_acknowledged else {first, third}) - prompts)
        assert answers == len(prompts)
        assert names == [LEDGER_FILE]  # nothing was set aside, and no journal stays
    count("A ledger whose own writes fail keeps what it acknowledged", len(found), lost)
    assert lost == 0
    assert len(found) > 10


def test_a_ledger_whose_file_cannot_be_looked_at_takes_up_again(tmp_path):
    """An I/O error as it looks for its file costs records at most, and never its thread."""
    path, exists = tmp_path / LEDGER_FILE, Path.exists

    def refused(file):
        if file == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return exists(file)

    book = Ledger(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "exists", refused)
        book.keep(*victims.ledger_entry(0))
        flush_in_time(book)
    book.keep(*victims.ledger_entry(1))
    flush_in_time(book)
    with book:
        starts = {row["start_ts"] for row in book.prompts(0)}
    assert victims.START + 60 in starts
    count("A ledger whose calls are refused takes up again", cases=1)


def flush_in_time(book):
    """As `flush`, which waits for ever where the writer has died."""
    flushing = threading.Thread(target=book.flush, daemon=True)
    flushing.start()
    flushing.join(PATIENCE_S / 6)
    assert not flushing.is_alive()


def test_a_disk_that_turns_read_only_costs_no_answer(archive, model_dir):
    """On a read-only disk every prompt is answered, and every write is one clear sentence."""
    with small_disk(16_384) as root:
        models = shutil.copytree(model_dir, root / "models")
        engine = ForecastEngine.open(archive, settings_below(models, root))
        expected = ask(engine).paths
        engine.checkpoint()
        BarStore(root).append("binance", "BTC", victims.truth(0, 700))
        with read_only(root):
            engine.refresh()
            np.testing.assert_array_equal(ask(engine).paths, expected)
            reopened = ForecastEngine.open(archive, settings_below(models, root))
            np.testing.assert_array_equal(ask(reopened).paths, expected)
            for write in (
                engine.checkpoint,
                lambda: BarStore(root).append("binance", "BTC", victims.truth(700, 1)),
            ):
                with pytest.raises(StateError) as error:
                    write()
                assert "writable" in str(error.value)
            with Ledger(root / LEDGER_FILE) as book:
                book.keep(*victims.ledger_entry(0))
                book.flush()
                assert book.lost == 1
            lost = max(0, 700 - bars_of(root))
        count("A disk turned read-only costs no answer", cases=2, bars_lost=lost)
        assert lost == 0


@pytest.mark.parametrize("trouble", [filled, read_only])
def test_a_live_miner_on_a_disk_that_refuses_answers_on_and_fetches_after(trouble):
    """It answers from fresh prices, names the disk and no feed, and then lacks no bar."""
    hand, start = Hand(T0), T0 - 26 * 3600
    market = {"BTC": walk(1, 90_000, start, 2 * 1440), "XAU": walk(2, 4000, start, 2 * 1440, 2e-4)}
    with (
        small_disk(16_384) as root,
        served(market, hand) as venues,
        live_world(live_settings(root, venues, tuple(market)), hand, truth=market) as world,
    ):
        world.collector.backfill()
        world.turn(2)
        with trouble(root):
            for _ in range(10):
                world.turn()
            unsaved = world.collector.unsaved()
            assert set(unsaved) == {plan.scored.name for plan in world.plans.values()}
            assert world.collector.failing() == {}
        world.turn()
        assert world.collector.unsaved() == {}
        lost, lacking = world.kept.lost, world.lacking(market, T0 - DAY_S)
        assert world.lies(market) == []
        count(
            "A live miner on a full or read-only disk answers on, and fetches after what it lacks",
            cases=1,
            answers_lost=len(lost),
            bars_lost=len(lacking),
        )
        assert (lost, lacking) == ([], [])


def test_folders_deleted_under_the_process_come_back(archive, model_dir, tmp_path):
    """With its folders deleted while it runs, the miner answers the same and makes them anew."""
    models = shutil.copytree(model_dir, tmp_path / "models")
    engine = ForecastEngine.open(archive, settings_below(models, tmp_path))
    state = tmp_path / "state"
    expected = ask(engine).paths
    engine.checkpoint()
    store = BarStore(state)
    with Ledger(state / LEDGER_FILE) as book:
        store.append("binance", "BTC", victims.truth(0, 10))
        book.keep(*victims.ledger_entry(0))
        book.flush()
        shutil.rmtree(state)
        shutil.rmtree(models)
        engine.refresh()
        np.testing.assert_array_equal(ask(engine).paths, expected)
        engine.checkpoint()
        store.append("binance", "BTC", victims.truth(10, 10))
        assert store.missing("binance", "BTC", 60, victims.START, victims.START + 1200) == [
            (victims.START, victims.START + 600)
        ]
        book.keep(*victims.ledger_entry(1))
        book.flush()
        assert len(book.prompts(0)) == 1
        assert book.lost == 0
    count("Folders deleted under the process come back", cases=2)


def test_a_folder_of_bars_that_cannot_be_listed_costs_no_other_asset_anything(
    tmp_path, monkeypatch
):
    """The others are collected and answered from their newest bars; then it catches up."""
    hand, assets, start = Hand(T0), ("BTC", "ETH", "XAU"), T0 - 26 * 3600
    market = {name: walk(at, 4000, start, 2 * 1440) for at, name in enumerate(assets)}
    scan = os.scandir

    def refused(path="."):
        if str(path).endswith("binance/BTC_60s"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scan(path)

    with (
        served(market, hand) as venues,
        live_world(live_settings(tmp_path, venues, assets), hand) as world,
    ):
        world.collector.backfill()
        world.turn(2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refused)
            for _ in range(10):
                world.turn()
            for asset in ("ETH", "XAU"):
                frequency = world.plans[asset].frequencies[0]
                assert world.engine.history(asset, frequency).anchor_ts == T0 + 600
        world.turn()
        lacking = world.lacking(market, T0 - DAY_S)
        lost = world.kept.lost
        count("A folder of bars that cannot be listed costs no answer and no bar", 1, len(lost))
        assert (lost, lacking) == ([], [])
        assert world.engine.history("BTC", HF).anchor_ts == T0 + 660
