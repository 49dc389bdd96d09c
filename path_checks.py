"""Would one be willing to send this forecast? The sanity checks of `test_miner.py`.

Form first (shape, time axis, digits, start price), then substance: spread at
each scored interval against what the market lately moved, tails, volatility
that differs between paths, and a spread that grows like a market's. If the form
is broken the rest is not looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from config import asset_spec
from domain import FloatArray, Forecast, IntArray, MarketHistory
from errors import InvalidAnswer
from protocol import Competition
from realised_spread import Surroundings, Yardstick, expected_at_start, measure, survey
from wire_format import check_paths

# How far, in logs, a spread may miss the yardstick, plus standard errors of the
# yardstick itself. One forecast may know more about its moment than the
# yardstick does: on 400 moments of BTC and gold in 2025 the trained engine was
# off by 0.07 (24 h) to 0.13, and 1 % of them failed. Over eight moments that
# averages out, and √2 (0.35 in logs) is told with certainty.
OVERALL_WARNING: Final = 0.15
OVERALL_FAILURE: Final = 0.25
SINGLE_WARNING: Final = 0.15
SINGLE_FAILURE: Final = 0.40
LEVEL_WARNING: Final = 0.12
LEVEL_FAILURE: Final = 0.20
ERRORS_ALLOWED: Final = 2.0
MIN_MOMENTS: Final = 4  # fewer cannot be averaged
CLOSED_BPS: Final = 0.02  # a market that moves less is closed

START_LIMIT: Final = 5.0  # of the move expected between the anchor price and point 0
START_SLACK_BPS: Final = 1.0

# q99 / q50 of |step|: 3.8 for a normal distribution, 6 for t(4), 64 for Cauchy.
TAIL_FAILURE: Final = (3.0, 15.0)
TAIL_WARNING: Final = (3.6, 9.0)
# Standard deviation of log volatility between paths, sampling noise removed.
DISPERSION_FAILURE: Final = (0.03, 1.0)
DISPERSION_WARNING: Final = (0.08, 0.6)
# Standard deviation of the whole change / root of the summed step variances:
# 1 for a random walk, 1/17 for white noise around a line over 288 steps.
GROWTH_FAILURE: Final = (0.60, 1.60)
GROWTH_WARNING: Final = (0.80, 1.25)


class Verdict(StrEnum):
    """What a check says."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The outcome of one check; `detail` is one sentence with the numbers."""

    check: str
    verdict: Verdict
    detail: str


def check_forecast(
    forecast: Forecast,
    history: MarketHistory,
    competition: Competition,
    *,
    timestamps: IntArray,
    answer_paths: FloatArray,
) -> tuple[CheckResult, ...]:
    """Judge one forecast of at least a hundred paths.

    `history`: what was known when it was made, of the same frequency.
    `competition`: names the scored intervals. `timestamps` (n_points,): the times
    that the answer claims for its points, Unix seconds. `answer_paths`: the
    prices as they leave, rounded.
    """
    form = tuple(_check_form(forecast, timestamps, answer_paths))
    if any(result.verdict is Verdict.FAILURE for result in form):
        return form
    hours = asset_spec(forecast.request.asset).hours
    surroundings = survey(forecast.request, history, hours)
    misses = _misses(forecast, surroundings, competition)
    return (
        *form,
        _check_start(forecast.paths, history.anchor_price, surroundings),
        *(_check_interval(miss) for miss in misses),
        _check_overall(misses),
        *_check_steps(np.log(forecast.paths)),
    )


def spread_miss(
    forecast: Forecast, history: MarketHistory, competition: Competition
) -> float | None:
    """Log of the forecast's spread over what the market lately moved in like moments.

    Over all scored intervals; None where the market is closed. `history`: what
    was known when the forecast was made.
    """
    hours = asset_spec(forecast.request.asset).hours
    surroundings = survey(forecast.request, history, hours)
    overall = _overall(_misses(forecast, surroundings, competition))
    return None if overall is None else overall[0]


def check_level(misses: Sequence[float]) -> CheckResult:
    """Judge the spread by several moments at once (`spread_miss` of each).

    This is the sharpest check of the spread: chance and what a model knows
    about a single moment average out.
    """
    check = "spread, several moments"
    if len(misses) < MIN_MOMENTS:
        detail = f"{len(misses)} open moments to compare with, {MIN_MOMENTS} are needed: not judged"
        return CheckResult(check=check, verdict=Verdict.OK, detail=detail)
    miss = float(np.mean(misses))
    return CheckResult(
        check=check,
        verdict=_outside(abs(miss), LEVEL_WARNING, LEVEL_FAILURE),
        detail=f"× {np.exp(miss):.2f} of what the market lately moved, over {len(misses)} moments, "
        f"{_bounds(LEVEL_WARNING, LEVEL_FAILURE)}",
    )


# ---------------------------------------------------------------- form


def _check_form(
    forecast: Forecast, timestamps: IntArray, answer_paths: FloatArray
) -> Iterator[CheckResult]:
    request, paths = forecast.request, forecast.paths
    expected = (request.num_paths, request.n_points)
    yield _passed_if(
        paths.shape == expected == answer_paths.shape,
        "shape",
        f"{paths.shape} paths and points, {answer_paths.shape} on the wire; {expected} were "
        "asked for",
    )
    yield _passed_if(
        np.array_equal(timestamps, request.grid_ts),
        "time axis",
        f"{len(timestamps)} times from {timestamps[:1]} to {timestamps[-1:]}, "
        f"{int((np.diff(timestamps) != request.increment_s).sum())} steps that are not "
        f"{request.increment_s} s",
    )
    bad = int((~np.isfinite(paths)).sum() + (paths <= 0).sum())
    yield _passed_if(bad == 0, "prices", f"{bad} prices are not finite and positive")
    if bad == 0 and paths.ndim == 2 and paths.size:
        frozen = int((np.ptp(paths, axis=1) == 0).sum())
        yield _passed_if(frozen == 0, "moving", f"{frozen} paths never move")
        copies = len(paths) - len(np.unique(paths, axis=0))
        yield _passed_if(copies == 0, "distinct", f"{copies} paths are copies of others")
    try:
        check_paths(answer_paths, request)
    except InvalidAnswer as error:
        yield CheckResult(check="digits", verdict=Verdict.FAILURE, detail=str(error))
    else:
        yield CheckResult(
            check="digits", verdict=Verdict.OK, detail="every price passes both digit rules"
        )


def _passed_if(passed: object, check: str, detail: str) -> CheckResult:
    verdict = Verdict.OK if passed else Verdict.FAILURE
    return CheckResult(check=check, verdict=verdict, detail=detail)


# ---------------------------------------------------------------- start and spread


def _check_start(paths: FloatArray, anchor: float, surroundings: Surroundings) -> CheckResult:
    off = float(np.abs(np.log(paths[:, 0] / anchor)).mean()) * 1e4
    limit = START_LIMIT * expected_at_start(surroundings) + START_SLACK_BPS
    return _passed_if(
        off <= limit,
        "start price",
        f"paths start {off:.2f} bp from the last known price {anchor:g} on average; the market "
        f"may move {limit:.2f} bp until then",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Miss:
    """One interval's spread (mean |change|, bps) beside its yardstick."""

    spread_bps: float
    yardstick: Yardstick

    @property
    def is_closed(self) -> bool:
        """True where the market does not move, or was never seen."""
        return self.yardstick.expected_bps < CLOSED_BPS

    @property
    def log(self) -> float:
        """Log of the spread over the yardstick."""
        return float(np.log(max(self.spread_bps, 1e-9) / self.yardstick.expected_bps))


def _misses(
    forecast: Forecast, surroundings: Surroundings, competition: Competition
) -> tuple[_Miss, ...]:
    misses = []
    for interval in competition.intervals:
        yardstick = measure(surroundings, interval, forecast.request)
        change = forecast.paths[:, yardstick.end] / forecast.paths[:, yardstick.begin] - 1
        spread = 1e4 * float(np.abs(change).mean()) if change.size else 0.0
        misses.append(_Miss(spread_bps=spread, yardstick=yardstick))
    return tuple(misses)


def _check_interval(miss: _Miss) -> CheckResult:
    yardstick = miss.yardstick
    check = f"spread {yardstick.interval}"
    if miss.is_closed:
        detail = "the market is closed or unknown at this time of week: nothing to compare with"
        return CheckResult(check=check, verdict=Verdict.OK, detail=detail)
    slack = ERRORS_ALLOWED * yardstick.error
    return CheckResult(
        check=check,
        verdict=_outside(abs(miss.log), SINGLE_WARNING + slack, SINGLE_FAILURE + slack),
        detail=f"mean |change| {miss.spread_bps:.2f} bp, lately {yardstick.expected_bps:.2f} bp on "
        f"{yardstick.days:.0f} like days: × {np.exp(miss.log):.2f}, "
        f"{_bounds(SINGLE_WARNING + slack, SINGLE_FAILURE + slack)}",
    )


def _overall(misses: Sequence[_Miss]) -> tuple[float, float] | None:
    """Log miss over all open intervals and its standard error.

    Precise intervals weigh most; errors are taken to be fully correlated. Being
    correlated, many vague intervals must not outvote the precise ones: hence
    the fourth power.
    """
    seen = [miss for miss in misses if not miss.is_closed]
    if not seen:
        return None
    errors = np.array([miss.yardstick.error for miss in seen])
    weight = errors**-4 / (errors**-4).sum()
    return float(weight @ np.array([miss.log for miss in seen])), float(weight @ errors)


def _check_overall(misses: Sequence[_Miss]) -> CheckResult:
    check, overall = "spread overall", _overall(misses)
    if overall is None:
        return CheckResult(check=check, verdict=Verdict.OK, detail="the market is closed")
    miss, slack = overall[0], ERRORS_ALLOWED * overall[1]
    return CheckResult(
        check=check,
        verdict=_outside(abs(miss), OVERALL_WARNING + slack, OVERALL_FAILURE + slack),
        detail=f"× {np.exp(miss):.2f} of what the market lately moved in like moments, "
        f"{_bounds(OVERALL_WARNING + slack, OVERALL_FAILURE + slack)}",
    )


def _bounds(warning: float, failure: float) -> str:
    """Both bounds of a logarithm, in words: which one was crossed must be seen."""
    return (
        f"a warning beyond × {np.exp(warning):.2f}, a failure beyond × {np.exp(failure):.2f}, "
        "up or down"
    )


def _outside(value: float, warning: float, failure: float) -> Verdict:
    if value > failure:
        return Verdict.FAILURE
    return Verdict.WARNING if value > warning else Verdict.OK


# ---------------------------------------------------------------- steps


def _check_steps(log_paths: FloatArray) -> Iterator[CheckResult]:
    """Tails, dispersion and growth from the log prices; shape (n_paths, n_points)."""
    steps = np.diff(log_paths, axis=1)
    steps -= steps.mean(axis=0)
    scale = np.abs(steps).mean(axis=0)
    size = np.abs(steps[:, scale > 0] / scale[scale > 0])
    middle, far = np.quantile(size, (0.5, 0.99))
    yield _within(
        float(far / max(middle, 1e-12)),
        "tails",
        "the 99 % step is {:.1f} times the median one (normal 3.8)",
        TAIL_WARNING,
        TAIL_FAILURE,
    )
    yield _within(
        _dispersion(size),
        "volatility dispersion",
        "volatility differs between paths by {:.2f} (standard deviation of the log)",
        DISPERSION_WARNING,
        DISPERSION_FAILURE,
    )
    yield _within(
        _growth(log_paths, steps),
        "growth",
        "the spread grows {:.2f} times as fast as a random walk's",
        GROWTH_WARNING,
        GROWTH_FAILURE,
    )


def _dispersion(size: FloatArray) -> float:
    """Standard deviation of the paths' mean |step|, relative, sampling noise removed."""
    level = size.mean(axis=1)
    noise = float(size.var(axis=1, ddof=1).mean()) / size.shape[1]
    return float(np.sqrt(max(float(level.var(ddof=1)) - noise, 0.0)) / level.mean())


def _growth(log_paths: FloatArray, steps: FloatArray) -> float:
    """Spread over a quarter, a half and the whole against a random walk's; the worst."""
    variance = np.cumsum(steps.var(axis=0))
    last = len(variance)
    ratios = [
        float(np.std(log_paths[:, k] - log_paths[:, 0]) / np.sqrt(variance[k - 1]))
        for k in (last // 4, last // 2, last)
        if k > 0
    ]
    return max(ratios, key=lambda ratio: abs(np.log(max(ratio, 1e-9))))


def _within(
    value: float,
    check: str,
    sentence: str,
    warning: tuple[float, float],
    failure: tuple[float, float],
) -> CheckResult:
    if not failure[0] <= value <= failure[1]:
        verdict = Verdict.FAILURE
    elif not warning[0] <= value <= warning[1]:
        verdict = Verdict.WARNING
    else:
        verdict = Verdict.OK
    bounds = (
        f"a warning outside {warning[0]:g} to {warning[1]:g}, a failure outside {failure[0]:g} to "
        f"{failure[1]:g}"
    )
    return CheckResult(check=check, verdict=verdict, detail=f"{sentence.format(value)}, {bounds}")
