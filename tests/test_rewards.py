"""Scores of a field to rewards, reckoned by hand for both protocols."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import ASSETS, DAY_S
from protocol import PROTOCOL_PROFILES
from rewards import (
    FieldScores,
    ScoredPrompt,
    combined_rewards,
    competition_rewards,
    field_scores,
    leaderboard,
    softmax_rewards,
)

NEW = PROTOCOL_PROFILES["2026-09"]
OLD = PROTOCOL_PROFILES["2026-05"]
NOW = 1_760_000_000


def points(totals, profile):
    return field_scores(np.array(totals, dtype=float), profile).points.tolist()


def test_the_best_score_is_subtracted():
    assert points([12, 10, 15], NEW) == [2, 0, 5]


def test_a_miss_gets_the_95th_percentile_of_those_who_answered():
    # Of 10, 20, 30, 40, 50 the 95th percentile is 40 + 0.8 · 10 = 48.
    field = field_scores(np.array([10.0, 20, 30, 40, 50, -1]), NEW)
    assert field.points.tolist() == pytest.approx([0, 10, 20, 30, 40, 38])
    assert field.miss == pytest.approx(38)


@pytest.mark.parametrize("miss", [-1.0, np.nan, np.inf])
def test_every_kind_of_miss_is_one(miss):
    assert points([10, 20, miss], NEW) == pytest.approx([0, 10, 9.5])


def test_a_score_above_ten_medians_is_clipped_and_does_not_raise_the_price_of_a_miss():
    # Median of 10, 12, 14, 16, 1e30 is 14: the limit is 140. A miss: 95th percentile of
    # 10, 12, 14, 16 is 14 + 0.85 · 2 = 15.7.
    assert points([10, 12, 14, 16, 1e30, -1], NEW) == pytest.approx([0, 2, 4, 6, 130, 5.7])


def test_the_old_protocol_caps_all_scores_at_the_90th_percentile():
    # Of 10, 20, 30, 40, 50 the 90th percentile is 40 + 0.6 · 10 = 46.
    assert points([10, 20, 30, 40, 50, -1], OLD) == pytest.approx([0, 10, 20, 30, 36, 36])


def test_the_old_protocol_does_not_clip_at_the_median():
    # The 90th percentile of 1, 1, 1000 is 1 + 0.8 · 999 = 800.2, and there it caps.
    assert points([1, 1, 1000], OLD) == pytest.approx([0, 0, 799.2])
    assert points([1, 1, 1000], NEW) == pytest.approx([0, 0, 9])


def test_a_prompt_that_everybody_missed_counts_for_nobody():
    missed = field_scores(np.array([-1.0, np.nan]), NEW)
    scored = FieldScores(points=np.array([0.0, 3.0]), miss=3.0)
    assert np.isnan(missed.points).all()
    assert leaderboard([missed, scored], np.ones(2)).tolist() == [0, 3]


def test_the_leaderboard_weighs_prompts_by_asset():
    fields = [
        FieldScores(points=np.array([0.0, 4.0]), miss=4.0),
        FieldScores(points=np.array([6.0, 0.0]), miss=6.0),
    ]
    # (1·0 + 2·6) / 3 and (1·4 + 2·0) / 3
    assert leaderboard(fields, np.array([1.0, 2.0])).tolist() == pytest.approx([4, 4 / 3])


def test_a_newcomer_is_back_filled_with_misses_and_a_later_gap_is_not():
    fields = [
        FieldScores(points=np.array([0.0, np.nan, 1.0]), miss=9.0),
        FieldScores(points=np.array([0.0, 2.0, np.nan]), miss=5.0),
        FieldScores(points=np.array([0.0, 4.0, 3.0]), miss=7.0),
    ]
    # Second: (9 + 2 + 4) / 3. Third: (1 + 3) / 2, its gap counts for nothing.
    assert leaderboard(fields, np.ones(3)).tolist() == pytest.approx([0, 5, 2])


def test_one_that_never_came_earns_nothing():
    fields = [FieldScores(points=np.array([0.0, np.nan]), miss=9.0)]
    scores = leaderboard(fields, np.ones(1))
    assert scores.tolist() == [0, np.inf]
    assert softmax_rewards(scores, -0.3).tolist() == [1, 0]


def test_rewards_are_a_softmax_of_scores():
    # exp(-0.3 · 0) : exp(-0.3 · ln 2 / 0.3) = 2 : 1
    shares = softmax_rewards(np.array([0.0, np.log(2) / 0.3]), -0.3)
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3])


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=20), st.floats(-1e3, 1e3))
def test_shares_add_up_to_one_and_a_common_shift_changes_none(scores, shift):
    shares = softmax_rewards(np.array(scores), -0.15)
    assert shares.sum() == pytest.approx(1)
    assert softmax_rewards(np.array(scores) + shift, -0.15) == pytest.approx(shares, abs=1e-6)


@given(st.lists(st.floats(0.1, 1e3) | st.just(-1.0), min_size=1, max_size=30))
def test_points_keep_the_ranking_and_none_is_below_the_best(totals):
    for profile in (NEW, OLD):
        found = np.array(points(totals, profile))
        answered = np.array(totals) >= 0
        if not answered.any():
            assert np.isnan(found).all()
            continue
        assert found.min() == 0
        order = np.argsort(np.array(totals)[answered], kind="stable")
        assert (np.diff(found[answered][order]) >= 0).all()


def test_one_competition_from_prompts_to_shares():
    competition = NEW.competitions["crypto-1h"]
    prompts = [
        ScoredPrompt(asset="BTC", scored_ts=NOW - DAY_S, totals={"us": 100.0, "them": 101.0}),
        ScoredPrompt(asset="ETH", scored_ts=NOW - 2 * DAY_S, totals={"us": 205.0, "them": 200.0}),
        ScoredPrompt(asset="BTC", scored_ts=NOW - 6 * DAY_S, totals={"us": 900.0, "them": 1.0}),
    ]
    # The last one has left the window of five days.
    eth = ASSETS["ETH"].weight
    us, them = 5 * eth / (1 + eth), 1 / (1 + eth)
    ratio = np.exp(-0.3 * (us - them))
    found = competition_rewards(prompts, competition, NEW, NOW)
    assert found["us"] / found["them"] == pytest.approx(ratio)
    assert sum(found.values()) == pytest.approx(1)


def test_a_miner_that_joined_late_pays_for_the_prompts_before():
    competition = NEW.competitions["crypto-24h"]
    early = ScoredPrompt(asset="BTC", scored_ts=NOW - 2, totals={"a": 10.0, "b": 20.0})
    late = ScoredPrompt(asset="BTC", scored_ts=NOW - 1, totals={"a": 10.0, "b": 20.0, "c": 10.0})
    found = competition_rewards([late, early], competition, NEW, NOW)
    # c: (9.5 + 0) / 2, a miss on the first prompt being the 95th percentile of 10 and 20.
    assert found["c"] / found["a"] == pytest.approx(np.exp(-0.15 * 4.75))


def test_no_prompt_in_the_window_pays_nobody():
    old = ScoredPrompt(asset="BTC", scored_ts=NOW - 30 * DAY_S, totals={"a": 1.0})
    assert competition_rewards([old], NEW.competitions["crypto-1h"], NEW, NOW) == {}


@pytest.mark.parametrize(("profile", "share"), [(NEW, 1 / 3), (OLD, 1 / 2)])
def test_competitions_are_added_by_their_share(profile, share):
    first, second = list(profile.competitions)[:2]
    found = combined_rewards({first: {"a": 0.75, "b": 0.25}, second: {"b": 1.0}}, profile)
    assert found == pytest.approx({"a": 0.75 * share, "b": 1.25 * share})


def test_one_percent_of_an_hourly_score_is_worth_a_factor_of_about_five():
    competition = NEW.competitions["crypto-1h"]
    prompt = ScoredPrompt(asset="BTC", scored_ts=NOW, totals={"a": 550.0, "b": 555.5})
    found = competition_rewards([prompt], competition, NEW, NOW)
    assert found["a"] / found["b"] == pytest.approx(np.exp(0.3 * 5.5))
    assert 5 < found["a"] / found["b"] < 5.5
