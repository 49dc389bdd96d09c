"""The clients of the venues over real HTTP: what is asked, what is believed, what is refused."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bar_cleaning import bars_from_minutes
from config import ASSETS, Frequency, Venue
from data_fetcher import ArchiveSource
from domain import Bars
from errors import (
    BadAnswer,
    CountryBlocked,
    FeedFailed,
    FeedRefused,
    FeedTimeout,
    FeedUnreachable,
    GarbledAnswer,
    RateLimited,
    SourceUnavailable,
)
from feed_plans import HOST_LIMITS, FeedHost, HttpPolicy
from feeds import Feed, open_feeds
from loopback_venues import Fault, FaultRule, LoopbackVenues, serve_venues
from settings import Settings

START = 1_764_547_200  # 2025-12-01, midnight UTC
N = 20_000  # minutes: more than any venue gives in one call
NOW = START + N * 60 - 30  # within the last minute

# One symbol of every venue, all of them the same bars.
SYMBOLS = {Venue.BINANCE: "BTCUSDT", Venue.HYPERLIQUID: "xyz:GOLD", Venue.PYTH: "Crypto.BTC/USD"}
VENUES = list(SYMBOLS)
CANDLE_HOST = {
    Venue.BINANCE: FeedHost.BINANCE,
    Venue.HYPERLIQUID: FeedHost.HYPERLIQUID,
    Venue.PYTH: FeedHost.PYTH_HISTORY,
}
QUOTE_HOST = CANDLE_HOST | {Venue.PYTH: FeedHost.PYTH_LATEST}
POLICY = HttpPolicy(attempts=2)
HASTY = HttpPolicy(connect_s=1, read_s=0.2, attempt_s=0.3, attempts=2)


@dataclass
class HandClock:
    """A clock that is turned by hand."""

    ts: float = NOW

    def now(self) -> float:
        return self.ts


def minutes():
    steps = np.random.default_rng(1).normal(0, 1e-3, N)
    close = 4000 * np.exp(np.cumsum(steps))
    opened = np.concatenate([[4000], close[:-1]])
    return Bars(
        open_ts=START + 60 * np.arange(N, dtype=np.int64),
        open=opened,
        high=np.maximum(opened, close) * 1.0005,
        low=np.minimum(opened, close) * 0.9995,
        close=close,
        volume=np.arange(1.0, N + 1),
        bar_s=60,
        feed="test",
    )


BARS = minutes()


@pytest.fixture(scope="module")
def served() -> Iterator[LoopbackVenues]:
    with serve_venues({"BTC": BARS, "XAU": BARS}, HandClock()) as venues:
        yield venues


@pytest.fixture
def venues(served: LoopbackVenues) -> LoopbackVenues:
    served.faults.clear()
    served.asked.clear()
    return served


@pytest.fixture
def clock() -> HandClock:
    """Our own clock."""
    return HandClock()


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def feeds(
    venues: LoopbackVenues, clock: HandClock, slept: list[float]
) -> Iterator[Mapping[Venue, Feed]]:
    opened = open_feeds(
        Settings(**venues.urls), clock, policy=POLICY, quote_policy=POLICY, sleep=slept.append
    )
    yield opened
    for feed in opened.values():
        feed.close()


def ts(minute):
    return START + 60 * minute


def fetch(feeds, venue, first, last, bar_s=60):
    """Candles that open from minute `first` and close by minute `last`."""
    return feeds[venue].candles(SYMBOLS[venue], bar_s, ts(first), ts(last))


def assert_are(candles, rows):
    np.testing.assert_array_equal(candles.bars.open_ts, BARS.open_ts[rows])
    np.testing.assert_array_equal(candles.bars.close, BARS.close[rows])


# ---------------------------------------------------------------- candles


@pytest.mark.parametrize("venue", VENUES)
def test_candles_arrive_as_the_venue_has_them(feeds, venue):
    candles, set_aside = fetch(feeds, venue, 17_000, 17_100)
    rows = slice(17_000, 17_100)
    for name in ("open_ts", "open", "high", "low", "close"):
        np.testing.assert_array_equal(getattr(candles.bars, name), getattr(BARS, name)[rows])
    assert candles.bars.feed == f"{venue.value}:{SYMBOLS[venue]}"
    assert candles.bars.bar_s == 60
    assert feeds[venue].name == venue.value
    assert set_aside == ()


def test_each_venue_gives_of_the_trades_what_it_has(feeds):
    rows = slice(17_000, 17_100)
    binance, _ = fetch(feeds, Venue.BINANCE, 17_000, 17_100)
    np.testing.assert_array_equal(binance.bars.volume, BARS.volume[rows])
    np.testing.assert_array_equal(binance.taker_volume, BARS.volume[rows] / 2)
    assert (binance.trades >= 1).all()
    perpetual, _ = fetch(feeds, Venue.HYPERLIQUID, 17_000, 17_100)
    np.testing.assert_array_equal(perpetual.bars.volume, BARS.volume[rows])
    np.testing.assert_array_equal(perpetual.trades, binance.trades)
    assert np.isnan(perpetual.taker_volume).all()
    pyth, _ = fetch(feeds, Venue.PYTH, 17_000, 17_100)
    assert np.isnan([pyth.bars.volume, pyth.trades, pyth.taker_volume]).all()


@pytest.mark.parametrize("venue", VENUES)
def test_five_minute_candles_are_read_too(feeds, venue):
    candles, set_aside = fetch(feeds, venue, 17_000, 17_100, bar_s=300)
    expected = bars_from_minutes(BARS.between(ts(17_000), ts(17_100)), bar_s=300)
    np.testing.assert_array_equal(candles.bars.open_ts, expected.open_ts)
    np.testing.assert_array_equal(candles.bars.close, expected.close)
    np.testing.assert_array_equal(candles.bars.high, expected.high)
    assert set_aside == ()


@pytest.mark.parametrize("venue", VENUES)
def test_other_lengths_are_not_read(feeds, venue):
    with pytest.raises(ValueError, match=r"bars of 120 s are not read; use one of \[60, 300\]"):
        fetch(feeds, venue, 0, 100, bar_s=120)


@pytest.mark.parametrize("venue", VENUES)
@settings(max_examples=12)
@given(data=st.data())
def test_any_time_is_cut_exactly(served, venue, data):
    served.faults.clear()
    first, length = data.draw(st.integers(15_500, 19_990)), data.draw(st.integers(0, 30))
    early, late = data.draw(st.integers(0, 59)), data.draw(st.integers(0, 59))
    feed = open_feeds(Settings(**served.urls), HandClock(), sleep=lambda _: None)[venue]
    start, end = ts(first) - early, ts(first + length) + late
    candles, set_aside = feed.candles(SYMBOLS[venue], 60, start, end)
    feed.close()
    expected = BARS.between(start, min(end, NOW))
    np.testing.assert_array_equal(candles.bars.open_ts, expected.open_ts)
    np.testing.assert_array_equal(candles.bars.close, expected.close)
    assert set_aside == ()


@pytest.mark.parametrize("venue", VENUES)
def test_the_candle_that_still_forms_is_never_given(feeds, venue, clock):
    candles, set_aside = fetch(feeds, venue, N - 10, N + 10)
    assert_are(candles, slice(N - 10, N - 1))
    assert set_aside == ()
    clock.ts = NOW + 90  # our clock is ahead of the venue's, which shows a forming candle
    candles, set_aside = fetch(feeds, venue, N - 10, N + 10)
    assert_are(candles, slice(N - 10, N - 1))
    assert set_aside == ()


@pytest.mark.parametrize("venue", VENUES)
def test_five_minutes_that_still_form_are_no_refused_bar_either(feeds, venue, clock):
    clock.ts = NOW + 90
    candles, set_aside = fetch(feeds, venue, N - 100, N, bar_s=300)
    assert candles.bars.end_ts == ts(N - 5)
    assert set_aside == ()


@pytest.mark.parametrize("venue", VENUES)
def test_a_venues_clock_that_is_far_behind_makes_no_closed_candle_vanish(feeds, venue, clock):
    """What it would have us leave out is set aside, so that its time is asked for again."""
    clock.ts = NOW + 6 * 3600
    candles, set_aside = fetch(feeds, venue, N - 10, N + 30)
    assert_are(candles, slice(N - 10, N - 1))
    assert {row.reason for row in set_aside} == {"still forming by the venue's clock"}


@pytest.mark.parametrize("venue", VENUES)
def test_a_clock_of_ours_that_is_behind_hides_what_it_does_not_know(feeds, venue, clock):
    clock.ts = ts(N - 5) + 59
    candles, _ = fetch(feeds, venue, N - 10, N)
    assert_are(candles, slice(N - 10, N - 5))


@pytest.mark.parametrize("venue", VENUES)
def test_nothing_is_asked_where_no_candle_can_be(feeds, venue, venues):
    for first, last in ((N + 5, N + 10), (100, 100), (100, 90)):
        candles, set_aside = fetch(feeds, venue, first, last)
        assert (len(candles), set_aside) == (0, ())
    assert venues.count() == 0


@pytest.mark.parametrize("venue", VENUES)
def test_a_time_without_candles_is_empty(feeds, venue):
    candles, set_aside = feeds[venue].candles(SYMBOLS[venue], 60, START - 9000, START - 6000)
    assert (len(candles), set_aside) == (0, ())


# ---------------------------------------------------------------- pages and limits


@pytest.mark.parametrize(("venue", "calls"), [(Venue.BINANCE, 19), (Venue.PYTH, 3)])
def test_long_times_are_read_page_by_page(feeds, venue, venues, calls):
    # 17,999 candles and the eight before them.
    candles, set_aside = fetch(feeds, venue, 2000, N)
    assert_are(candles, slice(2000, N - 1))
    assert set_aside == ()
    assert venues.count() == calls


def test_hyperliquid_gives_the_newest_5000_candles_in_one_call_and_no_older_ones(feeds, venues):
    candles, set_aside = fetch(feeds, Venue.HYPERLIQUID, 0, N)
    assert_are(candles, slice(N - 5000, N - 1))
    assert set_aside == ()
    assert venues.count() == 1
    assert len(fetch(feeds, Venue.HYPERLIQUID, 0, 1000)[0]) == 0


def test_weights_are_kept_under_the_limit_by_waiting(feeds, venues, slept):
    """Five times 104 of Hyperliquid's 1200 a minute: 400 are free, the rest is waited for."""
    for _ in range(5):
        fetch(feeds, Venue.HYPERLIQUID, 0, N)
    asked = venues.heaviest(FeedHost.HYPERLIQUID, 1e9)
    assert asked == 5 * (20 + math.ceil(5000 / 60))
    limit = HOST_LIMITS[FeedHost.HYPERLIQUID]
    rate = 2 / 3 * limit.weight / limit.window_s
    assert 0 < slept[-1] <= (asked - limit.weight / 3) / rate


def test_quotes_of_hermes_are_kept_under_its_limit(feeds, venues, slept):
    for _ in range(25):  # ten are free
        feeds[Venue.PYTH].price("Crypto.BTC/USD")
    assert venues.count(FeedHost.PYTH_LATEST) == 25
    assert 0 < slept[-1] <= 15 / 2


# ---------------------------------------------------------------- rows that are not believed


@pytest.mark.parametrize("venue", VENUES)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.NAN, "close is not a positive number"),
        (Fault.NULL, "close is not a positive number"),
        (Fault.TEXT, "close is not a positive number"),
        (Fault.NEGATIVE, "close is not a positive number"),
        (Fault.ZERO, "close is not a positive number"),
        (Fault.HUGE, "close is too large to be a price"),
        (Fault.SPIKE, "spike of about ×8 or more that reverts"),
    ],
)
def test_nonsense_prices_are_set_aside_and_the_rest_is_used(feeds, venue, venues, fault, reason):
    venues.faults.add(FaultRule(fault=fault))
    candles, set_aside = fetch(feeds, venue, 17_000, 17_040)
    opened = BARS.open_ts[17_000:17_040]
    bad = opened[(opened // 60 % 7 == 0) | (opened == opened[-1])]
    assert [row.ts for row in set_aside] == bad.tolist()
    assert {row.reason for row in set_aside} == {reason}
    assert set(candles.bars.open_ts) == set(opened) - set(bad)
    kept = np.searchsorted(BARS.open_ts, candles.bars.open_ts)
    np.testing.assert_array_equal(candles.bars.close, BARS.close[kept])


@pytest.mark.parametrize("venue", VENUES)
def test_a_spike_in_a_single_new_candle_is_seen_by_its_neighbours(feeds, venue, venues):
    venues.faults.add(FaultRule(fault=Fault.SPIKE))
    candles, (row,) = fetch(feeds, venue, 17_001, 17_002)
    assert len(candles) == 0
    assert row.ts == ts(17_001)
    assert row.close == pytest.approx(BARS.close[17_001] * 100)


@pytest.mark.parametrize("venue", VENUES)
def test_duplicates_count_once_and_are_reported(feeds, venue, venues):
    venues.faults.add(FaultRule(fault=Fault.DUPLICATED))
    candles, set_aside = fetch(feeds, venue, 17_000, 17_040)
    assert_are(candles, slice(17_000, 17_040))
    assert "a later row has the same time" in {row.reason for row in set_aside}


@pytest.mark.parametrize("venue", VENUES)
def test_shuffled_candles_are_put_in_order(feeds, venue, venues):
    venues.faults.add(FaultRule(fault=Fault.SHUFFLED))
    candles, _ = fetch(feeds, venue, 17_000, 17_040)
    assert_are(candles, slice(17_000, 17_040))


@pytest.mark.parametrize("venue", VENUES)
def test_missing_candles_are_gaps(feeds, venue, venues):
    venues.faults.add(FaultRule(fault=Fault.MISSING))
    candles, set_aside = fetch(feeds, venue, 17_000, 17_030)
    rows = [row for row in range(17_000, 17_030) if BARS.open_ts[row] // 60 % 3]
    assert_are(candles, rows)
    assert set_aside == ()


@pytest.mark.parametrize("venue", VENUES)
def test_candles_from_outside_of_the_asked_time_are_set_aside(feeds, venue, venues):
    venues.faults.add(FaultRule(fault=Fault.EARLIER))
    candles, set_aside = fetch(feeds, venue, 17_000, 17_030)
    assert_are(candles, slice(17_000, 17_030))
    assert {row.reason for row in set_aside} == {"outside of the asked time"}


@pytest.mark.parametrize("venue", VENUES)
def test_a_venue_that_lags_gives_what_it_has(feeds, venue, venues):
    venues.faults.add(FaultRule(fault=Fault.STALE))
    candles, set_aside = fetch(feeds, venue, N - 30, N)
    assert len(candles) in (15, 16)  # its newest candle does not know its end
    assert set_aside == ()


def test_candles_of_another_length_are_set_aside(feeds, venues, monkeypatch):
    monkeypatch.setattr("feeds._INTERVALS", {60: "1m", 300: "1m"})
    for venue in (Venue.BINANCE, Venue.HYPERLIQUID):
        candles, set_aside = fetch(feeds, venue, 19_000, 19_010, bar_s=300)
        assert len(candles) == 0
        assert "it is no candle of the asked length" in {row.reason for row in set_aside}


# ---------------------------------------------------------------- answers that are refused

REFUSED = {
    Fault.REFUSE: FeedUnreachable,
    Fault.RATE_LIMITED: RateLimited,
    Fault.BLOCKED: CountryBlocked,
    Fault.ERROR: FeedFailed,
    Fault.HTML: GarbledAnswer,
    Fault.TRUNCATED: GarbledAnswer,
    Fault.WRONG_SHAPE: BadAnswer,
}


def one_sentence(caught):
    text = str(caught.value)
    assert text.endswith(".")
    assert text.isprintable()
    return text


@pytest.mark.parametrize("venue", VENUES)
@pytest.mark.parametrize(("fault", "kind"), REFUSED.items())
def test_a_quote_that_cannot_be_had_is_an_error_with_a_name(feeds, venues, venue, fault, kind):
    venues.faults.add(FaultRule(fault=fault))
    with pytest.raises(kind) as caught:
        feeds[venue].price(SYMBOLS[venue])
    assert f"{QUOTE_HOST[venue].value} at http://127.0.0.1:" in one_sentence(caught)


@pytest.mark.parametrize("venue", [Venue.BINANCE, Venue.HYPERLIQUID])
@pytest.mark.parametrize(("fault", "kind"), REFUSED.items())
def test_candles_that_cannot_be_had_are_an_error_with_a_name(feeds, venues, venue, fault, kind):
    venues.faults.add(FaultRule(fault=fault))
    with pytest.raises(kind) as caught:
        fetch(feeds, venue, 17_000, 17_010)
    assert f"{CANDLE_HOST[venue].value} at http://127.0.0.1:" in one_sentence(caught)


@pytest.mark.parametrize("fault", [Fault.TIME_OUT, Fault.DRIP_BODY])
@pytest.mark.parametrize("venue", VENUES)
def test_a_venue_that_does_not_come_to_an_end_is_given_up(venues, clock, venue, fault):
    venues.faults.add(FaultRule(fault=fault))
    feeds = open_feeds(
        Settings(**venues.urls), clock, policy=HASTY, quote_policy=HASTY, sleep=lambda _: None
    )
    with pytest.raises(FeedTimeout) as caught:
        feeds[venue].price(SYMBOLS[venue])
    one_sentence(caught)
    for feed in feeds.values():
        feed.close()


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.BROKEN_GZIP])
@pytest.mark.parametrize("venue", VENUES)
def test_a_fault_that_passes_is_not_noticed(feeds, venues, venue, fault):
    venues.faults.add(FaultRule(fault=fault, times=1))
    candles, _ = fetch(feeds, venue, 17_000, 17_010)
    assert_are(candles, slice(17_000, 17_010))


@pytest.mark.parametrize("venue", VENUES)
def test_an_unknown_symbol_is_an_error(feeds, venue):
    with pytest.raises(SourceUnavailable) as caught:
        feeds[venue].candles("NOPE", 60, ts(17_000), ts(17_010))
    one_sentence(caught)


ODD_ANSWERS = [
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'"text"',
    b"[null]",
    b"[[]]",
    b"[[1,2,3]]",
    b"[{}]",
    b'[{"t": 1}]',
    b'{"s": "ok"}',
    b'{"s": "ok", "t": [1], "o": [], "h": [], "l": [], "c": []}',
    b'{"s": "ok", "t": 1, "o": 1, "h": 1, "l": 1, "c": 1}',
    b'{"s": 5}',
    b'{"symbol": "ETHUSDT", "price": "1"}',
    b'{"symbol": "BTCUSDT"}',
    b'{"symbol": "BTCUSDT", "price": []}',
    b'{"parsed": []}',
    b'{"parsed": [{"id": "00", "price": {"price": "1", "expo": 0, "publish_time": 9}}]}',
    b'{"parsed": [{"id": "00", "price": null}]}',
    b"[" * 100_000,
    b"",
    b"\xff\xfe",
]


@pytest.mark.parametrize("content", ODD_ANSWERS, ids=lambda content: repr(content[:40]))
def test_no_answer_of_any_form_breaks_a_client(feeds, venues, monkeypatch, content):
    monkeypatch.setattr("loopback_venues._PAGE", content)
    venues.faults.add(FaultRule(fault=Fault.HTML))
    for venue in VENUES:
        with pytest.raises((BadAnswer, SourceUnavailable)) as caught:
            feeds[venue].price(SYMBOLS[venue])
        one_sentence(caught)
        with suppress(BadAnswer, SourceUnavailable):
            candles, _ = fetch(feeds, venue, 17_000, 17_010)
            assert len(candles) == 0


# ---------------------------------------------------------------- two hosts of Pyth


def test_the_router_is_asked_when_the_first_host_fails_and_first_from_then_on(feeds, venues):
    venues.faults.add(FaultRule(fault=Fault.ERROR, host=FeedHost.PYTH_HISTORY))
    for _ in range(3):
        candles, _ = fetch(feeds, Venue.PYTH, 17_000, 17_010)
        assert_are(candles, slice(17_000, 17_010))
    assert venues.count(FeedHost.PYTH_HISTORY) == 2
    assert venues.count(FeedHost.PYTH_ROUTER) == 3
    venues.faults.clear()
    venues.faults.add(FaultRule(fault=Fault.WRONG_SHAPE, host=FeedHost.PYTH_ROUTER))
    assert len(fetch(feeds, Venue.PYTH, 17_000, 17_010)[0]) == 10
    assert venues.count(FeedHost.PYTH_HISTORY) == 3


def test_both_hosts_are_named_when_neither_answers(feeds, venues):
    venues.faults.add(FaultRule(fault=Fault.ERROR, host=FeedHost.PYTH_HISTORY))
    venues.faults.add(FaultRule(fault=Fault.BLOCKED, host=FeedHost.PYTH_ROUTER))
    with pytest.raises(
        SourceUnavailable, match=r"neither host.*pyth_history.*pyth_router"
    ) as caught:
        fetch(feeds, Venue.PYTH, 17_000, 17_010)
    one_sentence(caught)
    assert "BTC" not in str(caught.value)  # it is said of other symbols too


def test_a_symbol_that_both_hosts_refuse_is_refused_alone(feeds, venues):
    for host in (FeedHost.PYTH_HISTORY, FeedHost.PYTH_ROUTER):
        venues.faults.add(FaultRule(fault=Fault.NOT_FOUND, host=host))
    with pytest.raises(FeedRefused):
        fetch(feeds, Venue.PYTH, 17_000, 17_010)


def test_that_the_other_host_is_asked_is_said_once(feeds, venues, caplog):
    venues.faults.add(FaultRule(fault=Fault.ERROR, host=FeedHost.PYTH_HISTORY))
    for _ in range(3):
        fetch(feeds, Venue.PYTH, 17_000, 17_010)
    venues.faults.add(FaultRule(fault=Fault.ERROR, host=FeedHost.PYTH_ROUTER))
    for _ in range(3):
        with pytest.raises(SourceUnavailable):
            fetch(feeds, Venue.PYTH, 17_000, 17_010)
    (line,) = caplog.messages
    assert "Asking pyth_router" in line


# ---------------------------------------------------------------- quotes


@pytest.mark.parametrize("venue", VENUES)
def test_a_quote_is_the_price_of_the_moment(feeds, venue):
    quote = feeds[venue].price(SYMBOLS[venue])
    assert BARS.low[-1] <= quote.price <= BARS.high[-1]
    assert quote.price != BARS.close[-1]
    assert quote.ts == NOW
    assert quote.feed == f"{venue.value}:{SYMBOLS[venue]}"


def test_all_venues_quote_the_same_market(feeds):
    prices = [feeds[venue].price(SYMBOLS[venue]).price for venue in VENUES]
    # Bars of another asset move on another bridge within the minute.
    assert prices[0] == pytest.approx(prices[2], rel=1e-9)


@pytest.mark.parametrize("venue", VENUES)
@pytest.mark.parametrize(
    "fault", [Fault.NAN, Fault.NULL, Fault.TEXT, Fault.NEGATIVE, Fault.ZERO, Fault.HUGE]
)
def test_a_nonsense_quote_is_refused(feeds, venues, venue, fault):
    venues.faults.add(FaultRule(fault=fault))
    with pytest.raises(BadAnswer, match=rf"{venue.value}:.* is no price") as caught:
        feeds[venue].price(SYMBOLS[venue])
    one_sentence(caught)


def test_a_hyperliquid_quote_of_a_quiet_market_is_as_old_as_its_last_candle():
    closed = BARS.between(None, ts(1000))
    clock = HandClock(ts(1030))
    with serve_venues({"XAU": closed}, clock) as venues:
        feed = open_feeds(Settings(**venues.urls), clock)[Venue.HYPERLIQUID]
        quote = feed.price("xyz:GOLD")
        assert (quote.price, quote.ts) == (closed.close[-1], ts(1000))
        clock.ts = ts(1062)
        with pytest.raises(BadAnswer, match="no candle of the last 60 minutes"):
            feed.price("xyz:GOLD")
        feed.close()


def test_a_stale_pyth_quote_says_its_age(feeds, venues):
    venues.faults.add(FaultRule(fault=Fault.STALE))
    assert feeds[Venue.PYTH].price("Crypto.BTC/USD").ts == NOW - 900


def test_a_binance_quote_out_of_a_cache_is_as_old_as_its_headers_say(feeds, venues):
    venues.faults.add(FaultRule(fault=Fault.CACHED))
    assert feeds[Venue.BINANCE].price("BTCUSDT").ts == NOW - 900


def test_a_binance_quote_whose_candles_lag_is_as_old_as_they_are(feeds, venues):
    """The headers may say anything: who serves old candles as new serves old prices too."""
    stale = FaultRule(fault=Fault.STALE)
    venues.faults.add(stale)
    assert feeds[Venue.BINANCE].price("BTCUSDT").ts == NOW  # nothing else is known yet
    fetch(feeds, Venue.BINANCE, N - 100, N - 50)  # says nothing of now
    assert feeds[Venue.BINANCE].price("BTCUSDT").ts == NOW
    for first, lag_s in ((N - 30, 900), (N - 2, 10 * 60)):  # the second gets no candle at all
        fetch(feeds, Venue.BINANCE, first, N)
        aged = feeds[Venue.BINANCE].price("BTCUSDT").ts
        assert NOW - aged == pytest.approx(lag_s, abs=90)
    venues.faults.clear()
    fetch(feeds, Venue.BINANCE, N - 30, N)
    assert feeds[Venue.BINANCE].price("BTCUSDT").ts == NOW


def test_every_asset_of_pyth_has_a_price_feed_and_others_are_refused(feeds, venues):
    known = [spec.pyth_symbol for spec in ASSETS.values() if spec.pyth_symbol]
    assert len(known) == 12
    with pytest.raises(FeedRefused, match=r"'Crypto.DOGE/USD', whose price feed is not known"):
        feeds[Venue.PYTH].price("Crypto.DOGE/USD")
    assert venues.count() == 0


# ---------------------------------------------------------------- clocks and opening


@pytest.mark.parametrize("venue", VENUES)
def test_a_venues_clock_is_known_from_its_answers(feeds, venue, clock):
    assert feeds[venue].server_time() is None
    clock.ts = NOW - 300
    feeds[venue].price(SYMBOLS[venue])
    assert feeds[venue].server_time() == NOW + 0.5


def test_open_feeds_asks_nothing_and_follows_the_settings(venues):
    nowhere = replace(Settings(**venues.urls), binance_url="http://127.0.0.1:1")
    feeds = open_feeds(nowhere, HandClock(), policy=POLICY, sleep=lambda _: None)
    assert set(feeds) == set(Venue)
    assert venues.count() == 0
    with pytest.raises(FeedUnreachable, match="with BINANCE_API_HOST"):
        feeds[Venue.BINANCE].candles("BTCUSDT", 60, ts(0), ts(10))
    for feed in feeds.values():
        feed.close()


def test_real_bars_pass_through_every_venue_unchanged(real_bars):
    history = ArchiveSource(real_bars / "recent").load("BTC", Frequency.HF).history
    last = history.bars.end_ts
    bars = history.bars.between(last - 3 * 86_400, None)
    with serve_venues({"BTC": bars, "XAU": bars}, HandClock(last)) as venues:
        feeds = open_feeds(Settings(**venues.urls), HandClock(last))
        for venue, feed in feeds.items():
            candles, set_aside = feed.candles(SYMBOLS[venue], 60, last - 3 * 86_400, last)
            np.testing.assert_array_equal(candles.bars.open_ts, bars.open_ts)
            np.testing.assert_array_equal(candles.bars.close, bars.close)
            assert set_aside == ()
            feed.close()
