"""What a rehearsed miner writes to the disk: model sets, states, scores, log lines.

Nothing here writes. Sets are seen as they are published, the rest is read while the
miner is stopped.
"""

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import orjson

from bar_store import BARS_FOLDER
from clock import RehearsalClock
from config import Frequency
from data_fetcher import LiveSource
from forecast_engine import STATE_KIND, STATE_SCHEMA
from ledger import LEDGER_FILE
from lgbm_predictor import load_model_set
from market_view import MarketState, view_with_models
from model_store import MANIFEST, published_sets
from rehearsal_findings import DiskUse, PairScores, Published, name_of, read_log_line
from rehearsal_plan import Pair
from settings import Settings
from state_store import StateStore

MEGABYTE: Final = 1e6


class SetWatch:
    """Takes note of model sets as they are published, on a thread of its own."""

    def __init__(self, model_dir: Path, pairs: Sequence[Pair], clock: RehearsalClock) -> None:
        self._model_dir = model_dir
        self._pairs = pairs
        self._clock = clock
        self._current: dict[Pair, Path] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="set-watch", daemon=True)
        self.published: list[Published] = []

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Look once more and end."""
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self._look()

    def _look(self) -> None:
        for pair in self._pairs:
            folders = published_sets(self._model_dir, *pair)
            if folders and self._current.get(pair) != folders[0]:
                self._current[pair] = folders[0]
                manifest = orjson.loads((folders[0] / MANIFEST).read_bytes())
                self.published.append(
                    Published(
                        pair=pair,
                        seen_ts=self._clock.now(),
                        trained_until=int(manifest["trained_until"]),
                    )
                )


def disk_use(settings: Settings, at_ts: float) -> DiskUse:
    """What state and models take on the disk now."""
    bars = ledger = rest = 0
    files = 0
    for path, size in _sizes(settings.state_dir):
        if path.parts[0] == BARS_FOLDER:
            bars += size
            continue
        files += 1
        if path.name.startswith(LEDGER_FILE):  # with its write-ahead log
            ledger += size
        else:
            rest += size
    models = [size for _, size in _sizes(settings.model_dir)]
    return DiskUse(
        at_ts=at_ts,
        ledger_mb=ledger / MEGABYTE,
        bars_mb=bars / MEGABYTE,
        rest_mb=rest / MEGABYTE,
        models_mb=sum(models) / MEGABYTE,
        files=files + len(models),
    )


def _sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file below a folder, by its path in there; the miner may write meanwhile."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                yield path.relative_to(folder), path.stat().st_size


def read_states(settings: Settings, pairs: Sequence[Pair]) -> dict[Pair, MarketState]:
    """The state of every pair that the miner saved."""
    store = StateStore(settings.state_dir)
    found = {}
    for asset, frequency in pairs:
        name = f"{settings.source}/{asset}_{frequency.value}"
        document = store.load(STATE_KIND, name, STATE_SCHEMA)
        if document is not None:
            found[asset, frequency] = MarketState.from_dict(document["states"][-1])
    return found


def states_carried_on(
    settings: Settings, stopped: Mapping[Pair, MarketState]
) -> tuple[int, tuple[str, ...]]:
    """How many states at the end are those at the stop, taken through the bars since.

    Where a new model set came in between there is nothing to compare. Also returns
    the names of those that went astray.
    """
    carried, astray = 0, []
    for pair, at_end in read_states(settings, tuple(stopped)).items():
        at_stop = stopped[pair]
        if at_stop.model_id != at_end.model_id:
            continue
        source = LiveSource(settings, _Still(at_end.until))
        history = source.recent(*pair)
        folder = _folder_of(settings.model_dir, pair, at_end.model_id)
        if history is None or folder is None:
            continue
        known = history.known_at(at_end.until)
        _, expected = view_with_models(load_model_set(folder), known, at_stop)
        if _same(expected, at_end):
            carried += 1
        else:
            astray.append(name_of(pair))
    return carried, tuple(astray)


@dataclass(frozen=True, slots=True)
class _Still:
    """A clock that stands still."""

    time: float

    def now(self) -> float:
        """Unix seconds."""
        return self.time


def _folder_of(model_dir: Path, pair: Pair, model_id: str) -> Path | None:
    folders = published_sets(model_dir, *pair)
    return next((folder for folder in folders if folder.name == model_id), None)


def _same(state: MarketState, other: MarketState) -> bool:
    """Whether two states are the same to the last bit."""
    return orjson.dumps(state.to_dict(), option=orjson.OPT_SERIALIZE_NUMPY) == orjson.dumps(
        other.to_dict(), option=orjson.OPT_SERIALIZE_NUMPY
    )


_COUNTS: Final = """
SELECT sum(start_ts + length_s <= :by), sum(start_ts + length_s <= :by AND score IS NOT NULL),
    avg(score), avg(CASE WHEN score IS NOT NULL THEN ewma_t END)
FROM answers WHERE asset = :asset AND frequency = :frequency
"""


def read_scores(
    state_dir: Path, pairs: Sequence[Pair], matured_by: float
) -> dict[Pair, PairScores]:
    """What the ledger holds of every pair; nothing without a ledger."""
    path = state_dir / LEDGER_FILE
    if not path.exists():
        return {}
    found = {}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        for asset, frequency in pairs:
            wanted = {"by": matured_by, "asset": asset, "frequency": frequency.value}
            matured, scored, mean, yardstick = ledger.execute(_COUNTS, wanted).fetchone()
            found[asset, frequency] = PairScores(
                matured=matured or 0,
                scored=scored or 0,
                mean_bp=mean,
                ratio=mean / yardstick if mean and yardstick else None,
            )
    return found


def with_seconds(published: Sequence[Published], lines: Sequence[str]) -> list[Published]:
    """The sets with how long their trainings took, which the log tells in the same order."""
    took: dict[Pair, list[float]] = {}
    for line in lines:
        told = read_log_line(line) if "event=trained" in line else {}
        if told.get("event") == "trained" and told.keys() >= {"asset", "frequency", "seconds"}:
            pair = (told["asset"], Frequency(told["frequency"]))
            took.setdefault(pair, []).append(float(told["seconds"]))
    timed = []
    for entry in published:
        of_it = took.get(entry.pair, [])
        timed.append(replace(entry, seconds=of_it.pop(0) if of_it else None))
    return timed
