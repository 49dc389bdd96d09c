"""Every part earns its weight out of sample; what says nothing gets none."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, MarketHours
from domain import Bars, MarketHistory
from features import Standardiser, return_grid
from model_selection import (
    CENTRE_ERRORS,
    GAINS,
    SHARES,
    Judged,
    apply_shares,
    centre_weights,
    choose_gain,
    choose_shares,
    choose_strength,
    day_blocks,
    past_prompts,
    run_controller,
    shrink_centre,
    skills_by_bucket,
)
from seasonality import flat_profile
from uncertainty_engine import (
    CONTROLLER_HALF_LIFE_DAYS,
    CONTROLLER_LIMIT,
    CONTROLLER_PRIOR_DAYS,
    gamma_deviance,
)

HF, LF = FREQUENCIES[Frequency.HF], FREQUENCIES[Frequency.LF]
START = 1_761_523_200  # Monday 2025-10-27 00:00 UTC
STRIDE_S = 900  # between judged rows


def standardiser_of(spec: FrequencySpec) -> Standardiser:
    profile = flat_profile(spec.bar_s, MarketHours.CONTINUOUS)
    return Standardiser(profile=profile, unit_bps=5.0, cap=9.0)


def judged_fold(spec: FrequencySpec, days: float, *, seed: int = 0, start: int = START) -> Judged:
    """A fold whose blend is right: targets scatter around the level that it says."""
    rng = np.random.default_rng(seed)
    n = int(days * DAY_S / STRIDE_S)
    shape = (len(spec.bucket_ends), n)
    linear = 0.3 * rng.standard_normal(shape)
    end_ts = start + STRIDE_S * np.arange(1, n + 1, dtype=np.int64)
    leads = (len(spec.leads_s), n)
    return Judged(
        spec=spec,
        standardiser=standardiser_of(spec),
        rows=(end_ts - START) // spec.bar_s - 1,
        end_ts=end_ts,
        linear=linear,
        correction=np.zeros(shape),
        targets=np.exp(linear) * rng.gamma(4, 1 / 4, shape),
        fallback=linear.mean(axis=0),
        centre=rng.standard_normal(leads),
        centre_targets=rng.standard_normal(leads),
        scale_rounds=1,
        centre_rounds=(1,) * len(spec.leads_s),
    )


def two_folds(spec: FrequencySpec, days: float, seed: int = 0) -> list[Judged]:
    first = judged_fold(spec, days, seed=seed)
    second = judged_fold(spec, days, seed=seed + 1000, start=int(first.end_ts[-1]))
    return [first, second]


# ---------------------------------------------------------------- the centre


def pairs(seed: int, slope: float, days: int = 60, common: float = 0.0, size: float = 0.2):
    """Predictions, outcomes and days; a share of both is common to all rows of a day."""
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(days), 96)

    def drawn() -> np.ndarray:
        own, shared = rng.standard_normal(len(day)), rng.standard_normal(days)[day]
        return np.asarray(np.sqrt(1 - common) * own + np.sqrt(common) * shared)

    predicted = size * drawn()
    return predicted, slope * predicted + drawn(), day


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_a_centre_of_noise_weighs_exactly_nothing(common):
    weights = [shrink_centre(*pairs(seed, 0.0, common=common)) for seed in range(40)]
    # Beyond three standard errors on one side: one noise in 700.
    assert weights.count((0.0, 0.0)) >= 39


def test_a_planted_signal_gets_its_slope_less_a_standard_error():
    predicted, realised, day = pairs(1, 0.7)
    weight, skill = shrink_centre(predicted, realised, day)
    error = 1 / np.sqrt((predicted**2).sum())
    assert weight == pytest.approx(0.7 - error, abs=3 * error)
    assert weight < 0.7 + 2 * error
    left = realised - weight * predicted
    assert skill == pytest.approx(1 - (left**2).sum() / (realised**2).sum())
    assert skill > 0


def test_outcomes_that_are_alike_within_a_day_make_the_weight_smaller():
    apart, alike = (
        np.mean([shrink_centre(*pairs(s, 0.7, common=c, size=1.0))[0] for s in range(20)])
        for c in (0.0, 0.9)
    )
    # 5760 outcomes give an error of 0.013; 60 days of nearly one outcome each about 0.12.
    assert apart == pytest.approx(0.7 - 0.013, abs=0.01)
    assert alike == pytest.approx(0.7 - 0.12, abs=0.06)


def test_a_centre_is_never_made_larger_than_it_was_nor_turned_round():
    predicted, realised, day = pairs(3, 3.0)
    assert shrink_centre(predicted, realised, day)[0] == 1.0
    assert shrink_centre(predicted, -realised, day) == (0.0, 0.0)


def test_the_slope_must_beat_three_of_its_errors():
    predicted, realised, day = pairs(4, 0.5)
    centred = realised - (predicted @ realised) / (predicted @ predicted) * predicted
    scores = np.bincount(day, predicted * centred)
    error = np.sqrt((scores**2).sum()) / (predicted @ predicted)
    below, above = (
        shrink_centre(predicted, centred + factor * CENTRE_ERRORS * error * predicted, day)[0]
        for factor in (0.99, 1.01)
    )
    assert below == 0.0
    assert above == pytest.approx((1.01 * CENTRE_ERRORS - 1) * error)


def test_unknown_outcomes_are_left_out():
    predicted, realised, day = pairs(5, 0.8)
    holes = np.arange(0, len(day), 3)
    gone = np.setdiff1d(np.arange(len(day)), holes)
    expected = shrink_centre(predicted[gone], realised[gone], day[gone])
    realised[holes[::2]], predicted[holes[1::2]] = np.nan, np.nan
    assert shrink_centre(predicted, realised, day) == expected


@pytest.mark.parametrize(
    ("predicted", "realised"),
    [
        (np.zeros(100), np.ones(100)),
        (np.ones(100), np.zeros(100)),
        (np.ones(100), np.full(100, np.nan)),
        (np.zeros(0), np.zeros(0)),
    ],
)
def test_where_nothing_moved_or_is_known_a_centre_weighs_nothing(predicted, realised):
    assert shrink_centre(predicted, realised, np.arange(len(predicted)) // 10) == (0.0, 0.0)


def test_two_days_are_too_few_to_give_a_centre_weight():
    predicted, realised, _ = pairs(6, 1.0, days=2)
    days = np.repeat([0, 1], 96)
    assert shrink_centre(predicted, realised, days) == (0.0, 0.0)


def test_every_anchor_lead_has_a_weight_of_its_own():
    folds = two_folds(LF, 30)
    for fold in folds:
        fold.centre_targets[2] += 0.8 * fold.centre[2]
    weights = centre_weights(folds, LF)
    assert list(weights) == list(LF.leads_s)
    assert [weight > 0 for weight, _ in weights.values()] == [False, False, True, False]
    predicted, realised = (
        np.concatenate([around_mean(getattr(fold, name)[2]) for fold in folds])
        for name in ("centre", "centre_targets")
    )
    expected = shrink_centre(predicted, realised, day_blocks(folds))
    assert weights[10_800] == pytest.approx(expected)


def around_mean(values):
    return values - values.mean()


def test_a_drift_that_lasted_through_every_fold_is_no_skill():
    folds = two_folds(LF, 30)
    for fold in folds:
        fold.centre_targets[1] += 2.0
        fold.centre[1] += 2.0
    assert centre_weights(folds, LF)[1800] == (0.0, 0.0)


# ---------------------------------------------------------------- blend and correction


def with_missing_level(folds: list[Judged], seed: int, share: float) -> list[Judged]:
    """The blend misses something of the truth, of which the correction knows `1 / share`."""
    rng = np.random.default_rng(seed)
    changed = []
    for fold in folds:
        missed = 0.3 * rng.standard_normal(fold.linear.shape)
        changed.append(replace(fold, linear=fold.linear - missed, correction=missed / share))
    return changed


def test_a_correction_of_noise_gets_no_strength():
    found = []
    for seed in range(10):
        folds = two_folds(LF, 10, seed)
        rng = np.random.default_rng(seed)
        noisy = [
            replace(fold, correction=0.2 * rng.standard_normal(fold.linear.shape)) for fold in folds
        ]
        found.append(choose_strength(noisy))
    assert found == [0.0] * 10


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (0.6, 0.5), (1.0, 1.0)])
def test_an_informative_correction_gets_the_strength_that_it_deserves(share, expected):
    assert choose_strength(with_missing_level(two_folds(LF, 10), 1, share)) == expected


def test_a_correction_that_is_absurdly_small_gets_no_strength():
    folds = [replace(fold, correction=fold.correction - 50) for fold in two_folds(LF, 10)]
    assert choose_strength(folds) == 0.0


def test_a_gain_on_one_day_alone_is_not_enough():
    folds = two_folds(LF, 10, 3)
    rng = np.random.default_rng(3)
    for fold in folds:
        fold.correction[:] = 0.02 * rng.standard_normal(fold.linear.shape)
    lucky = folds[0].end_ts < START + DAY_S
    folds[0].linear[:, lucky] -= 0.4
    folds[0].correction[:, lucky] = 0.4
    # The mean gain is that one day's, and so is its error.
    assert choose_strength(folds) == 0.0
    for fold in folds:
        fold.linear[:, ~lucky] -= 0.4
        fold.correction[:, ~lucky] = 0.4
    assert choose_strength(folds) == 1.0


def test_the_blend_keeps_the_share_by_which_it_beats_the_single_average():
    folds = two_folds(LF, 20)
    for fold in folds:
        truth = fold.linear.copy()
        fold.linear[1] = np.random.default_rng(1).standard_normal(len(fold.end_ts))
        fold.linear[2] = fold.fallback + 2 * (truth[2] - fold.fallback)
    shares = choose_shares(folds, trusted=0.0)
    assert shares[0] == shares[3] == max(SHARES)
    assert shares[1] == 0.0
    assert shares[2] == 0.5
    kept = apply_shares(folds, shares)
    for fold, left in zip(folds, kept, strict=True):
        np.testing.assert_array_equal(
            left.linear[0], fold.fallback + (fold.linear[0] - fold.fallback)
        )
        np.testing.assert_array_equal(left.linear[1], fold.fallback)
        np.testing.assert_allclose(left.linear[2], (fold.fallback + fold.linear[2]) / 2)
        assert left.targets is fold.targets


def test_a_trusted_blend_is_left_only_for_a_clear_gain():
    folds = two_folds(LF, 20)
    rng = np.random.default_rng(1)
    for fold in folds:
        fold.linear[1] = fold.fallback + 2 * rng.standard_normal(len(fold.end_ts))
        fold.linear[2] = fold.fallback
        fold.targets[3] = np.nan
    shares = choose_shares(folds, trusted=1.0)
    assert shares[0] == shares[2] == shares[3] == 1.0
    assert shares[1] == 0.0


def test_the_skill_of_a_bucket_is_what_its_level_gains_on_the_single_average():
    folds = with_missing_level(two_folds(LF, 10), 4, 1.0)
    for fold in folds:
        fold.targets[5] = np.nan
        fold.targets[0, ::2] = np.nan
    skills = skills_by_bucket(folds, 1.0)
    assert skills[5] == 0.0
    assert np.all(skills[[0, 1, 2, 3, 4, 6, 7]] > 0.01)
    pooled = [
        np.concatenate([getattr(f, n)[0] for f in folds])
        for n in ("targets", "linear", "correction")
    ]
    fallback = np.concatenate([fold.fallback for fold in folds])
    gain = gamma_deviance(pooled[0], fallback) - gamma_deviance(pooled[0], pooled[1] + pooled[2])
    assert skills[0] == pytest.approx(np.nanmean(gain))
    assert np.all(skills_by_bucket(folds, 0.0)[[1, 2, 3]] < skills[[1, 2, 3]])


# ---------------------------------------------------------------- regime controller


def biased(folds: list[Judged], bias: float) -> list[Judged]:
    return [replace(fold, targets=bias * fold.targets) for fold in folds]


def ended_by(spec: FrequencySpec, times: np.ndarray, now: int) -> np.ndarray:
    """Which outcomes had ended; (buckets, n)."""
    ends = np.array(spec.bucket_ends)[:, None] * spec.bar_s
    return np.asarray(times + ends <= now)


@pytest.mark.parametrize("spec", [HF, LF], ids=["hf", "lf"])
@given(at=st.integers(1, 380), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_the_controller_knows_only_outcomes_that_had_ended(spec, at, seed):
    folds = two_folds(spec, 2, seed)
    times = np.concatenate([fold.end_ts for fold in folds])
    now, edge = int(times[at]), len(folds[0].end_ts)
    later = ~ended_by(spec, times, now)
    wild = [
        replace(fold, targets=np.where(part, 7.0 * fold.targets, fold.targets))
        for fold, part in zip(folds, (later[:, :edge], later[:, edge:]), strict=True)
    ]
    _, (honest,) = run_controller(folds, (0.5,))
    _, (corrupted,) = run_controller(wild, (0.5,))
    assert honest[:, : at + 1].tobytes() == corrupted[:, : at + 1].tobytes()


@pytest.mark.parametrize("spec", [HF, LF], ids=["hf", "lf"])
def test_an_outcome_is_used_soon_after_it_has_ended(spec):
    folds = two_folds(spec, 2)
    wild = [replace(folds[0], targets=folds[0].targets.copy()), folds[1]]
    wild[0].targets[:, 10] *= 5.0
    _, (honest,) = run_controller(folds, (0.5,))
    _, (changed,) = run_controller(wild, (0.5,))
    first = [int(np.flatnonzero(row)[0]) for row in honest != changed]
    times = np.concatenate([fold.end_ts for fold in folds])
    waited_s = times[first] - times[10] - np.array(spec.bucket_ends) * spec.bar_s
    assert np.all((waited_s >= 0) & (waited_s <= 2 * STRIDE_S))


def slow_multiplier(folds: list[Judged], gain: float, column: int, bucket: int) -> float:
    """The controller's rule written out for one row."""
    spec = folds[0].spec
    targets = np.concatenate([fold.targets[bucket] for fold in folds])
    expected = np.exp(np.concatenate([fold.linear[bucket] for fold in folds]))
    wait = int(np.ceil(spec.bucket_ends[bucket] * spec.bar_s / STRIDE_S))
    decay = 0.5 ** (STRIDE_S / DAY_S / CONTROLLER_HALF_LIFE_DAYS)
    prior = CONTROLLER_PRIOR_DAYS * DAY_S / STRIDE_S * decay**column
    sums = [prior, prior]
    for row in range(column - wait):
        if np.isfinite(targets[row]):
            weight = decay ** (column - 1 - wait - row)
            sums = [sums[0] + weight * targets[row], sums[1] + weight * expected[row]]
    return float(np.clip(gain * np.log(sums[0] / sums[1]), -CONTROLLER_LIMIT, CONTROLLER_LIMIT))


@pytest.mark.parametrize("spec", [HF, LF], ids=["hf", "lf"])
def test_multipliers_follow_the_rule_written_out(spec):
    folds = biased(two_folds(spec, 2), 1.3)
    folds[0].targets[:, 20:30] = np.nan
    _, (multipliers,) = run_controller(folds, (0.5,))
    for column in (0, 1, 50, 200, 383):
        for bucket in range(len(spec.bucket_ends)):
            expected = slow_multiplier(folds, 0.5, column, bucket)
            assert multipliers[bucket, column] == pytest.approx(expected, abs=1e-12)


def test_a_forecast_that_is_right_needs_no_controller():
    assert [choose_gain(two_folds(LF, 5, seed))[0] for seed in range(4)] == [0.0] * 4


@pytest.mark.parametrize("bias", [0.75, 1.3])
def test_a_lasting_bias_earns_the_controller_its_gain(bias):
    folds = biased(two_folds(LF, 8), bias)
    gain, controller = choose_gain(folds)
    assert gain == max(GAINS)
    assert np.all(np.sign(controller.log_multiplier(gain)) == np.sign(np.log(bias)))
    assert controller.end_ts == folds[1].end_ts[-1]
    again, _ = run_controller(folds, ())
    assert controller.realised.tobytes() == again.realised.tobytes()
    assert controller.expected.tobytes() == again.expected.tobytes()


# ---------------------------------------------------------------- past prompts


def history_of(spec: FrequencySpec, days: int, keep=None) -> MarketHistory:
    rng = np.random.default_rng(9)
    n = days * spec.bars_per_day
    keep = np.ones(n, dtype=bool) if keep is None else keep
    close = 100 * np.exp(np.cumsum(5 * rng.standard_normal(n)) / 1e4)[keep]
    absent = np.full(len(close), np.nan)
    bars = Bars(
        open_ts=START + spec.bar_s * np.flatnonzero(keep), open=absent, high=absent,
        low=absent, close=close, volume=absent, bar_s=spec.bar_s, feed="test",
    )  # fmt: skip
    return MarketHistory(
        asset="BTC", frequency=spec.frequency, bars=bars, price_bars=bars, source="archive"
    )


@pytest.mark.parametrize(("spec", "delay"), [(HF, 2), (LF, 0)], ids=["hf", "lf"])
def test_a_past_prompt_holds_what_was_known_and_what_came_of_it(spec, delay):
    history = history_of(spec, 4)
    grid = return_grid(history.bars)
    folds = two_folds(spec, 2)
    for fold in folds:
        fold.correction[:] = 0.4
    prompts = past_prompts(history, grid, folds, 0.5, count=7, delay_bars=delay)
    assert len(prompts) == 7
    price = dict(zip(history.bars.close_ts.tolist(), history.bars.close.tolist(), strict=True))
    rows = {
        int(end_ts): fold.linear[:, column]
        for fold in folds
        for column, end_ts in enumerate(fold.end_ts)
    }
    for prompt in prompts:
        assert prompt.anchor_price == price[prompt.anchor_ts]
        assert prompt.point_ts[0] - prompt.anchor_ts == delay * spec.bar_s
        assert np.all(np.diff(prompt.point_ts) == spec.prompt_increment_s)
        assert prompt.point_ts[-1] - prompt.point_ts[0] == spec.prompt_length_s
        assert prompt.realised.tolist() == [price[int(ts)] for ts in prompt.point_ts]
        np.testing.assert_allclose(prompt.log_levels, rows[prompt.anchor_ts] + 0.2)
    spacing = np.diff([prompt.anchor_ts for prompt in prompts])
    assert spacing.min() > 0
    assert spacing.max() - spacing.min() <= 2 * STRIDE_S
    assert prompts[-1].point_ts[-1] <= history.bars.end_ts < prompts[-1].point_ts[-1] + STRIDE_S * 2


def test_a_closed_market_makes_no_prompt_and_gaps_stay_unknown():
    keep = np.ones(4 * LF.bars_per_day, dtype=bool)
    keep[10 : 3 * LF.bars_per_day] = False  # closed from the first hour to the last day
    keep[::7] = False
    keep[0] = True
    history = history_of(LF, 4, keep)
    prompts = past_prompts(
        history, return_grid(history.bars), two_folds(LF, 2), 0.0, count=300, delay_bars=0
    )
    known = set(history.bars.close_ts.tolist())
    assert all(prompt.anchor_ts in known for prompt in prompts)
    assert all(np.isfinite(prompt.realised).mean() >= 0.05 for prompt in prompts)
    for prompt in prompts:
        there = [int(ts) in known for ts in prompt.point_ts]
        assert np.isfinite(prompt.realised).tolist() == there
    assert {prompt.anchor_ts // DAY_S for prompt in prompts} <= {START // DAY_S, START // DAY_S + 3}


def test_a_history_without_room_for_an_outcome_makes_no_prompt():
    history = history_of(LF, 1)
    folds = [judged_fold(LF, 1)]
    assert past_prompts(history, return_grid(history.bars), folds, 0.0, count=5, delay_bars=0) == []
