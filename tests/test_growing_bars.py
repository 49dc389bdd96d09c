"""Bars that grow in place against bars that are put together anew each time."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import DAY_S
from domain import Bars
from feed_seams import common_rows, in_time_order
from growing_bars import GrowingBars

START = 1_765_756_800  # a midnight
COLUMNS = ("open_ts", "open", "high", "low", "close", "volume")


def minutes(first, n, level=100.0):
    """Minutes from the `first` after START on; what no feed tells is not known."""
    close = level + np.arange(first, first + n, dtype=np.float64)
    unknown = np.full(n, np.nan)
    return Bars(
        open_ts=START + 60 * np.arange(first, first + n, dtype=np.int64),
        open=close - 0.5,
        high=unknown,
        low=unknown,
        close=close,
        volume=unknown,
        bar_s=60,
        feed="recorded",
    )


def assert_same(bars, expected):
    assert (bars is None) == (expected is None or not len(expected))
    if bars is not None:
        for name in COLUMNS:
            assert getattr(bars, name).tobytes() == getattr(expected, name).tobytes(), name
        assert (bars.bar_s, bars.feed) == (expected.bar_s, expected.feed)


def renewed(grown, since, tail, *, start):
    """What it holds then, which is something."""
    bars = grown.renew(since, tail, start=start)
    assert bars is not None
    return bars


steps = st.lists(
    st.tuples(
        st.integers(-30, 5),  # from where on, after the last bar
        st.integers(0, 40),  # how many bars come then
        st.sampled_from([100.0, 100.0, 200.0]),  # those of before, or corrected ones
        st.integers(0, 60),  # the window's first minute moves so far
    ),
    min_size=1,
    max_size=12,
)


@given(first=st.integers(0, 50), steps=steps)
def test_it_holds_what_was_put_together_and_never_changes_what_it_gave(first, steps):
    grown, naive, start, given_out = GrowingBars(), None, 0, []
    for offset, n, level, further in [(0, first, 100.0, 0), *steps]:
        end = 0 if naive is None or not len(naive) else int(naive.open_ts[-1] - START) // 60 + 1
        since = max(0, end + offset)
        start += further
        tail = minutes(since, n, level) if n else None
        kept = naive.between(None, START + 60 * since) if naive is not None else None
        parts = [part for part in (kept, tail) if part is not None and len(part)]
        naive = in_time_order(parts).between(START + 60 * start, None) if parts else None
        bars = grown.renew(START + 60 * since, tail, start=START + 60 * start)
        assert_same(bars, naive)
        if bars is not None:
            given_out.append((bars, {name: getattr(bars, name).tobytes() for name in COLUMNS}))
    for bars, bytes_of in given_out:
        assert {name: getattr(bars, name).tobytes() for name in COLUMNS} == bytes_of


def test_a_day_of_minutes_comes_without_a_copy():
    grown = GrowingBars()
    block = renewed(grown, START, minutes(0, 5000), start=START).close.base
    for n in range(5000, 5000 + DAY_S // 60):
        since = START + 60 * (n - 100)  # as a day's file, read again with one more
        bars = renewed(grown, since, minutes(n - 100, 101), start=START)
        assert bars.close.base is block
        assert len(bars) == n + 1
    assert renewed(grown, bars.end_ts, minutes(len(bars), 1), start=START).close.base is not block


@pytest.mark.parametrize("name", COLUMNS[1:])
def test_a_correction_of_any_column_is_a_new_block(name):
    grown = GrowingBars()
    before = renewed(grown, START, minutes(0, 10), start=START)
    changed = np.array(getattr(before, name))
    changed[7] = 7.0
    after = renewed(grown, START, replace(before, **{name: changed}), start=START)
    assert getattr(after, name)[7] == 7.0
    assert getattr(before, name)[7] != 7.0


@pytest.mark.parametrize("name", COLUMNS)
def test_bars_share_their_rows_up_to_the_first_bit_that_differs(name):
    before = minutes(0, 10)
    assert common_rows(before, minutes(0, 7)) == 7
    changed = np.array(getattr(before, name))
    changed[4] = changed[4] + 1 if name == "open_ts" else -0.0
    assert common_rows(before, replace(before, **{name: changed})) == 4


def test_what_left_the_window_is_forgotten_with_the_next_block():
    grown, days = GrowingBars(), 20
    for day in range(days):
        for hour in range(24):
            since = day * 1440 + 60 * hour
            start = START + DAY_S * max(0, day - 3)
            bars = renewed(grown, START + 60 * since, minutes(since, 60), start=start)
    assert len(bars) == 4 * 1440
    assert bars.close.base.shape[1] <= 6 * 1440
