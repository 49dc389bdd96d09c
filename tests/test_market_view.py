"""One market at one moment: the same bytes however one got there, and a ladder that holds."""

from dataclasses import replace

import numpy as np
import pytest

from bar_cleaning import bars_from_minutes
from config import DAY_S, FREQUENCIES, Frequency
from data_fetcher import SimulatedSource
from domain import Bars, ForecastRequest
from errors import ModelError
from forecast_engine import draw, forecast
from lgbm_predictor import load_model_set, load_without_trees
from market_view import (
    CHECKPOINT_AGE_DAYS,
    MarketState,
    Rung,
    best_view,
    best_views,
    first_state,
    prior_view,
    view_with_models,
    view_without_models,
    views_with_models,
)
from model_store import published_sets
from state_store import StateStore

HF, LF = Frequency.HF, Frequency.LF


@pytest.fixture(scope="module")
def models(model_dir):
    """The small sets with every part switched on, so that no part can err unseen."""
    sets = {}
    for frequency in Frequency:
        loaded = load_model_set(published_sets(model_dir, "BTC", frequency)[0])
        leads = FREQUENCIES[frequency].leads_s
        calibration = replace(
            loaded.calibration,
            blend_shares=np.full(len(FREQUENCIES[frequency].bucket_ends), 0.7),
            scale_strength=1.0,
            controller_gain=0.5,
            centre_weights=dict.fromkeys(leads, 0.5),
        )
        sets[frequency] = replace(loaded, calibration=calibration)
    return sets


@pytest.fixture(scope="module")
def history(archive):
    return {frequency: archive.load("BTC", frequency).history for frequency in Frequency}


def pick(bars, rows):
    columns = {
        name: getattr(bars, name)[rows]
        for name in ("open_ts", "open", "high", "low", "close", "volume")
    }
    return Bars(**columns, bar_s=bars.bar_s, feed=bars.feed)


def of_minutes(history, minutes):
    """The history with other one-minute bars."""
    bars = minutes
    if history.bars.bar_s != 60:
        bars = bars_from_minutes(minutes, bar_s=history.bars.bar_s)
    return replace(history, bars=bars, price_bars=minutes)


def complete(history):
    return history


def with_gaps(history):
    """A tenth of the minutes missing, two hours over a midnight, and the end of a day."""
    minutes = history.price_bars
    keep = np.random.default_rng(1).random(len(minutes)) > 0.1
    last_midnight = minutes.end_ts // DAY_S * DAY_S
    keep &= np.abs(minutes.open_ts - last_midnight) > 3600
    boundary = last_midnight - CHECKPOINT_AGE_DAYS * DAY_S
    keep &= np.abs(minutes.open_ts - boundary) > 1800
    return of_minutes(history, pick(minutes, keep))


def with_outage(history):
    """Three days without bars shortly before the end."""
    minutes = history.price_bars
    age = minutes.end_ts - minutes.open_ts
    return of_minutes(history, pick(minutes, (age < DAY_S // 2) | (age > 3.5 * DAY_S)))


def moments(history):
    """Times at which somebody looks: hours apart, at every bar, and days apart."""
    bar_s, end = history.bars.bar_s, history.bars.end_ts
    start = end - 5 * DAY_S
    steps = [0, 5 * bar_s, 6 * 3600, *[bar_s] * 6, 40 * bar_s, DAY_S, *[bar_s] * 3, 2 * DAY_S]
    return [*(start + np.cumsum(steps)).tolist(), *range(end - 5 * bar_s, end + 1, bar_s)]


def assert_same_bytes(one, other):
    """All of two views that depends on state and bars."""
    assert one.log_levels.tobytes() == other.log_levels.tobytes()
    for name in ("rung", "level", "centre", "anchor_price", "anchor_ts", "notes"):
        assert getattr(one, name) == getattr(other, name), name


def assert_same_state(one, other):
    assert (one.model_id, one.until) == (other.model_id, other.until)
    assert one.controller.to_dict() == other.controller.to_dict()
    assert one.ewma.end_ts == other.ewma.end_ts
    assert one.ewma.sums.tobytes() == other.ewma.sums.tobytes()
    assert one.ewma.weights.tobytes() == other.ewma.weights.tobytes()


def restored(store):
    document = store.load("market", "BTC", 1)
    assert document is not None
    return MarketState.from_dict(document)


# ---------------------------------------------------------------- one pass and many


@pytest.mark.parametrize("change", [complete, with_gaps, with_outage])
@pytest.mark.parametrize("frequency", list(Frequency))
def test_bar_by_bar_with_restarts_equals_one_pass_byte_for_byte(
    models, history, tmp_path, frequency, change
):
    trained, known = models[frequency], change(history[frequency])
    store = StateStore(tmp_path)
    state = None
    for step, now in enumerate(moments(known)):
        so_far = known.known_at(now)
        state = state or first_state(trained, so_far)
        view, state = view_with_models(trained, so_far, state)
        if step % 3 == 0:
            store.save("market", "BTC", 1, state.to_dict())
            state = restored(store)
    at_once, final = view_with_models(trained, known, first_state(trained, known))
    assert_same_bytes(view, at_once)
    assert_same_state(state, final)
    assert final.controller.end_ts > trained.trained_until  # outcomes were taken in
    assert final.ewma.end_ts > int(known.bars.open_ts[0])  # the checkpoint has moved


@pytest.mark.parametrize("change", [complete, with_gaps, with_outage])
@pytest.mark.parametrize("frequency", list(Frequency))
def test_many_views_at_once_are_those_of_one_after_the_other(models, history, frequency, change):
    trained, whole = models[frequency], change(history[frequency])
    early = trained.calibration.controller.end_ts - 3600  # also before training ended
    times = np.unique([early, *moments(whole), *moments(whole)[:3]])
    knowns = [whole.known_at(int(time)) for time in [*times, times[-1]]]
    start = first_state(trained, knowns[0])
    views, state = views_with_models(trained, knowns, start)
    carried = start
    for view, known in zip(views, knowns, strict=True):
        alone, carried = view_with_models(trained, known, carried)
        assert_same_bytes(view, alone)
    assert_same_state(state, carried)
    assert state.until % 900 == 0  # outcomes that are due at this very moment count
    assert state.controller.end_ts == state.until


def test_many_views_of_a_set_without_a_finite_scale_step_down_one_by_one(models, history):
    trained, known = models[HF], history[HF]
    broken = replace(
        trained,
        calibration=replace(trained.calibration, blend_shares=np.full(6, np.nan)),
    )
    knowns = [known.known_at(known.bars.end_ts - age_s) for age_s in (3600, 60, 0)]
    views, state = best_views(broken, knowns, first_state(broken, knowns[0]))
    assert [view.rung for view in views] == [Rung.PROFILE_EWMA] * 3
    assert [view.anchor_ts for view in views] == [each.anchor_ts for each in knowns]
    assert state.until == knowns[0].bars.open_ts[0]


def test_an_outage_longer_than_the_checkpoint_is_no_different(models, tmp_path):
    long = SimulatedSource(days=30, assets=("BTC",)).load("BTC", LF).history
    age = long.price_bars.end_ts - long.price_bars.open_ts
    known = of_minutes(long, pick(long.price_bars, (age < 3 * DAY_S) | (age > 15 * DAY_S)))
    trained = models[LF]
    state = first_state(trained, known)
    for age_s in (15 * DAY_S, 3 * DAY_S - 300, DAY_S, 0):
        so_far = known.known_at(known.bars.end_ts - age_s)
        view, state = view_with_models(trained, so_far, state)
    at_once, final = view_with_models(trained, known, first_state(trained, known))
    assert_same_bytes(view, at_once)
    assert_same_state(state, final)


@pytest.mark.parametrize("frequency", list(Frequency))
def test_a_moment_before_training_ended_has_no_controller_from_later(models, history, frequency):
    trained = models[frequency]
    now = trained.calibration.controller.end_ts - 3600
    early = history[frequency].known_at(now)
    view, state = view_with_models(trained, early, first_state(trained, early))
    still = replace(trained, calibration=replace(trained.calibration, controller_gain=0.0))
    unmoved, _ = view_with_models(still, early, first_state(still, early))
    assert view.log_levels.tobytes() == unmoved.log_levels.tobytes()
    # ... and once it is past, going on from there equals one pass
    late = history[frequency]
    carried, _ = view_with_models(trained, late, state)
    at_once, _ = view_with_models(trained, late, first_state(trained, late))
    assert_same_bytes(carried, at_once)


def test_the_controller_moves_the_level_within_its_limit(models, history):
    known, trained = history[HF], models[HF]
    still = replace(trained, calibration=replace(trained.calibration, controller_gain=0.0))
    moved, _ = view_with_models(trained, known, first_state(trained, known))
    unmoved, _ = view_with_models(still, known, first_state(still, known))
    difference = moved.log_levels - unmoved.log_levels
    assert np.abs(difference).max() <= 0.25 + 1e-12
    assert np.abs(difference).max() > 1e-4


def test_a_state_survives_the_disk_to_the_last_bit(models, history, tmp_path):
    _, state = view_with_models(models[HF], history[HF], first_state(models[HF], history[HF]))
    store = StateStore(tmp_path)
    store.save("market", "BTC", 1, state.to_dict())
    assert_same_state(restored(store), state)


# ---------------------------------------------------------------- the forecast


def prompt(history, frequency, num_paths=200):
    increment, length = {HF: (60, 3600), LF: (300, 86_400)}[frequency]
    return ForecastRequest(
        asset="BTC",
        start_ts=-(-history.bars.end_ts // 60) * 60 + 60,
        increment_s=increment,
        length_s=length,
        num_paths=num_paths,
    )


@pytest.mark.parametrize("frequency", list(Frequency))
def test_a_forecast_is_the_same_with_and_without_a_carried_state(models, history, frequency):
    known, trained = history[frequency], models[frequency]
    earlier = known.known_at(known.bars.end_ts - DAY_S)
    _, state = view_with_models(trained, earlier, first_state(trained, earlier))
    now = known.bars.end_ts
    fresh, carried = (
        forecast(prompt(known, frequency), known, trained, past, now, np.random.default_rng(1))
        for past in (None, state)
    )
    assert fresh.paths.tobytes() == carried.paths.tobytes()
    assert fresh.diagnostics == carried.diagnostics


@pytest.mark.parametrize("frequency", list(Frequency))
def test_bars_after_now_change_no_byte_of_a_forecast(models, history, frequency):
    known, trained = history[frequency], models[frequency]
    now = known.bars.end_ts - DAY_S
    minutes = known.price_bars
    close = np.where(minutes.close_ts > now, 1e-3, minutes.close)
    corrupted = of_minutes(known, replace(minutes, close=close))
    request = prompt(known.known_at(now), frequency)
    for models_or_none in (trained, None):
        one, other, leaking = (
            forecast(request, bars, models_or_none, None, at, np.random.default_rng(1))
            for bars, at in ((known, now), (corrupted, now), (corrupted, now + 60))
        )
        assert one.paths.tobytes() == other.paths.tobytes()
        assert one.diagnostics == other.diagnostics
        assert leaking.paths[0, 0] < 1  # a minute later the corruption shows


# ---------------------------------------------------------------- the ladder


def first_bars(history, count):
    minutes = pick(history.price_bars, np.arange(count))
    return of_minutes(history, minutes)


def broken(models):
    """A set whose scale is not a number."""
    shares = np.full(len(models.spec.bucket_ends), np.nan)
    return replace(models, calibration=replace(models.calibration, blend_shares=shares))


@pytest.fixture
def rungs(history, model_dir):
    """Name of a situation to (models, history, the rung that must answer)."""
    folders = {frequency: published_sets(model_dir, "BTC", frequency)[0] for frequency in Frequency}
    models = {frequency: load_model_set(folder) for frequency, folder in folders.items()}
    treeless = load_without_trees(folders[HF])
    full = history[HF]
    return {
        "everything": (models[HF], full, Rung.LIGHTGBM),
        "no trees": (treeless, full, Rung.CALIBRATED_EWMA),
        "no finite scale": (broken(models[HF]), full, Rung.PROFILE_EWMA),
        "no models": (None, full, Rung.PROFILE_EWMA),
        "no models, a day of bars": (None, first_bars(full, 1_440), Rung.PROFILE_EWMA),
        "no models, 31 bars": (None, first_bars(full, 31), Rung.PROFILE_EWMA),
        "no models, 30 bars": (None, first_bars(full, 30), Rung.PRIOR),
        "no models, one bar": (None, first_bars(full, 1), Rung.PRIOR),
        "models, 30 bars": (models[HF], first_bars(full, 30), Rung.LIGHTGBM),
        "models, one bar": (models[HF], first_bars(full, 1), Rung.LIGHTGBM),
        "models, no bar of five minutes": (models[LF], first_bars(history[LF], 3), Rung.PRIOR),
    }


def test_every_rung_answers_with_a_market_and_names_itself(rungs):
    hourly = {}
    for name, (trained, known, rung) in rungs.items():
        view, state = best_view(trained, known, None, "the reason")
        assert view.rung is rung, name
        assert (state is not None) == (rung in {Rung.LIGHTGBM, Rung.CALIBRATED_EWMA}), name
        answer = draw(prompt_at(known), view, known.anchor_ts, np.random.default_rng(0))
        assert answer.paths.shape == (1000, 61)
        assert np.isfinite(answer.paths).all()
        assert answer.paths.min() > 0
        assert answer.paths.std(axis=0).min() > 0
        assert answer.diagnostics.rung == rung.value
        hourly[name] = float(np.log(answer.paths[:, -1] / answer.paths[:, 0]).std())
        if trained is None:
            assert view.notes[0] == "the reason"
    # All rungs are about the same market: its documented volatility is 54 bp an hour.
    assert all(0.0015 < spread < 0.015 for spread in hourly.values()), hourly


def prompt_at(history):
    return ForecastRequest(
        asset="BTC",
        start_ts=-(-history.anchor_ts // 60) * 60,
        increment_s=60,
        length_s=3600,
        num_paths=1000,
    )


def test_missing_trees_are_named_in_the_notes(rungs):
    trained, known, _ = rungs["no trees"]
    view, _ = best_view(trained, known, None, "")
    assert view.notes == ("the LightGBM models are missing or damaged",)


def test_a_set_without_a_finite_scale_is_named_in_the_notes(rungs):
    trained, known, _ = rungs["no finite scale"]
    with pytest.raises(ModelError, match="forecasts no finite scale"):
        view_with_models(trained, known, first_state(trained, known))
    view, _ = best_view(trained, known, None, "")
    assert view.notes == (
        f"model set {trained.model_id} forecasts no finite scale; train it again.",
    )


def test_without_models_the_clock_and_the_level_come_from_the_bars(history):
    known = history[HF]
    view = view_without_models(known, "")
    clock = view.standardiser.profile.at(known.bars.open_ts[-7 * 1440 :])
    assert clock.max() / clock.min() > 1.5
    half = replace(
        known.bars,
        close=np.exp(
            np.log(known.bars.close[0]) + np.log(known.bars.close / known.bars.close[0]) / 2
        ),
    )
    calmer = view_without_models(replace(known, bars=half, price_bars=half), "")
    assert calmer.standardiser.unit_bps == pytest.approx(view.standardiser.unit_bps / 2, rel=1e-6)


def test_a_price_that_stood_still_is_no_market_without_volatility(history):
    bars = history[HF].bars
    still = replace(bars, close=np.full(len(bars), 100.0))
    frozen = replace(history[HF], bars=still, price_bars=still)
    view = view_without_models(frozen, "no models")
    assert view.rung is Rung.PRIOR
    assert "stood still" in view.notes[0]


def test_the_prior_is_the_documented_volatility(history):
    view = prior_view(first_bars(history[HF], 1), "")
    answer = draw(prompt_at(first_bars(history[HF], 1)), view, 0, np.random.default_rng(0))
    steps = np.diff(np.log(answer.paths), axis=1)
    # Mean |step| of a normal of 54.1 bp an hour; E|x| is what the simulator keeps.
    assert np.abs(steps).mean() == pytest.approx(
        0.00541 / np.sqrt(60) * np.sqrt(2 / np.pi), rel=0.03
    )


def test_a_view_of_another_feeds_bars_says_so(history):
    known = replace(history[LF], stand_in="pyth:Crypto.BTC/USD")
    view, _ = best_view(None, known, None, "the reason")
    assert view.notes == (
        "the reason",
        "no bar of the scored feed is stored; pyth:Crypto.BTC/USD stands in",
    )
