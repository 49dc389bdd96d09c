"""Every command that the documentation shows exists, flags included."""

import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")) if path.exists())
SCRIPTS = sorted(
    path.name
    for path in ROOT.glob("*.py")
    if re.search(r"^ +script_parser,$|import .*\bscript_parser\b", path.read_text(), re.MULTILINE)
)


# How the commands of an installation under systemd begin.
INSTALLED = re.compile(r"^sudo (-u \S+ )?|(/opt/lgbm-miner/)?\.venv/bin/|/opt/lgbm-miner/")


def fenced_commands(text):
    """Shell commands in ``` fences: prompts, users and folders removed, continued lines joined."""
    commands = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            command = INSTALLED.sub("", line.strip().removeprefix("$ "))
            if re.match(r"(python3? \S+\.py|make)\b", command):
                commands.append(command)
    return commands


@cache
def help_of(script):
    """What `--help` prints; within this process, for imports take most of the time."""
    shown = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown):
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert done.value.code == 0
    return shown.getvalue()


def faults(command):
    """What is wrong with a documented command; empty if nothing."""
    first, *words = shlex.split(command, comments=True)
    if first == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = [word for word in words if "=" not in word and not word.startswith("-")]
        return [f"make {word}: no such target" for word in wanted if word not in targets]
    script, *arguments = words
    if not (ROOT / script).is_file():
        return [f"{script}: no such file"]
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    if not flags:
        return []
    known = set(re.findall(r"--[\w.-]+", help_of(script)))
    return [f"{script} {flag}: no such flag" for flag in flags if flag not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_exists(page):
    commands = fenced_commands(page.read_text(encoding="utf-8"))
    assert [fault for command in commands for fault in faults(command)] == []


def test_the_demo_has_a_help_too():
    assert "demo.py" in SCRIPTS  # and runs nothing for it: see `help_of`


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_example_of_a_help_exists(script):
    examples = help_of(script).split("examples:\n")[1].strip().splitlines()
    assert [fault for line in examples for fault in faults(line.strip())] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_that_open_a_script_exist(script):
    opening = (ROOT / script).read_text(encoding="utf-8").split('"""')[1]
    commands = [line.strip() for line in opening.splitlines() if line.startswith("    python ")]
    assert commands
    assert [fault for command in commands for fault in faults(command)] == []


def test_a_wrong_command_would_be_found():
    text = """
```
$ python train_models.py --asset BTC \\
    --no-such-flag 3   # a comment --with-no-flag
python nowhere.py
make test PYTHON=python3.12
make coffee
an output line
```
python outside.py
"""
    found = [fault for command in fenced_commands(text) for fault in faults(command)]
    assert found == [
        "train_models.py --no-such-flag: no such flag",
        "nowhere.py: no such file",
        "make coffee: no such target",
    ]
