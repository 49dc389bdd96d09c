"""Figures of a back-test, reckoned by hand from small documents."""

from copy import deepcopy

import numpy as np
import pytest

from backtest_results import (
    MIN_PROMPTS,
    SCHEMA,
    check_document,
    compare_documents,
    gap_closed,
    market_entry,
    scores_of,
    summarise,
)
from config import DAY_S, Frequency
from errors import ConfigError, DataError

FIRST = 1_764_547_200
SETTINGS = {"source": "archive", "profile": "2026-09", "train_until": None, "seed": 0, "days": 365}


def card(change, volatility=None):
    parts = {"1min": change}
    if volatility is not None:
        parts["volatility_60min"] = volatility
    return {"total": sum(parts.values()), "intervals": parts}


def prompt(index, *, pit=0.5, **scores):
    counts = [0] * 20
    counts[index % 20] = 1
    return {
        "start_ts": FIRST + index * 10 * DAY_S,
        "scores": {name: card(*np.atleast_1d(value).tolist()) for name, value in scores.items()},
        "pit": {"60": pit, "3600": None},
        "histogram": {"1min": counts},
        "model_id": "m",
        "rung": "lightgbm",
        "answer": "a",
    }


def entry(prompts, asset="BTC", frequency=Frequency.HF, bars="b"):
    return market_entry(asset, frequency, "crypto-1h", bars, prompts)


def document(*markets, **changes):
    return {"schema": SCHEMA, "settings": {**SETTINGS, **changes}, "markets": list(markets)}


# ---------------------------------------------------------------- one market


def test_a_market_is_in_time_order_and_its_histograms_are_added_up():
    found = entry([prompt(1, engine=1.0), prompt(0, engine=2.0), prompt(20, engine=3.0)])
    assert [p["start_ts"] for p in found["prompts"]] == sorted(
        p["start_ts"] for p in found["prompts"]
    )
    assert found["pit_histogram"]["1min"][:3] == [2, 1, 0]
    assert "histogram" not in found["prompts"][0]


def test_the_gap_closed_is_the_share_of_the_way_to_the_oracle():
    market = entry([prompt(i, engine=97.0, ewma_t=100.0, oracle=95.0) for i in range(3)])
    assert gap_closed(market) == pytest.approx(3 / 5)
    worse = entry([prompt(i, engine=101.0, ewma_t=100.0, oracle=95.0) for i in range(3)])
    assert gap_closed(worse) == pytest.approx(-1 / 5)


def test_there_is_no_gap_without_an_oracle_or_behind_it():
    assert gap_closed(entry([prompt(0, engine=97.0, ewma_t=100.0)])) is None
    assert gap_closed(entry([prompt(0, engine=97.0, ewma_t=100.0, oracle=101.0)])) is None


def test_there_is_no_gap_if_the_oracle_is_not_clearly_the_better_one():
    """A handful of prompts closed 384 % of a gap that was none."""
    assert gap_closed(entry([prompt(0, engine=90.0, ewma_t=100.0, oracle=97.0)])) is None
    rng = np.random.default_rng(0)
    vague = [
        prompt(i, engine=90.0, ewma_t=100.0, oracle=float(oracle))
        for i, oracle in enumerate(rng.normal(99.5, 20, 40))
    ]
    assert gap_closed(entry(vague)) is None


@pytest.mark.parametrize(
    ("prompts", "apart", "words"),
    [
        (MIN_PROMPTS, DAY_S, "beats ewma_t"),
        (MIN_PROMPTS - 1, DAY_S, "too few prompts"),
        (90, 3600, "too few prompts"),  # of four days
        (110, 3600, "beats ewma_t"),
    ],
)
def test_few_prompts_or_days_decide_nothing(prompts, apart, words):
    scored_ = [
        prompt(0, engine=90.0 + i % 3, ewma_t=100.0) | {"start_ts": FIRST + 3600 + i * apart}
        for i in range(prompts)
    ]
    assert summarise([entry(scored_)]).verdict == words


def test_the_volatility_term_is_told_apart():
    scores = {"engine": (90.0, 5.0), "ewma_t": (100.0, 10.0), "oracle": (80.0, 12.0)}
    market = entry([prompt(i, **scores) for i in range(4)])
    figures = summarise([market])
    assert scores_of(market, "engine", "intervals").tolist() == [90.0] * 4
    assert figures.parts["total"].score == 95.0
    assert figures.parts["intervals"].score == 90.0
    assert figures.parts["volatility"].score == 5.0
    assert figures.parts["volatility"].ratios["ewma_t"].ratio == pytest.approx(0.5)
    assert figures.parts["intervals"].gap_closed == pytest.approx(0.5)
    assert figures.parts["total"].gap_closed == pytest.approx(15 / 18)


def test_a_prompt_that_somebody_missed_is_left_out_of_the_figures():
    prompts = [prompt(i, engine=90.0, ewma_t=100.0) for i in range(3)]
    prompts[1]["scores"]["engine"]["total"] = None
    prompts[1]["scores"]["ewma_t"]["total"] = 1e6
    figures = summarise([entry(prompts)])
    assert figures.prompts == 2
    assert figures.parts["total"].ratios["ewma_t"].ratio == pytest.approx(0.9)


def test_coverage_is_the_share_of_outcomes_inside_and_unknown_where_nothing_is():
    pits = [0.05, 0.1, 0.5, 0.9, 0.95]
    figures = summarise([entry([prompt(i, pit=p, engine=1.0) for i, p in enumerate(pits)])])
    assert figures.coverage[60][0.8] == pytest.approx(3 / 5)
    assert figures.coverage[60][0.5] == pytest.approx(1 / 5)
    assert np.isnan(figures.coverage[3600][0.8])
    assert figures.to_dict()["coverage"]["3600"] == {"50": None, "80": None, "95": None}


@pytest.mark.parametrize(
    ("ours", "words"),
    [(90.0, "beats ewma_t"), (110.0, "loses to ewma_t"), (100.0, "level with ewma_t")],
)
def test_the_verdict_is_in_words(ours, words):
    rng = np.random.default_rng(0)
    scores = [
        prompt(i, engine=ours * noise, ewma_t=100.0 * noise)
        for i, noise in enumerate(rng.uniform(0.9, 1.1, 30))
    ]
    assert summarise([entry(scores)]).verdict == words


def test_alone_there_is_nothing_to_beat():
    figures = summarise([entry([prompt(0, engine=1.0)])])
    assert figures.verdict == "nothing to beat"
    assert figures.parts["total"].ratios == {}


# ---------------------------------------------------------------- several markets


def test_the_average_counts_every_market_the_same():
    small = entry([prompt(i, engine=0.9, ewma_t=1.0, oracle=0.8) for i in range(3)])
    large = entry(
        [prompt(i, engine=1000.0, ewma_t=1000.0, oracle=500.0) for i in range(9)], asset="ETH"
    )
    figures = summarise([small, large])
    assert figures.name == "hf average"
    assert figures.prompts == 12
    assert figures.parts["total"].score is None
    assert figures.parts["total"].ratios["ewma_t"].ratio == pytest.approx(0.95)
    assert figures.parts["total"].gap_closed == pytest.approx(0.25)


# ---------------------------------------------------------------- champion and challenger


def scored(values, **changes):
    return document(entry([prompt(i, engine=float(v)) for i, v in enumerate(values)]), **changes)


NOISE = np.random.default_rng(1).uniform(90, 110, 40)


@pytest.mark.parametrize(
    ("factor", "decision"),
    [
        (0.99, "take the challenger: its mean score is 1.00 % lower"),
        (1.01, "keep the champion: the challenger is worse, its mean score is 1.00 % higher"),
        (1.0, "keep the champion: no clear difference"),
    ],
)
def test_the_decision_follows_the_difference(factor, decision):
    contest = compare_documents(scored(NOISE), scored(factor * NOISE))
    assert contest.decision.startswith(decision)
    assert contest.overall.ratio == pytest.approx(factor)


def test_a_challenger_that_is_better_by_luck_alone_is_not_taken():
    challenger = NOISE + np.random.default_rng(2).normal(0, 20, 40)
    contest = compare_documents(scored(NOISE), scored(challenger))
    assert contest.overall.verdict == "no clear difference"


def test_only_common_prompts_count():
    champion = document(entry([prompt(i, engine=1.0) for i in range(6)]))
    challenger = document(entry([prompt(i, engine=0.5 if i < 6 else 9.0) for i in range(3, 9)]))
    contest = compare_documents(champion, challenger)
    assert contest.overall.prompts == 3
    assert contest.overall.ratio == pytest.approx(0.5)


def test_without_a_common_prompt_there_is_nothing_to_decide():
    with pytest.raises(DataError, match="no prompt of the same market in common"):
        compare_documents(
            document(entry([prompt(0, engine=1.0)])), document(entry([prompt(1, engine=1.0)]))
        )
    with pytest.raises(DataError, match="no prompt of the same market in common"):
        compare_documents(
            document(entry([prompt(0, engine=1.0)])),
            document(entry([prompt(0, engine=1.0)], asset="ETH")),
        )


@pytest.mark.parametrize(
    ("setting", "value"), [("profile", "2026-05"), ("source", "simulated"), ("train_until", "x")]
)
def test_scores_of_different_things_are_not_compared(setting, value):
    with pytest.raises(ConfigError, match=rf"cannot be compared: {setting} is .* there"):
        compare_documents(scored(NOISE), scored(NOISE, **{setting: value}))


def test_scores_of_laws_and_of_paths_are_not_compared():
    drawn, closed = scored(NOISE, closed_form=False), scored(NOISE, closed_form=True)
    for pair in ((drawn, closed), (closed, drawn), (scored(NOISE), closed)):
        with pytest.raises(ConfigError, match=r"laws in closed form.*repeat one .* --closed-form"):
            compare_documents(*pair)
    assert compare_documents(closed, closed).overall.ratio == 1.0
    assert compare_documents(scored(NOISE), drawn).overall.ratio == 1.0  # written before there were


def test_scores_on_different_bars_are_not_compared():
    other = document(entry([prompt(i, engine=float(v)) for i, v in enumerate(NOISE)], bars="c"))
    with pytest.raises(ConfigError, match="bars of BTC hf"):
        compare_documents(scored(NOISE), other)


def test_what_a_challenger_is_about_is_named():
    contest = compare_documents(scored(NOISE), scored(NOISE, seed=3))
    assert contest.other_settings == ("seed is 0 here and 3 there",)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings",), None),
        (("markets",), "x"),
        (("markets", 0, "frequency"), "daily"),
        (("markets", 0, "prompts"), []),
        (("markets", 0, "prompts", 1, "start_ts"), 10**30),
        (("markets", 0, "prompts", 1, "scores"), {}),
        (("markets", 0, "prompts", 1, "scores", "engine", "total"), "x"),
    ],
)
def test_a_damaged_document_is_refused_by_the_place_of_the_damage(path, value):
    damaged = deepcopy(scored(NOISE))
    assert check_document(damaged, "x.json") == damaged
    *parents, last = path
    entry = damaged
    for key in parents:
        entry = entry[key]
    entry[last] = value
    place = ".".join(map(str, path))
    with pytest.raises(DataError, match=rf"x\.json is damaged: {place}.* anew with --json\.$"):
        check_document(damaged, "x.json")


@pytest.mark.parametrize("wrong", [None, [], {}, {"schema": 99, "settings": {}, "markets": []}])
def test_a_file_of_something_else_is_refused(wrong):
    with pytest.raises(DataError, match=r"x\.json holds no results .* write them with --json"):
        check_document(wrong, "x.json")
