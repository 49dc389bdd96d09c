"""Tails and dispersion are chosen by what they would have scored, or left as they were."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import path_fitting
from config import FREQUENCIES, Frequency, MarketHours
from features import Standardiser
from path_fitting import STARTING_SHAPES, VARIATIONS, PastPrompt, search_shape
from path_simulator import PathShape, simulate_steps
from protocol import PROTOCOL_PROFILES
from seasonality import flat_profile

HF = FREQUENCIES[Frequency.HF]
HOUR = PROTOCOL_PROFILES["2026-09"].competitions["crypto-1h"]
MONDAY = 1_763_337_600  # 2025-11-17 00:00 UTC
N_POINTS = 31  # half a prompt says as much and takes half the time

CALM = PathShape(tail_dof=40, path_sd=0.1, slow_sd=0.1, slow_half_life_s=2400)
WILD = PathShape(tail_dof=5, path_sd=0.4, slow_sd=0.4, slow_half_life_s=2400)


def past_prompts(shape: PathShape, n: int, seed: int) -> list[PastPrompt]:
    """Prompts of a market whose moves are of the given shape, their scale known exactly."""
    profile = flat_profile(60, MarketHours.CONTINUOUS)
    standardiser = Standardiser(profile=profile, unit_bps=5.0, cap=9.0)
    step_s = np.append(120.0, np.full(N_POINTS - 1, 60.0))
    scale = 5.0 * np.sqrt(step_s / 60)
    steps = simulate_steps(np.random.default_rng(seed), scale, step_s, shape, n_paths=n).T
    return [
        PastPrompt(
            standardiser=standardiser,
            log_levels=np.zeros(len(HF.bucket_ends)),
            anchor_price=100.0,
            anchor_ts=MONDAY + 3600 * index,
            point_ts=MONDAY + 3600 * index + 120 + 60 * np.arange(N_POINTS),
            realised=100 * np.exp(np.cumsum(steps[index]) / 1e4),
        )
        for index in range(n)
    ]


def try_only(monkeypatch: pytest.MonkeyPatch, *shapes: dict[str, float]) -> None:
    variations = tuple(partial(replace, **values) for values in shapes)
    monkeypatch.setattr(path_fitting, "VARIATIONS", variations)


# ---------------------------------------------------------------- planted shapes


@pytest.mark.parametrize(("truth", "start"), [(WILD, CALM), (CALM, WILD)], ids=["wild", "calm"])
def test_the_search_finds_the_dispersion_that_the_market_has(monkeypatch, truth, start):
    other = {"path_sd": start.path_sd, "slow_sd": start.slow_sd}
    planted = {"path_sd": truth.path_sd, "slow_sd": truth.slow_sd}
    try_only(monkeypatch, planted, other)
    prompts = past_prompts(truth, 50, seed=1)
    found = search_shape(HF, HOUR, prompts, start, seed=2)
    assert (found.path_sd, found.slow_sd) == (truth.path_sd, truth.slow_sd)
    assert found.tail_dof == start.tail_dof


def test_the_planted_shape_scores_better_by_a_clear_margin():
    prompts = past_prompts(WILD, 200, seed=3)
    calm, wild = (path_fitting._scores(HF, HOUR, prompts, shape, 4) for shape in (CALM, WILD))
    gain = calm - wild
    assert gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain))
    assert gain.mean() > 0.003 * calm.mean()


def test_the_same_seed_scores_alike_and_another_one_does_not():
    prompts = past_prompts(WILD, 3, seed=5)
    first, again, other = (
        path_fitting._scores(HF, HOUR, prompts, CALM, seed) for seed in (6, 6, 7)
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert np.all(first > 0)


def test_a_prompt_may_begin_at_the_last_known_price():
    prompts = [
        replace(prompt, anchor_ts=int(prompt.point_ts[0])) for prompt in past_prompts(CALM, 3, 8)
    ]
    assert np.isfinite(path_fitting._scores(HF, HOUR, prompts, CALM, 9)).all()


# ---------------------------------------------------------------- nothing to go by


def test_without_prompts_the_start_stays():
    assert search_shape(HF, HOUR, [], CALM, seed=0) is CALM


def test_prompts_of_which_nothing_that_counts_is_known_leave_the_start(monkeypatch):
    try_only(monkeypatch, {"path_sd": 0.4}, {"tail_dof": 5.0})
    silent = np.full(N_POINTS, np.nan)
    silent[0] = 100.0
    prompts = [replace(prompt, realised=silent) for prompt in past_prompts(WILD, 3, 10)]
    assert search_shape(HF, HOUR, prompts, CALM, seed=0) is CALM


def test_one_prompt_alone_decides_nothing_whatever_it_would_gain(monkeypatch):
    scores_by_path_sd(monkeypatch, {CALM.path_sd: [10.0], 0.4: [5.0]})
    try_only(monkeypatch, {"path_sd": 0.4})
    assert search_shape(HF, HOUR, past_prompts(WILD, 1, 11), CALM, seed=0) is CALM


# ---------------------------------------------------------------- the rule of the choice


def scores_by_path_sd(monkeypatch: pytest.MonkeyPatch, table: dict[float, list[float]]) -> None:
    monkeypatch.setattr(
        path_fitting, "_scores", lambda *args: np.array(table[args[3].path_sd], dtype=float)
    )


def chosen(monkeypatch: pytest.MonkeyPatch, table: dict[float, list[float]]) -> float:
    scores_by_path_sd(monkeypatch, {CALM.path_sd: [9.0, 10, 11, 10], **table})
    try_only(monkeypatch, *({"path_sd": value} for value in table))
    prompts = past_prompts(CALM, 4, 12)
    return search_shape(HF, HOUR, prompts, CALM, seed=0).path_sd


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({0.2: [8.9, 9.9, 10.9, 9.9]}, 0.2),  # a small gain on every prompt
        ({0.2: [5.0, 12, 12, 10]}, 0.1),  # a larger one that one prompt brought
        ({0.2: [9.0, 10, 11, 10]}, 0.1),  # none
        ({0.2: [8.0, 9, 10, 9], 0.3: [7.5, 8.5, 9.5, 8.5]}, 0.3),  # each against the best so far
        ({0.2: [8.0, 9, 10, 9], 0.3: [8.5, 9.5, 10.5, 9.5]}, 0.2),
        ({0.2: [np.nan] * 4}, 0.1),
    ],
)
def test_a_change_is_kept_only_for_a_gain_beyond_its_standard_error(monkeypatch, table, expected):
    assert chosen(monkeypatch, table) == expected


def test_progress_is_told_once_per_variation(monkeypatch):
    monkeypatch.setattr(path_fitting, "_scores", lambda *args: np.ones(3))
    steps: list[int] = []
    prompts = past_prompts(CALM, 3, 13)
    found = search_shape(HF, HOUR, prompts, CALM, seed=0, on_step=lambda: steps.append(1))
    assert len(steps) == len(VARIATIONS)
    assert found is CALM


@pytest.mark.parametrize("frequency", list(Frequency))
def test_the_search_starts_among_what_it_tries_and_for_bars_of_its_frequency(frequency):
    start = STARTING_SHAPES[frequency]
    assert start.bar_s == FREQUENCIES[frequency].bar_s
    assert start.tail_dof > 2
    for name in ("tail_dof", "path_sd", "slow_sd"):
        tried = {getattr(vary(start), name) for vary in VARIATIONS}
        assert min(tried) <= getattr(start, name) <= max(tried)
