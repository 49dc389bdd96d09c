"""What the fault suite shares: its size, its seed and the table at its end.

pytest tests/faults             a seeded slice, minutes
pytest tests/faults --full      every case, as `make faults` runs it
pytest tests/faults --table reliability.md    the table as a file, too
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.faults import tally

COUNTS: Final = "reliability"  # of a test process's output


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the suite be run in full."""
    parser.addoption(
        "--full",
        action="store_true",
        help="run every case of the fault suite, not only the seeded slice",
    )
    parser.addoption(
        "--table", type=Path, metavar="FILE", help="write the reliability table to a file, too"
    )


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How many cases to try: `size(slice, full)`."""
    full = bool(request.config.getoption("--full"))
    return lambda in_slice, in_full: in_full if full else in_slice


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take in what a process of its own counted, where tests run side by side."""
    tally.add(getattr(node, "workeroutput", {}).get(COUNTS, {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the counts to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[COUNTS] = tally.taken()


def _left_out(terminalreporter: pytest.TerminalReporter) -> list[str]:
    """Why tests of a full run were skipped, if any: their promises were not tried."""
    reasons = Counter(str(entry.longrepr[2]) for entry in terminalreporter.stats.get("skipped", ()))
    told = [f"NOT TRIED, {n} tests: {reason}" for reason, n in sorted(reasons.items())]
    return ["", *told] if told else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was tried and lost, and what a full run had to leave out."""
    lines = tally.table()
    if terminalreporter.config.getoption("--full"):
        lines += _left_out(terminalreporter)
    file = terminalreporter.config.getoption("--table")
    if lines and file is not None:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if lines:
        terminalreporter.section("reliability")
        for line in lines:
            terminalreporter.write_line(line)
