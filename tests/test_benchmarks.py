"""The benchmarks' rows and verdicts; what they measure is timed by hand."""

import numpy as np
import pytest

from benchmarks.measuring import Row, exit_code, finish, in_turn, load_rows, ratio_row


def row(value, *, at_least=True, limit=""):
    return Row(
        what="answer",
        against="floor",
        value=value,
        low=value,
        high=value,
        reach=2.0,
        at_least=at_least,
        limit=limit,
    )


@pytest.mark.parametrize(
    ("value", "at_least", "met"),
    [(2.0, True, True), (1.9, True, False), (2.0, False, True), (2.1, False, False)],
)
def test_a_row_is_met_at_its_bound_and_beyond(value, at_least, met):
    assert row(value, at_least=at_least).met is met


def test_a_missed_row_fails_the_run_unless_its_limit_is_documented():
    assert exit_code([row(3.0), row(1.0)]) == 1
    assert exit_code([row(3.0), row(1.0, limit="the encoder alone takes as long")]) == 0
    assert row(1.0).verdict == "missed"
    assert row(1.0, limit="the encoder").verdict == "the encoder"


def test_rows_come_back_from_the_file_that_a_benchmark_left(tmp_path, capsys):
    rows = [row(3.0), row(1.0, limit="why")]
    assert finish("Speed", rows, tmp_path / "rows.json") == 0
    assert load_rows(tmp_path / "rows.json") == rows
    assert "≥ 2" in capsys.readouterr().out


def test_the_spread_of_a_ratio_is_its_quartiles():
    ratios = np.arange(1.0, 102.0)
    found = ratio_row(
        ratios, what="answer", against="floor", reach=2.0, at_least=False, detail="1 / 2 ms"
    )
    assert (found.low, found.value, found.high) == (26.0, 51.0, 76.0)


def test_works_that_are_compared_take_turns():
    done: list[int] = []
    seconds = in_turn({"a": done.append, "b": lambda turn: done.append(-turn)}, 3)
    assert done == [0, 0, 1, -1, 2, -2]
    assert all(values.shape == (3,) and (values >= 0).all() for values in seconds.values())
