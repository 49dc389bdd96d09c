"""The flags of operators' process-manager files: accepted, understood, explained."""

import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caller_rules import CallerPolicy
from console import add_common_arguments, script_parser
from errors import ConfigError
from operator_flags import (
    AxonSettings,
    ChainKind,
    ChainSettings,
    Transport,
    add_operator_arguments,
    operator_settings,
    page_port,
)
from settings import Settings, load_settings

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
BOB = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


def parser(argv=()):
    built = script_parser("A miner.", examples=["python miner.py"])
    add_common_arguments(built)
    add_operator_arguments(built, argv)
    return built


def read(line):
    argv = shlex.split(line)
    return operator_settings(parser(argv).parse_args(argv))


def refusal(line, capsys):
    argv = shlex.split(line)
    with pytest.raises(SystemExit):
        parser(argv).parse_args(argv)
    return capsys.readouterr().err


def test_without_flags_answers_go_over_http():
    settings = read("")
    assert settings.transport is Transport.HTTP
    assert settings.axon == AxonSettings()
    assert settings.chain == ChainSettings()
    assert settings.policy == CallerPolicy()
    assert (settings.log_level, settings.remarks) == (None, ())


REFERENCE = (
    "--netuid 247 --logging.debug --logging.trace --subtensor.network test "
    "--wallet.name miner --wallet.hotkey default --axon.port 8091 "
    "--blacklist.validator_min_stake 1000"
)


def test_the_flags_of_the_reference_miners_file_choose_the_axon():
    settings = read(REFERENCE)
    assert settings.transport is Transport.AXON
    assert settings.axon == AxonSettings(wallet_name="miner")
    assert settings.chain == ChainSettings(network="test", netuid=247)
    assert settings.policy == CallerPolicy(min_stake=1000.0)
    assert (settings.log_level, settings.remarks) == ("debug", ())


def test_every_flag_has_its_place():
    settings = read(
        "--wallet.name=w --wallet.hotkey=h --wallet.path /keys --axon.ip 10.0.0.5 "
        "--axon.port 9000 --axon.external_ip 198.51.100.7 --axon.external_port 9001 "
        "--subtensor.network finney --subtensor.chain_endpoint ws://10.0.0.1:9944 "
        "--blacklist.allow_non_registered --blacklist.force_validator_permit "
        f"--whitelist.hotkeys {ALICE},{BOB} --logging.info --chain bittensor"
    )
    assert settings.axon == AxonSettings(
        wallet_name="w",
        wallet_hotkey="h",
        wallet_path=Path("/keys"),
        ip="10.0.0.5",
        port=9000,
        external_ip="198.51.100.7",
        external_port=9001,
    )
    assert settings.chain == ChainSettings(network="ws://10.0.0.1:9944")
    assert settings.policy == CallerPolicy(
        allow_non_registered=True, force_validator_permit=True, whitelist=frozenset({ALICE, BOB})
    )
    assert (settings.log_level, settings.remarks) == ("info", ())


def test_what_does_nothing_here_is_accepted_and_named_once():
    settings = read(
        f"{REFERENCE} --neuron.epoch_length 100 --neuron.device cpu --neuron.name miner "
        "--logging.logging_dir /logs --logging.record_log --axon.max_workers 4 "
        "--wandb.off --wandb.project_name x --wandb.anything=else --neuron.dont_save_events"
    )
    (remark,) = settings.remarks
    assert remark.startswith("these flags have no effect here: --")
    for name in (
        "neuron.epoch_length", "neuron.device", "neuron.name", "logging.logging_dir",
        "logging.record_log", "axon.max_workers", "wandb.off", "wandb.project_name",
        "wandb.anything", "neuron.dont_save_events",
    ):  # fmt: skip
        assert remark.count(f"--{name}") == 1
    assert "--netuid" not in remark


@pytest.mark.parametrize(
    "line",
    [
        "--neuron.timeout 10",
        "--neuron.timeout=10",
        "--neuron.nprocs -1",
        "--neuron.axon_off",
        "--mock",
        "--subtensor._mock",
        "--no_prompt",
        "--axon.disabled true",
        "--logging.level.of-what 3",
        "--wallet.coldkey x",
        "--wandb.offline",
        "--gcp.project y",
    ],
)
def test_flags_of_the_reference_miners_families_are_accepted_and_named_once(line):
    settings = read(f"{REFERENCE} {line} {line}")
    assert settings.axon == read(REFERENCE).axon
    name = line.replace("=", " ").split()[0]
    assert settings.remarks == (f"these flags have no effect here: {name}.",)


def test_a_flag_without_effect_chooses_no_transport():
    assert read("--wallet.coldkey x").transport is Transport.HTTP


@given(
    st.lists(st.sampled_from(["--wandb.off", "--wandb.entity x", "--wandb.notes='a b'"])),
)
def test_idle_flags_may_be_repeated_and_change_nothing_else(flags):
    settings = read(" ".join([REFERENCE, *flags]))
    assert settings.axon == read(REFERENCE).axon
    assert len(settings.remarks) == bool(flags)


@pytest.mark.parametrize("flag", ["--wallet.name w", "--wallet.hotkey h", "--wallet.path /keys"])
def test_any_wallet_flag_implies_the_axon_unless_http_is_asked_for(flag):
    assert read(flag).transport is Transport.AXON
    settings = read(f"{flag} --transport http")
    assert settings.transport is Transport.HTTP
    assert flag.split()[0] in settings.remarks[0]


def test_the_axon_may_be_chosen_with_the_default_wallet():
    assert read("--transport axon").axon.wallet_name == "default"


@pytest.mark.parametrize("ip", ["[::]", "::"])
def test_bittensors_default_address_means_all_of_ours(ip):
    assert read(f"--axon.ip {ip}").axon.ip == AxonSettings().ip


# ---------------------------------------------------------------- no chain


def test_a_static_chain_answers_the_named_hotkeys_alone():
    settings = read(
        f"--wallet.name w --chain static --whitelist.hotkeys {ALICE} "
        "--blacklist.allow_non_registered --netuid 50 --subtensor.network test"
    )
    assert settings.chain.kind is ChainKind.STATIC
    assert settings.policy.whitelist == {ALICE}
    assert settings.policy.allow_non_registered is False
    for name in ("--blacklist.allow_non_registered", "--netuid", "--subtensor.network"):
        assert name in settings.remarks[0]


def test_a_static_chain_without_names_is_refused():
    with pytest.raises(ConfigError, match=r"nobody may ask; .*--whitelist\.hotkeys"):
        read("--wallet.name w --chain static")


def test_a_mistyped_hotkey_is_named():
    with pytest.raises(ConfigError, match="wrong checksum"):
        read(f"--whitelist.hotkeys {ALICE},{BOB[:-1]}z")


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--axon.port 80", "use a whole number from 1025 to 65534"),
        ("--axon.port many", "got 'many'"),
        ("--axon.external_port 0", "from 1025"),
        ("--netuid -1", "from 0 to 65535"),
        ("--netuid ٣", "from 0 to 65535"),
        ("--blacklist.validator_min_stake lots", "use a number from 0 on"),
        ("--blacklist.validator_min_stake nan", "use a number from 0 on"),
        ("--blacklist.validator_min_stake inf", "use a number from 0 on"),
        ("--blacklist.validator_min_stake -1", "use a number from 0 on"),
        ("--transport carrier-pigeon", "invalid choice"),
        ("--chain none", "invalid choice"),
        ("--axon.prot 8091", "--axon.prot is no flag here; did you mean --axon.port?"),
        ("--axon.external_prot=8091", "did you mean --axon.external_port?"),
        ("--wallet.hotkeys h", "did you mean --wallet.hotkey?"),
        ("--subtensor.chain_endpiont ws://x", "did you mean --subtensor.chain_endpoint?"),
        ("--logging.debg", "did you mean --logging.debug?"),
        ("--blacklist.validator_minimum_stake 9", "did you mean --blacklist.validator_min_stake?"),
        ("--whitelist.hotkey x", "did you mean --whitelist.hotkeys?"),
        ("--blacklist.nobody", "who may ask is not left to chance; use --blacklist.allow_non_reg"),
        ("--whitelist.everybody=1", "use --whitelist.hotkeys, or leave it out"),
        ("--walet.name w", "unrecognized arguments"),
        ("--netuids 50", "unrecognized arguments"),
        ("--state-dri x", "unrecognized arguments"),
    ],
)
def test_a_bad_value_is_refused_with_a_remedy(line, words, capsys):
    assert words in refusal(line, capsys)


def test_every_flag_is_in_the_help_with_its_default():
    text = " ".join(parser().format_help().split())
    for words in ("--wallet.name", "(default: 8091)", "--wandb.*", "(default: 65000)", "--chain"):
        assert words in text


def test_the_groups_fit_any_parser():
    built = ArgumentParser(allow_abbrev=False)
    add_operator_arguments(built, [])
    assert operator_settings(built.parse_args([])).transport is Transport.HTTP


@pytest.mark.parametrize(
    ("line", "port", "page"),
    [
        ("", None, 8091),
        ("", 8300, 8300),
        ("", 0, 0),
        ("--wallet.name miner", None, 18_091),
        ("--wallet.name miner --axon.port 8101", None, 18_101),
        ("--wallet.name miner --axon.port 55535", None, 65_535),
        ("--wallet.name miner --axon.port 55536", None, 45_536),
        ("--wallet.name miner --axon.port 65534", None, 55_534),
        ("--wallet.name miner --axon.port 8101", 8091, 8091),
        ("--wallet.name miner --axon.port 8101", 0, 0),
        ("--wallet.name miner --axon.port 8101", 8101, 18_101),
        ("--wallet.name miner --axon.port 8101 --transport http", None, 8091),
    ],
)
def test_pages_are_far_from_an_axons_port_unless_another_is_named(line, port, page):
    assert page_port(Settings(port=port), read(line)) == page


def test_pages_of_miners_on_consecutive_axon_ports_share_no_port():
    taken = []
    for axon_port in (8091, 8092, 8093):
        flags = read(f"--wallet.name miner --axon.port {axon_port}")
        taken += [flags.axon.port, page_port(Settings(), flags)]
    assert len(set(taken)) == 6


def test_a_port_in_the_settings_file_or_the_environment_is_one_that_was_named(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("port = 8091\n")
    flags = read("--wallet.name miner --axon.port 8101")
    assert page_port(load_settings(file, {}), flags) == 8091
    assert page_port(load_settings(environment={"LGBM_MINER_PORT": "8090"}), flags) == 8090
    assert page_port(load_settings(environment={}), flags) == 18_101
