"""Clocks that jump, are smeared or change to summer time: no bar is lost, no answer invalid."""

from dataclasses import dataclass

import numpy as np
import pytest

from bar_cleaning import BarSieve
from bar_store import BarStore
from clock import RehearsalClock
from collector import Collector
from config import DAY_S, Frequency, Settings, Venue, feed_plans, protocol_profile
from data_fetcher import SimulatedSource
from domain import ForecastRequest, PriceQuote
from errors import FeedUnreachable
from forecast_engine import ForecastEngine
from price_board import PriceBoard
from quarantine import Quarantine
from tests.faults.tally import count
from tests.faults.victims import GrowingArchive
from upkeep import each
from wire_format import encode_prompt_answer, validate_answer

NOON = 1_765_800_000  # 2025-12-15 12:00 UTC
PLANS = {"BTC": feed_plans("venue", protocol_profile("2026-09"))["BTC"]}
FOLLOWED = "A clock that jumps costs no bar and leaves no false one"


@dataclass
class Clocks:
    """The true time, and a clock that may be off."""

    true: float = NOON
    off: float = 0.0

    def now(self):
        """What the miner's clock shows."""
        return self.true + self.off


def price_at(ts):
    return 100 * np.exp(np.sin(ts / 5e4) / 20 + np.sin(ts / 7e2) / 1000)


@dataclass
class TrueVenue:
    """A venue that lives in the true time: its newest candle is still forming."""

    venue: Venue
    clocks: Clocks
    out: bool = False

    @property
    def name(self):
        return self.venue.value

    def candles(self, symbol, bar_s, start_ts, end_ts):
        """As the real clients: what has closed by the miner's clock, as they are told it."""
        if self.out:
            raise FeedUnreachable(f"{self.name} cannot be reached; wait.")
        first = -(-start_ts // bar_s) * bar_s
        last = min(end_ts, self.clocks.now(), self.clocks.true + bar_s) // bar_s * bar_s
        ts = np.arange(first, last, bar_s, dtype=np.int64)
        close = price_at(np.minimum(ts + bar_s, self.clocks.true))
        sieve = BarSieve.of(ts, {"close": close})
        return sieve.candles(bar_s=bar_s, feed=f"{self.name}:{symbol}"), ()

    def price(self, symbol):
        return PriceQuote(price=1.0, ts=int(self.clocks.now()), feed=f"{self.name}:{symbol}")

    def server_time(self):
        return self.clocks.true

    def close(self):
        pass


@pytest.mark.parametrize("jump_s", [3600, -3600, 90, -90, 7200])
@pytest.mark.parametrize("outage_min", [0, 45, 240])
def test_bars_are_whole_after_a_clock_jump(tmp_path, jump_s, outage_min):
    """After a clock jumped and was set right again every bar is there, as the venue has it."""
    clocks = Clocks()
    feeds = {venue: TrueVenue(venue, clocks) for venue in Venue}
    store = BarStore(tmp_path)
    collector = Collector(PLANS, feeds, store, Quarantine(tmp_path), clocks, days=0.25)
    collector.collect()

    def minutes(n, *, out=False):
        for feed in feeds.values():
            feed.out = out
        for _ in range(n):
            clocks.true += 60
            collector.collect()

    minutes(3)
    clocks.off = jump_s
    minutes(4)
    clocks.off = 0.0
    minutes(outage_min, out=True)
    minutes(70)
    bars = store.load("binance", "BTC", 60)
    assert bars is not None
    wanted = np.arange(NOON - DAY_S // 4, clocks.true, 60, dtype=np.int64)
    lost = len(np.setdiff1d(wanted, bars.open_ts))
    false = int((bars.close != price_at(bars.open_ts + 60)).sum())
    count(FOLLOWED, cases=1, bars_lost=lost)
    assert lost == 0
    assert false == 0


def quote(ts, price):
    return PriceQuote(price=price, ts=int(ts), feed=PLANS["BTC"].scored.name)


@pytest.mark.parametrize("jump_s", [3600, 900])
def test_a_quote_of_a_clock_that_was_fast_does_not_outlive_it(jump_s):
    """A quote stamped by a fast clock gives way to the first one after it was set right."""
    board = PriceBoard(PLANS)
    board.post("BTC", quote(NOON, 100.0))
    board.post("BTC", quote(NOON + jump_s, 101.0))  # the clock is fast
    board.post("BTC", quote(NOON + 5, 102.0))  # and right again
    anchor = board.anchor("BTC", quote(NOON - 60, 99.0), NOON + 6)
    count("A quote of a fast clock does not outlive it", cases=1)
    assert anchor.price == 102.0


# ---------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def market():
    return SimulatedSource(days=16, assets=("BTC",)).load("BTC", Frequency.HF).history


def ask(engine, start):
    request = ForecastRequest(
        asset="BTC", start_ts=start, increment_s=60, length_s=3600, num_paths=20
    )
    answer = engine.answer(request)
    validate_answer(encode_prompt_answer(answer), request)
    return answer


def answered(promise, engine, start):
    lost = 1
    try:
        answer = ask(engine, start)
        lost = 0
    finally:
        count(promise, cases=1, answers_lost=lost)
    return answer


@pytest.mark.parametrize("off_s", [3600, -3600, 86_400, -86_400, 0.9, -0.9])
def test_answers_are_valid_whatever_the_clock_shows(market, tmp_path, off_s):
    """With a clock that is off by up to a day every prompt is answered, and the same after."""
    end = market.bars.end_ts - 2 * DAY_S
    source = GrowingArchive(market.known_at(end), end)
    engine = ForecastEngine.open(source, Settings(source="archive", state_dir=tmp_path))
    start = end // 60 * 60 + 60
    expected = ask(engine, start).paths
    source.moment = int(end + off_s)
    for minute in range(5):
        engine.refresh()
        answered("A clock that is off costs no answer", engine, start + 60 * minute)
        source.moment += 60
    source.moment = end
    engine.refresh()
    np.testing.assert_array_equal(ask(engine, start).paths, expected)


SUMMER_BEGINS = 1_772_953_200  # 2026-03-08 07:00 UTC, 02:00 in New York
SUMMER_ENDS = 1_762_063_200  # 2025-11-02 06:00 UTC, 02:00 in New York


@pytest.mark.parametrize("change", [SUMMER_BEGINS, SUMMER_ENDS])
@pytest.mark.parametrize("asset", ["BTC", "SP500", "XAU"])
def test_answers_across_the_change_of_summer_time_are_valid(tmp_path, change, asset):
    """Before, in and after the hour that New York's clocks repeat or leave out, answers go on."""
    source = SimulatedSource(days=20, end_ts=change + 2 * 3600, assets=(asset,))
    history = source.load(asset, Frequency.HF).history
    growing = GrowingArchive(history, change - 7200)
    engine = ForecastEngine.open(growing, Settings(source="archive", state_dir=tmp_path))
    for moment in range(change - 5400, change + 7200, 1200):
        growing.moment = moment
        engine.refresh()
        request = ForecastRequest(
            asset=asset, start_ts=moment + 60, increment_s=300, length_s=86_400, num_paths=5
        )
        lost = 1
        try:
            answer = engine.answer(request)
            validate_answer(encode_prompt_answer(answer), request)
            lost = 0
        finally:
            count("The change of summer time costs no answer", cases=1, answers_lost=lost)


# ---------------------------------------------------------------- duties


@pytest.mark.parametrize("jump_s", [0, 3600, -3600, 1, -1])
def test_no_duty_waits_longer_than_its_period_after_a_jump(jump_s):
    """However the clock jumps, a duty's next run is at most its period away."""
    clocks = Clocks(true=NOON + 17.3)
    pause = each(clocks, 60, offset_s=2)
    clocks.off = jump_s
    assert 0 < pause() <= 60
    count("A clock that jumps delays no duty by more than its period", cases=1)


def test_a_smeared_leap_second_keeps_the_minutes(size):
    """Through a leap second that is smeared over a day every minute's duty runs once."""
    real = 0.0
    smeared = RehearsalClock(start=NOON, origin=0.0, speed=1 - 1 / DAY_S, wall=lambda: real)
    pause = each(smeared, 60, offset_s=2)
    ran = []
    for _ in range(size(1500, 3000)):
        real += pause() + 1e-3
        ran.append(int(smeared.now() - 2) // 60)
    assert np.diff(ran).tolist() == [1] * (len(ran) - 1)
    count("A smeared leap second leaves out no minute", cases=len(ran))
