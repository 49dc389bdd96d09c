"""What the scripts share with the terminal: flags, errors, tables, progress, log lines.

Results go to stdout; progress bars, log lines and errors go to stderr, through
one `rich` console, so that a line never lands in the middle of a live bar.
"""

import errno
import logging
import os
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, get_args

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from config import ASSETS, EARLIEST_TS, LATEST_TS, SourceName, asset_spec
from errors import ConfigError, MinerError
from log_lines import KeyValueFormatter
from protocol import PROTOCOL_PROFILES
from settings import Settings, load_settings

Cell: TypeAlias = str | int | float | Text | None

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2  # as `argparse` has it
_ALIKE: Final = 0.8  # of two flags, from which one may be meant for the other
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it

_OUT: Final = Console(highlight=False)
_ERR: Final = Console(stderr=True, highlight=False)

# ---------------------------------------------------------------- arguments


class _ScriptParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence on stderr and exit code 2, without two dozen lines of usage."""
        unknown = next((word for word in message.split() if word.startswith("--")), "")
        alike = get_close_matches(unknown.partition("=")[0], self._option_string_actions, 1, _ALIKE)
        if message.startswith("unrecognized arguments") and alike:
            message += f"; did you mean {alike[0]}?"
        elif not message.endswith((".", "?")):
            message += f"; see {self.prog} --help."
        self.exit(EXIT_USAGE, f"{self.prog}: {' '.join(message.split())}\n")


def script_parser(description: str, *, examples: Sequence[str]) -> ArgumentParser:
    """A parser whose help ends with the examples, one command per line."""
    return _ScriptParser(
        description=description,
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation breaks when a flag is added
    )


def add_common_arguments(parser: ArgumentParser) -> None:
    """Flags that every script takes.

    A flag that is not given stays None, so that the settings file and the
    environment keep their say; `Settings` checks the values.
    """
    defaults = {entry.name: entry.default for entry in fields(Settings)}
    group = parser.add_argument_group(
        "common options", "They win over LGBM_MINER_* variables, and those over the settings file."
    )
    group.add_argument(
        "--source",
        metavar="{" + ",".join(get_args(SourceName)) + "}",
        help=f"where prices come from (default: {defaults['source']}, the feed that is scored)",
    )
    for flag, what in (
        ("--archive-dir", "folder of Parquet bars, for the archive source (default: none)"),
        ("--state-dir", f"folder of collected state (default: {defaults['state_dir']})"),
        ("--model-dir", f"folder of trained models (default: {defaults['model_dir']})"),
    ):
        group.add_argument(flag, metavar="DIR", help=what)
    group.add_argument(
        "--profile",
        metavar="{" + ",".join(PROTOCOL_PROFILES) + "}",
        help=f"what validators ask and score (default: {defaults['profile']})",
    )
    group.add_argument(
        "--seed", metavar="N", help=f"of every random draw (default: {defaults['seed']})"
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="settings file, TOML (default: miner.toml of this folder, if there is one)",
    )


def add_asset_argument(parser: ArgumentParser, *, default: str) -> None:
    """`--asset`, repeatable, as `args.assets`: a list, empty when not given.

    `default` ends the help: what is done when no asset is named.
    """
    parser.add_argument(
        "--asset",
        dest="assets",
        action="append",
        default=[],
        type=_known_asset,
        metavar="ASSET",
        help=f"one of {', '.join(ASSETS)}; repeatable (default: {default})",
    )


def add_worker_arguments(parser: ArgumentParser) -> None:
    """`--jobs` and `--scheduler`: who does the tasks."""
    parser.add_argument(
        "--jobs",
        metavar="N",
        help="processes of this machine that work side by side (default: the number of cores)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a dask.distributed cluster that works instead, e.g. tcp://10.0.0.5:8786; on a "
        "trusted network only, see docs/cluster.md (default: none)",
    )


def _known_asset(text: str) -> str:
    return asset_spec(text.upper()).symbol


def moment(text: str) -> int:
    """A time on the command line, ISO 8601 (UTC unless it says otherwise), in Unix seconds."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{text!r} is not an ISO 8601 time; write e.g. 2025-12-01T00:00:00Z."
        ) from None
    ts = int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
    if not EARLIEST_TS <= ts < LATEST_TS:
        raise ConfigError(f"{text!r} is out of range; write a time from 2000 to 2100.")
    return ts


def settings_from(args: Namespace) -> Settings:
    """Settings from the flags given, the environment, the settings file and the defaults.

    Every flag named like a field of `Settings` counts. Raises: ConfigError.
    """
    flags = {entry.name: getattr(args, entry.name, None) for entry in fields(Settings)}
    return load_settings(args.config, **flags)


# ---------------------------------------------------------------- exit


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its code.

    An expected failure becomes one line on stderr and exit code 1, an
    interrupt one line and 130; a reader that went away (`| head`) is no news.
    A bug keeps its traceback.
    """
    try:
        code = main()
        sys.stdout.flush()  # a closed pipe shows here, not at interpreter exit
    except MinerError as error:
        _complain(str(error))
        code = EXIT_FAILURE
    except KeyboardInterrupt:
        _complain("interrupted.")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        code = EXIT_FAILURE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise  # a file's own errors are told where it is written
        _close_stdout()
        _complain("standard output cannot be written (the disk is full); free some disk space.")
        code = EXIT_FAILURE
    sys.exit(code)


def _close_stdout() -> None:
    """Python flushes stdout once more at exit; it must not find the pipe or the disk again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(sentence: str) -> None:
    _print_line(f"{Path(sys.argv[0]).name}: {' '.join(sentence.split())}")


def note(sentence: str) -> None:
    """One line on stderr that is neither a result nor an error."""
    _print_line(" ".join(sentence.split()))


def _print_line(line: str) -> None:
    """One line on stderr as it is: above a live bar, never wrapped, no markup."""
    _ERR.print(Text(line), soft_wrap=True)


# ---------------------------------------------------------------- tables and progress

_NUMBER: Final = re.compile(r"[+\-−±]?[\d.,]+( ?(%|s|ms|bp|MB))?( ?± ?[\d.,]+)?|n/a|–|")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table to stdout; None is shown as a dash.

    A column of numbers is aligned right and never broken; the first column is
    never broken either, other text folds to the width of the terminal (80
    columns in a pipe).
    """
    texts = [[_cell_text(cell) for cell in row] for row in rows]
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(_NUMBER.fullmatch(row[index].plain) for row in texts)
        grid.add_column(
            name,
            justify="right" if numeric else "left",
            no_wrap=numeric or index == 0,
            overflow="fold",
        )
    for row in texts:
        grid.add_row(*row)
    if _OUT.is_terminal:
        _OUT.print(grid)
        return
    with _OUT.capture() as drawn:
        _OUT.print(grid)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))  # padded to one width


def _cell_text(cell: Cell) -> Text:
    if isinstance(cell, Text):
        return cell
    return Text("–" if cell is None else str(cell))


class _RateColumn(ProgressColumn):
    """Steps per second, the way `rich` measures them."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


def progress() -> Progress:
    """A progress bar on stderr, with rate and remaining time.

    In a pipe or a log file it shows nothing: there the log lines speak.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_ERR,
        disable=not _ERR.is_terminal,
    )


@contextmanager
def showing_days() -> Iterator[Callable[[int, int, str], None]]:
    """A bar of days that are fetched; moved by calls with days done, days in all, and what."""
    with progress() as bars:
        line = bars.add_task("bars", total=None, visible=False)

        def show(done: int, total: int, what: str) -> None:
            bars.update(line, completed=done, total=total, description=what, visible=True)

        yield show


@contextmanager
def showing_progress(totals: Mapping[str, int]) -> Iterator[Callable[[str, str], None]]:
    """One bar per name, moved by calls with a name and the step of its total that begins.

    The calls may come from any thread.
    """
    with progress() as bars:
        lines = {name: bars.add_task(name, total=total) for name, total in totals.items()}

        def show(name: str, step: str) -> None:
            bars.update(lines[name], advance=1, description=f"{name} · {step}")

        yield show


# ---------------------------------------------------------------- log lines


class _ConsoleHandler(logging.Handler):
    """Writes through the console that owns the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _print_line(self.format(record))
        except Exception:  # noqa: BLE001  # logging must never end the program
            self.handleError(record)


def configure_logging(level: str) -> None:
    """Send log lines of `level` ("debug" to "error") and above to stderr, around live bars."""
    handler = _ConsoleHandler()
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
