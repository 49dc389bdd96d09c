"""The work folder: found again by content, and never mixed."""

import json

import numpy as np
import pytest

from backtest_store import (
    append_score,
    differing,
    export_prediction,
    interrupted_run,
    load_prediction,
    load_scores,
    note_run,
    prediction_file,
)
from domain import ForecastRequest
from errors import DataError, StateError

REQUEST = ForecastRequest(
    asset="BTC", start_ts=1_764_547_500, increment_s=60, length_s=120, num_paths=2
)
PATHS = np.array([[1.5, 2.25, 3.0], [1.5, 2.0, 91234.567]])


# ---------------------------------------------------------------- scores


def test_scores_come_back_and_the_last_of_two_wins(tmp_path):
    file = tmp_path / "scores" / "x.jsonl"
    assert load_scores(file) == {}
    for entry in ({"start_ts": 60, "v": 1}, {"start_ts": 120, "v": 2}, {"start_ts": 60, "v": 3}):
        append_score(file, entry)
    assert load_scores(file) == {
        60: {"start_ts": 60, "v": 3},
        120: {"start_ts": 120, "v": 2},
    }


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path, cut):
    file = tmp_path / "x.jsonl"
    append_score(file, {"start_ts": 60, "v": "kept"})
    whole = file.read_bytes()
    append_score(file, {"start_ts": 120, "v": "cut off by a crash"})
    file.write_bytes(file.read_bytes()[: len(whole) + cut])
    append_score(file, {"start_ts": 180, "v": "after it"})
    assert sorted(load_scores(file)) == [60, 180]


@pytest.mark.parametrize("damage", [b"null", b"[]", b"{}", b'{"start_ts": null}', b"\xff\xfe"])
def test_a_line_that_is_no_score_is_left_out(tmp_path, damage):
    file = tmp_path / "x.jsonl"
    append_score(file, {"start_ts": 60})
    file.write_bytes(file.read_bytes() + damage + b"\n")
    assert list(load_scores(file)) == [60]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "scores").write_text("a file in the way")
    with pytest.raises(StateError, match=r"cannot be written .* --work-dir\.$"):
        append_score(tmp_path / "scores" / "x.jsonl", {"start_ts": 60})


# ---------------------------------------------------------------- runs


def test_a_run_that_ended_is_not_remembered_and_an_interrupted_one_is(tmp_path):
    assert interrupted_run(tmp_path) is None
    note_run(tmp_path, {"seed": 0}, ended=False)
    assert interrupted_run(tmp_path) == {"seed": 0}
    note_run(tmp_path, {"seed": 0}, ended=True)
    assert interrupted_run(tmp_path) is None
    (tmp_path / "last_run.json").write_bytes(b"{")
    assert interrupted_run(tmp_path) is None


def test_what_differs_is_said_in_words():
    before = {"seed": 0, "assets": ["BTC", "ETH"], "days": 365}
    now = {"seed": 1, "assets": [], "days": 365}
    assert differing(before, now) == ["seed 0, now 1", "assets BTC, ETH, now none"]


# ---------------------------------------------------------------- predictions


def exported(folder):
    paths = load_prediction(prediction_file(folder, REQUEST))
    assert paths is not None
    return paths.tolist()


def test_a_prediction_lies_where_the_official_back_tester_looks(tmp_path):
    export_prediction(tmp_path, REQUEST, PATHS)
    file = tmp_path / "miner_outputs/lgbm-miner/predictions/2025-12-01_00:05:00Z_BTC_120.json"
    assert prediction_file(tmp_path, REQUEST) == file
    assert json.loads(file.read_text()) == {
        "start_timestamp": "2025-12-01T00:05:00+00:00",
        "asset": "BTC",
        "time_increment": 60,
        "time_length": 120,
        "num_simulations": 2,
        "num_steps": 2,
        "paths": PATHS.tolist(),
    }


def test_exporting_twice_is_fine_and_other_files_are_left_alone(tmp_path):
    other = prediction_file(tmp_path, REQUEST).parent / "notes.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    for _ in range(2):
        export_prediction(tmp_path, REQUEST, PATHS)
    assert other.read_text() == "mine"
    assert exported(tmp_path) == PATHS.tolist()


def test_another_answer_to_the_same_prompt_is_an_error_and_stays(tmp_path):
    export_prediction(tmp_path, REQUEST, PATHS)
    with pytest.raises(DataError, match="holds another answer to this prompt"):
        export_prediction(tmp_path, REQUEST, PATHS + 0.5)
    assert exported(tmp_path) == PATHS.tolist()


def test_something_that_is_no_prediction_is_not_overwritten(tmp_path):
    file = prediction_file(tmp_path, REQUEST)
    file.parent.mkdir(parents=True)
    file.write_text("not JSON")
    with pytest.raises(DataError, match="is in the way and is no prediction"):
        export_prediction(tmp_path, REQUEST, PATHS)
    assert file.read_text() == "not JSON"
