"""Model sets on disk: names, atomic publishing, roll-back.

A set is written to a folder of its own and becomes visible when the pointer
`models/<ASSET>_<hf|lf>/current.json` is replaced, in one atomic step. The
pointer names the set before it too, which stays for roll-back; older ones are
removed.

A manifest records the hash of every other file and of itself, so that no
damaged byte of a set goes unnoticed.
"""

import hashlib
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import orjson

from config import Frequency
from errors import ModelError, StateError, UnreadableModel
from state_store import require_plain, write_atomically

POINTER: Final = "current.json"
MANIFEST: Final = "manifest.json"
SEAL: Final = "sha256"


def set_folder(model_dir: Path, asset: str, frequency: Frequency) -> Path:
    """Where the sets of one asset and frequency live."""
    return _pointer(model_dir, asset, frequency).parent


@lru_cache(maxsize=128)
def _pointer(model_dir: Path, asset: str, frequency: Frequency) -> Path:
    """Kept, as the paths of documents are: the miner looks for new sets every few seconds."""
    return model_dir / f"{asset}_{frequency.value}" / POINTER


def digest(data: bytes) -> str:
    """Hash that a manifest records for a file."""
    return hashlib.sha256(data).hexdigest()


def seal_manifest(content: Mapping[str, Any]) -> bytes:
    """A manifest as it is stored: JSON whose last entry is the hash of the others."""
    body = orjson.dumps(content, option=orjson.OPT_INDENT_2)
    return orjson.dumps({**content, SEAL: digest(body)}, option=orjson.OPT_INDENT_2)


def is_sealed(data: bytes) -> bool:
    """Whether a manifest is, byte for byte, what `seal_manifest` made."""
    content = orjson.loads(data)
    content.pop(SEAL, None)
    return seal_manifest(content) == data


def published_pairs(model_dir: Path) -> tuple[tuple[str, Frequency], ...]:
    """Every asset and frequency that has a published set, sorted."""
    pairs = []
    for pointer in sorted(model_dir.glob(f"*/{POINTER}")):
        asset, _, frequency = pointer.parent.name.rpartition("_")
        if asset and frequency in set(Frequency):
            pairs.append((asset, Frequency(frequency)))
    return tuple(pairs)


def published_sets(model_dir: Path, asset: str, frequency: Frequency) -> tuple[Path, ...]:
    """Folders of the set in use and of the one before it, newest first.

    Empty if nothing was published. Raises ModelError if the pointer is damaged,
    UnreadableModel if it cannot be read.
    """
    folder = set_folder(model_dir, asset, frequency)
    pointer = _pointer(model_dir, asset, frequency)
    try:
        names = orjson.loads(pointer.read_bytes())
        chosen = [names["current"], *filter(None, [names["previous"]])]
        for name in chosen:
            require_plain(name)
        return tuple(folder / name for name in chosen)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise _unread(pointer, error) from None
    except (ValueError, KeyError, TypeError, StateError):
        raise ModelError(
            f"{pointer} is damaged; train {asset} {frequency.value} again or restore the file."
        ) from None


def read_model_file(path: Path) -> bytes:
    """One file of a set, whole. Raises: ModelError if it is not there, UnreadableModel."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unread(path, error) from None


def _unread(path: Path, error: OSError) -> ModelError:
    """What a failed read means: that a file is missing, or that nothing can be said of it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return ModelError(f"{path} cannot be read ({error.strerror}); train the set again.")
    return UnreadableModel(
        f"{path} cannot be read ({error.strerror}); it is tried again, so check the disk and who "
        "may read it, or train the set again."
    )


def publication(model_dir: Path, asset: str, frequency: Frequency) -> tuple[int, int] | None:
    """A mark that differs after every publishing; None if nothing was published."""
    try:
        status = _pointer(model_dir, asset, frequency).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def publish_set(
    model_dir: Path, asset: str, frequency: Frequency, model_id: str, files: Mapping[str, bytes]
) -> Path:
    """Write a set and make it the current one; the set in use becomes the previous.

    Returns the set's folder. Raises StateError if the disk refuses; whatever
    was published before is then untouched.
    """
    folder = set_folder(model_dir, asset, frequency)
    target = folder / model_id
    for name, data in files.items():
        write_atomically(target / name, data)
    before = _names_in_use(model_dir, asset, frequency)
    previous = next((name for name in before or () if name != model_id), None)
    pointer = orjson.dumps({"current": model_id, "previous": previous})
    write_atomically(_pointer(model_dir, asset, frequency), pointer)
    if before is not None:
        _remove_others(folder, {model_id, previous})
    return target


def roll_back(model_dir: Path, asset: str, frequency: Frequency, leave: str) -> Path:
    """Make the set before the current one current again; the other stays beside it.

    `leave`: the id of the set to go back from. Where it is no longer the current one
    nothing is done, so a call that failed halfway may be repeated.
    Returns the folder of the set now in use. Raises: ModelError if there is none to
    go back to; StateError if the disk refuses.
    """
    sets = published_sets(model_dir, asset, frequency)
    if sets and sets[0].name != leave:
        return sets[0]
    if len(sets) < 2:
        raise ModelError(
            f"{asset} {frequency.value} has no set before the current one to go back to; "
            "train it again."
        )
    older = sets[1]
    pointer = orjson.dumps({"current": older.name, "previous": leave})
    write_atomically(_pointer(model_dir, asset, frequency), pointer)
    return older


def _names_in_use(model_dir: Path, asset: str, frequency: Frequency) -> list[str] | None:
    """Newest first; None while nobody can say, and so no set may be removed."""
    try:
        return [path.name for path in published_sets(model_dir, asset, frequency)]
    except UnreadableModel:
        return None
    except ModelError:  # a damaged pointer is what publishing repairs
        return []


def _remove_others(folder: Path, keep: set[str | None]) -> None:
    for path in folder.iterdir():
        if path.is_dir() and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)
