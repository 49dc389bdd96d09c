"""Flags, errors, tables, progress and log lines."""

import logging
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from console import (
    add_asset_argument,
    add_common_arguments,
    configure_logging,
    moment,
    script_parser,
    settings_from,
    table,
)
from errors import ConfigError, UnknownAsset
from settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def parse(*arguments):
    parser = script_parser("Try.", examples=["python try.py --asset BTC"])
    add_common_arguments(parser)
    add_asset_argument(parser, default="all")
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--state-dri", "x"], "unrecognized arguments: --state-dri x; did you mean --state-dir?"),
        (["--sede=1"], "unrecognized arguments: --sede=1; did you mean --seed?"),
        (["--colour", "a\nb"], "unrecognized arguments: --colour a b; see {prog} --help."),
        (["--seed"], "argument --seed: expected one argument; see {prog} --help."),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["try.py"])
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"try.py: {sentence.format(prog='try.py')}\n"


def script(body):
    """Write a script whose `main` is `body`, and return its command."""
    path = Path("try_it.py")
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import time\nfrom console import *\nfrom console import progress, run_script\n"
        f"from errors import MinerError\ndef main():\n{lines}\nrun_script(main)\n",
        encoding="utf-8",
    )
    return [sys.executable, str(path)]


def run(body, **options):
    return subprocess.run(script(body), capture_output=True, text=True, check=False, **options)


# ---------------------------------------------------------------- arguments


def test_without_flags_the_defaults_hold():
    assert settings_from(parse()) == Settings()


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch):
    Path("mine.toml").write_text("seed = 1\nprofile = '2026-05'\nport = 1", encoding="utf-8")
    monkeypatch.setenv("LGBM_MINER_SEED", "2")
    monkeypatch.setenv("LGBM_MINER_MODEL_DIR", "there")
    settings = settings_from(parse("--config", "mine.toml", "--model-dir", "here"))
    assert (settings.seed, settings.profile, settings.port) == (2, "2026-05", 1)
    assert settings.model_dir == Path("here")


def test_a_bad_value_of_a_flag_is_refused_like_any_other():
    with pytest.raises(ConfigError, match="seed='abc' from --seed does not fit"):
        settings_from(parse("--seed", "abc"))
    with pytest.raises(ConfigError, match="source='ftp' from --source does not fit"):
        settings_from(parse("--source", "ftp"))


def test_assets_are_repeatable_and_may_be_written_small():
    assert parse("--asset", "BTC", "--asset", "xau").assets == ["BTC", "XAU"]
    assert parse().assets == []
    assert parse("--asset", "BTC").assets == ["BTC"]  # the default list is not shared


def test_an_unknown_asset_is_named():
    with pytest.raises(UnknownAsset, match="asset 'DOGE' is unknown"):
        parse("--asset", "doge")


def test_a_flag_cannot_be_abbreviated():
    with pytest.raises(SystemExit):
        parse("--see", "1")


def test_help_states_defaults_and_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert text.rstrip().endswith("python try.py --asset BTC")
    for flag in (
        "--source", "--archive-dir", "--state-dir", "--model-dir", "--profile", "--seed", "--config"
    ):  # fmt: skip
        described = text.split(f"\n  {flag} ")[1].split("\n  --")[0]
        assert "(default: " in described


# ---------------------------------------------------------------- exit


def test_the_exit_code_is_what_main_returns():
    assert run("return 0").returncode == 0
    assert run("return 3").returncode == 3


def test_an_expected_failure_is_one_line_and_exit_code_one():
    done = run("raise MinerError('it [bold]went\\nwrong ' + 'x' * 200)")
    assert done.returncode == 1
    assert done.stderr == f"try_it.py: it [bold]went wrong {'x' * 200}\n"
    assert done.stdout == ""


def test_results_that_a_full_disk_does_not_take_are_one_line():
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            script("print('a result')\nreturn 0"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        1,
        "try_it.py: standard output cannot be written (the disk is full); free some disk space.\n",
    )


@pytest.mark.parametrize("text", ["1999-12-31", "9999-12-31T23:59-14:00", "0001-01-01T00:00+14:00"])
def test_a_time_that_no_market_had_is_refused(text):
    with pytest.raises(ConfigError, match=r"is out of range; write a time from 2000 to 2100\.$"):
        moment(text)


def test_a_bug_keeps_its_traceback():
    done = run("return 1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


FAILS_UNDER_A_BAR = """\
with progress() as bar:
    task = bar.add_task('training', total=10)
    bar.advance(task)
    time.sleep(0.2)
    raise MinerError('it went wrong.')
"""


def test_in_a_pipe_a_failure_under_a_progress_bar_is_one_line():
    assert run(FAILS_UNDER_A_BAR).stderr == "try_it.py: it went wrong.\n"


def test_on_a_terminal_a_failure_under_a_progress_bar_is_a_line_of_its_own():
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    subprocess.run(script(FAILS_UNDER_A_BAR), stderr=terminal, env=environment, check=False)
    shown = os.read(controller, 100_000).decode()
    os.close(terminal)
    os.close(controller)
    assert "training" in shown
    last = shown.rstrip("\r\n").rsplit("\n", 1)[1]
    assert last.removeprefix("\x1b[?25h") == "try_it.py: it went wrong."


def test_fetched_days_move_a_bar_with_rate_and_remaining_time():
    body = """\
with showing_days() as show:
    for day in range(1, 31):
        show(day, 40, 'BTC from binance')
        time.sleep(0.01)
return 0
"""
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(script(body), stderr=terminal, env=environment, check=False)
    shown = os.read(controller, 100_000).decode()
    os.close(terminal)
    os.close(controller)
    assert done.returncode == 0
    last = shown.rsplit("BTC from binance", 1)[1]
    assert "30/40" in last
    assert "/s" in last  # the rate
    assert last.count(":") >= 4  # time past and time left


def test_an_interrupt_is_one_line_and_exit_code_130():
    body = "print('ready', flush=True)\ntime.sleep(60)"
    with subprocess.Popen(script(body), stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "try_it.py: interrupted.\n"


@pytest.mark.parametrize(
    "body",
    [
        "for number in range(100_000): print(number)\nreturn 0",
        "for number in range(2_000): table('t', ['a'], [[number]])\nreturn 0",
    ],
)
def test_a_reader_that_goes_away_is_no_news(body):
    with subprocess.Popen(script(body), stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=30)
    assert errors == ""


# ---------------------------------------------------------------- tables and log lines


def test_numbers_are_aligned_right_and_text_left(capsys):
    table("Scores", ["asset", "score"], [["BTC", "0.9"], ["HYPE", 10.25], ["XAU", None]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Scores"
    rows = [line.rstrip() for line in lines if line.strip().startswith(("BTC", "HYPE", "XAU"))]
    assert len({len(row) for row in rows}) == 1
    assert [row.split()[-1] for row in rows] == ["0.9", "10.25", "–"]
    assert {row.index(row.split()[0]) for row in rows} == {1}


def test_a_table_fits_into_eighty_columns_of_a_pipe():
    words = " ".join(f"word{number}" for number in range(40))
    done = run(f"table('T', ['asset', 'n', 'why'], [['BTC', 123456, {words!r}]])\nreturn 0")
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert all(f"word{number}" in done.stdout for number in range(40))
    assert "123456" in done.stdout


def test_lines_of_a_table_in_a_pipe_end_with_their_text():
    done = run("table('T', ['asset', 'why'], [['BTC', 'x'], ['HYPE', 'a longer one']])\nreturn 0")
    assert done.stdout
    assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []


def test_square_brackets_in_a_cell_are_text(capsys):
    table("T", ["a"], [["[red]x[/red]"]])
    assert "[red]x[/red]" in capsys.readouterr().out


def test_a_log_line_is_keys_and_values(capsys):
    configure_logging("info")
    logging.getLogger("miner").info("answered in time", extra={"asset": "BTC", "note": 'a "b"'})
    logging.getLogger("miner").debug("not shown")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("time=20")
    assert line.endswith(
        'Z level=info logger=miner event="answered in time" asset=BTC note="a \\"b\\""\n'
    )


def test_a_log_line_break_cannot_forge_a_second_line(capsys):
    configure_logging("info")
    logging.getLogger("miner").warning("one\nlevel=error two")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_logged_exception_brings_its_traceback(capsys):
    configure_logging("info")
    try:
        int("broken")
    except ValueError:
        logging.getLogger("miner").exception("failed")
    assert "ValueError: invalid literal" in capsys.readouterr().err
