"""The benchmarks' rows and verdicts; what they measure is timed by hand."""

import json
from functools import partial

import lightgbm
import numpy as np
import orjson
import pytest

from benchmarks.answers import _floor, _reference_way
from benchmarks.growth import _growth
from benchmarks.measuring import (
    Row,
    bench_parser,
    bench_settings,
    exit_code,
    finish,
    in_turn,
    load_rows,
    ratio_row,
)
from benchmarks.one_training import NOTHING, Cost, Fits, Time, fit_pools, train_twice
from benchmarks.run import rows_of
from benchmarks.serving import _with_own_shape
from config import NUM_PATHS
from domain import ForecastRequest
from lgbm_predictor import CALIBRATION
from model_store import MANIFEST, digest, is_sealed, seal_manifest
from path_simulator import PathShape, StepLaw
from settings import Settings
from wire_format import validate_answer


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
    assert row(1.0, limit="the encoder").verdict == "limited"


def test_rows_come_back_from_the_file_that_a_benchmark_left(tmp_path, capsys):
    rows = [row(3.0), row(1.0, limit="why")]
    assert finish("Speed", rows, tmp_path / "rows.json") == 0
    assert load_rows(tmp_path / "rows.json") == rows
    shown = capsys.readouterr().out
    assert "≥ 2" in shown
    assert "answer: limited by why\n" in shown


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


# ---------------------------------------------------------------- what is compared with


@pytest.fixture(scope="module")
def law():
    """Steps of an hour and their usual prompt."""
    request = ForecastRequest(
        asset="BTC", start_ts=1_768_500_060, increment_s=60, length_s=3600, num_paths=NUM_PATHS
    )
    times = np.concatenate(([request.start_ts - 60], request.grid_ts))
    shape = PathShape(tail_dof=8.0, path_sd=0.2, slow_sd=0.25, slow_half_life_s=2400.0)
    return request, StepLaw(
        price=97_123.456,
        times=times,
        points=request.grid_ts,
        scale=np.full(request.n_points, 4.0),
        shape=shape,
        centre=np.zeros(request.n_points),
    )


def test_what_the_reference_way_answers_passes_the_check_of_validators(law):
    request, steps = law
    validate_answer(json.loads(_reference_way(1, request, steps)), request)


def test_the_floor_encodes_as_many_numbers_as_an_answer_has_steps():
    assert np.array(json.loads(_floor(1, 288))).shape == (NUM_PATHS, 288)
    assert np.array(json.loads(_floor(1, 60))).shape == (NUM_PATHS, 60)


@pytest.mark.parametrize("with_judge", [True, False])
def test_a_fit_that_is_done_twice_is_the_fit_that_training_wants(with_judge):
    def data():
        rng = np.random.default_rng(5)
        x = rng.normal(size=(400, 4)).astype(np.float32)
        return lightgbm.Dataset(x, label=x[:, 0] + rng.normal(size=400))

    def fit(train):
        judge = {"valid_sets": [data()], "callbacks": [lightgbm.early_stopping(5, verbose=False)]}
        settings = {"verbosity": -1, "num_threads": 1, "deterministic": True, "seed": 3}
        return train(settings, data(), num_boost_round=20, **(judge if with_judge else {}))

    bare: list[lightgbm.Booster] = []

    def keep(*args, **options):
        bare.append(lightgbm.train(*args, **options))
        return bare[-1]

    wanted, fits = fit(lightgbm.train).model_to_string(), Fits()
    for _ in range(2):  # bare first, then last
        assert fit(partial(train_twice, keep, fits)).model_to_string() == wanted
    assert len(bare) == 4
    # Feature names aside, which a bare fit is not given, the trees are the same.
    assert {booster.model_to_string() for booster in bare} == {wanted}
    assert fits.extra.cpu_s >= fits.bare.cpu_s > 0


# ---------------------------------------------------------------- a whole run


def test_a_benchmark_that_fails_is_a_missed_row_and_the_others_are_kept(tmp_path, capfd):
    (failed,) = rows_of("scoring", ["--source=archive", f"--archive-dir={tmp_path}"], tmp_path)
    assert failed.verdict == "missed"
    assert exit_code([row(3.0), failed]) == 1
    assert "exit code 1" in failed.detail
    assert "no bars of a known asset" in capfd.readouterr().err


def test_settings_of_the_operators_own_miner_do_not_leak_in(tmp_path, monkeypatch):
    (tmp_path / "miner.toml").write_text("days = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LGBM_MINER_SEED", "9")
    plain = bench_settings(bench_parser("Time it.", "answers").parse_args([]))
    assert (plain.days, plain.seed) == (Settings().days, Settings().seed)


def test_a_training_leans_on_the_pools_that_were_fitted_beforehand(tmp_path):
    pools = fit_pools(Settings(source="simulated"), "BTC", tmp_path)
    assert pools.assets == ("BTC", "XAU", "SP500")
    assert all(path.exists() for path in pools.files)


def test_sets_that_are_lent_have_shapes_of_their_own():
    files = {
        CALIBRATION: orjson.dumps({"path_shape": {"path_sd": 0.2}}),
        MANIFEST: seal_manifest({"files": {CALIBRATION: ""}, "path_shape": {}}),
    }
    first, second = (_with_own_shape(files, number) for number in (0, 1))
    assert is_sealed(second[MANIFEST])
    assert orjson.loads(second[MANIFEST])["files"][CALIBRATION] == digest(second[CALIBRATION])
    assert first[CALIBRATION] != second[CALIBRATION]


def test_growth_is_that_of_the_increments_so_that_fixed_costs_do_not_hide_it():
    def costing(months, cpu_s):
        return Cost(
            whole=Time(cpu_s=cpu_s, wall_s=0.0), bare=NOTHING, rows=0, bars=months, peak_mb=0.0
        )

    linear = {months: costing(months, 100.0 + months) for months in (3, 6, 12)}
    square = {months: costing(months, 100.0 + months**2) for months in (3, 6, 12)}
    assert _growth(linear) == pytest.approx(1.0)
    assert _growth(square) == pytest.approx(2.0)
