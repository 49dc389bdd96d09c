"""The back-test as it is run: from the command line, in processes, interrupted and repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import backtest
from backtest_store import interrupted_run
from config import DAY_S, Frequency
from errors import ConfigError, DataError, MinerError, StateError
from settings import Settings
from tests.conftest import TRAINED_DAYS_BEFORE_END
from tests.test_walk_forward import DAYS, keep_as_trained
from walk_forward import Market

SCRIPT = Path(backtest.__file__)
PROMPTS = 16  # enough for two chunks
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def train_until(archive):
    return archive.now() - TRAINED_DAYS_BEFORE_END * DAY_S + 60


@pytest.fixture(scope="module")
def arguments(archive_dir, train_until):
    """What names the small market of the tests."""
    return [
        *("--source", "archive", "--archive-dir", str(archive_dir)),
        *("--days", str(DAYS[Frequency.HF]), "--prompts", str(PROMPTS)),
        *("--train-until", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(train_until))),
        *("--asset", "BTC", "--frequency", "hf", "--baselines", "reference,ewma_t"),
    ]


@pytest.fixture(scope="module")
def make_work_dir(archive_dir, trained, train_until, tmp_path_factory):
    """Work folders in which the models are trained already."""

    def make():
        work_dir = tmp_path_factory.mktemp("work")
        market = Market(
            asset="BTC",
            frequency=Frequency.HF,
            settings=Settings(source="archive", archive_dir=archive_dir, days=DAYS[Frequency.HF]),
            train_until=train_until,
            baselines=("reference",),
            work_dir=work_dir,
        )
        keep_as_trained(market, trained[Frequency.HF])
        return work_dir

    return make


def command(*words):
    return [sys.executable, str(SCRIPT), *map(str, words)]


def run(*words):
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ONE_THREAD, "COLUMNS": "100"},
    )


@pytest.fixture(scope="module")
def finished(arguments, make_work_dir, tmp_path_factory):
    """A run with everything that it writes."""
    folder = tmp_path_factory.mktemp("finished")
    work_dir = make_work_dir()
    outputs = ("--json", folder / "a.json", "--export-predictions", folder / "out")
    done = run(*arguments, *outputs, "--work-dir", work_dir, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    return done, folder, work_dir


# ---------------------------------------------------------------- a whole run


def test_a_run_ends_with_tables_and_writes_what_was_asked_for(finished):
    done, folder, _ = finished
    assert "too few prompts: under 30, or of under 5 days, they decide nothing;" in done.stdout
    assert "n/a" in done.stdout  # no oracle was asked for
    for words in ("÷ reference", "÷ ewma_t", "80 % covers", "ewma_t", "volatility", "BTC hf"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    document = json.loads((folder / "a.json").read_bytes())
    (market,) = document["markets"]
    assert len(market["prompts"]) == PROMPTS
    assert market["competition"] == "crypto-1h"
    assert set(market["prompts"][0]["scores"]) == {"engine", "reference", "ewma_t"}
    files = list((folder / "out/miner_outputs/lgbm-miner/predictions").glob("*_BTC_3600.json"))
    assert len(files) == PROMPTS


def test_nothing_is_written_beside_the_folders_that_were_named(finished, tmp_path):
    assert list(tmp_path.iterdir()) == []  # the working directory: no models/, no state/


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(
    finished, arguments, make_work_dir, tmp_path
):
    _, folder, _ = finished
    work_dir, result = make_work_dir(), tmp_path / "c.json"
    words = (*arguments, "--work-dir", work_dir, "--json", result, "--jobs")
    process = subprocess.Popen(
        command(*words, 2), stderr=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD}
    )
    try:
        while not (kept := scored_lines(work_dir)) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, complaint
    assert "repeat the command to go on" in complaint
    assert "Traceback" not in complaint
    assert not result.exists()
    kept = scored_lines(work_dir)
    assert 0 < len(kept) < PROMPTS
    assert run(*words, 1).returncode == 0
    assert scored_lines(work_dir)[: len(kept)] == kept
    assert len(scored_lines(work_dir)) == PROMPTS
    # Neither the interrupt nor the number of processes nor the folder shows.
    assert result.read_bytes() == (folder / "a.json").read_bytes()


def scored_lines(work_dir):
    lines = [
        line
        for file in (work_dir / "scores").glob("*.jsonl")
        for line in file.read_bytes().splitlines()
    ]
    return [line for line in lines if line]


def test_a_run_in_closed_form_is_scored_beside_the_drawn_one_and_not_mixed(
    finished, arguments, monkeypatch, capsys, tmp_path
):
    _, folder, work_dir = finished
    before = scored_lines(work_dir)
    words = (*arguments, "--closed-form", "--work-dir", work_dir, "--jobs", 1, "--json")
    done = run(*words, tmp_path / "closed.json")
    assert done.returncode == 0, done.stderr
    assert "Mean score in closed form, lower is better" in done.stdout
    added = [line for line in scored_lines(work_dir) if line not in before]
    assert len(added) == PROMPTS
    closed, drawn = (
        json.loads(file.read_bytes()) for file in (tmp_path / "closed.json", folder / "a.json")
    )
    assert closed["settings"] == {**drawn["settings"], "closed_form": True}
    ours, theirs = (each["markets"][0]["summary"]["parts"]["total"] for each in (closed, drawn))
    assert ours["score"] == pytest.approx(theirs["score"], rel=0.003)
    assert ours["ratios"].keys() == theirs["ratios"].keys()
    assert main(monkeypatch, *words, tmp_path / "again.json") == 0  # needs no work
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "closed.json").read_bytes()
    assert main(monkeypatch, "compare", tmp_path / "closed.json", tmp_path / "again.json") == 0
    assert "no clear difference" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="laws in closed form, the other paths"):
        main(monkeypatch, "compare", tmp_path / "closed.json", folder / "a.json")


# ---------------------------------------------------------------- repeated in this process


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["backtest.py", *map(str, words)])
    return backtest.main()


def test_repeating_a_finished_run_needs_no_work(finished, arguments, monkeypatch, tmp_path):
    _, folder, work_dir = finished
    monkeypatch.setattr(backtest, "open_pool", None)  # it would be called otherwise
    again = tmp_path / "again.json"
    assert main(monkeypatch, *arguments, "--work-dir", work_dir, "--json", again) == 0
    assert again.read_bytes() == (folder / "a.json").read_bytes()


def test_other_settings_after_an_interrupt_are_named(finished, arguments, monkeypatch, capsys):
    _, _, work_dir = finished
    (work_dir / "last_run.json").write_text('{"ended": false, "settings": {"seed": 5}}')
    assert main(monkeypatch, *arguments, "--work-dir", work_dir) == 0
    told = capsys.readouterr().err
    assert "had other settings (seed 5, now 0;" in told
    assert "nothing of it is mixed" in told
    assert main(monkeypatch, *arguments, "--work-dir", work_dir) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flag", "name", "complaint"),
    [
        ("--report", "notes", "notes is not a folder; name one with --report."),
        ("--export-predictions", "notes/x", "notes is not a folder; name one with --export-pred"),
        ("--json", "notes/x.json", "notes is not a folder; name one with --json."),
        ("--json", ".", ". is a folder; name a file with --json."),
        ("--json", "link", "link is a link or a device, and a file would take its place; name a"),
        ("--json", "/dev/null", "/dev/null is a link or a device, and a file would take its "),
        (
            "--json",
            f"{'a' * 300}/x.json",
            f"{'a' * 300} cannot be reached (File name too long); let",
        ),
    ],
)
def test_what_cannot_be_written_is_known_before_the_work(
    arguments, monkeypatch, tmp_path, flag, name, complaint
):
    Path("notes").write_text("no folder")
    Path("link").symlink_to("notes")
    monkeypatch.setattr(backtest, "open_pool", None)  # it would be called otherwise
    with pytest.raises(StateError) as caught:
        main(monkeypatch, *arguments, flag, name, "--work-dir", tmp_path / "work")
    assert str(caught.value).startswith(complaint)
    assert not (tmp_path / "work").exists()  # nothing is remembered as interrupted


def test_a_run_whose_results_could_not_be_written_was_not_interrupted(
    finished, arguments, monkeypatch, tmp_path, capsys
):
    work_dir, file = finished[2], tmp_path / "out" / "a.json"

    def disk_fills_up(*_):
        raise StateError("the disk is full; free some.")

    with monkeypatch.context() as patch:
        patch.setattr(backtest, "write_atomically", disk_fills_up)
        with pytest.raises(StateError):
            main(patch, *arguments, "--work-dir", work_dir, "--json", file)
    assert main(monkeypatch, *arguments, "--seed", 0, "--work-dir", work_dir) == 0
    assert interrupted_run(work_dir) is None
    assert "interrupted" not in capsys.readouterr().err


def test_a_run_compared_with_itself_changes_nothing(finished, monkeypatch, capsys):
    result = finished[1] / "a.json"
    assert main(monkeypatch, "compare", result, result) == 0
    printed = capsys.readouterr().out
    assert "1.0000" in printed
    assert "Decision: keep the champion: no clear difference" in printed


# ---------------------------------------------------------------- bad input, one sentence each


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        (("--baselines", "har,gutfeeling"), ConfigError, "baseline 'gutfeeling' is unknown; "),
        (("--baselines", ""), ConfigError, "baseline '' is unknown; "),
        (("--profile", "1999-01"), ConfigError, "profile='1999-01' from --profile is unknown; "),
        (("--prompts", "0"), ConfigError, "--prompts 0 is too few; "),
        (("--asset", "ETH"), DataError, "ETH is not in this source; it has BTC, XAU"),
        (("--train-until", "yesterday"), ConfigError, "'yesterday' is not an ISO 8601 time; "),
        (("--closed-form", "--report", "r"), ConfigError, "--report needs paths, which "),
        (
            ("--closed-form", "--export-predictions", "out"),
            ConfigError,
            "--export-predictions needs paths, which --closed-form does not draw; ",
        ),
        (
            ("--closed-form", "--baselines", "ewma_t,garch_t"),
            ConfigError,
            "baseline garch_t has no law in closed form; ",
        ),
        (("--jobs", "0"), ConfigError, "jobs=0 from --jobs is out of range; "),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments, monkeypatch, words, kind, sentence):
    with pytest.raises(kind) as caught:
        main(monkeypatch, *arguments, *words)
    assert str(caught.value).startswith(sentence)


def test_an_asset_without_the_frequency_is_one_sentence(archive_dir, monkeypatch):
    words = ("--source", "archive", "--archive-dir", archive_dir, "--asset", "XAU")
    with pytest.raises(DataError, match="XAU has no bars for hf; "):
        main(monkeypatch, *words, "--frequency", "hf")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no prompt time"),
        ("1764547200\n\nsoon\n", "line 3: 'soon' is no time"),
        ("-5\n", "line 1: '-5' is no time"),
        (f"{10**30}\n", "line 1: '10+' is no time from 2000 to 2100"),
        ("9" * 5000, "line 1: '9{40}' is no time from 2000 to 2100"),
        (b"\xff\xfe\x00", "cannot be read: not a text file"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_of_prompt_times_is_read_with_care(
    arguments, monkeypatch, tmp_path, content, sentence
):
    file = tmp_path / "times.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    without = (
        arguments[: arguments.index("--prompts")] + arguments[arguments.index("--prompts") + 2 :]
    )
    with pytest.raises(DataError, match=sentence):
        main(monkeypatch, *without, "--prompt-times", file)


def replayed_at(monkeypatch, capsys, arguments, tmp_path, *lines, flags=()):
    """Exit code and complaints of a run with given prompt times."""
    file = tmp_path / "times.txt"
    file.write_text("\n".join(lines))
    position = arguments.index("--prompts")
    words = [*arguments[:position], *arguments[position + 2 :], "--prompt-times", file]
    code = main(monkeypatch, *words, *flags, "--work-dir", tmp_path / "work")
    return code, " ".join(capsys.readouterr().err.split())


def test_times_that_cannot_be_replayed_are_one_sentence(
    arguments, archive, monkeypatch, capsys, tmp_path
):
    end = archive.now()
    cases = {
        str(end - 40_000 // 60 * 60 - 30): "is off the grid; here prompts start",
        str(end): "lies outside the data, which serve prompts from",
        "2020-01-01T00:00:00Z": "lies outside the data, which serve prompts from",
        str(end - 5 * DAY_S): "so the models would know its outcome",
    }
    for line, sentence in cases.items():
        code, told = replayed_at(monkeypatch, capsys, arguments, tmp_path, line)
        assert code == 1
        assert told.startswith("BTC hf: ")
        assert told.endswith(".")
        assert sentence in told


def test_a_window_without_prompts_is_one_sentence(arguments, monkeypatch, capsys, tmp_path):
    words = ("--start", "2030-01-01", "--work-dir", tmp_path / "work")
    assert main(monkeypatch, *arguments, *words) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("BTC hf: no prompt fits between 2030-01-01T00:00:00Z and")


def test_files_that_are_no_results_are_not_compared(finished, monkeypatch, tmp_path):
    _, folder, _ = finished
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    for name, sentence in {
        "empty.json": "holds no results of this version's back-test",
        "broken.json": "is not valid JSON",
        "absent.json": "cannot be read: No such file",
    }.items():
        with pytest.raises(MinerError, match=sentence):
            main(monkeypatch, "compare", folder / "a.json", tmp_path / name)
