"""`har` and `oracle`: as they are defined, the one blind to the future, the other not."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import lfilter

from baselines import ConstantSigma, EwmaStudentT, Forecaster
from config import Frequency
from data_fetcher import SimulatedSource
from errors import InsufficientHistory
from features import bucket_edges, return_grid
from market_baselines import HAR_SPECS, Har, Oracle, _step_laws, draw_steps, fit_har
from protocol import competition_like, protocol_profile
from replay import known_at_prompt, law_digest, prompt_times, realised_path, usual_request
from scoring import score_paths
from tests.test_baselines import history_of


@pytest.fixture(scope="module")
def history():
    return SimulatedSource(days=24, assets=("BTC",)).load("BTC", Frequency.HF).history


@pytest.fixture(scope="module")
def past(history):
    return history.known_at(history.bars.end_ts - 4 * 86_400)


@pytest.fixture(scope="module")
def model(past):
    return fit_har(past, days=365)


def scrambled_after(history, end):
    """The same bars up to `end`, and nonsense after it."""
    rng = np.random.default_rng(9)

    def spoil(bars):
        noise = 1e3 * np.exp(rng.normal(size=len(bars)))
        return replace(bars, close=np.where(bars.close_ts <= end, bars.close, noise))

    bars = spoil(history.bars)
    return replace(history, bars=bars, price_bars=bars)


def test_the_yardsticks_have_the_buckets_of_their_definition():
    assert HAR_SPECS[Frequency.HF].bucket_ends == (1, 2, 5, 15, 30, 60)
    assert HAR_SPECS[Frequency.LF].bucket_ends == (1, 3, 6, 12, 36, 96, 192, 288)


def test_from_prompt_to_prompt_or_all_at_once_the_levels_are_the_same(history, model):
    carried = Har(model=model)
    for start_ts in prompt_times(history, history.bars.end_ts - 86_400, None, 6).tolist():
        known = known_at_prompt(history, start_ts)
        fresh = Har(model=model).log_levels([known])
        assert np.array_equal(carried.log_levels([known]), fresh)


def test_many_prompts_at_once_have_the_laws_of_one_after_the_other(history, model):
    times = prompt_times(history, history.bars.end_ts - 86_400, None, 9).tolist()
    prompts = [
        (usual_request(history, start_ts), known_at_prompt(history, start_ts))
        for start_ts in [*times[:4], *times[3:]]
    ]
    for make in (
        lambda: Har(model=model),
        lambda: Oracle(har=Har(model=model), full=history),
        lambda: EwmaStudentT.fit(history),
        ConstantSigma,
    ):
        carried = make()
        alone = [carried.laws([prompt])[0] for prompt in prompts]
        for one, other in zip(make().laws(prompts), alone, strict=True):
            assert law_digest(one) == law_digest(other)


def test_going_back_in_time_gives_the_levels_of_then(history, model):
    late, early = (
        known_at_prompt(history, history.bars.end_ts - 7200 - shift) for shift in (0, 43_200)
    )
    forecaster = Har(model=model)
    forecaster.log_levels([late])
    assert np.array_equal(forecaster.log_levels([early]), Har(model=model).log_levels([early]))


def test_no_new_bar_leaves_the_levels_as_they_were(history, model):
    known = known_at_prompt(history, history.bars.end_ts - 7200)
    forecaster = Har(model=model)
    assert np.array_equal(forecaster.log_levels([known]), forecaster.log_levels([known]))


def test_har_does_not_feel_what_comes_after_the_prompt_and_the_oracle_does(history, model):
    start_ts = int(prompt_times(history, history.bars.end_ts - 86_400, None, 3)[1])
    request, answers = usual_request(history, start_ts), []
    for full in (history, scrambled_after(history, start_ts - 60)):
        known = known_at_prompt(full, start_ts)
        forecasters = (Har(model=model), Oracle(har=Har(model=model), full=full))
        answers.append([f.paths(request, known, np.random.default_rng(0)) for f in forecasters])
    (har, oracle), (har_then, oracle_then) = answers
    assert har.tobytes() == har_then.tobytes()
    assert oracle.tobytes() != oracle_then.tobytes()


def test_the_oracle_knows_the_realised_mean_of_every_longer_bucket(history, model):
    start_ts = history.bars.end_ts - 7200
    known = known_at_prompt(history, start_ts)
    har = Har(model=model)
    ours = Oracle(har=har, full=history)._realised([known], har.log_levels([known]))[0]
    grid = return_grid(history.bars, known.bars.end_ts)
    size = np.abs(model.standardiser.apply(grid))
    for bucket, (begin, end) in enumerate(bucket_edges(model.spec)):
        expected = (
            np.log(size[begin:end].mean())
            if end - begin > 2
            else har.log_levels([known])[0, bucket]
        )
        assert ours[bucket] == pytest.approx(expected, abs=1e-5)


def test_without_a_bar_to_come_the_oracle_has_the_levels_of_har(history, model):
    known = known_at_prompt(history, history.bars.end_ts - 7200)
    levels = Har(model=model).log_levels([known])
    blind = Oracle(har=Har(model=model), full=known)
    assert np.array_equal(blind._realised([known], levels), levels)


def test_knowing_more_scores_better():
    """On a market with a clock and slow clusters: ewma_t, then har, then the oracle."""
    rng = np.random.default_rng(5)
    n = 16 * 1440
    clock = 1 + 0.8 * np.sin(2 * np.pi * np.arange(n) / 1440)
    clusters = np.exp(lfilter([1.0], [1.0, -0.98], 0.1 * rng.normal(size=n)))
    history = history_of(5 * clock * clusters * rng.normal(size=n))
    past = history.known_at(history.bars.end_ts - 3 * 86_400)
    model = fit_har(past, days=365)
    competition = competition_like(protocol_profile("2026-05"), "BTC", Frequency.HF)
    forecasters: tuple[Forecaster, ...] = (
        EwmaStudentT.fit(past),
        Har(model=model),
        Oracle(har=Har(model=model), full=history),
    )
    totals = np.zeros(3)
    for start_ts in prompt_times(history, past.bars.end_ts, None, 40).tolist():
        request = usual_request(history, start_ts)
        known, realised = known_at_prompt(history, start_ts), realised_path(history, request)
        for row, forecaster in enumerate(forecasters):
            paths = forecaster.paths(request, known, np.random.default_rng(start_ts))
            totals[row] += score_paths(paths, realised, competition, increment_s=60).total
    assert totals[2] < 0.99 * totals[1]
    assert totals[1] < 0.99 * totals[0]


@pytest.mark.parametrize("dof", [5.0, np.inf])
def test_steps_have_the_mean_size_that_the_level_and_the_clock_give(history, model, dof):
    known = known_at_prompt(history, history.bars.end_ts - 7200)
    request = usual_request(history, history.bars.end_ts - 7200)
    levels = np.full((1, len(model.spec.bucket_ends)), np.log(2.0))
    (law,) = _step_laws(model, [(request, known)], levels, dof)
    paths = draw_steps(law, request.num_paths, np.random.default_rng(1))
    steps = 1e4 * np.abs(np.diff(np.log(paths), axis=1)).mean(axis=0)
    clock = model.standardiser.profile.variance_time(request.grid_ts + 60)
    expected = 2 * model.standardiser.unit_bps * np.sqrt(np.diff(clock))
    # Mean of 1000 sizes whose relative spread is about 0.9.
    assert np.abs(steps / expected - 1).max() < 4.5 * 0.9 / np.sqrt(1000)


def test_a_history_without_outcomes_is_refused_in_one_sentence(history):
    young = history.known_at(int(history.bars.open_ts[0]) + 90 * 60)
    with pytest.raises(InsufficientHistory, match=r"har baseline.*leave it out of --baselines\.$"):
        fit_har(young, days=365)
