"""Whether one forecaster beats another: paired differences and their error.

Prompts overlap in time, and a quiet or wild day colours all of its prompts, so
differences are not independent. Standard errors weigh every pair of prompts by
how near they are (Bartlett's kernel over clock time, so prompts need not be
evenly spaced), across markets too. Sources: Newey & West (1987), Econometrica
55(3); Driscoll & Kraay (1998), Rev. Econ. Stat. 80(4), for several markets;
Diebold & Mariano (1995), JBES 13(3), for the test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import ndtr

from config import DAY_S
from domain import FloatArray, IntArray

DECISIVE: Final = 2.0  # standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """Mean score of one forecaster over that of another, on the same prompts."""

    ratio: float  # below 1: the first is better
    error: float  # standard error of the ratio
    wins: float  # share of prompts on which the first scores lower
    prompts: int

    @property
    def errors(self) -> float:
        """By how many standard errors the ratio misses 1; negative: the first is better."""
        if self.ratio == 1.0:
            return 0.0
        return (self.ratio - 1) / max(self.error, 1e-300)

    @property
    def p_value(self) -> float:
        """Chance of a difference this large, either way, between equals."""
        return float(2 * ndtr(-abs(self.errors)))

    @property
    def verdict(self) -> str:
        """The outcome in a word or two."""
        if abs(self.errors) < DECISIVE:
            return "no clear difference"
        return "better" if self.ratio < 1 else "worse"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedScores:
    """Scores of two forecasters on the same prompts of one market; all (n,)."""

    scores: FloatArray
    against: FloatArray
    start_ts: IntArray

    @property
    def relative(self) -> FloatArray:
        """Differences in units of the second one's mean score; (n,)."""
        unit = max(float(self.against.mean()), 1e-12)  # nothing to score scores nothing
        return np.asarray((self.scores - self.against) / unit, dtype=np.float64)


def compare_scores(
    scores: FloatArray, against: FloatArray, start_ts: IntArray, *, horizon_s: int
) -> PairedComparison:
    """Compare two forecasters prompt by prompt; all arrays (n,)."""
    market = PairedScores(scores=scores, against=against, start_ts=start_ts)
    return compare_markets([market], horizon_s=horizon_s)


def compare_markets(markets: Sequence[PairedScores], *, horizon_s: int) -> PairedComparison:
    """Compare two forecasters over several markets, each of which counts the same.

    The ratio is the mean of the markets' ratios. What happens at the same time in
    several markets is one event, not several: it enters the error as such.
    """
    share = 1 / len(markets)
    shares = [share * _shares_of_error(market.relative) for market in markets]
    times = np.concatenate([market.start_ts for market in markets])
    wins = [float(np.mean(market.scores < market.against)) for market in markets]
    return PairedComparison(
        ratio=1 + share * sum(float(market.relative.mean()) for market in markets),
        error=_error_of_sum(np.concatenate(shares), times, horizon_s),
        wins=share * sum(wins),
        prompts=len(times),
    )


def newey_west_error(values: FloatArray, start_ts: IntArray, *, horizon_s: int) -> float:
    """Standard error of the mean of values whose windows of `horizon_s` overlap; (n,)."""
    return _error_of_sum(_shares_of_error(values), start_ts, horizon_s)


def _shares_of_error(values: FloatArray) -> FloatArray:
    """What every value adds to the error of their mean; infinite for a single one."""
    n = len(values)
    if n < 2:
        return np.full(n, np.inf)
    return np.asarray((values - values.mean()) / np.sqrt(n * (n - 1)), dtype=np.float64)


def _error_of_sum(shares: FloatArray, start_ts: IntArray, horizon_s: int) -> float:
    """Root of Σ kernel(|tᵢ - tⱼ|) uᵢ uⱼ over all pairs."""
    if not np.isfinite(shares).all():
        return float("inf")
    order = np.argsort(start_ts, kind="stable")
    u, t = shares[order], start_ts[order]
    reach = horizon_s + DAY_S
    variance = float(u @ u)
    for lag in range(1, len(u)):
        distance = t[lag:] - t[:-lag]
        if distance.min() >= reach:
            break
        weight = np.maximum(1 - distance / reach, 0.0)
        variance += 2 * float((weight * u[lag:]) @ u[:-lag])
    return float(np.sqrt(max(variance, 0.0)))
