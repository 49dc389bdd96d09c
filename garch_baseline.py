"""The textbook yardstick `garch_t`: GARCH(1,1) with Student-t steps and no clock.

Fitted by maximum likelihood with the `arch` package, which only this module needs
and only when it fits. Source: Bollerslev (1987), Rev. Econ. Stat. 69(3), 542-547.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.random import Generator
from scipy.signal import lfilter

from config import FREQUENCIES
from domain import FloatArray, ForecastRequest, MarketHistory
from errors import ConfigError, InsufficientHistory
from features import CAP_QUANTILE, return_grid

FIT_BARS: Final = 40_000  # the last ones before training ends; more take long and change little
MINIMUM_BARS: Final = 500
WARM_UP_BARS: Final = 20_000  # of returns that the variance is filtered from
LIMIT_OF_PERSISTENCE: Final = 0.9999  # alpha + beta; at 1 the variance has no mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Garch:
    """Variance of the next bar: omega + alpha · (last return)² + beta · (its variance).

    Returns in basis points per bar; `dof` of the Student-t steps, above 2.
    """

    omega: float
    alpha: float
    beta: float
    dof: float
    cap_bps: float  # |return| is capped here, as for `ewma_t`
    name: ClassVar[str] = "garch_t"

    @classmethod
    def fit(cls, history: MarketHistory) -> Self:
        """Fit to the last bars of the history.

        Raises: InsufficientHistory.
        """
        grid = return_grid(history.bars)
        returns = grid.returns[grid.span > 0] / np.sqrt(grid.span[grid.span > 0])
        if len(returns) < MINIMUM_BARS:
            raise InsufficientHistory(
                f"{history.asset} {history.frequency.value}: {len(returns)} returns are too few "
                f"for the garch_t baseline; it needs {MINIMUM_BARS}: give it more history or "
                "leave it out of --baselines."
            )
        cap = float(np.quantile(np.abs(returns), CAP_QUANTILE))
        found = _maximum_likelihood(np.clip(returns[-FIT_BARS:], -cap, cap))
        alpha, beta = float(found["alpha[1]"]), float(found["beta[1]"])
        excess = max((alpha + beta) / LIMIT_OF_PERSISTENCE, 1.0)
        return cls(
            omega=float(found["omega"]),
            alpha=alpha / excess,
            beta=beta / excess,
            dof=max(float(found["nu"]), 2.1),
            cap_bps=cap,
        )

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Paths whose variance follows its own returns; (num_paths, n_points)."""
        points = request.grid_ts + known.scored_lag_s
        bar_s = FREQUENCIES[known.frequency].bar_s
        lengths = np.diff(np.concatenate(([known.anchor_ts], points))) / bar_s
        shape = (request.num_paths, request.n_points)
        steps = rng.standard_t(self.dof, shape) * np.sqrt((self.dof - 2) / self.dof)
        variance = np.full(request.num_paths, self.variance(known))
        for k, length in enumerate(lengths):
            per_bar = steps[:, k] * np.sqrt(variance)
            steps[:, k] = per_bar * np.sqrt(length)
            if not length:
                continue  # point 0 is the last known price itself
            variance = self.omega + self.alpha * per_bar**2 + self.beta * variance
        return np.asarray(known.anchor_price * np.exp(np.cumsum(steps, axis=1) / 1e4))

    def variance(self, known: MarketHistory) -> float:
        """Variance of the next bar, bps²; a move over a gap is spread over it."""
        bar_s = known.bars.bar_s
        grid = return_grid(known.bars, known.bars.end_ts - WARM_UP_BARS * bar_s)
        seen = grid.span > 0
        square = np.minimum(np.abs(np.where(seen, grid.returns, 0.0)), self.cap_bps) ** 2
        # A missing bar is taken as its expectation, the mean of the process.
        mean = self.omega / (1 - self.alpha - self.beta)
        square = np.where(seen, square / np.maximum(grid.span, 1), mean)
        driven = self.omega + self.alpha * square
        start = np.array([self.beta * mean])
        return float(lfilter([1.0], [1.0, -self.beta], driven, zi=start)[0][-1])


def require_arch() -> None:
    """Raises: ConfigError if the package that fits is not installed."""
    if find_spec("arch") is None:
        raise ConfigError(
            "baseline garch_t needs the arch package, which is not installed; run pip install "
            "-r requirements-dev.txt, or leave garch_t out of --baselines."
        )


def _maximum_likelihood(returns: FloatArray) -> Any:
    """Parameters by name; `returns` (n,) in basis points."""
    from arch.univariate import arch_model

    # In units of their size: the optimiser is not at home in others.
    unit = max(float(returns.std()), 1e-9)
    model = arch_model(returns / unit, mean="Zero", vol="GARCH", p=1, q=1, dist="t", rescale=False)
    found = model.fit(disp="off", show_warning=False).params.to_dict()
    return {**found, "omega": found["omega"] * unit**2}
