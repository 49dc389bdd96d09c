"""Second thoughts about a newly trained set, once bars have come that it did not see.

Both sets, the one in use and the one before it, forecast the size of the moves
since the newer one was trained. If the newer one is clearly worse, the older one
is made current again; being old, it is then soon trained anew.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from config import DAY_S, Frequency, FrequencySpec
from domain import FloatArray, IntArray, MarketHistory
from errors import MinerError
from features import ReturnGrid, bucket_edges, feature_frame, initial_state, move_sizes, return_grid
from forecast_engine import ForecastEngine
from lgbm_predictor import ModelSet, load_model_set
from model_store import published_sets, roll_back
from settings import Settings
from state_store import locked
from uncertainty_engine import gamma_deviance, step_scales

STRIDE_S: Final = {Frequency.HF: 900, Frequency.LF: 3600}  # between judged forecasts
BLOCK_S: Final = {Frequency.HF: 3600, Frequency.LF: 3 * 3600}  # outcomes within are not independent
LEAST_BLOCKS: Final = 12
WORSE_ERRORS: Final = 3.0  # standard errors by which the newer set must be worse, of many looks
MEMORY_DAYS: Final = 15.0  # of bars before the judged ones, for averages and windows

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """How the newer set compares with the older; losses are gamma deviances of |move|."""

    excess: float  # mean loss of the newer set over that of the older
    error: float  # its standard error over blocks
    blocks: int

    @property
    def is_worse(self) -> bool:
        """Whether to go back."""
        return self.blocks >= LEAST_BLOCKS and self.excess > WORSE_ERRORS * self.error


def review_sets(engine: ForecastEngine, settings: Settings) -> None:
    """Look at every market that answers from a new set; roll back what got worse.

    One market's failure is logged and keeps no other from being looked at.
    """
    for asset, frequency in engine.trained():
        try:
            _review_market(engine.history(asset, frequency), settings)
        except MinerError as error:
            log.warning(
                "review failed",
                extra={"asset": asset, "frequency": frequency.value, "reason": str(error)},
            )


def _review_market(history: MarketHistory, settings: Settings) -> None:
    asset, frequency = history.asset, history.frequency
    folders = published_sets(settings.model_dir, asset, frequency)
    if len(folders) < 2:
        return
    newer, older = (load_model_set(folder) for folder in folders)
    if newer.trained_until <= older.trained_until or newer.source != older.source:
        return  # rolled back already
    review = compare_sets(newer, older, history)
    if review.is_worse:
        with locked(settings.model_dir, "going back to an older set"):  # trainings publish there
            roll_back(settings.model_dir, asset, frequency, leave=newer.model_id)
        log.warning(
            "rolled back",
            extra={
                "asset": asset,
                "frequency": frequency.value,
                "from": newer.model_id,
                "to": older.model_id,
                "excess": round(review.excess, 4),
                "error": round(review.error, 4),
            },
        )


def compare_sets(newer: ModelSet, older: ModelSet, history: MarketHistory) -> Review:
    """Judge both on the bars after the newer one's training; shapes as in `Review`."""
    spec = newer.spec
    start = newer.trained_until
    recent = history.bars.between(start - int(MEMORY_DAYS * DAY_S), None)
    grid = return_grid(recent)
    ends = grid.open_ts + spec.bar_s
    rows = np.flatnonzero((ends >= start) & (ends % STRIDE_S[spec.frequency] == 0))[:-1]
    if not len(rows):
        return Review(excess=0.0, error=np.inf, blocks=0)
    sizes = np.where(grid.span > 0, move_sizes(grid), np.nan)
    losses = [_losses(models, grid, rows, sizes) for models in (newer, older)]
    return _summary(losses[0] - losses[1], ends[rows] // BLOCK_S[spec.frequency])


def _losses(models: ModelSet, grid: ReturnGrid, rows: IntArray, sizes: FloatArray) -> FloatArray:
    """Mean loss of the forecasts made at the rows, over the bars known since; (rows,)."""
    spec, standardiser = models.spec, models.calibration.standardiser
    state = initial_state(spec, int(grid.open_ts[0]))
    frame = feature_frame(spec, standardiser, grid, state, rows)
    levels = models.log_levels(frame)
    mean = []
    for column, row in enumerate(rows.tolist()):
        known = sizes[row + 1 : row + 1 + spec.horizon_bars]
        times = frame.end_ts[column] + spec.bar_s * np.arange(len(known) + 1, dtype=np.int64)
        scale = step_scales(spec, standardiser, levels[:, column], times)
        mean.append(_mean_loss(known, scale, spec))
    return np.array(mean)


def _mean_loss(sizes: FloatArray, scale: FloatArray, spec: FrequencySpec) -> float:
    """Loss per bar, every lead bucket of the scale weighing the same; NaN if nothing is known."""
    loss = gamma_deviance(sizes, np.log(scale))
    parts = [loss[low:high] for low, high in bucket_edges(spec)]
    means = [float(np.nanmean(part)) for part in parts if np.isfinite(part).any()]
    return float(np.mean(means)) if means else np.nan


def _summary(excess: FloatArray, block: IntArray) -> Review:
    known = np.isfinite(excess)
    labels = np.unique(block[known])
    means: Sequence[float] = [float(excess[known & (block == label)].mean()) for label in labels]
    if len(means) < 2:
        return Review(excess=0.0, error=np.inf, blocks=len(means))
    error = float(np.std(means, ddof=1) / np.sqrt(len(means)))
    return Review(excess=float(np.mean(means)), error=error, blocks=len(means))
