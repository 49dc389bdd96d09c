"""Replaying history: the production forecast, prompt by prompt, scored.

A prompt that starts at `t` knows what a live miner would: with one-minute bars
those that opened at or before `t - 120 s`, with five-minute archives those that
closed by `t`. It is scored with the prices that the network would look up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.random import Generator

from baselines import Forecaster, LawForecaster, Prompt
from closed_form import law_histograms, law_pits, score_laws
from config import FREQUENCIES, NUM_PATHS
from domain import FloatArray, Forecast, ForecastRequest, IntArray, MarketHistory
from errors import DataError
from forecast_engine import draw, request_rng, step_law
from lgbm_predictor import ModelSet
from market_view import MarketState, MarketView, best_view, best_views
from path_simulator import StepLaw
from pit import interval_histograms, lead_pits
from protocol import Competition
from scoring import ScoreCard, score_paths
from wire_format import round_prices

MINIMUM_REALISED: Final = 0.05  # of the points; below, the market was closed
VIEWS_AT_ONCE: Final = 128  # prompts whose markets are looked at together


# ---------------------------------------------------------------- the engine as a forecaster


@dataclass(slots=True, eq=False)
class EngineForecaster:
    """The production forecast with one model set, its state carried between prompts."""

    models: ModelSet
    name: ClassVar[str] = "engine"
    _state: MarketState | None = field(default=None, repr=False)

    def view(self, known: MarketHistory) -> MarketView:
        """The market as the engine sees it at the end of `known`."""
        if self._state is not None and self._state.until > known.bars.end_ts:
            self._state = None
        view, self._state = best_view(self.models, known, self._state, "")
        return view

    def views(self, knowns: Sequence[MarketHistory]) -> list[MarketView]:
        """`view` at the ends of beginnings of one history, in rising time.

        The bytes are those of one after the other; many cost little more than two.
        """
        first, rest = self.view(knowns[0]), knowns[1:]
        if self._state is None:  # nothing to go on from: no rung with models holds
            return [first, *(self.view(known) for known in rest)]
        if not rest:
            return [first]
        views, self._state = best_views(self.models, rest, self._state)
        return [first, *views]

    def laws(self, prompts: Sequence[Prompt]) -> list[StepLaw]:
        """What `paths` draws from, for prompts in rising time."""
        views = self.views([known for _, known in prompts])
        return [step_law(request, view) for (request, _), view in zip(prompts, views, strict=True)]

    def answer(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> Forecast:
        """The answer of a miner at the end of `known`, in prices as they are sent."""
        return answer_as_sent(request, self.view(known), rng)

    def paths(self, request: ForecastRequest, known: MarketHistory, rng: Generator) -> FloatArray:
        """The paths of `answer`; (num_paths, n_points)."""
        return self.answer(request, known, rng).paths


def answer_as_sent(request: ForecastRequest, view: MarketView, rng: Generator) -> Forecast:
    """The answer to a request in the market of `view`, its prices rounded as on the wire."""
    forecast = draw(request, view, view.anchor_ts, rng)
    return replace(forecast, paths=round_prices(forecast.paths))


# ---------------------------------------------------------------- prompts and outcomes


def known_at_prompt(history: MarketHistory, start_ts: int) -> MarketHistory:
    """What a miner knows when it answers a prompt for `start_ts`."""
    return history.known_at(start_ts - history.scored_lag_s)


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


def realised_path(history: MarketHistory, request: ForecastRequest) -> FloatArray:
    """The prices that score the request; (n_points,), NaN where none is known."""
    wanted = request.grid_ts + history.scored_lag_s
    closes = history.price_bars.close_ts
    at = np.minimum(np.searchsorted(closes, wanted), len(closes) - 1)
    return np.where(closes[at] == wanted, history.price_bars.close[at], np.nan)


def prompt_grid_s(history: MarketHistory) -> int:
    """Prompts start on whole multiples of this; without finer truth, on the grid of the bars."""
    return 60 if history.price_bars.bar_s == 60 else history.price_bars.bar_s


def last_prompt(history: MarketHistory, end: int | None = None) -> int:
    """The latest start time whose outcome is known by `end` (default: the last bar)."""
    spec = FREQUENCIES[history.frequency]
    last_known = history.price_bars.end_ts if end is None else min(end, history.price_bars.end_ts)
    last = last_known - spec.prompt_length_s - history.scored_lag_s
    return last // prompt_grid_s(history) * prompt_grid_s(history)


def prompt_times(history: MarketHistory, start: int, end: int | None, count: int) -> IntArray:
    """`count` start times from `start` on, evenly spread, their outcomes known by `end`.

    Prompts during which the market hardly moved hands do not count as time. Raises:
    DataError if there is none.
    """
    grid = prompt_grid_s(history)
    first = -(-max(start, int(history.price_bars.open_ts[0])) // grid) * grid
    times = np.arange(first, last_prompt(history, end) + 1, grid, dtype=np.int64)
    times = times[_share_realised(history, times) >= MINIMUM_REALISED]
    if not len(times):
        until = _readable(history.price_bars.end_ts if end is None else end)
        raise DataError(
            f"{history.asset} {history.frequency.value}: no prompt fits between {_readable(start)} "
            f"and {until} with a known outcome; choose another --start or --end."
        )
    chosen = np.linspace(0, len(times) - 1, min(count, len(times)))
    return np.asarray(times[chosen.round().astype(np.int64)], dtype=np.int64)


def _share_realised(history: MarketHistory, times: IntArray) -> FloatArray:
    """Share of the points of a usual prompt whose price is known; shape of `times`."""
    if not len(times):
        return np.empty(0)
    spec = FREQUENCIES[history.frequency]
    bar_s = history.price_bars.bar_s
    stride, steps = spec.prompt_increment_s // bar_s, spec.prompt_length_s // bar_s
    begin = int(times[0]) + history.scored_lag_s
    slots = np.arange(begin, int(times[-1]) + history.scored_lag_s + 1 + steps * bar_s, bar_s)
    known = np.isin(slots, history.price_bars.close_ts)
    # Running counts over every `stride`-th slot, one lane per phase.
    lanes = np.pad(known, (stride, -len(known) % stride)).reshape(-1, stride).cumsum(axis=0)
    running = lanes.ravel()
    at = (times - times[0]) // bar_s
    return np.asarray((running[at + steps + stride] - running[at]) / (steps // stride + 1))


def check_prompt_times(history: MarketHistory, times: IntArray) -> None:
    """Refuse given start times that cannot be replayed. Raises: DataError."""
    name = f"{history.asset} {history.frequency.value}"
    grid = prompt_grid_s(history)
    first = int(history.bars.open_ts[0]) + history.bars.bar_s + history.scored_lag_s
    last = last_prompt(history)
    for time in times.tolist():
        if time % grid:
            raise DataError(
                f"{name}: prompt time {_readable(time)} is off the grid; here prompts start on "
                f"whole multiples of {grid} s."
            )
        if not first <= time <= last:
            raise DataError(
                f"{name}: prompt time {_readable(time)} lies outside the data, which serve prompts "
                f"from {_readable(first)} to {_readable(last)}."
            )
        if not np.isfinite(realised_path(history, usual_request(history, time))).any():
            raise DataError(
                f"{name}: nothing is known of the outcome of prompt time {_readable(time)}; "
                "take it out of the file."
            )


def _readable(ts: int) -> str:
    return datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---------------------------------------------------------------- replay


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """One prompt: the score of every forecaster, and the calibration of the engine."""

    start_ts: int
    scores: Mapping[str, ScoreCard]
    pit: Mapping[int, float]  # of the engine, by anchor lead in seconds; NaN unknown
    histogram: Mapping[str, IntArray]  # of the engine's PIT, by scored interval
    model_id: str | None
    rung: str
    answer: str  # hash of the engine's prices

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become None."""
        return {
            "start_ts": self.start_ts,
            "scores": {
                name: {"total": _plain(card.total), "intervals": dict(card.by_interval)}
                for name, card in self.scores.items()
            },
            "pit": {str(lead): _plain(value) for lead, value in self.pit.items()},
            "histogram": {name: counts.tolist() for name, counts in self.histogram.items()},
            "model_id": self.model_id,
            "rung": self.rung,
            "answer": self.answer,
        }

    @classmethod
    def score(
        cls,
        forecast: Forecast,
        others: Mapping[str, FloatArray],
        realised: FloatArray,
        competition: Competition,
        leads_s: Sequence[int],
    ) -> Self:
        """Score the engine's answer and the paths of the others on one prompt, as drawn."""
        step = forecast.request.increment_s
        paths = forecast.paths
        all_paths = {EngineForecaster.name: paths, **others}
        return cls(
            start_ts=forecast.request.start_ts,
            scores={
                name: score_paths(given, realised, competition, increment_s=step)
                for name, given in all_paths.items()
            },
            pit=lead_pits(paths, realised, leads_s, increment_s=step),
            histogram=interval_histograms(paths, realised, competition, increment_s=step),
            model_id=forecast.diagnostics.model_id,
            rung=forecast.diagnostics.rung,
            answer=answer_digest(paths),
        )


def answer_digest(paths: FloatArray) -> str:
    """Hash of the prices of an answer: equal answers, equal hashes."""
    return sha256(np.ascontiguousarray(paths, dtype=np.float64).tobytes()).hexdigest()[:16]


def law_digest(law: StepLaw) -> str:
    """Hash of a law: equal laws, equal hashes."""
    numbers = np.concatenate(([law.price], law.times, law.points, law.scale, law.centre))
    return sha256(numbers.tobytes() + repr(law.shape).encode()).hexdigest()[:16]


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None


def replay(
    history: MarketHistory,
    engine: EngineForecaster,
    baselines: Sequence[Forecaster],
    competition: Competition,
    times: IntArray,
    *,
    seed: int,
) -> Iterator[tuple[PromptResult, Forecast]]:
    """Answer and score the prompts that start at `times`, in time order.

    Every forecaster gets the same random numbers that a live answer would.
    """
    leads_s = FREQUENCIES[history.frequency].leads_s
    for prompts in _chunks(history, times):
        views = engine.views([known for _, known in prompts])
        for (request, known), view in zip(prompts, views, strict=True):
            forecast = answer_as_sent(request, view, request_rng(seed, request))
            others = {
                baseline.name: baseline.paths(request, known, request_rng(seed, request))
                for baseline in baselines
            }
            realised = realised_path(history, request)
            yield PromptResult.score(forecast, others, realised, competition, leads_s), forecast


def replay_laws(
    history: MarketHistory,
    engine: EngineForecaster,
    baselines: Sequence[LawForecaster],
    competition: Competition,
    times: IntArray,
) -> Iterator[PromptResult]:
    """Score the prompts that start at `times`, in time order, without drawing a path."""
    for prompts in _chunks(history, times):
        yield from _score_laws(history, engine, baselines, competition, prompts)


def _chunks(history: MarketHistory, times: IntArray) -> Iterator[list[Prompt]]:
    """The usual prompts that start at `times`, as many as are looked at together."""
    for begin in range(0, len(times), VIEWS_AT_ONCE):
        yield [
            (usual_request(history, start_ts), known_at_prompt(history, start_ts))
            for start_ts in times[begin : begin + VIEWS_AT_ONCE].tolist()
        ]


def _score_laws(
    history: MarketHistory,
    engine: EngineForecaster,
    baselines: Sequence[LawForecaster],
    competition: Competition,
    prompts: Sequence[Prompt],
) -> Iterator[PromptResult]:
    """What all forecasters say to prompts in rising time, scored in closed form."""
    views = engine.views([known for _, known in prompts])
    ours = [step_law(request, view) for (request, _), view in zip(prompts, views, strict=True)]
    laws = {engine.name: ours} | {each.name: each.laws(prompts) for each in baselines}
    realised = np.stack([realised_path(history, request) for request, _ in prompts])
    step = prompts[0][0].increment_s
    cards = {
        name: score_laws(found, realised, competition, increment_s=step)
        for name, found in laws.items()
    }
    leads_s = FREQUENCIES[history.frequency].leads_s
    pits = law_pits(ours, realised, leads_s, increment_s=step)
    histograms = law_histograms(ours, realised, competition, increment_s=step)
    for row, (request, _) in enumerate(prompts):
        yield PromptResult(
            start_ts=request.start_ts,
            scores={name: found[row] for name, found in cards.items()},
            pit=pits[row],
            histogram=histograms[row],
            model_id=views[row].model_id,
            rung=views[row].rung.value,
            answer=law_digest(ours[row]),
        )
