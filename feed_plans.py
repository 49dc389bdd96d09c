"""Which feeds are read for an asset, and how their hosts want to be asked."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from config import ASSETS, FeedSymbol, Frequency, SourceName, Venue
from protocol import ProtocolProfile, scoring_competition

# ---------------------------------------------------------------- which feeds are read


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPlan:
    """Where the prices of one asset come from."""

    asset: str
    frequencies: tuple[Frequency, ...]  # that the profile asks of the asset
    scored: FeedSymbol
    others: tuple[FeedSymbol, ...]  # for history and second opinions, best first


def known_feed(venue: str, asset: str) -> FeedSymbol | None:
    """The feed of an asset at a venue, if `ASSETS` names one."""
    spec = ASSETS.get(asset)
    feeds = (spec.venue_feed, *spec.backfill) if spec else ()
    return next((feed for feed in feeds if feed.venue.value == venue), None)


def feed_plans(source: SourceName, profile: ProtocolProfile) -> dict[str, FeedPlan]:
    """What a live source reads for every asset that the profile asks, in the order of `ASSETS`.

    `venue` follows the feed that the profile scores, `pyth` reads Pyth alone and
    leaves out what Pyth does not know.
    """
    everywhere = Venue.PYTH if source == "pyth" else profile.scored_on
    plans = {}
    for asset, spec in ASSETS.items():
        asked = tuple(entry for entry in Frequency if scoring_competition(profile, asset, entry))
        known = (spec.venue_feed, *(feed for feed in spec.backfill if feed != spec.venue_feed))
        fit = [feed for feed in known if everywhere in (None, feed.venue) and feed.same_price]
        if asked and fit:
            others = () if source == "pyth" else tuple(feed for feed in known if feed != fit[0])
            plans[asset] = FeedPlan(asset=asset, frequencies=asked, scored=fit[0], others=others)
    return plans


def scored_at(
    plans: Mapping[str, FeedPlan], venues: Collection[Venue] | None
) -> tuple[FeedPlan, ...]:
    """The plans whose scored feed is at one of the venues; None: all."""
    return tuple(plan for plan in plans.values() if venues is None or plan.scored.venue in venues)


def venues_down(plans: Mapping[str, FeedPlan], failing: Collection[str]) -> set[Venue]:
    """Venues all of whose scored feeds are among the failing ones."""
    scored = [plan.scored for plan in plans.values()]
    up = {feed.venue for feed in scored if feed.name not in failing}
    return {feed.venue for feed in scored} - up


# ---------------------------------------------------------------- hosts of the feeds


class FeedHost(StrEnum):
    """A host that feeds are read from; `<value>_url` is the setting of its address."""

    BINANCE = "binance"
    HYPERLIQUID = "hyperliquid"
    PYTH_HISTORY = "pyth_history"
    PYTH_ROUTER = "pyth_router"  # the same history; asked when PYTH_HISTORY fails
    PYTH_LATEST = "pyth_latest"


@dataclass(frozen=True, slots=True)
class HostLimit:
    """How much a host answers: calls of this weight in any `window_s` seconds."""

    weight: int
    window_s: float
    penalty_s: float | None = None  # real seconds of silence after too many; None: not known


# Sources: the venues' public documentation, autumn 2026.
HOST_LIMITS: Final[Mapping[FeedHost, HostLimit]] = MappingProxyType(
    {
        FeedHost.BINANCE: HostLimit(6000, 60),
        FeedHost.HYPERLIQUID: HostLimit(1200, 60),
        FeedHost.PYTH_HISTORY: HostLimit(90, 10),
        FeedHost.PYTH_ROUTER: HostLimit(90, 10),
        FeedHost.PYTH_LATEST: HostLimit(30, 10, penalty_s=60),
    }
)

# The most candles that one call gives. Pyth refuses more than about 10,000.
CANDLES_PER_CALL: Final[Mapping[Venue, int]] = MappingProxyType(
    {Venue.BINANCE: 1000, Venue.HYPERLIQUID: 5000, Venue.PYTH: 8000}
)

# Serves the same candles from countries that Binance's first host refuses.
BINANCE_OPEN_HOST: Final = "https://data-api.binance.vision"
BINANCE_HOST_VARIABLE: Final = "BINANCE_API_HOST"  # operators' files already set it


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpPolicy:
    """How patient a client of a host is. Durations in real seconds."""

    connect_s: float = 4
    read_s: float = 8  # until the head of an answer is there, and between pieces of its body
    attempt_s: float = 20  # for one whole answer, however slowly it drips in
    attempts: int = 4
    budget_s: float = 60  # for all attempts and the waits between them
    first_wait_s: float = 0.5  # before the second attempt; doubles, with jitter
    longest_wait_s: float = 8
    max_bytes: int = 16 * 2**20  # of an answer, unpacked


CANDLE_POLICY: Final = HttpPolicy()
# A quote that comes late is worth little: the next one is asked for soon anyway.
QUOTE_POLICY: Final = HttpPolicy(read_s=4, attempt_s=6, attempts=2, budget_s=10)
