"""Yardsticks that look at the market through the clock: `har` and `oracle`.

Their layout is written down here and not taken from the engine: what a forecast
is measured with must stand still while the forecast improves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Final

import numpy as np
from numpy.random import Generator

from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, asset_spec
from domain import FloatArray, ForecastRequest, MarketHistory
from errors import InsufficientHistory
from features import (
    EwmaState,
    Standardiser,
    bucket_edges,
    bucket_targets,
    fit_standardiser,
    initial_state,
    mean_size,
    move_sizes,
    return_grid,
    trace_ewma,
    window_sums,
)
from path_simulator import student_t_steps
from seasonality import fit_profile
from training_rows import recency_weights
from uncertainty_engine import LogLinearScale, fit_log_linear, step_scales

HAR_DOF: Final = 5.0  # of its Student-t steps
BURN_IN_SHARE: Final = 0.02  # first bars, whose averages are still empty, teach nothing
KNOWN_BUCKET: Final = 2  # the oracle replaces buckets longer than this many steps
MINIMUM_ROWS: Final = 100  # base times that a bucket is fitted on

# As the yardsticks were defined; `config.FREQUENCIES` may move on.
HAR_SPECS: Final[Mapping[Frequency, FrequencySpec]] = MappingProxyType(
    {
        Frequency.HF: replace(
            FREQUENCIES[Frequency.HF],
            bucket_ends=(1, 2, 5, 15, 30, 60),
            ewma_half_lives=(1.5, 3, 6, 12, 25, 50, 100, 240, 480, 1440, 4320, 10080),
            blend_half_life_days=90,
        ),
        Frequency.LF: replace(
            FREQUENCIES[Frequency.LF],
            bucket_ends=(1, 3, 6, 12, 36, 96, 192, 288),
            ewma_half_lives=(3, 12, 48, 144, 288, 864, 2880),
            blend_half_life_days=90,
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HarModel:
    """Clock, unit and one log-linear blend of EWMAs of |z| per lead bucket."""

    spec: FrequencySpec
    standardiser: Standardiser
    blend: tuple[LogLinearScale, ...]

    def log_levels(self, sizes: FloatArray) -> FloatArray:
        """Log mean |z| per bucket from the EWMAs of |z| (half-lives,); (buckets,)."""
        row = np.log(np.maximum(sizes, 1e-3))[None, :]
        return np.array([float(part.log_level(row)[0]) for part in self.blend])


def fit_har(history: MarketHistory, *, days: float) -> HarModel:
    """Fit the blend on the last `days` of the history; every bar counts as known.

    Raises: InsufficientHistory if a lead bucket has next to no outcomes.
    """
    spec = HAR_SPECS[history.frequency]
    bars = history.bars.between(history.bars.end_ts - int(days * DAY_S), None)
    grid = return_grid(bars)
    hours = asset_spec(history.asset).hours
    profile = fit_profile(grid.open_ts, move_sizes(grid), bar_s=spec.bar_s, hours=hours)
    standardiser = fit_standardiser(grid, profile)
    z = standardiser.apply(grid)
    trace = trace_ewma(spec, z, initial_state(spec, int(grid.open_ts[0])))
    design = np.log(np.maximum(trace.means[0].T, 1e-3))
    weight = recency_weights(grid.open_ts + spec.bar_s, bars.end_ts, spec.blend_half_life_days)
    rows, sums = np.arange(int(BURN_IN_SHARE * len(grid)), len(grid)), window_sums(z)
    blend = []
    for bucket in range(len(spec.bucket_ends)):
        target = bucket_targets(spec, sums, rows, bucket)
        known = np.isfinite(target)
        if known.sum() < MINIMUM_ROWS:
            raise InsufficientHistory(
                f"{history.asset} {history.frequency.value}: {int(known.sum())} outcomes are too "
                f"few to fit the har baseline; it needs {MINIMUM_ROWS}: give it more history or "
                "leave it out of --baselines."
            )
        chosen = rows[known]
        blend.append(fit_log_linear(design[chosen], target[known], weight[chosen]))
    return HarModel(spec=spec, standardiser=standardiser, blend=tuple(blend))


@dataclass(slots=True, eq=False)
class Har:
    """`har`: clock, EWMA blend per lead bucket, independent t(5) steps, no centre.

    Carries its averages between prompts; from the first bar on or from prompt
    to prompt, the bytes are the same.
    """

    model: HarModel
    name: ClassVar[str] = "har"
    _ewma: EwmaState | None = field(default=None, repr=False)
    _sizes: FloatArray | None = field(default=None, repr=False)

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Price paths (num_paths, n_points)."""
        return draw_steps(self.model, self.log_levels(known), HAR_DOF, request, known, rng)

    def log_levels(self, known: MarketHistory) -> FloatArray:
        """Log mean |z| per bucket, counted from the last known close; (buckets,)."""
        spec = self.model.spec
        if self._ewma is None or self._ewma.end_ts > known.bars.end_ts:
            self._ewma = initial_state(spec, int(known.bars.open_ts[0]))
            self._sizes = None
        grid = return_grid(known.bars, self._ewma.end_ts)
        if len(grid) or self._sizes is None:
            trace = trace_ewma(spec, self.model.standardiser.apply(grid), self._ewma)
            self._ewma, self._sizes = trace.state, trace.means[0, :, -1]
        return self.model.log_levels(self._sizes)


@dataclass(slots=True, eq=False)
class Oracle:
    """`oracle`: `har` told the realised level of every bucket longer than two steps.

    Gaussian steps. It looks ahead in `full`, the whole history: a bound, not a
    competitor. A bucket without a bar keeps har's level.
    """

    har: Har
    full: MarketHistory
    name: ClassVar[str] = "oracle"

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Price paths (num_paths, n_points)."""
        levels = self._realised(known, self.har.log_levels(known))
        return draw_steps(self.har.model, levels, np.inf, request, known, rng)

    def _realised(self, known: MarketHistory, log_levels: FloatArray) -> FloatArray:
        """Har's log levels, those of the longer buckets replaced by what came; (buckets,)."""
        spec, start = self.har.model.spec, known.bars.end_ts
        horizon = spec.bucket_ends[-1] * spec.bar_s
        # One bar before, whose close the first return starts from.
        low = int(np.searchsorted(self.full.bars.open_ts, start)) - 1
        first = int(self.full.bars.open_ts[max(low, 0)])
        future = self.full.bars.between(first, start + horizon)
        if future.end_ts <= start:
            return log_levels
        sums = window_sums(self.har.model.standardiser.apply(return_grid(future, start)))
        levels = log_levels.copy()
        for bucket, (begin, end) in enumerate(bucket_edges(spec)):
            if end - begin > KNOWN_BUCKET:
                size = mean_size(sums, np.array([begin]), np.array([end]), np.nan)[0]
                levels[bucket] = np.log(size) if size > 0 else levels[bucket]
        return levels


def draw_steps(
    model: HarModel,
    log_levels: FloatArray,
    dof: float,
    request: ForecastRequest,
    known: MarketHistory,
    rng: Generator,
) -> FloatArray:
    """Independent steps of the scale that the levels and the clock give; (paths, points).

    Steps are Student-t, Gaussian for infinite `dof`; point k is the price that
    is scored for `start + k · increment`.
    """
    points = request.grid_ts + known.scored_lag_s
    times = np.unique(np.concatenate(([known.anchor_ts], points)))
    scale = step_scales(model.spec, model.standardiser, log_levels, times)
    if np.isinf(dof):
        shocks = rng.standard_normal((request.num_paths, len(scale))) * np.sqrt(np.pi / 2)
    else:
        shocks = student_t_steps(rng, request.num_paths, len(scale), dof=dof)
    moves = np.zeros((request.num_paths, len(times)))
    np.cumsum(shocks * scale, axis=1, out=moves[:, 1:])
    moves = moves[:, np.searchsorted(times, points)]
    return np.asarray(known.anchor_price * np.exp(moves / 1e4), dtype=np.float64)
