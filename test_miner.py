"""Sanity-check the forecasts of every trained asset; the exit code tells.

    python test_miner.py                           # every asset that has models
    python test_miner.py --asset BTC --verbose     # one asset, every check
    python test_miner.py --plot plots              # with fan charts
    python test_miner.py --preflight               # the doctor: may miner.py start?

Asks for the next prompt of each asset and frequency, encodes the answer as it
would leave, and judges it by what the market lately did.
"""

from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from rich.text import Text

import preflight
from clock import open_clock
from config import DAY_S, FREQUENCIES, NUM_PATHS, Frequency
from console import (
    Cell,
    add_asset_argument,
    add_common_arguments,
    configure_logging,
    note,
    progress,
    run_script,
    script_parser,
    settings_from,
    table,
)
from data_fetcher import LiveSource, open_source
from domain import Forecast, ForecastRequest, MarketHistory
from errors import InvalidAnswer, ModelError
from forecast_engine import ForecastEngine
from live_market import LiveMarket
from operator_flags import add_operator_arguments, operator_settings
from path_checks import CheckResult, Verdict, check_forecast, check_level, spread_miss
from plots import fan_chart, save_figure
from protocol import Competition, competition_like, protocol_profile
from settings import Settings
from state_store import require_writable
from wire_format import encode_prompt_answer, encode_shadow_answer, format_iso, parse_iso_minute

EXAMPLES: Final = (
    "python test_miner.py",
    "python test_miner.py --source archive --archive-dir bars --asset BTC --plot plots",
    "python test_miner.py --preflight --wallet.name miner --wallet.hotkey default --port 8090",
)
MOMENTS: Final = 8
MOMENT_SPACING_S: Final = 43 * 3600  # two weeks, at eight different times of day
MIN_DAYS_BEFORE: Final = 5  # of bars, or there is little to compare a moment with
STYLES: Final = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILURE: "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """One forecast and what the checks say about it."""

    forecast: Forecast
    history: MarketHistory
    results: tuple[CheckResult, ...]

    @property
    def worst(self) -> CheckResult:
        """The first of the gravest results."""
        gravity = list(Verdict)
        return max(self.results, key=lambda result: gravity.index(result.verdict))


def parser() -> ArgumentParser:
    """The command line."""
    options = script_parser("Sanity-check the forecasts of trained models.", examples=EXAMPLES)
    add_asset_argument(options, default="every asset that has models")
    options.add_argument(
        "--plot", metavar="DIR", type=Path, help="draw fan charts into this folder"
    )
    options.add_argument(
        "--verbose", action="store_true", help="show every check, not only warnings and failures"
    )
    add_common_arguments(options)
    group = options.add_argument_group(
        "preflight", "With it, the flags that miner.py will be started with; without it unused."
    )
    group.add_argument(
        "--preflight",
        action="store_true",
        help="check clock, ports, feeds, disk, wallet, models, state and memory instead",
    )
    group.add_argument("--host", metavar="ADDRESS", help="where miner.py will listen")
    group.add_argument("--port", metavar="N", help="its TCP port over HTTP")
    add_operator_arguments(options)
    return options


def main() -> int:
    """Check, report and draw; 0 if no check failed."""
    args = parser().parse_args()
    settings = settings_from(args)
    if args.preflight:
        return run_preflight(settings, args)
    configure_logging("warning")
    if args.plot is not None:
        require_writable(args.plot, "--plot")
    source = open_source(settings)
    if isinstance(source, LiveSource):
        _bring_up(source, settings, args.assets)
    engine = ForecastEngine.open(source, settings)
    pairs = chosen_pairs(engine, args.assets, settings)
    with progress() as bar:
        examined = [
            examine(engine, asset, frequency, settings)
            for asset, frequency in bar.track(pairs, description="checking")
        ]
    report(examined, verbose=args.verbose)
    if args.plot is not None:
        draw(examined, args.plot)
    return int(any(entry.worst.verdict is Verdict.FAILURE for entry in examined))


def _bring_up(source: LiveSource, settings: Settings, assets: list[str]) -> None:
    """Fetch the last day's bars that are missing. Raises: SourceUnavailable."""
    with LiveMarket.open(settings, source, assets) as market:
        market.require_scored(market.collect())


def run_preflight(settings: Settings, args: Namespace) -> int:
    """Examine machine, folders and feeds, one line each; 0 if nothing failed."""
    configure_logging("error")  # bugs; everything else is a finding
    operator = operator_settings(args)
    for remark in operator.remarks:
        note(remark)
    if args.assets:
        settings = replace(settings, served_assets=tuple(args.assets))
    site = preflight.Site(settings=settings, operator=operator, clock=open_clock(settings))
    findings = list(preflight.examine(site))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        sentence = " ".join(finding.sentence.split())
        print(f"{finding.level.value:<7}  {finding.name:<{width}}  {sentence}")
    counts = Counter(finding.level for finding in findings)
    print(", ".join(f"{counts[level]} {level.value}" for level in Verdict))
    return int(counts[Verdict.FAILURE] > 0)


def chosen_pairs(
    engine: ForecastEngine, assets: Sequence[str], settings: Settings
) -> list[tuple[str, Frequency]]:
    """Trained pairs of the named assets, or of all. Raises ModelError for what has no models."""
    trained = engine.trained()
    known = dict.fromkeys(asset for asset, _ in trained)
    missing = [asset for asset in assets if asset not in known]
    if missing or not trained:
        raise ModelError(
            f"{settings.model_dir} has no usable models of {', '.join(missing) or 'any asset'} for "
            f"the source {settings.source}; run train_models.py with the same source first."
        )
    return [pair for pair in trained if not assets or pair[0] in assets]


def examine(
    engine: ForecastEngine, asset: str, frequency: Frequency, settings: Settings
) -> Examined:
    """Answer the next prompt of a pair and check the answer."""
    competition = competition_like(protocol_profile(settings.profile), asset, frequency)
    forecast = engine.answer(next_prompt(asset, frequency, engine.now()))
    history = engine.history(asset, frequency).known_at(forecast.request.start_ts)
    results = check_forecast(
        forecast,
        history,
        competition,
        timestamps=_times_sent(forecast),
        answer_paths=_paths_sent(forecast),
    )
    if all(result.verdict is not Verdict.FAILURE for result in results):
        results += (check_level(tuple(past_misses(engine, history, competition))),)
    return Examined(forecast=forecast, history=history, results=results)


def past_misses(
    engine: ForecastEngine, history: MarketHistory, competition: Competition
) -> Iterator[float]:
    """How the spread compares at the end of the history and at moments before it."""
    for number in range(MOMENTS):
        moment = history.anchor_ts - number * MOMENT_SPACING_S
        known = history.known_at(moment)
        if moment - history.bars.open_ts[0] < MIN_DAYS_BEFORE * DAY_S:
            return
        forecast = engine.answer(
            next_prompt(history.asset, history.frequency, moment), origin=moment
        )
        miss = spread_miss(forecast, known, competition)
        if miss is not None:
            yield miss


def next_prompt(asset: str, frequency: Frequency, now: int) -> ForecastRequest:
    """The prompt of the frequency that starts at the next whole minute."""
    spec = FREQUENCIES[frequency]
    return ForecastRequest(
        asset=asset,
        start_ts=now - now % 60 + 60,
        increment_s=spec.prompt_increment_s,
        length_s=spec.prompt_length_s,
        num_paths=NUM_PATHS,
    )


def _paths_sent(forecast: Forecast) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The prices as a validator reads them; the raw ones if they cannot be sent."""
    try:
        return np.array(encode_prompt_answer(forecast)[2:], dtype=np.float64)
    except InvalidAnswer:
        return forecast.paths


def _times_sent(forecast: Forecast) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The times that the answer claims for its points; none if it cannot be sent."""
    try:
        stamps = orjson.loads(encode_shadow_answer(forecast))["timestamps"]
    except InvalidAnswer:
        stamps = []
    return np.array([parse_iso_minute(stamp) for stamp in stamps], dtype=np.int64)


# ---------------------------------------------------------------- report


def report(examined: Iterable[Examined], *, verbose: bool) -> None:
    """One row per forecast, then every check worth a look."""
    examined = list(examined)
    source = examined[0].history.source
    label = "SIMULATED MARKET" if source == "simulated" else f"source {source}"
    table(
        f"Forecasts checked: {label}, prompts of {_start(examined[0])} UTC",
        ("asset", "frequency", "answered by", "ok", "warnings", "failures", "verdict"),
        [_summary(entry) for entry in examined],
    )
    rows = [
        (_name(entry), result.check, _styled(result.verdict), result.detail)
        for entry in examined
        for result in entry.results
        if verbose or result.verdict is not Verdict.OK
    ]
    if rows:
        table("Every check" if verbose else "Worth a look", ("forecast", "check", "", "why"), rows)
    for entry in examined:
        for sentence in entry.forecast.diagnostics.notes:
            note(f"{_name(entry)}: {sentence}")


def _summary(entry: Examined) -> tuple[Cell, ...]:
    counts = Counter(result.verdict for result in entry.results)
    return (
        entry.forecast.request.asset,
        entry.history.frequency.value,
        entry.forecast.diagnostics.rung,
        *(counts[verdict] for verdict in Verdict),
        _styled(entry.worst.verdict),
    )


def _name(entry: Examined) -> str:
    return f"{entry.forecast.request.asset} {entry.history.frequency.value}"


def _start(entry: Examined) -> str:
    return format_iso(entry.forecast.request.start_ts)[:16].replace("T", " ")


def _styled(verdict: Verdict) -> Text:
    return Text(verdict.value, style=STYLES[verdict])


def draw(examined: Iterable[Examined], folder: Path) -> None:
    """One fan chart per forecast. Raises StateError if it cannot be written."""
    for entry in examined:
        request, diagnostics = entry.forecast.request, entry.forecast.diagnostics
        hours = request.length_s // 3600
        figure = fan_chart(
            entry.forecast,
            entry.history,
            title=f"{request.asset}: the next {'hour' if hours == 1 else f'{hours} hours'}",
            subtitle=f"{request.num_paths} paths from {_start(entry)} UTC, answered by "
            f"{diagnostics.rung}, checks: {entry.worst.verdict.value}, "
            f"source: {entry.history.source}",
        )
        path = folder / f"{request.asset}_{entry.history.frequency.value}.png"
        save_figure(figure, path)
        print(f"drawn: {path}")


if __name__ == "__main__":
    run_script(main)
