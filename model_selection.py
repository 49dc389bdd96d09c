"""Weights and settings that every part of a model set earns out of sample.

Works on predictions for rows that no fit has seen (`Judged`, one per fold).
Each choice starts from "leave it out" and moves only for a gain that exceeds its
standard error over blocks of days.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from config import DAY_S, FrequencySpec
from domain import FloatArray, IntArray, MarketHistory
from features import ReturnGrid, Standardiser
from path_fitting import PastPrompt
from uncertainty_engine import (
    Controller,
    blend_log_levels,
    controller_stride,
    controller_sums,
    gamma_deviance,
    log_multipliers,
    neutral_controller,
    weigh_blend,
)

SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the log-linear blend that are tried
STRENGTHS: Final = (0.0, 0.5, 1.0)  # shares of the scale correction that are tried
GAINS: Final = (0.0, 0.2, 0.35, 0.5)  # gains of the controller that are tried
GAIN_ERRORS: Final = 2.0  # standard errors by which it must beat none
CENTRE_ERRORS: Final = 3.0  # standard errors by which a centre must beat zero, of ten leads


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """Predictions of one fold for rows that it did not see."""

    spec: FrequencySpec
    standardiser: Standardiser
    rows: IntArray  # (n,), bars of the grid
    end_ts: IntArray  # (n,), when they closed
    linear: FloatArray  # (buckets, n): log level by the blend, or what is left of it
    correction: FloatArray  # (buckets, n): LightGBM's raw score
    targets: FloatArray  # (buckets, n)
    fallback: FloatArray  # (n,): log of the single EWMA
    centre: FloatArray  # (leads, n): predicted return in scale
    centre_targets: FloatArray  # (leads, n)
    scale_rounds: int
    centre_rounds: tuple[int, ...]


def _pooled(judged: list[Judged], name: str) -> FloatArray:
    return np.concatenate([getattr(fold, name) for fold in judged], axis=-1)


def day_blocks(judged: list[Judged]) -> IntArray:
    """The day of every judged row: outcomes within a day are not independent."""
    return np.concatenate([fold.end_ts for fold in judged]) // DAY_S


def _mean_and_error(values: FloatArray, blocks: IntArray) -> tuple[float, float]:
    """Mean of the finite values (rows, n) and its standard error over blocks (n,)."""
    known = np.isfinite(values)
    if not known.any():
        return 0.0, np.inf
    _, inverse = np.unique(blocks, return_inverse=True)
    total = np.bincount(inverse, np.where(known, values, 0.0).sum(axis=0))
    count = np.bincount(inverse, known.sum(axis=0))
    mean = float(total.sum() / count.sum())
    error = float(np.sqrt(((total - mean * count) ** 2).sum()) / count.sum())
    return mean, error if np.count_nonzero(count) > 1 else np.inf


def choose_shares(judged: list[Judged], *, trusted: float) -> FloatArray:
    """How much of the blend to take beside the single EWMA, per bucket; (buckets,).

    The `trusted` share stands unless another one beats it by an error: 0 for a
    blend that has learned from its own weeks alone, and then loses at long leads;
    1 for one that leans on other markets.
    """
    fallback, linear = _pooled(judged, "fallback"), _pooled(judged, "linear")
    targets, blocks = _pooled(judged, "targets"), day_blocks(judged)
    shares = np.full(len(linear), trusted)
    for bucket, target in enumerate(targets):
        losses = {
            share: gamma_deviance(target, fallback + share * (linear[bucket] - fallback))
            for share in SHARES
        }
        best_gain = 0.0
        for share in SHARES:
            mean, error = _mean_and_error((losses[trusted] - losses[share])[None], blocks)
            if mean > max(error, best_gain):
                shares[bucket], best_gain = share, mean
    return shares


def apply_shares(judged: list[Judged], shares: FloatArray) -> list[Judged]:
    """The folds with what the shares leave of the blend."""
    return [
        replace(fold, linear=weigh_blend(fold.linear, fold.fallback, shares)) for fold in judged
    ]


def choose_strength(judged: list[Judged]) -> float:
    """The share of LightGBM's scale correction that beats none by a standard error."""
    linear, correction = _pooled(judged, "linear"), _pooled(judged, "correction")
    targets, blocks = _pooled(judged, "targets"), day_blocks(judged)
    best, best_gain = 0.0, 0.0
    for strength in STRENGTHS[1:]:
        gain = gamma_deviance(targets, linear) - gamma_deviance(
            targets, linear + strength * correction
        )
        mean, error = _mean_and_error(gain, blocks)
        if mean > max(error, best_gain):
            best, best_gain = strength, mean
    return best


def shrink_centre(
    predicted: FloatArray, realised: FloatArray, blocks: IntArray
) -> tuple[float, float]:
    """Weight of a centre and its skill, from out-of-sample pairs; all (n,).

    The weight is the regression slope of realised on predicted less its block
    standard error, at most 1, and exactly 0 unless the slope exceeds that error
    `CENTRE_ERRORS` times.
    Skill: 1 - squared error of the shrunk centre / that of zero.
    """
    keep = np.isfinite(realised) & np.isfinite(predicted)
    p, y = predicted[keep], realised[keep]
    power = float((p**2).sum())
    if power <= 1e-12:
        return 0.0, 0.0
    slope = float((p * y).sum() / power)
    _, inverse = np.unique(blocks[keep], return_inverse=True)
    error = float(np.sqrt((np.bincount(inverse, p * (y - slope * p)) ** 2).sum()) / power)
    if len(np.unique(inverse)) < 3 or slope <= CENTRE_ERRORS * error:
        return 0.0, 0.0
    # The rounds were chosen on these rows too, so the slope is taken down by its error.
    weight = min(slope - error, 1.0)
    return weight, 1 - float(((y - weight * p) ** 2).sum() / (y**2).sum())


def run_controller(
    judged: list[Judged], gains: Sequence[float]
) -> tuple[Controller, list[FloatArray]]:
    """Replay the controller over the judged rows.

    Returns its last state, which no gain changes, and for every gain the log
    multipliers (buckets, n) that it would have applied to each row, knowing only
    outcomes that had ended by then.
    """
    spec = judged[0].spec
    times = np.concatenate([fold.end_ts for fold in judged])
    neutral = neutral_controller(spec, int(times[0]))
    stride_s = controller_stride(spec) * spec.bar_s
    delay = -(-np.array(spec.bucket_ends) * spec.bar_s // stride_s)
    realised = _delayed(_pooled(judged, "targets"), delay)
    expected = _delayed(np.exp(_pooled(judged, "linear")), delay)
    sums = controller_sums(spec, neutral, realised, expected)
    before = np.ascontiguousarray(sums[0][:, :-1]), np.ascontiguousarray(sums[1][:, :-1])
    controller = Controller(
        end_ts=int(times[-1]), realised=sums[0][:, -1].copy(), expected=sums[1][:, -1].copy()
    )
    return controller, [log_multipliers(*before, gain) for gain in gains]


def _delayed(values: FloatArray, delay: IntArray) -> FloatArray:
    """Each row (buckets, n) moved back by its delay, NaN where nothing has ended yet."""
    column = np.arange(values.shape[1]) - delay[:, None]
    moved = np.take_along_axis(values, np.maximum(column, 0), axis=1)
    return np.where(column >= 0, moved, np.nan)


def choose_gain(judged: list[Judged]) -> tuple[float, Controller]:
    """The controller's gain that beats none by enough, and its state."""
    linear, targets = _pooled(judged, "linear"), _pooled(judged, "targets")
    blocks = day_blocks(judged)
    best, best_gain = 0.0, 0.0
    controller, tried = run_controller(judged, GAINS[1:])
    for gain, multipliers in zip(GAINS[1:], tried, strict=True):
        gained = gamma_deviance(targets, linear) - gamma_deviance(targets, linear + multipliers)
        mean, error = _mean_and_error(gained, blocks)
        if mean > max(GAIN_ERRORS * error, best_gain):
            best, best_gain = gain, mean
    return best, controller


def past_prompts(
    history: MarketHistory,
    grid: ReturnGrid,
    judged: list[Judged],
    strength: float,
    *,
    count: int,
    delay_bars: int,
) -> list[PastPrompt]:
    """Prompts of the usual length at judged rows, evenly spread, with their outcomes.

    `delay_bars` lie between the last known close and point 0 of a path.
    """
    spec = judged[0].spec
    steps = spec.prompt_length_s // spec.bar_s
    closes = _closes_on_grid(history, grid)
    candidates = [
        (fold, column)
        for fold in judged
        for column, row in enumerate(fold.rows)
        if row + delay_bars + steps < len(closes) and np.isfinite(closes[row])
    ]
    chosen = np.unique(np.linspace(0, len(candidates) - 1, count).astype(int)) if candidates else ()
    prompts = []
    for index in chosen:
        fold, column = candidates[index]
        row = int(fold.rows[column])
        points = row + delay_bars + np.arange(steps + 1)
        if np.isfinite(closes[points]).mean() < 0.05:
            continue  # a closed market realises nothing to score
        prompts.append(
            PastPrompt(
                standardiser=fold.standardiser,
                log_levels=blend_log_levels(
                    fold.linear[:, column], fold.correction[:, column], strength
                ),
                anchor_price=float(closes[row]),
                anchor_ts=int(fold.end_ts[column]),
                point_ts=grid.open_ts[points] + grid.bar_s,
                realised=closes[points],
            )
        )
    return prompts


def _closes_on_grid(history: MarketHistory, grid: ReturnGrid) -> FloatArray:
    """Closes on the regular grid; (n,), NaN where a bar is missing."""
    closes = np.full(len(grid), np.nan)
    index = (history.bars.open_ts - grid.open_ts[0]) // grid.bar_s
    closes[index] = history.bars.close
    return closes


def skills_by_bucket(judged: list[Judged], strength: float) -> FloatArray:
    """Gamma deviance that the scale gains on the single EWMA; (buckets,)."""
    targets = _pooled(judged, "targets")
    level = blend_log_levels(_pooled(judged, "linear"), _pooled(judged, "correction"), strength)
    gain = gamma_deviance(targets, _pooled(judged, "fallback")) - gamma_deviance(targets, level)
    return np.array([np.nanmean(row) if np.isfinite(row).any() else 0.0 for row in gain])


def centre_weights(judged: list[Judged], spec: FrequencySpec) -> dict[int, tuple[float, float]]:
    """Shrinkage and skill of the centre at every anchor lead, by lead in seconds.

    Judged around the means of each fold, and a centre must gain in every one of
    them: a drift that happened to last is no skill.
    """
    judged = [_without_drift(fold) for fold in judged]
    predicted, realised = _pooled(judged, "centre"), _pooled(judged, "centre_targets")
    blocks = day_blocks(judged)
    weights = {}
    for lead, lead_s in enumerate(spec.leads_s):
        weight, skill = shrink_centre(predicted[lead], realised[lead], blocks)
        gains = [_squared_error_saved(fold, lead, weight) for fold in judged]
        weights[lead_s] = (weight, skill) if min(gains) > 0 else (0.0, 0.0)
    return weights


def _without_drift(fold: Judged) -> Judged:
    return replace(fold, centre=_centred(fold.centre), centre_targets=_centred(fold.centre_targets))


def _centred(values: FloatArray) -> FloatArray:
    """Rows less the mean of their known values; rows without any stay unknown."""
    known = np.isfinite(values)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    mean = np.where(known, values, 0.0).sum(axis=1, keepdims=True) / count
    return np.asarray(values - mean, dtype=np.float64)


def _squared_error_saved(fold: Judged, lead: int, weight: float) -> float:
    predicted, realised = weight * fold.centre[lead], fold.centre_targets[lead]
    return float(np.nansum(realised**2 - (realised - predicted) ** 2))
