"""Reading archives: what is used, what is set aside and named, what is refused."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import state_store
from bar_cleaning import summarise_set_aside
from bar_store import BarStore
from config import DAY_S, Frequency
from data_fetcher import (
    ArchiveSource,
    GrowingSource,
    LiveSource,
    SimulatedSource,
    open_source,
)
from domain import Bars
from errors import ConfigError, DataError, SourceUnavailable, UnknownAsset
from settings import Settings

START = 1_764_547_200  # 2025-12-01, midnight UTC


def minutes(n, step=60):
    return START + step * np.arange(n, dtype=np.int64)


def prices(n):
    return 100 + np.sin(np.arange(n) / 7)


def write(folder, name="BTC_1m.parquet", **columns):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def loaded(folder, asset="BTC", frequency=Frequency.HF):
    return ArchiveSource(folder).load(asset, frequency)


def reasons(result):
    return [bar.reason for bar in result.set_aside]


# ---------------------------------------------------------------- what is used


def test_a_clean_file_is_read_as_it_is(tmp_path):
    write(tmp_path, ts=minutes(30), close=prices(30))
    result = loaded(tmp_path)
    bars = result.history.bars
    np.testing.assert_array_equal(bars.open_ts, minutes(30))
    np.testing.assert_array_equal(bars.close, prices(30))
    assert bars.open_ts.dtype == np.int64
    assert np.isnan([bars.open, bars.high, bars.low, bars.volume]).all()
    assert bars.feed == "archive:BTC_1m"
    assert result.history.source == "archive"
    assert result.set_aside == ()


@pytest.mark.parametrize(
    "kind",
    [
        pa.int32(),
        pa.uint32(),
        pa.uint64(),
        pa.float64(),
        pa.timestamp("s"),
        pa.timestamp("us"),
        pa.timestamp("ns", "UTC"),
        pa.timestamp("ms", "America/New_York"),
    ],
    ids=str,
)
def test_any_whole_number_or_timestamp_serves_as_time(tmp_path, kind):
    scale = {"ms": 10**3, "us": 10**6, "ns": 10**9}.get(getattr(kind, "unit", "s"), 1)
    write(tmp_path, ts=pa.array((minutes(9) * scale).tolist()).cast(kind), close=prices(9))
    np.testing.assert_array_equal(loaded(tmp_path).history.bars.open_ts, minutes(9))


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.decimal128(38, 4)], ids=str)
def test_any_kind_of_number_serves_as_price(tmp_path, kind):
    write(tmp_path, ts=minutes(3), close=pa.array([7, 8, 9]).cast(kind))
    np.testing.assert_array_equal(loaded(tmp_path).history.bars.close, [7.0, 8.0, 9.0])


def test_a_gap_stays_a_gap(tmp_path):
    kept = np.r_[0:10, 40:50]
    write(tmp_path, ts=minutes(50)[kept], close=prices(50)[kept])
    result = loaded(tmp_path)
    np.testing.assert_array_equal(result.history.bars.open_ts, minutes(50)[kept])
    assert result.set_aside == ()


def test_low_frequency_prefers_the_five_minute_file_and_never_mixes_feeds(tmp_path):
    write(tmp_path, ts=minutes(60), close=prices(60))
    write(tmp_path, "BTC_5m.parquet", ts=minutes(4, 300), close=1.5 * prices(4))
    history = loaded(tmp_path, frequency=Frequency.LF).history
    assert history.bars.feed == history.price_bars.feed == "archive:BTC_5m"
    np.testing.assert_array_equal(history.bars.close, 1.5 * prices(4))
    assert history.price_bars is history.bars


def test_low_frequency_is_built_from_minutes_where_there_is_nothing_else(tmp_path):
    write(tmp_path, ts=minutes(60), close=prices(60))
    history = loaded(tmp_path, frequency=Frequency.LF).history
    assert (history.bars.bar_s, history.price_bars.bar_s) == (300, 60)
    np.testing.assert_array_equal(history.bars.close, prices(60)[4::5])
    assert history.bars.feed == history.price_bars.feed


def test_frequencies_follow_from_the_files(tmp_path):
    write(tmp_path, ts=minutes(9), close=prices(9))
    write(tmp_path, "HYPE_5m.parquet", ts=minutes(9, 300), close=prices(9))
    write(tmp_path, "DOGE_1m.parquet", ts=minutes(9), close=prices(9))
    (tmp_path / "notes.txt").write_text("not bars")
    source = ArchiveSource(tmp_path)
    assert dict(source.frequencies()) == {
        "BTC": (Frequency.HF, Frequency.LF),
        "HYPE": (Frequency.LF,),
    }
    assert source.unknown_assets == ("DOGE",)
    assert source.series() == [("BTC", 60), ("HYPE", 300)]


def test_now_is_the_latest_end_of_a_usable_bar_over_all_assets(tmp_path):
    write(tmp_path, ts=minutes(9), close=prices(9))
    write(tmp_path, "ETH_5m.parquet", ts=minutes(4, 300), close=[1.0, 1.0, 1.0, np.nan])
    (tmp_path / "SOL_1m.parquet").write_bytes(b"broken")
    source = ArchiveSource(tmp_path)
    assert source.now() == START + 3 * 300
    assert source.live is False


def test_the_version_of_an_archive_changes_with_the_files_that_are_read(tmp_path):
    write(tmp_path, ts=minutes(20), close=prices(20))
    source = ArchiveSource(tmp_path)
    before = source.version("BTC", Frequency.HF, 0)
    assert ArchiveSource(tmp_path).version("BTC", Frequency.LF, 0) == before
    write(tmp_path, ts=minutes(21), close=prices(21))
    assert source.version("BTC", Frequency.HF, 0) != before


def test_real_bars_load_whole(real_bars):
    source = ArchiveSource(real_bars / "recent")
    assert source.frequencies()["HYPE"] == (Frequency.LF,)
    btc = source.load("BTC", Frequency.HF)
    assert len(btc.history.bars) == 212_365
    assert btc.set_aside == ()
    xau = source.load("XAU", Frequency.LF).history
    assert (xau.bars.bar_s, xau.price_bars.bar_s) == (300, 60)
    assert source.now() == btc.history.bars.end_ts


# ---------------------------------------------------------------- what is set aside


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -5.0])
def test_a_close_that_is_no_positive_number_is_set_aside(tmp_path, bad):
    close = prices(20)
    close[7] = bad
    write(tmp_path, ts=minutes(20), close=close)
    result = loaded(tmp_path)
    assert [bar.ts for bar in result.set_aside] == [minutes(20)[7]]
    assert "positive number" in result.set_aside[0].reason
    np.testing.assert_array_equal(result.history.bars.open_ts, np.delete(minutes(20), 7))


@pytest.mark.parametrize("factor", [100, 10, 0.1, 0.001])
@pytest.mark.parametrize("at", [0, 10, 19])
def test_a_spike_is_set_aside_and_named(tmp_path, factor, at):
    close = prices(20)
    close[at] *= factor
    write(tmp_path, ts=minutes(20), close=close)
    result = loaded(tmp_path)
    assert [(bar.ts, bar.close) for bar in result.set_aside] == [(minutes(20)[at], close[at])]
    assert "spike" in result.set_aside[0].reason
    np.testing.assert_array_equal(result.history.bars.close, np.delete(prices(20), at))


def test_a_spike_of_several_bars_and_two_spikes_in_a_row_are_set_aside(tmp_path):
    close = prices(30)
    close[5:8] *= 100
    close[20] *= 100
    close[22] /= 100
    write(tmp_path, ts=minutes(30), close=close)
    expected = minutes(30)[[5, 6, 7, 20, 22]].tolist()
    assert [bar.ts for bar in loaded(tmp_path).set_aside] == expected


def test_a_change_of_level_that_stays_is_kept(tmp_path):
    close = np.r_[prices(20), 100 * prices(20)]
    write(tmp_path, ts=minutes(40), close=close)
    result = loaded(tmp_path)
    np.testing.assert_array_equal(result.history.bars.close, close)
    assert result.set_aside == ()


def test_a_large_genuine_move_is_kept(tmp_path):
    close = prices(20)
    close[10] *= 5
    write(tmp_path, ts=minutes(20), close=close)
    assert loaded(tmp_path).set_aside == ()


def test_of_rows_with_one_time_the_last_usable_is_kept(tmp_path):
    ts = np.r_[minutes(10), minutes(10)[[4, 4, 6]]]
    close = np.r_[prices(10), 98.0, 99.0, np.nan]
    write(tmp_path, ts=ts, close=close)
    result = loaded(tmp_path)
    expected = prices(10)
    expected[4] = 99.0
    np.testing.assert_array_equal(result.history.bars.close, expected)
    assert sum("same time" in reason for reason in reasons(result)) == 2
    assert sum("positive number" in reason for reason in reasons(result)) == 1


def test_unsorted_rows_are_sorted_and_reported_once_with_their_count(tmp_path):
    order = np.arange(20)[::-1]
    write(tmp_path, ts=minutes(20)[order], close=prices(20)[order])
    result = loaded(tmp_path)
    np.testing.assert_array_equal(result.history.bars.close, prices(20))
    assert reasons(result) == ["19 rows came out of time order and were sorted"]


@given(st.permutations(range(12)))
def test_the_order_of_rows_in_a_file_changes_nothing(tmp_path, order):
    write(tmp_path, ts=minutes(12)[list(order)], close=prices(12)[list(order)])
    bars = loaded(tmp_path).history.bars
    np.testing.assert_array_equal(bars.open_ts, minutes(12))
    np.testing.assert_array_equal(bars.close, prices(12))


@pytest.mark.parametrize("wrong", [START + 61, START * 1000, 0, -60, 2**62 // 60 * 60])
def test_a_row_with_an_impossible_time_is_set_aside(tmp_path, wrong):
    write(tmp_path, ts=np.r_[minutes(9), wrong], close=prices(10))
    result = loaded(tmp_path)
    np.testing.assert_array_equal(result.history.bars.open_ts, minutes(9))
    assert [bar.ts for bar in result.set_aside] == [wrong]


def test_missing_times_are_set_aside(tmp_path):
    write(tmp_path, ts=pa.array([*minutes(5).tolist(), None, float("nan"), 0.5]), close=prices(8))
    result = loaded(tmp_path)
    assert len(result.history.bars) == 5
    assert len(result.set_aside) == 3


def test_impossible_optional_fields_become_nan_and_the_bar_stays(tmp_path):
    close = np.full(6, 100.0)
    high = np.array([101.0, 99.0, 101.0, 1e6, np.inf, 101.0])  # 1: below close, 3 and 4: absurd
    low = np.array([99.0, 98.0, 101.0, 99.0, 99.0, -1.0])  # 2: above close, 5: no price
    volume = np.array([1.0, -1.0, 0.0, 1.0, np.inf, 1.0])
    write(tmp_path, ts=minutes(6), open=close, high=high, low=low, close=close, volume=volume)
    result = loaded(tmp_path)
    bars = result.history.bars
    np.testing.assert_array_equal(bars.close, close)
    np.testing.assert_array_equal(np.isnan(bars.high), [0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(np.isnan(bars.low), [0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(np.isnan(bars.volume), [0, 1, 0, 0, 1, 0])
    assert len(result.set_aside) == 1
    assert "ignored" in result.set_aside[0].reason


def test_a_summary_counts_reasons_and_dates_the_first(tmp_path):
    close = prices(20)
    close[[3, 9]] = -1
    close[5] *= 100
    write(tmp_path, ts=minutes(20), close=close)
    assert summarise_set_aside(loaded(tmp_path).set_aside) == [
        "2 × close is not a positive number (first at 2025-12-01T00:03:00Z)",
        "1 × spike of about ×8 or more that reverts (first at 2025-12-01T00:05:00Z)",
    ]


# ---------------------------------------------------------------- what is refused


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text", b"PAR1" + bytes(400) + b"PAR1"])
def test_an_unreadable_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "BTC_1m.parquet").write_bytes(content)
    with pytest.raises(DataError) as error:
        loaded(tmp_path)
    assert "BTC_1m.parquet" in one_sentence(error)


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path, ts=minutes(500), close=prices(500))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"BTC_1m\.parquet cannot be read as Parquet"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        {"time": minutes(3), "close": [1.0, 2.0, 3.0]},
        {"ts": minutes(3), "price": [1.0, 2.0, 3.0]},
        {"ts": minutes(3), "close": ["1", "2", "3"]},
        {"ts": ["a", "b", "c"], "close": [1.0, 2.0, 3.0]},
        {"ts": [True, False, True], "close": [1.0, 2.0, 3.0]},
        {"ts": minutes(3), "close": [1.0, 2.0, 3.0], "high": ["x", "y", "z"]},
    ],
)
def test_wrong_columns_are_refused_with_what_was_found_and_what_is_needed(tmp_path, columns):
    write(tmp_path, **columns)
    with pytest.raises(DataError) as error:
        loaded(tmp_path)
    text = one_sentence(error)
    assert "BTC_1m.parquet" in text
    assert all(f"{name} (" in text for name in columns)
    assert "needed are ts or timestamp" in text


@pytest.mark.parametrize(
    ("ts", "close"),
    [(minutes(0), prices(0)), (minutes(3), np.full(3, np.nan)), (minutes(3) * 1000, prices(3))],
    ids=["no rows", "no prices", "milliseconds"],
)
def test_a_file_without_any_usable_bar_is_refused(tmp_path, ts, close):
    write(tmp_path, ts=ts, close=close)
    with pytest.raises(DataError) as error:
        loaded(tmp_path)
    assert "no usable bar" in one_sentence(error)


def test_a_folder_without_bars_is_unavailable(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(SourceUnavailable) as error:
            ArchiveSource(folder)
        assert str(folder) in one_sentence(error)
    write(tmp_path, "DOGE_1m.parquet", ts=minutes(9), close=prices(9))
    with pytest.raises(SourceUnavailable, match="only of DOGE"):
        ArchiveSource(tmp_path)


def test_what_the_source_lacks_is_refused_with_what_it_has(tmp_path):
    write(tmp_path, "HYPE_5m.parquet", ts=minutes(9, 300), close=prices(9))
    source = ArchiveSource(tmp_path)
    with pytest.raises(UnknownAsset, match="DOGE"):
        source.load("DOGE", Frequency.LF)
    with pytest.raises(DataError, match="no bars of BTC; it has HYPE"):
        source.load("BTC", Frequency.LF)
    with pytest.raises(DataError, match="only five-minute bars of HYPE"):
        source.load("HYPE", Frequency.HF)


# ---------------------------------------------------------------- daily partitions


def write_day(folder, day, n=1440, **extra):
    ts = minutes(n) + day * 86_400
    name = f"BTC/1m/date=2025-12-{day + 1:02d}.parquet"
    columns = {"timestamp": pa.array(ts).cast(pa.timestamp("s", "UTC")), "close": prices(n)} | extra
    return write(folder, name, **columns)


def test_an_archive_of_damaged_files_names_one_and_its_fault(tmp_path):
    (tmp_path / "BTC_1m.parquet").write_bytes(b"rotten")
    with pytest.raises(DataError) as error:
        ArchiveSource(tmp_path).now()
    text = one_sentence(error)
    assert f"no usable bar in any file: {tmp_path / 'BTC_1m.parquet'} cannot be read as" in text
    (tmp_path / "ETH_1m.parquet").write_bytes(b"rotten")
    with pytest.raises(DataError, match=r"in any file \(and 1 more like it\): .*BTC_1m"):
        ArchiveSource(tmp_path).now()


def test_of_partitions_the_newest_fault_is_told(tmp_path):
    for day in range(2):
        write_day(tmp_path, day)
        (tmp_path / f"BTC/1m/date=2025-12-{day + 1:02d}.parquet").write_bytes(b"rotten")
    with pytest.raises(DataError, match=r"date=2025-\d\d-02\.parquet cannot be read as Parquet"):
        ArchiveSource(tmp_path).now()


def test_a_file_without_a_time_column_is_told_the_short_name(tmp_path):
    pq.write_table(pa.table({"open": [1.0]}), tmp_path / "BTC_1m.parquet")
    with pytest.raises(DataError, match="lacks the column ts and close: found are open"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("source", [{"a": 1}] * 3),
        ("source", [["a"]] * 3),
        ("source", [b"\xff"] * 3),
        ("is_final", ["yes"] * 3),
    ],
)
def test_a_mark_of_another_kind_is_refused_by_its_name(tmp_path, column, values):
    write(tmp_path, ts=minutes(3), close=prices(3), **{column: values})
    with pytest.raises(DataError, match=rf"BTC_1m\.parquet has no .* in the column {column} \("):
        loaded(tmp_path)


def test_a_partition_that_is_named_after_no_day_is_left_out_and_named(tmp_path, caplog):
    write_day(tmp_path, 0)
    (day,) = (tmp_path / "BTC" / "1m").iterdir()
    shutil.copy(day, day.with_name("date=2025-13-45.parquet"))
    assert len(loaded(tmp_path).history.bars) == 1440
    assert "date=2025-13-45.parquet is named after no day" in caplog.text


def test_a_folder_that_may_not_be_looked_at_is_one_sentence(tmp_path):
    with pytest.raises(SourceUnavailable, match=r"cannot be read \(File name too long\)"):
        ArchiveSource(tmp_path / ("a" * 300))


@pytest.mark.parametrize("below", ["", "market_data/prices"])
def test_daily_partitions_are_one_series(tmp_path, below):
    for day in range(3):
        write_day(tmp_path / below, day)
    source = ArchiveSource(tmp_path)
    result = source.load("BTC", Frequency.HF)
    np.testing.assert_array_equal(result.history.bars.open_ts, minutes(3 * 1440))
    assert result.set_aside == ()
    assert source.now() == START + 3 * 86_400


def test_a_nan_in_a_partition_is_a_gap_and_no_news(tmp_path):
    close = prices(1440)
    close[100:160] = np.nan
    write_day(tmp_path, 0, close=close)
    result = loaded(tmp_path)
    assert len(result.history.bars) == 1380
    assert result.set_aside == ()


def test_bars_that_are_not_final_are_set_aside(tmp_path):
    write_day(tmp_path, 0, is_final=np.arange(1440) < 1438)
    result = loaded(tmp_path)
    assert len(result.history.bars) == 1438
    assert reasons(result) == ["not final yet"] * 2


def test_rows_of_an_older_feed_are_never_merged_with_those_of_the_newest(tmp_path):
    write_day(tmp_path, 0, source=["pyth"] * 1440)
    write_day(tmp_path, 1, source=["binance"] * 1440)
    result = loaded(tmp_path)
    assert result.history.bars.feed == "archive:BTC_1m@binance"
    assert result.history.bars.open_ts[0] == START + 86_400
    assert reasons(result) == ["1440 rows of another feed than binance, the newest"]


def test_an_unreadable_day_is_a_gap_that_is_reported(tmp_path):
    for day in range(3):
        write_day(tmp_path, day)
    (tmp_path / "BTC/1m/date=2025-12-02.parquet").write_bytes(b"broken")
    result = loaded(tmp_path)
    assert len(result.history.bars) == 2 * 1440
    (entry,) = result.set_aside
    assert entry.ts == START + 86_400
    assert "date=2025-12-02" in entry.reason


def test_a_single_file_wins_over_partitions(tmp_path):
    write_day(tmp_path, 0)
    write(tmp_path, ts=minutes(9), close=prices(9))
    assert len(loaded(tmp_path).history.bars) == 9


# ---------------------------------------------------------------- opening a source


@pytest.mark.parametrize("name", ["venue", "pyth"])
def test_a_live_source_opens_without_a_bar_and_without_a_feed(name):
    source = open_source(Settings(source=name))
    assert (source.name, source.live, source.unknown_assets) == (name, True, ())
    assert isinstance(source, GrowingSource)
    assert source.frequencies()["BTC"] == tuple(Frequency)
    assert source.recent("BTC", Frequency.HF) is None
    with pytest.raises(DataError) as error:
        source.load("BTC", Frequency.HF)
    assert "no bar of BTC from" in one_sentence(error)


def test_an_archive_needs_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="--archive-dir"):
        open_source(Settings(source="archive"))
    write(tmp_path, ts=minutes(9), close=prices(9))
    assert open_source(Settings(source="archive", archive_dir=Path(tmp_path))).name == "archive"


def test_the_simulated_source_serves_both_frequencies_and_repeats_itself():
    source, again = (open_source(Settings(source="simulated", seed=5)) for _ in range(2))
    assert source.name == "simulated"
    assert source.live is False
    assert set(source.frequencies()["BTC"]) == set(Frequency)
    history = source.load("BTC", Frequency.LF).history
    assert history.bars.feed == "simulated:BTC"
    assert (history.bars.bar_s, history.price_bars.bar_s) == (300, 60)
    assert source.now() == history.anchor_ts
    np.testing.assert_array_equal(
        history.bars.close, again.load("BTC", Frequency.LF).history.bars.close
    )
    with pytest.raises(DataError, match="no bars of ETH; it has BTC, XAU, SP500"):
        source.load("ETH", Frequency.LF)


def test_all_simulated_markets_are_open_when_the_history_ends():
    source = SimulatedSource(days=5)
    ends = {asset: source.load(asset, Frequency.HF).history.anchor_ts for asset in source.assets}
    assert set(ends.values()) == {source.end_ts}


# ---------------------------------------------------------------- live

LIVE_NOW = 1_765_800_000  # 2025-12-15 12:00 UTC


@dataclass
class StillClock:
    time: float = LIVE_NOW

    def now(self):
        return self.time


def live_bars(first, last, feed, *, bar_s=60, level=100.0):
    """Bars that open from `first` to before `last`, of one price of the world at some level."""
    ts = np.arange(-(-first // bar_s) * bar_s, last, bar_s, dtype=np.int64)
    close = level * np.exp(np.sin((ts + bar_s) / 7e4) / 20)
    none = np.full(len(ts), np.nan)
    return Bars(
        open_ts=ts, open=none, high=none, low=none, close=close, volume=none, bar_s=bar_s, feed=feed
    )


@pytest.fixture
def live(tmp_path):
    """A live source with three days of minutes, seventeen of five minutes, and older history."""
    store = BarStore(tmp_path)
    gold = "hyperliquid:xyz:GOLD"
    store.append("hyperliquid", "XAU", live_bars(LIVE_NOW - 3 * DAY_S, LIVE_NOW, gold))
    store.append("hyperliquid", "XAU", live_bars(LIVE_NOW - 17 * DAY_S, LIVE_NOW, gold, bar_s=300))
    token = live_bars(LIVE_NOW - 26 * DAY_S, LIVE_NOW - 16 * DAY_S, "pyth:XAUT", level=7.0)
    store.append("pyth", "XAU", token)
    store.append("binance", "BTC", live_bars(LIVE_NOW - 18 * DAY_S, LIVE_NOW, "binance:BTCUSDT"))
    return LiveSource(Settings(state_dir=tmp_path, days=25, memory_days=15), StillClock()), store


def test_lf_history_is_made_of_minutes_own_bars_and_other_feeds_on_one_level(live):
    source, _ = live
    history = source.load("XAU", Frequency.LF).history
    whole = live_bars(LIVE_NOW - 25 * DAY_S, LIVE_NOW, "", bar_s=300)
    np.testing.assert_allclose(
        np.log(history.bars.close[-len(whole) :]), np.log(whole.close), atol=1e-12
    )
    assert (np.diff(history.bars.open_ts) == 300).all()
    assert (history.bars.feed, history.source) == ("hyperliquid:xyz:GOLD", "venue")
    assert (history.price_bars.bar_s, history.anchor_ts, history.scored_lag_s) == (60, LIVE_NOW, 60)


def test_the_version_changes_with_bars_before_a_moment_of_any_feed_that_is_read(live):
    source, store = live
    until = LIVE_NOW // DAY_S * DAY_S - 16 * DAY_S
    before = source.version("XAU", Frequency.LF, until)
    gold, token = "hyperliquid:xyz:GOLD", "pyth:XAUT"
    store.append("hyperliquid", "XAU", live_bars(until, LIVE_NOW, gold, level=101.0))
    store.append("binance", "BTC", live_bars(until - DAY_S, until, "binance:BTCUSDT", level=9.0))
    assert source.version("XAU", Frequency.LF, until) == before
    assert source.version("XAU", Frequency.LF, until + DAY_S) != before
    store.append("pyth", "XAU", live_bars(until - 600, until, token, level=8.0))
    assert source.version("XAU", Frequency.LF, until) != before


def test_without_minutes_the_venues_own_bars_give_the_price(tmp_path):
    fives = live_bars(LIVE_NOW - DAY_S, LIVE_NOW, "hyperliquid:xyz:CL", bar_s=300)
    BarStore(tmp_path).append("hyperliquid", "WTIOIL", fives)
    source = LiveSource(Settings(state_dir=tmp_path), StillClock())
    history = source.load("WTIOIL", Frequency.LF).history
    assert history.price_bars.bar_s == 300
    np.testing.assert_array_equal(history.bars.close, fives.close)


def test_another_feed_of_the_same_price_stands_in_until_the_scored_one_has_a_bar(tmp_path):
    """Of several the freshest; nothing of it is left in the prices once scored bars come."""
    store = BarStore(tmp_path)
    store.append("pyth", "XAU", live_bars(LIVE_NOW - 3 * DAY_S, LIVE_NOW - DAY_S, "pyth:XAUT"))
    token = live_bars(LIVE_NOW - DAY_S, LIVE_NOW, "binance:PAXGUSDT", level=90.0)
    store.append("binance", "XAU", token)
    source = LiveSource(Settings(state_dir=tmp_path), StillClock())
    history = source.recent("XAU", Frequency.LF)
    assert history is not None
    assert history.stand_in == history.bars.feed == history.price_bars.feed == "binance:PAXGUSDT"
    assert history.anchor_price == token.close[-1]
    assert source.load("XAU", Frequency.LF).history.stand_in == "binance:PAXGUSDT"
    gold = live_bars(LIVE_NOW - 600, LIVE_NOW, "hyperliquid:xyz:GOLD", level=110.0)
    store.append("hyperliquid", "XAU", gold)
    later = source.recent("XAU", Frequency.LF)
    assert later is not None
    assert (later.stand_in, later.bars.feed) == (None, "hyperliquid:xyz:GOLD")
    np.testing.assert_array_equal(later.price_bars.close, gold.close)
    assert np.abs(np.diff(np.log(later.bars.close))).max() < 1e-3  # no return spans two levels


def test_a_feed_of_another_price_never_stands_in(tmp_path):
    tenth = live_bars(LIVE_NOW - DAY_S, LIVE_NOW, "pyth:Crypto.SPYX/USD")
    BarStore(tmp_path).append("pyth", "SP500", tenth)
    source = LiveSource(Settings(state_dir=tmp_path), StillClock())
    assert source.recent("SP500", Frequency.LF) is None
    with pytest.raises(DataError, match="no bar of SP500"):
        source.load("SP500", Frequency.LF)


def test_a_frequency_that_nobody_asks_is_refused(live):
    with pytest.raises(DataError, match="no validator asks XAU at hf"):
        live[0].load("XAU", Frequency.HF)


def test_the_recent_past_is_bounded_shared_and_the_same_object_until_it_changes(live):
    source, store = live
    fast, slow = source.recent("BTC", Frequency.HF), source.recent("BTC", Frequency.LF)
    assert fast is source.recent("BTC", Frequency.HF)
    assert LIVE_NOW - 16 * DAY_S < fast.bars.open_ts[0] <= LIVE_NOW - 15 * DAY_S
    assert np.shares_memory(slow.price_bars.close, fast.bars.close)  # minutes are in memory once
    store.append("hyperliquid", "XAU", live_bars(LIVE_NOW, LIVE_NOW + 60, "hyperliquid:xyz:GOLD"))
    assert fast is source.recent("BTC", Frequency.HF)
    store.append("binance", "BTC", live_bars(LIVE_NOW, LIVE_NOW + 60, "binance:BTCUSDT"))
    grown = source.recent("BTC", Frequency.HF)
    assert grown.anchor_ts == LIVE_NOW + 60
    np.testing.assert_array_equal(grown.bars.close[:-1], fast.bars.close)


def columns_of(history):
    if history is None:
        return None
    held = (history.bars, history.price_bars)
    return [(bars.open_ts.tolist(), bars.close.tolist()) for bars in held]


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(-4000, 3000), st.integers(1, 400)), max_size=5))
def test_following_changes_gives_what_reading_anew_gives(tmp_path_factory, writes):
    root = tmp_path_factory.mktemp("state")
    clock, chosen = StillClock(), Settings(state_dir=root, memory_days=15)
    followed = LiveSource(chosen, clock)
    BarStore(root).append(
        "binance", "BTC", live_bars(LIVE_NOW - DAY_S, LIVE_NOW, "binance:BTCUSDT")
    )
    followed.recent("BTC", Frequency.LF)
    for number, (first, length) in enumerate(writes):
        start = LIVE_NOW + 60 * first
        BarStore(root).append(
            "binance",
            "BTC",
            live_bars(start, start + 60 * length, "binance:BTCUSDT", level=100 + number),
        )
        clock.time += 7 * DAY_S * (number % 2)
        mine = followed.recent("BTC", Frequency.LF)
        anew = LiveSource(chosen, clock).recent("BTC", Frequency.LF)
        assert columns_of(mine) == columns_of(anew)


def test_only_assets_that_are_chosen_are_followed(tmp_path):
    chosen = Settings(state_dir=tmp_path, served_assets=("XAU", "BTC"))
    assert list(LiveSource(chosen, StillClock()).frequencies()) == ["BTC", "XAU"]


def test_the_clock_is_the_markets(tmp_path):
    assert LiveSource(Settings(state_dir=tmp_path), StillClock(LIVE_NOW + 0.9)).now() == LIVE_NOW


def test_a_source_reads_every_day_once_when_it_begins(live, monkeypatch):
    source, _ = live
    read, load = [], BarStore._load_day

    def counted(store, series, day, bar_s):
        read.append((series, day))
        return load(store, series, day, bar_s)

    monkeypatch.setattr(BarStore, "_load_day", counted)
    source.recent("BTC", Frequency.HF)
    assert len(read) == len(set(read)) > 10


def test_a_day_that_could_not_be_read_once_is_there_the_next_time(live, monkeypatch):
    source, _ = live
    whole, day = state_store._read, LIVE_NOW // DAY_S - 5
    name = f"{np.datetime64(day, 'D')}.msgpack"

    def refused(path):
        if path.name == name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return whole(path)

    with monkeypatch.context() as patch:
        patch.setattr(state_store, "_read", refused)
        lacking = source.recent("BTC", Frequency.HF)
    found = source.recent("BTC", Frequency.HF)
    assert len(found.bars) - len(lacking.bars) == 1440
    assert source.recent("BTC", Frequency.HF) is found
