"""How long a warm answer takes, against the reference way and against the floor.

    python -m benchmarks.answers --source archive --archive-dir bars --model-dir models

Models and history are in memory. Every answer is a distinct request, from the
request object to encoded bytes; nothing is drawn beforehand. The reference way draws
from the same law one path at a time, rounds every number in Python to what both
digit rules accept and encodes with `json`. The floor draws the same count of
normals, adds them up, exponentiates and encodes them.
"""

import json
from math import floor, log10

import numpy as np
import orjson
from numpy.random import Generator
from scipy.signal import lfilter

from allocator import give_memory_back
from benchmarks.measuring import (
    Row,
    Work,
    bench_parser,
    bench_settings,
    finish,
    in_turn,
    milliseconds,
    ratio_row,
)
from config import FREQUENCIES, NUM_PATHS, Frequency
from console import run_script
from data_fetcher import open_source
from domain import FloatArray, ForecastRequest
from errors import MinerError
from forecast_engine import ForecastEngine, step_law
from lgbm_predictor import load_model_set
from model_store import published_sets
from path_simulator import StepLaw, mean_size_of_t
from replay import EngineForecaster
from settings import Settings
from wire_format import MAX_CHARACTERS, SIGNIFICANT_DIGITS, encode_prompt_json

TURNS = 40
REFERENCE_TURNS = 8  # the reference way takes most of a second
MOST_FLOORS = {Frequency.LF: 2.5, Frequency.HF: 3.0}
LEAST_REFERENCE = 15.0


def main() -> int:
    """Time the answers of one asset at both frequencies."""
    args = bench_parser("Time warm answers.", "answers").parse_args()
    give_memory_back()  # as the miner does
    settings = bench_settings(args)
    engine = ForecastEngine.open(open_source(settings), settings)
    rows = [
        row
        for frequency in Frequency
        for row in _rows(engine, settings, args.asset.upper(), frequency)
    ]
    return finish(f"Warm answers of {args.asset}, {NUM_PATHS} paths", rows, args.rows)


def _rows(
    engine: ForecastEngine, settings: Settings, asset: str, frequency: Frequency
) -> list[Row]:
    if (asset, frequency) not in engine.trained():
        raise MinerError(f"there are no {frequency.value} models of {asset}; train some first.")
    requests = _requests(engine, asset, frequency)
    law = _law(engine, settings, requests[0], frequency)

    def answer(turn: int) -> bytes:
        return encode_prompt_json(engine.answer(requests[turn]))

    def reference(turn: int) -> bytes:
        return _reference_way(turn, requests[turn], law)

    def least(turn: int) -> bytes:
        return _floor(turn, requests[turn].n_points - 1)

    answer(TURNS)  # warm
    against_reference: dict[str, Work] = {
        "reference": reference,
        "answer": lambda turn: answer(TURNS + 1 + turn),
    }
    slow = in_turn(against_reference, REFERENCE_TURNS)
    fast = in_turn({"answer": answer, "floor": least}, TURNS)
    name = f"{frequency.value.upper()} answer, warm"
    return [
        ratio_row(
            slow["reference"] / slow["answer"],
            what=name,
            against="reference way / answer",
            reach=LEAST_REFERENCE,
            at_least=True,
            detail=milliseconds(slow["reference"], slow["answer"]),
        ),
        ratio_row(
            fast["answer"] / fast["floor"],
            what=name,
            against="answer / floor",
            reach=MOST_FLOORS[frequency],
            at_least=False,
            detail=milliseconds(fast["answer"], fast["floor"]),
        ),
    ]


def _requests(engine: ForecastEngine, asset: str, frequency: Frequency) -> list[ForecastRequest]:
    """Distinct prompts of the usual kind: one for every turn, and one to warm up."""
    spec = FREQUENCIES[frequency]
    start = -(-engine.now() // 60) * 60
    return [
        ForecastRequest(
            asset=asset,
            start_ts=start + 60 * minute,
            increment_s=spec.prompt_increment_s,
            length_s=spec.prompt_length_s,
            num_paths=NUM_PATHS,
        )
        for minute in range(TURNS + 1 + REFERENCE_TURNS)
    ]


def _law(
    engine: ForecastEngine, settings: Settings, request: ForecastRequest, frequency: Frequency
) -> StepLaw:
    """What the engine draws from for a request."""
    folder = published_sets(settings.model_dir, request.asset, frequency)[0]
    known = engine.history(request.asset, frequency).known_at(engine.now())
    return step_law(request, EngineForecaster(load_model_set(folder)).view(known))


# ---------------------------------------------------------------- the floor


def _floor(seed: int, n_steps: int) -> bytes:
    moves = np.random.default_rng(seed).standard_normal((NUM_PATHS, n_steps))
    paths = 1e5 * np.exp(1e-4 * np.cumsum(moves, axis=1))
    return orjson.dumps(paths, option=orjson.OPT_SERIALIZE_NUMPY)


# ---------------------------------------------------------------- the reference way


def _reference_way(seed: int, request: ForecastRequest, law: StepLaw) -> bytes:
    rng = np.random.default_rng(seed)
    at = np.searchsorted(law.times, law.points)
    answer: list[object] = [request.start_ts, request.increment_s]
    for _ in range(NUM_PATHS):
        moves = np.insert(np.cumsum(_steps(rng, law)), 0, 0.0)
        path = law.price * np.exp((moves[at] + law.centre) / 1e4)
        answer.append([_rounded(price) for price in path.tolist()])
    return json.dumps(answer).encode()


def _steps(rng: Generator, law: StepLaw) -> FloatArray:
    """The steps of one path: Student-t, under a volatility of its own that comes and goes."""
    shape, n = law.shape, len(law.scale)
    decay = 0.5 ** (law.step_s / shape.slow_half_life_s)
    noise = rng.standard_normal(n) * np.sqrt(1 - decay**2)
    slow = lfilter([1.0], [1.0, -decay], noise)
    volatility = np.exp(shape.path_sd * rng.standard_normal() + shape.slow_sd * slow)
    shocks = rng.standard_t(shape.tail_dof, n) / mean_size_of_t(shape.tail_dof)
    return np.asarray(law.scale * volatility * shocks)


def _rounded(price: float) -> float:
    """A price with as many digits as both rules accept."""
    digits = SIGNIFICANT_DIGITS - 1 - floor(log10(price))
    rounded = round(price, digits)
    while len(str(rounded).replace(".", "")) > MAX_CHARACTERS:
        digits -= 1
        rounded = round(price, digits)
    return rounded


if __name__ == "__main__":
    run_script(main)
