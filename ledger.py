"""What was answered, and how it came out: one small SQLite file.

`prompts` has a row for every request that reached the engine's door; `answers`
one for every distinct live answer, with a sketch of its distribution until the
horizon has passed and its scores after. Nobody waits for the disk: `keep` puts
into a bounded queue, and a thread writes in batches. A file that is damaged is
set aside under another name and begun anew; one that cannot be written costs
records, never an answer, and one whose disk hangs keeps nobody from ending. Age and
count bound its size.

With the official cadence of prompts for 13 assets it grows to some 280 MB in a month,
and no further: 70 MB are sketches that wait for their day to pass, the rest are scores.
"""

import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self, TypeVar

from answer_sketch import AnswerSketch, SketchScore
from config import DAY_S, Frequency
from domain import FloatArray, ForecastRequest
from errors import DataError, RequestError
from protocol import Competition

LEDGER_FILE: Final = "ledger.sqlite3"  # in the state folder
SCHEMA: Final = 1
KEPT_DAYS: Final = 30.0
PAGE_ROWS: Final = 500  # that are read at once
MOST_PROMPTS: Final = 300_000  # 11 days of five validators
MOST_ANSWERS: Final = 200_000  # more than 30 days of 13 assets; 1 kB each
MOST_SKETCHES: Final = 4_000  # that wait for their outcome; 40 kB each
QUEUE_SIZE: Final = 64  # entries, each with paths of up to 2.3 MB
BATCH_S: Final = 0.5  # a batch gathers for so long
CACHE_KIB: Final = 256  # of SQLite; its own 2 MB fill within an hour, and the system has the file
COMPLAINT_S: Final = 300.0  # between two log lines about a file that cannot be written
BUSY_S: Final = 5.0  # another process may hold the file for so long
PATIENCE_S: Final = 8.0  # for the writer, when somebody waits for it

T = TypeVar("T")

log = logging.getLogger(__name__)

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS prompts (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,             -- Unix seconds
    caller TEXT NOT NULL,
    transport TEXT NOT NULL,
    asset TEXT NOT NULL,
    start_ts INTEGER NOT NULL,
    increment_s INTEGER NOT NULL,
    length_s INTEGER NOT NULL,
    num_paths INTEGER NOT NULL,
    origin INTEGER,
    outcome TEXT NOT NULL,
    rung TEXT,
    price_age_s INTEGER,
    ms REAL NOT NULL,
    size INTEGER NOT NULL,
    reason TEXT
);
CREATE INDEX IF NOT EXISTS prompts_at ON prompts (at);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY,
    asset TEXT NOT NULL,
    frequency TEXT NOT NULL,
    start_ts INTEGER NOT NULL,
    increment_s INTEGER NOT NULL,
    length_s INTEGER NOT NULL,
    num_paths INTEGER NOT NULL,
    at REAL NOT NULL,
    rung TEXT NOT NULL,
    model_id TEXT,
    sketch BLOB,                  -- until it is scored or given up
    scored_at REAL,
    score REAL,                   -- bp; NULL with scored_at: no outcome was ever known
    ewma_t REAL,
    intervals TEXT,               -- JSON: name to score
    covered TEXT,                 -- JSON: name to [inside the central 80 %, known]
    UNIQUE (asset, start_ts, increment_s, length_s, num_paths)
);
CREATE INDEX IF NOT EXISTS answers_pending ON answers (start_ts) WHERE sketch IS NOT NULL;
CREATE INDEX IF NOT EXISTS answers_start ON answers (start_ts);
"""


# ---------------------------------------------------------------- what goes in and out


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEntry:
    """One request and its outcome. Never holds a secret."""

    at: float  # Unix seconds
    caller: str
    transport: str
    request: ForecastRequest
    origin: int | None
    outcome: str
    rung: str | None
    price_age_s: int | None
    ms: float
    size: int  # bytes of the answer
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerEntry:
    """A live answer that is to be scored by a competition."""

    frequency: str
    rung: str
    model_id: str | None
    paths: FloatArray  # (num_paths, n_points)
    competition: Competition


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingAnswer:
    """A kept answer whose outcome is not known yet."""

    id: int
    frequency: str
    request: ForecastRequest
    sketch: AnswerSketch


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """A kept answer and its score in bp, lower being better."""

    asset: str
    frequency: str
    start_ts: int
    rung: str
    score: float
    ewma_t: float  # the yardstick's score for the same prompt
    intervals: Mapping[str, float]
    covered: Mapping[str, tuple[int, int]]  # inside the central 80 %, known


# ---------------------------------------------------------------- the ledger


@dataclass(slots=True, eq=False)
class _Flush:
    """Asks the writer to say when everything before it is on the disk."""

    done: threading.Event = field(default_factory=threading.Event)


class Ledger:
    """The open file and the thread that writes it. Thread-safe; `close` when done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()  # over the connection
        self._connection: sqlite3.Connection | None = None
        self._queue: queue.Queue[tuple[PromptEntry, AnswerEntry | None] | _Flush | None] = (
            queue.Queue(QUEUE_SIZE)
        )
        self._complained = -COMPLAINT_S
        self.lost = 0  # entries that could not be kept
        self._run(lambda _: None, None)
        self._writer = threading.Thread(target=self._write_batches, name="ledger", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is queued and close the file; what a hanging disk keeps is lost."""
        deadline = time.monotonic() + PATIENCE_S
        with suppress(queue.Full):
            self._queue.put(None, timeout=PATIENCE_S)
        self._writer.join(max(0.0, deadline - time.monotonic()))
        if self._writer.is_alive():
            left = sum(isinstance(entry, tuple) for entry in list(self._queue.queue))
            self._lose(left, f"its disk did not answer for {PATIENCE_S:g} s")
        else:
            with self._lock:
                self._disconnect()

    # -- writing

    def keep(self, prompt: PromptEntry, answer: AnswerEntry | None = None) -> None:
        """Record a request, and the answer if it is to be scored. Never waits or raises."""
        try:
            self._queue.put_nowait((prompt, answer))
        except queue.Full:
            self._lose(1, "its queue is full")

    def flush(self) -> None:
        """Wait until everything kept so far has been written (or lost), `PATIENCE_S` at most."""
        mark = _Flush()
        deadline = time.monotonic() + PATIENCE_S
        with suppress(queue.Full):
            self._queue.put(mark, timeout=PATIENCE_S)
            mark.done.wait(max(0.0, deadline - time.monotonic()))

    def _write_batches(self) -> None:
        going = True
        while going:
            batch = [self._queue.get()]
            until = time.monotonic() + BATCH_S
            while isinstance(batch[-1], tuple) and len(batch) < QUEUE_SIZE:
                try:
                    batch.append(self._queue.get(timeout=max(until - time.monotonic(), 0)))
                except queue.Empty:
                    break
            self._try_to_write([entry for entry in batch if isinstance(entry, tuple)])
            for mark in batch:
                if isinstance(mark, _Flush):
                    mark.done.set()
            going = batch[-1] is not None

    def _try_to_write(self, entries: Sequence[tuple[PromptEntry, AnswerEntry | None]]) -> None:
        """The thread must outlive an entry that it cannot digest, and whatever the disk says."""
        try:
            is_kept = not entries or self._write(entries)
        except Exception:
            log.exception("ledger entries lost")
            self.lost += len(entries)
        else:
            if not is_kept:
                self._lose(len(entries), "the file cannot be written")

    def _write(self, entries: Sequence[tuple[PromptEntry, AnswerEntry | None]]) -> bool:
        prompts = [_prompt_row(prompt) for prompt, _ in entries]
        answers = [_answer_row(prompt, answer) for prompt, answer in entries if answer is not None]

        def insert(connection: sqlite3.Connection) -> bool:
            connection.executemany(_INSERT_PROMPT, prompts)
            connection.executemany(_INSERT_ANSWER, answers)
            return True

        return self._run(insert, otherwise=False)

    def _lose(self, count: int, reason: str) -> None:
        self.lost += count
        self._complain(f"{self._path}: {reason}; {self.lost} records were lost so far.")

    def save_scores(
        self, scores: Iterable[tuple[PendingAnswer, SketchScore, float]], now: float
    ) -> None:
        """Keep scores of ours and of `ewma_t`, and drop the sketches."""
        rows = [
            (
                now,
                ours.card.total,
                ewma_t,
                json.dumps({name: _short(bp) for name, bp in ours.card.by_interval.items()}),
                json.dumps(dict(ours.covered)),
                answer.id,
            )
            for answer, ours, ewma_t in scores
        ]
        self._execute_many(_SAVE_SCORE, rows)

    def give_up(self, answers: Iterable[PendingAnswer], now: float) -> None:
        """Drop the sketches of answers that can never be scored."""
        self._execute_many(_GIVE_UP, [(now, answer.id) for answer in answers])

    def prune(self, now: float) -> None:
        """Delete what is old or too much. The file keeps its size and reuses the room."""

        def delete(connection: sqlite3.Connection) -> None:
            oldest = now - KEPT_DAYS * DAY_S
            connection.execute("DELETE FROM prompts WHERE at < ?", (oldest,))
            connection.execute("DELETE FROM answers WHERE start_ts < ?", (oldest,))
            for statement, most in _BOUNDS:
                connection.execute(statement, (most,))

        self._run(delete, None)

    # -- reading

    def pending_pairs(self, ended_by: float) -> list[tuple[str, str]]:
        """Assets and frequencies with unscored answers whose horizon ended by then, sorted."""
        return [
            (row["asset"], row["frequency"])
            for row in self._select(_PAIRS, (ended_by,))
            if row["frequency"] in set(Frequency)  # a letter may have rotted
        ]

    def pending(
        self, asset: str, frequency: str, ended_by: float, limit: int
    ) -> list[PendingAnswer]:
        """Up to `limit` unscored answers whose horizon ended by then, the earliest first."""
        found = []
        for row in self._select(_PENDING, (asset, frequency, ended_by, limit)):
            try:
                found.append(_pending_answer(row))
            except DataError as error:
                log.warning("%s", error)
                self._execute_many(_GIVE_UP, [(None, row["id"])])
        return found

    def scored(self, start_from: float) -> Iterator[ScoredAnswer]:
        """Scored answers to prompts that began at or after then, in the order of their keeping.

        A page at a time: ten days of all assets are fifty thousand.
        """
        last = 0
        while rows := self._select(_SCORED, (start_from, last, PAGE_ROWS)):
            last = rows[-1]["id"]
            for row in rows:
                try:
                    yield _scored_answer(row)
                except DataError as error:
                    self._complain(str(error))

    def prompts(self, since: float) -> list[dict[str, object]]:
        """The rows of `prompts` since a time, the latest first."""
        statement = "SELECT * FROM prompts WHERE at >= ? ORDER BY at DESC, id DESC"
        return [dict(row) for row in self._select(statement, (since,))]

    def _select(self, statement: str, values: tuple[object, ...]) -> list[sqlite3.Row]:
        nothing: list[sqlite3.Row] = []
        return self._run(lambda opened: opened.execute(statement, values).fetchall(), nothing)

    def _execute_many(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        self._run(lambda opened: opened.executemany(statement, rows), None)

    # -- the file

    def _run(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Do something in a transaction; what fails is logged and gives `otherwise`."""
        with self._lock:
            try:
                connection = self._connected()
                with connection:
                    return work(connection)
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # a rotten name
                if self._is_of_the_disk(error):
                    self._disconnect()
                    self._complain(
                        f"{self._path} cannot be used ({error}); free the disk or make the folder "
                        "writable, answers go on without it."
                    )
                else:
                    self._set_aside(str(error))
        return otherwise

    def _is_of_the_disk(self, error: Exception) -> bool:
        """Whether the file is locked, full, read-only or gone, and not damaged.

        A damaged header may claim a format that SQLite will not write, or does not know.
        """
        if not isinstance(error, sqlite3.OperationalError):
            return isinstance(error, OSError)
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_READONLY:
            return not os.access(self._path, os.W_OK)
        return code != sqlite3.SQLITE_ERROR

    def _connected(self) -> sqlite3.Connection:
        """Raises: sqlite3.Error, OSError."""
        if self._connection is not None and not self._path.exists():
            self._disconnect()  # somebody removed it: what we write would go nowhere
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        connection = sqlite3.connect(
            self._path, timeout=BUSY_S, check_same_thread=False, isolation_level="IMMEDIATE"
        )
        try:
            connection.row_factory = sqlite3.Row
            connection.text_factory = _text
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            _prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # it is given up, whatever becomes of it
                connection.close()

    def _set_aside(self, reason: str) -> None:
        """Rename the file with its journals; the next use begins a new one."""
        self._disconnect()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = self._path.with_name(f"{self._path.name}.damaged-{stamp}")
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            try:
                part.rename(aside.with_name(aside.name + suffix))
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("%s cannot be set aside (%s).", part, error.strerror)
        log.warning(
            "%s cannot be read (%s); it was set aside as %s.", self._path, reason, aside.name
        )

    def _complain(self, sentence: str) -> None:
        if time.monotonic() - self._complained >= COMPLAINT_S:
            self._complained = time.monotonic()
            log.warning("%s", sentence)


def _prepare(connection: sqlite3.Connection) -> None:
    """Make or check the tables. Raises: sqlite3.DatabaseError for another schema."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA):
        raise sqlite3.DatabaseError(f"it has schema {version}, this version writes {SCHEMA}")
    (check,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if check != "ok":
        raise sqlite3.DatabaseError(str(check))
    connection.executescript(_TABLES)
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


# ---------------------------------------------------------------- rows

_PROMPT_COLUMNS: Final = (
    "at, caller, transport, asset, start_ts, increment_s, length_s, num_paths, origin, outcome, "
    "rung, price_age_s, ms, size, reason"
)
_INSERT_PROMPT: Final = f"INSERT INTO prompts ({_PROMPT_COLUMNS}) VALUES ({', '.join('?' * 15)})"  # noqa: S608  # constants
_ANSWER_COLUMNS: Final = (
    "asset, frequency, start_ts, increment_s, length_s, num_paths, at, rung, model_id, sketch"
)
# The first answer is the one that was sent; one made again after the cache is not.
_INSERT_ANSWER: Final = (
    f"INSERT OR IGNORE INTO answers ({_ANSWER_COLUMNS}) VALUES ({', '.join('?' * 10)})"  # noqa: S608  # constants
)
_SAVE_SCORE: Final = """
UPDATE answers SET scored_at = ?, score = ?, ewma_t = ?, intervals = ?, covered = ?, sketch = NULL
WHERE id = ?
"""
_GIVE_UP: Final = "UPDATE answers SET scored_at = ?, sketch = NULL WHERE id = ?"
_PAIRS: Final = """
SELECT DISTINCT asset, frequency FROM answers WHERE sketch IS NOT NULL AND start_ts + length_s <= ?
ORDER BY asset, frequency
"""
_PENDING: Final = """
SELECT * FROM answers
WHERE sketch IS NOT NULL AND asset = ? AND frequency = ? AND start_ts + length_s <= ?
ORDER BY start_ts + length_s LIMIT ?
"""
_SCORED: Final = """
    SELECT id, asset, frequency, start_ts, rung, score, ewma_t, intervals, covered FROM answers
    WHERE score IS NOT NULL AND start_ts >= ? AND id > ? ORDER BY id LIMIT ?
"""
# What is beyond the newest so many. The sketches' bound drops sketches, not answers, and the
# newest: those that waited longest are nearest to their outcome.
_BOUNDS: Final = (
    (
        """
        DELETE FROM prompts
        WHERE id <= (SELECT id FROM prompts ORDER BY id DESC LIMIT 1 OFFSET ?)
        """,
        MOST_PROMPTS,
    ),
    (
        """
        DELETE FROM answers
        WHERE id <= (SELECT id FROM answers ORDER BY id DESC LIMIT 1 OFFSET ?)
        """,
        MOST_ANSWERS,
    ),
    (
        """
        UPDATE answers SET sketch = NULL
        WHERE sketch IS NOT NULL AND id >= (
            SELECT id FROM answers WHERE sketch IS NOT NULL ORDER BY id LIMIT 1 OFFSET ?
        )
        """,
        MOST_SKETCHES,
    ),
)


def _short(value: float) -> float:
    """Six digits: a sketch knows no more, and the file stays small."""
    return float(f"{value:.6g}")


def _prompt_row(entry: PromptEntry) -> tuple[object, ...]:
    request = entry.request
    return (
        entry.at,
        entry.caller,
        entry.transport,
        request.asset,
        request.start_ts,
        request.increment_s,
        request.length_s,
        request.num_paths,
        entry.origin,
        entry.outcome,
        entry.rung,
        entry.price_age_s,
        entry.ms,
        entry.size,
        entry.reason,
    )


def _answer_row(prompt: PromptEntry, answer: AnswerEntry) -> tuple[object, ...]:
    request = prompt.request
    sketch = AnswerSketch.of(answer.paths, answer.competition, increment_s=request.increment_s)
    return (
        request.asset,
        answer.frequency,
        request.start_ts,
        request.increment_s,
        request.length_s,
        request.num_paths,
        prompt.at,
        answer.rung,
        answer.model_id,
        sketch.to_bytes(),
    )


def _pending_answer(row: sqlite3.Row) -> PendingAnswer:
    """Raises: DataError if request or sketch cannot be read."""
    try:
        request = ForecastRequest(
            asset=row["asset"],
            start_ts=row["start_ts"],
            increment_s=row["increment_s"],
            length_s=row["length_s"],
            num_paths=row["num_paths"],
        )
    except (TypeError, RequestError):  # a number that rotted has another type
        raise DataError(
            f"the request in row {row['id']} of the ledger cannot be read; it is given up."
        ) from None
    sketch = AnswerSketch.from_bytes(row["sketch"])
    return PendingAnswer(id=row["id"], frequency=row["frequency"], request=request, sketch=sketch)


def _scored_answer(row: sqlite3.Row) -> ScoredAnswer:
    """Raises: DataError if the row cannot be read."""
    try:
        covered = json.loads(row["covered"])
        return ScoredAnswer(
            asset=row["asset"],
            frequency=Frequency(row["frequency"]).value,
            start_ts=int(row["start_ts"]),
            rung=row["rung"],
            score=float(row["score"]),
            ewma_t=float(row["ewma_t"]),
            intervals={name: float(bp) for name, bp in json.loads(row["intervals"]).items()},
            covered={name: (int(inside), int(known)) for name, (inside, known) in covered.items()},
        )
    except (ValueError, TypeError, AttributeError):
        raise DataError(
            f"the scores in row {row['id']} of the ledger cannot be read; they are left out."
        ) from None


def _text(data: bytes) -> str:
    """Text as stored; a byte that rotted costs a letter, not every row of the query."""
    return data.decode("utf-8", errors="replace")
