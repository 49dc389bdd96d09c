"""Asking hosts over real HTTP: what is waited for, repeated, refused and bounded."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

import feed_http
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
)
from feed_http import HostClient, TokenBucket
from feed_plans import HOST_LIMITS, FeedHost, HostLimit, HttpPolicy
from loopback_venues import Fault, FaultRule, LoopbackVenues, serve_venues

NOW = 1_764_547_200.0
POLICY = HttpPolicy(attempts=3)
HASTY = HttpPolicy(connect_s=1, read_s=0.2, attempt_s=0.3, attempts=2)
SLOW = (Fault.TIME_OUT, Fault.DRIP_HEAD, Fault.DRIP_BODY)


@dataclass
class FixedClock:
    """A clock that stands still."""

    ts: float = NOW

    def now(self) -> float:
        return self.ts


@dataclass
class HandTime:
    """Time that passes only by sleeping; notes every sleep."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


def one_bar():
    column = np.array([100.0])
    return Bars(
        open_ts=np.array([int(NOW) - 60]),
        open=column,
        high=column,
        low=column,
        close=column,
        volume=column,
        bar_s=60,
        feed="test",
    )


@pytest.fixture(scope="module")
def served() -> Iterator[LoopbackVenues]:
    with serve_venues({"BTC": one_bar()}, FixedClock()) as venues:
        yield venues


@pytest.fixture
def venues(served: LoopbackVenues) -> LoopbackVenues:
    served.faults.clear()
    served.asked.clear()
    return served


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def client(venues: LoopbackVenues, slept: list[float]) -> Iterator[HostClient]:
    url = f"{venues.address}/binance/"
    client = HostClient(FeedHost.BINANCE, url, now=FixedClock().now, sleep=slept.append)
    yield client
    client.close()


def test_no_message_tells_the_key_in_an_address():
    address = "user:s3cret@127.0.0.1:1/s3cret"  # of a proxy of one's own
    client = HostClient(FeedHost.BINANCE, f"http://{address}", now=FixedClock().now)
    with pytest.raises(FeedUnreachable, match=r"binance at http://127\.0\.0\.1:1 cannot") as caught:
        ask(client, HASTY)
    client.close()
    assert "s3cret" not in str(caught.value)


def test_a_closed_client_asks_nobody(client, venues):
    ask(client)
    client.close()
    before = len(venues.asked)
    with pytest.raises(FeedRefused, match="the miner stops"):
        ask(client)
    assert len(venues.asked) == before


def ask(client, policy=POLICY):
    return client.get("api/v3/ticker/price", {"symbol": "BTCUSDT"}, weight=2, policy=policy)


def one_sentence(caught):
    text = str(caught.value)
    assert text.endswith(".")
    assert text.isprintable()
    assert len(text) < 400
    return text


# ---------------------------------------------------------------- answers


def test_an_answer_is_decoded_and_dated_by_the_host(client, venues):
    answer = ask(client)
    assert answer.value == {"symbol": "BTCUSDT", "price": "100.0"}
    assert answer.date == NOW
    assert venues.count() == 1


@pytest.mark.parametrize(
    ("said", "age_s"), [(None, 0), ("42", 42), ("-1", 0), ("nan", 0), ("9" * 400, 86_400)]
)
def test_an_answer_tells_how_long_it_lay_in_caches(said, age_s):
    response = requests.Response()
    response.headers.update({} if said is None else {"Age": said})
    assert feed_http._age(response) == age_s


def test_the_hosts_clock_is_known_after_its_first_answer(venues):
    ours = FixedClock(NOW - 42)
    client = HostClient(FeedHost.BINANCE, f"{venues.address}/binance", now=ours.now)
    assert client.server_time() is None
    ask(client)
    assert client.server_time() == NOW + 0.5
    ours.ts += 100
    assert client.server_time() == NOW + 100.5
    client.close()


def test_a_few_answers_of_a_cache_do_not_change_what_is_known_of_the_hosts_clock(venues):
    ours = FixedClock(NOW - 42)
    client = HostClient(FeedHost.BINANCE, f"{venues.address}/binance", now=ours.now)
    venues.faults.add(FaultRule(fault=Fault.CACHED, times=3))
    for _ in range(3):
        ask(client)
    assert client.server_time() is None  # they say that they are old
    for late_s in (0, 300, 0, 300, 0):  # a cache that does not say so
        ours.ts = NOW - 42 + late_s
        ask(client)
    ours.ts = NOW
    assert client.server_time() == NOW + 42.5
    client.close()


def test_what_answers_of_long_ago_told_of_the_hosts_clock_is_forgotten(client, monkeypatch):
    ask(client)
    assert client.server_time() is not None
    monkeypatch.setattr(feed_http, "CLOCK_MEMORY_S", -1.0)
    assert client.server_time() is None


def test_a_connection_is_kept_and_used_again(client, venues):
    for _ in range(5):
        ask(client)
    assert len(venues.connections) == 1


# ---------------------------------------------------------------- failures that may pass

PASSING = {
    Fault.REFUSE: FeedUnreachable,
    Fault.TIME_OUT: FeedTimeout,
    Fault.DRIP_HEAD: FeedTimeout,
    Fault.DRIP_BODY: FeedTimeout,
    Fault.RATE_LIMITED: RateLimited,
    Fault.ERROR: FeedFailed,
    Fault.BAD_GATEWAY: FeedFailed,
    Fault.HTML: GarbledAnswer,
    Fault.TRUNCATED: GarbledAnswer,
    Fault.BROKEN_GZIP: GarbledAnswer,
    Fault.CUT_GZIP: GarbledAnswer,
}


@pytest.mark.parametrize("fault", [fault for fault in PASSING if fault not in SLOW])
def test_what_may_pass_is_tried_again_after_a_pause(client, venues, slept, fault):
    venues.faults.add(FaultRule(fault=fault, times=1))
    assert ask(client).value["price"] == "100.0"
    assert venues.count() == 2
    assert slept


@pytest.mark.parametrize("fault", SLOW)
def test_what_takes_too_long_is_tried_again(client, venues, slept, fault):
    venues.faults.add(FaultRule(fault=fault, times=1))
    assert ask(client, replace(HASTY, attempts=5)).value["price"] == "100.0"
    assert venues.count() >= 2
    assert slept


@pytest.mark.parametrize(("fault", "kind"), PASSING.items())
def test_what_does_not_pass_is_told_by_its_name_after_the_last_attempt(client, venues, fault, kind):
    venues.faults.add(FaultRule(fault=fault))
    with pytest.raises(kind) as caught:
        ask(client, HASTY if fault in SLOW else replace(POLICY, attempts=2))
    assert f"binance at {venues.address} " in one_sentence(caught)
    assert venues.count() == 2


def test_a_host_where_nobody_listens_is_unreachable_and_says_what_to_set(slept):
    with serve_venues({}, FixedClock()) as gone:
        url = gone.urls["hyperliquid_url"]
    client = HostClient(FeedHost.HYPERLIQUID, url, now=FixedClock().now, sleep=slept.append)
    with pytest.raises(FeedUnreachable, match=r"refused.*with hyperliquid_url") as caught:
        client.post("info", {}, weight=1, policy=POLICY)
    one_sentence(caught)
    assert len(slept) == POLICY.attempts - 1
    client.close()


@pytest.mark.parametrize(
    ("host", "setting"),
    [(FeedHost.BINANCE, "BINANCE_API_HOST"), (FeedHost.PYTH_LATEST, "pyth_latest_url")],
)
def test_a_name_that_cannot_be_resolved_is_called_so_with_the_network_first(host, setting):
    client = HostClient(host, "http://feed.invalid", now=FixedClock().now)
    with pytest.raises(FeedUnreachable) as caught:
        client.get("x", {}, weight=1, policy=replace(POLICY, attempts=1))
    assert one_sentence(caught) == (
        f"{host.value} at http://feed.invalid has a name that cannot be resolved; check the "
        f"network and its DNS first, else name another host with {setting}."
    )
    client.close()


def test_pauses_grow_and_are_jittered_and_reported(client, venues, slept, caplog):
    venues.faults.add(FaultRule(fault=Fault.ERROR))
    policy = replace(POLICY, attempts=5, first_wait_s=1, longest_wait_s=100, budget_s=1000)
    with caplog.at_level(logging.DEBUG, "feed_http"), pytest.raises(FeedFailed):
        ask(client, policy)
    for attempt, pause in enumerate(slept):
        assert 2**attempt <= pause <= 2**attempt + 1
    assert len(slept) == 4
    assert any(pause % 1 for pause in slept)
    assert [record.levelname for record in caplog.records] == 4 * ["DEBUG"]
    assert "attempt 1; again in" in caplog.text


# ---------------------------------------------------------------- failures that stay


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault.NOT_FOUND, FeedRefused, "HTTP 404"),
        (Fault.REDIRECT, FeedRefused, "HTTP 302"),
        (Fault.BLOCKED, CountryBlocked, "BINANCE_API_HOST=https://data-api.binance.vision"),
        (Fault.TOO_LARGE, BadAnswer, "more than the 1000000 bytes"),
    ],
)
def test_what_cannot_succeed_is_not_tried_again(client, venues, slept, fault, kind, words):
    venues.faults.add(FaultRule(fault=fault))
    with pytest.raises(kind, match=words) as caught:
        ask(client, replace(POLICY, max_bytes=10**6))
    one_sentence(caught)
    assert venues.count() == 1
    assert slept == []


@pytest.mark.parametrize(("path", "status"), [("api/v3/depth", 404), ("api/v3/klines", 400)])
def test_a_call_that_is_wrong_is_refused_with_what_the_host_said(client, path, status):
    with pytest.raises(FeedRefused, match=f"HTTP {status}: .*error.*check binance_url"):
        client.get(path, {"symbol": "BTCUSDT"}, weight=1, policy=POLICY)


def test_a_flat_body_is_refused_once(venues, slept):
    url = venues.urls["hyperliquid_url"]
    client = HostClient(FeedHost.HYPERLIQUID, url, now=FixedClock().now, sleep=slept.append)
    with pytest.raises(FeedRefused, match="HTTP 422"):
        client.post("info", {"type": "candleSnapshot"}, weight=1, policy=POLICY)
    assert (venues.count(), slept) == (1, [])
    client.close()


def test_a_block_of_another_venue_names_its_own_setting(venues):
    venues.faults.add(FaultRule(fault=Fault.BLOCKED))
    client = HostClient(FeedHost.PYTH_LATEST, venues.urls["pyth_latest_url"], now=FixedClock().now)
    with pytest.raises(CountryBlocked, match="set pyth_latest_url"):
        client.get("v2/updates/price/latest", {}, weight=1, policy=POLICY)
    client.close()


def test_a_large_body_that_is_not_packed_is_refused_too(client):
    with pytest.raises(BadAnswer, match="more than the 10 bytes"):
        ask(client, replace(POLICY, max_bytes=10))


# ---------------------------------------------------------------- fewer calls


@pytest.mark.parametrize("retry_after", ["7", "Mon, 01 Dec 2025 00:00:07 GMT"])
def test_the_wait_that_a_host_asks_for_is_kept(client, venues, slept, retry_after):
    venues.faults.add(FaultRule(fault=Fault.RATE_LIMITED, times=1, retry_after=retry_after))
    ask(client)
    pause, held = slept
    assert 7 <= pause <= 8.1
    assert 0 < held <= 7  # nobody else calls meanwhile: time stood still, so neither do we


@pytest.mark.parametrize("retry_after", [None, "soon", "-3", "nan"])
def test_without_a_useful_word_a_sixth_of_the_window_is_waited(client, venues, slept, retry_after):
    venues.faults.add(FaultRule(fault=Fault.RATE_LIMITED, times=1, retry_after=retry_after))
    ask(client)
    assert 10 <= slept[0] <= 11.1


def test_a_host_with_a_known_penalty_is_left_alone_for_all_of_it(venues, slept):
    venues.faults.add(FaultRule(fault=Fault.RATE_LIMITED))
    client = HostClient(
        FeedHost.PYTH_LATEST, venues.urls["pyth_latest_url"], now=FixedClock().now,
        sleep=slept.append,
    )  # fmt: skip
    impatient = replace(POLICY, budget_s=10)
    for words in ("none for 60 s", "leaves no call for"):
        with pytest.raises(RateLimited, match=words):
            client.get("v2/updates/price/latest", {}, weight=1, policy=impatient)
    assert (venues.count(), slept) == (1, [])
    client.close()


def test_a_longer_wait_than_there_is_patience_for_is_refused_without_another_call(
    client, venues, slept
):
    venues.faults.add(FaultRule(fault=Fault.RATE_LIMITED, retry_after="120"))
    with pytest.raises(RateLimited, match="none for 120 s") as caught:
        ask(client)
    assert caught.value.retry_after_s == 120
    one_sentence(caught)
    with pytest.raises(RateLimited, match="leaves no call for 1") as caught:
        ask(client)
    one_sentence(caught)
    assert venues.count() == 1
    assert slept == []


def test_no_word_of_a_host_silences_it_for_more_than_an_hour(client, venues):
    venues.faults.add(FaultRule(fault=Fault.RATE_LIMITED, retry_after="1e12"))
    with pytest.raises(RateLimited) as caught:
        ask(client)
    assert caught.value.retry_after_s == 3600


# ---------------------------------------------------------------- the bucket


def test_calls_within_the_capacity_do_not_wait():
    time = HandTime()
    bucket = TokenBucket(HostLimit(30, 10), sleep=time.sleep, monotonic=time.monotonic)
    for _ in range(10):
        bucket.take(1, patience_s=0)
    assert time.slept == []
    with pytest.raises(RateLimited):
        bucket.take(1, patience_s=0)
    bucket.take(1, patience_s=1)
    assert time.slept == [pytest.approx(0.5)]


def test_in_a_rehearsal_a_host_grants_as_many_calls_to_a_minute_of_its_market(venues, slept):
    url = f"{venues.address}/binance"
    client = HostClient(FeedHost.BINANCE, url, now=FixedClock().now, sleep=slept.append, speed=6000)
    for _ in range(100):  # of weight 1000: 17 minutes of the limit
        client.get("api/v3/ticker/price", {"symbol": "BTCUSDT"}, weight=1000, policy=POLICY)
    assert max(slept, default=0) < 1
    client.close()


@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(0, 20)), min_size=1, max_size=60),
    st.sampled_from(list(FeedHost)),
)
def test_no_window_ever_sees_more_than_the_limit(calls, host):
    time = HandTime()
    limit = HOST_LIMITS[host]
    bucket = TokenBucket(limit, sleep=time.sleep, monotonic=time.monotonic)
    made = []
    for percent, idle_s in calls:
        time.now += idle_s
        weight = limit.weight / 3 * percent / 100
        bucket.take(weight, patience_s=np.inf)
        made.append((time.now, weight))
    for start, _ in made:
        inside = [weight for at, weight in made if start <= at < start + limit.window_s]
        assert sum(inside) <= limit.weight * (1 + 1e-9)


def test_a_hold_stops_everybody_for_its_time():
    time = HandTime()
    bucket = TokenBucket(HostLimit(30, 10), sleep=time.sleep, monotonic=time.monotonic)
    bucket.hold(5)
    bucket.hold(2)
    bucket.take(1, patience_s=10)
    assert time.slept == [5]


def test_threads_share_one_limit(venues):
    """Sixty calls of 20 at once: the waits that are given out keep the rate."""
    slept: list[float] = []
    lock = threading.Lock()

    def note(seconds: float) -> None:
        with lock:
            slept.append(seconds)

    bucket = TokenBucket(HostLimit(1200, 60), sleep=note, monotonic=lambda: 0.0)
    threads = [threading.Thread(target=lambda: bucket.take(20, patience_s=1e9)) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(slept) == 40  # a third of the limit was free
    gaps = [later - earlier for earlier, later in pairwise(sorted(slept))]
    assert gaps == pytest.approx([1.5] * 39)


def test_threads_share_one_client(client, venues):
    answers: list[str] = []

    def several() -> None:
        answers.extend(ask(client).value["price"] for _ in range(10))

    threads = [threading.Thread(target=several) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["100.0"] * 80
    assert venues.count() == 80
