"""Files that survive crashes, full disks and bit rot: everything under `state/`.

Owns the atomic write, the lock and the checked document (`StateStore`); collected
bars are documents too (`bar_store`). A document is a msgpack envelope

    {"format": "lgbm-miner", "kind": …, "schema": …, "checksum": …, "payload": …}

whose payload is msgpack too, with NumPy arrays as little-endian extension type 1.
Documents of an earlier schema are migrated as they are read, and written anew as
the present one when they are next saved.
A damaged file, one that was read and is wrong, is renamed to
`<name>.damaged-<UTC time>`, logged in one sentence and treated as absent; it never
stops the miner and is never deleted. One that cannot be read at all stays.
"""

import errno
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias, TypeVar

import msgpack
import numpy as np
from filelock import FileLock, Timeout

from errors import BusyError, StateError, UnreadableState

_LOG: Final = logging.getLogger(__name__)

# ---------------------------------------------------------------- files and locks

ABANDONED_S: Final = 86_400  # longer than any write lasts, and than clocks are wrong by
_TEMPORARY: Final = re.compile(r"\..+\.[a-z0-9_]{8}~")  # as `tempfile` completes our names
READ_ATTEMPTS: Final = 3
_READ_PAUSE_S: Final = 0.05
T = TypeVar("T")
R = TypeVar("R")

_MAY_GET_WELL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, wholly or not at all, and on the disk when this returns.

    Missing folders are made. The file is readable by its owner alone. What a killed
    writer left half-written in the folder is removed once it is old.
    Raises: StateError; the former file is then untouched, or the new one is there and
    may be lost with the power; no other is left, and the same call may be repeated.
    Source: temp file in the same folder, fsync, rename, as in untitaker/python-atomicwrites.
    """
    try:
        make_folder(path.parent)
        _sweep(path.parent)
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


def _sweep(folder: Path) -> None:
    """Remove temporary files of ours that no writer can still be busy with.

    By age alone: other processes may write into the folder at this moment.
    """
    dead = time.time() - ABANDONED_S
    for entry in os.scandir(folder):
        if entry.name.endswith("~") and _TEMPORARY.fullmatch(entry.name):
            with suppress(OSError):  # somebody else was faster
                if entry.stat(follow_symlinks=False).st_mtime < dead:
                    Path(entry).unlink()


def folder_mark(folder: Path) -> str | None:
    """Which folder it is, by whatever path or mount it is reached; None if it is not there.

    It tells the miners of a machine apart and says nothing of where their folders are.
    """
    try:
        found = folder.stat()
    except OSError:
        return None
    return blake2b(f"{found.st_dev}:{found.st_ino}".encode(), digest_size=6).hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, open to their owner alone, each entry on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_folder(folder: Path, flag: str) -> None:
    """Refuse what is, or lies below, something else than a folder; `flag` is what names it.

    Raises: StateError.
    """
    try:
        place = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise StateError(
            f"{folder} cannot be reached ({error.strerror}); let this user enter the folders above "
            f"it, or name another one with {flag}."
        ) from None
    if not place.is_dir():
        raise StateError(f"{place} is not a folder; name one with {flag}.")


def require_writable(folder: Path, flag: str) -> None:
    """Make a folder and see that files can be made in it; `flag` is what names it.

    A disk that is full or broken is let pass: it may get well while its miner answers.
    Raises: StateError.
    """
    require_folder(folder, flag)
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in _MAY_GET_WELL:
            raise StateError(
                f"{folder} cannot be written ({error.strerror}); make it writable or name another "
                f"folder with {flag}."
            ) from error


def require_file(file: Path, flag: str) -> None:
    """See that a file can be put there, in the place of none but a file.

    Raises: StateError.
    """
    require_writable(file.parent, flag)
    if file.is_dir():
        raise StateError(f"{file} is a folder; name a file with {flag}.")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise StateError(
            f"{file} is a link or a device, and a file would take its place; name a file with "
            f"{flag}."
        )


def _no_folder(error: OSError) -> str | None:
    """Says so if an error means that something else has a folder's name."""
    is_other = isinstance(error, FileExistsError | NotADirectoryError)
    return f"{error.filename} is not a folder" if is_other else None


def _not_writable(path: Path, error: OSError) -> StateError:
    if (what := _no_folder(error)) is not None:
        return StateError(f"{path} cannot be written: {what}; name another one.")
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
    busy = (
        f"{directory} is in use by another process, so {purpose} cannot start; "
        "wait until that one is done, or name another folder."
    )
    with held(directory, ".lock", busy, wait_s):
        yield


@contextmanager
def owned(state_dir: Path) -> Iterator[None]:
    """Keep a second miner from the state folder, for as long as the block runs.

    Two would score into one ledger and save over each other. Whoever writes a part of it
    locks that part (`locked`), beside the miner or not: this lock is another.
    Raises: BusyError if a miner runs there; StateError if no lock can be made.
    """
    busy = (
        f"another miner runs on state folder {state_dir}, and its calibration and ledger are that "
        "one's own; give this one a folder with --state-dir, or end the other."
    )
    with held(state_dir, ".miner.lock", busy):
        yield


def go_through(work: Callable[[T], R], entries: Iterable[T]) -> list[R]:
    """Work on every entry, and only then raise what the disk refused first: StateError."""
    done, refusals = list[R](), list[StateError]()
    for entry in entries:
        try:
            done.append(work(entry))
        except StateError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return done


@contextmanager
def held(directory: Path, name: str, busy: str, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock file `name` in a directory for as long as the block runs.

    Raises: BusyError(busy) after `wait_s` seconds; StateError if no lock can be made.
    """
    lock = FileLock(directory / name, mode=0o600)
    try:
        make_folder(directory)
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise BusyError(busy) from None
    except (FileExistsError, NotADirectoryError) as error:
        raise StateError(f"{_no_folder(error)}; name another one.") from error
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
_KEPT_PATHS: Final = 512  # every market's state, and the days that are written


Migration: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
_NO_MIGRATIONS: Final[Mapping[int, Migration]] = MappingProxyType({})


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

    def load(
        self,
        kind: str,
        name: str,
        schema: int,
        *,
        migrations: Mapping[int, Migration] = _NO_MIGRATIONS,
    ) -> dict[str, Any] | None:
        """The document, or None if there is none or it is damaged (then it is set aside).

        `migrations`: by earlier schema, what makes its payload one of the schema
        after it. Raises: StateError if the name is unfit; UnreadableState if the disk
        or its rights give nothing to judge: that is no damage, and the file stays.
        """
        path = self.path(kind, name)
        try:
            return _unseal(_read(path), kind, schema, migrations)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnreadableState(
                f"{path} cannot be read ({error.strerror}); it stays as it is, so check the disk "
                "and who may read it, or move the file away to go on without it."
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
        """The names of all stored documents of a kind, sorted. Raises: UnreadableState."""
        folder = self._root / kind
        try:
            found = [path for path in folder.rglob("*.msgpack") if not path.name.startswith(".")]
        except OSError as error:
            raise unlisted(folder, error) from error
        return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)

    def path(self, kind: str, name: str) -> Path:
        """Where a document lives. Raises: StateError if the name could lead elsewhere."""
        return _file_of(self._root, kind, name)


@lru_cache(maxsize=_KEPT_PATHS)
def _file_of(root: Path, kind: str, name: str) -> Path:
    """Kept, because Python interns the parts of every new path.

    Its table of interned names grows by megabytes when parts come and go by the thousand.
    """
    parts = [kind, *name.split("/")]
    for part in parts:
        require_plain(part)
    return root.joinpath(*parts[:-1], f"{parts[-1]}.msgpack")


def unlisted(folder: Path, error: OSError) -> UnreadableState:
    """That nobody can say what is in a folder."""
    return UnreadableState(
        f"{folder} cannot be listed ({error.strerror}); it stays as it is, so check the disk and "
        "who may read it."
    )


def fault_of(path: Path) -> str | None:
    """What is wrong with a document's file, to follow its name; None if it is sound.

    Nothing is set aside. Raises: OSError if the file is gone or may not be read.
    """
    try:
        _open(_read(path))
    except _Damage as damage:
        return str(damage)
    return None


def require_plain(part: str) -> None:
    """Refuse a name that could lead out of its folder. Raises: StateError."""
    if not _NAME_PART.fullmatch(part):
        raise StateError(
            f"{part!r} cannot be part of a state file's name; use letters, digits, "
            "'.', '_', '-' and '=', beginning with a letter, digit or '_'."
        )


def _read(path: Path) -> bytes:
    """Raises: _Damage if a folder has its name, OSError if it cannot be read, also again."""
    for attempt in range(READ_ATTEMPTS):
        try:
            return path.read_bytes()
        except IsADirectoryError as error:
            raise _Damage("is a folder") from error
        except OSError as error:
            if error.errno != errno.EIO or attempt == READ_ATTEMPTS - 1:
                raise
            time.sleep(_READ_PAUSE_S)
    raise AssertionError("unreachable")


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


def _open(data: bytes) -> tuple[dict[str, Any], bytes]:
    """An envelope and its payload, still packed. Raises: _Damage."""
    try:
        envelope = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise _Damage("is truncated or no msgpack") from error
    if not isinstance(envelope, dict) or envelope.get("format") != _FORMAT:
        raise _Damage("is not a state file of this miner")
    content = envelope.get("payload")
    if not isinstance(content, bytes) or envelope.get("checksum") != _checksum(content):
        raise _Damage("does not match its checksum")
    return envelope, content


def _unseal(
    data: bytes, kind: str, schema: int, migrations: Mapping[int, Migration]
) -> dict[str, Any]:
    """The payload of an envelope, as one of the schema. Raises: _Damage."""
    envelope, content = _open(data)
    found = envelope.get("schema")
    steps = range(found, schema) if isinstance(found, int) else range(0)
    fits = found == schema or (len(steps) and all(step in migrations for step in steps))
    if envelope.get("kind") != kind or not fits:
        what = f"{envelope.get('kind')!r} of schema {found}"
        raise _Damage(f"holds {what} where {kind!r} of schema {schema} belongs")
    payload: dict[str, Any] = msgpack.unpackb(content, ext_hook=_decode, strict_map_key=False)
    for step in steps:
        payload = migrations[step](payload)
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
