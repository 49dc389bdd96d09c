"""The long-lived process: started, asked, stopped; and its background work."""

import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import miner
from config import Frequency, Settings
from domain import ForecastRequest
from errors import SourceUnavailable
from http_service import bind
from wire_format import parse_iso_minute, validate_answer

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60  # of a busy machine; nothing here takes long on an idle one
STOP_LIMIT_S = 10  # what operators are promised

BTC, XAU = ("BTC", Frequency.HF), ("XAU", Frequency.LF)


def wait_for(condition):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def is_running(pid):
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- retraining


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
    caplog.set_level(logging.INFO, logger="miner")
    return caplog


def test_what_is_due_is_trained_one_after_the_other(log):
    due = [BTC, XAU]
    retrainer = miner.Retrainer(lambda: due, lambda _pair: python("pass"), Clock())
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
    retrainer = miner.Retrainer(lambda: [BTC], lambda _pair: python(FAIL), clock)
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
    retrainer = miner.Retrainer(lambda: [BTC, XAU], commands.__getitem__, Clock())
    retrainer.step()
    run_to_end(retrainer)
    assert outcomes(log)[-2:] == [("training failed", "BTC"), ("training", "XAU")]
    retrainer.stop()


def test_after_a_success_the_next_failure_waits_the_shortest_time_again(log):
    clock = Clock()
    due = [BTC]
    retrainer = miner.Retrainer(lambda: due, lambda _pair: python(FAIL), clock)
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
    retrainer = miner.Retrainer(lambda: [BTC], lambda _pair: python("pass"), Clock())
    retrainer.step()
    run_to_end(retrainer)
    retrainer.step()
    assert outcomes(log) == [("training", "BTC"), ("trained", "BTC")]


def test_a_talkative_training_does_not_stall(log):
    code = "import sys; sys.stderr.write('x' * 1_000_000 + '\\nlast\\n'); sys.exit(3)"
    retrainer = miner.Retrainer(lambda: [BTC], lambda _pair: python(code), Clock())
    retrainer.step()
    run_to_end(retrainer)
    assert log.records[-1].reason == "last"


def test_a_training_runs_at_low_priority():
    training = miner.Training(BTC, python("import time; time.sleep(60)"))
    try:
        assert os.getpriority(os.PRIO_PROCESS, training.pid) >= miner.TRAINING_NICENESS
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
    retrainer = miner.Retrainer(lambda: [BTC], lambda _pair: python(code), Clock())
    retrainer.step()
    leader = under_way(retrainer).pid
    wait_for(lambda: worker.exists() and worker.read_text().endswith("."))
    retrainer.stop()
    wait_for(lambda: not is_running(leader))
    wait_for(lambda: not is_running(worker.read_text().rstrip(".")))


def test_a_training_that_will_not_listen_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(miner, "STOP_S", 0.2)
    deaf = tmp_path / "deaf"
    code = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(deaf)!r}).touch(); time.sleep(60)"
    )
    training = miner.Training(BTC, python(code))
    wait_for(deaf.exists)
    training.end()
    assert training.exit_code() == -signal.SIGKILL


def test_a_training_uses_the_miners_own_settings():
    settings = Settings(source="archive", archive_dir=Path("bars"), seed=5, days=40, jobs=2)
    command = miner.training_command(settings, Path("my.toml"), ("XAU", Frequency.LF))
    assert command[0] == sys.executable
    assert Path(command[1]) == ROOT / "train_models.py"
    assert " ".join(command[2:]) == (
        "--asset XAU --lf-only --source archive --archive-dir bars --state-dir state "
        "--model-dir models --profile 2026-09 --seed 5 --days 40 --jobs 2 --config my.toml"
    )


def test_the_trainer_knows_every_flag_that_the_miner_passes():
    settings = Settings(source="archive", archive_dir=Path("bars"))
    commands = [
        miner.training_command(settings, Path("my.toml"), ("BTC", frequency))
        for frequency in Frequency
    ]
    listed = subprocess.run(
        [*commands[0][:2], "--help"], capture_output=True, text=True, check=True
    ).stdout
    passed = {word for command in commands for word in command if word.startswith("--")}
    assert passed <= set(re.findall(r"--[a-z-]+", listed))


# ---------------------------------------------------------------- background


@contextmanager
def upkeep_of(*duties):
    upkeep = miner.Upkeep(duties, tick_s=0.001)
    upkeep.start()
    try:
        yield upkeep
    finally:
        upkeep.stop()


def test_a_failing_duty_stops_no_other(log):
    done = []

    def fail():
        raise ZeroDivisionError("a bug")

    def refuse():
        raise SourceUnavailable("the feed is away; wait.")

    duties = [
        miner.Duty("bug", 0, fail),
        miner.Duty("feed", 0, refuse),
        miner.Duty("work", 0, lambda: done.append(1)),
    ]
    with upkeep_of(*duties):
        wait_for(lambda: len(done) >= 5)
    failures = [entry for entry in log.records if entry.getMessage() == "duty failed"]
    # each was logged once, although the third was done five times: it waits a while
    assert [entry.duty for entry in failures] == ["bug", "feed"]
    assert failures[0].exc_info is not None
    assert failures[1].exc_info is None
    assert failures[1].reason == "the feed is away; wait."


def test_duties_keep_their_own_pace():
    counts = {"often": 0, "once": 0}

    def count(name):
        counts[name] += 1

    duties = [
        miner.Duty("often", 0, lambda: count("often")),
        miner.Duty("once", 3600, lambda: count("once")),
    ]
    with upkeep_of(*duties):
        wait_for(lambda: counts["often"] >= 5)
    assert counts["once"] == 1


def test_a_stuck_duty_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(miner, "STOP_S", 0.05)
    release, entered = threading.Event(), threading.Event()

    def stick():
        entered.set()
        release.wait(PATIENCE_S)

    with upkeep_of(miner.Duty("stuck", 0, stick)) as upkeep:
        assert entered.wait(PATIENCE_S)
    assert upkeep._thread.is_alive()
    release.set()
    upkeep._thread.join(PATIENCE_S)
    assert not upkeep._thread.is_alive()


# ---------------------------------------------------------------- the first line


def test_the_first_line_says_what_is_served_where_and_from_which_models():
    line = miner.serving_line(
        "http://127.0.0.1:8091",
        "archive",
        ["BTC", "ETH"],
        trained={("BTC", Frequency.LF): 0, ("BTC", Frequency.HF): 43_200},
        due=[("BTC", Frequency.HF), ("ETH", Frequency.LF)],
        now=86_400,
    )
    assert line == (
        "serving BTC hf+lf, ETH lf on http://127.0.0.1:8091 from source archive; "
        "2 of 3 model sets are trained, the oldest 1.0 days ago, 1 of them due again."
    )


def test_a_simulated_market_is_called_so():
    line = miner.serving_line(
        "http://[::1]:1", "simulated", ["BTC"], trained={}, due=[("BTC", Frequency.HF)], now=60
    )
    assert "from a SIMULATED market; none of 1 model sets is trained yet." in line


# ---------------------------------------------------------------- the process


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model and state folders with BTC trained at high frequency."""
    base = tmp_path_factory.mktemp("miner")
    flags = ["--model-dir", str(base / "models"), "--state-dir", str(base / "state")]
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "train_models.py"), "--source", "simulated"),
            *("--asset", "BTC", "--hf-only", "--days", "4", "--jobs", "1", *flags),
        ],
        cwd=base,
        check=True,
        capture_output=True,
    )
    return flags


@contextmanager
def running(*flags):
    """A miner on a free port: its process, base URL and lines on stderr so far."""
    command = [sys.executable, str(ROOT / "miner.py"), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        readable, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        first = process.stdout.readline() if readable else ""
        url = re.search(r"http://\S+", first)
        assert url, (first, lines)
        yield process, url.group(), lines
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        reader.join(PATIENCE_S)
        process.stdout.close()
        process.stderr.close()


def ask(url, **changes):
    body = {
        "asset": "BTC",
        "prompt_start_time": None,
        "origin": None,
        "horizon_seconds": 3600,
        "interval_seconds": 60,
        "num_paths": 100,
        "generated_at": "2026-01-15T12:00:00Z",
    }
    return httpx.post(f"{url}/predict", json=body | changes, timeout=PATIENCE_S)


def assert_valid(answer, asked):
    start = parse_iso_minute(answer["timestamps"][0])
    prompt = ForecastRequest(asset=answer["asset"], start_ts=start, **asked)
    validate_answer([start, asked["increment_s"], *answer["paths"]], prompt)


def test_a_terminated_miner_ends_well_and_the_next_one_answers_the_same(folders):
    with running("--source", "simulated", *folders) as (process, url, _lines):
        assert "BTC" in httpx.get(f"{url}/healthz").json()["assets"]
        hour = ask(url)
        assert hour.status_code == 200
        assert_valid(hour.json(), {"increment_s": 60, "length_s": 3600, "num_paths": 100})
        assert hour.json()["model_version"] != "none"
        day = ask(url, horizon_seconds=86_400, interval_seconds=300, num_paths=1000)
        assert_valid(day.json(), {"increment_s": 300, "length_s": 86_400, "num_paths": 1000})
        assert ask(url, asset="DOGE").status_code == 400
        assert ask(url, origin="2011-01-01T00:00:00Z").status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_LIMIT_S) == 0
    with running("--source", "simulated", *folders) as (_process, url, _lines):
        assert ask(url).content == hour.content


def test_an_interrupted_miner_ends_well_and_takes_its_training_along(folders):
    with running("--source", "simulated", *folders) as (process, _url, lines):
        started = re.compile(r"event=training .*pid=(\d+)")
        pid = wait_for(lambda: next(filter(None, map(started.search, lines)), None)).group(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_LIMIT_S) == 0
        wait_for(lambda: not is_running(pid))
    assert "Traceback" not in "".join(lines)


def complaint_of(*flags):
    """The one line on stderr of a miner that does not start."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "miner.py"), *flags],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    return line


def test_a_busy_port_is_one_line_and_exit_code_1():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        line = complaint_of("--source", "simulated", "--port", str(port))
    assert line.startswith(f"miner.py: cannot listen on 127.0.0.1 port {port}: Address already")


def test_a_missing_archive_is_one_line_and_exit_code_1():
    line = complaint_of("--port", "0", "--source", "archive", "--archive-dir", "nowhere")
    assert line.startswith("miner.py: archive folder nowhere does not exist")
