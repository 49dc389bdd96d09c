"""Less noise in an ensemble of paths, at no cost in independence.

A thousand random sums are a noisy picture of their distribution, and CRPS pays
for that noise. `match_quantiles` moves the sums over scored blocks to the
quantiles of the distribution they were drawn from, rank by rank: the path that
was third highest stays third highest. The correction is spread over the steps of
the block, so paths stay coherent over all leads.

Short sums are matched before long ones: what a long sum still lacks is little for
each of its steps, whereas what steps lack adds up over a long sum.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import gcd
from typing import Final

import numpy as np
from numpy.random import Generator
from scipy.special import ndtr

from domain import FloatArray
from path_simulator import PathShape, kept_with_shape, mean_size_of_t, volatility_process

MIXTURE_PARTS: Final = 1_000  # normals that a block's distribution is mixed from
MIXTURE_STEPS: Final = 400_000  # random steps drawn to find their variances
GRID_POINTS: Final = 400
LEAST_VARIANCE: Final = 1e-300  # of a sum, to divide by
PACKED_BITS: Final = 10  # of a path's number, that leave 21 to its value
KEY_LIMIT: Final = 64.0  # in mean sizes; larger values are ranked as equal
GRID_LIMIT: Final = 40.0  # in root mean variances; quantiles beyond are of no use


def match_quantiles(
    steps: FloatArray,
    scale: FloatArray,
    step_s: float,
    shape: PathShape,
    *,
    cycles: Sequence[Sequence[int]],
    prefixes: Sequence[int],
) -> None:
    """Move sums of steps to the quantiles of their distribution, in place.

    `steps` (n_steps, n_paths), drawn with mean size `scale` (n_steps,) bps each;
    `step_s`: their length. Each of `cycles` names the lengths of the consecutive
    blocks whose sums are matched, one length after the other, and ends with
    `prefixes`: numbers of steps, counted from the first, whose sums are matched
    together. What comes last is matched exactly.
    """
    n_steps, n_paths = steps.shape
    quantiles = partial(unit_quantiles, shape, step_s, n_paths=n_paths)
    ends = tuple(sorted({end for end in prefixes if 1 <= end <= n_steps}))
    sums: list[_Blocks | _Prefixes] = []
    for lengths in cycles:
        sums += [_Blocks(length) for length in lengths if 1 <= length <= n_steps]
        sums += [_Prefixes(ends)] if ends else []
    for part, group in _groups(sums):
        with _parts(steps, scale**2, part) as (values, variance):
            for each in group:
                each.match(values, variance, part, quantiles)


Quantiles = Callable[[int], FloatArray]  # those of a unit sum, by its number of steps


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The sums over consecutive blocks of `length` steps."""

    length: int

    def divisor(self, other: int) -> int:
        """The longest part that these sums, and those over `other` steps, are made of."""
        return gcd(self.length, other)

    def match(
        self, values: FloatArray, variance: FloatArray, part: int, quantiles: Quantiles
    ) -> None:
        """Match them; `values` (rows, n_paths) are sums over `part` steps."""
        with _parts(values, variance, self.length // part) as (sums, total):
            _set_quantiles(sums, np.sqrt(total), quantiles(self.length))


@dataclass(frozen=True, slots=True)
class _Prefixes:
    """The sums from the first step to every one of `ends`, which rise."""

    ends: tuple[int, ...]

    def divisor(self, other: int) -> int:
        """As that of `_Blocks`."""
        return gcd(other, *self.ends)

    def match(
        self, values: FloatArray, variance: FloatArray, part: int, quantiles: Quantiles
    ) -> None:
        """Match them all at once: the rows between two ends make up the difference."""
        bounds = [0, *(end // part for end in self.ends)]
        between = np.add.reduceat(variance[: bounds[-1]], bounds[:-1])
        sums = np.add.reduceat(values[: bounds[-1]], bounds[:-1], axis=0).cumsum(axis=0)
        moves = sums.copy()
        unit = np.stack([quantiles(end) for end in self.ends])
        _set_quantiles(moves, np.sqrt(between.cumsum()), unit)
        moves -= sums
        moves = np.diff(moves, axis=0, prepend=0.0)
        for (begin, end), total, move in zip(pairwise(bounds), between, moves, strict=True):
            share = variance[begin:end] / max(total, LEAST_VARIANCE)
            values[begin:end] += move * share[:, None]


def _groups(sums: Sequence[_Blocks | _Prefixes]) -> Iterator[tuple[int, list[_Blocks | _Prefixes]]]:
    """Sums that follow each other and are made of the same parts, with the parts' length.

    One after the other they move the sums over the parts alone; the steps follow once.
    """
    group: list[_Blocks | _Prefixes] = []
    part = 0
    for each in sums:
        common = each.divisor(part)
        if group and common == 1:
            yield part, group
            group, common = [], each.divisor(0)
        group.append(each)
        part = common
    if group:
        yield part, group


@contextmanager
def _parts(
    values: FloatArray, variance: FloatArray, length: int
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Sums over `length` rows each, and their variance; what is done to them, the rows follow.

    Each row takes a share like that of its variance; rows that fill no part keep out.
    `values` (rows, n_paths).
    """
    if length == 1:
        yield values, variance
        return
    n_parts = len(values) // length
    shares = variance[: n_parts * length].reshape(n_parts, length)
    rows = values[: n_parts * length].reshape(n_parts, length, -1)
    total = shares.sum(axis=1)
    before = rows.sum(axis=1)
    after = before.copy()
    yield after, total
    shares = shares / np.maximum(total, LEAST_VARIANCE)[:, None]
    rows += (after - before)[:, None] * shares[:, :, None]


def _set_quantiles(values: FloatArray, size: FloatArray, quantiles: FloatArray) -> None:
    """Give every row (rows, n_paths) the quantiles times its size, in the order it has."""
    rows, n_paths = values.shape
    # The path's number is packed below the value: such integers sort four times as fast
    # as an argsort does, and then say whose they were.
    bits = n_paths.bit_length()
    dtype, room = (np.int32, 31) if bits <= PACKED_BITS else (np.int64, 62)
    finest = 2.0 ** (room - bits) / KEY_LIMIT
    unit = values * (finest / np.maximum(size, LEAST_VARIANCE))[:, None]
    np.clip(unit, -finest * KEY_LIMIT, finest * KEY_LIMIT - 1, out=unit)
    keys = unit.astype(dtype)
    keys <<= bits
    keys |= np.arange(n_paths, dtype=dtype)
    keys.sort(axis=1)
    keys &= (1 << bits) - 1
    order = keys + n_paths * np.arange(rows)[:, None]
    values.reshape(-1)[order] = size[:, None] * quantiles


@kept_with_shape
def unit_quantiles(shape: PathShape, step_s: float, length: int, n_paths: int) -> FloatArray:
    """Quantiles (i - ½)/n of a sum of `length` steps of equal scale, over √length.

    Returns (n_paths,), rising and symmetric, nobody's to change.
    """
    grid, probability = unit_distribution(shape, step_s, length)
    levels = (np.arange(n_paths) + 0.5) / n_paths
    half = np.interp(np.maximum(levels, 1 - levels), probability, grid)
    return np.asarray(np.where(levels < 0.5, -half, half), dtype=np.float64)


@kept_with_shape
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
    mixing = tail_mixing(rng, (length, draws), dof=shape.tail_dof)
    variance = (volatility**2 / mixing).mean(axis=0) * _serial_factor(shape, step_s, length)
    spread = np.sort(np.sqrt(variance)) / mean_size_of_t(shape.tail_dof)
    return np.asarray(spread.reshape(MIXTURE_PARTS, -1).mean(axis=1), dtype=np.float64)


def tail_mixing(rng: Generator, size: tuple[int, ...], *, dof: float) -> FloatArray:
    """Draw χ²(ν)/ν: a normal step over its root is a t(ν) step."""
    if np.isinf(dof):
        return np.ones(size)
    return rng.standard_gamma(dof / 2, size) * (2.0 / dof)


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
