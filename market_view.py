"""One market at one moment, as a forecast needs it.

`MarketState` is carried from bar to bar and kept in `state/`; `MarketView` is
what state, models and bars say about now. When something is missing, the view
steps down a ladder (`Rung`) and says why. Everything here is pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, Self

import numpy as np

from config import DAY_S, FREQUENCIES, FrequencySpec, asset_spec
from domain import FloatArray, IntArray, MarketHistory
from errors import ModelError
from features import (
    EwmaState,
    FeatureFrame,
    ReturnGrid,
    Standardiser,
    bucket_targets,
    feature_frame,
    fit_standardiser,
    initial_state,
    move_sizes,
    return_grid,
    trace_ewma,
    window_sums,
)
from lgbm_predictor import ModelSet
from path_fitting import STARTING_SHAPES
from path_simulator import PathShape
from seasonality import fit_profile, flat_profile
from uncertainty_engine import Controller, advance_controller, controller_stride

# Windows look eight days back from rows that are up to a day old.
CHECKPOINT_AGE_DAYS: Final = 10
PROFILE_DAYS: Final = 60  # of history that the ladder learns a clock from
PROFILE_MINIMUM_DAYS: Final = 2.0
USABLE_BARS: Final = 30  # fewer known returns give no volatility
STILL_BPS: Final = 0.01  # a mean move below this is a frozen feed, not a market


class Rung(StrEnum):
    """Steps of the degradation ladder, best first."""

    LIGHTGBM = "lightgbm"  # everything is there
    CALIBRATED_EWMA = "calibrated_ewma"  # the trees are missing
    PROFILE_EWMA = "profile_ewma"  # no usable models: clock and volatility from the bars
    PRIOR = "prior"  # no usable history: the asset's documented volatility


# ---------------------------------------------------------------- state of a market


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarketState:
    """What is carried from bar to bar for one asset, frequency and model set.

    `ewma` stands some days back, so that windows can be rebuilt from bars;
    `controller` knows every outcome up to `until`. Advancing bar by bar, or
    stopping and starting in between, gives the same bytes as one pass.
    """

    model_id: str
    until: int
    ewma: EwmaState
    controller: Controller

    def to_dict(self) -> dict[str, Any]:
        """Plain values and arrays for a state file."""
        return {
            "model_id": self.model_id,
            "until": self.until,
            "ewma": {
                "end_ts": self.ewma.end_ts,
                "sums": self.ewma.sums,
                "weights": self.ewma.weights,
            },
            "controller": self.controller.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            model_id=values["model_id"],
            until=int(values["until"]),
            ewma=EwmaState(**values["ewma"]),
            controller=Controller.from_dict(values["controller"]),
        )


def first_state(models: ModelSet, history: MarketHistory) -> MarketState:
    """The state before the first bar: nothing seen but what training left."""
    start = int(history.bars.open_ts[0])
    return MarketState(
        model_id=models.model_id,
        until=start,
        ewma=initial_state(models.spec, start),
        controller=models.calibration.controller,
    )


def _advance(
    models: ModelSet, histories: Sequence[MarketHistory], state: MarketState
) -> tuple[FeatureFrame, list[Controller], MarketState]:
    """Take in the bars of histories, each the beginning of the next.

    Returns features and controller at the end of every history, and the state at the
    end of the last. One by one or all at once gives the same bytes.
    """
    spec, standardiser = models.spec, models.calibration.standardiser
    grid = return_grid(histories[-1].bars, state.ewma.end_ts)
    ends = np.array([history.bars.end_ts for history in histories], dtype=np.int64)
    until = int(ends[-1])
    # A controller from after this moment (a replay with newer models) stays out.
    due = _outcome_times(spec, state.controller.end_ts, until)
    last = (ends - grid.open_ts[0]) // spec.bar_s - 1
    rows = _rows_for(spec, grid, due, last)
    frame = feature_frame(spec, standardiser, grid, state.ewma, rows)
    controllers = [state.controller] * len(ends)
    if len(due):
        realised, expected = _outcomes(models, grid, frame, rows, due)
        controllers = _controllers(spec, state.controller, ends, due, realised, expected)
    ewma = _checkpoint(spec, standardiser, grid, state.ewma, until)
    advanced = MarketState(
        model_id=models.model_id, until=until, ewma=ewma, controller=controllers[-1]
    )
    return frame.take(np.searchsorted(rows, last)), controllers, advanced


def _outcome_times(spec: FrequencySpec, after: int, until: int) -> IntArray:
    """Comparison times in (after, until], on the controller's fixed grid."""
    stride = controller_stride(spec) * spec.bar_s
    first = (after // stride + 1) * stride
    return np.arange(first, until + 1, stride, dtype=np.int64)


def _delays(spec: FrequencySpec) -> IntArray:
    """Seconds from a forecast to the comparison time of each bucket; (buckets,)."""
    stride = controller_stride(spec) * spec.bar_s
    return -(-np.array(spec.bucket_ends, dtype=np.int64) * spec.bar_s // stride) * stride


def _rows_for(spec: FrequencySpec, grid: ReturnGrid, due: IntArray, last: IntArray) -> IntArray:
    """Bars of the grid whose forecasts have come due, and the `last` ones; sorted."""
    made = np.unique(due[:, None] - _delays(spec)[None, :])
    rows = (made - grid.open_ts[0]) // spec.bar_s - 1
    return np.union1d(rows[rows >= 0], last)


def _outcomes(
    models: ModelSet, grid: ReturnGrid, frame: FeatureFrame, rows: IntArray, due: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Realised and forecast mean |z| per bucket at the comparison times; (buckets, n)."""
    spec = models.spec
    sums = window_sums(models.calibration.standardiser.apply(grid))
    levels = models.linear_log_levels(frame)
    realised = np.full((len(spec.bucket_ends), len(due)), np.nan)
    expected = realised.copy()
    for bucket, delay in enumerate(_delays(spec)):
        made = (due - delay - grid.open_ts[0]) // spec.bar_s - 1
        inside = made >= 0
        at = np.searchsorted(rows, made[inside])
        realised[bucket, inside] = bucket_targets(spec, sums, made[inside], bucket)
        expected[bucket, inside] = np.exp(levels[bucket, at])
    return realised, expected


def _controllers(
    spec: FrequencySpec,
    controller: Controller,
    ends: IntArray,
    due: IntArray,
    realised: FloatArray,
    expected: FloatArray,
) -> list[Controller]:
    """The controller at every one of `ends`, with the outcomes that had come due by then."""
    found, begin = [], 0
    for stop in np.searchsorted(due, ends, "right").tolist():
        if stop > begin:
            part = slice(begin, stop)
            controller = advance_controller(
                spec, controller, int(due[stop - 1]), realised[:, part], expected[:, part]
            )
            begin = stop
        found.append(controller)
    return found


def _checkpoint(
    spec: FrequencySpec, standardiser: Standardiser, grid: ReturnGrid, ewma: EwmaState, until: int
) -> EwmaState:
    """The averages as they stood at a day's boundary, far enough back for all windows."""
    boundary = (until // DAY_S - CHECKPOINT_AGE_DAYS) * DAY_S
    n_old = int(np.searchsorted(grid.open_ts, boundary))
    if n_old == 0:
        return ewma
    old = grid.part(0, n_old)
    return trace_ewma(spec, standardiser.apply(old), ewma).state


# ---------------------------------------------------------------- view of a market


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarketView:
    """Everything about one moment that a forecast needs, whatever the request."""

    rung: Rung
    spec: FrequencySpec
    standardiser: Standardiser
    log_levels: FloatArray  # (buckets,)
    level: float  # fallback EWMA of |z|, the unit of the centre
    centre: Mapping[int, float]  # by anchor lead in seconds, in scale
    shape: PathShape
    anchor_price: float
    anchor_ts: int
    scored_lag_s: int
    model_id: str | None
    trained_until: int | None
    notes: tuple[str, ...]


def best_view(
    models: ModelSet | None, history: MarketHistory, state: MarketState | None, note: str
) -> tuple[MarketView, MarketState | None]:
    """The highest rung of the ladder that holds; also the state after the last bar.

    `state` None: from the first bar on. `note` says why there are no models. On
    the rungs without models there is no state either.
    """
    view, advanced = _highest_view(models, history, state, note)
    if history.stand_in is not None:
        said = f"no bar of the scored feed is stored; {history.stand_in} stands in"
        view = replace(view, notes=(*view.notes, said))
    return view, advanced


def _highest_view(
    models: ModelSet | None, history: MarketHistory, state: MarketState | None, note: str
) -> tuple[MarketView, MarketState | None]:
    if not len(history.bars):
        return prior_view(history, "no bar had closed by then"), None
    if models is None:
        return view_without_models(history, note), None
    try:
        return view_with_models(models, history, state or first_state(models, history))
    except ModelError as error:
        return view_without_models(history, str(error)), None


def best_views(
    models: ModelSet, histories: Sequence[MarketHistory], state: MarketState
) -> tuple[list[MarketView], MarketState]:
    """`best_view` at the ends of histories, each the beginning of the next, from a state."""
    try:
        return views_with_models(models, histories, state)
    except ModelError:  # for one of them, or for all: each gets what it can
        views, advanced = [], state
        for history in histories:
            view, after = best_view(models, history, advanced, "")
            views.append(view)
            advanced = after or advanced
        return views, advanced


def view_with_models(
    models: ModelSet, history: MarketHistory, state: MarketState
) -> tuple[MarketView, MarketState]:
    """The market through a trained set; also returns the state after the last bar."""
    (view,), advanced = views_with_models(models, [history], state)
    return view, advanced


def views_with_models(
    models: ModelSet, histories: Sequence[MarketHistory], state: MarketState
) -> tuple[list[MarketView], MarketState]:
    """`view_with_models` at the ends of histories, each the beginning of the next.

    Many cost little more than the last one alone.
    """
    frame, controllers, advanced = _advance(models, histories, state)
    levels = models.log_levels(frame)
    gain = models.calibration.controller_gain
    for row, (history, controller) in enumerate(zip(histories, controllers, strict=True)):
        if controller.end_ts <= history.bars.end_ts:
            levels[:, row] += controller.log_multiplier(gain)
    if not np.isfinite(levels).all():
        raise ModelError(f"model set {models.model_id} forecasts no finite scale; train it again.")
    views = [
        _view(models, history, frame.take(slice(row, row + 1)), levels[:, row])
        for row, history in enumerate(histories)
    ]
    return views, advanced


def _view(
    models: ModelSet, history: MarketHistory, frame: FeatureFrame, log_levels: FloatArray
) -> MarketView:
    """What one row of features and the levels (buckets,) say about the end of a history."""
    notes = () if models.complete else ("the LightGBM models are missing or damaged",)
    return MarketView(
        rung=Rung.LIGHTGBM if models.complete else Rung.CALIBRATED_EWMA,
        spec=models.spec,
        standardiser=models.calibration.standardiser,
        log_levels=log_levels,
        level=float(frame.level[-1]),
        centre=models.centre_in_scale(frame),
        shape=models.calibration.path_shape,
        model_id=models.model_id,
        trained_until=models.trained_until,
        notes=notes,
        **_anchor(history),
    )


def view_without_models(history: MarketHistory, note: str) -> MarketView:
    """Clock and volatility straight from the bars; without enough that move, the prior."""
    spec, asset = FREQUENCIES[history.frequency], asset_spec(history.asset)
    recent = history.bars.between(history.anchor_ts - PROFILE_DAYS * DAY_S, None)
    if len(recent) <= USABLE_BARS:
        return prior_view(history, note)
    grid = return_grid(recent)
    profile = flat_profile(spec.bar_s, asset.hours)
    if len(grid) >= PROFILE_MINIMUM_DAYS * spec.bars_per_day:
        sizes = move_sizes(grid)
        profile = fit_profile(grid.open_ts, sizes, bar_s=spec.bar_s, hours=asset.hours)
    standardiser = fit_standardiser(grid, profile)
    if standardiser.unit_bps < STILL_BPS:
        return prior_view(history, f"{note}; the price has stood still")
    state = initial_state(spec, int(grid.open_ts[0]))
    rows = np.array([len(grid) - 1])
    level = float(feature_frame(spec, standardiser, grid, state, rows).level[-1])
    return MarketView(
        rung=Rung.PROFILE_EWMA,
        spec=spec,
        standardiser=standardiser,
        log_levels=np.full(len(spec.bucket_ends), np.log(level)),
        level=level,
        centre={},
        shape=STARTING_SHAPES[history.frequency],
        model_id=None,
        trained_until=None,
        notes=(note,),
        **_anchor(history),
    )


def prior_view(history: MarketHistory, note: str) -> MarketView:
    """The asset's documented volatility and no clock, around the last known price."""
    spec, asset = FREQUENCIES[history.frequency], asset_spec(history.asset)
    # A normal move of standard deviation σ has mean size σ √(2/π).
    per_bar = asset.hourly_volatility * np.sqrt(spec.bar_s / 3600)
    standardiser = Standardiser(
        profile=flat_profile(spec.bar_s, asset.hours),
        unit_bps=float(1e4 * per_bar * np.sqrt(2 / np.pi)),
        cap=np.inf,
    )
    return MarketView(
        rung=Rung.PRIOR,
        spec=spec,
        standardiser=standardiser,
        log_levels=np.zeros(len(spec.bucket_ends)),
        level=1.0,
        centre={},
        shape=STARTING_SHAPES[history.frequency],
        model_id=None,
        trained_until=None,
        notes=(note, "the bars tell no volatility: the asset's documented one is used"),
        **_anchor(history),
    )


def _anchor(history: MarketHistory) -> dict[str, Any]:
    return {
        "anchor_price": history.anchor_price,
        "anchor_ts": history.anchor_ts,
        "scored_lag_s": history.scored_lag_s,
    }
