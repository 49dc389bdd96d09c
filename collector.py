"""Keeps the stored bars of every feed whole and growing.

Two duties. `collect` runs every minute, for each venue on its own: it appends the
candles that closed, asks for gaps of the last day, and reads the newest bars again,
because venues correct them; once an hour, and once a day, it reads further back. After
a failure the newest are read by themselves first: whatever is wrong with older ones, or
with long calls, keeps no new bar away.
`backfill` runs on the first start and after a break: it fetches what is missing of the
past, newest first and for all assets alike, so that the miner is of use as soon as can
be. What it finds on the disk it never asks for again, so both may be interrupted
anywhere, and two processes on one folder find each other's work done.

Of feeds that are not scored only history is fetched, and only where the scored
feed has none: before its first bar and in holes of days. Only while a scored feed
fails of which no bar is stored do others of its price stand in, minute by minute.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from threading import Event, Lock
from typing import Final, TypeVar

import numpy as np

from bar_cleaning import MAX_SPIKE_BARS, MINUTE_S, SPIKE, SetAsideBar
from bar_store import BarStore
from clock import Clock
from config import DAY_S, FREQUENCIES, VENUE_BARS_KEPT, FeedSymbol, Frequency, Venue
from domain import Bars, Candles
from errors import (
    CountryBlocked,
    DataError,
    FeedFailed,
    FeedRefused,
    MinerError,
    SourceUnavailable,
    StateError,
)
from feed_faults import FaultLog
from feed_plans import FeedPlan, scored_at, venues_down
from feed_seams import HOLE_S
from feeds import Feed
from level_changes import shares_level, sift_levels
from quarantine import Quarantine
from spans import Span, clip_spans, merge_spans, subtract_spans
from state_store import go_through

T = TypeVar("T")

REREAD_BARS: Final = 5  # read again with every append
LATE_REREAD_S: Final = 2 * 3600  # read again once every hour
LATE_EVERY_S: Final = 3600
DAILY_REREAD_S: Final = 2 * DAY_S  # read again once every day
SETTLE_S: Final = 600  # a younger gap may still be filled: it is asked for again
REPAIR_S: Final = DAY_S  # gaps that `collect` looks for; older ones are `backfill`'s
PAST_PAUSE_S: Final = 600  # after a call for older bars that failed
NEARBY_S: Final = 3600  # gaps that lie closer together are asked for in one call
CHUNK_S: Final = 5 * DAY_S  # of one call of a back-fill; all that an interrupt can lose
OVERLAP_S: Final = 3600  # of two feeds at a seam, so that their levels can be compared
FAULTS_OF_A_VENUE: Final = 2  # feeds in a row
STAND_IN_DAYS: Final = 15  # of other feeds' bars where nothing of a failing scored one is stored
_FAILING: Final = "feed failing"  # in the log
_PAST_FAILING: Final = "older bars not read"  # while the newest ones are
_UNSAVED: Final = "bars not stored"
_EDGE_BARS: Final = 5  # a venue drops its oldest bars while it is being asked

Progress = Callable[[int, int, str], None]  # days done, days in all, what is fetched


@dataclass(frozen=True, slots=True)
class Series:
    """One stored series and the feed it comes from."""

    asset: str
    feed: FeedSymbol
    bar_s: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Venue, asset and bar length, as the store names it."""
        return self.feed.venue.value, self.asset, self.bar_s

    def oldest(self, now: int, days: float) -> int:
        """The first moment that is worth asking for: kept by the venue, and wanted."""
        wanted = int(now - days * DAY_S)
        kept = VENUE_BARS_KEPT.get(self.feed.venue)
        if kept is not None:
            wanted = max(wanted, now - (kept - _EDGE_BARS) * self.bar_s)
        return -(-wanted // self.bar_s) * self.bar_s


@dataclass(slots=True)
class Collected:
    """What one run did."""

    new: int = 0
    corrected: int = 0
    refused: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # feed → one sentence
    unsaved: dict[str, str] = field(default_factory=dict)  # feed → why the disk refused its bars
    doubts: dict[str, str] = field(default_factory=dict)  # feed → why its newest bars wait

    def add(self, other: "Collected") -> None:
        """Take in what another thread did."""
        self.new += other.new
        self.corrected += other.corrected
        self.refused += other.refused
        self.failures |= other.failures
        self.unsaved |= other.unsaved
        self.doubts |= other.doubts


@dataclass(frozen=True, slots=True)
class _Pause:
    """Why a series' older bars are not asked for, and until when."""

    reason: str
    until: int


class Collector:
    """Fetches into the store. One per process; safe between threads."""

    def __init__(
        self,
        plans: Mapping[str, FeedPlan],
        feeds: Mapping[Venue, Feed],
        store: BarStore,
        quarantine: Quarantine,
        clock: Clock,
        *,
        days: float,
        faults: FaultLog | None = None,
    ) -> None:
        self._plans = plans
        self._feeds = feeds
        self._store = store
        self._quarantine = quarantine
        self._clock = clock
        self._days = days
        self._read_at: dict[Series, int] = {}
        self._pauses: dict[Series, _Pause] = {}
        self._standing: dict[str, set[str]] = {}  # by asset: feeds that stand in for its own
        self._visits = VenueVisits()
        self._doubts: dict[str, str] = {}
        self._doubts_lock = Lock()
        self._faults = faults or FaultLog()

    # -- every minute

    def collect(self, venues: Collection[Venue] | None = None) -> Collected:
        """Bring the series scored at the venues (all) up to now; failures are logged once.

        A venue that cannot be reached is left alone until the next time; the others
        go on, and who asks for them one by one waits for none of the others. Never
        raises for a feed.
        """
        now = int(self._clock.now())
        plans = scored_at(self._plans, venues)

        def bring_up(series: Series, into: Collected) -> None:
            self._bring_up(series, now, into)

        series = [entry for plan in plans for entry in scored_series(plan)]
        done = self._by_venue(series, bring_up)
        self._report(done, {entry.feed.name for entry in series})
        down = venues_down(self._plans, self.failing())
        stand_ins = [
            Series(plan.asset, feed, MINUTE_S)
            for plan in plans
            if self._is_bare(plan, done.failures, now)
            for feed in plan.others
            if feed.same_price and feed.venue not in down
        ]
        stood_in = self._by_venue(stand_ins, bring_up)
        standing = self._change_stand_ins(plans, stand_ins)
        self._report(stood_in, standing)
        done.add(stood_in)
        self._report_past([*series, *stand_ins])
        asked = standing | {entry.feed.name for entry in series}
        with self._doubts_lock:
            others = {name: why for name, why in self._doubts.items() if name not in asked}
            self._doubts = others | done.doubts
        return done

    def _change_stand_ins(self, plans: Iterable[FeedPlan], now: Sequence[Series]) -> set[str]:
        """Who stands in for feeds of the plans now, or did before.

        Who does so no longer is not asked again: what was said of it is over, too.
        """
        former = {name for plan in plans for name in self._standing.pop(plan.asset, ())}
        for entry in now:
            self._standing.setdefault(entry.asset, set()).add(entry.feed.name)
        return former | {entry.feed.name for entry in now}

    def _is_bare(self, plan: FeedPlan, failing: Collection[str], now: int) -> bool:
        """Whether the scored feed fails and no bar of it is stored."""
        start = (now // DAY_S - STAND_IN_DAYS) * DAY_S
        return plan.scored.name in failing and all(
            self._store.empty(*entry.key, start, now) == [(start, now // entry.bar_s * entry.bar_s)]
            for entry in scored_series(plan)
        )

    def _bring_up(self, series: Series, now: int, into: Collected) -> None:
        """Bring the newest bars, and with them what is missing or may have been corrected.

        After a failure the newest alone come first, by a short call.
        """
        pause = self._pauses.get(series)
        is_after_failure = pause is not None or series.feed.name in self.failing()
        if is_after_failure:
            end = now // series.bar_s * series.bar_s
            newest = max(series.oldest(now, self._days), end - REREAD_BARS * series.bar_s)
            self._fetch(series, newest, end, now, into)
        if pause is not None and now < pause.until <= now + PAST_PAUSE_S:  # else the clock jumped
            return
        spans = self._to_read(series, now)
        try:
            go_through(lambda span: self._fetch(series, *span, now, into), reversed(spans))
        except StateError:
            # What is missing is asked for again anyhow, and a day that cannot be read would
            # have two days fetched anew every minute.
            self._read_at[series] = now
            raise
        except DataError as error:
            if not is_after_failure:
                raise
            self._pause(series, error, now)
        else:
            self._pauses.pop(series, None)
            self._read_at[series] = now

    def _to_read(self, series: Series, now: int) -> list[Span]:
        """What is missing of the last day, and what may have been corrected, in calls."""
        end = now // series.bar_s * series.bar_s
        first = series.oldest(now, min(self._days, REPAIR_S / DAY_S))
        missing = self._store.missing(*series.key, first, end)
        reread = max(series.oldest(now, self._days), end - self._reread_s(series, now))
        return _calls([*missing, (reread, end)])

    def _pause(self, series: Series, error: DataError, now: int) -> None:
        """Ask for no older bars for a while: of the series, or of a venue that long calls break."""
        pause = _Pause(str(error), now + PAST_PAUSE_S)
        self._pauses[series] = pause
        if concerns_whole_venue(error):
            at_venue = scored_at(self._plans, [series.feed.venue])
            self._pauses |= {entry: pause for plan in at_venue for entry in scored_series(plan)}

    def _report_past(self, series: Sequence[Series]) -> None:
        """Tell once of feeds whose older bars cannot be read though their newest can."""
        paused = {
            entry.feed.name: self._pauses[entry].reason for entry in series if entry in self._pauses
        }
        asked = {entry.feed.name for entry in series}
        self._faults.report(_PAST_FAILING, paused, asked, over="older bars are read again")

    def _reread_s(self, series: Series, now: int) -> int:
        """How far back to read again: the last bars, and with a new hour or day more."""
        before = self._read_at.get(series, 0)
        if now // DAY_S != before // DAY_S:
            return DAILY_REREAD_S
        usual = REREAD_BARS * series.bar_s
        if now // LATE_EVERY_S != before // LATE_EVERY_S:
            usual = LATE_REREAD_S
        # After an outage also what was new before it: it may have been corrected since.
        return now - before + usual if now - before > usual else usual

    # -- the past

    def backfill(
        self,
        assets: Iterable[str] | None = None,
        *,
        progress: Progress = lambda _done, _total, _what: None,
        stop: Event | None = None,
    ) -> Collected:
        """Fetch what is missing of the past, newest first; ends early when `stop` is set.

        What the scored feed turns out to lack is then looked for in other feeds.
        """
        plans = [self._plans[asset] for asset in assets or self._plans]
        halt = stop or Event()
        total, tried, worked = Collected(), set[tuple[Series, Span]](), set[str]()
        now = int(self._clock.now())  # one for all rounds, so that they come to an end
        while not halt.is_set():
            failing = total.failures.keys() | self.failing().keys()
            chunks = [c for c in self._chunks(plans, now, failing) if c not in tried]
            if not chunks:
                break
            tried |= set(chunks)
            bar = _Bar(progress, sum(_days(span) for _, span in chunks))
            done = self._fetch_all(chunks, now, bar, halt)
            if not halt.is_set():  # else some were not asked
                worked |= {series.feed.name for series, _ in chunks} - done.failures.keys()
            total.add(done)
        self._report(total, total.failures.keys() | worked)
        return total

    def _chunks(
        self, plans: Sequence[FeedPlan], now: int, failing: Collection[str]
    ) -> list[tuple[Series, Span]]:
        """What is missing, in calls, the newest first."""
        wanted = [
            (series, span)
            for plan in plans
            for series, spans in self._wanted(plan, now, failing)
            for part in self._lacking(series, spans)
            for span in _cut(part)
        ]
        return sorted(wanted, key=lambda chunk: -(chunk[1][1] // CHUNK_S))

    def _lacking(self, series: Series, spans: Iterable[Span]) -> list[Span]:
        missing = [
            gap for low, high in spans for gap in self._store.missing(*series.key, low, high)
        ]
        return _calls(missing)

    def _wanted(
        self, plan: FeedPlan, now: int, failing: Collection[str]
    ) -> Iterator[tuple[Series, list[Span]]]:
        """What each series should hold. Other feeds: what all better ones cannot give."""
        settled = (now - SETTLE_S) // MINUTE_S * MINUTE_S
        for series in scored_series(plan):
            yield series, [(series.oldest(now, self._days), settled)]
        start = -(-int(now - self._days * DAY_S) // MINUTE_S) * MINUTE_S
        minutes = Series(plan.asset, plan.scored, MINUTE_S)
        holes = self._holes(minutes, [(start, settled)], now)
        is_bare = self._is_bare(plan, failing, now)
        if is_bare:
            since = max(start, now // MINUTE_S * MINUTE_S - STAND_IN_DAYS * DAY_S)
            holes = merge_spans([*holes, (since, settled)])
        for feed in plan.others:
            series = Series(plan.asset, feed, MINUTE_S)
            reach = [(low - OVERLAP_S, min(high + OVERLAP_S, settled)) for low, high in holes]
            yield series, clip_spans(reach, series.oldest(now, self._days), settled)
            if not (is_bare and feed.name in failing):  # else the next one fills them
                holes = self._holes(series, holes, now)

    def _holes(self, series: Series, within: Iterable[Span], now: int) -> list[Span]:
        """Time that the series has no bar of and will get none: its beginning, and days."""
        holes: list[Span] = []
        for start, end in within:
            empty = self._store.empty(*series.key, start, end)
            large = [(low, high) for low, high in empty if low == start or high - low >= HOLE_S]
            coming = self._store.missing(*series.key, series.oldest(now, self._days), end)
            holes += subtract_spans(large, coming)
        return [(low, high) for low, high in merge_spans(holes) if high - low >= MINUTE_S]

    def _fetch_all(
        self, chunks: Sequence[tuple[Series, Span]], now: int, bar: "_Bar", halt: Event
    ) -> Collected:
        spans: dict[Series, list[Span]] = {}
        for series, span in chunks:
            spans.setdefault(series, []).append(span)
        order = [series for series, _ in chunks]  # newest first, and so within each series

        def fetch(series: Series, into: Collected) -> None:
            start, end = spans[series].pop(0)
            if not halt.is_set():
                # Another process may have fetched it meanwhile.
                for low, high in self._lacking(series, [(start, end)]):
                    self._fetch(series, low, high, now, into)
                bar.advance(_days((start, end)), series)

        return self._by_venue(order, fetch, halt)

    # -- one call

    def _fetch(self, series: Series, start: int, end: int, now: int, into: Collected) -> None:
        """Ask for a span, store what is sound, set the rest aside.

        A jump in the last few bars waits for its neighbours: it is neither stored
        nor refused, and its time stays unchecked. So does for a day the time of what
        was refused: venues withdraw nonsense, and another level may be confirmed.
        """
        feed = self._feeds[series.feed.venue]
        fetched, set_aside = feed.candles(series.feed.symbol, series.bar_s, start, end)
        shown, end = self._shown(series, fetched, start, end, now)
        candles, doubted = sift_levels(
            shown, self._level_before(series, start), lambda bars: self._witnessed(series, bars)
        )
        edge = now // series.bar_s * series.bar_s - MAX_SPIKE_BARS * series.bar_s
        waiting = [row for row in set_aside if row.reason == SPIKE and row.ts >= edge]
        confirmed = self._confirmed(
            series, [row for row in set_aside if row.reason == SPIKE and row not in waiting]
        )
        settled = (now - SETTLE_S) // series.bar_s * series.bar_s
        refused = [row for row in set_aside if row not in waiting and row not in confirmed]
        refused += doubted
        doubtful = (row.ts for row in refused if row.ts >= max(start, now - REPAIR_S))
        until = min([end, settled, *(row.ts for row in waiting), *doubtful])
        self._append(series, candles, (start, until) if start < until else None, into)
        if confirmed:
            self._append(series, _closes_alone(confirmed, series), None, into)
        if doubted and doubted[-1].ts >= now - REPAIR_S:
            into.doubts[series.feed.name] = (
                f"{series.asset}: {len(doubted)} bars of {series.feed.name} at "
                f"{doubted[-1].close:g} are kept waiting, {doubted[-1].reason}"
            )
        into.refused += self._quarantine.add(
            series.feed.name, series.asset, series.bar_s, refused, now
        )

    def _shown(
        self, series: Series, candles: Candles, start: int, end: int, now: int
    ) -> tuple[Candles, int]:
        """What of an answer is settled, and up to when it is all that the venue has.

        An answer that ends early may be a cache's, as old as its last candle, which
        then still forms: that one waits for a later one. And where nothing later is
        known, the empty end is no gap yet: a venue that gives nothing for hours may
        only have lost its way.
        """
        closed = now // series.bar_s * series.bar_s
        shown = candles.bars.end_ts if len(candles) else start
        if shown >= min(end, closed):
            return candles, end
        if shown > now - LATE_REREAD_S:
            shown = max(start, shown - series.bar_s)
            return candles.between(None, shown), shown
        gaps = self._store.empty(*series.key, start, closed)
        held_until = gaps[-1][0] if gaps and gaps[-1][1] == closed else closed
        return candles, max(shown, min(end, held_until))

    def _append(
        self, series: Series, bars: Bars | Candles, checked: Span | None, into: Collected
    ) -> None:
        venue = series.feed.venue.value
        stored = self._store.append(venue, series.asset, bars, checked=checked)
        into.new += stored.new
        into.corrected += stored.corrected

    def _level_before(self, series: Series, moment: int) -> float | None:
        """The newest close that was stored from before a moment; None after a hole of days.

        None too while the disk does not say: collecting goes on.
        """
        with suppress(StateError):
            for reach in (NEARBY_S, HOLE_S):  # the first needs one file as a rule
                bars = self._store.load(*series.key, moment - reach, moment)
                if bars is not None:
                    return float(bars.close[-1])
        return None

    def _witnessed(self, series: Series, bars: Bars) -> bool | None:
        """Whether another feed of the price shares the bars' level; None if none can say."""
        verdicts = []
        for feed in self._witnesses(series):
            with suppress(DataError):
                seen, _ = self._feeds[feed.venue].candles(
                    feed.symbol, series.bar_s, int(bars.open_ts[0]), bars.end_ts
                )
                verdicts.append(shares_level(bars, seen.bars))
        known = [verdict for verdict in verdicts if verdict is not None]
        return any(known) if known else None

    def _witnesses(self, series: Series) -> list[FeedSymbol]:
        """The other feeds of the very price that the series is of."""
        others = [feed for feed in self._feeds_of(series.asset) if feed != series.feed]
        return [feed for feed in others if feed.same_price and series.feed.same_price]

    def _confirmed(self, series: Series, spikes: Sequence[SetAsideBar]) -> list[SetAsideBar]:
        """Spikes that the asset's other feeds saw as well: the market did that."""
        others = [feed for feed in self._feeds_of(series.asset) if feed != series.feed]
        return [row for row in spikes if any(self._saw(feed, row, series) for feed in others)]

    def _feeds_of(self, asset: str) -> tuple[FeedSymbol, ...]:
        plan = self._plans[asset]
        return plan.scored, *plan.others

    def _saw(self, feed: FeedSymbol, row: SetAsideBar, series: Series) -> bool:
        """Whether another feed calls the same bar a spike too, or has its very price there.

        That it has where a venue errs for longer than a spike, and is right in between.
        """
        around = 2 * (MAX_SPIKE_BARS + 1) * series.bar_s
        try:
            seen, set_aside = self._feeds[feed.venue].candles(
                feed.symbol, series.bar_s, row.ts - around, row.ts + around
            )
        except DataError:
            return False  # nobody can say so: the bar stays in quarantine
        is_spike = any(other.ts == row.ts and other.reason == SPIKE for other in set_aside)
        found = _closes_alone([row], series)
        return is_spike or (
            feed in self._witnesses(series) and shares_level(found, seen.bars) is True
        )

    # -- threads and failures

    def _by_venue(
        self,
        order: Sequence[Series],
        work: Callable[[Series, Collected], None],
        halt: Event | None = None,
    ) -> Collected:
        """Do the work, venues side by side, in the given order at each of them.

        An interrupt sets `halt`, which the work must look at, and waits for its end.
        """
        groups = [
            list(group)
            for _, group in groupby(
                sorted(order, key=lambda series: series.feed.venue),
                key=lambda series: series.feed.venue,
            )
        ]
        if not groups:
            return Collected()
        total = Collected()
        with ThreadPoolExecutor(len(groups), thread_name_prefix="collector") as pool:
            futures = [pool.submit(self._at_one_venue, group, work) for group in groups]
            try:
                for future in futures:
                    total.add(future.result())
            except BaseException:
                if halt is not None:
                    halt.set()
                raise
        return total

    def _at_one_venue(
        self, group: Sequence[Series], work: Callable[[Series, Collected], None]
    ) -> Collected:
        done = Collected()

        def work_on(one: Series) -> None:
            try:
                work(one, done)
            except StateError as error:  # the feed has answered: it is our disk that fails
                done.unsaved[one.feed.name] = str(error)

        done.failures = self._visits.visit(group, lambda one: one.feed.name, work_on)
        return done

    def _report(self, done: Collected, asked: Collection[str]) -> None:
        self._faults.report(_FAILING, done.failures, asked)
        gave = [name for name in asked if name not in done.failures]  # the disk was tried
        self._faults.report(_UNSAVED, done.unsaved, gave, over="bars are stored again")

    def failing(self) -> dict[str, str]:
        """Feeds whose last call failed, each with its sentence."""
        return self._faults.failing(_FAILING)

    def unsaved(self) -> dict[str, str]:
        """Feeds whose bars the disk refused when they were last asked, each with its sentence."""
        return self._faults.failing(_UNSAVED)

    def doubts(self) -> tuple[str, ...]:
        """Feeds whose newest bars are not believed yet, one sentence each."""
        return tuple(self._doubts.values())


def scored_series(plan: FeedPlan) -> list[Series]:
    """What is collected of the scored feed: minutes, and LF bars where minutes are short-lived."""
    minutes = Series(plan.asset, plan.scored, MINUTE_S)
    if plan.scored.venue not in VENUE_BARS_KEPT or Frequency.LF not in plan.frequencies:
        return [minutes]
    return [minutes, Series(plan.asset, plan.scored, FREQUENCIES[Frequency.LF].bar_s)]


class VenueVisits:
    """Rounds of calls at venues. Safe between threads that visit other venues."""

    def __init__(self) -> None:
        self._failed: set[str] = set()  # feeds whose own last call failed

    def visit(
        self, entries: Iterable[T], name_of: Callable[[T], str], call: Callable[[T], object]
    ) -> dict[str, str]:
        """Call for every entry in turn; returns the feeds that failed, each with its sentence.

        An unreachable venue ends the round, and its sentence is that of all who were not
        asked; any other failure is its entry's own. Who failed comes last the next time,
        so that one symbol that hangs, or two that a venue has lost, starve no other.
        """
        order = sorted(entries, key=lambda entry: name_of(entry) in self._failed)
        failures: dict[str, str] = {}
        venue = VenueRound()
        for number, entry in enumerate(order):
            name = name_of(entry)
            try:
                call(entry)
            except MinerError as error:
                failures[name] = str(error)
                self._failed.add(name)
                if venue.is_down_after(error, name):
                    unasked = {name_of(other): str(error) for other in order[number + 1 :]}
                    return unasked | failures
            else:
                venue.worked()
                if name not in failures:
                    self._failed.discard(name)
        return failures


@dataclass(slots=True)
class VenueRound:
    """One round of calls at a venue: whether a failure says that it is down altogether.

    A venue's own fault (HTTP 500) may be about one symbol, as Hyperliquid answers to
    an unknown coin; those of two symbols in a row are taken for the venue's. Of one
    symbol there may be several series.
    """

    faulty: set[str] = field(default_factory=set)  # feeds

    def is_down_after(self, error: MinerError, feed: str) -> bool:
        """Whether the rest of the round is in vain after a feed's failure."""
        if isinstance(error, FeedFailed):
            self.faulty.add(feed)
        is_of_symbol = isinstance(error, FeedFailed) and len(self.faulty) < FAULTS_OF_A_VENUE
        return concerns_whole_venue(error) and not is_of_symbol

    def worked(self) -> None:
        """A call went well."""
        self.faulty.clear()


def concerns_whole_venue(error: MinerError) -> bool:
    """Whether the venue cannot be reached at all, and not just this symbol."""
    is_of_symbol = isinstance(error, FeedRefused) and not isinstance(error, CountryBlocked)
    return isinstance(error, SourceUnavailable) and not is_of_symbol


@dataclass(slots=True)
class _Bar:
    """Counts days for a progress bar; called from several threads."""

    progress: Progress
    total: int
    done: int = 0
    lock: Lock = field(default_factory=Lock)

    def advance(self, days: int, series: Series) -> None:
        """Take note of days that were fetched."""
        with self.lock:
            self.done += days
            self.progress(self.done, self.total, f"{series.asset} from {series.feed.venue.value}")


def _calls(spans: Iterable[Span]) -> list[Span]:
    """Spans that are worth a call each: close ones become one."""
    widened = merge_spans((low, high + NEARBY_S) for low, high in spans)
    return [(low, high - NEARBY_S) for low, high in widened]


def _cut(span: Span) -> list[Span]:
    """A span in chunks whose edges lie on a fixed grid."""
    start, end = span
    edges = [start, *range((start // CHUNK_S + 1) * CHUNK_S, end, CHUNK_S), end]
    return list(pairwise(edges))


def _days(span: Span) -> int:
    return max(1, round((span[1] - span[0]) / DAY_S))


def _closes_alone(rows: Sequence[SetAsideBar], series: Series) -> Bars:
    """Bars of which no more is known than the close."""
    unknown = np.full(len(rows), np.nan)
    return Bars(
        open_ts=np.array([row.ts for row in rows], dtype=np.int64),
        open=unknown,
        high=unknown,
        low=unknown,
        close=np.array([row.close for row in rows]),
        volume=unknown,
        bar_s=series.bar_s,
        feed=series.feed.name,
    )
