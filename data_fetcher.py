"""Where bars come from: the seam between the miner and its price sources.

Owns the `BarSource` protocol, the sources of this version (Parquet archives and
the simulated market), and the cleaning of what they deliver. Bars of different
feeds are never merged: every series is read from one feed alone. DataFrames and
Arrow tables end here; the rest of the program sees `domain.Bars`.

An archive folder holds either `<ASSET>_<1m|5m>.parquet` files with the columns
`ts` (open time, Unix seconds or a timestamp) and `close`, and where the feed has
them `open`, `high`, `low`, `volume`; or daily partitions
`<ASSET>/1m/date=YYYY-MM-DD.parquet` with `timestamp` and `close`. Where a folder
has both for an asset, the single file is used.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from config import ASSETS, FREQUENCIES, Frequency, Settings, asset_spec
from domain import Bars, FloatArray, IntArray, MarketHistory
from errors import ConfigError, DataError, SourceUnavailable
from simulated_market import simulate_bars

BoolArray: TypeAlias = npt.NDArray[np.bool_]

MINUTE_S: Final = 60

# ---------------------------------------------------------------- the seam


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAsideBar:
    """One row of a source that is not used, or a block of rows (see `reason`)."""

    ts: int  # open time as found, Unix seconds
    close: float  # as found; NaN if there was none
    reason: str


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


def open_source(settings: Settings) -> BarSource:
    """The source that the settings name.

    Raises: ConfigError if a needed setting is missing; SourceUnavailable if the
    folder has nothing to read or the source is not part of this version.
    """
    if settings.source == "simulated":
        return SimulatedSource(seed=settings.seed)
    if settings.source == "archive":
        if settings.archive_dir is None:
            raise ConfigError(
                "source 'archive' needs a folder of Parquet files; name it with --archive-dir."
            )
        return ArchiveSource(settings.archive_dir)
    raise SourceUnavailable(
        f"source {settings.source!r} is a live feed, which this version does not have yet; "
        "use --source archive with --archive-dir, or --source simulated."
    )


def summarise_set_aside(set_aside: Iterable[SetAsideBar]) -> list[str]:
    """One clause per reason with its count and first time, the most frequent first."""
    entries = list(set_aside)
    first = {bar.reason: _readable(bar.ts) for bar in reversed(entries)}
    counts = Counter(bar.reason for bar in entries).most_common()
    return [f"{count} × {reason} (first at {first[reason]})" for reason, count in counts]


def _readable(ts: int) -> str:
    """ISO 8601 where the time is one, else the number that was found."""
    if not _EARLIEST_TS <= ts < _LATEST_TS:
        return str(ts)
    return datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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


def bars_from_minutes(bars: Bars, *, bar_s: int) -> Bars:
    """Build coarser bars on the UTC grid from one-minute bars of the same feed.

    A bar exists if its last minute does, because its close is the price at its
    end and an older price must not pose as that one; a bar without its last
    minute is a gap. Open is that of the first minute at hand; high, low and
    volume gather the minutes that have them and are NaN where none has.

    Raises: ValueError if the bars are not minutes or `bar_s` is not a multiple.
    """
    if bars.bar_s != MINUTE_S or bar_s % MINUTE_S:
        raise ValueError(f"cannot build bars of {bar_s} s from bars of {bars.bar_s} s")
    slot = bars.open_ts // bar_s
    first = np.flatnonzero(np.diff(slot, prepend=-1))
    last = np.append(first[1:], len(bars)) - 1 if len(bars) else first
    has_end = bars.open_ts[last] % bar_s == bar_s - MINUTE_S
    has_volume = np.isfinite(bars.volume)
    volume = _per_group(np.add, np.where(has_volume, bars.volume, 0.0), first)
    traded = _per_group(np.logical_or, has_volume, first)
    return Bars(
        open_ts=(slot[first] * bar_s)[has_end],
        open=bars.open[first][has_end],
        high=_per_group(np.fmax, bars.high, first)[has_end],
        low=_per_group(np.fmin, bars.low, first)[has_end],
        close=bars.close[last][has_end],
        volume=np.where(traded, volume, np.nan)[has_end],
        bar_s=bar_s,
        feed=bars.feed,
    )


def _per_group(reduction: np.ufunc, values: npt.NDArray[np.generic], first: IntArray) -> FloatArray:
    """Reduce each run of rows that begins at an index of `first`; shape (len(first),)."""
    return np.asarray(reduction.reduceat(values, first) if len(first) else values[:0])


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
        bar_s = FREQUENCIES[frequency].bar_s
        bars, set_aside = self.load_bars(asset, bar_s if (asset, bar_s) in self._series else 60)
        history = _history(asset, frequency, bars, self.name)
        return LoadedHistory(history=history, set_aside=set_aside)

    def load_bars(self, asset: str, bar_s: int) -> tuple[Bars, tuple[SetAsideBar, ...]]:
        """One series of `series()`, cleaned, with the rows set aside. Raises: DataError."""
        return _read_series(self._series[asset, bar_s])

    def now(self) -> int:
        """The latest end of a usable bar over all assets, Unix seconds."""
        return self._now

    @cached_property
    def _now(self) -> int:
        ends = [end for entry in self._series.values() if (end := _last_end(entry)) is not None]
        if not ends:
            raise DataError(
                f"archive folder {self._folder} has no usable bar in any file; "
                "load one asset to see what is wrong with it."
            )
        return max(ends)


def _find_series(folder: Path) -> dict[tuple[str, int], _Series]:
    """Every series below the folder, or below its `market_data/prices`."""
    if not folder.is_dir():
        raise SourceUnavailable(
            f"archive folder {folder} does not exist; name an existing one with --archive-dir."
        )
    nested = folder / "market_data" / "prices"
    try:
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
    days = sorted(day for day in minutes.iterdir() if _PARTITION.fullmatch(day.name))
    if not days:
        return None
    return _Series(asset=path.name, bar_s=MINUTE_S, paths=tuple(days), partitioned=True)


def _last_end(series: _Series) -> int | None:
    """When the last usable bar of the series closed; None if there is none."""
    for path in reversed(series.paths):
        try:
            return _clean(_read_table(path, ("close",)), series)[0].end_ts
        except DataError:
            continue  # loading the asset says what is wrong with it
    return None


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
    columns["origin"] = (table["source"] if "source" in schema.names else missing).cast(pa.string())
    columns["final"] = (table["is_final"] if "is_final" in schema.names else missing).cast(
        pa.bool_()
    )
    return pa.table(columns)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _check_columns(path: Path, schema: pa.Schema) -> str:
    """The name of the time column. Raises: DataError naming what was found and what is needed."""
    found = ", ".join(f"{column.name} ({column.type})" for column in schema)
    time_column = "ts" if "ts" in schema.names else "timestamp"
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

_EARLIEST_TS: Final = 946_684_800  # 2000-01-01
_LATEST_TS: Final = 4_102_444_800  # 2100-01-01
_SPIKE_FACTOR: Final = 8.0  # "about ten", leaving the market some room to move meanwhile
_MAX_SPIKE_BARS: Final = 3  # a level that lasts longer is believed


def _clean(table: pa.Table, series: _Series) -> tuple[Bars, tuple[SetAsideBar, ...]]:
    """Bars in rising time order, and every row that cannot be one of them.

    Raises: DataError if no usable bar is left.
    """
    origin, is_of_origin = _newest_origin(table)
    sieve = _Sieve.of(table)
    sieve.drop_block(~is_of_origin, f"rows of another feed than {origin}, the newest")
    sieve.drop(~sieve.final, "not final yet")
    in_range = (sieve.ts >= _EARLIEST_TS) & (sieve.ts < _LATEST_TS)
    sieve.drop(~in_range, "time is not in Unix seconds between the years 2000 and 2100")
    sieve.drop(sieve.ts % series.bar_s != 0, f"time is not on the {series.bar_s} s grid")
    if series.partitioned:
        sieve.forget(np.isnan(sieve.close))  # there, NaN is how a gap is written
    sieve.drop(~(np.isfinite(sieve.close) & (sieve.close > 0)), "close is not a positive number")
    sieve.sort()
    sieve.drop(np.diff(sieve.ts, append=-1) == 0, "a later row has the same time")
    sieve.drop(_is_spike(sieve.close), "spike of about ×10 or more that reverts")
    if not len(sieve.ts):
        found = "; ".join(summarise_set_aside(sieve.set_aside)) or "it is empty"
        raise DataError(f"{series.place} has no usable bar: {found}.")
    sieve.blank_impossible_fields()
    feed = f"{series.feed}@{origin}" if origin else series.feed
    return sieve.bars(series.bar_s, feed), tuple(sieve.set_aside)


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


@dataclass(slots=True)
class _Sieve:
    """Rows on their way to bars, and what was set aside on the way; arrays of shape (n,)."""

    ts: IntArray
    columns: dict[str, FloatArray]
    final: BoolArray
    set_aside: list[SetAsideBar] = field(default_factory=list)

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """All rows of a table in the common form; a missing time is 0, a missing price NaN."""
        nan = np.full(len(table), np.nan)
        held = [name for name in _PRICE_COLUMNS if name in table.column_names]
        columns = {name: nan.copy() for name in _PRICE_COLUMNS}
        columns |= {name: _numpy(table[name], np.nan) for name in held}
        final = _numpy(table["final"], fill=True)
        return cls(ts=_numpy(table["ts"], 0), columns=columns, final=final)

    @property
    def close(self) -> FloatArray:
        return self.columns["close"]

    def drop(self, bad: BoolArray, reason: str) -> None:
        """Set rows aside, one entry each."""
        self.set_aside += [
            SetAsideBar(ts=int(ts), close=float(close), reason=reason)
            for ts, close in zip(self.ts[bad], self.close[bad], strict=True)
        ]
        self.forget(bad)

    def drop_block(self, bad: BoolArray, reason: str) -> None:
        """Set many rows aside under one entry, dated by the first of them."""
        self.note(bad, f"{np.count_nonzero(bad)} {reason}")
        self.forget(bad)

    def note(self, rows: BoolArray, reason: str) -> None:
        """Report rows that stay, under one entry dated by the first of them."""
        if rows.any():
            first = int(np.argmax(rows))
            entry = SetAsideBar(
                ts=int(self.ts[first]), close=float(self.close[first]), reason=reason
            )
            self.set_aside.append(entry)

    def forget(self, bad: BoolArray) -> None:
        """Remove rows without a report."""
        if bad.any():
            self._take(np.flatnonzero(~bad))

    def sort(self) -> None:
        """Order rows by time; rows of one time stay in the order of the file."""
        late = self.ts < np.maximum.accumulate(self.ts)
        self.note(late, f"{np.count_nonzero(late)} rows came out of time order and were sorted")
        if late.any():
            self._take(np.argsort(self.ts, kind="stable"))

    def blank_impossible_fields(self) -> None:
        """Make optional fields that contradict the close NaN; the bar itself stays."""
        before = sum(np.count_nonzero(np.isfinite(column)) for column in self.columns.values())
        self.columns |= _possible_fields(self.columns)
        after = sum(np.count_nonzero(np.isfinite(column)) for column in self.columns.values())
        if after < before:
            reason = f"{before - after} impossible values of open, high, low or volume were ignored"
            self.note(np.ones(len(self.ts), dtype=np.bool_), reason)

    def bars(self, bar_s: int, feed: str) -> Bars:
        return Bars(open_ts=self.ts, **self.columns, bar_s=bar_s, feed=feed)

    def _take(self, rows: IntArray) -> None:
        self.ts = self.ts[rows]
        self.final = self.final[rows]
        self.columns = {name: column[rows] for name, column in self.columns.items()}


def _possible_fields(columns: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The optional columns, NaN where a value cannot be true beside the close."""
    close = columns["close"]
    near = {
        name: np.abs(np.log(np.where(columns[name] > 0, columns[name], np.nan)) - np.log(close))
        < np.log(_SPIKE_FACTOR)
        for name in ("open", "high", "low")
    }
    opened = np.where(near["open"], columns["open"], np.nan)
    top, bottom = np.fmax(opened, close), np.fmin(opened, close)
    volume = columns["volume"]
    return {
        "open": opened,
        "high": np.where(near["high"] & (columns["high"] >= top), columns["high"], np.nan),
        "low": np.where(near["low"] & (columns["low"] <= bottom), columns["low"], np.nan),
        "volume": np.where(np.isfinite(volume) & (volume >= 0), volume, np.nan),
    }


def _is_spike(close: FloatArray) -> BoolArray:
    """Which closes belong to a short excursion to another price level; shape (n,).

    The series is cut wherever the price jumps by the spike factor. A piece of up
    to three bars that lies that far from the last believed level is a spike, at
    either end of the series too, where the other neighbour is not known yet; a
    longer piece is a genuine change of level.
    """
    log_close = np.log(close)
    limit = np.log(_SPIKE_FACTOR)
    cuts = np.flatnonzero(np.abs(np.diff(log_close)) >= limit) + 1
    spike = np.zeros(len(close), dtype=np.bool_)
    if not len(cuts):
        return spike
    pieces = list(pairwise([0, *cuts.tolist(), len(close)]))
    lasting = [piece for piece in pieces if piece[1] - piece[0] > _MAX_SPIKE_BARS]
    level = log_close[(lasting or [max(pieces, key=lambda piece: piece[1] - piece[0])])[0][0]]
    for start, end in pieces:
        if end - start <= _MAX_SPIKE_BARS and abs(log_close[start] - level) >= limit:
            spike[start:end] = True
        else:
            level = log_close[end - 1]
    return spike
