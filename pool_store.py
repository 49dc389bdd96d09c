"""Pooled priors on disk: fitted when first asked for, found again by what they depend on.

    <folder>/<hf|lf>_<moment>_<key>.json

All trainings of a source share them, whichever asset they are for. A replay names
them by the bars themselves, which it holds anyway; a training that only wants to
read them by the versions of the files that the bars are in. A file seals itself as a
manifest of models does; one with a damaged byte is fitted anew.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import orjson

from config import Frequency
from content_keys import bars_key, content_key, program_key
from data_fetcher import BarSource, VersionedSource
from domain import MarketHistory
from errors import DataError
from model_store import is_sealed, seal_manifest
from pooled_prior import PooledPrior, pool_moments
from pooling import fit_pooled_prior, pool_window
from scheduled_events import known_events
from state_store import locked, write_atomically

FIT_WAIT_S: Final = 900  # for another process to fit the same pools
# Of a moment: what is in use, and what was before, for who goes back to other settings. A
# run asks for one name per moment, and only one run at a time works on a model folder.
KEPT_FILES: Final = 2


def each_history(source: BarSource, frequency: Frequency) -> Iterator[MarketHistory]:
    """Every asset of the source that has usable bars at the frequency, one after the other."""
    for asset, served in source.frequencies().items():
        if frequency in served:
            try:
                loaded = source.load(asset, frequency)
            except DataError:
                continue  # its own training says what is wrong with it
            yield loaded.history


def histories_of(source: BarSource, frequency: Frequency) -> tuple[MarketHistory, ...]:
    """All of them at once."""
    return tuple(each_history(source, frequency))


# ---------------------------------------------------------------- named by bars


def pool_files(
    histories: Sequence[MarketHistory], first: int, last: int, folder: Path
) -> list[Path]:
    """What a training needs whose fits end between `first` and `last`, Unix seconds.

    `histories`: all assets of one frequency, so that none of them is special.
    What is not there is fitted. Raises: StateError, BusyError.
    """
    files = [folder / name for name in pool_names(histories, first, last)]
    for moment, file in zip(pool_moments(first, last), files, strict=True):
        _require(lambda: histories, moment, file)
    return files


def pool_names(histories: Sequence[MarketHistory], first: int, last: int) -> list[str]:
    """The names of `pool_files`, which stand for all that they depend on."""
    return [_name_by_bars(histories, moment) for moment in pool_moments(first, last)]


def _name_by_bars(histories: Sequence[MarketHistory], moment: int) -> str:
    keys = [bars_key(pool_window(history, moment)) for history in histories]
    key = content_key(keys, program_key("pooling"), program_key("scheduled_events"))
    return _name(histories[0].frequency, moment, key)


def _name(frequency: Frequency, moment: int, key: str) -> str:
    day = datetime.fromtimestamp(moment, UTC).strftime("%Y%m%d")
    return f"{frequency.value}_{day}_{key}.json"


# ---------------------------------------------------------------- named by files


def pool_file(source: VersionedSource, frequency: Frequency, moment: int, folder: Path) -> Path:
    """The pool of all assets of a source at a moment, which is fitted if it is not there.

    Bars are read only then, one asset at a time; the source should reach back as far as
    pools do. Raises: StateError, BusyError.
    """
    versions = {
        asset: source.version(asset, frequency, moment)
        for asset, served in source.frequencies().items()
        if frequency in served
    }
    file = folder / _name(frequency, moment, content_key(versions, program_key("pool_store")))
    _require(lambda: each_history(source, frequency), moment, file)
    with suppress(OSError):  # a folder of somebody else's
        os.utime(file)  # in use
    return file


def prune_pools(folder: Path, before: int) -> None:
    """Remove pools of moments before a time, and of each later one all but the last used.

    Nobody may be reading them. Raises: StateError, BusyError.
    """
    with locked(folder, "clearing pools away", wait_s=FIT_WAIT_S):
        of_moment: dict[str, list[Path]] = {}
        for file in folder.glob("*_????????_*.json"):
            of_moment.setdefault(file.name.rpartition("_")[0], []).append(file)
        first = datetime.fromtimestamp(before, UTC).strftime("%Y%m%d")
        for name, files in of_moment.items():
            files.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
            for file in files if name.rpartition("_")[2] < first else files[KEPT_FILES:]:
                file.unlink()


# ---------------------------------------------------------------- files


def is_whole(file: Path) -> bool:
    """Whether a pool is there, byte for byte as it was written."""
    try:
        return is_sealed(file.read_bytes())
    except (OSError, ValueError, AttributeError, TypeError):  # absent, no JSON, no object
        return False


def _require(histories: Callable[[], Iterable[MarketHistory]], moment: int, file: Path) -> None:
    if not is_whole(file):
        with locked(file.parent, "fitting what the markets have in common", wait_s=FIT_WAIT_S):
            if not is_whole(file):
                events, _ = known_events(moment)
                prior = fit_pooled_prior(histories(), moment, events)
                said = {"prior": None if prior is None else prior.to_dict()}
                write_atomically(file, seal_manifest(said))


def read_pool(file: Path) -> PooledPrior | None:
    """A pool of the folder; None if no two assets had enough bars at its moment."""
    values = orjson.loads(file.read_bytes())["prior"]
    return None if values is None else PooledPrior.from_dict(values)
