"""Replaying history: the production forecast, prompt by prompt, scored.

A prompt that starts at `t` knows what a live miner would: with one-minute bars
those that opened at or before `t - 120 s`, with five-minute archives those that
closed by `t`. It is scored with the prices that the network would look up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from baselines import Forecaster
from config import FREQUENCIES, NUM_PATHS, Competition
from domain import FloatArray, ForecastRequest, IntArray, MarketHistory
from errors import DataError
from forecast_engine import draw, request_rng
from lgbm_predictor import ModelSet
from market_view import MarketState, first_state, view_with_models
from scoring import ScoreCard, score_paths

MINIMUM_REALISED = 0.05  # of the points; below, the market was closed


@dataclass(slots=True)
class EngineForecaster:
    """The production forecast with one model set, its state carried between prompts."""

    models: ModelSet
    name: str = "engine"
    _state: MarketState | None = field(default=None, repr=False)

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """Paths as the miner would answer at the end of `known`."""
        if self._state is None or self._state.until > known.bars.end_ts:
            self._state = first_state(self.models, known)
        view, self._state = view_with_models(self.models, known, self._state)
        return draw(request, view, known.anchor_ts, rng).paths


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """One prompt and the score of every forecaster."""

    start_ts: int
    scores: Mapping[str, ScoreCard]


def known_at_prompt(history: MarketHistory, start_ts: int) -> MarketHistory:
    """What a miner knows when it answers a prompt for `start_ts`."""
    return history.known_at(start_ts - history.scored_lag_s)


def realised_path(history: MarketHistory, request: ForecastRequest) -> FloatArray:
    """The prices that score the request; (n_points,), NaN where none is known."""
    wanted = request.grid_ts + history.scored_lag_s
    closes = history.price_bars.close_ts
    at = np.minimum(np.searchsorted(closes, wanted), len(closes) - 1)
    return np.where(closes[at] == wanted, history.price_bars.close[at], np.nan)


def prompt_times(history: MarketHistory, start: int, end: int, count: int) -> IntArray:
    """Up to `count` start times from `start` on, evenly spread, their outcomes known by `end`.

    Prompts during which the market hardly moved hands are left out. Raises:
    DataError if none is left.
    """
    spec = FREQUENCIES[history.frequency]
    last = min(end, history.bars.end_ts) - spec.prompt_length_s - history.scored_lag_s
    # Without finer truth, prompts lie on the grid of the bars.
    step = 60 if history.price_bars.bar_s == 60 else history.price_bars.bar_s
    spread = np.linspace(start, max(last, start), count) // step * step
    times = np.unique(spread.astype(np.int64))
    times = times[(times >= start) & (times <= last)]
    chosen = [t for t in times.tolist() if _was_open(history, usual_request(history, t))]
    if not chosen:
        raise DataError(
            f"{history.asset} {history.frequency.value}: no prompt fits between {start} and {end} "
            "with a known outcome; choose another --start or --end."
        )
    return np.array(chosen, dtype=np.int64)


def usual_request(history: MarketHistory, start_ts: int) -> ForecastRequest:
    """The prompt that validators send at this frequency."""
    spec = FREQUENCIES[history.frequency]
    return ForecastRequest(
        asset=history.asset,
        start_ts=start_ts,
        increment_s=spec.prompt_increment_s,
        length_s=spec.prompt_length_s,
        num_paths=NUM_PATHS,
    )


def _was_open(history: MarketHistory, request: ForecastRequest) -> bool:
    return bool(np.isfinite(realised_path(history, request)).mean() >= MINIMUM_REALISED)


def replay(
    history: MarketHistory,
    forecasters: Sequence[Forecaster],
    competition: Competition,
    times: IntArray,
    *,
    seed: int,
) -> Iterator[PromptScores]:
    """Score every forecaster on the prompts that start at `times`, in time order."""
    for start_ts in times.tolist():
        request = usual_request(history, start_ts)
        known = known_at_prompt(history, start_ts)
        realised = realised_path(history, request)
        scores = {
            forecaster.name: score_paths(
                forecaster.paths(request, known, request_rng(seed, request)),
                realised,
                competition,
                increment_s=request.increment_s,
            )
            for forecaster in forecasters
        }
        yield PromptScores(start_ts=start_ts, scores=scores)
