"""What the benchmarks share: turns, ratios with their spread, rows, and the verdict.

Work is timed in CPU seconds of its thread: what other programs take does not count.
What is compared is done in turn, so that a machine that slows down slows both.
"""

import json
import os
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from time import thread_time
from typing import Final

import numpy as np

from console import add_common_arguments, script_parser, table
from domain import FloatArray
from settings import Settings, load_settings

QUARTILES: Final = (25, 75)
NO_SETTINGS: Final = Path(os.devnull)  # a settings file that says nothing
Work = Callable[[int], object]  # what is timed, by the number of its turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: what was measured, and what it should reach."""

    what: str
    against: str  # what the ratio refers to, or the unit
    value: float
    low: float  # the spread: quartiles over the turns, or the range of a few
    high: float
    reach: float
    at_least: bool  # else at most
    detail: str = ""  # the times behind a ratio
    limit: str = ""  # why the row cannot be met, where that is known

    @property
    def met(self) -> bool:
        """Whether the value reaches what it should."""
        return self.value >= self.reach if self.at_least else self.value <= self.reach

    @property
    def verdict(self) -> str:
        """`met`, `limited` where it is documented why, or `missed`."""
        if self.met:
            return "met"
        return "limited" if self.limit else "missed"

    @property
    def remarks(self) -> str:
        """The spread, and what is behind the row."""
        spread = f"{self.low:.3g} to {self.high:.3g}" if self.low < self.high else ""
        limit = f"limited by {self.limit}" if self.verdict == "limited" else ""
        return "; ".join(filter(None, (spread, self.detail, limit)))

    def cells(self) -> tuple[str, ...]:
        """The row as it is printed, without its remarks: they leave no room in 80 columns."""
        return (
            self.what,
            self.against,
            f"{self.value:.3g}",
            f"{'≥' if self.at_least else '≤'} {self.reach:g}",
            self.verdict,
        )


def ratio_row(
    ratios: FloatArray, *, what: str, against: str, reach: float, at_least: bool, detail: str
) -> Row:
    """The row of a ratio that was taken turn by turn; `ratios` (turns,)."""
    low, middle, high = np.percentile(ratios, (QUARTILES[0], 50, QUARTILES[1])).tolist()
    return Row(
        what=what,
        against=against,
        value=middle,
        low=low,
        high=high,
        reach=reach,
        at_least=at_least,
        detail=detail,
    )


def plain_row(
    what: str, unit: str, values: Sequence[float], *, reach: float, detail: str = ""
) -> Row:
    """The row of a few numbers that should stay below `reach`; their spread is their range."""
    return Row(
        what=what,
        against=unit,
        value=float(np.median(values)),
        low=min(values),
        high=max(values),
        reach=reach,
        at_least=False,
        detail=detail,
    )


def in_turn(works: Mapping[str, Work], turns: int) -> dict[str, FloatArray]:
    """CPU seconds of every work in every turn, by name; each (turns,)."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns):
        for name, work in works.items():
            begun = thread_time()
            work(turn)
            seconds[name].append(thread_time() - begun)
    return {name: np.array(values) for name, values in seconds.items()}


def milliseconds(*seconds: FloatArray) -> str:
    """Medians of timings, for a row's detail."""
    return " / ".join(f"{1e3 * np.median(each):.3g}" for each in seconds) + " ms"


# ---------------------------------------------------------------- scripts


def bench_parser(description: str, name: str) -> ArgumentParser:
    """The flags of the benchmark `name`, as `benchmarks.run` gives them."""
    example = f"python -m benchmarks.{name} --source archive --archive-dir bars --asset BTC"
    parser = script_parser(description, examples=[example])
    add_common_arguments(parser)
    parser.add_argument(
        "--asset", default="BTC", metavar="ASSET", help="that is measured (default: BTC)"
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="where to write the rows, JSON (default: nowhere)"
    )
    return parser


def bench_settings(args: Namespace) -> Settings:
    """Settings from the flags alone, and from the file if one is named. Raises: ConfigError.

    What an operator has set for a miner of this folder is not what is measured.
    """
    flags = {entry.name: getattr(args, entry.name, None) for entry in fields(Settings)}
    return load_settings(args.config or NO_SETTINGS, {}, **flags)


def finish(title: str, rows: Sequence[Row], file: Path | None) -> int:
    """Print the rows and keep them for `benchmarks.run`; the exit code: 1 for a missed row."""
    show(title, rows)
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows]))
    return exit_code(rows)


def load_rows(file: Path) -> list[Row]:
    """The rows that `finish` kept."""
    return [Row(**row) for row in json.loads(file.read_text())]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows below the machine they were measured on, and what is behind them."""
    print(machine())
    columns = ("what", "against", "value", "reach", "verdict")
    table(title, columns, [row.cells() for row in rows])
    for row in rows:
        if row.remarks:
            print(f"{row.what}: {row.remarks}")


def exit_code(rows: Sequence[Row]) -> int:
    """1 if a row is missed and nothing says why."""
    return int(any(not row.met and not row.limit for row in rows))


def machine() -> str:
    """One line about what the figures were measured on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "orjson"))
    return (
        f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {packages}"
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
