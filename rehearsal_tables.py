"""The tables of a rehearsal, and its findings as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from console import table
from rehearsal_findings import DiskUse, Findings, Point, memory_growth, name_of, passed
from rehearsal_plan import Fate
from state_store import write_atomically


def print_findings(found: Findings, points: Sequence[Point]) -> None:
    """Tables of everything, and the verdict."""
    _print_bars(found)
    _print_trainings(found)
    _print_asks(found)
    _print_scores(found)
    _print_process(found)
    table("Acceptance", ("point", "holds", "found"), [_point_row(point) for point in points])
    print("PASSED" if passed(points) else "FAILED")


def _print_bars(found: Findings) -> None:
    rows = [
        (
            asset,
            entry.feed,
            f"{entry.bar_s // 60}m",
            entry.served,
            entry.missing,
            entry.different + entry.invented,
        )
        for asset, entries in found.bars.items()
        for entry in entries
    ]
    table("Bars in the store", ("asset", "feed", "bar", "served", "missing", "wrong"), rows)


def _print_trainings(found: Findings) -> None:
    rows = [
        (
            name_of(pair),
            entry.sets,
            entry.due,
            f"{entry.first_after_s / 3600:.1f}",
            f"{entry.oldest_days:.2f}",
            " ".join(f"{seconds:.0f}" for seconds in entry.seconds),
        )
        for pair, entry in found.trainings.items()
    ]
    columns = ("market", "sets", "due", "first after (h)", "oldest (days)", "took (s)")
    table("Trainings, ages in market time", columns, rows)


def _print_asks(found: Findings) -> None:
    rows: list[tuple[str | int, ...]] = [
        (name_of(pair), entry.prompts, entry.asks, *(entry.fates[fate] for fate in Fate))
        for pair, entry in found.asks.items()
    ]
    fates = (fate.value for fate in Fate)
    table("Prompts at the official cadence", ("market", "prompts", "asks", *fates), rows)
    how: list[tuple[str | None, ...]] = [
        (
            name_of(pair),
            *(_ms(value) for value in (entry.p50_ms, entry.p95_ms, entry.max_ms)),
            _counts(entry.rungs),
            _counts(entry.anchors),
        )
        for pair, entry in found.asks.items()
    ]
    columns = ("market", "p50", "p95", "max", "rungs", "first price from")
    table("How they were answered, latencies in ms", columns, how)


def _print_scores(found: Findings) -> None:
    rows = [
        (
            name_of(pair),
            entry.matured,
            entry.scored,
            None if entry.mean_bp is None else f"{entry.mean_bp:.1f}",
            None if entry.ratio is None else f"{entry.ratio:.4f}",
        )
        for pair, entry in found.scores.items()
    ]
    table("Own scores in the ledger", ("market", "matured", "scored", "bp", "÷ ewma_t"), rows)


def _print_process(found: Findings) -> None:
    rows = []
    for number, life in enumerate(found.lives, start=1):
        if not life:
            continue
        last, growth = life[-1], memory_growth(life)
        warm = next((entry for entry in life if entry.at_s >= 60), last)
        rows.append(
            (
                f"life {number}",
                f"{last.at_s / 60:.1f}",
                f"{warm.rss_mb:.0f} to {last.rss_mb:.0f}",
                f"{max(entry.rss_mb for entry in life):.0f}",
                None if growth is None else f"{growth.mb_per_hour:+.1f}",
                f"{warm.handles} to {last.handles}",
                f"{warm.threads} to {last.threads}",
            )
        )
    columns = ("miner", "minutes", "RSS (MB)", "most", "MB/h", "handles", "threads")
    table("The process, from its first minute to its end", columns, rows)
    if found.disk:
        _print_disk(found.disk)
    if found.restart is not None:
        done = found.restart
        first_s = done.first_answer_after_s
        print(
            f"Restart: exit code {done.exit_code} after {done.stopped_after_s:.1f} s, first answer "
            f"{'never' if first_s is None else f'{first_s:.1f} s after the start'}; "
            f"{done.compared - len(done.different)} of {done.compared} answers to moments of the "
            f"past the same; {done.states_carried_on} states carried on exactly, "
            f"{len(done.states_astray)} astray; {done.skipped} prompts fell into the pause."
        )
    if found.log:
        print(f"In the log: {_counts(found.log)}.")


def _print_disk(disk: Sequence[DiskUse]) -> None:
    rows: list[tuple[str | int, ...]] = [
        (
            when,
            *(f"{value:.1f}" for value in (use.ledger_mb, use.bars_mb, use.rest_mb, use.models_mb)),
            use.files,
        )
        for when, use in zip(("first prompt", "end"), disk, strict=True)
    ]
    columns = ("at", "ledger", "bars", "other state", "models", "files without bars")
    table("On the disk, MB", columns, rows)


def _point_row(point: Point) -> tuple[str, str, str]:
    holds = {True: "yes", False: "NO", None: "n/a"}[point.held]
    return point.name, holds, point.detail


def _ms(value: float) -> str | None:
    return f"{value:.0f}" if np.isfinite(value) else None


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counted.items()) or "none"


def write_report(path: Path, found: Findings, points: Sequence[Point], about: Any) -> None:
    """Everything as JSON; `about` says what was rehearsed."""
    document = {
        "about": about,
        "passed": passed(points),
        "points": points,
        **{name: _plain(getattr(found, name)) for name in Findings.__dataclass_fields__},
        "pairs": [name_of(pair) for pair in found.pairs],
        "memory_growth": [memory_growth(life) for life in found.lives],
        # Every second of hours is more than anybody wants to read.
        "lives": [list(life[:: max(1, len(life) // 500)]) for life in found.lives],
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    write_atomically(path, orjson.dumps(document, option=options))


def _plain(value: Any) -> Any:
    """Findings by pair under the pairs' names, as JSON can hold them."""
    if not isinstance(value, Mapping):
        return value
    return {name_of(key) if isinstance(key, tuple) else key: kept for key, kept in value.items()}
