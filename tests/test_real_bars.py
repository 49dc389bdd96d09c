"""On bars of real markets: what is trained, answered and promised of them."""

from datetime import UTC, datetime

import numpy as np
import pytest

from config import DAY_S, FREQUENCIES, Frequency, asset_spec
from data_fetcher import ArchiveSource
from domain import ForecastRequest
from features import return_grid
from forecast_engine import ForecastEngine
from lgbm_trainer import train
from market_view import Rung
from model_store import publish_set
from protocol import protocol_profile
from settings import Settings
from training_rows import prepare_market

HF, LF = Frequency.HF, Frequency.LF
PROFILE = protocol_profile("2026-09")
DECEMBER = int(datetime(2025, 12, 1, tzinfo=UTC).timestamp())


@pytest.fixture(scope="module")
def recent(real_bars):
    return ArchiveSource(real_bars / "recent")


@pytest.fixture
def engine_over(tmp_path):
    """Publish trained sets and open an engine over them and a source."""

    def build(source, *results):
        for result in results:
            publish_set(
                tmp_path / "models", result.asset, result.frequency, result.model_id, result.files
            )
        settings = Settings(
            source="archive", model_dir=tmp_path / "models", state_dir=tmp_path / "state"
        )
        return ForecastEngine.open(source, settings)

    return build


def only(source, *pairs):
    """The source as if it held these pairs alone, so that nothing else is read."""

    class Part:
        name, live, unknown_assets = source.name, source.live, ()
        load = staticmethod(source.load)

        @staticmethod
        def frequencies():
            assets = dict.fromkeys(asset for asset, _ in pairs)
            return {name: tuple(f for a, f in pairs if a == name) for name in assets}

        @staticmethod
        def now():
            return max(source.load(*pair).history.anchor_ts for pair in pairs)

    return Part()


def ask(asset, start, frequency, num_paths=1000):
    spec = FREQUENCIES[frequency]
    return ForecastRequest(
        asset=asset,
        start_ts=start,
        increment_s=spec.prompt_increment_s,
        length_s=spec.prompt_length_s,
        num_paths=num_paths,
    )


def assert_a_market(answer):
    assert np.isfinite(answer.paths).all()
    assert answer.paths.min() > 0
    assert (np.diff(answer.paths, axis=1).std(axis=1) > 0).all()


# ---------------------------------------------------------------- the spread of a day


def theory(view, history, times):
    """√(EWMA of squared standardised returns, one day) × clock: the textbook's spread, bps."""
    z = view.standardiser.apply(return_grid(history.bars.between(times[0] - 10 * DAY_S, None)))
    weight = 0.5 ** (np.arange(len(z))[::-1] / 288) * np.isfinite(z)
    level = np.sqrt((weight * np.nan_to_num(z) ** 2).sum() / weight.sum())
    clock = view.standardiser.profile.variance_time(times)
    return view.standardiser.unit_bps * level * np.sqrt(clock[-1])


@pytest.mark.usefixtures("quick_search")
def test_btc_spreads_over_a_day_as_profile_and_ewma_say(recent, engine_over):
    """20 moments of December 2025, with models that end where it begins."""
    history = recent.load("BTC", LF).history
    result = train(history.known_at(DECEMBER), days=40, seed=0, profile=PROFILE)
    engine = engine_over(only(recent, ("BTC", LF)), result)
    moments = DECEMBER + 300 * np.sort(np.random.default_rng(3).integers(0, 17 * 288, 20))
    day, five_minutes = [], []
    for moment in moments.tolist():
        request = ask("BTC", moment, LF)
        answer = engine.answer(request, origin=moment)
        assert answer.diagnostics.rung == Rung.LIGHTGBM.value
        assert not answer.diagnostics.models_saw_later_bars
        view = engine._markets["BTC", LF].views[moment, moment]
        expected = theory(view, history.known_at(moment), request.grid_ts)
        log_paths = 1e4 * np.log(answer.paths)
        day.append((log_paths[:, -1] - log_paths[:, 0]).std() / expected)
        # the 288 steps of five minutes have this variance together
        steps = np.diff(log_paths, axis=1)
        five_minutes.append(np.sqrt((steps.std(axis=0) ** 2).sum()) / expected)
    assert len(day) == 20
    assert 0.75 < min(day) <= max(day) < 1.25, np.round(day, 2)
    assert np.mean(five_minutes) == pytest.approx(1, abs=0.1), np.round(five_minutes, 2)
    # noise around the centre would keep the day's spread at the step's, 17 times too small
    assert np.allclose(np.array(day) / np.array(five_minutes), 1, atol=0.1)


# ---------------------------------------------------------------- training


@pytest.mark.usefixtures("quick_search")
def test_btc_by_the_minute_trains_loads_and_answers(recent, engine_over):
    history = recent.load("BTC", HF).history.known_at(DECEMBER)
    result = train(history, days=20, seed=0, profile=PROFILE)
    first = result.leads[0]
    assert first.scale_skill > 0.005  # better than one EWMA, out of sample
    assert sum(lead.rows for lead in result.leads) > 25_000
    engine = engine_over(only(recent, ("BTC", HF)), result)
    for days in (0.3, 3, 11):
        moment = DECEMBER + round(days * DAY_S / 60) * 60
        answer = engine.answer(ask("BTC", moment, HF), origin=moment)
        assert answer.diagnostics.rung == Rung.LIGHTGBM.value
        assert_a_market(answer)
        spread = 1e4 * np.log(answer.paths[:, -1] / answer.paths[:, 0]).std()
        assert 10 < spread < 150  # bps in an hour
    assert ("BTC", HF) in engine.due()


@pytest.mark.usefixtures("quick_search")
@pytest.mark.parametrize("frequency", list(Frequency))
def test_a_young_asset_is_trained_with_a_warning(real_bars, engine_over, frequency):
    source = ArchiveSource(real_bars / "short")
    history = source.load("WTIOIL", frequency).history
    result = train(history, days=365, seed=0, profile=PROFILE)
    (warning,) = result.warnings
    assert f"WTIOIL {frequency.value}: trained on only 1" in warning
    engine = engine_over(only(source, ("WTIOIL", frequency)), result)
    answer = engine.answer(ask("WTIOIL", engine.now(), frequency))
    assert answer.diagnostics.rung == Rung.LIGHTGBM.value
    assert_a_market(answer)
    # within a factor of what its EWMA alone would say, young as it is
    (view,) = engine._markets["WTIOIL", frequency].views.values()
    assert np.abs(view.log_levels - np.log(view.level)).max() < 1.5


# ---------------------------------------------------------------- features

FOLDERS = {"SP500": ("recent", LF), "AAPLX": ("recent", LF), "BTC": ("year-2019", HF)}


@pytest.mark.parametrize("asset", FOLDERS)
def test_sessions_and_gaps_give_finite_features_and_targets(real_bars, asset):
    folder, frequency = FOLDERS[asset]
    history = ArchiveSource(real_bars / folder).load(asset, frequency).history
    bars = history.bars.between(history.bars.end_ts - 30 * DAY_S, None)
    grid = return_grid(bars)
    missing = np.mean(grid.span == 0)
    assert missing > (0.6 if frequency is LF else 0.005)  # nights; minutes without trades
    spec = FREQUENCIES[frequency]
    market = prepare_market(
        spec, grid, grid.part(0, 0), asset_spec(asset).hours, train_end=len(grid)
    )
    assert np.isfinite(market.frame.shared).all()
    assert np.isfinite(market.frame.by_bucket).all()
    assert market.frame.level.min() > 0
    known = np.isfinite(market.targets)
    assert (known.mean(axis=1) > 0.05).all()  # every bucket can be learned
    assert market.targets[known].min() >= 0
    assert np.nanmean(np.abs(market.z)) == pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("quick_search")
def test_a_session_market_answers_over_night_and_weekend(recent, engine_over):
    history = recent.load("SP500", LF).history
    result = train(history.known_at(DECEMBER), days=60, seed=0, profile=PROFILE)
    engine = engine_over(only(recent, ("SP500", LF)), result)
    friday_evening = int(datetime(2025, 12, 5, 22, tzinfo=UTC).timestamp())
    monday_noon = int(datetime(2025, 12, 8, 16, tzinfo=UTC).timestamp())
    spreads = {}
    for moment in (friday_evening, friday_evening + DAY_S, monday_noon):
        answer = engine.answer(ask("SP500", moment, LF), origin=moment)
        assert_a_market(answer)
        spreads[moment] = 1e4 * np.log(answer.paths[:, -1] / answer.paths[:, 0]).std()
    # the day from Friday evening has no session in it, the one from Monday noon has
    assert spreads[friday_evening] < spreads[monday_noon]
    assert 20 < spreads[monday_noon] < 300
