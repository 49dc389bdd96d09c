"""Settings and the facts of the network."""

import pickle
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from config import (
    ASSETS,
    FREQUENCIES,
    HOST_LIMITS,
    PROTOCOL_PROFILES,
    FeedHost,
    Frequency,
    IntervalKind,
    Settings,
    Venue,
    asset_spec,
    competition_like,
    feed_plans,
    load_settings,
    protocol_profile,
    scoring_competition,
)
from errors import BadSetting, ConfigError, UnknownAsset


def toml(text: str) -> Path:
    path = Path("settings.toml")
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- settings


def test_without_anything_the_defaults_hold():
    assert load_settings(environment={}) == Settings()


def test_flags_win_over_environment_and_environment_over_the_file():
    file = toml("seed = 1\nport = 1001\nprofile = '2026-05'")
    environment = {"LGBM_MINER_SEED": "2", "LGBM_MINER_PORT": "1002"}
    settings = load_settings(file, environment, seed=3, port=None)
    assert (settings.seed, settings.port, settings.profile) == (3, 1002, "2026-05")


def test_the_settings_file_of_the_working_directory_is_read_if_it_exists():
    Path("miner.toml").write_text("seed = 7", encoding="utf-8")
    assert load_settings(environment={}).seed == 7


def test_the_environment_of_the_process_is_read(monkeypatch):
    monkeypatch.setenv("LGBM_MINER_ARCHIVE_DIR", "some/where")
    assert load_settings().archive_dir == Path("some/where")


def test_other_environment_variables_do_not_matter():
    assert load_settings(environment={"PORT": "1", "MINER_SEED": "9"}) == Settings()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sede = 1", r"'sede' in settings.toml is no setting; did you mean seed\?"),
        ("x = 1", r"'x' in settings.toml is no setting; known are source, archive_dir, "),
        ("seed = 'a'", r"seed='a' from settings.toml does not fit; write a whole number\."),
        ("days = 'a'", r"days='a' from settings.toml does not fit; write a number\."),
        ("port = 'a'", r"port='a' from settings.toml does not fit; write a whole number\."),
        ("state_dir = 1", r"state_dir=1 from settings.toml does not fit; write a path\."),
        ("archive_dir = 1", r"archive_dir=1 from settings.toml does not fit; write a path\."),
        ("host = 1", r"host=1 from settings.toml does not fit; write a text\."),
        ("served_assets = 1", r"served_assets=1 from .* does not fit; write a list of names\."),
        ("source = 'ftp'", r"source='ftp' from .* does not fit; write one of venue, pyth, archive"),
        ("log_level = 'loud'", r"log_level='loud' from settings.toml does not fit; write one of "),
        ("seed = -1", r"seed=-1 from settings.toml is out of range; use 0 to"),
        ("port = 70000", r"port=70000 from settings.toml is out of range; use 0 to 65535"),
        ("jobs = 0", r"jobs=0 from settings.toml is out of range; use 1 to 256"),
        ("days = 0.5", r"days=0.5 from settings.toml is out of range; use 1 to 3650"),
        (
            "profile = '2020-01'",
            r"profile='2020-01' from .* is unknown; known are 2026-09, 2026-05",
        ),
        (
            "binance_url = ''",
            r"binance_url='' from settings.toml is not the base address of a host",
        ),
        ("served_assets = []", r"served_assets from settings.toml names no asset; choose of BTC, "),
        ("seed = ", r"settings file settings.toml is not valid TOML"),
    ],
)
def test_a_bad_setting_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_settings(toml(text), {})
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize(
    ("variable", "text", "sentence"),
    [
        (
            "LGBM_MINER_DAYZ",
            "1",
            r"^LGBM_MINER_DAYZ in the environment is no setting; did you mean ",
        ),
        ("LGBM_MINER_DAYZ", "1", r"LGBM_MINER_DAYS\?$"),
        ("LGBM_MINER_X", "1", r"known are LGBM_MINER_SOURCE, LGBM_MINER_ARCHIVE_DIR, "),
        (
            "LGBM_MINER_DAYS",
            "few",
            r"^days='few' from LGBM_MINER_DAYS does not fit; write a number",
        ),
        ("LGBM_MINER_DAYS", "0", r"^days=0.0 from LGBM_MINER_DAYS is out of range"),
        ("BINANCE_API_HOST", "a/?b", r"^binance_url='https://a/\?b' from BINANCE_API_HOST is not "),
        (
            "LGBM_MINER_SERVED_ASSETS",
            ",",
            r"^served_assets from LGBM_MINER_SERVED_ASSETS names no ",
        ),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(variable, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_settings(environment={variable: text})


def test_a_bad_flag_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="seed='x' from --seed does not fit"):
        load_settings(toml("seed = 1"), {"LGBM_MINER_SEED": "2"}, seed="x")
    with pytest.raises(ConfigError, match=r"hf_retrain_days=0\.0 from --hf-retrain-days is out of"):
        load_settings(environment={}, hf_retrain_days="0")


def test_a_bad_setting_reads_the_same_from_another_process():
    with pytest.raises(BadSetting) as caught:
        Settings(seed=-1)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # our own
    assert str(copy) == str(caught.value)


# ---------------------------------------------------------------- served assets


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (
            {"served_assets": ("BTC", "SPYX")},
            "names SPYX, which profile 2026-09 does not ask; choo",
        ),
        ({"served_assets": ("XRP",), "source": "pyth"}, None),
        (
            {"served_assets": ("SPCX",), "source": "pyth"},
            "names SPCX, which source pyth has no pri",
        ),
        ({"served_assets": ("GOLD",)}, "names GOLD, which is unknown; choose of BTC, ETH, SOL"),
        ({"served_assets": ()}, "names no asset; choose of BTC, ETH, .* or leave it out"),
        ({"served_assets": ("SPYX",), "profile": "2026-05"}, None),
        ({"served_assets": ("SPYX",), "source": "archive"}, None),
    ],
)
def test_an_asset_that_nobody_asks_is_refused_as_served_by_live_sources(values, fault):
    if fault is None:
        assert Settings(**values).served_assets == values["served_assets"]
        return
    with pytest.raises(ConfigError, match=f"served_assets {fault}"):
        Settings(**values)


def test_served_assets_are_a_list_in_the_file_and_set_off_by_commas_in_the_environment():
    wanted = ("BTC", "XAU")
    assert load_settings(toml("served_assets = ['BTC', 'XAU']"), {}).served_assets == wanted
    environment = {"LGBM_MINER_SERVED_ASSETS": "BTC, XAU"}
    assert load_settings(environment=environment).served_assets == wanted
    assert load_settings(environment={"LGBM_MINER_SERVED_ASSETS": ""}).served_assets is None


@pytest.mark.parametrize("host", ["data-api.binance.vision", "https://data-api.binance.vision"])
def test_the_binance_host_that_operators_already_set_is_honoured(host):
    environment = {"BINANCE_API_HOST": host}
    settings = load_settings(toml("binance_url = 'https://other.example'"), environment)
    assert settings.feed_url(FeedHost.BINANCE) == "https://data-api.binance.vision"
    environment["LGBM_MINER_BINANCE_URL"] = "http://127.0.0.1:9"
    assert load_settings(environment=environment).binance_url == "http://127.0.0.1:9"


def test_every_host_has_an_address_and_a_limit():
    for host in FeedHost:
        assert Settings().feed_url(host).startswith("https://")
        assert HOST_LIMITS[host].weight > 0


@pytest.mark.parametrize("url", ["", "api.example.com", "ftp://x", "https://", "https://x?y=1"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match=r"hyperliquid_url=.* is not the base address"):
        Settings(hyperliquid_url=url)


def test_a_named_settings_file_that_is_missing_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        load_settings(Path("nowhere.toml"), {})


def test_a_settings_file_that_is_not_text_is_refused():
    Path("settings.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_settings(Path("settings.toml"), {})


@given(seed=st.integers(0, 2**32 - 1), port=st.integers(0, 65_535))
def test_a_value_means_the_same_wherever_it_stands(seed, port):
    by_flag = load_settings(environment={}, seed=seed, port=port)
    by_environment = load_settings(
        environment={"LGBM_MINER_SEED": str(seed), "LGBM_MINER_PORT": str(port)}
    )
    by_file = load_settings(toml(f"seed = {seed}\nport = {port}"), {})
    assert by_flag == by_environment == by_file


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        Settings().seed = 1  # type: ignore[misc]


# ---------------------------------------------------------------- the specification


def test_the_constants_of_the_specification_have_their_names_and_values():
    assert config.HF_RECENCY_HALF_LIFE_DAYS == 14
    assert config.LF_RECENCY_HALF_LIFE_DAYS == 60
    assert config.HF_LEADS == [60, 120, 300, 900, 1800, 3600]
    assert config.LF_LEADS == [300, 1800, 10800, 86400]
    assert config.HF_RETRAIN_INTERVAL_DAYS == 1
    assert config.LF_RETRAIN_INTERVAL_DAYS == 3
    assert config.HISTORY_DAYS == 365
    assert config.NUM_PATHS == 1000


@pytest.mark.parametrize("frequency", Frequency)
def test_the_parts_of_a_frequency_fit_together(frequency):
    spec = FREQUENCIES[frequency]
    assert spec.frequency is frequency
    assert spec.prompt_length_s == spec.leads_s[-1] == spec.horizon_bars * spec.bar_s
    assert spec.prompt_increment_s == spec.bar_s
    assert spec.bucket_ends[-1] == spec.horizon_bars
    assert list(spec.bucket_ends) == sorted(set(spec.bucket_ends))
    assert all(lead % spec.bar_s == 0 for lead in spec.leads_s)
    assert spec.bars_per_day * spec.bar_s == 86_400


# ---------------------------------------------------------------- profiles

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


def test_feed_identifiers_are_distinct_hexadecimal_numbers():
    ids = [spec.pyth_id for spec in ASSETS.values() if spec.pyth_id]
    assert len(set(ids)) == len(ids)
    assert all(len(bytes.fromhex(text)) == 32 for text in ids)


def test_every_setting_has_a_default():
    assert Settings() == Settings(**{f.name: getattr(Settings(), f.name) for f in fields(Settings)})


# ---------------------------------------------------------------- which feeds are read


def test_the_venue_source_reads_the_feed_that_the_profile_scores():
    now, before = (feed_plans("venue", protocol_profile(name)) for name in ("2026-09", "2026-05"))
    assert now["BTC"].scored.name == "binance:BTCUSDT"
    assert now["XAU"].scored.name == "hyperliquid:xyz:GOLD"
    assert [feed.name for feed in now["XAU"].others] == ["pyth:Crypto.XAUT/USD", "binance:PAXGUSDT"]
    assert before["XAU"].scored.name == "pyth:Crypto.XAUT/USD"
    assert {plan.scored.venue for plan in before.values()} == {Venue.PYTH}


def test_a_plan_is_made_for_exactly_what_the_profile_asks():
    for profile in PROTOCOL_PROFILES.values():
        asked = {
            (asset, entry.frequency)
            for entry in profile.competitions.values()
            for asset in entry.assets
        }
        plans = feed_plans("venue", profile)
        assert {(p.asset, f) for p in plans.values() for f in p.frequencies} == asked


def test_the_pyth_source_reads_pyth_alone_and_leaves_out_what_pyth_does_not_price():
    plans = feed_plans("pyth", protocol_profile("2026-09"))
    assert {plan.scored.venue for plan in plans.values()} == {Venue.PYTH}
    assert {plan.others for plan in plans.values()} == {()}
    assert {"SP500", "SPCX"}.isdisjoint(plans)  # SPYX moves like SP500, at a tenth of its price
