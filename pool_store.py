"""Pooled priors on disk: fitted when first asked for, found again by content.

    <folder>/<hf|lf>_<moment>_<key>.json

All trainings of a source share them, whichever asset they are for. A file seals
itself as a manifest of models does; one with a damaged byte is fitted anew.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import orjson

from config import Frequency
from content_keys import bars_key, content_key, program_key
from data_fetcher import BarSource
from domain import MarketHistory
from errors import DataError
from model_store import is_sealed, seal_manifest
from pooled_prior import PooledPrior, pool_moments
from pooling import fit_pooled_prior, pool_window
from scheduled_events import known_events
from state_store import locked, write_atomically

FIT_WAIT_S: Final = 900  # for another process to fit the same pools


def histories_of(source: BarSource, frequency: Frequency) -> tuple[MarketHistory, ...]:
    """Every asset of the source that has usable bars at the frequency."""
    histories = []
    for asset, served in source.frequencies().items():
        if frequency in served:
            try:
                histories.append(source.load(asset, frequency).history)
            except DataError:
                continue  # its own training says what is wrong with it
    return tuple(histories)


def pool_files(
    histories: Sequence[MarketHistory], first: int, last: int, folder: Path
) -> list[Path]:
    """What a training needs whose fits end between `first` and `last`, Unix seconds.

    `histories`: all assets of one frequency, so that none of them is special.
    What is not there is fitted. Raises: StateError, BusyError.
    """
    files = [folder / name for name in pool_names(histories, first, last)]
    for moment, file in zip(pool_moments(first, last), files, strict=True):
        _require(histories, moment, file)
    return files


def pool_names(histories: Sequence[MarketHistory], first: int, last: int) -> list[str]:
    """The names of `pool_files`, which stand for all that they depend on."""
    return [_name(histories, moment) for moment in pool_moments(first, last)]


def _name(histories: Sequence[MarketHistory], moment: int) -> str:
    keys = [bars_key(pool_window(history, moment)) for history in histories]
    key = content_key(keys, program_key("pooling"), program_key("scheduled_events"))
    day = datetime.fromtimestamp(moment, UTC).strftime("%Y%m%d")
    return f"{histories[0].frequency.value}_{day}_{key}.json"


def is_whole(file: Path) -> bool:
    """Whether a pool is there, byte for byte as it was written."""
    try:
        return is_sealed(file.read_bytes())
    except (OSError, ValueError, AttributeError, TypeError):  # absent, no JSON, no object
        return False


def _require(histories: Sequence[MarketHistory], moment: int, file: Path) -> None:
    if not is_whole(file):
        with locked(file.parent, "fitting what the markets have in common", wait_s=FIT_WAIT_S):
            if not is_whole(file):
                events, _ = known_events(moment)
                prior = fit_pooled_prior(histories, moment, events)
                said = {"prior": None if prior is None else prior.to_dict()}
                write_atomically(file, seal_manifest(said))


def read_pool(file: Path) -> PooledPrior | None:
    """A pool of `pool_files`; None if no two assets had enough bars at its moment."""
    values = orjson.loads(file.read_bytes())["prior"]
    return None if values is None else PooledPrior.from_dict(values)
