"""The long-lived process: answers prompts, collects, retrains, scores itself, saves.

    python miner.py                                        # the feeds that are scored, HTTP
    python miner.py --wallet.name miner --wallet.hotkey default --axon.port 8091
    python miner.py --source archive --archive-dir DIR     # replay an archive
    curl -s localhost:8091/healthz

Answers never wait: everything else is a duty on a thread of its own, and trainings
run in low-priority processes, one at a time. An unreachable feed stops nothing: the
miner answers from what it has, retries, and says so.
"""

import logging
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from math import inf
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from allocator import free_cycles, give_memory_back, trim

if __name__ == "__main__":
    give_memory_back()  # before NumPy starts its threads, which get heaps of their own

from answer_desk import AnswerDesk
from clock import Clock, market_speed, open_clock
from config import DAY_S, Frequency, Venue
from console import (
    add_common_arguments,
    run_script,
    script_parser,
    settings_from,
)
from data_fetcher import BarSource, LiveSource, open_source
from errors import StateError
from forecast_engine import ForecastEngine, reset_calibration
from http_service import bind, build_app, server_for
from ledger import LEDGER_FILE, Ledger
from live_market import LiveMarket
from log_lines import log_in_background
from metrics import Metrics
from miner_facts import AxonFacts, EngineFacts, MinerFacts, with_axon
from operator_flags import (
    PAGE_PORT,
    PAGES_AWAY,
    OperatorSettings,
    Transport,
    add_operator_arguments,
    operator_settings,
    page_port,
)
from own_scores import ScoreKeeper
from protocol import protocol_profile
from record_keeping import keeper
from retraining import Pair, Retrainer, training_command
from set_review import review_sets
from settings import Settings
from state_store import StateStore, folder_mark, owned, require_folder, require_writable
from status_page import RecentLog, RecentRequests, StatusPage
from upkeep import Duty, Upkeep, attempt, each, every

if TYPE_CHECKING:
    from axon_adapter import AxonServer

REFRESH_S: Final = 5
CHECKPOINT_S: Final = 60
# Nine prices of Hyperliquid weigh 198 of its 1200 a minute, twice a minute; its candles 378.
QUOTES_S: Final = 30
BACKFILL_S: Final = 3600
BACKFILL_AGAIN_S: Final = 60  # after one that a failing feed cut short
REVIEW_S: Final = 1800
PRUNE_S: Final = 3600
PROGRESS_S: Final = 60  # between two lines about a back-fill
TRIM_S: Final = 60
# At the start the first answer comes first; what is asked for is taken up without these.
REFRESH_AFTER_S: Final = 2
BACKFILL_AFTER_S: Final = 5
LATER_S: Final = 30
BARS_LATE_S: Final = 3600  # by which a clock may be ahead of the newest bar and be right
# Of market time by the venues' clocks: a minute's candle is closed and settled there.
COLLECT_OFFSET_S: Final = 3
OFFSET_JITTER_S: Final = 2  # to which our clock's distance from the venues' is known, rather less
SCORE_OFFSET_S: Final = 30
TRIM_OFFSET_S: Final = 50  # what the minute's bars needed is free again
STOP_S: Final = 3  # for duties under way when the miner is told to stop

log = logging.getLogger("miner")


# ---------------------------------------------------------------- the parts together


class Miner:
    """Engine, desk, ledger and pages of one running miner; its duties are `duties`."""

    def __init__(self, settings: Settings, market: LiveMarket | None, source: BarSource) -> None:
        self.clock: Clock = open_clock(settings)
        self.market = market
        if source.live:  # what is asked for is taken up first, the rest by the first refresh
            self.engine = ForecastEngine(source, settings, market.prices if market else None)
        else:
            self.engine = ForecastEngine.open(source, settings)
        self._settings = settings
        self._source = source
        self._is_loaded = False
        self.axon: Callable[[], AxonFacts] | None = None  # set while there is one
        self.ledger = Ledger(settings.state_dir / LEDGER_FILE)
        profile = protocol_profile(settings.profile)
        self.scores = ScoreKeeper(self.ledger, self.engine, profile, seed=settings.seed)
        requests, lines = RecentRequests(), RecentLog()
        logging.getLogger().addHandler(lines)
        self.desk = AnswerDesk(
            self.engine, observers=[keeper(self.ledger, profile), requests.observe]
        )
        facts = EngineFacts(
            self.engine,
            source=source.name,
            is_live=source.live,
            own=self.scores.latest,
            extra=self._fill,
        )
        metrics = Metrics(facts.facts, self.desk.load, lost=lambda: self.ledger.lost)
        self.desk.watch(metrics.observe)
        page = StatusPage(facts, self.desk.load, requests, lines, memory=metrics.memory_bytes)
        self.app = build_app(
            self.desk,
            now=self.now,
            facts=facts,
            metrics=metrics,
            page=page,
            speed=market_speed(self.clock),
            mark=folder_mark(settings.state_dir),
        )

    def now(self) -> float:
        """The clock for a live source, else the end of the source's bars; Unix seconds."""
        return self.clock.now() if self._source.live else float(self.engine.now())

    def settled_now(self) -> float:
        """Now, but hardly later than the newest bar; -inf before the first one.

        What is kept ages by this: a clock that jumps ahead must not make it look old.
        """
        held = (
            self.engine.held(asset, frequency)
            for asset, frequencies in self.engine.served().items()
            for frequency in frequencies
        )
        ends = [history.bars.end_ts for history in held if history and len(history.bars)]
        return min(self.now(), max(ends, default=-inf) + BARS_LATE_S)

    def close(self) -> None:
        """Refuse what still waits, and finish the ledger."""
        self.desk.close()
        self.ledger.close()

    def line(self, url: str) -> str:
        """The one line printed at the start."""
        engine = self.engine
        if self._source.live:
            return loading_line(url, self._source)
        return serving_line(
            url,
            self._source.name,
            engine.assets(),
            trained=engine.trained(),
            due=engine.due(),
            now=engine.now(),
        )

    def refresh(self) -> None:
        """Take up new bars and sets; say once what there was at the start."""
        self.engine.refresh()
        if not self._is_loaded:
            self._is_loaded = True
            engine = self.engine
            trained, due = engine.trained(), engine.due()
            found = {"markets": len({*trained, *due}), "trained": len(trained), "due": len(due)}
            log.info("loaded", extra=found)

    def score(self) -> None:
        """Score the answers whose outcome is known by now."""
        self.scores.step(self.settled_now())

    def prune(self) -> None:
        """Delete from the ledger what it keeps no longer."""
        self.ledger.prune(self.settled_now())

    def tidy(self) -> None:
        """Let go of answers that nobody gets any more, and give back what memory is free."""
        self.desk.expire()
        free_cycles()
        trim()

    def due(self) -> Sequence[Pair]:
        """What to train; nothing while the past of a live source is still being fetched."""
        if self.market is not None and not self.market.has_past:
            return ()
        return self.engine.due()

    def _fill(self, facts: MinerFacts) -> MinerFacts:
        """The facts with the axon, and the feeds that fail."""
        if self.axon is not None:
            facts = with_axon(facts, self.axon())
        if self.market is None:
            return facts
        return replace(
            facts,
            warnings=(*facts.warnings, *self.market.warnings()),
            failing_feeds=self.market.failing_feeds(),
            unsaved_feeds=self.market.unsaved_feeds(),
            clock_offset_s=self.market.clock_offset_s(),
        )


class BackfillLog:
    """Says now and then how far one back-fill is: the first one takes up to half an hour.

    A `collector.Progress`, whose calls come one at a time. Days are those of all series.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._began = self._called = self._told = monotonic()
        self._done = self._total = 0

    def __call__(self, done: int, total: int, what: str) -> None:
        """Take note of `done` of `total` days, the latest of `what`; a line a minute at most."""
        if total != self._total or done <= self._done:  # what earlier rounds left is counted anew
            self._began = self._called
        now = self._called = self._monotonic()
        self._done, self._total = done, total
        if now - self._told < PROGRESS_S:
            return
        self._told = now
        per_minute = 60 * done / (now - self._began)
        line = {
            "latest": what,
            "days": done,
            "of": total,
            "days_per_minute": round(per_minute, 1),
            "minutes_left": round((total - done) / per_minute, 1),
        }
        log.info("fetching the past", extra=line)


def duties(miner: Miner, settings: Settings, retrainer: Retrainer) -> list[Duty]:
    """Everything that goes on beside answering, each on its own cadence."""
    speed = market_speed(miner.clock)
    refresh = Duty("refresh", miner.refresh, every(REFRESH_S), after_s=REFRESH_AFTER_S)
    plan = [
        refresh,
        Duty("retrain", retrainer.step, every(REFRESH_S)),
        Duty("checkpoint", miner.engine.checkpoint, every(CHECKPOINT_S), after_s=CHECKPOINT_S),
        Duty(
            "own scores",
            miner.score,
            each(miner.clock, 60, offset_s=SCORE_OFFSET_S),
            after_s=LATER_S,
        ),
        Duty("prune", miner.prune, every(PRUNE_S), after_s=LATER_S),
        Duty("trim", miner.tidy, each(miner.clock, TRIM_S * speed, offset_s=TRIM_OFFSET_S), TRIM_S),
        Duty(
            "review", lambda: review_sets(miner.engine, settings), every(REVIEW_S), after_s=REVIEW_S
        ),
    ]
    market = miner.market
    if market is not None:
        for venue in market.venues():
            plan += _venue_duties(venue, market, miner.clock, refresh)
        plan += [
            Duty(
                "backfill",
                lambda: market.backfill(BackfillLog()),
                lambda: BACKFILL_AGAIN_S if market.awaits_past() else BACKFILL_S,
                after_s=BACKFILL_AFTER_S,
            ),
        ]
    return plan


def _venue_duties(venue: Venue, market: LiveMarket, clock: Clock, refresh: Duty) -> list[Duty]:
    """What is asked of one venue; a slow one keeps no other's bars and prices waiting."""
    speed, collected = market_speed(clock), -inf

    def offset_s() -> float:
        return COLLECT_OFFSET_S + max(0.0, market.clock_offset_s() or 0.0) * speed

    def collect() -> None:
        nonlocal collected
        collected = (clock.now() - offset_s() + OFFSET_JITTER_S) // 60
        market.collect([venue])
        refresh.wake()  # so that a view of the new bar is ready before it is asked for

    def quotes() -> None:
        market.poll([venue])

    def until_the_next_candle() -> float:
        now, offset = clock.now(), offset_s()
        pause_s = each(clock, 60, offset_s=offset)()
        # Our clock's distance is known to some tenths of a second only: the minute that was
        # just collected may seem to lie ahead again.
        is_done = round((now + pause_s * speed - offset) / 60) <= collected
        return pause_s + 60 / speed if is_done else pause_s

    return [
        Duty(f"collect {venue}", collect, until_the_next_candle),
        Duty(f"quotes {venue}", quotes, every(QUOTES_S / speed)),
    ]


@contextmanager
def _running(settings: Settings, config_file: Path | None) -> Iterator[Miner]:
    """A miner whose duties run for as long as the block does; saved once more at the end."""
    source = open_source(settings)
    with ExitStack() as opened:
        market = None
        if isinstance(source, LiveSource):
            market = opened.enter_context(LiveMarket.open(settings, source))
        miner = Miner(settings, market, source)
        opened.callback(miner.close)
        retrainer = Retrainer(miner.due, partial(training_command, settings, config_file))
        upkeep = Upkeep(duties(miner, settings, retrainer))
        upkeep.start()
        try:
            yield miner
        finally:
            if market is not None:
                market.stop()
            upkeep.stop(STOP_S)
            retrainer.stop()
            attempt(Duty("checkpoint", miner.engine.checkpoint, every(CHECKPOINT_S)))


def serving_line(
    url: str,
    source: str,
    assets: Sequence[str],
    *,
    trained: Mapping[Pair, int],
    due: Sequence[Pair],
    now: int,
) -> str:
    """The one line printed at the start: what is served, where, from models how old."""
    market = "a SIMULATED market" if source == "simulated" else f"source {source}"
    held = {*trained, *due}  # what has no models is due
    served = {
        asset: [frequency for frequency in Frequency if (asset, frequency) in held]
        for asset in assets
    }
    old = len(set(trained) & set(due))
    where = f"serving {_named(served)} on {url} from {market}"
    if not trained:
        return f"{where}; none of {len(held)} model sets is trained yet, all are trained now."
    age_days = (now - min(trained.values())) / DAY_S
    absent = len(held) - len(trained)
    others = f"; the other {absent} {'is' if absent == 1 else 'are'} trained now" if absent else ""
    return (
        f"{where}; {len(trained)} of {len(held)} model sets are trained, the oldest "
        f"{age_days:.1f} days ago, {old or 'none'} of them due again{others}."
    )


def loading_line(url: str, source: BarSource) -> str:
    """What a live miner prints at the start, when it has not looked at its files yet."""
    return (
        f"serving {_named(source.frequencies())} on {url} from source {source.name}; bars and "
        "models are taken up now, and collected and trained where there are none."
    )


def _named(served: Mapping[str, Sequence[Frequency]]) -> str:
    return ", ".join(f"{asset} {'+'.join(frequencies)}" for asset, frequencies in served.items())


# ---------------------------------------------------------------- the process


def main() -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code."""
    args = _arguments()
    settings, operator = settings_from(args), operator_settings(args)
    log_in_background(operator.log_level or settings.log_level)
    for remark in operator.remarks:
        log.warning("%s", remark)
    require_writable(settings.state_dir, "--state-dir")
    require_folder(settings.model_dir, "--model-dir")  # trained elsewhere, it may be read-only
    _on_stop_signals(lambda *_: sys.exit(0))  # nothing to save yet
    with ExitStack() as opened:
        _own_state(opened, settings.state_dir)
        if args.reset_calibration:
            log.info("calibration reset", extra={"markets": reset_calibration(settings.state_dir)})
        # What is wrong with ports and wallet is known before a venue is asked: a process
        # manager starts a miner that ends over and over.
        listener = bind(settings.host, page_port(settings, operator))
        opened.callback(listener.close)
        axon = _bound_axon(operator)
        if axon is not None:
            opened.callback(axon.stop)
        miner = opened.enter_context(_running(settings, args.config))
        server = server_for(miner.app)
        _on_stop_signals(lambda *_: setattr(server, "should_exit", True))
        if axon is not None:
            opened.enter_context(_serving(axon, miner, operator, settings))
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(miner.line(url), flush=True)
        server.run(sockets=[listener])
        log.info("stopping")
    log.info("stopped")
    return 0


def _own_state(opened: ExitStack, state_dir: Path) -> None:
    """Take the state folder for as long as the stack is open. Raises: BusyError."""
    try:
        opened.enter_context(owned(state_dir))
    except StateError as error:  # a disk that refuses stops no answer, so not this either
        log.warning("%s", error)


def _bound_axon(operator: OperatorSettings) -> "AxonServer | None":
    """The axon with its wallet and its port, if the flags ask for one. Raises: ConfigError."""
    if operator.transport is not Transport.AXON:
        return None
    # Here, because only an axon needs bittensor, which takes seconds to import.
    from axon_adapter import AxonServer

    return AxonServer(operator.axon)


@contextmanager
def _serving(
    axon: "AxonServer", miner: Miner, operator: OperatorSettings, settings: Settings
) -> Iterator[None]:
    """The axon asks the miner's desk for as long as the block runs."""
    from axon_adapter import serving

    with serving(axon, miner.desk, operator, StateStore(settings.state_dir), now=miner.clock.now):
        log.info("axon", extra={"port": axon.port, "hotkey": axon.hotkey})
        miner.axon = axon.facts
        yield


def _on_stop_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _arguments() -> Namespace:
    parser = script_parser(
        "Answer prompts, collect bars, retrain when models are due, and score what was answered.",
        examples=[
            "python miner.py --wallet.name miner --wallet.hotkey default --axon.port 8091",
            "python miner.py --source archive --archive-dir bars --port 8091",
            "python miner.py --source simulated --model-dir build/models --state-dir build/state",
        ],
    )
    add_common_arguments(parser)
    add_operator_arguments(parser)
    group = parser.add_argument_group("serving")
    defaults = {entry.name: entry.default for entry in fields(Settings)}
    group.add_argument(
        "--host", metavar="ADDRESS", help=f"listen here (default: {defaults['host']})"
    )
    group.add_argument(
        "--port",
        metavar="N",
        help=f"TCP port of prompts and pages over HTTP, 0 for a free one (default: {PAGE_PORT}, or "
        f"with an axon its own plus {PAGES_AWAY}, e.g. {PAGE_PORT + PAGES_AWAY})",
    )
    group.add_argument(
        "--log-level",
        metavar="{debug,info,warning,error}",
        help=f"least important lines to log (default: {defaults['log_level']})",
    )
    group.add_argument(
        "--reset-calibration",
        action="store_true",
        help="start the online calibration from neutral, until a set is trained anew",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
