"""Every figure of speed that the project holds itself to, in one table.

    python -m benchmarks.run                          # on a simulated market
    python -m benchmarks.run --archive-dir bars       # on bars of your own

Models of one asset are trained into a temporary folder, then every module of
`BENCHMARKS` measures in a process of its own, with no settings but the flags given here.
Exits with 1 if a row is missed and has no documented limit; a benchmark that fails is a
row missed, and so is a run of more than 40 minutes.
"""

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

from benchmarks.measuring import NO_SETTINGS, Row, exit_code, load_rows, plain_row, show
from config import Frequency
from console import run_script, script_parser
from data_fetcher import open_source
from errors import ConfigError, DataError, MinerError
from settings import load_settings, without_settings

ROOT: Final = Path(__file__).resolve().parent.parent
# Each takes the flags of `measuring.bench_parser` and writes its rows with `finish`.
BENCHMARKS: Final = (
    "answers",
    "scoring",
    "replay",
    "store",
    "serving",
    "axon",
    "growth",
    "training",
)
LIMIT_MINUTES: Final = 40.0


def main() -> int:
    """Train, measure, print the table."""
    args = _arguments()
    begun = perf_counter()
    with TemporaryDirectory() as name:
        folder = Path(name)
        flags = _flags(args, folder)
        if _run("train_models", *flags):
            raise MinerError("training failed; see above for why.")
        rows = [row for name in args.only or BENCHMARKS for row in rows_of(name, flags, folder)]
    minutes = (perf_counter() - begun) / 60
    rows.append(plain_row("all benchmarks", "minutes", [minutes], reach=LIMIT_MINUTES))
    show("Speed", rows)
    return exit_code(rows)


def _arguments() -> Namespace:
    parser = script_parser(
        "Measure everything that has a row in the table of speeds.",
        examples=["python -m benchmarks.run --archive-dir bars --only answers"],
    )
    parser.add_argument(
        "--archive-dir", metavar="DIR", help="folder of Parquet bars (default: a simulated market)"
    )
    parser.add_argument(
        "--asset",
        metavar="ASSET",
        help="that is measured (default: the first with bars for both kinds of prompt)",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        choices=BENCHMARKS,
        help=f"one of {', '.join(BENCHMARKS)}; repeatable (default: all)",
    )
    return parser.parse_args()


def _flags(args: Namespace, folder: Path) -> tuple[str, ...]:
    """What every benchmark is told: the bars, folders of its own, the asset."""
    given: dict[str, Any] = {"source": "simulated"}
    if args.archive_dir:
        given = {"source": "archive", "archive_dir": str(Path(args.archive_dir).resolve())}
    served = open_source(load_settings(NO_SETTINGS, {}, **given)).frequencies()
    whole = [asset for asset, found in served.items() if set(found) == set(Frequency)]
    if not whole:
        raise DataError(
            f"{args.archive_dir} has no asset with bars for both kinds of prompt; "
            "add one-minute bars of one."
        )
    asset = args.asset or whole[0]
    if asset not in whole:
        raise ConfigError(f"{asset} cannot be measured here; choose one of {', '.join(whole)}.")
    folders = {"model_dir": f"{folder}/models", "state_dir": f"{folder}/state"}
    pairs = {**given, **folders, "asset": asset}
    return tuple(f"--{name.replace('_', '-')}={value}" for name, value in pairs.items())


def rows_of(name: str, flags: Sequence[str], folder: Path) -> list[Row]:
    """What a benchmark found; one row, which is missed, if it failed before it could say."""
    file = folder / f"{name}.json"
    code = _run(f"benchmarks.{name}", *flags, f"--rows={file}")
    if file.exists():
        return load_rows(file)
    return [
        plain_row(f"benchmark {name}", "failures", [1.0], reach=0.0, detail=f"exit code {code}")
    ]


def _run(module: str, *flags: str) -> int:
    """Run a module of the project; its exit code."""
    begun = perf_counter()
    command = [sys.executable, "-m", module, f"--config={NO_SETTINGS}", *flags]
    print(f"\n$ python {shlex.join(command[1:])}", flush=True)
    environment = without_settings(os.environ)
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)  # noqa: S603  # ours
    print(f"{module}: {perf_counter() - begun:.0f} s", flush=True)
    return done.returncode


if __name__ == "__main__":
    run_script(main)
