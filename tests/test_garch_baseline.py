"""GARCH(1,1) with Student-t steps: found again where it was planted."""

import numpy as np
import pytest

import garch_baseline
from config import Frequency
from errors import ConfigError, InsufficientHistory
from garch_baseline import Garch, require_arch
from tests.test_baselines import ask, history_of

pytest.importorskip("arch", reason="development dependency of the garch_t baseline")

PLANTED = Garch(omega=0.5, alpha=0.1, beta=0.85, dof=6.0, cap_bps=1e9)


def planted_returns(n, seed=0):
    rng = np.random.default_rng(seed)
    shocks = rng.standard_t(PLANTED.dof, n) * np.sqrt((PLANTED.dof - 2) / PLANTED.dof)
    returns, variance = np.empty(n), PLANTED.omega / (1 - PLANTED.alpha - PLANTED.beta)
    for k, shock in enumerate(shocks):
        returns[k] = shock * np.sqrt(variance)
        variance = PLANTED.omega + PLANTED.alpha * returns[k] ** 2 + PLANTED.beta * variance
    return returns, variance


def test_planted_parameters_are_found():
    found = Garch.fit(history_of(planted_returns(20_000)[0]))
    assert found.alpha == pytest.approx(0.1, abs=0.02)
    assert found.beta == pytest.approx(0.85, abs=0.03)
    assert found.dof == pytest.approx(6.0, abs=0.7)
    assert found.omega == pytest.approx(0.5, rel=0.35)


def test_the_variance_of_the_next_bar_follows_the_recursion():
    returns, expected = planted_returns(2000)
    assert PLANTED.variance(history_of(returns)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("frequency", Frequency)
def test_the_variance_of_paths_returns_to_its_mean(frequency):
    history = history_of(np.full(2000, 30.0), frequency)  # excited
    start = PLANTED.variance(history)
    paths = PLANTED.paths(ask(history), history, np.random.default_rng(2))
    squares = (1e4 * np.diff(np.log(paths), axis=1)) ** 2
    mean = PLANTED.omega / (1 - PLANTED.alpha - PLANTED.beta)
    assert start > 50 * mean
    before = int(history.scored_lag_s > 0)  # a step from the last known price to point 0
    persistence = (PLANTED.alpha + PLANTED.beta) ** (before + np.arange(20))
    expected = mean + (start - mean) * persistence
    # A mean of 1000 squares, whose relative spread is about 2, and 20 times that.
    assert squares[:, 0].mean() == pytest.approx(expected[0], rel=4 * 2 / np.sqrt(1000))
    assert squares[:, :20].mean() == pytest.approx(expected.mean(), rel=0.15)


def test_a_market_that_rested_is_expected_to_move_as_on_average():
    returns = planted_returns(3000)[0]
    keep = np.ones(3001, dtype=bool)
    keep[1000:2990] = False
    rested = PLANTED.variance(history_of(returns, keep=keep))
    assert 0 < rested < 100


def test_too_few_returns_are_refused_in_one_sentence():
    with pytest.raises(InsufficientHistory, match=r"BTC hf: 99 returns are too few"):
        Garch.fit(history_of(np.ones(99)))


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(garch_baseline, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-dev.txt"):
        require_arch()
