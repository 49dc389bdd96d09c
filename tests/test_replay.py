"""Replaying history: what a prompt knows, what scores it, and nothing of the future in between."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines import ConstantSigma, EwmaStudentT, LawForecaster
from config import DAY_S, Frequency
from domain import MarketHistory
from errors import DataError
from forecast_engine import forecast, request_rng
from garch_baseline import Garch
from lgbm_predictor import load_model_set
from market_baselines import Har, Oracle, fit_har
from model_store import published_sets
from protocol import competition_like, protocol_profile
from replay import (
    EngineForecaster,
    answer_digest,
    check_prompt_times,
    known_at_prompt,
    last_prompt,
    law_digest,
    prompt_grid_s,
    prompt_times,
    realised_path,
    replay,
    replay_laws,
    usual_request,
)
from wire_format import round_prices


@pytest.fixture(scope="module")
def histories(archive):
    """BTC by the minute at both frequencies, XAU by five minutes."""
    return {
        "hf": archive.load("BTC", Frequency.HF).history,
        "lf": archive.load("BTC", Frequency.LF).history,
        "five": archive.load("XAU", Frequency.LF).history,
    }


@pytest.fixture(scope="module")
def models(model_dir):
    return {
        frequency.value: load_model_set(published_sets(model_dir, "BTC", frequency)[0])
        for frequency in Frequency
    }


def spoiled_after(history: MarketHistory, end: int) -> MarketHistory:
    """The same bars up to `end`; after it, other prices at other minutes."""
    rng = np.random.default_rng(11)

    def spoil(bars):
        keep = (bars.close_ts <= end) | (rng.random(len(bars)) < 0.9)
        noise = bars.close * np.exp(rng.normal(size=len(bars)))
        columns = {
            name: np.where(bars.close_ts <= end, getattr(bars, name), noise)[keep]
            for name in ("open", "high", "low", "close", "volume")
        }
        return replace(bars, open_ts=bars.open_ts[keep], **columns)

    return replace(history, bars=spoil(history.bars), price_bars=spoil(history.price_bars))


# ---------------------------------------------------------------- time, to the second


def test_with_minutes_a_prompt_knows_candles_that_opened_two_minutes_before(histories):
    for name in ("hf", "lf"):
        known = known_at_prompt(histories[name], 1_768_400_040)
        assert known.price_bars.open_ts[-1] == 1_768_400_040 - 120


def test_with_five_minute_bars_a_prompt_knows_those_that_closed(histories):
    start = int(histories["five"].bars.open_ts[-400])
    assert known_at_prompt(histories["five"], start).bars.open_ts[-1] == start - 300


def test_the_outcome_is_the_close_of_the_candle_that_opens_at_each_point(histories):
    history = histories["hf"]
    start = int(history.bars.open_ts[-200])
    realised = realised_path(history, usual_request(history, start))
    assert realised.tolist() == history.bars.close[-200:-139].tolist()


def test_five_minute_archives_are_scored_with_the_price_at_each_point(histories):
    history = histories["five"]
    start = int(history.bars.close_ts[-300])
    realised = realised_path(history, usual_request(history, start))
    assert realised[0] == history.bars.close[-300]


def test_a_missing_minute_stays_unknown(histories):
    history = histories["hf"]
    row = len(history.bars) - 190
    keep = np.arange(len(history.bars)) != row
    columns = ("open_ts", "open", "high", "low", "close", "volume")
    bars = replace(history.bars, **{c: getattr(history.bars, c)[keep] for c in columns})
    holed = replace(history, bars=bars, price_bars=bars)
    start = int(history.bars.open_ts[-200])
    realised = realised_path(holed, usual_request(holed, start))
    assert np.flatnonzero(np.isnan(realised)).tolist() == [10]


# ---------------------------------------------------------------- choosing prompts


@pytest.mark.parametrize("name", ["hf", "lf", "five"])
def test_prompts_are_evenly_spread_on_the_grid_with_known_outcomes(histories, name):
    history = histories[name]
    start = history.bars.end_ts - 4 * DAY_S
    times = prompt_times(history, start, None, 20)
    assert len(times) == 20
    assert (times % prompt_grid_s(history) == 0).all()
    assert times[0] >= start
    assert times[-1] == last_prompt(history)
    for time in times.tolist():
        known = np.isfinite(realised_path(history, usual_request(history, time)))
        assert known.mean() >= 0.05


def test_the_last_prompt_ends_with_the_last_bar(histories):
    history = histories["hf"]
    request = usual_request(history, last_prompt(history))
    assert request.grid_ts[-1] + 60 == history.price_bars.end_ts


def test_a_closed_market_is_left_out(histories):
    history = histories["five"]  # gold rests over the weekend
    times = prompt_times(history, int(history.bars.open_ts[0]), None, 5000)
    steps = np.diff(times)
    assert steps.max() > DAY_S
    missing = np.setdiff1d(np.arange(times[0], times[-1], 300), times)
    for time in missing[::20].tolist():
        assert np.isfinite(realised_path(history, usual_request(history, time))).mean() < 0.05


@given(count=st.integers(1, 50))
def test_asking_for_more_than_there_are_gives_all(histories, count):
    history = histories["hf"]
    end = history.bars.end_ts
    start = last_prompt(history) - 9 * 60
    times = prompt_times(history, start, end, count)
    assert len(times) == min(count, 10)
    assert len(np.unique(times)) == len(times)


def test_no_prompt_in_the_window_is_one_sentence(histories):
    history = histories["hf"]
    with pytest.raises(DataError, match=r"BTC hf: no prompt fits between .* choose another"):
        prompt_times(history, history.bars.end_ts, None, 5)


def test_given_times_are_checked(histories):
    history = histories["five"]
    good = prompt_times(history, history.bars.end_ts - 4 * DAY_S, None, 3)
    check_prompt_times(history, good)
    with pytest.raises(DataError, match=r"off the grid; here prompts start .* 300 s"):
        check_prompt_times(history, good + 60)
    for outside in (int(history.bars.open_ts[0]), history.bars.end_ts):
        with pytest.raises(DataError, match="lies outside the data"):
            check_prompt_times(history, np.array([outside]))
    with pytest.raises(DataError, match=r"off the grid; here prompts start .* 60 s"):
        check_prompt_times(histories["hf"], good + 30)


# ---------------------------------------------------------------- the engine replayed


@pytest.mark.parametrize("name", ["hf", "lf"])
def test_a_replay_gives_the_bytes_of_a_live_answer(histories, models, name):
    history = histories[name]
    engine = EngineForecaster(models[name])
    for start in prompt_times(history, history.bars.end_ts - 2 * DAY_S, None, 3).tolist():
        request = usual_request(history, start)
        rng = request_rng(7, request)
        ours = engine.answer(request, known_at_prompt(history, start), rng)
        now = start - history.scored_lag_s
        live = forecast(request, history, models[name], None, now, request_rng(7, request))
        assert answer_digest(ours.paths) == answer_digest(round_prices(live.paths))
        assert ours.diagnostics.rung == "lightgbm"


def test_one_changed_price_changes_the_digest(histories):
    paths = np.full((2, 3), 100.0)
    other = paths.copy()
    other[1, 2] = np.nextafter(100.0, 200.0)
    assert answer_digest(paths) == answer_digest(paths.copy())
    assert answer_digest(paths) != answer_digest(other)


def test_going_back_in_time_gives_the_answer_of_then(histories, models):
    history = histories["hf"]
    late, early = last_prompt(history), last_prompt(history) - 20 * 3600
    engine = EngineForecaster(models["hf"])

    def answer(forecaster, start):
        request = usual_request(history, start)
        known = known_at_prompt(history, start)
        return answer_digest(forecaster.paths(request, known, request_rng(0, request)))

    answer(engine, late)
    assert answer(engine, early) == answer(EngineForecaster(models["hf"]), early)


def forecasters_for(history, models, past):
    """Everything that a back-test compares, fitted to `past`; the oracle sees `history`."""
    har = fit_har(past, days=365)
    baselines = [ConstantSigma(), EwmaStudentT.fit(past), Har(model=har)]
    return [EngineForecaster(models), *baselines, Oracle(har=Har(model=har), full=history)]


@pytest.mark.parametrize("name", ["hf", "lf"])
def test_corrupting_everything_after_each_prompt_changes_no_byte(histories, models, name):
    pytest.importorskip("arch", reason="development dependency of the garch_t baseline")
    history = histories[name]
    past = history.known_at(history.bars.end_ts - 2 * DAY_S)
    honest = [*forecasters_for(history, models[name], past), Garch.fit(past)]
    for start in prompt_times(history, past.bars.end_ts + 60, None, 3).tolist():
        spoiled = spoiled_after(history, start - history.scored_lag_s)
        blind = [*forecasters_for(spoiled, models[name], past), Garch.fit(past)]
        request = usual_request(history, start)
        same = {}
        for one, other in zip(honest, blind, strict=True):
            before, after = (
                forecaster.paths(request, known_at_prompt(whole, start), request_rng(0, request))
                for forecaster, whole in ((one, history), (other, spoiled))
            )
            same[one.name] = answer_digest(before) == answer_digest(after)
        assert same == {name: name != "oracle" for name in same}


@pytest.mark.parametrize("name", ["hf", "lf"])
def test_in_closed_form_too_nothing_after_a_prompt_is_felt_by_it(histories, models, name):
    """Prompts are worked out together: the later ones must not reach back."""
    history = histories[name]
    past = history.known_at(history.bars.end_ts - 2 * DAY_S)
    times = prompt_times(history, past.bars.end_ts + 60, None, 5)

    def laws(whole, starts):
        prompts = [(usual_request(whole, t), known_at_prompt(whole, t)) for t in starts]
        return {
            forecaster.name: forecaster.laws(prompts)
            for forecaster in forecasters_for(whole, models[name], past)
            if isinstance(forecaster, LawForecaster)
        }

    together = laws(history, times.tolist())
    assert set(together) == {"engine", "reference", "ewma_t", "har", "oracle"}
    for row, start in enumerate(times.tolist()):
        spoiled = spoiled_after(history, start - history.scored_lag_s)
        for forecaster, found in laws(spoiled, [start]).items():
            same = law_digest(found[0]) == law_digest(together[forecaster][row])
            assert same == (forecaster != "oracle"), forecaster


@pytest.mark.parametrize("name", ["hf", "lf"])
def test_closed_form_scores_are_those_of_drawn_answers_up_to_their_noise(histories, models, name):
    history = histories[name]
    past = history.known_at(history.bars.end_ts - 2 * DAY_S)
    times = prompt_times(history, past.bars.end_ts + 60, None, 10)
    competition = competition_like(protocol_profile("2026-09"), "BTC", history.frequency)
    _, *baselines = forecasters_for(history, models[name], past)
    with_laws = [each for each in baselines if isinstance(each, LawForecaster)]
    engine = EngineForecaster(models[name])
    closed = list(replay_laws(history, engine, with_laws, competition, times))
    drawn = [r for r, _ in replay(history, engine, with_laws, competition, times, seed=0)]
    assert [each.start_ts for each in closed] == times.tolist()
    for forecaster in ("engine", "reference", "ewma_t", "har", "oracle"):
        ours, theirs = (
            np.array([each.scores[forecaster].total for each in results])
            for results in (closed, drawn)
        )
        # Answers of 1000 paths are matched to quantiles, those of the others are not.
        noise = 0.003 if forecaster == "engine" else 0.02
        assert ours.mean() == pytest.approx(theirs.mean(), rel=noise)
    for one, other in zip(closed, drawn, strict=True):
        assert one.pit == pytest.approx(other.pit, abs=0.06)
        assert (one.model_id, one.rung) == (other.model_id, other.rung)
        assert {k: v.sum() for k, v in one.histogram.items()} == {
            k: v.sum() for k, v in other.histogram.items()
        }


def test_every_forecaster_is_scored_on_the_same_prompts(histories, models):
    history = histories["hf"]
    past = history.known_at(history.bars.end_ts - 2 * DAY_S)
    engine, reference, *_ = forecasters_for(history, models["hf"], past)
    competition = competition_like(protocol_profile("2026-09"), "BTC", Frequency.HF)
    times = prompt_times(history, past.bars.end_ts + 60, None, 4)
    results = [r for r, _ in replay(history, engine, [reference], competition, times, seed=0)]
    assert [result.start_ts for result in results] == times.tolist()
    for result in results:
        plain = result.to_dict()
        assert set(plain["scores"]) == {"engine", "reference"}
        card = plain["scores"]["engine"]
        assert sum(card["intervals"].values()) == pytest.approx(card["total"])
        assert set(plain["histogram"]) == set(card["intervals"])
        assert sum(plain["histogram"]["1min"]) == 60
        assert list(plain["pit"]) == ["60", "120", "300", "900", "1800", "3600"]
        assert all(0 <= value <= 1 for value in plain["pit"].values())


def test_the_seed_changes_the_answers_and_the_same_seed_does_not(histories, models):
    history = histories["hf"]
    competition = competition_like(protocol_profile("2026-09"), "BTC", Frequency.HF)
    times = prompt_times(history, history.bars.end_ts - DAY_S, None, 2)

    def answers(seed):
        engine = EngineForecaster(models["hf"])
        replayed = replay(history, engine, [], competition, times, seed=seed)
        return [result.answer for result, _ in replayed]

    assert answers(1) == answers(1)
    assert set(answers(1)).isdisjoint(answers(2))
