"""What validators ask and score, by protocol profile: it changes every few weeks.

Nothing that a validator decides is written anywhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from config import Frequency, Venue
from errors import ConfigError


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
