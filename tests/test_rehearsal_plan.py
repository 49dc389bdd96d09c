"""What a rehearsal asks, and how it judges answers."""

from collections import Counter

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import NUM_PATHS, Frequency
from domain import Diagnostics, Forecast
from http_service import read_body, read_request
from protocol import protocol_profile
from rehearsal_plan import (
    CADENCE_MIN,
    DEADLINE_S,
    Ask,
    Fate,
    Prompt,
    asked_pairs,
    official_cadence,
    read_answer,
    tally,
    usual_request,
)
from wire_format import encode_shadow_answer

PROFILE = protocol_profile("2026-09")
START = 1_766_102_400
ASSETS = ("BTC", "ETH", "SOL", "XRP", "HYPE", "XAU", "SP500")


def cadence(assets=ASSETS, minutes=60, seed=0, start=START):
    return official_cadence(PROFILE, assets, start, start + 60 * minutes, seed=seed)


# ---------------------------------------------------------------- prompts


def test_an_hour_has_as_many_prompts_as_validators_ask():
    counts = Counter(prompt.pair for prompt in cadence(("BTC", "ETH", "XAU")))
    assert counts == {
        ("BTC", Frequency.HF): 60,
        ("ETH", Frequency.HF): 12,
        ("BTC", Frequency.LF): 15,
        ("ETH", Frequency.LF): 5,
        ("XAU", Frequency.LF): 5,
    }


@given(st.integers(1_500_000_000, 2_000_000_000), st.integers(1, 90))
def test_prompts_are_evenly_spaced_whole_minutes_asked_so_long_before(start, minutes):
    prompts = cadence(minutes=minutes, start=start)
    asked = [prompt.asked_ts for prompt in prompts]
    assert asked == sorted(asked)
    assert all(start <= ts < start + 60 * minutes for ts in asked)
    for asset, frequency in asked_pairs(PROFILE, ASSETS):
        of_it = [prompt for prompt in prompts if prompt.pair == (asset, frequency)]
        starts = [prompt.request.start_ts for prompt in of_it]
        every = CADENCE_MIN[frequency].get(asset, CADENCE_MIN[frequency][None])
        assert set(np.diff(starts).tolist()) <= {60 * every}
        assert all(
            prompt.request.start_ts - prompt.asked_ts == DEADLINE_S[frequency] for prompt in of_it
        )


@given(st.sets(st.sampled_from(ASSETS), min_size=1))
def test_an_asset_is_asked_the_same_whoever_else_is(assets):
    some = cadence(tuple(assets))
    assert some == [prompt for prompt in cadence() if prompt.request.asset in assets]


def test_some_prompts_are_asked_by_several_validators_the_same_ones_every_time():
    prompts = cadence(minutes=600)
    repeated = np.mean([prompt.callers > 1 for prompt in prompts])
    assert repeated == pytest.approx(0.1, abs=0.03)
    assert prompts == cadence(minutes=600)
    assert prompts != cadence(minutes=600, seed=1)


def test_the_miner_reads_a_prompt_as_it_was_meant():
    for prompt in cadence(minutes=12):
        body = read_body(orjson.dumps(prompt.body()))
        wanted, origin, budget_s = read_request(body, prompt.asked_ts)
        assert (wanted, origin, budget_s) == (prompt.request, None, prompt.deadline_s)


# ---------------------------------------------------------------- answers

REQUEST = usual_request("BTC", Frequency.HF, START)


@pytest.fixture(scope="module")
def answer():
    rng = np.random.default_rng(0)
    moves = rng.normal(0, 1e-3, (NUM_PATHS, REQUEST.n_points)).cumsum(axis=1)
    diagnostics = Diagnostics(
        rung="lightgbm",
        frequency="hf",
        anchor_price=97_000.5,
        anchor_ts=START - 60,
        price_age_s=5,
        model_id="abc",
        trained_until=START - 3600,
        models_saw_later_bars=False,
        anchor_source="quote",
    )
    paths = 97_000 * np.exp(moves)
    return encode_shadow_answer(Forecast(request=REQUEST, paths=paths, diagnostics=diagnostics))


@pytest.mark.parametrize("thoroughly", [False, True])
def test_a_good_answer_has_no_fault_and_tells_how_it_was_made(answer, thoroughly):
    read = read_answer(answer, REQUEST, thoroughly=thoroughly)
    assert read.fault is None
    assert (read.rung, read.anchor, read.model_version) == ("lightgbm", "quote", "abc")


def spoil(answer, change):
    document = orjson.loads(answer)
    change(document)
    return orjson.dumps(document)


def set_price(document, value):
    document["paths"][3][7] = value


FAULTS = {
    "another asset": lambda d: d.update(asset="ETH"),
    "other times": lambda d: d["timestamps"].reverse(),
    "another start": lambda d: d.update(data_cutoff="2025-01-01T00:00:00+00:00"),
    "a path too few": lambda d: d["paths"].pop(),
    "a point too few": lambda d: d["paths"][9].pop(),
    "too many digits": lambda d: set_price(d, 97_000.1234),
    "a zero": lambda d: set_price(d, 0.0),
    "a negative price": lambda d: set_price(d, -1.0),
    "no number": lambda d: set_price(d, None),
    "text": lambda d: set_price(d, "high"),
    "another first price": lambda d: d["paths"][5].__setitem__(0, 97_001.0),
    "no diagnostics": lambda d: d.pop("diagnostics"),
    "no paths": lambda d: d.pop("paths"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_answer_that_a_validator_would_refuse_is_at_fault(answer, name):
    assert read_answer(spoil(answer, FAULTS[name]), REQUEST).fault


def test_a_price_of_the_wrong_type_is_found_number_by_number(answer):
    spoiled = spoil(answer, lambda d: set_price(d, value=True))
    assert "not a plain int or float" in str(read_answer(spoiled, REQUEST, thoroughly=True).fault)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b"<html>", b'{"asset": "BTC"}'])
def test_what_is_no_answer_at_all_is_at_fault(body):
    assert read_answer(body, REQUEST).fault


# ---------------------------------------------------------------- asks


def prompt_at(minute, callers=1, frequency=Frequency.HF):
    request = usual_request("BTC", frequency, START + 60 * minute)
    return Prompt(frequency=frequency, request=request, callers=callers)


def test_asks_are_counted_by_fate_and_timed_where_they_were_answered():
    asks = [
        *(
            Ask(prompt=prompt_at(n), fate=Fate.IN_TIME, seconds=n / 1000, digest=str(n), rung="a")
            for n in range(1, 101)
        ),
        Ask(prompt=prompt_at(101), fate=Fate.REFUSED, seconds=9.0, reason="503: no price"),
        Ask(prompt=prompt_at(102), fate=Fate.UNHEARD, seconds=60.0),
    ]
    (found,) = tally(asks).values()
    assert (found.prompts, found.asks) == (102, 102)
    assert found.fates[Fate.IN_TIME] == 100
    assert found.fates[Fate.REFUSED] == found.fates[Fate.UNHEARD] == 1
    assert found.p50_ms == pytest.approx(50.5)
    assert found.max_ms == pytest.approx(100)
    assert found.rungs == {"a": 100}
    assert not found.is_clean


def test_callers_of_one_prompt_must_get_the_same_bytes():
    prompt = prompt_at(1, callers=3)
    same = [Ask(prompt=prompt, fate=Fate.IN_TIME, seconds=0.1, digest="x") for _ in range(3)]
    assert tally(same)[prompt.pair].is_clean
    other = [*same[:2], Ask(prompt=prompt, fate=Fate.IN_TIME, seconds=0.1, digest="y")]
    assert tally(other)[prompt.pair].disagreements == 1
    assert not tally(other)[prompt.pair].is_clean


def test_without_an_answer_there_is_no_latency():
    (found,) = tally([Ask(prompt=prompt_at(1), fate=Fate.UNHEARD, seconds=60.0)]).values()
    assert np.isnan(found.p50_ms)
    assert not found.is_clean
