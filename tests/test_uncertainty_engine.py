"""The scale of the next moves: what the blend learns, how the controller nudges it."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import uncertainty_engine
from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, MarketHours
from features import Standardiser, feature_names
from path_simulator import correlate_steps
from seasonality import flat_profile
from uncertainty_engine import (
    CLIP_SD,
    CONTROLLER_HALF_LIFE_DAYS,
    CONTROLLER_LIMIT,
    RESIDUAL_LIMIT,
    Controller,
    LogLinearScale,
    advance_controller,
    blend_log_levels,
    blend_ridge,
    bucket_centres,
    controller_stride,
    effective_rows,
    fit_log_linear,
    gamma_deviance,
    level_at,
    neutral_controller,
    shrunk_autocorrelation,
    step_scales,
)

SPECS = [pytest.param(spec, id=name.value) for name, spec in FREQUENCIES.items()]
HF, LF = FREQUENCIES[Frequency.HF], FREQUENCIES[Frequency.LF]
MONDAY = 1_763_337_600  # 2025-11-17 00:00 UTC


# ---------------------------------------------------------------- log-linear blend


def planted_rows(seed: int, n: int = 20_000, noise_shape: float = 4.0):
    """Features of odd units, gamma targets and recency weights; slopes per unit of each."""
    rng = np.random.default_rng(seed)
    unit = np.array([1.0, 0.01, 30.0, 1.0])
    x = np.array([0.0, 5.0, -100.0, 1.0]) + unit * rng.standard_normal((n, 4))
    slope = np.array([0.5, -20.0, 0.01, 0.0])
    log_mean = 0.3 + (x - np.array([0.0, 5.0, -100.0, 1.0])) @ slope
    y = np.exp(log_mean) * rng.gamma(noise_shape, 1 / noise_shape, n)
    return x, y, 0.5 ** (np.arange(n)[::-1] / n), slope, log_mean


def test_the_blend_recovers_planted_slopes():
    x, y, weight, slope, log_mean = planted_rows(1)
    fit = fit_log_linear(x, y, weight)
    found = fit.slope / fit.spread
    # The standard error of a slope is sd(noise) / (sd(x) · √rows): 0.5 / (sd · 140).
    error = 0.5 / np.sqrt(effective_rows(weight)) / x.std(axis=0)
    assert np.all(np.abs(found - slope) < 4 * error + 1e-3 * np.abs(slope))
    assert np.abs(fit.log_level(x) - log_mean).mean() < 0.01


def test_beginning_with_some_of_many_rows_changes_the_way_and_not_the_optimum(monkeypatch):
    x, y, weight, *_ = planted_rows(2)
    monkeypatch.setattr(uncertainty_engine, "ROUGH_ROWS", len(x))
    with_all = fit_log_linear(x, y, weight, ridge=0.01)
    monkeypatch.setattr(uncertainty_engine, "ROUGH_ROWS", 500)
    with_some = fit_log_linear(x, y, weight, ridge=0.01)
    np.testing.assert_allclose(with_some.slope, with_all.slope, atol=1e-5)
    assert with_some.intercept == pytest.approx(with_all.intercept, abs=1e-5)


def test_features_may_be_kept_in_half_the_bytes():
    x, y, weight, *_ = planted_rows(3)
    whole = fit_log_linear(x, y, weight, ridge=0.01)
    half = fit_log_linear(x.astype(np.float32), y, weight, ridge=0.01)
    np.testing.assert_allclose(half.log_level(x), whole.log_level(x), atol=2e-4)


def slow_penalised_fit(x, y, weight, ridge: float):
    """The same optimum, found by a general minimiser of the penalised likelihood."""
    weight = weight / weight.sum()
    centre = weight @ x
    spread = np.sqrt(weight @ (x - centre) ** 2)
    standard = np.clip((x - centre) / spread, -CLIP_SD, CLIP_SD)
    penalty = ridge

    def loss(beta):
        linear = beta[0] + standard @ beta[1:]
        deviance = weight @ (y * np.exp(-linear) + linear)
        slope = weight * (1 - y * np.exp(-linear))
        gradient = np.append(slope.sum(), standard.T @ slope + penalty * beta[1:])
        return deviance + 0.5 * penalty * (beta[1:] ** 2).sum(), gradient

    start = np.append(np.log(weight @ y), np.zeros(x.shape[1]))
    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    return found.x


@pytest.mark.parametrize("ridge", [0.001, 0.3])
@pytest.mark.parametrize("seed", [2, 3])
def test_the_blend_is_the_optimum_that_a_general_minimiser_finds(seed, ridge):
    x, y, weight, _, _ = planted_rows(seed, n=600, noise_shape=6.0)
    fit = fit_log_linear(x, y, weight, ridge=ridge)
    assert np.max(y * np.exp(-fit.log_level(x))) < RESIDUAL_LIMIT
    expected = slow_penalised_fit(x, y, weight, ridge)
    np.testing.assert_allclose([fit.intercept, *fit.slope], expected, rtol=1e-4, atol=1e-5)


def test_a_crash_pulls_no_harder_than_the_limit():
    x, y, weight, _, log_mean = planted_rows(4, n=5000)
    crashed = y.copy()
    crashed[::500] *= 1e4
    level = fit_log_linear(x, crashed, weight).log_level(x)
    # One row in 500 at 8 times its mean moves the level by about 7/500.
    assert np.abs(level - log_mean).mean() < 0.05


def test_an_infinite_ridge_leaves_a_feature_out():
    x, y, weight, _, _ = planted_rows(5, n=400)
    ridge = np.full(x.shape[1], 0.01)
    ridge[0] = np.inf
    without = fit_log_linear(x[:, 1:], y, weight, ridge=0.01)
    fit = fit_log_linear(x, y, weight, ridge=ridge)
    assert fit.slope[0] == 0.0
    np.testing.assert_allclose(fit.slope[1:], without.slope, rtol=1e-6)


def test_the_blend_weighs_sizes_least_and_the_clock_not_at_all():
    for spec in FREQUENCIES.values():
        shared, by_bucket = feature_names(spec)
        penalty = dict(zip((*shared, *by_bucket), blend_ridge(spec), strict=True))
        slowest = f"log_size_{spec.ewma_half_lives[-1]:g}"
        assert penalty[slowest] < penalty["range_24h"] < penalty["weekday"] == np.inf


def test_a_stronger_ridge_flattens_the_slopes():
    x, y, weight, _, _ = planted_rows(5, n=400)
    sizes = [np.abs(fit_log_linear(x, y, weight, ridge=r).slope).sum() for r in (0.0, 0.1, 100.0)]
    assert sizes[0] > sizes[1] > 10 * sizes[2]


def test_features_that_never_varied_and_targets_of_zero_do_no_harm():
    rng = np.random.default_rng(6)
    x = np.column_stack([rng.standard_normal(300), np.full(300, 3.0), np.zeros(300)])
    fit = fit_log_linear(x, np.zeros(300), np.ones(300))
    assert np.isfinite(fit.log_level(x)).all()
    varied = fit_log_linear(x, rng.gamma(2, 0.5, 300), np.ones(300))
    moved = varied.log_level(x + np.array([0, 1, 1])) - varied.log_level(x)
    assert np.abs(moved).max() < 1e-6


def test_a_feature_far_outside_what_was_seen_is_clipped():
    x, y, weight, _, _ = planted_rows(7, n=2000)
    fit = fit_log_linear(x, y, weight)
    far = np.tile(fit.centre, (2, 1))
    far[:, 0] += fit.spread[0] * np.array([CLIP_SD, 1e6])
    assert fit.log_level(far)[0] == fit.log_level(far)[1]


@given(seed=st.integers(0, 999), n=st.integers(1, 70), features=st.integers(1, 130))
@settings(max_examples=40)
def test_the_bytes_of_a_level_do_not_depend_on_its_neighbours(seed, n, features):
    rng = np.random.default_rng(seed)
    scale = LogLinearScale(
        centre=rng.standard_normal(features),
        spread=rng.uniform(0.5, 2, features),
        slope=rng.standard_normal(features),
        intercept=0.1,
    )
    x = rng.standard_normal((n, features))
    together = scale.log_level(x)
    alone = np.concatenate([scale.log_level(row[None]) for row in x])
    columns_first = scale.log_level(np.asfortranarray(x))
    assert together.tobytes() == alone.tobytes() == columns_first.tobytes()


def test_a_blend_survives_json():
    x, y, weight, _, _ = planted_rows(8, n=300)
    fit = fit_log_linear(x, y, weight)
    again = LogLinearScale.from_dict(json.loads(json.dumps(fit.to_dict())))
    assert again.log_level(x).tobytes() == fit.log_level(x).tobytes()


def test_equal_weights_count_every_row_and_one_heavy_row_counts_alone():
    assert effective_rows(np.full(50, 0.3)) == pytest.approx(50)
    assert effective_rows(np.array([1.0, 1e-9, 1e-9])) == pytest.approx(1)


# ---------------------------------------------------------------- the loss


@given(y=st.floats(0.01, 100), side=st.sampled_from([-1, 1]))
def test_the_loss_is_least_at_the_truth_and_grows_to_both_sides(y, side):
    truth = np.log(y)
    steps = truth + side * np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 40.0])
    loss = gamma_deviance(np.full(7, y), steps)
    assert np.all(np.diff(loss) > 0)
    assert loss[0] == pytest.approx(1 + truth)


def test_the_loss_is_the_gamma_likelihood_below_the_limit_and_straight_above():
    level = np.log(np.array([1.0, 0.5, 0.13, 1e-3, 1e-4]))
    loss = gamma_deviance(np.ones(5), level)
    np.testing.assert_allclose(loss[:3], np.exp(-level[:3]) + level[:3], rtol=1e-12)
    slope = (loss[4] - loss[3]) / (level[4] - level[3])
    assert slope == pytest.approx(1 - RESIDUAL_LIMIT)


def test_the_loss_of_what_is_unknown_is_unknown():
    loss = gamma_deviance(np.array([np.nan, 0.0]), np.zeros(2))
    assert np.isnan(loss[0])
    assert loss[1] == 0


# ---------------------------------------------------------------- regime controller


def outcomes(spec: FrequencySpec, n: int, bias: float, seed: int = 0, missing: float = 0.1):
    """Realised and expected mean |z|, realised `bias` times as large on average; (buckets, n)."""
    rng = np.random.default_rng(seed)
    shape = (len(spec.bucket_ends), n)
    expected = np.exp(0.3 * rng.standard_normal(shape))
    realised = bias * expected * rng.gamma(3, 1 / 3, shape)
    realised[rng.random(shape) < missing] = np.nan
    return realised, expected


def outcomes_per_day(spec: FrequencySpec) -> int:
    return spec.bars_per_day // controller_stride(spec)


@pytest.mark.parametrize("spec", SPECS)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_advancing_in_parts_gives_the_bytes_of_advancing_at_once(spec, cuts, seed):
    realised, expected = outcomes(spec, 300, 1.2, seed)
    times = MONDAY + 900 * np.arange(1, 301)
    start = neutral_controller(spec, MONDAY)
    whole = advance_controller(spec, start, int(times[-1]), realised, expected)
    controller, edges = start, [0, *sorted(cuts), 300]
    for low, high in pairwise(edges):
        end_ts = int(times[high - 1]) if high else MONDAY
        controller = advance_controller(
            spec, controller, end_ts, realised[:, low:high], expected[:, low:high]
        )
        controller = Controller.from_dict(json.loads(json.dumps(controller.to_dict())))
    assert controller.end_ts == whole.end_ts
    assert controller.realised.tobytes() == whole.realised.tobytes()
    assert controller.expected.tobytes() == whole.expected.tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_a_controller_that_has_seen_nothing_changes_nothing(spec):
    controller = neutral_controller(spec, MONDAY)
    assert controller.log_multiplier(0.5).tolist() == [0.0] * len(spec.bucket_ends)
    unknown = np.full((len(spec.bucket_ends), 40), np.nan)
    later = advance_controller(spec, controller, MONDAY + 36_000, unknown, unknown)
    assert np.abs(later.log_multiplier(0.5)).max() < 1e-12


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bias", [0.8, 1.2])
def test_the_controller_moves_towards_a_planted_bias(spec, bias):
    days = 40
    realised, expected = outcomes(spec, days * outcomes_per_day(spec), bias)
    start = neutral_controller(spec, MONDAY)
    end = advance_controller(spec, start, MONDAY + days * DAY_S, realised, expected)
    assert end.log_multiplier(1.0) == pytest.approx(
        np.full(len(start.realised), np.log(bias)), abs=0.06
    )
    half_gain = end.log_multiplier(0.5)
    assert half_gain == pytest.approx(end.log_multiplier(1.0) / 2)


@pytest.mark.parametrize("spec", SPECS)
def test_one_day_of_outcomes_does_not_outweigh_the_prior(spec):
    realised, expected = outcomes(spec, outcomes_per_day(spec), 1.2, missing=0.0)
    start = neutral_controller(spec, MONDAY)
    end = advance_controller(spec, start, MONDAY + DAY_S, realised, expected)
    moved = end.log_multiplier(1.0) / np.log(1.2)
    assert np.all((moved > 0.1) & (moved < 0.45))


def test_outcomes_lose_half_their_weight_per_half_life():
    start = neutral_controller(LF, MONDAY)
    n = int(CONTROLLER_HALF_LIFE_DAYS * outcomes_per_day(LF))
    nothing = np.full((len(LF.bucket_ends), n), np.nan)
    end = advance_controller(LF, start, MONDAY + 10 * DAY_S, nothing, nothing)
    np.testing.assert_allclose(end.realised, start.realised / 2, rtol=1e-9)


@given(seed=st.integers(0, 99), bias=st.sampled_from([1e-6, 0.3, 4.0, 1e6]), gain=st.floats(0, 3))
@settings(max_examples=30)
def test_the_controller_never_leaves_its_guard_rails(seed, bias, gain):
    realised, expected = outcomes(LF, 2000, bias, seed)
    end = advance_controller(LF, neutral_controller(LF, MONDAY), MONDAY, realised, expected)
    assert np.abs(end.log_multiplier(gain)).max() <= CONTROLLER_LIMIT
    if gain > 1:
        assert np.abs(end.log_multiplier(gain)).min() == CONTROLLER_LIMIT


def test_an_outcome_counts_only_where_both_sides_are_known():
    realised, expected = outcomes(LF, 50, 1.0, missing=0.0)
    holes = expected.copy()
    holes[:, ::2] = np.nan
    start = neutral_controller(LF, MONDAY)
    left = advance_controller(
        LF, start, MONDAY, np.where(np.isnan(holes), np.nan, realised), expected
    )
    right = advance_controller(LF, start, MONDAY, realised, holes)
    assert left.realised.tobytes() == right.realised.tobytes()
    assert left.expected.tobytes() == right.expected.tobytes()


# ---------------------------------------------------------------- scale along a path


def flat_standardiser(bar_s: int = 300) -> Standardiser:
    profile = flat_profile(bar_s, MarketHours.CONTINUOUS)
    return Standardiser(profile=profile, unit_bps=4.0, cap=9.0)


def wavy_standardiser(bar_s: int = 300) -> Standardiser:
    rng = np.random.default_rng(3)
    flat = flat_standardiser(bar_s)
    base = rng.uniform(0.3, 2, flat.profile.base.shape)
    return replace(flat, profile=replace(flat.profile, base=base))


@pytest.mark.parametrize("spec", SPECS)
def test_levels_are_met_at_bucket_centres_interpolated_between_and_flat_beyond(spec):
    levels = np.log(np.arange(1.0, len(spec.bucket_ends) + 1))
    centres = bucket_centres(spec)
    np.testing.assert_allclose(level_at(spec, levels, centres), np.exp(levels), rtol=1e-12)
    beyond = level_at(spec, levels, np.array([0.0, 0.5, centres[-1] + 1, 10 * centres[-1]]))
    np.testing.assert_allclose(beyond, np.exp(levels[[0, 0, -1, -1]]), rtol=1e-12)
    between = level_at(spec, levels, np.sqrt(centres[1:] * centres[:-1]))
    np.testing.assert_allclose(between, np.exp((levels[1:] + levels[:-1]) / 2), rtol=1e-12)
    dense = level_at(spec, levels, np.linspace(1, spec.horizon_bars, 999))
    assert np.all(np.diff(dense) >= 0)


def test_bucket_centres_are_the_mean_lead_of_their_bars():
    assert bucket_centres(HF).tolist() == [1, 2, 4, 10.5, 23, 45.5]


@given(
    start=st.integers(0, 7 * DAY_S),
    coarse=st.lists(st.integers(60, 4000), min_size=1, max_size=10),
    fine=st.lists(st.floats(0, 1), max_size=30),
    level=st.floats(-2, 2),
)
@settings(max_examples=50)
def test_with_a_flat_level_variance_adds_up_however_finely_the_path_is_cut(
    start, coarse, fine, level
):
    standardiser, levels = wavy_standardiser(), np.full(len(LF.bucket_ends), level)
    times = MONDAY + start + np.concatenate(([0], np.cumsum(coarse)))
    extra = times[0] + (np.array(fine) * (times[-1] - times[0])).astype(np.int64)
    finer = np.unique(np.concatenate((times, extra)))
    whole = step_scales(LF, standardiser, levels, times) ** 2
    parts = step_scales(LF, standardiser, levels, finer) ** 2
    owner = np.searchsorted(times, finer[1:]) - 1
    np.testing.assert_allclose(np.bincount(owner, parts), whole, rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_of_one_bar_has_the_size_of_unit_level_and_clock(spec):
    standardiser = wavy_standardiser(spec.bar_s)
    levels = np.log(np.linspace(0.7, 1.5, len(spec.bucket_ends)))
    times = MONDAY + spec.bar_s * np.arange(spec.horizon_bars + 1)
    clock = standardiser.profile.at(times[:-1])
    level = level_at(spec, levels, np.arange(1.0, spec.horizon_bars + 1))
    got = step_scales(spec, standardiser, levels, times)
    np.testing.assert_allclose(got, 4.0 * level * clock, rtol=1e-9)


def test_part_of_the_correction_is_added_to_the_blend():
    blended = blend_log_levels([0.1, 0.2], np.array([1.0, -2.0]), 0.5)
    assert blended.tolist() == pytest.approx([0.6, -0.8])


# ---------------------------------------------------------------- serial dependence


def test_a_planted_autocorrelation_is_found_and_shrunk():
    rng = np.random.default_rng(9)
    noise = rng.standard_normal(60_001)
    z = noise[1:] - 0.2 * noise[:-1]
    z[rng.random(len(z)) < 0.3] = np.nan
    found = shrunk_autocorrelation(z, np.ones(len(z)), lags=5)
    # MA(1): -0.2 / 1.04; the standard error is 1/√29000 = 0.006.
    assert len(found) == 1
    assert found[0] == pytest.approx(-0.7 * 0.2 / 1.04, abs=4 * 0.7 * 0.006)


def test_noise_has_no_autocorrelation_also_where_volatility_clusters():
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        calm = np.exp(0.8 * np.repeat(rng.standard_normal(500), 20))
        found.append(
            shrunk_autocorrelation(
                calm * rng.standard_normal(10_000), np.ones(10_000), lags=5, limit=10.0
            )
        )
    # Five lags at three standard errors: one noise in 75 may pass, so 40 give
    # none or one; three would have a chance of 2 %.
    assert sum(entry != () for entry in found) <= 2


def test_a_lag_that_does_not_count_is_zero_and_trailing_ones_are_dropped():
    rng = np.random.default_rng(11)
    noise = rng.standard_normal(80_002)
    z = noise[2:] + 0.2 * noise[:-2]
    found = shrunk_autocorrelation(z, np.ones(len(z)), lags=5)
    assert len(found) == 2
    assert found[0] == 0.0
    assert found[1] > 0.1


def test_old_bars_without_weight_say_nothing():
    rng = np.random.default_rng(12)
    noise = rng.standard_normal(40_001)
    z = np.concatenate([noise[1:] + 0.5 * noise[:-1], rng.standard_normal(20_000)])
    weight = np.concatenate([np.zeros(40_000), np.ones(20_000)])
    assert shrunk_autocorrelation(z, weight, lags=3) == ()
    old = shrunk_autocorrelation(z, 1 - weight, lags=3)
    assert old == pytest.approx([0.7 * 0.5 / 1.25], abs=4 * 0.7 * 0.005)


@pytest.mark.parametrize("z", [np.zeros(500), np.full(500, np.nan)])
def test_a_market_that_stands_still_has_no_autocorrelation(z):
    assert shrunk_autocorrelation(z, np.ones(500), lags=5) == ()


@given(
    phi=st.floats(-0.98, 0.98),
    second=st.floats(-0.9, 0.9),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_whatever_autocorrelation_is_found_paths_can_be_drawn_with_it(phi, second, seed):
    noise = np.random.default_rng(seed).standard_normal(3000)
    z = np.convolve(noise, phi ** np.arange(40)) + second * np.convolve(
        np.roll(noise, 2), phi ** np.arange(40)
    )
    found = shrunk_autocorrelation(z / np.abs(z).mean(), np.ones(len(z)), lags=5)
    assert np.isfinite(correlate_steps(np.ones((288, 1)), found)).all()


# ---------------------------------------------------------------- leaning on a prior


def scaled(prior: LogLinearScale, by: float) -> LogLinearScale:
    """The same function, written for features measured in other units."""
    return LogLinearScale(
        centre=prior.centre, spread=prior.spread * by, slope=prior.slope * by,
        intercept=prior.intercept,
    )  # fmt: skip


def test_a_hard_pull_gives_the_priors_own_forecast():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3000, 3)) * [1.0, 0.2, 3.0] + [0.5, 0.0, -1.0]
    y = rng.gamma(4, 0.25, 3000)
    prior = LogLinearScale(
        centre=np.zeros(3), spread=np.ones(3), slope=np.array([0.3, -0.2, 0.05]), intercept=0.1
    )
    for same in (prior, scaled(prior, 0.01)):
        fit = fit_log_linear(x, y, np.ones(3000), ridge=1e6, prior=same, intercept_ridge=1e6)
        np.testing.assert_allclose(fit.log_level(x), 0.1 + x @ [0.3, -0.2, 0.05], atol=1e-3)


def test_a_feature_that_hardly_moved_keeps_the_priors_slope_and_is_not_clipped_away():
    rng = np.random.default_rng(6)
    x = 0.01 * rng.standard_normal((2000, 1))
    y = np.exp(-5 * x[:, 0]) * rng.gamma(4, 0.25, 2000)
    prior = LogLinearScale(
        centre=np.zeros(1), spread=np.ones(1), slope=np.array([0.4]), intercept=0.0
    )
    fit = fit_log_linear(x, y, np.ones(2000), ridge=0.03, prior=prior)
    calm, loud = fit.log_level(np.array([[0.0], [1.0]]))
    assert loud - calm == pytest.approx(0.4, abs=0.1)
