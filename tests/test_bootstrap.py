"""Block-bootstrap errors."""

import numpy as np
import pytest

from bootstrap import block_bootstrap_error

HOUR_S = 3600


def hourly(n):
    return HOUR_S * np.arange(n, dtype=np.int64)


def test_independent_values_get_the_error_of_a_mean():
    values = np.random.default_rng(1).normal(size=400)
    error = block_bootstrap_error(values, hourly(400), block_s=HOUR_S)
    assert error == pytest.approx(values.std() / 20, rel=0.1)


def test_values_that_come_in_runs_get_a_larger_error_when_blocks_hold_the_runs():
    values = np.repeat(np.random.default_rng(2).normal(size=50), 8)
    short, long = (
        block_bootstrap_error(values, hourly(400), block_s=hours * HOUR_S) for hours in (1, 24)
    )
    assert long == pytest.approx(values.std() / np.sqrt(50), rel=0.3)
    assert long > 2 * short


def test_unknown_values_are_left_out():
    values = np.random.default_rng(3).normal(size=100)
    holes = np.insert(values, 50, np.full(20, np.nan))
    closer = block_bootstrap_error(values, hourly(100), block_s=HOUR_S)
    assert block_bootstrap_error(holes, hourly(120), block_s=HOUR_S) == pytest.approx(
        closer, rel=0.1
    )


def test_blocks_never_hold_so_much_that_nothing_varies():
    values = np.random.default_rng(6).normal(size=80)
    endless = block_bootstrap_error(values, hourly(80), block_s=10**9)
    assert endless == block_bootstrap_error(values, hourly(80), block_s=20 * HOUR_S)
    assert endless > 0


@pytest.mark.parametrize("values", [np.array([]), np.array([1.0]), np.array([np.nan, 1.0])])
def test_fewer_than_two_values_have_no_known_error(values):
    assert block_bootstrap_error(values, hourly(len(values)), block_s=HOUR_S) == np.inf


def test_the_same_seed_gives_the_same_error():
    values = np.random.default_rng(4).normal(size=60)
    errors = {block_bootstrap_error(values, hourly(60), block_s=86_400, seed=5) for _ in range(2)}
    assert len(errors) == 1
