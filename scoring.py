"""The validator's score: sums of CRPS over the intervals of a competition.

Lower is better. Statistics come first (one CRPS per observation), sums after.
Source: the network's scoring rules as described in its public code; CRPS is
the M² ("nrg") estimator, mean|y - x| - ΣΣ|y_i - y_j| / (2 M²), never the "fair"
one (Gneiting & Raftery 2007, JASA 102, eq. 20).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from domain import FloatArray
from errors import DataError
from protocol import Competition, IntervalKind, ScoringInterval

ZERO_PRICE_SCORE = -1.0  # what the validator records for an answer with a zero price


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCard:
    """The score of one answer, in basis points."""

    total: float
    by_interval: Mapping[str, float]  # sums to `total` unless the answer is a miss

    @property
    def miss(self) -> bool:
        """True when the validator treats the answer as missing."""
        return not np.isfinite(self.total) or self.total < 0


def crps_ensemble(observed: FloatArray, ensemble: FloatArray) -> FloatArray:
    """CRPS of each column of an ensemble.

    `observed` (m,), `ensemble` (n, m); returns (m,) in the ensemble's unit.
    """
    n = len(ensemble)
    # Distances from the observation are small where prices are large: nothing cancels.
    ordered = np.sort(np.ascontiguousarray(ensemble.T) - observed[:, None], axis=1)
    spread = ordered @ ((2.0 * np.arange(n) - n + 1) / n**2)
    return np.asarray(np.abs(ordered).mean(axis=1) - spread, dtype=np.float64)


def score_paths(
    paths: FloatArray, realised: FloatArray, competition: Competition, *, increment_s: int
) -> ScoreCard:
    """Score simulated paths as a validator does.

    `paths` (n, T) prices; `realised` (T,) prices, NaN where unknown. A zero price
    scores -1 and a price that is not finite NaN: both are misses.
    Raises: DataError if the shapes disagree or nothing was realised.
    """
    if paths.ndim != 2 or realised.shape != paths.shape[1:]:
        raise DataError(
            f"paths of shape {paths.shape} cannot be scored against a realised path of shape "
            f"{realised.shape}; both need the same number of points."
        )
    require_known(realised)
    if np.any(paths == 0):
        return ScoreCard(total=ZERO_PRICE_SCORE, by_interval={})
    # Not left to arithmetic: a NaN where nothing was realised would go unseen.
    if not np.isfinite(paths).all():
        return ScoreCard(total=np.nan, by_interval={})
    factors = score_factors(competition, realised)
    parts = dict.fromkeys(factors, 0.0)
    for name, observed, ensemble in scored_pairs(
        paths, realised, competition, increment_s=increment_s
    ):
        known = np.isfinite(observed)
        crps = crps_ensemble(observed[known], ensemble[:, known])
        parts[name] = factors[name] * float(crps.sum())
    return ScoreCard(total=float(sum(parts.values())), by_interval=parts)


def scored_pairs(
    paths: FloatArray, realised: FloatArray, competition: Competition, *, increment_s: int
) -> Iterator[tuple[str, FloatArray, FloatArray]]:
    """Everything that is compared, by name: what was realised (m,), the ensemble (n, m).

    `paths` (n, T) and `realised` (T,) prices; see `scored_values`.
    """
    observed = scored_values(realised[None, :], competition, increment_s=increment_s)
    simulated = scored_values(paths, competition, increment_s=increment_s)
    for (name, values), (_, ensemble) in zip(observed, simulated, strict=True):
        yield name, values[0], ensemble


def scored_values(
    prices: FloatArray, competition: Competition, *, increment_s: int
) -> Iterator[tuple[str, FloatArray]]:
    """Everything that a competition looks at, by its name on a score card.

    `prices` (n, T) to numbers (n, m), one after the other. Volatilities of blocks that
    are longer than the path, or shorter than a step, are left out.
    """
    n_points = prices.shape[1]
    for interval in competition.intervals:
        steps = interval_steps(interval, increment_s, n_points)
        yield interval.name, interval_changes(prices, steps, interval.kind)
    for block_s, _ in competition.volatility_weights:
        steps = block_s // increment_s
        if 1 <= steps < n_points:
            yield volatility_name(block_s), block_volatility(prices, steps)


def score_factors(competition: Competition, realised: FloatArray) -> dict[str, float]:
    """What the sum of CRPS of each of them is multiplied by.

    `realised` (T,) prices, of which one at least is known: the last one is what
    absolute prices are measured by.
    """
    last = float(realised[np.isfinite(realised)][-1])
    factors = {
        interval.name: 1e4 / last if interval.kind is IntervalKind.ABSOLUTE else 1.0
        for interval in competition.intervals
    }
    return factors | {
        volatility_name(block_s): factor for block_s, factor in competition.volatility_weights
    }


def volatility_name(block_s: int) -> str:
    """How score cards call the part of the volatility term that blocks of a length make up."""
    return f"volatility_{block_s // 60}min"


def require_known(realised: FloatArray) -> None:
    """Raises: DataError if no price of a realised path is known."""
    if not np.isfinite(realised).any():
        raise DataError("the realised path is all NaN; choose a prompt whose prices are known.")


def interval_changes(prices: FloatArray, steps: int, kind: IntervalKind) -> FloatArray:
    """What an interval compares: prices (n, T) to numbers (n, m).

    Simple returns in basis points, or the prices themselves (`ABSOLUTE`).
    """
    if kind is IntervalKind.ABSOLUTE:
        return prices[:, ::steps][:, 1:]
    points = prices[:, ::steps]
    if kind is IntervalKind.GAP:
        points = points[:, :2]
    return np.asarray((points[:, 1:] / points[:, :-1] - 1) * 1e4, dtype=np.float64)


def interval_steps(interval: ScoringInterval, increment_s: int, n_points: int) -> int:
    """Stride of the interval in points.

    An absolute interval whose stride leaves only the first point is shortened
    until it does not.
    """
    steps = max(interval.seconds // increment_s, 1)
    if interval.kind is IntervalKind.ABSOLUTE:
        steps = max(min(steps, n_points - 1), 1)
    return steps


def block_volatility(prices: FloatArray, steps: int) -> FloatArray:
    """Standard deviation (ddof 1) of the one-step returns per block; (n, blocks).

    In basis points; NaN with fewer than two known returns; leftover steps are
    dropped.
    """
    change = interval_changes(prices, 1, IntervalKind.CHANGE)
    blocks = change.shape[1] // steps
    block = change[:, : blocks * steps].reshape(len(prices), blocks, steps)
    known = np.isfinite(block)
    if steps >= 2 and known.all():
        return np.asarray(block.std(axis=2, ddof=1), dtype=np.float64)
    count = known.sum(axis=2)
    filled = np.where(known, block, 0.0)
    mean = filled.sum(axis=2) / np.maximum(count, 1)
    square = (np.where(known, block - mean[:, :, None], 0.0) ** 2).sum(axis=2)
    return np.where(count >= 2, np.sqrt(square / np.maximum(count - 1, 1)), np.nan)
