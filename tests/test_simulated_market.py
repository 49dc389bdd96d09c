"""The simulated market: repeatable, and shaped like a market."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from config import ASSETS, MarketHours
from errors import ConfigError, UnknownAsset
from simulated_market import simulate_bars, trading_minutes

END = 1_768_500_000  # Thursday 2026-01-15, 18:00 UTC
NEW_YORK = ZoneInfo("America/New_York")


@pytest.fixture(scope="module")
def bitcoin():
    return simulate_bars("BTC", end_ts=END, days=120, seed=1)


def returns_bps(bars):
    return 1e4 * np.diff(np.log(bars.close))


def moment(year, month, day, hour, minute=0):
    """Unix seconds of a New York wall-clock time."""
    return int(datetime(year, month, day, hour, minute, tzinfo=NEW_YORK).timestamp())


def is_open(hours, *when):
    return bool(trading_minutes(np.array([moment(*when)]), hours)[0])


def test_the_same_arguments_give_the_same_bars():
    one, two = (simulate_bars("XAU", end_ts=END, days=3, seed=4) for _ in range(2))
    for name in ("open_ts", "open", "high", "low", "close", "volume"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize(
    "changed",
    [{"asset": "ETH"}, {"seed": 5}, {"end_ts": END - 86_400}, {"days": 4}],
    ids=["asset", "seed", "end", "days"],
)
def test_every_argument_changes_the_returns(changed):
    arguments = {"asset": "BTC", "seed": 4, "end_ts": END, "days": 3} | changed
    base = simulate_bars("BTC", end_ts=END, days=3, seed=4)
    other = simulate_bars(arguments.pop("asset"), **arguments)
    assert abs(np.corrcoef(returns_bps(base)[:4000], returns_bps(other)[:4000])[0, 1]) < 0.1


@pytest.mark.parametrize("asset", ASSETS)
def test_every_asset_has_sound_labelled_minutes(asset):
    bars = simulate_bars(asset, end_ts=END + 17, days=3, seed=0)
    assert bars.feed == f"simulated:{asset}"
    assert (bars.bar_s, bars.end_ts) == (60, END)
    assert not (bars.open_ts % 60).any()
    columns = np.array([bars.open, bars.high, bars.low, bars.close, bars.volume])
    assert np.isfinite(columns).all()
    assert (columns > 0).all()
    assert (bars.high >= np.maximum(bars.open, bars.close)).all()
    assert (bars.low <= np.minimum(bars.open, bars.close)).all()


def test_a_continuous_market_has_every_minute_and_no_price_gaps(bitcoin):
    np.testing.assert_array_equal(np.diff(bitcoin.open_ts), 60)
    assert len(bitcoin) == 120 * 1440
    np.testing.assert_allclose(bitcoin.open[1:], bitcoin.close[:-1])


@pytest.mark.parametrize("asset", ["BTC", "XAU", "SP500"])
def test_the_level_of_volatility_is_the_one_in_the_settings(asset):
    """Averaged over markets, since a slow volatility factor moves each one for days."""
    variances = []
    for seed in range(12):
        bars = simulate_bars(asset, end_ts=END, days=60, seed=seed)
        within = np.log(bars.close / bars.open)
        variances.append(60 * np.mean(within**2))
    error = np.std(variances, ddof=1) / np.sqrt(len(variances))
    assert abs(np.mean(variances) - ASSETS[asset].hourly_volatility ** 2) < 4 * error


def test_volatility_clusters_while_returns_do_not_repeat(bitcoin):
    r = returns_bps(bitcoin)
    size = np.minimum(np.abs(r), np.quantile(np.abs(r), 0.999))
    noise = 1 / np.sqrt(len(r))

    def correlation(x, lag):
        return np.corrcoef(x[:-lag], x[lag:])[0, 1]

    assert correlation(size, 1) > 0.15
    assert correlation(size, 120) > 0.05
    assert abs(correlation(np.sign(r), 1)) < 4 * noise


def test_returns_have_fat_tails(bitcoin):
    median, extreme = np.quantile(np.abs(returns_bps(bitcoin)), [0.5, 0.999])
    assert extreme / median > 1.3 * 3.29 / 0.674  # beyond a Gaussian's ratio by a clear margin


@pytest.mark.parametrize(("end", "open_hour_utc"), [(END, 14), (1_752_602_400, 13)])
def test_the_day_follows_the_new_york_clock_in_winter_and_summer(end, open_hour_utc):
    bars = simulate_bars("BTC", end_ts=end, days=60, seed=3)
    minute = bars.open_ts[1:] // 60 % 1440
    size = np.abs(returns_bps(bars))
    opening = open_hour_utc * 60 + 30
    before = size[(minute >= opening - 20) & (minute < opening)].mean()
    after = size[(minute >= opening) & (minute < opening + 20)].mean()
    assert after > 1.3 * before


def test_weekends_are_calmer(bitcoin):
    weekday = (bitcoin.open_ts[1:] // 86_400 + 3) % 7
    size = np.abs(returns_bps(bitcoin))
    assert size[weekday >= 5].mean() < 0.8 * size[weekday < 5].mean()


def test_the_exchange_keeps_its_sessions_holidays_and_early_closes():
    equity = MarketHours.EQUITY
    assert is_open(equity, 2026, 1, 15, 9, 30)
    assert not is_open(equity, 2026, 1, 15, 9, 29)
    assert is_open(equity, 2026, 1, 15, 15, 59)
    assert not is_open(equity, 2026, 1, 15, 16, 0)
    assert not is_open(equity, 2026, 1, 17, 12)  # Saturday
    assert not is_open(equity, 2026, 1, 19, 12)  # Martin Luther King Jr. Day
    assert is_open(equity, 2025, 11, 28, 12, 59)  # the day after Thanksgiving
    assert not is_open(equity, 2025, 11, 28, 13, 0)
    assert is_open(equity, 2025, 7, 15, 9, 30)  # daylight saving time


def test_commodities_pause_daily_and_over_the_weekend():
    commodity = MarketHours.COMMODITY
    assert is_open(commodity, 2026, 1, 14, 16, 59)  # Wednesday
    assert not is_open(commodity, 2026, 1, 14, 17, 0)
    assert not is_open(commodity, 2026, 1, 14, 17, 59)
    assert is_open(commodity, 2026, 1, 14, 18, 0)
    assert is_open(commodity, 2026, 1, 16, 16, 59)  # Friday
    assert not is_open(commodity, 2026, 1, 16, 18, 0)
    assert not is_open(commodity, 2026, 1, 17, 12)
    assert not is_open(commodity, 2026, 1, 18, 17, 59)  # Sunday
    assert is_open(commodity, 2026, 1, 18, 18, 0)


@pytest.mark.parametrize("asset", ["XAU", "SP500"])
def test_a_closed_market_has_no_bars_and_reopens_at_another_price(asset):
    bars = simulate_bars(asset, end_ts=END, days=60, seed=2)
    assert trading_minutes(bars.open_ts, ASSETS[asset].hours).all()
    reopened = np.flatnonzero(np.diff(bars.open_ts) > 60) + 1
    assert len(reopened) > 30
    over_the_close = np.log(bars.open[reopened] / bars.close[reopened - 1])
    minute = np.std(np.log(bars.close / bars.open))
    assert np.std(over_the_close) > 1.5 * minute


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(UnknownAsset, match="DOGE"):
        simulate_bars("DOGE", end_ts=END, days=3, seed=0)
    for days in (0, -1, 1e6, float("nan")):
        with pytest.raises(ConfigError, match="use 1 to"):
            simulate_bars("BTC", end_ts=END, days=days, seed=0)


def test_the_default_end_is_the_moment_it_is_said_to_be():
    assert datetime.fromtimestamp(END, UTC).isoformat() == "2026-01-15T18:00:00+00:00"
