"""What time the market has: the system's clock, or a rehearsal's.

A rehearsal replays old bars at a multiple of their speed. Miner, training
processes and replaying feeds must then agree on the time without talking to each
other, so it follows from one line of text, the setting `rehearsal`:

    START@ORIGIN×SPEED      e.g. 2025-12-15T00:00:00Z@1766400000.5×60

At the real Unix time ORIGIN the market's clock shows START; from then on it runs
SPEED times as fast. `x` may stand for `×`. Deadlines, timeouts and trainings
always take real seconds and never ask this clock.
"""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

from errors import ConfigError
from settings import Settings

_REHEARSAL: Final = re.compile(
    r"(?P<start>[^@]+)@(?P<origin>\d+(\.\d+)?)[×x](?P<speed>\d+(\.\d+)?)"
)


class Clock(Protocol):
    """Tells the market's time."""

    def now(self) -> float:
        """Unix seconds."""


@dataclass(frozen=True, slots=True)
class SystemClock:
    """The real time."""

    def now(self) -> float:
        """Unix seconds."""
        return time.time()


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalClock:
    """Market time that started somewhere else and runs at another speed."""

    start: float  # market time at the origin, Unix seconds
    origin: float  # real time, Unix seconds
    speed: float  # market seconds per real second
    wall: Callable[[], float] = time.time

    def now(self) -> float:
        """Market time, Unix seconds."""
        return self.start + self.speed * (self.wall() - self.origin)

    @classmethod
    def parse(cls, text: str, wall: Callable[[], float] = time.time) -> "RehearsalClock":
        """The clock that a setting describes. Raises: ConfigError."""
        match = _REHEARSAL.fullmatch(text.strip())
        start = _moment(match["start"]) if match else None
        if match is None or start is None or float(match["speed"]) == 0:
            raise ConfigError(
                f"rehearsal {text!r} cannot be read; write START@ORIGIN×SPEED, with START in ISO "
                "8601, ORIGIN in Unix seconds and SPEED above 0, e.g. "
                "2025-12-15T00:00:00Z@1766400000×60."
            )
        origin, speed = float(match["origin"]), float(match["speed"])
        return cls(start=start, origin=origin, speed=speed, wall=wall)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        start = datetime.fromtimestamp(self.start, UTC).isoformat()
        return f"{start}@{self.origin!r}×{self.speed:g}"


def _moment(text: str) -> float | None:
    """Unix seconds of an ISO 8601 time, UTC unless it says otherwise."""
    try:
        time_of = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (time_of if time_of.tzinfo else time_of.replace(tzinfo=UTC)).timestamp()


def market_speed(clock: Clock) -> float:
    """Market seconds per real second: 1, or a rehearsal's speed."""
    return clock.speed if isinstance(clock, RehearsalClock) else 1.0


def agreed_offset(offsets: Iterable[float]) -> float | None:
    """By how much our clock is off, from what several others are ahead of it; None of none.

    The middle one; of two in the middle the smaller: a stale cache of one alone, or one
    clock that is wrong itself, says nothing of ours.
    """
    ordered = sorted(offsets)
    if not ordered:
        return None
    return min(ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2], key=abs)


def open_clock(settings: Settings) -> Clock:
    """The clock that the settings name. Raises: ConfigError."""
    if settings.rehearsal is None:
        return SystemClock()
    return RehearsalClock.parse(settings.rehearsal)
