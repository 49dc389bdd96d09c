"""What rows become: bars, or rows that are set aside and named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bar_cleaning import BarSieve, SetAsideBar, bars_from_minutes, find_spikes, summarise_set_aside
from domain import Bars

START = 1_764_547_200  # 2025-12-01, midnight UTC


def minutes(n, step=60):
    return START + step * np.arange(n, dtype=np.int64)


def prices(n):
    return 100 + np.sin(np.arange(n) / 7)


def bars_of(open_ts, close, bar_s=60, **columns):
    nan = np.full(len(open_ts), np.nan)
    fields = {name: columns.get(name, nan) for name in ("open", "high", "low", "volume")}
    return Bars(
        open_ts=np.asarray(open_ts, dtype=np.int64),
        close=np.asarray(close, dtype=float),
        bar_s=bar_s,
        feed="test",
        **fields,
    )


# ---------------------------------------------------------------- the sieve


def test_clean_rows_pass_with_every_column():
    columns = {
        "open": prices(9),
        "high": prices(9) + 2,
        "low": prices(9) - 2,
        "close": prices(9),
        "volume": np.full(9, 5.0),
        "trades": np.arange(9.0),
        "taker_volume": np.full(9, 2.0),
    }
    sieve = BarSieve.of(minutes(9), columns)
    candles = sieve.candles(bar_s=60, feed="test:X")
    for name in ("open", "high", "low", "close", "volume"):
        np.testing.assert_array_equal(getattr(candles.bars, name), columns[name])
    np.testing.assert_array_equal(candles.trades, columns["trades"])
    np.testing.assert_array_equal(candles.taker_volume, columns["taker_volume"])
    assert (candles.bars.bar_s, candles.bars.feed, sieve.set_aside) == (60, "test:X", [])


def test_a_close_that_nothing_costs_is_set_aside():
    sieve = BarSieve.of(minutes(3), {"close": np.full(3, 1e308)})
    assert len(sieve.candles(bar_s=60, feed="test:X")) == 0
    assert {bar.reason for bar in sieve.set_aside} == {"close is too large to be a price"}


def test_no_rows_give_no_candles():
    sieve = BarSieve.of(minutes(0), {"close": prices(0)})
    assert len(sieve.candles(bar_s=60, feed="test:X")) == 0
    assert sieve.set_aside == []


def test_columns_that_a_source_lacks_are_nan():
    candles = BarSieve.of(minutes(4), {"close": prices(4)}).candles(bar_s=60, feed="test:X")
    assert np.isnan([candles.bars.open, candles.trades, candles.taker_volume]).all()


def test_impossible_trades_become_nan_and_the_bar_stays():
    columns = {
        "close": prices(5),
        "volume": np.array([5.0, 5.0, 5.0, np.nan, 5.0]),
        "trades": np.array([1.0, -1.0, np.inf, 0.0, 7.0]),
        "taker_volume": np.array([1.0, 6.0, -1.0, 1.0, 5.0]),
    }
    sieve = BarSieve.of(minutes(5), columns)
    candles = sieve.candles(bar_s=60, feed="test:X")
    np.testing.assert_array_equal(candles.bars.close, prices(5))
    np.testing.assert_array_equal(np.isnan(candles.trades), [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(np.isnan(candles.taker_volume), [0, 1, 1, 1, 0])
    (entry,) = sieve.set_aside
    assert entry.ts == START + 60
    assert entry.reason == "4 impossible values beside the close were ignored"


@given(st.lists(st.tuples(st.integers(0, 30), st.floats()), max_size=40))
def test_every_row_becomes_a_bar_or_is_set_aside_once(rows):
    ts = np.array([START + 60 * minute for minute, _ in rows], dtype=np.int64)
    sieve = BarSieve.of(ts, {"close": np.array([close for _, close in rows])})
    candles = sieve.candles(bar_s=60, feed="test:X")
    dropped = [bar for bar in sieve.set_aside if "sorted" not in bar.reason]
    assert len(candles) + len(dropped) == len(rows)
    assert np.isfinite(candles.bars.close).all()
    assert (candles.bars.close > 0).all()
    assert (np.diff(candles.bars.open_ts) > 0).all()


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_spike_is_found_inside_and_at_both_ends(factor, at):
    close = prices(10)
    close[at] *= factor
    assert np.flatnonzero(find_spikes(close)).tolist() == [at]


def test_a_level_that_lasts_is_no_spike():
    close = prices(10)
    close[6:] *= 100
    assert not find_spikes(close).any()


def test_a_summary_counts_and_dates_and_keeps_times_that_are_none():
    entries = [SetAsideBar(ts=ts, close=1.0, reason=why) for ts, why in ((9, "a"), (START, "b"))]
    assert summarise_set_aside([*entries, entries[1]]) == [
        "2 × b (first at 2025-12-01T00:00:00Z)",
        "1 × a (first at 9)",
    ]


# ---------------------------------------------------------------- coarser bars


def test_five_minutes_become_one_bar():
    bars = bars_of(
        minutes(5),
        [1.0, 2.0, 3.0, 4.0, 5.0],
        open=np.array([9.0, 1.0, 2.0, 3.0, 4.0]),
        high=np.array([np.nan, 7.0, 3.0, 4.0, 5.0]),
        low=np.array([1.0, 2.0, np.nan, 0.5, 5.0]),
        volume=np.array([1.0, np.nan, 2.0, 0.0, 4.0]),
    )
    built = bars_from_minutes(bars, bar_s=300)
    row = [built.open, built.high, built.low, built.close, built.volume]
    assert np.array(row).T.tolist() == [[9.0, 7.0, 0.5, 5.0, 7.0]]
    assert built.open_ts.tolist() == [START]
    assert (built.bar_s, built.feed) == (300, "test")


def test_a_coarse_bar_without_its_last_minute_is_a_gap():
    kept = np.delete(np.arange(15), 9)
    built = bars_from_minutes(bars_of(minutes(15)[kept], prices(15)[kept]), bar_s=300)
    assert built.open_ts.tolist() == [START, START + 600]


def test_columns_that_the_minutes_lack_stay_nan():
    built = bars_from_minutes(bars_of(minutes(10), prices(10)), bar_s=300)
    assert np.isnan([built.open, built.high, built.low, built.volume]).all()


def test_no_minutes_give_no_bars():
    assert len(bars_from_minutes(bars_of(minutes(0), prices(0)), bar_s=300)) == 0


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 4))
def test_coarse_bars_agree_with_a_slow_and_obvious_version(present, shift):
    kept = np.flatnonzero(present) + shift
    all_ts, all_close, volume = minutes(50), prices(50), np.arange(50.0)
    bars = bars_of(all_ts[kept], all_close[kept], high=all_close[kept] + 1, volume=volume[kept])
    expected = []
    for slot in range(10):
        rows = [row for row in kept if row // 5 == slot]
        if 5 * slot + 4 in rows:
            last = 5 * slot + 4
            top = max(all_close[row] + 1 for row in rows)
            total = sum(volume[row] for row in rows)
            expected.append((all_ts[5 * slot], all_close[last], top, total))
    built = bars_from_minutes(bars, bar_s=300)
    found = zip(built.open_ts, built.close, built.high, built.volume, strict=True)
    assert [tuple(map(float, row)) for row in found] == [tuple(map(float, row)) for row in expected]


def test_a_truncated_history_builds_the_same_bars():
    bars = bars_of(minutes(60), prices(60))
    for now in range(START, START + 3601, 60):
        known = bars_from_minutes(bars.between(None, now), bar_s=300)
        whole = bars_from_minutes(bars, bar_s=300).between(None, now)
        np.testing.assert_array_equal(known.open_ts, whole.open_ts)
        np.testing.assert_array_equal(known.close, whole.close)
