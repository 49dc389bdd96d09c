"""A sketch scores as the whole answer does, to within what its module says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answer_sketch import AnswerSketch
from domain import FloatArray
from errors import DataError
from protocol import protocol_profile
from scoring import score_paths

COMPETITIONS = protocol_profile("2026-09").competitions
HOUR, DAY = COMPETITIONS["crypto-1h"], COMPETITIONS["crypto-24h"]


def walks(seed: int, n: int, points: int, increment_s: int) -> FloatArray:
    """Fat-tailed paths whose volatilities differ."""
    rng = np.random.default_rng(seed)
    volatility = 5e-4 * np.sqrt(increment_s / 60) * np.exp(0.3 * rng.standard_normal((n, 1)))
    steps: FloatArray = volatility * rng.standard_t(5, (n, points))
    return np.asarray(98_000 * np.exp(np.cumsum(steps, axis=1)))


@pytest.mark.parametrize(
    ("competition", "increment_s", "points"), [(HOUR, 60, 61), (DAY, 300, 289)]
)
def test_a_sketch_scores_like_the_answer_also_after_storage(competition, increment_s, points):
    errors = []
    for seed in range(8):
        paths = walks(seed, 1000, points, increment_s)
        realised = walks(100 + seed, 1, points, increment_s)[0]
        realised[5 + seed] = np.nan
        sketch = AnswerSketch.of(paths, competition, increment_s=increment_s)
        found = AnswerSketch.from_bytes(sketch.to_bytes()).score(realised, competition).card
        whole = score_paths(paths, realised, competition, increment_s=increment_s)
        assert list(found.by_interval) == list(whole.by_interval)
        assert found.total == pytest.approx(sum(found.by_interval.values()))
        errors.append(found.total / whole.total - 1)
    assert np.abs(errors).max() < 2e-3
    assert -1e-3 < np.mean(errors) < 1e-4


def test_a_stored_sketch_is_small():
    paths = walks(0, 1000, 289, 300)
    data = AnswerSketch.of(paths, DAY, increment_s=300).to_bytes()
    assert len(data) < 0.02 * paths.nbytes


@settings(max_examples=40)
@given(n=st.integers(1, 50), seed=st.integers(0, 99))
def test_a_small_answer_is_kept_whole(n, seed):
    paths = walks(seed, n, 61, 60)
    realised = walks(seed + 1000, 1, 61, 60)[0]
    found = AnswerSketch.of(paths, HOUR, increment_s=60).score(realised, HOUR).card
    whole = score_paths(paths, realised, HOUR, increment_s=60)
    assert found.total == pytest.approx(whole.total, rel=1e-9)


def test_the_middle_holds_four_fifths_of_what_comes_true():
    inside = known = 0
    for seed in range(30):
        paths = walks(seed, 400, 61, 60)
        outcome = AnswerSketch.of(paths, HOUR, increment_s=60).score(
            walks(500 + seed, 1, 61, 60)[0], HOUR
        )
        covered, of = outcome.covered["1min"]
        assert of == 60
        inside, known = inside + covered, known + of
    # Minutes of one hour share a volatility: the error is wider than of independent ones.
    assert inside / known == pytest.approx(0.8, abs=0.03)


def test_what_is_not_known_is_not_counted():
    realised = walks(1, 1, 61, 60)[0]
    realised[10:21] = np.nan
    outcome = AnswerSketch.of(walks(2, 100, 61, 60), HOUR, increment_s=60).score(realised, HOUR)
    assert outcome.covered["1min"][1] == 60 - 12
    assert np.isfinite(outcome.card.total)


def test_an_outcome_of_nothing_is_refused():
    sketch = AnswerSketch.of(walks(2, 100, 61, 60), HOUR, increment_s=60)
    with pytest.raises(DataError, match="all NaN"):
        sketch.score(np.full(61, np.nan), HOUR)


def test_a_sketch_for_other_intervals_is_refused():
    sketch = AnswerSketch.of(walks(2, 100, 61, 60), HOUR, increment_s=60)
    with pytest.raises(DataError, match="other intervals"):
        sketch.score(walks(1, 1, 61, 60)[0], DAY)


def test_paths_that_stand_still_can_be_kept():
    paths = np.full((100, 61), 5.0)
    sketch = AnswerSketch.from_bytes(AnswerSketch.of(paths, HOUR, increment_s=60).to_bytes())
    assert sketch.score(paths[0], HOUR).card.total == 0


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x93\x01\x02\x03"])
def test_a_damaged_sketch_is_one_sentence(data):
    with pytest.raises(DataError, match="cannot be read"):
        AnswerSketch.from_bytes(data)


def test_a_cut_sketch_is_one_sentence():
    data = AnswerSketch.of(walks(2, 100, 61, 60), HOUR, increment_s=60).to_bytes()
    with pytest.raises(DataError, match="cannot be read"):
        AnswerSketch.from_bytes(data[:-40])
