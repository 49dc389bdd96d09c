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


def block_sums(steps: np.ndarray, length: int) -> np.ndarray:
    return np.asarray(steps.reshape(-1, length, steps.shape[1]).sum(axis=1))


def match(steps: np.ndarray, cycles, prefixes=(), scale=None) -> None:
    scale = np.ones(len(steps)) if scale is None else scale
    match_quantiles(steps, scale, 60.0, SHAPE, cycles=cycles, prefixes=prefixes)


@pytest.mark.parametrize("length", [1, 4, 24])
def test_the_quantiles_are_those_of_a_large_simulation(length):
    large = np.hstack([drawn(seed, 20_000) for seed in range(8)])
    blocks = block_sums(large, length)
    expected = unit_quantiles(SHAPE, 60.0, length, 1000) * np.sqrt(length)
    for index in (10, 100, 250, 400):
        level = (index + 0.5) / 1000
        found = np.quantile(blocks, level, axis=1).mean()
        # 160,000 paths: one per cent covers the error of the quantile at 1 %.
        assert found == pytest.approx(expected[index], rel=0.02)


def test_quantiles_rise_and_are_symmetric():
    quantiles = unit_quantiles(SHAPE, 60.0, 5, 999)
    assert np.all(np.diff(quantiles) > 0)
    assert np.allclose(quantiles, -quantiles[::-1])


@pytest.mark.parametrize("n_paths", [500, 1500])
@pytest.mark.parametrize("length", [1, 6])
def test_blocks_that_are_matched_last_sit_exactly_on_their_quantiles(n_paths, length):
    steps = drawn(1, n_paths)
    scale = np.linspace(0.5, 2.0, STEPS)
    steps *= scale[:, None]
    match(steps, [(1, 4), (4, length)], scale=scale)
    size = np.sqrt((scale**2).reshape(-1, length).sum(axis=1))
    expected = unit_quantiles(SHAPE, 60.0, length, n_paths)
    np.testing.assert_allclose(np.sort(block_sums(steps, length)), size[:, None] * expected)


def test_prefixes_that_are_matched_last_sit_exactly_on_their_quantiles():
    steps = drawn(1, 500)
    scale = np.linspace(0.5, 2.0, STEPS)
    steps *= scale[:, None]
    match(steps, [(1, 4)], (8, 12, 24), scale)
    for length in (8, 12, 24):
        size = np.sqrt((scale[:length] ** 2).sum())
        expected = size * unit_quantiles(SHAPE, 60.0, length, 500)
        np.testing.assert_allclose(np.sort(steps[:length].sum(axis=0)), expected)


@pytest.mark.parametrize("n_paths", [300, 1500])
def test_ranks_survive_when_one_length_is_matched(n_paths):
    before = drawn(2, n_paths)
    after = before.copy()
    match(after, [(6,)])
    ranks = [np.argsort(block_sums(steps, 6)) for steps in (before, after)]
    # Values closer than the 21 bits of a key may change places.
    assert np.mean(ranks[0] != ranks[1]) < 0.01


def test_what_is_done_at_once_is_what_is_done_one_after_the_other():
    """Lengths with common parts are matched on sums over these parts alone."""
    at_once, in_turn = drawn(3, 400), drawn(3, 400)
    scale = np.linspace(0.5, 2.0, STEPS)
    match(at_once, [(4, 8, 12)], (8, 20), scale)
    for length in (4, 8, 12):
        match(in_turn, [(length,)], scale=scale)
    match(in_turn, [()], (8, 20), scale)
    np.testing.assert_allclose(at_once, in_turn, rtol=0, atol=0.01)


def test_sums_over_every_scored_block_become_less_noisy():
    """The spread of ensemble means and sizes over seeds shrinks at every length."""
    for length in (1, 4, 24):
        plain, matched = [], []
        for seed in range(20):
            steps = drawn(seed, 200)
            plain.append(np.abs(block_sums(steps, length)).mean())
            match(steps, [(4,), (1, 4)], (24,))
            matched.append(np.abs(block_sums(steps, length)).mean())
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
    match(steps, [(1, length)] * cycles, (length, 2 * length))
    assert steps.shape == (n_steps, n_paths)
    assert np.isfinite(steps).all()


def test_a_market_that_does_not_move_stays_put():
    steps = np.zeros((STEPS, 50))
    match(steps, [(1,), (1,)], (STEPS,), scale=np.zeros(STEPS))
    assert np.abs(steps).max() < 1e-100
