"""What the status page says, and what it never says."""

import logging
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest

import status_page
from answer_desk import AnswerRecord, Caller, DeskLoad, Outcome
from config import Frequency
from domain import Bars, Diagnostics, Forecast, ForecastRequest, MarketHistory
from errors import NoPriceError
from miner_facts import MarketFacts, MinerFacts
from own_scores import OwnScore
from status_page import HEADERS, PAGE_S, SCRIPT, RecentLog, RecentRequests, StatusPage

NOW = 1_766_102_700 // 300 * 300
KEY = "0x" + "ab12" * 16
LOAD = DeskLoad(waiting=3, running=2, cached=7, cached_bytes=1234, seconds_per_day_answer=0.25)
OWN = OwnScore(
    answers=120,
    score=490.0,
    ewma_t=500.0,
    covered=0.79,
    covered_by_interval={"1min": 0.79},
    course=tuple((NOW - 60 * n, 490.0 + n % 7, 500.0) for n in range(120, 0, -1)),
)


def market(asset="BTC", frequency=Frequency.HF, **changes):
    facts = MarketFacts(
        asset=asset,
        frequency=frequency,
        last_bar_ts=NOW - 20,
        price=98_123.5,
        price_ts=NOW - 3,
        price_feed="binance:BTCUSDT",
        trained_until=NOW - 2 * 3600,
        is_due=False,
        own=OWN,
    )
    return replace(facts, **changes)


class Source:
    """Facts that a test may change, and random walks for pictures."""

    def __init__(self):
        self.known = MinerFacts(now=NOW, source="venue", is_live=True, markets=(market(),))
        self.drawn = 0
        self.rung = "lightgbm"
        self.notes: tuple[str, ...] = ()

    def facts(self):
        return self.known

    def fan(self, asset, frequency):
        if asset == "HYPE":
            raise NoPriceError("no price of HYPE is known; collect bars first.")
        self.drawn += 1
        walk = np.cumsum(np.random.default_rng(0).normal(0, 1e-3, (60, 61)), axis=1)
        close = 98_000 * np.exp(walk[0])
        bars = Bars(
            open_ts=np.arange(NOW - 61 * 60, NOW, 60),
            open=close, high=close, low=close, close=close, volume=close,
            bar_s=60, feed="walk",
        )  # fmt: skip
        forecast = Forecast(
            request=ForecastRequest(
                asset=asset, start_ts=NOW, increment_s=60, length_s=3600, num_paths=60
            ),
            paths=98_000 * np.exp(walk),
            diagnostics=Diagnostics(
                rung=self.rung,
                frequency=frequency.value,
                anchor_price=98_000.0,
                anchor_ts=NOW,
                price_age_s=0,
                model_id=None,
                trained_until=None,
                models_saw_later_bars=False,
                notes=self.notes,
            ),
        )
        history = MarketHistory(
            asset=asset, frequency=frequency, bars=bars, price_bars=bars, source="venue"
        )
        return forecast, history


def record(outcome=Outcome.COMPUTED, caller="5Validator", reason=None, at=NOW - 5.0, ms=41.0):
    answered = outcome in (Outcome.COMPUTED, Outcome.REPEATED)
    diagnostics = Diagnostics(
        rung="lightgbm",
        frequency="hf",
        anchor_price=1.0,
        anchor_ts=0,
        price_age_s=0,
        model_id=None,
        trained_until=None,
        models_saw_later_bars=False,
    )
    return AnswerRecord(
        at=at,
        caller=Caller(name=caller, transport="axon"),
        outcome=outcome,
        ms=ms,
        request=ForecastRequest(
            asset="BTC", start_ts=NOW, increment_s=60, length_s=3600, num_paths=9
        ),
        diagnostics=diagnostics if answered else None,
        reason=reason,
    )


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def requests():
    return RecentRequests()


@pytest.fixture
def lines():
    return RecentLog()


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def page(source, requests, lines, clock):
    return StatusPage(
        source,
        lambda: LOAD,
        requests,
        lines,
        memory=lambda: 256 * 2**20,
        monotonic=lambda: clock[0],
    )


def text_of(page):
    """The page without its head, its figures and its tags."""
    body = page.render().decode().partition("<body>")[2]
    plain = re.sub(r"<svg.*?</svg>|<script.*?</script>|<[^>]*>", " ", body, flags=re.DOTALL)
    return re.sub(r"\s+", " ", plain)


# ---------------------------------------------------------------- what it says


def test_one_look_says_how_things_stand(page, requests):
    for ms in (30.0, 40.0, 300.0):
        requests.observe(record(ms=ms))
    text = text_of(page)
    for words in (
        "serving",
        "1 asset from source venue",
        "answers, last hour 3 all that were asked for",
        "time per answer 40 ms slowest 300 ms",
        "score against ewma_t −2.0 %",
        "in the 80 % band 79.0 %",
        "oldest models 2.0 h no trainings due",
        "queue 3 2 being computed",
        "memory 256 MB",
        "BTC 1 hour 98,123.5 3 s",
        "BTC 1 hour 120 490.0 500.0 −2.0 % 79.0 %",
        "None since the start.",
    ):
        assert words in text, (words, text)


def test_a_picture_is_on_the_page_and_drawn_anew_with_every_bar(page, source, clock):
    assert page.render().count(b'role="img" aria-label="BTC 1 hour') == 1
    for minute, drawn in ((0, 1), (59, 1), (60, 2), (61, 2)):
        source.known = replace(source.known, now=NOW + minute)
        clock[0] += PAGE_S
        page.render()
        assert source.drawn == drawn
    source.known = replace(source.known, markets=(market(trained_until=NOW),))
    clock[0] += PAGE_S
    page.render()
    assert source.drawn == 3


def test_a_page_is_good_for_some_seconds(page, source, clock):
    first = page.render()
    source.known = replace(source.known, warnings=("the chain is silent",))
    clock[0] += PAGE_S - 0.1
    assert page.render() is first
    clock[0] += 0.1
    assert "The chain is silent." in text_of(page)


def test_warnings_and_obstacles_stand_at_the_top(page, source):
    source.known = replace(
        source.known, obstacles=("no asset has any bars yet",), warnings=("disk is full",)
    )
    text = text_of(page)
    assert text.index("not ready") < text.index("No asset has any bars yet.")
    assert text.index("Disk is full.") < text.index("Forecasts now")


def test_a_market_that_cannot_be_drawn_says_why_and_costs_no_other(page, source):
    source.known = replace(source.known, markets=(market("HYPE", own=None), market()))
    assert "no price of HYPE is known; collect bars first." in text_of(page)
    assert page.render().count(b'role="img" aria-label="BTC') == 1


def test_a_market_without_a_price_says_so_and_is_drawn_with_the_first_one(page, source, clock):
    bare = market("HYPE", own=None, price=None, price_ts=None, last_bar_ts=None)
    source.known = replace(source.known, markets=(bare, market()))
    assert "No price is known yet, so its prompts are refused." in text_of(page)
    assert "1 asset from source venue" in text_of(page)
    source.known = replace(source.known, markets=(market("HYPE", own=None), market()))
    clock[0] += PAGE_S
    assert "no price of HYPE is known; collect bars first." in text_of(page)  # it was asked for


def test_a_lower_rung_is_named_with_its_reason(page, source):
    source.rung, source.notes = "profile_ewma", ("no models were trained yet",)
    source.known = replace(source.known, markets=(market(trained_until=None, is_due=True),))
    text = text_of(page)
    assert "EWMA, no models: no models were trained yet" in text
    assert "1 training due" in text
    assert "models none" in text


def test_a_miner_that_knows_nothing_yet_has_a_page(page, source):
    source.known = replace(source.known, markets=())
    text = text_of(page)
    for words in ("no bars of any asset yet", "Nobody has asked yet", "None yet: an answer"):
        assert words in text


def test_a_simulated_market_is_called_one(page, source):
    source.known = replace(source.known, source="simulated", is_live=False)
    assert "Simulated market. Every price on this page is invented." in text_of(page)


def test_an_old_price_stands_out_where_prices_should_move(page, source, clock):
    source.known = replace(source.known, markets=(market(price_ts=NOW - 600),))
    assert re.search(rb'class="warn" title="age of the price[^>]*>10 min<', page.render())
    source.known = replace(source.known, is_live=False)
    clock[0] += PAGE_S
    assert not re.search(rb'class="warn" title="age', page.render())


def test_requests_are_listed_the_latest_first_with_their_reasons(page, requests):
    requests.observe(record(at=NOW - 7200))
    requests.observe(record(Outcome.TOO_LATE, reason="0.4 s are left until the start."))
    requests.observe(record(Outcome.REPEATED, caller="5F3sa2TJAWMqDhXG6jhV4N8ko9SxwGy8TpaNS1"))
    text = text_of(page)
    assert "1 not answered" in text
    assert "5F3sa2…TpaNS1 · axon repeated LightGBM" in text
    assert text.index("repeated LightGBM") < text.index("0.4 s are left until the start.")
    assert "last hour: 1 repeated, 1 too late" in text


class Unspeakable(Exception):
    """Even its text is a fault."""

    def __str__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("message", "args", "error"),
    [("lost %d frames", ("many",), None), ("failed", (), Unspeakable())],
)
def test_a_line_that_cannot_be_put_together_ends_nobody(lines, message, args, error):
    exc_info = None if error is None else (type(error), error, None)
    record = logging.LogRecord("bittensor", logging.WARNING, "", 0, message, args, exc_info)
    lines.handle(record)
    (line,) = lines.lines()
    assert line.text == "a line of bittensor that cannot be put together; the log has it"


def test_a_flood_of_rejects_is_counted_and_pushes_nothing_off_the_page(page, requests):
    requests.observe(record(caller="5Honest"))
    for _ in range(2 * status_page.KEPT_REQUESTS):
        requests.observe(record(Outcome.TURNED_AWAY, caller="5Flood"))
    text = text_of(page)
    assert "5Honest" in text
    assert "5Flood" not in text
    assert f"{status_page.KEPT_REQUESTS:,} turned away unread" in text


def test_callers_that_may_not_ask_are_listed_with_their_reason_once_each(page, requests):
    requests.observe(record(caller="5Honest", at=NOW - 9.0))
    for number in range(3):
        sentence = f"hotkey 5Poor has a stake of {number}; more than 65000 is needed."
        requests.observe(record(Outcome.NOT_ALLOWED, caller="5Poor", reason=sentence))
    text = text_of(page)
    assert "5Poor · axon not allowed hotkey 5Poor has a stake of 2" in text
    assert "a stake of 1" not in text
    assert "last hour: 1 computed, 3 not allowed" in text
    assert "3 not answered" in text


def test_a_flood_of_callers_that_may_not_ask_pushes_nothing_off_the_page(page, requests):
    requests.observe(record(caller="5Honest", at=NOW - 9.0))
    for number in range(2 * status_page.KEPT_REQUESTS):
        requests.observe(record(Outcome.NOT_ALLOWED, caller=f"5Made{number}"))
    text = text_of(page)
    assert "5Honest" in text
    assert text.count("5Made") == status_page.SHOWN_NOT_ALLOWED
    assert f"{status_page.KEPT_REQUESTS:,} not allowed" in text


def test_a_caller_that_was_not_allowed_long_ago_leaves_the_list(page, requests):
    requests.observe(record(Outcome.NOT_ALLOWED, caller="5Poor", at=NOW - 3700.0))
    assert "5Poor" not in text_of(page)


# ---------------------------------------------------------------- log lines


@pytest.fixture
def logger(lines):
    made = logging.Logger("test")  # noqa: LOG001  # not of the tree: nothing else hears it
    made.addHandler(lines)
    return made


def test_warnings_and_errors_are_kept_with_what_explains_them(page, logger, lines):
    logger.info("training")
    logger.warning("duty failed", extra={"duty": "collect", "reason": "429 from the venue"})
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        logger.exception("failed")
    assert [line.text for line in lines.lines()] == [
        "failed · ZeroDivisionError: division by zero",
        "duty failed · collect · 429 from the venue",
    ]
    text = text_of(page)
    assert "error failed · ZeroDivisionError: division by zero" in text


def test_the_same_line_again_only_counts(page, logger, lines):
    for _ in range(30):
        logger.warning("the feed is silent")
    (line,) = lines.lines()
    assert line.count == 30
    assert "the feed is silent × 30" in text_of(page)


def test_the_lines_are_bounded_in_number_and_length(logger, lines):
    for number in range(3 * status_page.KEPT_LINES):
        logger.warning("%d %s", number, "long " * 1000)
    kept = lines.lines()
    assert len(kept) == status_page.KEPT_LINES
    assert max(len(line.text) for line in kept) <= status_page.LINE_LENGTH + 1


def test_what_looks_like_a_key_is_hidden(logger, lines):
    logger.warning("seed %s could not be read", KEY)
    assert lines.lines()[0].text == "seed [hidden] could not be read"


# ---------------------------------------------------------------- safety


def test_nothing_from_outside_becomes_markup(page, source, requests, logger):
    evil = "<script>alert(1)</script>"
    requests.observe(record(caller=evil))
    requests.observe(record(Outcome.REFUSED, reason=evil))
    logger.warning(evil)
    source.notes, source.rung = (evil,), "prior"
    source.known = replace(
        source.known,
        warnings=(evil,),
        details=((evil, evil),),
        markets=(market(price_feed=f'"{evil}'),),
    )
    html = page.render().decode()
    assert html.count("<script>") == 1
    assert "alert(1)</script>" not in html
    assert "&lt;script&gt;" in html


def test_the_page_asks_for_nothing_from_elsewhere(page):
    html = page.render().decode()
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", html)
    assert "@import" not in html
    assert "connect-src 'self'" in HEADERS["content-security-policy"]


def test_the_policy_allows_the_pages_own_script_and_no_other(page):
    html = page.render().decode()
    (inline,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert inline == SCRIPT
    assert "script-src 'sha256-" in HEADERS["content-security-policy"]


def test_figures_are_well_formed(page):
    for figure in re.findall(rb"<svg.*?</svg>", page.render(), flags=re.DOTALL):
        ET.fromstring(figure)  # noqa: S314  # our own


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"), (-3, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"),
        (7200, "2.0 h"), (86_399, "24.0 h"), (86_400, "1.0 d"), (864_000, "10.0 d"),
    ],
)  # fmt: skip
def test_ages_are_short(seconds, text):
    assert status_page._age(seconds) == text


@pytest.mark.parametrize(
    ("price", "text"),
    [
        (None, "–"), (98_123.456, "98,123.5"), (2978.034, "2,978.03"), (187.5, "187.500"),
        (31.42, "31.4200"), (2.1034, "2.10340"), (0.00001234, "0.0000123400"),
    ],
)  # fmt: skip
def test_prices_have_the_digits_that_matter(price, text):
    assert status_page._price(price) == text
