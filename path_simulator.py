"""Random paths whose increments agree with the forecast at every lead.

`log price[k] = centre[k] + Σ scale[j] · v[i, j] · ε[i, j]`: Student-t steps of
unit mean size, times a volatility process per path (one factor for the whole
path and a slow mean-reverting one), so that volatility clusters within a path
and differs between paths. Steps add up; nothing pulls a path back to the
centre, for that would make the spread at long leads far too small.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial, wraps
from itertools import pairwise
from math import prod
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
from numpy.random import Generator
from scipy.linalg import cholesky_banded
from scipy.special import gammaln, ndtri, stdtrit

from domain import FloatArray, IntArray

P = ParamSpec("P")
T = TypeVar("T")

LEVELS: Final = 1 << 16  # quantiles that a step is drawn from
KEPT_RESULTS: Final = 32  # of a function for one shape


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class PathShape:
    """How paths differ and cluster, beyond the scale of their steps."""

    tail_dof: float  # Student-t ν, dimensionless; infinite: normal steps
    path_sd: float  # standard deviation of a path's log-volatility factor
    slow_sd: float  # of the mean-reverting log-volatility within a path
    slow_half_life_s: float  # of that process, seconds
    autocorrelation: tuple[float, ...] = ()  # of steps one bar long, lags 1, 2, …
    bar_s: int = 60  # the bar that the autocorrelation refers to, seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON manifest."""
        return {
            "tail_dof": self.tail_dof,
            "path_sd": self.path_sd,
            "slow_sd": self.slow_sd,
            "slow_half_life_s": self.slow_half_life_s,
            "autocorrelation": list(self.autocorrelation),
            "bar_s": self.bar_s,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PathShape":
        """Inverse of `to_dict`; one object for all equal shapes, whoever reads them.

        What is kept with a shape then lives as long as the last set that has it.
        """
        shape = PathShape(**{**values, "autocorrelation": tuple(values["autocorrelation"])})
        return _SHAPES.setdefault(astuple(shape), shape)


_SHAPES: "WeakValueDictionary[tuple[Any, ...], PathShape]" = WeakValueDictionary()


def independent_steps(dof: float) -> PathShape:
    """The shape of independent Student-t steps, normal ones for infinite `dof`."""
    return PathShape(tail_dof=dof, path_sd=0.0, slow_sd=0.0, slow_half_life_s=1.0)


def kept_with_shape(
    function: Callable[Concatenate[PathShape, P], T],
) -> Callable[Concatenate[PathShape, P], T]:
    """Work out a function of a shape once, and keep the result as long as the shape.

    A miner takes up new shapes with every training. Tables of the old ones would fill
    a cache of a fixed size for days before it dropped any.
    """
    by_shape: WeakKeyDictionary[PathShape, Callable[P, T]] = WeakKeyDictionary()

    @wraps(function)
    def kept(shape: PathShape, /, *args: P.args, **named: P.kwargs) -> T:
        results = by_shape.get(shape)
        if results is None:
            # Of a copy: results that held their own key would never be dropped.
            of_this = lru_cache(KEPT_RESULTS)(partial(function, replace(shape)))
            results = by_shape.setdefault(shape, cast("Callable[P, T]", of_this))
        return results(*args, **named)

    return kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLaw:
    """What a forecast says before anything is drawn: random steps from a price on.

    `times` (n + 1,): when the price holds, then the ends of the steps, among them all
    `points`, Unix seconds. `scale` (n,): mean |move| of the steps, bps. `centre`
    (points,): expected log move from the price on, bps.
    """

    price: float
    times: IntArray
    points: IntArray
    scale: FloatArray
    shape: PathShape
    centre: FloatArray

    @property
    def step_s(self) -> float:
        """Length of the usual step, seconds; the first may be another."""
        return float(self.times[-1] - self.times[-2])

    def paths(self, steps: FloatArray) -> FloatArray:
        """Prices at the points after the moves `steps` (n_paths, n), bps; (n_paths, points)."""
        moves = np.hstack([np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)])
        moves = moves[:, np.searchsorted(self.times, self.points)] + self.centre
        return np.asarray(self.price * np.exp(moves / 1e4), dtype=np.float64)


def simulate_steps(
    rng: Generator, scale: FloatArray, step_s: FloatArray, shape: PathShape, *, n_paths: int
) -> FloatArray:
    """Draw the log moves of every step around a flat centre.

    `scale` (steps,): mean |move| of every step, bps. `step_s` (steps,): their
    lengths in seconds. Returns (steps, n_paths), bps: what is done step by step, all
    paths at once, finds its numbers side by side.
    """
    shocks = draw_evenly(rng, (len(scale), n_paths), step_quantiles(shape))
    shocks *= volatility_process(rng, n_paths, step_s, shape)
    if shape.autocorrelation and np.all(step_s[1:] == shape.bar_s):
        shocks = correlate_steps(shocks, shape.autocorrelation)
    shocks *= scale[:, None]
    return shocks


def student_t_steps(rng: Generator, size: tuple[int, ...], *, dof: float) -> FloatArray:
    """Draw Student-t steps, normal ones for infinite `dof`, rescaled to unit mean size.

    Returns: `size`, E|x| = 1, dimensionless, so that `scale` means "mean |move|".
    Source: Bollerslev (1987), Rev. Econ. Stat. 69(3), 542-547.
    """
    return draw_evenly(rng, size, unit_t_quantiles(dof))


def draw_evenly(rng: Generator, size: tuple[int, ...], quantiles: FloatArray) -> FloatArray:
    """Draw from LEVELS quantiles in the middle of equal shares of a law.

    By 16 random bits each: ten times as fast as a Student-t number made of a normal
    over the root of a gamma number, and no score tells them apart.
    """
    drawn = np.frombuffer(rng.bytes(2 * prod(size)), dtype="<u2")
    steps: FloatArray = quantiles[drawn].reshape(size)
    return steps


@kept_with_shape
def step_quantiles(shape: PathShape) -> FloatArray:
    """The quantiles that steps of the shape are drawn from."""
    return unit_t_quantiles(shape.tail_dof)


@lru_cache(maxsize=8)  # half a megabyte each
def unit_t_quantiles(dof: float) -> FloatArray:
    """LEVELS quantiles of a Student-t step of mean size 1; rising, nobody's to change."""
    levels = (np.arange(LEVELS // 2) + 0.5) / LEVELS
    lower = ndtri(levels) if np.isinf(dof) else stdtrit(dof, levels)
    quantiles = np.concatenate((lower, -lower[::-1]))
    return np.asarray(quantiles / np.abs(lower).mean(), dtype=np.float64)


def mean_size_of_t(dof: float) -> float:
    """E|t(ν)| of a plain Student-t variable; of a standard normal one for infinite ν.

    E|t(ν)| = 2 √ν Γ((ν+1)/2) / ((ν-1) √π Γ(ν/2)).
    """
    if np.isinf(dof):
        return float(np.sqrt(2 / np.pi))
    log_ratio = gammaln((dof + 1) / 2) - gammaln(dof / 2)
    return float(2 * np.sqrt(dof / np.pi) / (dof - 1) * np.exp(log_ratio))


def volatility_process(
    rng: Generator, n_paths: int, step_s: FloatArray, shape: PathShape
) -> FloatArray:
    """Draw the volatility of every step and path; mean 1.

    exp(path_sd · N + slow_sd · AR(1)), the AR(1) stationary with unit variance.
    Returns (steps, n_paths), or (1, n_paths) where volatility stays as it is.
    """
    factor = shape.path_sd * rng.standard_normal((1, n_paths))
    if shape.slow_sd > 0:
        decay = 0.5 ** (float(np.median(step_s)) / shape.slow_half_life_s)
        slow = student_t_steps(rng, (len(step_s), n_paths), dof=np.inf)
        slow *= shape.slow_sd * mean_size_of_t(np.inf)
        slow[1:] *= np.sqrt(1 - decay**2)
        for before, after in pairwise(slow):
            np.add(decay * before, after, out=after)
        slow += factor
        factor = slow
    factor -= (shape.path_sd**2 + shape.slow_sd**2) / 2
    return np.exp(factor, out=factor)


def correlate_steps(shocks: FloatArray, autocorrelation: tuple[float, ...]) -> FloatArray:
    """Give independent steps (steps, n) a short autocorrelation, keeping their variance.

    Multiplies by the Cholesky factor of the banded Toeplitz correlation matrix.
    """
    n_steps = len(shocks)
    factor = _correlation_factor(autocorrelation[: max(n_steps - 1, 0)], n_steps)
    mixed: FloatArray = shocks * factor[0][:, None]
    for lag in range(1, len(factor)):
        mixed[lag:] += shocks[:-lag] * factor[lag, : n_steps - lag, None]
    return mixed


@lru_cache(maxsize=64)
def _correlation_factor(autocorrelation: tuple[float, ...], n_steps: int) -> FloatArray:
    """Lower Cholesky factor of the correlation matrix of `n_steps` steps, in bands by lag."""
    bands = np.zeros((len(autocorrelation) + 1, n_steps))
    bands[0] = 1.0
    for lag, value in enumerate(autocorrelation, start=1):
        bands[lag, : n_steps - lag] = value
    return np.asarray(cholesky_banded(bands, lower=True), dtype=np.float64)
