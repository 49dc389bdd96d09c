"""Importing bars as an operator does: from the command line, twice, and with broken files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import import_bars
from bar_store import BarStore
from clock import SystemClock
from errors import ConfigError, SourceUnavailable

START = 1_764_547_200  # 2025-12-01, midnight UTC
SCRIPT = Path(import_bars.__file__)


def write(folder, name, n=20, bar_s=60, spike_at=None):
    close = 100 + np.arange(n) / 100
    if spike_at is not None:
        close[spike_at] *= 100
    folder.mkdir(exist_ok=True)
    ts = START + bar_s * np.arange(n, dtype=np.int64)
    pq.write_table(pa.table({"ts": ts, "close": close}), folder / name)


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "bars"
    write(folder, "BTC_1m.parquet")
    write(folder, "BTC_5m.parquet", bar_s=300)
    write(folder, "ETH_1m.parquet", n=30, spike_at=9)
    return folder


def run(archive, *more):
    return import_bars.main(["--archive-dir", str(archive), "--feed", "binance", *more])


def test_every_series_is_stored_under_the_name_of_its_feed(archive, capsys):
    assert run(archive) == 0
    store = BarStore(Path("state"))
    expected = [("binance", "BTC", 60), ("binance", "BTC", 300), ("binance", "ETH", 60)]
    assert store.series() == expected
    bars = store.load("binance", "BTC", 60)
    assert bars is not None
    assert len(bars) == 20
    assert bars.feed == "binance:BTCUSDT"  # as the collector labels what it adds
    printed = capsys.readouterr().out
    assert "ETH 1m set aside: 1 × spike" in printed
    assert "2025-12-01" in printed


def test_a_second_import_adds_what_is_new(archive, capsys):
    run(archive)
    write(archive, "BTC_1m.parquet", n=50)
    capsys.readouterr()
    assert run(archive, "--asset", "BTC") == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if " 1m " in line]
    assert row[:4] == ["BTC", "1m", "30", "50"]


def test_bars_of_the_future_are_set_aside(archive, capsys, monkeypatch):
    monkeypatch.setattr(SystemClock, "now", lambda _: START + 60 * 12 + 30.5)
    assert run(archive, "--asset", "BTC") == 0
    bars = BarStore(Path("state")).load("binance", "BTC", 60)
    assert bars is not None
    assert bars.end_ts == START + 60 * 12
    said = "BTC 1m set aside: 8 × closes after now (first at 2025-12-01T00:12:00Z)"
    assert said in capsys.readouterr().out
    monkeypatch.setattr(SystemClock, "now", lambda _: START)
    assert run(archive, "--asset", "ETH") == 1
    assert "ETH: all 29 bars close after now, 2025-12-01T00:00:00+00:00" in capsys.readouterr().err


def test_only_the_named_assets_are_imported(archive):
    assert run(archive, "--asset", "eth", "--state-dir", "elsewhere") == 0
    assert BarStore(Path("elsewhere")).series() == [("binance", "ETH", 60)]
    assert not Path("state").exists()


def test_what_cannot_be_imported_is_named_and_the_rest_is_kept(archive, capsys):
    (archive / "SOL_1m.parquet").write_bytes(b"broken")
    write(archive, "DOGE_1m.parquet")
    assert run(archive) == 1
    assert len(BarStore(Path("state")).series()) == 3
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("import_bars.py: ")
    assert "SOL_1m.parquet" in line
    assert "DOGE" in captured.out


def test_an_asset_that_the_folder_lacks_is_an_error(archive, capsys):
    assert run(archive, "--asset", "BTC", "--asset", "XAU") == 1
    assert "no bars of XAU; it has BTC, ETH." in capsys.readouterr().err
    assert ("binance", "BTC", 60) in BarStore(Path("state")).series()


@pytest.mark.parametrize("name", ["nosuchfeed", "../x", ""])
def test_a_feed_that_nobody_reads_is_refused_with_the_known_ones(archive, capsys, tmp_path, name):
    with pytest.raises(SystemExit) as ended:
        run(archive, "--feed", name)
    assert ended.value.code == 2
    assert "choose from binance, hyperliquid, pyth" in capsys.readouterr().err.replace("'", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars"]


def test_an_asset_that_is_not_read_from_the_feed_is_left_out_and_named(archive, capsys):
    write(archive, "HYPE_1m.parquet")
    assert run(archive) == 0
    assert "no feed of them is read from binance: HYPE" in capsys.readouterr().out
    assert run(archive, "--asset", "HYPE") == 1
    assert "no feed of HYPE is read from binance; name another" in capsys.readouterr().err
    assert ("binance", "HYPE", 60) not in BarStore(Path("state")).series()


def test_a_folder_of_which_nothing_is_read_from_the_feed_is_an_error(tmp_path, capsys):
    write(tmp_path / "bars", "HYPE_1m.parquet")
    assert run(tmp_path / "bars") == 1
    assert "is read from binance." in capsys.readouterr().err


def test_the_symbol_is_shown_and_one_that_is_not_scored_is_warned_of(archive, capsys):
    write(archive, "XAU_1m.parquet")
    assert run(archive) == 0
    told = capsys.readouterr()
    assert "BTC is stored as binance:BTCUSDT, the feed that is scored.\n" in told.out
    assert told.err == (
        "XAU is stored as binance:PAXGUSDT, but hyperliquid:xyz:GOLD is scored: its past alone can "
        "be extended by them.\n"
    )


def test_an_asset_that_nobody_asks_is_warned_of(archive, capsys):
    write(archive, "SPYX_1m.parquet")
    assert run(archive, "--feed", "pyth", "--asset", "SPYX") == 0
    assert "but profile 2026-09 does not ask SPYX." in capsys.readouterr().err


def test_without_a_usable_folder_there_is_nothing_to_import(tmp_path):
    with pytest.raises(ConfigError, match="--archive-dir"):
        import_bars.main(["--feed", "binance"])
    with pytest.raises(SourceUnavailable, match="does not exist"):
        run(tmp_path / "absent")


def test_as_a_script_a_failure_is_one_line_and_exit_code_one(tmp_path):
    command = [sys.executable, str(SCRIPT), "--feed", "binance", "--archive-dir", "absent"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert "absent" in ended.stderr


def test_the_help_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        import_bars.main(["--help"])
    assert "python import_bars.py" in capsys.readouterr().out.splitlines()[-1]
