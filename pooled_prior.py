"""What markets have in common, and how far one of them leans on it.

An asset with days of bars cannot learn how volatility decays from its own; with
a year it can. So every blend is pulled towards slopes fitted to all assets
together, the harder the fewer days of its own there are, and every clock
towards the mean clock of the markets with the same hours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from config import DAY_S, Frequency, FrequencySpec, MarketHours
from domain import FloatArray
from seasonality import SeasonalProfile, lean_on_pool
from uncertainty_engine import LogLinearScale, blend_ridge, fit_log_linear

INTERCEPT_RIDGE: Final = 0.01  # of the blend, at `pool_days` of own bars
POOL_EVERY_S: Final = 30 * DAY_S  # what markets have in common changes slowly


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PooledPrior:
    """Blend and clocks of all assets of a source, from bars that closed by `until`."""

    frequency: Frequency
    until: int
    assets: tuple[str, ...]
    blend: tuple[LogLinearScale, ...]  # one per lead bucket
    profiles: Mapping[MarketHours, SeasonalProfile]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "frequency": self.frequency.value,
            "until": self.until,
            "assets": list(self.assets),
            "blend": [part.to_dict() for part in self.blend],
            "profiles": {hours.value: one.to_dict() for hours, one in self.profiles.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            frequency=Frequency(values["frequency"]),
            until=int(values["until"]),
            assets=tuple(values["assets"]),
            blend=tuple(LogLinearScale.from_dict(part) for part in values["blend"]),
            profiles={
                MarketHours(hours): SeasonalProfile.from_dict(one)
                for hours, one in values["profiles"].items()
            },
        )


def pool_moments(first: int, last: int) -> list[int]:
    """The moments of the pools that fits between two times use; Unix seconds, rising.

    A pool serves all fits until the next moment of a fixed grid of clock time, so
    that assets and retrainings share it.
    """
    begin = first // POOL_EVERY_S * POOL_EVERY_S
    return list(range(begin, last + 1, POOL_EVERY_S))


def prior_known_at(priors: Sequence[PooledPrior], ts: int) -> PooledPrior | None:
    """The newest prior that had seen nothing after `ts`."""
    known = [prior for prior in priors if prior.until <= ts]
    return max(known, key=lambda prior: prior.until, default=None)


def pooled_clock(own: SeasonalProfile, prior: PooledPrior | None, days: float) -> SeasonalProfile:
    """The clock learned from `days` of bars, leaning on like markets."""
    pooled = None if prior is None else prior.profiles.get(own.hours)
    return own if pooled is None else lean_on_pool(own, pooled, days)


def fit_blend_bucket(
    spec: FrequencySpec,
    bucket: int,
    x: FloatArray,
    y: FloatArray,
    weight: FloatArray,
    *,
    prior: PooledPrior | None,
    days: float,
    room: Any = None,
) -> LogLinearScale:
    """The blend of one lead bucket; shapes as `fit_log_linear`.

    Without a prior slopes are pulled to 0 by the usual ridge; with one towards
    the pool's, by that ridge times (pool days / own days)², never less than it.
    """
    ridge = blend_ridge(spec)
    if prior is None:
        return fit_log_linear(x, y, weight, ridge=ridge, room=room)
    pull = max(1.0, (spec.pool_days / max(days, 1e-3)) ** 2)
    return fit_log_linear(
        x,
        y,
        weight,
        ridge=pull * ridge,
        prior=prior.blend[bucket],
        intercept_ridge=pull * INTERCEPT_RIDGE,
        room=room,
    )
