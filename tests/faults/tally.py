"""What the fault suite tried and lost, promise by promise: the README's reliability table."""

from dataclasses import dataclass


@dataclass(slots=True)
class Tally:
    """Counts under one promise."""

    cases: int = 0
    answers_lost: int = 0
    bars_lost: int = 0


_tallies: dict[str, Tally] = {}


def count(promise: str, cases: int = 0, answers_lost: int = 0, bars_lost: int = 0) -> None:
    """Add to what was tried, and lost, under a promise.

    promise: one sentence, the same in every call about it.
    """
    tally = _tallies.setdefault(promise, Tally())
    tally.cases += cases
    tally.answers_lost += answers_lost
    tally.bars_lost += bars_lost


def table() -> list[str]:
    """The counts as lines of a Markdown table; none where nothing was counted."""
    if not _tallies:
        return []
    lines = ["| promise | cases | answers lost | bars lost |", "|---|---:|---:|---:|"]
    lines += [
        f"| {promise} | {tally.cases:,} | {tally.answers_lost:,} | {tally.bars_lost:,} |"
        for promise, tally in sorted(_tallies.items())
    ]
    return lines
