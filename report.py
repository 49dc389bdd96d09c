"""The report of a back-test: one HTML page that opens offline, on a laptop or a phone.

`explain_market` replays some prompts of a market to say what its score is lost to
and to draw its worst forecasts; `write_report` puts that and the results on a page.
Whatever comes from data is escaped by the template; only our own figures are not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from attribution import STEPS, Attribution, Loss, Occasion, Part, attribute
from backtest_results import (
    ENGINE,
    YARDSTICK,
    Figures,
    Market,
    PartFigures,
    market_name,
    summarise,
)
from comparison import PairedComparison
from config import Frequency
from domain import FloatArray, Forecast, MarketHistory
from forecast_engine import draw, request_rng
from market_view import MarketView
from plots import (
    CSS_COLOURS,
    Figure,
    coverage_figure,
    dot_figure,
    line_figure,
    loss_figure,
    pit_figure,
    sideways_dot_figure,
    small_fan,
    svg_markup,
)
from protocol import Competition, protocol_profile
from replay import known_at_prompt, realised_path, usual_request
from report_numbers import (
    Coverage,
    Group,
    IntervalRow,
    MarketResult,
    WorstPrompt,
    by_hour,
    by_interval,
    by_weekday,
    coverage_by_lead,
    over_time,
    read_market,
    simulated_rewards,
    worst_prompts,
)
from state_store import write_atomically

PAGE: Final = "report.html"
TEMPLATE: Final = "report.html.j2"
EXPLAINED: Final = 24  # prompts per market whose score is taken apart
EXPLAIN_STEPS: Final = STEPS + 2  # of `on_step`
LEAD_BINS: Final = 10  # of the histograms with one outcome a prompt
NEW_YORK: Final = ZoneInfo("America/New_York")

FEW_PROMPTS: Final = 50
NOTEWORTHY_BP: Final = 1.0
NORMAL_RUNGS: Final = ("lightgbm",)
FIGURE_NAMES: Final = {
    "scores": "mean score over time",
    "ratios": "score over that of the yardstick, over time",
    "hours": "ratio to the yardstick by hour in New York",
    "weekdays": "ratio to the yardstick by weekday in New York",
    "intervals": "ratio to the yardstick by interval",
    "pit_leads": "PIT histograms by lead",
    "pit_intervals": "PIT histograms by scored interval",
    "coverage": "coverage by lead",
    "prompt_losses": "losses that are known only afterwards",
    "market_losses": "losses over all prompts",
}
FREQUENCY_NAMES: Final = {Frequency.HF: "1-hour", Frequency.LF: "24-hour"}
PART_NAMES: Final = {
    Part.CENTRE: "centre",
    Part.TOO_WIDE: "scale too wide",
    Part.TOO_NARROW: "scale too narrow",
    Part.DRIFT: "drift",
    Part.LEVEL: "level of scale",
    Part.TAILS: "tails",
    Part.DISPERSION: "dispersion",
    Part.ENSEMBLE: "ensemble noise",
}
PROMPT_PARTS: Final = (Part.CENTRE, Part.TOO_WIDE, Part.TOO_NARROW)  # known only afterwards
MARKET_PARTS: Final = (Part.DRIFT, Part.LEVEL, Part.TAILS, Part.DISPERSION, Part.ENSEMBLE)


# ---------------------------------------------------------------- what needs a replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Insight:
    """What replaying some prompts of a market brought to light; small and picklable."""

    attribution: Attribution
    fans: Mapping[int, str]  # SVG of the worst forecasts, by start time


def explain_market(
    history: MarketHistory,
    see: Callable[[MarketHistory], MarketView],
    competition: Competition,
    entry: Market,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Insight:
    """Take the score of some prompts apart and draw the worst ones.

    `see` gives the engine's view at the end of what is known, with the models of
    that time; it is called in rising time. `entry`: the market in the results.
    `on_step` is called `EXPLAIN_STEPS` times on the way.
    """
    market = read_market(entry)
    worst = [prompt.start_ts for prompt in worst_prompts(market)]
    spread = np.linspace(0, len(market.start_ts) - 1, min(EXPLAINED, len(market.start_ts)))
    evenly = np.unique(market.start_ts[spread.round().astype(np.int64)]).tolist()
    occasions = {t: _occasion(history, see, t) for t in sorted({*worst, *evenly})}
    on_step()
    fans = {start_ts: _fan(history, occasions[start_ts], seed) for start_ts in worst}
    on_step()
    chosen = [occasions[start_ts] for start_ts in evenly]
    attribution = attribute(chosen, competition, seed=seed, on_step=on_step)
    return Insight(attribution=attribution, fans=fans)


def _occasion(
    history: MarketHistory, see: Callable[[MarketHistory], MarketView], start_ts: int
) -> Occasion:
    request = usual_request(history, start_ts)
    view = see(known_at_prompt(history, start_ts))
    return Occasion(request=request, view=view, realised=realised_path(history, request))


def _fan(history: MarketHistory, occasion: Occasion, seed: int) -> str:
    request, view = occasion.request, occasion.view
    forecast: Forecast = draw(request, view, view.anchor_ts, request_rng(seed, request))
    known = known_at_prompt(history, request.start_ts)
    figure = small_fan(forecast, known, occasion.realised)
    return svg_markup(figure, label=f"Forecast of {request.asset} at {_utc(request.start_ts)}")


# ---------------------------------------------------------------- the page


def write_report(folder: Path, results: Mapping[str, Any], insights: Mapping[str, Insight]) -> Path:
    """Write the page into the folder, whole or not at all; returns its path.

    `results`: the document that the back-test writes as JSON, with at least one market.
    `insights`: by name of the market, e.g. "BTC hf"; a market without one is shown
    without attribution and fan charts. Raises: StateError if it cannot be written.
    """
    path = folder / PAGE
    write_atomically(path, render(results, insights).encode("utf-8"))
    return path


def render(results: Mapping[str, Any], insights: Mapping[str, Insight]) -> str:
    """The page as text."""
    settings, entries = results["settings"], results["markets"]
    markets = [read_market(entry) for entry in entries]
    profile = protocol_profile(settings["profile"])
    rewards = simulated_rewards(markets, profile)
    paid = {name for competition in rewards for name in competition.markets}
    summary = _summary(entries)
    page = _environment().get_template(TEMPLATE)
    return page.render(
        settings=settings,
        yardstick=YARDSTICK,
        simulated=settings["source"] == "simulated",
        colours=CSS_COLOURS,
        baselines=tuple(dict.fromkeys(name for market in markets for name in market.baselines)),
        summary=summary,
        headlines=_headlines(summary),
        rewards=rewards,
        unpaid=[market.name for market in markets if market.name not in paid],
        profile=profile.name,
        markets=[_section(entry, insights.get(market_name(entry))) for entry in entries],
        first_ts=min(int(market.start_ts[0]) for market in markets),
        last_ts=max(int(market.start_ts[-1]) for market in markets),
        explained=EXPLAINED,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ratio": _ratio,
        "number": _number,
        "signed": _signed,
        "percent": lambda value, digits=0: f"{100 * value:.{digits}f} %",
        "utc": _utc,
        "new_york": _new_york,
        "lead": lead_name,
        "coverage": _coverage_text,
    }
    return environment


def _ratio(comparison: PairedComparison | None) -> str:
    if comparison is None:
        return "–"
    if not np.isfinite(comparison.error):
        return f"{comparison.ratio:.4f}"
    return f"{comparison.ratio:.4f} ± {comparison.error:.4f}"


def _coverage_text(entry: Coverage) -> str:
    text = f"{100 * entry.found:.1f}"
    if np.isfinite(entry.error):
        text += f" ± {100 * entry.error:.1f}"
    return text if entry.verdict == "right" else f"{text} ({entry.verdict})"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def _number(value: float) -> str:
    """Four digits or more: a thousandth of a score is worth money."""
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _utc(ts: float) -> str:
    return datetime.fromtimestamp(ts, UTC).strftime("%a %d %b %Y %H:%M UTC")


def _new_york(ts: float) -> str:
    return datetime.fromtimestamp(ts, NEW_YORK).strftime("%a %H:%M")


# ---------------------------------------------------------------- summary


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """One market, or the average of one frequency, on top of the page."""

    figures: Figures
    anchor: str | None  # of its section; None for an average
    frequency: Frequency

    @property
    def total(self) -> PartFigures:
        """The whole score, not a part of it."""
        return self.figures.parts["total"]

    @property
    def found(self) -> PairedComparison | None:
        """Against the yardstick."""
        return self.total.ratios.get(YARDSTICK)

    @property
    def judged(self) -> PairedComparison | None:
        """The same, if there are prompts enough to judge by."""
        return self.found if self.figures.is_enough else None

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.judged is None or not np.isfinite(self.judged.error):
            return self.figures.verdict
        return f"{self.figures.verdict} ({abs(self.judged.errors):.1f} standard errors)"


def _summary(entries: Sequence[Market]) -> list[SummaryRow]:
    rows = []
    for frequency in Frequency:
        members = [entry for entry in entries if entry["frequency"] == frequency.value]
        rows += [
            SummaryRow(figures=summarise([entry]), anchor=_anchor(entry), frequency=frequency)
            for entry in members
        ]
        if len(members) > 1:
            rows.append(SummaryRow(figures=summarise(members), anchor=None, frequency=frequency))
    return rows


def _headlines(rows: Sequence[SummaryRow]) -> list[str]:
    """The outcome of each frequency in one sentence: of its average, or of its only market."""
    last = {row.frequency: row for row in rows}
    return [_headline(row, row.found) for row in last.values() if row.found is not None]


def _headline(row: SummaryRow, found: PairedComparison) -> str:
    side = "below" if found.ratio < 1 else "above"
    error = f" ± {100 * found.error:.2f}" if np.isfinite(found.error) else ""
    gap = row.total.gap_closed
    closed = "" if gap is None else f" and close {100 * gap:.0f} % of the gap to the oracle"
    verdict = found.verdict if row.judged is not None else row.verdict
    return (
        f"{FREQUENCY_NAMES[row.frequency]} prompts score {100 * abs(1 - found.ratio):.2f}{error} % "
        f"{side} {YARDSTICK} ({verdict}){closed}."
    )


def _anchor(entry: Market) -> str:
    return market_name(entry).replace(" ", "-").lower()


# ---------------------------------------------------------------- one market


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRow:
    """One line of the attribution."""

    name: str
    loss: Loss
    expected: float | None  # None where it has no meaning
    stands_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstRow:
    """One of the worst prompts and its picture, if it was drawn."""

    prompt: WorstPrompt
    fan: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Everything that the page shows of one market."""

    market: MarketResult
    summary: SummaryRow
    anchor: str
    title: str
    notes: list[str]
    figures: Mapping[str, Markup]
    intervals: list[IntervalRow]
    coverage: Mapping[int, tuple[Coverage, ...]]
    coverage_words: str
    attribution: Attribution | None
    losses: Mapping[str, list[LossRow]]
    loss_words: str
    worst: list[WorstRow]


def _section(entry: Market, insight: Insight | None) -> Section:
    market = read_market(entry)
    fans = insight.fans if insight else {}
    coverage = coverage_by_lead(market)
    losses = _loss_rows(insight.attribution) if insight else {}
    return Section(
        market=market,
        summary=SummaryRow(
            figures=summarise([entry]), anchor=_anchor(entry), frequency=market.frequency
        ),
        anchor=_anchor(entry),
        title=f"{market.asset}, {FREQUENCY_NAMES[market.frequency]} prompts",
        notes=_notes(market),
        figures=_figures(market, coverage, losses),
        intervals=by_interval(market),
        coverage=coverage,
        coverage_words=_coverage_words(coverage),
        attribution=insight.attribution if insight else None,
        losses=losses,
        loss_words=_loss_words(losses),
        worst=[
            WorstRow(prompt=prompt, fan=_markup(fans.get(prompt.start_ts)))
            for prompt in worst_prompts(market)
        ],
    )


def _markup(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)  # noqa: S704  # drawn by us, escaped where it is drawn


def _notes(market: MarketResult) -> list[str]:
    """What a reader must know before trusting the numbers, one sentence each."""
    notes = []
    if market.missed:
        notes.append(f"{market.missed} prompts are left out: somebody's answer did not count.")
    lower = {rung: count for rung, count in market.rungs.items() if rung not in NORMAL_RUNGS}
    notes += [
        f"{count} prompts were answered on the rung “{rung}”." for rung, count in lower.items()
    ]
    if len(market.start_ts) < FEW_PROMPTS:
        notes.append("So few prompts say little; errors are rough themselves.")
    return notes


def _coverage_words(coverage: Mapping[int, tuple[Coverage, ...]]) -> str:
    """What became of the 80 % interval."""
    found = [entry for row in coverage.values() for entry in row if entry.nominal == 0.8]
    if not found:
        return "Nothing is known of the calibration."
    mean = 100 * float(np.mean([entry.found for entry in found]))
    words = f"The 80 % interval held {mean:.1f} % of outcomes on average over the leads; "
    wrong = [
        f"{entry.verdict} at {lead_name(lead)}"
        for lead, row in coverage.items()
        for entry in row
        if entry.nominal == 0.8 and entry.verdict != "right"
    ]
    return words + (", ".join(wrong) + "." if wrong else "right at every lead.")


def lead_name(lead_s: int) -> str:
    """A lead in words, e.g. "5 min"."""
    if lead_s % 3600 == 0:
        return f"{lead_s // 3600} h"
    return f"{lead_s // 60} min"


def _loss_rows(attribution: Attribution) -> dict[str, list[LossRow]]:
    by_part = {loss.part: loss for loss in attribution.losses}
    return {
        group: [_loss_row(by_part[part]) for part in parts]
        for group, parts in (("market", MARKET_PARTS), ("prompt", PROMPT_PARTS))
    }


def _loss_row(loss: Loss) -> LossRow:
    # More paths help forecasts in which nothing is wrong just as much.
    expected = None if loss.part is Part.ENSEMBLE else loss.expected_bp
    beyond = loss.lost_bp - max(expected or 0.0, 0.0)
    return LossRow(
        name=PART_NAMES[loss.part],
        loss=loss,
        expected=expected,
        stands_out=beyond > max(2 * loss.error_bp, NOTEWORTHY_BP),
    )


def _loss_words(losses: Mapping[str, list[LossRow]]) -> str:
    """Which parts cost more than hindsight finds anyway."""
    found = [
        f"{row.name} ({row.loss.lost_bp:.1f} ± {row.loss.error_bp:.1f} bp; best: "
        f"{row.loss.hindsight})"
        for rows in losses.values()
        for row in rows
        if row.stands_out
    ]
    return f"What stands out: {', '.join(found)}." if found else "Nothing stands out."


# ---------------------------------------------------------------- figures of one market


def _figures(
    market: MarketResult,
    coverage: Mapping[int, tuple[Coverage, ...]],
    losses: Mapping[str, list[LossRow]],
) -> dict[str, Markup]:
    """By name; only those that there are data for."""
    drawn = _time_figures(market) | _calibration_figures(market, coverage)
    if market.yardstick:
        drawn |= {
            "hours": _group_figure(by_hour(market)),
            "weekdays": _group_figure(by_weekday(market)),
            "intervals": _interval_figure(market, market.yardstick),
        }
    drawn |= {f"{group}_losses": _loss_figure(rows) for group, rows in losses.items()}
    return {
        name: Markup(svg_markup(figure, label=f"{market.name}: {FIGURE_NAMES[name]}"))  # noqa: S704  # drawn by us
        for name, figure in drawn.items()
    }


def _time_figures(market: MarketResult) -> dict[str, Figure]:
    periods = over_time(market)
    scores = {name: periods.scores[name] for name in (ENGINE, *market.baselines)}
    figures = {"scores": line_figure(periods.middle_ts, scores, level=None)}
    if market.yardstick:
        yardstick = periods.scores[market.yardstick]
        # The reference is so far off that it would flatten everything else.
        ratios = {
            name: values / yardstick
            for name, values in scores.items()
            if name not in (market.yardstick, "reference")
        }
        figures["ratios"] = line_figure(periods.middle_ts, ratios, level=1.0)
    return figures


def _group_figure(groups: Sequence[Group]) -> Figure:
    return dot_figure(
        [group.label for group in groups],
        np.array([group.ratio for group in groups]),
        np.array([group.error for group in groups]),
        level=1.0,
    )


def _interval_figure(market: MarketResult, yardstick: str) -> Figure:
    rows = [row for row in by_interval(market) if not row.member]
    found = [row.against[yardstick] for row in rows]
    return sideways_dot_figure(
        [row.name for row in rows],
        np.array([entry.ratio if entry else np.nan for entry in found]),
        np.array([entry.error if entry else np.nan for entry in found]),
        level=1.0,
    )


def _calibration_figures(
    market: MarketResult, coverage: Mapping[int, tuple[Coverage, ...]]
) -> dict[str, Figure]:
    figures = {}
    if coverage:
        counts = {lead_name(lead): _counts(market.pits[lead]) for lead in coverage}
        figures["pit_leads"] = pit_figure(counts, columns=_columns(counts))
        figures["coverage"] = coverage_figure(
            [lead_name(lead) for lead in coverage],
            {
                entry.nominal: (
                    np.array([row[index].found for row in coverage.values()]),
                    np.array([row[index].error for row in coverage.values()]),
                )
                for index, entry in enumerate(next(iter(coverage.values())))
            },
        )
    # Gaps are the changes from the start that the leads show already.
    shown = {n: c.astype(np.float64) for n, c in market.histograms.items() if "_gaps" not in n}
    if shown:
        figures["pit_intervals"] = pit_figure(shown, columns=_columns(shown))
    return figures


def _columns(histograms: Mapping[str, FloatArray]) -> int:
    """Three side by side, unless one would be left over."""
    return 2 if len(histograms) % 3 == 1 else 3


def _counts(pits: FloatArray) -> FloatArray:
    counts, _ = np.histogram(pits[np.isfinite(pits)], bins=LEAD_BINS, range=(0.0, 1.0))
    return counts.astype(np.float64)


def _loss_figure(rows: Sequence[LossRow]) -> Figure:
    return loss_figure(
        [row.name for row in rows],
        np.array([row.loss.lost_bp for row in rows]),
        np.array([row.loss.error_bp for row in rows]),
        np.array([np.nan if row.expected is None else row.expected for row in rows]),
    )
