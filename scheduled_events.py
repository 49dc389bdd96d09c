"""Scheduled releases that move markets, from the data file `scheduled_events.toml`.

The file names the source of every date, the day it was announced, and a day after
which a kind is not to be relied on. Nothing is known before it was announced.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cache
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np

from domain import IntArray
from errors import ConfigError
from seasonality import EventTimes

EVENTS_FILE: Final = Path(__file__).resolve().with_name("scheduled_events.toml")
_NEW_YORK: Final = ZoneInfo("America/New_York")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventKind:
    """One kind of release. `times` and `announced` (n,): Unix seconds, times rising."""

    name: str
    expires_ts: int
    edges_s: tuple[int, ...]  # around a release, rising, in seconds
    times: IntArray
    announced: IntArray


def known_events(now: int, file: Path = EVENTS_FILE) -> tuple[tuple[EventTimes, ...], list[str]]:
    """What is scheduled as far as it was announced by `now`, and one sentence per expired kind.

    Raises: ConfigError if the file cannot be used.
    """
    known, warnings = [], []
    for kind in load_events(file):
        if now >= kind.expires_ts:
            warnings.append(
                f"the dates of {kind.name} in {file.name} ended before this moment and are "
                "ignored; add the next ones from the source that the file names."
            )
            continue
        times = kind.times[kind.announced <= now]
        known.append(EventTimes(name=kind.name, edges_s=kind.edges_s, times=times))
    return tuple(known), warnings


@cache
def load_events(file: Path = EVENTS_FILE) -> tuple[EventKind, ...]:
    """Every kind in the file. Raises: ConfigError that names the file and its fault."""
    try:
        kinds = tomllib.loads(file.read_text(encoding="utf-8"))["kind"]
        return tuple(_kind(entry) for entry in kinds)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); restore it from the release."
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{file} is not a calendar of events ({error}); restore it from the release."
        ) from None


def _kind(entry: Mapping[str, Any]) -> EventKind:
    dated = [
        (_timestamp(day, group["time"]), _timestamp(group["announced"], time(0)))
        for group in entry["dates"]
        for day in group["days"]
    ]
    times, announced = np.array(sorted(dated), dtype=np.int64).T
    return EventKind(
        name=entry["name"],
        expires_ts=_timestamp(entry["expires"], time(0)),
        edges_s=tuple(60 * int(minutes) for minutes in entry["edges_minutes"]),
        times=times,
        announced=announced,
    )


def _timestamp(day: date, at: time) -> int:
    return int(datetime.combine(day, at, tzinfo=_NEW_YORK).timestamp())
