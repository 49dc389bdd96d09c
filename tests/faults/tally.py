"""What the fault suite tried and lost, promise by promise: the README's reliability table.

Tests that run on several processes count in each of them; `taken` and `add` bring
the counts together.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Tally:
    """Counts under one promise; None: what the promise is about cannot be lost."""

    cases: int = 0
    answers_lost: int | None = None
    bars_lost: int | None = None


_tallies: dict[str, Tally] = {}


def count(
    promise: str, cases: int = 0, answers_lost: int | None = None, bars_lost: int | None = None
) -> None:
    """Add to what was tried, and lost, under a promise.

    promise: one sentence, the same in every call about it. What is left out was not looked
    at, and is no zero.
    """
    tally = _tallies.setdefault(promise, Tally())
    tally.cases += cases
    tally.answers_lost = _sum(tally.answers_lost, answers_lost)
    tally.bars_lost = _sum(tally.bars_lost, bars_lost)


def _sum(before: int | None, more: int | None) -> int | None:
    return before if more is None else (before or 0) + more


def taken() -> dict[str, tuple[int, int | None, int | None]]:
    """All counts as plain values, by promise."""
    return {
        promise: (tally.cases, tally.answers_lost, tally.bars_lost)
        for promise, tally in _tallies.items()
    }


def add(counts: Mapping[str, tuple[int, int | None, int | None]]) -> None:
    """Take in the counts of another process."""
    for promise, numbers in counts.items():
        count(promise, *numbers)


def table() -> list[str]:
    """The counts as lines of a Markdown table; none where nothing was counted."""
    if not _tallies:
        return []
    lines = ["| promise | cases | answers lost | bars lost |", "|---|---:|---:|---:|"]
    for promise, tally in sorted(_tallies.items()):
        numbers = (tally.cases, tally.answers_lost, tally.bars_lost)
        told = ("\N{EN DASH}" if n is None else f"{n:,}" for n in numbers)
        lines.append(" | ".join([f"| {promise.rstrip('.')}", *told]) + " |")
    return lines
