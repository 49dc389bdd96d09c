"""The ledger on a real file: kept, scored, pruned, damaged, full, shared."""

import errno
import logging
import os
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import ledger as ledger_module
from answer_sketch import AnswerSketch, SketchScore
from config import DAY_S
from domain import ForecastRequest
from ledger import CACHE_KIB, Ledger
from scoring import ScoreCard
from tests.entries import HOUR, hour_answer, prompt_entry
from tests.waiting import wait_for

START = 1_766_102_700 // 60 * 60


def prompt(start=START, asset="BTC", **changes):
    request = ForecastRequest(
        asset=asset, start_ts=start, increment_s=60, length_s=3600, num_paths=100
    )
    return prompt_entry(request, **changes)


def answer(seed=0):
    return hour_answer(seed, n_paths=100)


def score(total=500.0):
    card = ScoreCard(total=total, by_interval={"1min": total})
    return SketchScore(card=card, covered={"1min": (48, 60)})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.sqlite3"


@pytest.fixture
def book(path):
    with Ledger(path) as opened:
        yield opened


def test_what_the_file_holds_is_not_kept_in_memory_too(book):
    book.prune(START)  # opens it
    assert book._connection is not None
    assert book._connection.execute("PRAGMA cache_size").fetchone()[0] == -CACHE_KIB


def test_what_was_answered_can_be_read_again(book):
    book.keep(prompt())
    book.keep(prompt(outcome="too_late", rung=None, price_age_s=None, reason="3 s are left."))
    book.flush()
    late, first = book.prompts(since=0)
    assert first["asset"] == "BTC"
    assert (first["caller"], first["rung"], first["ms"]) == ("5Validator", "lightgbm", 41.5)
    assert (late["outcome"], late["reason"], late["rung"]) == ("too_late", "3 s are left.", None)
    assert book.prompts(since=START) == []


def test_an_answer_waits_for_its_outcome_and_then_holds_its_scores(book):
    book.keep(prompt(), answer())
    book.flush()
    assert book.pending("BTC", "hf", START + 3599, limit=9) == []
    (waiting,) = book.pending("BTC", "hf", START + 3600, limit=9)
    assert waiting.request == prompt().request
    realised = np.full(61, 98_000.0)
    assert waiting.sketch.score(realised, HOUR).card.total > 0
    book.save_scores([(waiting, score(), 510.0)], now=START + 4000)
    assert book.pending("BTC", "hf", START + DAY_S, limit=9) == []
    (scored,) = list(book.scored(START))
    assert (scored.asset, scored.frequency, scored.rung) == ("BTC", "hf", "lightgbm")
    assert (scored.score, scored.ewma_t) == (500.0, 510.0)
    assert scored.covered == {"1min": (48, 60)}
    assert list(book.scored(START + 1)) == []


def test_what_is_kept_survives_a_restart(path):
    with Ledger(path) as book:
        book.keep(prompt(), answer())
    with Ledger(path) as book:
        assert len(book.prompts(since=0)) == 1
        assert len(book.pending("BTC", "hf", START + DAY_S, limit=9)) == 1


def test_the_first_answer_to_a_prompt_is_the_one_that_counts(book):
    for seed in (1, 2):
        book.keep(prompt(), answer(seed))
    book.flush()
    (waiting,) = book.pending("BTC", "hf", START + DAY_S, limit=9)
    realised = np.linspace(98_000, 98_100, 61)
    first = AnswerSketch.of(answer(1).paths, HOUR, increment_s=60)
    expected = first.score(realised, HOUR).card.total
    assert waiting.sketch.score(realised, HOUR).card.total == pytest.approx(expected, rel=1e-3)


def test_the_earliest_come_first_and_no_more_than_asked_for(book):
    for number in (2, 0, 1):
        book.keep(prompt(START + 60 * number), answer())
    book.flush()
    starts = [entry.request.start_ts for entry in book.pending("BTC", "hf", START + DAY_S, limit=2)]
    assert starts == [START, START + 60]


def test_pairs_that_wait_are_named(book):
    for asset in ("ETH", "BTC"):
        for number in range(2):
            book.keep(prompt(START + 60 * number, asset=asset), answer())
    book.flush()
    assert book.pending_pairs(START + 3599) == []
    assert book.pending_pairs(START + 3600) == [("BTC", "hf"), ("ETH", "hf")]


def test_an_answer_given_up_is_neither_pending_nor_scored(book):
    book.keep(prompt(), answer())
    book.flush()
    book.give_up(book.pending("BTC", "hf", START + DAY_S, limit=9), now=START + DAY_S)
    assert book.pending("BTC", "hf", START + DAY_S, limit=9) == []
    assert list(book.scored(0)) == []


def test_old_records_are_pruned(book):
    month = ledger_module.KEPT_DAYS * DAY_S
    for start in (START, START + DAY_S):
        book.keep(prompt(start), answer())
    book.flush()
    book.prune(START + month + DAY_S / 2)
    (kept,) = book.prompts(since=0)
    assert kept["start_ts"] == START + DAY_S
    assert len(book.pending("BTC", "hf", START + 9 * DAY_S, limit=9)) == 1


def test_too_many_records_are_pruned_and_sketches_sooner(path, monkeypatch):
    bounds = [
        (statement, most)
        for (statement, _), most in zip(ledger_module._BOUNDS, (4, 5, 2), strict=True)
    ]
    monkeypatch.setattr(ledger_module, "_BOUNDS", bounds)
    with Ledger(path) as book:
        for number in range(7):
            book.keep(prompt(START + 60 * number), answer())
        book.flush()
        book.prune(START)
        kept = [row["start_ts"] for row in book.prompts(since=0)]
        assert kept == [START + 60 * number for number in (6, 5, 4, 3)]
        waiting = [
            entry.request.start_ts for entry in book.pending("BTC", "hf", START + DAY_S, limit=9)
        ]
        assert waiting == [START + 120, START + 180]  # the oldest of the answers that are kept
    with sqlite3.connect(path) as reader:
        assert reader.execute("SELECT COUNT(*) FROM answers").fetchone() == (5,)
    reader.close()


def test_with_more_answers_than_may_wait_some_still_come_to_their_outcome(path, monkeypatch):
    """An hour is thirty answers long here, and twenty may wait."""
    monkeypatch.setattr(ledger_module, "_BOUNDS", [(ledger_module._BOUNDS[2][0], 20)])
    matured = set()
    with Ledger(path) as book:
        for number in range(120):
            start = START + 120 * number
            book.keep(prompt(start), answer())
            book.flush()
            book.prune(START)
            due = book.pending("BTC", "hf", start, limit=99)
            matured |= {entry.request.start_ts for entry in due}
            book.give_up(due, start)
    assert len(matured) > 40


def test_the_file_stays_small_when_answers_come_and_go(path):
    with Ledger(path) as book:
        sizes = []
        for number in range(4):
            for minute in range(40):
                book.keep(prompt(START + 60 * (40 * number + minute)), answer())
            book.flush()
            book.save_scores(
                (
                    (entry, score(), 1.0)
                    for entry in book.pending("BTC", "hf", START + DAY_S, limit=99)
                ),
                START,
            )
            with sqlite3.connect(path) as reader:
                reader.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            reader.close()
            sizes.append(path.stat().st_size)
    assert sizes[-1] < 1.5 * sizes[0]


# ---------------------------------------------------------------- things that go wrong


@pytest.mark.parametrize(
    "content", [b"this is no database, " * 500, b"SQLite format 3\0" + b"x" * 9000]
)
def test_a_damaged_file_is_set_aside_and_begun_anew(path, content, caplog):
    path.parent.mkdir()
    path.write_bytes(content)
    with Ledger(path) as book:
        book.keep(prompt())
        book.flush()
        assert len(book.prompts(since=0)) == 1
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.read_bytes() == content
    assert "set aside as" in caplog.text


def test_a_file_of_a_later_version_is_set_aside(path, caplog):
    Ledger(path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with Ledger(path) as book:
        assert book.prompts(since=0) == []
    assert "schema 99" in caplog.text
    assert list(path.parent.glob("*.damaged-*"))


def test_a_file_damaged_while_it_is_open_costs_records_and_no_more(path):
    with Ledger(path) as book:
        for number in range(50):
            book.keep(prompt(START + 60 * number), answer())
        book.flush()
        book._disconnect()  # so that nothing is read from memory
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)
        path.write_bytes(data)
        book.keep(prompt())
        book.flush()
        book.prompts(since=0)
        book.keep(prompt())
        book.flush()
        assert book.prompts(since=0)


def test_a_file_that_vanishes_is_made_again(path, book):
    book.keep(prompt())
    book.flush()
    for part in path.parent.iterdir():
        part.unlink()
    book.keep(prompt(START + 60))
    book.flush()
    assert [row["start_ts"] for row in book.prompts(since=0)] == [START + 60]


def test_a_place_that_cannot_be_written_costs_records_and_is_said_once(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING), Ledger(blocked / "ledger.sqlite3") as book:
        for _ in range(3):
            book.keep(prompt(), answer())
            book.flush()
        assert book.prompts(since=0) == []
        assert book.pending("BTC", "hf", START + DAY_S, limit=9) == []
        assert list(book.scored(0)) == []
        assert book.lost == 3
        book.prune(START)
    assert len(caplog.records) == 1
    assert "answers go on without it" in caplog.text


def test_a_record_never_waits_for_the_disk(path, caplog):
    with Ledger(path) as book:
        with book._lock:  # the disk hangs
            for _ in range(3 * ledger_module.QUEUE_SIZE):
                book.keep(prompt())
        book.flush()
        assert book.lost >= ledger_module.QUEUE_SIZE
        assert len(book.prompts(since=0)) + book.lost == 3 * ledger_module.QUEUE_SIZE
    assert "queue is full" in caplog.text


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_that_refuses_to_say_whether_the_file_is_there_costs_what_came_meanwhile(
    path, number, monkeypatch
):
    look = Path.stat

    def refused(at, **options):
        if at == path:
            raise OSError(number, os.strerror(number), str(at))
        return look(at, **options)

    with Ledger(path) as book:
        book.keep(prompt())
        book.flush()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", refused)
            book.keep(prompt(START + 60))
            book.flush()
            assert book.lost == 1
            Ledger(path).close()
        book.keep(prompt(START + 120))
        book.flush()
        kept = [row["start_ts"] for row in book.prompts(since=0)]
        assert (kept, book.lost) == ([START + 120, START], 1)


def test_a_disk_that_hangs_keeps_nobody_from_ending_and_its_records_are_counted(
    path, monkeypatch, caplog
):
    monkeypatch.setattr(ledger_module, "PATIENCE_S", 0.3)
    book, size = Ledger(path), ledger_module.QUEUE_SIZE
    with book._lock:
        book.keep(prompt())
        wait_for(book._queue.empty)  # the writer holds it
        time.sleep(2 * ledger_module.BATCH_S)  # and gathers no more
        for _ in range(size):
            book.keep(prompt())
        book.flush()
        book.close()
        assert book.lost == size
    assert "did not answer" in caplog.text


def test_a_fault_of_the_writing_itself_does_not_stop_the_thread(book, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "_INSERT_PROMPT", None)
        book.keep(prompt())
        book.flush()
    book.keep(prompt(START + 60))
    book.flush()
    assert [row["start_ts"] for row in book.prompts(since=0)] == [START + 60]
    assert book.lost == 1
    assert "entries lost" in caplog.text


def test_an_entry_that_cannot_be_digested_does_not_stop_the_thread(book, caplog):
    broken = answer()
    object.__setattr__(broken, "paths", np.zeros(3))
    book.keep(prompt(), broken)
    book.flush()
    book.keep(prompt(START + 60))
    book.flush()
    assert [row["start_ts"] for row in book.prompts(since=0)] == [START + 60]
    assert "entries lost" in caplog.text


def test_a_sketch_that_cannot_be_read_is_left_out(path, book, caplog):
    for number in range(2):
        book.keep(prompt(START + 60 * number), answer())
    book.flush()
    with sqlite3.connect(path) as other:
        other.execute("UPDATE answers SET sketch = x'00' WHERE start_ts = ?", (START,))
    other.close()
    for _ in range(2):
        (waiting,) = book.pending("BTC", "hf", START + DAY_S, limit=9)
        assert waiting.request.start_ts == START + 60
    assert caplog.text.count("cannot be read") == 1


def test_two_miners_may_write_the_same_file(path):
    with Ledger(path) as one, Ledger(path) as other:

        def write(book, begin):
            for number in range(20):
                book.keep(prompt(begin + 60 * number), answer())
            book.flush()

        threads = [
            threading.Thread(target=write, args=(one, START)),
            threading.Thread(target=write, args=(other, START + 60_000)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(one.prompts(since=0)) == 40
        assert one.lost == other.lost == 0


@pytest.mark.parametrize(
    ("sound", "rotten"), [(b'{"1min"', b'["1min"'), (b'{"1min"', b'{"1\xffmin')]
)
def test_scores_that_rotted_are_left_out_and_the_rest_is_read(path, sound, rotten, caplog):
    with Ledger(path) as book:
        for start in (START, START + 60):
            book.keep(prompt(start), answer())
        book.flush()
        for waiting in book.pending("BTC", "hf", START + DAY_S, limit=9):
            book.save_scores([(waiting, score(), 510.0)], now=START + 4000)
    content = path.read_bytes()
    path.write_bytes(content.replace(sound, rotten[: len(sound)], 1))
    with Ledger(path) as book:
        assert len(list(book.scored(START))) == 1
        assert len(book.prompts(0)) == 2
    assert "left out" in caplog.text


@pytest.mark.parametrize("byte", [18, 47])
def test_a_header_that_rotted_is_set_aside_and_the_ledger_goes_on(path, byte):
    with Ledger(path) as book:
        book.keep(prompt())
        book.flush()
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x80
    path.write_bytes(content)
    with Ledger(path) as book:
        for start in (START, START + 60):
            book.keep(prompt(start))
            book.flush()
        assert book.prompts(0)
    assert len(list(path.parent.glob("*.damaged-*[0-9]Z"))) == 1


def test_a_column_whose_name_rotted_is_set_aside_and_the_ledger_goes_on(path):
    with Ledger(path) as book:
        book.keep(prompt())
        book.flush()
    content = path.read_bytes()
    assert b"reason TEXT" in content
    path.write_bytes(content.replace(b"reason TEXT", b"\xa0eason TEXT"))
    with Ledger(path) as book:
        assert book.prompts(0) == []
        for start in (START, START + 60):
            book.keep(prompt(start))
            book.flush()
        assert book.prompts(0)
    assert len(list(path.parent.glob("*.damaged-*[0-9]Z"))) == 1


@pytest.mark.parametrize("column", ["start_ts", "increment_s", "frequency"])
def test_an_answer_whose_request_rotted_is_given_up_and_the_rest_is_read(path, column):
    with Ledger(path) as book:
        for start in (START, START + 60):
            book.keep(prompt(start), answer())
        book.flush()
        with closing(sqlite3.connect(path)) as opened:
            rot = f"UPDATE answers SET {column} = x'a0' WHERE id = 1"  # noqa: S608  # our names
            opened.execute(rot)
            opened.commit()
        ended_by = START + DAY_S
        (pair,) = book.pending_pairs(ended_by)
        found = [entry for _ in range(2) for entry in book.pending(*pair, ended_by, limit=9)]
    assert {entry.request.start_ts for entry in found} == {START + 60}
