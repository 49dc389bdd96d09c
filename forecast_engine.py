"""From history and models to an answer.

The heart is `forecast`, a pure function: history up to now, models, state,
request and random generator in; paths out. It reads no clock, file or network,
so a replay of the past runs the very code that answers live. `ForecastEngine`
holds histories, models and states for it, and knows the retraining cadence.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Final, Self
from zlib import crc32

import numpy as np
from numpy.random import Generator

from bar_cleaning import summarise_set_aside
from config import ANCHOR_MAX_AGE_S, ASKED_AHEAD_S, DAY_S, FREQUENCIES, Frequency, asset_spec
from data_fetcher import BarSource, GrowingSource
from domain import (
    Bars,
    Diagnostics,
    FloatArray,
    Forecast,
    ForecastRequest,
    IntArray,
    MarketHistory,
    PriceQuote,
)
from ensemble import draw_moves, prepare_drawing
from errors import (
    DataError,
    MinerError,
    ModelError,
    NoPriceError,
    RequestError,
    StateError,
    UnknownAsset,
    UnreadableModel,
)
from feed_seams import common_rows
from lgbm_predictor import ModelSet, interpolate_centre, load_model_set, load_without_trees
from market_view import MarketState, MarketView, best_view
from model_store import publication, published_sets
from path_simulator import StepLaw
from price_board import Anchor, AnchorSource, PriceBoard
from protocol import protocol_profile, scoring_competition
from settings import Settings
from state_store import StateStore, go_through
from uncertainty_engine import Controller, neutral_controller, step_scales
from wire_format import format_iso

log = logging.getLogger(__name__)

STATE_KIND: Final = "market"
STATE_SCHEMA: Final = 4
CACHED_VIEWS: Final = 16  # moments per asset and frequency: callers ask for the latest few
STATE_SPACING_S: Final = DAY_S  # states of past moments that are kept for replays
# With the newest, one that is at least a day old: replays of the last day go on from it.
SAVED_STATES: Final = 3
# When the paths start, not now: a request asked twice is answered with the same notes.
OLD_AT_START_S: Final = ANCHOR_MAX_AGE_S + ASKED_AHEAD_S


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


def draw(
    request: ForecastRequest,
    view: MarketView,
    now: int,
    rng: Generator,
    anchor: Anchor | None = None,
) -> Forecast:
    """Paths for a request in the market of `view`, from `anchor` (None: the last bar)."""
    start = anchor or _bar_anchor(view)
    law = step_law(request, view, start)
    moves = draw_moves(
        rng, view.spec, law.scale, law.times, law.points, law.shape, n_paths=request.num_paths
    )
    moves += law.centre
    return Forecast(
        request=request,
        paths=law.price * np.exp(moves / 1e4),
        diagnostics=_diagnostics(request, view, now, start),
    )


def step_law(request: ForecastRequest, view: MarketView, anchor: Anchor | None = None) -> StepLaw:
    """What paths for a request are drawn from, from `anchor` (None: the last bar) on.

    Point k is the price that the network scores for `start + k · increment`,
    which is the price `scored_lag_s` later. A newer anchor than the last bar takes
    nothing from what is known about volatility: leads go on counting from the bar,
    and only what lies after the anchor is still uncertain.
    """
    start = anchor or _bar_anchor(view)
    points = request.grid_ts + view.scored_lag_s
    times = _simulation_times(start.ts, view.spec.bar_s, points, request.increment_s)
    centre = centre_path(view, points)
    if start.ts > view.anchor_ts:
        centre -= centre_path(view, times[:1])
    return StepLaw(
        price=start.price,
        times=times,
        points=points,
        scale=_scales_after_bar(view, times),
        shape=view.shape,
        centre=centre,
    )


def _bar_anchor(view: MarketView) -> Anchor:
    return Anchor(
        price=view.anchor_price, ts=view.anchor_ts, feed=None, source=AnchorSource.LAST_BAR
    )


def _scales_after_bar(view: MarketView, times: IntArray) -> FloatArray:
    """Mean |move| of the steps between `times`, whose leads count from the last bar; bps."""
    if times[0] == view.anchor_ts:
        return step_scales(view.spec, view.standardiser, view.log_levels, times)
    since = np.concatenate(([view.anchor_ts], times))
    return step_scales(view.spec, view.standardiser, view.log_levels, since)[1:]


def _simulation_times(anchor_ts: int, bar_s: int, points: IntArray, increment_s: int) -> IntArray:
    """The anchor, then equal steps of at most one bar that meet every point."""
    if points[0] < anchor_ts:
        raise RequestError(
            f"the path would start {anchor_ts - int(points[0])} s before the last known "
            "price; ask for a later start or replay with an origin."
        )
    # Not the greatest common divisor: 61 s would make 600,000 steps of a week.
    parts = -(-increment_s // bar_s)
    steps = np.arange((len(points) - 1) * parts + 1, dtype=np.int64)
    fine = points[0] + steps * increment_s // parts
    return np.concatenate(([anchor_ts], fine)) if points[0] > anchor_ts else fine


def centre_path(view: MarketView, points: IntArray) -> FloatArray:
    """Expected log move at every point since the last bar, bps; (points,)."""
    if not any(view.centre.values()):
        return np.zeros(len(points))
    leads = np.array(list(view.centre), dtype=np.int64)
    clock = view.standardiser.profile.variance_time(
        np.concatenate(([view.anchor_ts], view.anchor_ts + leads))
    )
    unit = view.standardiser.unit_bps * view.level * np.sqrt(clock[1:])
    anchors = dict(zip(leads.tolist(), unit * np.array(list(view.centre.values())), strict=True))
    return interpolate_centre(anchors, (points - view.anchor_ts).astype(np.float64))


def _diagnostics(
    request: ForecastRequest, view: MarketView, now: int, anchor: Anchor
) -> Diagnostics:
    later = view.trained_until is not None and view.trained_until > now
    notes = view.notes
    if later:
        notes = (*notes, "the models were trained on bars later than this moment")
    age_s = request.start_ts - anchor.ts
    if age_s > OLD_AT_START_S:
        notes = (*notes, f"the price is already {age_s / 60:.0f} minutes old at the start")
    return Diagnostics(
        rung=view.rung.value,
        frequency=view.spec.frequency.value,
        anchor_price=anchor.price,
        anchor_ts=anchor.ts,
        anchor_source=anchor.source.value,
        anchor_feed=anchor.feed,
        price_age_s=now - anchor.ts,
        model_id=view.model_id,
        trained_until=view.trained_until,
        models_saw_later_bars=later,
        notes=notes,
    )


def request_frequency(request: ForecastRequest) -> Frequency:
    """The set that answers: LF where its five-minute bars can make up the steps."""
    low = FREQUENCIES[Frequency.LF]
    return Frequency.LF if request.increment_s % low.bar_s == 0 else Frequency.HF


def _by_preference(frequency: Frequency) -> tuple[Frequency, ...]:
    """The frequency itself, and the other one, which answers if it has no bars."""
    return frequency, *(other for other in Frequency if other is not frequency)


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
_Moment = tuple[int, int]  # when the last price and the last bar of a history were known


@dataclass
class _Market:
    """What the engine holds for one asset at one frequency. Guarded by `lock`."""

    history: MarketHistory
    models: ModelSet | None = None
    publication: tuple[int, int] | None = None  # the one that was looked at
    note: str = "no models were trained yet"
    said: set[str] = field(default_factory=set)  # notes, since a publication was looked at
    states: list[MarketState] = field(default_factory=list)  # by rising `until`
    views: "OrderedDict[_Moment, MarketView]" = field(default_factory=OrderedDict)
    lock: RLock = field(default_factory=RLock)


class ForecastEngine:
    """Histories, models and states of every asset that a source serves.

    Thread-safe: answers may be computed side by side, and never wait for
    training. Damaged models or state cost a rung of the ladder, not an answer.
    A live source's bars grow with every `refresh`; `prices` gives answers a newer
    price than the last bar's to start from. Markets of a live source are taken up
    when they are first asked for, or by the first `refresh`.
    """

    def __init__(
        self, source: BarSource, settings: Settings, prices: PriceBoard | None = None
    ) -> None:
        self._source = source
        self._settings = settings
        self._prices = prices
        self._store = StateStore(settings.state_dir)
        self._markets: dict[Pair, _Market] = {}
        self._faults: dict[tuple[Pair, str], str] = {}
        self._taking_up = Lock()

    @classmethod
    def open(cls, source: BarSource, settings: Settings, prices: PriceBoard | None = None) -> Self:
        """Load bars, models and state of everything that the source serves."""
        engine = cls(source, settings, prices)
        if not isinstance(source, GrowingSource):
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

    def served(self) -> Mapping[str, tuple[Frequency, ...]]:
        """What prompts are expected for, whether or not there are bars of it yet."""
        return self._source.frequencies()

    def held(self, asset: str, frequency: Frequency) -> MarketHistory | None:
        """The bars in memory; None while there are none, or nobody asked for them yet."""
        market = self._markets.get((asset, frequency))
        return None if market is None else market.history

    def trained(self) -> dict[Pair, int]:
        """Pairs that answer from a trained set, and when its training data end."""
        return {
            pair: market.models.trained_until
            for pair, market in self._markets.items()
            if market.models
        }

    def history(self, asset: str, frequency: Frequency) -> MarketHistory:
        """All bars held for the pair. Raises UnknownAsset if there are none."""
        market = self._market(asset, frequency)
        if market is None:
            raise UnknownAsset(
                f"{asset} has no {frequency.value} bars here; the source serves "
                f"{', '.join(self.assets()) or 'nothing'}."
            )
        return market.history

    def anchor(self, asset: str, frequency: Frequency) -> Anchor | None:
        """What an answer would start from now; None while no price is known."""
        now = self.now()
        held = (self.held(asset, each) for each in _by_preference(frequency))
        history = next((entry for entry in held if entry is not None), None)
        known = None if history is None else history.known_at(now)
        return self._anchor(known, now) if known and len(known.price_bars) else None

    def scored_ts(self, asset: str, frequency: Frequency) -> int | None:
        """When the scored feed itself last told a price, believed or not; Unix seconds."""
        history = self.held(asset, frequency)
        told = []
        if history is not None and history.stand_in is None and len(history.price_bars):
            told.append(history.anchor_ts)
        quote = self._prices.quote(asset) if self._prices else None
        if quote is not None:
            told.append(quote.ts)
        return min(max(told), self.now()) if told else None

    def calibration(self, asset: str, frequency: Frequency) -> dict[str, float]:
        """What the controller multiplies the scale by, by lead; empty without a state."""
        market = self._markets.get((asset, frequency))
        if market is None:
            return {}
        with market.lock:
            models, state = market.models, market.states[-1] if market.states else None
        if models is None or state is None:
            return {}
        multiplier = np.exp(state.controller.log_multiplier(models.calibration.controller_gain))
        ends = (end * models.spec.bar_s for end in models.spec.bucket_ends)
        return {f"{end} s": float(value) for end, value in zip(ends, multiplier, strict=True)}

    def due(self) -> tuple[Pair, ...]:
        """Pairs without models or trees, or with models older than the retraining cadence.

        Without a bar since they were trained, old models stay: the same would come out.
        """
        now = self.now()
        return tuple(
            pair
            for pair, market in self._markets.items()
            if _is_due(market, now, self._settings.retrain_days(pair[1]))
        )

    # -- upkeep

    def refresh(self) -> None:
        """Take up bars that came or changed, and model sets that were published since.

        A market that cannot be brought up is logged once and stays as it is; others go on.
        """
        if isinstance(self._source, GrowingSource):
            for asset, frequencies in self._source.frequencies().items():
                for frequency in frequencies:
                    with self._apart((asset, frequency), "bars"):
                        self._take_up_bars(self._source, asset, frequency)
        for (asset, frequency), market in self._markets.items():
            with self._apart((asset, frequency), "models"):
                self._load_models(asset, frequency, market)
                with market.lock:
                    self._view(market, market.history)
        for market in self._markets.values():
            if market.models is not None:
                prepare_drawing(market.models.spec, market.models.calibration.path_shape)

    @contextmanager
    def _apart(self, pair: Pair, work: str) -> Iterator[None]:
        """Let a failure stay with its market, and be said when it begins."""
        about = {"asset": pair[0], "frequency": pair[1].value, "work": work}
        try:
            yield
        except Exception as error:
            if self._faults.get((pair, work)) != repr(error):
                self._faults[pair, work] = repr(error)
                if isinstance(error, MinerError):
                    log.warning("market not refreshed", extra={**about, "reason": str(error)})
                else:
                    log.exception("market not refreshed", extra=about)
        else:
            if self._faults.pop((pair, work), None) is not None:
                log.info("market refreshed again", extra=about)

    def _take_up_bars(self, source: GrowingSource, asset: str, frequency: Frequency) -> None:
        """A market appears with its first bar, and follows its bars from then on."""
        market, history = self._market(asset, frequency), source.recent(asset, frequency)
        if market is not None and history is not None:
            _follow(market, history)

    def _market(self, asset: str, frequency: Frequency) -> _Market | None:
        """The market, taken up now if nobody asked for it before; None without bars."""
        pair, source = (asset, frequency), self._source
        if pair in self._markets or not isinstance(source, GrowingSource):
            return self._markets.get(pair)
        served = source.frequencies()
        if frequency not in served.get(asset, ()):
            return None
        with self._taking_up:
            history = None if pair in self._markets else source.recent(asset, frequency)
            if history is not None:
                market = _Market(history=history)
                self._load_models(asset, frequency, market)
                held = {**self._markets, pair: market}
                # In one step and in the source's order: others look through it meanwhile.
                self._markets = {
                    (one, each): held[one, each]
                    for one, frequencies in served.items()
                    for each in frequencies
                    if (one, each) in held
                }
        return self._markets.get(pair)

    def checkpoint(self) -> None:
        """Write the newest states of every market. Raises StateError if the disk refuses."""
        go_through(self._checkpoint_market, self._markets.items())

    def _checkpoint_market(self, entry: tuple[Pair, _Market]) -> None:
        (asset, frequency), market = entry
        with market.lock:
            states, bars = market.states[-SAVED_STATES:], market.history.bars
        if states:
            saved = [{**state.to_dict(), "bars": _seen_bars(bars, state)} for state in states]
            name = self._state_name(asset, frequency)
            self._store.save(STATE_KIND, name, STATE_SCHEMA, {"states": saved})

    def _state_name(self, asset: str, frequency: Frequency) -> str:
        return f"{self._source.name}/{asset}_{frequency.value}"

    def _load_models(self, asset: str, frequency: Frequency, market: _Market) -> None:
        """Load a newly published set first and swap it in after: answers do not wait."""
        # Not the folders' names: training on the same bars again repairs a set in place.
        latest = publication(self._settings.model_dir, asset, frequency)
        if latest == market.publication:
            return
        try:
            folders = published_sets(self._settings.model_dir, asset, frequency)
            models, is_read = _first_usable(folders, self._source.name, market)
        except ModelError as error:
            _take_note(market, str(error))
            models, is_read = None, not isinstance(error, UnreadableModel)
        if not is_read and models is None:
            return  # it is looked at again by the next refresh
        states = []
        if models is not None:
            states = self._saved_states(asset, frequency, models, market.history)
            if market.models is not None:  # the first set answers at once, unprepared
                prepare_drawing(models.spec, models.calibration.path_shape)
        with market.lock:
            if models is not None:
                market.models, market.states = models, states
            market.views.clear()
        if is_read:  # not before it is in use: what failed on the way is tried again
            market.publication = latest
            market.said.clear()

    def _saved_states(
        self, asset: str, frequency: Frequency, models: ModelSet, history: MarketHistory
    ) -> list[MarketState]:
        """The states on disk that are of these models and of these bars' past."""
        name = self._state_name(asset, frequency)
        try:
            document = self._store.load(STATE_KIND, name, STATE_SCHEMA, migrations=MIGRATIONS)
        except StateError as error:  # a state saves work and changes nothing
            log.warning("%s", error)
            return []
        states = []
        for saved in document["states"] if document else ():
            state = MarketState.from_dict(saved)
            seen = _seen_bars(history.bars, state)
            if state.model_id == models.model_id and seen is not None and saved["bars"] == seen:
                states.append(state)
        return states

    # -- answers

    def answer(self, request: ForecastRequest, *, origin: int | None = None) -> Forecast:
        """Answer a prompt with what is known now, or was known at `origin`.

        Raises: UnknownAsset, NoPriceError, RequestError (an origin before the
        first usable bar).
        """
        now = self.now() if origin is None else origin
        market = self._choose_market(request)
        with market.lock:
            known = market.history.known_at(min(now, request.start_ts))
            if not len(known.price_bars):
                self._refuse_without_price(request, market, origin)
            view = self._view(market, known)
        anchor = None
        if origin is None and self._prices is not None:
            fresh = self._anchor(known, now)
            anchor = fresh if fresh.ts <= request.start_ts + known.scored_lag_s else None
        return draw(request, view, now, request_rng(self._settings.seed, request), anchor)

    def _anchor(self, known: MarketHistory, now: int) -> Anchor:
        """The freshest price by the ladder of the price board; without one, the last bar's."""
        bar = PriceQuote(price=known.anchor_price, ts=known.anchor_ts, feed=known.price_bars.feed)
        if self._prices is None:
            return Anchor(price=bar.price, ts=bar.ts, feed=bar.feed, source=AnchorSource.LAST_BAR)
        return self._prices.anchor(known.asset, bar, now)

    def _choose_market(self, request: ForecastRequest) -> _Market:
        """The market that answers. Raises: UnknownAsset, NoPriceError."""
        asset_spec(request.asset)
        for frequency in _by_preference(request_frequency(request)):
            market = self._market(request.asset, frequency)
            if market is not None:
                return market
        raise self._unserved(request.asset)

    def _unserved(self, asset: str) -> MinerError:
        """Why there is no market of a known asset."""
        served = ", ".join(self._source.frequencies())
        if not isinstance(self._source, GrowingSource):
            return UnknownAsset(f"asset {asset} has no bars here; this miner serves {served}.")
        if asset in self._source.frequencies():
            return NoPriceError(
                f"no price of {asset} is known yet; wait until bars of it are collected."
            )
        profile = protocol_profile(self._settings.profile)
        is_asked = any(scoring_competition(profile, asset, entry) for entry in Frequency)
        fault = "this miner does not serve" if is_asked else f"profile {profile.name} does not ask"
        return UnknownAsset(f"{fault} {asset}; served are {served}.")

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
        key = (known.anchor_ts, known.bars.end_ts if len(known.bars) else 0)
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


def _is_due(market: _Market, now: int, interval_days: float) -> bool:
    if market.models is None or market.models.scale_model is None:
        return True
    until = market.models.trained_until
    return now - until >= interval_days * DAY_S and market.history.bars.end_ts > until


def _first_usable(
    folders: tuple[Path, ...], source: str, market: _Market
) -> tuple[ModelSet | None, bool]:
    """The newest set that loads whole, or else without trees; and whether all could be read.

    Where one cannot be read, which may pass, what is in memory goes on.
    """
    is_read = True
    for load in (load_model_set, load_without_trees):
        for folder in folders:
            try:
                models = load(folder)
            except ModelError as error:
                _take_note(market, str(error))
                is_read = is_read and not isinstance(error, UnreadableModel)
                if market.models is not None and not is_read:
                    return None, False
                continue
            if models.source == source:
                return models, is_read
            _take_note(
                market,
                f"the models in {folder} were trained on source {models.source!r}, not "
                f"{source!r}; train on this source.",
            )
    return None, is_read


def _follow(market: _Market, history: MarketHistory) -> None:
    """Swap the history; forget what was computed from bars that are different now."""
    if history is market.history:
        return
    with market.lock:
        changed = first_change(market.history, history)
        market.history = history
        # Windows are rebuilt from bars after the averages: those must be in memory.
        first = int(history.bars.open_ts[0]) if len(history.bars) else 0
        market.states = [state for state in market.states if state.ewma.end_ts >= first]
        if changed is not None:
            market.states = [state for state in market.states if state.until < changed]
            for moment in [moment for moment in market.views if max(moment) >= changed]:
                del market.views[moment]


def first_change(old: MarketHistory, new: MarketHistory) -> int | None:
    """When the first bar closed that `old` had otherwise, or not; None if bars only came after.

    Bars that `new` has dropped at its beginning are no change.
    """
    pairs = ((old.bars, new.bars), (old.price_bars, new.price_bars))
    changes = [change for pair in pairs if (change := _first_change(*pair)) is not None]
    return min(changes, default=None)


def _first_change(old: Bars, new: Bars) -> int | None:
    if not len(old) or not len(new):
        return None
    held = old.between(int(new.open_ts[0]), None)
    now = new.between(None, old.end_ts)
    row = common_rows(held, now)
    opened = [int(bars.open_ts[row]) for bars in (held, now) if row < len(bars)]
    return min(opened) + new.bar_s if opened else None


def _seen_bars(bars: Bars, state: MarketState) -> list[str] | None:
    """Feed and digest of the bars that a state is rebuilt from: other bars, other past.

    None if the bar that it stands at is not there.
    """
    row = int(np.searchsorted(bars.close_ts, state.until))
    first = int(np.searchsorted(bars.open_ts, state.ewma.end_ts))
    has_end = row < len(bars) and bars.close_ts[row] == state.until
    if not has_end or bars.open_ts[0] > state.ewma.end_ts:
        return None
    digest = blake2b(digest_size=16)
    for column in (bars.open_ts, bars.close):
        digest.update(column[first : row + 1].tobytes())
    return [bars.feed, digest.hexdigest()]


def _from_schema_1(document: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 knew none of its bars, so what it holds is rebuilt from them."""
    return document | {"last_bar": None}


def _from_schema_2(document: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 knew its last bar alone, too little to tell whether bars were corrected."""
    return {key: value for key, value in document.items() if key != "last_bar"} | {"bars": None}


def _from_schema_3(document: dict[str, Any]) -> dict[str, Any]:
    """Schema 3 held the newest state alone."""
    return {"states": [document]}


MIGRATIONS: Final = {1: _from_schema_1, 2: _from_schema_2, 3: _from_schema_3}


def reset_calibration(state_dir: Path) -> tuple[str, ...]:
    """Let the online calibration of every saved market go on from neutral; their names.

    Before an engine opens. The newest state alone forgets: it is what answers follow
    from until a set is trained anew, which brings a calibration of its own. Moments
    before it are replayed as they were. Raises StateError if the disk refuses.
    """
    store, names = StateStore(state_dir), []
    for name in store.names(STATE_KIND):
        try:
            document = store.load(STATE_KIND, name, STATE_SCHEMA, migrations=MIGRATIONS)
        except StateError as error:
            log.warning("%s", error)
            continue
        if document and document["states"]:
            newest = document["states"][-1]
            spec = FREQUENCIES[Frequency(name.rpartition("_")[2])]
            known_until = Controller.from_dict(newest["controller"]).end_ts
            newest["controller"] = neutral_controller(spec, known_until).to_dict()
            store.save(STATE_KIND, name, STATE_SCHEMA, document)
            names.append(name)
    return tuple(names)


def _take_note(market: _Market, sentence: str) -> None:
    """Say once, in the log and in later answers, why there are no models."""
    if sentence != market.note and sentence not in market.said:
        log.warning("%s", sentence)
    market.note = sentence
    market.said.add(sentence)


def _latest_state(market: _Market, known: MarketHistory) -> MarketState | None:
    """The newest kept state that looks at nothing after the last known bar."""
    end = known.anchor_ts
    return next((state for state in reversed(market.states) if state.until <= end), None)


def _keep_state(market: _Market, state: MarketState) -> None:
    """Keep the newest state, and at most two a day of older moments for replays."""
    earlier = [kept for kept in market.states if kept.until < state.until]
    later = [kept for kept in market.states if kept.until > state.until]
    if len(later) > 1 and later[1].until - state.until < STATE_SPACING_S:
        return  # replays of ever earlier moments would each leave one
    while len(earlier) > 1 and state.until - earlier[-2].until < STATE_SPACING_S:
        earlier.pop()
    market.states = [*earlier, state, *later]
