"""Matched sums follow the law they were drawn from, and lose their noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from path_simulator import PathShape, simulate_steps
from quantile_matching import match_quantiles, unit_quantiles

SHAPE = PathShape(
    tail_dof=6,
    path_sd=0.3,
    slow_sd=0.3,
    slow_half_life_s=600,
    autocorrelation=(0.1,),
    bar_s=60,
)
STEPS = 24


def drawn(seed: int, n_paths: int, shape: PathShape = SHAPE) -> np.ndarray:
    scale = np.ones(STEPS)
    rng = np.random.default_rng(seed)
    return simulate_steps(rng, scale, np.full(STEPS, 60.0), shape, n_paths=n_paths)


@pytest.mark.parametrize("length", [1, 4, 24])
def test_the_quantiles_are_those_of_a_large_simulation(length):
    large = np.vstack([drawn(seed, 20_000) for seed in range(8)])
    blocks = large.reshape(len(large), -1, length).sum(axis=2)
    expected = unit_quantiles(SHAPE, 60.0, length, 1000) * np.sqrt(length)
    for index in (10, 100, 250, 400):
        level = (index + 0.5) / 1000
        found = np.quantile(blocks, level, axis=0).mean()
        # 160,000 paths: one per cent covers the error of the quantile at 1 %.
        assert found == pytest.approx(expected[index], rel=0.02)


def test_quantiles_rise_and_are_symmetric():
    quantiles = unit_quantiles(SHAPE, 60.0, 5, 999)
    assert np.all(np.diff(quantiles) > 0)
    assert np.allclose(quantiles, -quantiles[::-1])


def test_what_is_matched_last_sits_exactly_on_its_quantiles():
    steps = drawn(1, 500)
    scale = np.linspace(0.5, 2.0, STEPS)
    steps *= scale
    match_quantiles(steps, scale, 60.0, SHAPE, prefixes=(12,), blocks=(4, 1), cycles=2)
    expected = unit_quantiles(SHAPE, 60.0, 1, 500)
    assert np.allclose(np.sort(steps, axis=0), expected[:, None] * scale)


def test_ranks_survive_when_one_length_is_matched():
    before = drawn(2, 300)
    after = before.copy()
    match_quantiles(after, np.ones(STEPS), 60.0, SHAPE, prefixes=(), blocks=(6,), cycles=1)
    sums = [steps.reshape(300, -1, 6).sum(axis=2) for steps in (before, after)]
    assert np.array_equal(np.argsort(sums[0], axis=0), np.argsort(sums[1], axis=0))


def test_sums_over_every_scored_block_become_less_noisy():
    """The spread of ensemble means and sizes over seeds shrinks at every length."""
    for length in (1, 4, 24):
        plain, matched = [], []
        for seed in range(20):
            steps = drawn(seed, 200)
            plain.append(np.abs(steps.reshape(200, -1, length).sum(axis=2)).mean())
            match_quantiles(
                steps, np.ones(STEPS), 60.0, SHAPE, prefixes=(24,), blocks=(4, 1), cycles=2
            )
            matched.append(np.abs(steps.reshape(200, -1, length).sum(axis=2)).mean())
        assert np.std(matched) < 0.5 * np.std(plain)
        # and it is the same size that they settle on
        assert np.mean(matched) == pytest.approx(np.mean(plain), rel=0.03)


@given(
    length=st.integers(1, 40),
    n_paths=st.integers(1, 30),
    n_steps=st.integers(1, 30),
    cycles=st.integers(0, 2),
)
def test_any_length_and_ensemble_keeps_shape_and_finiteness(length, n_paths, n_steps, cycles):
    rng = np.random.default_rng(0)
    scale = np.ones(n_steps)
    steps = simulate_steps(rng, scale, np.full(n_steps, 60.0), SHAPE, n_paths=n_paths)
    match_quantiles(
        steps, scale, 60.0, SHAPE, prefixes=(length,), blocks=(length, 1), cycles=cycles
    )
    assert steps.shape == (n_paths, n_steps)
    assert np.isfinite(steps).all()


def test_a_market_that_does_not_move_stays_put():
    steps = np.zeros((50, STEPS))
    match_quantiles(steps, np.zeros(STEPS), 60.0, SHAPE, prefixes=(STEPS,), blocks=(1,), cycles=2)
    assert np.abs(steps).max() < 1e-100
