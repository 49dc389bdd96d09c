"""Numbers for Prometheus: counted as answers go out, or read when somebody asks.

Every name begins with `lgbm_miner_`; the process itself (memory, CPU, file
handles, start time) is told under the client library's usual names. A label
never holds what a caller may choose: unknown assets are counted as "other".
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Final, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from answer_desk import ANSWERED, AnswerRecord, DeskLoad, Outcome
from config import ANCHOR_MAX_AGE_S, ASSETS
from miner_facts import AxonFacts, MarketFacts, MinerFacts
from operator_flags import Transport
from own_scores import OwnScore

T = TypeVar("T")

PREFIX: Final = "lgbm_miner_"
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


def _age(ts: float | None, now: float) -> float | None:
    return None if ts is None else now - ts


# Gauges: name, help, how to read them; None where there is nothing to tell.
_Gauges: TypeAlias = tuple[tuple[str, str, T], ...]
_MARKET: Final[_Gauges[Callable[[MarketFacts, float], float | None]]] = (
    ("bar_age_seconds", "Time since the last bar closed", lambda m, t: _age(m.last_bar_ts, t)),
    ("price_age_seconds", "Age of the price answers start from", lambda m, t: _age(m.price_ts, t)),
    ("price", "The price answers start from", lambda m, _: m.price),
    (
        "has_price",
        "1 if a price is known, 0 if prompts are refused",
        lambda m, _: m.price is not None,
    ),
    (
        "scored_price_age_seconds",
        "Time since the scored feed itself told a price, infinite before the first",
        lambda m, t: math.inf if m.scored_ts is None else t - m.scored_ts,
    ),
    ("model_age_seconds", "Time since training data end", lambda m, t: _age(m.trained_until, t)),
    ("model_trained", "1 with trained models, else 0", lambda m, _: m.trained_until is not None),
    ("training_due", "1 if a training is due, else 0", lambda m, _: m.is_due),
)
_OWN: Final[_Gauges[Callable[[OwnScore], float]]] = (
    ("own_answers_scored", "Own answers behind the scores", lambda own: own.answers),
    ("own_crps_bp", "Mean score of own answers, lower is better", lambda own: own.score),
    ("ewma_t_crps_bp", "Mean score of ewma_t on the same prompts", lambda own: own.ewma_t),
    ("own_crps_ratio", "Own score over that of ewma_t", lambda own: own.ratio),
    ("own_coverage_80", "Share of outcomes in the central 80 %", lambda own: own.covered),
)
_LOAD: Final[_Gauges[Callable[[DeskLoad], float]]] = (
    ("queue_waiting", "Distinct requests that wait", lambda load: load.waiting),
    ("queue_running", "Distinct requests being computed", lambda load: load.running),
    ("cached_answers", "Answers kept for those who ask again", lambda load: load.cached),
    ("cached_bytes", "Bytes of kept answers", lambda load: load.cached_bytes),
    (
        "day_answer_estimate_seconds",
        "Expected time of an LF answer",
        lambda load: load.seconds_per_day_answer,
    ),
)


class Metrics:
    """The miner's own registry. `observe` is an observer of the desk."""

    def __init__(
        self,
        facts: Callable[[], MinerFacts],
        load: Callable[[], DeskLoad],
        *,
        lost: Callable[[], int] = lambda: 0,
    ) -> None:
        """`lost`: records that the ledger could not keep."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}requests",
            "Requests by what became of them",
            ["transport", "outcome"],
            registry=self._registry,
        )
        self._answers = Counter(
            f"{PREFIX}answers",
            "Answers by the step of the ladder that gave them",
            ["asset", "frequency", "rung"],
            registry=self._registry,
        )
        self._anchors = Counter(
            f"{PREFIX}answers_by_anchor",
            "Answers by where the price that they start from was taken, and whether it was old",
            ["asset", "anchor", "stale"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            f"{PREFIX}answer_seconds",
            "Time from arrival to the encoded answer",
            ["frequency", "outcome"],
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        # Told as 0 from the start: a rise that begins with the series is none to Prometheus.
        for transport, outcome in product(Transport, Outcome):
            self._requests.labels(transport.value, outcome.value)
        ProcessCollector(registry=self._registry)
        self._registry.register(_Readings(facts, load, lost))

    def observe(self, record: AnswerRecord) -> None:
        """Count one request."""
        self._requests.labels(record.caller.transport, record.outcome.value).inc()
        if record.outcome not in ANSWERED or record.diagnostics is None or record.request is None:
            return
        asset = record.request.asset if record.request.asset in ASSETS else "other"
        frequency = record.diagnostics.frequency
        self._answers.labels(asset, frequency, record.diagnostics.rung).inc()
        stale = record.diagnostics.price_age_s > ANCHOR_MAX_AGE_S
        self._anchors.labels(asset, record.diagnostics.anchor_source, str(stale).lower()).inc()
        self._seconds.labels(frequency, record.outcome.value).observe(record.ms / 1e3)

    def page(self) -> bytes:
        """Everything in the text format, to be served as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def memory_bytes(self) -> float | None:
        """Resident memory of this process; None where the system does not say."""
        return self._registry.get_sample_value("process_resident_memory_bytes")


class _Readings(Collector):
    """Gauges that are read off the miner when somebody asks."""

    def __init__(
        self, facts: Callable[[], MinerFacts], load: Callable[[], DeskLoad], lost: Callable[[], int]
    ) -> None:
        self._facts = facts
        self._load = load
        self._lost = lost

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks for no facts yet

    def collect(self) -> Iterator[Metric]:
        facts = self._facts()
        for name, text, read in _MARKET:
            yield _by_market(name, text, [(m, read(m, facts.now)) for m in facts.markets])
        for name, text, tell in _OWN:
            yield _by_market(name, text, [(m, tell(m.own)) for m in facts.markets if m.own])
        yield _calibration(facts)
        if facts.axon is not None:
            yield from _of_axon(facts.axon)
        if facts.clock_offset_s is not None:
            text = "Our clock less the venues', to about a second"
            yield GaugeMetricFamily(f"{PREFIX}clock_offset_seconds", text, facts.clock_offset_s)
        failing = GaugeMetricFamily(
            f"{PREFIX}feed_failing", "1 for a scored feed that gives no candles", labels=("feed",)
        )
        for feed in facts.failing_feeds:
            failing.add_metric((feed,), 1)
        yield failing
        text = "Feeds whose bars the disk refused"
        yield GaugeMetricFamily(f"{PREFIX}unsaved_feeds", text, len(facts.unsaved_feeds))
        load = self._load()
        for name, text, measure in _LOAD:
            yield GaugeMetricFamily(f"{PREFIX}{name}", text, value=measure(load))
        yield GaugeMetricFamily(f"{PREFIX}ready", "1 if it can answer", not facts.obstacles)
        yield GaugeMetricFamily(f"{PREFIX}warnings", "Warnings now", len(facts.warnings))
        yield GaugeMetricFamily(f"{PREFIX}ledger_lost", "Records that were lost", self._lost())


def _by_market(name: str, text: str, values: Sequence[tuple[MarketFacts, float | None]]) -> Metric:
    gauge = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=("asset", "frequency"))
    for market, value in values:
        if value is not None:
            gauge.add_metric((market.asset, market.frequency.value), float(value))
    return gauge


def _of_axon(axon: AxonFacts) -> Iterator[Metric]:
    """What only an axon has; nothing of a chain where there is none."""
    yield GaugeMetricFamily(f"{PREFIX}axon_up", "1 while the axon listens, else 0", axon.is_up)
    chain = axon.chain
    if chain is None:
        return
    age_s = math.inf if chain.age_s is None else chain.age_s  # so that an alert sees it
    text = "Time since the chain was read, infinite before the first time"
    yield GaugeMetricFamily(f"{PREFIX}chain_age_seconds", text, age_s)
    if chain.is_registered is not None:
        text = "1 if our hotkey is registered, else 0"
        yield GaugeMetricFamily(f"{PREFIX}registered", text, chain.is_registered)


def _calibration(facts: MinerFacts) -> Metric:
    gauge = GaugeMetricFamily(
        f"{PREFIX}calibration",
        "Scalars that the regime controller moves",
        labels=("asset", "frequency", "name"),
    )
    for market in facts.markets:
        for name, value in market.calibration.items():
            gauge.add_metric((market.asset, market.frequency.value, name), value)
    return gauge
