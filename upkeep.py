"""What a long-lived process does beside answering: duties, each on a thread of its own.

A duty that fails is logged and tried again later; a duty that hangs keeps nobody
else waiting. Duties end with the process, or when they are told to.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from clock import Clock, market_speed
from errors import MinerError

FAILED_PAUSE_S: Final = 60.0  # so that a lasting fault is one log line a minute

Pause: TypeAlias = Callable[[], float]  # real seconds until the next time

log = logging.getLogger(__name__)


def every(seconds: float) -> Pause:
    """The same real seconds after every run."""
    return lambda: seconds


def each(clock: Clock, period_s: float, *, offset_s: float = 0.0) -> Pause:
    """When the market's clock next stands `offset_s` past a whole period."""

    def pause() -> float:
        since = (clock.now() - offset_s) % period_s
        return (period_s - since) / market_speed(clock)

    return pause


@dataclass(slots=True, eq=False)
class Duty:
    """Something to do again and again: first `after_s` real seconds, then after every pause."""

    name: str
    run: Callable[[], object]
    pause: Pause
    after_s: float = 0.0
    _wake: threading.Event = field(default_factory=threading.Event, repr=False)

    def wake(self) -> None:
        """Do it now instead of after the pause."""
        self._wake.set()

    def sleep(self, seconds: float) -> None:
        """Until the seconds are over or somebody wakes it."""
        self._wake.wait(seconds)
        self._wake.clear()


class Upkeep:
    """Runs duties side by side until it is stopped."""

    def __init__(self, duties: Sequence[Duty]) -> None:
        self._duties = tuple(duties)
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=(duty,), name=duty.name, daemon=True)
            for duty in duties
        ]

    def start(self) -> None:
        """Begin all of them."""
        for thread in self._threads:
            thread.start()

    def stop(self, patience_s: float) -> None:
        """End after the runs under way; what takes longer than the patience is left behind."""
        self._stopping.set()
        for duty in self._duties:
            duty.wake()
        deadline = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _loop(self, duty: Duty) -> None:
        if duty.after_s:
            duty.sleep(duty.after_s)
        while not self._stopping.is_set():
            went_well = attempt(duty, is_over=self._stopping.is_set)
            if not self._stopping.is_set():
                duty.sleep(_pause(duty, went_well=went_well))


def _pause(duty: Duty, *, went_well: bool) -> float:
    """Until it is done again, s. Never raises."""
    try:
        pause_s = duty.pause()
    except Exception:
        log.exception("duty failed", extra={"duty": duty.name})
        return FAILED_PAUSE_S
    return pause_s if went_well else max(pause_s, FAILED_PAUSE_S)


def attempt(duty: Duty, *, is_over: Callable[[], bool] = lambda: False) -> bool:
    """Do it once; whether it went well. Never raises.

    What fails when all `is_over` was cut off by the end of the process, and is no fault:
    an interpreter that shuts down starts no more threads.
    """
    try:
        duty.run()
    except MinerError as error:
        log.warning("duty failed", extra={"duty": duty.name, "reason": str(error)})
    except Exception:
        if is_over():
            log.info("duty cut off", extra={"duty": duty.name})
        else:
            log.exception("duty failed", extra={"duty": duty.name})
    else:
        return True
    return False
