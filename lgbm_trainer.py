"""Training: history to a model set, every part of it weighed out of sample.

A rolling split by time with an embargo of one horizon gives predictions for
bars that no fit has seen. From them every part earns its weight: rounds of the
trees, share of the scale correction, shrinkage of each centre, gain of the
controller, tails and dispersion of the paths. Then everything is fitted once
more on all bars. Nothing is shuffled over time, and every fold learns clock,
unit and cap from its own past.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import Any, Final

import lightgbm
import numpy as np
import orjson
from lightgbm import Booster
from numpy.random import Generator
from threadpoolctl import threadpool_limits

from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, asset_spec
from domain import FloatArray, IntArray, MarketHistory
from errors import InsufficientHistory
from features import ReturnGrid, feature_names, return_grid
from lgbm_predictor import (
    CALIBRATION,
    SCALE_MODEL,
    SCHEMA,
    Calibration,
    bucket_part,
    centre_design,
    centre_file,
    centre_names,
    fallback_log_level,
    lead_layout,
    scale_design,
    scale_names,
    set_extra_columns,
)
from model_selection import (
    Judged,
    apply_shares,
    centre_weights,
    choose_gain,
    choose_shares,
    choose_strength,
    past_prompts,
    skills_by_bucket,
)
from model_store import MANIFEST, digest, seal_manifest
from path_fitting import STARTING_SHAPES, VARIATIONS, search_shape
from path_simulator import PathShape
from pooled_prior import PooledPrior, fit_blend_bucket, prior_known_at
from protocol import ProtocolProfile, competition_like
from scheduled_events import known_events
from training_rows import (
    FOLDS,
    Fold,
    Market,
    fewest_bars,
    jitter_leads,
    prepare_market,
    recency_weights,
    rolling_splits,
    rows_known_by,
    sample_leads,
    training_rows,
)
from uncertainty_engine import (
    Controller,
    LogLinearScale,
    bucket_design,
    bucket_rows,
    controller_stride,
    shrunk_autocorrelation,
)

WARM_UP_DAYS: Final = 40.0  # four half-lives of the slowest average
BLEND_DRAWS: Final = 3  # lead buckets drawn per base time for the log-linear blend
SHORT_DAYS: Final = 30.0  # with less history the training is done with a warning
AUTOCORRELATION_LAGS: Final = 5
SHAPE_PROMPTS: Final = {Frequency.HF: 80, Frequency.LF: 40}
MAX_ROUNDS: Final = 80
PATIENCE: Final = 15

_TREES: Final[Mapping[str, Any]] = {
    "verbosity": -1,
    "num_threads": 1,  # processes run side by side; bytes must not depend on threads
    "deterministic": True,
    "force_row_wise": True,
    "max_bin": 127,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "min_data_in_leaf": 300,
    "boost_from_average": False,  # the scale has an offset; an average drift is no forecast
}
SCALE_PARAMETERS: Final[Mapping[str, Any]] = {
    **_TREES,
    "objective": "gamma",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "lambda_l2": 10.0,
    "feature_fraction": 0.5,
}
CENTRE_PARAMETERS: Final[Mapping[str, Any]] = {
    **_TREES,
    "objective": "regression",
    "learning_rate": 0.03,
    "num_leaves": 7,
    "lambda_l2": 50.0,
    "feature_fraction": 0.3,
}

Progress = Callable[[str], None]


class _NoOutcomes(Exception):
    """A stretch of bars has nothing to learn from or to judge by: the market rested."""


# ---------------------------------------------------------------- what training reports


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadReport:
    """One line of the closing table."""

    asset: str
    frequency: Frequency
    lead_s: int
    rows: int  # training rows of the lead's centre model
    best_iteration: int  # rounds of the lead's centre model
    centre_skill: float  # 1 - squared error / that of zero, out of sample, after shrinkage
    centre_weight: float  # the shrinkage, 0 to 1
    scale_skill: float  # gamma deviance gained on the single EWMA, out of sample


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """A trained set, ready to publish."""

    asset: str
    frequency: Frequency
    model_id: str
    files: Mapping[str, bytes]
    leads: tuple[LeadReport, ...]
    days: float  # of history used
    seconds: float
    warnings: tuple[str, ...]


# ---------------------------------------------------------------- one fit


def _fit_blend(market: Market, train_end: int, rng: Generator) -> tuple[LogLinearScale, ...]:
    spec = market.spec
    rows = training_rows(market, train_end)
    drawn = sample_leads(rng, len(rows), len(spec.bucket_ends), draws=BLEND_DRAWS)
    now = int(market.frame.end_ts[train_end - 1])
    teaching = [
        rows_known_by(market, bucket, rows[(drawn == bucket).any(axis=1)], train_end)
        for bucket in range(len(spec.bucket_ends))
    ]
    # The same for all buckets: the system clears new memory page by page.
    size, width = max(map(len, teaching)), sum(map(len, feature_names(spec)))
    design, room = (np.empty((size, width + more), dtype=np.float32) for more in (0, 1))
    fits = []
    for bucket, chosen in enumerate(teaching):
        _require_rows(chosen)
        fits.append(
            fit_blend_bucket(
                spec,
                bucket,
                bucket_rows(market.frame, bucket, chosen, out=design[: len(chosen)]),
                market.targets[bucket, chosen],
                recency_weights(market.frame.end_ts[chosen], now, spec.blend_half_life_days),
                prior=market.prior,
                days=market.days_known(train_end),
                room=room[: len(chosen)],
            )
        )
    return tuple(fits)


def _require_rows(rows: IntArray) -> None:
    if not len(rows):
        raise _NoOutcomes


def _scale_rows(
    market: Market, blend: tuple[LogLinearScale, ...], rows: IntArray, limit: int, rng: Generator
) -> lightgbm.Dataset:
    """One drawn bucket per base time, pooled over buckets, the blend as offset."""
    spec = market.spec
    drawn = sample_leads(rng, len(rows), len(spec.bucket_ends))[:, 0]
    chosen = [
        rows_known_by(market, bucket, rows[drawn == bucket], limit) for bucket in range(len(blend))
    ]
    ends = market.frame.end_ts[np.concatenate(chosen)]
    _require_rows(ends)
    names = scale_names(spec)
    design = np.empty((len(ends), len(names)), dtype=np.float32)
    labels, offsets = np.empty(len(ends)), np.empty(len(ends))
    end = 0
    for bucket, part in enumerate(blend):
        begin, end = end, end + len(chosen[bucket])
        own = bucket_part(design[begin:end])
        bucket_rows(market.frame, bucket, chosen[bucket], out=own)
        offsets[begin:end] = part.log_level(own)
        set_extra_columns(design[begin:end], spec, bucket, offsets[begin:end])
        labels[begin:end] = market.targets[bucket, chosen[bucket]]
    now = int(market.frame.end_ts[min(limit, len(market.grid)) - 1])
    return lightgbm.Dataset(
        design,
        label=np.maximum(labels, 1e-3),  # the gamma law has no zeros
        weight=recency_weights(ends, now, spec.recency_half_life_days),
        init_score=offsets,
        feature_name=names,
    )


def _rows_by_lead(spec: FrequencySpec, rows: IntArray, rng: Generator) -> list[IntArray]:
    """The base times of every anchor lead: each base time draws the one lead it teaches."""
    drawn = sample_leads(rng, len(rows), len(spec.leads_s))[:, 0]
    return [rows[drawn == lead] for lead in range(len(spec.leads_s))]


def _centre_rows(
    market: Market, lead: int, rows: IntArray, limit: int, rng: Generator
) -> lightgbm.Dataset:
    """The base times that drew this anchor lead, the lead jittered within its bucket."""
    spec = market.spec
    bars = jitter_leads(rng, spec, lead, len(rows))
    target = market.centre_targets(rows, bars)
    keep = np.isfinite(target) & (rows + bars < limit)
    rows = rows[keep]
    _require_rows(rows)
    ends = market.frame.end_ts[rows]
    now = int(market.frame.end_ts[min(limit, len(market.grid)) - 1])
    return lightgbm.Dataset(
        centre_design(market.frame.shared[rows], bars[keep]),
        label=target[keep],
        weight=recency_weights(ends, now, spec.recency_half_life_days),
        feature_name=centre_names(spec),
    )


def _grow(
    parameters: Mapping[str, Any],
    train: lightgbm.Dataset,
    *,
    seed: int,
    rounds: int = MAX_ROUNDS,
    judge: lightgbm.Dataset | None = None,
) -> Booster:
    """Grow trees for `rounds`, or until the judging rows have not improved for long."""
    n_rows = len(train.label)
    settings = {
        **parameters,
        "seed": seed,
        # A young asset has fewer rows than the usual leaf; a tenth must fit.
        "min_data_in_leaf": max(20, min(int(parameters["min_data_in_leaf"]), n_rows // 20)),
    }
    if judge is None:
        return lightgbm.train(settings, train, num_boost_round=rounds)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    return lightgbm.train(
        settings, train, num_boost_round=rounds, valid_sets=[judge], callbacks=[stop]
    )


# ---------------------------------------------------------------- out of sample


def _judge_fold(market: Market, fold: Fold, seed: int, progress: Progress) -> Judged:
    spec = market.spec
    rng = np.random.default_rng([seed, fold.begin])
    progress("scale")
    blend = _fit_blend(market, fold.train_end, rng)
    train_rows = training_rows(market, fold.train_end)
    judge_rows = np.arange(fold.begin, fold.end)
    n = len(market.grid)
    scale = _grow(
        SCALE_PARAMETERS,
        _scale_rows(market, blend, train_rows, fold.train_end, rng),
        judge=_scale_rows(market, blend, judge_rows, n, rng),
        seed=seed,
    )
    centres = []
    train_by_lead = _rows_by_lead(spec, train_rows, rng)
    judge_by_lead = _rows_by_lead(spec, judge_rows, rng)
    for lead, lead_s in enumerate(spec.leads_s):
        progress(f"centre {lead_s} s")
        train = _centre_rows(market, lead, train_by_lead[lead], fold.train_end, rng)
        judge = _centre_rows(market, lead, judge_by_lead[lead], n, rng)
        centres.append(_grow(CENTRE_PARAMETERS, train, judge=judge, seed=seed))
    return _predict_fold(market, fold, blend, scale, centres)


def _predict_fold(
    market: Market,
    fold: Fold,
    blend: tuple[LogLinearScale, ...],
    scale: Booster,
    centres: list[Booster],
) -> Judged:
    spec = market.spec
    stride = controller_stride(spec)
    rows = np.arange(fold.begin, fold.end)
    rows = rows[market.frame.end_ts[rows] % (stride * spec.bar_s) == 0]
    frame = market.frame.take(rows)
    linear = np.stack([part.log_level(bucket_design(frame, b)) for b, part in enumerate(blend)])
    correction = [
        scale.predict(scale_design(spec, frame, bucket, level), raw_score=True)
        for bucket, level in enumerate(linear)
    ]
    lead_bars = [np.full(len(rows), lead_s // spec.bar_s) for lead_s in spec.leads_s]
    centre = [
        model.predict(centre_design(frame.shared, bars))
        for model, bars in zip(centres, lead_bars, strict=True)
    ]
    return Judged(
        spec=spec,
        standardiser=market.standardiser,
        rows=rows,
        end_ts=frame.end_ts,
        linear=linear,
        correction=np.asarray(correction, dtype=np.float64),
        targets=market.targets[:, rows],
        fallback=fallback_log_level(frame),
        centre=np.asarray(centre, dtype=np.float64),
        centre_targets=np.stack([market.centre_targets(rows, bars) for bars in lead_bars]),
        scale_rounds=max(int(scale.best_iteration), 1),
        centre_rounds=tuple(max(int(model.best_iteration), 1) for model in centres),
    )


# ---------------------------------------------------------------- training


def progress_steps(frequency: Frequency) -> int:
    """How often `train` calls its progress function; less often for a short history."""
    fits = 1 + len(FREQUENCIES[frequency].leads_s)
    return (FOLDS + 1) * fits + len(VARIATIONS)


def fit_window(history: MarketHistory, days: float) -> tuple[int, int]:
    """When the bars of the first fold's and of the final fit end, Unix seconds."""
    spec = FREQUENCIES[history.frequency]
    end = history.bars.end_ts
    start = max(int(history.bars.open_ts[0]), end - int(days * DAY_S))
    folds = rolling_splits((end - start) // spec.bar_s, spec.horizon_bars)
    return start + max(folds[0].train_end, 0) * spec.bar_s, end


def train(
    history: MarketHistory,
    *,
    days: float,
    seed: int,
    profile: ProtocolProfile,
    priors: Sequence[PooledPrior] = (),
    progress: Progress = lambda _: None,
) -> TrainingResult:
    """Train one asset at one frequency on the last `days` of the history.

    Every fit leans on the newest of the `priors` that had seen nothing later.

    Deterministic in its arguments; single-threaded, so that sets can be trained
    side by side. `progress` is called with the name of every step begun.
    Raises: InsufficientHistory with less than the frequency's minimum.
    """
    begun = perf_counter()
    with threadpool_limits(1):
        is_cut = history.bars.open_ts[0] < history.bars.end_ts - int(days * DAY_S)
        history, grid, warm_up = _recent(history, days)
        _require_enough(history, grid, is_cut=is_cut)
        try:
            bars = _Bars(history=history, grid=grid, warm_up=warm_up, priors=tuple(priors))
            judged = _judge_all(bars, seed, progress)
            market = bars.market(len(grid))
            chosen = _choose(history, judged, market, seed, profile, progress)
            fitted = _fit_final(market, chosen, seed, progress)
        except _NoOutcomes:
            raise InsufficientHistory(
                f"{_name(history)}: {_extent(history, grid)} are too few to judge a forecast "
                "by, because the market rested at their end: collect or import more."
            ) from None
    return _result(history, chosen, fitted, seed, perf_counter() - begun)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Bars:
    """What a training learns from."""

    history: MarketHistory
    grid: ReturnGrid
    warm_up: ReturnGrid
    priors: tuple[PooledPrior, ...]

    def market(self, train_end: int, end: int | None = None) -> Market:
        """The bars up to `end` (default: all), under what could be learned before `train_end`."""
        moment = int(self.grid.open_ts[train_end - 1]) + self.grid.bar_s
        events, _ = known_events(moment)
        return prepare_market(
            FREQUENCIES[self.history.frequency],
            self.grid.part(0, len(self.grid) if end is None else end),
            self.warm_up,
            asset_spec(self.history.asset).hours,
            train_end,
            prior=prior_known_at(self.priors, moment),
            events=events,
        )


def _recent(history: MarketHistory, days: float) -> tuple[MarketHistory, ReturnGrid, ReturnGrid]:
    """The last `days`, their grid, and the grid of the bars that warm the averages up."""
    start = history.bars.end_ts - int(days * DAY_S)
    recent = replace(history, bars=history.bars.between(start, None))
    warm = history.bars.between(start - int(WARM_UP_DAYS * DAY_S), None)
    grid = return_grid(warm)
    n_warm = len(grid) - int((recent.bars.end_ts - recent.bars.open_ts[0]) // grid.bar_s)
    return recent, grid.part(n_warm, len(grid)), grid.part(0, n_warm)


def _days(history: MarketHistory) -> float:
    return float(history.bars.end_ts - history.bars.open_ts[0]) / DAY_S


def _require_enough(history: MarketHistory, grid: ReturnGrid, *, is_cut: bool) -> None:
    """Refuse too short a time, or one with too few bars; `is_cut`: there is more of both."""
    spec = FREQUENCIES[history.frequency]
    length, known = fewest_bars(spec)
    if len(grid) < length:
        fault = f"are too short a time; training needs {spec.minimum_days:g} days"
    elif grid.known < known:
        fault = f"are too few bars; training needs {known}"
    else:
        return
    remedy = "there are earlier ones, so raise --days" if is_cut else "collect or import more"
    raise InsufficientHistory(f"{_name(history)}: {_extent(history, grid)} {fault}: {remedy}.")


def _name(history: MarketHistory) -> str:
    return f"{history.asset} {history.frequency.value}"


def _extent(history: MarketHistory, grid: ReturnGrid) -> str:
    return f"{grid.known} bars over {_days(history):.1f} days"


def _judge_all(bars: _Bars, seed: int, progress: Progress) -> list[Judged]:
    """Every fold that has outcomes; a night or weekend of sessions may have none."""
    judged = []
    horizon = FREQUENCIES[bars.history.frequency].horizon_bars
    for fold in rolling_splits(len(bars.grid), horizon):
        market = bars.market(fold.train_end, min(fold.end + horizon, len(bars.grid)))
        with suppress(_NoOutcomes):
            judged.append(_judge_fold(market, fold, seed, progress))
    if not judged:
        raise _NoOutcomes
    return judged


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Choice:
    """What the judged rows decided."""

    judged: list[Judged]  # with the blend at its shares
    shares: FloatArray
    strength: float
    centre: Mapping[int, tuple[float, float]]  # lead to shrinkage and skill
    gain: float
    controller: Controller
    shape: PathShape
    scale_rounds: int
    centre_rounds: tuple[int, ...]
    pooled_with: tuple[str, ...]  # assets whose common blend and clock were leaned on


def _choose(
    history: MarketHistory,
    judged: list[Judged],
    market: Market,
    seed: int,
    profile: ProtocolProfile,
    progress: Progress,
) -> _Choice:
    spec = market.spec
    shares = choose_shares(judged, trusted=0.0 if market.prior is None else 1.0)
    judged = apply_shares(judged, shares)
    strength = choose_strength(judged)
    gain, controller = choose_gain(judged)
    weight = recency_weights(
        market.frame.end_ts, int(market.frame.end_ts[-1]), spec.blend_half_life_days
    )
    start = replace(
        STARTING_SHAPES[history.frequency],
        autocorrelation=shrunk_autocorrelation(market.z, weight, lags=AUTOCORRELATION_LAGS),
    )
    prompts = past_prompts(
        history,
        market.grid,
        judged,
        strength,
        count=SHAPE_PROMPTS[history.frequency],
        delay_bars=2 * history.scored_lag_s // spec.bar_s,
    )
    shape = search_shape(
        spec,
        competition_like(profile, history.asset, history.frequency),
        prompts,
        start,
        seed=seed,
        on_step=lambda: progress("path shape"),
    )
    rounds = np.median([fold.centre_rounds for fold in judged], axis=0)
    return _Choice(
        judged=judged,
        shares=shares,
        strength=strength,
        centre=centre_weights(judged, spec),
        gain=gain,
        controller=controller,
        shape=shape,
        scale_rounds=int(np.median([fold.scale_rounds for fold in judged])),
        centre_rounds=tuple(int(value) for value in rounds),
        pooled_with=() if market.prior is None else market.prior.assets,
    )


def _fit_final(
    market: Market, chosen: _Choice, seed: int, progress: Progress
) -> tuple[dict[str, bytes], dict[int, int]]:
    """Fit everything on all bars; returns the files of the set and rows per lead."""
    spec, n = market.spec, len(market.grid)
    rng = np.random.default_rng([seed, n])
    rows = training_rows(market, n)
    progress("scale")
    blend = _fit_blend(market, n, rng)
    data = _scale_rows(market, blend, rows, n, rng)
    scale = _grow(SCALE_PARAMETERS, data, seed=seed, rounds=chosen.scale_rounds)
    files = {SCALE_MODEL: scale.model_to_string().encode()}
    counts = {}
    rows_by_lead = _rows_by_lead(spec, rows, rng)
    for lead, lead_s in enumerate(spec.leads_s):
        progress(f"centre {lead_s} s")
        data = _centre_rows(market, lead, rows_by_lead[lead], n, rng)
        rounds = chosen.centre_rounds[lead]
        model = _grow(CENTRE_PARAMETERS, data, seed=seed, rounds=rounds)
        files[centre_file(lead_s)] = model.model_to_string().encode()
        counts[lead_s] = len(data.label)
    calibration = Calibration(
        standardiser=market.standardiser,
        linear=blend,
        blend_shares=chosen.shares,
        scale_strength=chosen.strength,
        centre_weights={lead: weight for lead, (weight, _) in chosen.centre.items()},
        controller=chosen.controller,
        controller_gain=chosen.gain,
        path_shape=chosen.shape,
    )
    files[CALIBRATION] = orjson.dumps(calibration.to_dict())
    return files, counts


def _result(
    history: MarketHistory,
    chosen: _Choice,
    fitted: tuple[dict[str, bytes], dict[int, int]],
    seed: int,
    seconds: float,
) -> TrainingResult:
    files, counts = fitted
    leads = _lead_reports(history, chosen, counts)
    model_id = _model_id(history, files)
    manifest = {
        "schema": SCHEMA,
        "model_id": model_id,
        **_provenance(history, seed),
        "features": {
            "scale": scale_names(FREQUENCIES[history.frequency]),
            "centre": centre_names(FREQUENCIES[history.frequency]),
        },
        "leads": lead_layout(FREQUENCIES[history.frequency]),
        "weights": {
            "blend_shares": chosen.shares.tolist(),
            "scale_strength": chosen.strength,
            "scale_rounds": chosen.scale_rounds,
            "controller_gain": chosen.gain,
            "centre": {str(lead): weight for lead, (weight, _) in chosen.centre.items()},
        },
        "path_shape": chosen.shape.to_dict(),
        "pooled_with": list(chosen.pooled_with),
        "validation": [_lead_metrics(lead) for lead in leads],
        "files": {name: digest(data) for name, data in files.items()},
    }
    files = {**files, MANIFEST: seal_manifest(manifest)}
    return TrainingResult(
        asset=history.asset,
        frequency=history.frequency,
        model_id=model_id,
        files=files,
        leads=leads,
        days=_days(history),
        seconds=seconds,
        warnings=_warnings(history),
    )


def _model_id(history: MarketHistory, files: Mapping[str, bytes]) -> str:
    """Name of the set: when its training data end, and a hash of its content."""
    until = datetime.fromtimestamp(history.bars.end_ts, UTC).strftime("%Y%m%dT%H%MZ")
    content = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    return f"{until}-{content[:10]}"


def _provenance(history: MarketHistory, seed: int) -> dict[str, Any]:
    return {
        "asset": history.asset,
        "frequency": history.frequency.value,
        "source": history.source,
        "feed": history.bars.feed,
        "trained_from": int(history.bars.open_ts[0]),
        "trained_until": history.bars.end_ts,
        "bars": len(history.bars),
        "seed": seed,
        "libraries": {name: version(name) for name in ("lightgbm", "numpy", "scipy")},
    }


def _lead_metrics(lead: LeadReport) -> dict[str, Any]:
    return {
        "lead_s": lead.lead_s,
        "rows": lead.rows,
        "best_iteration": lead.best_iteration,
        "centre_skill": lead.centre_skill,
        "centre_weight": lead.centre_weight,
        "scale_skill": lead.scale_skill,
    }


def _lead_reports(
    history: MarketHistory, chosen: _Choice, counts: Mapping[int, int]
) -> tuple[LeadReport, ...]:
    spec = FREQUENCIES[history.frequency]
    skills = skills_by_bucket(chosen.judged, chosen.strength)
    reports = []
    for lead, lead_s in enumerate(spec.leads_s):
        bucket = int(np.searchsorted(spec.bucket_ends, lead_s // spec.bar_s))
        weight, skill = chosen.centre[lead_s]
        reports.append(
            LeadReport(
                asset=history.asset,
                frequency=history.frequency,
                lead_s=lead_s,
                rows=counts[lead_s],
                best_iteration=chosen.centre_rounds[lead],
                centre_skill=skill,
                centre_weight=weight,
                scale_skill=float(skills[bucket]),
            )
        )
    return tuple(reports)


def _warnings(history: MarketHistory) -> tuple[str, ...]:
    days = _days(history)
    _, warnings = known_events(history.bars.end_ts)
    if days < SHORT_DAYS:
        warnings.append(
            f"{_name(history)}: trained on only {days:.1f} days of bars; "
            f"below {SHORT_DAYS:g} days the calibration is rough."
        )
    return tuple(warnings)
