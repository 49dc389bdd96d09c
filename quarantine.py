"""Rows of feeds that were refused, kept for the operator: `state/quarantine/*.jsonl`.

One line per row: when it was refused, which feed and bar, its close, and why. A
row is written once however often the feed repeats it. A file that has grown to a
megabyte becomes `….old`, in place of the one before.
"""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from io import SEEK_END, RawIOBase
from pathlib import Path
from threading import Lock
from typing import Final

from bar_cleaning import SetAsideBar
from errors import StateError

_LOG: Final = logging.getLogger(__name__)
_MAX_BYTES: Final = 2**20

_Key = tuple[int, str]


class Quarantine:
    """Safe between threads; processes that share it may repeat a line, never garble one."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "quarantine"
        self._seen: dict[Path, set[_Key]] = {}
        self._lock = Lock()

    def add(
        self, feed: str, asset: str, bar_s: int, rows: Iterable[SetAsideBar], now: float
    ) -> int:
        """Write what is new of the rows, and log it; returns how many that were.

        Raises: StateError if the disk refuses.
        """
        rows = list(rows)
        if not rows:
            return 0
        path = self.path(feed, asset, bar_s)
        with self._lock:
            if path not in self._seen:
                self._seen[path] = _read_keys(path)
            seen = self._seen[path]
            new = [row for row in rows if (row.ts, row.reason) not in seen]
            if not new:
                return 0
            found = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
            lines = [_line(row, feed, found) for row in new]
            _append(path, "".join(lines))
            seen.update((row.ts, row.reason) for row in new)
        for row in new:
            about = {"asset": asset, "feed": feed, "bar": row.ts, "close": row.close}
            _LOG.warning("bar refused", extra={**about, "reason": row.reason})
        return len(new)

    def path(self, feed: str, asset: str, bar_s: int) -> Path:
        """The file of one series."""
        return self._folder / f"{feed.split(':', maxsplit=1)[0]}_{asset}_{bar_s}s.jsonl"


def _line(row: SetAsideBar, feed: str, found: str) -> str:
    close = row.close if row.close == row.close else None  # NaN is no JSON
    document = {"found": found, "feed": feed, "ts": row.ts, "close": close, "reason": row.reason}
    return json.dumps(document, ensure_ascii=False) + "\n"


def _read_keys(path: Path) -> set[_Key]:
    """What the file holds; lines that cannot be read are nobody's loss."""
    keys: set[_Key] = set()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return keys
    for line in lines:
        try:
            row = json.loads(line)
            keys.add((row["ts"], row["reason"]))
        except (ValueError, KeyError, TypeError):
            continue
    return keys


def _line_end(file: RawIOBase) -> bytes:
    """What ends a last line that a full disk cut off."""
    if not file.seek(0, SEEK_END):
        return b""
    file.seek(-1, SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _append(path: Path, text: str) -> None:
    """In one write, so that lines of two processes do not mix."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _MAX_BYTES:
            path.replace(path.with_name(f"{path.name}.old"))
        path.touch(mode=0o600)
        with path.open("a+b", buffering=0) as file:
            left = memoryview(_line_end(file) + text.encode())
            while left:  # a disk that fills up takes a part, and refuses the rest
                left = left[file.write(left) :]
    except OSError as error:
        raise StateError(
            f"{path} cannot be written ({error.strerror}); free some disk space or make the "
            "folder writable."
        ) from error
