"""The rehearsal as a command: short, complete, and with nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import orjson
import pytest

import rehearse
from clock import RehearsalClock
from console import EXIT_INTERRUPTED
from errors import BusyError, ConfigError, StateError
from feed_plans import FeedHost
from rehearsal import is_comparable, write_settings
from rehearse import LOCK, own_folder, read_script
from settings import load_settings
from simulated_market import simulate_bars
from state_store import owned

ROOT = Path(__file__).resolve().parent.parent
END = 1_766_102_400  # 2025-12-19 00:00 UTC
LIMIT_S = 120


@pytest.fixture(scope="module")
def bars_dir(tmp_path_factory, write_bars):
    """Six simulated days of BTC by the minute."""
    folder = tmp_path_factory.mktemp("bars")
    write_bars(folder, "BTC", simulate_bars("BTC", end_ts=END, days=6, seed=1))
    return folder


def arguments(bars_dir, work_dir, **changes):
    values = {
        "archive_dir": bars_dir,
        "assets": ["BTC"],
        "speed": 60.0,
        "days": 1.0,
        "start": None,
        "history": 3.0,
        "restart_at": 0.5,
        "simulated": False,
        "retrain_hours": None,
        "work_dir": work_dir,
    }
    return Namespace(**(values | changes))


# ---------------------------------------------------------------- what is set up


def test_the_latest_midnight_that_leaves_enough_bars_is_the_start(bars_dir, tmp_path):
    script = read_script(arguments(bars_dir, tmp_path))
    assert script.start == END - 2 * 86_400
    assert [pair[0] for pair in script.pairs] == ["BTC", "BTC"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": END - 86_400}, "start 2025-12-18T00:00:00.* is out of range"),
        ({"days": 5.5}, "is out of range"),
        ({"assets": ["ETH"]}, "no one-minute bars of ETH"),
        ({"assets": ["SPYX"]}, "no validator asks SPYX"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_in_one_sentence(bars_dir, tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_script(arguments(bars_dir, tmp_path, **changes))


def test_a_report_that_cannot_be_written_is_known_before_the_rehearsal(
    bars_dir, tmp_path, monkeypatch
):
    words = command(bars_dir, tmp_path / "work", "--report", str(tmp_path))[1:]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(StateError, match=r"is a folder; name a file with --report\.$"):
        rehearse.main()
    assert not (tmp_path / "work").exists()


def test_only_a_folder_of_an_earlier_rehearsal_is_made_anew(bars_dir, tmp_path):
    script = read_script(arguments(bars_dir, tmp_path / "work"))
    with own_folder(script):
        (script.work_dir / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="holds other files"), own_folder(script):
        pass
    assert (script.work_dir / "precious.txt").exists()
    script.config_file.write_text("")
    script.state_dir.mkdir()
    with own_folder(script):
        assert [path.name for path in script.work_dir.iterdir()] == [LOCK]


def test_a_folder_in_which_a_rehearsal_runs_is_left_to_it(bars_dir, tmp_path):
    script = read_script(arguments(bars_dir, tmp_path / "work"))
    with own_folder(script):  # no miner lives: it is between its two lives
        script.config_file.write_text("")
        with (
            pytest.raises(BusyError, match="a rehearsal runs in --work-dir"),
            own_folder(script),
        ):
            pass
        assert script.config_file.exists()


def test_a_folder_in_which_a_killed_rehearsals_miner_lives_is_left_to_it(bars_dir, tmp_path):
    script = read_script(arguments(bars_dir, tmp_path / "work"))
    with own_folder(script):
        script.config_file.write_text("")
    with (
        owned(script.state_dir),
        pytest.raises(BusyError, match="a rehearsal runs in --work-dir"),
        own_folder(script),
    ):
        pass
    assert script.config_file.exists()


def test_the_settings_file_says_what_the_rehearsal_means(bars_dir, tmp_path):
    script = read_script(arguments(bars_dir, tmp_path))
    clock = RehearsalClock(start=script.start, origin=1_766_400_000.25, speed=60)
    urls = {f"{host.value}_url": f"http://127.0.0.1:1/{host.value}" for host in FeedHost}
    written = write_settings(script, clock, urls)
    assert load_settings(script.config_file, {}) == written
    assert written.served_assets == ("BTC",)
    assert RehearsalClock.parse(written.rehearsal or "") == clock


def test_answers_are_compared_unless_a_new_set_came_in_between():
    old, same, new = (orjson.dumps({"model_version": name}) for name in ("a", "a", "b"))
    assert is_comparable(old, same)
    assert not is_comparable(old, new)
    assert is_comparable(old, None)
    assert not is_comparable(None, old)


# ---------------------------------------------------------------- the command


def command(bars_dir, work_dir, *flags):
    return [
        sys.executable,
        str(ROOT / "rehearse.py"),
        *("--archive-dir", str(bars_dir), "--asset", "BTC", "--history", "3"),
        *("--work-dir", str(work_dir), *flags),
    ]


def processes_of(work_dir):
    """Ids of processes whose command names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(work_dir) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_short_rehearsal_passes_and_says_so(bars_dir, tmp_path):
    work, report = tmp_path / "work", tmp_path / "report.json"
    flags = ("--speed", "240", "--days", "0.03", "--report", str(report))
    done = subprocess.run(
        command(bars_dir, work, *flags),
        capture_output=True,
        check=False,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.stdout.strip().endswith("PASSED"), done.stdout + done.stderr
    assert done.returncode == 0
    found = json.loads(report.read_text())
    assert found["passed"]
    assert found["asks"]["BTC hf"]["prompts"] >= 10
    assert found["restart"]["exit_code"] == 0
    assert found["restart"]["compared"] == 4
    assert len(found["lives"]) == 2
    assert processes_of(work) == []


def test_an_interrupt_ends_the_miner_and_prints_what_there_is(bars_dir, tmp_path):
    work = tmp_path / "work"
    running = subprocess.Popen(
        command(bars_dir, work, "--days", "0.5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log, deadline = work / "miner.log", time.monotonic() + LIMIT_S
        while not (log.exists() and "event=answered" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=LIMIT_S)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == EXIT_INTERRUPTED
    assert "interrupted; stopping the miner." in err
    assert "Prompts at the official cadence" in out
    assert "FAILED" in out
    assert processes_of(work) == []
