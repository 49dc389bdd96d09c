"""Paths whose increments agree with the forecast at every lead."""

import json
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from path_simulator import (
    KEPT_RESULTS,
    PathShape,
    correlate_steps,
    kept_with_shape,
    simulate_steps,
    student_t_steps,
    unit_t_quantiles,
    volatility_process,
)

STEP_S = np.full(60, 60.0)


def shape_of(**changes) -> PathShape:
    """Nearly normal, independent steps of one volatility, but for what is changed."""
    plain = {"tail_dof": 200.0, "path_sd": 0.0, "slow_sd": 0.0, "slow_half_life_s": 1200.0}
    return PathShape(**{**plain, **changes})


def draw(shape: PathShape, *, n_paths: int = 20_000, seed: int = 0, scale=None, step_s=STEP_S):
    """Sums of steps from the start on, the way an answer adds them up."""
    rng = np.random.default_rng(seed)
    scale = np.ones(len(step_s)) if scale is None else scale
    return np.cumsum(simulate_steps(rng, scale, step_s, shape, n_paths=n_paths).T, axis=1)


def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return left.tobytes() == right.tobytes()


def standard_error(values: np.ndarray) -> float:
    return float(values.std() / np.sqrt(values.size))


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("dof", [3.0, 5.0, 8.0, 12.0, 40.0, 1000.0])
def test_steps_have_a_mean_size_of_one_whatever_their_tails(dof):
    size = np.abs(student_t_steps(np.random.default_rng(1), (1000, 300), dof=dof))
    assert size.mean() == pytest.approx(1, abs=4 * standard_error(size))


@pytest.mark.parametrize("dof", [2.5, 4.0, 12.0])
def test_steps_have_the_quantiles_of_student_t(dof):
    n = 300_000
    steps = student_t_steps(np.random.default_rng(2), (n,), dof=dof)
    truth = stats.t(dof)
    # E|t| is twice the partial expectation of the upper half.
    mean_size = 2 * truth.expect(lambda x: x, lb=0)
    for level in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        expected = truth.ppf(level)
        error = np.sqrt(level * (1 - level) / n) / truth.pdf(expected)
        found = np.quantile(steps, level) * mean_size
        assert found == pytest.approx(expected, abs=4 * error)


def test_steps_are_independent_of_each_other():
    steps = student_t_steps(np.random.default_rng(3), (2000, 60), dof=6)
    assert abs(np.corrcoef(steps[:, 1:].ravel(), steps[:, :-1].ravel())[0, 1]) < 4 / np.sqrt(
        118_000
    )
    size = np.abs(steps)
    assert abs(np.corrcoef(size[:, 1:].ravel(), size[:, :-1].ravel())[0, 1]) < 4 / np.sqrt(118_000)


@pytest.mark.parametrize("dof", [3.0, 8.0, np.inf])
def test_every_quantile_stands_for_the_same_share_of_the_law(dof):
    quantiles = unit_t_quantiles(dof)
    assert np.abs(quantiles).mean() == pytest.approx(1, rel=1e-12)
    assert np.all(np.diff(quantiles) > 0)
    assert np.array_equal(quantiles, -quantiles[::-1])
    truth = stats.norm() if np.isinf(dof) else stats.t(dof)
    share = np.diff(truth.cdf(quantiles * np.abs(truth.ppf(0.25) / np.quantile(quantiles, 0.25))))
    np.testing.assert_allclose(share * len(quantiles), 1, rtol=1e-2)


def test_tables_are_made_once_and_last_as_long_as_the_shape():
    made = []

    @kept_with_shape
    def table(shape, scale):
        made.append(scale)
        return np.full(3, shape.tail_dof * scale)

    shape, equal = shape_of(tail_dof=8), shape_of(tail_dof=8)
    assert table(shape, 2.0) is table(equal, 2.0)
    assert table(shape, 3.0)[0] == 24.0
    assert made == [2.0, 3.0]
    kept = weakref.ref(table(shape, 2.0))
    assert kept() is not None
    del shape
    assert kept() is None


def test_tables_outlive_the_set_they_were_first_made_for_while_an_equal_one_lives():
    old = PathShape.from_dict(FULL.to_dict())
    kept = weakref.ref(unit_quantiles_of(old))
    new = PathShape.from_dict(json.loads(json.dumps(FULL.to_dict())))
    del old
    assert kept() is not None
    del new
    assert kept() is None


@kept_with_shape
def unit_quantiles_of(shape):
    return np.full(3, shape.tail_dof)


def test_odd_arguments_do_not_pile_up():
    held = kept_with_shape(lambda shape, length: np.zeros(length))
    shape = shape_of()
    first = weakref.ref(held(shape, 1))
    for length in range(2, KEPT_RESULTS + 2):
        held(shape, length)
    assert first() is None


# ---------------------------------------------------------------- volatility


@pytest.mark.parametrize(("path_sd", "slow_sd"), [(0.4, 0.0), (0.0, 0.4), (0.3, 0.3), (0.0, 0.0)])
def test_volatility_has_mean_one_and_the_same_spread_all_along_the_path(path_sd, slow_sd):
    n = 20_000
    process = volatility_process(
        np.random.default_rng(4), n, STEP_S, shape_of(path_sd=path_sd, slow_sd=slow_sd)
    )
    assert process.min() > 0
    log_sd = np.log(process).std(axis=1)
    sd = np.hypot(path_sd, slow_sd)
    np.testing.assert_allclose(log_sd, sd, atol=5 * sd / np.sqrt(2 * n) + 1e-12)
    error = np.sqrt(np.expm1(sd**2) / n)
    np.testing.assert_allclose(process.mean(axis=1), 1, atol=5 * error + 1e-12)


@pytest.mark.parametrize("half_life_s", [300.0, 1200.0])
@pytest.mark.parametrize("step_s", [60.0, 300.0])
def test_the_slow_part_forgets_half_per_half_life(half_life_s, step_s):
    n = 40_000
    log_process = np.log(
        volatility_process(
            np.random.default_rng(5),
            n,
            np.full(21, step_s),
            shape_of(slow_sd=0.5, slow_half_life_s=half_life_s),
        )
    )
    for lag in (1, 4, 20):
        found = np.corrcoef(log_process[0], log_process[lag])[0, 1]
        assert found == pytest.approx(0.5 ** (lag * step_s / half_life_s), abs=4 / np.sqrt(n))


def test_the_path_factor_stays_and_differs_between_paths():
    process = volatility_process(np.random.default_rng(6), 500, STEP_S, shape_of(path_sd=0.3))
    assert process.shape == (1, 500)
    assert np.std(np.log(process)) == pytest.approx(0.3, rel=0.15)


def test_an_odd_first_step_does_not_change_how_fast_volatility_reverts():
    step_s = np.append(120.0, STEP_S[1:])
    shape = shape_of(slow_sd=0.3)
    odd = volatility_process(np.random.default_rng(7), 100, step_s, shape)
    even = volatility_process(np.random.default_rng(7), 100, STEP_S, shape)
    assert same_bytes(odd, even)


# ---------------------------------------------------------------- serial dependence


@pytest.mark.parametrize("planted", [(-0.2,), (0.1, -0.15), (0.05, 0.0, 0.2)])
def test_a_planted_autocorrelation_is_there_and_the_variance_of_steps_is_kept(planted):
    n = 20_000
    steps = correlate_steps(np.random.default_rng(8).standard_normal((40, n)), planted).T
    np.testing.assert_allclose(steps.var(axis=0), 1, atol=5 * np.sqrt(2 / n))
    for lag, expected in enumerate((*planted, 0.0), start=1):
        products = steps[:, lag:] * steps[:, :-lag]
        found = products.mean(axis=0)
        np.testing.assert_allclose(found, expected, atol=5 / np.sqrt(n))
        assert products.mean() == pytest.approx(expected, abs=4 / np.sqrt(products.size))


@given(n_steps=st.integers(1, 6), lags=st.integers(1, 5))
def test_short_paths_take_as_many_lags_as_fit(n_steps, lags):
    steps = correlate_steps(np.ones((n_steps, 2)), (0.1,) * lags)
    assert steps.shape == (n_steps, 2)
    assert np.isfinite(steps).all()


def test_autocorrelation_belongs_to_steps_of_one_bar_alone():
    linked = shape_of(autocorrelation=(0.3,), bar_s=60)
    assert not same_bytes(draw(linked, n_paths=50), draw(shape_of(), n_paths=50))
    longer = np.full(60, 300.0)
    free = draw(shape_of(), n_paths=50, step_s=longer)
    assert same_bytes(draw(linked, n_paths=50, step_s=longer), free)
    first_longer = np.append(120.0, STEP_S[1:])
    moves = draw(linked, n_paths=20_000, step_s=first_longer)
    steps = np.diff(moves, axis=1)
    assert np.corrcoef(steps[:, 9], steps[:, 10])[0, 1] == pytest.approx(0.3, abs=0.03)


# ---------------------------------------------------------------- coherence


def test_variance_adds_up_to_the_end_of_the_path():
    scale = np.linspace(0.5, 2.0, 60)
    moves = draw(shape_of(), n_paths=40_000, scale=scale)
    # A normal step of mean size s has variance s² π / 2.
    step_variance = (scale**2).cumsum() * np.pi / 2
    error = np.sqrt(2 / 40_000)
    np.testing.assert_allclose(moves.var(axis=0), step_variance, rtol=6 * error + 0.01)
    # White noise around a line would have the last step's variance at the end.
    assert moves[:, -1].var() > 20 * scale[-1] ** 2


@pytest.mark.parametrize("n_joined", [2, 5, 15, 30])
def test_moves_over_several_steps_have_the_sum_of_their_variances_anywhere(n_joined):
    moves = draw(shape_of(path_sd=0.3, slow_sd=0.3, tail_dof=8), n_paths=40_000, seed=9)
    joined = moves[:, n_joined::n_joined] - moves[:, :-n_joined:n_joined]
    single = np.diff(moves, axis=1).var()
    assert joined.var() == pytest.approx(n_joined * single, rel=0.05)


def test_paths_wander_around_zero():
    moves = draw(shape_of(path_sd=0.3, slow_sd=0.3, tail_dof=5), n_paths=20_000, seed=10)
    error = moves.std(axis=0) / np.sqrt(len(moves))
    assert np.all(np.abs(moves.mean(axis=0)) < 5 * error)


def test_volatility_clusters_within_paths_and_differs_between_them():
    moves = draw(
        shape_of(path_sd=0.3, slow_sd=0.4, slow_half_life_s=600.0), n_paths=20_000, seed=11
    )
    size = np.log(np.abs(np.diff(moves, axis=1)) + 1e-9)
    near = np.mean([np.corrcoef(size[:, k], size[:, k + 1])[0, 1] for k in range(0, 50, 5)])
    far = np.corrcoef(size[:, 0], size[:, 50])[0, 1]
    assert near > far + 0.03 > 0.06
    independent = np.log(np.abs(np.diff(draw(shape_of(), seed=11), axis=1)) + 1e-9)
    assert abs(np.corrcoef(independent[:, 0], independent[:, 1])[0, 1]) < 0.03


def test_the_scale_is_the_mean_size_of_every_step():
    scale = np.array([1.0, 7.0, 0.1, 3.0])
    moves = draw(
        shape_of(tail_dof=6, path_sd=0.2, slow_sd=0.3),
        n_paths=50_000,
        scale=scale,
        step_s=STEP_S[:4],
    )
    steps = np.diff(moves, axis=1, prepend=0.0)
    size = np.abs(steps)
    error = size.std(axis=0) / np.sqrt(len(size))
    assert np.all(np.abs(size.mean(axis=0) - scale) < 5 * error)


# ---------------------------------------------------------------- reproducible


FULL = PathShape(
    tail_dof=7.0, path_sd=0.2, slow_sd=0.3, slow_half_life_s=900.0, autocorrelation=(0.1, -0.05)
)


@given(seed=st.integers(0, 2**32 - 1), n_paths=st.integers(1, 30))
@settings(max_examples=20)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(seed, n_paths):
    first = draw(FULL, n_paths=n_paths, seed=seed)
    assert first.shape == (n_paths, 60)
    assert np.isfinite(first).all()
    assert same_bytes(first, draw(FULL, n_paths=n_paths, seed=seed))
    assert not same_bytes(first, draw(FULL, n_paths=n_paths, seed=seed + 1))


def test_what_was_passed_in_is_left_as_it_was():
    scale, step_s = np.ones(60), STEP_S.copy()
    draw(FULL, n_paths=10, scale=scale, step_s=step_s)
    assert scale.tolist() == [1.0] * 60
    assert step_s.tolist() == [60.0] * 60


def test_a_shape_survives_json():
    assert PathShape.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL
