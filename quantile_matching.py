"""Less noise in an ensemble of paths, at no cost in independence.

A thousand random sums are a noisy picture of their distribution, and CRPS pays
for that noise. `match_quantiles` moves the sums over scored blocks to the
quantiles of the distribution they were drawn from, rank by rank: the path that
was third highest stays third highest. The correction is spread over the steps of
the block, so paths stay coherent over all leads.
"""

from functools import lru_cache
from typing import Final

import numpy as np
from scipy.special import ndtr

from domain import FloatArray
from path_simulator import PathShape, mean_size_of_t, tail_mixing, volatility_process

MIXTURE_PARTS: Final = 1_000  # normals that a block's distribution is mixed from
MIXTURE_STEPS: Final = 400_000  # random steps drawn to find their variances
GRID_POINTS: Final = 400
GRID_LIMIT: Final = 40.0  # in root mean variances; quantiles beyond are of no use


def match_quantiles(
    steps: FloatArray,
    scale: FloatArray,
    step_s: float,
    shape: PathShape,
    *,
    prefixes: tuple[int, ...],
    blocks: tuple[int, ...],
    cycles: int,
) -> None:
    """Move sums of steps to the quantiles of their distribution, in place.

    `steps` (n_paths, n_steps), drawn with mean size `scale` (n_steps,) bps each;
    `step_s`: their length. `prefixes`: numbers of steps, counted from the first,
    whose sum is matched; `blocks`: lengths of the consecutive blocks that are. Each
    cycle goes through the prefixes, then through the blocks, in the order given;
    what comes last is matched exactly.
    """
    variance = scale**2
    for _ in range(cycles):
        for length in prefixes:
            if 1 <= length <= steps.shape[1]:
                _match(steps[:, :length], variance[:length], length, step_s, shape)
        for length in blocks:
            if 1 <= length <= steps.shape[1]:
                used = steps.shape[1] // length * length
                _match(steps[:, :used], variance[:used], length, step_s, shape)


def _match(
    steps: FloatArray, variance: FloatArray, length: int, step_s: float, shape: PathShape
) -> None:
    """Match the sums over consecutive blocks of `length` steps, in place."""
    n_paths, n_steps = steps.shape
    parts = variance.reshape(-1, length)
    total = np.maximum(parts.sum(axis=1), 1e-300)  # (blocks,)
    sums = np.ascontiguousarray(
        steps.reshape(n_paths, n_steps // length, length).sum(axis=2).T
    )  # (blocks, n_paths)
    order = np.argsort(sums, axis=1)
    quantiles = unit_quantiles(shape, step_s, length, n_paths)
    target = np.empty_like(sums)
    np.put_along_axis(target, order, np.sqrt(total)[:, None] * quantiles, axis=1)
    correction = (target - sums).T  # (n_paths, blocks)
    share = (parts / total[:, None]).ravel()
    steps += np.repeat(correction, length, axis=1) * share


def unit_quantiles(shape: PathShape, step_s: float, length: int, n_paths: int) -> FloatArray:
    """Quantiles (i - ½)/n of a sum of `length` steps of equal scale, over √length.

    Returns (n_paths,), rising and symmetric.
    """
    grid, probability = unit_distribution(shape, step_s, length)
    levels = (np.arange(n_paths) + 0.5) / n_paths
    half = np.interp(np.maximum(levels, 1 - levels), probability, grid)
    return np.where(levels < 0.5, -half, half)


@lru_cache(maxsize=256)
def unit_distribution(
    shape: PathShape, step_s: float, length: int
) -> tuple[FloatArray, FloatArray]:
    """Distribution function of the unit sum on a grid of its upper half.

    The unit sum is one of `length` steps of mean size 1, over √length; it is
    symmetric. Given its volatilities, a sum of Student-t steps is normal; its
    distribution is the mixture of these normals over drawn variances, which is
    smooth where an empirical one would bring back the noise. Returns the grid and
    the probability of falling below; both (GRID_POINTS,), nobody's to change.
    """
    spread = _mixture_spreads(shape, step_s, length)
    unit = float(np.sqrt(np.mean(spread**2)))
    grid = unit * np.sinh(np.linspace(0, np.arcsinh(GRID_LIMIT), GRID_POINTS))
    return grid, np.array([ndtr(x / spread).mean() for x in grid])


def _mixture_spreads(shape: PathShape, step_s: float, length: int) -> FloatArray:
    """Standard deviations of a unit sum given its volatilities, in equal shares; rising."""
    draws = MIXTURE_PARTS * max(MIXTURE_STEPS // (MIXTURE_PARTS * length), 4)
    rng = np.random.default_rng([length, draws])
    volatility = volatility_process(rng, draws, np.full(length, step_s), shape)
    mixing = tail_mixing(rng, draws, length, dof=shape.tail_dof)
    variance = (volatility**2 / mixing).mean(axis=1) * _serial_factor(shape, step_s, length)
    spread = np.sort(np.sqrt(variance)) / mean_size_of_t(shape.tail_dof)
    return np.asarray(spread.reshape(MIXTURE_PARTS, -1).mean(axis=1), dtype=np.float64)


def _serial_factor(shape: PathShape, step_s: float, length: int) -> float:
    """How much serial correlation widens a sum: 1 + 2 Σ (1 - k/h) ρ(k)."""
    if step_s != shape.bar_s:
        return 1.0
    weights = [
        (1 - lag / length) * value
        for lag, value in enumerate(shape.autocorrelation, start=1)
        if lag < length
    ]
    return 1 + 2 * sum(weights)
