"""Bars that grow in place: a new minute does not copy the months before it.

A series lies in one block of memory with room for a day to come. What was given out
are views of its rows, and rows that were given out are never written again: bars that
a venue corrects, or that leave the window, are a new block. Whoever copied all columns
for every minute would leave holes in the heap each of which is one bar too small for
the next copy; a block of months is pages of its own, and goes back whole.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np

from config import DAY_S
from domain import Bars, FloatArray
from feed_seams import COLUMNS, common_rows, take_rows

_NUMBERS: Final = COLUMNS[1:]  # all but the times


class GrowingBars:
    """One series of bars that is followed from its files. One thread at a time."""

    def __init__(self) -> None:
        self._block: FloatArray = np.empty((1 + len(_NUMBERS), 0))
        self._bars: Bars | None = None  # all rows in the block

    def between(self, start: int, end: int | None) -> Bars | None:
        """The bars that open at or after `start` and are closed by `end`; None of none."""
        held = None if self._bars is None else self._bars.between(start, end)
        return held if held is not None and len(held) else None

    def renew(self, since: int, tail: Bars | None, *, start: int) -> Bars | None:
        """Put `tail` in place of all bars that open at or after `since`; those from `start` on.

        Whatever was given out before stays as it was.
        """
        held = self._bars
        if held is None:
            if tail is not None and len(tail):
                self._move(tail, tail, kept=0, dropped=0)
            return self.between(start, None)
        kept = int(np.searchsorted(held.open_ts, since))
        new = take_rows(held, slice(0, 0)) if tail is None else tail
        same = common_rows(take_rows(held, slice(kept, None)), new)
        if kept + same < len(held) or kept + len(new) > self._block.shape[1]:
            dropped = min(int(np.searchsorted(held.open_ts, start)), kept)
            self._move(held, new, kept=kept, dropped=dropped)
        elif same < len(new):
            self._write(kept + same, take_rows(new, slice(same, None)))
            self._show(held, kept + len(new))
        return self.between(start, None)

    def _move(self, held: Bars, tail: Bars, *, kept: int, dropped: int) -> None:
        """To a new block: rows `dropped` to `kept` of what is held, and the tail."""
        rows = kept - dropped + len(tail)
        self._block = np.empty((1 + len(_NUMBERS), rows + DAY_S // held.bar_s))
        self._write(0, take_rows(held, slice(dropped, kept)))
        self._write(kept - dropped, tail)
        self._show(held, rows)

    def _write(self, row: int, bars: Bars) -> None:
        end = row + len(bars)
        self._block[0].view(np.int64)[row:end] = bars.open_ts
        for line, name in enumerate(_NUMBERS, 1):
            self._block[line, row:end] = getattr(bars, name)

    def _show(self, like: Bars, rows: int) -> None:
        columns: dict[str, Any] = {
            name: self._block[line, :rows] for line, name in enumerate(_NUMBERS, 1)
        }
        open_ts = self._block[0].view(np.int64)[:rows]
        self._bars = replace(like, open_ts=open_ts, **columns) if rows else None
