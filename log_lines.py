"""Log lines, one an event, and a writer that nobody who logs ever waits for.

A terminal that is held still, a pipe that nobody reads or a disk that hangs keeps whoever
writes to it waiting for as long as it likes, and answers are logged on the very threads
that send them. So a miner leaves writing to a thread of its own (`BackgroundWriter`).
"""

import json
import logging
import re
import sys
import time
import traceback
from datetime import UTC, datetime
from queue import Full, Queue
from threading import Lock, Thread
from typing import Final

WAITING_LINES: Final = 4096  # that may wait for whoever reads; a megabyte or two
FLUSH_S: Final = 1.0  # for them at the end of the process

_RECORD_FIELDS: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_BARE_VALUE: Final = re.compile(r"[^\s\"=]+")
# What looks like a key or a seed, and where addresses carry theirs: no line should hold one.
_KEY: Final = re.compile(r"\b(0x)?[0-9a-fA-F]{64,}\b")
_URL_SECRET: Final = re.compile(r"(?<=://)[^\s/@?#\"]+@|(?<=\?)[^\s\"?]*=[^\s\")]*")

log = logging.getLogger(__name__)


def without_secrets(text: str) -> str:
    """The text with keys, seeds, and users and queries of addresses hidden."""
    return _URL_SECRET.sub("[hidden]", _KEY.sub("[hidden]", text))


class KeyValueFormatter(logging.Formatter):
    """`time=… level=… logger=… event=…`, then whatever `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it if there is one."""
        moment = datetime.fromtimestamp(record.created, UTC)
        pairs = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        } | {key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS}
        line = " ".join(f"{key}={_quoted(value)}" for key, value in pairs.items())
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return without_secrets(line)


def _quoted(value: object) -> str:
    text = str(value)
    is_plain = text.isprintable()  # a terminal obeys what is not
    is_bare = is_plain and _BARE_VALUE.fullmatch(text)
    return text if is_bare else json.dumps(text, ensure_ascii=not is_plain)


class BackgroundWriter(logging.Handler):
    """Writes to stderr on a thread of its own.

    Lines that do not fit while nobody reads are lost, and so are those that stderr
    refuses; the first one of a fault is told to the other handlers, and how many there
    were as soon as lines go out again.
    """

    def __init__(self, waiting_lines: int = WAITING_LINES) -> None:
        super().__init__()
        self.setFormatter(KeyValueFormatter())
        self._lines: Queue[str] = Queue(waiting_lines)
        self._lost = 0  # since a line last went out
        self._counting = Lock()
        Thread(target=self._write_on, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the line over. Never waits, never raises."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  # logging must never end the program
            line = traceback.format_exc().rstrip()  # a mistake of ours, to be seen
        try:
            self._lines.put_nowait(line)
        except Full:
            self._lose("nobody reads what is written to it")

    def flush(self) -> None:
        """Wait until all is written, FLUSH_S at most."""
        deadline = time.monotonic() + FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write_on(self) -> None:
        while True:
            line = self._lines.get()
            try:
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()
            except Exception as error:  # noqa: BLE001  # whatever it is, the next line may go out
                self._lose(str(error))
            else:
                self._tell_lost()
            self._lines.task_done()

    def _lose(self, reason: str) -> None:
        with self._counting:
            self._lost += 1
            is_news = self._lost == 1
        if is_news:
            log.warning("log not written", extra={"reason": f"stderr: {reason}"})

    def _tell_lost(self) -> None:
        if not self._lost or not self._lines.empty():  # there must be room to tell it
            return
        with self._counting:
            lost, self._lost = self._lost, 0
        log.warning("log written again", extra={"lost": lost})


def log_in_background(level: str) -> None:
    """Send log lines of `level` ("debug" to "error") and above to stderr, as a miner does.

    One line per event: `log.info("answered", extra={"asset": "BTC"})` prints
    `time=… level=info logger=miner event=answered asset=BTC`.
    """
    logging.basicConfig(level=level.upper(), handlers=[BackgroundWriter()], force=True)
