"""A live source with everything that feeds it: clients, collector, prices.

    with LiveMarket.open(settings, source) as market:
        engine = ForecastEngine.open(source, settings, market.prices)
        market.collect()    # every minute, or each venue on its own
        market.poll()       # every few seconds, likewise
        market.backfill()   # at the start, then now and then

A feed that cannot be reached, or a disk that refuses, raises nothing: that is logged
once and told by `warnings`. Scripts that need it insist by `require_scored`.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from types import TracebackType
from typing import Final, Self

from bar_store import BarStore
from clock import Clock, agreed_offset, market_speed, open_clock
from collector import Collected, Collector, Progress
from config import Venue
from data_fetcher import LiveSource
from errors import SourceUnavailable, StateError
from feed_faults import FaultLog
from feed_plans import FeedPlan
from feeds import Feed, open_feeds
from price_board import PriceBoard, PricePoller
from quarantine import Quarantine
from settings import Settings

PATIENT_ROUNDS: Final = 10  # of back-fills in which a scored feed failed
CLOCK_OFF_S: Final = 5.0  # by how much our clock may be off; from 10 s on callers may be refused
PAST_FETCHED: Final = "fetched the past"  # the log's word for `has_past`

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class LiveMarket:
    """One per process; its methods may be called on threads of their own."""

    prices: PriceBoard
    collector: Collector
    poller: PricePoller
    _plans: Mapping[str, FeedPlan]
    _feeds: Mapping[Venue, Feed]
    _clock: Clock
    _stop: Event
    has_past: bool = False  # whether the past was fetched as far as feeds would give it
    _failed_rounds: int = 0  # of back-fills, in a row

    @classmethod
    def open(
        cls, settings: Settings, source: LiveSource, assets: Sequence[str] | None = None
    ) -> Self:
        """Clients and collector of the assets (all of the source); calls no host yet."""
        plans = {asset: source.plans[asset] for asset in assets or source.plans}
        clock, stop = open_clock(settings), Event()
        feeds = open_feeds(settings, clock, sleep=stop.wait)
        prices, faults = PriceBoard(plans), FaultLog()
        store, quarantine = BarStore(settings.state_dir), Quarantine(settings.state_dir)
        return cls(
            prices=prices,
            collector=Collector(
                plans, feeds, store, quarantine, clock, days=settings.days, faults=faults
            ),
            poller=PricePoller(plans, feeds, prices, clock, faults=faults),
            _plans=plans,
            _feeds=feeds,
            _clock=clock,
            _stop=stop,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End waits and the back-fill under way; whatever is asked from now on is refused."""
        self._stop.set()
        for feed in self._feeds.values():
            feed.close()

    def venues(self) -> tuple[Venue, ...]:
        """Where the feeds that are scored trade."""
        return tuple(sorted({plan.scored.venue for plan in self._plans.values()}))

    def collect(self, venues: Collection[Venue] | None = None) -> Collected:
        """Append what closed at the venues (all), and repair what is missing of the last day."""
        return self.collector.collect(venues)

    def backfill(self, progress: Progress = lambda _done, _total, _what: None) -> Collected:
        """Fetch what is missing of the past; `has_past` after a round that was not cut short.

        A round in which a scored feed failed is cut short, too, and worth another soon;
        but no feed that stays away keeps the others from being learnt from.
        """
        done = self.collector.backfill(progress=progress, stop=self._stop)
        if not self._stop.is_set():
            failed = any(plan.scored.name in done.failures for plan in self._plans.values())
            self._failed_rounds = self._failed_rounds + 1 if failed else 0
            if not self.has_past and not self.awaits_past():
                self.has_past = True
                log.info(PAST_FETCHED)
        return done

    def awaits_past(self) -> bool:
        """Whether the next back-fill may soon give what the last one could not."""
        return 0 < self._failed_rounds <= PATIENT_ROUNDS

    def require_scored(self, done: Collected) -> None:
        """Insist that the scored feeds gave what they were asked for.

        Raises: SourceUnavailable with the first failing feed's own sentence; StateError
        if the disk refused what one gave.
        """
        for plan in self._plans.values():
            if plan.scored.name in done.failures:
                raise SourceUnavailable(done.failures[plan.scored.name])
            if plan.scored.name in done.unsaved:
                raise StateError(done.unsaved[plan.scored.name])

    def poll(self, venues: Collection[Venue] | None = None) -> None:
        """Ask the feeds that are scored at the venues (all) for their prices."""
        self.poller.poll(venues)

    def failing_feeds(self) -> tuple[str, ...]:
        """Scored feeds that gave no candles when they were last asked; a closed market does."""
        scored = {plan.scored.name for plan in self._plans.values()}
        return tuple(feed for feed in self.collector.failing() if feed in scored)

    def unsaved_feeds(self) -> tuple[str, ...]:
        """Feeds whose bars the disk refused when they were last asked."""
        return tuple(self.collector.unsaved())

    def clock_offset_s(self) -> float | None:
        """Real seconds that our clock is ahead of the venues'; None while they do not tell."""
        now = self._clock.now()
        told = (feed.server_time() for feed in self._feeds.values())
        ahead = agreed_offset(at - now for at in told if at is not None)
        return None if ahead is None else -ahead / market_speed(self._clock)

    def warnings(self) -> tuple[str, ...]:
        """A disk that refuses, feeds that fail or are hard to believe, a wrong clock of ours.

        One sentence each, without its full stop.
        """
        failing = self.collector.failing() | self.poller.failing()
        unsaved = self.collector.unsaved()
        sentences = (
            *unsaved.values(),
            *failing.values(),
            *self.collector.doubts(),
            *self.prices.doubts(),
        )
        sentences = (*_clock_doubts(self.clock_offset_s()), *sentences)
        return tuple(dict.fromkeys(sentence.rstrip(".") for sentence in sentences))


def _clock_doubts(ahead_s: float | None) -> Iterator[str]:
    if ahead_s is not None and abs(ahead_s) > CLOCK_OFF_S:
        yield (
            f"our clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the "
            "venues', and from 10 s on callers may be refused for the times that they sign; "
            "synchronise it, e.g. "
            "`timedatectl set-ntp true`"
        )
