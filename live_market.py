"""A live source with everything that feeds it: clients, collector, prices.

    with LiveMarket.open(settings, source) as market:
        engine = ForecastEngine.open(source, settings, market.prices)
        market.collect()    # every minute
        market.poll()       # every few seconds
        market.backfill()   # at the start, then now and then

Nothing here raises for a feed that cannot be reached: that is logged once and
told by `warnings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Event
from types import TracebackType
from typing import Self

from bar_store import BarStore
from clock import open_clock
from collector import Collected, Collector
from config import Settings, Venue
from data_fetcher import LiveSource
from domain import PriceQuote
from feeds import Feed, open_feeds
from price_board import PriceBoard, PricePoller
from quarantine import Quarantine


@dataclass(slots=True, eq=False)
class LiveMarket:
    """One per process; its methods may be called on threads of their own."""

    prices: PriceBoard
    collector: Collector
    poller: PricePoller
    _feeds: Mapping[Venue, Feed]
    _stop: Event
    has_past: bool = False  # whether the past was fetched as far as feeds would give it

    @classmethod
    def open(cls, settings: Settings, source: LiveSource) -> Self:
        """Clients and collector of the source's assets; calls no host yet."""
        clock, stop = open_clock(settings), Event()
        feeds = open_feeds(settings, clock, sleep=stop.wait)
        prices = PriceBoard(source.plans)
        store, quarantine = BarStore(settings.state_dir), Quarantine(settings.state_dir)
        return cls(
            prices=prices,
            collector=Collector(source.plans, feeds, store, quarantine, clock, days=settings.days),
            poller=PricePoller(source.plans, feeds, prices, clock),
            _feeds=feeds,
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
        for feed in self._feeds.values():
            feed.close()

    def stop(self) -> None:
        """End waits and the back-fill under way."""
        self._stop.set()

    def collect(self) -> Collected:
        """Append what closed since, and repair what is missing of the last day."""
        return self.collector.collect()

    def backfill(self) -> Collected:
        """Fetch what is missing of the past; `has_past` after a round that was not cut short."""
        done = self.collector.backfill(stop=self._stop)
        self.has_past = self.has_past or not self._stop.is_set()
        return done

    def poll(self) -> None:
        """Ask the feeds for their prices."""
        self.poller.poll()

    def quote(self, asset: str) -> PriceQuote | None:
        """The scored feed's latest quote."""
        return self.prices.quote(asset)

    def warnings(self) -> tuple[str, ...]:
        """Feeds that fail now, one sentence each, without its full stop."""
        failing = self.collector.failing() | self.poller.failing()
        return tuple(dict.fromkeys(sentence.rstrip(".") for sentence in failing.values()))
