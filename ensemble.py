"""The ensemble of an answer: random steps, matched and summed to the asked points.

One function serves the live forecast and the search for path shapes in training.
"""

from itertools import chain, pairwise
from typing import Final

import numpy as np
from numpy.random import Generator

from config import NUM_PATHS, FrequencySpec
from domain import FloatArray, IntArray
from path_simulator import PathShape, simulate_steps, step_quantiles
from quantile_matching import match_quantiles, unit_quantiles

# The quantiles of fewer are too regular: a single path would stand at every median.
MATCHED_PATHS: Final = 100


def draw_moves(
    rng: Generator,
    spec: FrequencySpec,
    scale: FloatArray,
    times: IntArray,
    points: IntArray,
    shape: PathShape,
    *,
    n_paths: int,
) -> FloatArray:
    """Log moves from the last known price to every point around a flat centre.

    `times` (n + 1,): the last known price, then the ends of the steps, among them
    all `points`. `scale` (n,): mean |move| of the steps, bps. Returns
    (n_paths, points), bps; 0 for a point at the last known price itself.
    """
    step_s = np.diff(times).astype(np.float64)
    steps = simulate_steps(rng, scale, step_s, shape, n_paths=n_paths)
    if n_paths >= MATCHED_PATHS:
        # What lies before point 0 is in every sum, but in no scored interval.
        lead_in = int(np.searchsorted(times, points[0]))
        unit_s = float(step_s[-1])
        match_quantiles(
            steps[lead_in:],
            scale[lead_in:],
            unit_s,
            shape,
            cycles=[_whole_steps(lengths_s, unit_s) for lengths_s in spec.matched_blocks_s],
            prefixes=_whole_steps(spec.matched_prefixes_s, unit_s),
        )
    moves = np.concatenate((np.zeros((1, n_paths)), steps))
    for before, after in pairwise(moves):  # a fifth of the time of cumsum
        np.add(before, after, out=after)
    return np.ascontiguousarray(moves[np.searchsorted(times, points)].T)


def prepare_drawing(spec: FrequencySpec, shape: PathShape) -> None:
    """Work out what steps are drawn from and matched to, ahead of the first usual prompt.

    They are half a megabyte. Were they left to the first prompt, what a miner needs would
    not be told before every market has been asked for.
    """
    step_quantiles(shape)
    step_s = float(spec.prompt_increment_s)
    lengths_s = {*spec.matched_prefixes_s, *chain.from_iterable(spec.matched_blocks_s)}
    for length in _whole_steps(tuple(lengths_s), step_s):
        unit_quantiles(shape, step_s, length, NUM_PATHS)


def _whole_steps(lengths_s: tuple[int, ...], step_s: float) -> tuple[int, ...]:
    """Lengths that are a whole number of steps, in steps."""
    return tuple(int(length // step_s) for length in lengths_s if length % step_s == 0)
