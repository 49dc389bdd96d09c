"""The sanity checks pass honest forecasts and catch broken ones."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from bar_cleaning import bars_from_minutes
from config import Frequency, asset_spec
from data_fetcher import ArchiveSource
from domain import Bars, Diagnostics, Forecast, ForecastRequest, MarketHistory
from path_checks import CheckResult, Verdict, check_forecast, check_level, spread_miss
from protocol import competition_like, protocol_profile
from realised_spread import measure, survey
from simulated_market import simulate_bars
from wire_format import round_prices

END_TS = 1_763_942_400  # Monday 2025-11-24 00:00 UTC
PROMPTS = {Frequency.HF: (60, 3600), Frequency.LF: (300, 86_400)}


@cache
def minutes(asset: str) -> Bars:
    return simulate_bars(asset, end_ts=END_TS, days=40, seed=5)


def history(asset: str = "BTC", frequency: Frequency = Frequency.LF, now: int = END_TS):
    bars = minutes(asset)
    return MarketHistory(
        asset=asset,
        frequency=frequency,
        bars=bars if frequency is Frequency.HF else bars_from_minutes(bars, bar_s=300),
        price_bars=bars,
        source="simulated",
    ).known_at(now)


def next_prompt(past: MarketHistory) -> ForecastRequest:
    increment_s, length_s = PROMPTS[past.frequency]
    start_ts = past.anchor_ts - past.anchor_ts % 60 + 60
    return ForecastRequest(
        asset=past.asset,
        start_ts=start_ts,
        increment_s=increment_s,
        length_s=length_s,
        num_paths=1000,
    )


def competition(asset: str, frequency: Frequency):
    return competition_like(protocol_profile("2026-09"), asset, frequency)


def honest_paths(past: MarketHistory, *, seed: int = 1, factor: float = 1.0) -> np.ndarray:
    """A random walk with the clock and the level of the last weeks, and its own volatility
    per path; shape (1000, n_points)."""
    request = next_prompt(past)
    around = survey(request, past, asset_spec(past.asset).hours)
    finest = measure(around, competition(past.asset, past.frequency).intervals[0], request)
    rng = np.random.default_rng(seed)
    clock = np.sqrt(np.diff(around.variance_time[0]))
    scale = finest.expected_bps / 1e4 * clock / clock.mean() if finest.days else 1e-4 * clock
    steps = rng.standard_t(8, (1000, len(clock)))
    steps *= np.exp(0.25 * rng.standard_normal((1000, 1))) / np.abs(steps).mean()
    log_paths = np.cumsum(factor * steps * scale / np.exp(0.25**2 / 2), axis=1)
    return np.asarray(past.anchor_price * np.exp(np.pad(log_paths, ((0, 0), (1, 0)))))


def forecast(past: MarketHistory, paths: np.ndarray) -> Forecast:
    diagnostics = Diagnostics(
        rung="lightgbm",
        frequency=past.frequency,
        anchor_price=past.anchor_price,
        anchor_ts=past.anchor_ts,
        price_age_s=0,
        model_id=None,
        trained_until=None,
        models_saw_later_bars=False,
    )
    return Forecast(request=next_prompt(past), paths=paths, diagnostics=diagnostics)


def judge(past: MarketHistory, paths: np.ndarray, **changes) -> dict[str, CheckResult]:
    entry = forecast(past, paths)
    given = {"timestamps": entry.request.grid_ts, "answer_paths": paths} | changes
    if np.isfinite(paths).all() and (paths > 0).all() and "answer_paths" not in changes:
        given["answer_paths"] = round_prices(paths)
    results = check_forecast(entry, past, competition(past.asset, past.frequency), **given)
    return {result.check: result for result in results}


def level(asset: str, frequency: Frequency, factor: float) -> CheckResult:
    """What is said about honest forecasts of eight moments, all too wide by a factor."""
    misses = []
    for number in range(8):
        past = history(asset, frequency, END_TS - number * 43 * 3600)
        entry = forecast(past, honest_paths(past, seed=number, factor=factor))
        misses.append(spread_miss(entry, past, competition(asset, frequency)))
    return check_level([miss for miss in misses if miss is not None])


def failures(results: dict[str, CheckResult]) -> set[str]:
    return {name for name, result in results.items() if result.verdict is Verdict.FAILURE}


# ---------------------------------------------------------------- honest forecasts


@pytest.mark.parametrize("frequency", Frequency)
@pytest.mark.parametrize("asset", ["BTC", "XAU"])
def test_an_honest_forecast_has_no_fault(asset, frequency):
    past = history(asset, frequency)
    results = judge(past, honest_paths(past))
    assert failures(results) == set()
    intervals = competition(asset, frequency).intervals
    assert {f"spread {interval.name}" for interval in intervals} < set(results)


@pytest.mark.parametrize("hour", [3, 13, 22])
@pytest.mark.parametrize("frequency", Frequency)
def test_an_honest_forecast_has_no_fault_at_other_times_of_day(frequency, hour):
    past = history("BTC", frequency, END_TS - 3 * 86_400 + hour * 3600)
    assert failures(judge(past, honest_paths(past))) == set()


def test_every_detail_is_one_sentence():
    past = history()
    for result in judge(past, honest_paths(past)).values():
        assert "\n" not in result.detail


@pytest.mark.parametrize("factor", [1.0, 1.35])
def test_a_spread_is_told_with_the_bound_that_it_crossed(factor):
    past = history()
    told = re.compile(r"× ([\d.]+).* warning beyond × ([\d.]+), a failure beyond × ([\d.]+), up or")
    judged = [
        (result, tuple(map(float, match.groups())))
        for result in (
            *judge(past, honest_paths(past, factor=factor)).values(),
            level("BTC", Frequency.LF, factor**0.5),
        )
        if (match := told.search(result.detail))
    ]
    assert len(judged) == 6  # four intervals, overall, several moments
    for result, (factor_found, warning, failure) in judged:
        off = max(factor_found, 1 / factor_found)
        bounds = {Verdict.OK: (0, warning), Verdict.WARNING: (warning, failure)}
        low, high = bounds.get(result.verdict, (failure, np.inf))
        assert low - 0.01 <= off <= high + 0.01, result


def test_a_shape_of_steps_is_told_with_both_bounds():
    past = history()
    detail = judge(past, honest_paths(past))["growth"].detail
    assert detail.endswith(", a warning outside 0.8 to 1.25, a failure outside 0.6 to 1.6")


def test_a_closed_market_is_no_failure():
    saturday = END_TS - 2 * 86_400 + 12 * 3600
    past = history("XAU", Frequency.HF, saturday)
    request = next_prompt(past)
    quiet = np.random.default_rng(1).normal(0, 1e-5, (1000, request.n_points - 1))
    quiet *= np.exp(0.2 * np.random.default_rng(2).standard_normal((1000, 1)))
    paths = past.anchor_price * np.exp(np.pad(np.cumsum(quiet, axis=1), ((0, 0), (1, 0))))
    results = judge(past, paths)
    assert failures(results) == set()
    assert "closed" in results["spread 1min"].detail


def test_three_days_of_history_are_too_little_to_accuse_anybody():
    past = history("BTC", Frequency.HF)
    short = replace(
        past,
        bars=past.bars.between(END_TS - 3 * 86_400, None),
        price_bars=past.price_bars.between(END_TS - 3 * 86_400, None),
    )
    assert failures(judge(short, honest_paths(past))) == set()


# ---------------------------------------------------------------- broken on purpose


@pytest.mark.parametrize("frequency", Frequency)
@pytest.mark.parametrize("asset", ["BTC", "XAU"])
def test_a_spread_that_is_always_off_by_the_root_of_two_fails(asset, frequency):
    verdicts = [level(asset, frequency, factor).verdict for factor in (2**-0.5, 1.0, 2**0.5)]
    assert verdicts == [Verdict.FAILURE, Verdict.OK, Verdict.FAILURE]


@pytest.mark.parametrize("frequency", Frequency)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_spread_that_is_off_by_two_fails_at_once(frequency, factor):
    past = history("BTC", frequency)
    assert "spread overall" in failures(judge(past, honest_paths(past, factor=factor)))


def test_too_few_open_moments_are_not_judged():
    assert check_level([1.0, 1.0]).verdict is Verdict.OK
    assert check_level([0.15] * 8).verdict is Verdict.WARNING


@pytest.mark.parametrize("frequency", Frequency)
def test_constant_paths_fail(frequency):
    past = history("BTC", frequency)
    paths = np.full((1000, next_prompt(past).n_points), past.anchor_price)
    assert failures(judge(past, paths)) == {"moving", "distinct"}


@pytest.mark.parametrize("frequency", Frequency)
def test_white_noise_around_the_centre_fails(frequency):
    past = history("BTC", frequency)
    walk = np.log(honest_paths(past))
    noise = walk.copy()
    noise[:, 1:] = walk[:, :1] + np.diff(walk, axis=1)  # each step starts from the centre again
    assert "growth" in failures(judge(past, np.exp(noise)))


def test_paths_that_share_one_volatility_fail():
    past = history()
    steps = np.abs(np.diff(np.log(honest_paths(past)), axis=1)).mean(axis=0)
    normal = np.random.default_rng(3).standard_normal((1000, len(steps))) * steps * 1.2533
    paths = past.anchor_price * np.exp(np.pad(np.cumsum(normal, axis=1), ((0, 0), (1, 0))))
    assert failures(judge(past, paths)) == {"volatility dispersion"}


def test_steps_of_one_size_fail():
    past = history()
    steps = np.diff(np.log(honest_paths(past)), axis=1)
    sized = np.sign(steps) * np.abs(steps).mean(axis=0)
    sized *= np.exp(0.2 * np.random.default_rng(3).standard_normal((1000, 1)))
    paths = past.anchor_price * np.exp(np.pad(np.cumsum(sized, axis=1), ((0, 0), (1, 0))))
    assert "tails" in failures(judge(past, paths))


@pytest.mark.parametrize("price", [np.nan, np.inf, 0.0, -1.0])
def test_a_price_that_is_none_fails(price):
    past = history()
    paths = honest_paths(past)
    paths[7, 11] = price
    assert {"prices", "digits"} <= failures(judge(past, paths))


def test_an_unsorted_time_axis_fails():
    past = history()
    grid = next_prompt(past).grid_ts.copy()
    grid[[3, 4]] = grid[[4, 3]]
    assert failures(judge(past, honest_paths(past), timestamps=grid)) == {"time axis"}


def test_a_time_axis_that_starts_late_fails():
    past = history()
    grid = next_prompt(past).grid_ts + 60
    assert failures(judge(past, honest_paths(past), timestamps=grid)) == {"time axis"}


@pytest.mark.parametrize("cut", [np.s_[:999], np.s_[:, :-1], np.s_[0]])
def test_a_wrong_shape_fails(cut):
    past = history()
    assert {"shape", "digits"} <= failures(judge(past, honest_paths(past)[cut]))


def test_prices_with_too_many_digits_fail():
    past = history()
    paths = honest_paths(past)
    assert failures(judge(past, paths, answer_paths=paths)) == {"digits"}


def test_a_start_far_from_the_last_known_price_fails():
    past = history()
    assert failures(judge(past, honest_paths(past) * 1.02)) == {"start price"}


def test_copied_paths_fail():
    past = history()
    paths = honest_paths(past)
    paths[500:] = paths[:500]
    assert failures(judge(past, paths)) == {"distinct"}


# ---------------------------------------------------------------- the yardstick on real bars


def realised_against_expected(past: MarketHistory, start: int) -> float:
    """Log of what the finest interval moved after `start` over what was expected of it."""
    known = past.known_at(start)
    request = next_prompt(known)
    around = survey(request, known, asset_spec(past.asset).hours)
    finest = measure(around, competition(past.asset, past.frequency).intervals[0], request)
    after = past.price_bars.between(start, start + request.length_s)
    stride = max(request.increment_s // past.price_bars.bar_s, 1)
    moved = 1e4 * np.abs(np.diff(np.log(after.close[::stride]))).mean()
    return float(np.log(moved / finest.expected_bps))


@pytest.mark.parametrize(
    ("asset", "frequency", "tolerance"),
    [("BTC", Frequency.HF, 0.30), ("ETH", Frequency.HF, 0.30), ("ETH", Frequency.LF, 0.22)],
)
def test_the_market_moves_as_the_yardstick_says(real_bars, asset, frequency, tolerance):
    past = ArchiveSource(real_bars / "recent").load(asset, frequency).history
    starts = past.bars.end_ts - 86_400 * np.arange(2, 42) - 3600 * np.arange(40)
    misses = [realised_against_expected(past, int(start)) for start in starts]
    # One moment scatters by `tolerance` (that is the market); the mean must not.
    assert abs(np.mean(misses)) < 3 * tolerance / np.sqrt(len(misses))
    assert np.std(misses) < 1.5 * tolerance
