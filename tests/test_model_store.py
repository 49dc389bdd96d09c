"""Model sets on disk: what was published stays whole, whatever happens next."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import Frequency
from errors import ModelError, StateError
from lgbm_predictor import load_model_set
from model_store import (
    POINTER,
    is_sealed,
    publication,
    publish_set,
    published_pairs,
    published_sets,
    roll_back,
    seal_manifest,
    set_folder,
)

HF, LF = Frequency.HF, Frequency.LF


def publish(folder, name, asset="BTC", frequency=HF):
    return publish_set(folder, asset, frequency, name, {"a.txt": name.encode(), "b.txt": b"b"})


def names(folder, asset="BTC", frequency=HF):
    return [path.name for path in published_sets(folder, asset, frequency)]


# ---------------------------------------------------------------- publishing


def test_nothing_is_published_at_first(tmp_path):
    assert published_sets(tmp_path / "models", "BTC", HF) == ()
    assert published_pairs(tmp_path / "models") == ()
    assert publication(tmp_path / "models", "BTC", HF) is None


def test_a_published_set_is_found_with_its_files(tmp_path):
    folder = publish(tmp_path, "one")
    assert published_sets(tmp_path, "BTC", HF) == (folder,)
    assert (folder / "a.txt").read_bytes() == b"one"
    assert (folder / "b.txt").read_bytes() == b"b"


def test_the_previous_set_stays_and_older_ones_go(tmp_path):
    for name in ("one", "two", "three"):
        publish(tmp_path, name)
    assert names(tmp_path) == ["three", "two"]
    kept = sorted(path.name for path in set_folder(tmp_path, "BTC", HF).iterdir() if path.is_dir())
    assert kept == ["three", "two"]


def test_publishing_a_set_again_repairs_it_and_keeps_the_previous_one(tmp_path):
    publish(tmp_path, "one")
    (publish(tmp_path, "two") / "a.txt").write_bytes(b"damaged")
    publish(tmp_path, "two")
    assert names(tmp_path) == ["two", "one"]
    assert (published_sets(tmp_path, "BTC", HF)[0] / "a.txt").read_bytes() == b"two"


def test_going_back_to_the_previous_set_keeps_both(tmp_path):
    publish(tmp_path, "one")
    publish(tmp_path, "two")
    publish(tmp_path, "one")
    assert names(tmp_path) == ["one", "two"]


def test_pairs_do_not_mix(tmp_path):
    publish(tmp_path, "one")
    publish(tmp_path, "two", frequency=LF)
    publish(tmp_path, "three", asset="XAU", frequency=LF)
    assert names(tmp_path) == ["one"]
    assert names(tmp_path, frequency=LF) == ["two"]
    assert published_pairs(tmp_path) == (("BTC", HF), ("BTC", LF), ("XAU", LF))


def test_folders_that_are_no_pairs_are_not_listed(tmp_path):
    publish(tmp_path, "one")
    for name in ("notes", "BTC_weekly", "_hf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / POINTER).write_text("{}")
    (tmp_path / "ETH_hf").mkdir()
    assert published_pairs(tmp_path) == (("BTC", HF),)


def test_every_publishing_leaves_another_mark(tmp_path):
    marks = []
    for name in ("one", "two", "two", "one"):
        publish(tmp_path, name)
        assert publication(tmp_path, "BTC", HF) == publication(tmp_path, "BTC", HF)
        marks.append(publication(tmp_path, "BTC", HF))
    assert len(set(marks)) == 4


# ---------------------------------------------------------------- failures on the way


def failing_call(function, number, error):
    """The function, but its call `number` (from 0) raises."""
    calls = iter(range(1_000))

    def call(*args, **kwargs):
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_whichever_write_fails_the_former_set_stays_current_and_loads(
    tmp_path, trained, monkeypatch, name
):
    result = trained[LF]
    publish_set(tmp_path, "BTC", LF, result.model_id, result.files)
    real, full = getattr(os, name), OSError(errno.ENOSPC, "No space left on device")
    number, published = 0, False
    while not published:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing_call(real, number, full))
            try:
                publish_set(tmp_path, "BTC", LF, "later", result.files)
                published = True
            except StateError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
        number += 1
        if names(tmp_path, frequency=LF)[0] == "later":
            break  # the pointer was replaced: only the sync of its folder may fail after that
        assert names(tmp_path, frequency=LF) == [result.model_id]
        assert load_model_set(published_sets(tmp_path, "BTC", LF)[0]).complete
    assert number >= len(result.files) + 1
    assert load_model_set(published_sets(tmp_path, "BTC", LF)[0]).complete
    assert not list(tmp_path.rglob("*~"))


def test_what_a_failed_publishing_left_is_cleared_by_the_next(tmp_path, monkeypatch):
    publish(tmp_path, "one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing_call(os.replace, 1, OSError(errno.EIO, "broken")))
        with pytest.raises(StateError):
            publish(tmp_path, "half")
    assert (set_folder(tmp_path, "BTC", HF) / "half").is_dir()
    publish(tmp_path, "two")
    assert not (set_folder(tmp_path, "BTC", HF) / "half").exists()
    assert names(tmp_path) == ["two", "one"]


# ---------------------------------------------------------------- the pointer


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"current": "one"}', b'{"current": 1, "previous": null}'],
)
def test_a_damaged_pointer_is_one_sentence_and_publishing_repairs_it(tmp_path, content):
    publish(tmp_path, "one")
    pointer = set_folder(tmp_path, "BTC", HF) / POINTER
    pointer.write_bytes(content)
    with pytest.raises(ModelError) as refusal:
        published_sets(tmp_path, "BTC", HF)
    assert str(refusal.value) == (f"{pointer} is damaged; train BTC hf again or restore the file.")
    publish(tmp_path, "two")
    assert names(tmp_path) == ["two"]


@pytest.mark.parametrize("name", ["..", ".", "../elsewhere", "/", "/etc", "a/b", "a/..", "", 5])
def test_a_pointer_leads_to_a_folder_beside_it_or_nowhere(tmp_path, name):
    publish(tmp_path, "one")
    pointer = set_folder(tmp_path, "BTC", HF) / POINTER
    pointer.write_bytes(orjson.dumps({"current": name, "previous": None}))
    with pytest.raises(ModelError, match="damaged"):
        published_sets(tmp_path, "BTC", HF)


def test_a_pointer_to_nothing_is_found_out_on_loading(tmp_path, model_dir):
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    pointer = set_folder(tmp_path, "BTC", HF) / POINTER
    pointer.write_bytes(orjson.dumps({"current": "gone", "previous": None}))
    with pytest.raises(ModelError, match=r"gone.*cannot be read"):
        load_model_set(published_sets(tmp_path, "BTC", HF)[0])


# ---------------------------------------------------------------- the seal of a manifest

entries = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), entries, max_size=5))
def test_what_was_sealed_is_recognised(content):
    data = seal_manifest(content)
    assert is_sealed(data)
    assert orjson.loads(data).items() >= content.items()


@given(st.data())
def test_no_changed_byte_passes_the_seal(data):
    sealed = seal_manifest({"seed": 3, "weights": {"60": 0.25}, "names": ["a", "é"]})
    place = data.draw(st.integers(0, len(sealed) - 1))
    damaged = bytearray(sealed)
    damaged[place] ^= data.draw(st.integers(1, 255))
    with suppress(orjson.JSONDecodeError):
        assert not is_sealed(bytes(damaged))


# ---------------------------------------------------------------- going back


def test_going_back_swaps_the_two_sets_and_is_seen_as_a_publication(tmp_path):
    publish(tmp_path, "one")
    publish(tmp_path, "two")
    mark = publication(tmp_path, "BTC", HF)
    assert roll_back(tmp_path, "BTC", HF, leave="two").name == "one"
    assert names(tmp_path) == ["one", "two"]
    assert publication(tmp_path, "BTC", HF) != mark


def test_going_back_may_be_repeated_when_the_disk_failed_halfway(tmp_path, monkeypatch):
    """The pointer is replaced, the sync of its folder fails: once more does not swap again."""
    publish(tmp_path, "one")
    publish(tmp_path, "two")
    with monkeypatch.context() as patch:
        failing = OSError(errno.EIO, os.strerror(errno.EIO))
        patch.setattr(os, "fsync", failing_call(os.fsync, 1, failing))
        with pytest.raises(StateError):
            roll_back(tmp_path, "BTC", HF, leave="two")
    assert names(tmp_path) == ["one", "two"]
    for _ in range(2):
        assert roll_back(tmp_path, "BTC", HF, leave="two").name == "one"
        assert names(tmp_path) == ["one", "two"]


def test_while_the_pointer_cannot_be_read_publishing_removes_no_set(tmp_path, monkeypatch):
    publish(tmp_path, "one")
    publish(tmp_path, "two")
    read = Path.read_bytes

    def refuse(path):
        if path.name == POINTER:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        publish(tmp_path, "three")
    folder = set_folder(tmp_path, "BTC", HF)
    assert names(tmp_path) == ["three"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"one", "two", "three"}
    publish(tmp_path, "four")
    assert names(tmp_path) == ["four", "three"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"four", "three"}


def test_without_a_set_before_there_is_no_way_back(tmp_path):
    publish(tmp_path, "one")
    with pytest.raises(ModelError, match="BTC hf has no set before the current one"):
        roll_back(tmp_path, "BTC", HF, leave="one")
    assert names(tmp_path) == ["one"]
