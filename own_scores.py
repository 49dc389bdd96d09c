"""How our own answers came out: against what happened, and against `ewma_t`.

Answers wait in the ledger as sketches. Once the last price of a prompt is known,
the validator's score is told from the sketch, and the yardstick `ewma_t` answers
the same prompt from what was known then, scored by way of a sketch too: what a
sketch leaves out, it leaves out on both sides.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeAlias

import numpy as np

from answer_sketch import AnswerSketch, SketchScore
from baselines import EwmaStudentT
from config import DAY_S, FREQUENCIES, Frequency
from domain import ForecastRequest, MarketHistory
from errors import DataError, UnknownAsset
from forecast_engine import request_frequency, request_rng
from ledger import Ledger, PendingAnswer, ScoredAnswer
from protocol import Competition, ProtocolProfile, competition_like
from replay import MINIMUM_REALISED, known_at_prompt, realised_path

LATE_BARS_S: Final = 120  # the last bar may come so late, or be corrected
GIVE_UP_S: Final = 2 * DAY_S  # what is not known by then never will be
MOST_AT_ONCE: Final = 100  # answers per pair and call: a slow machine does other things too
CAP_DAYS: Final = 60.0  # of bars that the yardstick learns its cap from

SUMMARY_DAYS: Final = 10.0  # the longest window that the network scores over
SUMMARY_S: Final = 300.0  # between two summaries
COURSE_S: Final = 900  # of prompts that are one point of the course

Pair: TypeAlias = tuple[str, Frequency]


class Histories(Protocol):
    """Where the realised prices come from; a forecast engine is one."""

    def history(self, asset: str, frequency: Frequency) -> MarketHistory:
        """All bars held for the pair. Raises: UnknownAsset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnScore:
    """Our answers of one asset at one frequency over some days."""

    answers: int
    score: float  # mean in bp, lower is better
    ewma_t: float  # the yardstick's mean on the same prompts
    covered: float  # share of outcomes inside the central 80 %, over all that is scored
    covered_by_interval: dict[str, float]  # NaN where nothing was known
    # By quarter of an hour, in time order: its start, and the sums of score and ewma_t.
    course: tuple[tuple[int, float, float], ...]

    @property
    def ratio(self) -> float:
        """Our mean score over that of `ewma_t`: below 1 is better than it."""
        return self.score / self.ewma_t if self.ewma_t else np.nan


def scored_by(profile: ProtocolProfile, request: ForecastRequest) -> Competition | None:
    """The competition whose intervals score a request; None for one that no validator sends.

    An asset outside all competitions is scored as its neighbours are.
    """
    spec = FREQUENCIES[request_frequency(request)]
    usual = (spec.prompt_increment_s, spec.prompt_length_s)
    if (request.increment_s, request.length_s) != usual:
        return None
    return competition_like(profile, request.asset, spec.frequency)


def score_matured(
    ledger: Ledger, histories: Histories, now: float, profile: ProtocolProfile, *, seed: int = 0
) -> int:
    """Score kept answers whose outcome is known by `now`; returns how many were.

    An answer waits for its last bar until none can be expected any more; then it is
    scored by what is known, or given up if that is next to nothing. One asset that
    gets no bars holds up no other.
    """
    scored = 0
    for asset, name in ledger.pending_pairs(now - LATE_BARS_S):
        try:
            history = histories.history(asset, Frequency(name))
        except UnknownAsset:
            ledger.give_up(ledger.pending(asset, name, now - GIVE_UP_S, MOST_AT_ONCE), now)
            continue
        ended_by = max(min(now - LATE_BARS_S, _known_until(history)), now - GIVE_UP_S)
        answers = ledger.pending(asset, name, ended_by, MOST_AT_ONCE)
        scored += _score_all(ledger, answers, history, now, profile, seed)
    return scored


def _known_until(history: MarketHistory) -> float:
    """Until which grid time realised prices are known."""
    bars = history.price_bars
    is_known = len(bars) and history.stand_in is None  # another feed's prices score nothing
    return bars.end_ts - history.scored_lag_s if is_known else -np.inf


def _score_all(
    ledger: Ledger,
    answers: Sequence[PendingAnswer],
    history: MarketHistory,
    now: float,
    profile: ProtocolProfile,
    seed: int,
) -> int:
    """Score answers of one pair whose outcome is as known as it will ever be."""
    if not answers:
        return 0
    scored = []
    hopeless = []
    yardstick: EwmaStudentT | None = None
    for answer in answers:
        try:
            yardstick = yardstick or _yardstick(history)
            ours, theirs = _scores(answer, history, yardstick, profile, seed)
        except DataError:
            hopeless.append(answer)
        else:
            scored.append((answer, ours, theirs.card.total))
    ledger.save_scores(scored, now)
    ledger.give_up(hopeless, now)
    return len(scored)


def _yardstick(history: MarketHistory) -> EwmaStudentT:
    """Raises: DataError if there are no returns to learn from."""
    recent = history.bars.between(int(history.bars.end_ts - CAP_DAYS * DAY_S), None)
    if len(recent) < 2:
        raise DataError(f"{history.asset}: too few bars for a yardstick; collect some first.")
    return EwmaStudentT.fit(replace(history, bars=recent))


def _scores(
    answer: PendingAnswer,
    history: MarketHistory,
    yardstick: EwmaStudentT,
    profile: ProtocolProfile,
    seed: int,
) -> tuple[SketchScore, SketchScore]:
    """Of the answer and of `ewma_t`. Raises: DataError if it cannot be scored."""
    request = answer.request
    if history.stand_in is not None:
        raise DataError(f"{request.asset}: no price of the scored feed is known.")
    competition = scored_by(profile, request)
    realised = realised_path(history, request)
    known = known_at_prompt(history, request.start_ts)
    if (
        competition is None
        or np.isfinite(realised).mean() < MINIMUM_REALISED
        or len(known.bars) < 2
    ):
        raise DataError(f"{request.asset}: next to nothing is known of the prompt's outcome.")
    paths = yardstick.paths(request, known, request_rng(seed, request))
    baseline = AnswerSketch.of(paths, competition, increment_s=request.increment_s)
    return answer.sketch.score(realised, competition), baseline.score(realised, competition)


# ---------------------------------------------------------------- summary


def summarise(ledger: Ledger, now: float, days: float) -> dict[Pair, OwnScore]:
    """What the scored answers to prompts of the last `days` say, by asset and frequency."""
    sums: dict[Pair, _Sums] = {}
    for answer in ledger.scored(now - days * DAY_S):
        pair = answer.asset, Frequency(answer.frequency)
        sums.setdefault(pair, _Sums()).add(answer)
    return {pair: sums[pair].summary() for pair in sorted(sums)}


@dataclass(slots=True, eq=False)
class _Sums:
    """Running sums over the answers of one pair; no answer is kept."""

    answers: int = 0
    inside: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    course: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, answer: ScoredAnswer) -> None:
        """Count one answer in."""
        self.answers += 1
        for name, (covered, of) in answer.covered.items():
            self.inside[name] += covered
            self.known[name] += of
        at = answer.start_ts // COURSE_S * COURSE_S
        score, ewma_t = self.course.get(at, (0.0, 0.0))
        self.course[at] = score + answer.score, ewma_t + answer.ewma_t

    def summary(self) -> OwnScore:
        """What they come to."""
        return OwnScore(
            answers=self.answers,
            score=sum(score for score, _ in self.course.values()) / self.answers,
            ewma_t=sum(ewma_t for _, ewma_t in self.course.values()) / self.answers,
            covered=_share(self.inside.total(), self.known.total()),
            covered_by_interval={
                name: _share(self.inside[name], self.known[name]) for name in self.known
            },
            course=tuple((at, *self.course[at]) for at in sorted(self.course)),
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else np.nan


class ScoreKeeper:
    """Scores matured answers now and then, and has the latest summary ready.

    `step` belongs on a background thread; `latest` may be called from any.
    """

    def __init__(
        self,
        ledger: Ledger,
        histories: Histories,
        profile: ProtocolProfile,
        *,
        seed: int = 0,
        days: float = SUMMARY_DAYS,
    ) -> None:
        self._ledger = ledger
        self._histories = histories
        self._profile = profile
        self._seed = seed
        self._days = days
        self._latest: dict[Pair, OwnScore] = {}
        self._summed_at = -np.inf

    def step(self, now: float) -> int:
        """Score what has matured by `now`; returns how many answers were."""
        scored = score_matured(self._ledger, self._histories, now, self._profile, seed=self._seed)
        if abs(now - self._summed_at) >= SUMMARY_S:  # it reads ten days of scores
            self._latest = summarise(self._ledger, now, self._days)
            self._summed_at = now
        return scored

    def latest(self) -> dict[Pair, OwnScore]:
        """The latest summary, by asset and frequency; empty before the first."""
        return self._latest
