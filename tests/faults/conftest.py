"""What the fault suite shares: its size, its seed and the table at its end.

pytest tests/faults             a seeded slice, minutes
pytest tests/faults --full      every case, as `make faults` runs it
"""

from collections.abc import Callable

import pytest

from tests.faults import tally


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the suite be run in full."""
    parser.addoption(
        "--full",
        action="store_true",
        help="run every case of the fault suite, not only the seeded slice",
    )


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How many cases to try: `size(slice, full)`."""
    full = bool(request.config.getoption("--full"))
    return lambda in_slice, in_full: in_full if full else in_slice


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was tried and lost."""
    lines = tally.table()
    if lines:
        terminalreporter.section("reliability")
        for line in lines:
            terminalreporter.write_line(line)
