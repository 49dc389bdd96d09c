"""The service as its callers see it: a real server on loopback, real HTTP."""

import json
import logging
import re
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import http_service
import slow_callers
from answer_desk import MAX_AHEAD_S, AnswerDesk
from config import Frequency
from domain import Diagnostics, Forecast, ForecastRequest
from errors import ConfigError, NoPriceError, RequestError, UnknownAsset
from http_service import MAX_BODY_BYTES, bind, build_app, server_for
from metrics import Metrics
from miner_facts import MarketFacts, MinerFacts
from status_page import RecentLog, RecentRequests, StatusPage
from wire_format import format_iso, parse_iso_minute, validate_answer

NOW = parse_iso_minute("2025-12-19T00:05:00Z") - 20
NEXT_MINUTE = NOW + 20
FIRST_BAR = NOW - 30 * 86_400


class GeometricWalks:
    """Answers every request with its own reproducible random walk."""

    def __init__(self):
        self.release = threading.Event()

    def now(self):
        return NOW

    def assets(self):
        return ("BTC", "XAU")

    def answer(self, request, *, origin=None):
        if request.asset == "HYPE":
            raise NoPriceError("no price of HYPE is known; wait for the feed.")
        if request.asset == "SOL":
            raise ZeroDivisionError("a bug")
        if request.asset == "ETH":
            assert self.release.wait(20)
        elif request.asset not in self.assets():
            raise UnknownAsset(f"asset {request.asset!r} is unknown; known are BTC, XAU.")
        if request.start_ts < FIRST_BAR:
            raise RequestError("the origin lies before the first bar; take a later one.")
        rng = np.random.default_rng(zlib.crc32(repr((request, origin)).encode()))
        steps = rng.normal(0, 1e-3, (request.num_paths, request.n_points))
        return Forecast(
            request=request,
            paths=98_000 * np.exp(np.cumsum(steps, axis=1)),
            diagnostics=Diagnostics(
                rung="full",
                frequency="hf" if request.increment_s == 60 else "lf",
                anchor_price=98_123.4567,
                anchor_ts=NOW - 40,
                price_age_s=40,
                model_id=None if request.asset == "XAU" else "BTC-lf-7",
                trained_until=None,
                models_saw_later_bars=origin is not None,
            ),
        )


class Facts:
    """What the walks know of themselves."""

    obstacles: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def facts(self):
        markets = [
            MarketFacts(
                asset=asset,
                frequency=Frequency.HF,
                last_bar_ts=NOW - 30,
                price=98_000.0,
                price_ts=NOW - 3,
                price_feed="walks",
                trained_until=None,
                is_due=True,
            )
            for asset in ("BTC", "XAU")
        ]
        return MinerFacts(
            now=NOW,
            source="walks",
            is_live=True,
            markets=tuple(markets),
            obstacles=self.obstacles,
            warnings=self.warnings,
        )

    def fan(self, asset, frequency):
        raise NoPriceError(f"no picture of {asset} is drawn in this test.")


@contextmanager
def serving(answerer, facts=None):
    """A base URL for as long as the block lasts."""
    with server_of(answerer, facts) as (base, _server):
        yield base


@contextmanager
def server_of(answerer, facts=None):
    """A base URL, and the server behind it."""
    listener = bind("127.0.0.1", 0)
    host, port = listener.getsockname()
    source, requests = facts or Facts(), RecentRequests()
    desk = AnswerDesk(answerer, observers=[requests.observe])
    metrics = Metrics(source.facts, desk.load)
    desk.watch(metrics.observe)
    page = StatusPage(source, desk.load, requests, RecentLog())
    app = build_app(desk, now=answerer.now, facts=source, metrics=metrics, page=page, mark="0a1b2c")
    server = server_for(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://{host}:{port}", server
    finally:
        server.should_exit = True
        thread.join(20)
        desk.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url():
    with serving(GeometricWalks()) as base:
        yield base


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=20) as opened:
        yield opened


def body(**changes):
    values = {
        "asset": "BTC",
        "prompt_start_time": None,
        "origin": None,
        "horizon_seconds": 3600,
        "interval_seconds": 60,
        "num_paths": 7,
        "generated_at": "2025-12-19T00:04:40.123456+00:00",
    }
    return values | changes


def without(name):
    return {key: value for key, value in body().items() if key != name}


def assert_one_sentence(response):
    answer = response.json()
    assert list(answer) == ["error"]
    sentence = answer["error"]
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 400
    # one sentence: no full stop before the last that a new sentence follows
    assert not re.search(r"\. +[A-Z]", sentence), sentence
    return sentence


# ---------------------------------------------------------------- answers


def test_an_answer_holds_the_paths_that_were_asked_for(client):
    response = client.post("/predict", json=body(horizon_seconds=86_400, interval_seconds=300))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert list(answer) == [
        "asset",
        "model_version",
        "data_cutoff",
        "current_price",
        "paths",
        "timestamps",
        "diagnostics",
        "metadata",
    ]
    assert answer["asset"] == "BTC"
    assert answer["model_version"] == "BTC-lf-7"
    assert answer["current_price"] == 98_123.457
    assert {path[0] for path in answer["paths"]} == {98_123.457}
    times = [parse_iso_minute(text) for text in answer["timestamps"]]
    assert times == list(range(NEXT_MINUTE, NEXT_MINUTE + 86_401, 300))
    assert answer["data_cutoff"] == answer["timestamps"][0]
    assert answer["diagnostics"]["rung"] == "full"


def test_a_thousand_paths_of_a_day_pass_the_validators_check(client):
    asked = body(horizon_seconds=86_400, interval_seconds=300, num_paths=1000)
    answer = client.post("/predict", json=asked).json()
    prompt = ForecastRequest(
        asset="BTC", start_ts=NEXT_MINUTE, increment_s=300, length_s=86_400, num_paths=1000
    )
    validate_answer([NEXT_MINUTE, 300, *answer["paths"]], prompt)


def test_no_model_is_called_none(client):
    assert client.post("/predict", json=body(asset="XAU")).json()["model_version"] == "none"


@pytest.mark.parametrize(
    ("times", "start"),
    [
        ({}, NEXT_MINUTE),
        ({"prompt_start_time": format_iso(NEXT_MINUTE)}, NEXT_MINUTE),
        ({"prompt_start_time": format_iso(NEXT_MINUTE + 3540)}, NEXT_MINUTE + 3540),
        ({"origin": format_iso(NEXT_MINUTE - 60)}, NEXT_MINUTE - 60),
        ({"origin": "2025-12-01T03:33:00+01:00"}, parse_iso_minute("2025-12-01T02:33:00Z")),
        # with both, the paths start at the origin
        (
            {
                "origin": "2025-12-01T02:31:00",
                "prompt_start_time": "2025-12-01T02:40:00Z",
            },
            parse_iso_minute("2025-12-01T02:31:00Z"),
        ),
    ],
)
def test_paths_start_where_the_request_says(client, times, start):
    answer = client.post("/predict", json=body(**times)).json()
    assert answer["timestamps"][0] == answer["data_cutoff"] == format_iso(start)
    assert answer["diagnostics"]["models_saw_later_bars"] is ("origin" in times)


@pytest.mark.parametrize("name", ["prompt_start_time", "origin", "generated_at"])
def test_a_time_that_may_be_null_may_be_left_out(client, name):
    assert client.post("/predict", json=without(name)).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/octet-stream", ""])
def test_the_content_type_does_not_matter(client, kind):
    response = client.post("/predict", content=json.dumps(body()), headers={"content-type": kind})
    assert response.status_code == 200


def test_identical_requests_get_identical_bytes(client):
    asked = body(num_paths=100)
    first, second = (client.post("/predict", json=asked).content for _ in range(2))
    assert first == second
    assert client.post("/predict", json=body(num_paths=101)).content != first


def test_many_callers_at_once_get_their_own_answers(client):
    numbers = [1 + index % 16 for index in range(64)]
    with ThreadPoolExecutor(16) as callers:
        responses = list(
            callers.map(lambda n: client.post("/predict", json=body(num_paths=n)), numbers)
        )
    assert [len(response.json()["paths"]) for response in responses] == numbers
    by_number: dict[int, bytes] = {}
    for number, response in zip(numbers, responses, strict=True):
        assert by_number.setdefault(number, response.content) == response.content


def test_a_slow_answer_holds_up_no_other():
    answerer = GeometricWalks()
    with serving(answerer) as base, ThreadPoolExecutor(1) as caller:
        slow = caller.submit(httpx.post, f"{base}/predict", json=body(asset="ETH"), timeout=20)
        assert httpx.get(f"{base}/healthz").status_code == 200
        assert httpx.post(f"{base}/predict", json=body()).status_code == 200
        assert not slow.done()
        answerer.release.set()
        assert slow.result().status_code == 200


def test_an_answer_under_way_is_finished_before_the_server_ends():
    answerer = GeometricWalks()
    with ThreadPoolExecutor(1) as caller:
        with serving(answerer) as base:
            slow = caller.submit(httpx.post, f"{base}/predict", json=body(asset="ETH"), timeout=20)
            threading.Timer(0.5, answerer.release.set).start()
            time.sleep(0.2)
        assert slow.result().status_code == 200


def test_health_names_the_assets_and_which_miner_it_is(client):
    response = client.get("/healthz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "live": True,
        "ready": True,
        "reasons": [],
        "warnings": [],
        "assets": ["BTC", "XAU"],
        "miner": "0a1b2c",
    }


def test_health_tells_what_is_wrong_and_whether_answers_can_be_given():
    facts = Facts()
    with serving(GeometricWalks(), facts) as base:
        facts.warnings = ("XAU lf: the last bar is 40 minutes old",)
        degraded = httpx.get(f"{base}/healthz")
        assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
        assert degraded.json()["warnings"] == list(facts.warnings)
        facts.obstacles = ("no asset has any bars yet",)
        refused = httpx.get(f"{base}/healthz")
        assert (refused.status_code, refused.json()["status"]) == (503, "not ready")
        assert refused.json()["live"] is True
        assert refused.json()["ready"] is False
        assert refused.json()["reasons"] == list(facts.obstacles)


def test_metrics_count_what_was_asked(url, client):
    series = re.compile(r'_requests_total\{outcome="(\w+)",transport="http"\} (\S+)')

    def counted():
        text = client.get("/metrics").text
        return {outcome: float(count) for outcome, count in series.findall(text)}

    before = counted()
    client.post("/predict", json=body())
    client.post("/predict", content=b"nonsense")
    client.post("/predict", content=b" " * (MAX_BODY_BYTES + 1))
    client.post("/predict", json=body(prompt_start_time=format_iso(NEXT_MINUTE - 60)))
    risen = {outcome for outcome, count in counted().items() if count == before[outcome] + 1}
    assert risen >= {"refused", "turned_away", "too_late"}
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'lgbm_miner_price{asset="BTC",frequency="hf"} 98000.0' in response.text


def test_the_status_page_is_served_whole_and_safely(client):
    client.post("/predict", json=body())
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.text.startswith("<!doctype html>")
    assert "127.0.0.1" in response.text


def test_the_status_page_waits_for_no_answer_and_no_answer_for_it():
    answerer = GeometricWalks()
    with serving(answerer) as base, ThreadPoolExecutor(1) as caller:
        slow = caller.submit(httpx.post, f"{base}/predict", json=body(asset="ETH"), timeout=20)
        assert httpx.get(base).status_code == 200
        assert httpx.get(f"{base}/metrics").status_code == 200
        answerer.release.set()
        assert slow.result().status_code == 200


@pytest.mark.parametrize("is_asked_twice", [False, True])
def test_what_an_end_cuts_off_leaves_no_traceback(is_asked_twice, caplog, monkeypatch):
    monkeypatch.setattr(http_service, "GRACE_S", 1)
    with server_of(GeometricWalks()) as (base, server):
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
            assert httpx.get(f"{base}/healthz").status_code == 200
            assert server.server_state.tasks
            server.should_exit = True
            server.force_exit = is_asked_twice
            assert caller.recv(1000).startswith(b"HTTP/1.1 500 ")
    assert not [record for record in caplog.records if record.exc_info]
    assert "CancelledError" not in caplog.text


def test_every_answer_leaves_one_log_line(client, caplog):
    with caplog.at_level(logging.INFO, logger="answer_desk"):
        client.post("/predict", json=body(num_paths=11))
    (record,) = [entry for entry in caplog.records if entry.getMessage() == "answered"]
    assert (record.asset, record.frequency, record.rung) == ("BTC", "hf", "full")
    assert record.price_age_s == 40
    assert record.ms >= 0


# ---------------------------------------------------------------- refusals

BAD_BODIES = {
    "empty": b"",
    "not JSON": b"asset=BTC",
    "null": b"null",
    "array": b"[]",
    "number": b"5",
    "text": b'"BTC"',
    "bytes": b"\xff\xfe\x00",
    "lone surrogate": json.dumps(body(asset="\ud800")).encode(),
    "nested": b"[" * 50_000,
    "nested objects": b'{"asset":' * 6_000,
    "NaN": json.dumps(body(num_paths=float("nan"))).encode(),
    "long integer": b'{"num_paths": ' + b"9" * 6_000 + b"}",
}


@pytest.mark.parametrize("raw", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_no_request_is_refused(client, raw):
    response = client.post("/predict", content=raw)
    assert response.status_code == 400
    assert_one_sentence(response)


@pytest.mark.parametrize("name", ["asset", "horizon_seconds", "interval_seconds", "num_paths"])
def test_a_missing_field_is_named(client, name):
    response = client.post("/predict", json=without(name))
    assert response.status_code == 400
    assert assert_one_sentence(response) == f"field '{name}' is missing from the body."


def test_a_field_that_nobody_knows_is_refused_rather_than_passed_over(client):
    """A misspelt origin would otherwise get a forecast from now."""
    response = client.post("/predict", json=body(orign=format_iso(NEXT_MINUTE - 60)))
    assert response.status_code == 400
    assert assert_one_sentence(response) == (
        'field "orign" of the body is unknown; known are asset, prompt_start_time, origin, '
        "horizon_seconds, interval_seconds, num_paths, generated_at."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"asset": "DOGE"}, "'DOGE' is unknown"),
        ({"asset": 5}, "'asset': got 5"),
        ({"asset": None}, "'asset': got null"),
        ({"asset": "A" * 60_000}, "'asset': got"),
        ({"num_paths": 0}, "'num_paths': got 0"),
        ({"num_paths": 1001}, "'num_paths': got 1001; .* 1000"),
        ({"num_paths": True}, "'num_paths': got true"),
        ({"num_paths": 300.5}, r"'num_paths': got 300\.5"),
        ({"num_paths": 300.0}, r"'num_paths': got 300\.0"),
        ({"num_paths": "300"}, "'num_paths': got \"300\""),
        ({"num_paths": 10**4000}, "'num_paths': got 1000"),
        ({"horizon_seconds": 0}, "'horizon_seconds': got 0"),
        ({"horizon_seconds": -3600}, "'horizon_seconds': got -3600"),
        ({"horizon_seconds": 10**9}, "'horizon_seconds': got 1000000000"),
        ({"interval_seconds": 0}, "'interval_seconds': got 0"),
        ({"interval_seconds": 7}, "interval_seconds 7 does not divide horizon_seconds 3600"),
        ({"interval_seconds": 1, "horizon_seconds": 86_400}, "86401 points"),
        ({"interval_seconds": [60]}, "'interval_seconds': got"),
        ({"prompt_start_time": 1_766_102_700}, "'prompt_start_time': got 1766102700"),
        ({"prompt_start_time": "soon"}, "'soon' cannot be read"),
        ({"prompt_start_time": format_iso(NEXT_MINUTE)[:-8] + "30Z"}, "past a whole minute"),
        ({"prompt_start_time": "0001-01-01T00:00:00+14:00"}, "cannot be read"),
        (
            {"prompt_start_time": format_iso(NEXT_MINUTE + MAX_AHEAD_S)},
            "3620 s ahead; ask at most 3600",
        ),
        ({"prompt_start_time": "9999-12-31T23:59:00-14:00"}, "cannot be read"),
        ({"origin": format_iso(NEXT_MINUTE)}, "lies in the future"),
        ({"origin": "9999-12-31T23:59:00Z"}, "lies in the future"),
        ({"origin": "9999-12-31T23:59:00-14:00"}, "cannot be read"),
        ({"origin": "2011-01-01T00:00:00Z"}, "before the first bar"),
        ({"origin": "0001-01-01T00:00:00+14:00"}, "cannot be read"),
        ({"origin": ""}, "'' cannot be read"),
        ({"origin": "2025-12-01T00:00:00Z", "prompt_start_time": "soon"}, "'soon' cannot"),
        ({"generated_at": 5}, "'generated_at': got 5"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(client, changes, words):
    response = client.post("/predict", json=body(**changes))
    assert response.status_code == 400
    assert re.search(words, assert_one_sentence(response)), response.json()


@pytest.mark.parametrize("start", [format_iso(NEXT_MINUTE - 60), "0001-01-01T00:00:00Z"])
def test_a_start_that_has_passed_is_told_apart(client, start):
    response = client.post("/predict", json=body(prompt_start_time=start))
    assert response.status_code == 408
    assert "has passed" in assert_one_sentence(response)


@pytest.mark.parametrize("size", [MAX_BODY_BYTES + 1, 5_000_000])
def test_a_large_body_is_refused_and_the_caller_reads_why(client, size):
    response = client.post("/predict", content=b" " * size)
    assert response.status_code == 413
    assert "65536 bytes" in assert_one_sentence(response)


def test_a_caller_that_hangs_up_leaves_the_server_well(url, client):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as caller:
        caller.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    assert client.get("/healthz").status_code == 200


def raw_connection(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_body_that_does_not_come_is_not_waited_for(url, monkeypatch):
    monkeypatch.setattr(http_service, "BODY_S", 0.05)
    with raw_connection(url) as caller:
        caller.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        assert b" 408 " in caller.recv(1000).split(b"\r\n")[0]


def test_headers_that_drip_in_are_hung_up_on(url, monkeypatch):
    monkeypatch.setattr(slow_callers, "HEADERS_S", 0.05)
    with raw_connection(url) as caller:
        caller.sendall(b"POST /predict HTTP/1.1\r\nhost")
        assert caller.recv(1000) == b""


def test_a_caller_is_named_by_its_address_whatever_its_headers_say(url, client):
    client.post("/predict", content=b"5", headers={"x-forwarded-for": "6.6.6.6"})
    assert "6.6.6.6" not in client.get("/").text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/favicon.ico", 404),
        ("POST", "/metrics", 405),
        ("POST", "/predict/", 404),
        ("GET", "/predict%0a/..%ff", 404),
        ("GET", "/predict", 405),
        ("DELETE", "/predict", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_other_routes_are_refused_in_json(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert "use POST /predict, GET /healthz" in assert_one_sentence(response)


def test_without_a_price_the_caller_is_asked_to_wait(client):
    response = client.post("/predict", json=body(asset="HYPE"))
    assert response.status_code == 503
    assert "no price of HYPE" in assert_one_sentence(response)


def test_a_bug_is_told_apart_and_keeps_its_traceback(client, caplog):
    response = client.post("/predict", json=body(asset="SOL"))
    assert response.status_code == 500
    assert_one_sentence(response)
    (record,) = [entry for entry in caplog.records if entry.exc_info]
    assert "a bug" in str(record.exc_info)
    assert client.post("/predict", json=body()).status_code == 200


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([60, 300, 3600, "BTC", "2025-12-01T00:00:00Z"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(body())), anything, min_size=1))
def test_no_value_in_a_body_makes_the_server_fail(client, changes):
    response = client.post("/predict", content=json.dumps(body(**changes)))
    assert response.status_code == 200 or 400 <= response.status_code < 500
    if response.status_code != 200:
        assert_one_sentence(response)


@given(raw=st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_no_body_makes_the_server_fail(client, raw):
    response = client.post("/predict", content=raw)
    assert response.status_code == 400
    assert_one_sentence(response)


# ---------------------------------------------------------------- listening


def test_a_busy_port_is_one_sentence_with_a_remedy():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port}, another program does.* with --port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "a..b", "x" * 64])
def test_an_address_of_another_machine_is_one_sentence(host):
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind(host, 0)


def test_an_ipv6_address_can_be_listened_on():
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with bind("::1", 0) as listener:
        assert listener.family == socket.AF_INET6
