"""From history and models to an answer, whatever is missing, damaged or new."""

import errno
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import forecast_engine
from config import DAY_S, FREQUENCIES, Frequency
from data_fetcher import ArchiveSource, LoadedHistory, SimulatedSource, open_source
from domain import Bars, ForecastRequest, MarketHistory, PriceQuote
from errors import NoPriceError, RequestError, StateError, UnknownAsset, UnreadableState
from feed_plans import feed_plans
from forecast_engine import (
    OLD_AT_START_S,
    STATE_SCHEMA,
    ForecastEngine,
    centre_path,
    draw,
    first_change,
    forecast,
    request_frequency,
    request_rng,
    reset_calibration,
)
from lgbm_predictor import CALIBRATION, SCALE_MODEL, load_model_set
from market_view import Rung, first_state, view_with_models
from model_store import (
    MANIFEST,
    POINTER,
    digest,
    publication,
    publish_set,
    published_sets,
    seal_manifest,
    set_folder,
)
from path_fitting import STARTING_SHAPES
from price_board import Anchor, AnchorSource, PriceBoard
from protocol import protocol_profile
from settings import Settings
from state_store import StateStore
from uncertainty_engine import level_at, step_scales
from wire_format import encode_shadow_answer

HF, LF = Frequency.HF, Frequency.LF


@pytest.fixture
def settings(model_dir, tmp_path):
    """Settings of an engine over the published sets and an empty state folder."""
    return Settings(source="archive", model_dir=model_dir, state_dir=tmp_path / "state")


@pytest.fixture
def engine(archive, settings):
    return ForecastEngine.open(archive, settings)


@pytest.fixture(scope="module")
def shared_engine(archive, model_dir, tmp_path_factory):
    """An engine for tests that only ask."""
    state_dir = tmp_path_factory.mktemp("state")
    return ForecastEngine.open(
        archive, Settings(source="archive", model_dir=model_dir, state_dir=state_dir)
    )


@pytest.fixture
def own_models(model_dir, tmp_path):
    """A copy of the published sets, to be damaged."""
    return shutil.copytree(model_dir, tmp_path / "models")


def ask(start, *, asset="BTC", increment=60, length=3600, num_paths=50):
    return ForecastRequest(
        asset=asset,
        start_ts=start,
        increment_s=increment,
        length_s=length,
        num_paths=num_paths,
    )


def hour(engine, **changes):
    return ask(engine.now() + 60, **changes)


def day(engine, **changes):
    return ask(engine.now() + 60, increment=300, length=86_400, **changes)


def assert_a_market(answer, points):
    assert answer.paths.shape == (answer.request.num_paths, points)
    assert np.isfinite(answer.paths).all()
    assert answer.paths.min() > 0
    steps = np.diff(np.log(answer.paths), axis=1)
    assert (steps.std(axis=1) > 0).all()  # no path is constant


def flip(path):
    """Damage a file in its middle, in a way that still reads: one digit becomes another."""
    data = bytearray(path.read_bytes())
    at = next(at for at in range(len(data) // 2, len(data)) if data[at] in b"0123456789")
    data[at] ^= 1
    path.write_bytes(data)


@dataclass
class Histories:
    """A source of given histories, live or not."""

    loaded: dict[tuple[str, Frequency], MarketHistory]
    name: str = "archive"
    live: bool = False
    unknown_assets: tuple[str, ...] = ()

    def frequencies(self):
        assets = dict.fromkeys(asset for asset, _ in self.loaded)
        return {a: tuple(f for f in Frequency if (a, f) in self.loaded) for a in assets}

    def load(self, asset, frequency):
        return LoadedHistory(history=self.loaded[asset, frequency], set_aside=())

    def now(self):
        return max(history.anchor_ts for history in self.loaded.values())


def truncated(archive, now, asset="BTC"):
    """The archive as it would have been at `now`."""
    return Histories(
        {
            (asset, f): archive.load(asset, f).history.known_at(now)
            for f in archive.frequencies()[asset]
        }
    )


# ---------------------------------------------------------------- the pure forecast


def test_a_forecast_depends_on_its_arguments_alone(archive, model_dir):
    models = load_model_set(published_sets(model_dir, "BTC", HF)[0])
    history = archive.load("BTC", HF).history
    request, now = ask(archive.now()), archive.now()

    def answer(seed):
        return forecast(request, history, models, None, now, np.random.default_rng(seed))

    one, two, other = answer(1), answer(1), answer(2)
    assert one.paths.tobytes() == two.paths.tobytes()
    assert one.diagnostics == two.diagnostics
    assert one.paths.tobytes() != other.paths.tobytes()


def test_a_forecast_without_any_price_is_refused(archive):
    history = archive.load("BTC", HF).history
    before = int(history.bars.open_ts[0])
    with pytest.raises(NoPriceError, match="BTC: no price is known at"):
        forecast(ask(before), history, None, None, before, np.random.default_rng(0))


def test_the_engine_answers_with_the_pure_forecast(engine, archive, model_dir):
    request = hour(engine)
    models = load_model_set(published_sets(model_dir, "BTC", HF)[0])
    pure = forecast(
        request,
        archive.load("BTC", HF).history,
        models,
        None,
        engine.now(),
        request_rng(0, request),
    )
    answer = engine.answer(request)
    assert answer.paths.tobytes() == pure.paths.tobytes()
    assert answer.diagnostics == pure.diagnostics


# ---------------------------------------------------------------- what may be asked


@pytest.mark.parametrize(
    ("increment", "length", "frequency"),
    [
        (60, 3600, HF),
        (300, 86_400, LF),
        (60, 6 * 3600, HF),
        (300, 48 * 3600, LF),
        (900, 24 * 3600, LF),
        (420, 7 * 3600, HF),
        (61, 61 * 50, HF),
        (1, 120, HF),
        (86_400, 8 * 86_400, LF),
    ],
)
def test_any_sane_increment_and_length_is_answered(shared_engine, increment, length, frequency):
    request = ask(shared_engine.now() + 60, increment=increment, length=length)
    answer = shared_engine.answer(request)
    assert answer.diagnostics.frequency == request_frequency(request).value == frequency.value
    assert answer.diagnostics.rung == Rung.LIGHTGBM.value
    assert_a_market(answer, length // increment + 1)


@pytest.mark.parametrize("minute", range(5))
def test_a_day_may_start_off_the_grid_of_five_minutes(shared_engine, minute):
    start = shared_engine.now() // 300 * 300 + 60 * minute
    answer = shared_engine.answer(ask(start, increment=300, length=86_400))
    assert answer.diagnostics.frequency == "lf"
    assert_a_market(answer, 289)


def test_the_largest_odd_prompt_takes_no_more_steps_than_bars_and_points(shared_engine):
    """61 s over a week: second by second it would be 600,000 steps."""
    answer = shared_engine.answer(
        ask(shared_engine.now() + 60, increment=61, length=61 * 9_999, num_paths=2)
    )
    assert_a_market(answer, 10_000)


@pytest.mark.parametrize("num_paths", [1, 2, 99, 100])
def test_few_paths_move_like_many(shared_engine, num_paths):
    answer = shared_engine.answer(hour(shared_engine, num_paths=num_paths))
    assert_a_market(answer, 61)
    sizes = np.abs(np.diff(np.log(answer.paths), axis=1))
    assert len(np.unique(sizes.round(12)[0])) > 25
    many = shared_engine.answer(hour(shared_engine, num_paths=1000))
    usual = np.abs(np.diff(np.log(many.paths), axis=1)).mean()
    assert 0.5 * usual < sizes.mean() < 2 * usual


def test_an_asset_with_bars_of_five_minutes_alone_answers_by_the_minute(shared_engine):
    answer = shared_engine.answer(hour(shared_engine, asset="XAU"))
    assert answer.diagnostics.frequency == "lf"
    assert answer.diagnostics.rung == Rung.PROFILE_EWMA.value
    assert answer.diagnostics.notes == ("no models were trained yet",)
    assert_a_market(answer, 61)
    five = shared_engine.answer(ask(shared_engine.now() + 60, asset="XAU", increment=300))
    ratio = (
        np.log(answer.paths[:, -1] / answer.paths[:, 0]).std()
        / np.log(five.paths[:, -1] / five.paths[:, 0]).std()
    )
    assert 0.5 < ratio < 2


def test_point_zero_is_a_forecast_of_the_price_a_minute_after_the_start(shared_engine):
    """Two minutes after the last close: point 0 differs between paths, by two bars' worth."""
    history = shared_engine.history("BTC", HF)
    answer = shared_engine.answer(ask(shared_engine.now() + 60, num_paths=1000))
    lead_in = np.log(answer.paths[:, 0] / history.anchor_price)
    step = np.diff(np.log(answer.paths[:, :6]), axis=1)
    assert lead_in.std() == pytest.approx(np.sqrt(2) * step.std(), rel=0.25)


def test_the_same_request_is_answered_with_the_same_bytes_and_another_with_others(engine):
    one, two = engine.answer(hour(engine)), engine.answer(hour(engine))
    assert one.paths.tobytes() == two.paths.tobytes()
    for changes in ({"num_paths": 51}, {"length": 3660}):
        assert engine.answer(hour(engine, **changes)).paths[0, 1] != one.paths[0, 1]


def test_an_asset_nobody_knows_is_refused(shared_engine):
    with pytest.raises(UnknownAsset, match="asset 'DOGE' is unknown; known are BTC"):
        shared_engine.answer(hour(shared_engine, asset="DOGE"))


def test_an_asset_that_is_not_served_is_refused(shared_engine):
    with pytest.raises(UnknownAsset, match="ETH has no bars here; this miner serves BTC, XAU"):
        shared_engine.answer(hour(shared_engine, asset="ETH"))
    with pytest.raises(UnknownAsset, match="XAU has no hf bars here"):
        shared_engine.history("XAU", HF)


@pytest.mark.parametrize(
    ("asset", "sentence"),
    [
        ("SPYX", "profile 2026-09 does not ask SPYX; served are BTC, XAU."),
        ("ETH", "this miner does not serve ETH; served are BTC, XAU."),
    ],
)
def test_a_live_miner_says_whether_it_or_its_profile_leaves_an_asset_out(asset, sentence):
    settings = Settings(source="venue", served_assets=("BTC", "XAU"))
    live = ForecastEngine(open_source(settings), settings)
    request = ForecastRequest(
        asset=asset, start_ts=live.now() // 60 * 60, increment_s=60, length_s=3600, num_paths=10
    )
    with pytest.raises(UnknownAsset, match=re.escape(sentence)):
        live.answer(request)


# ---------------------------------------------------------------- the past


@pytest.mark.parametrize(("frequency", "days"), [(HF, 1.3), (HF, 6), (LF, 1.3), (LF, 12)])
def test_an_origin_is_answered_with_what_was_known_then(engine, archive, settings, frequency, days):
    origin = engine.now() - round(days * DAY_S / 60) * 60
    request = ask(origin, increment=FREQUENCIES[frequency].prompt_increment_s, length=7200)
    engine.answer(hour(engine))  # states of later moments are at hand
    replayed = engine.answer(request, origin=origin)
    then = ForecastEngine.open(truncated(archive, origin), settings)
    assert then.now() == origin
    live = then.answer(request)
    assert replayed.paths.tobytes() == live.paths.tobytes()
    assert replayed.diagnostics == live.diagnostics


def test_replays_of_ever_earlier_moments_leave_no_state_each(archive, settings):
    engine, days = ForecastEngine.open(archive, settings), 4
    pair = ("BTC", HF)
    for hours in range(days * 24):
        origin = engine.now() - 3600 * hours
        engine.answer(ask(origin), origin=origin)
    kept = [state.until for state in engine._markets[pair].states]
    assert kept == sorted(kept)
    assert kept[-2] >= engine.now() - DAY_S  # replays of the last day go on from one of them
    assert 2 <= len(kept) <= 2 * days


def test_origins_in_any_order_give_the_same_answers(engine, archive, settings):
    end = engine.now()
    origins = [end - hours * 3600 for hours in (300, 3, 150, 30, 29, 149, 4, 301, 100)]
    mixed = {origin: engine.answer(ask(origin), origin=origin) for origin in origins}
    for origin in sorted(origins):
        fresh = ForecastEngine.open(archive, settings).answer(ask(origin), origin=origin)
        assert fresh.paths.tobytes() == mixed[origin].paths.tobytes(), origin


def test_an_origin_before_the_models_were_trained_says_so(shared_engine):
    end = shared_engine.now()
    early, late = (
        shared_engine.answer(ask(end - days * DAY_S), origin=end - days * DAY_S) for days in (5, 1)
    )
    assert early.diagnostics.models_saw_later_bars
    assert any("later than this moment" in note for note in early.diagnostics.notes)
    assert not late.diagnostics.models_saw_later_bars
    assert late.diagnostics.trained_until == end - 2 * DAY_S


@pytest.mark.parametrize("explicit", [True, False])
def test_a_moment_before_the_first_bar_is_refused_with_both_times(shared_engine, explicit):
    history = shared_engine.history("BTC", HF)
    moment = int(history.bars.open_ts[0])
    with pytest.raises(RequestError) as refusal:
        shared_engine.answer(ask(moment), origin=moment if explicit else None)
    name = "origin" if explicit else "start"
    assert str(refusal.value) == (
        f"{name} 2025-12-30T18:00:00+00:00 lies before the first usable bar of BTC, "
        f"which closed at 2025-12-30T18:01:00+00:00; ask for a later {name}."
    )


def test_the_first_minutes_of_all_have_an_answer(shared_engine):
    first = int(shared_engine.history("BTC", LF).price_bars.open_ts[0])
    for minutes in (1, 4, 5, 6, 40):
        moment = first + 60 * minutes
        request = ask(moment, increment=300, length=86_400)
        answer = shared_engine.answer(request, origin=moment)
        assert_a_market(answer, 289)
        expected = Rung.PRIOR if minutes < 5 else Rung.LIGHTGBM
        assert answer.diagnostics.rung == expected.value


def test_a_path_never_starts_before_the_last_known_price(archive):
    history = archive.load("BTC", HF).history
    with pytest.raises(RequestError, match="the path would start 3540 s before"):
        forecast(
            ask(archive.now() - 3600),
            history,
            None,
            None,
            archive.now(),
            np.random.default_rng(0),
        )


# ---------------------------------------------------------------- damaged and foreign models


def test_damaged_trees_cost_a_rung_and_are_said_once(archive, settings, own_models, caplog):
    (folder,) = published_sets(own_models, "BTC", HF)
    flip(folder / SCALE_MODEL)
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    warnings = [entry.getMessage() for entry in caplog.records]
    assert sum(SCALE_MODEL in warning for warning in warnings) == 1
    caplog.clear()
    for _ in range(3):
        engine.refresh()
        answer = engine.answer(hour(engine))
    assert caplog.records == []
    assert answer.diagnostics.rung == Rung.CALIBRATED_EWMA.value
    assert answer.diagnostics.notes == ("the LightGBM models are missing or damaged",)
    assert_a_market(answer, 61)
    assert engine.answer(day(engine)).diagnostics.rung == Rung.LIGHTGBM.value


@pytest.mark.parametrize("name", [MANIFEST, CALIBRATION])
def test_a_set_that_cannot_be_read_costs_two_rungs_and_is_named(
    archive, settings, own_models, caplog, name
):
    (folder,) = published_sets(own_models, "BTC", HF)
    flip(folder / name)
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    caplog.clear()
    for _ in range(3):
        engine.refresh()
        answer = engine.answer(hour(engine))
    assert caplog.records == []
    assert answer.diagnostics.rung == Rung.PROFILE_EWMA.value
    (note,) = answer.diagnostics.notes
    assert note.startswith(f"{folder / name} does not have the hash")
    assert ("BTC", HF) not in engine.trained()
    assert ("BTC", HF) in engine.due()


def test_a_damaged_pointer_is_one_note_and_the_models_in_memory_stay(
    archive, settings, own_models, caplog
):
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    before = engine.answer(hour(engine))
    (set_folder(own_models, "BTC", HF) / "current.json").write_text("{")
    for _ in range(3):
        engine.refresh()
    (warning,) = (entry.getMessage() for entry in caplog.records)
    assert warning.endswith("current.json is damaged; train BTC hf again or restore the file.")
    assert engine.answer(hour(engine)).paths.tobytes() == before.paths.tobytes()


def test_a_damaged_newest_set_is_rolled_back(archive, settings, own_models, trained):
    result = trained[HF]
    folder = publish_set(own_models, "BTC", HF, "newest", result.files)
    flip(folder / CALIBRATION)
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    answer = engine.answer(hour(engine))
    assert answer.diagnostics.rung == Rung.LIGHTGBM.value
    assert answer.diagnostics.model_id == result.model_id


def test_models_of_another_source_are_refused_with_a_note(settings, caplog):
    source = SimulatedSource(days=3, assets=("BTC",))
    engine = ForecastEngine.open(source, replace(settings, source="simulated"))
    answer = engine.answer(hour(engine))
    assert answer.diagnostics.rung == Rung.PROFILE_EWMA.value
    (note,) = answer.diagnostics.notes
    assert "were trained on source 'archive', not 'simulated'" in note
    assert engine.trained() == {}
    caplog.clear()
    engine.refresh()
    assert caplog.records == []


# ---------------------------------------------------------------- new models


def test_a_newly_published_set_is_taken_up_by_a_refresh(archive, settings, own_models, trained):
    for frequency in Frequency:
        shutil.rmtree(set_folder(own_models, "BTC", frequency))
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    assert engine.answer(hour(engine)).diagnostics.rung == Rung.PROFILE_EWMA.value
    result = trained[HF]
    publish_set(own_models, "BTC", HF, result.model_id, result.files)
    assert engine.answer(hour(engine)).diagnostics.rung == Rung.PROFILE_EWMA.value
    engine.refresh()
    answer = engine.answer(hour(engine))
    assert answer.diagnostics.rung == Rung.LIGHTGBM.value
    assert answer.diagnostics.model_id == result.model_id
    assert engine.trained() == {("BTC", HF): archive.now() - 2 * DAY_S}


def test_a_market_whose_state_the_disk_refuses_keeps_no_other_from_being_saved(
    archive, settings, monkeypatch
):
    engine = ForecastEngine.open(archive, settings)
    save, tried = StateStore.save, list[str]()

    def refuse_the_first(store, kind, name, schema, document):
        tried.append(name)
        if len(tried) == 1:
            raise StateError("the disk is full; free some space.")
        save(store, kind, name, schema, document)

    monkeypatch.setattr(StateStore, "save", refuse_the_first)
    engine.answer(hour(engine))
    engine.answer(day(engine))
    with pytest.raises(StateError, match="the disk is full"):
        engine.checkpoint()
    assert tried == ["archive/BTC_hf", "archive/BTC_lf"]
    assert (settings.state_dir / "market" / "archive" / "BTC_lf.msgpack").exists()


def test_a_set_whose_taking_up_failed_is_taken_up_by_the_next_refresh(
    archive, settings, own_models, trained, monkeypatch
):
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    old = engine._markets["BTC", HF].models
    publish_set(own_models, "BTC", HF, "newer", trained[HF].files)

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(forecast_engine, "prepare_drawing", out_of_memory)
        for _ in range(2):
            with pytest.raises(MemoryError):
                engine.refresh()
        assert engine._markets["BTC", HF].models is old
    engine.refresh()
    taken = engine._markets["BTC", HF].models
    assert taken is not old
    engine.refresh()
    assert engine._markets["BTC", HF].models is taken  # once


def test_a_set_that_was_repaired_under_its_own_name_is_taken_up(
    archive, settings, own_models, trained
):
    """Training on the same bars again gives the same name."""
    (folder,) = published_sets(own_models, "BTC", HF)
    flip(folder / SCALE_MODEL)
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    assert engine.answer(hour(engine)).diagnostics.rung == Rung.CALIBRATED_EWMA.value
    result = trained[HF]
    publish_set(own_models, "BTC", HF, result.model_id, result.files)
    engine.refresh()
    assert engine.answer(hour(engine)).diagnostics.rung == Rung.LIGHTGBM.value


def test_a_broken_newer_set_leaves_the_one_in_memory(archive, settings, own_models, trained):
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    before = engine.answer(hour(engine))
    for name in ("newer", "newest"):  # the one in memory is not even on disk any more
        folder = publish_set(own_models, "BTC", HF, name, trained[HF].files)
        flip(folder / MANIFEST)
    engine.refresh()
    after = engine.answer(hour(engine))
    assert after.paths.tobytes() == before.paths.tobytes()


@contextmanager
def unreadable(path, times=10**6):
    """The disk gives nothing of the file so many times; yields how often it was asked."""
    read, refused = Path.read_bytes, list[Path]()

    def refusing(at):
        if at == path and len(refused) < times:
            refused.append(at)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(at))
        return read(at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", refusing)
        yield refused


@pytest.mark.parametrize("name", [SCALE_MODEL, CALIBRATION, MANIFEST, "../current.json"])
def test_a_set_that_could_not_be_read_for_a_moment_is_taken_up_by_the_next_refresh(
    archive, settings, own_models, caplog, name
):
    (folder,) = published_sets(own_models, "BTC", HF)
    path = folder.parent / POINTER if name.startswith("..") else folder / name
    chosen = replace(settings, model_dir=own_models)
    with unreadable(path) as refused:
        engine = ForecastEngine.open(archive, chosen)
        for _ in range(3):
            engine.refresh()
            assert engine.answer(hour(engine)).diagnostics.rung != Rung.LIGHTGBM.value
    assert len(refused) > 2  # it goes on trying
    assert caplog.text.count(f"{path} cannot be read (Input/output error); it is tried again") == 1
    engine.refresh()
    answer = engine.answer(hour(engine))
    assert answer.diagnostics.rung == Rung.LIGHTGBM.value
    fresh = ForecastEngine.open(archive, replace(chosen, state_dir=settings.state_dir / "none"))
    assert answer.paths.tobytes() == fresh.answer(hour(fresh)).paths.tobytes()


@pytest.mark.parametrize("in_memory", [True, False])
def test_while_a_newer_set_cannot_be_read_the_one_before_answers(
    archive, settings, own_models, trained, in_memory
):
    chosen = replace(settings, model_dir=own_models)
    engine = ForecastEngine.open(archive, chosen) if in_memory else None
    folder = publish_set(own_models, "BTC", HF, "newest", trained[HF].files)
    with unreadable(folder / CALIBRATION) as refused:
        engine = engine or ForecastEngine.open(archive, chosen)
        for _ in range(3):
            engine.refresh()
            answer = engine.answer(hour(engine))
            assert answer.diagnostics.model_id == trained[HF].model_id
            assert answer.diagnostics.rung == Rung.LIGHTGBM.value
        assert len(refused) >= 3
    engine.refresh()
    assert load_model_set(folder).calibration is not None
    assert engine._markets["BTC", HF].publication == publication(own_models, "BTC", HF)


def test_a_set_without_trees_is_due(archive, settings, own_models):
    flip(published_sets(own_models, "BTC", HF)[0] / SCALE_MODEL)
    engine = ForecastEngine.open(
        archive, replace(settings, model_dir=own_models, hf_retrain_days=9)
    )
    assert ("BTC", HF) in engine.trained()
    assert ("BTC", HF) in engine.due()


# ---------------------------------------------------------------- cadence


@pytest.mark.parametrize(
    ("age_s", "due"),
    [
        (0, set()),
        (DAY_S - 60, set()),
        (DAY_S, {HF}),
        (3 * DAY_S - 300, {HF}),
        (3 * DAY_S, {HF, LF}),
    ],
)
def test_models_are_due_by_the_cadence(archive, settings, age_s, due):
    """HF every day, LF every third; the models end two days before the archive does."""
    until = archive.now() - 2 * DAY_S
    source = SimulatedSource(days=20, assets=("BTC",), end_ts=until + age_s)
    later = {("BTC", f): source.load("BTC", f).history for f in Frequency}
    engine = ForecastEngine.open(Histories(later), settings)
    assert set(engine.trained().values()) == {until}
    assert set(engine.due()) == {("BTC", frequency) for frequency in due}


def test_without_models_a_pair_is_due(shared_engine):
    assert ("XAU", LF) in shared_engine.due()


def test_without_a_new_bar_old_models_are_not_due(archive, settings):
    """A long weekend, or a file that ends before the others: nothing new would be learned."""
    until = archive.now() - 2 * DAY_S
    histories = truncated(archive, until).loaded
    histories["XAU", LF] = archive.load("XAU", LF).history
    engine = ForecastEngine.open(Histories(histories), settings)
    assert engine.now() - engine.trained()["BTC", HF] >= 2 * DAY_S - 3600
    assert engine.due() == (("XAU", LF),)


# ---------------------------------------------------------------- state


def test_a_restart_from_saved_state_gives_the_same_bytes(archive, settings):
    past = archive.now() - DAY_S
    first = ForecastEngine.open(truncated(archive, past), settings)
    first.checkpoint()
    saved = sorted(path.name for path in settings.state_dir.rglob("*.msgpack"))
    assert saved == ["BTC_hf.msgpack", "BTC_lf.msgpack"]
    restarted = ForecastEngine.open(archive, settings)
    fresh = ForecastEngine.open(archive, replace(settings, state_dir=settings.state_dir / "none"))
    for request in (hour(fresh), day(fresh)):
        one, two = restarted.answer(request), fresh.answer(request)
        assert one.paths.tobytes() == two.paths.tobytes()
        assert one.diagnostics == two.diagnostics


def test_a_saved_state_is_what_a_restart_goes_on_from(engine, archive, settings, monkeypatch):
    engine.checkpoint()
    monkeypatch.setattr(
        "market_view.first_state", lambda *_: pytest.fail("all history was read again")
    )
    restarted = ForecastEngine.open(archive, settings)
    assert (
        restarted.answer(hour(engine)).paths.tobytes()
        == engine.answer(hour(engine)).paths.tobytes()
    )


def test_a_reset_calibration_goes_on_from_neutral_and_past_moments_stay(
    archive, settings, monkeypatch
):
    def follows_outcomes(folder):
        models = load_model_set(folder)
        return replace(models, calibration=replace(models.calibration, controller_gain=1.0))

    monkeypatch.setattr("forecast_engine.load_model_set", follows_outcomes)
    before = ForecastEngine.open(archive, settings)
    earlier = before.now() - 2 * DAY_S
    past = before.answer(ask(earlier), origin=earlier).paths
    learnt = before.calibration("BTC", HF)
    assert max(abs(value - 1) for value in learnt.values()) > 1e-3
    before.checkpoint()
    assert f"{archive.name}/BTC_hf" in reset_calibration(settings.state_dir)
    after = ForecastEngine.open(archive, settings)
    assert set(after.calibration("BTC", HF).values()) == {1.0}
    assert after.answer(ask(earlier), origin=earlier).paths.tobytes() == past.tobytes()
    # It stays, whatever starts and stops.
    after.checkpoint()
    again = ForecastEngine.open(archive, settings)
    assert set(again.calibration("BTC", HF).values()) == {1.0}
    assert again.answer(hour(again)).paths.tobytes() == after.answer(hour(after)).paths.tobytes()
    assert again.answer(hour(again)).paths.tobytes() != before.answer(hour(before)).paths.tobytes()


def test_a_damaged_state_keeps_no_other_from_being_reset(archive, settings, caplog):
    ForecastEngine.open(archive, settings).checkpoint()
    flip(settings.state_dir / "market" / archive.name / "BTC_hf.msgpack")
    assert reset_calibration(settings.state_dir)
    assert "BTC_hf" in caplog.text
    assert f"{archive.name}/BTC_hf" not in reset_calibration(settings.state_dir)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_state_is_set_aside_and_the_answer_the_same(
    engine, archive, settings, caplog, damage
):
    before = engine.answer(hour(engine))
    engine.checkpoint()
    (path,) = settings.state_dir.rglob("BTC_hf.msgpack")
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    restarted = ForecastEngine.open(archive, settings)
    assert restarted.answer(hour(engine)).paths.tobytes() == before.paths.tobytes()
    assert sum("was set aside as" in entry.getMessage() for entry in caplog.records) == 1
    assert len(list(path.parent.glob("BTC_hf.msgpack.damaged-*"))) == 1
    restarted.checkpoint()
    assert path.exists()


def test_a_state_of_other_bars_is_not_used(engine, archive, settings):
    engine.checkpoint()
    histories = truncated(archive, archive.now()).loaded
    for key, history in histories.items():
        doubled = replace(history.price_bars, close=history.price_bars.close**1.5)
        bars = replace(history.bars, close=history.bars.close**1.5)
        histories[key] = replace(history, bars=bars, price_bars=doubled)
    with_state = ForecastEngine.open(Histories(histories), settings)
    without = ForecastEngine.open(
        Histories(histories), replace(settings, state_dir=settings.state_dir / "none")
    )
    request = hour(engine)
    assert with_state.answer(request).paths.tobytes() == without.answer(request).paths.tobytes()


def test_a_state_of_other_models_is_not_used(archive, settings, own_models, trained):
    settings = replace(settings, model_dir=own_models)
    ForecastEngine.open(archive, settings).checkpoint()
    files = dict(trained[HF].files)
    calibration = orjson.loads(files[CALIBRATION])
    calibration["standardiser"]["unit_bps"] *= 2  # other units: the averages do not fit
    files[CALIBRATION] = orjson.dumps(calibration)
    manifest = orjson.loads(files[MANIFEST])
    del manifest["sha256"]
    manifest["model_id"] = "other"
    manifest["files"][CALIBRATION] = digest(files[CALIBRATION])
    publish_set(own_models, "BTC", HF, "other", files | {MANIFEST: seal_manifest(manifest)})
    with_state = ForecastEngine.open(archive, settings)
    without = ForecastEngine.open(archive, replace(settings, state_dir=settings.state_dir / "none"))
    assert with_state.answer(hour(without)).diagnostics.model_id == "other"
    one, two = with_state.answer(hour(without)), without.answer(hour(without))
    assert one.paths.tobytes() == two.paths.tobytes()


def test_an_unusable_asset_does_not_stop_the_others(
    archive, archive_dir, settings, tmp_path, caplog
):
    folder = shutil.copytree(archive_dir, tmp_path / "archive")
    (folder / "ETH_1m.parquet").write_bytes(b"no parquet")
    engine = ForecastEngine.open(ArchiveSource(folder), settings)
    assert engine.assets() == ("BTC", "XAU")
    assert any("ETH_1m.parquet cannot be read" in entry.getMessage() for entry in caplog.records)


# ---------------------------------------------------------------- side by side


def test_answers_computed_side_by_side_equal_those_in_turn(archive, settings, engine):
    end = engine.now()
    asked = []
    for hours in (0, 5, 100, 40, 5, 200, 0, 41, 99, 3):
        origin = end - 3600 * hours
        asked += [(ask(origin), origin), (ask(origin, increment=300), origin)]
    alone = [engine.answer(request, origin=origin).paths for request, origin in asked]
    together = ForecastEngine.open(archive, settings)
    with ThreadPoolExecutor(6) as pool:
        refreshing = [pool.submit(together.refresh) for _ in range(2)]
        answers = list(pool.map(lambda pair: together.answer(pair[0], origin=pair[1]), asked))
        for task in refreshing:
            task.result()
    for one, answer in zip(alone, answers, strict=True):
        assert one.tobytes() == answer.paths.tobytes()


# ---------------------------------------------------------------- coherence


def sizes_of_steps(view, request):
    """Mean |step| over the paths, drift taken out, in units of the clock; (steps,)."""
    answer = draw(request, view, view.anchor_ts, np.random.default_rng(5))
    points = request.grid_ts + view.scored_lag_s
    steps = np.diff(1e4 * np.log(answer.paths), axis=1) - np.diff(centre_path(view, points))
    clock = np.diff(view.standardiser.profile.variance_time(points))
    return np.abs(steps).mean(axis=0) / (view.standardiser.unit_bps * np.sqrt(clock))


@pytest.mark.parametrize("frequency", list(Frequency))
def test_no_anchor_lead_shows_a_kink_of_volatility(archive, model_dir, frequency):
    """In a level market |step| is flat over all leads; in another it follows its levels."""
    spec = FREQUENCIES[frequency]
    models = load_model_set(published_sets(model_dir, "BTC", frequency)[0])
    history = archive.load("BTC", frequency).history
    view, _ = view_with_models(models, history, first_state(models, history))
    # A centre that turns at every anchor must not show in the volatility.
    turns = dict(zip(spec.leads_s, np.linspace(-0.1, 0.3, len(spec.leads_s)), strict=True))
    request = ask(
        history.anchor_ts, increment=spec.bar_s, length=spec.prompt_length_s, num_paths=1000
    )
    level = replace(view, log_levels=np.zeros(len(spec.bucket_ends)), centre=turns)
    flat = sizes_of_steps(level, request)
    assert flat.mean() == pytest.approx(1, abs=0.02)
    assert np.abs(flat - 1).max() < 0.06
    rising = np.linspace(-0.4, 0.4, len(spec.bucket_ends))
    risen = sizes_of_steps(replace(level, log_levels=rising), request)
    lead = np.arange(1.0, len(risen) + 1) + view.scored_lag_s / spec.bar_s
    assert np.abs(risen / level_at(spec, rising, lead) - 1).max() < 0.06


@pytest.mark.parametrize("frequency", list(Frequency))
def test_the_spread_grows_like_the_sum_of_its_steps(shared_engine, frequency):
    """Not like noise around the centre, whose spread stays where it began."""
    spec = FREQUENCIES[frequency]
    request = ask(
        shared_engine.now(),
        increment=spec.bar_s,
        length=spec.prompt_length_s,
        num_paths=1000,
    )
    log_paths = np.log(shared_engine.answer(request).paths)
    steps = np.diff(log_paths, axis=1)
    for share in (4, 2, 1):
        points = steps.shape[1] // share
        spread = (log_paths[:, points] - log_paths[:, 0]).std()
        theory = np.sqrt((steps[:, :points].std(axis=0) ** 2).sum())
        assert spread == pytest.approx(theory, rel=0.12)


def test_the_centre_passes_through_its_anchors_in_units_of_scale(archive, model_dir):
    models = load_model_set(published_sets(model_dir, "BTC", HF)[0])
    history = archive.load("BTC", HF).history
    view, _ = view_with_models(models, history, first_state(models, history))
    view = replace(view, centre={60: 0.1, 300: 0.2, 3600: -0.3})
    leads = np.array([60, 300, 3600])
    points = view.anchor_ts + leads
    clock = view.standardiser.profile.variance_time(np.concatenate(([view.anchor_ts], points)))[1:]
    expected = view.standardiser.unit_bps * view.level * np.sqrt(clock) * [0.1, 0.2, -0.3]
    np.testing.assert_allclose(centre_path(view, points), expected)
    beyond = centre_path(view, view.anchor_ts + np.array([3600, 7200, 86_400]))
    np.testing.assert_allclose(beyond, expected[-1])


# ---------------------------------------------------------------- bars that grow


@dataclass
class Growing(Histories):
    """Histories that a test changes while an engine reads them."""

    live: bool = True
    served: tuple[str, ...] = ("BTC",)
    clock: int | None = None  # None: the end of the bars

    def now(self):
        return super().now() if self.clock is None else self.clock

    def frequencies(self):
        return dict.fromkeys(self.served, (HF, LF))

    def recent(self, asset, frequency):
        return self.loaded.get((asset, frequency))

    def become(self, other):
        self.loaded = dict(other.loaded)


def growing(archive, now):
    return Growing(truncated(archive, now).loaded)


def test_a_market_is_taken_up_when_it_is_first_asked_for(archive, settings):
    """So that the first answer after a start does not wait for all the others."""
    source = growing(archive, archive.now())
    engine = ForecastEngine(source, settings)
    assert engine.assets() == ()
    request = ask(source.now() + 60)
    answer = engine.answer(request)
    assert engine.trained().keys() == {("BTC", HF)}
    opened = ForecastEngine.open(source, settings)
    assert answer.paths.tobytes() == opened.answer(request).paths.tobytes()
    assert engine.history("BTC", LF) is source.loaded["BTC", LF]
    assert engine.trained().keys() == opened.trained().keys()


def test_markets_keep_the_order_of_the_source_whatever_is_asked_first(archive, settings):
    source = growing(archive, archive.now())
    engine = ForecastEngine(source, settings)
    engine.history("BTC", LF)
    engine.refresh()
    assert list(engine.trained()) == [("BTC", HF), ("BTC", LF)]


def test_a_market_asked_for_from_many_threads_at_once_is_taken_up_once(archive, settings):
    source = growing(archive, archive.now())
    engine = ForecastEngine(source, settings)
    request = ask(source.now() + 60)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(engine.answer, request) for _ in range(8)]
        assert len({task.result().paths.tobytes() for task in answers}) == 1
    assert list(engine.trained()) == [("BTC", HF)]


@dataclass
class Failing(Growing):
    """A source of which a market can fail."""

    failures: dict[tuple[str, Frequency], Exception] = field(default_factory=dict)

    def recent(self, asset, frequency):
        if (asset, frequency) in self.failures:
            raise self.failures[asset, frequency]
        return super().recent(asset, frequency)


@pytest.mark.parametrize(
    "failure", [UnreadableState("it cannot be listed; look."), ZeroDivisionError("a bug")]
)
def test_a_market_that_cannot_be_brought_up_holds_up_no_other_and_is_logged_once(
    archive, settings, caplog, failure
):
    caplog.set_level(logging.INFO, logger="forecast_engine")
    end = archive.now() // 300 * 300
    source = Failing(truncated(archive, end - 3600).loaded)
    engine = ForecastEngine.open(source, settings)
    source.failures["BTC", HF] = failure
    for left in (1800, 900, 0):
        source.become(truncated(archive, end - left))
        engine.refresh()
        assert engine.history("BTC", LF).anchor_ts == end - left
        assert engine.history("BTC", HF).anchor_ts == end - 3600
        assert_a_market(engine.answer(hour(engine)), 61)
    assert caplog.text.count("market not refreshed") == 1
    source.failures.clear()
    engine.refresh()
    assert engine.history("BTC", HF).anchor_ts == end
    assert caplog.text.count("market refreshed again") == 1


def test_a_market_whose_models_cannot_be_looked_at_holds_up_no_other(
    archive, settings, own_models, trained, monkeypatch, caplog
):
    engine = ForecastEngine.open(archive, replace(settings, model_dir=own_models))
    for frequency in Frequency:
        publish_set(own_models, "BTC", frequency, "newest", trained[frequency].files)

    def refused(model_dir, asset, frequency):
        if frequency is HF:
            raise ZeroDivisionError("a bug")
        return published_sets(model_dir, asset, frequency)

    monkeypatch.setattr("forecast_engine.published_sets", refused)
    for _ in range(3):
        engine.refresh()
    assert engine._markets["BTC", LF].publication == publication(own_models, "BTC", LF)
    assert caplog.text.count("market not refreshed") == 1
    assert_a_market(engine.answer(hour(engine)), 61)


def assert_as_if_opened_now(engine, source, settings):
    """The engine answers with the bytes of one that has read all bars afresh."""
    fresh = ForecastEngine.open(source, replace(settings, state_dir=settings.state_dir / "none"))
    for request in (hour(fresh), day(fresh)):
        one, two = engine.answer(request), fresh.answer(request)
        assert one.paths.tobytes() == two.paths.tobytes()
        assert one.diagnostics == two.diagnostics


def corrected(history, closed_at, factor=1.003):
    """The history with the bar that closed then corrected, in both kinds of bars."""

    def changed(bars):
        return replace(bars, close=np.where(bars.close_ts == closed_at, factor, 1) * bars.close)

    return replace(history, bars=changed(history.bars), price_bars=changed(history.price_bars))


def test_bars_that_come_are_taken_up_and_the_answers_are_those_of_a_fresh_start(archive, settings):
    end = archive.now() // 300 * 300
    source = growing(archive, end - 1800)
    engine = ForecastEngine.open(source, settings)
    for left in (1740, 1500, 1500, 600, 0):
        source.become(truncated(archive, end - left))
        engine.refresh()
        assert engine.now() == end - left
    assert_as_if_opened_now(engine, source, settings)


def test_a_corrected_bar_changes_the_answers_into_those_of_a_fresh_start(archive, settings):
    source = growing(archive, archive.now())
    engine = ForecastEngine.open(source, settings)
    request = hour(engine)
    before, past = engine.answer(request), engine.now() - 2 * DAY_S
    replayed = engine.answer(ask(past), origin=past)
    at = engine.now() - 3600
    source.loaded = {key: corrected(history, at) for key, history in source.loaded.items()}
    engine.refresh()
    assert engine.answer(request).paths.tobytes() != before.paths.tobytes()
    assert_as_if_opened_now(engine, source, settings)
    assert engine.answer(ask(past), origin=past).paths.tobytes() == replayed.paths.tobytes()


def test_a_bar_that_fills_a_gap_changes_the_answers_too(archive, settings):
    source = growing(archive, archive.now())
    whole = dict(source.loaded)
    gap = archive.now() - 7200

    def without(bars):
        return replace_rows(bars, bars.close_ts != gap)

    source.loaded = {
        key: replace(h, bars=without(h.bars), price_bars=without(h.price_bars))
        for key, h in whole.items()
    }
    engine = ForecastEngine.open(source, settings)
    source.loaded = whole
    engine.refresh()
    assert_as_if_opened_now(engine, source, settings)


def replace_rows(bars, keep):
    columns = ("open_ts", "open", "high", "low", "close", "volume")
    return replace(bars, **{name: getattr(bars, name)[keep] for name in columns})


def test_dropping_the_oldest_days_from_memory_changes_no_answer(archive, settings):
    end = archive.now()
    source = growing(archive, end - 3600)
    engine, kept = ForecastEngine.open(source, settings), ForecastEngine.open(archive, settings)
    source.become(truncated(archive, end))
    first = (end // DAY_S - 13) * DAY_S
    source.loaded = {
        key: replace(
            h, bars=h.bars.between(first, None), price_bars=h.price_bars.between(first, None)
        )
        for key, h in source.loaded.items()
    }
    engine.refresh()
    request = hour(kept)
    assert engine.answer(request).paths.tobytes() == kept.answer(request).paths.tobytes()


def test_an_asset_appears_with_its_first_bar_and_is_refused_without_a_price_until_then(
    archive, settings
):
    source = Growing({}, clock=archive.now())
    engine = ForecastEngine.open(source, settings)
    assert engine.assets() == ()
    with pytest.raises(NoPriceError, match="no price of BTC is known yet; wait until"):
        engine.answer(ask(archive.now()))
    with pytest.raises(UnknownAsset):
        engine.answer(ask(archive.now(), asset="XAU"))
    source.become(truncated(archive, archive.now()))
    engine.refresh()
    assert engine.assets() == ("BTC",)
    assert_a_market(engine.answer(hour(engine)), 61)


def test_answers_during_a_refresh_see_the_old_bars_or_the_new_ones(archive, settings):
    end = archive.now()
    source = growing(archive, end)
    plain = source.loaded
    other = {key: corrected(history, end - 600) for key, history in plain.items()}
    engine = ForecastEngine.open(source, settings)
    request = hour(engine)
    expected = {
        ForecastEngine.open(Growing(loaded), settings).answer(request).paths.tobytes()
        for loaded in (plain, other)
    }
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(engine.answer, request) for _ in range(6)]
        for loaded in (other, plain, other):
            source.loaded = loaded
            engine.refresh()
        asked += [pool.submit(engine.answer, request) for _ in range(3)]
        assert {task.result().paths.tobytes() for task in asked} <= expected
    assert_as_if_opened_now(engine, source, settings)


def test_a_saved_state_of_bars_that_were_corrected_since_is_not_used(archive, settings):
    source = growing(archive, archive.now())
    engine = ForecastEngine.open(source, settings)
    engine.checkpoint()
    at = engine.now() - 3600
    source.loaded = {key: corrected(history, at) for key, history in source.loaded.items()}
    assert_as_if_opened_now(ForecastEngine.open(source, settings), source, settings)


def test_states_of_earlier_schemas_are_read(engine, archive, settings, caplog, monkeypatch):
    engine.checkpoint()
    store = StateStore(settings.state_dir)
    document = store.load("market", "archive/BTC_hf", STATE_SCHEMA)
    assert document is not None
    newest = document["states"][-1]
    request = hour(engine)
    expected = engine.answer(request).paths.tobytes()
    caplog.clear()

    second = {name: value for name, value in newest.items() if name != "bars"}
    store.save("market", "archive/BTC_hf", 2, {**second, "last_bar": ["archive:BTC_1m", 1.0]})
    assert ForecastEngine.open(archive, settings).answer(request).paths.tobytes() == expected

    store.save("market", "archive/BTC_hf", 3, newest)
    monkeypatch.setattr("market_view.first_state", lambda *_: pytest.fail("all was read again"))
    assert ForecastEngine.open(archive, settings).answer(request).paths.tobytes() == expected
    assert caplog.records == []


def test_a_restart_with_fewer_days_in_memory_repeats_what_was_said_of_the_last_day(
    archive, settings
):
    """Over midnight the window of bars in memory moves: averages begin elsewhere."""
    end = archive.now()
    source = growing(archive, end - 3 * DAY_S)
    engine = ForecastEngine.open(source, settings)
    for left in range(3 * 24, -1, -1):
        source.become(truncated(archive, end - left * 3600))
        engine.refresh()
    engine.checkpoint()
    start = int(source.loaded["BTC", HF].bars.open_ts[0]) + DAY_S
    source.loaded = {key: since(history, start) for key, history in source.loaded.items()}
    restarted = ForecastEngine.open(source, settings)
    for age in (0, 6 * 3600, DAY_S):
        origin = end - age
        request = ask(origin + 60)
        before = engine.answer(request, origin=origin)
        assert restarted.answer(request, origin=origin).paths.tobytes() == before.paths.tobytes()


def since(history, start):
    """The history without the bars before a moment."""
    bars, prices = (part.between(start, None) for part in (history.bars, history.price_bars))
    return replace(history, bars=bars, price_bars=prices)


def minute_history(closes):
    """A history of some minutes, by number, with their closes."""
    numbers = sorted(closes)
    column = np.array([closes[number] for number in numbers], dtype=np.float64)
    bars = Bars(
        open_ts=60 * np.array(numbers, dtype=np.int64),
        open=column,
        high=column,
        low=column,
        close=column,
        volume=np.full(len(numbers), np.nan),
        bar_s=60,
        feed="test",
    )
    return MarketHistory(asset="BTC", frequency=HF, bars=bars, price_bars=bars, source="test")


CLOSES = st.dictionaries(st.integers(0, 12), st.sampled_from([1.0, 2.0]), min_size=1)


@given(CLOSES, CLOSES)
def test_the_first_change_is_the_first_bar_that_differs(old, new):
    first, last = min(new), max(old)
    different = [number for number in range(first, last + 1) if old.get(number) != new.get(number)]
    found = first_change(minute_history(old), minute_history(new))
    assert found == (60 * different[0] + 60 if different else None)


# ---------------------------------------------------------------- a newer price than the last bar


@pytest.fixture(scope="module", params=list(Frequency))
def view(request, archive, model_dir):
    models = load_model_set(published_sets(model_dir, "BTC", request.param)[0])
    history = archive.load("BTC", request.param).history
    return view_with_models(models, history, first_state(models, history))[0]


def prompt(view, num_paths=1000):
    spec = view.spec
    return ask(
        view.anchor_ts + 120,
        increment=spec.prompt_increment_s,
        length=spec.prompt_length_s,
        num_paths=num_paths,
    )


def later(view, seconds, price=None):
    price = view.anchor_price if price is None else price
    return Anchor(
        price=price, ts=view.anchor_ts + seconds, feed="binance:BTCUSDT", source=AnchorSource.QUOTE
    )


def test_an_anchor_at_the_last_bar_gives_the_same_bytes_as_none(view):
    def paths(anchor):
        return draw(prompt(view), view, 0, np.random.default_rng(1), anchor).paths.tobytes()

    assert paths(later(view, 0)) == paths(None)


@pytest.mark.parametrize("seconds", [1, 47, 90, 170])
def test_the_variance_from_anchor_to_point_is_what_the_bar_leaves_after_it(view, seconds):
    """Against the bar's own scale curve, cut into single seconds."""
    view = replace(
        view,
        centre={},
        shape=replace(STARTING_SHAPES[view.spec.frequency], path_sd=0.0, slow_sd=0.0),
        log_levels=np.linspace(-0.5, 0.5, len(view.log_levels)),
    )
    request = prompt(view)
    first = int(request.grid_ts[0]) + view.scored_lag_s
    since = np.arange(view.anchor_ts, first + 1)
    seconds_scale = step_scales(view.spec, view.standardiser, view.log_levels, since)
    expected = np.sqrt((seconds_scale[seconds:] ** 2).sum())
    anchor = later(view, seconds, price=1.0)
    sizes = [
        np.abs(np.log(draw(request, view, 0, np.random.default_rng(k), anchor).paths[:, 0])).mean()
        for k in range(12)
    ]
    # 12,000 draws of a size whose deviation is about its mean: 1 % is one standard error.
    assert 1e4 * np.mean(sizes) == pytest.approx(expected, rel=0.035)


@pytest.mark.parametrize("seconds", [1, 90])
def test_what_comes_after_point_0_is_as_uncertain_as_without_the_quote(view, seconds):
    def steps(anchor):
        paths = draw(prompt(view), view, 0, np.random.default_rng(3), anchor).paths
        return np.diff(np.log(paths), axis=1)

    np.testing.assert_allclose(steps(later(view, seconds)), steps(None), atol=1e-12)


def test_of_the_centre_only_what_lies_after_the_quote_is_still_expected(view):
    turns = dict(
        zip(view.spec.leads_s, np.linspace(0.2, -0.3, len(view.spec.leads_s)), strict=True)
    )
    silent = np.full(len(view.log_levels), -40.0)
    view = replace(view, centre=turns, log_levels=silent)
    request = prompt(view, num_paths=2)
    anchor = later(view, 90, price=50.0)
    points = request.grid_ts + view.scored_lag_s
    moves = centre_path(view, points) - centre_path(view, np.array([anchor.ts]))
    answer = draw(request, view, 0, np.random.default_rng(0), anchor)
    np.testing.assert_allclose(answer.paths[0], 50 * np.exp(moves / 1e4), rtol=1e-9)


def test_an_answer_starts_from_the_freshest_price_and_says_so(archive, settings):
    plans = feed_plans("venue", protocol_profile("2026-09"))
    board = PriceBoard(plans)
    now = archive.now()
    source = growing(archive, now - 180)
    source.clock = now
    engine = ForecastEngine.open(source, settings, board)
    plain = ForecastEngine.open(source, settings)
    request = ask(now)
    one, two = engine.answer(request), plain.answer(request)
    assert one.paths.tobytes() == two.paths.tobytes()
    assert one.diagnostics.anchor_source == two.diagnostics.anchor_source == "last_bar"
    price = 1.01 * one.diagnostics.anchor_price
    board.post("BTC", PriceQuote(price=price, ts=now - 7, feed="binance:BTCUSDT"))
    quoted = engine.answer(request)
    told = quoted.diagnostics
    assert (told.anchor_source, told.anchor_feed) == ("quote", "binance:BTCUSDT")
    assert (told.anchor_price, told.anchor_ts, told.price_age_s) == (price, now - 7, 7)
    assert np.median(quoted.paths[:, 0]) == pytest.approx(price, rel=1e-3)
    assert engine.answer(request, origin=now - 180).diagnostics.anchor_source == "last_bar"


def test_what_is_told_of_the_price_is_what_an_answer_starts_from(archive, settings):
    board = PriceBoard(feed_plans("venue", protocol_profile("2026-09")))
    source = growing(archive, archive.now() - 1800)
    source.clock = now = archive.now()
    engine = ForecastEngine.open(source, settings, board)
    bar = engine.history("BTC", HF)

    def agreed():
        told = engine.answer(ask(now)).diagnostics
        anchor, other = (engine.anchor("BTC", frequency) for frequency in Frequency)
        assert anchor is not None
        assert anchor == other
        assert (anchor.price, anchor.ts) == (told.anchor_price, told.anchor_ts)
        assert (anchor.feed, anchor.source) == (told.anchor_feed, told.anchor_source)
        return anchor.source, now - anchor.ts, now - engine.scored_ts("BTC", HF)

    assert agreed() == (AnchorSource.LAST_BAR, 1800, 1800)
    wild = PriceQuote(price=10 * bar.anchor_price, ts=now - 7, feed="binance:BTCUSDT")
    board.post("BTC", wild)
    assert agreed() == (AnchorSource.LAST_BAR, 1800, 7)
    second = PriceQuote(price=bar.anchor_price, ts=now - 44, feed="pyth:Crypto.BTC/USD")
    board.post("BTC", second)
    assert agreed() == (AnchorSource.SECOND_SOURCE, 44, 7)


def test_nothing_is_told_of_a_price_that_is_not_known(archive, settings):
    source = Growing({}, clock=archive.now())
    board = PriceBoard(feed_plans("venue", protocol_profile("2026-09")))
    engine = ForecastEngine.open(source, settings, board)
    assert engine.served() == {"BTC": (HF, LF)}
    assert engine.held("BTC", HF) is None
    assert engine.anchor("BTC", HF) is None
    assert engine.scored_ts("BTC", HF) is None
    board.post("BTC", PriceQuote(price=1.0, ts=archive.now() - 5, feed="binance:BTCUSDT"))
    assert engine.anchor("BTC", HF) is None  # a quote alone is not answered from
    assert engine.scored_ts("BTC", HF) == archive.now() - 5


def test_looking_at_a_market_does_not_take_it_up(archive, settings):
    """A health check at the start must not keep the first answer waiting."""
    engine = ForecastEngine(growing(archive, archive.now()), settings)
    assert engine.held("BTC", HF) is None
    assert engine.anchor("BTC", HF) is None
    assert engine.assets() == ()


@pytest.mark.parametrize("age_s", [OLD_AT_START_S, OLD_AT_START_S + 60])
def test_an_old_price_is_noted_the_same_whenever_it_is_asked_for(archive, settings, age_s):
    end = archive.now()
    source = growing(archive, end)
    engine = ForecastEngine.open(source, settings)
    told = set()
    for asked_at in (end, end + age_s - 60, end + age_s):
        source.clock = asked_at
        told.add(encode_shadow_answer(engine.answer(ask(end + age_s))))
    (answer,) = told
    diagnostics = orjson.loads(answer)["diagnostics"]
    assert diagnostics["anchor_age_s"] == age_s
    noted = "the price is already 4 minutes old at the start" in diagnostics["notes"]
    assert noted is (age_s > OLD_AT_START_S)


def test_a_replay_tells_the_age_of_its_price_the_same_now_and_later(archive, settings):
    end = archive.now()
    source = growing(archive, end)
    engine = ForecastEngine.open(source, settings)
    request = ask(end - 600)
    told = set()
    for clock in (end, end + 3600):
        source.clock = clock
        told.add(encode_shadow_answer(engine.answer(request, origin=end - 600)))
    assert len(told) == 1
    assert orjson.loads(told.pop())["diagnostics"]["anchor_age_s"] == 0
