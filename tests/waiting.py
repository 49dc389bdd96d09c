"""Waiting for threads and processes, with the patience that a busy machine needs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

PATIENCE_S: Final = 60  # nothing here takes long on an idle machine

T = TypeVar("T")


def wait_for(condition: Callable[[], T]) -> T:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
