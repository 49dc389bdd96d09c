"""Rows to learn from: nothing judges what it taught, and leads are drawn evenly."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import DAY_S, FREQUENCIES, Frequency, FrequencySpec, MarketHours
from domain import Bars
from features import bucket_edges, feature_frame, initial_state, return_grid
from training_rows import (
    BURN_IN_DAYS,
    CENTRE_LIMIT,
    FOLDS,
    Market,
    jitter_leads,
    prepare_market,
    recency_weights,
    rolling_splits,
    rows_known_by,
    sample_leads,
    training_rows,
)

SPECS = [pytest.param(spec, id=name.value) for name, spec in FREQUENCIES.items()]
HF, LF = FREQUENCIES[Frequency.HF], FREQUENCIES[Frequency.LF]
START = 1_761_523_200  # Monday 2025-10-27 00:00 UTC
DAYS = {Frequency.HF: 3, Frequency.LF: 9}


# Comparing inside a function keeps a failure from printing megabytes of bytes.
def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def learned_the_same(left: Market, right: Market) -> bool:
    return left.standardiser.to_dict() == right.standardiser.to_dict()


@cache
def some_bars(spec: FrequencySpec) -> Bars:
    """Some days of a random walk with single bars and one night missing."""
    rng = np.random.default_rng(1)
    n = DAYS[spec.frequency] * spec.bars_per_day
    keep = rng.random(n) > 0.05
    keep[n // 2 : n // 2 + n // 20] = False
    keep[0] = True
    close = 100 * np.exp(np.cumsum(5 * rng.standard_t(4, n)) / 1e4)[keep]
    absent = np.full(len(close), np.nan)
    return Bars(
        open_ts=START + spec.bar_s * np.flatnonzero(keep), open=absent, high=absent,
        low=absent, close=close, volume=absent, bar_s=spec.bar_s, feed="test",
    )  # fmt: skip


def market_of(bars: Bars, spec: FrequencySpec, train_end: int, start: int = START) -> Market:
    """The market from `start` on, warmed up by the bars before."""
    warm_up = (
        return_grid(bars.between(None, start)) if start > START else return_grid(bars).part(0, 0)
    )
    grid = return_grid(bars, start)
    return prepare_market(spec, grid, warm_up, MarketHours.CONTINUOUS, train_end)


@cache
def whole_market(spec: FrequencySpec) -> Market:
    bars = some_bars(spec)
    return market_of(bars, spec, int((bars.open_ts[-1] - START) // spec.bar_s) + 1)


def corrupted_from(bars: Bars, ts: int) -> Bars:
    wild = bars.close * np.where(bars.open_ts < ts, 1.0, 1 + 0.3 * np.sin(bars.open_ts))
    return replace(bars, close=wild)


# ---------------------------------------------------------------- splits by time


@given(horizon=st.integers(1, 400), multiple=st.floats(5, 300))
@settings(max_examples=200)
def test_folds_are_ordered_and_disjoint_with_one_horizon_before_each(horizon, multiple):
    n_bars = int(np.ceil(horizon * multiple))
    folds = rolling_splits(n_bars, horizon)
    assert 1 <= len(folds) <= FOLDS
    for fold in folds:
        assert 0 < fold.train_end < fold.begin < fold.end <= n_bars
        assert fold.begin - fold.train_end == horizon
        assert len(folds) == 1 or fold.end - fold.begin >= 2 * horizon
    assert all(earlier.end == later.begin for earlier, later in pairwise(folds))
    assert n_bars - folds[-1].end < FOLDS


def test_a_long_history_is_judged_in_several_folds_over_about_a_quarter():
    folds = rolling_splits(365 * 288, 288)
    assert len(folds) == FOLDS
    judged = sum(fold.end - fold.begin for fold in folds)
    assert judged == pytest.approx(0.24 * 365 * 288, abs=3)


@pytest.mark.parametrize("spec", SPECS)
def test_the_shortest_history_that_is_trained_still_has_rows_to_teach_and_to_judge(spec):
    n_bars = int(spec.minimum_days * spec.bars_per_day)
    for fold in rolling_splits(n_bars, spec.horizon_bars):
        assert fold.train_end > 2 * spec.horizon_bars
        assert fold.end - fold.begin > spec.horizon_bars


# ---------------------------------------------------------------- sampling of leads


@given(
    n_base=st.integers(0, 300), n_leads=st.integers(1, 9), draws=st.integers(1, 12),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_leads_are_drawn_evenly_and_never_twice_for_a_base_time(n_base, n_leads, draws, seed):
    drawn = sample_leads(np.random.default_rng(seed), n_base, n_leads, draws=draws)
    per_row = min(draws, n_leads)
    assert drawn.shape == (n_base, per_row)
    assert all(len(set(row)) == per_row for row in drawn.tolist())
    assert set(drawn.ravel().tolist()) <= set(range(n_leads))
    for begin in range(0, n_base - n_leads + 1, n_leads):
        run = Counter(drawn[begin : begin + n_leads].ravel().tolist())
        assert run == dict.fromkeys(range(n_leads), per_row)


def test_the_number_of_rows_does_not_grow_with_the_number_of_leads():
    sizes = {
        sample_leads(np.random.default_rng(0), 1000, n_leads).size for n_leads in (1, 2, 6, 60)
    }
    assert sizes == {1000}


def test_sampling_is_seeded():
    first, again, other = (sample_leads(np.random.default_rng(s), 500, 6) for s in (1, 1, 2))
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


def test_every_base_time_is_as_likely_to_draw_any_lead():
    drawn = sample_leads(np.random.default_rng(3), 6 * 4000, 6, draws=2).reshape(4000, 6, 2)
    for place in range(6):
        for draw in range(2):
            share = np.bincount(drawn[:, place, draw], minlength=6) / 4000
            np.testing.assert_allclose(share, 1 / 6, atol=5 * np.sqrt(5 / 36 / 4000))


EXPECTED_LEADS = {
    Frequency.HF: [{1}, {2}, {5}, {10, 15}, {20, 25, 30}, {35, 40, 45, 50, 55, 60}],
    Frequency.LF: [{1}, {6}, set(range(12, 37, 6)), set(range(42, 289, 6))],
}


@pytest.mark.parametrize("spec", SPECS)
def test_leads_are_jittered_within_their_bucket_and_on_the_sampling_grid(spec):
    rng = np.random.default_rng(4)
    found = [set(jitter_leads(rng, spec, lead, 2000).tolist()) for lead in range(len(spec.leads_s))]
    assert found == EXPECTED_LEADS[spec.frequency]
    assert [max(leads) * spec.bar_s for leads in found] == list(spec.leads_s)


def test_a_bucket_that_misses_the_sampling_grid_is_drawn_bar_by_bar():
    spec = replace(HF, leads_s=(60, 240, 3600))
    drawn = jitter_leads(np.random.default_rng(5), spec, 1, 500)
    assert set(drawn.tolist()) == {2, 3, 4}


# ---------------------------------------------------------------- weights and rows


@pytest.mark.parametrize("half_life_days", [14.0, 60.0])
def test_rows_weigh_half_as_much_per_half_life(half_life_days):
    now = START + 100 * DAY_S
    age_days = half_life_days * np.array([0.0, 0.5, 1.0, 2.0])
    weights = recency_weights(now - (age_days * DAY_S).astype(np.int64), now, half_life_days)
    np.testing.assert_allclose(weights, [1, np.sqrt(0.5), 0.5, 0.25], rtol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_the_first_bars_teach_nothing_but_never_most_of_a_short_history(spec):
    market = whole_market(spec)
    long = training_rows(market, 100 * spec.bars_per_day)
    assert long[0] == BURN_IN_DAYS * spec.bars_per_day
    short = training_rows(market, 1000)
    assert (short[0], short[-1]) == (150, 999)
    assert np.all(np.diff(short) == 1)


@pytest.mark.parametrize("spec", SPECS)
def test_taking_rows_takes_them_from_every_part(spec):
    frame = whole_market(spec).frame
    rows = np.array([7, 3, 500])
    part = frame.take(rows)
    for name in ("shared", "level", "end_ts"):
        assert same_bytes(getattr(part, name), getattr(frame, name)[rows])
    assert same_bytes(part.by_bucket[2], frame.by_bucket[2][rows])
    assert part.names == frame.names


@pytest.mark.parametrize("spec", SPECS)
def test_no_row_that_teaches_looks_past_the_end_of_training(spec):
    bars, train_end = some_bars(spec), 800
    honest = market_of(bars, spec, train_end)
    corrupted = market_of(corrupted_from(bars, START + train_end * spec.bar_s), spec, train_end)
    rows = training_rows(honest, train_end)
    for bucket, (_, end) in enumerate(bucket_edges(spec)):
        known = rows_known_by(honest, bucket, rows, train_end)
        assert known.max() + end < train_end
        assert known.max() + end > train_end - 10
        assert np.isfinite(honest.targets[bucket, known]).all()
        assert same_bytes(honest.targets[bucket, known], corrupted.targets[bucket, known])
        assert same_bytes(rows_known_by(corrupted, bucket, rows, train_end), known)
        left_out = np.setdiff1d(rows[rows + end < train_end], known)
        assert np.isnan(honest.targets[bucket, left_out]).all()


# ---------------------------------------------------------------- a prepared market


@pytest.mark.parametrize("spec", SPECS)
def test_clock_unit_and_cap_are_learned_from_the_past_alone(spec):
    bars, train_end = some_bars(spec), 700
    honest = market_of(bars, spec, train_end)
    corrupted = market_of(corrupted_from(bars, START + train_end * spec.bar_s), spec, train_end)
    shorter = market_of(bars.between(None, START + 750 * spec.bar_s), spec, train_end)
    for other in (corrupted, shorter):
        assert learned_the_same(other, honest)
        assert same_bytes(other.frame.shared[:train_end], honest.frame.shared[:train_end])
        assert same_bytes(
            other.frame.by_bucket[:, :train_end], honest.frame.by_bucket[:, :train_end]
        )
        assert same_bytes(other.z[:train_end], honest.z[:train_end])
    later = market_of(bars, spec, train_end + 200)
    assert not learned_the_same(later, honest)


@pytest.mark.parametrize("spec", SPECS)
def test_averages_start_from_the_bars_before_the_window(spec):
    bars, begin = some_bars(spec), 400
    start = START + begin * spec.bar_s
    warmed = market_of(bars, spec, 300, start)
    grid = return_grid(bars)
    whole = feature_frame(
        spec, warmed.standardiser, grid, initial_state(spec, START), np.arange(len(grid))
    )
    assert same_bytes(warmed.frame.level, whole.level[begin:])
    assert same_bytes(warmed.frame.end_ts, whole.end_ts[begin:])
    cold = prepare_market(
        spec, return_grid(bars, start), grid.part(0, 0), MarketHours.CONTINUOUS, 300
    )
    assert learned_the_same(cold, warmed)
    assert not same_bytes(cold.frame.level, warmed.frame.level)


@pytest.mark.parametrize("spec", SPECS)
def test_targets_are_the_mean_size_that_followed(spec):
    market = whole_market(spec)
    rng = np.random.default_rng(6)
    for bucket, (begin, end) in enumerate(bucket_edges(spec)):
        for row in rng.integers(0, len(market.grid) - end - 1, 20):
            future = np.abs(market.z[row + 1 + begin : row + 1 + end])
            value = market.targets[bucket, row]
            if 2 * np.isfinite(future).sum() >= len(future):
                assert value == pytest.approx(np.nanmean(future), abs=1e-5)
            else:
                assert np.isnan(value)
    last = len(market.grid) - np.array(spec.bucket_ends)
    assert np.isnan(market.targets[np.arange(len(last)), last]).all()


@pytest.mark.parametrize("spec", SPECS)
def test_centre_targets_are_the_return_over_the_lead_in_its_own_scale(spec):
    market = whole_market(spec)
    rng = np.random.default_rng(7)
    n = len(market.grid)
    rows = np.append(rng.integers(0, n, 300), [n - 1, n - 2])
    leads = np.append(rng.choice([lead // spec.bar_s for lead in spec.leads_s], 300), [1, 1])
    got = market.centre_targets(rows, leads)
    variance = market.standardiser.profile.at(market.grid.open_ts) ** 2
    for row, lead, value in zip(rows, leads, got, strict=True):
        future = market.grid.returns[row + 1 : row + 1 + lead]
        if len(future) < lead or 2 * np.isfinite(future).sum() < lead:
            assert np.isnan(value)
            continue
        scale = market.standardiser.unit_bps * market.frame.level[row]
        expected = np.nansum(future) / (scale * np.sqrt(variance[row + 1 : row + 1 + lead].sum()))
        assert value == pytest.approx(np.clip(expected, -CENTRE_LIMIT, CENTRE_LIMIT), abs=1e-9)
    assert np.isnan(got).any()
    assert np.isfinite(got).sum() > 100


@pytest.mark.parametrize("spec", SPECS)
def test_a_market_that_never_moved_gives_finite_rows(spec):
    bars = some_bars(spec)
    market = market_of(replace(bars, close=np.full(len(bars), 100.0)), spec, 500)
    assert np.isfinite(market.frame.shared).all()
    assert np.isfinite(market.frame.by_bucket).all()
    assert np.nanmax(np.abs(market.targets)) == 0.0
    rows = np.arange(0, 400, 7)
    targets = market.centre_targets(rows, np.ones(len(rows), dtype=np.int64))
    assert np.nanmax(np.abs(targets)) == 0.0
