"""Where bars come from: the seam between the miner and its price sources.

Owns the `BarSource` protocol and the sources: Parquet archives, the simulated
market, and the live feeds as the collector stored them. What archives deliver is
cleaned by `bar_cleaning`; an archive's series is read from one feed alone. Arrow
tables end here; the rest of the program sees `domain.Bars`.

An archive folder holds either `<ASSET>_<1m|5m>.parquet` files with the columns
`ts` (open time, Unix seconds or a timestamp) and `close`, and where the feed has
them `open`, `high`, `low`, `volume`; or daily partitions
`<ASSET>/1m/date=YYYY-MM-DD.parquet` with `timestamp` and `close`. Where a folder
has both for an asset, the single file is used.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bar_cleaning import (
    MINUTE_S,
    BarSieve,
    BoolArray,
    SetAsideBar,
    bars_from_minutes,
    summarise_set_aside,
)
from bar_store import BarStore, FileMark
from clock import Clock, open_clock
from config import ASSETS, DAY_S, FREQUENCIES, VENUE_BARS_KEPT, Frequency, asset_spec
from domain import Bars, MarketHistory
from errors import ConfigError, DataError, SourceUnavailable
from feed_plans import FeedPlan, feed_plans
from feed_seams import coarse_bars, in_time_order, join_feeds
from growing_bars import GrowingBars
from protocol import protocol_profile
from settings import Settings
from simulated_market import simulate_bars
from spans import Span

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- the seam


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedHistory:
    """A history and the rows that were set aside on the way to it."""

    history: MarketHistory
    set_aside: tuple[SetAsideBar, ...]


class BarSource(Protocol):
    """A source of bars of known assets."""

    @property
    def name(self) -> str:
        """The source as settings, state and manifests spell it."""

    @property
    def live(self) -> bool:
        """Whether "now" is the clock, and not the end of what the source holds."""

    @property
    def unknown_assets(self) -> tuple[str, ...]:
        """Symbols that the source holds and `config.ASSETS` does not know."""

    def frequencies(self) -> Mapping[str, tuple[Frequency, ...]]:
        """What each available known asset can serve; cheap, reads no bars."""

    def load(self, asset: str, frequency: Frequency) -> LoadedHistory:
        """All that the source has of the asset.

        Raises: UnknownAsset for a symbol that no validator uses; DataError if
        the source lacks the asset, the frequency or any usable bar.
        """

    def now(self) -> int:
        """Unix seconds: the clock, or the latest end of a bar over all assets."""


class VersionedSource(BarSource, Protocol):
    """A source that can tell without a look at its bars whether they are what they were."""

    def version(self, asset: str, frequency: Frequency, until: int) -> Any:
        """Plain values that change whenever a bar known by then may have; reads no bars."""


@runtime_checkable
class GrowingSource(BarSource, Protocol):
    """A source whose bars grow and are corrected while it is read."""

    def recent(self, asset: str, frequency: Frequency) -> MarketHistory | None:
        """The last days of bars; the same object again while nothing changed.

        None while no feed of the asset's price has a bar of it.
        """


def open_source(settings: Settings) -> VersionedSource:
    """The source that the settings name; opening one reads no bars and calls no host.

    Raises: ConfigError if a setting is missing or bad; SourceUnavailable if the
    folder has nothing to read.
    """
    if settings.source == "simulated":
        return SimulatedSource(seed=settings.seed)
    if settings.source == "archive":
        if settings.archive_dir is None:
            raise ConfigError(
                "source 'archive' needs a folder of Parquet files; name it with --archive-dir."
            )
        return ArchiveSource(settings.archive_dir)
    return LiveSource(settings, open_clock(settings))


# ---------------------------------------------------------------- live

_Read = TypeVar("_Read")


class LiveSource:
    """What the collector stored of live feeds (`bars/` in the state folder).

    It calls no host itself: whatever is stored can be read, also while every feed
    is unreachable. LF bars are made of minutes, and are the feed's own five-minute
    bars where minutes are missing; time before the scored feed's first bar, and
    holes of days, show other feeds' bars on the scored feed's level. While no bar of
    the scored feed is stored at all, another feed of its price stands in.
    """

    live: Final = True
    unknown_assets: Final[tuple[str, ...]] = ()

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.name = settings.source
        plans = feed_plans(settings.source, protocol_profile(settings.profile))
        chosen = plans if settings.served_assets is None else settings.served_assets
        self.plans = {asset: plan for asset, plan in plans.items() if asset in chosen}
        self._clock = clock
        self._days = settings.days
        self._memory_days = settings.memory_days
        self._store = BarStore(settings.state_dir)
        self._windows: dict[tuple[str, str, int], _Window] = {}
        self._recent: dict[tuple[str, Frequency], tuple[_Parts, MarketHistory | None]] = {}
        self._lock = Lock()

    def frequencies(self) -> Mapping[str, tuple[Frequency, ...]]:
        """What the profile asks, whether or not there are bars yet."""
        return {asset: plan.frequencies for asset, plan in self.plans.items()}

    def now(self) -> int:
        """The clock, Unix seconds."""
        return int(self._clock.now())

    def load(self, asset: str, frequency: Frequency) -> LoadedHistory:
        """Stored bars of as many days as the settings say.

        Raises: UnknownAsset; DataError if no feed of its price has a bar of it yet.
        """
        if frequency not in _require_asset(asset, self):
            raise DataError(
                f"no validator asks {asset} at {frequency.value} under this profile; it is asked "
                f"at {', '.join(entry.value for entry in self.plans[asset].frequencies)}."
            )
        start = self._first_day(self._days)
        parts = self._parts(
            self.plans[asset],
            frequency,
            lambda venue, bar_s: self._store.load(venue, asset, bar_s, start),
        )
        history = _live_history(self.plans[asset], frequency, parts, self.name)
        if history is None:
            raise DataError(
                f"no bar of {asset} from {self.plans[asset].scored.name} is stored yet; let "
                "train_models.py or miner.py collect some while the feed can be reached."
            )
        return LoadedHistory(history=history, set_aside=())

    def version(self, asset: str, frequency: Frequency, until: int) -> Any:
        """The marks of the day files of every series that is read, however old."""
        plan = self.plans[asset]
        parts = self._parts(
            plan, frequency, lambda venue, bar_s: self._store.marks(venue, asset, bar_s, 0)
        )
        marks = [
            sorted((day, *mark) for day, mark in (part or {}).items() if day * DAY_S < until)
            for part in parts
        ]
        return [[plan.scored.name, *(feed.name for feed in plan.others)], marks]

    def recent(self, asset: str, frequency: Frequency) -> MarketHistory | None:
        """The last `memory_days`; the same object again while nothing changed."""
        with self._lock:
            start = self._first_day(self._memory_days)
            parts = self._parts(
                self.plans[asset],
                frequency,
                lambda venue, bar_s: self._window(venue, asset, bar_s).read(start),
            )
            held = self._recent.get((asset, frequency))
            if held is None or any(old is not new for old, new in zip(held[0], parts, strict=True)):
                held = parts, _live_history(self.plans[asset], frequency, parts, self.name)
                self._recent[asset, frequency] = held
            return held[1]

    def _parts(
        self, plan: FeedPlan, frequency: Frequency, read: Callable[[str, int], _Read | None]
    ) -> "tuple[_Read | None, ...]":
        """The scored feed's minutes, its own coarser bars, and the other feeds' minutes."""
        scored, bar_s = plan.scored.venue, FREQUENCIES[frequency].bar_s
        has_coarse = bar_s != MINUTE_S and scored in VENUE_BARS_KEPT
        return (
            read(scored.value, MINUTE_S),
            read(scored.value, bar_s) if has_coarse else None,
            *(read(feed.venue.value, MINUTE_S) for feed in plan.others),
        )

    def _window(self, venue: str, asset: str, bar_s: int) -> "_Window":
        key = (venue, asset, bar_s)
        if key not in self._windows:
            self._windows[key] = _Window(self._store, key)
        return self._windows[key]

    def _first_day(self, days: float) -> int:
        """A midnight that lies the days back, so that windows move once a day."""
        return int(self.now() // DAY_S - days) * DAY_S


_Parts: TypeAlias = tuple[Bars | None, ...]


class _Window:
    """The stored bars of one series since some day; a read takes in what was written since."""

    def __init__(self, store: BarStore, series: tuple[str, str, int]) -> None:
        self._store = store
        self._series = series
        self._marks: dict[int, FileMark] = {}
        self._grown = GrowingBars()
        self._bars: Bars | None = None

    def read(self, start: int) -> Bars | None:
        """The bars from midnight `start` on; the same object while their files are the same."""
        marks = self._store.marks(*self._series, start)
        if marks != self._marks:
            before = {day: mark for day, mark in self._marks.items() if day >= start // DAY_S}
            days = sorted(marks.keys() | before.keys())
            changed = [day for day in days if marks.get(day) != before.get(day)]
            self._bars = self._follow(days, changed, start)
            # What could not be read just now is tried again.
            self._marks = {
                day: mark
                for day, mark in marks.items()
                if not self._store.is_unreadable(*self._series, day)
            }
        return self._bars

    def _follow(self, days: list[int], changed: list[int], start: int) -> Bars | None:
        if not changed:  # the first days were left behind, at most
            return self._grown.between(start, None)
        if changed == days:  # the first time: one pass
            parts = [self._part(days[0], days[-1])]
        else:
            later = [day for day in days if day >= changed[0]]
            parts = [self._part(day, day) if day in changed else self._held(day) for day in later]
        held = [part for part in parts if part is not None and len(part)]
        tail = in_time_order(held) if held else None
        return self._grown.renew(changed[0] * DAY_S, tail, start=start)

    def _held(self, day: int) -> Bars | None:
        return self._grown.between(*self._span(day, day))

    def _part(self, first: int, last: int) -> Bars | None:
        return self._store.load(*self._series, *self._span(first, last))

    def _span(self, first: int, last: int) -> Span:
        """From when to when bars close that open on the days."""
        return first * DAY_S, (last + 1) * DAY_S + self._series[2] - 1


def _live_history(
    plan: FeedPlan, frequency: Frequency, parts: _Parts, source: str
) -> MarketHistory | None:
    minutes, own, *others = parts
    stand_in = _stand_in(plan, others) if minutes is None and own is None else None
    if stand_in is not None:
        minutes = others[stand_in]
        others[stand_in] = None
    price_bars = own if minutes is None else minutes
    if price_bars is None:
        return None
    bar_s = FREQUENCIES[frequency].bar_s
    bars = minutes if bar_s == MINUTE_S else coarse_bars(minutes, own, bar_s=bar_s)
    coarse = [
        other if bar_s == MINUTE_S else bars_from_minutes(other, bar_s=bar_s)
        for other in others
        if other is not None
    ]
    if bars is None:
        return None
    return MarketHistory(
        asset=plan.asset,
        frequency=frequency,
        bars=join_feeds(bars, coarse),
        price_bars=price_bars,
        source=source,
        stand_in=None if stand_in is None else plan.others[stand_in].name,
    )


def _stand_in(plan: FeedPlan, others: Sequence[Bars | None]) -> int | None:
    """Which other feed speaks for a scored one without any bar; the freshest, of equals the best.

    Only one of about the same price: the moves of a tenth of an index are known, its
    level is not.
    """
    ends = {
        number: bars.end_ts
        for number, (feed, bars) in enumerate(zip(plan.others, others, strict=True))
        if feed.same_price and bars is not None
    }
    return max(ends, key=lambda number: ends[number]) if ends else None


# ---------------------------------------------------------------- simulated


@dataclass(frozen=True, kw_only=True)
class SimulatedSource:
    """The seeded market of `simulated_market`; its clock stands still.

    The default end is a Thursday, 13:00 in New York, before a long weekend: all
    markets are open, and the day ahead has closed hours in it.
    """

    seed: int = 0
    end_ts: int = 1_768_500_000
    days: float = 60
    assets: tuple[str, ...] = ("BTC", "XAU", "SP500")
    name: str = "simulated"
    live: bool = False
    unknown_assets: tuple[str, ...] = ()
    _bars: dict[str, Bars] = field(default_factory=dict, init=False, repr=False)

    def frequencies(self) -> Mapping[str, tuple[Frequency, ...]]:
        """Both frequencies for every simulated asset."""
        return {asset: tuple(Frequency) for asset in self.assets}

    def load(self, asset: str, frequency: Frequency) -> LoadedHistory:
        """The asset's whole simulated history. Raises: UnknownAsset, DataError."""
        _require_asset(asset, self)
        if asset not in self._bars:
            self._bars[asset] = simulate_bars(
                asset, end_ts=self.end_ts, days=self.days, seed=self.seed
            )
        history = _history(asset, frequency, self._bars[asset], self.name)
        return LoadedHistory(history=history, set_aside=())

    def version(self, asset: str, frequency: Frequency, until: int) -> Any:
        """What the market is made from."""
        return [asset, frequency.value, until, self.seed, self.end_ts, self.days]

    def now(self) -> int:
        """The latest end of a simulated bar, Unix seconds."""
        return max(self.load(asset, Frequency.HF).history.anchor_ts for asset in self.assets)


def _require_asset(asset: str, source: BarSource) -> tuple[Frequency, ...]:
    """What the source serves of the asset. Raises: UnknownAsset, DataError."""
    asset_spec(asset)
    available = source.frequencies()
    if asset not in available:
        raise DataError(
            f"source {source.name!r} has no bars of {asset}; it has {', '.join(available)}."
        )
    return available[asset]


def _history(asset: str, frequency: Frequency, bars: Bars, source: str) -> MarketHistory:
    """Put bars on the frequency's grid, keeping finer ones for the anchor price."""
    bar_s = FREQUENCIES[frequency].bar_s
    on_grid = bars if bars.bar_s == bar_s else bars_from_minutes(bars, bar_s=bar_s)
    return MarketHistory(
        asset=asset, frequency=frequency, bars=on_grid, price_bars=bars, source=source
    )


# ---------------------------------------------------------------- archives

_BAR_NAMES: Final[Mapping[str, int]] = {"1m": 60, "5m": 300}
_SERIES_FILE: Final = re.compile(r"(?P<asset>.+)_(?P<bar>1m|5m)\.parquet")
_PARTITION: Final = re.compile(r"date=\d{4}-\d{2}-\d{2}\.parquet")
_PRICE_COLUMNS: Final = ("open", "high", "low", "close", "volume")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """The files of one asset and bar length, oldest first."""

    asset: str
    bar_s: int
    paths: tuple[Path, ...]
    partitioned: bool = False

    @property
    def feed(self) -> str:
        return f"archive:{self.asset}_{self.bar_s // MINUTE_S}m"

    @property
    def place(self) -> Path:
        """The file or folder to name in a message."""
        return self.paths[0].parent if self.partitioned else self.paths[0]


class ArchiveSource:
    """A folder of Parquet files, read once for what it holds and then as asked.

    Raises: SourceUnavailable if the folder is missing or has no series of a
    known asset.
    """

    name: Final = "archive"
    live: Final = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = _find_series(folder)
        self._series = {key: entry for key, entry in found.items() if key[0] in ASSETS}
        self.unknown_assets = tuple(sorted({asset for asset, _ in found} - set(ASSETS)))
        if not self._series:
            strangers = ", ".join(self.unknown_assets)
            raise SourceUnavailable(
                f"archive folder {folder} has no bars of a known asset"
                + (f" (only of {strangers})" if strangers else "")
                + "; it needs files such as BTC_1m.parquet or BTC/1m/date=2026-01-31.parquet."
            )

    def frequencies(self) -> Mapping[str, tuple[Frequency, ...]]:
        """HF where there are one-minute bars; LF where there are any."""
        held = {asset for asset, _ in self._series}
        return {
            asset: tuple(Frequency) if (asset, MINUTE_S) in self._series else (Frequency.LF,)
            for asset in ASSETS
            if asset in held
        }

    def series(self) -> list[tuple[str, int]]:
        """Every stored series of a known asset, as (asset, bar length in seconds)."""
        return sorted(self._series)

    def load(self, asset: str, frequency: Frequency) -> LoadedHistory:
        """The asset's whole history; LF prefers five-minute files over minutes.

        Raises: UnknownAsset, DataError.
        """
        if frequency not in _require_asset(asset, self):
            raise DataError(
                f"archive folder {self._folder} has only five-minute bars of {asset}, and HF "
                f"needs one-minute bars; add {asset}_1m.parquet or ask for LF."
            )
        bars, set_aside = self.load_bars(asset, self._bar_s(asset, frequency))
        history = _history(asset, frequency, bars, self.name)
        return LoadedHistory(history=history, set_aside=set_aside)

    def version(self, asset: str, frequency: Frequency, until: int) -> Any:
        """Name, age and size of the files that are read; of partitions those before `until`."""
        series = self._series[asset, self._bar_s(asset, frequency)]
        days = [not series.partitioned or _day_of(path) < until for path in series.paths]
        files = [(path, path.stat()) for path in compress(series.paths, days)]
        return [(str(path), status.st_mtime_ns, status.st_size) for path, status in files]

    def _bar_s(self, asset: str, frequency: Frequency) -> int:
        """The bar length of the series that serves the frequency."""
        bar_s = FREQUENCIES[frequency].bar_s
        return bar_s if (asset, bar_s) in self._series else MINUTE_S

    def load_bars(self, asset: str, bar_s: int) -> tuple[Bars, tuple[SetAsideBar, ...]]:
        """One series of `series()`, cleaned, with the rows set aside. Raises: DataError."""
        return _read_series(self._series[asset, bar_s])

    def now(self) -> int:
        """The latest end of a usable bar over all assets, Unix seconds."""
        return self._now

    @cached_property
    def _now(self) -> int:
        ends: list[int] = []
        faults: list[str] = []
        for series in self._series.values():
            try:
                ends.append(_last_end(series))
            except DataError as error:
                faults.append(str(error))
        if not ends:
            others = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
            raise DataError(
                f"archive folder {self._folder} has no usable bar in any file{others}: {faults[0]}"
            )
        return max(ends)


def _find_series(folder: Path) -> dict[tuple[str, int], _Series]:
    """Every series below the folder, or below its `market_data/prices`."""
    nested = folder / "market_data" / "prices"
    try:
        if not folder.is_dir():
            fault = "is not a folder" if folder.exists() else "does not exist"
            raise SourceUnavailable(
                f"archive folder {folder} {fault}; name an existing one with --archive-dir."
            )
        roots = [folder, nested] if nested.is_dir() else [folder]
        entries = sorted(entry for root in roots for entry in root.iterdir())
        found = [*map(_partitioned_series, entries), *map(_file_series, entries)]
    except OSError as error:
        raise SourceUnavailable(
            f"archive folder {folder} cannot be read ({error.strerror}); check its permissions."
        ) from error
    return {(entry.asset, entry.bar_s): entry for entry in found if entry is not None}


def _file_series(path: Path) -> _Series | None:
    match = _SERIES_FILE.fullmatch(path.name)
    if match is None or not path.is_file():
        return None
    return _Series(asset=match["asset"], bar_s=_BAR_NAMES[match["bar"]], paths=(path,))


def _partitioned_series(path: Path) -> _Series | None:
    minutes = path / "1m"
    if not minutes.is_dir():
        return None
    days = sorted(day for day in minutes.iterdir() if _is_of_a_day(day))
    if not days:
        return None
    return _Series(asset=path.name, bar_s=MINUTE_S, paths=tuple(days), partitioned=True)


def _is_of_a_day(path: Path) -> bool:
    if not _PARTITION.fullmatch(path.name):
        return False
    try:
        _day_of(path)
    except ValueError:
        log.warning(
            "%s is named after no day and left out; rename it to date=YYYY-MM-DD.parquet.", path
        )
        return False
    return True


def _last_end(series: _Series) -> int:
    """When the last usable bar of the series closed.

    Raises: DataError, the newest file's, if none has one.
    """
    newest: DataError | None = None
    for path in reversed(series.paths):
        try:
            return _clean(_read_table(path, ("close",)), series)[0].end_ts
        except DataError as error:
            newest = newest or error
    raise newest or AssertionError("a series has files")


def _read_series(series: _Series) -> tuple[Bars, tuple[SetAsideBar, ...]]:
    """Read and clean the files of a series.

    An unreadable day of a partitioned series is set aside; an unreadable only
    file refuses the series. Raises: DataError.
    """
    tables: list[pa.Table] = []
    unreadable: list[SetAsideBar] = []
    for path in series.paths:
        try:
            tables.append(_read_table(path, _PRICE_COLUMNS))
        except DataError as error:
            if not series.partitioned:
                raise
            unreadable.append(SetAsideBar(ts=_day_of(path), close=np.nan, reason=str(error)))
    if not tables:
        raise DataError(
            f"none of the {len(unreadable)} files of {series.feed} can be read; "
            f"the first: {unreadable[0].reason}"
        )
    bars, set_aside = _clean(pa.concat_tables(tables), series)
    return bars, (*unreadable, *set_aside)


def _day_of(partition: Path) -> int:
    day = np.datetime64(partition.stem.removeprefix("date="), "s")
    return int(day.astype(np.int64))


# ---------------------------------------------------------------- reading a file

_NEEDED: Final = (
    "needed are ts or timestamp (whole numbers or timestamps) and close (numbers), and there "
    "may be open, high, low and volume (numbers)"
)


def _read_table(path: Path, prices: tuple[str, ...]) -> pa.Table:
    """One file in the common form: ts, the price columns, origin, final.

    Raises: DataError if the file is no Parquet or its columns do not fit.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            time_column = _check_columns(path, schema)
            extra = (time_column, "source", "is_final", *prices)
            table = file.read([name for name in extra if name in schema.names])
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({_first_line(error)}); replace or remove the file."
        ) from error
    missing = pa.nulls(len(table))
    columns = {"ts": _unix_seconds(table[time_column])}
    for name in prices:
        column = table[name] if name in schema.names else missing
        columns[name] = column.cast(pa.float64(), safe=False)
    for name, column, kind in (
        ("origin", "source", pa.string()),
        ("final", "is_final", pa.bool_()),
    ):
        try:
            columns[name] = (table[column] if column in schema.names else missing).cast(kind)
        except pa.ArrowException as error:
            raise DataError(
                f"{path} has no {kind} in the column {column} ({_first_line(error)}); mend the "
                "column or leave it out."
            ) from error
    return pa.table(columns)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _check_columns(path: Path, schema: pa.Schema) -> str:
    """The name of the time column. Raises: DataError naming what was found and what is needed."""
    found = ", ".join(f"{column.name} ({column.type})" for column in schema)
    time_column = next((name for name in ("ts", "timestamp") if name in schema.names), "ts")
    lacking = [name for name in (time_column, "close") if name not in schema.names]
    doubled = [name for name, count in Counter(schema.names).items() if count > 1]
    unfit = [] if lacking or doubled else _unfit_columns(schema, time_column)
    for names, fault in ((lacking, "lacks"), (doubled, "repeats"), (unfit, "has no numbers in")):
        if names:
            raise DataError(
                f"{path} {fault} the column {' and '.join(names)}: found are "
                f"{found or 'none'}; {_NEEDED}."
            )
    return time_column


def _unfit_columns(schema: pa.Schema, time_column: str) -> list[str]:
    kinds = pa.types
    unfit = [
        name
        for name in _PRICE_COLUMNS
        if name in schema.names and not _is_number(schema.field(name).type)
    ]
    time_type = schema.field(time_column).type
    if not (kinds.is_timestamp(time_type) or _is_number(time_type)):
        unfit.insert(0, time_column)
    return unfit


def _is_number(kind: pa.DataType) -> bool:
    is_any_of = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    return any(check(kind) for check in is_any_of)


def _unix_seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole Unix seconds as int64; null where there is no time or no whole second."""
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64(), safe=False)
    seconds = column.cast(pa.float64(), safe=False)
    whole = pc.equal(pc.floor(seconds), seconds)
    return pc.if_else(whole, seconds, None).cast(pa.int64(), safe=False)


# ---------------------------------------------------------------- cleaning


def _clean(table: pa.Table, series: _Series) -> tuple[Bars, tuple[SetAsideBar, ...]]:
    """Bars in rising time order, and every row that cannot be one of them.

    Raises: DataError if no usable bar is left.
    """
    origin, is_of_origin = _newest_origin(table)
    held = [name for name in _PRICE_COLUMNS if name in table.column_names]
    sieve = BarSieve.of(
        _numpy(table["ts"], 0), {name: _numpy(table[name], np.nan) for name in held}
    )
    sieve.drop_block(~is_of_origin, f"rows of another feed than {origin}, the newest")
    sieve.drop(~_numpy(table["final"], fill=True)[is_of_origin], "not final yet")
    if series.partitioned:
        sieve.forget(np.isnan(sieve.close))  # there, NaN is how a gap is written
    bars = sieve.candles(
        bar_s=series.bar_s, feed=f"{series.feed}@{origin}" if origin else series.feed
    ).bars
    if not len(bars):
        found = "; ".join(summarise_set_aside(sieve.set_aside)) or "it is empty"
        raise DataError(f"{series.place} has no usable bar: {found}.")
    return bars, tuple(sieve.set_aside)


def _newest_origin(table: pa.Table) -> tuple[str | None, BoolArray]:
    """The feed that the latest row names, and which rows are of it (all, if none is named)."""
    if not len(table) or table["origin"].null_count == len(table):
        return None, np.ones(len(table), dtype=np.bool_)
    named = table.filter(pc.and_(pc.is_valid(table["origin"]), pc.is_finite(table["close"])))
    if not len(named):
        return None, np.ones(len(table), dtype=np.bool_)
    newest = named["origin"][int(np.argmax(_numpy(named["ts"], 0)))].as_py()
    return newest, _numpy(pc.equal(table["origin"], newest), fill=False)


def _numpy(column: pa.ChunkedArray, fill: float) -> npt.NDArray[Any]:
    """A writable array with nulls filled."""
    return np.array(pc.fill_null(column, fill).to_numpy())
