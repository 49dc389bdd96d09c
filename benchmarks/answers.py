"""How long a warm answer takes, and how far that is from the floor.

    python benchmarks/answers.py --source archive --archive-dir bars --model-dir models

Models and history are in memory. Every answer is a distinct request, from the
request object to encoded bytes; the floor draws the same count of normals, adds
them up, exponentiates and encodes them, and is measured in turn with the answers.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import FREQUENCIES, NUM_PATHS
from console import add_common_arguments, run_script, script_parser, settings_from, table
from data_fetcher import open_source
from domain import ForecastRequest
from errors import MinerError
from forecast_engine import ForecastEngine, Pair
from wire_format import encode_shadow_answer

REPEATS = 15


def main() -> int:
    """Time every trained asset and frequency."""
    options = script_parser(
        "Time warm answers against the floor.",
        examples=["python benchmarks/answers.py --source archive --archive-dir bars"],
    )
    add_common_arguments(options)
    settings = settings_from(options.parse_args())
    engine = ForecastEngine.open(open_source(settings), settings)
    if not engine.trained():
        raise MinerError(f"there are no models in {settings.model_dir}; train some first.")
    table(
        f"Warm answers, {NUM_PATHS} paths, median of {REPEATS} distinct requests",
        ("market", "answer ms", "range ms", "floor ms", "× floor"),
        [_row(engine, pair) for pair in engine.trained()],
    )
    return 0


def _row(engine: ForecastEngine, pair: Pair) -> tuple[str, ...]:
    asset, frequency = pair
    spec = FREQUENCIES[frequency]
    start = -(-engine.now() // 60) * 60
    requests = [
        ForecastRequest(
            asset=asset,
            start_ts=start + 60 * minute,
            increment_s=spec.prompt_increment_s,
            length_s=spec.prompt_length_s,
            num_paths=NUM_PATHS,
        )
        for minute in range(REPEATS + 1)
    ]
    _answer(engine, requests[-1])  # warm
    answers, floors = [], []
    for number, request in enumerate(requests[:-1]):
        answers.append(_ms(partial(_answer, engine, request)))
        floors.append(_ms(partial(_floor, number, request.n_points)))
    answer, floor = float(np.median(answers)), float(np.median(floors))
    spread = f"{min(answers):.0f}-{max(answers):.0f}"
    name = f"{asset} {frequency.value}"
    return (name, f"{answer:.1f}", spread, f"{floor:.1f}", f"{answer / floor:.2f}")


def _answer(engine: ForecastEngine, request: ForecastRequest) -> bytes:
    return encode_shadow_answer(engine.answer(request))


def _floor(seed: int, n_points: int) -> bytes:
    moves = np.random.default_rng(seed).standard_normal((NUM_PATHS, n_points))
    paths = 1e5 * np.exp(1e-4 * np.cumsum(moves, axis=1))
    return orjson.dumps(paths, option=orjson.OPT_SERIALIZE_NUMPY)


def _ms(work: Callable[[], object]) -> float:
    begun = perf_counter()
    work()
    return 1e3 * (perf_counter() - begun)


if __name__ == "__main__":
    run_script(main)
