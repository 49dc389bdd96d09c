"""How many prompts of history are replayed in a second, on one core.

    python -m benchmarks.replay --source archive --archive-dir bars --model-dir models

The drawn back-test with 1000 paths: distinct prompts, each answered by the engine of
the tables of skill from what was known then, scored, and its calibration taken. What
it comes to beside the baselines that a back-test draws by default is in the detail.
"""

from collections.abc import Iterator, Sequence
from time import thread_time

import numpy as np
from threadpoolctl import threadpool_limits

from baselines import ConstantSigma, EwmaStudentT, Forecaster
from benchmarks.measuring import Row, bench_parser, finish, ratio_row
from config import DAY_S, Frequency, Settings, competition_like, protocol_profile
from console import run_script, settings_from
from data_fetcher import open_source
from domain import FloatArray, IntArray, MarketHistory
from lgbm_predictor import load_model_set
from market_baselines import Har, Oracle, fit_har
from model_store import published_sets
from replay import EngineForecaster, known_at_prompt, prompt_times, replay

RUNS = 5
PROMPTS = 128  # a run
DAYS = 20
LEAST_RATE = {Frequency.LF: 8.0, Frequency.HF: 20.0}


def main() -> int:
    """Replay one asset at both frequencies."""
    args = bench_parser("Time the replay of history.", "replay").parse_args()
    settings = settings_from(args)
    with threadpool_limits(1):
        rows = [_row(settings, args.asset.upper(), frequency) for frequency in Frequency]
    return finish(f"Replay of {args.asset}", rows, args.rows)


def _row(settings: Settings, asset: str, frequency: Frequency) -> Row:
    history = open_source(settings).load(asset, frequency).history
    times = prompt_times(history, history.bars.end_ts - DAYS * DAY_S, None, RUNS * PROMPTS)
    alone = _rates(settings, history, (), times)
    beside = _rates(settings, history, _baselines(settings, history, times), times[:PROMPTS])
    return ratio_row(
        alone,
        what=f"replay of history, {frequency.value.upper()}",
        against="prompts/s",
        reach=LEAST_RATE[frequency],
        at_least=True,
        detail=f"{np.median(beside):.3g}/s beside 4 baselines",
    )


def _rates(
    settings: Settings, history: MarketHistory, baselines: Sequence[Forecaster], times: IntArray
) -> FloatArray:
    """Prompts per second of every run."""
    folder = published_sets(settings.model_dir, history.asset, history.frequency)[0]
    engine = EngineForecaster(load_model_set(folder))
    engine.view(known_at_prompt(history, int(times[0])))  # warm: a replay begins once
    return np.array(list(_runs(settings, history, engine, baselines, times)))


def _runs(
    settings: Settings,
    history: MarketHistory,
    engine: EngineForecaster,
    baselines: Sequence[Forecaster],
    times: IntArray,
) -> Iterator[float]:
    profile = protocol_profile(settings.profile)
    competition = competition_like(profile, history.asset, history.frequency)
    for begin in range(0, len(times), PROMPTS):
        run = times[begin : begin + PROMPTS]
        begun = thread_time()
        for _ in replay(history, engine, baselines, competition, run, seed=settings.seed):
            pass
        yield len(run) / (thread_time() - begun)


def _baselines(
    settings: Settings, history: MarketHistory, times: IntArray
) -> tuple[Forecaster, ...]:
    """Those that a back-test draws by default."""
    past = known_at_prompt(history, int(times[0]))
    har = Har(model=fit_har(past, days=settings.days))
    return (ConstantSigma(), EwmaStudentT.fit(past), har, Oracle(har=har, full=history))


if __name__ == "__main__":
    run_script(main)
