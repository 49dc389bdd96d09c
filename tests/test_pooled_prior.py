"""What markets have in common: how far a market leans on it, and what it knew."""

from dataclasses import replace

import numpy as np
import orjson
import pytest

from config import DAY_S, FREQUENCIES, Frequency, MarketHours
from features import feature_names
from pooled_prior import (
    POOL_EVERY_S,
    PooledPrior,
    fit_blend_bucket,
    pool_moments,
    pooled_clock,
    prior_known_at,
)
from seasonality import flat_profile
from uncertainty_engine import LogLinearScale, blend_ridge

LF = FREQUENCIES[Frequency.LF]
NAMES = [name for part in feature_names(LF) for name in part]
USED = np.isfinite(blend_ridge(LF))


def prior_of(slope, until=0, base=1.0):
    part = LogLinearScale(
        centre=np.zeros(len(NAMES)),
        spread=np.ones(len(NAMES)),
        slope=np.where(USED, slope, 0.0),
        intercept=0.1,
    )
    profile = flat_profile(LF.bar_s, MarketHours.EQUITY)
    return PooledPrior(
        frequency=Frequency.LF,
        until=until,
        assets=("SP500", "AAPLX"),
        blend=(part,) * len(LF.bucket_ends),
        profiles={MarketHours.EQUITY: replace(profile, base=base * profile.base)},
    )


def rows(slope, n=4000, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, len(NAMES)))
    level = np.exp(x[:, 0] * slope)
    return x, level * rng.gamma(4, 1 / 4, n), np.ones(n)


def slope_for(days, prior, slope=0.4):
    x, y, weight = rows(slope)
    return fit_blend_bucket(LF, 0, x, y, weight, prior=prior, days=days).slope[0]


def test_the_fewer_days_the_closer_to_the_pool():
    prior = prior_of(0.0)
    slopes = [slope_for(days, prior) for days in (3, 30, 100, 345)]
    assert slopes == sorted(slopes)
    assert slopes[0] == pytest.approx(0.0, abs=0.01)
    assert slopes[-1] == pytest.approx(0.4, abs=0.04)


def test_a_long_history_is_pulled_no_less_than_the_usual_ridge():
    prior = prior_of(0.2)
    assert slope_for(345, prior) == slope_for(3450, prior)


def test_without_a_pool_slopes_are_pulled_to_nothing_whatever_the_days():
    assert slope_for(3, None) == slope_for(345, None)
    assert 0.3 < slope_for(3, None) < 0.4


def test_features_that_the_blend_leaves_out_stay_out():
    x, y, weight = rows(0.4)
    fit = fit_blend_bucket(LF, 0, x, y, weight, prior=prior_of(0.2), days=20)
    np.testing.assert_array_equal(fit.slope[~USED], 0.0)


def test_a_clock_leans_on_markets_with_the_same_hours_alone():
    prior = prior_of(0.0, base=4.0)
    for hours, expected in ((MarketHours.EQUITY, 2.0), (MarketHours.COMMODITY, 1.0)):
        own = flat_profile(LF.bar_s, hours)
        np.testing.assert_allclose(pooled_clock(own, prior, days=15).base, expected)
    assert pooled_clock(own, None, days=1) is own


def test_only_a_prior_that_saw_nothing_later_is_used():
    priors = [prior_of(0.0, until=until) for until in (100, 300, 200)]
    assert [getattr(prior_known_at(priors, ts), "until", None) for ts in (99, 100, 250, 999)] == [
        None,
        100,
        200,
        300,
    ]


def test_moments_lie_on_a_fixed_grid_and_begin_before_the_first_fit():
    first, last = 1_750_000_000, 1_750_000_000 + 100 * DAY_S
    moments = pool_moments(first, last)
    assert all(moment % POOL_EVERY_S == 0 for moment in moments)
    assert first - POOL_EVERY_S < moments[0] <= first
    assert last - POOL_EVERY_S < moments[-1] <= last
    assert pool_moments(moments[1], moments[1]) == [moments[1]]


def test_a_prior_survives_being_written():
    prior = prior_of(0.3, until=77)
    again = PooledPrior.from_dict(orjson.loads(orjson.dumps(prior.to_dict())))
    assert again.to_dict() == prior.to_dict()
    assert again.profiles.keys() == {MarketHours.EQUITY}
