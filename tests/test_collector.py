"""The collector against feeds in memory: whole series, no work twice, nothing wrong stored."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bar_cleaning import BarSieve
from bar_store import BarStore
from collector import (
    CHUNK_S,
    LATE_REREAD_S,
    PAST_PAUSE_S,
    REREAD_BARS,
    SETTLE_S,
    STAND_IN_DAYS,
    Collector,
    Series,
    VenueRound,
    scored_series,
)
from config import DAY_S, VENUE_BARS_KEPT, Frequency, Venue
from data_fetcher import LiveSource
from domain import Bars, PriceQuote
from errors import (
    BadAnswer,
    CountryBlocked,
    FeedFailed,
    FeedRefused,
    FeedTimeout,
    FeedUnreachable,
    StateError,
    UnreadableState,
)
from feed_plans import feed_plans
from feeds import open_feeds
from level_changes import LASTING_S
from loopback_venues import serve_venues
from protocol import protocol_profile
from quarantine import Quarantine
from settings import Settings

NOW = 1_765_800_000  # 2025-12-15 12:00 UTC
PLANS = feed_plans("venue", protocol_profile("2026-09"))


@dataclass
class TurnedClock:
    """A clock that stands still until it is turned."""

    time: float = NOW

    def now(self):
        return self.time


@dataclass
class MemoryFeed:
    """A venue with one price per second of the world, kept as the real ones keep it."""

    venue: Venue
    clock: TurnedClock
    since: int = 0  # nothing opened before
    level: float = 100.0
    failure: Exception | None = None
    failing_symbols: dict[str, Exception] = field(default_factory=dict)
    prices: dict[int, float] = field(default_factory=dict)  # closes that differ from the rule
    lacks: set[int] = field(default_factory=set)  # open times without a candle
    calls: list[tuple[str, int, int, int]] = field(default_factory=list)
    chokes_on: Callable[[int, int], Exception | None] = lambda _start, _end: None
    held_until: Event | None = None
    on_call: Event = field(default_factory=Event)

    @property
    def name(self):
        return self.venue.value

    def rule(self, ts):
        return self.level * np.exp(np.sin(ts / 5e4) / 20 + np.sin(ts / 7e2) / 1000)

    def candles(self, symbol, bar_s, start_ts, end_ts):
        self.calls.append((symbol, bar_s, start_ts, end_ts))
        if self.held_until is not None:
            self.held_until.wait(60)
        failure = self.failing_symbols.get(symbol, self.failure)
        failure = failure or self.chokes_on(start_ts, end_ts)
        if failure is not None:
            raise failure
        end = min(end_ts, int(self.clock.now())) // bar_s * bar_s
        first = max(start_ts - 8 * bar_s, self.since)
        if self.venue in VENUE_BARS_KEPT:
            edge = int(self.clock.now()) // bar_s * bar_s
            first = max(first, edge - VENUE_BARS_KEPT[self.venue] * bar_s)
        ts = np.arange(-(-first // bar_s) * bar_s, end, bar_s, dtype=np.int64)
        ts = ts[~np.isin(ts, list(self.lacks))]
        close = self.rule(ts + bar_s)
        for at, price in self.prices.items():
            close[ts == at] = price
        sieve = BarSieve.of(
            ts, {"close": close, "volume": np.ones(len(ts)), "trades": np.full(len(ts), 7.0)}
        )
        candles = sieve.candles(bar_s=bar_s, feed=f"{self.name}:{symbol}")
        return candles.between(start_ts, end_ts), tuple(
            row for row in sieve.set_aside if start_ts <= row.ts < end_ts
        )

    def price(self, symbol):
        return PriceQuote(price=1.0, ts=int(self.clock.now()), feed=f"{self.name}:{symbol}")

    def server_time(self):
        return None

    def close(self):
        pass


class World:
    """Feeds, a store and a collector of some assets."""

    def __init__(self, root, *assets, days=3.0):
        self.clock = TurnedClock()
        self.feeds = {venue: MemoryFeed(venue, self.clock) for venue in Venue}
        self.root, self.days = root, days
        self.plans = {asset: PLANS[asset] for asset in assets}
        self.store = BarStore(root)
        self.collector = self.another()

    def another(self):
        """One more process on the same folder."""
        return Collector(
            self.plans,
            self.feeds,
            BarStore(self.root),
            Quarantine(self.root),
            self.clock,
            days=self.days,
        )

    def asked(self):
        """Seconds of bars that were asked for since the last look."""
        seconds = sum(end - start for feed in self.feeds.values() for *_, start, end in feed.calls)
        for feed in self.feeds.values():
            feed.calls.clear()
        return seconds

    def closes(self, asset="BTC", venue="binance", bar_s=60):
        bars = self.store.load(venue, asset, bar_s)
        return {} if bars is None else dict(zip(bars.open_ts.tolist(), bars.close, strict=True))

    def refused(self):
        files = sorted((self.root / "quarantine").glob("*.jsonl"))
        return [line for path in files for line in path.read_text().splitlines()]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path, "BTC")


# ---------------------------------------------------------------- every minute


def test_every_closed_candle_is_stored_with_its_trades_and_its_feed(world):
    world.collector.collect()
    candles = world.store.load_candles("binance", "BTC", 60)
    assert candles.bars.feed == "binance:BTCUSDT"
    assert candles.bars.end_ts == NOW
    assert (candles.trades == 7).all()
    for minute in range(1, 4):
        world.clock.time = NOW + 60 * minute + 2
        done = world.collector.collect()
        assert (done.new, done.failures) == (1, {})
        assert max(world.closes()) == NOW + 60 * (minute - 1)


def test_a_forming_candle_is_never_stored(world):
    world.clock.time = NOW + 59.9
    world.collector.collect()
    assert max(world.closes()) == NOW - 60


def test_a_minute_asks_for_the_last_bars_alone(world):
    world.collector.collect()
    world.asked()
    world.clock.time = NOW + 62
    world.collector.collect()
    assert world.asked() == REREAD_BARS * 60


def test_a_late_correction_is_read_soon_and_once_more_later(world):
    world.collector.collect()
    soon, late = NOW - 120, NOW - 3000
    world.feeds[Venue.BINANCE].prices |= {soon: 101.0, late: 102.0}
    world.clock.time = NOW + 62
    assert world.collector.collect().corrected == 1
    assert (world.closes()[soon], world.closes()[late]) == (101.0, pytest.approx(100, rel=0.1))
    world.clock.time = NOW + 3602  # the next hour
    assert late >= NOW + 3600 - LATE_REREAD_S
    assert world.collector.collect().corrected == 1
    assert world.closes()[late] == 102.0


def test_a_gap_left_by_an_outage_is_repaired(world):
    world.collector.collect()
    feed = world.feeds[Venue.BINANCE]
    feed.failure = FeedUnreachable("binance is away; try again.")
    world.clock.time = NOW + 4 * 3600
    assert world.collector.collect().failures == {"binance:BTCUSDT": "binance is away; try again."}
    feed.failure = None
    world.clock.time += 60
    world.collector.collect()
    times = sorted(world.closes())
    assert times[-1] == world.clock.time - 60
    assert set(np.diff(times)) == {60}


def test_a_gap_that_the_venue_confirms_is_not_asked_for_again(world):
    feed = world.feeds[Venue.BINANCE]
    feed.lacks = {NOW - 7200, NOW - 7260}
    for minute in range(3):
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
    assert feed.lacks.isdisjoint(world.closes())
    world.asked()
    world.clock.time = NOW + 240
    world.collector.collect()
    assert world.asked() == REREAD_BARS * 60


def test_a_young_gap_is_asked_for_until_it_has_settled(world):
    feed = world.feeds[Venue.BINANCE]
    feed.lacks = {NOW - 60}
    for late in range(0, SETTLE_S - 60, 60):  # the venue is slow with this one
        world.clock.time = NOW + late
        world.collector.collect()
    feed.lacks = set()
    world.clock.time += 60
    world.collector.collect()
    assert NOW - 60 in world.closes()


def test_a_venue_that_gives_nothing_for_hours_is_asked_again_for_them(world):
    world.collector.collect()
    feed = world.feeds[Venue.BINANCE]
    feed.lacks = set(range(NOW, NOW + 6 * 3600, 60))
    for _ in range(12):
        world.clock.time += 1800
        world.collector.collect()
        world.collector.backfill()
    feed.lacks = set()
    world.collector.collect()
    assert (np.diff(sorted(world.closes())) == 60).all()
    assert max(world.closes()) == world.clock.time - 60


def test_the_last_candle_of_an_old_copy_corrects_nothing(world):
    world.collector.collect()
    feed, last = world.feeds[Venue.BINANCE], NOW - 900
    feed.lacks = set(range(last + 60, NOW + 3700, 60))
    feed.prices[last] = 77.0  # as it was while it formed
    world.clock.time = NOW + 3600  # an hour's late look back
    world.collector.collect()
    assert world.closes()[last] == feed.rule(last + 60)


# ---------------------------------------------------------------- nonsense


def test_a_price_that_is_not_positive_is_refused_reported_and_kept_in_a_file_once(world, caplog):
    world.feeds[Venue.BINANCE].prices[NOW - 120] = -5.0
    for minute in range(3):
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
    assert NOW - 120 not in world.closes()
    (line,) = world.refused()
    assert '"reason": "close is not a positive number"' in line
    assert f'"ts": {NOW - 120}' in line
    assert caplog.text.count("bar refused") == 1
    world.another().collect()
    assert len(world.refused()) == 1  # a restart does not repeat it


def test_a_spike_at_the_newest_edge_waits_for_its_neighbours_and_is_then_refused(world):
    world.feeds[Venue.BINANCE].prices[NOW - 60] = 1000.0
    for minute in range(3):
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
        assert (NOW - 60 in world.closes(), world.refused()) == (False, [])
    world.clock.time = NOW + 180
    assert world.collector.collect().refused == 1
    assert NOW - 60 not in world.closes()
    assert "spike" in world.refused()[0]


def test_a_spike_that_a_second_feed_saw_too_is_stored(world):
    world.feeds[Venue.BINANCE].prices[NOW - 1200] = 1000.0
    world.feeds[Venue.PYTH].prices[NOW - 1200] = 1001.0
    assert world.collector.collect().refused == 0
    assert world.closes()[NOW - 1200] == 1000.0


def test_a_spike_at_which_a_second_feed_has_the_very_price_is_stored(world):
    """As where a venue errs for long and is right for a minute in between."""
    world.feeds[Venue.BINANCE].prices[NOW - 1200] = 1000.0
    world.feeds[Venue.PYTH].prices |= {NOW - 1200 + 60 * n: 1001.0 for n in range(-4, 4)}
    world.collector.collect()
    assert world.closes()[NOW - 1200] == 1000.0


def other_level(minutes):
    """Closes of so many minutes from now on, fifteen times as high."""
    return {NOW + 60 * minute: 1500.0 + minute for minute in range(minutes)}


def test_a_level_that_another_feed_shares_is_believed_once_it_is_no_spike(world):
    world.collector.collect()
    for venue in (Venue.BINANCE, Venue.PYTH):
        world.feeds[venue].prices |= other_level(10)
    for minute in range(1, 8):
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
    assert [world.closes()[NOW + 60 * minute] for minute in range(6)] == [
        1500.0 + minute for minute in range(6)
    ]
    assert world.refused() == []
    assert world.collector.doubts() == ()


@pytest.mark.parametrize("minutes", [4, 10, 60])
def test_a_level_that_another_feed_denies_waits_until_it_is_withdrawn(world, minutes):
    world.collector.collect()
    feed = world.feeds[Venue.BINANCE]
    feed.prices |= other_level(minutes)
    lies = set(feed.prices.values())
    for minute in range(1, minutes + 8):
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
        assert lies.isdisjoint(world.closes().values())
    told = f"BTC: {minutes} bars of binance:BTCUSDT at {1499 + minutes} are kept waiting, a level"
    (doubt,) = world.collector.doubts()
    assert doubt.startswith(told)
    assert len(world.refused()) == minutes  # each once
    assert "another feed denies" in world.refused()[0]
    feed.prices.clear()
    world.clock.time += 60
    world.collector.collect()
    assert set(np.diff(sorted(world.closes()))) == {60}
    assert max(world.closes()) == world.clock.time - 60
    assert world.collector.doubts() == ()


def test_a_level_that_another_feed_comes_round_to_is_stored_in_the_end(world):
    world.collector.collect()
    world.feeds[Venue.BINANCE].prices |= other_level(200)
    world.clock.time = NOW + 180 * 60
    world.collector.collect()
    assert NOW not in world.closes()
    world.feeds[Venue.PYTH].prices |= other_level(200)
    world.clock.time += 60
    world.collector.collect()
    assert world.closes() | other_level(181) == world.closes()


@pytest.mark.parametrize("lasting", [False, True])
def test_a_level_that_nobody_can_confirm_is_believed_when_it_has_lasted(world, lasting):
    world.collector.collect()
    world.feeds[Venue.PYTH].failure = FeedUnreachable("pyth is away; try again.")
    minutes = LASTING_S // 60 - (0 if lasting else 1)
    world.feeds[Venue.BINANCE].prices |= other_level(minutes)
    for minute in (5, 60, minutes):
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
        assert (NOW in world.closes()) == (lasting and minute == minutes)
    assert "no other feed confirms" in world.refused()[0]
    if not lasting:
        world.feeds[Venue.BINANCE].prices.clear()
        world.clock.time += 600
        world.collector.collect()
        assert max(world.closes().values()) < 200


def test_a_level_of_the_past_that_another_feed_denies_is_not_stored(tmp_path):
    world = World(tmp_path, "BTC", days=10.0)
    lies = {NOW - 3 * DAY_S + 60 * minute: 1500.0 for minute in range(60)}
    world.feeds[Venue.BINANCE].prices |= lies
    world.collector.backfill()
    assert world.closes().keys().isdisjoint(lies)
    assert len(world.closes()) == 10 * 1440 - SETTLE_S // 60 - 60


# ---------------------------------------------------------------- venues fail


def test_an_unreachable_venue_is_asked_once_and_the_others_go_on(tmp_path, caplog):
    world = World(tmp_path, "BTC", "XAU", "SP500")
    world.feeds[Venue.HYPERLIQUID].failure = FeedUnreachable("hyperliquid is away; wait.")
    for minute in range(3):
        world.clock.time = NOW + 60 * minute
        done = world.collector.collect()
        assert set(done.failures) == {"hyperliquid:xyz:GOLD", "hyperliquid:xyz:SP500"}
    assert len(world.feeds[Venue.HYPERLIQUID].calls) == 3
    assert max(world.closes()) == NOW + 60
    (line,) = (line for line in caplog.records if line.levelname == "WARNING")
    assert line.getMessage() == "feed failing"  # not every minute
    assert (line.feed, line.also) == ("hyperliquid:xyz:GOLD", "hyperliquid:xyz:SP500")
    assert world.collector.failing().keys() == done.failures.keys()
    world.feeds[Venue.HYPERLIQUID].failure = None
    world.collector.collect()
    assert world.collector.failing() == {}
    assert world.closes("XAU", "hyperliquid")


@pytest.mark.parametrize(("error", "is_of_all"), [(FeedRefused, False), (CountryBlocked, True)])
def test_a_refused_symbol_does_not_stop_the_venues_others(tmp_path, error, is_of_all):
    world = World(tmp_path, "BTC", "ETH")
    world.feeds[Venue.BINANCE].failing_symbols["BTCUSDT"] = error("no; do without.")
    failures = world.collector.collect().failures
    assert ("binance:ETHUSDT" in failures) == is_of_all
    assert bool(world.closes("ETH")) != is_of_all


def test_a_symbol_that_was_refused_keeps_its_own_sentence_when_the_venue_falls(tmp_path):
    world = World(tmp_path, "BTC", "ETH", "SOL")
    symbols = world.feeds[Venue.BINANCE].failing_symbols
    symbols["BTCUSDT"] = FeedRefused("no; do without.")
    symbols["ETHUSDT"] = FeedUnreachable("it is away; wait.")
    assert world.collector.collect().failures == {
        "binance:BTCUSDT": "no; do without.",
        "binance:ETHUSDT": "it is away; wait.",
        "binance:SOLUSDT": "it is away; wait.",
    }


# ---------------------------------------------------------------- the past


def test_a_first_run_fetches_all_days_without_a_gap_the_newest_first(tmp_path):
    world = World(tmp_path, "BTC", "ETH", days=30.0)
    told = []
    done = world.collector.backfill(progress=lambda *step: told.append(step))
    for asset in ("BTC", "ETH"):
        times = np.array(sorted(world.closes(asset)))
        assert (times[0], times[-1]) == (NOW - 30 * DAY_S, NOW - SETTLE_S - 60)
        assert (np.diff(times) == 60).all()
    ends = [end // CHUNK_S for *_, end in world.feeds[Venue.BINANCE].calls]
    assert ends == sorted(ends, reverse=True)
    assert done.new == sum(len(world.closes(asset)) for asset in ("BTC", "ETH"))
    counts = [done for done, _, _ in told]
    assert counts == sorted(counts)
    assert told[-1][0] == told[-1][1]
    assert told[-1][2] == "ETH from binance"


def test_nothing_is_fetched_twice(tmp_path):
    world = World(tmp_path, "BTC", days=30.0)
    stop = Event()

    def stop_halfway(done, total, _what):
        if done > total / 2:
            stop.set()

    world.collector.backfill(progress=stop_halfway, stop=stop)
    first = world.asked()
    assert 0 < first < 28 * DAY_S
    world.another().backfill()
    assert first + world.asked() == 30 * DAY_S - SETTLE_S
    world.another().backfill()
    assert world.asked() == 0


def test_an_interrupt_keeps_what_was_fetched(tmp_path):
    world = World(tmp_path, "BTC", days=30.0)

    def interrupt(done, total, _what):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.collector.backfill(progress=interrupt)
    first = world.asked()
    world.another().backfill()
    assert first + world.asked() == 30 * DAY_S - SETTLE_S


def test_of_a_short_lived_venue_both_kinds_of_bars_are_collected(tmp_path):
    world = World(tmp_path, "SPCX", days=60.0)
    world.collector.backfill()
    world.collector.collect()
    minutes, fives = (sorted(world.closes("SPCX", "hyperliquid", bar_s)) for bar_s in (60, 300))
    assert NOW - minutes[0] == pytest.approx(5000 * 60, abs=600)
    assert NOW - fives[0] == pytest.approx(5000 * 300, abs=3000)
    assert (minutes[-1], fives[-1]) == (NOW - 60, NOW - 300)
    world.asked()
    world.another().backfill()
    assert world.asked() == 0  # what the venue does not keep is not asked for


def test_other_feeds_give_the_history_from_before_the_scored_one(tmp_path):
    world = World(tmp_path, "XAU", days=20.0)
    world.feeds[Venue.PYTH].since = NOW - 12 * DAY_S
    world.collector.backfill()
    scored = min(world.closes("XAU", "hyperliquid"))
    pyth, paxg = sorted(world.closes("XAU", "pyth")), sorted(world.closes("XAU", "binance"))
    assert pyth[0] == NOW - 12 * DAY_S
    assert scored < pyth[-1] < scored + DAY_S  # enough to compare their levels
    assert paxg[0] == NOW - 20 * DAY_S
    assert pyth[0] < paxg[-1] < pyth[0] + DAY_S
    token = world.store.load("binance", "XAU", 60)
    assert token is not None
    assert token.feed == "binance:PAXGUSDT"
    world.asked()
    world.another().backfill()
    assert world.asked() == 0
    assert Series("XAU", PLANS["XAU"].others[0], 60) not in scored_series(PLANS["XAU"])


def test_a_venue_with_all_of_the_past_needs_no_other_feed(tmp_path):
    world = World(tmp_path, "BTC", days=20.0)
    world.collector.backfill()
    assert world.feeds[Venue.PYTH].calls == []


def test_a_miner_that_was_off_for_long_fills_the_hole_from_another_feed(tmp_path):
    world = World(tmp_path, "HYPE", days=30.0)
    world.collector.backfill()
    world.clock.time = NOW + 12 * DAY_S
    world.collector.backfill()
    lost = NOW + DAY_S  # Hyperliquid keeps three and a half days of minutes
    assert lost not in world.closes("HYPE", "hyperliquid")
    assert lost in world.closes("HYPE", "pyth")


def test_while_a_scored_feed_without_a_bar_fails_others_stand_in_for_it(tmp_path):
    """The best that works, some days back and minute by minute; and only as long as that lasts."""
    world = World(tmp_path, "XAU", days=40.0)

    def held(venue):
        bars = world.store.load(venue, "XAU", 60)
        assert bars is not None
        return bars.open_ts[0], bars.end_ts

    down = FeedUnreachable("it cannot be reached; wait.")
    world.feeds[Venue.HYPERLIQUID].failure = down
    world.feeds[Venue.PYTH].failure = down
    world.collector.collect()
    world.collector.backfill()
    first, end = held("binance")
    assert end == NOW
    assert NOW - first >= STAND_IN_DAYS * DAY_S
    world.clock.time += 60
    world.feeds[Venue.PYTH].failure = None
    world.collector.collect()
    assert held("binance")[1] == NOW + 60
    assert held("pyth")[1] == NOW + 60
    world.feeds[Venue.HYPERLIQUID].failure = None
    world.clock.time += 60
    world.collector.collect()
    for _ in range(3):
        world.clock.time += 60
        world.collector.collect()
    assert held("hyperliquid")[1] == NOW + 300
    assert held("pyth")[1] == NOW + 60


def test_a_venue_that_keeps_its_past_is_replaced_for_some_days_alone(tmp_path):
    world = World(tmp_path, "BTC", days=40.0)
    world.feeds[Venue.BINANCE].failure = FeedUnreachable("it cannot be reached; wait.")
    world.collector.backfill()
    held = world.store.load("pyth", "BTC", 60)
    assert held is not None
    assert NOW - held.open_ts[0] == pytest.approx(STAND_IN_DAYS * DAY_S, abs=2 * 3600)
    assert (np.diff(held.open_ts) == 60).all()


def test_an_unreachable_venue_ends_the_backfill_with_its_sentence(tmp_path):
    world = World(tmp_path, "BTC", "XAU", days=8.0)
    world.feeds[Venue.BINANCE].failure = FeedUnreachable("binance is away; wait.")
    done = world.collector.backfill()
    assert done.failures["binance:BTCUSDT"] == "binance is away; wait."
    assert world.closes("XAU", "pyth")
    assert len([c for c in world.feeds[Venue.BINANCE].calls if c[0] == "BTCUSDT"]) == 1


def test_two_processes_on_one_folder_share_the_work(tmp_path):
    world = World(tmp_path, "BTC", "ETH", days=10.0)
    other, done = world.another(), set[str]()

    def halfway(*_):
        if not done:
            done.add("halfway")
            other.backfill()

    world.collector.backfill(progress=halfway)
    for asset in ("BTC", "ETH"):
        assert (np.diff(sorted(world.closes(asset))) == 60).all()
    assert world.asked() <= 2 * 10 * DAY_S  # nothing was fetched by both


def test_a_damaged_day_is_fetched_again(tmp_path):
    world = World(tmp_path, "BTC", days=10.0)
    world.collector.backfill()
    before, asked = world.closes(), world.asked()
    sorted((tmp_path / "bars").rglob("*.msgpack"))[3].write_bytes(b"rust")
    world.another().backfill()
    assert world.closes() == before
    assert 0 < world.asked() <= DAY_S < asked


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 900), st.booleans()), min_size=1, max_size=8),
    st.sets(st.integers(-1000, 3000), max_size=30),
)
def test_whatever_happens_the_store_ends_up_holding_what_the_venue_has(
    tmp_path_factory, steps, lacks
):
    world = World(tmp_path_factory.mktemp("state"), "BTC", days=1.0)
    feed = world.feeds[Venue.BINANCE]
    feed.lacks = {NOW + 60 * minute for minute in lacks}
    for minutes, is_reachable in steps:
        world.clock.time += 60 * minutes
        feed.failure = None if is_reachable else FeedUnreachable("away; wait.")
        (world.collector if minutes % 2 else world.another()).collect()
    feed.failure = None
    end = int(world.clock.time)
    feed.lacks.discard(end - 60)  # before a gap at the end, the last candle would wait
    world.collector.backfill()
    world.collector.collect()
    wanted = set(range(end - DAY_S, end, 60)) - feed.lacks
    held = world.closes()
    assert {ts for ts in held if ts >= end - DAY_S} == wanted
    assert all(held[ts] == feed.rule(ts + 60) for ts in wanted)


def test_frequencies_decide_what_is_collected():
    assert [entry.bar_s for entry in scored_series(PLANS["BTC"])] == [60]
    assert [entry.bar_s for entry in scored_series(PLANS["XAU"])] == [60, 300]
    assert Frequency.LF in PLANS["XAU"].frequencies


# ---------------------------------------------------------------- over real HTTP


def recorded(days, end):
    """Minutes of a walk, as a venue gives them."""
    n = days * 1440
    close = 2000 * np.exp(np.cumsum(np.random.default_rng(2).normal(0, 5e-4, n)))
    return Bars(
        open_ts=end - 60 * np.arange(n, 0, -1, dtype=np.int64),
        open=close,
        high=close * 1.0002,
        low=close * 0.9998,
        close=close,
        volume=np.ones(n),
        bar_s=60,
        feed="recorded",
    )


def test_over_real_http_the_past_and_the_present_become_one_history(tmp_path):
    clock = TurnedClock(NOW + 30)
    bars = recorded(8, NOW + 7200)
    plans = {asset: PLANS[asset] for asset in ("BTC", "XAU")}
    with ExitStack() as opened:
        venues = opened.enter_context(serve_venues({"BTC": bars, "XAU": bars}, clock))
        chosen = Settings(state_dir=tmp_path, days=6, **venues.urls)
        feeds = open_feeds(chosen, clock)
        for feed in feeds.values():
            opened.callback(feed.close)
        store = BarStore(tmp_path)
        collector = Collector(plans, feeds, store, Quarantine(tmp_path), clock, days=6)
        assert collector.backfill().failures == {}
        for _ in range(3):
            assert collector.collect().failures == {}
            clock.time += 60
        collector.collect()
    source, end = LiveSource(chosen, clock), NOW + 180
    for asset, frequency in (("BTC", Frequency.HF), ("BTC", Frequency.LF), ("XAU", Frequency.LF)):
        history = source.load(asset, frequency).history
        assert history.anchor_ts == end
        held, bar_s = history.bars, history.bars.bar_s
        assert (np.diff(held.open_ts) == bar_s).all()
        assert held.open_ts[0] <= NOW - 6 * DAY_S + bar_s + 60
        known = np.searchsorted(bars.close_ts, held.close_ts)
        np.testing.assert_allclose(held.close, bars.close[known], rtol=1e-12)
    candles = store.load_candles("binance", "BTC", 60)
    assert candles is not None
    assert np.isfinite(candles.trades).all()
    assert np.isfinite(candles.taker_volume).all()


# ---------------------------------------------------------------- whose fault it is


def test_one_fault_of_a_venue_is_the_symbols_and_two_in_a_row_are_its_own():
    fault, gone = FeedFailed("HTTP 500."), FeedUnreachable("no connection.")
    refused = FeedRefused("HTTP 422.")
    venue = VenueRound()
    assert [venue.is_down_after(fault, name) for name in "AAB"] == [False, False, True]
    again = VenueRound()
    assert not again.is_down_after(fault, "A")
    again.worked()
    assert not again.is_down_after(fault, "B")
    assert not again.is_down_after(refused, "C")
    assert VenueRound().is_down_after(gone, "A")


def test_a_symbol_that_a_venue_has_lost_costs_the_others_nothing(tmp_path):
    """Hyperliquid answers 500 to it, for its minutes and for its longer bars."""
    world = World(tmp_path, "XAU", "WTIOIL", "SP500", days=1.0)
    hyperliquid = world.feeds[Venue.HYPERLIQUID]
    hyperliquid.failing_symbols["xyz:GOLD"] = FeedFailed("HTTP 500.")
    done = world.collector.collect()
    assert set(done.failures) == {"hyperliquid:xyz:GOLD"}
    for asset in ("WTIOIL", "SP500"):
        assert world.closes(asset, "hyperliquid")


def test_a_venue_that_hangs_keeps_no_other_waiting(tmp_path):
    world, let_go = World(tmp_path, "BTC", "XAU", days=1.0), Event()
    world.feeds[Venue.HYPERLIQUID].held_until = let_go
    hanging = Thread(target=world.collector.collect, args=([Venue.HYPERLIQUID],))
    hanging.start()
    try:
        for minute in range(3):
            world.clock.time = NOW + 60 * minute
            assert world.collector.collect([Venue.BINANCE]).failures == {}
            assert max(world.closes()) == NOW + 60 * (minute - 1)
        assert hanging.is_alive()
    finally:
        let_go.set()
        hanging.join()
    assert world.closes("XAU", "hyperliquid")


def test_venues_that_are_asked_one_by_one_keep_their_own_failures_and_doubts(tmp_path):
    world = World(tmp_path, "BTC", "XAU", days=1.0)
    world.collector.collect()
    world.feeds[Venue.BINANCE].level = 9_000.0  # at once, and for good
    world.feeds[Venue.HYPERLIQUID].failure = FeedUnreachable("no connection.")
    world.clock.time += 3600
    for venue in (Venue.BINANCE, Venue.HYPERLIQUID):
        world.collector.collect([venue])
    assert set(world.collector.failing()) == {"hyperliquid:xyz:GOLD"}
    assert [sentence.partition(":")[0] for sentence in world.collector.doubts()] == ["BTC"]
    world.feeds[Venue.HYPERLIQUID].failure = None
    world.collector.collect([Venue.HYPERLIQUID])
    assert world.collector.failing() == {}
    assert len(world.collector.doubts()) == 1


def test_a_feed_that_fails_says_nothing_of_the_disk(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    world = World(tmp_path, "HYPE", days=1.0)

    def refuse(*_args, **_more):
        raise StateError("no room.")

    monkeypatch.setattr(world.collector._store, "append", refuse)
    for failure in (None, FeedUnreachable("no connection."), None):
        world.feeds[Venue.HYPERLIQUID].failure = failure
        world.collector.collect()
        assert set(world.collector.unsaved()) >= {"hyperliquid:@107"}
    assert "stored again" not in [line.getMessage() for line in caplog.records]


def test_a_disk_that_refuses_is_no_feed_that_fails(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    world = World(tmp_path, "BTC", "ETH", days=1.0)
    store, append = world.collector._store, world.collector._store.append

    def refuse(venue, asset, *args, **more):
        if asset == "BTC":
            raise StateError("bars/binance/BTC_60s cannot be written; make room.")
        return append(venue, asset, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(store, "append", refuse)
        for work in (world.collector.collect, world.collector.collect, world.collector.backfill):
            done = work()
            assert done.failures == world.collector.failing() == {}
            assert set(done.unsaved) == set(world.collector.unsaved()) == {"binance:BTCUSDT"}
    assert world.closes("ETH")
    assert not world.closes("BTC")
    world.collector.collect()
    assert world.collector.unsaved() == {}
    assert world.closes("BTC")
    told = [line.getMessage() for line in caplog.records]
    assert told == ["bars not stored", "bars are stored again"]


@pytest.mark.parametrize(
    "faults",
    [
        {"xyz:GOLD": FeedTimeout("no answer.")},
        {"xyz:GOLD": FeedFailed("HTTP 500."), "xyz:CL": FeedFailed("HTTP 500.")},
        {"xyz:SP500": FeedFailed("HTTP 500."), "xyz:CL": FeedFailed("HTTP 500.")},
    ],
    ids=["one hangs", "the first two are lost", "the last two are lost"],
)
def test_symbols_that_fail_starve_no_other_of_their_venue(tmp_path, faults):
    world = World(tmp_path, "HYPE", "XAU", "WTIOIL", "SP500", days=1.0)
    world.feeds[Venue.HYPERLIQUID].failing_symbols.update(faults)
    for _ in range(3):
        world.collector.collect()
        world.clock.time += 60
    lost = {f"hyperliquid:{symbol}" for symbol in faults}
    assert set(world.collector.failing()) == lost
    for asset, plan in world.plans.items():
        assert bool(world.closes(asset, "hyperliquid")) == (plan.scored.name not in lost)
    world.feeds[Venue.HYPERLIQUID].failing_symbols.clear()
    world.collector.collect()
    assert world.collector.failing() == {}


def test_what_was_said_of_a_feed_that_stood_in_ends_with_its_standing_in(tmp_path, monkeypatch):
    world = World(tmp_path, "BTC", days=1.0)
    binance, pyth = world.feeds[Venue.BINANCE], world.feeds[Venue.PYTH]
    binance.failure = FeedUnreachable("no connection.")
    pyth.failure = FeedRefused("no such symbol.")
    world.collector.collect()
    assert set(world.collector.failing()) == {"binance:BTCUSDT", "pyth:Crypto.BTC/USD"}
    pyth.failure = None
    append = world.collector._store.append

    def refuse_pyth(venue, *args, **more):
        if venue == "pyth":
            raise StateError("no room.")
        return append(venue, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(world.collector._store, "append", refuse_pyth)
        world.collector.collect()
        assert set(world.collector.unsaved()) == {"pyth:Crypto.BTC/USD"}
    binance.failure = None
    world.collector.collect()
    assert world.collector.failing() == world.collector.unsaved() == {}


def test_a_day_that_cannot_be_read_stops_no_bar_of_another(tmp_path, monkeypatch):
    """Yesterday's file, from the next midnight on."""
    world = World(tmp_path, "BTC", days=3.0)
    world.collector.backfill()
    store, midnight = world.collector._store, (NOW // DAY_S + 1) * DAY_S
    world.clock.time = midnight - 60
    world.collector.collect()
    read = store._load_day

    def refuse_yesterday(series, day, bar_s):
        if day == midnight // DAY_S - 1:
            raise UnreadableState("it cannot be read; mend the disk.")
        return read(series, day, bar_s)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_load_day", refuse_yesterday)
        for minute in range(1, 4):
            world.clock.time = midnight + 60 * minute
            world.asked()
            world.collector.collect()
        assert max(world.closes()) == midnight + 120
        assert world.asked() <= 2 * LATE_REREAD_S  # and not two days every minute


BAD_BAR = NOW + 120
WRONG, SLOW = BadAnswer("binance gives no candles."), FeedTimeout("binance took too long.")


@pytest.mark.parametrize(
    "chokes_on",
    [
        lambda start, end: WRONG if start <= BAD_BAR < end else None,
        lambda start, end: SLOW if end - start > 3600 else None,
    ],
    ids=["one bar that no answer survives", "long calls"],
)
def test_older_bars_that_cannot_be_read_keep_no_new_one_away(world, caplog, chokes_on):
    caplog.set_level("INFO")
    world.collector.collect()
    feed = world.feeds[Venue.BINANCE]
    feed.chokes_on = chokes_on
    late = []
    for minute in range(1, 130):
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
        late.append((world.clock.time - 60 - max(world.closes())) // 60)
    assert max(late) <= REREAD_BARS  # while the bad one is among the newest
    assert sum(map(bool, late)) <= REREAD_BARS
    assert world.collector.failing() == {}
    told = [r.getMessage() for r in caplog.records if r.name == "feed_faults"]
    assert told.count("older bars not read") == 1
    feed.chokes_on = lambda _start, _end: None
    world.clock.time += PAST_PAUSE_S
    world.collector.collect()
    assert set(np.diff(sorted(world.closes()))) == {60}
    assert max(world.closes()) == world.clock.time - 60
    assert caplog.records[-1].getMessage() == "older bars are read again"


def test_long_calls_that_a_venue_does_not_answer_are_tried_for_one_series_at_a_time(tmp_path):
    world = World(tmp_path, "BTC", "ETH", "SOL")
    feed = world.feeds[Venue.BINANCE]
    world.collector.collect()
    feed.chokes_on = lambda start, end: SLOW if end - start > 3600 else None
    feed.calls.clear()
    for minute in range(60, 80):  # from a full hour on
        world.clock.time = NOW + 60 * minute
        world.collector.collect()
    assert {max(world.closes(asset)) for asset in world.plans} == {world.clock.time - 60}
    assert sum(end - start > 3600 for *_, start, end in feed.calls) <= 4


def test_a_clock_that_was_ahead_makes_older_bars_wait_no_longer(world):
    world.collector.collect()
    feed = world.feeds[Venue.BINANCE]
    feed.chokes_on = lambda start, end: SLOW if end - start > 3600 else None
    for minute in range(2):
        world.clock.time = NOW + 6 * 3600 + 60 * minute
        world.collector.collect()
    feed.chokes_on = lambda _start, _end: None
    world.clock.time = NOW + 3600
    world.collector.collect()
    assert NOW in world.closes()
    assert set(np.diff([ts for ts in sorted(world.closes()) if ts <= NOW + 3540])) == {60}


def test_a_feed_that_a_backfill_finds_well_again_is_not_called_failing(tmp_path):
    world = World(tmp_path, "NVDAX", days=6.0)
    world.feeds[Venue.HYPERLIQUID].since = NOW - 3 * DAY_S
    pyth = world.feeds[Venue.PYTH]
    world.collector.collect()
    pyth.failure = FeedUnreachable("no connection.")
    world.collector.backfill()
    assert set(world.collector.failing()) == {"pyth:Crypto.NVDAX/USD"}
    pyth.failure = None
    world.collector.backfill()
    assert world.closes("NVDAX", "pyth")
    assert world.collector.failing() == {}
