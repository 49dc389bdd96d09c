"""Pools on disk: shared by all trainings, and found again by what they depend on."""

import os
import weakref
from dataclasses import replace

import numpy as np
import pytest

import pool_store
from config import DAY_S, Frequency
from data_fetcher import SimulatedSource
from pool_store import (
    each_history,
    histories_of,
    is_whole,
    pool_file,
    pool_files,
    pool_names,
    prune_pools,
    read_pool,
)
from pooled_prior import POOL_EVERY_S
from tests.test_pooling import corrupted

SOURCE = SimulatedSource(days=40)
LAST = SOURCE.end_ts
FIRST = LAST - 2 * DAY_S


@pytest.fixture(scope="module")
def histories():
    return histories_of(SOURCE, Frequency.LF)


def pooled_priors(*arguments):
    return [prior for file in pool_files(*arguments) if (prior := read_pool(file)) is not None]


def test_every_asset_of_the_source_takes_part(histories):
    assert [history.asset for history in histories] == list(SOURCE.assets)


def test_a_pool_is_fitted_once_and_then_read(tmp_path, histories, monkeypatch):
    (prior,) = pooled_priors(histories, FIRST, LAST, tmp_path)
    assert prior.until == FIRST // POOL_EVERY_S * POOL_EVERY_S
    monkeypatch.setattr(pool_store, "fit_pooled_prior", None)  # would fail if it were called
    (again,) = pooled_priors(histories, FIRST, LAST, tmp_path)
    assert again.to_dict() == prior.to_dict()
    assert [file.name for file in tmp_path.glob("*.json")] == pool_names(histories, FIRST, LAST)


def test_a_damaged_pool_is_fitted_anew(tmp_path, histories):
    """A bit that flipped in a digit would go on into every model trained with it."""
    (file,) = pool_files(histories, FIRST, LAST, tmp_path)
    sound = file.read_bytes()
    for damaged in (b"", b"[]", sound[:-1], sound.replace(b"1", b"2", 1)):
        file.write_bytes(damaged)
        assert not is_whole(file)
    pool_files(histories, FIRST, LAST, tmp_path)
    assert file.read_bytes() == sound
    assert is_whole(file)


def test_moments_before_all_bars_have_no_prior(tmp_path, histories):
    early = FIRST - 90 * DAY_S
    assert len(pool_names(histories, early, LAST)) == 4
    assert len(pooled_priors(histories, early, LAST, tmp_path)) == 1


def test_names_change_with_the_past_of_any_asset_and_not_with_its_future(histories):
    moment = FIRST // POOL_EVERY_S * POOL_EVERY_S
    names = pool_names(histories, FIRST, LAST)
    later = [*histories[:-1], corrupted(histories[-1], moment)]
    sooner = [*histories[:-1], corrupted(histories[-1], moment - 5 * DAY_S)]
    assert pool_names(later, FIRST, LAST) == names
    assert pool_names(sooner, FIRST, LAST) != names
    assert np.all([history.bars.end_ts > moment for history in histories])


# ---------------------------------------------------------------- named by files


def test_a_pool_is_found_by_the_versions_of_files_without_a_look_at_bars(
    tmp_path, histories, monkeypatch
):
    moment = FIRST // POOL_EVERY_S * POOL_EVERY_S
    file = pool_file(SOURCE, Frequency.LF, moment, tmp_path / "files")
    (same,) = pool_files(histories, moment, moment, tmp_path / "bars")
    assert file.read_bytes() == same.read_bytes()
    monkeypatch.setattr(pool_store, "each_history", None)  # would fail if it were called
    assert pool_file(SOURCE, Frequency.LF, moment, tmp_path / "files") == file


def test_assets_are_loaded_one_after_the_other(tmp_path, monkeypatch):
    closes: list[weakref.ref[np.ndarray]] = []
    most = []

    def watched(source, frequency):
        for history in each_history(source, frequency):
            close = history.bars.close.copy()
            closes.append(weakref.ref(close))
            most.append(sum(each() is not None for each in closes))
            yield replace(history, bars=replace(history.bars, close=close))
            del close

    monkeypatch.setattr(pool_store, "each_history", watched)
    pool_file(SOURCE, Frequency.LF, FIRST // POOL_EVERY_S * POOL_EVERY_S, tmp_path)
    assert len(most) == len(SOURCE.assets)
    assert max(most) <= 2  # one is handed over while the next one is made


def test_pools_of_the_days_that_count_are_kept_and_of_each_moment_the_last_used(tmp_path):
    day = 1_760_000_000 // DAY_S * DAY_S
    ages = {"20250801_old": 0, "20251009_a": 9, "20251009_b": 1, "20251009_c": 5, "20251108_d": 20}
    for frequency in Frequency:
        for name, age in ages.items():
            file = tmp_path / f"{frequency.value}_{name}.json"
            file.write_text("null")
            os.utime(file, (day - age, day - age))
    prune_pools(tmp_path, day)
    left = {file.name for file in tmp_path.glob("*.json")}
    kept = ("20251009_b", "20251009_c", "20251108_d")
    assert left == {f"{frequency.value}_{name}.json" for frequency in Frequency for name in kept}
