"""The numbers behind a report, beyond those of the tables: groups, intervals, rewards.

Everything comes from the document that a back-test writes; nothing is replayed here.
Scores are compared with the yardstick `ewma_t`, or with the first baseline there is,
if it was left out. Groups (hours, weekdays, periods) compare sums of scores, so that
every basis point counts the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from backtest_results import (
    BOUND,
    ENGINE,
    Market,
    answered_by_all,
    forecasters_of,
    market_name,
    scores_of,
    start_times,
)
from bootstrap import block_bootstrap_error
from comparison import PairedComparison, compare_scores
from config import DAY_S, FREQUENCIES, Frequency
from domain import FloatArray, IntArray
from pit import COVERAGES
from protocol import Competition, ProtocolProfile, scoring_competition
from rewards import ScoredPrompt, competition_rewards
from seasonality import new_york_seconds, weekday_of

YARDSTICKS: Final = ("ewma_t", "har", "garch_t", "reference")  # the first that was replayed
PERIODS: Final = 24  # at most, on the axis of time
COVERAGE_BLOCK_S: Final = DAY_S  # at least; a wild day misses many intervals at once
TOLERANCE: Final = 0.03  # by which coverage may miss, beside two standard errors
WORST: Final = 10


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarketResult:
    """The prompts of one market that every forecaster answered; arrays are (prompts,)."""

    name: str
    asset: str
    frequency: Frequency
    competition: str
    start_ts: IntArray
    totals: Mapping[str, FloatArray]  # by forecaster, the engine first
    intervals: Mapping[str, Mapping[str, FloatArray]]  # by forecaster and interval
    pits: Mapping[int, FloatArray]  # by lead in seconds; NaN where unknown
    histograms: Mapping[str, IntArray]  # PIT counts by scored interval
    model_ids: Counter[str]
    rungs: Counter[str]
    missed: int  # prompts left out because somebody's answer did not count

    @property
    def length_s(self) -> int:
        """Length of its prompts, seconds."""
        return FREQUENCIES[self.frequency].prompt_length_s

    @property
    def baselines(self) -> tuple[str, ...]:
        """What the engine is measured against."""
        return tuple(name for name in self.totals if name != ENGINE)

    @property
    def yardstick(self) -> str | None:
        """The baseline of groups and periods; None if the engine ran alone."""
        return next((name for name in YARDSTICKS if name in self.totals), None)


def read_market(entry: Market) -> MarketResult:
    """One market of a back-test's document."""
    answered = answered_by_all(entry)
    prompts, names = answered["prompts"], forecasters_of(answered)
    return MarketResult(
        name=market_name(entry),
        asset=str(entry["asset"]),
        frequency=Frequency(entry["frequency"]),
        competition=str(entry["competition"]),
        start_ts=start_times(answered),
        totals={name: scores_of(answered, name) for name in names},
        intervals={name: _by_interval(prompts, name) for name in names},
        pits=_pits(prompts),
        histograms={
            str(name): np.array(counts, dtype=np.int64)
            for name, counts in entry["pit_histogram"].items()
        },
        model_ids=Counter(str(prompt["model_id"]) for prompt in prompts),
        rungs=Counter(str(prompt["rung"]) for prompt in prompts),
        missed=len(entry["prompts"]) - len(prompts),
    )


def _by_interval(prompts: Sequence[Mapping[str, Any]], name: str) -> dict[str, FloatArray]:
    cards = [prompt["scores"][name]["intervals"] for prompt in prompts]
    found = dict.fromkeys(interval for card in cards for interval in card)
    return {
        interval: np.array([card.get(interval) for card in cards], dtype=np.float64)
        for interval in found
    }


def _pits(prompts: Sequence[Mapping[str, Any]]) -> dict[int, FloatArray]:
    leads = sorted({int(lead) for prompt in prompts for lead in prompt["pit"]})
    return {
        lead: np.array([prompt["pit"].get(str(lead)) for prompt in prompts], dtype=np.float64)
        for lead in leads
    }


def against(
    market: MarketResult, name: str, *, where: Any = None, interval: str | None = None
) -> PairedComparison | None:
    """The engine over a baseline, on the prompts `where` (prompts,) is true.

    `interval` compares that part of the score. None if there is nothing to compare.
    """
    ours, theirs = (
        market.totals[who] if interval is None else market.intervals[who].get(interval)
        for who in (ENGINE, name)
    )
    if ours is None or theirs is None:
        return None
    both = np.isfinite(ours) & np.isfinite(theirs)
    both = both if where is None else both & where
    if not both.any() or theirs[both].sum() <= 0:
        return None
    return compare_scores(
        ours[both], theirs[both], market.start_ts[both], horizon_s=market.length_s
    )


# ---------------------------------------------------------------- groups and periods


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Some of the prompts and how the engine did on them against the yardstick."""

    label: str
    prompts: int
    ratio: float  # NaN without a prompt
    error: float  # standard error of `ratio`


def by_hour(market: MarketResult) -> list[Group]:
    """By the hour in which prompts start in New York; 24 groups."""
    hours = new_york_seconds(market.start_ts) % DAY_S // 3600
    return [_group(market, f"{hour:02d}", hours == hour) for hour in range(24)]


def by_weekday(market: MarketResult) -> list[Group]:
    """By the weekday on which prompts start in New York; 7 groups."""
    days = weekday_of(new_york_seconds(market.start_ts))
    names = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    return [_group(market, name, days == day) for day, name in enumerate(names)]


def _group(market: MarketResult, label: str, where: Any) -> Group:
    found = against(market, market.yardstick, where=where) if market.yardstick else None
    return Group(
        label=label,
        prompts=int(where.sum()),
        ratio=found.ratio if found else np.nan,
        error=found.error if found else np.nan,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Periods:
    """Mean scores in equal periods of time; arrays are (periods,), NaN where empty."""

    middle_ts: FloatArray
    days: float  # length of each
    scores: Mapping[str, FloatArray]  # by forecaster


def over_time(market: MarketResult) -> Periods:
    """Mean scores of every forecaster along the time of the test."""
    begin, end = int(market.start_ts[0]), int(market.start_ts[-1]) + 1
    count = int(np.clip(len(market.start_ts) // 3, 1, PERIODS))
    edges = np.linspace(begin, end, count + 1)
    period = np.clip(np.searchsorted(edges, market.start_ts, "right") - 1, 0, count - 1)
    prompts = np.bincount(period, minlength=count)
    return Periods(
        middle_ts=(edges[1:] + edges[:-1]) / 2,
        days=(end - begin) / count / DAY_S,
        scores={
            name: np.where(
                prompts > 0,
                np.bincount(period, values, count) / np.maximum(prompts, 1),
                np.nan,
            )
            for name, values in market.totals.items()
        },
    )


# ---------------------------------------------------------------- intervals

FAMILIES: Final = {"all gaps": "_gaps", "volatility term": "volatility_"}  # by a common mark


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalRow:
    """One part of the score."""

    name: str
    member: bool  # of a family that has a row of its own
    score: float  # the engine's mean
    share: float  # of its total
    against: Mapping[str, PairedComparison | None]  # by baseline


def by_interval(market: MarketResult) -> list[IntervalRow]:
    """Every interval; gaps, and the blocks of the volatility term, also as one."""
    total = float(np.nanmean(market.totals[ENGINE]))
    summed = replace(
        market, intervals={name: _with_families(parts) for name, parts in market.intervals.items()}
    )
    rows = []
    for name, values in summed.intervals[ENGINE].items():
        score = float(np.nanmean(values))
        rows.append(
            IntervalRow(
                name=name,
                member=any(mark in name for mark in FAMILIES.values()),
                score=score,
                share=score / total,
                against={base: against(summed, base, interval=name) for base in market.baselines},
            )
        )
    return rows


def _with_families(parts: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The parts of a score, and the sum of every family before its members."""
    ordered: dict[str, FloatArray] = {}
    for name, values in parts.items():
        family = next((family for family, mark in FAMILIES.items() if mark in name), name)
        ordered[family] = ordered[family] + values if family in ordered else values
    members = {
        name: values
        for name, values in parts.items()
        if any(mark in name for mark in FAMILIES.values())
    }
    return ordered | members


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How often outcomes fell inside one central interval of the forecasts."""

    nominal: float
    found: float
    error: float  # block-bootstrap standard error

    @property
    def verdict(self) -> str:
        """Within three points or two standard errors is right."""
        miss = self.found - self.nominal
        if abs(miss) <= max(TOLERANCE, 2 * self.error):
            return "right"
        return "too wide" if miss > 0 else "too narrow"


def coverage_by_lead(market: MarketResult) -> dict[int, tuple[Coverage, ...]]:
    """Coverage of every nominal share, by lead in seconds."""
    return {
        lead: tuple(_coverage(market, values, share) for share in COVERAGES)
        for lead, values in market.pits.items()
        if np.isfinite(values).any()
    }


def _coverage(market: MarketResult, pits: FloatArray, share: float) -> Coverage:
    inside = np.where(np.isfinite(pits), np.abs(pits - 0.5) <= share / 2, np.nan)
    error = block_bootstrap_error(
        inside, market.start_ts, block_s=max(2 * market.length_s, COVERAGE_BLOCK_S)
    )
    return Coverage(nominal=share, found=float(np.nanmean(inside)), error=error)


# ---------------------------------------------------------------- the worst prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstPrompt:
    """A prompt on which the engine did badly against the yardstick."""

    start_ts: int
    ratio: float
    score: float
    yardstick: float
    costliest: str  # the part of the score that lost most against the yardstick's


def worst_prompts(market: MarketResult) -> list[WorstPrompt]:
    """The prompts with the highest ratio to the yardstick, worst first."""
    if market.yardstick is None:
        return []
    ours, theirs = market.totals[ENGINE], market.totals[market.yardstick]
    ratio = np.divide(ours, theirs, out=np.full(len(ours), np.nan), where=theirs > 0)
    order = [int(row) for row in np.argsort(-ratio, kind="stable") if np.isfinite(ratio[row])]
    return [
        WorstPrompt(
            start_ts=int(market.start_ts[row]),
            ratio=float(ratio[row]),
            score=float(ours[row]),
            yardstick=float(theirs[row]),
            costliest=_costliest(market, market.yardstick, row),
        )
        for row in order[:WORST]
    ]


def _costliest(market: MarketResult, yardstick: str, row: int) -> str:
    ours, theirs = market.intervals[ENGINE], market.intervals[yardstick]
    lost = {name: float(ours[name][row] - theirs[name][row]) for name in ours if name in theirs}
    return max(lost, key=lambda name: lost[name]) if lost else ""


# ---------------------------------------------------------------- rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRow:
    """What one forecaster would be paid in a field of engine and baselines."""

    name: str
    share: float  # mean over the windows
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompetitionRewards:
    """A simulated competition; `rows` best paid first."""

    name: str
    markets: tuple[str, ...]
    window_days: float
    windows: int
    rows: tuple[RewardRow, ...]


def simulated_rewards(
    markets: Sequence[MarketResult], profile: ProtocolProfile
) -> list[CompetitionRewards]:
    """Rewards in every competition of the profile whose assets were replayed.

    The field is the engine and the baselines that do not look ahead. Windows of the
    competition's length stand side by side, the last one at the end; a test
    shorter than one window is one window.
    """
    found = []
    for competition in profile.competitions.values():
        scored = [
            market
            for market in markets
            if scoring_competition(profile, market.asset, market.frequency) is competition
        ]
        if scored:
            prompts = [prompt for market in scored for prompt in _scored_prompts(market)]
            shares = _window_shares(prompts, competition, profile)
            found.append(
                CompetitionRewards(
                    name=competition.name,
                    markets=tuple(market.name for market in scored),
                    window_days=competition.window_days,
                    windows=len(shares),
                    rows=_reward_rows(shares),
                )
            )
    return found


def _scored_prompts(market: MarketResult) -> list[ScoredPrompt]:
    field = {name: values for name, values in market.totals.items() if name != BOUND}
    return [
        ScoredPrompt(
            asset=market.asset,
            scored_ts=start_ts + market.length_s,
            totals={name: float(values[row]) for name, values in field.items()},
        )
        for row, start_ts in enumerate(market.start_ts.tolist())
    ]


def _window_shares(
    prompts: list[ScoredPrompt], competition: Competition, profile: ProtocolProfile
) -> list[dict[str, float]]:
    times = [prompt.scored_ts for prompt in prompts]
    window_s = int(competition.window_days * DAY_S)
    count = max((max(times) - min(times)) // window_s, 1)
    ends = [max(times) - index * window_s for index in range(count)]
    shares = [competition_rewards(prompts, competition, profile, end) for end in ends]
    return [share for share in shares if share]


def _reward_rows(shares: list[dict[str, float]]) -> tuple[RewardRow, ...]:
    names = sorted({name for share in shares for name in share})
    table = {name: [share.get(name, 0.0) for share in shares] for name in names}
    rows = [
        RewardRow(name=name, share=float(np.mean(paid)), lowest=min(paid), highest=max(paid))
        for name, paid in table.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.share))
