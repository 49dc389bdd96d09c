"""Whether one forecaster beats another: paired differences and their error.

Prompts overlap in time, so their scores are not independent; standard errors
follow Newey & West (1987), Econometrica 55(3), with as many lags as prompts lie
within one horizon. Source of the test: Diebold & Mariano (1995), JBES 13(3).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

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
    def verdict(self) -> str:
        """The outcome in a word or two."""
        if abs(self.ratio - 1) < DECISIVE * self.error:
            return "no clear difference"
        return "better" if self.ratio < 1 else "worse"


def compare_scores(
    scores: FloatArray, against: FloatArray, start_ts: IntArray, *, horizon_s: int
) -> PairedComparison:
    """Compare two forecasters prompt by prompt; all arrays (n,), in time order."""
    base = float(against.mean())
    difference = (scores - against) / base
    return PairedComparison(
        ratio=1 + float(difference.mean()),
        error=newey_west_error(difference, start_ts, horizon_s=horizon_s),
        wins=float(np.mean(scores < against)),
        prompts=len(scores),
    )


def newey_west_error(values: FloatArray, start_ts: IntArray, *, horizon_s: int) -> float:
    """Standard error of the mean of values whose windows of `horizon_s` overlap; (n,)."""
    n = len(values)
    if n < 2:
        return float("inf")
    spacing = max(float(np.median(np.diff(start_ts))), 1.0)
    lags = min(int(horizon_s / spacing), n - 1)
    centred = values - values.mean()
    variance = float(centred @ centred) / n
    for lag in range(1, lags + 1):
        covariance = float(centred[lag:] @ centred[:-lag]) / n
        variance += 2 * (1 - lag / (lags + 1)) * covariance
    return float(np.sqrt(max(variance, 0.0) / n))
