"""What SECURITY.md promises: nothing is executed, heard, told or left open unasked."""

import ast
import ipaddress
import json
import os
import re
import signal
import socket
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from lightgbm import Booster
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from axon_adapter import bt, load_wallet
from backtest_store import append_score
from errors import ConfigError
from operator_flags import AxonSettings
from state_store import StateStore
from tests import test_axon_adapter as axon
from tests.test_miner_process import STOP_LIMIT_S, ask, running
from tests.waiting import PATIENCE_S, wait_for
from wire_format import format_iso

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
HERE = "127.0.0.1"
LISTENING, BOUND = "0A", "07"  # as /proc/net/tcp and /proc/net/udp write it


# ---------------------------------------------------------------- nothing is executed

EXECUTING_MODULES = {
    "_pickle", "cloudpickle", "code", "codeop", "dill", "joblib", "jsonpickle", "marshal", "pickle",
    "runpy", "shelve", "yaml",
}  # fmt: skip
# Whatever they are called by: `builtins.eval`, `from os import system`.
EXECUTING_NAMES = {"eval", "exec", "__import__", "system", "popen", "read_pickle", "to_pickle"}
EXECUTING_CALLS = {"compile", "builtins.compile"}  # and no `re.compile`
IMPORTING_CALLS = {"import_module", "__import__"}


def executing(tree):
    """What in a module could run data as code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from {alias.name.split(".")[0] for alias in node.names} & EXECUTING_MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or "").split(".")[0]} & EXECUTING_MODULES
            yield from {alias.name for alias in node.names} & EXECUTING_NAMES
        elif isinstance(node, ast.Attribute):  # called or handed on
            is_os = ast.unparse(node.value) in {"os", "builtins", "pd", "pandas"}
            yield from {node.attr} & EXECUTING_NAMES if is_os else ()
        elif isinstance(node, ast.Call):
            yield from executing_call(node)


def executing_call(node):
    """What in a call could run data as code."""
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    yield from {name} & (EXECUTING_NAMES | EXECUTING_CALLS)
    yield from {last} & {"read_pickle", "to_pickle"}
    if last in IMPORTING_CALLS:  # of a fixed name that is harmless, or not at all
        wanted = node.args[0] if node.args else None
        module = str(wanted.value) if isinstance(wanted, ast.Constant) else None
        if module is None or module.split(".")[0] in EXECUTING_MODULES:
            yield name
    yield from (
        f"{name}({option.arg})"
        for option in node.keywords
        if option.arg in {"shell", "allow_pickle"} and ast.unparse(option.value) != "False"
    )


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_no_module_runs_data_as_code(path):
    assert list(executing(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "pd.read_pickle(path)",
        "frame.to_pickle(path)",
        "from os import system",
        "import builtins; builtins.eval(text)",
        "run = builtins.exec",
        "importlib.import_module('pickle')",
        "importlib.import_module(name)",
        "from importlib import import_module; import_module(name)",
        "__import__('os')",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "import dill",
        "import cloudpickle",
        "import runpy",
        "compile(text, 'x', 'exec')",
    ],
)
def test_what_runs_data_as_code_would_be_found(source):
    assert list(executing(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["re.compile(text)", "importlib.import_module('bittensor')", "platform.system()"]
)
def test_what_runs_no_data_passes(source):
    assert list(executing(ast.parse(source))) == []


# ---------------------------------------------------------------- what a real miner does


@pytest.fixture(scope="module")
def wallets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wallets")
    axon.make_wallet(folder, "miner")
    return folder


@pytest.fixture(scope="module")
def secrets(wallets):
    """What the wallet's files hold and nobody else may: phrases, seeds and keys."""
    found = set()
    for path in (wallets / "miner" / "coldkey", wallets / "miner" / "hotkeys" / "hot"):
        told = json.loads(path.read_text())
        for name in ("secretPhrase", "secretSeed", "privateKey"):
            if told.get(name):
                found.add(told[name].removeprefix("0x"))
    assert len(found) >= 4
    return found


def descendants(pid):
    """A process and all that it started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from descendants(int(child))


def listening_addresses(pid):
    """Where a process and its children can be reached: addresses and ports, TCP and UDP."""
    found = set()
    for one in descendants(pid):
        inodes = set()
        for handle in Path(f"/proc/{one}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", str(handle.readlink())))
            except FileNotFoundError:
                continue
        for table, heard in (
            ("tcp", LISTENING),
            ("tcp6", LISTENING),
            ("udp", BOUND),
            ("udp6", BOUND),
        ):
            for line in Path(f"/proc/{one}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == heard and fields[9] in inodes:
                    address, _, port = fields[1].partition(":")
                    found.add((address_of(address), int(port, 16)))
    return found


def address_of(written):
    """An address as the kernel writes it: 32-bit words in the machine's order."""
    words = [bytes.fromhex(written[at : at + 8])[::-1] for at in range(0, len(written), 8)]
    return ipaddress.ip_address(b"".join(words))


def free_port():
    with socket.create_server((HERE, 0)) as taken:
        return taken.getsockname()[1]


def said_by(url, port, hotkey):
    """All that the miner says to those who ask it well or badly."""
    server = SimpleNamespace(hotkey=hotkey)
    asked = {
        "asset": "BTC",
        "start_time": format_iso(int(time.time()) // 60 * 60 + 120),
        "time_increment": 60,
        "time_length": 3600,
        "num_simulations": 2,
    }
    with httpx.Client(base_url=f"http://{HERE}:{port}", timeout=PATIENCE_S) as client:
        answers = [
            axon.post(client, axon.signed(server), asked),
            axon.post(client, axon.signed(server), asked | {"asset": "DOGE"}),
            axon.post(client, axon.signed(server, axon.CALLERS["poor"]), asked),
            axon.post(client, {}, asked),
            client.get("/docs"),
        ]
    assert answers[0].status_code == 200, answers[0].text
    answers += [ask(url), ask(url, asset="DOGE")]
    answers += [httpx.get(url + path, timeout=PATIENCE_S) for path in ("/", "/metrics", "/healthz")]
    return "\n".join(f"{answer.headers}\n{answer.text}" for answer in answers)


@pytest.fixture(scope="module")
def ran(wallets, tmp_path_factory):
    """What a miner with a wallet listened on, said, logged and wrote."""
    base = tmp_path_factory.mktemp("ran")
    port = free_port()
    wallet = bt.Wallet(name="miner", hotkey="hot", path=str(wallets))
    flags = {
        "--source": "simulated",
        "--log-level": "debug",
        "--model-dir": base / "models",
        "--state-dir": base / "state",
        "--wallet.name": "miner",
        "--wallet.hotkey": "hot",
        "--wallet.path": wallets,
        "--axon.ip": HERE,
        "--axon.external_ip": HERE,
        "--axon.port": port,
        "--chain": "static",
        "--whitelist.hotkeys": axon.VALIDATOR.ss58_address,
    }
    with running(*(str(word) for flag in flags.items() for word in flag)) as (process, url, lines):
        wait_for(lambda: any("axon listens" in line or "event=axon" in line for line in lines))
        told = said_by(url, port, wallet.hotkey.ss58_address)
        addresses = listening_addresses(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_LIMIT_S) == 0
    return SimpleNamespace(base=base, addresses=addresses, told=told, log="".join(lines))


def test_nothing_listens_beyond_loopback_unless_asked(ran):
    assert len(ran.addresses) == 2  # the axon and the pages
    assert all(address.is_loopback for address, _ in ran.addresses)


def test_by_default_the_axon_alone_listens_on_all_addresses(wallets, tmp_path):
    """Validators must reach it, as the reference miner's; the pages are for the machine alone."""
    port = free_port()
    flags = {
        "--source": "simulated",
        "--model-dir": tmp_path / "models",
        "--state-dir": tmp_path / "state",
        "--wallet.name": "miner",
        "--wallet.hotkey": "hot",
        "--wallet.path": wallets,
        "--axon.port": port,
        "--chain": "static",
        "--whitelist.hotkeys": axon.VALIDATOR.ss58_address,
    }
    with running(*(str(word) for flag in flags.items() for word in flag)) as (process, _, lines):
        wait_for(lambda: any("axon listens" in line or "event=axon" in line for line in lines))
        reached = listening_addresses(process.pid)
    (axon_address,) = [address for address, heard in reached if heard == port]
    assert axon_address.is_unspecified
    (page_address,) = [address for address, heard in reached if heard != port]
    assert page_address.is_loopback


def test_no_secret_of_the_wallet_is_told_logged_or_written(ran, secrets):
    written = [path.read_bytes() for path in ran.base.rglob("*") if path.is_file()]
    assert written
    assert len(ran.log) > 100
    everything = b"\n".join([ran.told.encode(), ran.log.encode(), *written])
    for secret in secrets:
        assert secret.encode() not in everything
        if re.fullmatch(r"[0-9a-f]+", secret):
            assert bytes.fromhex(secret) not in everything


def test_what_the_miner_writes_is_for_its_owner_alone(ran):
    for path in [ran.base / "state", *(ran.base / "state").rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_damaged_wallet_is_complained_of_without_its_content(wallets, secrets, tmp_path):
    hotkeys = tmp_path / "miner" / "hotkeys"
    hotkeys.mkdir(parents=True)
    whole = (wallets / "miner" / "hotkeys" / "hot").read_text()
    (hotkeys / "hot").write_text(whole[:-3])
    with pytest.raises(ConfigError) as caught:
        load_wallet(AxonSettings(wallet_name="miner", wallet_hotkey="hot", wallet_path=tmp_path))
    assert not [secret for secret in secrets if secret in str(caught.value)]


# ---------------------------------------------------------------- models and state


def test_models_are_json_and_text_for_their_owner_alone(model_dir):
    files = [path for path in model_dir.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".txt"}
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, path
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            assert Booster(model_str=path.read_text()).num_trees() >= 0


def test_state_is_private_even_where_the_machine_is_generous(tmp_path):
    before = os.umask(0)
    try:
        StateStore(tmp_path / "state").save("market", "archive/BTC_hf", 1, {"x": 1})
        append_score(tmp_path / "work" / "scores" / "x.jsonl", {"start_ts": 60})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


# ---------------------------------------------------------------- requirements


def locked_packages():
    """Version and number of hashes by package, as requirements.lock has them."""
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(
        r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:\w{64}.*\n)+)", text, re.MULTILINE
    )
    return {
        canonicalize_name(name): (version, rows.count("--hash")) for name, version, rows in entries
    }


def requirements_in(name):
    rows = [row.partition(" #")[0].strip() for row in (ROOT / name).read_text().splitlines()]
    return [Requirement(row) for row in rows if row and not row.startswith("#")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-axon.txt"])
def test_every_requirement_is_locked_at_a_version_that_it_allows(name):
    locked = locked_packages()
    for wanted in requirements_in(name):
        version, hashes = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), wanted
        assert hashes


def test_the_lock_holds_pins_with_hashes_and_names_no_host():
    text = (ROOT / "requirements.lock").read_text()
    rows = [row for row in text.splitlines() if row and not row.lstrip().startswith("#")]
    assert all(re.match(r"[\w.-]+==\S+ \\$|    --hash=sha256:\w{64}( \\)?$", row) for row in rows)
    assert len(locked_packages()) == sum("==" in row for row in rows)
    assert not re.search(r"\w://|--(extra-)?index|--find-links|--trusted", text)
