"""How many prompts of history are replayed in a second, on one core.

    python -m benchmarks.replay --source archive --archive-dir bars --model-dir models

The drawn back-test with 1000 paths: distinct prompts, each answered by the engine of
the tables of skill from what was known then, scored, and its calibration taken; once
the engine alone, and once as `backtest.py` does it by default, beside four baselines.
Sets are trained until the replay begins, so that the regime controller has outcomes to
follow, as in a back-test.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import thread_time

import numpy as np
from threadpoolctl import threadpool_limits

from baselines import Forecaster
from benchmarks.measuring import Row, bench_parser, bench_settings, finish, ratio_row
from config import DAY_S, Frequency
from console import run_script
from data_fetcher import open_source
from domain import FloatArray, IntArray, MarketHistory
from lgbm_predictor import ModelSet, load_model_set
from lgbm_trainer import train
from model_store import publish_set
from protocol import protocol_profile
from replay import EngineForecaster, known_at_prompt, prompt_times, replay
from settings import Settings
from walk_forward import DEFAULT_BASELINES, Market, fit_baselines

RUNS = 5
PROMPTS = 128  # a run
DAYS = 20
LEAST_RATE = {Frequency.LF: 8.0, Frequency.HF: 20.0}


def main() -> int:
    """Replay one asset at both frequencies."""
    args = bench_parser("Time the replay of history.", "replay").parse_args()
    settings = bench_settings(args)
    with threadpool_limits(1):
        rows = [
            row for frequency in Frequency for row in _rows(settings, args.asset.upper(), frequency)
        ]
    return finish(f"Replay of {args.asset}", rows, args.rows)


def _rows(settings: Settings, asset: str, frequency: Frequency) -> list[Row]:
    history = open_source(settings).load(asset, frequency).history
    times = prompt_times(history, history.bars.end_ts - DAYS * DAY_S, None, RUNS * PROMPTS)
    past = known_at_prompt(history, int(times[0]))
    models = _trained(settings, past)
    market = Market(
        asset=asset,
        frequency=frequency,
        settings=settings,
        train_until=past.bars.end_ts,
        baselines=DEFAULT_BASELINES,
        work_dir=Path(),  # nothing is kept
    )
    beside = fit_baselines(market, history, past)
    return [
        ratio_row(
            _rates(market, history, models, baselines, times),
            what=f"replay, {frequency.value.upper()}, {who}",
            against="prompts/s",
            reach=LEAST_RATE[frequency],
            at_least=True,
            detail=f"{len(times)} prompts",
        )
        for who, baselines in (("engine and scores", ()), (f"with {len(beside)} baselines", beside))
    ]


def _trained(settings: Settings, past: MarketHistory) -> ModelSet:
    """The models that a back-test would replay with, but for what other assets teach."""
    result = train(
        past, days=settings.days, seed=settings.seed, profile=protocol_profile(settings.profile)
    )
    with TemporaryDirectory() as name:
        folder = publish_set(Path(name), past.asset, past.frequency, result.model_id, result.files)
        return load_model_set(folder)


def _rates(
    market: Market,
    history: MarketHistory,
    models: ModelSet,
    baselines: Sequence[Forecaster],
    times: IntArray,
) -> FloatArray:
    """Prompts per second of every run."""
    engine = EngineForecaster(models)
    engine.view(known_at_prompt(history, int(times[0])))  # warm: a replay begins once
    return np.array(list(_runs(market, history, engine, baselines, times)))


def _runs(
    market: Market,
    history: MarketHistory,
    engine: EngineForecaster,
    baselines: Sequence[Forecaster],
    times: IntArray,
) -> Iterator[float]:
    seed = market.settings.seed
    for begin in range(0, len(times), PROMPTS):
        run = times[begin : begin + PROMPTS]
        begun = thread_time()
        for _ in replay(history, engine, baselines, market.competition, run, seed=seed):
            pass
        yield len(run) / (thread_time() - begun)


if __name__ == "__main__":
    run_script(main)
