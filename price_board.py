"""The freshest price of every asset, and which one an answer may start from.

The ladder: the newest price of the scored feed, quote or closed bar, while it is
young; else another feed's quote, moved to the scored feed's level; else the newest
price of the scored feed whatever its age. While no bar of the scored feed is known,
another feed's last bar takes its place, as a second source. A quote that is eight
times off the last bar counts only if another feed agrees, and one that is so far off a
young quote of another feed of its price never. Answers read the board and call no feed;
`PricePoller` fills it.
"""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from math import log as ln
from threading import Lock
from typing import Final

from bar_cleaning import is_other_level
from clock import Clock
from collector import VenueVisits
from config import ANCHOR_MAX_AGE_S, FeedSymbol, Venue, asset_spec
from domain import PriceQuote
from feed_faults import FaultLog
from feed_plans import FeedPlan, scored_at, venues_down
from feeds import Feed
from seasonality import open_seconds

SAME_MOMENT_S: Final = 60  # two quotes no further apart tell how two feeds' levels compare
OUT_OF_ORDER_S: Final = 120  # by more than this no quote overtakes another
LEVEL_EVERY_S: Final = 300  # how often that is looked at while the scored feed is well
AGREEMENT: Final = 1.1  # how far apart two feeds may be and still agree on that
STILL_S: Final = 1800  # of market hours at one price: more than a quiet market's
_FAILING: Final = "no price"  # in the log
DIVERGENCE: Final = 0.02  # between two feeds of one price: more than a token's premium


class AnchorSource(StrEnum):
    """Where the price that paths start from was taken."""

    QUOTE = "quote"  # the scored feed's ticker
    SECOND_SOURCE = "second_source"  # another feed, on the scored feed's level
    LAST_BAR = "last_bar"  # the scored feed's last closed bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The price that paths start from."""

    price: float
    ts: int  # when it was the price, Unix seconds
    feed: str | None  # None: whatever feed the bars are of
    source: AnchorSource


@dataclass(frozen=True, slots=True)
class _Level:
    """What the asset costs at the scored feed, in units of another feed's price."""

    ratio: float
    ts: int


class PriceBoard:
    """Safe between threads; reads and writes are short."""

    def __init__(
        self, plans: Mapping[str, FeedPlan], *, max_age_s: float = ANCHOR_MAX_AGE_S
    ) -> None:
        self._plans = plans
        self._max_age_s = max_age_s
        self._quotes: dict[tuple[str, str], PriceQuote] = {}  # by asset and feed
        self._levels: dict[tuple[str, str], _Level] = {}
        self._doubtful: dict[tuple[str, str], _Level] = {}
        self._still_since: dict[tuple[str, str], int] = {}
        self._lock = Lock()

    def post(self, asset: str, quote: PriceQuote) -> None:
        """Take a quote in; one that comes after a newer one of its feed changes nothing.

        One that is far older is newer all the same: a clock was fast and is right again.
        """
        with self._lock:
            held = self._quotes.get((asset, quote.feed))
            if held is None or not 0 < held.ts - quote.ts <= OUT_OF_ORDER_S:
                self._quotes[asset, quote.feed] = quote
                if held is None or held.price != quote.price:
                    self._still_since[asset, quote.feed] = quote.ts
                self._compare(asset)

    def forget_after(self, moment: float) -> None:
        """Drop quotes and levels dated later: a venue's nonsense, or ours before a clock was set.

        Kept, they would pass for new until their time has come.
        """
        with self._lock:
            for dated in (self._quotes, self._levels, self._doubtful):
                for key in [key for key, entry in dated.items() if entry.ts > moment]:
                    del dated[key]

    def quote(self, asset: str) -> PriceQuote | None:
        """The latest quote of the scored feed."""
        with self._lock:
            return self._quotes.get((asset, self._plans[asset].scored.name))

    def level_age(self, asset: str, feed: FeedSymbol, now: float) -> float:
        """Seconds since the feed's level was last compared; infinite before the first time."""
        with self._lock:
            level = self._levels.get((asset, feed.name))
        return float("inf") if level is None else now - level.ts

    def is_contested(self, asset: str, feed: FeedSymbol) -> bool:
        """Whether the feed's latest quote, of whatever age, denies the scored feed's."""
        with self._lock:
            scored = self._quotes.get((asset, self._plans[asset].scored.name))
            return scored is not None and self._denies(asset, feed, scored)

    def doubts(self) -> tuple[str, ...]:
        """What makes a scored feed's price hard to believe, one sentence each.

        A price that has stood still in market hours, or that another feed of the same
        price is far from, may be true: it is used, and an operator should look at it.
        """
        with self._lock:
            return tuple(
                sentence
                for plan in self._plans.values()
                for sentence in (*self._stillness(plan), *self._divergence(plan))
            )

    def _stillness(self, plan: FeedPlan) -> Iterator[str]:
        quote = self._quotes.get((plan.asset, plan.scored.name))
        if quote is None:
            return
        since = self._still_since[plan.asset, plan.scored.name]
        still_s = open_seconds(asset_spec(plan.asset).hours, since, quote.ts)
        if still_s >= STILL_S:
            yield (
                f"{plan.asset}: {plan.scored.name} has stood at {quote.price:g} for "
                f"{still_s / 60:.0f} minutes of market hours"
            )

    def _divergence(self, plan: FeedPlan) -> Iterator[str]:
        scored = self._quotes.get((plan.asset, plan.scored.name))
        for feed in plan.others:
            other = self._quotes.get((plan.asset, feed.name))
            if not (feed.same_price and scored and other):
                continue
            apart = abs(ln(scored.price / other.price))
            if abs(scored.ts - other.ts) <= LEVEL_EVERY_S and apart > DIVERGENCE:
                yield (
                    f"{plan.asset}: {plan.scored.name} says {scored.price:g} and {feed.name} "
                    f"{other.price:g}, {100 * apart:.1f} % apart"
                )

    def anchor(self, asset: str, last_bar: PriceQuote, now: int) -> Anchor:
        """What the ladder gives; `last_bar` is the scored feed's last close.

        Or that of another feed while no bar of the scored one is known: it is then a
        second source like any other.
        """
        plan = self._plans[asset]
        with self._lock:
            scored = self._quotes.get((asset, plan.scored.name))
            quoted = [(feed, self._quotes.get((asset, feed.name))) for feed in plan.others]
            others = [on for feed, quote in quoted if (on := self._on_level(asset, feed, quote))]
            young = [feed for feed, quote in quoted if quote and now - quote.ts <= self._max_age_s]
            is_denied = scored is not None and any(
                self._denies(asset, feed, scored) for feed in young
            )
            stands_in = [feed for feed in plan.others if feed.name == last_bar.feed]
            for feed in stands_in:
                last_bar = self._on_level(asset, feed, last_bar) or last_bar
        source = AnchorSource.SECOND_SOURCE if stands_in else AnchorSource.LAST_BAR
        best = _anchor(last_bar, source, now)
        if scored and not is_denied and _is_plausible(scored, last_bar, others):
            goes_before = bool(stands_in) and now - scored.ts <= self._max_age_s
            if goes_before or scored.ts > last_bar.ts:
                best = _anchor(scored, AnchorSource.QUOTE, now)
        if now - best.ts <= self._max_age_s:
            return best
        for quote in others:
            is_young = quote.ts > best.ts and now - quote.ts <= self._max_age_s
            if is_young and _is_plausible(quote, last_bar, [scored]):
                return _anchor(quote, AnchorSource.SECOND_SOURCE, now)
        return best

    def _compare(self, asset: str) -> None:
        """Note the levels of feeds that were quoted at the scored feed's moment.

        A level that is far from the one before waits until it is seen again: one
        wild quote must not make the other feed agree with it.
        """
        plan = self._plans[asset]
        scored = self._quotes.get((asset, plan.scored.name))
        for feed in plan.others:
            key = (asset, feed.name)
            other = self._quotes.get(key)
            if scored and other and abs(scored.ts - other.ts) <= SAME_MOMENT_S:
                if self._denies(asset, feed, scored):
                    continue  # one of them is wrong, and not at another level
                level = _Level(scored.price / other.price, min(scored.ts, other.ts))
                expected = self._levels.get(key) or (_Level(1.0, 0) if feed.same_price else level)
                doubtful = self._doubtful.pop(key, None)
                if _is_near(level, expected) or (
                    doubtful and doubtful.ts < level.ts and _is_near(level, doubtful)
                ):
                    self._levels[key] = level
                else:
                    self._doubtful[key] = level

    def _denies(self, asset: str, feed: FeedSymbol, scored: PriceQuote) -> bool:
        """Whether the feed, being of the same price, says something altogether different."""
        other = self._quotes.get((asset, feed.name))
        return feed.same_price and other is not None and is_other_level(scored.price, other.price)

    def _on_level(
        self, asset: str, feed: FeedSymbol, quote: PriceQuote | None
    ) -> PriceQuote | None:
        """A price of another feed on the scored feed's level; None while that is not known."""
        level = self._levels.get((asset, feed.name))
        if quote is None or (level is None and not feed.same_price):
            return None
        return replace(quote, price=quote.price * (level.ratio if level else 1.0))


def _is_near(level: _Level, other: _Level) -> bool:
    return abs(ln(level.ratio / other.ratio)) < ln(AGREEMENT)


def _anchor(quote: PriceQuote, source: AnchorSource, now: int) -> Anchor:
    """A quote as an anchor; a venue's clock may be ahead of ours, an anchor may not."""
    return Anchor(price=quote.price, ts=min(quote.ts, now), feed=quote.feed, source=source)


def _is_plausible(
    quote: PriceQuote, last_bar: PriceQuote, opinions: list[PriceQuote] | list[PriceQuote | None]
) -> bool:
    if not is_other_level(quote.price, last_bar.price):
        return True
    return any(
        other is not None
        and other.ts > last_bar.ts
        and abs(ln(quote.price / other.price)) < ln(AGREEMENT)
        for other in opinions
    )


class PricePoller:
    """Asks feeds for prices and posts them. One thread at a time for each venue."""

    def __init__(
        self,
        plans: Mapping[str, FeedPlan],
        feeds: Mapping[Venue, Feed],
        board: PriceBoard,
        clock: Clock,
        *,
        max_age_s: float = ANCHOR_MAX_AGE_S,
        faults: FaultLog | None = None,
    ) -> None:
        self._plans = plans
        self._feeds = feeds
        self._board = board
        self._clock = clock
        self._max_age_s = max_age_s
        self._faults = faults or FaultLog()
        self._visits = VenueVisits()

    def poll(self, venues: Collection[Venue] | None = None) -> None:
        """One round: the feeds scored at the venues (all), then others where they are needed.

        Others are asked where the scored feed has no young price, where they denied it,
        and now and then for their level. A venue that cannot be reached is left alone for
        the rest of the round; what begins to fail is logged once. Never raises for a feed.
        """
        self._board.forget_after(self._clock.now() + SAME_MOMENT_S)
        plans = scored_at(self._plans, venues)
        asked = [(plan.asset, plan.scored) for plan in plans]
        self._report(self._ask(asked), asked)
        down = venues_down(self._plans, self.failing())
        others = [
            (plan.asset, feed)
            for plan in plans
            for feed in plan.others
            if feed.venue not in down and self._is_needed(plan, feed)
        ]
        self._report(self._ask(others), others)
        self._board.forget_after(self._clock.now() + SAME_MOMENT_S)

    def _report(self, failures: dict[str, str], asked: list[tuple[str, FeedSymbol]]) -> None:
        self._faults.report(_FAILING, failures, {feed.name for _, feed in asked})

    def failing(self) -> dict[str, str]:
        """Feeds that gave no price when they were last asked, each with its sentence."""
        return self._faults.failing(_FAILING)

    def _is_needed(self, plan: FeedPlan, feed: FeedSymbol) -> bool:
        now = self._clock.now()
        scored = self._board.quote(plan.asset)
        is_stale = scored is None or now - scored.ts > self._max_age_s / 2
        if is_stale or self._board.is_contested(plan.asset, feed):
            return True
        return self._board.level_age(plan.asset, feed, now) > LEVEL_EVERY_S

    def _ask(self, wanted: list[tuple[str, FeedSymbol]]) -> dict[str, str]:
        """Post the quotes of some feeds, venues side by side; returns what failed."""
        by_venue: dict[Venue, list[tuple[str, FeedSymbol]]] = {}
        for asset, feed in wanted:
            by_venue.setdefault(feed.venue, []).append((asset, feed))
        failures: dict[str, str] = {}
        if by_venue:
            with ThreadPoolExecutor(len(by_venue), thread_name_prefix="prices") as pool:
                for failed in pool.map(self._ask_venue, by_venue.values()):
                    failures |= failed
        return failures

    def _ask_venue(self, wanted: list[tuple[str, FeedSymbol]]) -> dict[str, str]:
        def post(entry: tuple[str, FeedSymbol]) -> None:
            asset, feed = entry
            self._board.post(asset, self._feeds[feed.venue].price(feed.symbol))

        return self._visits.visit(wanted, lambda entry: entry[1].name, post)
