"""The flags that operators have in their process-manager files, as settings.

The names and defaults are the reference miner's, so that a file written for it
works unchanged: wallet flags alone choose the axon. What has no meaning here
(devices, epochs, W&B) is accepted and named once in the log, by family, for its names
change. What looks like one of ours mistyped is refused, and so is every unknown flag
that might say who may ask: a restriction must not be lost by a letter.

    parser = script_parser(…)
    add_operator_arguments(parser)
    operator = operator_settings(parser.parse_args())
    for sentence in operator.remarks: log.warning("%s", sentence)
"""

import re
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from caller_rules import CallerPolicy, parse_hotkeys
from errors import ConfigError
from settings import Settings

AXON_REQUIREMENTS: Final = "requirements-axon.txt"
PAGE_PORT: Final = 8091  # of pages and prompts over HTTP where there is no axon
# From an axon's port to that of its pages: far enough for axons on consecutive ports, and
# where no other program of an operator (Prometheus and its kin, a node) usually listens.
PAGES_AWAY: Final = 10_000
_LAST_PORT: Final = 65_535
_DEFAULT_IP: Final = "0.0.0.0"  # noqa: S104  # an axon is asked from the whole internet


class Transport(StrEnum):
    """How prompts come in."""

    HTTP = "http"
    AXON = "axon"


class ChainKind(StrEnum):
    """Who says which callers may ask."""

    BITTENSOR = "bittensor"
    STATIC = "static"  # no chain: the whitelist alone


@dataclass(frozen=True, slots=True, kw_only=True)
class AxonSettings:
    """Where the axon listens, and under which identity."""

    wallet_name: str = "default"
    wallet_hotkey: str = "default"
    wallet_path: Path = Path("~/.bittensor/wallets")
    ip: str = _DEFAULT_IP  # listened on
    port: int = 8091  # 0, which no flag gives, takes a free one
    external_ip: str | None = None  # published; None: looked up
    external_port: int | None = None  # published; None: `port`


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSettings:
    """Which chain, and which subnet of it."""

    kind: ChainKind = ChainKind.BITTENSOR
    network: str = "finney"  # a name that bittensor knows, or the URL of a node
    netuid: int = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """What the operator's flags say."""

    transport: Transport
    axon: AxonSettings
    chain: ChainSettings
    policy: CallerPolicy
    log_level: str | None  # of the --logging flags; None: they were not given
    remarks: tuple[str, ...]  # one sentence each, to be logged once


# ---------------------------------------------------------------- the flags


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ArgumentTypeError(f"got {text[:40]!r}; use a whole number from {low} to {high}")
        return int(text)

    return read


def _stake(text: str) -> float:
    try:
        stake = float(text)
    except ValueError:
        stake = -1.0
    if not 0 <= stake < float("inf"):
        raise ArgumentTypeError(f"got {text[:40]!r}; use a number from 0 on, e.g. 65000")
    return stake


@dataclass(frozen=True, slots=True)
class _Flag:
    name: str
    help: str
    options: Mapping[str, Any]


def _value(name: str, metavar: str, help_: str, read: Callable[[str], Any] = str) -> _Flag:
    return _Flag(name, help_, {"metavar": metavar, "type": read})


def _switch(name: str, help_: str) -> _Flag:
    return _Flag(name, help_, {"action": "store_true"})


_PORT: Final = _whole(1025, 65_534)  # bittensor's limits
_HERE: Final = AxonSettings()
_SUBNET: Final = ChainSettings()
_WHO: Final = CallerPolicy()

_FLAGS: Final = (
    _value("wallet.name", "NAME", f"wallet (default: {_HERE.wallet_name})"),
    _value("wallet.hotkey", "NAME", f"its hotkey (default: {_HERE.wallet_hotkey})"),
    _value("wallet.path", "DIR", f"folder of wallets (default: {_HERE.wallet_path})", Path),
    _value("axon.ip", "ADDRESS", f"listen here (default: {_HERE.ip})"),
    _value("axon.port", "N", f"TCP port of the axon (default: {_HERE.port})", _PORT),
    _value("axon.external_ip", "ADDRESS", "address to publish (default: looked up)"),
    _value("axon.external_port", "N", "port to publish (default: that of --axon.port)", _PORT),
    _value(
        "netuid", "N", f"subnet (default: {_SUBNET.netuid}; on test give 247)", _whole(0, 65_535)
    ),
    _value("subtensor.network", "NAME", f"finney, test or local (default: {_SUBNET.network})"),
    _value("subtensor.chain_endpoint", "URL", "node to ask, e.g. ws://127.0.0.1:9944"),
    _switch("blacklist.allow_non_registered", "answer hotkeys that the subnet does not know"),
    _switch("blacklist.force_validator_permit", "refuse callers without a validator permit"),
    _value(
        "blacklist.validator_min_stake",
        "STAKE",
        f"refuse callers with this stake or less (default: {_WHO.min_stake:.0f})",
        _stake,
    ),
    _value(
        "whitelist.hotkeys",
        "SS58,SS58",
        "callers that are answered whatever the chain says (default: none)",
        parse_hotkeys,
    ),
    _switch("logging.debug", "log level debug"),
    _switch("logging.trace", "log level debug"),
    _switch("logging.info", "log level info"),
)

_OURS: Final = frozenset(flag.name for flag in _FLAGS)

# Accepted, with or without a value; the others of their families join them.
_IDLE: Final = (
    "axon.max_workers",
    "gcp.log_id_prefix",
    "logging.enable_third_party_loggers",
    "logging.logging_dir",
    "logging.record_log",
    "mock",
    "neuron.device",
    "neuron.dont_save_events",
    "neuron.epoch_length",
    "neuron.events_retention_size",
    "neuron.name",
    "no_prompt",
    "no_version_checking",
    "strict",
)
_FAMILIES: Final = ("axon", "gcp", "logging", "neuron", "subtensor", "wallet", "wandb")
_GUARDED: Final = ("blacklist", "whitelist")
_FAMILY_FLAG: Final = re.compile(
    rf"--((?:{'|'.join((*_FAMILIES, *_GUARDED))})\.[\w.-]+)(=.*)?", re.DOTALL
)
_ALIKE: Final = 0.7  # from here on a name is one of ours mistyped: `prot`, `hotkeys`
_LOG_LEVELS: Final = {
    "logging.trace": "debug",
    "logging.debug": "debug",
    "logging.info": "info",
}  # the first one given counts


def add_operator_arguments(parser: ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """All operator flags, as two groups of the parser.

    `argv` (default: the program's) is looked through for flags like `--neuron.…`, whose
    names nobody knows in advance; it ends the program, as parsing does, for one that must
    not be ignored. A flag that is not given leaves no trace in the result.
    """
    _add_choices(parser)
    group = parser.add_argument_group(
        "operator options", "As the reference miner's process-manager files have them."
    )
    for flag in _FLAGS:
        group.add_argument(
            f"--{flag.name}", default=SUPPRESS, dest=flag.name, help=flag.help, **flag.options
        )
    given = sys.argv[1:] if argv is None else argv
    named = {match[1] for text in given if (match := _FAMILY_FLAG.fullmatch(text))}
    others = sorted(named - _OURS - {*_IDLE})
    for name in others:
        _refuse_mistyped(parser, name)
    idle = parser.add_argument_group(
        "operator options without effect",
        "Accepted, with or without a value; also any other of "
        f"{', '.join(f'--{family}.*' for family in _FAMILIES)}.",
    )
    for name in (*_IDLE, *others):
        idle.add_argument(f"--{name}", default=SUPPRESS, dest=name, nargs="?", metavar="…")


def _refuse_mistyped(parser: ArgumentParser, name: str) -> None:
    """End the program for a flag that is nearly ours, or that might say who may ask."""
    family, _, word = name.partition(".")
    words = [ours.partition(".")[2] for ours in sorted(_OURS) if ours.startswith(f"{family}.")]
    alike = get_close_matches(word, words, n=1, cutoff=_ALIKE)
    if alike:
        parser.error(f"--{name} is no flag here; did you mean --{family}.{alike[0]}?")
    if family in _GUARDED:
        known = ", ".join(f"--{family}.{ours}" for ours in words)
        parser.error(
            f"--{name} is no flag here, and who may ask is not left to chance; use {known}, or "
            "leave it out."
        )


def _add_choices(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("transport")
    group.add_argument(
        "--transport",
        choices=[choice.value for choice in Transport],
        help="how prompts come in (default: axon if a wallet is named, else http)",
    )
    group.add_argument(
        "--chain",
        choices=[choice.value for choice in ChainKind],
        default=ChainKind.BITTENSOR.value,
        help="who says which callers may ask: the subnet, or --whitelist.hotkeys alone "
        "(default: bittensor)",
    )


# ---------------------------------------------------------------- what they say


def operator_settings(args: Namespace) -> OperatorSettings:
    """Settings from parsed flags. Raises: ConfigError for flags that contradict each other."""
    given = vars(args)
    transport = _transport(given)
    chain = ChainSettings(
        kind=ChainKind(given["chain"]),
        network=given.get("subtensor.chain_endpoint")
        or given.get("subtensor.network", _SUBNET.network),
        netuid=given.get("netuid", _SUBNET.netuid),
    )
    policy = _policy(given, chain.kind)
    if transport is Transport.AXON and chain.kind is ChainKind.STATIC and not policy.whitelist:
        raise ConfigError(
            "with --chain static nobody may ask; name the callers with --whitelist.hotkeys."
        )
    levels = [level for name, level in _LOG_LEVELS.items() if given.get(name)]
    return OperatorSettings(
        transport=transport,
        axon=_axon(given),
        chain=chain,
        policy=policy,
        log_level=levels[0] if levels else None,
        remarks=_remarks(given, transport, chain.kind),
    )


def page_port(settings: Settings, operator: OperatorSettings) -> int:
    """Where pages are served over HTTP: as the settings say, else PAGES_AWAY from an axon.

    Files of the reference miner name the axon's port alone. Whoever names that one for
    both means the same.
    """
    axon_port = operator.axon.port
    if operator.transport is Transport.AXON and settings.port in (None, axon_port):
        above = axon_port + PAGES_AWAY
        return above if above <= _LAST_PORT else axon_port - PAGES_AWAY
    return PAGE_PORT if settings.port is None else settings.port


def _transport(given: Mapping[str, Any]) -> Transport:
    if given["transport"]:
        return Transport(given["transport"])
    has_wallet = any(name.startswith("wallet.") for name in given.keys() & _OURS)
    return Transport.AXON if has_wallet else Transport.HTTP


def _axon(given: Mapping[str, Any]) -> AxonSettings:
    ip = given.get("axon.ip", _HERE.ip)
    return AxonSettings(
        wallet_name=given.get("wallet.name", _HERE.wallet_name),
        wallet_hotkey=given.get("wallet.hotkey", _HERE.wallet_hotkey),
        wallet_path=given.get("wallet.path", _HERE.wallet_path),
        # bittensor's default, and it listens on all IPv4 addresses all the same
        ip=_DEFAULT_IP if ip in {"[::]", "::"} else ip,
        port=given.get("axon.port", _HERE.port),
        external_ip=given.get("axon.external_ip"),
        external_port=given.get("axon.external_port"),
    )


def _policy(given: Mapping[str, Any], kind: ChainKind) -> CallerPolicy:
    allows = given.get("blacklist.allow_non_registered", False)
    return CallerPolicy(
        min_stake=given.get("blacklist.validator_min_stake", _WHO.min_stake),
        # without a chain nobody is registered, and the named ones alone are meant
        allow_non_registered=allows and kind is not ChainKind.STATIC,
        force_validator_permit=given.get("blacklist.force_validator_permit", False),
        whitelist=given.get("whitelist.hotkeys", frozenset()),
    )


def _remarks(given: Mapping[str, Any], transport: Transport, kind: ChainKind) -> tuple[str, ...]:
    idle = [name for name in given if name in _IDLE or ("." in name and name not in _OURS)]
    if kind is ChainKind.STATIC:
        idle += [name for name in given if name.startswith(("subtensor.", "blacklist.", "netuid"))]
    if transport is Transport.HTTP:
        axon_only = ("wallet.", "axon.", "subtensor.", "blacklist.", "whitelist.", "netuid")
        idle += [name for name in given if name.startswith(axon_only)]
    names = ", ".join(f"--{name}" for name in dict.fromkeys(idle))
    return (f"these flags have no effect here: {names}.",) if names else ()
