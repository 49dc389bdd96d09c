"""The few things an operator changes, by file, environment or flag."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from config import (
    ASSETS,
    HF_RETRAIN_INTERVAL_DAYS,
    HISTORY_DAYS,
    LF_RETRAIN_INTERVAL_DAYS,
    LONGEST_DAYS,
    Frequency,
    SourceName,
)
from errors import BadSetting, ConfigError
from feed_plans import BINANCE_HOST_VARIABLE, FeedHost, feed_plans
from protocol import PROTOCOL_PROFILES, ProtocolProfile, protocol_profile

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
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)  # processes of a script
    binance_url: str = "https://api.binance.com"  # BINANCE_API_HOST sets it as well
    hyperliquid_url: str = "https://api.hyperliquid.xyz"
    pyth_history_url: str = "https://benchmarks.pyth.network/v1/shims/tradingview"
    pyth_router_url: str = "https://pyth.dourolabs.app/v1/fixed_rate@200ms"
    pyth_latest_url: str = "https://hermes.pyth.network"
    host: str = "127.0.0.1"
    port: int | None = None  # None: 8091, or an axon's plus 10000
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


def address_shown(address: str) -> str:
    """An address as messages may name it: scheme, host and port, for the rest may be a key."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "a malformed address"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else address


def _is_address(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        is_fit = False
    if not is_fit or parts.query or parts.fragment:
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
    `miner.toml` of the working directory is read if it exists. An empty variable counts as
    not given: files of variables keep the names of those that they leave alone.
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
    for key, entry in given.items():
        if _is_no_path(key, entry.value):
            raise _unfit(key, entry)
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
        raise _unfit(key, given[key]) from None


def _is_no_path(setting: str, value: Any) -> bool:
    """An empty text would be the working directory, and no file's name holds a NUL."""
    is_text = isinstance(value, str) and _wanted(setting) == _KINDS[Path]
    return is_text and (not value.strip() or "\0" in value)


def _unfit(setting: str, entry: _Given) -> ConfigError:
    return ConfigError(
        f"{setting}={entry.value!r} from {entry.place} does not fit; write {_wanted(setting)}."
    )


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
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows begins with a mark
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # no TOML, no text, too many digits, too deep
        raise ConfigError(
            f"settings file {path} is not valid TOML ({error}); mend it or remove the file."
        ) from None
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
            if text:
                read[key] = _Given(_list(text) if key == "served_assets" else text, name)
    return read


def _list(text: str) -> list[str]:
    """Names set off by commas, as a list is written in the environment."""
    return [name.strip() for name in text.split(",") if name.strip()]
