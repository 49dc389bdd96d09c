"""What a rehearsal found, and whether that is good enough: bars, trainings, memory, points.

Everything here is pure; `rehearse` gathers what goes in.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy.stats import theilslopes

from config import DAY_S, Frequency
from domain import Bars, IntArray
from rehearsal_plan import Fate, Pair, PairAsks

# In which a due training must be published, for every pair that may be trained before it.
TRAINING_ALLOWANCE_S: Final = 180.0  # real
WARM_UP_S: Final = 300.0  # at least, after a start, while caches and histories fill
WARM_UP_SHARE: Final = 0.25  # of a longer life, in which every set is taken up
# What is freed waits up to a minute until it is given back: no growth, but a sawtooth.
FLOOR_S: Final = 60.0
CONFIDENCE: Final = 0.95
SHORTEST_SLOPE_S: Final = 600.0  # less says nothing about an hour
# Memory may grow by so much in an hour of the market, which brings new bars, and in
# a real hour at least.
FLAT_MB_PER_MARKET_HOUR: Final = 0.5
FLAT_MB_PER_HOUR: Final = 1.0
STEADY: Final = 3  # handles or threads that may come and go
LEDGER_LIMIT_MB: Final = 2000.0  # when it holds all the days that it keeps
LEDGER_DAYS: Final = 1.5  # in less it still fills with sketches of a day that has not passed
STOP_LIMIT_S: Final = 10.0
SCORED_SHARE: Final = 0.95  # of answers whose outcome is long known


# ---------------------------------------------------------------- bars


@dataclass(frozen=True, slots=True, kw_only=True)
class BarsFound:
    """Stored bars of one series against what its venue served over the same time."""

    feed: str
    bar_s: int
    served: int
    missing: int
    different: int  # another close
    invented: int  # never served
    first_missing_ts: int | None

    @property
    def is_whole(self) -> bool:
        """Whether the store holds exactly what was served, and that was something."""
        return self.served > 0 and not (self.missing or self.different or self.invented)


def compare_bars(stored: Bars | None, served: Bars, start: int, end: int) -> BarsFound:
    """Compare the bars that open at or after `start` and closed by `end`."""
    given = served.between(start, end)
    kept = None if stored is None else stored.between(start, end)
    kept_ts = np.empty(0, dtype=np.int64) if kept is None else kept.open_ts
    kept_close = np.empty(0) if kept is None else kept.close
    _, in_given, in_kept = np.intersect1d(given.open_ts, kept_ts, return_indices=True)
    missing = np.setdiff1d(given.open_ts, kept_ts)
    return BarsFound(
        feed=served.feed if stored is None else stored.feed,
        bar_s=served.bar_s,
        served=len(given),
        missing=len(missing),
        different=int((given.close[in_given] != kept_close[in_kept]).sum()),
        invented=len(kept_ts) - len(in_kept),
        first_missing_ts=int(missing[0]) if len(missing) else None,
    )


# ---------------------------------------------------------------- trainings


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A model set that appeared. Market times, Unix seconds."""

    pair: Pair
    seen_ts: float
    trained_until: int
    seconds: float | None = None  # real, of the training; None: the log does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTrainings:
    """The trainings of one asset at one frequency."""

    sets: int
    due: int  # sets that the cadence asks for over the run
    first_after_s: float  # market seconds from the start to the first set
    oldest_days: float  # the greatest age that served models reached, market days
    seconds: tuple[float, ...]  # real, of each training that the log tells of
    on_cadence: bool  # whether nothing is later than it may be


def judge_trainings(
    published: Sequence[Published],
    pair: Pair,
    start: float,
    end: float,
    *,
    closes: IntArray,
    interval_days: float,
    pairs: int,
    speed: float,
) -> PairTrainings:
    """Hold the sets of a pair against its cadence.

    A set is due once the former has seen no bar of the last `interval_days`; from then on
    it has `TRAINING_ALLOWANCE_S` real seconds for each of the `pairs` that are trained. In
    a market that is closed nothing is due: the same set would come out. `closes` (n,): when
    the bars of the market closed, rising, Unix seconds.
    """
    mine = sorted((entry for entry in published if entry.pair == pair), key=lambda p: p.seen_ts)
    interval_s = interval_days * DAY_S
    allowance_s = TRAINING_ALLOWANCE_S * pairs * speed

    def wanted(after: float) -> float:
        newer = closes[np.searchsorted(closes, after, "right") :]
        return max(after + interval_s, float(newer[0])) if len(newer) else np.inf

    # Of a market that was closed at the start there were no newer bars to learn from.
    until = [max(entry.trained_until, start) for entry in mine]
    replaced = [entry.seen_ts for entry in mine[1:]] + [end] * bool(mine)
    served = list(zip(replaced, until, strict=True))
    first_after = mine[0].seen_ts - start if mine else end - start
    lateness = max([first_after, *(late - wanted(early) for late, early in served)])
    return PairTrainings(
        sets=len(mine),
        due=1 + _count_due(until[0], end - allowance_s, wanted) if until else 1,
        first_after_s=first_after,
        oldest_days=max((late - early for late, early in served), default=0.0) / DAY_S,
        seconds=tuple(entry.seconds for entry in mine if entry.seconds is not None),
        on_cadence=lateness <= allowance_s,
    )


def _count_due(since: float, end: float, wanted: Callable[[float], float]) -> int:
    """How often a successor is wanted until the end, each as soon as it may be."""
    count = 0
    while (since := wanted(since)) <= end:
        count += 1
    return count


# ---------------------------------------------------------------- log lines


def read_log_line(line: str) -> dict[str, str]:
    """The pairs of a `key=value` log line; values in quotes lose them, other text is ignored."""
    found: dict[str, str] = {}
    rest = line.strip()
    while "=" in rest:
        key, _, rest = rest.partition("=")
        key = key.rpartition(" ")[2]
        if rest.startswith('"'):
            value, rest = _quoted(rest)
        else:
            value, _, rest = rest.partition(" ")
        found[key] = value
    return found


def _quoted(text: str) -> tuple[str, str]:
    """The string that text begins with, and what follows it."""
    at = 1
    while at < len(text) and text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return text[1:at].replace('\\"', '"').replace("\\\\", "\\"), text[at + 1 :]


def complaints(lines: Sequence[str]) -> Counter[str]:
    """How often the log warned of what, and of tracebacks."""
    counted: Counter[str] = Counter()
    for line in lines:
        told = read_log_line(line) if "level=" in line else {}
        if told.get("level") in {"warning", "error", "critical"}:
            counted[f"{told['level']}: {told.get('event', '')}"] += 1
        elif line.startswith("Traceback "):
            counted["traceback"] += 1
    return counted


# ---------------------------------------------------------------- the process


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """The miner's process at one moment."""

    at_s: float  # real seconds since it was started
    rss_mb: float
    threads: int
    handles: int  # open file descriptors
    kept_mb: float = 0.0  # of it answers for those who ask again, as the miner says

    @property
    def lasting_mb(self) -> float:
        """Memory without kept answers: they come and go with the prompts, and have a bound."""
        return self.rss_mb - self.kept_mb


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Of memory after the warm-up, MB an hour, and where 95 % confidence lets it lie."""

    mb_per_hour: float
    low: float
    high: float

    def __str__(self) -> str:
        low, high = (
            f"{end:+.1f}" if abs(end) < 2 else f"{end:+.0f}" for end in (self.low, self.high)
        )
        return f"{self.mb_per_hour:+.1f} ({low} to {high})"


def memory_growth(vitals: Sequence[Vitals]) -> Growth | None:
    """How fast memory grew; None if there is too little to tell.

    The median of the slopes between all floors, the least that every whole minute
    needed without the answers it kept: single peaks change nothing, and what is never
    freed raises every floor. Source: Theil (1950), Sen (1968).
    """
    floors: dict[int, Vitals] = {}
    warm = _warm(vitals)
    for entry in warm:
        window = int((entry.at_s - warm[0].at_s) // FLOOR_S)
        if (window + 1) * FLOOR_S <= warm[-1].at_s - warm[0].at_s:
            floors[window] = min(floors.get(window, entry), entry, key=lambda each: each.lasting_mb)
    if not floors:
        return None
    found = theilslopes(
        [entry.lasting_mb for entry in floors.values()],
        [entry.at_s for entry in floors.values()],
        CONFIDENCE,
    )
    slope, low, high = (3600 * float(found[part]) for part in (0, 2, 3))
    return Growth(mb_per_hour=slope, low=low, high=high)


def _warm(vitals: Sequence[Vitals]) -> list[Vitals]:
    """A life without its warm-up; empty if what is left is too short."""
    if not vitals:
        return []
    begin = max(WARM_UP_S, WARM_UP_SHARE * vitals[-1].at_s)
    warm = [entry for entry in vitals if entry.at_s >= begin]
    return warm if vitals[-1].at_s - begin >= SHORTEST_SLOPE_S else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The usual count of something in the first and the last quarter after the warm-up."""

    first: float
    last: float

    @property
    def is_steady(self) -> bool:
        """Whether it does not grow."""
        return self.last - self.first <= STEADY

    def __str__(self) -> str:
        return f"{self.first:.0f} to {self.last:.0f}"


def courses(vitals: Sequence[Vitals]) -> dict[str, Course]:
    """How handles and threads went; empty if there is too little to tell."""
    warm = _warm(vitals)
    if len(warm) < 4:
        return {}
    quarter = len(warm) // 4
    counted = {
        "handles": [entry.handles for entry in warm],
        "threads": [entry.threads for entry in warm],
    }
    return {
        name: Course(first=float(np.median(n[:quarter])), last=float(np.median(n[-quarter:])))
        for name, n in counted.items()
    }


# ---------------------------------------------------------------- the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """What the miner's folders hold at one moment. Market time, Unix seconds."""

    at_ts: float
    ledger_mb: float
    bars_mb: float
    rest_mb: float  # of the state folder
    models_mb: float
    files: int  # that are no bars


def full_ledger_mb(begin: DiskUse, end: DiskUse, kept_days: float) -> float | None:
    """The ledger once it holds all its days, if it goes on growing like this; MB.

    None if there is too little to tell.
    """
    days = (end.at_ts - begin.at_ts) / DAY_S
    if days < LEDGER_DAYS:
        return None
    return (end.ledger_mb - begin.ledger_mb) / days * kept_days


# ---------------------------------------------------------------- the restart


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """The stop and the start in the middle."""

    exit_code: int | None
    stopped_after_s: float
    first_answer_after_s: float | None  # from the start to the first valid answer; None: never
    compared: int  # answers that were asked before and after
    different: tuple[str, ...]  # which of them had other bytes
    states_carried_on: int = 0  # states at the end that follow exactly from those at the stop
    states_astray: tuple[str, ...] = ()  # those that do not
    skipped: int = 0  # prompts that fell into the pause and were not asked

    @property
    def is_clean(self) -> bool:
        """Whether it went on as if nothing had been."""
        return (
            self.exit_code == 0
            and self.stopped_after_s <= STOP_LIMIT_S
            and self.first_answer_after_s is not None
            and self.compared > 0
            and not self.different
            and not self.states_astray
        )


# ---------------------------------------------------------------- the verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """Own scores in the ledger of one asset at one frequency."""

    matured: int  # answers whose outcome is long known
    scored: int  # of all answers
    mean_bp: float | None  # of their scores, lower is better
    ratio: float | None  # to `ewma_t` on the same prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that a rehearsal found; what is empty was not looked at."""

    pairs: tuple[Pair, ...]
    market_days: float  # that were rehearsed
    speed: float  # market seconds per real second
    complete: bool  # False: it was ended before its time
    bars: Mapping[str, Sequence[BarsFound]] = field(default_factory=dict)  # by asset
    trainings: Mapping[Pair, PairTrainings] = field(default_factory=dict)
    asks: Mapping[Pair, PairAsks] = field(default_factory=dict)
    scores: Mapping[Pair, PairScores] = field(default_factory=dict)
    lives: Sequence[Sequence[Vitals]] = ()  # one entry per start
    disk: Sequence[DiskUse] = ()  # at the first prompt and at the end
    ledger_days: float = np.nan  # that the ledger keeps
    restart: Restart | None = None
    exit_code: int | None = None  # of the last stop
    stopped_after_s: float | None = None
    left_behind: int = 0  # processes that outlived the miner
    log: Mapping[str, int] = field(default_factory=dict)  # complaints


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One thing that must hold; `held` None: the rehearsal was too short to tell."""

    name: str
    held: bool | None
    detail: str


def judge(found: Findings) -> tuple[Point, ...]:
    """Every point of acceptance."""
    return (
        Point(
            name="ran to its end",
            held=found.complete,
            detail=f"{found.market_days:.2f} market days",
        ),
        _bars_point(found),
        _trainings_point(found),
        _asks_point(found),
        _scores_point(found),
        _memory_point(found),
        _counts_point(found),
        _disk_point(found),
        _restart_point(found),
        Point(
            name="nothing left behind",
            held=found.exit_code == 0
            and found.left_behind == 0
            and (found.stopped_after_s or 0.0) <= STOP_LIMIT_S,
            detail=f"exit code {found.exit_code}, {found.left_behind} processes outlived it",
        ),
        Point(
            name="no fault in the log",
            held="traceback" not in found.log,
            detail=f"{found.log.get('traceback', 0)} tracebacks",
        ),
    )


def passed(points: Sequence[Point]) -> bool:
    """Whether nothing failed; what could not be told does not fail."""
    return all(point.held is not False for point in points)


def _bars_point(found: Findings) -> Point:
    series = [entry for entries in found.bars.values() for entry in entries]
    lacking = sum(entry.missing for entry in series)
    wrong = sum(entry.different + entry.invented for entry in series)
    return Point(
        name="bars collected without a gap",
        held=bool(series) and all(entry.is_whole for entry in series),
        detail=f"{sum(entry.served for entry in series)} bars, {lacking} missing, {wrong} wrong",
    )


def _trainings_point(found: Findings) -> Point:
    late = [name_of(pair) for pair, entry in found.trainings.items() if not entry.on_cadence]
    sets = sum(entry.sets for entry in found.trainings.values())
    detail = f"{sets} sets" + (f"; late: {', '.join(late)}" if late else "")
    held = False if late else True if sets else None
    return Point(name="retrained on cadence", held=held, detail=detail)


def _asks_point(found: Findings) -> Point:
    asks = sum(entry.asks for entry in found.asks.values())
    good = sum(entry.fates[Fate.IN_TIME] for entry in found.asks.values())
    differ = sum(entry.disagreements for entry in found.asks.values())
    silent = set(found.pairs) - found.asks.keys()
    return Point(
        name="every prompt answered in time and valid",
        held=not silent and all(entry.is_clean for entry in found.asks.values()),
        detail=f"{good} of {asks} asks; {differ} prompts answered differently to different callers",
    )


def _scores_point(found: Findings) -> Point:
    matured = sum(entry.matured for entry in found.scores.values())
    scored = sum(entry.scored for entry in found.scores.values())
    enough = [entry.scored >= SCORED_SHARE * entry.matured for entry in found.scores.values()]
    return Point(
        name="own scores in the ledger",
        held=all(enough) if matured else None,
        detail=f"{scored} of {matured} answers that had come out",
    )


def flat_limit(speed: float) -> float:
    """By how much memory may grow in a real hour, MB."""
    return max(FLAT_MB_PER_HOUR, FLAT_MB_PER_MARKET_HOUR * speed)


def _memory_point(found: Findings) -> Point:
    growths = [growth for life in found.lives if (growth := memory_growth(life)) is not None]
    if not growths:
        return Point(name="memory flat", held=None, detail="too short to tell")
    limit = flat_limit(found.speed)
    grown = ", ".join(map(str, growths))
    return Point(
        name="memory flat",
        held=max(growth.mb_per_hour for growth in growths) <= limit,
        detail=f"{grown} MB in a real hour, at most {limit:g}",
    )


def _counts_point(found: Findings) -> Point:
    """Handles and threads, which leak long before memory does."""
    went = [(name, course) for life in found.lives for name, course in courses(life).items()]
    return Point(
        name="handles and threads steady",
        held=all(course.is_steady for _, course in went) if went else None,
        detail=", ".join(f"{name} {course}" for name, course in went) or "too short to tell",
    )


def _disk_point(found: Findings) -> Point:
    days = found.ledger_days
    full = full_ledger_mb(found.disk[0], found.disk[-1], days) if found.disk else None
    return Point(
        name="state bounded",
        held=None if full is None else full <= LEDGER_LIMIT_MB,
        detail="too short to tell"
        if full is None
        else f"the ledger's {days:.0f} days come to {full:.0f} MB",
    )


def _restart_point(found: Findings) -> Point:
    done = found.restart
    if done is None:
        return Point(name="clean restart", held=None, detail="there was none")
    return Point(
        name="clean restart, identical continuation",
        held=done.is_clean,
        detail=f"exit code {done.exit_code} after {done.stopped_after_s:.1f} s, "
        f"{done.compared - len(done.different)} of {done.compared} answers the same",
    )


def name_of(pair: tuple[str, Frequency]) -> str:
    """A pair as tables call it."""
    return f"{pair[0]} {pair[1].value}"
