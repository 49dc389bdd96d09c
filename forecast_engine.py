"""From history and models to an answer.

The heart is `forecast`, a pure function: history up to now, models, state,
request and random generator in; paths out. It reads no clock, file or network,
so a replay of the past runs the very code that answers live. `ForecastEngine`
holds histories, models and states for it, and knows the retraining cadence.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Final, Self
from zlib import crc32

import numpy as np
from numpy.random import Generator

from bar_cleaning import summarise_set_aside
from config import DAY_S, FREQUENCIES, Frequency, Settings, asset_spec
from data_fetcher import BarSource
from domain import (
    Bars,
    Diagnostics,
    FloatArray,
    Forecast,
    ForecastRequest,
    IntArray,
    MarketHistory,
)
from ensemble import draw_moves, prepare_matching
from errors import (
    DataError,
    ModelError,
    NoPriceError,
    RequestError,
    StateError,
    UnknownAsset,
)
from lgbm_predictor import ModelSet, interpolate_centre, load_model_set, load_without_trees
from market_view import MarketState, MarketView, best_view
from model_store import publication, published_sets
from state_store import StateStore
from uncertainty_engine import step_scales
from wire_format import format_iso

log = logging.getLogger(__name__)

STATE_KIND: Final = "market"
STATE_SCHEMA: Final = 2
CACHED_VIEWS: Final = 64  # moments per asset and frequency
STATE_SPACING_S: Final = DAY_S  # states of past moments that are kept for replays


# ---------------------------------------------------------------- the forecast


def forecast(
    request: ForecastRequest,
    history: MarketHistory,
    models: ModelSet | None,
    state: MarketState | None,
    now: int,
    rng: Generator,
) -> Forecast:
    """Answer one prompt. Pure: the same arguments give the same bytes.

    Only bars known at `now` are used. `state` may be any earlier state of the
    same models (None: from the first bar on); it saves work and changes nothing.
    Raises: NoPriceError if no bar is known by then.
    """
    known = history.known_at(now)
    if not len(known.price_bars):
        raise NoPriceError(f"{history.asset}: no price is known at {now}; collect or import bars.")
    view, _ = best_view(models, known, state, "no usable models")
    return draw(request, view, now, rng)


def draw(request: ForecastRequest, view: MarketView, now: int, rng: Generator) -> Forecast:
    """Paths for a request in the market of `view`.

    Point k is the price that the network scores for `start + k · increment`,
    which is the price `scored_lag_s` later.
    """
    points = request.grid_ts + view.scored_lag_s
    times = _simulation_times(view, points, request.increment_s)
    scale = step_scales(view.spec, view.standardiser, view.log_levels, times)
    moves = draw_moves(rng, view.spec, scale, times, points, view.shape, n_paths=request.num_paths)
    moves += centre_path(view, points)
    return Forecast(
        request=request,
        paths=view.anchor_price * np.exp(moves / 1e4),
        diagnostics=_diagnostics(view, now),
    )


def _simulation_times(view: MarketView, points: IntArray, increment_s: int) -> IntArray:
    """The anchor, then equal steps of at most one bar that meet every point."""
    if points[0] < view.anchor_ts:
        raise RequestError(
            f"the path would start {view.anchor_ts - int(points[0])} s before the last known "
            "price; ask for a later start or replay with an origin."
        )
    # Not the greatest common divisor: 61 s would make 600,000 steps of a week.
    parts = -(-increment_s // view.spec.bar_s)
    steps = np.arange((len(points) - 1) * parts + 1, dtype=np.int64)
    fine = points[0] + steps * increment_s // parts
    return np.concatenate(([view.anchor_ts], fine)) if points[0] > view.anchor_ts else fine


def centre_path(view: MarketView, points: IntArray) -> FloatArray:
    """Expected log move at every point since the anchor, bps; (points,)."""
    if not any(view.centre.values()):
        return np.zeros(len(points))
    leads = np.array(list(view.centre), dtype=np.int64)
    clock = view.standardiser.profile.variance_time(
        np.concatenate(([view.anchor_ts], view.anchor_ts + leads))
    )
    unit = view.standardiser.unit_bps * view.level * np.sqrt(clock[1:])
    anchors = dict(zip(leads.tolist(), unit * np.array(list(view.centre.values())), strict=True))
    return interpolate_centre(anchors, (points - view.anchor_ts).astype(np.float64))


def _diagnostics(view: MarketView, now: int) -> Diagnostics:
    later = view.trained_until is not None and view.trained_until > now
    notes = view.notes
    if later:
        notes = (*notes, "the models were trained on bars later than this moment")
    return Diagnostics(
        rung=view.rung.value,
        frequency=view.spec.frequency.value,
        anchor_price=view.anchor_price,
        anchor_ts=view.anchor_ts,
        price_age_s=now - view.anchor_ts,
        model_id=view.model_id,
        trained_until=view.trained_until,
        models_saw_later_bars=later,
        notes=notes,
    )


def request_frequency(request: ForecastRequest) -> Frequency:
    """The set that answers: LF where its five-minute bars can make up the steps."""
    low = FREQUENCIES[Frequency.LF]
    return Frequency.LF if request.increment_s % low.bar_s == 0 else Frequency.HF


def request_rng(seed: int, request: ForecastRequest) -> Generator:
    """The generator of an answer: the same request is answered with the same bytes."""
    return np.random.default_rng(
        [
            seed,
            crc32(request.asset.encode()),
            request.start_ts,
            request.increment_s,
            request.length_s,
            request.num_paths,
        ]
    )


# ---------------------------------------------------------------- the engine

Pair = tuple[str, Frequency]


@dataclass
class _Market:
    """What the engine holds for one asset at one frequency. Guarded by `lock`."""

    history: MarketHistory
    models: ModelSet | None = None
    publication: tuple[int, int] | None = None  # the one that was looked at
    note: str = "no models were trained yet"
    states: list[MarketState] = field(default_factory=list)  # by rising `until`
    views: "OrderedDict[int, MarketView]" = field(default_factory=OrderedDict)
    lock: RLock = field(default_factory=RLock)


class ForecastEngine:
    """Histories, models and states of every asset that a source serves.

    Thread-safe: answers may be computed side by side, and never wait for
    training. Damaged models or state cost a rung of the ladder, not an answer.
    """

    def __init__(self, source: BarSource, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self._store = StateStore(settings.state_dir)
        self._markets: dict[Pair, _Market] = {}

    @classmethod
    def open(cls, source: BarSource, settings: Settings) -> Self:
        """Load bars, models and state of everything that the source serves."""
        engine = cls(source, settings)
        for asset, frequencies in source.frequencies().items():
            for frequency in frequencies:
                engine._open_market(asset, frequency)
        engine.refresh()
        return engine

    def _open_market(self, asset: str, frequency: Frequency) -> None:
        try:
            loaded = self._source.load(asset, frequency)
        except DataError as error:
            log.warning("%s", error)
            return
        for line in summarise_set_aside(loaded.set_aside):
            log.warning("%s %s: %s", asset, frequency.value, line)
        self._markets[asset, frequency] = _Market(history=loaded.history)

    # -- what is there

    def now(self) -> int:
        """The clock for a live source, else the end of the source's last bar."""
        return self._source.now()

    def assets(self) -> tuple[str, ...]:
        """Assets that can be answered, in the order of the source."""
        return tuple(dict.fromkeys(asset for asset, _ in self._markets))

    def trained(self) -> dict[Pair, int]:
        """Pairs that answer from a trained set, and when its training data end."""
        return {
            pair: market.models.trained_until
            for pair, market in self._markets.items()
            if market.models
        }

    def history(self, asset: str, frequency: Frequency) -> MarketHistory:
        """All bars held for the pair. Raises UnknownAsset if there are none."""
        try:
            return self._markets[asset, frequency].history
        except KeyError:
            raise UnknownAsset(
                f"{asset} has no {frequency.value} bars here; the source serves "
                f"{', '.join(self.assets()) or 'nothing'}."
            ) from None

    def due(self) -> tuple[Pair, ...]:
        """Pairs without models, or with models older than the retraining cadence.

        Without a bar since they were trained, old models stay: the same would come out.
        """
        now = self.now()
        return tuple(pair for pair, market in self._markets.items() if _is_due(market, now))

    # -- upkeep

    def refresh(self) -> None:
        """Take up model sets that were published since, and the bars up to now."""
        for (asset, frequency), market in self._markets.items():
            self._load_models(asset, frequency, market)
            with market.lock:
                self._view(market, market.history)

    def checkpoint(self) -> None:
        """Write the newest state of every market. Raises StateError if the disk refuses."""
        for (asset, frequency), market in self._markets.items():
            with market.lock:
                newest = market.states[-1] if market.states else None
            if newest is not None:
                name = self._state_name(asset, frequency)
                last_bar = _last_bar(market.history.bars, newest.until)
                document = {**newest.to_dict(), "last_bar": last_bar}
                self._store.save(STATE_KIND, name, STATE_SCHEMA, document)

    def _state_name(self, asset: str, frequency: Frequency) -> str:
        return f"{self._source.name}/{asset}_{frequency.value}"

    def _load_models(self, asset: str, frequency: Frequency, market: _Market) -> None:
        """Load a newly published set first and swap it in after: answers do not wait."""
        # Not the folders' names: training on the same bars again repairs a set in place.
        latest = publication(self._settings.model_dir, asset, frequency)
        if latest == market.publication:
            return
        market.publication = latest
        try:
            folders = published_sets(self._settings.model_dir, asset, frequency)
        except ModelError as error:
            _take_note(market, str(error))
            return
        models = _first_usable(folders, self._source.name, market)
        states = []
        if models is not None:
            states = self._saved_states(asset, frequency, models, market.history)
            prepare_matching(models.spec, models.calibration.path_shape)
        with market.lock:
            if models is not None:
                market.models, market.states = models, states
            market.views.clear()

    def _saved_states(
        self, asset: str, frequency: Frequency, models: ModelSet, history: MarketHistory
    ) -> list[MarketState]:
        """The state on disk, if it is of these models and of these bars' past."""
        name = self._state_name(asset, frequency)
        try:
            document = self._store.load(STATE_KIND, name, STATE_SCHEMA)
        except StateError as error:  # a state saves work and changes nothing
            log.warning("%s", error)
            return []
        if document is None:
            return []
        state = MarketState.from_dict(document)
        same_bars = document["last_bar"] == _last_bar(history.bars, state.until)
        return [state] if same_bars and state.model_id == models.model_id else []

    # -- answers

    def answer(self, request: ForecastRequest, *, origin: int | None = None) -> Forecast:
        """Answer a prompt with what is known now, or was known at `origin`.

        Raises: UnknownAsset, NoPriceError, RequestError (an origin before the
        first usable bar).
        """
        now = self.now() if origin is None else origin
        market = self._choose_market(request)
        known = market.history.known_at(min(now, request.start_ts))
        if not len(known.price_bars):
            self._refuse_without_price(request, market, origin)
        with market.lock:
            view = self._view(market, known)
        return draw(request, view, now, request_rng(self._settings.seed, request))

    def _choose_market(self, request: ForecastRequest) -> _Market:
        """The request's frequency decides; the other one answers if it has no bars."""
        asset_spec(request.asset)
        wanted = request_frequency(request)
        other = Frequency.HF if wanted is Frequency.LF else Frequency.LF
        for frequency in (wanted, other):
            market = self._markets.get((request.asset, frequency))
            if market is not None:
                return market
        raise UnknownAsset(
            f"asset {request.asset} has no bars here; this miner serves "
            f"{', '.join(self.assets()) or 'nothing'}."
        )

    def _refuse_without_price(
        self, request: ForecastRequest, market: _Market, origin: int | None
    ) -> None:
        if len(market.history.price_bars):
            first = int(market.history.price_bars.close_ts[0])
            name, moment = ("start", request.start_ts) if origin is None else ("origin", origin)
            raise RequestError(
                f"{name} {format_iso(moment)} lies before the first usable bar of "
                f"{request.asset}, which closed at {format_iso(first)}; ask for a later {name}."
            )
        raise NoPriceError(
            f"no price of {request.asset} is known; collect or import bars of it first."
        )

    def _view(self, market: _Market, known: MarketHistory) -> MarketView:
        """The market at the last bar of `known`, from the cache or computed."""
        key = known.anchor_ts
        if key in market.views:
            market.views.move_to_end(key)
            return market.views[key]
        view = self._compute_view(market, known)
        market.views[key] = view
        if len(market.views) > CACHED_VIEWS:
            market.views.popitem(last=False)
        return view

    def _compute_view(self, market: _Market, known: MarketHistory) -> MarketView:
        state = _latest_state(market, known)
        view, advanced = best_view(market.models, known, state, market.note)
        if advanced is not None:
            _keep_state(market, advanced)
        elif market.models is not None and len(known.bars):
            _take_note(market, view.notes[0])
        return view


def _is_due(market: _Market, now: int) -> bool:
    if market.models is None:
        return True
    interval_days = FREQUENCIES[market.history.frequency].retrain_interval_days
    until = market.models.trained_until
    return now - until >= interval_days * DAY_S and market.history.bars.end_ts > until


def _first_usable(folders: tuple[Path, ...], source: str, market: _Market) -> ModelSet | None:
    """The newest set that loads whole; failing that, the newest that loads without trees."""
    for load in (load_model_set, load_without_trees):
        for folder in folders:
            try:
                models = load(folder)
            except ModelError as error:
                _take_note(market, str(error))
                continue
            if models.source == source:
                return models
            _take_note(
                market,
                f"the models in {folder} were trained on source {models.source!r}, not "
                f"{source!r}; train on this source.",
            )
    return None


def _last_bar(bars: Bars, until: int) -> list[str | float] | None:
    """Feed and close of the bar that closed at `until`: other bars, other past."""
    row = int(np.searchsorted(bars.close_ts, until))
    if row == len(bars) or bars.close_ts[row] != until:
        return None
    return [bars.feed, float(bars.close[row])]


def _take_note(market: _Market, sentence: str) -> None:
    """Say once, in the log and in later answers, why there are no models."""
    if sentence != market.note:
        market.note = sentence
        log.warning("%s", sentence)


def _latest_state(market: _Market, known: MarketHistory) -> MarketState | None:
    """The newest kept state that looks at nothing after the last known bar."""
    end = known.anchor_ts
    return next((state for state in reversed(market.states) if state.until <= end), None)


def _keep_state(market: _Market, state: MarketState) -> None:
    """Keep the newest state, and one a day of older moments for replays."""
    earlier = [kept for kept in market.states if kept.until < state.until]
    later = [kept for kept in market.states if kept.until > state.until]
    while len(earlier) > 1 and state.until - earlier[-2].until < STATE_SPACING_S:
        earlier.pop()
    market.states = [*earlier, state, *later]
