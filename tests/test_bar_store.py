"""Collected bars: they only ever grow, remember what was asked, and cost the same each day."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import state_store
from bar_store import BarStore, Stored
from domain import Bars, Candles
from errors import StateError
from spans import clip_spans
from state_store import StateStore

DAY = 86_400
START = 1_764_547_200  # 2025-12-01, midnight UTC


def refuse(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def files_below(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*.msgpack")
    }


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


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
        new = BarStore(root).append("binance", "BTC", bars).new
        assert new == len(set(bars.open_ts.tolist()) - expected.keys())
        expected |= dict(zip(bars.open_ts.tolist(), bars.close.tolist(), strict=True))
    stored = BarStore(root).load("binance", "BTC", 60)
    assert stored is not None
    assert dict(zip(stored.open_ts.tolist(), stored.close.tolist(), strict=True)) == expected
    assert stored.open_ts.tolist() == sorted(expected)


def test_all_columns_and_the_feed_come_back(tmp_path):
    bars = some_bars(range(3000))
    assert BarStore(tmp_path).append("binance", "BTC", bars) == Stored(3000, 0)
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
    assert store.append("binance", "BTC", some_bars([4], offset=9)) == Stored(0, 1)
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
    assert max(sizes) < 1.2 * min(sizes)


def test_bars_that_are_stored_already_are_not_written_again(tmp_path):
    store, bars = BarStore(tmp_path), some_bars(range(2000))
    store.append("binance", "BTC", bars)
    before = files_below(tmp_path)
    assert store.append("binance", "BTC", bars) == Stored(0, 0)
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
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    kept = np.r_[0:1440, 2880:4320]
    assert_same_bars(store.load("binance", "BTC", 60), some_bars(kept))
    assert "checksum" in caplog.text
    assert len(list(path.parent.glob("*.damaged-*"))) == 1
    assert store.append("binance", "BTC", bars) == Stored(1440, 0)
    assert_same_bars(store.load("binance", "BTC", 60), bars)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES], ids=os.strerror)
def test_a_day_that_cannot_be_read_is_no_damaged_one(tmp_path, monkeypatch, caplog, code):
    """It is left out, said once, not written over, and back when the disk reads again."""
    store = BarStore(tmp_path)
    store.append("binance", "BTC", some_bars(range(1430, 1450)))
    days = sorted(tmp_path.rglob("*.msgpack"))
    held = [path.read_bytes() for path in days]
    marks = store.marks("binance", "BTC", 60, 0)
    read = Path.read_bytes

    def refused(path):
        if path == days[0]:
            raise OSError(code, os.strerror(code))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        patch.setattr(state_store, "_READ_PAUSE_S", 0)
        for _ in range(2):
            left = store.load("binance", "BTC", 60)
            assert_same_bars(left, some_bars(range(1440, 1450)))
            assert store.missing("binance", "BTC", 60, START, START + DAY) == []
            assert len(store.marks("binance", "BTC", 60, 0)) == 1
        with pytest.raises(StateError, match="it stays as it is"):
            store.append("binance", "BTC", some_bars([1431], offset=5.0))
        store.append("binance", "BTC", some_bars([1440]))
        assert caplog.text.count("cannot be read") == 1
    assert [path.read_bytes() for path in days] == held
    assert sorted(tmp_path.rglob("*.msgpack*")) == days
    assert store.marks("binance", "BTC", 60, 0) == marks
    assert_same_bars(store.load("binance", "BTC", 60), some_bars(range(1430, 1450)))
    assert store.missing("binance", "BTC", 60, START, START + DAY) != []


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


def test_a_day_that_the_disk_refuses_stops_no_other(tmp_path, monkeypatch):
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
    kept = [*range(1440), *range(2880, 4320)]
    assert_same_bars(store.load("binance", "BTC", 60), some_bars(kept))


# ---------------------------------------------------------------- how bars were traded


def some_candles(minutes, **more):
    bars = some_bars(minutes, **more)
    return Candles(bars=bars, trades=np.round(bars.close), taker_volume=bars.close / 2)


def test_trades_and_taker_volume_come_back(tmp_path):
    candles = some_candles(range(2000))
    store = BarStore(tmp_path)
    store.append("binance", "BTC", candles)
    stored = store.load_candles("binance", "BTC", 60)
    assert stored is not None
    np.testing.assert_array_equal(stored.trades, candles.trades)
    np.testing.assert_array_equal(stored.taker_volume, candles.taker_volume)


def test_a_corrected_number_of_trades_is_a_correction(tmp_path):
    store, candles = BarStore(tmp_path), some_candles(range(10))
    store.append("binance", "BTC", candles)
    more = replace(candles, trades=candles.trades + (np.arange(10) == 3))
    assert store.append("binance", "BTC", more) == Stored(0, 1)
    stored = store.load_candles("binance", "BTC", 60)
    assert stored is not None
    np.testing.assert_array_equal(stored.trades, more.trades)


# ---------------------------------------------------------------- what is not there


def minute(number):
    return START + 60 * number


def test_a_gap_is_missing_until_the_venue_was_asked_and_empty_ever_after(tmp_path):
    store = BarStore(tmp_path)
    store.append("binance", "BTC", some_bars([0, 1, 5, 6]))
    span = ("binance", "BTC", 60, minute(0), minute(8))
    gaps = [(minute(2), minute(5)), (minute(7), minute(8))]
    assert store.missing(*span) == store.empty(*span) == gaps
    store.append("binance", "BTC", some_bars([]), checked=(minute(2), minute(5)))
    assert store.missing(*span) == gaps[1:]
    assert store.empty(*span) == gaps
    assert BarStore(tmp_path).missing(*span) == gaps[1:]  # also for the next process


def test_days_without_any_bar_can_be_checked(tmp_path):
    store = BarStore(tmp_path)
    store.append("binance", "BTC", some_bars([]), checked=(START - DAY, START + 2 * DAY + 60))
    assert store.missing("binance", "BTC", 60, START - 2 * DAY, START + 3 * DAY) == [
        (START - 2 * DAY, START - DAY),
        (START + 2 * DAY + 60, START + 3 * DAY),
    ]
    assert store.load("binance", "BTC", 60) is None


def test_only_whole_bars_are_missing(tmp_path):
    missing = BarStore(tmp_path).missing("binance", "BTC", 300, START + 1, START + 899)
    assert missing == [(START + 300, START + 600)]


def test_another_process_s_bars_are_seen_at_once(tmp_path):
    mine, other = BarStore(tmp_path), BarStore(tmp_path)
    span = ("binance", "BTC", 60, START, minute(10))
    assert mine.missing(*span) == [(START, minute(10))]
    other.append("binance", "BTC", some_bars(range(4)))
    assert mine.missing(*span) == [(minute(4), minute(10))]


def test_a_damaged_day_is_missing_again_although_it_was_checked(tmp_path):
    store, span = BarStore(tmp_path), ("binance", "BTC", 60, START, START + 2 * DAY)
    store.append("binance", "BTC", some_bars(range(2870)), checked=(START, START + 2 * DAY))
    assert store.missing(*span) == []
    day_file(tmp_path, 0).write_bytes(b"rust")
    assert store.missing(*span) == [(START, START + DAY)]


@settings(max_examples=15)
@given(
    st.sets(st.integers(0, 3000), max_size=40),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 900)), max_size=4),
    st.integers(0, 2000),
    st.integers(1, 1500),
)
def test_missing_is_what_has_no_bar_and_was_not_checked(
    tmp_path_factory, held, asked, first, length
):
    root = tmp_path_factory.mktemp("state")
    BarStore(root).append("binance", "BTC", some_bars(sorted(held)))
    checked: set[int] = set()
    for begin, size in asked:
        span = (minute(begin), minute(begin + size))
        BarStore(root).append("binance", "BTC", some_bars([]), checked=span)
        checked |= set(range(begin, begin + size))
    missing = BarStore(root).missing("binance", "BTC", 60, minute(first), minute(first + length))
    found = {(at - START) // 60 for low, high in missing for at in range(low, high, 60)}
    assert found == set(range(first, first + length)) - held - checked
    assert clip_spans(missing, 0, 2**40) == missing


def test_marks_change_for_the_days_that_were_written(tmp_path):
    store = BarStore(tmp_path)
    store.append("binance", "BTC", some_bars(range(2880)))
    before = store.marks("binance", "BTC", 60, START)
    store.append("binance", "BTC", some_bars([2880], offset=1))
    store.append("binance", "BTC", some_bars([5], offset=1))
    after = store.marks("binance", "BTC", 60, START)
    first = START // DAY
    assert {day for day in after if before.get(day) != after[day]} == {first, first + 2}
    assert store.marks("binance", "BTC", 60, START + 2 * DAY).keys() == {first + 2}


# ---------------------------------------------------------------- earlier schemas


def save_schema_1(root, bars, venue, asset):
    """What the first version wrote: one day of plain columns."""
    document = {
        "day": START // DAY,
        "bar_s": bars.bar_s,
        "feed": bars.feed,
        "offset_s": (bars.open_ts - START).astype(np.uint32),
        "columns": {"close": bars.close, "high": bars.high, "low": bars.low},
    }
    StateStore(root).save("bars", f"{venue}/{asset}_{bars.bar_s}s/2025-12-01", 1, document)


def test_bars_of_the_first_schema_load_and_go_on_growing(tmp_path):
    old = some_bars(range(100), feed="binance:BTC_1m")
    save_schema_1(tmp_path, old, "binance", "BTC")
    store = BarStore(tmp_path)
    assert_same_bars(
        store.load("binance", "BTC", 60), replace(old, feed="binance:BTCUSDT")
    )  # the importer's label gives way to the feed's own
    assert store.append("binance", "BTC", some_bars(range(90, 110))) == Stored(10, 0)
    assert_same_bars(
        BarStore(tmp_path).load("binance", "BTC", 60, minute(90)), some_bars(range(90, 110))
    )


def test_a_label_that_is_no_known_feed_stays(tmp_path):
    bars = some_bars(range(3), feed="mine:BTC_1m")
    save_schema_1(tmp_path, bars, "mine", "BTC")
    assert_same_bars(BarStore(tmp_path).load("mine", "BTC", 60), bars)


def test_other_files_in_the_folder_of_a_series_are_no_days(tmp_path):
    store = BarStore(tmp_path)
    first = some_bars(np.arange(5) - START // 60)  # of the first day that there is
    store.append("binance", "BTC", first)
    folder = tmp_path / "bars" / "binance" / "BTC_60s"
    whole = (folder / "1970-01-01.msgpack").read_bytes()
    for name in ("1970-01-02.msgpack.damaged-1", ".1970-01-02.msgpack~", "notes.msgpack", "1970"):
        (folder / name).write_bytes(whole)
    assert list(store.marks("binance", "BTC", 60, 0)) == [0]
    assert_same_bars(store.load("binance", "BTC", 60), first)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_said_in_one_sentence(tmp_path, monkeypatch, code):
    store = BarStore(tmp_path)
    store.append("binance", "BTC", some_bars(range(5)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse(code))
        for look in (
            lambda: store.load("binance", "BTC", 60),
            lambda: store.marks("binance", "BTC", 60, START),
            store.series,
        ):
            with pytest.raises(StateError, match="cannot be listed") as error:
                look()
            assert os.strerror(code) in one_sentence(error)
    loaded = store.load("binance", "BTC", 60)
    assert loaded is not None
    assert len(loaded) == 5
