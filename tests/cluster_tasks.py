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
    """Something big, noted in a file each time that it is loaded."""
    with (Path(folder) / "loaded").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return list(range(n))


def add_up(numbers, extra):
    tell("sum", "adding", {"extra": extra})
    return sum(numbers) + extra


def who_has(numbers, _):
    time.sleep(0.05)
    return os.getpid(), id(numbers)


def die_once(mark, value):
    """Kill this process, but only the first time that anybody runs this."""
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return value
    os.kill(os.getpid(), 9)


def die(_):
    os.kill(os.getpid(), 9)


def double(value):
    return 2 * value


def fail(sentence):
    raise ValueError(sentence)
