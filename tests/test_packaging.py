"""The ways to run a miner: files of process managers and images, as far as they can be tried."""

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from answer_desk import DeskLoad, Outcome
from bar_store import BarStore
from chain import ChainHealth
from config import Frequency
from domain import Bars
from http_service import bind
from metrics import Metrics
from miner_facts import AxonFacts, MarketFacts, MinerFacts
from operator_flags import Transport, add_operator_arguments, operator_settings, page_port
from own_scores import OwnScore
from settings import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "packaging"
STOP_S = 10  # what operators are promised
PATIENCE_S = 60  # of a busy machine
INSTALLED_IN_CI = {"promtool"}
PAGES = [ROOT / "docs" / "operating.md", ROOT / "docs" / "migrating.md"]


def text(name):
    return (PACKAGING / name).read_text(encoding="utf-8")


@cache
def known_flags():
    """All that `miner.py` has."""
    command = [sys.executable, str(ROOT / "miner.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[\w.-]+", shown))


def unknown_flags(words):
    return {word for word in words if word.startswith("--")} - known_flags()


def operator_of(words):
    parser = ArgumentParser()
    add_operator_arguments(parser, words)
    return operator_settings(parser.parse_known_args(words)[0])


def program(name):
    path = shutil.which(name)
    if path is None and name in INSTALLED_IN_CI and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed, and .ci/run installs it")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


# ---------------------------------------------------------------- PM2


@pytest.fixture(scope="module")
def app():
    file = json.dumps(str(PACKAGING / "ecosystem.config.js"))
    script = f"console.log(JSON.stringify(require({file})))"
    run = subprocess.run(
        [program("node"), "-e", script], capture_output=True, text=True, check=True
    )
    (found,) = json.loads(run.stdout)["apps"]
    return found


def test_the_pm2_file_starts_the_miner_of_this_folder_over_an_axon(app):
    assert Path(app["cwd"]) == ROOT
    assert (ROOT / app["script"]).is_file()
    assert Path(app["interpreter"]) == ROOT / ".venv" / "bin" / "python"
    assert unknown_flags(app["args"]) == set()
    operator = operator_of(app["args"])
    assert operator.transport is Transport.AXON
    assert operator.remarks == ()


def test_pm2_leaves_the_miner_its_time_to_end(app):
    assert app["kill_timeout"] > 1000 * STOP_S


# ---------------------------------------------------------------- systemd


def unit():
    """Directives of all sections: name → values in order."""
    found: dict[str, list[str]] = {}
    for line in text("lgbm-miner.service").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_passes_systemds_own_checks(tmp_path):
    systemd = program("systemd-analyze")
    command = f"ExecStart={sys.executable}"  # theirs is not installed here
    here = re.sub(r"^ExecStart=\S+", command, text("lgbm-miner.service"), flags=re.MULTILINE)
    copy = tmp_path / "lgbm-miner.service"
    copy.write_text(here)
    verified = subprocess.run(
        [systemd, "verify", str(copy)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    exposed = subprocess.run(
        [systemd, "security", "--offline=true", "--threshold=20", "--no-pager", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert exposed.returncode == 0, exposed.stdout[-200:]  # at most 2.0 of 10


def test_the_unit_stops_the_miner_gently_and_starts_it_as_its_own_user():
    found = unit()
    assert int(found["TimeoutStopSec"][0]) > STOP_S
    assert found["KillMode"] == ["mixed"]
    assert found["User"] == ["lgbm-miner"]
    assert found["ProtectHome"] == found["NoNewPrivileges"] == ["true"]


def test_the_units_settings_are_settings():
    pairs = [value.partition("=")[::2] for value in unit()["Environment"]]
    ours = dict(pair for pair in pairs if pair[0].startswith("LGBM_MINER_"))
    assert load_settings(environment=ours).state_dir == Path("/var/lib/lgbm-miner/state")


# ---------------------------------------------------------------- settings


def test_every_line_of_the_example_settings_can_be_used():
    lines = re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", text(".env.example"), flags=re.MULTILINE)
    environment = dict(lines)
    flags = shlex.split(environment.pop("MINER_FLAGS"))
    assert operator_of(flags).transport is Transport.AXON
    assert unknown_flags(flags) == set()
    settings = load_settings(environment=environment)
    assert settings.binance_url == "https://data-api.binance.vision"
    assert settings.port == page_port(Settings(), operator_of(flags))
    for name in environment.keys() - {"BINANCE_API_HOST", "LGBM_MINER_JOBS", "LGBM_MINER_PORT"}:
        field = name.removeprefix("LGBM_MINER_").lower()
        assert getattr(settings, field) == getattr(Settings(), field)  # as shown, a default


# ---------------------------------------------------------------- Docker


def instructions():
    """The Dockerfile's instructions, continued lines joined."""
    joined = re.sub(r"^#.*\n", "", text("Dockerfile"), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def copied():
    """Patterns of what the image's last stage takes from here."""
    *_, last = [
        rest for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")
    ]
    return last.split()[:-1]


def image_environment():
    (line,) = [rest for name, rest in instructions() if name == "ENV"]
    return dict(word.split("=", 1) for word in shlex.split(line))


def test_the_build_leaves_out_all_but_what_the_image_takes():
    allowed = {line[1:] for line in text("Dockerfile.dockerignore").splitlines() if line[0] == "!"}
    assert allowed == {*copied(), "requirements.lock"}


def test_the_image_is_built_from_the_lock_alone_with_the_python_of_the_lock():
    (taken, *_) = [rest for name, rest in instructions() if name == "COPY"]
    assert taken.split()[0] == "requirements.lock"
    (installing,) = [rest for name, rest in instructions() if "pip install" in rest]
    assert "--require-hashes --requirement requirements.lock" in " ".join(installing.split())
    made_with = re.search(
        r"pip-compile with Python (\S+)", (ROOT / "requirements.lock").read_text()
    )
    assert made_with
    bases = [rest for name, rest in instructions() if name == "FROM"]
    assert all(base.startswith(f"python:{made_with[1]}-") for base in bases)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """What the image's folder would hold."""
    folder = tmp_path_factory.mktemp("app")
    for path in ROOT.iterdir():
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in copied()):
            shutil.copy(path, folder)
    return folder


@contextmanager
def container(image, data, port):
    """The entry point in the image's folder and environment, its data folder elsewhere."""
    (entry,) = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    environment = {
        name: value.replace("/data", str(data)) for name, value in image_environment().items()
    } | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MPLCONFIGDIR": str(data),
        "LGBM_MINER_SOURCE": "simulated",
        "LGBM_MINER_HOST": "127.0.0.1",
        "LGBM_MINER_PORT": str(port),
    }
    process = subprocess.Popen(
        entry, cwd=image, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield process, environment
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stdout
        process.stdout.close()


def is_healthy(environment):
    (check,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    return (
        subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0
    )


def test_what_the_image_holds_answers_is_healthy_and_ends_as_docker_asks(image, tmp_path):
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with container(image, tmp_path, port) as (process, environment):
        assert process.stdout
        readable, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        assert readable
        assert b"SIMULATED market" in process.stdout.readline()
        assert is_healthy(environment)
        ((_, stop),) = [entry for entry in instructions() if entry[0] == "STOPSIGNAL"]
        process.send_signal(signal.Signals[stop])
        assert process.wait(STOP_S) == 0
        assert not is_healthy(environment)
    assert (tmp_path / "state").is_dir()


def test_the_image_runs_as_a_user_without_rights():
    ((_, user),) = [entry for entry in instructions() if entry[0] == "USER"]
    assert int(user) > 0
    ours = {key: value for key, value in image_environment().items() if key.startswith("LGBM_")}
    assert load_settings(environment=ours).port == 8090


# ---------------------------------------------------------------- monitoring


def told_metrics():
    """Names of all series that a miner with one market and an axon tells."""
    own = OwnScore(answers=1, score=1.0, ewma_t=1.0, covered=0.8, **_rest_of_own_score())
    market = MarketFacts(
        asset="BTC",
        frequency=Frequency.HF,
        last_bar_ts=0,
        price=1.0,
        price_ts=0,
        price_feed="x",
        trained_until=0,
        is_due=False,
        own=own,
        calibration={"level": 1.0},
    )
    axon = AxonFacts(port=1, is_up=True, chain=ChainHealth(age_s=1.0, uid=0, fault=None))
    known = MinerFacts(now=1.0, source="venue", is_live=True, markets=(market,), axon=axon)
    facts = replace(known, clock_offset_s=0.5)
    load = DeskLoad(**dict.fromkeys(DeskLoad.__dataclass_fields__, 0))
    page = Metrics(lambda: facts, lambda: load).page().decode()
    return set(re.findall(r"^# TYPE (\w+)", page, flags=re.MULTILINE))


def _rest_of_own_score():
    known = {"answers", "score", "ewma_t", "covered"}
    return {name: 0 for name in OwnScore.__dataclass_fields__ if name not in known}


@pytest.mark.parametrize(
    "page", [PACKAGING / "prometheus-alerts.yml", *PAGES], ids=lambda page: page.name
)
def test_every_metric_that_is_named_exists(page):
    told = told_metrics() | {f"{name}_total" for name in told_metrics()}
    named = set(re.findall(r"\blgbm_miner_\w+", page.read_text(encoding="utf-8")))
    assert named - told == set()


# Outcomes that no alert looks for, each with its reason.
NOT_ALERTED = {
    Outcome.NOT_ALLOWED: "any key can cause it; validators who are refused show in MinerNotAsked",
    Outcome.TURNED_AWAY: "anybody can cause it",
}


def test_every_outcome_is_in_an_alert_or_left_out_for_a_reason():
    rules = text("prometheus-alerts.yml")
    alerted = {
        name for group in re.findall(r'outcome=~"([^"]+)"', rules) for name in group.split("|")
    }
    assert alerted == {outcome.value for outcome in Outcome} - {o.value for o in NOT_ALERTED}
    for group in re.findall(r'outcome!~"([^"]+)"', rules):
        # what others can cause at will must not water a share down
        assert {outcome.value for outcome in NOT_ALERTED} <= set(group.split("|"))


def alerts():
    return re.findall(r"- alert: (\w+)", text("prometheus-alerts.yml"))


def test_the_page_names_the_alerts():
    page = PAGES[0].read_text()
    assert re.findall(r"^\| `(Miner\w+)` ", page, flags=re.MULTILINE) == alerts()


REQUESTS = 'lgbm_miner_requests_total{instance="a",transport="%s",outcome="%s"}'
BTC = '{instance="a",asset="BTC",frequency="hf"}'
WELL = {
    'up{job="lgbm-miner",instance="a"}': "1+0x1000",
    'lgbm_miner_ready{instance="a"}': "1+0x1000",
    'lgbm_miner_axon_up{instance="a"}': "1+0x1000",
    'lgbm_miner_registered{instance="a"}': "1+0x1000",
    'lgbm_miner_chain_age_seconds{instance="a"}': "300+0x1000",
    'lgbm_miner_clock_offset_seconds{instance="a"}': "-1+0x1000",
    f"lgbm_miner_has_price{BTC}": "1+0x1000",
    f"lgbm_miner_price_age_seconds{BTC}": "30+0x1000",
    f"lgbm_miner_scored_price_age_seconds{BTC}": "30+0x1000",
    f"lgbm_miner_model_age_seconds{BTC}": "9000+0x1000",
    f"lgbm_miner_model_trained{BTC}": "1+0x1000",
    f"lgbm_miner_own_crps_ratio{BTC}": "0.97+0x1000",
    f"lgbm_miner_own_answers_scored{BTC}": "900+0x1000",
    **{
        REQUESTS % (transport, outcome.value): "0+0x1000"
        for transport in Transport
        for outcome in Outcome
    },
    REQUESTS % ("axon", "computed"): "0+4x1000",
    REQUESTS % ("axon", "turned_away"): "0+50x1000",  # scanners and strangers, always
    REQUESTS % ("axon", "not_allowed"): "0+50x1000",
}
FAULTS = {
    "nothing": ({}, set()),
    "it is down": ({'up{job="lgbm-miner",instance="a"}': "0+0x1000"}, {"MinerCannotAnswer"}),
    "an asset without bars": (
        {
            f"lgbm_miner_has_price{BTC}": "0+0x1000",
            f"lgbm_miner_price_age_seconds{BTC}": "_x1000",
            f"lgbm_miner_scored_price_age_seconds{BTC}": "Inf+0x1000",
        },
        {"MinerAssetWithoutPrice", "MinerScoredFeedStale"},
    ),
    "slow answers": ({REQUESTS % ("axon", "left"): "0+1x1000"}, {"MinerTooLate"}),
    "prompts without a price": (
        {REQUESTS % ("axon", "no_price"): "0+1x1000"},
        {"MinerRefusesPrompts"},
    ),
    "a new asset": ({REQUESTS % ("axon", "refused"): "0+1x1000"}, {"MinerRefusesPrompts"}),
    "nonsense over HTTP": ({REQUESTS % ("http", "refused"): "0+9x1000"}, set()),
    "a closed port": ({REQUESTS % ("axon", "computed"): "0+4x10 40+0x990"}, {"MinerNotAsked"}),
    "nobody asks a miner that is not registered": (
        {
            REQUESTS % ("axon", "computed"): "0+0x1000",
            'lgbm_miner_registered{instance="a"}': "0+0x1000",
        },
        {"MinerOffChain"},
    ),
    "the scored feed down": (
        {f"lgbm_miner_scored_price_age_seconds{BTC}": "30+60x1000"},
        {"MinerScoredFeedStale"},
    ),
    "a symbol that its venue has lost": (
        {'lgbm_miner_feed_failing{instance="a",feed="hyperliquid:xyz:GOLD"}': "1+0x1000"},
        {"MinerFeedFailing"},
    ),
    "a disk that is full": (
        {'lgbm_miner_unsaved_feeds{instance="a"}': "2+0x1000"},
        {"MinerDiskRefuses"},
    ),
    "a ledger that loses records": (
        {'lgbm_miner_ledger_lost{instance="a"}': "0+3x1000"},
        {"MinerDiskRefuses"},
    ),
    "a clock that is behind": (
        {'lgbm_miner_clock_offset_seconds{instance="a"}': "-12+0x1000"},
        {"MinerClockOff"},
    ),
    "every feed down": (
        {
            f"lgbm_miner_price_age_seconds{BTC}": "30+60x1000",
            f"lgbm_miner_scored_price_age_seconds{BTC}": "30+60x1000",
        },
        {"MinerFeedStale", "MinerScoredFeedStale"},
    ),
}


@pytest.mark.parametrize(("changes", "fired"), FAULTS.values(), ids=FAULTS)
def test_each_fault_raises_its_alert_and_no_other(changes, fired, tmp_path):
    promtool = program("promtool")
    firing = {
        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "2h",
        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in fired],
    }
    series = [{"series": name, "values": values} for name, values in (WELL | changes).items()]
    case = {"interval": "1m", "input_series": series, "promql_expr_test": [firing]}
    file = tmp_path / "case.yml"
    rules = str(PACKAGING / "prometheus-alerts.yml")
    file.write_text(json.dumps({"rule_files": [rules], "tests": [case]}))
    ran = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ---------------------------------------------------------------- what the pages promise


def bars(first, count):
    close = np.full(count, 100.0)
    return Bars(
        open_ts=first + 60 * np.arange(count, dtype=np.int64),
        open=close,
        high=close,
        low=close,
        close=close,
        volume=close,
        bar_s=60,
        feed="binance:BTCUSDT",
    )


def test_two_miners_share_bars_through_a_link(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = BarStore(tmp_path / "a")
    day = 1_765_756_800
    first.append("binance", "BTC", bars(day, 10))
    (tmp_path / "b" / "bars").symlink_to(tmp_path / "a" / "bars")
    second = BarStore(tmp_path / "b")
    assert second.series() == first.series()
    assert second.append("binance", "BTC", bars(day, 12)).new == 2
    held = first.load("binance", "BTC", 60)
    assert held is not None
    assert len(held) == 12


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([\w./-]*)#?([\w-]*)\)", page.read_text()):
            there = page.parent / target if target else page
            titles = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}
