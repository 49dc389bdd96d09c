"""Yardsticks that look at the market through the clock: `har` and `oracle`.

Their layout is written down here and not taken from the engine: what a forecast
is measured with must stand still while the forecast improves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Final

import numpy as np
from numpy.random import Generator

from baselines import Prompt
from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, asset_spec
from domain import FloatArray, ForecastRequest, IntArray, MarketHistory
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
from path_simulator import StepLaw, independent_steps, student_t_steps
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
        """Log mean |z| per bucket from the EWMAs of |z| (n, half-lives); (n, buckets)."""
        rows = np.log(np.maximum(sizes, 1e-3))
        return np.column_stack([part.log_level(rows) for part in self.blend])


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

    Carries its averages between prompts; from the first bar on, from prompt to
    prompt or for many at once, the bytes are the same.
    """

    model: HarModel
    name: ClassVar[str] = "har"
    _ewma: EwmaState | None = field(default=None, repr=False)
    _sizes: FloatArray | None = field(default=None, repr=False)

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Price paths (num_paths, n_points)."""
        (law,) = self.laws([(request, known)])
        return draw_steps(law, request.num_paths, rng)

    def laws(self, prompts: Sequence[Prompt]) -> list[StepLaw]:
        """What `paths` draws from, for prompts in rising time."""
        levels = self.log_levels([known for _, known in prompts])
        return _step_laws(self.model, prompts, levels, HAR_DOF)

    def log_levels(self, knowns: Sequence[MarketHistory]) -> FloatArray:
        """Log mean |z| per bucket, counted from the last known closes; (n, buckets).

        `knowns`: beginnings of one history, each no shorter than the one before.
        """
        spec, ends = self.model.spec, _ends(knowns)
        if self._ewma is None or self._sizes is None or self._ewma.end_ts > ends[0]:
            self._ewma = initial_state(spec, int(knowns[0].bars.open_ts[0]))
            self._sizes = np.zeros(len(spec.ewma_half_lives))
        rows = (ends - self._ewma.end_ts) // spec.bar_s
        sizes = self._sizes[:, None]
        if rows[-1] > 0:
            grid = return_grid(knowns[-1].bars, self._ewma.end_ts)
            trace = trace_ewma(spec, self.model.standardiser.apply(grid), self._ewma)
            sizes = np.hstack([sizes, trace.means[0]])
            self._ewma, self._sizes = trace.state, sizes[:, -1].copy()
        return self.model.log_levels(sizes[:, rows].T)


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
        (law,) = self.laws([(request, known)])
        return draw_steps(law, request.num_paths, rng)

    def laws(self, prompts: Sequence[Prompt]) -> list[StepLaw]:
        """What `paths` draws from, for prompts in rising time."""
        knowns = [known for _, known in prompts]
        levels = self._realised(knowns, self.har.log_levels(knowns))
        return _step_laws(self.har.model, prompts, levels, np.inf)

    def _realised(self, knowns: Sequence[MarketHistory], log_levels: FloatArray) -> FloatArray:
        """Har's log levels, those of the longer buckets replaced by what came; (n, buckets)."""
        spec, starts = self.har.model.spec, _ends(knowns)
        first, horizon = int(starts[0]), spec.bucket_ends[-1] * spec.bar_s
        # One bar before, whose close the first return starts from.
        low = int(np.searchsorted(self.full.bars.open_ts, first)) - 1
        before = int(self.full.bars.open_ts[max(low, 0)])
        future = self.full.bars.between(before, int(starts[-1]) + horizon)
        if future.end_ts <= first:
            return log_levels
        sums = window_sums(self.har.model.standardiser.apply(return_grid(future, first)))
        rows, levels = (starts - first) // spec.bar_s, log_levels.copy()
        for bucket, (begin, end) in enumerate(bucket_edges(spec)):
            if end - begin > KNOWN_BUCKET:
                size = mean_size(sums, rows + begin, rows + end, np.nan)
                levels[size > 0, bucket] = np.log(size[size > 0])
        return levels


def _ends(knowns: Sequence[MarketHistory]) -> IntArray:
    return np.array([known.bars.end_ts for known in knowns], dtype=np.int64)


def _step_laws(
    model: HarModel, prompts: Sequence[Prompt], log_levels: FloatArray, dof: float
) -> list[StepLaw]:
    """Independent steps of the scale that levels (n, buckets) and clock give, per prompt."""
    laws = []
    for (request, known), levels in zip(prompts, log_levels, strict=True):
        points = request.grid_ts + known.scored_lag_s
        times = np.unique(np.concatenate(([known.anchor_ts], points)))
        laws.append(
            StepLaw(
                price=known.anchor_price,
                times=times,
                points=points,
                scale=step_scales(model.spec, model.standardiser, levels, times),
                shape=independent_steps(dof),
                centre=np.zeros(len(points)),
            )
        )
    return laws


def draw_steps(law: StepLaw, n_paths: int, rng: Generator) -> FloatArray:
    """Prices after independent steps of the law's scale and tails; (n_paths, points)."""
    shocks = student_t_steps(rng, (len(law.scale), n_paths), dof=law.shape.tail_dof)
    return law.paths(shocks.T * law.scale)
