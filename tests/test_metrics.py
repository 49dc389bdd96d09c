"""What a Prometheus server reads: parsed back by the client library's own parser."""

import math
from dataclasses import replace
from itertools import product

import pytest
from prometheus_client.parser import text_string_to_metric_families

from answer_desk import AnswerRecord, Caller, DeskLoad, Outcome
from chain import ChainHealth
from config import ANCHOR_MAX_AGE_S, Frequency
from domain import Diagnostics, ForecastRequest
from metrics import CONTENT_TYPE, Metrics
from miner_facts import AxonFacts, MarketFacts, MinerFacts
from own_scores import OwnScore
from price_board import AnchorSource

NOW = 1_766_102_700.0
LOAD = DeskLoad(waiting=3, running=2, cached=7, cached_bytes=1234, seconds_per_day_answer=0.25)
OWN = OwnScore(
    answers=12, score=490.0, ewma_t=500.0, covered=0.79, covered_by_interval={}, course=()
)
TRAINED = MarketFacts(
    asset="BTC",
    frequency=Frequency.HF,
    last_bar_ts=int(NOW) - 70,
    price=98_000.5,
    price_ts=int(NOW) - 4,
    price_feed="binance:BTCUSDT",
    scored_ts=int(NOW) - 900,
    trained_until=int(NOW) - 7200,
    is_due=False,
    own=OWN,
    calibration={"scale 5 min": 1.04},
)
BARE = MarketFacts(
    asset="XAU",
    frequency=Frequency.LF,
    last_bar_ts=None,
    price=None,
    price_ts=None,
    price_feed=None,
    trained_until=None,
    is_due=True,
)
FACTS = MinerFacts(now=NOW, source="venue", is_live=True, markets=(TRAINED, BARE))


def record(outcome=Outcome.COMPUTED, asset="BTC", ms=41.0, anchor="quote", age_s=0):
    answered = outcome in (Outcome.COMPUTED, Outcome.REPEATED)
    return AnswerRecord(
        at=NOW,
        caller=Caller(name="5Validator", transport="axon"),
        outcome=outcome,
        ms=ms,
        request=ForecastRequest(
            asset=asset, start_ts=1_766_102_700, increment_s=60, length_s=3600, num_paths=9
        ),
        diagnostics=Diagnostics(
            rung="lightgbm",
            frequency="hf",
            anchor_price=1.0,
            anchor_ts=0,
            price_age_s=age_s,
            model_id=None,
            trained_until=None,
            models_saw_later_bars=False,
            anchor_source=anchor,
        )
        if answered
        else None,
    )


def scraped(metrics):
    """Every sample by its name and labels."""
    return {
        (sample.name.removeprefix("lgbm_miner_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
    }


@pytest.fixture
def metrics():
    return Metrics(lambda: FACTS, lambda: LOAD, lost=lambda: 5)


def test_ages_prices_models_and_scores_are_told_by_market(metrics):
    found = scraped(metrics)
    assert found["bar_age_seconds", "BTC", "hf"] == 70
    assert found["price_age_seconds", "BTC", "hf"] == 4
    assert found["price", "BTC", "hf"] == 98_000.5
    assert found["has_price", "BTC", "hf"] == 1
    assert found["scored_price_age_seconds", "BTC", "hf"] == 900
    assert found["model_age_seconds", "BTC", "hf"] == 7200
    assert found["own_crps_bp", "BTC", "hf"] == 490
    assert found["ewma_t_crps_bp", "BTC", "hf"] == 500
    assert found["own_crps_ratio", "BTC", "hf"] == 0.98
    assert found["own_coverage_80", "BTC", "hf"] == 0.79
    assert found["calibration", "BTC", "hf", "scale 5 min"] == 1.04


def test_what_is_unknown_is_left_out_not_told_as_zero(metrics):
    found = scraped(metrics)
    assert found["model_trained", "XAU", "lf"] == 0
    assert found["training_due", "XAU", "lf"] == 1
    assert found["has_price", "XAU", "lf"] == 0
    assert found["scored_price_age_seconds", "XAU", "lf"] == math.inf  # so that an alert sees it
    told = {name for name, *labels in found if "XAU" in labels}
    assert told == {"model_trained", "training_due", "has_price", "scored_price_age_seconds"}


def test_queue_memory_and_losses_are_told(metrics):
    found = scraped(metrics)
    assert found["queue_waiting",] == 3
    assert found["queue_running",] == 2
    assert found["cached_bytes",] == 1234
    assert found["ledger_lost",] == 5
    assert found["ready",] == 1
    assert found["process_resident_memory_bytes",] > 1e6
    memory = metrics.memory_bytes()
    assert memory is not None
    assert memory > 1e6


def test_the_clocks_offset_is_told_where_somebody_knows_it(metrics):
    assert ("clock_offset_seconds",) not in scraped(metrics)
    off = replace(FACTS, clock_offset_s=-12.5)
    assert scraped(Metrics(lambda: off, lambda: LOAD))["clock_offset_seconds",] == -12.5


def test_a_scored_feed_that_fails_is_told_by_name(metrics):
    assert not any("feed_failing" in name for name in scraped(metrics))
    failing = replace(FACTS, failing_feeds=("hyperliquid:xyz:GOLD",))
    found = scraped(Metrics(lambda: failing, lambda: LOAD))
    assert found["feed_failing", "hyperliquid:xyz:GOLD"] == 1


def test_feeds_whose_bars_the_disk_refuses_are_counted(metrics):
    assert scraped(metrics)["unsaved_feeds",] == 0
    unsaved = replace(FACTS, unsaved_feeds=("binance:BTCUSDT", "binance:ETHUSDT"))
    assert scraped(Metrics(lambda: unsaved, lambda: LOAD))["unsaved_feeds",] == 2


def test_a_miner_that_cannot_answer_is_not_ready():
    idle = replace(FACTS, markets=(), obstacles=("no asset has any bars yet",))
    assert scraped(Metrics(lambda: idle, lambda: LOAD))["ready",] == 0


def test_answers_are_counted_by_outcome_rung_and_time(metrics):
    for outcome in (Outcome.COMPUTED, Outcome.REPEATED, Outcome.TOO_LATE, Outcome.COMPUTED):
        metrics.observe(record(outcome))
    found = scraped(metrics)
    assert found["requests_total", "axon", "computed"] == 2
    assert found["requests_total", "axon", "too_late"] == 1
    assert found["answers_total", "BTC", "hf", "lightgbm"] == 3
    assert found["answer_seconds_count", "computed", "hf"] == 2
    assert found["answer_seconds_sum", "computed", "hf"] == pytest.approx(0.082)
    assert found["answer_seconds_bucket", "0.05", "computed", "hf"] == 2
    assert found["answer_seconds_bucket", "0.025", "computed", "hf"] == 0


@pytest.mark.parametrize(
    ("age_s", "stale"), [(ANCHOR_MAX_AGE_S, "false"), (ANCHOR_MAX_AGE_S + 1, "true")]
)
@pytest.mark.parametrize("source", list(AnchorSource))
def test_answers_are_counted_by_the_step_of_the_price_ladder(metrics, source, age_s, stale):
    for outcome in (Outcome.COMPUTED, Outcome.REPEATED, Outcome.NO_PRICE):
        metrics.observe(record(outcome, anchor=source.value, age_s=age_s))
    anchors = {key[1:]: n for key, n in scraped(metrics).items() if "by_anchor_total" in key[0]}
    assert anchors == {tuple(sorted(("BTC", source.value, stale))): 2}


def test_every_outcome_is_counted_from_zero_on(metrics):
    """A series that begins with its first event shows Prometheus no rise."""
    counted = {key[1:]: n for key, n in scraped(metrics).items() if key[0] == "requests_total"}
    pairs = product(("axon", "http"), (outcome.value for outcome in Outcome))
    assert counted == {tuple(sorted(pair)): 0 for pair in pairs}


def test_no_caller_can_make_up_labels(metrics):
    for number in range(50):
        metrics.observe(record(asset=f"MADE-UP-{number}"))
        metrics.observe(record(Outcome.REFUSED, asset=f"MADE-UP-{number}"))
    text = metrics.page().decode()
    assert "MADE-UP" not in text
    assert "5Validator" not in text
    assert scraped(metrics)["answers_total", "hf", "lightgbm", "other"] == 50


def test_two_miners_in_one_process_count_apart(metrics):
    metrics.observe(record())
    other = Metrics(lambda: FACTS, lambda: LOAD)
    assert ("answers_total", "BTC", "hf", "lightgbm") not in scraped(other)


def test_every_name_says_whose_it_is(metrics):
    metrics.observe(record())
    names = {family.name for family in text_string_to_metric_families(metrics.page().decode())}
    assert all(name.startswith(("lgbm_miner_", "process_")) for name in names)
    assert CONTENT_TYPE.startswith("text/plain")


def test_a_score_without_a_yardstick_is_no_number():
    odd = replace(TRAINED, own=replace(OWN, ewma_t=0.0))
    facts = replace(FACTS, markets=(odd,))
    found = scraped(Metrics(lambda: facts, lambda: LOAD))
    assert math.isnan(found["own_crps_ratio", "BTC", "hf"])


# ---------------------------------------------------------------- the axon

AXON_NAMES = {"axon_up", "chain_age_seconds", "registered"}


def of_axon(axon):
    facts = replace(FACTS, axon=axon)
    found = scraped(Metrics(lambda: facts, lambda: LOAD))
    return {name: value for (name, *_), value in found.items() if name in AXON_NAMES}


def test_without_an_axon_nothing_is_told_of_one():
    assert of_axon(None) == {}


def test_an_axon_without_a_chain_tells_only_whether_it_listens():
    assert of_axon(AxonFacts(port=8091, is_up=True, chain=None)) == {"axon_up": 1}
    assert of_axon(AxonFacts(port=8091, is_up=False, chain=None)) == {"axon_up": 0}


@pytest.mark.parametrize(("uid", "registered"), [(7, 1), (None, 0)])
def test_the_age_of_the_chain_and_our_place_on_it_are_told(uid, registered):
    chain = ChainHealth(age_s=42.0, uid=uid, fault=None)
    found = of_axon(AxonFacts(port=8091, is_up=True, chain=chain))
    assert found == {"axon_up": 1, "chain_age_seconds": 42, "registered": registered}


def test_a_chain_that_was_never_read_is_infinitely_old_and_registers_nobody():
    chain = ChainHealth(age_s=None, uid=None, fault="down.")
    found = of_axon(AxonFacts(port=8091, is_up=True, chain=chain))
    assert found == {"axon_up": 1, "chain_age_seconds": math.inf}
