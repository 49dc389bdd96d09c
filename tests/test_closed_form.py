"""Scores without paths: by hand where that is possible, else against very many paths."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from closed_form import law_histograms, law_pits, score_laws, sum_law, volatility_law
from config import FREQUENCIES, Frequency
from errors import DataError
from path_simulator import PathShape, StepLaw, independent_steps, simulate_steps
from pit import interval_histograms, lead_pits
from protocol import IntervalKind, ScoringInterval, protocol_profile
from scoring import score_paths

HOUR = protocol_profile("2026-09").competitions["crypto-1h"]
DAY = protocol_profile("2026-09").competitions["crypto-24h"]
ONE_STEP = replace(
    HOUR,
    intervals=(ScoringInterval(name="1min", seconds=60, kind=IntervalKind.CHANGE),),
    volatility_weights=(),
)
NORMAL = independent_steps(np.inf)
SHAPES = {
    "normal": NORMAL,
    "t(4)": independent_steps(4.0),
    "clustered": PathShape(tail_dof=8.0, path_sd=0.3, slow_sd=0.25, slow_half_life_s=2400),
    "reverting": replace(NORMAL, autocorrelation=(-0.2, 0.05)),
}
ROOT_HALF_PI = np.sqrt(np.pi / 2)  # standard deviation of a normal step of mean size 1


def law_of(frequency=Frequency.HF, shape=NORMAL, lead_in_s=120, price=100.0):
    """A law whose scale and centre change along the path."""
    spec = FREQUENCIES[frequency]
    n_points = spec.prompt_length_s // spec.prompt_increment_s + 1
    points = 1_000_080 + spec.prompt_increment_s * np.arange(n_points)
    times = np.concatenate(([points[0] - lead_in_s], points)) if lead_in_s else points
    wave = np.sin(np.arange(len(times) - 1) / 9)
    return StepLaw(
        price=price,
        times=times,
        points=points,
        scale=7 * np.exp(0.1 * wave) * np.sqrt(spec.prompt_increment_s / 60),
        shape=replace(shape, bar_s=spec.bar_s),
        centre=np.linspace(0.0, 3.0, n_points),
    )


def paths_of(law, n_paths, seed):
    """Paths drawn from a law, without any matching."""
    step_s = np.diff(law.times).astype(np.float64)
    rng = np.random.default_rng(seed)
    return law.paths(simulate_steps(rng, law.scale, step_s, law.shape, n_paths=n_paths).T)


def one_step(scale, shape=NORMAL, centre=0.0, price=100.0):
    return StepLaw(
        price=price,
        times=np.array([0, 60]),
        points=np.array([0, 60]),
        scale=np.array([scale]),
        shape=shape,
        centre=np.array([0.0, centre]),
    )


def score(law, realised, competition=HOUR):
    increment_s = int(law.points[1] - law.points[0])
    (card,) = score_laws([law], realised[None, :], competition, increment_s=increment_s)
    return card


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("z", [-4.0, -1.0, 0.0, 0.3, 2.0, 7.0])
def test_a_normal_change_scores_what_the_formula_says(z):
    sigma = 2.0
    realised = np.array([100.0, 100.0 * np.exp(z * sigma / 1e4)])
    expected = sigma * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - np.pi**-0.5)
    found = score(one_step(sigma / ROOT_HALF_PI), realised, ONE_STEP)
    assert found.total == pytest.approx(expected, rel=1e-3)
    assert found.by_interval == {"1min": found.total}


@pytest.mark.parametrize("dof", [4.0, 8.0])
@pytest.mark.parametrize("z", [0.0, 1.5, -6.0])
def test_a_student_t_change_scores_its_integral(dof, z):
    law = stats.t(dof)
    below = quad(lambda w: law.cdf(w) ** 2, -np.inf, z)[0]
    above = quad(lambda w: law.sf(w) ** 2, z, np.inf)[0]
    size = law.expect(abs)
    found = size * sum_law(independent_steps(dof), 60.0, 1).score(np.array([z / size]))[0]
    assert found == pytest.approx(below + above, rel=3e-3)


@pytest.mark.parametrize("z", [-2.0, 0.0, 1.0])
def test_prices_are_scored_and_not_their_logarithms(z):
    """A day that moves by 4 %: log returns would be off by two per cent."""
    sigma, centre = 400.0, 30.0
    law = stats.norm(centre, sigma)
    came = centre + z * sigma

    def squared(u):
        return (law.cdf(u) - (u >= came)) ** 2 * np.exp(u / 1e4)

    expected = quad(squared, -3500, 3500, points=[came], limit=200)[0]
    realised = np.array([100.0, 100.0 * np.exp(came / 1e4)])
    found = score(one_step(sigma / ROOT_HALF_PI, centre=centre), realised, ONE_STEP).total
    assert found == pytest.approx(expected, rel=1.5e-3)


def test_far_outside_the_table_every_basis_point_costs_one():
    unit = sum_law(NORMAL, 60.0, 5)
    far = np.array([-1e5, -1e3, 1e3, 1e5])
    spread = ROOT_HALF_PI / np.sqrt(np.pi)  # half the mean distance of two draws
    assert unit.score(far) == pytest.approx(np.abs(far) - spread, rel=1e-6)
    assert unit.tilted_score(far) == pytest.approx(np.sign(far) * far**2 / 2, rel=1e-5)


def test_a_law_that_does_not_move_scores_the_distance():
    realised = np.array([100.0, 100.0 * np.exp(5e-4)])
    assert score(one_step(0.0), realised, ONE_STEP).total == pytest.approx(1e4 * np.expm1(5e-4))


@pytest.mark.parametrize("length", [5, 60])
def test_the_volatility_of_normal_blocks_has_the_law_of_chi(length):
    unit = volatility_law(NORMAL, 60.0, length)
    chi = stats.chi(length - 1, scale=ROOT_HALF_PI / np.sqrt(length - 1))
    at = chi.ppf([0.001, 0.1, 0.5, 0.9, 0.999])
    assert unit.pit(at) == pytest.approx([0.001, 0.1, 0.5, 0.9, 0.999], abs=0.008)
    for z in at:
        below = quad(lambda w: chi.cdf(w) ** 2, 0, z)[0]
        above = quad(lambda w: chi.sf(w) ** 2, z, np.inf)[0]
        assert unit.score(np.array([z]))[0] == pytest.approx(below + above, rel=0.01)


# ---------------------------------------------------------------- against very many paths


def compare_with_paths(law, realised, competition, *, ensembles, n_paths):
    """Every part agrees with the mean over ensembles, within its error and theirs."""
    increment_s = int(law.points[1] - law.points[0])
    cards = [
        score_paths(paths_of(law, n_paths, seed), realised, competition, increment_s=increment_s)
        for seed in range(ensembles)
    ]
    found = score(law, realised, competition).by_interval
    assert list(found) == list(cards[0].by_interval)
    for name, value in found.items():
        drawn = np.array([card.by_interval[name] for card in cards])
        error = drawn.std(ddof=1) / np.sqrt(ensembles)
        # A thousandth for tables and finite ensembles, more where scales differ in a block.
        slack = 0.015 if name.startswith("volatility") else 1.5e-3
        assert abs(value - drawn.mean()) < 5 * error + slack * drawn.mean() + 1e-12, name


@pytest.mark.parametrize("name", SHAPES)
def test_every_part_of_an_hour_agrees_with_many_paths(name):
    law = law_of(shape=SHAPES[name])
    realised = paths_of(law, 1, 99)[0]
    compare_with_paths(law, realised, HOUR, ensembles=8, n_paths=4000)


@pytest.mark.parametrize("lead_in_s", [0, 120, 7200])
def test_every_part_of_a_day_agrees_with_many_paths(lead_in_s):
    law = law_of(Frequency.LF, SHAPES["clustered"], lead_in_s)
    realised = paths_of(law, 1, 98)[0]
    compare_with_paths(law, realised, DAY, ensembles=8, n_paths=1000)


def test_prices_that_are_not_known_are_left_out_as_with_paths():
    law = law_of(shape=SHAPES["t(4)"])
    realised = paths_of(law, 1, 97)[0]
    realised[[3, 10, 20, 21, 22, 23, 24, 25, 26, 60]] = np.nan
    compare_with_paths(law, realised, HOUR, ensembles=8, n_paths=2000)
    realised[1:] = np.nan
    compare_with_paths(law, realised, HOUR, ensembles=2, n_paths=10)
    assert score(law, realised).total == 0.0


@given(known=st.lists(st.booleans(), min_size=61, max_size=61).filter(any))
def test_whatever_is_missing_the_same_parts_are_zero(known):
    law = law_of()
    realised = np.where(known, paths_of(law, 1, 96)[0], np.nan)
    few = score_paths(paths_of(law, 20, 0), realised, HOUR, increment_s=60)
    found = score(law, realised)
    assert np.isfinite(found.total)
    assert {k for k, v in found.by_interval.items() if v == 0} == {
        k for k, v in few.by_interval.items() if v == 0
    }


# ---------------------------------------------------------------- what must not matter


@given(factor=st.floats(1e-6, 1e6))
def test_the_unit_of_prices_does_not_matter(factor):
    law = law_of()
    realised = paths_of(law, 1, 95)[0]
    scaled = score(replace(law, price=factor * law.price), factor * realised)
    assert scaled.total == pytest.approx(score(law, realised).total, rel=1e-9)


@given(factor=st.floats(0.01, 1.0))
def test_twice_the_moves_score_twice_as_much(factor):
    realised = np.array([100.0, 100.0 * np.exp(1e-4)])
    smaller = np.array([100.0, 100.0 * np.exp(factor * 1e-4)])
    whole = score(one_step(1.0), realised, ONE_STEP).total
    assert score(one_step(factor), smaller, ONE_STEP).total == pytest.approx(
        factor * whole, rel=1e-3
    )


def test_many_laws_at_once_score_as_one_by_one():
    laws = [
        law_of(shape=shape, lead_in_s=lead_in_s, price=price)
        for shape in SHAPES.values()
        for lead_in_s, price in ((0, 3.0), (120, 5.0), (180, 7.0))
    ]
    realised = np.stack([paths_of(law, 1, seed)[0] for seed, law in enumerate(laws)])
    realised[2, 7:20] = np.nan
    cards = score_laws(laws, realised, HOUR, increment_s=60)
    assert cards == [score(*pair) for pair in zip(laws, realised, strict=True)]


def test_the_truth_scores_best_on_average():
    law, shape = law_of(), SHAPES["clustered"]
    realised = paths_of(replace(law, shape=shape), 400, 94)

    def mean(scale, shape):
        told = replace(law, scale=scale, shape=shape)
        cards = score_laws([told] * len(realised), realised, HOUR, increment_s=60)
        return np.mean([card.total for card in cards])

    truth = mean(law.scale, shape)
    assert truth < mean(1.15 * law.scale, shape)
    assert truth < mean(law.scale / 1.15, shape)
    assert truth < mean(law.scale, SHAPES["t(4)"])


# ---------------------------------------------------------------- calibration


def test_outcomes_of_the_law_fall_evenly_into_it():
    law = law_of(shape=SHAPES["clustered"])
    realised = paths_of(law, 1500, 93)
    laws = [law] * len(realised)
    pits = law_pits(laws, realised, (60, 300, 3600), increment_s=60)
    for lead in (60, 300, 3600):
        assert stats.kstest([pit[lead] for pit in pits], "uniform").pvalue > 1e-3
    counts = law_histograms(laws, realised, HOUR, increment_s=60)
    for name in ("60min_abs", "0_30min_gaps", "volatility_60min"):
        total = np.sum([count[name] for count in counts], axis=0)
        assert stats.chisquare(total).pvalue > 1e-3, name


def test_outcomes_fall_where_they_fall_among_many_paths():
    law = law_of(shape=SHAPES["t(4)"])
    realised = paths_of(law, 1, 92)[0]
    realised[[5, 12]] = np.nan
    paths = paths_of(law, 20_000, 0)
    (found,) = law_pits([law], realised[None, :], (30, 60, 300, 3600, 7200), increment_s=60)
    expected = lead_pits(paths, realised, (60, 300, 3600, 7200), increment_s=60)
    assert found == pytest.approx(expected, abs=0.02, nan_ok=True)
    (counts,) = law_histograms([law], realised[None, :], HOUR, increment_s=60)
    drawn = interval_histograms(paths, realised, HOUR, increment_s=60)
    assert {k: v.sum() for k, v in counts.items()} == {k: v.sum() for k, v in drawn.items()}


# ---------------------------------------------------------------- bad input, one sentence each


def test_a_path_of_another_length_is_refused():
    with pytest.raises(DataError, match=r"a law of 61 points cannot be scored .* \(60,\); both"):
        score(law_of(), np.ones(60))


def test_a_path_without_a_price_is_refused():
    with pytest.raises(DataError, match="the realised path is all NaN"):
        score(law_of(), np.full(61, np.nan))
