"""The status page in a real Chromium: it fits, it renews itself, it says when it cannot."""

import html
import json
import logging
import os
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

import status_page
from answer_desk import AnswerDesk, Outcome
from config import Frequency
from errors import MinerError
from forecast_engine import ForecastEngine
from http_service import bind, build_app, server_for
from metrics import Metrics
from miner_facts import EngineFacts
from own_scores import OwnScore
from settings import Settings
from status_page import RecentLog, RecentRequests, StatusPage
from tests.test_status_page import LOAD, record

WIDTHS = (1280, 768, 390, 320)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Each frame as wide as a window: how far its content reaches, and what reaches out.
MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const all = selector => [...page.querySelectorAll(selector)];
    const box = element => element.getBoundingClientRect();
    const out = all("body *").filter(element =>
      !element.closest(".panel, svg") && box(element).right > root.clientWidth + 1);
    const small = all("body *:not(svg *):not(script)").filter(element =>
      element.childElementCount === 0 && element.textContent.trim() &&
      parseFloat(getComputedStyle(element).fontSize) < 11);
    return {
      width: root.clientWidth, content: root.scrollWidth,
      out: out.map(element => element.outerHTML.slice(0, 120)),
      small: small.map(element => element.outerHTML.slice(0, 120)),
      bent: all(".dot").filter(dot => Math.abs(box(dot).width - box(dot).height) > 0.5).length,
      figures: all(".card svg").map(svg => box(svg).height),
      scrolled: all(".panel").filter(panel => panel.scrollWidth > panel.clientWidth + 1)
        .map(panel => panel.outerHTML.slice(0, 120)),
    };
  });
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
});
</script>
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Open an address in a browser of its own and give the document it ends up with."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        reason = "there is no chromium here; install it (Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    def dump(address: str, *flags: str) -> str:
        profile = tmp_path_factory.mktemp("chromium")
        command = [program, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", address]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, cwd=profile
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return dump


@pytest.fixture(scope="module")
def source(archive, model_dir, tmp_path_factory):
    """Facts and pictures of a real engine, with scores of our own making."""
    settings = Settings(
        source="archive", model_dir=model_dir, state_dir=tmp_path_factory.mktemp("state")
    )
    engine = ForecastEngine.open(archive, settings)
    now = engine.now()
    own = OwnScore(
        answers=1234,
        score=4123.4,
        ewma_t=4000.0,
        covered=0.713,
        covered_by_interval={},
        course=tuple((now - 60 * n, 4000.0 + 10 * (n % 17), 4000.0) for n in range(200, 0, -1)),
    )
    scores = {("BTC", frequency): own for frequency in Frequency}
    warn = "the chain has not answered for 12 minutes"
    return EngineFacts(
        engine,
        source="simulated",
        own=lambda: scores,
        extra=lambda facts: replace(facts, warnings=(warn,)),
    )


@pytest.fixture
def page(source):
    requests, lines = RecentRequests(), RecentLog()
    for name in ("5F3sa2TJAWMqDhXG6jhV4N8ko9SxwGy8TpaNS1repo5EYjQX", "203.0.113.7"):
        for outcome in Outcome:
            now = source.facts().now
            requests.observe(record(outcome, caller=name, reason="word " * 40, at=now - 9.0))
    log = logging.Logger("test")  # noqa: LOG001  # not of the tree
    log.addHandler(lines)
    log.warning("training failed", extra={"reason": "unbroken" * 40})
    return StatusPage(source, lambda: LOAD, requests, lines, memory=lambda: 4e8)


@contextmanager
def served(source, page):
    """The address of a server that shows the page."""
    listener = bind("127.0.0.1", 0)
    desk = AnswerDesk(source._engine)
    metrics = Metrics(source.facts, desk.load)
    app = build_app(desk, now=source._engine.now, facts=source, metrics=metrics, page=page)
    server = server_for(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)
        desk.close()
        assert not thread.is_alive()


def test_the_page_fits_a_laptop_a_tablet_and_a_phone(browse, page, tmp_path):
    content = html.escape(page.render().decode())
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{content}"></iframe>'
        for width in WIDTHS
    )
    file = tmp_path / "frames.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{MEASURE}", "utf-8")
    document = browse(file.as_uri())
    told = re.search(r'<pre id="found">(.*?)</pre>', document, flags=re.DOTALL)
    assert told is not None, document[-2000:]
    for width, found in zip(WIDTHS, json.loads(html.unescape(told[1])), strict=True):
        assert width - 20 <= found["width"] <= width  # a scroll bar may take some
        assert found["content"] <= found["width"], found
        assert found["out"] == []
        assert found["small"] == []
        assert found["bent"] == 0
        assert len(found["figures"]) == 3
        assert min(found["figures"]) > 120
        if width < 700:
            assert found["scrolled"] == []


class _Counted:
    """A page that counts its renderings and can be made to fail."""

    def __init__(self, page, failing_after=None):
        self._page = page
        self._failing_after = failing_after
        self.count = 0

    def render(self):
        self.count += 1
        if self._failing_after is not None and self.count > self._failing_after:
            raise MinerError("the test wants no page.")
        text = self._page.render().decode()
        return text.replace("LGBM Miner</h1>", f"Rendering {self.count}</h1>").encode()


def test_the_page_renews_itself_under_its_own_policy(browse, source, page, monkeypatch):
    monkeypatch.setattr(status_page, "REFRESH_S", 1)
    counted = _Counted(page)
    with served(source, counted) as address:
        document = browse(address, "--virtual-time-budget=3500")
    assert counted.count > 1
    shown = re.search(r"<h1>Rendering (\d+)</h1>", document)
    assert shown is not None
    assert int(shown[1]) > 1
    assert re.search(r'<p id="lost"[^>]* hidden', document)


def test_a_page_that_gets_no_new_one_says_so(browse, source, page, monkeypatch):
    monkeypatch.setattr(status_page, "REFRESH_S", 1)
    with served(source, _Counted(page, failing_after=1)) as address:
        document = browse(address, "--virtual-time-budget=3500")
    assert "No contact with the miner since" in document
    assert not re.search(r'<p id="lost"[^>]* hidden', document)
    assert "<h1>Rendering 1</h1>" in document
