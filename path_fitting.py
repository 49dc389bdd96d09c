"""Tails and dispersion of the paths, chosen by the score they would have earned.

A coordinate search over few values, each compared with the best so far on the
same prompts and the same random numbers. A change is kept only if its mean gain
exceeds its standard error: where a feed has too few prompts to tell, the
starting values stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Final

import numpy as np

from config import Frequency, FrequencySpec
from domain import FloatArray, IntArray
from ensemble import draw_moves
from features import Standardiser
from path_simulator import PathShape
from protocol import Competition
from scoring import score_paths
from uncertainty_engine import step_scales

# Starting values suit liquid crypto; every asset may move away from them.
STARTING_SHAPES: Final = {
    Frequency.HF: PathShape(
        tail_dof=12, path_sd=0.2, slow_sd=0.25, slow_half_life_s=2400, bar_s=60
    ),
    Frequency.LF: PathShape(
        tail_dof=40, path_sd=0.2, slow_sd=0.3, slow_half_life_s=21_600, bar_s=300
    ),
}
VARIATIONS: Final[tuple[Callable[[PathShape], PathShape], ...]] = (
    *(partial(replace, tail_dof=value) for value in (5.0, 8.0, 12.0, 40.0)),
    *(partial(replace, path_sd=value) for value in (0.1, 0.2, 0.3, 0.4)),
    *(partial(replace, slow_sd=value) for value in (0.1, 0.25, 0.4)),
)
SEARCH_PATHS: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PastPrompt:
    """A prompt whose outcome is known, with the scale that was forecast for it."""

    standardiser: Standardiser
    log_levels: FloatArray  # (buckets,)
    anchor_price: float
    anchor_ts: int
    point_ts: IntArray  # (points,), the times of the prices that are scored
    realised: FloatArray  # (points,), NaN where unknown


def search_shape(
    spec: FrequencySpec,
    competition: Competition,
    prompts: Sequence[PastPrompt],
    start: PathShape,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> PathShape:
    """The shape with the best score over the prompts, starting from `start`."""
    if not prompts:
        return start
    best, best_scores = start, _scores(spec, competition, prompts, start, seed)
    for vary in VARIATIONS:
        on_step()
        challenger = vary(best)
        if challenger == best:
            continue
        scores = _scores(spec, competition, prompts, challenger, seed)
        gain = best_scores - scores
        error = float(gain.std(ddof=1)) / np.sqrt(len(gain)) if len(gain) > 1 else np.inf
        if float(gain.mean()) > error:
            best, best_scores = challenger, scores
    return best


def _scores(
    spec: FrequencySpec,
    competition: Competition,
    prompts: Sequence[PastPrompt],
    shape: PathShape,
    seed: int,
) -> FloatArray:
    return np.array(
        [
            _score(spec, competition, prompt, shape, np.random.default_rng([seed, index]))
            for index, prompt in enumerate(prompts)
        ]
    )


def _score(
    spec: FrequencySpec,
    competition: Competition,
    prompt: PastPrompt,
    shape: PathShape,
    rng: np.random.Generator,
) -> float:
    times, scale = _steps(spec, prompt)
    moves = draw_moves(rng, spec, scale, times, prompt.point_ts, shape, n_paths=SEARCH_PATHS)
    paths = prompt.anchor_price * np.exp(moves / 1e4)
    increment_s = int(prompt.point_ts[1] - prompt.point_ts[0])
    return score_paths(paths, prompt.realised, competition, increment_s=increment_s).total


@lru_cache(maxsize=128)
def _steps(spec: FrequencySpec, prompt: PastPrompt) -> tuple[IntArray, FloatArray]:
    """Ends of a prompt's steps (n + 1,) and their scale (n,): the same for every shape."""
    times = np.unique(np.concatenate(([prompt.anchor_ts], prompt.point_ts)))
    return times, step_scales(spec, prompt.standardiser, prompt.log_levels, times)
