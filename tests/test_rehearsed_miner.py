"""A process under watch: it says where it serves, is measured, and leaves nothing behind."""

import os
import sys

import pytest

import rehearsed_miner
from errors import MinerError
from rehearsed_miner import RehearsedMiner, log_lines, marked, vitals_of
from tests.waiting import PATIENCE_S, is_running, wait_for

# Stands in for the miner where its faults matter: it starts a child in a session of
# its own, as trainings are, and forgets it at the end.
FORGETFUL = """
import signal, subprocess, sys, threading
over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("level=info event=answered", file=sys.stderr, flush=True)
print("serving BTC hf on http://127.0.0.1:1 from source venue; none is trained.", flush=True)
over.wait()
"""


# Keeps 3 MB of answers, and 5 at every other look.
TELLING = """
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import cycle
kept = cycle([3, 5])
class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"lgbm_miner_cached_bytes {next(kept) * 2**20:.1f}\\n".encode())
server = HTTPServer(("127.0.0.1", 0), Page)
print(f"serving BTC hf on http://127.0.0.1:{server.server_port} from source venue.", flush=True)
server.serve_forever()
"""


@pytest.fixture
def life(tmp_path, monkeypatch):
    """A process of some code, ended whatever happens."""
    lives = []

    def begin(code):
        script = tmp_path / "stand_in.py"
        script.write_text(code)
        monkeypatch.setattr(rehearsed_miner, "SCRIPT", script)
        lives.append(RehearsedMiner(tmp_path / "miner.toml", tmp_path / "miner.log", "venue"))
        lives[0].start()
        return lives[0]

    yield begin
    for entry in lives:
        entry.end()


def test_a_process_that_outlives_the_miner_is_counted_and_killed(life):
    miner = life(FORGETFUL)
    assert miner.wait_until_serving() == "http://127.0.0.1:1"
    # A moment after its start a process may still show no environment.
    (child,) = wait_for(lambda: set(marked(miner._mark)) - {miner._process.pid})
    code, seconds = miner.stop()
    assert code == 0
    assert seconds < PATIENCE_S
    assert is_running(child)
    assert miner.end() == 1
    wait_for(lambda: not is_running(child))
    assert miner.end() == 0
    assert not miner.is_running


def test_a_page_that_nobody_serves_is_not_open(life):
    miner = life(FORGETFUL)
    miner.wait_until_serving()
    assert not miner.open_page()


def test_what_it_keeps_of_answers_counts_once_it_lasts(life):
    """Told from its second answer on: as much as was kept before and after a look."""
    miner = life(TELLING)
    miner.wait_until_serving()
    told = wait_for(lambda: [entry.kept_mb for entry in miner.vitals if entry.kept_mb][2:])
    assert next(entry.kept_mb for entry in miner.vitals) == 0
    assert set(told) == {3.0}
    assert all(entry.lasting_mb == entry.rss_mb - entry.kept_mb for entry in miner.vitals)


def test_its_log_and_its_vitals_are_kept_and_the_end_does_not_count(life, tmp_path):
    miner = life(FORGETFUL)
    miner.wait_until_serving()
    # Between its fork and its program a process has next to nothing.
    (first, *_) = wait_for(lambda: [entry for entry in miner.vitals if entry.rss_mb > 1])
    miner.stop()
    count = len(miner.vitals)
    miner.end()
    assert len(miner.vitals) <= count + 1
    assert first.handles >= 3
    assert log_lines(tmp_path / "miner.log") == ["level=info event=answered"]
    assert log_lines(tmp_path / "nothing.log") == ()


def test_one_that_ends_at_once_is_reported(life):
    miner = life("raise SystemExit('miner.py: settings are bad.')")
    with pytest.raises(MinerError, match=r"did not say .* where it serves; read its log"):
        miner.wait_until_serving()
    assert miner.stop()[0] == 1


def test_one_that_does_not_end_is_killed(life, monkeypatch):
    monkeypatch.setattr(rehearsed_miner, "STOP_PATIENCE_S", 0.2)
    miner = life(FORGETFUL.replace("over.set()", "None"))
    miner.wait_until_serving()
    assert miner.stop()[0] is None
    miner.end()
    assert not miner.is_running


def test_settings_of_another_miner_do_not_leak_in(life, monkeypatch):
    monkeypatch.setenv("LGBM_MINER_PORT", "1")
    monkeypatch.setenv("BINANCE_API_HOST", "api.example.com")
    miner = life(
        "import os\n"
        "found = [n for n in os.environ if n.startswith(('LGBM_', 'BINANCE_'))]\n"
        "print('serving on http://127.0.0.1:' + str(len(found)), flush=True)\n"
    )
    assert miner.wait_until_serving() == "http://127.0.0.1:0"


def test_vitals_are_those_of_the_process():
    found = vitals_of(os.getpid(), 3.0)
    assert found is not None
    assert found.at_s == 3.0
    assert found.rss_mb > 10
    assert found.threads >= 1
    assert vitals_of(2**22 + 1, 0.0) is None
    assert sys.platform == "linux"
