"""Features know the past alone, and the same past gives the same bytes."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import features
from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, MarketHours
from domain import Bars
from features import (
    EWMA_PRIOR_WEIGHT,
    LOG_FLOOR,
    MEMORY_DAYS,
    QUANTUM,
    EwmaState,
    FeatureFrame,
    ReturnGrid,
    Standardiser,
    bucket_edges,
    bucket_targets,
    feature_frame,
    feature_names,
    fit_standardiser,
    initial_state,
    mean_size,
    move_sizes,
    return_grid,
    trace_ewma,
    window_sums,
)
from seasonality import SeasonalProfile, flat_profile, new_york_seconds
from state_store import StateStore

START = 1_761_523_200  # Monday 2025-10-27 00:00 UTC: the clocks change within the week
SPECS = [pytest.param(spec, id=name.value) for name, spec in FREQUENCIES.items()]
HF, LF = FREQUENCIES[Frequency.HF], FREQUENCIES[Frequency.LF]


def bars_at(open_ts: np.ndarray, bar_s: int, seed: int = 0, bps: float = 5.0) -> Bars:
    """A random walk with fat tails whose steps belong to the grid, so gaps jump further."""
    rng = np.random.default_rng(seed)
    n = int((open_ts[-1] - open_ts[0]) // bar_s) + 1
    walk = np.cumsum(bps * rng.standard_t(4, n))
    close = 100 * np.exp(walk[(open_ts - open_ts[0]) // bar_s] / 1e4)
    absent = np.full(len(open_ts), np.nan)
    return Bars(
        open_ts=open_ts, open=absent, high=absent, low=absent, close=close, volume=absent,
        bar_s=bar_s, feed="test",
    )  # fmt: skip


def full_grid(days: float, bar_s: int) -> np.ndarray:
    return START + bar_s * np.arange(int(days * DAY_S / bar_s), dtype=np.int64)


def with_gaps(open_ts: np.ndarray, gaps: list[tuple[float, float]], missing: float, seed: int):
    """Leave out stretches (begin and length as shares of all) and single bars at random."""
    n = len(open_ts)
    keep = np.random.default_rng(seed).random(n) >= missing
    for begin, length in gaps:
        keep[int(begin * n) : int((begin + length) * n)] = False
    keep[0] = True
    return open_ts[keep]


GAPS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.3)), max_size=4)


def wavy_profile(bar_s: int, hours: MarketHours = MarketHours.EQUITY) -> SeasonalProfile:
    rng = np.random.default_rng(1)
    return replace(
        flat_profile(bar_s, hours),
        base=rng.uniform(0.1, 2.5, (2, DAY_S // bar_s)),
        weekly=rng.uniform(0.8, 1.2, (7, 8)),
    )


def standardiser_for(spec: FrequencySpec) -> Standardiser:
    return Standardiser(profile=wavy_profile(spec.bar_s), unit_bps=4.0, cap=9.0)


# Comparing inside a function keeps a failure from printing megabytes of bytes.
def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def same_frame(left: FeatureFrame, right: FeatureFrame) -> bool:
    return all(
        same_bytes(getattr(left, name), getattr(right, name))
        for name in ("shared", "by_bucket", "level", "end_ts")
    )


# ---------------------------------------------------------------- the grid of returns


def test_a_gap_stays_a_gap_and_its_move_counts_for_all_bars_it_covers():
    close = np.array([100.0, 101, 103, 102])
    bars = replace(bars_at(START + 300 * np.array([0, 1, 4, 5]), 300), close=close)
    grid = return_grid(bars)
    assert grid.open_ts.tolist() == (START + 300 * np.arange(6)).tolist()
    assert grid.span.tolist() == [0, 1, 0, 0, 3, 1]
    assert np.isnan(grid.returns).tolist() == [True, False, True, True, False, False]
    known = 1e4 * np.log([101 / 100, 103 / 101, 102 / 103])
    np.testing.assert_allclose(grid.returns[[1, 4, 5]], known, rtol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
@given(gaps=GAPS, missing=st.floats(0, 0.6), start=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_the_grid_from_any_start_is_the_tail_of_the_full_grid(spec, gaps, missing, start, seed):
    open_ts = with_gaps(full_grid(0.7, spec.bar_s), gaps, missing, seed)
    bars = bars_at(open_ts, spec.bar_s, seed)
    full = return_grid(bars)
    cut = int(start * len(full))
    tail = return_grid(bars, START + cut * spec.bar_s)
    for name in ("open_ts", "returns", "span"):
        assert same_bytes(getattr(tail, name), getattr(full, name)[cut:])


def test_a_grid_that_starts_before_the_first_bar_begins_with_a_gap():
    bars = bars_at(full_grid(0.1, 300), 300)
    grid = return_grid(bars, START - 3 * 300)
    assert grid.span[:5].tolist() == [0, 0, 0, 0, 1]
    assert same_bytes(grid.returns[4:], return_grid(bars).returns[1:])


def test_a_grid_that_starts_after_the_last_bar_is_empty_and_changes_no_state():
    grid = return_grid(bars_at(full_grid(0.1, 300), 300), START + DAY_S)
    z = standardiser_for(LF).apply(grid)
    assert len(grid) == len(z) == 0
    before = trace_ewma(LF, np.ones(5), initial_state(LF, START)).state
    after = trace_ewma(LF, z, before).state
    assert after.end_ts == before.end_ts
    assert same_bytes(after.sums, before.sums)


def test_a_move_over_a_gap_is_spread_over_the_bars_it_covers():
    grid = ReturnGrid(
        open_ts=START + 300 * np.arange(8, dtype=np.int64),
        returns=np.array([np.nan, -2, np.nan, np.nan, np.nan, 6, 1, np.nan]),
        span=np.array([0, 1, 0, 0, 0, 4, 1, 0]),
        bar_s=300,
    )
    np.testing.assert_array_equal(move_sizes(grid), [2, 2, 3, 3, 3, 3, 1, np.nan])


# ---------------------------------------------------------------- standardised returns


@given(gaps=GAPS, missing=st.floats(0, 0.5), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_standardised_returns_divide_by_the_clock_of_every_bar_they_cover(gaps, missing, seed):
    bars = bars_at(with_gaps(full_grid(2, 300), gaps, missing, seed), 300, seed)
    standardiser, grid = standardiser_for(LF), return_grid(bars)
    got = standardiser.apply(grid)
    variance = standardiser.profile.at(grid.open_ts) ** 2
    expected = np.full(len(grid), np.nan)
    for i in np.flatnonzero(grid.span):
        covered = variance[i + 1 - grid.span[i] : i + 1].sum()
        expected[i] = grid.returns[i] / (4.0 * np.sqrt(covered))
    np.testing.assert_allclose(got, np.clip(expected, -9, 9), rtol=1e-7)


def test_a_gap_that_began_before_the_grid_is_divided_by_its_full_length():
    open_ts = np.delete(full_grid(2, 300), slice(100, 400))
    bars, standardiser = bars_at(open_ts, 300), standardiser_for(LF)
    full = standardiser.apply(return_grid(bars))
    tail = standardiser.apply(return_grid(bars, START + 250 * 300))
    assert same_bytes(tail, full[250:])
    assert np.isfinite(tail[150])


def test_fitting_makes_the_mean_size_one_below_the_cap():
    grid = return_grid(bars_at(full_grid(20, 300), 300, seed=3))
    fitted = fit_standardiser(grid, wavy_profile(300))
    z = fitted.apply(grid)
    known = np.isfinite(z)
    assert np.abs(z[known]).mean() == pytest.approx(1, rel=1e-9)
    assert np.mean(np.abs(z[known]) >= fitted.cap * (1 - 1e-12)) == pytest.approx(5e-4, rel=0.2)


def test_a_standardiser_survives_json():
    standardiser = standardiser_for(HF)
    again = Standardiser.from_dict(standardiser.to_dict())
    assert (again.unit_bps, again.cap) == (4.0, 9.0)
    grid = return_grid(bars_at(full_grid(1, 60), 60))
    np.testing.assert_allclose(again.apply(grid), standardiser.apply(grid), rtol=1e-3)


# ---------------------------------------------------------------- recursive averages


def slow_means(spec: FrequencySpec, z: np.ndarray) -> np.ndarray:
    """Every average after every bar, by weights of clock time; (channels, half-lives, n)."""
    known = np.isfinite(z)
    value = z[known]
    size = np.abs(value)
    channels = [size, size**2, np.log(size + LOG_FLOOR), value, np.maximum(value, 0)]
    at = np.flatnonzero(known)
    means = np.empty((5, len(spec.ewma_half_lives), len(z)))
    for bar in range(len(z)):
        past = at <= bar
        slower = np.array([1.0, 2.0, -0.4, 0.0, 0.5])
        for h in reversed(range(len(spec.ewma_half_lives))):
            weight = 0.5 ** ((bar - at[past]) / spec.ewma_half_lives[h])
            total = np.array([np.sum(weight * channel[past]) for channel in channels])
            prior = EWMA_PRIOR_WEIGHT
            slower = (total + prior * slower) / (weight.sum() + prior)
            means[:, h, bar] = slower
    return means


@pytest.mark.parametrize("spec", SPECS)
@given(gaps=GAPS, missing=st.floats(0, 0.6), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_averages_decay_by_clock_time_also_over_gaps(spec, gaps, missing, seed):
    open_ts = with_gaps(full_grid(80 * spec.bar_s / DAY_S, spec.bar_s), gaps, missing, seed)
    z = standardiser_for(spec).apply(return_grid(bars_at(open_ts, spec.bar_s, seed)))
    got = trace_ewma(spec, z, initial_state(spec, START)).means
    np.testing.assert_allclose(got, slow_means(spec, z), rtol=1e-9, atol=1e-12)


def stored_and_loaded(state: EwmaState, folder: Path) -> EwmaState:
    store = StateStore(folder)
    document = {"end_ts": state.end_ts, "sums": state.sums, "weights": state.weights}
    store.save("ewma", "BTC", 1, document)
    loaded = StateStore(folder).load("ewma", "BTC", 1)
    assert loaded is not None
    return EwmaState(**loaded)


@pytest.mark.parametrize("spec", SPECS)
def test_bar_by_bar_saved_and_loaded_halfway_gives_the_bytes_of_one_pass(spec, tmp_path):
    open_ts = with_gaps(full_grid(300 * spec.bar_s / DAY_S, spec.bar_s), [(0.4, 0.1)], 0.1, 7)
    grid = return_grid(bars_at(open_ts, spec.bar_s, 7))
    z = standardiser_for(spec).apply(grid)
    whole = trace_ewma(spec, z, initial_state(spec, START))
    state, means = initial_state(spec, START), []
    for bar in range(len(z)):
        if bar in (1, len(z) // 2):
            state = stored_and_loaded(state, tmp_path)
        step = trace_ewma(spec, z[bar : bar + 1], state)
        state = step.state
        means.append(step.means)
    assert same_bytes(np.concatenate(means, axis=2), whole.means)
    assert state.end_ts == whole.state.end_ts == grid.open_ts[-1] + spec.bar_s
    assert same_bytes(state.sums, whole.state.sums)
    assert same_bytes(state.weights, whole.state.weights)


@given(cuts=st.lists(st.integers(0, 400), max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_any_division_into_parts_leaves_the_same_state(cuts, seed):
    rng = np.random.default_rng(seed)
    z = np.where(rng.random(400) < 0.2, np.nan, rng.standard_t(4, 400))
    whole = trace_ewma(LF, z, initial_state(LF, START)).state
    state = initial_state(LF, START)
    for part in np.split(z, sorted(cuts)):
        state = trace_ewma(LF, part, state).state
    assert state.end_ts == whole.end_ts
    assert same_bytes(state.sums, whole.sums)
    assert same_bytes(state.weights, whole.weights)


# ---------------------------------------------------------------- windows and targets


def slow_mean_size(z: np.ndarray, begin: int, end: int, default: float) -> float:
    inside = [abs(v) for j, v in enumerate(z) if begin <= j < end and np.isfinite(v)]
    return float(np.mean(inside)) if inside else default


@given(
    n=st.integers(1, 40),
    missing=st.floats(0, 1),
    seed=st.integers(0, 999),
    begin=st.integers(-20, 60),
    width=st.integers(0, 50),
)
@settings(max_examples=150)
def test_window_means_equal_a_plain_loop(n, missing, seed, begin, width):
    rng = np.random.default_rng(seed)
    z = np.where(rng.random(n) < missing, np.nan, 3 * rng.standard_t(3, n))
    got = mean_size(window_sums(z), np.array([begin]), np.array([begin + width]), -7.0)
    assert got[0] == pytest.approx(slow_mean_size(z, begin, begin + width, -7.0), abs=QUANTUM)


def test_window_means_are_exact_wherever_the_history_starts():
    z = np.random.default_rng(2).standard_t(3, 20_000)
    begin = np.arange(15_000, 19_000, 7)
    whole = mean_size(window_sums(z), begin, begin + 300, np.nan)
    part = mean_size(window_sums(z[14_000:]), begin - 14_000, begin - 13_700, np.nan)
    assert same_bytes(whole, part)


@pytest.mark.parametrize("spec", SPECS)
@given(missing=st.floats(0, 1), seed=st.integers(0, 999), n=st.integers(2, 400))
@settings(max_examples=20)
def test_targets_are_what_followed_and_unknown_unless_half_of_it_is_there(spec, missing, seed, n):
    rng = np.random.default_rng(seed)
    z = np.where(rng.random(n) < missing, np.nan, rng.standard_t(3, n))
    rows = np.unique(rng.integers(0, n, 12))
    for bucket, (begin, end) in enumerate(bucket_edges(spec)):
        got = bucket_targets(spec, window_sums(z), rows, bucket)
        for row, value in zip(rows, got, strict=True):
            future = z[row + 1 + begin : row + 1 + end]
            half_known = 2 * np.isfinite(future).sum() >= end - begin
            if row + end < n and half_known:
                assert value == pytest.approx(np.nanmean(np.abs(future)), abs=2 * QUANTUM)
            else:
                assert np.isnan(value)


@pytest.mark.parametrize("spec", SPECS)
def test_buckets_follow_each_other_without_a_gap(spec):
    edges = bucket_edges(spec)
    assert edges[0][0] == 0
    assert edges[-1][1] == spec.horizon_bars
    assert all(left[1] == right[0] for left, right in pairwise(edges))


# ---------------------------------------------------------------- rows


def rows_from_memory(
    spec: FrequencySpec, standardiser: Standardiser, bars: Bars, rows: np.ndarray, begin: int
) -> FeatureFrame:
    """Rows (bars since START) computed from bars and a stored state of bar `begin` alone."""
    early = return_grid(bars).part(0, begin)
    before = trace_ewma(spec, standardiser.apply(early), initial_state(spec, START)).state
    with TemporaryDirectory() as folder:
        state = stored_and_loaded(before, Path(folder))
    # The bar before the memory gives the first return its start, however long ago.
    first = max(int(np.searchsorted(bars.open_ts, state.end_ts)) - 1, 0)
    kept = bars.between(int(bars.open_ts[first]), None)
    grid = return_grid(kept, state.end_ts)
    return feature_frame(spec, standardiser, grid, state, rows - begin)


@pytest.mark.parametrize("spec", SPECS)
@given(gaps=GAPS, missing=st.sampled_from([0.0, 0.02, 0.5]), seed=st.integers(0, 999))
@settings(max_examples=12)
def test_rows_from_memory_and_state_have_the_bytes_of_rows_from_all_history(
    spec, gaps, missing, seed
):
    open_ts = with_gaps(full_grid(MEMORY_DAYS + 3, spec.bar_s), gaps, missing, seed)
    bars, standardiser = bars_at(open_ts, spec.bar_s, seed), standardiser_for(spec)
    grid = return_grid(bars)
    memory = MEMORY_DAYS * spec.bars_per_day
    begin = max(len(grid) - memory - 40, 0)
    rows = np.arange(begin + memory, len(grid)) if begin else np.array([len(grid) - 1])
    full = feature_frame(spec, standardiser, grid, initial_state(spec, START), rows)
    assert same_frame(rows_from_memory(spec, standardiser, bars, rows, begin), full)


@pytest.mark.parametrize("spec", SPECS)
def test_how_many_bars_are_worked_on_together_changes_no_byte(spec, monkeypatch):
    grid = return_grid(bars_at(full_grid(3, spec.bar_s), spec.bar_s, 5))
    standardiser, state = standardiser_for(spec), initial_state(spec, START)
    rows = np.union1d(np.arange(0, len(grid), 7), np.arange(300, 420))
    at_once = feature_frame(spec, standardiser, grid, state, rows)
    monkeypatch.setattr(features, "CHUNK_BARS", 100)
    assert same_frame(feature_frame(spec, standardiser, grid, state, rows), at_once)


@pytest.mark.parametrize("spec", SPECS)
def test_the_bytes_of_a_row_do_not_depend_on_its_neighbours(spec):
    grid = return_grid(bars_at(full_grid(3, spec.bar_s), spec.bar_s, 4))
    standardiser, state = standardiser_for(spec), initial_state(spec, START)
    rows = np.arange(len(grid) - 33, len(grid))
    together = feature_frame(spec, standardiser, grid, state, rows)
    for at in (0, 7, 32):
        alone = feature_frame(spec, standardiser, grid, state, rows[at : at + 1])
        assert same_bytes(alone.shared[0], together.shared[at])
        assert same_bytes(alone.by_bucket[:, 0], together.by_bucket[:, at])


# Its last bucket is longer than the day by which it is shifted back.
LONG = replace(LF, bucket_ends=(*LF.bucket_ends[:-1], 600))


@pytest.mark.parametrize("spec", [*SPECS, pytest.param(LONG, id="long")])
@given(
    row=st.floats(0.05, 1),
    gaps=GAPS,
    seed=st.integers(0, 999),
)
@settings(max_examples=8)
def test_nothing_after_a_row_reaches_it(spec, row, gaps, seed):
    open_ts = with_gaps(full_grid(2.5, spec.bar_s), gaps, 0.05, seed)
    bars, standardiser = bars_at(open_ts, spec.bar_s, seed), standardiser_for(spec)
    grid, state = return_grid(bars), initial_state(spec, START)
    rows = np.arange(0, int(row * len(grid)), 97)
    now = grid.open_ts[rows[-1]]
    wild = np.where(bars.open_ts <= now, bars.close, bars.close * (1 + 0.5 * np.sin(bars.open_ts)))
    corrupted = return_grid(replace(bars, close=wild))
    honest = feature_frame(spec, standardiser, grid, state, rows)
    assert same_frame(feature_frame(spec, standardiser, corrupted, state, rows), honest)
    cut = return_grid(bars.between(None, int(now) + spec.bar_s))
    if len(cut) > rows[-1]:
        assert same_frame(feature_frame(spec, standardiser, cut, state, rows), honest)


@pytest.mark.parametrize("spec", SPECS)
def test_the_last_bar_is_felt_at_once(spec):
    bars = bars_at(full_grid(2, spec.bar_s), spec.bar_s, 5)
    jump = bars.close.copy()
    jump[-1] *= 1.01
    rows, state = np.array([len(bars) - 1]), initial_state(spec, START)
    calm, jumped = (
        feature_frame(spec, standardiser_for(spec), return_grid(part), state, rows)
        for part in (bars, replace(bars, close=jump))
    )
    felt = dict(zip(calm.names, jumped.shared[0] - calm.shared[0], strict=True))
    fastest = f"log_size_{spec.ewma_half_lives[0]:g}"
    assert min(felt[name] for name in (fastest, "log_size_lag_0", "log_max_5")) > 0.1
    assert jumped.level > calm.level


@pytest.mark.parametrize("spec", SPECS)
@given(
    gaps=GAPS,
    missing=st.sampled_from([0.0, 0.3, 0.97]),
    bps=st.sampled_from([0.0, 1e-3, 5.0, 2e3]),
    seed=st.integers(0, 999),
)
@settings(max_examples=15)
def test_features_are_finite_whatever_is_missing_and_however_prices_move(
    spec, gaps, missing, bps, seed
):
    open_ts = with_gaps(full_grid(1.5, spec.bar_s), gaps, missing, seed)
    grid = return_grid(bars_at(open_ts, spec.bar_s, seed, bps))
    rows = np.arange(len(grid))
    frame = feature_frame(spec, standardiser_for(spec), grid, initial_state(spec, START), rows)
    assert np.isfinite(frame.shared).all()
    assert np.isfinite(frame.by_bucket).all()
    assert np.isfinite(frame.level).all()


@pytest.mark.parametrize("spec", SPECS)
def test_a_single_bar_gives_a_finite_row(spec):
    grid = return_grid(bars_at(full_grid(1, spec.bar_s)[:1], spec.bar_s))
    frame = feature_frame(
        spec, standardiser_for(spec), grid, initial_state(spec, START), np.array([0])
    )
    assert np.isfinite(frame.shared).all()
    assert np.isfinite(frame.by_bucket).all()
    assert frame.level == pytest.approx(1)


def test_prices_that_never_move_can_be_standardised():
    grid = return_grid(bars_at(full_grid(1, 300), 300, bps=0.0))
    fitted = fit_standardiser(grid, flat_profile(300, MarketHours.EQUITY))
    assert np.nanmax(np.abs(fitted.apply(grid))) == 0.0
    rows, state = np.arange(len(grid)), initial_state(LF, START)
    frame = feature_frame(LF, fitted, grid, state, rows)
    assert column(frame, "log_size_3").min() == pytest.approx(np.log(1e-3))


@pytest.mark.parametrize("spec", SPECS)
def test_names_belong_to_the_columns_and_are_unique(spec):
    grid = return_grid(bars_at(full_grid(1, spec.bar_s), spec.bar_s))
    state, rows = initial_state(spec, START), np.arange(3)
    frame = feature_frame(spec, standardiser_for(spec), grid, state, rows)
    assert feature_names(spec) == (frame.names, frame.bucket_names)
    assert frame.shared.shape == (3, len(frame.names))
    assert frame.by_bucket.shape == (len(spec.bucket_ends), 3, len(frame.bucket_names))
    assert frame.shared.dtype == frame.by_bucket.dtype == np.float32
    assert len({*frame.names, *frame.bucket_names}) == len(frame.names) + len(frame.bucket_names)
    assert frame.end_ts.tolist() == (START + spec.bar_s * np.arange(1, 4)).tolist()


# ---------------------------------------------------------------- single features, by hand


def column(frame: FeatureFrame, name: str) -> np.ndarray:
    return np.asarray(frame.shared[:, frame.names.index(name)], dtype=float)


@pytest.mark.parametrize("spec", SPECS)
def test_recent_moves_ranges_and_maxima_look_back_exactly_as_far_as_they_say(spec):
    grid = return_grid(bars_at(full_grid(2, spec.bar_s), spec.bar_s, 6))
    standardiser = standardiser_for(spec)
    z = standardiser.apply(grid)
    row = len(grid) - 5
    frame = feature_frame(spec, standardiser, grid, initial_state(spec, START), np.array([row]))
    path = np.nancumsum(z)
    for lag in range(5):
        assert column(frame, f"move_lag_{lag}") == pytest.approx(z[row - lag], rel=1e-6)
    for width in (5, 15, 60):
        largest = np.abs(z[row - width + 1 : row + 1]).max()
        assert column(frame, f"log_max_{width}") == pytest.approx(np.log(largest + LOG_FLOOR), 1e-5)
    for hours in (1, 4, 24):
        width = hours * 3600 // spec.bar_s
        scale = np.abs(z[row - width + 1 : row + 1]).mean() * np.sqrt(width)
        window = path[row - width + 1 : row + 1]
        moved = abs(path[row] - path[row - width])
        assert column(frame, f"efficiency_{hours}h") == pytest.approx(moved / scale, rel=1e-3)
        above = (path[row] - window.min()) / scale
        assert column(frame, f"above_low_{hours}h") == pytest.approx(above, abs=1e-3)
        below = (window.max() - path[row]) / scale
        assert column(frame, f"below_high_{hours}h") == pytest.approx(below, abs=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_bucket_features_look_at_the_same_hours_of_earlier_days(spec):
    grid = return_grid(bars_at(full_grid(8.5, spec.bar_s), spec.bar_s, 8))
    standardiser = standardiser_for(spec)
    z = standardiser.apply(grid)
    row = len(grid) - 9
    frame = feature_frame(spec, standardiser, grid, initial_state(spec, START), np.array([row]))
    slow = column(frame, f"log_size_{spec.ewma_half_lives[-2]:g}")
    for bucket, (begin, end) in enumerate(bucket_edges(spec)):
        widen = max(0, (900 // spec.bar_s - (end - begin)) // 2)
        low, high = row + 1 + begin - widen, row + 1 + end + widen
        logs = []
        for days in (1, 2, 3, 5, 7):
            back = days * spec.bars_per_day
            then = np.abs(z[low - back : min(high - back, row + 1)]).mean()
            logs.append(np.log(then + LOG_FLOOR) - np.log(np.exp(slow) + LOG_FLOOR))
        got = dict(zip(frame.bucket_names, frame.by_bucket[bucket, 0], strict=True))
        assert got["log_size_1d_ago"] == pytest.approx(logs[0][0], abs=1e-4)
        assert got["log_size_7d_ago"] == pytest.approx(logs[-1][0], abs=1e-4)
        assert got["log_size_days_ago"] == pytest.approx(np.mean(logs), abs=1e-4)
        middle = grid.open_ts[row] + spec.bar_s * ((begin + end + 1) // 2)
        factor = standardiser.profile.at(np.array([middle]))
        assert got["log_profile"] == pytest.approx(np.log(factor[0]), abs=1e-4)


def test_the_clock_features_tell_new_york_time_at_the_close_of_the_bar():
    grid = return_grid(bars_at(full_grid(7, 300), 300))
    frame = feature_frame(
        LF, standardiser_for(LF), grid, initial_state(LF, START), np.arange(len(grid))
    )
    local = new_york_seconds(frame.end_ts)
    angle = 2 * np.pi * (local % DAY_S) / DAY_S
    np.testing.assert_allclose(column(frame, "day_sin"), np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(column(frame, "day_cos"), np.cos(angle), atol=1e-6)
    saturday = (local // DAY_S + 3) % 7 == 5
    assert np.all(column(frame, "weekday")[saturday] == 5)
    assert np.all(column(frame, "closed")[saturday] == 1)
    noon_tuesday = frame.end_ts == START + DAY_S + 16 * 3600
    assert column(frame, "closed")[noon_tuesday] == 0
