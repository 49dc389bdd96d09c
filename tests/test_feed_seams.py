"""Several series as one: no return may span two feeds, and the scored feed wins."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import Bars
from feed_seams import HOLE_S, coarse_bars, join_feeds

START = 1_764_547_200
BAR_S = 300
DAY = 86_400 // BAR_S


def walk(slots, *, level=100.0, seed=0, feed="scored", bar_s=BAR_S):
    """Bars at some slots of one random walk; another level is another price of the same thing."""
    moves = np.random.default_rng(seed).normal(0, 1e-3, 20_000)
    slots = np.asarray(slots, dtype=np.int64)
    close = level * np.exp(np.cumsum(moves)[slots])
    return Bars(
        open_ts=START + bar_s * slots,
        open=close * 0.999,
        high=close * 1.001,
        low=close * 0.998,
        close=close,
        volume=np.ones(len(slots)),
        bar_s=bar_s,
        feed=feed,
    )


def returns(bars):
    return np.diff(np.log(bars.close))


def test_history_of_another_level_is_joined_without_a_jump():
    scored = walk(range(5000, 6000))
    older = walk(range(5010), level=10.0, feed="token")
    joined = join_feeds(scored, [older])
    whole = walk(range(6000))
    assert joined.feed == "scored"
    np.testing.assert_array_equal(joined.open_ts, whole.open_ts)
    np.testing.assert_allclose(joined.close, whole.close, rtol=1e-12)
    np.testing.assert_allclose(joined.high, whole.high, rtol=1e-12)
    np.testing.assert_array_equal(joined.close[5000:], scored.close)  # the scored feed's bytes


def test_the_return_at_a_seam_is_the_older_feeds_own():
    scored = walk(range(1000, 1100), seed=1)
    older = walk(range(1001), seed=2, feed="other")  # moves on its own
    joined = join_feeds(scored, [older])
    np.testing.assert_allclose(returns(joined)[:1000], returns(older)[:1000], atol=1e-12)
    np.testing.assert_allclose(returns(joined)[1000:], returns(scored), atol=1e-12)


def test_without_a_bar_in_common_the_price_stands_still_across_the_gap():
    joined = join_feeds(walk(range(1000, 1100)), [walk(range(900), level=7.0, feed="other")])
    assert returns(joined)[899] == pytest.approx(0, abs=1e-12)
    assert abs(returns(joined)).max() < 0.01


def test_a_hole_of_days_is_filled_and_both_of_its_seams_are_level():
    hole = range(2000, 2000 + HOLE_S // BAR_S + 10)
    kept = [slot for slot in range(5000) if slot not in hole]
    other = walk(range(1990, hole.stop + 10), level=1.0, feed="other")
    joined = join_feeds(walk(kept), [other])
    np.testing.assert_allclose(returns(joined), returns(walk(range(5000))), atol=1e-12)
    assert np.isnan(joined.volume[list(hole)]).all()  # of another market
    assert (joined.volume[kept] == 1).all()


def test_a_closed_weekend_is_no_hole():
    kept = [slot for slot in range(3000) if not 1000 <= slot < 1000 + 2 * DAY]
    scored = walk(kept)
    joined = join_feeds(scored, [walk(range(900, 3000), level=3.0, feed="other")])
    np.testing.assert_array_equal(joined.close, scored.close)


def test_the_second_best_feed_fills_what_the_best_one_lacks():
    scored, best = walk(range(4000, 4100)), walk(range(2000, 4010), level=5.0, feed="best")
    second = walk(range(4100), level=50.0, feed="second")
    joined = join_feeds(scored, [best, second])
    np.testing.assert_allclose(joined.close, walk(range(4100)).close, rtol=1e-11)


@given(st.integers(0, 50), st.integers(51, 90), st.floats(1e-3, 1e3))
def test_joining_never_makes_a_move_that_no_feed_made(first, seam, level):
    scored = walk(range(seam, 100), seed=3)
    other = walk(range(first, 100), seed=4, level=level, feed="other")
    joined = join_feeds(scored, [other])
    limit = max(abs(returns(scored)).max(initial=0), abs(returns(other)).max())
    assert abs(returns(joined)).max() <= limit * (1 + 1e-9)
    assert len(joined) == 100 - first


def test_nothing_scored_gives_no_level_to_join_to():
    nothing = walk([])
    assert len(join_feeds(nothing, [walk(range(10), feed="other")])) == 0


def test_own_coarse_bars_stand_where_minutes_are_missing():
    minutes = walk(range(1000, 1500), bar_s=60)
    own = replace(walk(range(300)), close=np.full(300, 5.0), feed=minutes.feed)
    bars = coarse_bars(minutes, own, bar_s=BAR_S)
    assert bars is not None
    np.testing.assert_array_equal(bars.open_ts, own.open_ts)
    from_minutes = slice(200, 300)
    np.testing.assert_array_equal(bars.close[from_minutes], minutes.close[4::5])
    assert (bars.close[:200] == 5.0).all()


def test_either_kind_of_bars_alone_will_do():
    own, minutes = walk(range(10)), walk(range(10), bar_s=60)
    assert coarse_bars(None, own, bar_s=BAR_S) is own
    assert coarse_bars(None, None, bar_s=BAR_S) is None
    built = coarse_bars(minutes, None, bar_s=BAR_S)
    assert built is not None
    assert list(built.close) == list(minutes.close[4::5])
