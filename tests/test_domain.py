"""Bars, histories and requests."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import Frequency
from domain import MAX_PATHS, Bars, Candles, ForecastRequest, MarketHistory, PriceQuote
from errors import DataError, RequestError

BAR_S = 60
MOMENTS = st.integers(-10, 250).map(lambda minute: minute * 20)  # on and between the bars
MINUTES = st.lists(st.integers(0, 80), unique=True, max_size=40).map(sorted)


def bars(minutes, bar_s=BAR_S):
    """Bars that open at the given multiples of their length; the close tells the bar."""
    open_ts = np.array(minutes, dtype=np.int64) * bar_s
    close = open_ts.astype(np.float64) + 1.0
    nan = np.full(len(close), np.nan)
    return Bars(
        open_ts=open_ts,
        open=nan,
        high=nan,
        low=nan,
        close=close,
        volume=nan,
        bar_s=bar_s,
        feed="test:BTC_1m",
    )


def history(bars_, price_bars=None):
    return MarketHistory(
        asset="BTC",
        frequency=Frequency.HF,
        bars=bars_,
        price_bars=bars_ if price_bars is None else price_bars,
        source="archive",
    )


def request(**changes):
    fields: dict[str, Any] = {
        "asset": "BTC",
        "start_ts": 1_700_000_040,
        "increment_s": 300,
        "length_s": 86_400,
        "num_paths": 1000,
    }
    return ForecastRequest(**(fields | changes))


# ---------------------------------------------------------------- bars


@given(MINUTES, MOMENTS, MOMENTS)
def test_between_keeps_exactly_the_bars_that_open_and_close_inside(minutes, start, end):
    kept = bars(minutes).between(start, end)
    expected = [m for m in minutes if m * BAR_S >= start and (m + 1) * BAR_S <= end]
    assert list(kept.open_ts // BAR_S) == expected
    assert list(kept.close) == [m * BAR_S + 1 for m in expected]


@given(MINUTES)
def test_between_nothing_and_nothing_keeps_everything(minutes):
    assert list(bars(minutes).between(None, None).open_ts) == list(bars(minutes).open_ts)


def test_bars_of_which_nothing_is_cut_are_not_looked_through_again():
    many = bars(range(100))
    assert many.between(None, many.end_ts) is many
    assert many.between(None, many.end_ts - 1) is not many


def test_between_copies_no_data():
    many = bars(range(10))
    assert np.shares_memory(many.between(0, 300).close, many.close)


def test_a_gap_stays_a_gap():
    assert list(bars([0, 1, 5]).close_ts) == [60, 120, 360]


def test_bars_must_rise_in_time():
    with pytest.raises(DataError, match="test:BTC_1m: bars are not in strictly rising time order"):
        bars([1, 0])
    with pytest.raises(DataError, match="strictly rising"):
        bars([1, 1])


def test_bar_columns_must_have_one_length():
    with pytest.raises(DataError, match="test:BTC_1m: bar columns differ in length"):
        replace(bars([0, 1]), close=np.ones(3))


def test_no_bars_have_no_end():
    assert bars([3]).end_ts == 240
    with pytest.raises(DataError, match="there are no bars"):
        _ = bars([]).end_ts


def candles(minutes):
    bars_ = bars(minutes)
    return Candles(bars=bars_, trades=bars_.close * 10, taker_volume=bars_.close * 100)


@given(MINUTES, MOMENTS, MOMENTS)
def test_candles_are_cut_like_their_bars(minutes, start, end):
    kept = candles(minutes).between(start, end)
    expected = bars(minutes).between(start, end)
    assert list(kept.bars.open_ts) == list(expected.open_ts)
    assert list(kept.trades) == list(expected.close * 10)
    assert list(kept.taker_volume) == list(expected.close * 100)
    assert len(kept) == len(expected)


def test_columns_of_trades_must_be_as_long_as_the_bars():
    with pytest.raises(DataError, match="test:BTC_1m: columns of trades differ"):
        replace(candles([0, 1]), trades=np.ones(3))


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_quote_holds_a_positive_price(price):
    with pytest.raises(DataError, match=r"binance:BTCUSDT: price .* is not a positive number"):
        PriceQuote(price=price, ts=1, feed="binance:BTCUSDT")


# ---------------------------------------------------------------- histories


@given(MINUTES, MOMENTS)
def test_what_is_known_at_a_moment_had_closed_by_then(minutes, now):
    known = history(bars(minutes)).known_at(now)
    assert all(known.bars.close_ts <= now)
    assert len(known.bars) == sum((m + 1) * BAR_S <= now for m in minutes)


@given(MINUTES, MOMENTS, MOMENTS)
def test_knowing_twice_is_knowing_the_less(minutes, first, second):
    twice = history(bars(minutes)).known_at(first).known_at(second)
    once = history(bars(minutes)).known_at(min(first, second))
    assert list(twice.bars.open_ts) == list(once.bars.open_ts)


@given(MINUTES, MOMENTS, st.floats(1, 1e6))
def test_later_prices_change_nothing_that_was_known(minutes, now, price):
    honest = bars(minutes)
    corrupted = replace(honest, close=np.where(honest.close_ts > now, price, honest.close))
    before, after = (history(entry).known_at(now).bars for entry in (honest, corrupted))
    assert list(before.close) == list(after.close)


def test_the_anchor_comes_from_the_finest_bars():
    entry = history(bars([0, 1], bar_s=300), price_bars=bars(range(12)))
    assert (entry.anchor_ts, entry.anchor_price) == (720, 661.0)
    known = entry.known_at(430)
    assert (known.anchor_ts, known.anchor_price) == (420, 361.0)
    assert len(known.bars) == 1


def test_one_minute_candles_are_scored_a_minute_late_and_five_minute_ones_are_not():
    assert history(bars([0])).scored_lag_s == 60
    assert history(bars([0], bar_s=300)).scored_lag_s == 0


# ---------------------------------------------------------------- requests


def test_a_day_has_289_points_and_an_hour_61():
    assert request().n_points == 289
    assert request(increment_s=60, length_s=3600).n_points == 61


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 10**6))
def test_the_grid_starts_at_the_start_and_ends_after_the_length(steps, increment, minute):
    entry = request(start_ts=minute * 60, increment_s=increment, length_s=steps * increment)
    grid = entry.grid_ts
    assert (grid[0], grid[-1]) == (entry.start_ts, entry.start_ts + entry.length_s)
    assert len(grid) == entry.n_points == steps + 1
    assert set(np.diff(grid)) == {increment}
    assert grid.dtype == np.int64


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start_ts": 1_700_000_041}, r"start time 1700000041 is 1 s past a whole minute"),
        ({"increment_s": 0}, r"increment 0 s and length 86400 s must both be positive"),
        ({"increment_s": -60}, r"increment -60 s and length"),
        ({"length_s": 0}, r"length 0 s must both be positive"),
        ({"length_s": -300}, r"length -300 s must both be positive"),
        ({"increment_s": 420}, r"increment 420 s does not divide length 86400 s"),
        ({"increment_s": 86_401}, r"increment 86401 s does not divide"),
        ({"increment_s": 1}, r"86401 points over 86400 s were asked for; the limits are 10000"),
        ({"length_s": 9 * 86_400}, r"over 777600 s were asked for; the limits are"),
        ({"num_paths": 0}, r"0 paths were asked for; ask for 1 to 1000"),
        ({"num_paths": -1}, r"-1 paths were asked for"),
        ({"num_paths": MAX_PATHS + 1}, r"1001 paths were asked for; ask for 1 to 1000"),
        ({"num_paths": 10**7}, r"10000000 paths were asked for"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_in_one_sentence(changes, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        request(**changes)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("increment_s", "length_s"), [(60, 3600), (60, 21_600), (300, 172_800), (900, 86_400)]
)
def test_other_sane_combinations_are_prompts_too(increment_s, length_s):
    entry = request(increment_s=increment_s, length_s=length_s)
    assert entry.grid_ts[-1] - entry.grid_ts[0] == length_s
