"""Collected bars under `state/bars/`, one file per series and UTC day.

A series is a venue, an asset and a bar length: `bars/binance/BTC_60s/`. It takes
candles of one feed alone, which every day's file remembers. A file holds the
day's candles and the *checked* spans: time for which the venue was asked and gave
all it has. A minute that is checked and has no bar is a gap that the venue
confirmed, and nobody asks for it again; a damaged file takes its checked spans
with it, so that the day is fetched anew. A file that cannot be read at all is no
damaged one: its day is left out while that lasts, and nothing is written over it.

An append rewrites the days it touches and no others: it costs the same in the
first week as after years. Columns are shuffled by bytes and deflated.
"""

import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from config import DAY_S
from domain import Bars, Candles, FloatArray, IntArray
from errors import StateError, UnreadableState
from feed_plans import known_feed
from spans import Span, clip_spans, empty_slots, merge_spans, subtract_spans
from state_store import StateStore, go_through, locked, require_plain, unlisted

_LOG: Final = logging.getLogger(__name__)

BARS_FOLDER: Final = "bars"
_SCHEMA: Final = 2
_PRICES: Final = ("open", "high", "low", "close", "volume")
_TRADING: Final = ("trades", "taker_volume")
_SERIES_NAME: Final = re.compile(r"(?P<asset>.+)_(?P<bar_s>\d+)s")
_DAY_FILE: Final = re.compile(r"\d{4}-\d\d-\d\d\.msgpack")
_KNOWN_NAMES: Final = 4096  # eleven years of days
_IMPORTED_FEED: Final = re.compile(r"(?P<venue>[^:]+):(?P<asset>.+)_\d+m")
_COMPRESSION: Final = 1  # more saves 3 % of the bytes and triples the time
_LOCK_WAIT_S: Final = 30

FileMark: TypeAlias = tuple[int, int, int]  # changes whenever a file is written anew


@dataclass(frozen=True, slots=True)
class Stored:
    """What an append changed."""

    new: int  # bars that were not there before
    corrected: int  # bars that were there with other values


@dataclass(frozen=True, slots=True)
class _Day:
    """One day of a series."""

    candles: Candles
    checked: list[Span]


@dataclass(frozen=True, slots=True)
class _Gaps:
    """What a day's file lacks, as of one version of the file."""

    mark: FileMark
    empty: list[Span]  # no bar
    missing: list[Span]  # no bar, and the venue was not asked


class BarStore:
    """Series of candles that only ever grow. Safe between threads and processes."""

    def __init__(self, root: Path) -> None:
        self._store = StateStore(root)
        self._gaps: dict[tuple[str, int], _Gaps] = {}
        self._unreadable: set[tuple[str, int]] = set()

    # -- writing

    def append(
        self, venue: str, asset: str, bars: Bars | Candles, *, checked: Span | None = None
    ) -> Stored:
        """Store candles; one that was stored before is corrected.

        `checked`: the time for which `bars` is all that the venue has. What this
        returns for is on the disk. Raises: StateError if the disk refuses or a stored day
        cannot be read (all other days are kept), or the series is of another feed;
        BusyError if another process keeps writing to it.
        """
        candles = bars if isinstance(bars, Candles) else _untraded(bars)
        series = _series_name(venue, asset, candles.bars.bar_s)
        days = np.unique(candles.bars.open_ts // DAY_S).tolist()
        days += range(checked[0] // DAY_S, -(-checked[1] // DAY_S)) if checked else ()
        with locked(self._folder(series), "storing bars", wait_s=_LOCK_WAIT_S):
            touched = sorted(set(days))
            self._require_feed(series, candles.bars, touched)
            # One day's file must not stop those after it.
            done = go_through(
                lambda day: self._append_day(series, day, _rows_of(candles, day), checked), touched
            )
        return Stored(sum(entry.new for entry in done), sum(entry.corrected for entry in done))

    def _append_day(self, series: str, day: int, new: Candles, checked: Span | None) -> Stored:
        asked = clip_spans([checked] if checked else [], day * DAY_S, (day + 1) * DAY_S)
        old = self._load_day(series, day, new.bars.bar_s)
        merged = _Day(new, asked) if old is None else _merge(old, new, asked)
        corrected = 0 if old is None else _differing(old.candles, merged.candles)
        added = len(merged.candles) - (0 if old is None else len(old.candles))
        if old is None or added or corrected or merged.checked != old.checked:
            self._store.save(BARS_FOLDER, _day_name(series, day), _SCHEMA, _document(merged, day))
        return Stored(added, corrected)

    def _require_feed(self, series: str, bars: Bars, days: list[int]) -> None:
        """Compare with a readable one of these days, or else the newest. Raises: StateError.

        A year of files is listed for a day that has none yet, and not for every minute.
        """
        for day in chain(days[-1:], self._newest_days(series)):
            stored = self._readable_day(series, day, bars.bar_s)
            if stored is None:
                continue
            if stored.candles.bars.feed != bars.feed:
                raise StateError(
                    f"{series} holds bars of feed {stored.candles.bars.feed!r} and takes none of "
                    f"{bars.feed!r}; feeds are never merged, so store these under another source."
                )
            return

    def _newest_days(self, series: str) -> Iterator[int]:
        yield from reversed(self._days(series))

    # -- reading

    def load(
        self, venue: str, asset: str, bar_s: int, start: int | None = None, end: int | None = None
    ) -> Bars | None:
        """Bars that open at or after `start` and are closed by `end`; None if there are none.

        Damaged days are set aside and, like unreadable ones, missing from the result.
        Raises: UnreadableState if the disk does not even say which days there are.
        """
        candles = self.load_candles(venue, asset, bar_s, start, end)
        return None if candles is None else candles.bars

    def load_candles(
        self, venue: str, asset: str, bar_s: int, start: int | None = None, end: int | None = None
    ) -> Candles | None:
        """As `load`, with how the bars were traded."""
        series = _series_name(venue, asset, bar_s)
        first = -1 if start is None else start // DAY_S
        last = np.inf if end is None else (end - bar_s) // DAY_S  # later bars close after it
        parts: list[Candles] = []
        for day in reversed([day for day in self._days(series) if first <= day <= last]):
            stored = self._readable_day(series, day, bar_s)
            if stored is not None and parts and stored.candles.bars.feed != parts[0].bars.feed:
                reason = f"is of feed {stored.candles.bars.feed}"
                self._store.set_aside(BARS_FOLDER, _day_name(series, day), reason)
            elif stored is not None:
                parts.append(stored.candles)
        candles = _concatenate(parts[::-1]).between(start, end) if parts else None
        return candles if candles is not None and len(candles) else None

    def series(self) -> list[tuple[str, str, int]]:
        """Every stored series as (venue, asset, bar length in seconds), sorted."""
        found = {tuple(name.split("/")[:2]) for name in self._store.names(BARS_FOLDER)}
        split = [(venue, _SERIES_NAME.fullmatch(series)) for venue, series in found]
        return sorted(
            (venue, match["asset"], int(match["bar_s"])) for venue, match in split if match
        )

    def marks(self, venue: str, asset: str, bar_s: int, start: int) -> dict[int, FileMark]:
        """The version of every day's file from `start` on, by days since 1970; reads no bars.

        Days that could not be read are left out until they can be: those are tried again.
        """
        series = _series_name(venue, asset, bar_s)
        return {
            day: mark
            for day, entry in self._day_files(series)
            if day >= start // DAY_S
            and (mark := _mark_of(entry)) is not None
            and not self._stays_unreadable(series, day, bar_s)
        }

    def is_unreadable(self, venue: str, asset: str, bar_s: int, day: int) -> bool:
        """Whether a day (since 1970) could not be read when that was last tried."""
        return (_series_name(venue, asset, bar_s), day) in self._unreadable

    # -- what is not there

    def empty(self, venue: str, asset: str, bar_s: int, start: int, end: int) -> list[Span]:
        """Spans of the grid between two moments that have no bar."""
        gaps = self._all_gaps(venue, asset, bar_s, start, end)
        return _inside(gaps, start, end, bar_s, "empty")

    def missing(self, venue: str, asset: str, bar_s: int, start: int, end: int) -> list[Span]:
        """Spans that have no bar and that the venue was not asked for yet."""
        gaps = self._all_gaps(venue, asset, bar_s, start, end)
        return _inside(gaps, start, end, bar_s, "missing")

    def _all_gaps(self, venue: str, asset: str, bar_s: int, start: int, end: int) -> list[_Gaps]:
        series = _series_name(venue, asset, bar_s)
        return [
            self._gaps_of(series, day, bar_s) for day in range(start // DAY_S, -(-end // DAY_S))
        ]

    def _gaps_of(self, series: str, day: int, bar_s: int) -> _Gaps:
        """Read from the file once per version of it."""
        mark = self._mark(series, day) or _NO_FILE
        known = self._gaps.get((series, day))
        if known is not None and known.mark == mark:
            return known
        stored = None if mark == _NO_FILE else self._readable_day(series, day, bar_s)
        if (series, day) in self._unreadable:
            return _Gaps(mark, [], [])  # nobody knows, and what was fetched could not be stored
        start, end = day * DAY_S, (day + 1) * DAY_S
        open_ts = np.empty(0, dtype=np.int64) if stored is None else stored.candles.bars.open_ts
        empty = empty_slots(open_ts, bar_s=bar_s, start=start, end=end)
        missing = subtract_spans(empty, stored.checked if stored else [])
        self._gaps[series, day] = gaps = _Gaps(mark, empty, missing)
        return gaps

    # -- files

    def _folder(self, series: str) -> Path:
        return self._store.path(BARS_FOLDER, f"{series}/day").parent

    def _days(self, series: str) -> list[int]:
        """Days since 1970 that have a file, in order. Raises: UnreadableState."""
        return [day for day, _ in self._day_files(series)]

    def _day_files(self, series: str) -> list[tuple[int, "os.DirEntry[str]"]]:
        """Days since 1970 and their files, in order. Raises: UnreadableState.

        In one pass over the folder: the engine looks for new bars every few seconds.
        """
        folder = self._folder(series)
        try:
            with os.scandir(folder) as entries:
                found = [(_day_of_file(entry.name), entry) for entry in entries]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unlisted(folder, error) from error
        return sorted((day, entry) for day, entry in found if day is not None)

    def _mark(self, series: str, day: int) -> FileMark | None:
        return _mark_of(self._store.path(BARS_FOLDER, _day_name(series, day)))

    def _readable_day(self, series: str, day: int, bar_s: int) -> _Day | None:
        """As `_load_day`; None also while it cannot be read, which is logged once."""
        key = (series, day)
        try:
            stored = self._load_day(series, day, bar_s)
        except UnreadableState as error:
            if key not in self._unreadable:
                _LOG.warning("%s", error)
            self._unreadable.add(key)
            return None
        self._unreadable.discard(key)
        return stored

    def _stays_unreadable(self, series: str, day: int, bar_s: int) -> bool:
        key = (series, day)
        if key in self._unreadable:
            self._readable_day(series, day, bar_s)
        return key in self._unreadable

    def _load_day(self, series: str, day: int, bar_s: int) -> _Day | None:
        """One day, or None if it is absent or damaged (then it is set aside).

        Raises: UnreadableState.
        """
        name = _day_name(series, day)
        document = self._store.load(BARS_FOLDER, name, _SCHEMA, migrations={1: _from_schema_1})
        if document is None:
            return None
        if (document["day"], document["bar_s"]) != (day, bar_s):
            self._store.set_aside(
                BARS_FOLDER, name, "holds another day or bar length than its name says"
            )
            return None
        return _day_of(document)


_NO_FILE: Final[FileMark] = (0, 0, 0)


def _mark_of(file: "os.DirEntry[str] | Path") -> FileMark | None:
    """None if it is gone."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _series_name(venue: str, asset: str, bar_s: int) -> str:
    """The folder of a series below `bars`. Raises: StateError if a name is unfit."""
    require_plain(venue)
    require_plain(asset)
    return f"{venue}/{asset}_{bar_s}s"


def _day_name(series: str, day: int) -> str:
    return f"{series}/{np.datetime64(day, 'D')}"


@lru_cache(maxsize=_KNOWN_NAMES)
def _day_of_file(name: str) -> int | None:
    """Inverse of `_day_name`, for the file's own name; None for any other file."""
    if not _DAY_FILE.fullmatch(name):
        return None
    return int(np.datetime64(name.partition(".")[0], "D").astype(np.int64))


def _inside(gaps: Iterable[_Gaps], start: int, end: int, bar_s: int, kind: str) -> list[Span]:
    """Spans of all days as one list, cut to the whole bars between two moments."""
    spans = [span for entry in gaps for span in getattr(entry, kind)]
    return clip_spans(spans, -(-start // bar_s) * bar_s, end // bar_s * bar_s)


# ---------------------------------------------------------------- one day


def _document(day: _Day, number: int) -> dict[str, Any]:
    """Columns without any value are left out; times count from the day's start."""
    columns = _columns(day.candles)
    start = number * DAY_S
    return {
        "day": number,
        "bar_s": day.candles.bars.bar_s,
        "feed": day.candles.bars.feed,
        "checked": [[low - start, high - start] for low, high in day.checked],
        "offset_s": _pack((day.candles.bars.open_ts - start).astype(np.uint32)),
        "columns": {
            name: _pack(values) for name, values in columns.items() if np.isfinite(values).any()
        },
    }


def _day_of(document: Mapping[str, Any]) -> _Day:
    start = document["day"] * DAY_S
    open_ts = _unpack(document["offset_s"], "<u4").astype(np.int64) + start
    absent = np.full(len(open_ts), np.nan)
    packed = document["columns"]
    columns = {
        name: _unpack(packed[name], "<f8") if name in packed else absent
        for name in (*_PRICES, *_TRADING)
    }
    checked = [(low + start, high + start) for low, high in document["checked"]]
    return _Day(_candles(open_ts, columns, document["bar_s"], document["feed"]), checked)


def _pack(values: npt.NDArray[Any]) -> bytes:
    """Deflated little-endian bytes, the first byte of every value first, then the second, …

    Neighbouring prices share their leading bytes; side by side these deflate to
    next to nothing.
    Source: the shuffle filter of HDF5 and Blosc.
    """
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    shuffled = little.view(np.uint8).reshape(len(little), little.itemsize).T
    return zlib.compress(shuffled.tobytes(), _COMPRESSION)


def _unpack(data: bytes, kind: str) -> npt.NDArray[Any]:
    """Inverse of `_pack`; writable, native byte order."""
    size = np.dtype(kind).itemsize
    shuffled = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(size, -1)
    values = np.ascontiguousarray(shuffled.T).view(kind).ravel()
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _from_schema_1(document: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 held plain columns, no checked spans, and labels of the importer's own."""
    match = _IMPORTED_FEED.fullmatch(document["feed"])
    known = known_feed(match["venue"], match["asset"]) if match else None
    return {
        **document,
        "feed": known.name if known else document["feed"],
        "checked": [],
        "offset_s": _pack(document["offset_s"]),
        "columns": {name: _pack(values) for name, values in document["columns"].items()},
    }


# ---------------------------------------------------------------- candles


def _untraded(bars: Bars) -> Candles:
    """Bars of which nothing more is known."""
    unknown = np.full(len(bars), np.nan)
    return Candles(bars=bars, trades=unknown, taker_volume=unknown)


def _rows_of(candles: Candles, day: int) -> Candles:
    """The candles that open on a UTC day (a view)."""
    bar_s = candles.bars.bar_s
    return candles.between(day * DAY_S, (day + 1) * DAY_S + bar_s - 1)


def _columns(candles: Candles) -> dict[str, FloatArray]:
    prices = {name: getattr(candles.bars, name) for name in _PRICES}
    return {**prices, "trades": candles.trades, "taker_volume": candles.taker_volume}


def _candles(
    open_ts: IntArray, columns: Mapping[str, FloatArray], bar_s: int, feed: str
) -> Candles:
    bars = Bars(
        open_ts=open_ts, **{name: columns[name] for name in _PRICES}, bar_s=bar_s, feed=feed
    )
    return Candles(bars=bars, **{name: columns[name] for name in _TRADING})


def _concatenate(parts: list[Candles]) -> Candles:
    held = [_columns(part) for part in parts]
    columns = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
    open_ts = np.concatenate([part.bars.open_ts for part in parts])
    return _candles(open_ts, columns, parts[0].bars.bar_s, parts[0].bars.feed)


def _merge(old: _Day, new: Candles, checked: list[Span]) -> _Day:
    """Both, in time order; where both have a bar, the new one."""
    open_ts = np.concatenate([new.bars.open_ts, old.candles.bars.open_ts])
    kept_ts, rows = np.unique(open_ts, return_index=True)  # the first of equals: the new one
    before, after = _columns(old.candles), _columns(new)
    columns = {name: np.concatenate([after[name], before[name]])[rows] for name in after}
    candles = _candles(kept_ts, columns, new.bars.bar_s, new.bars.feed)
    return _Day(candles, merge_spans([*old.checked, *checked]))


def _differing(old: Candles, merged: Candles) -> int:
    """How many bars of `old` have other values in `merged`, which holds them all."""
    rows = np.searchsorted(merged.bars.open_ts, old.bars.open_ts)
    before, after = _columns(old), _columns(merged)
    differs = np.zeros(len(old), dtype=np.bool_)
    for name, values in before.items():
        now = after[name][rows]
        differs |= ~((values == now) | (np.isnan(values) & np.isnan(now)))
    return int(differs.sum())
