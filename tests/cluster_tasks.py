"""Tasks for tests of the pools, in a module that worker processes can import."""

import os
import time
from functools import lru_cache
from pathlib import Path

from task_pool import Shared, tell


def shared_numbers(folder, n):
    return Shared(load_numbers, (folder, n), key_of)


def key_of(numbers):
    return f"numbers-{len(numbers)}"


@lru_cache(maxsize=1)
def load_numbers(folder, n):
    """Something big, and a note of every process that loads it."""
    with (folder / "loaded").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return list(range(n))


def add_up(numbers, extra):
    tell("sum", "adding", {"extra": extra})
    return sum(numbers) + extra


def add_all(many):
    return sum(map(sum, many))


def who_has(numbers):
    time.sleep(0.05)  # so that the other worker gets some too
    return os.getpid(), id(numbers)


def double(value):
    return 2 * value


def refuse(error):
    raise error


def die_once(mark, value):
    """Kill this process, but only the first time that anybody does this."""
    if not mark.exists():
        mark.touch()
        kill(os.getpid())
    return value


def die():
    kill(os.getpid())


def kill(pid):
    os.kill(pid, 9)


def rest(mark: Path):
    mark.write_text(str(os.getpid()))
    time.sleep(600)
