"""Whether a price that has moved to another level was moved by the market.

A short excursion is a spike, and `bar_cleaning` sets it aside. One that lasts is a
split, a crash, or a venue that errs for as long as that takes it to notice. The price
alone does not tell these apart, another feed of the same price does: a level that it
shares is believed at once, one that it denies waits. Where no other feed can be
asked, a level is believed when it has lasted for `LASTING_S`: a venue's mistake
seldom lives so long, and what the scored feed says for hours is what is scored.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np

from bar_cleaning import SetAsideBar, is_other_level, level_cuts
from domain import Bars, Candles
from feed_seams import take_rows

LASTING_S: Final = 2 * 3600
AGREEMENT: Final = 2.0  # two feeds of one price are nearer than that, also in a crash
DENIED: Final = "a level about ×8 or more from the last one, which another feed denies"
UNCONFIRMED: Final = "a level about ×8 or more from the last one, which no other feed confirms yet"

Witness: TypeAlias = Callable[[Bars], bool | None]  # None: there is nobody to ask


def sift_levels(
    candles: Candles, level: float | None, witness: Witness
) -> tuple[Candles, list[SetAsideBar]]:
    """The candles whose price level can be believed, and the others with the reason.

    `level`: the last price that is believed from before them; None: that of most of them.
    `witness` is asked for the bars of every other level, whether another feed shares it.
    """
    bars, doubted = candles.bars, list[SetAsideBar]()
    pieces = _pieces(bars)
    if not pieces:
        return candles, []
    last = float(max(pieces, key=len).close[0]) if level is None else level
    for piece in pieces:
        reason = _objection(piece, witness) if is_other_level(piece.close[0], last) else None
        if reason is None:
            last = float(piece.close[-1])
        else:
            doubted += [
                SetAsideBar(ts=int(ts), close=float(close), reason=reason)
                for ts, close in zip(piece.open_ts, piece.close, strict=True)
            ]
    return _without(candles, doubted), doubted


def shares_level(bars: Bars, other: Bars) -> bool | None:
    """Whether another feed has about the same prices; None if it has no bar of that time."""
    _, ours, theirs = np.intersect1d(bars.open_ts, other.open_ts, return_indices=True)
    if not len(ours):
        return None
    apart = np.abs(np.log(bars.close[ours] / other.close[theirs]))
    return bool(np.median(apart) < np.log(AGREEMENT))


def _objection(bars: Bars, witness: Witness) -> str | None:
    verdict = witness(bars)
    if verdict is None:
        return None if bars.end_ts - bars.open_ts[0] >= LASTING_S else UNCONFIRMED
    return None if verdict else DENIED


def _pieces(bars: Bars) -> list[Bars]:
    """The bars in parts without a change of level."""
    cuts = [0, *level_cuts(bars.close).tolist(), len(bars)]
    return [take_rows(bars, slice(start, end)) for start, end in pairwise(cuts) if start < end]


def _without(candles: Candles, doubted: list[SetAsideBar]) -> Candles:
    if not doubted:
        return candles
    kept = ~np.isin(candles.bars.open_ts, [row.ts for row in doubted])
    return Candles(
        bars=take_rows(candles.bars, kept),
        trades=candles.trades[kept],
        taker_volume=candles.taker_volume[kept],
    )
