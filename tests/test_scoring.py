"""The score is the validator's, by hand, by a slow second opinion and by its symmetries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properscoring import crps_ensemble as slow_crps

from config import Frequency
from errors import DataError
from protocol import PROTOCOL_PROFILES, Competition, IntervalKind, ScoringInterval
from scoring import (
    block_volatility,
    crps_ensemble,
    interval_changes,
    interval_steps,
    score_paths,
)

COMPETITIONS = [
    pytest.param(entry, id=f"{profile.name}-{entry.name}")
    for profile in PROTOCOL_PROFILES.values()
    for entry in profile.competitions.values()
]
HOUR = PROTOCOL_PROFILES["2026-09"].competitions["crypto-1h"]
DAY = PROTOCOL_PROFILES["2026-09"].competitions["crypto-24h"]


def random_walks(seed: int, n_paths: int, n_points: int) -> np.ndarray:
    """Prices of about 20 to 20000; shape (n_paths, n_points)."""
    rng = np.random.default_rng(seed)
    moves = rng.standard_t(3, (n_paths, n_points)) * rng.uniform(1e-4, 3e-3, (n_paths, 1))
    return rng.uniform(20, 20_000) * np.exp(np.cumsum(moves, axis=1))


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("ensemble", "observed", "expected"),
    [
        ([1, 3], 2, 1 - 0.5),
        ([1, 3], 0, 2 - 0.5),
        ([1, 2, 4], 2, 1 - 12 / 18),  # the "fair" estimator would say 0
        ([4, 2, 1], 5, 8 / 3 - 12 / 18),
        ([7], 4, 3),
        ([5, 5, 5], 5, 0),
    ],
)
def test_crps_of_a_small_ensemble_is_what_one_finds_by_hand(ensemble, observed, expected):
    columns = np.array(ensemble, dtype=float)[:, None]
    assert crps_ensemble(np.array([float(observed)]), columns)[0] == pytest.approx(expected)


def test_a_tiny_day_is_scored_as_by_hand():
    paths = np.array([[100, 101, 102.01], [100, 99, 98.01]])
    card = score_paths(paths, np.array([100.0, 100, 100]), DAY, increment_s=300)
    # Two changes: {+100, -100} against 0 is 100 - 50 each. The last price:
    # {102.01, 98.01} against 100 is 2 - 1, which is 100 bps of 100.
    expected = {"5min": 100, "30min": 0, "3hour": 0, "24hour_abs": 100}
    assert card.by_interval == pytest.approx(expected)
    assert card.total == pytest.approx(200)
    assert not card.miss


def test_volatility_counts_with_the_networks_factors_as_by_hand():
    zigzag = 100 * np.cumprod([1, 1.01, 0.99, 1.01, 0.99, 1.01])
    paths = np.array([zigzag, np.full(6, 100.0)])
    card = score_paths(paths, np.full(6, 100.0), HOUR, increment_s=60)
    volatility = np.sqrt((3 * 80**2 + 2 * 120**2) / 4)  # of +100 -100 +100 -100 +100
    assert card.by_interval["volatility_5min"] == pytest.approx(5.25 / 36 * volatility / 4)
    assert card.by_interval["volatility_15min"] == card.by_interval["volatility_60min"] == 0
    assert card.total == pytest.approx(sum(card.by_interval.values()))


def test_each_block_length_has_its_own_factor():
    paths = random_walks(1, 40, 61)
    realised = random_walks(2, 1, 61)[0]
    card = score_paths(paths, realised, HOUR, increment_s=60)
    for minutes, factor in ((60, 5.25 / 3), (15, 5.25 / 12), (5, 5.25 / 36)):
        observed = block_volatility(realised[None], minutes)[0]
        crps = crps_ensemble(observed, block_volatility(paths, minutes)).sum()
        assert card.by_interval[f"volatility_{minutes}min"] == pytest.approx(factor * crps)
        assert len(observed) == 60 // minutes


def test_a_gap_interval_takes_the_first_change_only():
    prices = np.array([[100.0, 110, 120, 150, 90]])
    assert interval_changes(prices, 2, IntervalKind.GAP) == pytest.approx(np.array([[2000]]))
    assert interval_changes(prices, 2, IntervalKind.CHANGE) == pytest.approx(
        np.array([[2000, -2500]])
    )
    assert interval_changes(prices, 2, IntervalKind.ABSOLUTE).tolist() == [[120, 90]]


@pytest.mark.parametrize(("n_points", "steps"), [(61, 60), (60, 59), (10, 9), (2, 1), (121, 60)])
def test_an_absolute_interval_is_shortened_until_a_point_is_left(n_points, steps):
    interval = ScoringInterval(name="60min_abs", seconds=3600, kind=IntervalKind.ABSOLUTE)
    assert interval_steps(interval, 60, n_points) == steps


def test_other_intervals_are_dropped_where_the_path_is_too_short():
    interval = ScoringInterval(name="3hour", seconds=10_800, kind=IntervalKind.CHANGE)
    assert interval_steps(interval, 300, 10) == 36
    assert interval_changes(np.ones((3, 10)), 36, IntervalKind.CHANGE).shape == (3, 0)


# ---------------------------------------------------------------- a slow second opinion


def slow_score(paths: np.ndarray, x: np.ndarray, competition: Competition, increment_s: int):
    """The rules once more, one observation at a time, told from the names of the intervals."""
    total = 0.0
    for interval in competition.intervals:
        k = interval.seconds // increment_s
        factor = 1.0
        if interval.name.endswith("_abs"):
            while len(x[::k][1:]) == 0:
                k -= 1
            simulated, observed = paths[:, ::k][:, 1:], x[::k][1:]
            factor = 1e4 / [price for price in x if not np.isnan(price)][-1]
        else:
            simulated = (paths[:, k::k] / paths[:, :-k:k] - 1) * 1e4
            observed = (x[k::k] / x[:-k:k] - 1) * 1e4
            if interval.name.endswith("_gaps"):
                simulated, observed = simulated[:, :1], observed[:1]
        for j, value in enumerate(observed):
            if not np.isnan(value):
                total += factor * slow_crps(value, simulated[:, j])
    for block_s, factor in competition.volatility_weights:
        total += factor * slow_volatility_score(paths, x, block_s // increment_s)
    return total


def slow_volatility_score(paths: np.ndarray, x: np.ndarray, steps: int) -> float:
    simulated = (paths[:, 1:] / paths[:, :-1] - 1) * 1e4
    observed = (x[1:] / x[:-1] - 1) * 1e4
    total = 0.0
    for begin in range(0, len(observed) - steps + 1, steps):
        block = observed[begin : begin + steps]
        known = block[~np.isnan(block)]
        if len(known) >= 2:
            ensemble = np.array([np.std(path[begin : begin + steps], ddof=1) for path in simulated])
            total += slow_crps(np.std(known, ddof=1), ensemble)
    return total


@pytest.mark.parametrize("competition", COMPETITIONS)
@given(data=st.data())
@settings(max_examples=30)
def test_the_score_equals_a_slow_reading_of_the_rules(competition, data):
    shortest = 60 if competition.frequency is Frequency.HF else 300
    increment_s = data.draw(st.sampled_from([shortest, shortest // 2]), label="increment")
    n_points = data.draw(st.integers(2, 130), label="points")
    n_paths = data.draw(st.integers(1, 6), label="paths")
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    missing = data.draw(st.lists(st.integers(0, n_points - 1), max_size=n_points), label="missing")
    prices = random_walks(seed, n_paths + 1, n_points)
    paths, realised = prices[1:], prices[0].copy()
    realised[missing] = np.nan
    realised[data.draw(st.integers(0, n_points - 1), label="known")] = prices[0, 0]
    got = score_paths(paths, realised, competition, increment_s=increment_s)
    expected = slow_score(paths, realised, competition, increment_s)
    assert got.total == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert sum(got.by_interval.values()) == pytest.approx(got.total)


@pytest.mark.parametrize("competition", COMPETITIONS)
def test_a_prompt_of_full_size_scores_like_the_slow_reading(competition):
    increment_s, n_points = (60, 61) if competition.frequency is Frequency.HF else (300, 289)
    prices = random_walks(8, 101, n_points)
    realised = prices[0].copy()
    realised[[0, 7, 8, 40]] = np.nan
    got = score_paths(prices[1:], realised, competition, increment_s=increment_s)
    expected = slow_score(prices[1:], realised, competition, increment_s)
    assert got.total == pytest.approx(expected, rel=1e-9)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.floats(1e-3, 1e6),
)
def test_crps_is_the_estimator_with_all_pairs(seed, n, size):
    rng = np.random.default_rng(seed)
    ensemble, observed = size * rng.standard_t(2, (n, 3)), size * rng.standard_t(2, 3)
    pairs = np.abs(ensemble[:, None] - ensemble[None]).sum(axis=(0, 1)) / (2 * n**2)
    expected = np.abs(ensemble - observed).mean(axis=0) - pairs
    got = crps_ensemble(observed, ensemble)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * size)
    assert np.all(got >= 0)


# ---------------------------------------------------------------- symmetries


@pytest.mark.parametrize("competition", [HOUR, DAY], ids=["hour", "day"])
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(1e-4, 1e4))
@settings(max_examples=25)
def test_neither_the_order_of_the_paths_nor_the_unit_of_the_price_matters(
    competition, seed, factor
):
    increment_s = 60 if competition is HOUR else 300
    paths, realised = random_walks(seed, 20, 61), random_walks(seed + 1, 1, 61)[0]
    score = score_paths(paths, realised, competition, increment_s=increment_s).total
    order = np.random.default_rng(seed).permutation(len(paths))
    shuffled = score_paths(paths[order], realised, competition, increment_s=increment_s).total
    scaled = score_paths(
        factor * paths, factor * realised, competition, increment_s=increment_s
    ).total
    assert score >= 0
    assert [shuffled, scaled] == pytest.approx([score, score], rel=1e-8)


def test_paths_that_hit_a_standing_price_score_exactly_nothing():
    prices = np.full((1000, 61), 97_352.61)
    card = score_paths(prices, prices[0], HOUR, increment_s=60)
    assert card.total == 0
    assert not card.miss


def test_the_spread_of_the_truth_scores_better_than_half_and_twice_of_it():
    scores = {}
    for factor in (0.5, 1.0, 2.0):
        rng, total = np.random.default_rng(4), 0.0
        for prompt in range(40):
            draw = np.random.default_rng(prompt).standard_normal((200, 60))
            moves = np.hstack([np.zeros((200, 1)), np.cumsum(factor * 1e-3 * draw, axis=1)])
            truth = np.cumsum(np.append(0, 1e-3 * rng.standard_normal(60)))
            total += score_paths(
                100 * np.exp(moves), 100 * np.exp(truth), HOUR, increment_s=60
            ).total
        scores[factor] = total
    assert scores[1.0] < 0.97 * min(scores[0.5], scores[2.0])


# ---------------------------------------------------------------- misses and misuse


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("point", [0, 3, 60])
def test_a_path_that_is_not_finite_is_a_miss_even_where_nothing_was_realised(bad, point):
    paths, realised = random_walks(5, 10, 61), random_walks(6, 1, 61)[0]
    paths[4, point] = bad
    realised[point] = np.nan
    assert score_paths(paths, realised, HOUR, increment_s=60).miss


def test_a_price_of_zero_scores_minus_one_and_is_a_miss():
    paths, realised = random_walks(5, 10, 61), random_walks(6, 1, 61)[0]
    paths[9, 60] = 0
    card = score_paths(paths, realised, HOUR, increment_s=60)
    assert card.total == -1
    assert card.miss


@pytest.mark.parametrize(
    ("paths", "realised"),
    [
        (np.ones((5, 10)), np.ones(9)),
        (np.ones((5, 10)), np.ones((1, 10))),
        (np.ones(10), np.ones(10)),
        (np.ones((5, 10)), np.ones(5)),
    ],
)
def test_shapes_that_disagree_are_refused_in_one_sentence(paths, realised):
    with pytest.raises(DataError, match="same number of points"):
        score_paths(paths, realised, DAY, increment_s=300)


def test_a_prompt_of_which_nothing_was_realised_is_refused():
    with pytest.raises(DataError, match="all NaN"):
        score_paths(np.ones((5, 10)), np.full(10, np.nan), DAY, increment_s=300)


def test_what_was_not_realised_counts_nothing_and_takes_nothing_else_away():
    paths, realised = random_walks(7, 50, 61), random_walks(8, 1, 61)[0]
    realised[30] = np.nan
    card = score_paths(paths, realised, HOUR, increment_s=60)
    changes = (realised[1:] / realised[:-1] - 1) * 1e4
    known = np.isfinite(changes)
    simulated = interval_changes(paths, 1, IntervalKind.CHANGE)
    expected = sum(slow_crps(changes[j], simulated[:, j]) for j in np.flatnonzero(known))
    assert known.sum() == 58
    assert card.by_interval["1min"] == pytest.approx(expected)
    assert card.by_interval["0_30min_gaps"] == 0
    assert card.by_interval["0_35min_gaps"] > 0


def test_a_block_of_which_fewer_than_two_returns_are_known_has_no_volatility():
    prices = np.array([[100.0, 101, np.nan, np.nan, 100, 102, 101]])
    volatility = block_volatility(prices, 3)[0]
    assert np.isnan(volatility[0])
    expected = np.std([200, (101 / 102 - 1) * 1e4], ddof=1)
    assert volatility[1] == pytest.approx(expected)
    assert block_volatility(prices, 4).shape == (1, 1)
