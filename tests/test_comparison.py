"""Paired comparisons: ratios by hand, and errors that allow for shared time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison import PairedScores, compare_markets, compare_scores, newey_west_error
from config import DAY_S

FAR_APART = 10 * DAY_S
HOUR = 3600


def apart(n, spacing=FAR_APART):
    return 1_700_000_000 + spacing * np.arange(n)


def test_the_ratio_is_that_of_the_means():
    found = compare_scores(np.array([1.0, 5.0]), np.array([2.0, 6.0]), apart(2), horizon_s=HOUR)
    assert found.ratio == pytest.approx(6 / 8)
    assert (found.wins, found.prompts) == (1.0, 2)


def test_prompts_far_apart_have_the_error_of_independent_ones():
    values = np.random.default_rng(1).normal(size=50)
    expected = values.std(ddof=1) / np.sqrt(50)
    assert newey_west_error(values, apart(50), horizon_s=HOUR) == pytest.approx(expected)


def test_prompts_at_the_same_time_count_once():
    values = np.random.default_rng(2).normal(size=200)
    once = newey_west_error(values, apart(200), horizon_s=HOUR)
    twice = newey_west_error(np.repeat(values, 2), np.repeat(apart(200), 2), horizon_s=HOUR)
    assert twice == pytest.approx(once, rel=0.01)


def test_the_error_of_overlapping_windows_is_near_the_true_one():
    """Means of moving sums over four steps, simulated, against what the estimator says."""
    rng = np.random.default_rng(3)
    width, n = 4, 400
    series = rng.normal(size=(300, n + width))
    sums = np.stack([row.cumsum()[width:] - row.cumsum()[:-width] for row in series])
    truth = sums.mean(axis=1).std(ddof=1)
    times = apart(n, spacing=DAY_S)
    estimates = [newey_west_error(row, times, horizon_s=width * DAY_S) for row in sums[:60]]
    naive = sums[0].std(ddof=1) / np.sqrt(n)
    assert naive < 0.6 * truth
    # Bartlett's kernel gives overlap less than its full weight, so it stays a little below.
    assert 0.8 * truth < np.mean(estimates) < 1.1 * truth


def test_uneven_spacing_is_judged_by_the_clock_and_not_by_position():
    values = np.array([1.0, 1.0, -1.0, -1.0])
    together = np.array([0, HOUR, FAR_APART, FAR_APART + HOUR])
    mixed = np.array([0, FAR_APART, HOUR, FAR_APART + HOUR])
    alike = newey_west_error(values, together, horizon_s=HOUR)
    opposed = newey_west_error(values, mixed, horizon_s=HOUR)
    assert opposed < 0.5 * alike


@given(st.permutations(range(12)))
def test_the_order_of_prompts_does_not_matter(order):
    values = np.random.default_rng(4).normal(size=12)
    times, order = apart(12, spacing=HOUR), np.array(order)
    given_order = newey_west_error(values, times, horizon_s=HOUR)
    assert newey_west_error(values[order], times[order], horizon_s=HOUR) == pytest.approx(
        given_order
    )


def market(seed, start=0):
    rng = np.random.default_rng(seed)
    against = rng.uniform(1, 2, 100)
    return PairedScores(
        scores=against * rng.uniform(0.8, 1.1, 100), against=against, start_ts=start + apart(100)
    )


def test_the_same_market_twice_is_no_more_certain_than_once():
    once = compare_markets([market(5)], horizon_s=HOUR)
    twice = compare_markets([market(5), market(5)], horizon_s=HOUR)
    assert twice.error == pytest.approx(once.error)
    assert twice.ratio == pytest.approx(once.ratio)


def test_markets_at_other_times_add_certainty():
    one, other = market(5), market(6, start=100 * FAR_APART)
    errors = [compare_markets([each], horizon_s=HOUR).error for each in (one, other)]
    both = compare_markets([one, other], horizon_s=HOUR)
    assert both.error == pytest.approx(np.hypot(errors[0], errors[1]) / 2)
    assert both.prompts == 200


def test_a_market_with_large_scores_counts_no_more_than_another():
    small, large = market(5), market(6)
    large = PairedScores(
        scores=1e6 * large.scores, against=1e6 * large.against, start_ts=large.start_ts
    )
    ratios = [compare_markets([each], horizon_s=HOUR).ratio for each in (small, large)]
    assert compare_markets([small, large], horizon_s=HOUR).ratio == pytest.approx(np.mean(ratios))


def test_equals_are_called_so():
    scores = np.arange(1.0, 9.0)
    found = compare_scores(scores, scores, apart(8), horizon_s=HOUR)
    assert (found.ratio, found.errors, found.p_value) == (1.0, 0.0, 1.0)
    assert found.verdict == "no clear difference"


def test_one_prompt_proves_nothing():
    found = compare_scores(np.array([1.0]), np.array([2.0]), apart(1), horizon_s=HOUR)
    assert found.error == np.inf
    assert found.p_value == 1.0
    assert found.verdict == "no clear difference"


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "better"), (1.1, "worse")])
def test_a_steady_difference_is_decisive(factor, verdict):
    against = np.random.default_rng(7).uniform(1, 2, 40)
    found = compare_scores(factor * against, against, apart(40), horizon_s=HOUR)
    assert found.verdict == verdict
    assert found.p_value < 1e-6


def test_two_standard_errors_are_five_percent():
    # ±1 around a mean shift of exactly two standard errors.
    noise = np.tile([1.0, -1.0], 50)
    error = noise.std(ddof=1) / 10
    against = np.full(100, 100.0)
    found = compare_scores(against + noise - 2.001 * error, against, apart(100), horizon_s=HOUR)
    assert found.errors == pytest.approx(-2.001)
    assert found.p_value == pytest.approx(0.0454, abs=3e-4)
    assert found.verdict == "better"
