"""Levels that last: which are believed, by whom, and what is set aside."""

import numpy as np
import pytest

from domain import Bars, Candles
from level_changes import DENIED, LASTING_S, UNCONFIRMED, shares_level, sift_levels

START = 1_764_547_200  # 2025-12-01 00:00 UTC


def bars_of(*closes):
    unknown = np.full(len(closes), np.nan)
    return Bars(
        open_ts=START + 60 * np.arange(len(closes), dtype=np.int64),
        open=unknown,
        high=unknown,
        low=unknown,
        close=np.array(closes),
        volume=unknown,
        bar_s=60,
        feed="test:X",
    )


def sifted(closes, level, *, verdict=None):
    """What is believed, what is not, and the closes that the witness was asked about."""
    asked = []

    def witness(bars):
        asked.append(bars.close.tolist())
        return verdict

    bars = bars_of(*closes)
    given = Candles(bars=bars, trades=np.ones(len(bars)), taker_volume=np.ones(len(bars)))
    candles, doubted = sift_levels(given, level, witness)
    return candles.bars.close.tolist(), [(row.close, row.reason) for row in doubted], asked


def test_one_level_needs_no_witness():
    assert sifted([100, 300, 900, 200], 150) == ([100, 300, 900, 200], [], [])
    assert sifted([], 150) == ([], [], [])


@pytest.mark.parametrize(("verdict", "reason"), [(False, DENIED), (None, UNCONFIRMED)])
def test_another_level_is_set_aside_with_the_reason_and_the_way_back_is_believed(verdict, reason):
    believed, doubted, asked = sifted([100, 9e3, 9e3, 101], 100, verdict=verdict)
    assert believed == [100, 101]
    assert doubted == [(9e3, reason), (9e3, reason)]
    assert asked == [[9e3, 9e3]]


def test_a_level_that_a_witness_shares_is_what_later_ones_are_held_against():
    assert sifted([100, 9e3, 9e3, 9.1e3], 100, verdict=True)[:2] == ([100, 9e3, 9e3, 9.1e3], [])


def test_a_level_is_held_against_the_price_before_the_first_bar():
    assert sifted([9e3, 9e3], 100, verdict=False)[0] == []


def test_without_a_price_before_the_level_of_most_bars_counts():
    assert sifted([9e3, 100, 101, 102], None, verdict=False)[0] == [100, 101, 102]


def test_without_a_witness_a_level_is_believed_when_it_has_lasted():
    enough = LASTING_S // 60
    assert len(sifted([9e3] * enough, 100)[0]) == enough
    assert sifted([9e3] * (enough - 1), 100)[0] == []
    assert sifted([9e3] * enough, 100, verdict=False)[0] == []  # not against one who can say


def test_prices_of_the_smallest_and_the_largest_are_told_apart():
    assert sifted([5e-324, 1e11], 5e-324, verdict=False)[0] == [5e-324]


def test_a_level_is_shared_where_most_bars_of_the_same_time_are_near():
    bars = bars_of(100, 100, 100, 100)
    assert shares_level(bars, bars_of(101, 9e3, 99, 130)) is True
    assert shares_level(bars, bars_of(9e3, 100, 9e3, 9e3)) is False
    assert shares_level(bars, bars_of()) is None
