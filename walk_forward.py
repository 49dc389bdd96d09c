"""Replaying one market with the models that a miner would have had at each prompt.

Models learn from the bars known before the prompts they answer: up to one moment
for all of them (frozen), or again and again at the cadence of the live miner. Sets
and scores are kept in the work folder, so only what is missing is done: as tasks, which
know nothing of that folder, and give back what is kept in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Final

import numpy as np

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
from config import DAY_S, Frequency
from content_keys import bars_key, content_key, program_key
from domain import IntArray, MarketHistory
from errors import ConfigError, DataError, InsufficientHistory, ModelError
from garch_baseline import Garch
from lgbm_predictor import ModelSet, load_model_set
from lgbm_trainer import TrainingResult, fit_window
from market_baselines import Har, Oracle, fit_har
from market_view import MarketView
from model_store import publish_set, published_sets
from pooled_prior import PooledPrior
from protocol import Competition, competition_like, protocol_profile
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
from set_training import (
    load_history,
    names_of_pools,
    shared_history,
    shared_priors,
    train_set,
)
from settings import Settings
from task_pool import Job, tell
from wire_format import format_iso

BASELINES: Final = ("reference", "ewma_t", "har", "garch_t", "oracle")
WITHOUT_LAW: Final = ("garch_t",)  # their variance follows their own paths
DEFAULT_BASELINES: Final = ("reference", "ewma_t", "har", "oracle")
DEFAULT_DAYS: Final = 7  # that are replayed, before the end of the bars
POOLS: Final = "pools"  # in the work folder


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
        return int(self.settings.retrain_days(self.frequency) * DAY_S)

    def history(self) -> MarketHistory:
        """Everything that the source has. Raises: DataError."""
        return load_history(self.settings, self.asset, self.frequency)


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


def training_job(market: Market, moment: int, then: Callable[[], Sequence[Job]]) -> Job:
    """Train the models that have learned up to `moment`, keep them, and go on with `then`.

    Raises: DataError if nothing was known by then.
    """
    history = market.history()
    past = _past(market, history, moment)
    folder = _set_folder(market, past)
    priors = shared_priors(
        market.settings,
        market.frequency,
        *fit_window(past, market.settings.days),
        market.work_dir / POOLS,
    )

    def keep(result: TrainingResult) -> Sequence[Job]:
        publish_set(folder, market.asset, market.frequency, result.model_id, result.files)
        return then()

    shared = shared_history(market.settings, market.asset, market.frequency)
    return Job(
        name=market.name, work=train_models, args=(shared, priors, market, moment), then=keep
    )


def train_models(
    history: MarketHistory, priors: Sequence[PooledPrior | None], market: Market, moment: int
) -> TrainingResult:
    """The task: models that have learned up to `moment`. Raises: InsufficientHistory."""
    try:
        return train_set(history, priors, market.settings, moment, market.name)
    except InsufficientHistory as error:
        raise InsufficientHistory(
            f"{str(error).rstrip('.')}, or choose a later --train-until or --start."
        ) from None


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
    window = fit_window(past, settings.days)
    pools = names_of_pools(settings, market.frequency, *window)
    key = content_key(bars_key(past), wanted, pools, program_key("lgbm_trainer"))
    return sets_folder(market.work_dir, key)


def _published(market: Market, history: MarketHistory, moment: int) -> tuple[Path, ...]:
    folder = _set_folder(market, _past(market, history, moment))
    return published_sets(folder, market.asset, market.frequency)


def _models(market: Market, history: MarketHistory, moment: int) -> ModelSet:
    return load_model_set(_published(market, history, moment)[0])


def fit_baselines(
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


class Scores:
    """Keeps the scores of a plan's missing prompts as they come in, from any thread.

    Every prompt comes in twice, told of and given back, and is kept once.
    """

    def __init__(self, plan: Plan) -> None:
        self._file = plan.scores
        self._missing = {time for times in plan.missing.values() for time in times.tolist()}
        self._lock = Lock()

    def keep(self, entry: Mapping[str, Any]) -> None:
        """Keep one prompt. Raises: StateError."""
        with self._lock:
            if entry["start_ts"] in self._missing:
                append_score(self._file, entry)
                self._missing.remove(entry["start_ts"])

    def keep_all(self, entries: Sequence[Mapping[str, Any]]) -> Sequence[Job]:
        """Keep what a task gave back; nothing follows from it. Raises: StateError."""
        for entry in entries:
            self.keep(entry)
        return ()


def replay_jobs(plan: Plan, moment: int, parts: int, scores: Scores) -> list[Job]:
    """Answer and score the plan's missing prompts with the models of `moment`, in parts."""
    market = plan.market
    (folder, *_) = _published(market, market.history(), moment)
    files = _whole_files(folder)
    shared = shared_history(market.settings, market.asset, market.frequency)
    return [
        Job(
            name=market.name,
            work=replay_prompts,
            args=(shared, files, market, moment, times),
            then=scores.keep_all,
            urgent=True,  # the models are fresh: what is done first is out of the way
        )
        for times in np.array_split(plan.missing[moment], parts)
    ]


def _whole_files(folder: Path) -> dict[str, bytes]:
    """The files of a set. Raises: ModelError if it was damaged since it was trained."""
    try:
        load_model_set(folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}
    except (OSError, ModelError) as error:
        fault = str(error).partition(";")[0]
        raise ModelError(
            f"{fault}; remove {folder.parent} and repeat the command, which trains the set again."
        ) from None


def replay_prompts(
    history: MarketHistory,
    files: Mapping[str, bytes],
    market: Market,
    moment: int,
    times: IntArray,
) -> list[dict[str, Any]]:
    """The task: answer and score the prompts with a set, given as its files."""
    engine = EngineForecaster(_set_from(files))
    baselines = fit_baselines(market, history, _past(market, history, moment))
    found = []
    for result in _results(market, history, engine, baselines, times):
        found.append(result.to_dict())
        tell(market.name, "prompts", found[-1])
    return found


def _set_from(files: Mapping[str, bytes]) -> ModelSet:
    with TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        return load_model_set(Path(name))


def _results(
    market: Market,
    history: MarketHistory,
    engine: EngineForecaster,
    baselines: Sequence[Forecaster],
    times: IntArray,
) -> Iterator[PromptResult]:
    """Replay prompts one by one; what is drawn is exported if it is wanted."""
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
