"""Processes that write until they are killed, and tell what they had been promised.

Each runs in a child of a server process that has the imports ready, so that a
kill costs milliseconds. Whatever a victim sends was acknowledged before.
"""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from bar_store import BarStore
from config import DAY_S, Frequency
from data_fetcher import ArchiveSource, LoadedHistory
from domain import Bars, ForecastRequest, MarketHistory
from forecast_engine import ForecastEngine
from ledger import LEDGER_FILE, AnswerEntry, Ledger, PromptEntry
from model_store import publish_set
from protocol import protocol_profile
from settings import Settings
from state_store import locked
from tests.entries import hour_answer, prompt_entry

START: Final = 1_765_756_800  # 2025-12-15, midnight UTC
HOUR: Final = protocol_profile("2026-09").competitions["crypto-1h"]

_PROCESSES: Final = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.faults.victims", "lgbm_trainer"])


@cache
def _serve() -> None:
    """Start the server where it finds the imports: of our path it knows nothing by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


@contextmanager
def victim(work: Callable[..., None], *args: object) -> Iterator[tuple[Connection, Any]]:
    """A child that does `work(acknowledge, *args)`: what it sends, and its process."""
    _serve()
    told, acknowledge = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=work, args=(acknowledge, *args), daemon=True)
    process.start()
    acknowledge.close()
    try:
        yield told, process
    finally:
        process.kill()
        process.join()
        told.close()


def killed(work: Callable[..., None], *args: object, dice: random.Random, spread_s: float) -> int:
    """Kill a victim at work, at a random moment after its first word; its last word.

    One that came to its end first was not killed: then the next one is, a little sooner.
    """
    while True:
        with victim(work, *args) as (told, process):
            last = int(told.recv())
            time.sleep(dice.uniform(0, spread_s))
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                return max([last, *map(int, said_by(told))])
            assert process.exitcode == 0
            spread_s *= 0.9


def ended(work: Callable[..., None], *args: object) -> int:
    """Let a victim come to its end; its last word."""
    with victim(work, *args) as (told, process):
        words = list(said_by(told))
        process.join()
        assert process.exitcode == 0
        return int(words[-1])


def seconds_at_work(work: Callable[..., None], *args: object) -> float:
    """Let a victim come to its end; how long that was after its first word."""
    with victim(work, *args) as (told, process):
        told.recv()
        began = time.monotonic()
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - began


def said_by(told: Connection) -> Iterator[Any]:
    """Everything a victim says until its end."""
    while True:
        try:
            yield told.recv()
        except EOFError:
            return


# ---------------------------------------------------------------- bars


def truth(first: int, n: int) -> Bars:
    """Bars whose every value follows from their time."""
    minutes = np.arange(first, first + n, dtype=np.int64)
    close = 100 + np.sin(minutes) + minutes / 1000
    return Bars(
        open_ts=START + 60 * minutes,
        open=close - 0.25,
        high=close + 1,
        low=close - 1,
        close=close,
        volume=close * 3,
        bar_s=60,
        feed="binance:BTCUSDT",
    )


def append_bars(acknowledge: Connection, root: Path, first: int) -> None:
    """Append batches of a few minutes; says the minute before which all are stored."""
    store = BarStore(root)
    for n in [1, 2, 1, 700] * 10_000:  # now and then over midnight
        end = START + 60 * (first + n)
        store.append("binance", "BTC", truth(first, n), checked=(START + 60 * first, end))
        first += n
        acknowledge.send(first)


# ---------------------------------------------------------------- states


@dataclass
class GrowingArchive:
    """An archive of which more becomes known, and of which a window may be all that is held."""

    history: MarketHistory
    moment: int
    window_days: int | None = None
    name: str = "archive"
    live: bool = True
    unknown_assets: tuple[str, ...] = ()

    def frequencies(self) -> Mapping[str, tuple[Frequency, ...]]:
        """The one market."""
        return {self.history.asset: (self.history.frequency,)}

    def load(self, asset: str, frequency: Frequency) -> LoadedHistory:
        """What is known by the moment."""
        return LoadedHistory(history=self.recent(asset, frequency), set_aside=())

    def recent(self, asset: str, frequency: Frequency) -> MarketHistory:
        """What is known by the moment; of a window, from a midnight on as live sources hold it."""
        known = self.history.known_at(self.moment)
        if self.window_days is None:
            return known
        first = (self.moment // DAY_S - self.window_days) * DAY_S
        return replace(
            known,
            bars=known.bars.between(first, None),
            price_bars=known.price_bars.between(first, None),
        )

    def now(self) -> int:
        """The moment."""
        return self.moment


def growing_engine(
    archive_dir: Path, settings: Settings, moment: int, window_days: int | None = None
) -> tuple[GrowingArchive, ForecastEngine]:
    """An engine of BTC whose bars end at a moment."""
    history = ArchiveSource(archive_dir).load("BTC", Frequency.HF).history
    source = GrowingArchive(history, moment, window_days)
    return source, ForecastEngine.open(source, settings)


def checkpoint_states(
    acknowledge: Connection,
    archive_dir: Path,
    settings: Settings,
    window_days: int,
    moment: int,
    end: int,
) -> None:
    """Take in bar by bar, with a checkpoint after each; says which moment is on the disk."""
    source, engine = growing_engine(archive_dir, settings, moment, window_days)
    while True:
        engine.checkpoint()
        acknowledge.send(source.moment)
        if source.moment >= end:
            return
        source.moment += 60
        engine.refresh()


# ---------------------------------------------------------------- models


def publish_models(
    acknowledge: Connection, model_dir: Path, files: Mapping[str, bytes], first: int
) -> None:
    """Publish one set after the other; says the number of the one in use."""
    for number in range(first, first + 10_000):
        with locked(model_dir, "training"):
            publish_set(model_dir, "BTC", Frequency.HF, f"set-{number:06}", files)
        acknowledge.send(number)


def train(acknowledge: Connection, archive_dir: Path, model_dir: Path) -> None:
    """Train a small set and publish it; says 0 as it begins and 1 at the end."""
    import lgbm_trainer
    import path_fitting

    lgbm_trainer.SHAPE_PROMPTS = dict.fromkeys(Frequency, 3)  # type: ignore[misc]
    for module in (lgbm_trainer, path_fitting):
        module.VARIATIONS = path_fitting.VARIATIONS[:2]  # type: ignore[attr-defined]
    history = ArchiveSource(archive_dir).load("BTC", Frequency.LF).history
    acknowledge.send(0)
    with locked(model_dir, "training"):
        result = lgbm_trainer.train(history, days=8.0, seed=0, profile=protocol_profile("2026-09"))
        publish_set(model_dir, "BTC", Frequency.LF, result.model_id, result.files)
    acknowledge.send(1)


# ---------------------------------------------------------------- the ledger


def ledger_entry(number: int) -> tuple[PromptEntry, AnswerEntry]:
    """A prompt and its answer."""
    request = ForecastRequest(
        asset="BTC", start_ts=START + 60 * number, increment_s=60, length_s=3600, num_paths=20
    )
    return prompt_entry(request), hour_answer(number, n_paths=20)


def keep_answers(acknowledge: Connection, path: Path, first: int) -> None:
    """Keep answers one by one; says how many are on the disk."""
    with Ledger(path) as book:
        for number in range(first, first + 10_000):
            book.keep(*ledger_entry(number))
            book.flush()
            acknowledge.send(number + 1)


def keep_answers_beyond_a_limit(acknowledge: Connection, folder: Path, step: int) -> None:
    """Keep one answer, one while no file may grow beyond a limit, and one after.

    Every write beyond the limit is refused, SQLite's own too, and halfway where it begins
    below. Says of every limit whether the second was acknowledged, the starts of the
    prompts and how many answers were found at the end, and the names of all files; until
    a limit refused nothing.
    """
    _, hardest = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit, is_refused = 0, True
    while is_refused:
        path = folder / str(limit) / LEDGER_FILE
        book = Ledger(path)
        book.keep(*ledger_entry(0))
        book.flush()
        assert book.lost == 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hardest))
        book.keep(*ledger_entry(1))
        book.flush()
        is_refused = book.lost > 0
        book.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hardest, hardest))
        with Ledger(path) as after:
            after.keep(*ledger_entry(2))
            after.flush()
            found = {row["start_ts"] for row in after.prompts(0)}
            answers = len(after.pending("BTC", "hf", START + 9 * DAY_S, 10))
        names = sorted(path.name for path in path.parent.iterdir())
        acknowledge.send((not is_refused, found, answers, names))
        limit += step
