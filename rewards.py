"""From the scores of a field of miners to what they are paid.

Prompt by prompt: misses are filled in, outliers clipped or capped, the best score
subtracted. Then an average over the window, weighted by asset, and a softmax per
competition; competitions are added by their share. Everything that differs between
protocols comes from the `ProtocolProfile`.
Source: the network's reward rules as described in its public code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from config import DAY_S, asset_spec
from domain import FloatArray
from protocol import Competition, ProtocolProfile


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FieldScores:
    """The scores of a whole field on one prompt, counted from its best.

    `points` (miners,): 0 for the best, NaN for a miner that was not there yet.
    `miss` is what a miss counts, NaN if the whole field missed.
    """

    points: FloatArray
    miss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPrompt:
    """One prompt of an asset and what every miner of the field scored on it.

    `totals` by miner, as `ScoreCard.total` has it: negative or not finite is a miss.
    A miner that had not joined yet is not in it.
    """

    asset: str
    scored_ts: int
    totals: Mapping[str, float]


def field_scores(totals: FloatArray, profile: ProtocolProfile) -> FieldScores:
    """Scores of one prompt counted from the best; `totals` (miners,), misses < 0 or not finite.

    A miss gets a percentile of the answers that were not clipped. If everybody
    missed, the prompt counts for nobody.
    """
    answered = np.isfinite(totals) & (totals >= 0)
    if not answered.any():
        return FieldScores(points=np.full(len(totals), np.nan), miss=np.nan)
    valid = totals[answered]
    ordinary = valid
    if profile.clip_at_median_multiple is not None:
        limit = profile.clip_at_median_multiple * float(np.median(valid))
        if limit > 0:
            ordinary = valid[valid <= limit]
            valid = np.minimum(valid, limit)
    miss = float(np.percentile(ordinary, profile.miss_percentile))
    if profile.cap_at_percentile:
        valid = np.minimum(valid, miss)
    filled = np.full(len(totals), miss)
    filled[answered] = valid
    best = float(filled.min())
    return FieldScores(points=filled - best, miss=miss - best)


def leaderboard(fields: Sequence[FieldScores], weights: FloatArray) -> FloatArray:
    """Weighted average of the points of every miner; (miners,), lower is better.

    `fields` in time order, `weights` (prompts,) by asset. A miner that joined later is
    back-filled with what a miss counted; one that was never there gets infinity.
    """
    points = np.stack([field.points for field in fields])
    misses = np.array([field.miss for field in fields])
    joined = np.logical_or.accumulate(np.isfinite(points), axis=0)
    points = np.where(joined, points, misses[:, None])
    counted = np.isfinite(points) * weights[:, None]
    total = np.where(np.isfinite(points), points, 0.0) * weights[:, None]
    average = total.sum(axis=0) / np.maximum(counted.sum(axis=0), 1e-300)
    return np.where(joined[-1] & (counted.sum(axis=0) > 0), average, np.inf)


def softmax_rewards(scores: FloatArray, beta: float) -> FloatArray:
    """Shares of one competition, ∝ exp(β · leaderboard score); (miners,), sum 1."""
    if not np.isfinite(scores).any():
        return np.zeros(len(scores))
    exponent = beta * scores
    raised = np.exp(exponent - exponent.max())
    return np.asarray(raised / raised.sum(), dtype=np.float64)


def competition_rewards(
    prompts: Sequence[ScoredPrompt], competition: Competition, profile: ProtocolProfile, now: int
) -> dict[str, float]:
    """Shares of one competition at `now`, over the prompts of its window; by miner."""
    begin = now - competition.window_days * DAY_S
    window = [prompt for prompt in prompts if begin <= prompt.scored_ts <= now]
    if not window:
        return {}
    window.sort(key=lambda prompt: prompt.scored_ts)
    miners = sorted({miner for prompt in window for miner in prompt.totals})
    weights = np.array([asset_spec(prompt.asset).weight for prompt in window])
    fields = [_field_of(prompt, miners, profile) for prompt in window]
    shares = softmax_rewards(leaderboard(fields, weights), competition.beta)
    return dict(zip(miners, shares.tolist(), strict=True))


def _field_of(prompt: ScoredPrompt, miners: list[str], profile: ProtocolProfile) -> FieldScores:
    """The prompt's points in the order of `miners`, NaN for those that were not there."""
    there = np.array([miner in prompt.totals for miner in miners])
    totals = np.array([prompt.totals[miner] for miner in miners if miner in prompt.totals])
    field = field_scores(totals, profile)
    points = np.full(len(miners), np.nan)
    points[there] = field.points
    return FieldScores(points=points, miss=field.miss)


def combined_rewards(
    by_competition: Mapping[str, Mapping[str, float]], profile: ProtocolProfile
) -> dict[str, float]:
    """Shares of all competitions added up by their part of the pool; by miner.

    A competition without rewards pays nobody: its part is not spread over the others.
    """
    combined: dict[str, float] = {}
    for name, rewards in by_competition.items():
        for miner, reward in rewards.items():
            paid = profile.competitions[name].share * reward
            combined[miner] = combined.get(miner, 0.0) + paid
    return combined
