"""Forecasters that the engine is measured against.

Each is a small frozen object with a `name` and `paths(request, known, rng)`,
where `known` holds only bars known at the moment of the prompt.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self

import numpy as np
from numpy.random import Generator
from scipy.signal import lfilter

from config import FREQUENCIES, asset_spec
from domain import FloatArray, ForecastRequest, MarketHistory
from features import CAP_QUANTILE, return_grid

TAIL_DOF: Final = 4.0
MEMORY_HALF_LIVES: Final = 64


class Forecaster(Protocol):
    """Anything that turns a prompt and what is known into price paths."""

    @property
    def name(self) -> str:
        """How tables call it."""

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Price paths (num_paths, n_points)."""


@dataclass(frozen=True, slots=True)
class ConstantSigma:
    """The official reference miner: a geometric walk with one hourly sigma per asset."""

    name: ClassVar[str] = "reference"

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """p[k+1] = p[k] · (1 + r), r normal; every path starts at the last known price."""
        sigma = asset_spec(request.asset).hourly_volatility * np.sqrt(request.increment_s / 3600)
        steps = 1 + sigma * rng.standard_normal((request.num_paths, request.n_points - 1))
        start = np.full((request.num_paths, 1), known.anchor_price)
        return np.cumprod(np.hstack([start, steps]), axis=1)


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
        spec = FREQUENCIES[known.frequency]
        points = request.grid_ts + known.scored_lag_s
        lengths = np.diff(np.concatenate(([known.anchor_ts], points))) / spec.bar_s
        unit = np.sqrt((TAIL_DOF - 2) / TAIL_DOF)
        shocks = unit * rng.standard_t(TAIL_DOF, (request.num_paths, request.n_points))
        moves = np.cumsum(shocks * np.sqrt(self.variance(known) * lengths), axis=1)
        return known.anchor_price * np.exp(moves / 1e4)

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
