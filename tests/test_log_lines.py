"""Log lines: one an event, nothing secret in them, and never a reason to wait or to end."""

import io
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from log_lines import BackgroundWriter, KeyValueFormatter, log_in_background, without_secrets
from tests.waiting import PATIENCE_S, wait_for

KEY = "0123456789abcdef" * 4


class Others(logging.Handler):
    """What the other handlers of the root logger are told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def emit(self, record):
        self.told.append(record)

    def events(self):
        return [record.getMessage() for record in self.told]


@pytest.fixture
def others():
    """The root logger with one more handler; as it was afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    handler = Others()
    root.handlers, root.level = [handler], logging.INFO
    yield handler
    root.handlers, root.level = before, level


def writer(others, **given):
    opened = BackgroundWriter(**given)
    logging.getLogger().addHandler(opened)
    return opened


def say(number):
    logging.getLogger("test").info("line %d", number)


def formatted(message, *args, **extra):
    record = logging.makeLogRecord({"msg": message, "args": args, "levelname": "INFO", **extra})
    return KeyValueFormatter().format(record)


# ---------------------------------------------------------------- what a line is


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("BTC", "event=BTC"),
        ("two words", 'event="two words"'),
        ("ψ×8", "event=ψ×8"),
        ("one\nlevel=error two", 'event="one\\nlevel=error two"'),
        ("\x1b]0;title\x07", 'event="\\u001b]0;title\\u0007"'),
        ("\x9b31m", 'event="\\u009b31m"'),
    ],
)
def test_no_value_can_forge_a_line_or_command_a_terminal(text, shown):
    line = formatted(text)
    assert shown in line
    assert line.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"seed {KEY}", "seed [hidden]"),
        (f"seed 0x{KEY}.", "seed [hidden]."),
        ("wss://node.example/ws?apikey=5f6a", "wss://node.example/ws?[hidden]"),
        ("(http://user:s3cret@10.0.0.1:80/v3)", "(http://[hidden]10.0.0.1:80/v3)"),
        ("https://a.example/b is away", "https://a.example/b is away"),
        ("what? x=1", "what? x=1"),
        ("BTC@binance:BTCUSDT", "BTC@binance:BTCUSDT"),
    ],
)
def test_keys_and_the_secrets_of_addresses_are_hidden(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


def test_a_traceback_hides_them_too():
    try:
        int(KEY)
    except ValueError:
        line = formatted("failed", exc_info=sys.exc_info())
    assert "ValueError: invalid literal for int() with base 10: '[hidden]'" in line
    assert KEY not in line


# ---------------------------------------------------------------- who writes them


def test_lines_come_in_their_order_and_all_of_them(others, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    opened = writer(others)
    for number in range(200):
        say(number)
    opened.flush()
    lines = stream.getvalue().splitlines()
    assert [line.rpartition("event=")[2] for line in lines] == [f'"line {n}"' for n in range(200)]


def test_what_is_configured_writes_to_stderr_from_the_level_on(others, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    log_in_background("warning")
    say(1)
    logging.getLogger("test").warning("shown", extra={"asset": "BTC"})
    logging.getLogger().handlers[0].flush()
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("Z level=warning logger=test event=shown asset=BTC")


def full_pipe():
    """A pipe into which nothing more goes: its ends, and how much is in it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    size = 0
    with suppress(BlockingIOError):
        while True:
            size += os.write(writing, b"." * 512)
    os.set_blocking(writing, True)
    return reading, writing, size


def test_who_logs_never_waits_for_who_reads(others, monkeypatch):
    reading, writing, size = full_pipe()
    with os.fdopen(writing, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        opened = writer(others, waiting_lines=16)
        logging_thread = threading.Thread(target=lambda: [say(n) for n in range(5000)], daemon=True)
        logging_thread.start()
        logging_thread.join(PATIENCE_S)
        was_stuck, told = (
            logging_thread.is_alive(),
            [name for name in others.events() if "log" in name],
        )
        with os.fdopen(reading) as reader:
            reader.read(size)
            wait_for(lambda: "log written again" in others.events())
            opened.flush()
            stderr.close()
            read = reader.read().splitlines()
    assert (was_stuck, told) == (False, ["log not written"])
    written = [line for line in read if 'event="line' in line]
    assert written[0].endswith('event="line 0"')
    # one with the writer, or none yet, and as many as may wait; that it was not written is lost too
    assert len(written) in {16, 17}
    assert read[-1].endswith(f'event="log written again" lost={5000 - len(written) + 1}')


def test_a_reader_that_has_ended_ends_nobody_else(others, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    stderr = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    opened = writer(others)
    for number in range(50):
        say(number)
    opened.flush()
    assert others.events().count("log not written") == 1
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    say(50)
    wait_for(lambda: "log written again" in others.events())
    opened.flush()
    first, second = stream.getvalue().splitlines()
    assert 'event="line 50"' in first
    assert second.endswith('event="log written again" lost=51')  # that it was not written, too
    with pytest.raises(BrokenPipeError):
        stderr.close()


def test_a_full_disk_costs_the_lines_and_nothing_else(others, monkeypatch):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        opened = writer(others)
        for number in range(50):
            say(number)
        opened.flush()
        (fault,) = [record for record in others.told if record.getMessage() == "log not written"]
        assert "No space left" in fault.reason
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        say(50)
        wait_for(lambda: "log written again" in others.events())
        opened.flush()
        assert "lost=51" in stream.getvalue()
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_a_line_that_cannot_be_put_together_is_told_and_stops_nobody(others, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    logging.getLogger().handlers = []
    opened = writer(others)
    logging.getLogger("test").warning("lost %d frames", "many")
    opened.flush()
    assert "TypeError: %d format: a real number is required" in stream.getvalue()


def test_the_end_waits_for_a_stuck_reader_only_so_long(others, monkeypatch):
    monkeypatch.setattr("log_lines.FLUSH_S", 0.05)
    stuck = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text):
            stuck.wait(PATIENCE_S)
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Stuck())
    opened = writer(others)
    say(1)
    opened.flush()
    assert opened._lines.unfinished_tasks == 1
    stuck.set()
    wait_for(lambda: not opened._lines.unfinished_tasks)
