"""One series out of several: coarser bars of one feed, and feeds one after the other.

The scored feed wins wherever it has bars; before its first bar, and in holes of
days, bars of other feeds tell what the market did. Their levels differ (another
token of the same metal, a tenth of an index), so older parts are scaled to the
newer ones, as continuous futures are: at a seam the older feed's own bar of that
minute gives the ratio and is then dropped, so that no return spans two feeds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bar_cleaning import bars_from_minutes
from domain import Bars

# A closed market is no hole; a miner that was off for longer than this leaves one.
HOLE_S: Final = 4 * 86_400
_PRICES: Final = ("open", "high", "low", "close")
COLUMNS: Final = ("open_ts", *_PRICES, "volume")


def coarse_bars(minutes: Bars | None, own: Bars | None, *, bar_s: int) -> Bars | None:
    """Bars of one feed on a coarser grid: made of minutes, the feed's own where those lack."""
    built = None if minutes is None else bars_from_minutes(minutes, bar_s=bar_s)
    if built is None or own is None:
        return own if built is None else built
    extra = take_rows(own, ~np.isin(own.open_ts, built.open_ts))
    return in_time_order([built, extra]) if len(extra) else built


def join_feeds(scored: Bars, others: Sequence[Bars]) -> Bars:
    """The scored bars, with those of the others (best first) before them and in holes of days.

    All share one grid. The result carries the scored feed's name and level; amounts
    of other venues are left out, being of another market.
    """
    pieces = _split(scored)
    for other in others:
        pieces = _filled(pieces, other)
    joined = [piece.bars for piece in _levelled(pieces)]
    return in_time_order([replace(bars, feed=scored.feed) for bars in joined]) if joined else scored


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bars without a hole of days, and the series they were cut from."""

    bars: Bars
    series: Bars


def _split(series: Bars) -> list[_Piece]:
    cuts = np.flatnonzero(np.diff(series.open_ts) >= HOLE_S) + 1
    edges = [0, *cuts.tolist(), len(series)]
    return [
        _Piece(take_rows(series, slice(low, high)), series)
        for low, high in pairwise(edges)
        if low < high
    ]


def _filled(pieces: list[_Piece], other: Bars) -> list[_Piece]:
    """The pieces, and those of another series that lie before and between them."""
    if not pieces:
        return []
    blank = replace(other, volume=np.full(len(other), np.nan))
    filled: list[_Piece] = []
    since: int | None = None
    for piece in pieces:
        until = int(piece.bars.open_ts[0])
        filled += [_Piece(part.bars, blank) for part in _split(blank.between(since, until))]
        filled.append(piece)
        since = piece.bars.end_ts
    return filled


def _levelled(pieces: list[_Piece]) -> list[_Piece]:
    """All pieces on the level of the newest one."""
    levelled: list[_Piece] = []
    ratio = 1.0
    for piece, following in zip(reversed(pieces), [None, *reversed(pieces)], strict=False):
        ratio *= 1.0 if following is None else _step(piece, following)
        levelled.append(_Piece(_scaled(piece.bars, ratio), piece.series))
    return levelled[::-1]


def _step(piece: _Piece, following: _Piece) -> float:
    """What the following piece costs in units of this one.

    By a bar that both series have at the seam; failing that, the price is taken
    to have stood still across the gap.
    """
    joint, last = following.bars.open_ts[0], piece.bars.open_ts[-1]
    here = _close_at(piece.series, joint)
    if here is not None:
        return float(following.bars.close[0]) / here
    there = _close_at(following.series, last)
    return (there or float(following.bars.close[0])) / float(piece.bars.close[-1])


def _close_at(bars: Bars, open_ts: int) -> float | None:
    row = int(np.searchsorted(bars.open_ts, open_ts))
    found = row < len(bars) and bars.open_ts[row] == open_ts
    return float(bars.close[row]) if found else None


def _scaled(bars: Bars, ratio: float) -> Bars:
    if ratio == 1.0:
        return bars
    return replace(bars, **{name: ratio * getattr(bars, name) for name in _PRICES})


def take_rows(bars: Bars, rows: slice | npt.NDArray[np.bool_]) -> Bars:
    """Some of the bars (a view for a slice)."""
    columns: dict[str, Any] = {name: getattr(bars, name)[rows] for name in COLUMNS}
    return replace(bars, **columns)


def common_rows(before: Bars, after: Bars) -> int:
    """How many of their first rows are the same, bit by bit: what is unknown equals itself."""
    n = min(len(before), len(after))
    differs = np.zeros(n, dtype=np.bool_)
    for name in COLUMNS:
        old, new = getattr(before, name)[:n], getattr(after, name)[:n]
        differs |= old.view(np.int64) != new.view(np.int64)
    return int(np.argmax(differs)) if differs.any() else n


def in_time_order(parts: Iterable[Bars]) -> Bars:
    """All bars of one or more parts that share no time, in time order."""
    held = list(parts)
    if len(held) == 1:
        return held[0]
    order = np.argsort(np.concatenate([part.open_ts for part in held]), kind="stable")
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in held])[order] for name in COLUMNS
    }
    return replace(held[0], **columns)
