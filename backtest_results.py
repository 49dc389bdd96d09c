"""What a back-test found: its document, the figures drawn from it, two of them compared.

The document is plain JSON (docs/backtest.md describes it). Everything here reads or
makes plain values; the figures of a table and of a report come from the same place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from comparison import (
    PairedComparison,
    PairedScores,
    compare_markets,
    compare_scores,
    newey_west_error,
)
from config import DAY_S, EARLIEST_TS, FREQUENCIES, LATEST_TS, Frequency
from domain import FloatArray
from errors import ConfigError, DataError
from pit import coverage

SCHEMA: Final = 1
ENGINE: Final = "engine"
YARDSTICK: Final = "ewma_t"  # what everything is measured against
BOUND: Final = "oracle"
NOMINAL: Final = 0.8  # the coverage that tables show
MIN_PROMPTS: Final = 30  # fewer, or of fewer days, decide nothing
MIN_DAYS: Final = 5
VOLATILITY: Final = "volatility_"  # how the names of its parts of a score begin

PARTS: Final = ("total", "intervals", "volatility")
MUST_AGREE: Final = ("source", "profile", "train_until")  # else scores are of other things
MAY_DIFFER: Final = ("seed", "days", "program")  # what a challenger may be about

Market = Mapping[str, Any]  # an entry of the document's "markets"


# ---------------------------------------------------------------- the document


def market_entry(
    asset: str,
    frequency: Frequency,
    competition: str,
    bars: str,
    prompts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One market of the document from its scored prompts, in time order."""
    ordered = sorted(prompts, key=lambda prompt: int(prompt["start_ts"]))
    totals: dict[str, Any] = {}
    for prompt in ordered:
        for name, counts in prompt["histogram"].items():
            totals[name] = np.add(totals.get(name, 0), counts)
    entry: dict[str, Any] = {
        "asset": asset,
        "frequency": frequency.value,
        "competition": competition,
        "bars": bars,
        "prompts": [
            {key: value for key, value in prompt.items() if key != "histogram"}
            for prompt in ordered
        ],
        "pit_histogram": {name: counts.tolist() for name, counts in totals.items()},
    }
    return {**entry, "summary": summarise([entry]).to_dict()}


class _Card(BaseModel):
    total: float | None  # None for a miss


class _Cards(BaseModel):
    engine: _Card


class _Prompt(BaseModel):
    start_ts: int = Field(ge=EARLIEST_TS, lt=LATEST_TS)
    scores: _Cards


class _Market(BaseModel):
    asset: str
    frequency: Frequency
    bars: str
    prompts: list[_Prompt] = Field(min_length=1)


class _Compared(BaseModel):
    """What a comparison reads of a document."""

    settings: dict[str, Any]
    markets: list[_Market]


def check_document(document: Any, name: str) -> dict[str, Any]:
    """A document as read from a file. Raises: DataError if it is none, or not whole."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise DataError(
            f"{name} holds no results of this version's back-test; write them with --json."
        )
    try:
        _Compared.model_validate(document)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        raise DataError(
            f"{name} is damaged: {place}: {wrong['msg']}; write it anew with --json."
        ) from None
    return dict(document)


def market_name(market: Market) -> str:
    """How tables call a market."""
    return f"{market['asset']} {market['frequency']}"


# ---------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFigures:
    """The engine's score, or one part of it, against that of others."""

    score: float | None  # mean; None over several markets
    ratios: Mapping[str, PairedComparison]  # by baseline
    gap_closed: float | None  # share of the way from `ewma_t` to `oracle`, if there is one

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "score": self.score,
            "gap_closed": self.gap_closed,
            "ratios": {
                name: {
                    "ratio": found.ratio,
                    "error": found.error if np.isfinite(found.error) else None,
                    "wins": found.wins,
                }
                for name, found in self.ratios.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one market, or several together, came to."""

    name: str
    prompts: int
    days: int  # on which prompts start, UTC
    parts: Mapping[str, PartFigures]  # "total"; with a volatility term, also what it is made of
    coverage: Mapping[int, Mapping[float, float]]  # by lead in seconds, by nominal share
    coverage_error: Mapping[int, float]  # standard error of the 80 % one, by lead

    @property
    def is_enough(self) -> bool:
        """Whether there are prompts enough, of days enough, to judge by."""
        return self.prompts >= MIN_PROMPTS and self.days >= MIN_DAYS

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        ratios = self.parts["total"].ratios
        if YARDSTICK not in ratios:
            return "nothing to beat"
        if not self.is_enough:
            return "too few prompts"
        words = {
            "better": f"beats {YARDSTICK}",
            "worse": f"loses to {YARDSTICK}",
            "no clear difference": f"level with {YARDSTICK}",
        }
        return words[ratios[YARDSTICK].verdict]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "prompts": self.prompts,
            "verdict": self.verdict,
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
            "coverage": {
                str(lead): {
                    f"{100 * share:g}": None if np.isnan(value) else value
                    for share, value in shares.items()
                }
                for lead, shares in self.coverage.items()
            },
        }


def summarise(markets: Sequence[Market]) -> Figures:
    """The figures of one market, or of several of one frequency, each counting the same."""
    markets = [answered_by_all(market) for market in markets]
    single = len(markets) == 1
    parts = [part for part in PARTS if part == "total" or _has_volatility(markets)]
    leads = [int(lead) for lead in markets[0]["prompts"][0]["pit"]]
    return Figures(
        name=market_name(markets[0]) if single else f"{markets[0]['frequency']} average",
        prompts=sum(len(market["prompts"]) for market in markets),
        days=len(np.unique(np.concatenate([start_times(m) for m in markets]) // DAY_S)),
        parts={part: _part_figures(markets, part) for part in parts},
        coverage={lead: _mean_coverage(markets, lead) for lead in leads},
        coverage_error={lead: _coverage_error(markets, lead) for lead in leads},
    )


def answered_by_all(market: Market) -> Market:
    """The market without prompts on which anybody missed; as it is, if that leaves none."""
    prompts = [
        prompt
        for prompt in market["prompts"]
        if not any(_is_miss(card["total"]) for card in prompt["scores"].values())
    ]
    return {**market, "prompts": prompts} if prompts else market


def _is_miss(total: float | None) -> bool:
    return total is None or total < 0


def scores_of(market: Market, forecaster: str, part: str = "total") -> FloatArray:
    """A forecaster's scores, or one part of them, by prompt; (n,), NaN for a miss.

    "intervals" are the prices' changes, "volatility" is the term on top of them.
    """
    cards = [prompt["scores"][forecaster] for prompt in market["prompts"]]
    if part == "total":
        values = [card["total"] for card in cards]
    else:
        wanted = part == "volatility"
        values = [
            sum(v for name, v in card["intervals"].items() if name.startswith(VOLATILITY) == wanted)
            for card in cards
        ]
    return np.array(values, dtype=np.float64)


def start_times(market: Market) -> Any:
    """Start times of the prompts; (n,), Unix seconds."""
    return np.array([prompt["start_ts"] for prompt in market["prompts"]], dtype=np.int64)


def pits_of(market: Market, lead_s: int) -> FloatArray:
    """The engine's PIT at a lead by prompt; (n,), NaN where unknown."""
    values = [prompt["pit"].get(str(lead_s)) for prompt in market["prompts"]]
    return np.array(values, dtype=np.float64)


def forecasters_of(market: Market) -> tuple[str, ...]:
    """The engine and its baselines, in the order in which they were asked for."""
    return tuple(market["prompts"][0]["scores"])


def gap_closed(market: Market, part: str = "total") -> float | None:
    """Share of the way from `ewma_t` to `oracle`.

    None without both, or without a way: if the oracle is not clearly the better one.
    """
    if not {YARDSTICK, BOUND} <= set(forecasters_of(market)):
        return None
    yardstick, bound, ours = (scores_of(market, name, part) for name in (YARDSTICK, BOUND, ENGINE))
    horizon_s, times = _horizon_s([market]), start_times(market)
    way = compare_scores(bound, yardstick, times, horizon_s=horizon_s)
    if way.verdict != "better":
        return None
    return float((yardstick.mean() - ours.mean()) / (yardstick.mean() - bound.mean()))


def _has_volatility(markets: Sequence[Market]) -> bool:
    card = markets[0]["prompts"][0]["scores"][ENGINE]
    return any(name.startswith(VOLATILITY) for name in card["intervals"])


def _part_figures(markets: Sequence[Market], part: str) -> PartFigures:
    baselines = [name for name in forecasters_of(markets[0]) if name != ENGINE]
    gaps = [gap_closed(market, part) for market in markets]
    known = [gap for gap in gaps if gap is not None]
    score = float(scores_of(markets[0], ENGINE, part).mean()) if len(markets) == 1 else None
    return PartFigures(
        score=score,
        ratios={name: _versus(markets, name, part) for name in baselines},
        gap_closed=float(np.mean(known)) if known and len(known) == len(gaps) else None,
    )


def _versus(markets: Sequence[Market], baseline: str, part: str) -> PairedComparison:
    paired = [
        PairedScores(
            scores=scores_of(market, ENGINE, part),
            against=scores_of(market, baseline, part),
            start_ts=start_times(market),
        )
        for market in markets
    ]
    return compare_markets(paired, horizon_s=_horizon_s(markets))


def _horizon_s(markets: Sequence[Market]) -> int:
    frequencies = {Frequency(market["frequency"]) for market in markets}
    return max(FREQUENCIES[frequency].prompt_length_s for frequency in frequencies)


def _mean_coverage(markets: Sequence[Market], lead_s: int) -> dict[float, float]:
    """Coverage at a lead, averaged over the markets where anything is known of it."""
    found = [coverage(pits_of(market, lead_s)) for market in markets]
    return {
        share: float(np.mean(known)) if known else np.nan
        for share in found[0]
        for known in [[each[share] for each in found if np.isfinite(each[share])]]
    }


def _coverage_error(markets: Sequence[Market], lead_s: int) -> float:
    errors = []
    for market in markets:
        pits = pits_of(market, lead_s)
        known = np.isfinite(pits)
        inside = (np.abs(pits[known] - 0.5) <= NOMINAL / 2).astype(np.float64)
        times = start_times(market)[known]
        errors.append(newey_west_error(inside, times, horizon_s=_horizon_s([market])))
    # Markets move together; as if they did wholly, the error of the mean is the mean error.
    return float(np.mean(errors))


# ---------------------------------------------------------------- two documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Challenger against champion: ratios of mean scores, below 1 the challenger is better."""

    markets: Mapping[str, PairedComparison]
    overall: PairedComparison
    other_settings: tuple[str, ...]  # what differs besides, in words

    @property
    def decision(self) -> str:
        """What to do, in words."""
        change = 100 * (self.overall.ratio - 1)
        evidence = (
            f"its mean score is {abs(change):.2f} % {'lower' if change < 0 else 'higher'}, "
            f"± {100 * self.overall.error:.2f} %, p = {self.overall.p_value:.2g}"
        )
        verdict = self.overall.verdict
        if verdict == "better":
            return f"take the challenger: {evidence}"
        if verdict == "worse":
            return f"keep the champion: the challenger is worse, {evidence}"
        return f"keep the champion: no clear difference; of the challenger, {evidence}"


def compare_documents(champion: Mapping[str, Any], challenger: Mapping[str, Any]) -> Contest:
    """Compare the engines of two documents on the prompts that they have in common.

    Raises: ConfigError if the scores are of different things; DataError if no prompt is
    in both.
    """
    ours = {market_name(market): market for market in champion["markets"]}
    theirs = {market_name(market): market for market in challenger["markets"]}
    names = [name for name in ours if name in theirs]
    _require_comparable(champion, challenger, [(n, ours[n], theirs[n]) for n in names])
    paired = {name: _common_prompts(theirs[name], ours[name]) for name in names}
    paired = {name: scores for name, scores in paired.items() if len(scores.start_ts)}
    if not paired:
        raise DataError(
            "the two results have no prompt of the same market in common; replay the same prompts."
        )
    horizons = {name: _horizon_s([ours[name]]) for name in paired}
    return Contest(
        markets={
            name: compare_markets([scores], horizon_s=horizons[name])
            for name, scores in paired.items()
        },
        overall=compare_markets(list(paired.values()), horizon_s=max(horizons.values())),
        other_settings=tuple(_differing(champion["settings"], challenger["settings"], MAY_DIFFER)),
    )


def _require_comparable(
    champion: Mapping[str, Any],
    challenger: Mapping[str, Any],
    markets: Sequence[tuple[str, Market, Market]],
) -> None:
    ways = [bool(document["settings"].get("closed_form")) for document in (champion, challenger)]
    if ways[0] != ways[1]:
        raise ConfigError(
            "one of the two results scores laws in closed form, the other paths drawn from them, "
            "and the two cannot be compared; repeat one of them with or without --closed-form."
        )
    differing = _differing(champion["settings"], challenger["settings"], MUST_AGREE)
    differing += [f"bars of {name}" for name, a, b in markets if a["bars"] != b["bars"]]
    if differing:
        raise ConfigError(
            f"the two results are of different things and cannot be compared: "
            f"{'; '.join(differing)}; repeat one of them with the settings of the other."
        )


def _differing(
    left: Mapping[str, Any], right: Mapping[str, Any], names: Sequence[str]
) -> list[str]:
    return [
        f"{name} is {left.get(name)} here and {right.get(name)} there"
        for name in names
        if left.get(name) != right.get(name)
    ]


def _common_prompts(challenger: Market, champion: Market) -> PairedScores:
    new = dict(zip(start_times(challenger).tolist(), scores_of(challenger, ENGINE), strict=True))
    old = dict(zip(start_times(champion).tolist(), scores_of(champion, ENGINE), strict=True))
    common = [time for time in old if time in new]
    return PairedScores(
        scores=np.array([new[time] for time in common], dtype=np.float64),
        against=np.array([old[time] for time in common], dtype=np.float64),
        start_ts=np.array(common, dtype=np.int64),
    )
