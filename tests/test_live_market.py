"""A live market over real HTTP: what it says of its feeds and of our clock."""

import logging
import time

import numpy as np
import pytest

from bar_store import BarStore
from clock import RehearsalClock
from data_fetcher import LiveSource
from domain import Bars
from errors import StateError
from feed_plans import FeedHost
from live_market import PAST_FETCHED, PATIENT_ROUNDS, LiveMarket
from loopback_venues import Fault, FaultRule, serve_venues
from settings import Settings

NOW = 1_765_800_000  # 2025-12-15 12:00 UTC


def minutes(n=2000):
    close = 4000 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 5e-4, n)))
    return Bars(
        open_ts=NOW - 60 * np.arange(n - 60, -60, -1, dtype=np.int64),
        open=close,
        high=close * 1.0002,
        low=close * 0.9998,
        close=close,
        volume=np.ones(n),
        bar_s=60,
        feed="recorded",
    )


def settings_of(tmp_path, venues, clock, *assets):
    return Settings(
        state_dir=tmp_path / "state",
        served_assets=assets,
        rehearsal=str(clock),
        days=1,
        **venues.urls,
    )


def told_of_the_clock(tmp_path, ahead_s, *faults):
    """The offset and the warnings of a miner whose clock is so far ahead of the venues'."""
    theirs = RehearsalClock(start=NOW, origin=time.time(), speed=1.0)
    ours = RehearsalClock(start=NOW + ahead_s, origin=theirs.origin, speed=1.0)
    with serve_venues({"BTC": minutes(), "XAU": minutes()}, theirs) as venues:
        for fault in faults:
            venues.faults.add(fault)
        settings = Settings(
            state_dir=tmp_path / "state",
            served_assets=("BTC", "XAU"),
            rehearsal=str(ours),
            **venues.urls,
        )
        with LiveMarket.open(settings, LiveSource(settings, ours)) as market:
            assert market.clock_offset_s() is None
            for _ in range(2):
                market.poll()
            return market.clock_offset_s(), [
                warning for warning in market.warnings() if warning.startswith("our clock")
            ]


@pytest.mark.parametrize(("ahead_s", "said"), [(15, "15 s ahead of"), (-20, "20 s behind")])
def test_a_wrong_clock_of_ours_is_measured_and_told(tmp_path, ahead_s, said):
    offset_s, (warning,) = told_of_the_clock(tmp_path, ahead_s)
    assert offset_s == pytest.approx(ahead_s, abs=1.5)
    assert warning.startswith(f"our clock is {said} the venues'")


def test_a_right_clock_is_no_warning_whatever_one_venues_cache_says(tmp_path):
    cached = FaultRule(fault=Fault.CACHED, host=FeedHost.BINANCE)
    for faults in ((), (cached,)):
        offset_s, warnings = told_of_the_clock(tmp_path, 0, *faults)
        assert offset_s == pytest.approx(0, abs=1.5)
        assert warnings == []


def test_a_back_fill_that_a_feed_cuts_short_is_awaited_but_not_for_ever(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clock = RehearsalClock(start=NOW, origin=time.time(), speed=60.0)
    with serve_venues({"BTC": minutes(), "XAU": minutes()}, clock) as venues:
        settings = settings_of(tmp_path, venues, clock, "BTC", "XAU")
        with LiveMarket.open(settings, LiveSource(settings, clock)) as market:
            venues.faults.add(FaultRule(fault=Fault.BLOCKED, host=FeedHost.BINANCE))
            told = []
            for _ in range(PATIENT_ROUNDS + 1):
                market.backfill()
                told.append((market.awaits_past(), market.has_past))
            assert told == [(True, False)] * PATIENT_ROUNDS + [(False, True)]
            venues.faults.clear()
            market.backfill()
            assert not market.awaits_past()
            assert [line for line in caplog.messages if line == PAST_FETCHED] == [PAST_FETCHED]
        with LiveMarket.open(settings, LiveSource(settings, clock)) as market:
            market.backfill()
            assert market.has_past


def test_bars_that_the_disk_refuses_are_told_and_insisted_on(tmp_path, monkeypatch):
    clock = RehearsalClock(start=NOW, origin=time.time(), speed=1.0)
    with serve_venues({"BTC": minutes()}, clock) as venues:
        settings = settings_of(tmp_path, venues, clock, "BTC")

        def refuse(*_args, **_more):
            raise StateError("the folder of bars is full; make room.")

        with LiveMarket.open(settings, LiveSource(settings, clock)) as market:
            with monkeypatch.context() as patch:
                patch.setattr(BarStore, "append", refuse)
                with pytest.raises(StateError, match="make room"):
                    market.require_scored(market.collect())
            assert market.unsaved_feeds() == ("binance:BTCUSDT",)
            assert market.failing_feeds() == ()
            assert market.warnings() == ("the folder of bars is full; make room",)
            market.require_scored(market.collect())
            assert market.unsaved_feeds() == market.warnings() == ()


def test_a_scored_feed_that_gives_no_candles_is_named(tmp_path):
    refusal = FaultRule(fault=Fault.BLOCKED, host=FeedHost.BINANCE)
    clock = RehearsalClock(start=NOW, origin=time.time(), speed=1.0)
    with serve_venues({"BTC": minutes(), "XAU": minutes()}, clock) as venues:
        venues.faults.add(refusal)
        settings = settings_of(tmp_path, venues, clock, "BTC", "XAU")
        with LiveMarket.open(settings, LiveSource(settings, clock)) as market:
            assert market.failing_feeds() == ()
            market.collect()
            assert market.failing_feeds() == ("binance:BTCUSDT",)
            venues.faults.clear()
            market.collect()
            assert market.failing_feeds() == ()
