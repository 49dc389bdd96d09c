"""Forecasters of known quality: each as it is defined, and none of them looks ahead."""

from dataclasses import replace

import numpy as np
import pytest

from baselines import ConstantSigma, EwmaStudentT
from config import FREQUENCIES, Frequency, asset_spec
from domain import Bars, MarketHistory
from replay import usual_request

START = 1_760_000_400
BAR_S = {Frequency.HF: 60, Frequency.LF: 300}


def history_of(returns_bps, frequency=Frequency.HF, asset="BTC", keep=None):
    """A market that moves by these returns, bar by bar; `keep` leaves bars out."""
    close = 100 * np.exp(np.concatenate(([0.0], np.cumsum(returns_bps))) / 1e4)
    bar_s = BAR_S[frequency]
    open_ts = START + bar_s * np.arange(len(close), dtype=np.int64)
    rows = np.ones(len(close), dtype=bool) if keep is None else keep
    nothing = np.full(rows.sum(), np.nan)
    bars = Bars(
        open_ts=open_ts[rows],
        open=nothing,
        high=nothing,
        low=nothing,
        close=close[rows],
        volume=nothing,
        bar_s=bar_s,
        feed="test",
    )
    return MarketHistory(
        asset=asset, frequency=frequency, bars=bars, price_bars=bars, source="test"
    )


def ask(history):
    return usual_request(history, history.anchor_ts + history.scored_lag_s)


def test_the_reference_walks_with_one_hourly_sigma_from_the_last_price():
    history = history_of(np.zeros(10))
    paths = ConstantSigma().paths(ask(history), history, np.random.default_rng(0))
    assert paths.shape == (1000, 61)
    assert (paths[:, 0] == history.anchor_price).all()
    hourly = np.log(paths[:, -1] / paths[:, 0]).std()
    sigma = asset_spec("BTC").hourly_volatility
    assert hourly == pytest.approx(sigma, rel=4 / np.sqrt(2 * 1000))


@pytest.mark.parametrize("frequency", Frequency)
def test_the_ewma_variance_is_the_weighted_mean_of_squares(frequency):
    returns = np.random.default_rng(1).normal(0, 5, 3000)
    half_life = FREQUENCIES[frequency].fallback_half_life
    weights = 0.5 ** (np.arange(3000)[::-1] / half_life)
    expected = (weights * returns**2).sum() / weights.sum()
    found = EwmaStudentT(cap_bps=1e9).variance(history_of(returns, frequency))
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_return_is_capped_before_it_is_squared():
    returns = np.array([1.0, 1.0, 50.0])
    calm = EwmaStudentT(cap_bps=2.0).variance(history_of(returns))
    weights = 0.5 ** (np.arange(3)[::-1] / 120)
    assert calm == pytest.approx((weights * [1, 1, 4]).sum() / weights.sum())


def test_the_cap_is_the_training_quantile():
    returns = np.random.default_rng(2).normal(0, 5, 20_000)
    cap = EwmaStudentT.fit(history_of(returns)).cap_bps
    assert np.mean(np.abs(returns) > cap) == pytest.approx(5e-4, abs=1e-4)


def test_a_move_over_a_gap_is_spread_over_its_bars():
    returns = np.full(100, 3.0)
    keep = np.ones(101, dtype=bool)
    keep[50:60] = False  # the bar after covers eleven steps of 3 bps
    found = EwmaStudentT(cap_bps=1e9).variance(history_of(returns, keep=keep))
    weights = 0.5 ** (np.arange(100)[::-1] / 120)
    squares = np.where(np.arange(1, 101) == 60, 33.0**2 / 11, 9.0)
    seen = keep[1:]
    assert found == pytest.approx((weights * squares)[seen].sum() / weights[seen].sum())


def test_what_is_long_forgotten_changes_nothing():
    returns = np.random.default_rng(3).normal(0, 5, 30_000)
    whole = history_of(returns)
    recent = replace(
        whole,
        bars=whole.bars.between(whole.bars.end_ts - 20_000 * 60, None),
        price_bars=whole.price_bars.between(whole.bars.end_ts - 20_000 * 60, None),
    )
    yardstick = EwmaStudentT(cap_bps=30.0)
    assert yardstick.variance(recent) == yardstick.variance(whole)


def test_steps_have_the_variance_of_the_ewma_and_its_tails():
    history = history_of(np.tile([4.0, -4.0], 2000))
    yardstick = EwmaStudentT(cap_bps=1e9)
    paths = yardstick.paths(ask(history), history, np.random.default_rng(4))
    steps = 1e4 * np.diff(np.log(paths), axis=1)
    # t(4) has no fourth moment: compare quantiles. Scaled to unit variance, its quartile is
    # 0.7407 / √2 = 0.5238.
    assert np.median(np.abs(steps)) == pytest.approx(4 * 0.5238, rel=0.02)
    assert np.quantile(np.abs(steps), 0.99) == pytest.approx(4 * 4.6041 / np.sqrt(2), rel=0.05)


def test_point_zero_is_a_forecast_too():
    history = history_of(np.tile([4.0, -4.0], 200))
    paths = EwmaStudentT(cap_bps=1e9).paths(ask(history), history, np.random.default_rng(5))
    first = 1e4 * np.log(paths[:, 0] / history.anchor_price)
    # The last known close is two minutes before the price that scores point 0.
    assert np.median(np.abs(first)) == pytest.approx(4 * np.sqrt(2) * 0.5238, rel=0.1)
