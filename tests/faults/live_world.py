"""A whole live miner but for its transport: loopback venues, collector, board and engine.

The clock is turned by hand. After every turn the duties run once in the order in
which a minute brings them, and prompts are asked.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bar_cleaning import bars_from_minutes
from bar_store import BarStore
from clock import RehearsalClock
from collector import Collected, Collector
from config import FREQUENCIES, Venue
from data_fetcher import LiveSource
from domain import Bars, Candles, FloatArray, Forecast, ForecastRequest
from errors import MinerError
from feed_plans import FeedPlan, HttpPolicy
from feeds import Feed, open_feeds
from forecast_engine import ForecastEngine
from loopback_venues import LoopbackVenues, serve_venues
from market_view import Rung
from price_board import AnchorSource, PriceBoard, PricePoller
from quarantine import Quarantine
from settings import Settings
from wire_format import encode_prompt_answer, validate_answer

# So fast a market that no call waits for its share of a host's limit.
SPEED: Final = 1e5
PATIENT: Final = HttpPolicy(first_wait_s=0.0, attempts=2)
HASTY: Final = HttpPolicy(connect_s=1, read_s=0.3, attempt_s=0.4, attempts=1)
Series = tuple[str, str, int]  # venue, asset, bar length
# How far an answer may start from the truth: feeds may be a quarter of an hour late
# unnoticed, and an old price is as far away as its market moves meanwhile.
NEAR: Final = 0.02
FAR_PER_ROOT_MINUTE: Final = 5 * 5e-4  # of five standard deviations of `walk`


@dataclass
class Hand:
    """The time that a clock shows, set by hand."""

    ts: float

    def clock(self) -> RehearsalClock:
        """A clock that shows it, at a speed that leaves all hosts their limits."""
        return RehearsalClock(start=0.0, origin=0.0, speed=SPEED, wall=lambda: self.ts / SPEED)


def walk(asset_seed: int, level: float, start: int, n: int, sigma: float = 5e-4) -> Bars:
    """Minutes of a random walk from a moment on, no two closes alike."""
    close = level * np.exp(np.cumsum(np.random.default_rng(asset_seed).normal(0, sigma, n)))
    opened = np.concatenate([[level], close[:-1]])
    return Bars(
        open_ts=start + 60 * np.arange(n, dtype=np.int64),
        open=opened,
        high=np.maximum(opened, close) * 1.0001,
        low=np.minimum(opened, close) * 0.9999,
        close=close,
        volume=np.ones(n),
        bar_s=60,
        feed="truth",
    )


@dataclass
class Kept:
    """What became of the prompts so far."""

    asked: int = 0
    lost: list[str] = field(default_factory=list)
    rungs: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)  # of the prices that paths start from


@dataclass
class LiveWorld:
    """One miner on one state folder."""

    hand: Hand
    settings: Settings
    plans: Mapping[str, FeedPlan]
    feeds: Mapping[Venue, Feed]
    board: PriceBoard
    poller: PricePoller
    collector: Collector
    store: BarStore
    source: LiveSource
    engine: ForecastEngine
    truth: Mapping[str, Bars] | None = None  # that answers must start from; None: not looked at
    kept: Kept = field(default_factory=Kept)

    def turn(self, seconds: float = 60.0) -> Collected:
        """Let time pass, do the minute's duties, ask every asset at its frequencies."""
        self.hand.ts += seconds
        done = self.collector.collect()
        self.poller.poll()
        self.engine.refresh()
        self.ask_all()
        return done

    def ask_all(self) -> list[Forecast]:
        """Every prompt that the profile knows; what is not answered validly is noted."""
        answers = []
        for plan in self.plans.values():
            for frequency in plan.frequencies:
                spec = FREQUENCIES[frequency]
                request = ForecastRequest(
                    asset=plan.asset,
                    start_ts=(int(self.hand.ts) // 60 + 1) * 60,
                    increment_s=spec.prompt_increment_s,
                    length_s=spec.prompt_length_s,
                    num_paths=8,
                )
                answer = self.ask(request)
                answers += [answer] if answer is not None else []
        return answers

    def ask(self, request: ForecastRequest) -> Forecast | None:
        """The answer, or None and a note if there is no valid one."""
        self.kept.asked += 1
        try:
            answer = self.engine.answer(request)
            validate_answer(encode_prompt_answer(answer), request)
            assert np.isfinite(answer.paths).all()
            assert Rung(answer.diagnostics.rung)
            assert AnchorSource(answer.diagnostics.anchor_source)
            assert not (strayed := self._strayed(answer)), strayed
        except (MinerError, AssertionError, ArithmeticError, LookupError) as error:
            self.kept.lost.append(f"{request.asset} {request.increment_s} s: {error!r}")
            return None
        self.kept.rungs.add(answer.diagnostics.rung)
        self.kept.sources.add(answer.diagnostics.anchor_source)
        return answer

    def _strayed(self, answer: Forecast) -> str:
        """What is wrong with the price that an answer starts from, if that is known."""
        if self.truth is None:
            return ""
        true = self.truth[answer.request.asset]
        last = int(np.searchsorted(true.close_ts, self.hand.ts, "right")) - 1
        start, price = float(np.median(answer.paths[:, 0])), float(true.close[last])
        age_min = max(0.0, answer.diagnostics.price_age_s) / 60
        allowed = NEAR + FAR_PER_ROOT_MINUTE * np.sqrt(age_min)
        return "" if abs(np.log(start / price)) < allowed else f"starts at {start}, not {price}"

    def stored(self, series: Series) -> dict[int, float]:
        """Closes by open time."""
        bars = self.store.load(*series)
        return {} if bars is None else dict(zip(bars.open_ts.tolist(), bars.close, strict=True))

    def lies(self, market: Mapping[str, Bars]) -> list[str]:
        """Stored values that never were, and bars that had not closed by now.

        What a bar leaves open, beside its close, is no lie.
        """
        found = []
        for series in self.store.series():
            venue, asset, bar_s = series
            candles = self.store.load_candles(*series)
            if candles is None:
                continue
            stored, true = _columns(candles), _true_columns(market[asset], venue, bar_s)
            ts = candles.bars.open_ts
            early = ts + bar_s > self.hand.ts
            found += [f"{venue} {asset} {bar_s}: {moment} is early" for moment in ts[early]]
            at = np.minimum(np.searchsorted(true["ts"], ts), len(true["ts"]) - 1)
            for name, values in stored.items():
                told = np.isfinite(values) | (name == "close")
                false = told & ((true["ts"][at] != ts) | (true[name][at] != values))
                found += [
                    f"{venue} {asset} {bar_s}: {name} {values[row]} at {ts[row]}"
                    for row in np.flatnonzero(false)
                ]
        return found

    def lacking(self, market: Mapping[str, Bars], since: int, *assets: str) -> list[str]:
        """Closed minutes of the scored feeds since a moment that are not stored."""
        found = []
        for plan in (self.plans[asset] for asset in assets or self.plans):
            held = self.stored((plan.scored.venue.value, plan.asset, 60))
            wanted = [ts for ts in truth_of(market[plan.asset], 60) if since <= ts]
            found += [
                f"{plan.asset} {ts}" for ts in wanted if ts + 60 <= self.hand.ts and ts not in held
            ]
        return found


def _columns(candles: Candles) -> dict[str, FloatArray]:
    """Everything that a series holds beside its times."""
    bars = candles.bars
    return {
        "open": bars.open,
        "high": bars.high,
        "low": bars.low,
        "close": bars.close,
        "volume": bars.volume,
        "trades": candles.trades,
        "taker_volume": candles.taker_volume,
    }


def _true_columns(minutes: Bars, venue: str, bar_s: int) -> dict[str, npt.NDArray[Any]]:
    """What an honest venue says of the bars, by column; of volume Pyth says nothing but 0."""
    bars = minutes if bar_s == 60 else bars_from_minutes(minutes, bar_s=bar_s)
    volume = np.zeros(len(bars)) if venue == Venue.PYTH else bars.volume
    candles = Candles(
        bars=replace(bars, volume=volume),
        trades=(1 + (bars.volume * 10).astype(np.int64) % 1000).astype(np.float64),
        taker_volume=bars.volume / 2,
    )
    return {"ts": bars.open_ts, **_columns(candles)}


def truth_of(minutes: Bars, bar_s: int) -> dict[int, float]:
    """True closes by open time."""
    bars = minutes if bar_s == 60 else bars_from_minutes(minutes, bar_s=bar_s)
    return dict(zip(bars.open_ts.tolist(), bars.close.tolist(), strict=True))


@contextmanager
def live_world(
    settings: Settings,
    hand: Hand,
    *,
    policy: HttpPolicy = PATIENT,
    truth: Mapping[str, Bars] | None = None,
) -> Iterator[LiveWorld]:
    """Open a miner over settings whose addresses lead to loopback venues.

    With the market's `truth` answers that start elsewhere count as lost.
    """
    clock = hand.clock()
    with ExitStack() as opened:
        source = LiveSource(settings, clock)
        feeds = open_feeds(
            settings, clock, policy=policy, quote_policy=policy, sleep=lambda _seconds: None
        )
        for feed in feeds.values():
            opened.callback(feed.close)
        board, store = PriceBoard(source.plans), BarStore(settings.state_dir)
        yield LiveWorld(
            hand=hand,
            settings=settings,
            plans=source.plans,
            feeds=feeds,
            board=board,
            poller=PricePoller(source.plans, feeds, board, clock),
            collector=Collector(
                source.plans,
                feeds,
                store,
                Quarantine(settings.state_dir),
                clock,
                days=settings.days,
            ),
            store=store,
            source=source,
            engine=ForecastEngine.open(source, settings, board),
            truth=truth,
        )


@contextmanager
def served(market: Mapping[str, Bars], hand: Hand) -> Iterator[LoopbackVenues]:
    """Loopback venues on the same hand-set time."""
    with serve_venues(market, hand.clock()) as venues:
        yield venues


def live_settings(
    root: Path, venues: LoopbackVenues, assets: tuple[str, ...], **more: object
) -> Settings:
    """Settings of a small live miner."""
    chosen: dict[str, object] = {"state_dir": root / "state", "model_dir": root / "models"}
    chosen |= {"days": 3.0, "memory_days": 15, "served_assets": assets, **venues.urls, **more}
    return Settings(**chosen)  # type: ignore[arg-type]
