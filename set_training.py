"""The training of a set as a task: what it needs, named so that it can travel.

A set is trained from one history and from what all assets have in common; the pools
are fitted once, by the caller, and kept in a folder of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from config import DAY_S, LONGEST_DAYS, Frequency
from content_keys import bars_key, content_key
from data_fetcher import open_source
from domain import MarketHistory
from lgbm_trainer import TrainingResult, train
from pool_store import histories_of, is_whole, pool_file, pool_files, pool_names, read_pool
from pooled_prior import PooledPrior, pool_moments
from pooling import POOL_HISTORY_DAYS
from protocol import protocol_profile
from settings import Settings
from task_pool import Shared, tell

KEPT_HISTORIES: Final = 2  # per process: tasks of one market follow each other


@lru_cache(maxsize=KEPT_HISTORIES)
def load_history(settings: Settings, asset: str, frequency: Frequency) -> MarketHistory:
    """Everything that the source has of the asset. Raises: DataError."""
    return open_source(settings).load(asset, frequency).history


@lru_cache(maxsize=1)
def load_peers(settings: Settings, frequency: Frequency) -> tuple[MarketHistory, ...]:
    """All assets that a set may lean on, whichever are trained."""
    return histories_of(open_source(settings), frequency)


def names_of_pools(settings: Settings, frequency: Frequency, first: int, last: int) -> list[str]:
    """`pool_names` of the source's assets, each worked out once."""
    return [_pool_name(settings, frequency, moment) for moment in pool_moments(first, last)]


@lru_cache(maxsize=1024)
def _pool_name(settings: Settings, frequency: Frequency, moment: int) -> str:
    (name,) = pool_names(load_peers(settings, frequency), moment, moment)
    return name


def shared_history(settings: Settings, asset: str, frequency: Frequency) -> Shared:
    """The history of an asset, for tasks."""
    return Shared(load_history, (settings, asset, frequency), _history_key)


def _history_key(history: MarketHistory) -> str:
    return f"{history.asset}-{history.frequency.value}-{bars_key(history)}"


def shared_priors(
    settings: Settings, frequency: Frequency, first: int, last: int, folder: Path
) -> list[Shared]:
    """What a training leans on whose fits end between `first` and `last`, for tasks.

    Pools that the folder does not have are fitted here. Raises: StateError, BusyError.
    """
    names = names_of_pools(settings, frequency, first, last)
    if not all(is_whole(folder / name) for name in names):
        pool_files(load_peers(settings, frequency), first, last, folder)
    return [shared_pool(folder / name) for name in names]


def stored_pool(settings: Settings, frequency: Frequency, moment: int, folder: Path) -> Path:
    """The pool of the source's assets at a moment; no bars are read if the folder has it.

    A live source shows as many days as the settings say, counted from now; pools need
    what came before their moment, or they would lose a day of it every day.
    Raises: StateError, BusyError.
    """
    source = open_source(settings)
    if source.live:
        days = POOL_HISTORY_DAYS[frequency] + (source.now() - moment) / DAY_S + 1
        source = open_source(replace(settings, days=min(max(settings.days, days), LONGEST_DAYS)))
    return pool_file(source, frequency, moment, folder)


def shared_pool(file: Path) -> Shared:
    """A pool, for tasks."""
    return Shared(read_pool, (file,), _prior_key)


def _prior_key(prior: PooledPrior | None) -> str:
    return content_key(None if prior is None else prior.to_dict())


def train_set(
    history: MarketHistory,
    priors: Sequence[PooledPrior | None],
    settings: Settings,
    until: int | None,
    name: str,
) -> TrainingResult:
    """Train on what is known of the history at `until`, and `tell` every step.

    Raises: InsufficientHistory.
    """
    return train(
        history if until is None else history.known_at(until),
        days=settings.days,
        seed=settings.seed,
        profile=protocol_profile(settings.profile),
        priors=[prior for prior in priors if prior is not None],
        progress=lambda step: tell(name, step),
    )
