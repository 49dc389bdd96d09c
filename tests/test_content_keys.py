"""Keys: they change with everything that a result depends on, and with nothing else."""

from dataclasses import replace

import numpy as np

import content_keys
from content_keys import bars_key, content_key, program_key
from tests.test_baselines import history_of


def test_a_key_depends_on_every_part_and_not_on_the_order_of_names():
    assert content_key(1, {"a": 1, "b": 2}) == content_key(1, {"b": 2, "a": 1})
    assert content_key(1, 2) != content_key(2, 1)


def test_the_key_of_bars_depends_on_every_column():
    history = history_of(np.ones(20))
    keys = {bars_key(history)}
    for column in ("open", "high", "low", "close", "volume"):
        values = getattr(history.bars, column).copy()
        values[3] = 1.0
        keys.add(bars_key(replace(history, bars=replace(history.bars, **{column: values}))))
    keys.add(bars_key(history.known_at(history.bars.end_ts - 60)))
    assert len(keys) == 7
    assert bars_key(history_of(np.ones(20))) in keys


def test_the_program_key_follows_imports(monkeypatch, tmp_path):
    (tmp_path / "top.py").write_text("import json\nfrom middle import x\n")
    (tmp_path / "middle.py").write_text("def f():\n    import deep\n")
    (tmp_path / "deep.py").write_text("")
    (tmp_path / "apart.py").write_text("")
    monkeypatch.setattr(content_keys, "PROGRAM", tmp_path)

    def key():
        program_key.cache_clear()
        return program_key("top")

    before = key()
    (tmp_path / "apart.py").write_text("changed = 1")
    assert key() == before
    (tmp_path / "deep.py").write_text("changed = 1")
    assert key() != before
    program_key.cache_clear()


def test_what_scores_depend_on_is_in_the_program_key():
    reached = content_keys._imported_from("walk_forward")
    needed = {"features", "lgbm_trainer", "forecast_engine", "scoring", "config", "domain"}
    assert needed < reached
    assert not {"console", "miner", "report"} & reached
