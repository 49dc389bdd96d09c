"""Which price an answer starts from: the ladder, the levels of feeds, and wild quotes."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import ANCHOR_MAX_AGE_S, Venue
from domain import PriceQuote
from errors import FeedRefused, FeedUnreachable
from feed_plans import feed_plans
from price_board import LEVEL_EVERY_S, STILL_S, AnchorSource, PriceBoard, PricePoller
from protocol import protocol_profile

NOW = 1_765_800_000
PLANS = feed_plans("venue", protocol_profile("2026-09"))
BTC, PYTH_BTC = PLANS["BTC"].scored.name, PLANS["BTC"].others[0].name
SP500, SPYX = PLANS["SP500"].scored.name, PLANS["SP500"].others[0].name
OLD = ANCHOR_MAX_AGE_S + 1


def quote(price, age=0, feed=BTC):
    return PriceQuote(price=price, ts=NOW - age, feed=feed)


def anchored(*quotes, asset="BTC", bar=None):
    board = PriceBoard(PLANS)
    for entry in quotes:
        board.post(asset, entry)
    return board.anchor(asset, bar or quote(100, age=OLD + 60, feed=PLANS[asset].scored.name), NOW)


def test_a_young_quote_of_the_scored_feed_is_the_anchor():
    anchor = anchored(quote(101, age=5), quote(103, feed=PYTH_BTC))
    assert (anchor.price, anchor.ts, anchor.feed) == (101, NOW - 5, BTC)
    assert anchor.source is AnchorSource.QUOTE


def test_an_old_quote_gives_way_to_the_second_source():
    anchor = anchored(quote(101, age=OLD), quote(103, age=3, feed=PYTH_BTC))
    assert (anchor.price, anchor.ts, anchor.feed) == (103, NOW - 3, PYTH_BTC)
    assert anchor.source is AnchorSource.SECOND_SOURCE


def test_the_second_source_is_moved_to_the_scored_feeds_level():
    board = PriceBoard(PLANS)
    board.post("BTC", quote(100, age=OLD))
    board.post("BTC", quote(98, age=OLD - 20, feed=PYTH_BTC))
    board.post("BTC", quote(99, age=2, feed=PYTH_BTC))
    anchor = board.anchor("BTC", quote(100, age=OLD + 60), NOW)
    assert anchor.price == pytest.approx(99 * 100 / 98)


def test_a_feed_of_another_price_counts_only_once_its_level_is_known():
    bar = quote(6800, age=OLD + 60, feed=SP500)
    only = anchored(quote(680, age=2, feed=SPYX), asset="SP500", bar=bar)
    assert (only.price, only.source) == (6800, AnchorSource.LAST_BAR)
    known = anchored(
        quote(6805, age=OLD + 5, feed=SP500),
        quote(680, age=OLD, feed=SPYX),
        quote(682, age=1, feed=SPYX),
        asset="SP500",
        bar=bar,
    )
    assert known.price == pytest.approx(6805 * 682 / 680)
    assert known.source is AnchorSource.SECOND_SOURCE


@pytest.mark.parametrize(
    ("scored", "other", "bar_age", "price", "source"),
    [
        (None, None, 30, 98, AnchorSource.SECOND_SOURCE),  # the bar that stands in
        (None, None, OLD, 98, AnchorSource.SECOND_SOURCE),
        (None, 3, OLD, 103, AnchorSource.SECOND_SOURCE),
        (50, 3, 20, 101, AnchorSource.QUOTE),  # the scored price goes before a newer other one
        (OLD, 3, 20, 98, AnchorSource.SECOND_SOURCE),
        (OLD, None, OLD + 60, 101, AnchorSource.QUOTE),
    ],
)
def test_a_bar_of_another_feed_is_a_second_source(scored, other, bar_age, price, source):
    """While no bar of the scored feed is known, its quotes still go before other feeds' prices."""
    quotes = [] if scored is None else [quote(101, age=scored)]
    quotes += [] if other is None else [quote(103, age=other, feed=PYTH_BTC)]
    anchor = anchored(*quotes, bar=quote(98, age=bar_age, feed=PYTH_BTC))
    level = 101 / 103 if scored == 50 else 1.0
    assert anchor.price == pytest.approx(price * (level if source is not AnchorSource.QUOTE else 1))
    assert anchor.source is source


def test_a_bar_that_stands_in_is_moved_to_the_scored_feeds_level():
    anchor = anchored(
        quote(110, age=OLD + 90),
        quote(105, age=OLD + 95, feed=PYTH_BTC),
        bar=quote(101, age=30, feed=PYTH_BTC),
    )
    assert (anchor.price, anchor.feed) == (pytest.approx(101 * 110 / 105), PYTH_BTC)


def test_without_any_young_price_the_newest_of_the_scored_feed_is_used():
    bar_only = anchored()
    assert (bar_only.price, bar_only.source) == (100, AnchorSource.LAST_BAR)
    stale = anchored(quote(101, age=OLD), quote(103, age=OLD, feed=PYTH_BTC))
    assert (stale.price, stale.source) == (101, AnchorSource.QUOTE)


def test_a_bar_that_is_newer_than_the_quote_wins():
    anchor = anchored(quote(101, age=50), bar=quote(102, age=20))
    assert (anchor.price, anchor.source) == (102, AnchorSource.LAST_BAR)


def test_a_young_bar_needs_no_second_source():
    anchor = anchored(quote(103, age=1, feed=PYTH_BTC), bar=quote(102, age=60))
    assert (anchor.price, anchor.source) == (102, AnchorSource.LAST_BAR)


def test_a_wild_quote_counts_only_if_another_feed_agrees():
    bar = quote(100, age=60)
    assert anchored(quote(1000, age=1), bar=bar).price == 100
    denied = anchored(quote(1000, age=1), quote(101, age=1, feed=PYTH_BTC), bar=bar)
    assert (denied.price, denied.source) == (100, AnchorSource.LAST_BAR)
    agreed = anchored(quote(1000, age=1), quote(1010, age=1, feed=PYTH_BTC), bar=bar)
    assert (agreed.price, agreed.source) == (1000, AnchorSource.QUOTE)


def test_a_level_that_changed_for_good_is_believed_when_it_is_seen_again():
    board = PriceBoard(PLANS)
    for age, price in ((900, 100), (600, 20), (300, 20)):
        board.post("BTC", quote(price, age=age))
        board.post("BTC", quote(100, age=age, feed=PYTH_BTC))
    board.post("BTC", quote(101, age=1, feed=PYTH_BTC))
    anchor = board.anchor("BTC", quote(20, age=OLD), NOW)
    assert anchor.price == pytest.approx(20.2)


def test_two_feeds_of_one_price_are_never_taken_for_ten_times_apart():
    board = PriceBoard(PLANS)
    for age in (900, 600, 300, 20):
        board.post("BTC", quote(10_000 if age < 900 else 100, age=age))
        board.post("BTC", quote(100, age=age, feed=PYTH_BTC))
    anchor = board.anchor("BTC", quote(99, age=OLD), NOW)
    assert (anchor.price, anchor.source) == (100, AnchorSource.SECOND_SOURCE)


def test_a_quote_that_a_young_quote_of_its_price_denies_does_not_count_whatever_the_bars_say():
    bar = quote(9000, age=60)
    contested = quote(10_000, age=1)
    denied = anchored(contested, quote(100, age=30, feed=PYTH_BTC), bar=bar)
    assert (denied.price, denied.source) == (9000, AnchorSource.LAST_BAR)
    by_an_old_one = anchored(contested, quote(100, age=OLD, feed=PYTH_BTC), bar=bar)
    assert (by_an_old_one.price, by_an_old_one.source) == (10_000, AnchorSource.QUOTE)
    token = quote(680, age=1, feed=SPYX)  # costs a tenth, and is no witness
    index = quote(6805, age=1, feed=SP500)
    apart = anchored(index, token, asset="SP500", bar=quote(6800, age=60, feed=SP500))
    assert apart.source is AnchorSource.QUOTE


def test_an_anchor_is_never_in_the_future():
    assert anchored(quote(101, age=-7)).ts == NOW


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=6), st.integers(0, 300))
def test_an_anchor_is_always_a_price_that_was_posted_and_never_older_than_the_bar(posts, bar_age):
    quotes = [
        quote(100 + age / 100, age=age, feed=BTC if is_scored else PYTH_BTC)
        for age, is_scored in posts
    ]
    bar = quote(99, age=bar_age)
    anchor = anchored(*quotes, bar=bar)
    assert anchor.ts >= bar.ts
    assert anchor.feed in (BTC, PYTH_BTC)
    assert 90 < anchor.price < 110


def test_a_price_that_stands_still_in_market_hours_is_doubted():
    board = PriceBoard(PLANS)
    for age in range(STILL_S, -1, -60):
        assert board.doubts() == ()
        board.post("BTC", quote(100, age=age))
    assert board.doubts() == (
        "BTC: binance:BTCUSDT has stood at 100 for 30 minutes of market hours",
    )
    board.post("BTC", quote(101))
    assert board.doubts() == ()


def test_a_price_that_stands_still_while_the_market_rests_is_believed():
    board = PriceBoard(PLANS)
    saturday = 1_765_627_200  # 12:00 UTC
    for second in range(0, 2 * STILL_S, 60):
        board.post("SP500", PriceQuote(price=6800, ts=saturday + second, feed=SP500))
    assert board.doubts() == ()
    for second in range(0, 2 * STILL_S, 60):  # crypto never rests
        board.post("BTC", PriceQuote(price=100, ts=saturday + second, feed=BTC))
    assert board.doubts()[0].startswith("BTC: binance:BTCUSDT has stood at 100 for 59 minutes")


def test_two_feeds_of_one_price_that_are_far_apart_are_doubted():
    board = PriceBoard(PLANS)
    board.post("BTC", quote(100))
    board.post("BTC", quote(101, feed=PYTH_BTC))
    assert board.doubts() == ()
    board.post("BTC", quote(104, feed=PYTH_BTC))
    (doubt,) = board.doubts()
    assert doubt == f"BTC: {BTC} says 100 and {PYTH_BTC} 104, 3.9 % apart"
    board.post("SP500", quote(6800, feed=SP500))
    board.post("SP500", quote(680, feed=SPYX))
    assert board.doubts() == (doubt,)


# ---------------------------------------------------------------- asking


@dataclass
class Ticker:
    """A venue's prices in memory."""

    venue: Venue
    clock: "Turned"
    prices: dict[str, float | Exception] = field(default_factory=dict)
    age: int = 0
    asked: list[str] = field(default_factory=list)

    @property
    def name(self):
        return self.venue.value

    def price(self, symbol):
        self.asked.append(symbol)
        price = self.prices.get(symbol, 50.0)
        if isinstance(price, Exception):
            raise price
        return PriceQuote(
            price=price, ts=int(self.clock.time) - self.age, feed=f"{self.name}:{symbol}"
        )

    def candles(self, symbol, bar_s, start_ts, end_ts):
        raise NotImplementedError

    def server_time(self):
        return None

    def close(self):
        pass


@dataclass
class Turned:
    time: float = NOW

    def now(self):
        return self.time


class Round:
    """A poller of some assets and what it talks to."""

    def __init__(self, *assets):
        self.clock = Turned()
        self.feeds = {venue: Ticker(venue, self.clock) for venue in Venue}
        plans = {asset: PLANS[asset] for asset in assets}
        self.board = PriceBoard(plans)
        self.poller = PricePoller(plans, self.feeds, self.board, self.clock)

    def poll(self):
        for feed in self.feeds.values():
            feed.asked.clear()
        self.poller.poll()
        return {venue.value: feed.asked for venue, feed in self.feeds.items() if feed.asked}


def test_other_feeds_are_asked_for_their_level_now_and_then_only():
    turn = Round("BTC")
    assert turn.poll() == {"binance": ["BTCUSDT"], "pyth": ["Crypto.BTC/USD"]}
    turn.clock.time += 20
    assert turn.poll() == {"binance": ["BTCUSDT"]}
    turn.clock.time += LEVEL_EVERY_S
    assert turn.poll() == {"binance": ["BTCUSDT"], "pyth": ["Crypto.BTC/USD"]}


def test_other_feeds_are_asked_while_the_scored_one_gives_no_young_price():
    turn = Round("BTC")
    turn.poll()
    turn.feeds[Venue.BINANCE].age = ANCHOR_MAX_AGE_S
    turn.clock.time += ANCHOR_MAX_AGE_S
    assert "pyth" in turn.poll()


def test_a_feed_that_denies_the_scored_one_is_asked_in_every_round():
    turn = Round("BTC")
    turn.poll()
    turn.feeds[Venue.BINANCE].prices["BTCUSDT"] = 5000.0
    for _ in range(3):
        turn.clock.time += 20
        assert "pyth" in turn.poll()
    turn.feeds[Venue.BINANCE].prices.clear()
    turn.poll()
    turn.clock.time += 20
    assert "pyth" not in turn.poll()


def test_a_quote_from_the_future_blocks_no_later_one():
    turn = Round("BTC")
    turn.clock.time += 3600  # our clock, an hour ahead until it is set
    turn.poll()
    turn.clock.time -= 3590
    turn.poll()
    held = turn.board.quote("BTC")
    assert held is not None
    assert held.ts == NOW + 10
    turn.feeds[Venue.BINANCE].age = -7200  # a venue that dates its price ahead
    turn.poll()
    assert turn.board.quote("BTC") is None


def test_an_unreachable_venue_is_asked_once_a_round_and_named_once(caplog):
    turn = Round("XAU", "SP500", "BTC")
    away = dict.fromkeys(("xyz:GOLD", "xyz:SP500"), FeedUnreachable("it is away; wait."))
    turn.feeds[Venue.HYPERLIQUID].prices |= away
    for _ in range(3):
        asked = turn.poll()
        assert len(asked["hyperliquid"]) == 1
        assert asked["binance"] == ["BTCUSDT", "PAXGUSDT"]
        turn.clock.time += 20
    assert set(turn.poller.failing()) == {"hyperliquid:xyz:GOLD", "hyperliquid:xyz:SP500"}
    assert caplog.text.count("no price") == 1
    turn.feeds[Venue.HYPERLIQUID].prices.clear()
    turn.poll()
    assert turn.poller.failing() == {}


def test_a_symbol_that_a_venue_refuses_bars_it_not_as_a_second_source():
    turn = Round("XAU", "XRP", "BTC")
    turn.feeds[Venue.BINANCE].prices["XRPUSDT"] = FeedRefused("no such symbol; do without.")
    for venue in (Venue.HYPERLIQUID, Venue.PYTH):
        turn.feeds[venue].age = ANCHOR_MAX_AGE_S + 1
    turn.poll()
    assert "PAXGUSDT" in turn.poll()["binance"]


def test_a_refused_symbol_does_not_stop_the_venues_others():
    turn = Round("XAU", "SP500")
    turn.feeds[Venue.HYPERLIQUID].prices["xyz:GOLD"] = FeedRefused("unknown; do without.")
    turn.poll()
    assert turn.board.quote("SP500") is not None
    assert list(turn.poller.failing()) == ["hyperliquid:xyz:GOLD"]
