"""What the miner knows of itself, for the metrics, the health check and the status page.

`MinerFacts` are plain values at one moment. `EngineFacts` reads them off a running
engine, which says nothing of feeds, trainings or a chain: whoever wires the miner
adds what else there is by `extra`, which takes the facts and returns fuller ones.

    facts = EngineFacts(engine, source="venue", own=book.latest, extra=with_feed_prices)

Every market that prompts are expected for has its facts, empty where nothing is
known: one that is missing would be missed by nobody. Everything is read from memory;
nothing here waits for a disk or a network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeAlias

from chain import SYNC_S, ChainHealth
from config import FREQUENCIES, NUM_PATHS, Frequency, asset_spec
from domain import Forecast, ForecastRequest, MarketHistory
from errors import ConfigError
from forecast_engine import ForecastEngine
from own_scores import OwnScore, Pair
from scheduled_events import known_events
from seasonality import open_seconds

STALE_BARS: Final = 5  # bars later than this many are worth a warning
STALE_CHAIN_S: Final = 3 * SYNC_S  # a reading that hangs has no fault to tell
FAN_PATHS: Final = NUM_PATHS // 4  # enough for the bands of a picture

Fan: TypeAlias = tuple[Forecast, MarketHistory]


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketFacts:
    """One asset at one frequency. Times are Unix seconds of the miner's clock."""

    asset: str
    frequency: Frequency
    last_bar_ts: int | None  # when the last bar closed; None: there are no bars
    price: float | None  # what the next answer would start from; None: prompts are refused
    price_ts: int | None
    price_feed: str | None  # e.g. "binance:BTCUSDT"
    trained_until: int | None = None  # None: no trained models
    is_due: bool = False  # for training
    price_source: str | None = None  # the step of the ladder of prices that gave it
    scored_ts: int | None = None  # when the scored feed last told a price, believed or not
    stand_in: str | None = None  # the feed whose bars are used while the scored one has none
    own: OwnScore | None = None
    calibration: Mapping[str, float] = field(default_factory=dict)  # scalars by name

    @property
    def pair(self) -> Pair:
        """Asset and frequency."""
        return self.asset, self.frequency

    def bars_are_late(self, now: float) -> bool:
        """Whether some are missing of the time in which the market was open."""
        if self.last_bar_ts is None:
            return False
        patience_s = STALE_BARS * FREQUENCIES[self.frequency].bar_s
        hours = asset_spec(self.asset).hours
        return (
            now - self.last_bar_ts > patience_s
            and open_seconds(hours, self.last_bar_ts, int(now)) >= patience_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AxonFacts:
    """The axon, and what it knows of its chain."""

    port: int
    is_up: bool
    chain: ChainHealth | None  # None: a static one, which cannot fail


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerFacts:
    """The whole miner at one moment."""

    now: float  # of the miner's clock, Unix seconds
    source: str  # "venue", "simulated", …
    is_live: bool  # False: bars do not grow, so their age means nothing
    markets: tuple[MarketFacts, ...]
    obstacles: tuple[str, ...] = ()  # why nothing can be answered, one sentence each
    warnings: tuple[str, ...] = ()  # what an operator should look at, one sentence each
    details: tuple[tuple[str, str], ...] = ()  # more to show as it is: ("netuid", "50"), …
    axon: AxonFacts | None = None  # None: validators are not answered by an axon
    failing_feeds: tuple[str, ...] = ()  # scored ones that gave no candles when last asked
    unsaved_feeds: tuple[str, ...] = ()  # whose bars the disk refused when they were last asked
    clock_offset_s: float | None = None  # ours less the venues'; None: nobody tells it

    @property
    def assets(self) -> tuple[str, ...]:
        """Assets that can be answered, in their order."""
        return tuple(dict.fromkeys(m.asset for m in self.markets if m.price is not None))


class FactSource(Protocol):
    """Where facts and pictures come from; called on threads other than the event loop's."""

    def facts(self) -> MinerFacts:
        """The facts now; milliseconds."""

    def fan(self, asset: str, frequency: Frequency) -> Fan:
        """What would be answered to the usual prompt now, and from what. Raises: MinerError."""


class EngineFacts:
    """Facts of a running engine. Thread-safe as the engine is."""

    def __init__(
        self,
        engine: ForecastEngine,
        *,
        source: str,
        is_live: bool = False,
        own: Callable[[], Mapping[Pair, OwnScore]] = dict,
        extra: Callable[[MinerFacts], MinerFacts] = lambda facts: facts,
    ) -> None:
        self._engine = engine
        self._source = source
        self._is_live = is_live
        self._own = own
        self._extra = extra

    def facts(self) -> MinerFacts:
        """The facts now."""
        now = self._engine.now()
        markets = self._markets()
        can_answer = any(market.price is not None for market in markets)
        warnings = (*_without_price(markets), *(_doubts(markets, now) if self._is_live else ()))
        facts = MinerFacts(
            now=now,
            source=self._source,
            is_live=self._is_live,
            markets=markets,
            obstacles=() if can_answer else ("no asset has any bars yet",),
            warnings=warnings if can_answer else (),
        )
        return self._extra(facts)

    def fan(self, asset: str, frequency: Frequency) -> Fan:
        """What would be answered to the prompt that starts with the next minute."""
        spec = FREQUENCIES[frequency]
        request = ForecastRequest(
            asset=asset,
            start_ts=-(-self._engine.now() // 60) * 60,
            increment_s=spec.prompt_increment_s,
            length_s=spec.prompt_length_s,
            num_paths=FAN_PATHS,
        )
        return self._engine.answer(request), self._engine.history(asset, frequency)

    def _markets(self) -> tuple[MarketFacts, ...]:
        trained, due, own = self._engine.trained(), self._engine.due(), self._own()
        served = self._engine.served().items()
        return tuple(
            replace(
                self._market(asset, frequency),
                trained_until=trained.get((asset, frequency)),
                is_due=(asset, frequency) in due,
                own=own.get((asset, frequency)),
            )
            for asset, frequencies in served
            for frequency in frequencies
        )

    def _market(self, asset: str, frequency: Frequency) -> MarketFacts:
        """What bars and prices say."""
        engine = self._engine
        history, anchor = engine.held(asset, frequency), engine.anchor(asset, frequency)
        return MarketFacts(
            asset=asset,
            frequency=frequency,
            last_bar_ts=history.bars.end_ts if history and len(history.bars) else None,
            price=anchor.price if anchor else None,
            price_ts=anchor.ts if anchor else None,
            price_feed=anchor.feed if anchor else None,
            price_source=anchor.source.value if anchor else None,
            scored_ts=engine.scored_ts(asset, frequency),
            stand_in=history.stand_in if history else None,
            calibration=engine.calibration(asset, frequency),
        )


def _without_price(markets: Sequence[MarketFacts]) -> list[str]:
    """Assets whose prompts are refused."""
    blind = dict.fromkeys(market.asset for market in markets if market.price is None)
    return [f"{asset}: no price yet, its prompts are refused" for asset in blind]


def _doubts(markets: Sequence[MarketFacts], now: float) -> list[str]:
    sentences = []
    for market in markets:
        if market.stand_in is not None:
            sentences.append(
                f"{market.asset} {market.frequency}: no bar of the scored feed is stored, "
                f"{market.stand_in} stands in"
            )
        if market.last_bar_ts is None and market.price is not None:
            sentences.append(f"{market.asset} {market.frequency} has no bars")
        elif market.last_bar_ts is not None and market.bars_are_late(now):
            minutes = (now - market.last_bar_ts) / 60
            sentences.append(
                f"{market.asset} {market.frequency}: the last bar is {minutes:.0f} minutes old"
            )
    return [*sentences, *_ended_dates(now)]


def _ended_dates(now: float) -> list[str]:
    """What the calendar of releases lacks. Answers need no calendar, trainings do."""
    try:
        return known_events(int(now))[1]
    except ConfigError as error:
        return [str(error)]


# ---------------------------------------------------------------- axon and chain


def with_axon(facts: MinerFacts, axon: AxonFacts) -> MinerFacts:
    """The facts with those of the axon: a dead one is an obstacle, an unknown chain a warning."""
    down = () if axon.is_up else (f"the axon on port {axon.port} has stopped; restart the miner",)
    return replace(
        facts,
        axon=axon,
        obstacles=(*facts.obstacles, *down),
        warnings=(*facts.warnings, *(_chain_doubts(axon.chain) if axon.chain else ())),
        details=(*facts.details, *_axon_details(axon)),
    )


def _chain_doubts(chain: ChainHealth) -> list[str]:
    sentences = []
    if chain.fault is not None:
        sentences.append(chain.fault.rstrip("."))
    if chain.age_s is None:
        sentences.append("the chain was not read yet, so only whitelisted callers are answered")
    elif chain.age_s > STALE_CHAIN_S:
        minutes = chain.age_s / 60
        sentences.append(
            f"the chain was last read {minutes:.0f} minutes ago, stakes are those of then"
        )
    if chain.is_registered is False:
        sentences.append("our hotkey is not registered on this subnet, so no validator will ask")
    return sentences


def _axon_details(axon: AxonFacts) -> list[tuple[str, str]]:
    details = [("axon", f"on port {axon.port}" if axon.is_up else "stopped")]
    if axon.chain is None:
        return details
    if axon.chain.uid is not None:
        details.append(("uid", str(axon.chain.uid)))
    age_s = axon.chain.age_s
    details.append(("chain", "not read yet" if age_s is None else f"read {age_s / 60:.0f} min ago"))
    return details
