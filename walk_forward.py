"""Replaying one market with the models that a miner would have had at each prompt.

Models learn from the bars known before the prompts they answer: up to one moment
for all of them (frozen), or again and again at the cadence of the live miner. Sets
and scores are kept in the work folder, so only what is missing is done.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from multiprocessing import parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Thread
from typing import Any, Final

import numpy as np
from threadpoolctl import threadpool_limits

from backtest_store import (
    append_score,
    export_prediction,
    load_prediction,
    load_scores,
    prediction_file,
    require_same_prediction,
    scores_file,
    sets_folder,
)
from baselines import ConstantSigma, EwmaStudentT, Forecaster, LawForecaster
from config import (
    DAY_S,
    FREQUENCIES,
    Competition,
    Frequency,
    Settings,
    competition_like,
    protocol_profile,
)
from content_keys import bars_key, content_key, program_key
from data_fetcher import open_source
from domain import IntArray, MarketHistory
from errors import ConfigError, DataError, InsufficientHistory
from garch_baseline import Garch
from lgbm_predictor import ModelSet, load_model_set
from lgbm_trainer import fit_window, train
from market_baselines import Har, Oracle, fit_har
from market_view import MarketView
from model_store import publish_set, published_sets
from pool_store import histories_of, pool_names, pooled_priors
from replay import (
    EngineForecaster,
    PromptResult,
    answer_digest,
    check_prompt_times,
    known_at_prompt,
    prompt_times,
    replay,
    replay_laws,
    usual_request,
)
from wire_format import format_iso

BASELINES: Final = ("reference", "ewma_t", "har", "garch_t", "oracle")
WITHOUT_LAW: Final = ("garch_t",)  # their variance follows their own paths
DEFAULT_BASELINES: Final = ("reference", "ewma_t", "har", "oracle")
DEFAULT_DAYS: Final = 7  # that are replayed, before the end of the bars
KEPT_HISTORIES: Final = 2  # per process: chunks of one market follow each other

Report = Callable[[str, str], None]  # a market's name, and the step that it begins


class Stopped(Exception):
    """The run was interrupted: what is done is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """One asset at one frequency, and how it is to be replayed."""

    asset: str
    frequency: Frequency
    settings: Settings
    train_until: int | None  # None: retrained at the cadence of the live miner
    baselines: tuple[str, ...]
    work_dir: Path
    export_dir: Path | None = None
    closed_form: bool = False  # laws are scored, and no path is drawn

    @property
    def name(self) -> str:
        """How progress and tables call it."""
        return f"{self.asset} {self.frequency.value}"

    @property
    def competition(self) -> Competition:
        """What its prompts are scored by."""
        profile = protocol_profile(self.settings.profile)
        return competition_like(profile, self.asset, self.frequency)

    @property
    def cadence_s(self) -> int:
        """How often models are trained anew, without `train_until`."""
        return int(FREQUENCIES[self.frequency].retrain_interval_days * DAY_S)

    def history(self) -> MarketHistory:
        """Everything that the source has. Raises: DataError."""
        return _load(self.settings, self.asset, self.frequency)


@lru_cache(maxsize=KEPT_HISTORIES)
def _load(settings: Settings, asset: str, frequency: Frequency) -> MarketHistory:
    return open_source(settings).load(asset, frequency).history


def _peers(market: Market) -> tuple[MarketHistory, ...]:
    """All assets that the market's models may lean on, whichever are replayed."""
    return _load_all(market.settings, market.frequency)


@lru_cache(maxsize=1)
def _load_all(settings: Settings, frequency: Frequency) -> tuple[MarketHistory, ...]:
    return histories_of(open_source(settings), frequency)


# ---------------------------------------------------------------- the plan of a market


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """The prompts that were asked for; either `times` or the rest counts."""

    start: int | None
    end: int | None
    count: int
    times: IntArray | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What is to be replayed in one market, and what of it is missing."""

    market: Market
    times: IntArray  # of all prompts, rising
    bars: str  # hash of the history
    scores: Path
    missing: Mapping[int, IntArray]  # start times by the moment up to which models learn
    untrained: tuple[int, ...]  # moments whose models are not there

    @property
    def todo(self) -> int:
        """Prompts that are not scored yet."""
        return sum(len(times) for times in self.missing.values())


def plan_market(market: Market, prompts: Prompts) -> Plan:
    """Choose the prompts and see what the work folder has of them.

    Raises: DataError if there is no such prompt; ConfigError if models would know
    an outcome.
    """
    history = market.history()
    times = _chosen_times(market, history, prompts)
    bars = bars_key(history)
    scores = scores_file(market.work_dir, market.asset, market.frequency, _scores_key(market, bars))
    done = load_scores(scores)
    waiting = np.array([t for t in times.tolist() if not _is_done(market, history, done, t)])
    moments = np.array([training_moment(market, history, t) for t in waiting.tolist()])
    missing = {int(moment): waiting[moments == moment] for moment in np.unique(moments)}
    untrained = [m for m in missing if not _published(market, history, m)]
    return Plan(
        market=market,
        times=times,
        bars=bars,
        scores=scores,
        missing=missing,
        untrained=tuple(untrained),
    )


def _chosen_times(market: Market, history: MarketHistory, prompts: Prompts) -> IntArray:
    if prompts.times is not None:
        times = np.unique(prompts.times)
        check_prompt_times(history, times)
    else:
        start = market.train_until if prompts.start is None else prompts.start
        if start is None:
            start = history.bars.end_ts - DEFAULT_DAYS * DAY_S
        times = prompt_times(history, start, prompts.end, prompts.count)
    if market.train_until is not None and times[0] < market.train_until:
        raise ConfigError(
            f"{market.name}: the first prompt, {format_iso(int(times[0]))}, is before "
            f"--train-until {format_iso(market.train_until)}, so the models would know its "
            "outcome; train until an earlier moment or ask for later prompts."
        )
    return times


def _scores_key(market: Market, bars: str) -> str:
    settings = market.settings
    until = ["every", market.cadence_s] if market.train_until is None else market.train_until
    wanted = [settings.seed, settings.days, settings.profile, until, list(market.baselines)]
    kind = "closed form" if market.closed_form else "drawn"
    return content_key(bars, wanted, kind, program_key("walk_forward"))


def _is_done(
    market: Market, history: MarketHistory, done: Mapping[int, Any], start_ts: int
) -> bool:
    if start_ts not in done:
        return False
    if market.export_dir is None:
        return True
    file = prediction_file(market.export_dir, usual_request(history, start_ts))
    present = load_prediction(file)
    if present is None:
        return False
    require_same_prediction(file, same=answer_digest(present) == done[start_ts]["answer"])
    return True


# ---------------------------------------------------------------- models


def training_moment(market: Market, history: MarketHistory, start_ts: int) -> int:
    """Up to when the models that answer a prompt have learned: what was known by then.

    Never later than what the prompt itself may know. Without `train_until` on a fixed
    grid of clock time, so that prompts share models whatever prompts are asked for.
    """
    if market.train_until is not None:
        return market.train_until - history.scored_lag_s
    return (start_ts - history.scored_lag_s) // market.cadence_s * market.cadence_s


def train_models(market: Market, moment: int, report: Report) -> None:
    """Train and keep the models that have learned up to `moment`.

    Raises: InsufficientHistory.
    """
    history = market.history()
    past = _past(market, history, moment)
    first, last = fit_window(past, market.settings.days)
    try:
        result = train(
            past,
            days=market.settings.days,
            seed=market.settings.seed,
            profile=protocol_profile(market.settings.profile),
            priors=pooled_priors(_peers(market), first, last, market.work_dir / "pools"),
            progress=lambda step: report(market.name, step),
        )
    except InsufficientHistory as error:
        raise InsufficientHistory(
            f"{str(error).rstrip('.')}, or choose a later --train-until or --start."
        ) from None
    folder = _set_folder(market, past)
    publish_set(folder, market.asset, market.frequency, result.model_id, result.files)


def _past(market: Market, history: MarketHistory, moment: int) -> MarketHistory:
    past = history.known_at(moment)
    if not len(past.bars):
        raise DataError(
            f"{market.name}: no bars are known by {format_iso(moment)}; choose a later "
            "--train-until or --start."
        )
    return past


def _set_folder(market: Market, past: MarketHistory) -> Path:
    settings = market.settings
    wanted = [settings.seed, settings.days, settings.profile]
    pools = pool_names(_peers(market), *fit_window(past, settings.days))
    key = content_key(bars_key(past), wanted, pools, program_key("lgbm_trainer"))
    return sets_folder(market.work_dir, key)


def _published(market: Market, history: MarketHistory, moment: int) -> tuple[Path, ...]:
    folder = _set_folder(market, _past(market, history, moment))
    return published_sets(folder, market.asset, market.frequency)


def _models(market: Market, history: MarketHistory, moment: int) -> ModelSet:
    return load_model_set(_published(market, history, moment)[0])


def _fit_baselines(
    market: Market, history: MarketHistory, past: MarketHistory
) -> tuple[Forecaster, ...]:
    """The baselines of the market, fitted to `past`; the oracle sees all of `history`."""
    har = cache(lambda: fit_har(past, days=market.settings.days))
    makers: dict[str, Callable[[], Forecaster]] = {
        "reference": ConstantSigma,
        "ewma_t": lambda: EwmaStudentT.fit(past),
        "har": lambda: Har(model=har()),
        "garch_t": lambda: Garch.fit(past),
        "oracle": lambda: Oracle(har=Har(model=har()), full=history),
    }
    return tuple(makers[name]() for name in market.baselines)


# ---------------------------------------------------------------- replay


def replay_prompts(market: Market, moment: int, times: IntArray, report: Report) -> None:
    """Answer and score the prompts with the models of `moment`; keep every one as it is done."""
    history = market.history()
    past = _past(market, history, moment)
    file = scores_file(
        market.work_dir, market.asset, market.frequency, _scores_key(market, bars_key(history))
    )
    engine = EngineForecaster(_models(market, history, moment))
    baselines = _fit_baselines(market, history, past)
    for result in _results(market, engine, baselines, times):
        append_score(file, result.to_dict())
        report(market.name, "prompts")


def _results(
    market: Market, engine: EngineForecaster, baselines: Sequence[Forecaster], times: IntArray
) -> Iterator[PromptResult]:
    """Replay prompts one by one; what is drawn is exported if it is wanted."""
    history = market.history()
    if market.closed_form:
        with_laws = [each for each in baselines if isinstance(each, LawForecaster)]
        yield from replay_laws(history, engine, with_laws, market.competition, times)
        return
    seed = market.settings.seed
    drawn = replay(history, engine, baselines, market.competition, times, seed=seed)
    for result, forecast in drawn:
        if market.export_dir is not None:
            export_prediction(market.export_dir, forecast.request, forecast.paths)
        yield result


class EngineViews:
    """What the engine saw at prompts that were replayed: a view for what was known then.

    Nothing is trained: the models are those of the replay. Quick in rising time.
    """

    def __init__(self, market: Market, times: IntArray) -> None:
        """`times` (n,): the start times of the replayed prompts."""
        history = market.history()
        self._market = market
        self._moments = {
            known_at_prompt(history, t).anchor_ts: training_moment(market, history, t)
            for t in times.tolist()
        }
        self._engines: dict[int, EngineForecaster] = {}

    def __call__(self, known: MarketHistory) -> MarketView:
        """The market as the engine saw it at the end of `known`."""
        moment = self._moments[known.anchor_ts]
        if moment not in self._engines:
            models = _models(self._market, self._market.history(), moment)
            self._engines = {moment: EngineForecaster(models)}  # the ones before are done with
        return self._engines[moment].view(known)


# ---------------------------------------------------------------- worker processes


@dataclass(slots=True)
class _Worker:
    """What a worker process shares with its parent."""

    stop: Event | None = None
    events: Any = None


_worker: Final = _Worker()


def start_worker(stop: Event, events: Any) -> None:
    """Make this process a worker that stops when told to, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and says when
    threadpool_limits(1)  # workers share the cores already
    _worker.stop, _worker.events = stop, events
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _go_on() -> None:
    """Raises: Stopped if nothing more is to be done."""
    if _worker.stop is not None and _worker.stop.is_set():
        raise Stopped


def report_step(name: str, step: str) -> None:
    """Say which step of a market begins. Raises: Stopped if there is to be no other."""
    _go_on()
    if _worker.events is not None:
        _worker.events.put((name, step))


def train_in_worker(market: Market, moment: int) -> None:
    """`train_models`, in a worker process."""
    _go_on()
    train_models(market, moment, report_step)


def replay_in_worker(market: Market, moment: int, times: IntArray) -> None:
    """`replay_prompts`, in a worker process."""
    _go_on()
    replay_prompts(market, moment, times, report_step)
