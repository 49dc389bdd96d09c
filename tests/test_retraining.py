"""Trainings beside a running miner: one at a time, and no hurry to try again."""

import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import retraining
from config import Frequency
from model_store import published_sets
from retraining import Retrainer, Training, training_command
from settings import Settings
from state_store import locked
from tests.waiting import PATIENCE_S, is_running, wait_for

ROOT = Path(__file__).resolve().parent.parent

BTC, XAU = ("BTC", Frequency.HF), ("XAU", Frequency.LF)


class Clock:
    """Monotonic seconds, set by hand."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def python(code):
    return [sys.executable, "-c", code]


FAIL = "import sys; print('epoch 1', file=sys.stderr); sys.exit('train.py: no bars; get some.\\n')"


def outcomes(caplog):
    return [
        (entry.getMessage(), entry.asset)
        for entry in caplog.records
        if entry.getMessage() in {"training", "trained", "training failed"}
    ]


def under_way(retrainer):
    assert retrainer._running is not None
    return retrainer._running


def run_to_end(retrainer):
    """Let the training under way end, and the retrainer notice."""
    wait_for(lambda: under_way(retrainer).exit_code() is not None)
    retrainer.step()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="retraining")
    return caplog


def test_what_is_due_is_trained_one_after_the_other(log):
    due = [BTC, XAU]
    retrainer = Retrainer(lambda: due, lambda _pair: python("pass"), Clock())
    retrainer.step()
    retrainer.step()
    assert outcomes(log) == [("training", "BTC")]
    wait_for(lambda: under_way(retrainer).exit_code() is not None)
    due.remove(BTC)
    retrainer.step()
    assert outcomes(log) == [("training", "BTC"), ("trained", "BTC"), ("training", "XAU")]
    due.remove(XAU)
    run_to_end(retrainer)
    assert outcomes(log)[-1] == ("trained", "XAU")
    assert len(outcomes(log)) == 4


def test_a_failed_training_is_reported_with_its_last_line_and_waits_ever_longer(log):
    clock = Clock()
    retrainer = Retrainer(lambda: [BTC], lambda _pair: python(FAIL), clock)
    waits = []
    for _ in range(8):
        retrainer.step()
        run_to_end(retrainer)
        failure = log.records[-1]
        assert failure.getMessage() == "training failed"
        assert failure.reason == "train.py: no bars; get some."
        waits.append(failure.next_try_s)
        clock.time += failure.next_try_s - 1
        retrainer.step()
        assert retrainer._running is None
        clock.time += 1
    assert waits == [600, 1200, 2400, 4800, 9600, 19_200, 21_600, 21_600]


def test_one_failing_asset_does_not_hold_up_the_next(log):
    commands = {BTC: python(FAIL), XAU: python("pass")}
    retrainer = Retrainer(lambda: [BTC, XAU], commands.__getitem__, Clock())
    retrainer.step()
    run_to_end(retrainer)
    assert outcomes(log)[-2:] == [("training failed", "BTC"), ("training", "XAU")]
    retrainer.stop()


def test_after_a_success_the_next_failure_waits_the_shortest_time_again(log):
    clock = Clock()
    due = [BTC]
    retrainer = Retrainer(lambda: due, lambda _pair: python(FAIL), clock)
    for _ in range(2):
        retrainer.step()
        run_to_end(retrainer)
        clock.time += 10_000
    due.clear()
    retrainer.step()
    due.append(BTC)
    retrainer.step()
    run_to_end(retrainer)
    assert log.records[-1].next_try_s == 600


def test_a_training_that_helps_nothing_is_not_repeated_at_once(log):
    retrainer = Retrainer(lambda: [BTC], lambda _pair: python("pass"), Clock())
    retrainer.step()
    run_to_end(retrainer)
    retrainer.step()
    assert outcomes(log) == [("training", "BTC"), ("trained", "BTC")]


def test_a_talkative_training_does_not_stall(log):
    code = "import sys; sys.stderr.write('x' * 1_000_000 + '\\nlast\\n'); sys.exit(3)"
    retrainer = Retrainer(lambda: [BTC], lambda _pair: python(code), Clock())
    retrainer.step()
    run_to_end(retrainer)
    assert log.records[-1].reason == "last"


def test_a_training_runs_at_low_priority():
    training = Training(BTC, python("import time; time.sleep(60)"))
    try:
        assert os.getpriority(os.PRIO_PROCESS, training.pid) >= retraining.TRAINING_NICENESS
    finally:
        training.end()


def test_a_stopped_training_ends_with_all_its_workers(tmp_path):
    worker = tmp_path / "worker"
    code = (
        "import subprocess, sys, time, pathlib;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"pathlib.Path({str(worker)!r}).write_text(f'{{child.pid}}.');"
        "time.sleep(60)"
    )
    retrainer = Retrainer(lambda: [BTC], lambda _pair: python(code), Clock())
    retrainer.step()
    leader = under_way(retrainer).pid
    wait_for(lambda: worker.exists() and worker.read_text().endswith("."))
    retrainer.stop()
    wait_for(lambda: not is_running(leader))
    wait_for(lambda: not is_running(worker.read_text().rstrip(".")))


def test_a_training_that_hangs_is_ended_with_its_workers_and_the_next_pair_is_trained(
    log, tmp_path
):
    worker, clock = tmp_path / "worker", Clock()
    hang = (
        "import subprocess, sys, time, pathlib;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print('fold 2 of 4', file=sys.stderr, flush=True);"
        f"pathlib.Path({str(worker)!r}).write_text(f'{{child.pid}}.');"
        "time.sleep(60)"
    )
    commands = {BTC: python(hang), XAU: python("pass")}
    retrainer = Retrainer(lambda: [BTC, XAU], commands.__getitem__, clock)
    retrainer.step()
    leader = under_way(retrainer).pid
    wait_for(lambda: worker.exists() and worker.read_text().endswith("."))
    clock.time += retraining.LIMIT_S - 1
    retrainer.step()
    assert outcomes(log) == [("training", "BTC")]
    clock.time += 1
    retrainer.step()
    assert outcomes(log)[1:] == [("training failed", "BTC"), ("training", "XAU")]
    failure = next(line for line in log.records if line.getMessage() == "training failed")
    assert failure.reason == "ended after the limit of 3600 s; the last that it said: fold 2 of 4"
    assert (failure.seconds, failure.next_try_s) == (3600, 600)
    wait_for(lambda: not is_running(leader))
    wait_for(lambda: not is_running(worker.read_text().rstrip(".")))
    clock.time += failure.next_try_s - 1
    run_to_end(retrainer)
    assert outcomes(log)[3:] == [("trained", "XAU")]
    clock.time += 1
    retrainer.step()
    assert outcomes(log)[4:] == [("training", "BTC")]
    retrainer.stop()


def test_what_a_killed_training_leaves_behind_is_ended_too(log, tmp_path):
    child = tmp_path / "child"
    code = (
        "import os, pathlib, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"  # as for want of memory
    )
    retrainer = Retrainer(lambda: [BTC], lambda _pair: python(code), Clock())
    retrainer.step()
    wait_for(lambda: under_way(retrainer).exit_code() is not None)
    left = int(child.read_text())
    assert is_running(left)
    retrainer.step()
    wait_for(lambda: not is_running(left))
    assert outcomes(log) == [("training", "BTC"), ("training failed", "BTC")]


def test_a_training_that_will_not_listen_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(retraining, "STOP_S", 0.2)
    deaf = tmp_path / "deaf"
    code = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(deaf)!r}).touch(); time.sleep(60)"
    )
    training = Training(BTC, python(code))
    wait_for(deaf.exists)
    training.end()
    assert training.exit_code() == -signal.SIGKILL


MINER = """
import sys, time
from pathlib import Path
from config import Frequency
from settings import Settings
from retraining import Training, training_command

archive, models = map(Path, sys.argv[1:])
settings = Settings(source="archive", archive_dir=archive, model_dir=models, jobs=1)
pair = "BTC", Frequency.HF
training = Training(pair, training_command(settings, None, pair))
print(training.pid, flush=True)
time.sleep(600)
"""


def members(group):
    """The processes of a group that run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, of_group = status.read_text().rpartition(")")[2].split()[:3]
            found += [status.parent.name] if int(of_group) == group and state != "Z" else []
    return found


def test_a_training_ends_with_all_its_workers_when_the_miner_is_killed(archive_dir, tmp_path):
    models = tmp_path / "models"
    command = [sys.executable, "-c", MINER, str(archive_dir), str(models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as miner:
        assert miner.stdout is not None
        group = int(miner.stdout.readline())
        try:
            wait_for(lambda: len(members(group)) > 2)  # it works
            miner.kill()
            miner.wait()
            wait_for(lambda: not members(group))
        finally:
            miner.kill()
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    assert published_sets(models, "BTC", Frequency.HF) == ()  # it was not that it was done
    with locked(models, "training", wait_s=PATIENCE_S):
        pass  # and nothing keeps the next one from beginning


def test_a_training_uses_the_miners_own_settings():
    settings = Settings(source="archive", archive_dir=Path("bars"), seed=5, days=40)
    command = training_command(settings, Path("my.toml"), ("XAU", Frequency.LF))
    assert command[0] == sys.executable
    assert Path(command[1]) == ROOT / "train_models.py"
    assert " ".join(command[2:]) == (
        "--asset XAU --lf-only --stored-only --end-with-parent --source archive --archive-dir bars "
        "--state-dir state --model-dir models --profile 2026-09 --seed 5 --days 40 "
        "--config my.toml"
    )


def test_the_trainer_knows_every_flag_that_the_miner_passes():
    settings = Settings(source="archive", archive_dir=Path("bars"))
    commands = [
        training_command(settings, Path("my.toml"), ("BTC", frequency)) for frequency in Frequency
    ]
    listed = subprocess.run(
        [*commands[0][:2], "--help"], capture_output=True, text=True, check=True
    ).stdout
    passed = {word for command in commands for word in command if word.startswith("--")}
    assert passed <= set(re.findall(r"--[a-z-]+", listed))
