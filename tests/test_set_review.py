"""Second thoughts: a set that got worse is rolled back, and only on clear evidence."""

import logging
from dataclasses import replace

import numpy as np
import orjson
import pytest

from config import DAY_S, Frequency
from forecast_engine import ForecastEngine
from lgbm_predictor import CALIBRATION, load_model_set
from model_store import MANIFEST, digest, publish_set, published_sets, seal_manifest
from set_review import LEAST_BLOCKS, Review, compare_sets, review_sets
from settings import Settings
from state_store import locked

HF = Frequency.HF


@pytest.fixture(scope="module")
def good(model_dir):
    return load_model_set(published_sets(model_dir, "BTC", HF)[0])


def spoiled(models, factor=1.5, later_s=0):
    """The same set, its scale wrong by a factor, trained so much later."""
    standardiser = replace(
        models.calibration.standardiser,
        unit_bps=factor * models.calibration.standardiser.unit_bps,
    )
    calibration = replace(models.calibration, standardiser=standardiser)
    return replace(models, calibration=calibration, trained_until=models.trained_until + later_s)


@pytest.fixture(scope="module")
def history(archive):
    return archive.load("BTC", HF).history


def test_a_set_that_forecasts_the_wrong_size_is_worse(good, history):
    review = compare_sets(spoiled(good, 2.0), good, history)
    assert review.blocks >= LEAST_BLOCKS
    assert review.is_worse
    assert compare_sets(good, spoiled(good, 2.0), history).excess == pytest.approx(-review.excess)


def test_a_set_is_no_worse_than_itself(good, history):
    review = compare_sets(good, good, history)
    assert (review.excess, review.error) == (0.0, 0.0)
    assert not review.is_worse


def test_a_few_hours_are_no_evidence(good, history):
    soon = history.known_at(good.trained_until + 5 * 3600)
    review = compare_sets(spoiled(good, 3.0), good, soon)
    assert 0 < review.blocks < LEAST_BLOCKS
    assert not review.is_worse
    nothing = compare_sets(spoiled(good), good, history.known_at(good.trained_until))
    assert (nothing.blocks, nothing.is_worse) == (0, False)


def test_bars_before_the_newer_training_say_nothing(good, history):
    start = good.trained_until
    wild = np.where(history.bars.open_ts < start - 20 * DAY_S, 3.0, 1.0) * history.bars.close
    other = replace(history, bars=replace(history.bars, close=wild))
    assert compare_sets(spoiled(good), good, other) == compare_sets(spoiled(good), good, history)


@pytest.mark.parametrize("excess", [0.029, 0.031])
def test_worse_means_by_three_errors(excess):
    assert Review(excess=excess, error=0.01, blocks=40).is_worse is (excess > 0.03)


# ---------------------------------------------------------------- in the running miner


def publish_spoiled(folder, models, source_folder, later_s):
    """Publish a spoiled copy of a set that claims a later training."""
    worse = spoiled(models, 2.0, later_s)
    files = {path.name: path.read_bytes() for path in source_folder.iterdir()}
    files[CALIBRATION] = orjson.dumps(worse.calibration.to_dict())
    manifest = orjson.loads(files[MANIFEST])
    manifest.pop("sha256")
    manifest |= {"model_id": "worse", "trained_until": worse.trained_until}
    manifest["files"][CALIBRATION] = digest(files[CALIBRATION])
    files[MANIFEST] = seal_manifest(manifest)
    publish_set(folder, "BTC", HF, "worse", files)


@pytest.fixture
def answering_from_a_worse_set(good, archive, model_dir, tmp_path):
    """An engine whose newest set is spoiled, its settings, and the name of the set before."""
    folder = tmp_path / "models"
    before = published_sets(model_dir, "BTC", HF)[0]
    files = {path.name: path.read_bytes() for path in before.iterdir()}
    publish_set(folder, "BTC", HF, before.name, files)
    publish_spoiled(folder, good, before, later_s=3600)
    settings = Settings(source="archive", model_dir=folder, state_dir=tmp_path / "state")
    engine = ForecastEngine.open(archive, settings)
    return engine, settings, before


def test_a_worse_set_is_rolled_back_once_and_said_so(good, answering_from_a_worse_set, caplog):
    engine, settings, before = answering_from_a_worse_set
    folder = settings.model_dir
    assert engine.trained()["BTC", HF] == good.trained_until + 3600
    with caplog.at_level(logging.INFO, logger="set_review"):
        review_sets(engine, settings)
        engine.refresh()
        review_sets(engine, settings)
    assert [entry.getMessage() for entry in caplog.records] == ["rolled back"]
    assert engine.trained()["BTC", HF] == good.trained_until
    assert [path.name for path in published_sets(folder, "BTC", HF)] == [before.name, "worse"]


def test_one_damaged_set_keeps_no_other_from_being_looked_at(answering_from_a_worse_set, caplog):
    engine, settings, _ = answering_from_a_worse_set
    folder = settings.model_dir
    (published_sets(folder, "BTC", HF)[1] / MANIFEST).write_text("{}")
    with caplog.at_level(logging.INFO, logger="set_review"):
        review_sets(engine, settings)
    (entry,) = caplog.records
    assert entry.getMessage() == "review failed"
    assert entry.asset == "BTC"


def test_while_a_training_publishes_no_set_is_gone_back_from(answering_from_a_worse_set, caplog):
    engine, settings, before = answering_from_a_worse_set
    folder = settings.model_dir
    with caplog.at_level(logging.INFO, logger="set_review"):
        with locked(folder, "training"):
            review_sets(engine, settings)
        assert published_sets(folder, "BTC", HF)[0].name == "worse"
        review_sets(engine, settings)
    assert [entry.getMessage() for entry in caplog.records] == ["review failed", "rolled back"]
    assert published_sets(folder, "BTC", HF)[0].name == before.name
