"""The score that endless paths would get, without drawing one.

Every scored interval compares a sum of steps with an outcome. The sum has a law
that is known up to its scale: √ΣS² over its steps, S their mean sizes, times the
unit law of so many steps, which is tabulated once. So the CRPS of an interval is
two look-ups, no random number is drawn for a prompt, and two forecasts can be told
apart on thousands of prompts that would take hours to draw.

With F the law of a log move u and x what came, in basis points, prices score
`∫ (F(u) - 1{u ≥ x})² exp(u / 1e4) du`. The table `crps` holds the integral without
the exponential, `tilted` its first-order term; the second is of order 1e-3 of a score
even where a day moves by 4 %. Source: Gneiting & Raftery (2007), JASA 102, eq. 20.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Self

import numpy as np
from scipy.integrate import cumulative_trapezoid, trapezoid

from domain import FloatArray, IntArray
from errors import DataError
from path_simulator import PathShape, StepLaw, simulate_steps
from pit import histogram
from protocol import Competition, IntervalKind
from quantile_matching import unit_distribution
from scoring import ScoreCard, block_volatility, interval_steps, require_known, volatility_name

BLOCK_STEPS: Final = 3_000_000  # random steps that a law of block volatilities is read off
BLOCK_LEVELS: Final = 1_001  # quantiles of it that are kept
LEAST_VARIANCE: Final = 1e-24  # bps²; no law is a single point
BPS: Final = 1e4


# ---------------------------------------------------------------- unit laws


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitLaw:
    """A distribution of unit scale, and what an outcome scores under it; all (n,).

    `below`: the distribution function on the rising `grid`, which spans all of it.
    `crps`: ∫ (F - 1{w ≥ z})² dw for an outcome z, which is E|X - z| - ½ E|X - X'|;
    `tilted`: the same integral of the integrand times w.
    """

    grid: FloatArray
    below: FloatArray
    crps: FloatArray
    tilted: FloatArray

    @classmethod
    def of(cls, grid: FloatArray, below: FloatArray) -> Self:
        """Tabulate both scores: their slopes are 2F - 1 and w (2F - 1)."""
        above, slope = (1 - below) ** 2, 2 * below - 1
        crps = trapezoid(above, grid) + cumulative_trapezoid(slope, grid, initial=0)
        tilted = trapezoid(above * grid, grid) + cumulative_trapezoid(slope * grid, grid, initial=0)
        return cls(grid=grid, below=below, crps=crps, tilted=tilted)

    def pit(self, outcome: FloatArray) -> FloatArray:
        """Probability of less than the outcomes; same shape."""
        return np.interp(outcome, self.grid, self.below)

    def score(self, outcome: FloatArray) -> FloatArray:
        """CRPS of the outcomes; same shape."""
        inside = np.clip(outcome, self.grid[0], self.grid[-1])
        return np.interp(inside, self.grid, self.crps) + np.abs(outcome - inside)

    def tilted_score(self, outcome: FloatArray) -> FloatArray:
        """The first-order term of the outcomes; same shape."""
        inside = np.clip(outcome, self.grid[0], self.grid[-1])
        beyond = np.sign(outcome - inside) * (outcome**2 - inside**2) / 2
        return np.interp(inside, self.grid, self.tilted) + beyond


@lru_cache(maxsize=256)
def sum_law(shape: PathShape, step_s: float, length: int) -> UnitLaw:
    """The law of a sum of `length` steps of mean size 1, over √length."""
    grid, below = unit_distribution(shape, step_s, length)
    return UnitLaw.of(
        np.concatenate((-grid[:0:-1], grid)), np.concatenate((1 - below[:0:-1], below))
    )


@lru_cache(maxsize=64)
def volatility_law(shape: PathShape, step_s: float, length: int) -> UnitLaw:
    """The law of the standard deviation (ddof 1) of `length` steps of mean size 1.

    Read off many drawn blocks, with the same random numbers for every shape.
    """
    draws = BLOCK_STEPS // length
    rng = np.random.default_rng([length, draws])
    unit = np.ones(length)
    steps = simulate_steps(rng, unit, step_s * unit, shape, n_paths=draws)
    # Levels crowd at both ends, where quantiles lie far apart.
    levels = (1 - np.cos(np.linspace(0, np.pi, BLOCK_LEVELS))) / 2
    return UnitLaw.of(np.quantile(steps.std(axis=0, ddof=1), levels), levels)


# ---------------------------------------------------------------- outcomes under laws


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Outcomes:
    """What came of m changes in n prompts, and `centre + scale · unit`, the laws of them.

    Arrays are (n, m) or can be made so; `observed` is NaN where unknown. `weight`: what
    a basis point is worth in the score. `compound`: whether what is observed are log
    changes, and the prices behind them are scored.
    """

    unit: UnitLaw
    observed: FloatArray  # bps
    scale: FloatArray
    centre: FloatArray | float = 0.0
    weight: FloatArray | float = 1.0
    compound: bool = True

    def crps(self) -> FloatArray:
        """CRPS per prompt, what is unknown left out; (n,)."""
        standard = self._standard()
        each = self.scale * self.unit.score(standard)
        if self.compound:
            each += self.scale**2 / BPS * self.unit.tilted_score(standard)
        known = np.isfinite(self.observed)
        return np.asarray(np.where(known, self.weight * each, 0.0).sum(axis=1), dtype=np.float64)

    def pit(self) -> FloatArray:
        """Probability of less than what came; (n, m), NaN where unknown."""
        return self.unit.pit(self._standard())

    def _standard(self) -> FloatArray:
        return np.asarray((self.observed - self.centre) / self.scale, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prompts:
    """Laws of one shape and what came, ready to be compared over any steps.

    `realised` (n, points) prices, `observed` (n, points) log moves from the laws' prices
    on, bps, both NaN where unknown; `centre` (n, points). `at` (points,): steps from
    there to each point; `variance` (n, steps + 1): what their squared scales add up to.
    """

    shape: PathShape
    step_s: float
    realised: FloatArray
    price: FloatArray  # (n,)
    observed: FloatArray
    centre: FloatArray
    at: IntArray
    variance: FloatArray

    @classmethod
    def of(cls, laws: Sequence[StepLaw], realised: FloatArray) -> Self:
        """Put together laws that agree in shape and in the steps to each point."""
        first = laws[0]
        price = np.array([law.price for law in laws])
        steps = np.stack([law.scale for law in laws]) ** 2
        return cls(
            shape=first.shape,
            step_s=first.step_s,
            realised=realised,
            price=price,
            observed=BPS * np.log(realised / price[:, None]),
            centre=np.stack([law.centre for law in laws]),
            at=np.searchsorted(first.times, first.points),
            variance=np.hstack([np.zeros((len(laws), 1)), np.cumsum(steps, axis=1)]),
        )

    def scored(
        self, competition: Competition, increment_s: int
    ) -> Iterator[tuple[str, float, list[_Outcomes]]]:
        """Every part of a score card: its name, its factor and the outcomes in it."""
        n_points = len(self.at)
        for interval in competition.intervals:
            steps = interval_steps(interval, increment_s, n_points)
            ends = np.arange(steps, n_points, steps)
            if interval.kind is IntervalKind.ABSOLUTE:
                yield interval.name, 1.0, self._prices(ends)
                continue
            ends = ends[:1] if interval.kind is IntervalKind.GAP else ends
            yield interval.name, 1.0, self.changes(ends - steps, ends)
        for block_s, factor in competition.volatility_weights:
            yield volatility_name(block_s), factor, self._volatilities(block_s // increment_s)

    def changes(self, begin: IntArray, end: IntArray) -> list[_Outcomes]:
        """Returns from the points `begin` to the points `end`, both (m,)."""
        observed = self.observed[:, end] - self.observed[:, begin]
        centre = self.centre[:, end] - self.centre[:, begin]
        return self._by_length(self.at[begin], self.at[end], observed, centre, 1.0)

    def _prices(self, end: IntArray) -> list[_Outcomes]:
        """The prices at the points `end` (m,), in bps of the last one that is known."""
        n_points = self.realised.shape[1]
        last = n_points - 1 - np.isfinite(self.realised[:, ::-1]).argmax(axis=1)
        worth = self.price / self.realised[np.arange(len(last)), last]
        begin = np.zeros_like(end)
        observed, centre = self.observed[:, end], self.centre[:, end]
        return self._by_length(begin, self.at[end], observed, centre, worth[:, None])

    def _by_length(
        self,
        begin: IntArray,
        end: IntArray,
        observed: FloatArray,
        centre: FloatArray,
        worth: FloatArray | float,
    ) -> list[_Outcomes]:
        """Log changes over the steps begin ≤ j < end (m,), sorted by how many these are."""
        variance = self.variance[:, end] - self.variance[:, begin]
        scale = np.sqrt(np.maximum(variance, LEAST_VARIANCE))
        weight = worth * np.exp(centre / BPS)
        return [
            _Outcomes(
                unit=sum_law(self.shape, self.step_s, length),
                observed=observed[:, of_it],
                scale=scale[:, of_it],
                centre=centre[:, of_it],
                weight=weight[:, of_it],
            )
            for length in np.unique(end - begin).tolist()
            for of_it in [end - begin == length]
        ]

    def _volatilities(self, steps: int) -> list[_Outcomes]:
        """Standard deviations of one-step returns in blocks of `steps` points.

        Within a block all steps count as equal: how they differ moves the law of a
        block's volatility in second order only.
        """
        if not 1 <= steps < len(self.at):
            return []
        edges = self.variance[:, self.at[::steps]]
        variance = np.diff(edges, axis=1) / steps
        return [
            _Outcomes(
                unit=volatility_law(self.shape, self.step_s, steps),
                observed=block_volatility(self.realised, steps),
                scale=np.sqrt(np.maximum(variance, LEAST_VARIANCE)),
                compound=False,
            )
        ]


# ---------------------------------------------------------------- what is asked of laws


def score_laws(
    laws: Sequence[StepLaw], realised: FloatArray, competition: Competition, *, increment_s: int
) -> list[ScoreCard]:
    """Score laws as `score_paths` would score endless paths that are drawn from each.

    `realised` (n, points) prices, NaN where unknown. Many laws at once take little
    longer than one. Raises: DataError if the number of points differs or a prompt has
    no price.
    """
    cards: list[dict[str, float]] = [{} for _ in laws]
    for rows, prompts in _alike(laws, realised):
        for name, factor, groups in prompts.scored(competition, increment_s):
            total = factor * sum((group.crps() for group in groups), np.zeros(len(rows)))
            for row, part in zip(rows, total.tolist(), strict=True):
                cards[row][name] = part
    return [ScoreCard(total=float(sum(card.values())), by_interval=card) for card in cards]


def law_histograms(
    laws: Sequence[StepLaw], realised: FloatArray, competition: Competition, *, increment_s: int
) -> list[dict[str, IntArray]]:
    """`pit.interval_histograms` of every law; arguments as for `score_laws`."""
    found: list[dict[str, IntArray]] = [{} for _ in laws]
    for rows, prompts in _alike(laws, realised):
        for name, _, groups in prompts.scored(competition, increment_s):
            pits = np.hstack([np.empty((len(rows), 0)), *(group.pit() for group in groups)])
            for row, values in zip(rows, pits, strict=True):
                found[row][name] = histogram(values)
    return found


def law_pits(
    laws: Sequence[StepLaw], realised: FloatArray, leads_s: Iterable[int], *, increment_s: int
) -> list[dict[int, float]]:
    """`pit.lead_pits` of every law; `realised` as for `score_laws`."""
    ends = np.array([lead // increment_s for lead in leads_s if lead >= increment_s])
    ends = ends[ends < realised.shape[1]]
    found: list[dict[int, float]] = [{} for _ in laws]
    for rows, prompts in _alike(laws, realised):
        for end in ends.tolist():
            (outcomes,) = prompts.changes(np.array([0]), np.array([end]))
            for row, value in zip(rows, outcomes.pit()[:, 0].tolist(), strict=True):
                found[row][end * increment_s] = value
    return found


def _alike(laws: Sequence[StepLaw], realised: FloatArray) -> Iterator[tuple[list[int], _Prompts]]:
    """The laws in groups of one shape and one order of steps, and where they stood."""
    groups: dict[Any, list[int]] = {}
    for row, (law, path) in enumerate(zip(laws, realised, strict=True)):
        if path.shape != law.points.shape:
            raise DataError(
                f"a law of {len(law.points)} points cannot be scored against a realised path of "
                f"shape {path.shape}; both need the same number of points."
            )
        require_known(path)
        steps = (np.searchsorted(law.times, law.points)).tobytes()
        groups.setdefault((law.shape, law.step_s, len(law.scale), steps), []).append(row)
    for rows in groups.values():
        yield rows, _Prompts.of([laws[row] for row in rows], realised[rows])
