"""Refused rows: one line each, once, bounded, and never a reason to stop."""

import json
import resource
import signal

import pytest

import quarantine
from bar_cleaning import SetAsideBar
from errors import StateError
from quarantine import Quarantine

NOW = 1_765_800_000


def row(ts, close=5.0, reason="spike"):
    return SetAsideBar(ts=ts, close=close, reason=reason)


def add(root, *rows):
    return Quarantine(root).add("binance:BTCUSDT", "BTC", 60, rows, NOW)


def lines(root):
    path = Quarantine(root).path("binance:BTCUSDT", "BTC", 60)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_written_with_its_reason_once_across_restarts(tmp_path):
    assert add(tmp_path, row(60), row(120, close=float("nan"))) == 2
    assert add(tmp_path, row(60), row(180)) == 1
    assert [(entry["ts"], entry["close"]) for entry in lines(tmp_path)] == [
        (60, 5.0),
        (120, None),
        (180, 5.0),
    ]
    assert lines(tmp_path)[0] == {
        "found": "2025-12-15T12:00:00+00:00",
        "feed": "binance:BTCUSDT",
        "ts": 60,
        "close": 5.0,
        "reason": "spike",
    }


def test_a_damaged_line_hides_no_other(tmp_path):
    add(tmp_path, row(60))
    path = Quarantine(tmp_path).path("binance:BTCUSDT", "BTC", 60)
    path.write_bytes(b"\xff{broken\n[1]\n" + path.read_bytes())
    assert add(tmp_path, row(60), row(120)) == 1


def test_a_line_that_a_full_disk_cut_off_spoils_no_later_one(tmp_path):
    add(tmp_path, row(60))
    size = Quarantine(tmp_path).path("binance:BTCUSDT", "BTC", 60).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        with pytest.raises(StateError, match="free some disk space"):
            add(tmp_path, row(120), row(180))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    path = Quarantine(tmp_path).path("binance:BTCUSDT", "BTC", 60)
    assert path.stat().st_size == size + 20  # a part of it was taken
    assert add(tmp_path, row(120), row(240)) == 2
    whole, _cut_off, *later = path.read_text().splitlines()
    assert [json.loads(line)["ts"] for line in (whole, *later)] == [60, 120, 240]


def test_a_file_that_has_grown_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "_MAX_BYTES", 200)
    for ts in range(0, 1200, 60):
        add(tmp_path, row(ts))
    files = sorted(path.name for path in (tmp_path / "quarantine").iterdir())
    assert files == ["binance_BTC_60s.jsonl", "binance_BTC_60s.jsonl.old"]
    assert sum(path.stat().st_size for path in (tmp_path / "quarantine").iterdir()) < 1000


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "quarantine").write_text("a file")
    with pytest.raises(StateError, match=r"cannot be written .*; free some disk space or make"):
        add(tmp_path, row(60))
