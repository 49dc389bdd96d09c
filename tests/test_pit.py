"""Where outcomes fall among the paths."""

import numpy as np
import pytest

from pit import BINS, coverage, histogram, interval_histograms, lead_pits, pit_values
from protocol import PROTOCOL_PROFILES
from scoring import score_paths

HOURLY = PROTOCOL_PROFILES["2026-09"].competitions["crypto-1h"]
DAILY = PROTOCOL_PROFILES["2026-09"].competitions["crypto-24h"]
LEADS = (60, 120, 300, 900, 1800, 3600)


def walk(rng, n, points, scale=1e-4):
    return 100 * np.exp(np.cumsum(scale * rng.standard_normal((n, points)), axis=1))


def test_the_share_of_paths_below_is_counted_and_ties_are_halved():
    ensemble = np.array([[1.0], [2.0], [2.0], [3.0]])
    observed = {0.5: 0.0, 1.5: 0.25, 2.0: 0.5, 3.0: 0.875, 9.0: 1.0}
    for value, expected in observed.items():
        assert pit_values(np.array([value]), ensemble)[0] == expected


def test_what_is_not_known_has_no_place_among_the_paths():
    assert np.isnan(pit_values(np.array([np.nan]), np.ones((3, 1)))[0])
    assert histogram(np.array([np.nan, 0.0, 1.0, 0.5])).sum() == 3


def test_leads_are_changes_from_the_start_of_every_path():
    paths = np.array([[100.0, 101, 101], [200, 198, 204], [50, 50, 50]])
    found = lead_pits(paths, np.array([10.0, 10.02, 10.5]), (60, 120, 180), increment_s=60)
    # +0.2 % among -1 %, 0 %, +1 %; +5 % above all; no third point.
    assert found == {60: pytest.approx(2 / 3), 120: 1.0}


def test_a_price_that_is_missing_leaves_its_lead_unknown():
    paths = walk(np.random.default_rng(0), 50, 61)
    realised = paths[0].copy()
    realised[2] = np.nan
    found = lead_pits(paths, realised, LEADS, increment_s=60)
    assert [lead for lead, value in found.items() if np.isnan(value)] == [120]
    realised[0] = np.nan
    assert np.isnan(list(lead_pits(paths, realised, LEADS, increment_s=60).values())).all()


@pytest.mark.parametrize(("competition", "step", "points"), [(HOURLY, 60, 61), (DAILY, 300, 289)])
def test_everything_that_is_scored_has_a_histogram(competition, step, points):
    paths = walk(np.random.default_rng(1), 50, points)
    found = interval_histograms(paths, paths[0], competition, increment_s=step)
    assert set(found) == set(
        score_paths(paths, paths[0], competition, increment_s=step).by_interval
    )
    first = competition.intervals[0].name
    assert found[first].sum() == points - 1
    assert found[first].shape == (BINS,)


def test_a_calibrated_forecast_covers_what_it_says_and_a_narrow_one_less():
    rng = np.random.default_rng(2)
    right, narrow = [], []
    for _ in range(400):
        paths, realised = walk(rng, 200, 61), walk(rng, 1, 61)[0]
        right.append(lead_pits(paths, realised, (3600,), increment_s=60)[3600])
        half = 100 * (paths / 100) ** 0.5
        narrow.append(lead_pits(half, realised, (3600,), increment_s=60)[3600])
    for share, found in coverage(np.array(right)).items():
        # Three standard errors of a share of 400, and one path in 200.
        assert found == pytest.approx(share, abs=3 * np.sqrt(share * (1 - share) / 400) + 0.01)
    assert coverage(np.array(narrow))[0.8] < 0.6


def test_coverage_of_nothing_is_unknown():
    assert np.isnan(list(coverage(np.array([np.nan])).values())).all()
