"""The venues on 127.0.0.1: the forms, the limits and the faults that real ones have."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import requests

from domain import Bars
from feed_plans import FeedHost
from loopback_venues import Fault, FaultPlan, FaultRule, LoopbackVenues, serve_venues

START = 1_764_547_200  # 2025-12-01, midnight UTC


@dataclass
class HandClock:
    """A clock that is turned by hand."""

    ts: float

    def now(self) -> float:
        return self.ts


def minutes(n, level=100.0, start=START):
    steps = np.random.default_rng(int(level)).normal(0, 1e-3, n)
    close = level * np.exp(np.cumsum(steps))
    opened = np.concatenate([[level], close[:-1]])
    return Bars(
        open_ts=start + 60 * np.arange(n, dtype=np.int64),
        open=opened,
        high=np.maximum(opened, close) * 1.0005,
        low=np.minimum(opened, close) * 0.9995,
        close=close,
        volume=np.arange(n) + 1.0,
        bar_s=60,
        feed="test",
    )


BTC = minutes(7000, 90_000)
GOLD = minutes(7000, 4000)
SPYX = minutes(7000, 600)


@pytest.fixture(scope="module")
def served() -> Iterator[LoopbackVenues]:
    with serve_venues({"BTC": BTC, "XAU": GOLD, "SPYX": SPYX}, HandClock(START)) as venues:
        yield venues


@pytest.fixture
def venues(served: LoopbackVenues) -> LoopbackVenues:
    served.faults.clear()
    served.asked.clear()
    served.clock.ts = START + 6000 * 60 + 30  # type: ignore[attr-defined]
    return served


def get(venues, host, path, **query):
    return requests.get(f"{venues.address}/{host}/{path}", params=query, timeout=5)


def klines(venues, first, last, interval="1m", **more):
    return get(
        venues,
        "binance",
        "api/v3/klines",
        symbol="BTCUSDT",
        interval=interval,
        startTime=(START + first * 60) * 1000,
        endTime=(START + last * 60) * 1000,
        **more,
    ).json()


def snapshot(venues, first, last, coin="xyz:GOLD"):
    times = {"startTime": (START + first * 60) * 1000, "endTime": (START + last * 60) * 1000}
    body = {"type": "candleSnapshot", "req": {"coin": coin, "interval": "1m", **times}}
    return requests.post(f"{venues.address}/hyperliquid/info", json=body, timeout=5)


# ---------------------------------------------------------------- forms


def test_klines_have_the_form_of_binance(venues):
    (row,) = klines(venues, 10, 10)
    texts = [repr(float(getattr(BTC, name)[10])) for name in ("open", "high", "low", "close")]
    opened = (START + 600) * 1000
    assert row[:5] == [opened, *texts]
    assert row[5:7] == [repr(11.0), opened + 59_999]
    assert [type(value) for value in row[7:]] == [str, int, str, str, str]


def test_klines_come_oldest_first_and_a_thousand_at_most(venues):
    rows = klines(venues, 0, 5000, limit=5000)
    assert [row[0] // 1000 for row in rows] == BTC.open_ts[:1000].tolist()
    assert len(klines(venues, 0, 5000)) == 500


def test_the_newest_kline_still_forms_and_does_not_know_its_close(venues):
    last = klines(venues, 5999, 6100)[-1]
    assert last[0] == (START + 6000 * 60) * 1000
    assert float(last[4]) != BTC.close[6000]
    assert float(last[5]) == pytest.approx(BTC.volume[6000] / 2)


def test_the_ticker_shows_the_price_of_the_forming_candle(venues):
    ticker = get(venues, "binance", "api/v3/ticker/price", symbol="BTCUSDT").json()
    assert ticker == {"symbol": "BTCUSDT", "price": klines(venues, 6000, 6100)[-1][4]}


def test_five_minute_klines_are_made_of_minutes(venues):
    first, *_ = klines(venues, 5, 40, interval="5m")
    assert first[0] == (START + 300) * 1000
    assert first[6] == (START + 600) * 1000 - 1
    assert float(first[1]) == BTC.open[5]
    assert float(first[2]) == BTC.high[5:10].max()
    assert float(first[3]) == BTC.low[5:10].min()
    assert float(first[4]) == BTC.close[9]
    assert float(first[5]) == BTC.volume[5:10].sum()


def test_an_unknown_symbol_is_refused_as_binance_does(venues):
    answer = get(venues, "binance", "api/v3/ticker/price", symbol="NOPE")
    assert (answer.status_code, answer.json()["code"]) == (400, -1121)


def test_snapshots_have_the_form_of_hyperliquid(venues):
    (row,) = snapshot(venues, 3000, 3000).json()
    assert row["t"] == (START + 3000 * 60) * 1000
    assert row["T"] == row["t"] + 59_999
    assert (row["s"], row["i"], type(row["n"])) == ("xyz:GOLD", "1m", int)
    assert [float(row[key]) for key in "ohlcv"] == [
        getattr(GOLD, name)[3000] for name in ("open", "high", "low", "close", "volume")
    ]


def test_only_the_newest_5000_snapshots_exist(venues):
    rows = snapshot(venues, 0, 7000).json()
    assert len(rows) == 5000
    assert rows[-1]["t"] == (START + 6000 * 60) * 1000


def test_a_flat_body_and_an_unknown_coin_are_refused_as_hyperliquid_does(venues):
    address = f"{venues.address}/hyperliquid/info"
    flat = requests.post(address, json={"type": "candleSnapshot", "coin": "xyz:GOLD"}, timeout=5)
    assert flat.status_code == 422
    assert snapshot(venues, 0, 9, coin="xyz:NOPE").status_code == 500


@pytest.mark.parametrize("host", ["pyth_history", "pyth_router"])
def test_history_has_the_form_of_pyth(venues, host):
    query = {"symbol": "Crypto.XAUT/USD", "resolution": "1"}
    found = get(venues, host, "history", **query, **{"from": START, "to": START + 120}).json()
    assert found["s"] == "ok"
    assert found["t"] == [START, START + 60, START + 120]
    assert found["c"] == GOLD.close[:3].tolist()
    assert all(len(found[key]) == 3 for key in "ohlv")
    late = {"from": START + 9_000_000, "to": START + 9_000_060}
    assert get(venues, host, "history", **query, **late).json() == {"s": "no_data"}
    many = {"from": START, "to": START + 10_002 * 60}
    refused = get(venues, host, "history", **query, **many).json()
    assert (refused["s"], refused["t"]) == ("error", [])


def test_the_latest_price_has_the_form_of_hermes(venues):
    wanted = "44465e17d2e9d390e70c999d5a11fda4f092847fcd2e3e5aa089d96c98a30e67"
    found = get(venues, "pyth_latest", "v2/updates/price/latest", **{"ids[]": wanted}).json()
    (entry,) = found["parsed"]
    assert entry["id"] == wanted
    assert entry["price"]["publish_time"] == START + 6000 * 60 + 30
    shown = int(entry["price"]["price"]) * 10.0 ** entry["price"]["expo"]
    assert GOLD.low[6000] <= shown <= GOLD.high[6000]


def test_the_date_is_that_of_the_market(venues):
    answer = get(venues, "binance", "api/v3/ticker/price", symbol="BTCUSDT")
    assert answer.headers["Date"] == "Fri, 05 Dec 2025 04:00:30 GMT"


def test_an_asset_of_its_own_goes_before_one_that_only_helps_out(venues):
    query = {"symbol": "Crypto.SPYX/USD", "resolution": "1", "from": START, "to": START}
    assert get(venues, "pyth_history", "history", **query).json()["c"] == [SPYX.close[0]]
    gold = get(venues, "binance", "api/v3/ticker/price", symbol="PAXGUSDT").json()
    assert float(gold["price"]) == pytest.approx(GOLD.close[6000], rel=0.01)


def test_bars_of_one_feed_win_over_those_of_the_asset():
    own = minutes(10, 50)
    clock = HandClock(START + 600)
    with serve_venues({"BTC": BTC, "pyth:Crypto.BTC/USD": own}, clock) as venues:
        query = {"symbol": "Crypto.BTC/USD", "resolution": "1", "from": START, "to": START}
        assert get(venues, "pyth_history", "history", **query).json()["c"] == [own.close[0]]
        assert float(klines(venues, 0, 0)[0][4]) == BTC.close[0]


def test_the_price_within_a_minute_moves_from_open_to_close_in_its_range(venues):
    shown = []
    for second in range(61):
        venues.clock.ts = START + 100 * 60 + second
        ticker = get(venues, "binance", "api/v3/ticker/price", symbol="BTCUSDT").json()
        shown.append(float(ticker["price"]))
    assert shown[0] == BTC.close[99]
    assert shown[60] == BTC.close[100]
    assert len(set(shown)) > 30
    assert BTC.low[100] <= min(shown[1:])
    assert max(shown[1:]) <= BTC.high[100]


def test_bars_that_are_not_minutes_are_refused():
    coarse = Bars(
        open_ts=BTC.open_ts[:1] * 1,
        open=BTC.open[:1],
        high=BTC.high[:1],
        low=BTC.low[:1],
        close=BTC.close[:1],
        volume=BTC.volume[:1],
        bar_s=300,
        feed="test",
    )
    with (
        pytest.raises(ValueError, match="BTC has bars of 300 s"),
        serve_venues({"BTC": coarse}, HandClock(START)),
    ):
        pass


def test_a_long_answer_is_packed_and_comes_in_chunks(venues):
    times = {"startTime": START * 1000, "endTime": (START + 60_000) * 1000}
    url = f"{venues.address}/binance/api/v3/klines"
    query: dict[str, str | int] = {"symbol": "BTCUSDT", "interval": "1m", "limit": 1000, **times}
    packed = requests.get(url, params=query, headers={"Accept-Encoding": "gzip"}, timeout=5)
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.headers["Transfer-Encoding"] == "chunked"
    plain = requests.get(url, params=query, headers={"Accept-Encoding": "identity"}, timeout=5)
    assert plain.headers["Content-Length"] == str(len(plain.content))
    assert packed.json() == plain.json()


# ---------------------------------------------------------------- counting


def test_requests_are_counted_with_the_weight_that_the_venue_gives_them(venues):
    klines(venues, 0, 10)
    snapshot(venues, 2000, 2119)
    snapshot(venues, 2000, 2000)
    assert venues.count() == 3
    assert venues.count(FeedHost.HYPERLIQUID) == 2
    assert venues.heaviest(FeedHost.BINANCE, 60) == 2
    assert venues.heaviest(FeedHost.HYPERLIQUID, 60) == 22 + 21
    assert venues.heaviest(FeedHost.PYTH_LATEST, 60) == 0


# ---------------------------------------------------------------- faults


def test_a_rule_holds_for_its_host_symbol_time_and_number_of_requests():
    plan = FaultPlan()
    rule = FaultRule(
        fault=Fault.ERROR, host=FeedHost.BINANCE, symbol="X", times=2, from_ts=10, until_ts=20
    )
    plan.add(rule)
    assert plan.pick(FeedHost.HYPERLIQUID, "X", 15) is None
    assert plan.pick(FeedHost.BINANCE, "Y", 15) is None
    assert plan.pick(FeedHost.BINANCE, "X", 9.9) is None
    assert plan.pick(FeedHost.BINANCE, "X", 20) is None
    picked = [plan.pick(FeedHost.BINANCE, "X", 10) for _ in range(3)]
    assert picked == [rule, rule, None]


def test_a_share_of_requests_is_drawn_and_a_seed_repeats_it():
    drawn = []
    for _ in range(2):
        plan = FaultPlan(seed=3)
        plan.add(FaultRule(fault=Fault.ERROR, share=0.3))
        drawn.append([plan.pick(FeedHost.BINANCE, "X", 0) is not None for _ in range(400)])
    assert drawn[0] == drawn[1]
    assert sum(drawn[0]) == pytest.approx(120, abs=4 * np.sqrt(400 * 0.3 * 0.7))


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.RATE_LIMITED, 429),
        (Fault.BLOCKED, 451),
        (Fault.NOT_FOUND, 404),
        (Fault.ERROR, 500),
        (Fault.BAD_GATEWAY, 502),
    ],
)
def test_a_status_is_served_on_order(venues, fault, status):
    venues.faults.add(FaultRule(fault=fault, retry_after="7", times=1))
    answer = get(venues, "binance", "api/v3/ticker/price", symbol="BTCUSDT")
    assert answer.status_code == status
    assert answer.headers["Retry-After"] == "7"
    assert get(venues, "binance", "api/v3/ticker/price", symbol="BTCUSDT").ok


@pytest.mark.parametrize(
    "fault", [Fault.REFUSE, Fault.TRUNCATED, Fault.BROKEN_GZIP, Fault.CUT_GZIP]
)
def test_a_broken_answer_is_served_on_order(venues, fault):
    venues.faults.add(FaultRule(fault=fault, times=1))
    with pytest.raises((requests.RequestException, ValueError)):
        klines(venues, 0, 50)


def closes(venues, first, last):
    return [row[4] for row in klines(venues, first, last)]


def test_candles_are_spoiled_on_order(venues):
    clean = klines(venues, 0, 20)

    def under(fault):
        venues.faults.clear()
        venues.faults.add(FaultRule(fault=fault))
        return klines(venues, 0, 20)

    assert under(Fault.EMPTY) == []
    assert under(Fault.DUPLICATED) == clean + clean[:10]
    assert under(Fault.SHUFFLED) != clean
    assert sorted(under(Fault.SHUFFLED)) == clean
    assert len(under(Fault.MISSING)) == 14
    assert len(under(Fault.EARLIER)) == 21  # there are no bars before these
    for fault, text in (
        (Fault.NAN, "nan"),
        (Fault.NULL, None),
        (Fault.TEXT, "n/a"),
        (Fault.HUGE, "1e+308"),
        (Fault.NEGATIVE, "-1.0"),
        (Fault.ZERO, "0.0"),
    ):
        spoiled = under(fault)
        assert spoiled[-1][4] == text
        assert [row[4] for row in spoiled].count(text) in (3, 4)
    assert float(under(Fault.SPIKE)[-1][4]) == pytest.approx(float(clean[-1][4]) * 100)


def test_a_frozen_market_stands_still_from_the_moment_that_the_rule_names(venues):
    since = START + 5990 * 60
    venues.faults.add(FaultRule(fault=Fault.FROZEN, from_ts=since))
    shown = closes(venues, 5980, 6100)
    assert shown[:10] == [repr(float(price)) for price in BTC.close[5980:5990]]
    assert set(shown[10:]) == {shown[9]}
    ticker = get(venues, "binance", "api/v3/ticker/price", symbol="BTCUSDT").json()
    assert ticker["price"] == shown[9]


def test_a_stale_answer_is_a_quarter_of_an_hour_old(venues):
    venues.faults.add(FaultRule(fault=Fault.STALE))
    assert klines(venues, 5900, 6100)[-1][0] == (START + 5985 * 60) * 1000


def test_nothing_is_left_running_when_the_venues_close():
    before = set(threading.enumerate())
    with requests.Session() as session, serve_venues({"BTC": BTC}, HandClock(START)) as venues:
        venues.faults.add(FaultRule(fault=Fault.TIME_OUT, times=1))
        with pytest.raises(requests.Timeout):
            session.get(f"{venues.address}/binance/api/v3/ticker/price", timeout=0.05)
        session.get(f"{venues.address}/binance/api/v3/ticker/price", timeout=5)
    assert set(threading.enumerate()) <= before


def test_what_no_venue_serves_is_not_found(venues):
    assert requests.get(f"{venues.address}/elsewhere", timeout=5).status_code == 404
    assert get(venues, "binance", "api/v3/depth", symbol="BTCUSDT").status_code == 404
    assert get(venues, "binance", "api/v3/klines", symbol="BTCUSDT").status_code == 400


def test_answers_are_strict_json_unless_a_fault_says_otherwise(venues):
    query = {"symbol": "Crypto.BTC/USD", "resolution": "1", "from": START, "to": START + 600}
    text = get(venues, "pyth_history", "history", **query).text
    json.loads(text, parse_constant=pytest.fail)
    venues.faults.add(FaultRule(fault=Fault.NAN))
    assert "NaN" in get(venues, "pyth_history", "history", **query).text
