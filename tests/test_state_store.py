"""State on disk: round trips, damage, full disks, locks, and bars that only ever grow."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import state_store
from domain import Bars
from errors import BusyError, StateError
from state_store import BarStore, StateStore, locked, write_atomically

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


def test_a_directory_that_cannot_be_locked_is_one_clear_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError) as error, locked(tmp_path / "file", "training"):
        pass
    assert "file" in one_sentence(error)
    monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    with pytest.raises(StateError) as error, locked(tmp_path, "training"):
        pass
    assert os.strerror(errno.EROFS) in one_sentence(error)


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


# ---------------------------------------------------------------- bars


def some_bars(minutes, feed="binance:BTCUSDT", offset=0.0, bar_s=60):
    minutes = np.asarray(minutes, dtype=np.int64)
    close = 100 + offset + minutes / 1000
    return Bars(
        open_ts=START + bar_s * minutes,
        open=np.full(len(minutes), np.nan),
        high=close + 1,
        low=np.where(minutes % 3 == 0, np.nan, close - 1),
        close=close,
        volume=np.full(len(minutes), np.nan),
        bar_s=bar_s,
        feed=feed,
    )


def assert_same_bars(left, right):
    assert (left.feed, left.bar_s) == (right.feed, right.bar_s)
    for name in ("open_ts", "open", "high", "low", "close", "volume"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


@settings(max_examples=40)
@given(st.lists(st.sets(st.integers(0, 4000), min_size=1, max_size=30), min_size=1, max_size=5))
def test_bars_come_back_as_a_dictionary_would_keep_them(tmp_path_factory, batches):
    root = tmp_path_factory.mktemp("state")
    expected: dict[int, float] = {}
    for number, batch in enumerate(batches):
        bars = some_bars(sorted(batch), offset=number)
        new = BarStore(root).append("binance", "BTC", bars)
        assert new == len(set(bars.open_ts.tolist()) - expected.keys())
        expected |= dict(zip(bars.open_ts.tolist(), bars.close.tolist(), strict=True))
    stored = BarStore(root).load("binance", "BTC", 60)
    assert stored is not None
    assert dict(zip(stored.open_ts.tolist(), stored.close.tolist(), strict=True)) == expected
    assert stored.open_ts.tolist() == sorted(expected)


def test_all_columns_and_the_feed_come_back(tmp_path):
    bars = some_bars(range(3000))
    assert BarStore(tmp_path).append("binance", "BTC", bars) == 3000
    assert_same_bars(BarStore(tmp_path).load("binance", "BTC", 60), bars)


def test_a_range_reads_as_a_cut_of_the_whole(tmp_path):
    store, bars = BarStore(tmp_path), some_bars(range(100, 5000, 7))
    store.append("binance", "BTC", bars)
    for start, end in [(None, START + DAY), (START + DAY, None), (START + 90_000, START + 180_060)]:
        assert_same_bars(store.load("binance", "BTC", 60, start, end), bars.between(start, end))
    assert store.load("binance", "BTC", 60, START + 900 * DAY) is None
    assert store.load("binance", "ETH", 60) is None


def test_a_later_correction_replaces_a_bar_and_is_not_new(tmp_path):
    store = BarStore(tmp_path)
    store.append("binance", "BTC", some_bars(range(10)))
    assert store.append("binance", "BTC", some_bars([4], offset=9)) == 0
    stored = store.load("binance", "BTC", 60)
    assert stored is not None
    assert stored.close[4] == some_bars([4], offset=9).close[0]
    assert len(stored) == 10


def test_an_append_rewrites_only_the_day_it_touches(tmp_path):
    store = BarStore(tmp_path)
    written = []
    for day in range(6):
        store.append("binance", "BTC", some_bars(np.arange(1439) + 1440 * day))
        before = files_below(tmp_path)
        store.append("binance", "BTC", some_bars([1440 * day + 1439]))
        after = files_below(tmp_path)
        changed = [name for name, stamp in after.items() if before[name] != stamp]
        assert len(after) == day + 1
        written.append([(tmp_path / name).stat().st_size for name in changed])
    sizes = {size for (size,) in written}  # one file each time
    assert max(sizes) == min(sizes)


def test_bars_that_are_stored_already_are_not_written_again(tmp_path):
    store, bars = BarStore(tmp_path), some_bars(range(2000))
    store.append("binance", "BTC", bars)
    before = files_below(tmp_path)
    assert store.append("binance", "BTC", bars) == 0
    assert files_below(tmp_path) == before


def test_feeds_are_never_merged(tmp_path):
    store, bars = BarStore(tmp_path), some_bars(range(10))
    store.append("venue", "BTC", bars)
    other = replace(some_bars(range(1440, 1450)), feed="pyth:BTC")
    with pytest.raises(StateError) as error:
        store.append("venue", "BTC", other)
    text = one_sentence(error)
    assert "binance:BTCUSDT" in text
    assert "pyth:BTC" in text
    assert_same_bars(store.load("venue", "BTC", 60), bars)
    store.append("pyth", "BTC", other)
    assert_same_bars(store.load("pyth", "BTC", 60), other)


def test_series_are_kept_apart_and_listed(tmp_path):
    store = BarStore(tmp_path)
    assert store.series() == []
    store.append("binance", "BTC", some_bars(range(10)))
    store.append("binance", "BTC", some_bars(range(10), bar_s=300, feed="five"))
    store.append("pyth", "ETH", some_bars(range(10)))
    expected = [("binance", "BTC", 60), ("binance", "BTC", 300), ("pyth", "ETH", 60)]
    assert store.series() == expected


@pytest.mark.parametrize("source", ["", "..", "a/b", "../../x"])
def test_a_source_cannot_lead_out_of_the_folder(tmp_path, source):
    with pytest.raises(StateError):
        BarStore(tmp_path / "state").append(source, "BTC", some_bars(range(3)))
    assert list(tmp_path.iterdir()) == []


def day_file(root, day):
    return sorted(Path(root).rglob("*.msgpack"))[day]


def test_a_damaged_day_is_set_aside_and_the_rest_still_loads(tmp_path, caplog):
    store, bars = BarStore(tmp_path), some_bars(range(4320))
    store.append("binance", "BTC", bars)
    path = day_file(tmp_path, 1)
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 4
    path.write_bytes(damaged)
    kept = np.r_[0:1440, 2880:4320]
    assert_same_bars(store.load("binance", "BTC", 60), some_bars(kept))
    assert "checksum" in caplog.text
    assert len(list(path.parent.glob("*.damaged-*"))) == 1
    assert store.append("binance", "BTC", bars) == 1440
    assert_same_bars(store.load("binance", "BTC", 60), bars)


def test_a_day_under_another_days_name_is_set_aside(tmp_path, caplog):
    store = BarStore(tmp_path)
    store.append("binance", "BTC", some_bars(range(2880)))
    day_file(tmp_path, 1).write_bytes(day_file(tmp_path, 0).read_bytes())
    assert_same_bars(store.load("binance", "BTC", 60), some_bars(range(1440)))
    assert "another day" in caplog.text


def test_a_day_of_another_feed_is_set_aside(tmp_path, caplog):
    store, other = BarStore(tmp_path / "a"), BarStore(tmp_path / "b")
    store.append("venue", "BTC", some_bars(range(2880)))
    other.append("venue", "BTC", some_bars(range(1440), feed="pyth:BTC"))
    day_file(tmp_path / "a", 0).write_bytes(day_file(tmp_path / "b", 0).read_bytes())
    assert_same_bars(store.load("venue", "BTC", 60), some_bars(range(1440, 2880)))
    assert "pyth:BTC" in caplog.text


def test_days_before_a_full_disk_are_kept(tmp_path, monkeypatch):
    store, bars, rename = BarStore(tmp_path), some_bars(range(4320)), os.replace
    calls = []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            refuse(errno.ENOSPC)()
        return rename(*args, **kwargs)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(StateError, match="free some disk space"):
        store.append("binance", "BTC", bars)
    monkeypatch.undo()
    assert_same_bars(store.load("binance", "BTC", 60), some_bars(range(1440)))
