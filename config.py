"""Constants of the specification, and facts about frequencies, feeds and assets, as data.

What validators do with them is in `protocol`, which feeds are read for them in
`feed_plans`, and what an operator may change in `settings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from errors import UnknownAsset

# ---------------------------------------------------------------- specification

HF_RECENCY_HALF_LIFE_DAYS: Final = 14
LF_RECENCY_HALF_LIFE_DAYS: Final = 60
HF_LEADS: Final = [60, 120, 300, 900, 1800, 3600]  # seconds
LF_LEADS: Final = [300, 1800, 10800, 86400]  # seconds
HF_RETRAIN_INTERVAL_DAYS: Final = 1
LF_RETRAIN_INTERVAL_DAYS: Final = 3
HISTORY_DAYS: Final = 365
EARLIEST_TS: Final = 946_684_800  # 2000-01-01, before which no bar is
LATEST_TS: Final = 4_102_444_800  # 2100-01-01
LONGEST_DAYS: Final = 3_650  # of history that may be asked for
NUM_PATHS: Final = 1000

DAY_S: Final = 86_400

SourceName: TypeAlias = Literal["venue", "pyth", "archive", "simulated"]


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
