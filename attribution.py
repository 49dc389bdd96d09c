"""What the engine's score is lost to, part by part, measured in hindsight.

Every part of a forecast is replaced by the best that could have been chosen once
the outcomes were known; the score that this saves is what the part costs. Parts
overlap, so losses do not add up. Hindsight also fits noise: so the same is done to
worlds whose outcomes are drawn from the forecasts themselves, where nothing is
wrong, and `expected_bp` says what it saves there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import product
from typing import Final, TypeAlias

import numpy as np

from comparison import newey_west_error
from domain import FloatArray, ForecastRequest
from forecast_engine import centre_path, draw, request_rng
from market_view import MarketView
from path_simulator import PathShape
from protocol import Competition
from scoring import score_paths

FACTORS: Final = tuple(np.exp(np.linspace(-0.6, 0.6, 13)).tolist())  # of the scale
DRIFTS: Final = tuple(np.linspace(-0.4, 0.4, 9).tolist())  # in spreads of the last point
TAILS: Final = (4.0, 6.0, 10.0, 20.0, 80.0)  # degrees of freedom
DISPERSIONS: Final = tuple(product((0.05, 0.2, 0.35), (0.05, 0.25, 0.45)))  # per path, slow
ENSEMBLES: Final = 4  # of the usual size, that together stand for "many paths"
IMAGINED: Final = 2  # worlds, their outcomes drawn from the forecasts
IMAGINED_SEED: Final = 1_000_003  # apart from the random numbers of the answers
STEPS: Final = 2 + len(DRIFTS) + len(FACTORS) + len(TAILS) + len(DISPERSIONS)  # of `on_step`


class Part(StrEnum):
    """The parts of a forecast that are replaced."""

    CENTRE = "centre"  # the realised mean move of every prompt
    DRIFT = "drift"  # one drift for all prompts
    TOO_WIDE = "too_wide"  # the best factor of every prompt, where it is below 1
    TOO_NARROW = "too_narrow"  # ... where it is above 1
    LEVEL = "level"  # one factor for all prompts
    TAILS = "tails"  # one number of degrees of freedom for all prompts
    DISPERSION = "dispersion"  # one pair of volatility dispersions for all prompts
    ENSEMBLE = "ensemble"  # more paths


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Occasion:
    """A past prompt as the engine saw it, and what came true.

    `realised` (n_points,): prices, NaN where unknown.
    """

    request: ForecastRequest
    view: MarketView
    realised: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What one part costs. 1 bp is 0.01 % of the mean score."""

    part: Part
    lost_bp: float  # what hindsight saves
    error_bp: float  # standard error of `lost_bp`
    expected_bp: float  # what it saves where nothing is wrong
    hindsight: str  # what would have been best, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """The losses of one market, all over the same prompts."""

    prompts: int
    score: float  # mean, as the engine answered
    losses: tuple[Loss, ...]


def attribute(
    occasions: Sequence[Occasion],
    competition: Competition,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Attribution:
    """Measure every part over the same prompts with the same random numbers.

    `occasions` in time order. `on_step` is called `STEPS` times on the way. Raises:
    DataError if nothing of an outcome is known.
    """
    answers = _Answers.draw(occasions, competition, seed, on_step)
    losses = (
        *_centre_losses(answers),
        *_scale_losses(answers),
        _tail_loss(answers),
        _dispersion_loss(answers),
        _ensemble_loss(answers),
    )
    score = float(answers.given[0].mean())
    return Attribution(prompts=len(occasions), score=score, losses=losses)


# ---------------------------------------------------------------- answers and scores

Variant: TypeAlias = Callable[[Occasion, FloatArray], FloatArray]  # paths to changed paths


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Answers:
    """All prompts as they were answered, in the real world (the first) and imagined ones.

    `given` (worlds, prompts): scores of the answers.
    """

    occasions: Sequence[Occasion]
    competition: Competition
    seed: int
    on_step: Callable[[], None]
    paths: list[FloatArray]
    outcomes: list[list[FloatArray]]  # by prompt, then by world
    given: FloatArray

    @classmethod
    def draw(
        cls,
        occasions: Sequence[Occasion],
        competition: Competition,
        seed: int,
        on_step: Callable[[], None],
    ) -> "_Answers":
        paths = [_answer(occasion, seed) for occasion in occasions]
        outcomes = [[occasion.realised, *_imagine(occasion, seed)] for occasion in occasions]
        drawn = cls(
            occasions=occasions,
            competition=competition,
            seed=seed,
            on_step=on_step,
            paths=paths,
            outcomes=outcomes,
            given=np.empty(0),
        )
        return replace(drawn, given=drawn.rescored(lambda _, paths: paths))

    def score(self, prompt: int, paths: FloatArray, realised: FloatArray) -> float:
        """What paths score on a prompt, against any outcome."""
        increment_s = self.occasions[prompt].request.increment_s
        return score_paths(paths, realised, self.competition, increment_s=increment_s).total

    def rescored(self, variant: Variant) -> FloatArray:
        """Scores with every answer changed; (worlds, prompts)."""
        scores = []
        for prompt, (occasion, paths) in enumerate(zip(self.occasions, self.paths, strict=True)):
            changed = variant(occasion, paths)
            scores.append([self.score(prompt, changed, x) for x in self.outcomes[prompt]])
        self.on_step()
        return np.array(scores).T

    def table(self, variants: Sequence[Variant]) -> FloatArray:
        """Scores with each of the variants; (worlds, prompts, variants)."""
        # Variant by variant: what a shape of paths needs is computed once for all prompts.
        return np.stack([self.rescored(variant) for variant in variants], axis=2)

    def loss(self, part: Part, better: FloatArray, hindsight: str) -> Loss:
        """The loss from scores with the part replaced; `better` (worlds, prompts)."""
        saved = 1e4 * (self.given - better) / self.given.mean(axis=1, keepdims=True)
        start_ts = np.array([occasion.request.start_ts for occasion in self.occasions])
        horizon_s = self.occasions[0].request.length_s
        return Loss(
            part=part,
            lost_bp=float(saved[0].mean()),
            error_bp=newey_west_error(saved[0], start_ts, horizon_s=horizon_s),
            expected_bp=float(saved[1:].mean()),
            hindsight=hindsight,
        )


def _answer(occasion: Occasion, seed: int) -> FloatArray:
    """Paths (n, points), with the very random numbers of a replay with this seed."""
    request, view = occasion.request, occasion.view
    return draw(request, view, view.anchor_ts, request_rng(seed, request)).paths


def _imagine(occasion: Occasion, seed: int) -> list[FloatArray]:
    """Outcomes (points,) drawn from the forecast, unknown where the real one is."""
    # From a whole ensemble: in one of two paths the two would lie where quantiles do.
    drawn = _answer(occasion, seed + IMAGINED_SEED)
    chosen = np.random.default_rng([seed, occasion.request.start_ts]).choice(
        len(drawn), size=IMAGINED, replace=False
    )
    return [np.where(np.isfinite(occasion.realised), drawn[row], np.nan) for row in chosen]


def _best_for_all(table: FloatArray) -> FloatArray:
    """In every world the variant that is best on average; (worlds, prompts)."""
    best = table.mean(axis=1).argmin(axis=1)
    return np.take_along_axis(table, best[:, None, None], axis=2)[:, :, 0]


def _chosen(table: FloatArray) -> int:
    """The variant that is best on average in the real world."""
    return int(table[0].mean(axis=0).argmin())


# ---------------------------------------------------------------- centre


def _centre_losses(answers: _Answers) -> tuple[Loss, Loss]:
    known = np.array(
        [
            [
                answers.score(prompt, _with_move(occasion, paths, realised), realised)
                for realised in answers.outcomes[prompt]
            ]
            for prompt, (occasion, paths) in enumerate(
                zip(answers.occasions, answers.paths, strict=True)
            )
        ]
    ).T
    drifts = answers.table([partial(_with_drift, drift=drift) for drift in DRIFTS])
    drift = DRIFTS[_chosen(drifts)]
    sign = "+" if drift > 0 else "\N{MINUS SIGN}"
    words = f"{sign}{abs(drift):.1f} standard deviations of the end" if drift else "as forecast"
    return (
        answers.loss(Part.CENTRE, known, "the mean move of every prompt, as it came true"),
        answers.loss(Part.DRIFT, _best_for_all(drifts), words),
    )


def _with_move(occasion: Occasion, paths: FloatArray, realised: FloatArray) -> FloatArray:
    """Paths whose centre arrives where the last known price did."""
    last = int(np.flatnonzero(np.isfinite(realised))[-1])
    move = float(np.log(realised[last])) - _log_centre(occasion)[last]
    return _tilted(occasion, paths, move / _elapsed(occasion)[last])


def _with_drift(occasion: Occasion, paths: FloatArray, *, drift: float) -> FloatArray:
    return _tilted(occasion, paths, drift * float(np.log(paths[:, -1]).std()))


def _tilted(occasion: Occasion, paths: FloatArray, move: float) -> FloatArray:
    """Paths with a log move added that grows linearly from the last known price on."""
    return np.asarray(paths * np.exp(move * _elapsed(occasion)), dtype=np.float64)


def _elapsed(occasion: Occasion) -> FloatArray:
    """Share of the time from the last known price to the last point; (points,)."""
    since = occasion.request.grid_ts + occasion.view.scored_lag_s - occasion.view.anchor_ts
    return np.asarray(np.maximum(since, 1) / since[-1], dtype=np.float64)


def _log_centre(occasion: Occasion) -> FloatArray:
    """The forecast centre, log prices; (points,)."""
    points = occasion.request.grid_ts + occasion.view.scored_lag_s
    moves = centre_path(occasion.view, points)
    return np.asarray(np.log(occasion.view.anchor_price) + moves / 1e4, dtype=np.float64)


# ---------------------------------------------------------------- scale


def _scale_losses(answers: _Answers) -> list[Loss]:
    table = answers.table([partial(_scaled, factor=factor) for factor in FACTORS])
    chosen = np.array(FACTORS)[table.argmin(axis=2)]  # (worlds, prompts)
    losses = []
    for part, meant in ((Part.TOO_WIDE, chosen < 1), (Part.TOO_NARROW, chosen > 1)):
        words = f"on {meant[0].sum()} of {len(meant[0])} prompts"
        if meant[0].any():
            words += f", there × {np.median(chosen[0, meant[0]]):.2f} (median)"
        better = np.where(meant, table.min(axis=2), answers.given)
        losses.append(answers.loss(part, better, words))
    words = f"× {FACTORS[_chosen(table)]:.2f}"
    return [*losses, answers.loss(Part.LEVEL, _best_for_all(table), words)]


def _scaled(occasion: Occasion, paths: FloatArray, *, factor: float) -> FloatArray:
    """Paths `factor` times as far from their centre."""
    centre = _log_centre(occasion)
    return np.asarray(np.exp(centre + factor * (np.log(paths) - centre)), dtype=np.float64)


# ---------------------------------------------------------------- shape of the paths


def _tail_loss(answers: _Answers) -> Loss:
    changes = {f"{dof:g} degrees of freedom": partial(replace, tail_dof=dof) for dof in TAILS}
    return _shape_loss(answers, Part.TAILS, changes)


def _dispersion_loss(answers: _Answers) -> Loss:
    changes = {
        f"{path_sd:g} between paths, {slow_sd:g} within": partial(
            replace, path_sd=path_sd, slow_sd=slow_sd
        )
        for path_sd, slow_sd in DISPERSIONS
    }
    return _shape_loss(answers, Part.DISPERSION, changes)


def _shape_loss(
    answers: _Answers, part: Part, changes: Mapping[str, Callable[[PathShape], PathShape]]
) -> Loss:
    """The best of other shapes over all prompts, or the shape as it was."""
    variants = [
        partial(_reshaped, seed=answers.seed, change=change, made={}) for change in changes.values()
    ]
    table = np.concatenate([answers.given[:, :, None], answers.table(variants)], axis=2)
    words = ("as forecast", *changes)[_chosen(table)]
    return answers.loss(part, _best_for_all(table), words)


def _reshaped(
    occasion: Occasion,
    _: FloatArray,
    *,
    seed: int,
    change: Callable[[PathShape], PathShape],
    made: dict[PathShape, PathShape],
) -> FloatArray:
    # What a shape needs is kept as long as the shape: `made` holds it for all prompts.
    shape = made.setdefault(occasion.view.shape, change(occasion.view.shape))
    return _answer(replace(occasion, view=replace(occasion.view, shape=shape)), seed)


# ---------------------------------------------------------------- ensemble


def _ensemble_loss(answers: _Answers) -> Loss:
    """The mean score of several ensembles against that of all their paths together."""
    saved = np.zeros_like(answers.given)
    for prompt, (occasion, own) in enumerate(zip(answers.occasions, answers.paths, strict=True)):
        others = [_answer(occasion, answers.seed + extra) for extra in range(1, ENSEMBLES)]
        union = np.vstack([own, *others])
        for world, realised in enumerate(answers.outcomes[prompt]):
            single = [answers.score(prompt, paths, realised) for paths in (own, *others)]
            saved[world, prompt] = np.mean(single) - answers.score(prompt, union, realised)
    answers.on_step()
    n_paths = len(answers.paths[0])
    words = f"{ENSEMBLES * n_paths} paths instead of {n_paths}"
    return answers.loss(Part.ENSEMBLE, answers.given - saved, words)
