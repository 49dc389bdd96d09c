"""Settings and the facts of the network, as data.

Three kinds of values live here: constants of the specification, facts about
assets and what validators do with them (a *protocol profile*), and `Settings`,
the few things an operator changes by file, environment or flag.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from errors import BadSetting, ConfigError, UnknownAsset

# ---------------------------------------------------------------- specification

HF_RECENCY_HALF_LIFE_DAYS: Final = 14
LF_RECENCY_HALF_LIFE_DAYS: Final = 60
HF_LEADS: Final = [60, 120, 300, 900, 1800, 3600]  # seconds
LF_LEADS: Final = [300, 1800, 10800, 86400]  # seconds
HF_RETRAIN_INTERVAL_DAYS: Final = 1
LF_RETRAIN_INTERVAL_DAYS: Final = 3
HISTORY_DAYS: Final = 365
LONGEST_DAYS: Final = 3_650  # of history that may be asked for
NUM_PATHS: Final = 1000

DAY_S: Final = 86_400


class Frequency(StrEnum):
    """The two families of prompts: high (1 h) and low (24 h) frequency."""

    HF = "hf"
    LF = "lf"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequencySpec:
    """How one frequency is modelled. Durations in seconds unless named otherwise."""

    frequency: Frequency
    bar_s: int
    leads_s: tuple[int, ...]  # anchor leads of the centre path
    bucket_ends: tuple[int, ...]  # ends of the scale's lead buckets, in bars
    lead_sampling_s: int  # long leads are sampled on this grid and interpolated
    ewma_half_lives: tuple[float, ...]  # of |z|, in bars
    fallback_half_life: float  # of the ladder's single EWMA, in bars
    recency_half_life_days: float  # of sample weights in the LightGBM models
    blend_half_life_days: float  # of sample weights in the log-linear blend
    pool_days: float  # of own bars with which the blend leans on the pool no more than usual
    prompt_increment_s: int
    prompt_length_s: int
    # Sums of steps that are matched to their quantiles: in blocks, cycle by cycle, and
    # at the end of each cycle from point 0 on.
    matched_blocks_s: tuple[tuple[int, ...], ...]
    matched_prefixes_s: tuple[int, ...]
    minimum_days: float  # fewer days of bars are refused by the trainer

    @property
    def horizon_bars(self) -> int:
        """The longest modelled lead, in bars."""
        return self.leads_s[-1] // self.bar_s

    @property
    def bars_per_day(self) -> int:
        """Bars in 24 hours."""
        return DAY_S // self.bar_s


FREQUENCIES: Final[Mapping[Frequency, FrequencySpec]] = MappingProxyType(
    {
        Frequency.HF: FrequencySpec(
            frequency=Frequency.HF,
            bar_s=60,
            leads_s=tuple(HF_LEADS),
            bucket_ends=(1, 2, 5, 15, 30, 60),
            lead_sampling_s=300,
            ewma_half_lives=(1.5, 3, 6, 12, 25, 50, 100, 240, 480, 1440, 4320, 10080),
            fallback_half_life=120,
            recency_half_life_days=HF_RECENCY_HALF_LIFE_DAYS,
            blend_half_life_days=90,
            pool_days=175,
            prompt_increment_s=60,
            prompt_length_s=3600,
            matched_blocks_s=((300, 900, 1800), (60, 120, 300, 900, 1800)),
            matched_prefixes_s=tuple(range(600, 3900, 300)),
            minimum_days=3,
        ),
        Frequency.LF: FrequencySpec(
            frequency=Frequency.LF,
            bar_s=300,
            leads_s=tuple(LF_LEADS),
            bucket_ends=(1, 3, 6, 12, 36, 96, 192, 288),
            lead_sampling_s=1800,
            ewma_half_lives=(3, 12, 48, 144, 288, 864, 2880),
            fallback_half_life=288,
            recency_half_life_days=LF_RECENCY_HALF_LIFE_DAYS,
            blend_half_life_days=90,
            pool_days=345,
            prompt_increment_s=300,
            prompt_length_s=86_400,
            matched_blocks_s=((1800, 10_800), (300, 1800, 10_800)),
            matched_prefixes_s=(86_400,),
            minimum_days=4.2,  # a week of five sessions, from open to close
        ),
    }
)

# ---------------------------------------------------------------- assets


class MarketHours(StrEnum):
    """When an asset's underlying market moves."""

    CONTINUOUS = "continuous"  # crypto: every minute of the year
    COMMODITY = "commodity"  # Sunday 18:00 to Friday 17:00 New York
    EQUITY = "equity"  # sessions of the New York Stock Exchange


class Venue(StrEnum):
    """A feed that is scored."""

    BINANCE = "binance"
    HYPERLIQUID = "hyperliquid"
    PYTH = "pyth"


@dataclass(frozen=True, slots=True)
class FeedSymbol:
    """One symbol at one venue: a feed."""

    venue: Venue
    symbol: str  # as the venue spells it
    same_price: bool = True  # False: it moves like the asset but costs something else

    @property
    def name(self) -> str:
        """What bars and quotes of this feed are labelled with, e.g. "binance:BTCUSDT"."""
        return f"{self.venue.value}:{self.symbol}"


# How many bars of each length a venue keeps at all; the others keep years.
VENUE_BARS_KEPT: Final[Mapping[Venue, int]] = MappingProxyType({Venue.HYPERLIQUID: 5000})

# An anchor price older than this gives way to the next step of the ladder.
ANCHOR_MAX_AGE_S: Final = 120
ASKED_AHEAD_S: Final = 60  # how far ahead of its start a prompt is usually asked


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetSpec:
    """Fixed facts about one asset."""

    symbol: str  # the validator's spelling
    hours: MarketHours
    venue: Venue  # scored feed of profile 2026-09
    venue_symbol: str
    pyth_symbol: str | None  # Pyth history symbol
    pyth_id: str | None  # Hermes price-feed id, hex
    weight: float  # in the leaderboard average
    hourly_volatility: float  # prior: standard deviation of the one-hour return, as a fraction
    # History from before the scored feed's first bar, and second opinions; best first.
    backfill: tuple[FeedSymbol, ...] = ()

    @property
    def venue_feed(self) -> FeedSymbol:
        """The feed of `venue`."""
        return FeedSymbol(self.venue, self.venue_symbol)


def _pyth(symbol: str | None, *, same_price: bool = True) -> tuple[FeedSymbol, ...]:
    return (FeedSymbol(Venue.PYTH, symbol, same_price),) if symbol else ()


def _crypto(
    symbol: str, weight: float, sigma: float, pyth_id: str, venue_symbol: str | None = None
) -> AssetSpec:
    return AssetSpec(
        symbol=symbol,
        hours=MarketHours.CONTINUOUS,
        venue=Venue.HYPERLIQUID if venue_symbol else Venue.BINANCE,
        venue_symbol=venue_symbol or f"{symbol}USDT",
        pyth_symbol=f"Crypto.{symbol}/USD",
        pyth_id=pyth_id,
        weight=weight,
        hourly_volatility=sigma,
        backfill=_pyth(f"Crypto.{symbol}/USD"),
    )


def _perpetual(
    symbol: str,
    hours: MarketHours,
    coin: str,
    weight: float,
    sigma: float,
    pyth: tuple[str, str] | None = None,
    backfill: tuple[FeedSymbol, ...] = (),
) -> AssetSpec:
    return AssetSpec(
        symbol=symbol,
        hours=hours,
        venue=Venue.HYPERLIQUID,
        venue_symbol=coin,
        pyth_symbol=pyth[0] if pyth else None,
        pyth_id=pyth[1] if pyth else None,
        weight=weight,
        hourly_volatility=sigma,
        backfill=(*_pyth(pyth[0] if pyth else None), *backfill),
    )


# Weights, symbols and ids: the network's public validator code, autumn 2026.
# Volatilities: the constants of the official reference miner; SP500 takes
# SPYX's, and SPCX (which it does not know) the largest of the single shares
# plus a half, being younger and wilder than they are.
_ASSETS: Final = (
    _crypto(
        "BTC", 1.0, 0.00541, "e62df6c8b4a85fe1a67db44dc12de5db330f7ac66b72dc658afedf0f4a415b43"
    ),
    _crypto(
        "ETH",
        0.7064366394033871,
        0.00766,
        "ff61491a931112ddf1bd8147cd1b641375f79f5825126d665480874634fd0ace",
    ),
    _crypto(
        "SOL",
        0.6310037175639559,
        0.00858,
        "ef0d8b6fda2ceba41da15d4095d1da392a0d2f8ed0c6c7bc0f4cfac8c280b56d",
    ),
    _crypto(
        "XRP",
        0.5658394110809131,
        0.00956,
        "ec5d399846a9209f3fe5881d70aae9268c94339ff9817e8d18ff19fa05eea1c8",
    ),
    _crypto(
        "HYPE",
        0.4784547133706857,
        0.01131,
        "4279e31cc369bbcc2faf022b382b080e32a8e689ff20fbc530d2a603eb6cd98b",
        venue_symbol="@107",
    ),
    _perpetual(
        "XAU",
        MarketHours.COMMODITY,
        "xyz:GOLD",
        1.7370922597118699,
        0.00312,
        (
            "Crypto.XAUT/USD",
            "44465e17d2e9d390e70c999d5a11fda4f092847fcd2e3e5aa089d96c98a30e67",
        ),
        # Another gold token, traded since 2020.
        backfill=(FeedSymbol(Venue.BINANCE, "PAXGUSDT"),),
    ),
    _perpetual(
        "WTIOIL",
        MarketHours.COMMODITY,
        "xyz:CL",
        0.8475062847978935,
        0.00639,
        (
            "Crypto.WTIOIL/USD",
            "67784f72e95ac01337edb7d7bd5bbd1c03669101b7068a620df228ed4e52ef14",
        ),
    ),
    _perpetual(
        "SP500",
        MarketHours.EQUITY,
        "xyz:SP500",
        3.437935601155441,
        0.00157,
        # A tenth of the index: its moves, not its price.
        backfill=_pyth("Crypto.SPYX/USD", same_price=False),
    ),
    AssetSpec(
        symbol="SPYX",
        hours=MarketHours.EQUITY,
        venue=Venue.PYTH,
        venue_symbol="Crypto.SPYX/USD",
        pyth_symbol="Crypto.SPYX/USD",
        pyth_id="2817b78438c769357182c04346fddaad1178c82f4048828fe0997c3c64624e14",
        weight=3.437935601155441,
        hourly_volatility=0.00157,
    ),
    _perpetual(
        "NVDAX",
        MarketHours.EQUITY,
        "xyz:NVDA",
        1.6028217601617174,
        0.00338,
        (
            "Crypto.NVDAX/USD",
            "4244d07890e4610f46bbde67de8f43a4bf8b569eebe904f136b469f148503b7f",
        ),
    ),
    _perpetual(
        "TSLAX",
        MarketHours.EQUITY,
        "xyz:TSLA",
        1.6068755936957768,
        0.00337,
        (
            "Crypto.TSLAX/USD",
            "47a156470288850a440df3a6ce85a55917b813a19bb5b31128a33a986566a362",
        ),
    ),
    _perpetual(
        "AAPLX",
        MarketHours.EQUITY,
        "xyz:AAPL",
        2.0916380815843123,
        0.00259,
        (
            "Crypto.AAPLX/USD",
            "978e6cc68a119ce066aa830017318563a9ed04ec3a0a6439010fc11296a58675",
        ),
    ),
    _perpetual(
        "GOOGLX",
        MarketHours.EQUITY,
        "xyz:GOOGL",
        1.6827392777257926,
        0.00322,
        (
            "Crypto.GOOGLX/USD",
            "b911b0329028cd0283e4259c33809d62942bd2716a58084e5f31d64c00b5424e",
        ),
    ),
    _perpetual("SPCX", MarketHours.EQUITY, "xyz:SPCX", 0.4329342627683478, 0.00507),
)

ASSETS: Final[Mapping[str, AssetSpec]] = MappingProxyType({spec.symbol: spec for spec in _ASSETS})


def asset_spec(symbol: str) -> AssetSpec:
    """Look an asset up. Raises UnknownAsset with the known ones."""
    try:
        return ASSETS[symbol]
    except KeyError:
        raise UnknownAsset(f"asset {symbol!r} is unknown; known are {', '.join(ASSETS)}.") from None


# ---------------------------------------------------------------- protocol profiles


class IntervalKind(StrEnum):
    """Which numbers of a path an interval compares."""

    CHANGE = "change"  # returns between every k-th point
    ABSOLUTE = "absolute"  # the prices themselves
    GAP = "gap"  # the first change only


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringInterval:
    """One interval of a prompt score."""

    name: str  # the validator's name
    seconds: int
    kind: IntervalKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Competition:
    """One scored competition: which prompts, and what counts."""

    name: str
    frequency: Frequency
    assets: tuple[str, ...]
    intervals: tuple[ScoringInterval, ...]
    volatility_weights: tuple[tuple[int, float], ...]  # (block seconds, factor of its CRPS sum)
    window_days: float
    beta: float  # softmax: reward ∝ exp(beta · leaderboard score)
    share: float  # of the miners' reward


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolProfile:
    """What validators did at one time. Source: the network's public code."""

    name: str
    competitions: Mapping[str, Competition]
    miss_percentile: float  # of the field's scores, given for a miss
    cap_at_percentile: bool  # scores above it are capped there
    clip_at_median_multiple: float | None  # scores above it are clipped
    scored_on: Venue | None = None  # the venue that scores every asset; None: each its own


def _change(name: str, seconds: int) -> ScoringInterval:
    return ScoringInterval(name=name, seconds=seconds, kind=IntervalKind.CHANGE)


_HOUR_INTERVALS: Final = (
    _change("1min", 60),
    _change("2min", 120),
    _change("5min", 300),
    _change("15min", 900),
    _change("30min", 1800),
    ScoringInterval(name="60min_abs", seconds=3600, kind=IntervalKind.ABSOLUTE),
    *(
        ScoringInterval(name=f"0_{minutes}min_gaps", seconds=60 * minutes, kind=IntervalKind.GAP)
        for minutes in range(5, 65, 5)
    ),
)
_DAY_INTERVALS: Final = (
    _change("5min", 300),
    _change("30min", 1800),
    _change("3hour", 10_800),
    ScoringInterval(name="24hour_abs", seconds=86_400, kind=IntervalKind.ABSOLUTE),
)
_CRYPTO: Final = ("BTC", "ETH", "SOL", "XRP", "HYPE")
_VOLATILITY_LAMBDA: Final = 5.25


def _competitions(*entries: Competition) -> Mapping[str, Competition]:
    return MappingProxyType({entry.name: entry for entry in entries})


PROTOCOL_PROFILES: Final[Mapping[str, ProtocolProfile]] = MappingProxyType(
    {
        "2026-09": ProtocolProfile(
            name="2026-09",
            competitions=_competitions(
                Competition(
                    name="crypto-1h",
                    frequency=Frequency.HF,
                    assets=_CRYPTO,
                    intervals=_HOUR_INTERVALS,
                    volatility_weights=(
                        (3600, _VOLATILITY_LAMBDA / 3),
                        (900, _VOLATILITY_LAMBDA / 12),
                        (300, _VOLATILITY_LAMBDA / 36),
                    ),
                    window_days=5,
                    beta=-0.3,
                    share=1 / 3,
                ),
                Competition(
                    name="crypto-24h",
                    frequency=Frequency.LF,
                    assets=_CRYPTO,
                    intervals=_DAY_INTERVALS,
                    volatility_weights=(),
                    window_days=10,
                    beta=-0.15,
                    share=1 / 3,
                ),
                Competition(
                    name="com-equ-24h",
                    frequency=Frequency.LF,
                    assets=(
                        "XAU",
                        "SP500",
                        "NVDAX",
                        "GOOGLX",
                        "TSLAX",
                        "AAPLX",
                        "WTIOIL",
                        "SPCX",
                    ),
                    intervals=_DAY_INTERVALS,
                    volatility_weights=(),
                    window_days=10,
                    beta=-0.15,
                    share=1 / 3,
                ),
            ),
            miss_percentile=95,
            cap_at_percentile=False,
            clip_at_median_multiple=10,
        ),
        "2026-05": ProtocolProfile(
            name="2026-05",
            competitions=_competitions(
                Competition(
                    name="low",
                    frequency=Frequency.LF,
                    assets=(
                        "BTC",
                        "ETH",
                        "XAU",
                        "SOL",
                        "SPYX",
                        "NVDAX",
                        "TSLAX",
                        "AAPLX",
                        "GOOGLX",
                        "XRP",
                        "HYPE",
                        "WTIOIL",
                    ),
                    intervals=_DAY_INTERVALS,
                    volatility_weights=(),
                    window_days=10,
                    beta=-0.1,
                    share=1 / 2,
                ),
                Competition(
                    name="high",
                    frequency=Frequency.HF,
                    assets=("BTC", "ETH", "XAU", "SOL", "HYPE"),
                    intervals=_HOUR_INTERVALS,
                    volatility_weights=(),
                    window_days=3,
                    beta=-0.2,
                    share=1 / 2,
                ),
            ),
            miss_percentile=90,
            cap_at_percentile=True,
            clip_at_median_multiple=None,
            scored_on=Venue.PYTH,
        ),
    }
)


def protocol_profile(name: str) -> ProtocolProfile:
    """Look a profile up. Raises ConfigError with the known ones."""
    try:
        return PROTOCOL_PROFILES[name]
    except KeyError:
        raise ConfigError(
            f"profile {name!r} is unknown; known are {', '.join(PROTOCOL_PROFILES)}."
        ) from None


def scoring_competition(
    profile: ProtocolProfile, asset: str, frequency: Frequency
) -> Competition | None:
    """The competition that scores the asset at the frequency, if the profile has one."""
    for competition in profile.competitions.values():
        if competition.frequency is frequency and asset in competition.assets:
            return competition
    return None


def competition_like(profile: ProtocolProfile, asset: str, frequency: Frequency) -> Competition:
    """The competition that scores the asset, or the frequency's first one if none does."""
    return scoring_competition(profile, asset, frequency) or next(
        entry for entry in profile.competitions.values() if entry.frequency is frequency
    )


# ---------------------------------------------------------------- which feeds are read

SourceName: TypeAlias = Literal["venue", "pyth", "archive", "simulated"]


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


# ---------------------------------------------------------------- settings

ENVIRONMENT_PREFIX: Final = "LGBM_MINER_"
DEFAULT_CONFIG_FILE: Final = Path("miner.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an operator may change; flags win over environment over file."""

    source: SourceName = "venue"
    archive_dir: Path | None = None
    state_dir: Path = Path("state")
    model_dir: Path = Path("models")
    profile: str = "2026-09"
    seed: int = 0
    days: float = HISTORY_DAYS  # of history that is collected and used in training
    served_assets: tuple[str, ...] | None = None  # of those that the profile asks; None: all
    memory_days: int = 62  # of bars that the running miner keeps in memory, live sources only
    hf_retrain_days: float = HF_RETRAIN_INTERVAL_DAYS  # after which models are due again
    lf_retrain_days: float = LF_RETRAIN_INTERVAL_DAYS
    rehearsal: str | None = None  # START@ORIGIN×SPEED: the market's clock, see clock.py
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)  # training processes
    binance_url: str = "https://api.binance.com"  # BINANCE_API_HOST sets it as well
    hyperliquid_url: str = "https://api.hyperliquid.xyz"
    pyth_history_url: str = "https://benchmarks.pyth.network/v1/shims/tradingview"
    pyth_router_url: str = "https://pyth.dourolabs.app/v1/fixed_rate@200ms"
    pyth_latest_url: str = "https://hermes.pyth.network"
    host: str = "127.0.0.1"
    port: int | None = None  # None: 8091, or the one after an axon's
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if self.profile not in PROTOCOL_PROFILES:
            raise BadSetting(
                "profile",
                f"profile={self.profile!r}",
                f"is unknown; known are {', '.join(PROTOCOL_PROFILES)}.",
            )
        if self.port is not None:
            _within("port", self.port, 0, 65_535)
        _within("jobs", self.jobs, 1, 256)
        _within("days", self.days, 1, LONGEST_DAYS)
        # States reach back eleven days; the ladder's clock learns from sixty.
        _within("memory_days", self.memory_days, 15, LONGEST_DAYS)
        for frequency in Frequency:
            name = f"{frequency.value}_retrain_days"
            _within(name, self.retrain_days(frequency), 1 / 24, 365)
        _within("seed", self.seed, 0, 2**32 - 1)
        if self.served_assets is not None:
            _can_be_served(self.served_assets, self.source, protocol_profile(self.profile))
        for host in FeedHost:
            _is_address(f"{host.value}_url", self.feed_url(host))

    def retrain_days(self, frequency: Frequency) -> float:
        """After how many days the models of a frequency are due again."""
        return self.hf_retrain_days if frequency is Frequency.HF else self.lf_retrain_days

    def feed_url(self, host: FeedHost) -> str:
        """The base address of a host of the feeds."""
        return str(getattr(self, f"{host.value}_url"))


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadSetting(name, f"{name}={value}", f"is out of range; use {low} to {high}.")


def _is_address(name: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise BadSetting(
            name,
            f"{name}={url!r}",
            "is not the base address of a host; write one such as https://api.example.com.",
        )


def _can_be_served(assets: tuple[str, ...], source: SourceName, profile: ProtocolProfile) -> None:
    """Refuse assets that nobody asks, or that a live source has no price of."""
    is_live = source in ("venue", "pyth")
    asked = [name for entry in profile.competitions.values() for name in entry.assets]
    can_be = list(feed_plans(source, profile) if is_live else ASSETS)
    for asset in assets:
        if asset in can_be:
            continue
        fault = f"which source {source} has no price of"
        if asset not in ASSETS:
            fault = "which is unknown"
        elif is_live and asset not in asked:
            fault = f"which profile {profile.name} does not ask"
        raise BadSetting(
            "served_assets",
            "served_assets",
            f"names {asset}, {fault}; choose of {', '.join(can_be)}.",
        )
    if not assets:
        raise BadSetting(
            "served_assets",
            "served_assets",
            f"names no asset; choose of {', '.join(can_be)}, or leave it out to serve all.",
        )


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as an operator gave it."""

    value: Any
    place: str  # e.g. "--seed", "LGBM_MINER_SEED", "miner.toml"


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    **flags: Any,
) -> Settings:
    """Merge defaults, TOML file, environment and flags (None: not given).

    Of variables without our prefix, BINANCE_API_HOST alone is read, with or
    without its "https://"; LGBM_MINER_BINANCE_URL wins over it. Without `file`,
    `miner.toml` of the working directory is read if it exists.
    Raises: ConfigError for an unreadable file, an unknown key or a bad value, with
    where it stands.
    """
    given = _read_toml(file)
    given |= _read_environment(os.environ if environment is None else environment)
    given |= {
        key: _Given(value, f"--{key.replace('_', '-')}")
        for key, value in flags.items()
        if value is not None
    }
    try:
        return TypeAdapter(Settings).validate_python(
            {key: entry.value for key, entry in given.items()}
        )
    except BadSetting as error:
        if error.setting not in given:  # a default that does not go with another value
            raise
        raise error.from_place(given[error.setting].place) from None
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        entry = given[key]
        raise ConfigError(
            f"{key}={entry.value!r} from {entry.place} does not fit; write {_wanted(key)}."
        ) from None


_KINDS: Final[Mapping[Any, str]] = MappingProxyType(
    {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
)


def _wanted(setting: str) -> str:
    """What a setting takes, in words."""
    hint = get_type_hints(Settings)[setting]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    kinds = (hint, *get_args(hint))
    return next((_KINDS[kind] for kind in kinds if kind in _KINDS), "a list of names")


def _require_known(setting: str, written: str, place: str, prefix: str = "") -> None:
    """Refuse what is no setting, by its name as written; name the nearest one that is."""
    known = [entry.name for entry in fields(Settings)]
    if setting in known:
        return
    spelt = {name: f"{prefix}{name.upper()}" if prefix else name for name in known}
    near = get_close_matches(setting, known, 1)
    hint = f"did you mean {spelt[near[0]]}" if near else f"known are {', '.join(spelt.values())}"
    raise ConfigError(f"{written} {place} is no setting; {hint}{'?' if near else '.'}")


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment less everything that `load_settings` reads from it."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(ENVIRONMENT_PREFIX) and name != BINANCE_HOST_VARIABLE
    }


def _read_toml(file: Path | None) -> dict[str, _Given]:
    path = file or DEFAULT_CONFIG_FILE
    if file is None and not path.exists():
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} is not valid TOML: {error}.") from None
    for key in found:
        _require_known(key, repr(key), f"in {path}")
    return {key: _Given(value, str(path)) for key, value in found.items()}


def _read_environment(environment: Mapping[str, str]) -> dict[str, _Given]:
    host = environment.get(BINANCE_HOST_VARIABLE)
    read = {}
    if host:
        address = host if "://" in host else f"https://{host}"
        read["binance_url"] = _Given(address, BINANCE_HOST_VARIABLE)
    for name, text in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
            _require_known(key, name, "in the environment", ENVIRONMENT_PREFIX)
            read[key] = _Given(_list(text) if key == "served_assets" else text, name)
    return read


def _list(text: str) -> list[str] | None:
    """Names set off by commas, as a list is written in the environment; None if it is empty.

    Files of variables keep the names of those that they leave alone.
    """
    return [name.strip() for name in text.split(",") if name.strip()] if text else None
