"""How large the next moves are: the regime controller of the miner.

The scale of every lead is built in three layers, each optional when something
is missing: EWMAs of past |z| (the state of the market), a log-linear blend of
features per lead bucket (the calibration, HAR-like), a LightGBM correction on
top. `Controller` nudges the result by how past forecasts came out. The clock is
multiplied back in by `step_scales`, which the path simulator then draws from.

Sources: Corsi (2009), J. Financ. Econometrics 7(2), for the blend of horizons;
McCullagh & Nelder (1989), ch. 8, for gamma regression with a log link.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.signal import lfilter

from config import FrequencySpec
from domain import FloatArray, IntArray
from features import CLOCK_NAMES, FeatureFrame, Standardiser, bucket_edges, feature_names

CLIP_SD: Final = 5.0  # features are clipped at this many standard deviations
RESIDUAL_LIMIT: Final = 8.0  # y/μ beyond this does not pull harder on the fit
# Penalties on slopes of standardised features, in units of one such feature's
# information. Averages of size carry the forecast, the rest may refine it.
SIZE_RIDGE: Final = 0.03
OTHER_RIDGE: Final = 0.3
LIGHT_RIDGE: Final = 1e-4  # for a few features that all belong
NEWTON_STEPS: Final = 20  # at most
CONVERGED: Final = 1e-5  # a step below this is the last one
ROUGHLY: Final = 1e-3  # the same for the steps with some of the rows
ROUGH_ROWS: Final = 30_000
# Rows that are worked on together: few enough for the processor's cache.
BLOCK_ROWS: Final = 1024  # where they are summed, so that the blocks show in the last digits
LIGHT_ROWS: Final = 256

CONTROLLER_HALF_LIFE_DAYS: Final = 10.0
CONTROLLER_LIMIT: Final = 0.25  # of the log multiplier
CONTROLLER_PRIOR_DAYS: Final = 3.0  # outcomes that must outweigh "the forecast is right"

AUTOCORRELATION_ERRORS: Final = 3.0  # standard errors by which a lag must stand out, of five
LOWEST_SPECTRUM: Final = 0.05  # of correlated steps, 1 being that of independent ones


# ---------------------------------------------------------------- log-linear blend


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogLinearScale:
    """log mean |z| of one bucket as a linear function of standardised features.

    `centre`, `spread` and `slope` have shape (features,).
    """

    centre: FloatArray
    spread: FloatArray
    slope: FloatArray
    intercept: float

    def log_level(self, x: Any) -> FloatArray:
        """Log of the expected mean |z|; `x` (n, features), float64 or float32, to (n,).

        Summed row by row, so a row's bytes do not depend on its neighbours.
        """
        level = np.empty(len(x))
        for rows in _blocks(len(x), LIGHT_ROWS):
            standard = np.clip((x[rows] - self.centre) / self.spread, -CLIP_SD, CLIP_SD)
            level[rows] = np.ascontiguousarray(standard * self.slope).sum(axis=1)
        return np.asarray(self.intercept + level, dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON manifest."""
        return {
            "centre": self.centre.tolist(),
            "spread": self.spread.tolist(),
            "slope": self.slope.tolist(),
            "intercept": self.intercept,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            centre=np.array(values["centre"], dtype=np.float64),
            spread=np.array(values["spread"], dtype=np.float64),
            slope=np.array(values["slope"], dtype=np.float64),
            intercept=float(values["intercept"]),
        )


def bucket_design(frame: FeatureFrame, bucket: int) -> FloatArray:
    """Features of one lead bucket, shared ones first; (n, features) float64."""
    return np.hstack([frame.shared, frame.by_bucket[bucket]]).astype(np.float64)


def bucket_rows(frame: FeatureFrame, bucket: int, chosen: IntArray, out: Any = None) -> Any:
    """The same at some rows, as they are kept; (chosen, features) float32, `out` if given."""
    shared, own = frame.shared, frame.by_bucket[bucket]
    if out is None:
        out = np.empty((len(chosen), shared.shape[1] + own.shape[1]), dtype=np.float32)
    for rows in _blocks(len(chosen), LIGHT_ROWS):
        out[rows, : shared.shape[1]] = shared[chosen[rows]]
        out[rows, shared.shape[1] :] = own[chosen[rows]]
    return out


def fit_log_linear(
    x: Any,
    y: FloatArray,
    weight: FloatArray,
    *,
    ridge: float | FloatArray = LIGHT_RIDGE,
    prior: LogLinearScale | None = None,
    intercept_ridge: float = 0.0,
    room: Any = None,
) -> LogLinearScale:
    """Gamma regression with a log link, ridge and a bounded gradient.

    `x` (n, features), float64 or float32, `y` (n,) >= 0, the mean |z|, `weight` (n,), `ridge`
    (features,) or one for all: the penalty on half the squared slope, beside a loss of weight 1
    in all; infinite leaves a feature out. It does not fade as rows are added:
    outcomes overlap, and a year of them is a handful of regimes. With a `prior`
    slopes are pulled towards its slopes instead of 0, and the intercept by
    `intercept_ridge`; a feature is then measured in its own spread or the prior's,
    whichever is larger, for a few rows may hardly have moved it. The information
    matrix of the gamma family does not depend on the fit, so one factorisation
    serves every Newton step. It decides how fast they arrive, not where: some of many
    rows are enough for it, and for the first steps. `room` (n, 1 + features) float32, whatever
    is in it: where to put the standardised rows, for who fits often.
    """
    weight = weight / weight.sum()
    centre, spread = _moments(x, weight)
    target = np.zeros(len(centre) + 1)
    target[0] = np.log(max(float(weight @ y), 1e-6))
    if prior is not None:
        spread = np.maximum(spread, prior.spread)
        target = _in_units(prior, centre, spread)
    ridges = np.broadcast_to(np.asarray(ridge, dtype=np.float64), centre.shape)
    fitted = np.isfinite(ridges)
    standard = np.empty((len(x), 1 + len(centre)), dtype=np.float32) if room is None else room
    _standardise(x, centre, spread, fitted, standard)
    pull = target, np.concatenate(([intercept_ridge], np.where(fitted, ridges, 1.0)))
    some = slice(None, None, max(len(y) // ROUGH_ROWS, 1))
    rough = standard[some].copy(), y[some], weight[some]
    factor = cho_factor(_information(rough[0], rough[2]) + np.diag(pull[1] + 1e-9))
    near = _climb(*rough, pull, factor, target, until=ROUGHLY)
    beta = _climb(standard, y, weight, pull, factor, near, until=CONVERGED)
    return LogLinearScale(centre=centre, spread=spread, slope=beta[1:], intercept=float(beta[0]))


def _blocks(n_rows: int, at_once: int = BLOCK_ROWS) -> Iterator[slice]:
    """All rows, block by block."""
    return (slice(begin, begin + at_once) for begin in range(0, n_rows, at_once))


def _moments(x: Any, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weighted mean and standard deviation of every feature; both (features,)."""
    centre, variance = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for rows in _blocks(len(x)):
        centre += weight[rows] @ x[rows].astype(np.float64)
    for rows in _blocks(len(x)):
        variance += weight[rows] @ np.square(x[rows] - centre)
    return centre, np.maximum(np.sqrt(variance), 1e-6)


def _standardise(
    x: Any, centre: FloatArray, spread: FloatArray, fitted: npt.NDArray[np.bool_], standard: Any
) -> None:
    """A column of ones, then the clipped features, 0 if not fitted; (n, 1 + features) float32."""
    centre, spread, kept = (each.astype(x.dtype) for each in (centre, spread, fitted))
    # Clipping moves the mean a little; the ones keep the intercept from feeling it.
    standard[:, 0] = 1.0
    for rows in _blocks(len(x), LIGHT_ROWS):
        part = x[rows] - centre
        part /= spread
        np.clip(part, -CLIP_SD, CLIP_SD, out=part)
        np.multiply(part, kept, out=standard[rows, 1:])


def _information(standard: Any, weight: FloatArray) -> FloatArray:
    """Weighted second moments of the features; (features, features)."""
    total = np.zeros((standard.shape[1], standard.shape[1]))
    for rows in _blocks(len(standard)):
        part = standard[rows].astype(np.float64)
        total += (part * weight[rows, None]).T @ part
    return np.asarray(total / weight.sum(), dtype=np.float64)


def _climb(
    standard: Any,
    y: FloatArray,
    weight: FloatArray,
    penalised: tuple[FloatArray, FloatArray],
    factor: Any,
    beta: FloatArray,
    *,
    until: float,
) -> FloatArray:
    """Newton steps from `beta`, the last one smaller than `until`; (features,).

    `penalised`: what slopes are pulled to, and how hard, beside rows of weight 1 in all.
    """
    target, penalty = penalised
    share = weight / weight.sum()
    for _ in range(NEWTON_STEPS):
        gradient = penalty * (target - beta)
        for rows in _blocks(len(y)):
            part = standard[rows].astype(np.float64)
            ratio = np.minimum(y[rows] * np.exp(-(part @ beta)), RESIDUAL_LIMIT)
            gradient += (share[rows] * (ratio - 1)) @ part
        step = cho_solve(factor, gradient)
        beta = beta + step
        if np.abs(step).max() < until:
            break
    return beta


def _in_units(prior: LogLinearScale, centre: FloatArray, spread: FloatArray) -> FloatArray:
    """Intercept and slopes of the prior for features measured otherwise; (1 + features,)."""
    slope = prior.slope / prior.spread
    intercept = prior.intercept + float((centre - prior.centre) @ slope)
    return np.concatenate(([intercept], slope * spread))


def blend_ridge(spec: FrequencySpec) -> FloatArray:
    """The penalty on every feature of the blend; (features,).

    The clock is divided out before; what is left of it is for the trees to find.
    """
    shared, by_bucket = feature_names(spec)
    sizes = {f"log_size_{half_life:g}" for half_life in spec.ewma_half_lives}
    left_out = {*CLOCK_NAMES, "log_profile"}
    return np.array(
        [
            SIZE_RIDGE if name in sizes else np.inf if name in left_out else OTHER_RIDGE
            for name in (*shared, *by_bucket)
        ]
    )


def effective_rows(weight: FloatArray) -> float:
    """How many equal rows weigh as much (Kish)."""
    return float(weight.sum() ** 2 / (weight**2).sum())


def gamma_deviance(y: FloatArray, log_level: FloatArray) -> FloatArray:
    """Gamma loss per row, up to terms of y alone: y/μ + log μ; shape (n,).

    Beyond `RESIDUAL_LIMIT` it goes on with the slope it has there, as the
    gradient of the fit does: cut off flat, it would reward ever smaller levels.
    """
    ratio = y * np.exp(-log_level) / RESIDUAL_LIMIT
    return RESIDUAL_LIMIT * (np.minimum(ratio, 1) + np.log(np.maximum(ratio, 1))) + log_level


# ---------------------------------------------------------------- regime controller


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Controller:
    """Running comparison of realised with forecast size, per lead bucket.

    `realised` and `expected` (buckets,) are exponentially weighted sums of
    mean |z| over outcomes known by `end_ts`. Slow, bounded, resettable.
    """

    end_ts: int
    realised: FloatArray
    expected: FloatArray

    def log_multiplier(self, gain: float) -> FloatArray:
        """What to add to the log level of each bucket; (buckets,)."""
        return log_multipliers(self.realised, self.expected, gain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for state files and manifests."""
        return {
            "end_ts": self.end_ts,
            "realised": self.realised.tolist(),
            "expected": self.expected.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            end_ts=int(values["end_ts"]),
            realised=np.array(values["realised"], dtype=np.float64),
            expected=np.array(values["expected"], dtype=np.float64),
        )


def log_multipliers(realised: FloatArray, expected: FloatArray, gain: float) -> FloatArray:
    """What a controller with these sums adds to a log level; of their shape."""
    ratio = np.log(np.maximum(realised, 1e-9) / np.maximum(expected, 1e-9))
    return np.clip(gain * ratio, -CONTROLLER_LIMIT, CONTROLLER_LIMIT)


def controller_stride(spec: FrequencySpec) -> int:
    """Outcomes are compared every so many bars (a quarter of an hour)."""
    return max(900 // spec.bar_s, 1)


def neutral_controller(spec: FrequencySpec, end_ts: int) -> Controller:
    """A controller that has seen nothing: its prior says the forecast is right."""
    prior = CONTROLLER_PRIOR_DAYS * spec.bars_per_day / controller_stride(spec)
    buckets = len(spec.bucket_ends)
    return Controller(
        end_ts=end_ts, realised=np.full(buckets, prior), expected=np.full(buckets, prior)
    )


def advance_controller(
    spec: FrequencySpec,
    controller: Controller,
    end_ts: int,
    realised: FloatArray,
    expected: FloatArray,
) -> Controller:
    """Add outcomes in time order, one column per comparison time up to `end_ts`.

    `realised` and `expected` (buckets, n): mean |z|, NaN where not known. The
    comparison times lie on the fixed grid of `controller_stride`, so advancing
    at once or in parts gives the same bytes. The prior decays like the rest.
    """
    sums = controller_sums(spec, controller, realised, expected)
    last = [each[:, -1].copy() for each in sums]
    return Controller(end_ts=end_ts, realised=last[0], expected=last[1])


def controller_sums(
    spec: FrequencySpec, controller: Controller, realised: FloatArray, expected: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The controller's sums as they stand now and after each column of outcomes.

    `realised` and `expected` (buckets, n) as `advance_controller` takes them;
    returns both sums, each (buckets, n + 1).
    """
    known = np.isfinite(realised) & np.isfinite(expected)
    stride_days = controller_stride(spec) / spec.bars_per_day
    decay = 0.5 ** (stride_days / CONTROLLER_HALF_LIFE_DAYS)
    courses = []
    for now, values in ((controller.realised, realised), (controller.expected, expected)):
        rows = np.where(known, values, 0.0)
        course = np.empty((len(rows), rows.shape[1] + 1))
        course[:, 0] = now
        if rows.shape[1]:
            start = decay * now[:, None]
            course[:, 1:] = lfilter([1.0], [1.0, -decay], rows, axis=1, zi=start)[0]
        courses.append(course)
    return courses[0], courses[1]


# ---------------------------------------------------------------- scale along a path


def bucket_centres(spec: FrequencySpec) -> FloatArray:
    """Middle of every lead bucket in bars; (buckets,)."""
    return np.array([(begin + 1 + end) / 2 for begin, end in bucket_edges(spec)])


def level_at(spec: FrequencySpec, log_levels: FloatArray, lead_bars: FloatArray) -> FloatArray:
    """Mean |z| at any lead, log-interpolated between bucket centres, flat beyond.

    `log_levels` (buckets,), `lead_bars` (n,) the index of the bar (1 is the next);
    returns (n,).
    """
    grid = np.log(bucket_centres(spec))
    return np.exp(np.interp(np.log(np.maximum(lead_bars, 1.0)), grid, log_levels))


def step_scales(
    spec: FrequencySpec,
    standardiser: Standardiser,
    log_levels: FloatArray,
    times: IntArray,
) -> FloatArray:
    """Mean |move| of every step between `times`, in bps; (n - 1,).

    `times` (n,) rising Unix seconds, beginning with the time of the last known
    price. Steps may be of any length: variance adds up along the clock.
    """
    variance = np.diff(standardiser.profile.variance_time(times))
    lead = (times - times[0]) / spec.bar_s
    middle = (lead[1:] + lead[:-1]) / 2 + 0.5
    level = level_at(spec, log_levels, middle)
    return np.asarray(standardiser.unit_bps * level * np.sqrt(variance), dtype=np.float64)


# ---------------------------------------------------------------- tails of the steps


def shrunk_autocorrelation(
    z: FloatArray, weight: FloatArray, *, lags: int, shrinkage: float = 0.7, limit: float = 3.0
) -> tuple[float, ...]:
    """Autocorrelation of clipped standardised returns, shrunk; () if none stands out.

    `z` (n,) with NaN gaps, `weight` (n,). A lag counts only beyond three standard
    errors, which allow for volatility that clusters; trailing lags that do not
    count are dropped.
    Source: White (1980), Econometrica 48(4), for the errors.
    """
    value = np.clip(np.where(np.isfinite(z), z, 0.0), -limit, limit)
    known = np.isfinite(z) * weight
    variance = max(float((known * value**2).sum() / max(known.sum(), 1e-12)), 1e-12)
    found: list[float] = []
    for lag in range(1, lags + 1):
        pair = known[lag:] * np.isfinite(z[:-lag])
        product = pair * value[lag:] * value[:-lag] / (max(pair.sum(), 1e-12) * variance)
        correlation, error = float(product.sum()), float(np.sqrt((product**2).sum()))
        stands_out = abs(correlation) > AUTOCORRELATION_ERRORS * error
        found.append(float(np.clip(shrinkage * correlation, -0.3, 0.3)) if stands_out else 0.0)
    while found and found[-1] == 0.0:
        found.pop()
    return _made_possible(tuple(found))


def _made_possible(autocorrelation: tuple[float, ...]) -> tuple[float, ...]:
    """Scale a cut-off autocorrelation down until its spectrum is positive at all angles.

    Lags that each look harmless can together belong to no series at all.
    """
    if not autocorrelation:
        return ()
    angle = np.linspace(0.0, np.pi, 181)[:, None]
    lags = np.arange(1, len(autocorrelation) + 1)
    lowest = float((2 * np.cos(angle * lags) @ np.array(autocorrelation)).min())
    scale = min(1.0, (1.0 - LOWEST_SPECTRUM) / max(-lowest, 1e-12))
    return tuple(scale * value for value in autocorrelation)


def blend_log_levels(
    linear: Sequence[float] | FloatArray, correction: FloatArray, strength: float
) -> FloatArray:
    """Log levels of the buckets with part of LightGBM's correction; (buckets,)."""
    return np.asarray(linear, dtype=np.float64) + strength * correction


def weigh_blend(linear: FloatArray, fallback: FloatArray, shares: FloatArray) -> FloatArray:
    """Log levels between the single EWMA (share 0) and the log-linear blend (share 1).

    `linear` (buckets, n), `fallback` (n,), `shares` (buckets,); returns (buckets, n).
    """
    return np.asarray(fallback + shares[:, None] * (linear - fallback), dtype=np.float64)
