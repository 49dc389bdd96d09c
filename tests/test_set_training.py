"""The training of a set as a task, and the pools that live trainings share."""

import time
from dataclasses import replace

import pytest

from bar_store import BarStore
from clock import RehearsalClock
from config import DAY_S, Frequency
from pool_store import read_pool
from pooled_prior import POOL_EVERY_S
from set_training import stored_pool
from settings import Settings
from simulated_market import simulate_bars

LF = Frequency.LF
MOMENT = 1_768_500_000 // POOL_EVERY_S * POOL_EVERY_S
STORED_DAYS = 12  # before the moment, and after it
FEEDS = {"BTC": "binance:BTCUSDT", "ETH": "binance:ETHUSDT"}


@pytest.fixture
def stored(tmp_path):
    """Bars of two markets as a collector stores them, before and after a moment of pools."""
    store = BarStore(tmp_path / "state")
    end = MOMENT + STORED_DAYS * DAY_S
    for asset, feed in FEEDS.items():
        bars = simulate_bars(asset, end_ts=end, days=2 * STORED_DAYS, seed=1)
        store.append("binance", asset, replace(bars, feed=feed))
    return store


@pytest.fixture
def pool_after(stored, tmp_path):
    """The pool that a training finds some days after the moment; it shows itself ten days."""

    def pool(days):
        start = int(MOMENT + days * DAY_S)
        settings = Settings(
            state_dir=tmp_path / "state",
            days=10,
            served_assets=tuple(FEEDS),
            rehearsal=str(RehearsalClock(start=start, origin=time.time(), speed=1)),
        )
        return stored_pool(settings, LF, MOMENT, tmp_path / "pool")

    return pool


def rewrite(store, asset, ts):
    """Correct one stored bar."""
    bars = store.load("binance", asset, 60, ts, ts + 60)
    store.append("binance", asset, replace(bars, close=1.01 * bars.close))


def test_a_pool_stays_what_it_is_while_days_pass(pool_after):
    first = pool_after(1)
    content = first.read_bytes()
    prior = read_pool(first)
    assert prior is not None
    assert (prior.assets, prior.until) == (("BTC", "ETH"), MOMENT)
    assert pool_after(5) == first
    first.unlink()
    assert pool_after(9.5).read_bytes() == content  # with all the bars, a day's more or not


def test_a_pool_is_another_once_a_bar_before_its_moment_is_corrected(pool_after, stored):
    first = pool_after(1)
    rewrite(stored, "ETH", MOMENT)
    assert pool_after(1) == first
    rewrite(stored, "ETH", MOMENT - 60)
    second = pool_after(1)
    assert second != first
    assert second.read_bytes() != first.read_bytes()
