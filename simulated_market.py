"""A seeded market for demonstrations and tests: realistic in form, invented in content.

Owns the closing hours of the simulated assets and the recipe of their prices:
a New York intraday clock, calmer weekends, volatility that clusters over
minutes, hours and days, fat-tailed returns, occasional jumps, and a price that
goes on moving unseen while the market is closed. Pure: the same arguments give
the same bars.
"""

from collections.abc import Mapping
from typing import Final, TypeAlias
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pandas as pd
from holidays import HALF_DAY, financial_holidays
from numpy.random import Generator
from scipy.signal import lfilter

from config import DAY_S, MarketHours, asset_spec
from domain import Bars, FloatArray, IntArray
from errors import ConfigError

BoolArray: TypeAlias = npt.NDArray[np.bool_]

BAR_S: Final = 60
MAX_DAYS: Final = 3_650

# First prices, in dollars: the right order of magnitude and nothing more.
_FIRST_PRICE: Final[Mapping[str, float]] = {
    "BTC": 96_000.0,
    "ETH": 3_300.0,
    "SOL": 142.0,
    "XRP": 2.1,
    "HYPE": 25.0,
    "XAU": 4_600.0,
    "WTIOIL": 60.0,
    "SP500": 6_900.0,
    "SPYX": 690.0,
    "NVDAX": 186.0,
    "TSLAX": 440.0,
    "AAPLX": 260.0,
    "GOOGLX": 330.0,
    "SPCX": 120.0,
}

# Log-volatility is a sum of AR(1) factors: (half-life in minutes, stationary deviation).
_VOLATILITY_FACTORS: Final = ((8.0, 0.25), (180.0, 0.30), (3_600.0, 0.35))
_TAIL_DOF: Final = 5.0
_JUMPS_PER_DAY: Final = 0.5
_JUMP_SIZE: Final = 8.0  # standard deviation of a jump, in minutes' standard deviations
_CLOSED_LEVEL: Final = 0.3  # volatility while closed, as a share of the open level
_WEEKEND_LEVEL: Final = 0.6

_NYSE_OPEN: Final = 9 * 60 + 30  # minutes after midnight, New York
_NYSE_CLOSE: Final = 16 * 60
_NYSE_EARLY_CLOSE: Final = 13 * 60
_GLOBEX_BREAK: Final = (17 * 60, 18 * 60)


def simulate_bars(asset: str, *, end_ts: int, days: float, seed: int) -> Bars:
    """Simulate one-minute bars of the `days` before `end_ts` (Unix seconds).

    All columns are filled; closed hours have no bars. The mean variance of the
    open minutes is that of `AssetSpec.hourly_volatility`.

    Raises: UnknownAsset; ConfigError if `days` is not within 1 to 3650.
    """
    spec = asset_spec(asset)
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"days={days} of simulated market; use 1 to {MAX_DAYS}.")
    last = end_ts // BAR_S * BAR_S
    open_ts = np.arange(last - round(days * DAY_S / BAR_S) * BAR_S, last, BAR_S, dtype=np.int64)
    rng = np.random.default_rng([seed, crc32(asset.encode()), last, len(open_ts)])
    is_open = trading_minutes(open_ts, spec.hours)
    clock = _volatility_clock(open_ts, spec.hours, is_open)
    sigma = spec.hourly_volatility / np.sqrt(60) * clock * _clustering(rng, len(open_ts))
    returns = sigma * _innovations(rng, len(open_ts))
    log_close = np.log(_FIRST_PRICE[asset]) + np.cumsum(returns)
    return _to_bars(rng, open_ts, log_close, returns, sigma, is_open, f"simulated:{asset}")


def trading_minutes(open_ts: IntArray, hours: MarketHours) -> BoolArray:
    """Which minutes are traded; shape (n,). Times are Unix seconds.

    Equities follow the New York Stock Exchange with its holidays and early
    closes; commodities pause from Friday 17:00 to Sunday 18:00 New York and
    daily from 17:00 to 18:00.
    """
    minute, weekday, dates = _new_york(open_ts)
    if hours is MarketHours.EQUITY:
        return _equity_minutes(minute, weekday, dates)
    if hours is MarketHours.COMMODITY:
        start, end = _GLOBEX_BREAK
        in_break = (minute >= start) & (minute < end)
        weekend = (weekday == 5) | ((weekday == 4) & (minute >= start))
        weekend |= (weekday == 6) & (minute < end)
        return np.asarray(~(in_break | weekend))
    return np.ones(len(open_ts), dtype=np.bool_)


def _equity_minutes(minute: IntArray, weekday: IntArray, dates: pd.DatetimeIndex) -> BoolArray:
    years = range(dates[0].year, dates[-1].year + 1)
    full_days = pd.DatetimeIndex(list(financial_holidays("NYSE", years=years)))
    half_days = pd.DatetimeIndex(
        list(financial_holidays("NYSE", years=years, categories=(HALF_DAY,)))
    )
    close = np.where(dates.isin(half_days), _NYSE_EARLY_CLOSE, _NYSE_CLOSE)
    session = (minute >= _NYSE_OPEN) & (minute < close) & (weekday < 5)
    return np.asarray(session & ~dates.isin(full_days), dtype=np.bool_)


def _new_york(open_ts: IntArray) -> tuple[IntArray, IntArray, pd.DatetimeIndex]:
    """Minute of day, weekday (Monday 0) and date on the New York wall clock."""
    local = pd.to_datetime(open_ts, unit="s", utc=True).tz_convert("America/New_York")
    minute = (local.hour * 60 + local.minute).to_numpy(dtype=np.int64)
    return minute, local.day_of_week.to_numpy(dtype=np.int64), local.tz_localize(None).normalize()


def _volatility_clock(open_ts: IntArray, hours: MarketHours, is_open: BoolArray) -> FloatArray:
    """Relative volatility by time of week; mean square 1 over the open minutes."""
    minute, weekday, _ = _new_york(open_ts)
    shape = _intraday_shape(minute, hours)
    shape = np.where(weekday >= 5, _WEEKEND_LEVEL * shape, shape)
    shape = np.where(is_open, shape, _CLOSED_LEVEL * shape)
    open_level = np.sqrt(np.mean(shape[is_open] ** 2)) if is_open.any() else 1.0
    return np.asarray(shape / open_level)


def _intraday_shape(minute: IntArray, hours: MarketHours) -> FloatArray:
    """A broad hump over the New York day, and bursts that fade after scheduled moments."""
    hump = 1 + 0.35 * np.cos(2 * np.pi * (minute - 11 * 60) / 1_440)
    opening = 1.1 * _burst(minute, _NYSE_OPEN, fades_over=35)
    if hours is MarketHours.EQUITY:
        into_close = 0.6 * np.exp(-np.abs(minute - _NYSE_CLOSE) / 30)
        return np.asarray(hump + opening + into_close)
    news = 0.5 * _burst(minute, 8 * 60 + 30, fades_over=15)
    asia = 0.35 * _burst(minute, 20 * 60, fades_over=60)
    return np.asarray(hump + opening + news + asia)


def _burst(minute: IntArray, start: int, *, fades_over: float) -> FloatArray:
    return np.asarray(np.exp(-((minute - start) % 1_440) / fades_over))


def _clustering(rng: Generator, n: int) -> FloatArray:
    """Volatility multipliers with mean square 1; shape (n,)."""
    log_level = np.zeros(n)
    for half_life, deviation in _VOLATILITY_FACTORS:
        decay = 0.5 ** (1 / half_life)
        shocks = deviation * np.sqrt(1 - decay**2) * rng.standard_normal(n)
        start = decay * deviation * rng.standard_normal(1)  # stationary from the first minute
        log_level += lfilter([1.0], [1.0, -decay], shocks, zi=start)[0]
    # E exp(2 h) = exp(2 Var h) for Gaussian h
    return np.asarray(np.exp(log_level - sum(d**2 for _, d in _VOLATILITY_FACTORS)))


def _innovations(rng: Generator, n: int) -> FloatArray:
    """Student-t shocks plus rare jumps, together of unit variance; shape (n,)."""
    shocks = rng.standard_t(_TAIL_DOF, n) * np.sqrt((_TAIL_DOF - 2) / _TAIL_DOF)
    rate = _JUMPS_PER_DAY * BAR_S / DAY_S
    jumps = (rng.random(n) < rate) * _JUMP_SIZE * rng.standard_normal(n)
    return np.asarray((shocks + jumps) / np.sqrt(1 + rate * _JUMP_SIZE**2))


def _to_bars(
    rng: Generator,
    open_ts: IntArray,
    log_close: FloatArray,
    returns: FloatArray,
    sigma: FloatArray,
    is_open: BoolArray,
    feed: str,
) -> Bars:
    """Bars of the open minutes.

    High and low are drawn as the extremes of a Brownian bridge between open and
    close: max = (r + sqrt(r² - 2 σ² ln U)) / 2, and the mirror image for the low.
    Source: Karatzas and Shreve (1991), section 2.8.
    """
    rise, fall = (
        np.sqrt(returns**2 - 2 * sigma**2 * np.log1p(-rng.random(len(returns)))) for _ in range(2)
    )
    log_open = log_close - returns
    log_high = np.maximum(log_open + (returns + rise) / 2, np.maximum(log_open, log_close))
    log_low = np.minimum(log_open + (returns - fall) / 2, np.minimum(log_open, log_close))
    volume = 100 * np.exp(0.5 * rng.standard_normal(len(returns))) * sigma / np.mean(sigma)
    return Bars(
        open_ts=open_ts[is_open],
        open=np.exp(log_open)[is_open],
        high=np.exp(log_high)[is_open],
        low=np.exp(log_low)[is_open],
        close=np.exp(log_close)[is_open],
        volume=volume[is_open],
        bar_s=BAR_S,
        feed=feed,
    )
