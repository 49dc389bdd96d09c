"""Loading model sets and predicting with them: nothing damaged or foreign gets through."""

import shutil
from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightgbm import Booster

from config import FREQUENCIES, Frequency
from errors import ModelError
from features import feature_frame, initial_state, return_grid
from lgbm_predictor import (
    CALIBRATION,
    SCALE_MODEL,
    SCHEMA,
    centre_design,
    centre_file,
    interpolate_centre,
    load_model_set,
    load_without_trees,
    scale_design,
)
from model_store import MANIFEST, digest, published_sets, seal_manifest
from uncertainty_engine import bucket_design

HF = FREQUENCIES[Frequency.HF]
FILES = (MANIFEST, CALIBRATION, SCALE_MODEL, *(centre_file(lead) for lead in HF.leads_s))


@pytest.fixture
def folder(model_dir, tmp_path):
    """A copy of the published HF set, to be damaged."""
    (current,) = published_sets(model_dir, "BTC", Frequency.HF)
    return shutil.copytree(current, tmp_path / current.name)


@pytest.fixture(scope="module")
def models(model_dir):
    (current,) = published_sets(model_dir, "BTC", Frequency.HF)
    return load_model_set(current)


@pytest.fixture(scope="module")
def frame(archive, models):
    """Features at every tenth of the last 2000 bars."""
    grid = return_grid(archive.load("BTC", Frequency.HF).history.bars)
    state = initial_state(HF, int(grid.open_ts[0]))
    rows = np.arange(len(grid) - 2_000, len(grid), 10)
    return feature_frame(HF, models.calibration.standardiser, grid, state, rows)


def refusal_of(folder):
    """The sentence with which the set in the folder is refused."""
    with pytest.raises(ModelError) as refusal:
        load_model_set(folder)
    sentence = str(refusal.value)
    assert sentence.count("\n") == 0
    assert sentence.endswith("train the set again.")
    return sentence


def rewrite(folder, **changes):
    """Change entries of the manifest and seal it again."""
    manifest = orjson.loads((folder / MANIFEST).read_bytes())
    del manifest["sha256"]
    (folder / MANIFEST).write_bytes(seal_manifest(manifest | changes))


# ---------------------------------------------------------------- loading


def test_a_published_set_loads_as_it_was_trained(models, trained):
    result = trained[Frequency.HF]
    assert models.complete
    assert (models.model_id, models.asset, models.frequency) == (
        result.model_id,
        "BTC",
        Frequency.HF,
    )
    assert (models.source, models.feed) == ("archive", "archive:BTC_1m")
    assert models.trained_until - models.trained_from == 4 * 86_400
    assert models.spec is HF
    assert orjson.dumps(models.calibration.to_dict()) == result.files[CALIBRATION]
    assert sorted(models.centre_models) == sorted(HF.leads_s)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_noticed(folder, name):
    path = folder / name
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [0, len(data) - 1, *rng.integers(0, len(data), 8).tolist()]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert str(path) in refusal_of(folder), place
    path.write_bytes(data)
    load_model_set(folder)


@pytest.mark.parametrize("name", FILES)
def test_any_cut_file_is_noticed(folder, name):
    path = folder / name
    data = path.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert str(path) in refusal_of(folder), length


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{folder / name} cannot be read (No such file" in refusal_of(folder)


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b"{}", b'{"schema": 2}'])
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    refusal_of(folder)


def test_a_manifest_changed_by_hand_is_refused(folder):
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"source": "archive"', b'"source": "venue"'))
    assert "does not have the hash" in refusal_of(folder)


def test_a_set_of_an_unknown_schema_is_refused(folder):
    rewrite(folder, schema=99)
    assert f"has schema 99, this version reads {SCHEMA}" in refusal_of(folder)


@pytest.mark.parametrize("kind", ["scale", "centre"])
@pytest.mark.parametrize(
    "change",
    [
        lambda names: names[::-1],
        lambda names: names[1:],
        lambda names: [*names[:-1], "moon_phase"],
    ],
    ids=["order", "count", "name"],
)
def test_a_set_made_for_other_features_is_refused(folder, kind, change):
    features = orjson.loads((folder / MANIFEST).read_bytes())["features"]
    rewrite(folder, features=features | {kind: change(features[kind])})
    assert f"{kind} features that differ" in refusal_of(folder)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("bucket_ends", [1, 2, 5, 15, 30, 90]), ("leads_s", [60, 3600]), ("bar_s", 300)],
)
def test_a_set_made_for_other_leads_is_refused(folder, entry, value):
    leads = orjson.loads((folder / MANIFEST).read_bytes())["leads"]
    rewrite(folder, leads=leads | {entry: value})
    assert "other leads" in refusal_of(folder)


@pytest.mark.parametrize("name", [SCALE_MODEL, centre_file(300)])
def test_trees_that_contradict_their_manifest_are_refused(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes().replace(b"day_sin", b"day_tan"))
    files = orjson.loads((folder / MANIFEST).read_bytes())["files"]
    rewrite(folder, files=files | {name: digest(path.read_bytes())})
    assert "was trained on other features than its manifest names" in refusal_of(folder)


@pytest.mark.parametrize("damage", [b"", b"no trees"])
def test_without_trees_the_rest_still_answers(folder, models, frame, damage):
    for name in FILES[2:]:
        (folder / name).write_bytes(damage)
    rest = load_without_trees(folder)
    assert not rest.complete
    np.testing.assert_array_equal(rest.log_levels(frame), models.linear_log_levels(frame))
    assert set(rest.centre_in_scale(frame).values()) == {0.0}


@pytest.mark.parametrize("name", [MANIFEST, CALIBRATION])
def test_without_its_calibration_a_set_is_of_no_use(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=name):
        load_without_trees(folder)


# ---------------------------------------------------------------- predicting


def weighed(models, **changes):
    return replace(models, calibration=replace(models.calibration, **changes))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_level_lies_between_the_ewma_and_the_blend(models, frame, share):
    shares = np.full(len(HF.bucket_ends), share)
    levels = weighed(models, blend_shares=shares, scale_strength=0.0).log_levels(frame)
    ewma = np.log(frame.level)
    for bucket, part in enumerate(models.calibration.linear):
        blend = part.log_level(bucket_design(frame, bucket))
        np.testing.assert_allclose(levels[bucket], (1 - share) * ewma + share * blend)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_share_of_the_correction_comes_on_top(models, frame, trained, strength):
    levels = weighed(models, scale_strength=strength).log_levels(frame)
    below = models.linear_log_levels(frame)
    trees = Booster(model_str=trained[Frequency.HF].files[SCALE_MODEL].decode())
    for bucket, part in enumerate(models.calibration.linear):
        blend = part.log_level(bucket_design(frame, bucket))
        correction = trees.predict(scale_design(HF, frame, bucket, blend), raw_score=True)
        assert np.ptp(correction) > 0
        np.testing.assert_allclose(
            levels[bucket] - below[bucket], strength * correction, atol=1e-12
        )


def test_one_row_is_predicted_like_many(models, frame):
    together = weighed(models, scale_strength=1.0).log_levels(frame)
    for row in (0, 77, 199):
        alone = replace(
            frame,
            shared=frame.shared[row : row + 1],
            by_bucket=frame.by_bucket[:, row : row + 1],
            level=frame.level[row : row + 1],
            end_ts=frame.end_ts[row : row + 1],
        )
        levels = weighed(models, scale_strength=1.0).log_levels(alone)
        assert levels[:, 0].tobytes() == together[:, row].tobytes()


def test_a_centre_counts_with_its_weight_and_none_without(models, frame):
    weights = dict.fromkeys(HF.leads_s, 0.0) | {300: 0.5, 3600: 1.0}
    centre = weighed(models, centre_weights=weights).centre_in_scale(frame)
    assert list(centre) == list(HF.leads_s)
    for lead, weight in weights.items():
        design = centre_design(frame.shared, np.full(len(frame.level), lead // 60))
        assert centre[lead] == weight * models.centre_models[lead].predict(design)[-1]
    assert centre[60] == 0.0
    assert centre[3600] != 0.0


# ---------------------------------------------------------------- interpolation

values = st.integers(-100_000, 100_000).map(lambda move: move / 1_000)
anchor_leads = st.lists(st.integers(1, 10_000), min_size=1, max_size=8, unique=True).map(sorted)


@st.composite
def centres(draw, *, increasing=False):
    """Anchors: lead in seconds to expected move in bps."""
    leads = draw(anchor_leads)
    moves = draw(st.lists(values, min_size=len(leads), max_size=len(leads)))
    if increasing:
        moves = np.cumsum(np.abs(moves)).tolist()
    return dict(zip(map(float, leads), moves, strict=True))


@given(centres())
def test_the_centre_passes_through_its_anchors_and_through_zero(anchors):
    leads = np.array([0.0, *anchors])
    np.testing.assert_allclose(
        interpolate_centre(anchors, leads), [0.0, *anchors.values()], atol=1e-9
    )


@given(centres())
def test_the_centre_is_flat_beyond_the_last_anchor(anchors):
    last = max(anchors)
    beyond = interpolate_centre(anchors, last + np.array([0.0, 1.0, 1e3, 1e6]))
    np.testing.assert_allclose(beyond, anchors[last], atol=1e-9)


@given(centres(increasing=True))
def test_a_rising_centre_never_falls_between_its_anchors(anchors):
    curve = interpolate_centre(anchors, np.linspace(0, max(anchors), 400))
    assert np.diff(curve).min() >= -1e-9


@given(centres())
def test_the_centre_never_overshoots_its_anchors(anchors):
    curve = interpolate_centre(anchors, np.linspace(0, 2 * max(anchors), 400))
    assert curve.max() <= max(0.0, *anchors.values()) + 1e-9
    assert curve.min() >= min(0.0, *anchors.values()) - 1e-9


@pytest.mark.parametrize("anchors", [{}, {60.0: 0.0, 300.0: 0.0}])
def test_without_a_centre_the_path_is_flat(anchors):
    np.testing.assert_array_equal(interpolate_centre(anchors, np.arange(5.0)), np.zeros(5))
