"""The dress rehearsal: the real miner through recorded days, at many times their speed.

    python rehearse.py --archive-dir bars --asset BTC --asset ETH --asset XAU --speed 60 --days 2
    python rehearse.py --archive-dir bars --asset BTC --speed 60 --days 0.25 --report rehearsal.json
    python rehearse.py --simulated --speed 1 --days 0.0835 --history 62 --restart-at 0  # a soak

All venues are served on loopback from recorded one-minute bars, `miner.py` runs as a
process of its own against them, and validators ask at the official cadence. In the
middle the miner is stopped and started again. What was collected, trained, answered,
scored and used is then held against what must hold; exit code 0 says that it did.

Where no bars of an asset are at hand, `--simulated` invents a market for all of them.
Market time runs at `--speed`; deadlines, trainings and timeouts take real seconds.
"""

import shutil
import signal
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

import numpy as np

from bar_cleaning import MINUTE_S
from config import DAY_S, HISTORY_DAYS
from console import (
    EXIT_INTERRUPTED,
    add_asset_argument,
    moment,
    note,
    progress,
    run_script,
    script_parser,
)
from data_fetcher import ArchiveSource
from domain import Bars
from errors import BusyError, ConfigError, MinerError
from feed_plans import feed_plans
from protocol import protocol_profile
from rehearsal import PROFILE, SEED, SOURCE, Script, rehearsal_of
from rehearsal_findings import judge, name_of, passed
from rehearsal_plan import Fate, asked_pairs
from rehearsal_tables import print_findings, write_report
from simulated_market import simulate_bars
from state_store import held, owned, require_file, require_folder
from wire_format import format_iso

SIMULATED_END: Final = 1_768_608_000  # Saturday 2026-01-17 00:00 UTC, after five trading days
LOCK: Final = ".rehearsal.lock"
SPARE_DAYS: Final = 1.0  # of bars after the last prompt, for a slow start and the last scores


def main() -> int:
    """Rehearse. Returns the exit code: 0 if everything held."""
    args = _arguments()
    if args.report is not None:
        require_file(args.report, "--report")
    script = read_script(args)
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        signal.signal(number, _interrupt)
    interrupted = False
    with own_folder(script), rehearsal_of(script) as rehearsal:
        try:
            with progress() as bars:
                rehearsal.run(bars)
        except KeyboardInterrupt:
            interrupted = True
            note("interrupted; stopping the miner.")
        except MinerError as error:
            note(str(error))
    found = rehearsal.findings()
    points = judge(found)
    print_findings(found, points)
    if args.report is not None:
        write_report(args.report, found, points, script.about())
    for ask in [ask for ask in rehearsal.validators.asks if ask.fate is not Fate.IN_TIME][:10]:
        note(
            f"{name_of(ask.prompt.pair)}: {ask.fate.value} after {ask.seconds:.2f} s: {ask.reason}"
        )
    if interrupted:
        return EXIT_INTERRUPTED
    return 0 if passed(points) else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def own_folder(script: Script) -> Iterator[None]:
    """Make the work folder anew, and keep other rehearsals from it as long as the block runs.

    Raises: ConfigError if it holds anything but a rehearsal; BusyError if one runs there,
    or the miner of one that was killed.
    """
    folder = script.work_dir
    require_folder(folder, "--work-dir")
    if folder.is_dir() and _content(folder) and not script.config_file.exists():
        raise ConfigError(
            f"--work-dir {folder} holds other files than a rehearsal's; name a new folder."
        )
    busy = f"a rehearsal runs in --work-dir {folder}; name another folder, or let it end."
    with held(folder, LOCK, busy):
        try:
            with owned(script.state_dir):
                pass
        except BusyError:  # its own remedy is a flag of the miner's
            raise BusyError(busy) from None
        for path in _content(folder):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        yield


def _content(folder: Path) -> list[Path]:
    """All in a work folder but its lock."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def read_script(args: Namespace) -> Script:
    """The script that the flags describe, with its bars. Raises: ConfigError, DataError."""
    profile = protocol_profile(PROFILE)
    default = feed_plans(SOURCE, profile) if args.simulated else ("BTC", "ETH", "XAU")
    assets = tuple(dict.fromkeys(args.assets)) or tuple(default)
    if not asked_pairs(profile, assets):
        raise ConfigError(f"no validator asks {', '.join(assets)} under profile {PROFILE}.")
    bars = _simulated(assets, args) if args.simulated else _recorded(assets, args.archive_dir)
    first = max(entry.open_ts[0] for entry in bars.values())
    last = min(entry.end_ts for entry in bars.values())
    latest = last - (args.days + min(args.days, SPARE_DAYS)) * DAY_S
    start = args.start if args.start is not None else int(latest // DAY_S * DAY_S)
    if not first + DAY_S <= start <= latest:
        raise ConfigError(
            f"start {format_iso(start)} is out of range: the bars of {', '.join(assets)} last from "
            f"{format_iso(int(first))} to {format_iso(last)}, and {args.days:g} days and some "
            "spare must follow; choose another --start or fewer --days."
        )
    return Script(
        assets=assets,
        bars=bars,
        start=start,
        days=args.days,
        speed=args.speed,
        restart_at=args.restart_at,
        history_days=float(min(args.history, (start - first) / DAY_S)),
        retrain_days=None if args.retrain_hours is None else args.retrain_hours / 24,
        work_dir=args.work_dir.resolve(),
    )


def _recorded(assets: Sequence[str], folder: Path) -> dict[str, Bars]:
    """One-minute bars of an archive. Raises: ConfigError, DataError."""
    source = ArchiveSource(folder)
    lacking = [asset for asset in assets if (asset, MINUTE_S) not in source.series()]
    if lacking:
        raise ConfigError(
            f"the archive has no one-minute bars of {', '.join(lacking)}; rehearse other assets."
        )
    return {asset: source.load_bars(asset, MINUTE_S)[0] for asset in assets}


def _simulated(assets: Sequence[str], args: Namespace) -> dict[str, Bars]:
    """A simulated market that lasts for history, rehearsal and spare."""
    days = args.history + 2 * args.days + 2
    return {
        asset: simulate_bars(asset, end_ts=SIMULATED_END, days=days, seed=SEED) for asset in assets
    }


def _arguments() -> Namespace:
    parser = script_parser(
        "Run the real miner through recorded days on loopback, faster than they were.",
        examples=[
            "python rehearse.py --archive-dir bars --asset BTC --asset ETH --asset XAU",
            "python rehearse.py --archive-dir bars --asset BTC --days 0.25 --report rehearsal.json",
        ],
    )
    add_asset_argument(parser, default="BTC, ETH and XAU; with --simulated all that are asked")
    bars = parser.add_mutually_exclusive_group(required=True)
    bars.add_argument("--archive-dir", metavar="DIR", type=Path, help="folder of one-minute bars")
    bars.add_argument("--simulated", action="store_true", help="bars of an invented market")
    _add_time_arguments(parser)
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        type=Path,
        default=Path("build/rehearsal"),
        help="folder of the rehearsed miner, made anew (default: build/rehearsal)",
    )
    parser.add_argument("--report", metavar="FILE", type=Path, help="write all findings as JSON")
    return parser.parse_args()


def _add_time_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--speed",
        metavar="X",
        type=_above_zero,
        default=60.0,
        help="market seconds per real second (default: 60)",
    )
    parser.add_argument(
        "--days",
        metavar="N",
        type=_above_zero,
        default=2.0,
        help="market days in which prompts are asked (default: 2)",
    )
    parser.add_argument(
        "--start",
        metavar="TIME",
        type=moment,
        help="market time at which the miner is started, ISO 8601 "
        "(default: the last midnight that leaves enough bars)",
    )
    parser.add_argument(
        "--history",
        metavar="DAYS",
        type=_above_zero,
        default=float(HISTORY_DAYS),
        help="most days of history that are back-filled and trained on "
        f"(default: {HISTORY_DAYS}, or what the archive has before the start)",
    )
    parser.add_argument(
        "--restart-at",
        metavar="SHARE",
        type=_share,
        default=0.5,
        help="restart the miner after this share of the days, 0 for never (default: 0.5)",
    )
    parser.add_argument(
        "--retrain-hours",
        metavar="H",
        type=_above_zero,
        help="train every set again after so many market hours (default: the usual cadence)",
    )


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < np.inf:
        raise ArgumentTypeError(f"{text} is not above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


if __name__ == "__main__":
    run_script(main)
