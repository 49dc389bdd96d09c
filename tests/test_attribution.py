"""Losses of planted defects: the right part is blamed, in the right direction."""

from dataclasses import replace

import numpy as np
import pytest

import attribution
import quantile_matching
from attribution import DISPERSIONS, DRIFTS, FACTORS, STEPS, TAILS, Occasion, Part, attribute
from config import DAY_S, Frequency
from domain import Bars, ForecastRequest, MarketHistory
from errors import DataError
from forecast_engine import draw, request_rng
from market_view import prior_view
from protocol import protocol_profile
from scoring import score_paths

HOUR = protocol_profile("2026-09").competitions["crypto-1h"]
# Three of the intervals that fit into a quarter of an hour; the whole score takes long.
COMPETITION = replace(
    HOUR,
    intervals=tuple(i for i in HOUR.intervals if i.name in ("1min", "5min", "60min_abs")),
    volatility_weights=(),
)
START_TS = 1_764_590_400
PROMPTS = 40


def view(start_ts):
    """Flat volatility known from the asset alone; no models, no clock."""
    open_ts = np.array([start_ts - 60], dtype=np.int64)
    price, nan = np.array([90_000.0]), np.full(1, np.nan)
    bars = Bars(
        open_ts=open_ts, open=nan, high=nan, low=nan, close=price, volume=nan, bar_s=60, feed="test"
    )
    history = MarketHistory(
        asset="BTC", frequency=Frequency.HF, bars=bars, price_bars=bars, source="simulated"
    )
    return prior_view(history, "planted")


def occasions(defect=lambda view: view, truth=lambda view: view, *, num_paths=100, gap=False):
    """Prompts half a day apart whose outcomes are drawn from `truth`, forecast by `defect`."""
    made = []
    for index in range(PROMPTS):
        start_ts = START_TS + index * DAY_S // 2
        request = ForecastRequest(
            asset="BTC", start_ts=start_ts, increment_s=60, length_s=900, num_paths=num_paths
        )
        sound = view(start_ts)
        rng = np.random.default_rng([7, index])
        realised = draw(request, truth(sound), start_ts, rng).paths[index % num_paths]
        if gap:
            realised[10:] = np.nan
        made.append(Occasion(request=request, view=defect(sound), realised=realised))
    return made


def wider(factor):
    return lambda view: replace(view, log_levels=view.log_levels + np.log(factor))


def shaped(**change):
    return lambda view: replace(view, shape=replace(view.shape, **change))


def losses(*args, **kwargs):
    found = attribute(occasions(*args, **kwargs), COMPETITION, seed=3)
    return {loss.part: loss for loss in found.losses}


def stands_out(loss):
    """Whether hindsight saves clearly more than where nothing is wrong."""
    return loss.lost_bp - max(loss.expected_bp, 0) > 2 * loss.error_bp > 0


@pytest.fixture(autouse=True)
def _few_variants(monkeypatch):
    """Every further one costs time and shows nothing new."""
    monkeypatch.setattr(attribution, "FACTORS", (0.65, 1.0, 1.5))
    monkeypatch.setattr(attribution, "DRIFTS", (-0.4, 0.0, 0.4))
    monkeypatch.setattr(attribution, "TAILS", (4.0, 80.0))
    monkeypatch.setattr(attribution, "DISPERSIONS", ((0.05, 0.05), (0.35, 0.45)))


def test_sound_forecasts_are_blamed_for_nothing_but_noise_and_the_unforeseeable():
    found = losses()
    assert not any(
        stands_out(found[part]) for part in Part if part not in (Part.CENTRE, Part.ENSEMBLE)
    )
    # What nobody can know is measured as well, and named by what is expected.
    for part in (Part.CENTRE, Part.TOO_WIDE, Part.TOO_NARROW):
        assert abs(found[part].lost_bp - found[part].expected_bp) < 3 * found[part].error_bp


def test_a_scale_that_is_too_wide_is_found_and_not_called_too_narrow():
    found = losses(wider(1.5))
    assert stands_out(found[Part.TOO_WIDE])
    assert stands_out(found[Part.LEVEL])
    assert found[Part.TOO_NARROW].lost_bp < found[Part.TOO_NARROW].expected_bp
    assert found[Part.LEVEL].hindsight == "× 0.65"


def test_a_scale_that_is_too_narrow_is_found_and_not_called_too_wide():
    found = losses(wider(1 / 1.5))
    assert stands_out(found[Part.TOO_NARROW])
    assert found[Part.LEVEL].lost_bp > 0
    assert found[Part.TOO_WIDE].lost_bp < found[Part.TOO_WIDE].expected_bp
    assert found[Part.LEVEL].hindsight == "× 1.50"


def test_a_centre_that_drifts_wrongly_is_found_with_the_sign_that_mends_it():
    found = losses(lambda view: replace(view, centre={900: 1.5}))
    assert stands_out(found[Part.DRIFT])
    assert found[Part.DRIFT].hindsight.startswith("\N{MINUS SIGN}0.4")
    assert not stands_out(found[Part.LEVEL])


def test_tails_that_are_too_heavy_are_found():
    found = losses(shaped(tail_dof=2.2), shaped(tail_dof=80.0, path_sd=0.05, slow_sd=0.05))
    assert stands_out(found[Part.TAILS])
    assert found[Part.TAILS].hindsight == "80 degrees of freedom"


def test_volatility_that_differs_too_little_between_paths_is_found():
    found = losses(shaped(path_sd=0.01, slow_sd=0.01), shaped(path_sd=0.5, slow_sd=0.4))
    assert stands_out(found[Part.DISPERSION])
    assert found[Part.DISPERSION].hindsight == "0.35 between paths, 0.45 within"


def test_fewer_paths_lose_more_to_ensemble_noise():
    few, many = (losses(num_paths=n)[Part.ENSEMBLE] for n in (30, 300))
    assert few.lost_bp > 3 * many.lost_bp > 0


def test_the_centre_is_judged_by_the_last_price_that_is_known():
    found = losses(gap=True)
    assert found[Part.CENTRE].lost_bp > 0
    assert np.isfinite([loss.lost_bp for loss in found.values()]).all()


def test_the_score_is_that_of_the_replay_with_the_same_seed():
    made = occasions()
    found = attribute(made, COMPETITION, seed=3)
    replayed = [
        score_paths(
            draw(o.request, o.view, o.view.anchor_ts, request_rng(3, o.request)).paths,
            o.realised,
            COMPETITION,
            increment_s=60,
        ).total
        for o in made
    ]
    assert found.score == pytest.approx(np.mean(replayed))
    assert found.prompts == PROMPTS


def test_progress_counts_as_many_steps_as_announced():
    steps = []
    attribute(occasions()[:2], COMPETITION, seed=3, on_step=lambda: steps.append(1))
    left_out = STEPS - len(steps)
    assert left_out == len(FACTORS) - 3 + len(DRIFTS) - 3 + len(TAILS) - 2 + len(DISPERSIONS) - 2


def test_what_a_shape_needs_is_worked_out_once_for_all_prompts(monkeypatch):
    worked_out, work_out = [], quantile_matching._mixture_spreads

    def counted(shape, step_s, length):
        worked_out.append((shape, step_s, length))
        return work_out(shape, step_s, length)

    monkeypatch.setattr(quantile_matching, "_mixture_spreads", counted)
    made = occasions(shaped(tail_dof=5.55, path_sd=0.21, slow_sd=0.23))
    attribute(made[:3], COMPETITION, seed=3)
    assert len({shape for shape, *_ in worked_out}) == 1 + len(attribution.TAILS) + len(
        attribution.DISPERSIONS
    )
    assert len(set(worked_out)) == len(worked_out)


def test_an_outcome_that_is_all_unknown_is_refused():
    made = occasions()[:2]
    made[1] = replace(made[1], realised=np.full(16, np.nan))
    with pytest.raises(DataError, match="all NaN"):
        attribute(made, COMPETITION, seed=3)
