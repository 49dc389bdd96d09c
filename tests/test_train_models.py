"""The training script, run as its users run it."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train_models
from clock import RehearsalClock
from config import DAY_S, Frequency
from console import run_script
from data_fetcher import LiveSource, open_source
from errors import InsufficientHistory
from loopback_venues import serve_venues
from model_store import published_pairs
from settings import Settings
from state_store import locked
from task_pool import Job, work_off
from tests.pools import PoolHere, do_here
from wire_format import format_iso

ROOT = Path(__file__).resolve().parent.parent
HF, LF = Frequency.HF, Frequency.LF


# Most of a small training is the search of path shapes; workers read this file too.
QUICK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import lgbm_trainer, path_fitting, train_models
from config import Frequency
lgbm_trainer.SHAPE_PROMPTS = dict.fromkeys(Frequency, 3)
path_fitting.VARIATIONS = path_fitting.VARIATIONS[:2]
if __name__ == "__main__":
    train_models.run_script(train_models.main)
"""


def start(folder, *flags, script=ROOT / "train_models.py"):
    """A training in a folder of its own, with models below it."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(script), *flags],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": "random", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr.splitlines()


@pytest.fixture(scope="module")
def mixed_archive(archive_dir, archive, write_bars, tmp_path_factory):
    """BTC as in the shared archive, and a day of ETH, which is too little."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "BTC_1m.parquet").symlink_to(archive_dir / "BTC_1m.parquet")
    bars = archive.load("BTC", HF).history.bars
    write_bars(folder, "ETH", bars.between(bars.end_ts - DAY_S, None))
    return folder


@pytest.fixture(scope="module")
def trainings(mixed_archive, tmp_path_factory):
    """BTC LF trained alone, and by two processes along with HF and a hopeless ETH."""
    base = tmp_path_factory.mktemp("trainings")
    script = base / "quick.py"
    script.write_text(QUICK)
    flags = ("--source", "archive", "--archive-dir", str(mixed_archive), "--days", "7")
    started = {
        "alone": start(
            base / "alone", *flags, "--asset", "BTC", "--lf-only", "--jobs", "1", script=script
        ),
        "all": start(base / "all", *flags, "--jobs", "2", script=script),
    }
    return {name: (base / name / "models", *finish(run)) for name, run in started.items()}


# ---------------------------------------------------------------- what it does


def test_the_number_of_processes_changes_no_byte(trainings):
    def files(name):
        folder = trainings[name][0] / "BTC_lf"
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}

    alone = files("alone")
    assert sum(len(path.parts) == 2 for path in alone) == 3 + 4  # the set, and its centres
    assert alone == files("all")


def test_a_finished_training_ends_with_a_table_and_exit_code_0(trainings):
    _, code, stdout, stderr = trainings["alone"]
    assert code == 0
    title, _, header, _, *rest = (line.split() for line in stdout.splitlines())
    assert title == ["Trained", "models"]
    assert header == ["asset", "freq", "lead", "rows", "iter", "centre", "shrink", "scale", "s"]
    rows = [row for row in rest if "%" in row]
    assert rows[0][:3] == ["BTC", "lf", "300"]
    assert [row[0] for row in rows[1:]] == ["1800", "10800", "86400"]
    assert stdout.splitlines()[-1] == "in use from now on: models/BTC_lf"
    assert stderr == [
        "BTC lf: trained on only 7.0 days of bars; below 30 days the calibration is rough."
    ]


def test_what_cannot_be_trained_is_said_and_the_others_are_kept(trainings):
    folder, code, stdout, stderr = trainings["all"]
    assert code == 1
    assert published_pairs(folder) == (("BTC", HF), ("BTC", LF))
    rows = [line.split() for line in stdout.splitlines() if "%" in line]
    assert [row[:3] for row in rows if row[0] == "BTC"] == [
        ["BTC", "hf", "60"],
        ["BTC", "lf", "300"],
    ]
    assert len(rows) == 6 + 4
    refusals = [line for line in stderr if line.startswith("ETH")]
    assert len(refusals) == 2
    assert min(refusals).startswith("ETH hf: 1439 bars over 1.0 days are too short a time;")
    assert stderr[0].startswith("not in this source: SOL, XRP, HYPE, XAU")
    assert not any("Traceback" in line for line in stderr)


# ---------------------------------------------------------------- what it refuses

REFUSALS = {
    "no such folder": (
        ("--source", "archive", "--archive-dir", "nowhere"),
        "archive folder nowhere does not exist",
    ),
    "in use": (
        ("--source", "simulated", "--asset", "BTC", "--model-dir", "taken"),
        "taken is in use by another process, so training cannot start",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """All refusals, started side by side: exit code, stdout and lines of stderr by name."""
    base = tmp_path_factory.mktemp("refused")
    with locked(base / "taken", "this test"):
        started = {name: start(base, *flags) for name, (flags, _) in REFUSALS.items()}
        return {name: finish(process) for name, process in started.items()}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_exit_code_1(refused, name):
    code, stdout, (line,) = refused[name]
    assert (code, stdout) == (1, "")
    assert line.startswith(f"train_models.py: {REFUSALS[name][1]}")


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the script in this process: exit code, stdout, lines of stderr."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train_models.py", *flags])
        monkeypatch.setattr(train_models, "configure_logging", lambda _level: None)
        with pytest.raises(SystemExit) as end:
            run_script(train_models.main)
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err.splitlines()

    return run


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--asset", "DOGE"), "asset 'DOGE' is unknown; known are BTC"),
        (("--until", "tomorrow"), "'tomorrow' is not an ISO 8601 time"),
        (("--source", "archive"), "source 'archive' needs a folder"),
        (
            ("--source", "archive", "--archive-dir", "."),
            "archive folder . has no bars of a known asset",
        ),
        (
            ("--source", "simulated", "--days", "few"),
            "days='few' from --days does not fit; write a number",
        ),
        (("--source", "simulated", "--jobs", "0"), "jobs=0 from --jobs is out of range"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_1(main, flags, sentence):
    code, stdout, (line,) = main(*flags)
    assert (code, stdout) == (1, "")
    assert line.startswith(f"train_models.py: {sentence}")


def test_only_the_one_and_only_the_other_is_a_contradiction(main):
    code, _, stderr = main("--hf-only", "--lf-only")
    assert code == 2
    assert "not allowed with argument" in stderr[-1]


def test_an_asset_without_minutes_has_no_hf_models(main, archive_dir):
    flags = ("--source", "archive", "--archive-dir", str(archive_dir), "--asset", "XAU")
    code, stdout, stderr = main(*flags, "--hf-only")
    assert (code, stdout) == (1, "")
    assert stderr == ["XAU has no bars for hf in this source."]


def test_a_source_with_nothing_to_train_says_so(main, archive, write_bars, tmp_path):
    write_bars(tmp_path / "bars", "XAU", archive.load("XAU", LF).history.bars)
    code, stdout, stderr = main("--source", "archive", "--archive-dir", "bars", "--hf-only")
    assert (code, stdout) == (1, "")
    assert stderr[-1] == "no asset of this source has bars for hf models."


def test_assets_asked_for_twice_are_trained_once_and_absent_ones_named(archive):
    args = train_models.parser().parse_args(
        ["--asset", "btc", "--asset", "BTC", "--asset", "SOL", "--lf-only"]
    )
    pairs, failures = train_models.choose_pairs(archive, args)
    assert pairs == [("BTC", LF)]
    assert failures == ["SOL is not in this source; it has BTC, XAU."]


# ---------------------------------------------------------------- one task


@pytest.fixture
def run_task(quick_search, tmp_path):
    """One set, trained in this process: its result, and the jobs that could not be made."""

    def run(folder, frequency=LF, until=None):
        settings = Settings(
            source="archive", archive_dir=folder, days=6.5, model_dir=tmp_path / "models"
        )
        batch = train_models._Batch(settings=settings, until=until)
        do_here(batch.jobs({("BTC", frequency): f"BTC {frequency.value}"}))
        return batch

    return run


def test_bars_after_until_change_no_byte(run_task, archive_dir, archive, write_bars, tmp_path):
    until = archive.now() - 2 * DAY_S
    for asset, frequency in (("BTC", HF), ("XAU", LF)):  # all that the pool reads
        bars = archive.load(asset, frequency).history.bars
        noise = np.exp(0.3 * np.random.default_rng(0).standard_normal(len(bars)))
        close = np.where(bars.close_ts > until, bars.close * noise, bars.close)
        write_bars(tmp_path / "corrupted", asset, replace(bars, close=close))
    (one,) = run_task(archive_dir, until=until).results
    (other,) = run_task(tmp_path / "corrupted", until=until).results
    assert one.files == other.files
    (later,) = run_task(tmp_path / "corrupted").results
    assert later.files != one.files


def test_a_moment_before_the_first_bar_trains_nothing(run_task, archive_dir, archive):
    first = int(archive.load("BTC", HF).history.bars.open_ts[0])
    batch = run_task(archive_dir, until=first)
    assert batch.results == []
    (failure,) = batch.failures
    assert failure == "BTC lf: no bars are known by --until; choose a later moment."


def test_a_moment_after_the_last_bar_is_told(main, mixed_archive, archive):
    late = ("--until", "2030-01-01", "--days", "2", "--asset", "BTC", "--hf-only")
    code, _, lines = main("--source", "archive", "--archive-dir", str(mixed_archive), *late)
    assert code == 1
    first, second = lines
    assert first == (
        "--until 2030-01-01T00:00:00+00:00 lies after the end of the last bar, "
        f"{format_iso(archive.now())}; all bars are used."
    )
    assert "2.0 days are too short a time" in second


def test_a_damaged_file_is_told_once_for_both_frequencies(main, tmp_path):
    (tmp_path / "BTC_1m.parquet").write_bytes(b"rotten")
    code, _, lines = main("--source", "archive", "--archive-dir", str(tmp_path), "--asset", "BTC")
    assert code == 1
    (line,) = lines
    assert "BTC_1m.parquet cannot be read as Parquet" in line


def test_bars_that_were_set_aside_are_reported(run_task, archive, write_bars, tmp_path, capsys):
    bars = archive.load("BTC", HF).history.bars
    close = bars.close.copy()
    close[-5_000] *= 100
    write_bars(tmp_path / "spiked", "BTC", replace(bars, close=close))
    run_task(tmp_path / "spiked")
    line = capsys.readouterr().err
    assert line.startswith("BTC lf: set aside 1 × spike of about ×8 or more that reverts (first")


# ---------------------------------------------------------------- when something breaks


def raising(error):
    raise error


def outcome_of(error, settings):
    """The failure that a task ends with which raises the error."""
    batch = train_models._Batch(settings=settings, until=None)
    job = Job(name="BTC hf", work=raising, args=(error,), then=list)
    work_off(PoolHere(), [job], batch._failed)
    assert batch.results == []
    (failure,) = batch.failures
    return failure


def test_a_refused_set_is_a_failure_in_its_own_words(tmp_path):
    failure = outcome_of(InsufficientHistory("too short; wait."), Settings(model_dir=tmp_path))
    assert failure == "too short; wait."


def test_a_bug_keeps_its_traceback_and_stops_no_other_set(tmp_path, caplog):
    failure = outcome_of(ZeroDivisionError("a bug"), Settings(model_dir=tmp_path))
    assert failure == "BTC hf: the training failed by a fault of the program, see above."
    (entry,) = caplog.records
    assert entry.exc_info is not None
    assert entry.exc_info[0] is ZeroDivisionError


def test_a_set_that_cannot_be_written_is_a_failure(tmp_path, trained):
    blocked = tmp_path / "models"
    blocked.write_text("a file where the folder should be")
    batch = train_models._Batch(settings=Settings(model_dir=blocked), until=None)
    assert list(batch._keep([], trained[HF])) == []
    (failure,) = batch.failures
    assert "cannot be written" in failure


# ---------------------------------------------------------------- live sources

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def unreachable():
    """Settings under which every feed is out of reach."""
    names = ("binance", "hyperliquid", "pyth_history", "pyth_router", "pyth_latest")
    Path("miner.toml").write_text("".join(f'{name}_url = "{NOWHERE}"\n' for name in names))


def test_an_unreachable_feed_stops_the_training_with_its_sentence(unreachable, main, caplog):
    code, stdout, (line,) = main("--asset", "BTC", "--days", "3")
    assert (code, stdout) == (1, "")
    assert line.startswith(f"train_models.py: binance at {NOWHERE} cannot be reached")
    assert line.endswith("check the network first, else name another host with BINANCE_API_HOST.")
    assert not Path("models").exists()


def test_stored_bars_alone_need_no_feed(unreachable, main):
    code, _, (line,) = main("--asset", "BTC", "--stored-only", "--hf-only")
    assert code == 1
    assert line.startswith("no bar of BTC from binance:BTCUSDT is stored yet; let train_models.py")


def test_missing_bars_are_fetched_before_a_training_and_only_once(archive, tmp_path):
    bars = archive.load("BTC", HF).history.bars
    now = bars.end_ts - 30
    rehearsal = str(RehearsalClock(start=now, origin=time.time(), speed=1))
    with serve_venues({"BTC": bars}, RehearsalClock.parse(rehearsal)) as venues:
        settings = Settings(
            state_dir=tmp_path / "state", days=3, rehearsal=rehearsal, **venues.urls
        )
        source = open_source(settings)
        assert isinstance(source, LiveSource)
        train_models.collect_bars(source, settings, ["BTC"])
        first = len(venues.asked)
        train_models.collect_bars(source, settings, ["BTC"])
        # The past is there; the last two days are read again, a thousand bars a call.
        assert len(venues.asked) - first == 3
    history = source.load("BTC", HF).history
    assert history.anchor_ts == now // 60 * 60
    assert len(history.bars) == len(bars.between(now - 3 * DAY_S, now))
