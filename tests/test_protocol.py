"""What validators ask and score, as data."""

import pytest

from config import ASSETS, Frequency, asset_spec
from errors import ConfigError, UnknownAsset
from protocol import (
    PROTOCOL_PROFILES,
    IntervalKind,
    competition_like,
    protocol_profile,
    scoring_competition,
)

CRYPTO = ["BTC", "ETH", "SOL", "XRP", "HYPE"]
HOUR_NAMES = ["1min", "2min", "5min", "15min", "30min", "60min_abs"] + [
    f"0_{minutes}min_gaps" for minutes in range(5, 65, 5)
]
DAY_NAMES = ["5min", "30min", "3hour", "24hour_abs"]


@pytest.mark.parametrize(
    ("profile", "competition", "assets", "names", "window", "beta", "share"),
    [
        ("2026-09", "crypto-1h", CRYPTO, HOUR_NAMES, 5, -0.3, 1 / 3),
        ("2026-09", "crypto-24h", CRYPTO, DAY_NAMES, 10, -0.15, 1 / 3),
        (
            "2026-09",
            "com-equ-24h",
            ["XAU", "SP500", "NVDAX", "GOOGLX", "TSLAX", "AAPLX", "WTIOIL", "SPCX"],
            DAY_NAMES,
            10,
            -0.15,
            1 / 3,
        ),
        (
            "2026-05",
            "low",
            "BTC ETH XAU SOL SPYX NVDAX TSLAX AAPLX GOOGLX XRP HYPE WTIOIL".split(),  # noqa: SIM905
            DAY_NAMES,
            10,
            -0.1,
            1 / 2,
        ),
        ("2026-05", "high", ["BTC", "ETH", "XAU", "SOL", "HYPE"], HOUR_NAMES, 3, -0.2, 1 / 2),
    ],
)
def test_a_competition_is_what_validators_run(
    profile, competition, assets, names, window, beta, share
):
    found = PROTOCOL_PROFILES[profile].competitions[competition]
    assert list(found.assets) == assets
    assert [interval.name for interval in found.intervals] == names
    assert (found.window_days, found.beta, found.share) == (window, beta, share)


def test_there_are_no_other_profiles_and_competitions():
    assert {name: list(entry.competitions) for name, entry in PROTOCOL_PROFILES.items()} == {
        "2026-09": ["crypto-1h", "crypto-24h", "com-equ-24h"],
        "2026-05": ["low", "high"],
    }


def test_an_interval_lasts_what_its_name_says():
    units = {"min": 60, "hour": 3600}
    for profile in PROTOCOL_PROFILES.values():
        for competition in profile.competitions.values():
            for interval in competition.intervals:
                base = interval.name.removesuffix("_abs").removesuffix("_gaps").removeprefix("0_")
                unit = next(name for name in units if base.endswith(name))
                assert interval.seconds == int(base.removesuffix(unit)) * units[unit]
                kind = {"_abs": IntervalKind.ABSOLUTE, "aps": IntervalKind.GAP}
                expected = kind.get(interval.name[-4:], kind.get(interval.name[-3:]))
                assert interval.kind is (expected or IntervalKind.CHANGE)


def test_only_the_hourly_crypto_competition_scores_volatility():
    weights = {
        (profile.name, competition.name): competition.volatility_weights
        for profile in PROTOCOL_PROFILES.values()
        for competition in profile.competitions.values()
        if competition.volatility_weights
    }
    assert weights == {
        ("2026-09", "crypto-1h"): ((3600, 5.25 / 3), (900, 5.25 / 12), (300, 5.25 / 36))
    }


def test_a_miss_costs_what_the_profile_says():
    new, old = PROTOCOL_PROFILES["2026-09"], PROTOCOL_PROFILES["2026-05"]
    assert (new.miss_percentile, new.cap_at_percentile, new.clip_at_median_multiple) == (
        95,
        False,
        10,
    )
    assert (old.miss_percentile, old.cap_at_percentile, old.clip_at_median_multiple) == (
        90,
        True,
        None,
    )


def test_assets_weigh_what_validators_say():
    assert {symbol: spec.weight for symbol, spec in ASSETS.items()} == {
        "BTC": 1.0,
        "ETH": 0.7064366394033871,
        "XAU": 1.7370922597118699,
        "SOL": 0.6310037175639559,
        "SPYX": 3.437935601155441,
        "SP500": 3.437935601155441,
        "NVDAX": 1.6028217601617174,
        "TSLAX": 1.6068755936957768,
        "AAPLX": 2.0916380815843123,
        "GOOGLX": 1.6827392777257926,
        "XRP": 0.5658394110809131,
        "HYPE": 0.4784547133706857,
        "WTIOIL": 0.8475062847978935,
        "SPCX": 0.4329342627683478,
    }


def test_every_scored_asset_is_known():
    for profile in PROTOCOL_PROFILES.values():
        for competition in profile.competitions.values():
            assert set(competition.assets) <= set(ASSETS)


def test_gold_has_no_hourly_score_today_but_is_scored_like_the_first_hourly_competition():
    profile = protocol_profile("2026-09")
    assert scoring_competition(profile, "XAU", Frequency.HF) is None
    assert competition_like(profile, "XAU", Frequency.HF).name == "crypto-1h"
    assert competition_like(profile, "XAU", Frequency.LF).name == "com-equ-24h"


def test_an_unknown_asset_or_profile_is_named_together_with_the_known_ones():
    with pytest.raises(UnknownAsset, match=r"asset 'DOGE' is unknown; known are BTC, ETH, "):
        asset_spec("DOGE")
    with pytest.raises(ConfigError, match=r"profile 'x' is unknown; known are 2026-09, 2026-05"):
        protocol_profile("x")
