"""Settings from defaults, file, environment and flags."""

import pickle
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadSetting, ConfigError
from feed_plans import FeedHost
from settings import Settings, address_shown, load_settings


def toml(text: str) -> Path:
    path = Path("settings.toml")
    path.write_text(text, encoding="utf-8")
    return path


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
        ("state_dir = ' '", r"state_dir=' ' from settings.toml does not fit; write a path\."),
        ('model_dir = "a\\u0000"', r"model_dir='a.x00' from settings.toml does not fit; write a "),
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
        (f"seed = {'9' * 5000}", r"settings file settings.toml is not valid TOML \(.*; mend it"),
        (f"seed = {'[' * 5000}", r"settings file settings.toml is not valid TOML \(.*; mend it"),
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
    with pytest.raises(ConfigError, match="state_dir='' from --state-dir does not fit; write a pa"):
        load_settings(environment={}, state_dir="")


def test_empty_variables_count_as_not_given():
    empty = {f"LGBM_MINER_{entry.name.upper()}": "" for entry in fields(Settings)}
    assert load_settings(environment={**empty, "BINANCE_API_HOST": ""}) == Settings()


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


@pytest.mark.parametrize("host", ["data-api.binance.vision", "https://data-api.binance.vision"])
def test_the_binance_host_that_operators_already_set_is_honoured(host):
    environment = {"BINANCE_API_HOST": host}
    settings = load_settings(toml("binance_url = 'https://other.example'"), environment)
    assert settings.feed_url(FeedHost.BINANCE) == "https://data-api.binance.vision"
    environment["LGBM_MINER_BINANCE_URL"] = "http://127.0.0.1:9"
    assert load_settings(environment=environment).binance_url == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example.com",
        "ftp://x",
        "https://",
        "https://x?y=1",
        "http://[::1",
        "http://x:99999",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match=r"hyperliquid_url=.* is not the base address"):
        Settings(hyperliquid_url=url)


def test_a_named_settings_file_that_is_missing_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        load_settings(Path("nowhere.toml"), {})


def test_the_mark_that_windows_begins_a_file_with_does_not_matter():
    Path("settings.toml").write_bytes(b"\xef\xbb\xbfseed = 7")
    assert load_settings(Path("settings.toml"), {}).seed == 7


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("finney", "finney"),
        ("wss://u:p@node.example:9944/key?k=key", "wss://node.example:9944"),
        ("http://[::1]:80/key", "http://[::1]:80"),
        ("http://[::1", "a malformed address"),
    ],
)
def test_of_an_address_no_more_is_shown_than_where_it_is(address, shown):
    assert address_shown(address) == shown


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


def test_every_setting_has_a_default():
    assert Settings() == Settings(**{f.name: getattr(Settings(), f.name) for f in fields(Settings)})
