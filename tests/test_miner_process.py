"""The long-lived process: started, asked, stopped; and its background work."""

import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

import miner
from config import Frequency
from data_fetcher import open_source
from domain import ForecastRequest
from feed_plans import FeedHost
from http_service import bind
from settings import Settings
from state_store import folder_mark
from tests.waiting import PATIENCE_S, is_running, wait_for
from wire_format import parse_iso_minute, validate_answer

ROOT = Path(__file__).resolve().parent.parent
STOP_LIMIT_S = 10  # what operators are promised


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
        "2 of 3 model sets are trained, the oldest 1.0 days ago, 1 of them due again; the "
        "other 1 is trained now."
    )


def test_a_simulated_market_is_called_so():
    line = miner.serving_line(
        "http://[::1]:1", "simulated", ["BTC"], trained={}, due=[("BTC", Frequency.HF)], now=60
    )
    assert (
        "from a SIMULATED market; none of 1 model sets is trained yet, all are trained now." in line
    )


def test_a_live_miner_says_at_once_what_it_serves():
    """Before it has read a file: the first prompt may come within a second."""
    source = open_source(Settings(source="venue", served_assets=("BTC", "AAPLX")))
    assert miner.loading_line("http://[::1]:1", source) == (
        "serving BTC hf+lf, AAPLX lf on http://[::1]:1 from source venue; bars and models are "
        "taken up now, and collected and trained where there are none."
    )


# ---------------------------------------------------------------- fetching the past


def followed(caplog, *calls):
    """The lines about a back-fill whose calls come at given seconds: time, done, total."""
    moments = iter([0.0, *(at for at, _, _ in calls)])
    follow = miner.BackfillLog(lambda: next(moments))
    with caplog.at_level("INFO", logger="miner"):
        for _, done, total in calls:
            follow(done, total, "BTC from binance")
    return [
        (line.days, line.of, line.days_per_minute, line.minutes_left)
        for line in caplog.records
        if line.getMessage() == "fetching the past"
    ]


def test_a_back_fill_says_at_most_once_a_minute_how_far_it_is(caplog):
    lines = followed(caplog, *((10.0 * second, second, 90) for second in range(1, 19)))
    assert lines == [(6, 90, 6.0, 14.0), (12, 90, 6.0, 13.0), (18, 90, 6.0, 12.0)]
    assert caplog.records[0].latest == "BTC from binance"


def test_a_back_fill_of_less_than_a_minute_says_nothing(caplog):
    assert followed(caplog, (1.0, 1, 2), (59.0, 2, 2)) == []


def test_the_rate_of_a_round_is_its_own(caplog):
    """What the first round left is fetched from other feeds, which may be slower."""
    lines = followed(caplog, (30.0, 300, 300), (90.0, 2, 10), (150.0, 4, 10))
    assert lines == [(2, 10, 2.0, 4.0), (4, 10, 2.0, 3.0)]


def test_a_round_of_as_many_days_as_the_last_is_still_another(caplog):
    assert followed(caplog, (30.0, 4, 4), (90.0, 1, 4)) == [(1, 4, 1.0, 3.0)]


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
def running(*flags, script=ROOT / "miner.py"):
    """A miner on a free port: its process, base URL and lines on stderr so far."""
    command = [sys.executable, str(script), "--port", "0", *flags]
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
        health = httpx.get(f"{url}/healthz").json()
        assert "BTC" in health["assets"]
        assert health["miner"] == folder_mark(Path(folders[-1]))
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


def test_a_miner_whose_venues_never_answer_ends_in_time_too(tmp_path):
    """SIGTERM while every call hangs: the attempts under way end, and no other begins."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        hosts = "".join(f'{host.value}_url = "{url}"\n' for host in FeedHost)
        (tmp_path / "miner.toml").write_text(hosts + 'served_assets = ["BTC", "HYPE"]\n')
        folders = ("--state-dir", str(tmp_path / "s"), "--model-dir", str(tmp_path / "m"))
        config = ("--config", str(tmp_path / "miner.toml"), "--source", "venue")
        with running(*config, *folders) as (process, _url, lines):
            wait_for(lambda: any("event=loaded" in line for line in lines))
            time.sleep(1)  # calls of every duty are under way
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_LIMIT_S) == 0
    assert not any("Traceback" in line for line in lines)


def test_an_interrupted_miner_ends_well_and_takes_its_training_along(folders):
    with running("--source", "simulated", *folders) as (process, _url, lines):
        started = re.compile(r"event=training .*pid=(\d+)")
        found = wait_for(lambda: next(filter(None, map(started.search, lines)), None))
        assert found
        pid = int(found.group(1))
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


def simulated(folder):
    """Flags of a miner without models, its state in the folder."""
    state, models = str(folder / "state"), str(folder / "models")
    return "--source", "simulated", "--state-dir", state, "--model-dir", models


def test_a_second_miner_on_a_state_folder_is_one_line_and_the_first_goes_on(tmp_path):
    flags = simulated(tmp_path)
    with running(*flags) as (_process, url, _lines):
        line = complaint_of("--port", "0", *flags)
        assert line == (
            f"miner.py: another miner runs on state folder {tmp_path / 'state'}, and its "
            "calibration and ledger are that one's own; give this one a folder with --state-dir, "
            "or end the other."
        )
        assert complaint_of("--port", "0", "--reset-calibration", *flags) == line
        assert ask(url).status_code == 200
        port = url.rpartition(":")[2]
        command = [sys.executable, str(ROOT / "test_miner.py"), "--preflight", "--port", port]
        doctor = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert "this miner is running there" in doctor.stdout


def test_a_killed_miner_leaves_its_state_folder_to_the_next(tmp_path):
    for _ in range(2):
        with running(*simulated(tmp_path)) as (process, _url, _lines):
            process.kill()
            process.wait(PATIENCE_S)


def test_a_state_folder_that_cannot_be_locked_stops_no_miner(tmp_path, caplog):
    (tmp_path / ".miner.lock").mkdir()
    with ExitStack() as opened:
        miner._own_state(opened, tmp_path)
    assert "cannot be locked" in caplog.text


def test_a_busy_port_is_one_line_and_exit_code_1():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        line = complaint_of("--source", "simulated", "--port", str(port))
    assert line == (
        f"miner.py: the pages cannot listen on 127.0.0.1 port {port}, another program does; choose "
        "another port with --port."
    )


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--state-dir", "notes"), "notes is not a folder; name one with --state-dir."),
        (("--state-dir", "notes/x"), "notes is not a folder; name one with --state-dir."),
        (("--model-dir", "notes"), "notes is not a folder; name one with --model-dir."),
        (("--state-dir", "/proc/x"), "/proc/x cannot be written (No such file or directory); make"),
        (("--state-dir", "/proc"), "/proc cannot be written (No such file or directory); make it"),
        (
            ("--source", "archive", "--archive-dir", "notes"),
            "archive folder notes is not a folder; name an existing one with --archive-dir.",
        ),
    ],
)
def test_a_folder_that_can_be_none_is_one_line_and_exit_code_1(flags, complaint):
    """Not a miner that answers for ever and keeps nothing of it."""
    Path("notes").write_text("no folder")
    line = complaint_of("--port", "0", "--source", "simulated", *flags)
    assert line.startswith(f"miner.py: {complaint}")


def test_a_missing_archive_is_one_line_and_exit_code_1():
    line = complaint_of("--port", "0", "--source", "archive", "--archive-dir", "nowhere")
    assert line.startswith("miner.py: archive folder nowhere does not exist")
