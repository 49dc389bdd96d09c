"""Moves at the asked points, whatever the steps between them."""

from dataclasses import replace

import numpy as np
import pytest

import path_simulator
import quantile_matching
from config import FREQUENCIES, NUM_PATHS, Frequency
from ensemble import draw_moves, prepare_drawing
from path_fitting import STARTING_SHAPES

HF, LF = FREQUENCIES[Frequency.HF], FREQUENCIES[Frequency.LF]


def moves_of(spec, *, lead_in_s, points, step_s, n_paths=400, seed=0, shape=None):
    """Moves over equal steps, the first point `lead_in_s` after the last known price."""
    fine = np.arange(0, (points - 1) * spec.prompt_increment_s + 1, step_s) + lead_in_s
    times = np.concatenate(([0], fine)) if lead_in_s else fine
    scale = np.sqrt(np.diff(times) / spec.bar_s)
    asked = lead_in_s + spec.prompt_increment_s * np.arange(points)
    shape = shape or STARTING_SHAPES[spec.frequency]
    rng = np.random.default_rng(seed)
    return draw_moves(rng, spec, scale, times, asked, shape, n_paths=n_paths)


def test_a_point_at_the_last_known_price_has_not_moved():
    moves = moves_of(LF, lead_in_s=0, points=13, step_s=300)
    assert moves.shape == (400, 13)
    assert np.all(moves[:, 0] == 0)


def test_point_zero_moves_when_it_lies_ahead_of_the_last_known_price():
    moves = moves_of(HF, lead_in_s=120, points=61, step_s=60)
    assert moves.shape == (400, 61)
    assert np.abs(moves[:, 0]).mean() == pytest.approx(np.sqrt(2), rel=0.15)


@pytest.mark.parametrize("step_s", [300, 150, 100, 60])
def test_finer_steps_give_the_same_spread_at_the_points(step_s):
    moves = moves_of(LF, lead_in_s=0, points=37, step_s=step_s)
    spread = np.diff(moves, axis=1).std()
    whole = moves_of(LF, lead_in_s=0, points=37, step_s=300, seed=1)
    assert spread == pytest.approx(np.diff(whole, axis=1).std(), rel=0.05)
    assert moves[:, -1].std() == pytest.approx(whole[:, -1].std(), rel=0.12)


def test_the_same_seed_gives_the_same_bytes():
    one = moves_of(HF, lead_in_s=120, points=61, step_s=60, seed=7)
    two = moves_of(HF, lead_in_s=120, points=61, step_s=60, seed=7)
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("spec", FREQUENCIES.values())
def test_after_preparing_the_usual_prompt_works_out_no_table(spec, monkeypatch):
    shape = replace(STARTING_SHAPES[spec.frequency], tail_dof=7.125)  # nobody else's

    def draw():
        step_s, points = spec.prompt_increment_s, spec.prompt_length_s // spec.prompt_increment_s
        given = {"lead_in_s": 0, "points": points + 1, "step_s": step_s, "n_paths": NUM_PATHS}
        return moves_of(spec, **given, shape=shape)

    def refuse(*_args):
        raise AssertionError("a table was worked out")

    table_of = path_simulator.unit_t_quantiles

    def only_normal(dof):  # every shape's volatilities are drawn from this one
        return table_of(dof) if np.isinf(dof) else refuse()

    prepare_drawing(spec, shape)
    with monkeypatch.context() as patched:
        patched.setattr(path_simulator, "unit_t_quantiles", only_normal)
        patched.setattr(quantile_matching, "_mixture_spreads", refuse)
        prepared = draw()
        shape = replace(shape, tail_dof=7.25)
        with pytest.raises(AssertionError, match="worked out"):
            draw()
    assert prepared.shape[0] == NUM_PATHS
