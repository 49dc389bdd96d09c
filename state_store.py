"""Files that survive crashes, full disks and bit rot: everything under `state/`.

Owns three things: the atomic write, the checked document (`StateStore`) and the
collected bars (`BarStore`). A document is a msgpack envelope

    {"format": "lgbm-miner", "kind": …, "schema": …, "checksum": …, "payload": …}

whose payload is msgpack too, with NumPy arrays as little-endian extension type 1.
A damaged file is renamed to `<name>.damaged-<UTC time>`, logged in one sentence
and treated as absent; it never stops the miner and is never deleted.
"""

import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
from filelock import FileLock, Timeout

from config import DAY_S
from domain import Bars, FloatArray
from errors import BusyError, StateError

_LOG: Final = logging.getLogger(__name__)

# ---------------------------------------------------------------- files and locks


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, wholly or not at all, and on the disk when this returns.

    Missing folders are made. The file is readable by its owner alone.
    Raises: StateError; the former file is then untouched and no other is left.
    Source: temp file in the same folder, fsync, rename, as in untitaker/python-atomicwrites.
    """
    try:
        _make_folder(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix="~")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_writable(path, error) from error


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, each entry on the disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_writable(path: Path, error: OSError) -> StateError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some disk space" if is_full else "make the folder writable or name another one"
    return StateError(f"{path} cannot be written ({error.strerror or error}); {remedy}.")


@contextmanager
def locked(directory: Path, purpose: str, wait_s: float = 0) -> Iterator[None]:
    """Keep other processes from working on the directory, for as long as the block runs.

    `purpose` completes the sentence "… cannot start", e.g. "training". The lock
    is advisory and falls with the process, so a crash leaves nothing to clean.
    Raises: BusyError after `wait_s` seconds; StateError if no lock can be made.
    """
    lock = FileLock(directory / ".lock")
    try:
        _make_folder(directory)
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise BusyError(
            f"{directory} is in use by another process, so {purpose} cannot start; "
            "wait until that one is done, or name another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StateError(
            f"{directory} cannot be locked ({reason}); make it writable or name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- documents

_FORMAT: Final = "lgbm-miner"
_ARRAY: Final = 1  # msgpack extension code
_NUMERIC: Final = "biuf"  # NumPy kinds that may be stored
_NAME_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=-]*")


class _Damage(Exception):
    """Why a file cannot be what it should be."""


class StateStore:
    """Named documents below one folder; names are `/`-separated, e.g. "archive/BTC_hf"."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def save(self, kind: str, name: str, schema: int, payload: Mapping[str, Any]) -> None:
        """Store a document, replacing its predecessor in one step.

        Values may be what msgpack knows and numeric NumPy arrays; tuples come
        back as lists. Raises: StateError if the name is unfit or the disk refuses.
        """
        write_atomically(self.path(kind, name), _seal(kind, schema, payload))

    def load(self, kind: str, name: str, schema: int) -> dict[str, Any] | None:
        """The document, or None if there is none or it is damaged (then it is set aside).

        Raises: StateError if the name is unfit or the file may not be read.
        """
        path = self.path(kind, name)
        try:
            return _unseal(_read(path), kind, schema)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(
                f"{path} cannot be read ({error.strerror}); check who may read it."
            ) from error
        except _Damage as damage:
            self.set_aside(kind, name, str(damage))
            return None

    def set_aside(self, kind: str, name: str, reason: str) -> None:
        """Rename a document that cannot be used, and log where it went and why."""
        path = self.path(kind, name)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = path.with_name(f"{path.name}.damaged-{stamp}")
        try:
            path.rename(aside)
        except OSError as error:
            _LOG.warning("%s %s and is ignored; it stays (%s).", path, reason, error.strerror)
        else:
            _LOG.warning("%s %s; it was set aside as %s.", path, reason, aside.name)

    def names(self, kind: str) -> list[str]:
        """The names of all stored documents of a kind, sorted."""
        folder = self._root / kind
        found = (path for path in folder.rglob("*.msgpack") if not path.name.startswith("."))
        return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)

    def path(self, kind: str, name: str) -> Path:
        """Where a document lives. Raises: StateError if the name could lead elsewhere."""
        parts = [kind, *name.split("/")]
        for part in parts:
            _require_plain(part)
        return self._root.joinpath(*parts[:-1], f"{parts[-1]}.msgpack")


def _require_plain(part: str) -> None:
    """Refuse a name that could lead out of its folder. Raises: StateError."""
    if not _NAME_PART.fullmatch(part):
        raise StateError(
            f"{part!r} cannot be part of a state file's name; use letters, digits, "
            "'.', '_', '-' and '=', beginning with a letter, digit or '_'."
        )


def _read(path: Path) -> bytes:
    """Raises: _Damage if the disk lost the content, other OSErrors as they come."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in (errno.EIO, errno.EISDIR):
            raise _Damage(f"cannot be read ({error.strerror})") from error
        raise


def _seal(kind: str, schema: int, payload: Mapping[str, Any]) -> bytes:
    content = msgpack.packb(dict(payload), default=_encode)
    envelope = {
        "format": _FORMAT,
        "kind": kind,
        "schema": schema,
        "checksum": _checksum(content),
        "payload": content,
    }
    return bytes(msgpack.packb(envelope))


def _unseal(data: bytes, kind: str, schema: int) -> dict[str, Any]:
    """The payload of an envelope. Raises: _Damage."""
    try:
        envelope = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise _Damage("is truncated or no msgpack") from error
    if not isinstance(envelope, dict) or envelope.get("format") != _FORMAT:
        raise _Damage("is not a state file of this miner")
    content = envelope.get("payload")
    if not isinstance(content, bytes) or envelope.get("checksum") != _checksum(content):
        raise _Damage("does not match its checksum")
    if envelope.get("kind") != kind or envelope.get("schema") != schema:
        found = f"{envelope.get('kind')!r} of schema {envelope.get('schema')}"
        raise _Damage(f"holds {found} where {kind!r} of schema {schema} belongs")
    payload: dict[str, Any] = msgpack.unpackb(content, ext_hook=_decode, strict_map_key=False)
    return payload


def _checksum(content: bytes) -> str:
    return blake2b(content, digest_size=32).hexdigest()


def _encode(value: object) -> object:
    """What msgpack does not know by itself. Raises: TypeError for anything but numbers."""
    if isinstance(value, np.generic) and value.dtype.kind in _NUMERIC:
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMERIC:
        little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        packed = msgpack.packb((little.dtype.str, value.shape, little.tobytes()))
        return msgpack.ExtType(_ARRAY, packed)
    raise TypeError(f"{type(value).__name__} cannot be stored; convert it to numbers or text")


def _decode(code: int, data: bytes) -> object:
    if code != _ARRAY:
        return msgpack.ExtType(code, data)
    kind, shape, content = msgpack.unpackb(data)
    values = np.frombuffer(content, dtype=np.dtype(kind)).reshape(shape)
    return values.astype(values.dtype.newbyteorder("="))  # a copy: writable, native order


# ---------------------------------------------------------------- bars

_BARS: Final = "bars"
_BARS_SCHEMA: Final = 1
_COLUMNS: Final = ("open", "high", "low", "close", "volume")
_SERIES_NAME: Final = re.compile(r"(?P<asset>.+)_(?P<bar_s>\d+)s")


class BarStore:
    """Collected bars, one document per series and UTC day.

    So an append rewrites the days it touches and no others, and costs the same
    in the first week as after years. A series is a source, an asset and a bar
    length; it takes bars of one feed alone, which every day's file remembers.
    """

    def __init__(self, root: Path) -> None:
        self._store = StateStore(root)
        self._root = root

    def append(self, source: str, asset: str, bars: Bars) -> int:
        """Store bars and return how many are new; a bar stored before is corrected.

        What this returns for is on the disk. Raises: StateError if the disk
        refuses (days before the failing one are kept) or the series is of
        another feed; BusyError if another process keeps writing to it.
        """
        series = _series_name(source, asset, bars.bar_s)
        with locked(self._store.path(_BARS, f"{series}/day").parent, "storing bars", wait_s=30):
            self._require_feed(series, bars)
            days = np.unique(bars.open_ts // DAY_S).tolist()
            return sum(self._append_day(series, day, _rows_of(bars, day)) for day in days)

    def load(
        self, source: str, asset: str, bar_s: int, start: int | None = None, end: int | None = None
    ) -> Bars | None:
        """Stored bars that open at or after `start` and are closed by `end`; None if none.

        Damaged days are set aside and missing from the result.
        """
        series = _series_name(source, asset, bar_s)
        first = -1 if start is None else start // DAY_S
        last = np.inf if end is None else end // DAY_S
        parts: list[Bars] = []
        for day in reversed([day for day in self._days(series) if first <= day <= last]):
            part = self._load_day(series, day, bar_s)
            if part is not None and parts and part.feed != parts[0].feed:
                self._store.set_aside(_BARS, _day_name(series, day), f"is of feed {part.feed}")
            elif part is not None:
                parts.append(part)
        bars = _concatenate(parts[::-1]).between(start, end) if parts else None
        return bars if bars is not None and len(bars) else None

    def series(self) -> list[tuple[str, str, int]]:
        """Every stored series as (source, asset, bar length in seconds), sorted."""
        found = {tuple(name.split("/")[:2]) for name in self._store.names(_BARS)}
        split = [(source, _SERIES_NAME.fullmatch(series)) for source, series in found]
        return sorted(
            (source, match["asset"], int(match["bar_s"])) for source, match in split if match
        )

    def _days(self, series: str) -> list[int]:
        """Days since 1970 that have a file, in order."""
        folder = self._store.path(_BARS, f"{series}/day").parent
        names = (path.stem for path in folder.glob("????-??-??.msgpack"))
        return sorted(int(np.datetime64(name, "D").astype(np.int64)) for name in names)

    def _require_feed(self, series: str, bars: Bars) -> None:
        """Compare with the newest readable day. Raises: StateError."""
        for day in reversed(self._days(series)):
            stored = self._load_day(series, day, bars.bar_s)
            if stored is None:
                continue
            if stored.feed != bars.feed:
                raise StateError(
                    f"{series} holds bars of feed {stored.feed!r} and takes none of "
                    f"{bars.feed!r}; feeds are never merged, so store these under another source."
                )
            return

    def _append_day(self, series: str, day: int, new: Bars) -> int:
        old = self._load_day(series, day, new.bar_s)
        merged = new if old is None else _merge(old, new)
        if old is None or not _same(old, merged):
            self._store.save(
                _BARS, _day_name(series, day), _BARS_SCHEMA, _day_document(merged, day)
            )
        return len(merged) - (0 if old is None else len(old))

    def _load_day(self, series: str, day: int, bar_s: int) -> Bars | None:
        """One day, or None if it is absent or damaged (then it is set aside)."""
        name = _day_name(series, day)
        document = self._store.load(_BARS, name, _BARS_SCHEMA)
        if document is None:
            return None
        if (document["day"], document["bar_s"]) != (day, bar_s):
            self._store.set_aside(_BARS, name, "holds another day or bar length than its name says")
            return None
        return _bars_of(document)


def _series_name(source: str, asset: str, bar_s: int) -> str:
    """The folder of a series below `bars`. Raises: StateError if a name is unfit."""
    _require_plain(source)
    _require_plain(asset)
    return f"{source}/{asset}_{bar_s}s"


def _day_name(series: str, day: int) -> str:
    return f"{series}/{np.datetime64(day, 'D')}"


def _rows_of(bars: Bars, day: int) -> Bars:
    """The bars that open on a UTC day (a view)."""
    return bars.between(day * DAY_S, (day + 1) * DAY_S + bars.bar_s - 1)


def _day_document(bars: Bars, day: int) -> dict[str, Any]:
    """Offsets and columns of a day; columns without any value are left out."""
    columns = {name: _column(bars, name) for name in _COLUMNS}
    return {
        "day": day,
        "bar_s": bars.bar_s,
        "feed": bars.feed,
        "offset_s": (bars.open_ts - day * DAY_S).astype(np.uint32),
        "columns": {name: values for name, values in columns.items() if np.isfinite(values).any()},
    }


def _bars_of(document: Mapping[str, Any]) -> Bars:
    open_ts = document["offset_s"].astype(np.int64) + document["day"] * DAY_S
    absent = np.full(len(open_ts), np.nan)
    columns = {name: document["columns"].get(name, absent) for name in _COLUMNS}
    return Bars(open_ts=open_ts, **columns, bar_s=document["bar_s"], feed=document["feed"])


def _column(bars: Bars, name: str) -> FloatArray:
    values: FloatArray = getattr(bars, name)
    return values


def _concatenate(parts: list[Bars]) -> Bars:
    columns: dict[str, Any] = {
        name: np.concatenate([_column(part, name) for part in parts]) for name in _COLUMNS
    }
    return replace(parts[0], open_ts=np.concatenate([part.open_ts for part in parts]), **columns)


def _merge(old: Bars, new: Bars) -> Bars:
    """Both, in time order; where both have a bar, the new one."""
    open_ts = np.concatenate([new.open_ts, old.open_ts])
    kept_ts, rows = np.unique(open_ts, return_index=True)  # the first of equals: the new one
    columns: dict[str, Any] = {
        name: np.concatenate([_column(new, name), _column(old, name)])[rows] for name in _COLUMNS
    }
    return replace(new, open_ts=kept_ts, **columns)


def _same(left: Bars, right: Bars) -> bool:
    return np.array_equal(left.open_ts, right.open_ts) and all(
        np.array_equal(_column(left, name), _column(right, name), equal_nan=True)
        for name in _COLUMNS
    )
