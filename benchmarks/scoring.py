"""How long scoring an answer takes, against a loop over properscoring.

    python -m benchmarks.scoring --source archive --archive-dir bars --model-dir models

Answers of the trained models to prompts of the past, each scored once by either. The
loop takes the same changes, column by column through `properscoring.crps_ensemble`
as it is installed (without numba, unless numba is there), and must come to the same
totals to 1e-9.
"""

import numpy as np
from properscoring import crps_ensemble

from benchmarks.measuring import (
    Row,
    bench_parser,
    bench_settings,
    finish,
    in_turn,
    milliseconds,
    ratio_row,
)
from config import DAY_S, FREQUENCIES, Frequency
from console import run_script
from data_fetcher import open_source
from domain import FloatArray
from errors import MinerError
from lgbm_predictor import load_model_set
from model_store import published_sets
from protocol import Competition, competition_like, protocol_profile
from replay import EngineForecaster, known_at_prompt, prompt_times, realised_path, usual_request
from scoring import score_factors, score_paths, scored_pairs
from settings import Settings
from wire_format import round_prices

TURNS = 5  # the loop takes seconds
DAYS = 14
LEAST_RATIO = 60.0
TOLERANCE = 1e-9


def main() -> int:
    """Score answers of one asset at both frequencies."""
    args = bench_parser("Time the scoring of an answer.", "scoring").parse_args()
    settings = bench_settings(args)
    rows = [_row(settings, args.asset.upper(), frequency) for frequency in Frequency]
    return finish(f"Scoring answers of {args.asset}", rows, args.rows)


def _row(settings: Settings, asset: str, frequency: Frequency) -> Row:
    competition = competition_like(protocol_profile(settings.profile), asset, frequency)
    step = FREQUENCIES[frequency].prompt_increment_s
    answers = _answers(settings, asset, frequency)
    totals: dict[str, list[float]] = {"ours": [], "loop": []}

    def ours(turn: int) -> None:
        card = score_paths(*answers[turn], competition, increment_s=step)
        totals["ours"].append(card.total)

    def loop(turn: int) -> None:
        totals["loop"].append(_loop(*answers[turn], competition, step))

    ours(-1)
    totals["ours"].clear()
    seconds = in_turn({"loop": loop, "ours": ours}, TURNS)
    difference = float(np.abs(np.divide(totals["ours"], totals["loop"]) - 1).max())
    if not difference <= TOLERANCE:
        raise MinerError(f"scores differ by {difference:.1e} of their size from properscoring's.")
    return ratio_row(
        seconds["loop"] / seconds["ours"],
        what=f"scoring one {frequency.value.upper()} answer",
        against="properscoring loop / ours",
        reach=LEAST_RATIO,
        at_least=True,
        detail=f"{milliseconds(seconds['loop'], seconds['ours'])}; equal to {difference:.0e}",
    )


def _answers(
    settings: Settings, asset: str, frequency: Frequency
) -> list[tuple[FloatArray, FloatArray]]:
    """Paths and what was realised, for every turn and one to warm up."""
    history = open_source(settings).load(asset, frequency).history
    engine = EngineForecaster(
        load_model_set(published_sets(settings.model_dir, asset, frequency)[0])
    )
    times = prompt_times(history, history.bars.end_ts - DAYS * DAY_S, None, TURNS + 1)
    rng = np.random.default_rng(settings.seed)
    answers = []
    for start_ts in times.tolist():
        request = usual_request(history, start_ts)
        paths = engine.paths(request, known_at_prompt(history, start_ts), rng)
        answers.append((round_prices(paths), realised_path(history, request)))
    return answers


def _loop(
    paths: FloatArray, realised: FloatArray, competition: Competition, increment_s: int
) -> float:
    """The score, one observation at a time."""
    factors = score_factors(competition, realised)
    pairs = scored_pairs(paths, realised, competition, increment_s=increment_s)
    return sum(factors[name] * _sum(observed, ensemble) for name, observed, ensemble in pairs)


def _sum(observed: FloatArray, simulated: FloatArray) -> float:
    pairs = zip(observed, simulated.T, strict=True)
    return sum(float(crps_ensemble(one, many)) for one, many in pairs if np.isfinite(one))


if __name__ == "__main__":
    run_script(main)
