"""Forecasters that the engine is measured against.

Each is a small frozen object with a `name` and `paths(request, known, rng)`,
where `known` holds only bars known at the moment of the prompt. Those whose steps
are known in law before any is drawn say so with `laws(prompts)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self, runtime_checkable

import numpy as np
from numpy.random import Generator
from scipy.signal import lfilter

from config import FREQUENCIES, asset_spec
from domain import FloatArray, ForecastRequest, MarketHistory
from features import BPS, CAP_QUANTILE, return_grid
from path_simulator import StepLaw, independent_steps, mean_size_of_t

TAIL_DOF: Final = 4.0
MEMORY_HALF_LIVES: Final = 64

Prompt = tuple[ForecastRequest, MarketHistory]  # what is asked, and what is known then


class Forecaster(Protocol):
    """Anything that turns a prompt and what is known into price paths."""

    @property
    def name(self) -> str:
        """How tables call it."""

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Price paths (num_paths, n_points)."""


@runtime_checkable
class LawForecaster(Forecaster, Protocol):
    """A forecaster whose answers can be scored without drawing them."""

    def laws(self, prompts: Sequence[Prompt]) -> list[StepLaw]:
        """What it says to each prompt, in rising time, each from what is known then."""


@dataclass(frozen=True, slots=True)
class ConstantSigma:
    """The official reference miner: a geometric walk with one hourly sigma per asset."""

    name: ClassVar[str] = "reference"

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """p[k+1] = p[k] · (1 + r), r normal; every path starts at the last known price."""
        sigma = self._sigma(request)
        steps = 1 + sigma * rng.standard_normal((request.num_paths, request.n_points - 1))
        start = np.full((request.num_paths, 1), known.anchor_price)
        return np.cumprod(np.hstack([start, steps]), axis=1)

    def laws(self, prompts: Sequence[Prompt]) -> list[StepLaw]:
        """Normal log steps with the mean and variance of log(1 + r), to second order."""
        return [self._law(request, known) for request, known in prompts]

    def _law(self, request: ForecastRequest, known: MarketHistory) -> StepLaw:
        sigma, points = self._sigma(request), request.grid_ts + known.scored_lag_s
        return StepLaw(
            price=known.anchor_price,
            times=points,
            points=points,
            scale=np.full(request.n_points - 1, BPS * sigma * mean_size_of_t(np.inf)),
            shape=independent_steps(np.inf),
            centre=-BPS * sigma**2 / 2 * np.arange(request.n_points, dtype=np.float64),
        )

    def _sigma(self, request: ForecastRequest) -> float:
        """Standard deviation of a step's simple return, as a fraction."""
        hourly = asset_spec(request.asset).hourly_volatility
        return float(hourly * np.sqrt(request.increment_s / 3600))


@dataclass(frozen=True, slots=True, kw_only=True)
class EwmaStudentT:
    """The yardstick `ewma_t`: one EWMA variance, held flat, independent t(4) steps.

    `cap_bps`: |return| is capped at the training 99.95 % quantile.
    """

    cap_bps: float
    name: ClassVar[str] = "ewma_t"

    @classmethod
    def fit(cls, history: MarketHistory) -> Self:
        """Learn the cap from everything in the history."""
        returns = return_grid(history.bars).returns
        return cls(cap_bps=float(np.quantile(np.abs(returns[np.isfinite(returns)]), CAP_QUANTILE)))

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Steps of equal variance from the last known price on, through point 0."""
        law = self._law(request, known)
        shocks = rng.standard_t(TAIL_DOF, (request.num_paths, request.n_points))
        # None is left to point 0 where it is the last known price itself.
        steps = shocks[:, -len(law.scale) :] / mean_size_of_t(TAIL_DOF) * law.scale
        return law.paths(steps)

    def laws(self, prompts: Sequence[Prompt]) -> list[StepLaw]:
        """What `paths` draws from, prompt by prompt."""
        return [self._law(request, known) for request, known in prompts]

    def _law(self, request: ForecastRequest, known: MarketHistory) -> StepLaw:
        points = request.grid_ts + known.scored_lag_s
        times = np.unique(np.concatenate(([known.anchor_ts], points)))
        # E|x| of a Student-t step of unit variance.
        size = np.sqrt((TAIL_DOF - 2) / TAIL_DOF) * mean_size_of_t(TAIL_DOF)
        bars = np.diff(times) / FREQUENCIES[known.frequency].bar_s
        return StepLaw(
            price=known.anchor_price,
            times=times,
            points=points,
            scale=size * np.sqrt(self.variance(known) * bars),
            shape=independent_steps(TAIL_DOF),
            centre=np.zeros(request.n_points),
        )

    def variance(self, known: MarketHistory) -> float:
        """EWMA of squared capped returns per bar, bps²; a move over a gap is spread."""
        spec = FREQUENCIES[known.frequency]
        # What is forgotten to the last digit need not be read.
        memory_s = int(MEMORY_HALF_LIVES * spec.fallback_half_life) * spec.bar_s
        grid = return_grid(known.bars, known.bars.end_ts - memory_s)
        seen = grid.span > 0
        square = np.minimum(np.abs(np.where(seen, grid.returns, 0.0)), self.cap_bps) ** 2
        square /= np.maximum(grid.span, 1)
        taps = [1.0, -(0.5 ** (1 / spec.fallback_half_life))]
        total = lfilter([1.0], taps, square)[-1]
        return float(total / max(lfilter([1.0], taps, seen.astype(np.float64))[-1], 1e-12))
