"""Calibration of an ensemble: where the realised value fell among the paths.

The probability integral transform (PIT) of an outcome is the share of paths below
it. Over many prompts it is uniform if the forecast is calibrated: a U says too
narrow, a hump too wide, a slope off centre. Source: Gneiting, Balabdaoui & Raftery
(2007), JRSS B 69(2).
"""

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from domain import FloatArray, IntArray
from protocol import Competition
from scoring import scored_pairs

BINS: Final = 20
COVERAGES: Final = (0.5, 0.8, 0.95)


def pit_values(observed: FloatArray, ensemble: FloatArray) -> FloatArray:
    """Share of the ensemble below each observation, ties counting half.

    `observed` (m,), `ensemble` (n, m); returns (m,) in [0, 1], NaN where unknown.
    """
    below = (ensemble < observed).mean(axis=0)
    not_above = (ensemble <= observed).mean(axis=0)
    return np.where(np.isfinite(observed), (below + not_above) / 2, np.nan)


def lead_pits(
    paths: FloatArray, realised: FloatArray, leads_s: Iterable[int], *, increment_s: int
) -> dict[int, float]:
    """PIT of the change from the start to each lead; by lead in seconds, NaN where unknown.

    `paths` (n, T) and `realised` (T,) prices; leads beyond the path are left out.
    """
    steps = np.array([lead // increment_s for lead in leads_s if lead // increment_s > 0])
    steps = steps[steps < len(realised)]
    change = realised[steps] / realised[0]
    values = pit_values(change, paths[:, steps] / paths[:, :1])
    return dict(zip((steps * increment_s).tolist(), values.tolist(), strict=True))


def interval_histograms(
    paths: FloatArray, realised: FloatArray, competition: Competition, *, increment_s: int
) -> dict[str, IntArray]:
    """Counts of PIT in `BINS` equal bins for everything that is scored, by name.

    The names are those of a score card. `paths` (n, T), `realised` (T,) prices.
    """
    pairs = scored_pairs(paths, realised, competition, increment_s=increment_s)
    return {name: histogram(pit_values(observed, ensemble)) for name, observed, ensemble in pairs}


def histogram(values: FloatArray) -> IntArray:
    """Counts of the known values in `BINS` equal bins of [0, 1]; (BINS,)."""
    counts, _ = np.histogram(values[np.isfinite(values)], bins=BINS, range=(0.0, 1.0))
    return np.asarray(counts, dtype=np.int64)


def coverage(values: FloatArray) -> Mapping[float, float]:
    """Share of outcomes inside each central interval, by its nominal share; NaN if none."""
    known = values[np.isfinite(values)]
    if not len(known):
        return dict.fromkeys(COVERAGES, np.nan)
    off_centre = np.abs(known - 0.5)
    return {share: float(np.mean(off_centre <= share / 2)) for share in COVERAGES}
