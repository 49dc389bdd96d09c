"""State on disk: round trips, damage, full disks, locks and earlier schemas."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import state_store
from errors import BusyError, StateError
from state_store import (
    StateStore,
    folder_mark,
    go_through,
    locked,
    owned,
    require_writable,
    write_atomically,
)

DAY = 86_400
START = 1_764_547_200  # 2025-12-01, midnight UTC


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def refuse(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def files_below(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*.msgpack")
    }


# ---------------------------------------------------------------- atomic writes


def test_a_write_makes_its_folders_and_replaces_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o077 == 0
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path):
    """Only old files of our own pattern go: another process may be writing right now."""
    path = tmp_path / "day.msgpack"
    abandoned, young = tmp_path / ".day.msgpack.abcd_123~", tmp_path / ".other.json.abcd1234~"
    others = [tmp_path / name for name in (".notes~", "day.msgpack~", ".day.abcd1234", ".lock")]
    for file in (abandoned, young, *others):
        file.write_bytes(b"half")
    ago = time.time() - state_store.ABANDONED_S - 60
    for file in (abandoned, *others):
        os.utime(file, (ago, ago))
    write_atomically(path, b"whole")
    assert set(tmp_path.iterdir()) == {path, young, *others}


@pytest.mark.parametrize(
    ("call", "code", "remedy"),
    [
        ("replace", errno.ENOSPC, "free some disk space"),
        ("fsync", errno.ENOSPC, "free some disk space"),
        ("replace", errno.EROFS, "make the folder writable"),
        ("open", errno.EACCES, "make the folder writable"),
    ],
)
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path, monkeypatch, call, code, remedy
):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, call, refuse(code))
    with pytest.raises(StateError) as error:
        write_atomically(path, b"new")
    monkeypatch.undo()
    text = one_sentence(error)
    assert str(path) in text
    assert os.strerror(code) in text
    assert remedy in text
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_known_by_whatever_path_it_is_reached(tmp_path):
    one, other, link = tmp_path / "one", tmp_path / "other", tmp_path / "link"
    assert folder_mark(one) is None
    one.mkdir()
    other.mkdir()
    link.symlink_to(one)
    mark = folder_mark(one)
    assert mark == folder_mark(link) == folder_mark(other / ".." / "one")
    assert mark != folder_mark(other)


def test_a_folder_that_is_a_file_is_one_clear_sentence(tmp_path):
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(StateError) as error:
        write_atomically(tmp_path / "state" / "file", b"data")
    assert "state" in one_sentence(error)


def test_a_reader_sees_the_old_or_the_new_file_when_the_writer_is_killed(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    program = (
        "import os, signal, pathlib, state_store\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"state_store.write_atomically(pathlib.Path({str(path)!r}), b'new')\n"
    )
    root = Path(state_store.__file__).parent
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, check=False)
    assert ended.returncode < 0
    assert path.read_bytes() == b"old"


# ---------------------------------------------------------------- locks


def test_a_directory_can_be_held_by_one_process_only(tmp_path):
    program = (
        "import pathlib, sys, state_store, errors\n"
        "try:\n"
        f"    with state_store.locked(pathlib.Path({str(tmp_path)!r}), 'training'):\n"
        "        print('in')\n"
        "except errors.BusyError as error:\n"
        "    print(error)\n"
    )

    def attempt():
        command = [sys.executable, "-c", program]
        root = Path(state_store.__file__).parent
        return subprocess.run(
            command, cwd=root, check=True, capture_output=True, text=True
        ).stdout.strip()

    with locked(tmp_path, "importing"):
        text = attempt()
        assert str(tmp_path) in text
        assert "training cannot start" in text
    assert attempt() == "in"


def test_a_lock_falls_when_the_block_fails(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path, "training"):
        raise KeyError
    with locked(tmp_path, "training"):
        pass


def test_a_second_lock_in_one_process_is_refused_too(tmp_path):
    with locked(tmp_path, "training"), pytest.raises(BusyError), locked(tmp_path, "training"):
        pass


def test_a_miner_owns_its_state_folder_and_leaves_others_their_work_in_it(tmp_path):
    with owned(tmp_path):
        with locked(tmp_path, "training"), locked(tmp_path / "bars", "storing bars"):
            pass
        with pytest.raises(BusyError, match=r"another miner runs on .*--state-dir"):
            owned(tmp_path).__enter__()
        with owned(tmp_path / "another"):
            pass
    with owned(tmp_path):
        pass


def test_a_directory_that_cannot_be_locked_is_one_clear_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError) as error, locked(tmp_path / "file", "training"):
        pass
    assert "file" in one_sentence(error)
    monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    with pytest.raises(StateError) as error, locked(tmp_path, "training"):
        pass
    assert os.strerror(errno.EROFS) in one_sentence(error)


@pytest.mark.parametrize("name", ["notes", "notes/deeper"])
def test_what_is_no_folder_is_called_so(tmp_path, name):
    (tmp_path / "notes").write_text("no folder")
    complaint = f"{tmp_path / 'notes'} is not a folder"
    with pytest.raises(StateError, match=complaint), locked(tmp_path / name, "training"):
        pass
    with pytest.raises(StateError, match=complaint):
        write_atomically(tmp_path / name / "file", b"")
    with pytest.raises(StateError, match=f"{complaint}; name one with --state-dir"):
        require_writable(tmp_path / name, "--state-dir")


def test_a_full_disk_is_no_reason_not_to_start(tmp_path, monkeypatch):
    def full(**_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    require_writable(tmp_path, "--state-dir")


# ---------------------------------------------------------------- documents

_ARRAYS = st.one_of(hnp.integer_dtypes(), hnp.floating_dtypes(sizes=(32, 64))).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | _ARRAYS
)
_DOCUMENTS = st.dictionaries(
    st.text(),
    st.recursive(
        _LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=8,
    ),
    max_size=5,
)


def equal(left, right):
    if isinstance(left, np.ndarray):
        same_kind = isinstance(right, np.ndarray) and left.dtype.newbyteorder("=") == right.dtype
        return same_kind and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and (left == right or left != left)  # noqa: PLR0124 - NaN


@given(_DOCUMENTS)
def test_documents_come_back_as_they_were(tmp_path, document):
    store = StateStore(tmp_path)
    store.save("ewma", "archive/BTC_hf", 1, document)
    assert equal(document, store.load("ewma", "archive/BTC_hf", 1))


def test_arrays_come_back_writable_and_in_native_order(tmp_path):
    store = StateStore(tmp_path)
    store.save("ewma", "x", 1, {"big": np.arange(3, dtype=">f8"), "one": np.float32(0.5)})
    document = store.load("ewma", "x", 1)
    assert document is not None
    document["big"] += 1
    assert document["big"].tolist() == [1.0, 2.0, 3.0]
    assert document["big"].dtype.isnative
    assert document["one"] == 0.5


def test_the_same_document_gives_the_same_bytes(tmp_path):
    store = StateStore(tmp_path)
    for name in ("a", "b"):
        store.save("ewma", name, 1, {"level": np.arange(5.0), "n": 3})
    assert store.path("ewma", "a").read_bytes() == store.path("ewma", "b").read_bytes()


def test_what_is_not_numbers_is_refused_and_nothing_is_written(tmp_path):
    store = StateStore(tmp_path)
    for value in (object(), np.array([{}]), {1, 2}):
        with pytest.raises(TypeError):
            store.save("ewma", "x", 1, {"value": value})
    assert store.load("ewma", "x", 1) is None
    assert store.names("ewma") == []


def test_an_absent_document_is_none(tmp_path):
    assert StateStore(tmp_path / "absent").load("ewma", "x", 1) is None


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../b", "/etc/x", ".hidden", "a//b", "a\\b"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path, name):
    store = StateStore(tmp_path)
    for attempt in (lambda: store.save("ewma", name, 1, {}), lambda: store.load("ewma", name, 1)):
        with pytest.raises(StateError) as error:
            attempt()
        one_sentence(error)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- damage


@pytest.fixture
def saved(tmp_path):
    store = StateStore(tmp_path)
    store.save("ewma", "archive/BTC_hf", 3, {"level": np.arange(6.0), "note": "text"})
    return store, store.path("ewma", "archive/BTC_hf")


def assert_set_aside(store, path, damaged, caplog):
    caplog.clear()
    assert store.load("ewma", "archive/BTC_hf", 3) is None
    assert not path.exists()
    (aside,) = path.parent.glob("*.damaged-*")
    assert aside.read_bytes() == damaged
    assert len(caplog.records) == 1
    assert aside.name in caplog.text
    aside.unlink()


def test_every_flipped_bit_is_found(saved, caplog):
    store, path = saved
    sound = path.read_bytes()
    for position in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert_set_aside(store, path, bytes(damaged), caplog)


def test_every_truncation_is_found(saved, caplog):
    store, path = saved
    sound = path.read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        assert_set_aside(store, path, sound[:length], caplog)


@given(st.binary(max_size=200))
def test_any_other_content_is_set_aside(saved, caplog, content):
    store, path = saved
    path.write_bytes(content)
    assert_set_aside(store, path, content, caplog)


@pytest.mark.parametrize(
    ("kind", "schema", "found"), [("calibration", 3, "'ewma'"), ("ewma", 4, "schema 3")]
)
def test_another_kind_or_schema_is_set_aside_and_named(saved, caplog, kind, schema, found):
    store, path = saved
    foreign = store.path(kind, "archive/BTC_hf")
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_bytes(path.read_bytes())
    assert store.load(kind, "archive/BTC_hf", schema) is None
    assert found in caplog.text
    assert list(foreign.parent.glob("*.damaged-*"))


def test_two_damaged_files_of_one_name_are_both_kept(saved):
    store, path = saved
    for content in (b"one", b"two"):
        path.write_bytes(content)
        assert store.load("ewma", "archive/BTC_hf", 3) is None
    kept = {aside.read_bytes() for aside in path.parent.glob("*.damaged-*")}
    assert kept == {b"one", b"two"}
    assert store.names("ewma") == []


def test_damage_on_a_read_only_disk_is_reported_and_stops_nothing(saved, monkeypatch, caplog):
    store, path = saved
    path.write_bytes(b"broken")
    monkeypatch.setattr(os, "rename", refuse(errno.EROFS))
    assert store.load("ewma", "archive/BTC_hf", 3) is None
    assert os.strerror(errno.EROFS) in caplog.text
    assert path.read_bytes() == b"broken"


def test_a_directory_in_place_of_a_file_is_set_aside(saved, caplog):
    store, path = saved
    path.unlink()
    path.mkdir()
    assert store.load("ewma", "archive/BTC_hf", 3) is None
    assert "set aside" in caplog.text


# ---------------------------------------------------------------- earlier schemas


def test_an_earlier_document_is_migrated_step_by_step(tmp_path):
    store = StateStore(tmp_path)
    store.save("count", "a", 1, {"n": 1})
    steps = {1: lambda old: {"m": old["n"] + 1}, 2: lambda old: {"k": old["m"] * 10}}
    assert store.load("count", "a", 3, migrations=steps) == {"k": 20}
    store.save("count", "a", 3, {"k": 5})
    assert store.load("count", "a", 3, migrations=steps) == {"k": 5}


@pytest.mark.parametrize("schema", [1, 4])
def test_a_schema_that_no_migration_leads_from_is_set_aside(tmp_path, caplog, schema):
    store = StateStore(tmp_path)
    store.save("count", "a", schema, {"n": 1})
    assert store.load("count", "a", 3, migrations={2: dict}) is None
    assert f"of schema {schema}" in caplog.text


def test_a_file_can_be_judged_without_being_set_aside(tmp_path):
    store = StateStore(tmp_path)
    store.save("market", "BTC", 1, {"level": 1.0})
    path = store.path("market", "BTC")
    assert state_store.fault_of(path) is None
    path.write_bytes(path.read_bytes()[:-3])
    assert state_store.fault_of(path) == "is truncated or no msgpack"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_the_disk_refuses_for_one_stops_no_other_and_is_raised_after():
    done = []

    def work(number):
        if number % 2:
            raise StateError(f"{number} cannot be written; make room.")
        done.append(number)
        return 10 * number

    with pytest.raises(StateError, match=r"^1 cannot be written"):
        go_through(work, range(5))
    assert done == [0, 2, 4]
    assert go_through(work, (2, 4)) == [20, 40]
