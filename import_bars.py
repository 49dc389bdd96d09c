"""Bring Parquet bars of your own into `state/`, as a series of their own.

    python import_bars.py --archive-dir my_bars --feed binance
    python import_bars.py --archive-dir my_bars --feed binance --asset BTC --asset ETH

The folder is laid out as the archive source reads it (see `data_fetcher`). Bars
are stored under the name of the feed they come from and never merged with those
of another; a second import adds what is new and corrects what changed.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bar_cleaning import SetAsideBar, summarise_set_aside
from bar_store import BarStore
from clock import SystemClock
from config import FeedSymbol, Venue
from console import (
    Cell,
    add_asset_argument,
    note,
    run_script,
    script_parser,
    settings_from,
    table,
)
from data_fetcher import ArchiveSource
from domain import Bars
from errors import ConfigError, DataError, MinerError
from feed_plans import feed_plans, known_feed
from protocol import protocol_profile
from settings import Settings
from wire_format import format_iso

LATER: Final = "closes after now"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Imported:
    """What became of one series."""

    asset: str
    bars: Bars
    new: int
    set_aside: tuple[SetAsideBar, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Import and report; 1 if anything that was asked for could not be imported."""
    args = _parser().parse_args(argv)
    settings = settings_from(args)
    source = ArchiveSource(_archive_dir(settings))
    store = BarStore(settings.state_dir)
    feeds = _feeds(args.feed, args.assets or list(source.frequencies()))
    wanted = args.assets or list(feeds)
    now = int(SystemClock().now())
    failures = [
        f"{settings.archive_dir} has no bars of {asset}; it has {', '.join(source.frequencies())}."
        for asset in wanted
        if asset not in source.frequencies()
    ]
    failures += [
        f"no feed of {asset} is read from {args.feed}; name another with --feed."
        for asset in wanted
        if asset not in feeds
    ]
    done: list[_Imported] = []
    for asset, bar_s in source.series():
        if asset in wanted and asset in feeds:
            try:
                done.append(_import(source, store, feeds[asset], asset, bar_s, now))
            except MinerError as error:
                failures.append(str(error))
    if not feeds and not failures:
        failures.append(f"nothing in {settings.archive_dir} is read from {args.feed}.")
    _report(done, source.unknown_assets)
    if not args.assets:
        _name_the_others(args.feed, [name for name in source.frequencies() if name not in feeds])
    _tell_symbols(done, settings)
    for sentence in failures:
        print(f"{Path(__file__).name}: {sentence}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> ArgumentParser:
    parser = script_parser(
        "Import Parquet bars into the state folder, for operators who bring history.",
        examples=["python import_bars.py --archive-dir my_bars --feed binance --asset BTC"],
    )
    parser.add_argument(
        "--feed",
        required=True,
        choices=[venue.value for venue in Venue],
        help="the feed that the bars come from",
    )
    add_asset_argument(parser, default="every asset in the folder")
    parser.add_argument(
        "--archive-dir", metavar="DIR", help="folder of one- and five-minute bars (default: none)"
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help=f"folder of collected state (default: {Settings().state_dir})",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="settings file, TOML (default: miner.toml of this folder, if there is one)",
    )
    return parser


def _archive_dir(settings: Settings) -> Path:
    if settings.archive_dir is None:
        raise ConfigError(
            "there is nothing to import from; name a folder of Parquet files with --archive-dir."
        )
    return settings.archive_dir


def _feeds(venue: str, assets: Sequence[str]) -> dict[str, FeedSymbol]:
    """What is read of the assets from a venue, by asset."""
    found = ((asset, known_feed(venue, asset)) for asset in assets)
    return {asset: feed for asset, feed in found if feed is not None}


def _import(
    source: ArchiveSource, store: BarStore, feed: FeedSymbol, asset: str, bar_s: int, now: int
) -> _Imported:
    """Store one series under the feed's name, as far as it is known by `now`.

    Raises: DataError, StateError, BusyError.
    """
    found, set_aside = source.load_bars(asset, bar_s)
    bars = found.between(None, now)
    if not len(bars):
        raise DataError(
            f"{asset}: all {len(found)} bars close after now, {format_iso(now)}; set the clock "
            "right, or mend their times."
        )
    rest = slice(len(bars), None)
    later = zip(found.open_ts[rest].tolist(), found.close[rest].tolist(), strict=True)
    set_aside += tuple(SetAsideBar(ts=ts, close=close, reason=LATER) for ts, close in later)
    labelled = replace(bars, feed=feed.name)
    new = store.append(feed.venue.value, asset, labelled).new
    return _Imported(asset=asset, bars=labelled, new=new, set_aside=set_aside)


def _name_the_others(venue: str, assets: Sequence[str]) -> None:
    if assets:
        print(f"not imported, because no feed of them is read from {venue}: {', '.join(assets)}")


def _tell_symbols(done: Sequence[_Imported], settings: Settings) -> None:
    """Print which symbol the bars of each asset are stored as; warn where another is scored."""
    plans = feed_plans("venue", protocol_profile(settings.profile))
    for asset, feed in {entry.asset: entry.bars.feed for entry in done}.items():
        stored = f"{asset} is stored as {feed}"
        scored = plans[asset].scored.name if asset in plans else None
        if feed == scored:
            print(f"{stored}, the feed that is scored.")
        elif scored is None:
            note(f"{stored}, but profile {settings.profile} does not ask {asset}.")
        else:
            note(f"{stored}, but {scored} is scored: its past alone can be extended by them.")


def _report(done: Sequence[_Imported], unknown_assets: Sequence[str]) -> None:
    """Print what came in, what was set aside and why, and what nobody asks for."""
    columns = ("asset", "bars", "new", "read", "from (UTC)", "to (UTC)", "set aside")
    if done:
        table("imported bars", columns, [_row(entry) for entry in done])
    for entry in done:
        for clause in summarise_set_aside(entry.set_aside):
            print(f"{entry.asset} {entry.bars.bar_s // 60}m set aside: {clause}")
    if unknown_assets:
        print(f"not imported, because no validator asks for them: {', '.join(unknown_assets)}")


def _row(entry: _Imported) -> tuple[Cell, ...]:
    bars = entry.bars
    first, last = (
        datetime.fromtimestamp(moment, UTC).date().isoformat()
        for moment in (int(bars.open_ts[0]), bars.end_ts)
    )
    name = f"{bars.bar_s // 60}m"
    return entry.asset, name, entry.new, len(bars), first, last, len(entry.set_aside)


if __name__ == "__main__":
    run_script(main)
