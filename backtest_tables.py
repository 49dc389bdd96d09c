"""The tables of a back-test: scores and what they come to, champion and challenger."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backtest_results import (
    BOUND,
    MIN_DAYS,
    MIN_PROMPTS,
    NOMINAL,
    YARDSTICK,
    Contest,
    Figures,
    PartFigures,
    summarise,
)
from comparison import PairedComparison
from config import Frequency
from console import note, table


def print_figures(document: Mapping[str, Any]) -> None:
    """Every market, and the averages, of a document; nothing if it has none."""
    figures = _all_figures(document["markets"])
    if not figures:
        return
    baselines = [name for name in document["settings"]["baselines"] if name != BOUND]
    closed = " in closed form" if document["settings"].get("closed_form") else ""
    table(
        f"Mean score{closed}, lower is better",
        ("market", "score", *(f"÷ {name}" for name in baselines)),
        [_score_row(found, found.parts["total"], baselines) for found in figures],
    )
    table(
        "What they come to",
        ("market", "prompts", "gap closed", f"{100 * NOMINAL:g} % covers", "verdict"),
        [
            (
                found.name,
                found.prompts,
                _percent(found.parts["total"].gap_closed),
                " ".join(f"{100 * shares[NOMINAL]:.0f}" for shares in found.coverage.values()),
                found.verdict,
            )
            for found in figures
        ],
    )
    with_term = [found for found in figures if "volatility" in found.parts]
    if with_term:
        _print_volatility(with_term)
    print(
        f"gap closed: the way from {YARDSTICK} to an oracle that knows the volatility to come. "
        f"{100 * NOMINAL:g} % covers: how\noften, in %, the outcome fell into that interval, by "
        "lead. ±: one standard error, over days."
    )
    if not all(found.is_enough for found in figures):
        print(
            f"too few prompts: under {MIN_PROMPTS}, or of under {MIN_DAYS} days, they decide "
            "nothing; ask for more (--prompts)."
        )


def _print_volatility(figures: Sequence[Figures]) -> None:
    """The two parts of a score that has a volatility term, apart."""
    rows = []
    for found in figures:
        changes, term = found.parts["intervals"], found.parts["volatility"]
        rows.append(
            (
                found.name,
                _score(changes),
                _ratio(changes.ratios.get(YARDSTICK)),
                _percent(changes.gap_closed),
                _score(term),
                _ratio(term.ratios.get(YARDSTICK)),
            )
        )
    table(
        "Price changes and the volatility term apart",
        ("market", "changes", f"÷ {YARDSTICK}", "gap closed", "volatility", f"÷ {YARDSTICK}"),
        rows,
    )


def _all_figures(markets: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """Every market, and after those of one frequency their average."""
    figures = []
    for frequency in Frequency:
        of_it = [market for market in markets if market["frequency"] == frequency.value]
        figures += [summarise([market]) for market in of_it]
        if len(of_it) > 1:
            figures.append(summarise(of_it))
    return figures


def _score_row(found: Figures, part: PartFigures, baselines: Sequence[str]) -> tuple[Any, ...]:
    ratios = [_ratio(part.ratios.get(name)) for name in baselines]
    return (found.name, _score(part), *ratios)


def _score(part: PartFigures) -> str | None:
    return None if part.score is None else f"{part.score:.1f}"


def _ratio(found: PairedComparison | None) -> str | None:
    if found is None:
        return None
    error = f"{found.error:.4f}".lstrip("0") if np.isfinite(found.error) else "n/a"
    return f"{found.ratio:.4f}±{error}"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.0f} %"


def print_contest(contest: Contest) -> None:
    """The markets in which two engines met, and the decision in words."""
    for difference in contest.other_settings:
        note(f"they differ: {difference}.")
    rows = [_contest_row(name, found) for name, found in contest.markets.items()]
    if len(rows) > 1:
        rows.append(_contest_row("overall", contest.overall))
    table(
        "Mean score of the challenger over that of the champion",
        ("market", "prompts", "ratio", "better on", "p", "verdict"),
        rows,
    )
    print(f"Decision: {contest.decision}.")


def _contest_row(name: str, found: PairedComparison) -> tuple[Any, ...]:
    better_on = f"{100 * found.wins:.0f} %"
    return name, found.prompts, _ratio(found), better_on, f"{found.p_value:.3f}", found.verdict
