"""The pool: fitted on the past of all assets, none of which can upset it."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from config import DAY_S, FREQUENCIES, Frequency, MarketHours
from domain import MarketHistory
from features import feature_names
from pooled_prior import PooledPrior
from pooling import fit_pooled_prior, pool_window
from simulated_market import simulate_bars

END = 1_768_500_000
LF = FREQUENCIES[Frequency.LF]


@cache
def market(asset, days=40.0, end=END):
    bars = simulate_bars(asset, end_ts=end, days=days, seed=1)
    coarse = bars.between(None, None)
    keep = coarse.open_ts % 300 == 240
    names = ("open", "high", "low", "close", "volume")
    columns = {name: getattr(coarse, name)[keep] for name in names}
    five = replace(bars, open_ts=coarse.open_ts[keep] - 240, bar_s=300, **columns)
    return MarketHistory(
        asset=asset, frequency=Frequency.LF, bars=five, price_bars=five, source="simulated"
    )


def pool(histories, until=END) -> PooledPrior:
    prior = fit_pooled_prior(histories, until, ())
    assert prior is not None
    return prior


def corrupted(history, after):
    wild = history.bars.close * np.where(history.bars.close_ts <= after, 1.0, 1.5)
    bars = replace(history.bars, close=wild)
    return replace(history, bars=bars, price_bars=bars)


def test_bars_after_the_moment_change_no_byte():
    until = END - 5 * DAY_S
    histories = [market("BTC"), market("XAU")]
    one = pool(histories, until)
    other = pool([corrupted(history, until) for history in histories], until)
    assert one.to_dict() == other.to_dict()
    sooner = pool([corrupted(history, until - 3600) for history in histories], until)
    assert one.to_dict() != sooner.to_dict()


def test_an_asset_without_enough_bars_takes_no_part():
    young = market("XAU", days=2.0)
    prior = pool([market("BTC"), market("ETH"), young])
    assert prior.assets == ("BTC", "ETH")
    assert prior.profiles.keys() == {MarketHours.CONTINUOUS}


def test_a_market_alone_is_no_pool():
    both = [market("BTC"), market("ETH")]
    assert fit_pooled_prior(both[:1], END, ()) is None
    assert fit_pooled_prior([market("BTC"), market("XAU", days=2.0)], END, ()) is None
    assert fit_pooled_prior(both, END - 100 * DAY_S, ()) is None


def test_a_longer_history_counts_more():
    sizes = [name for name in feature_names(LF)[0] if name.startswith("log_size_")]
    column = feature_names(LF)[0].index(sizes[0])
    loud, calm = market("BTC"), market("ETH", days=10.0)
    mixes = ([loud, loud], [calm, calm], [loud, calm])
    centres = [pool(parts).blend[0].centre[column] for parts in mixes]
    share = (centres[2] - centres[0]) / (centres[1] - centres[0])
    assert share == pytest.approx(10 / 50, abs=0.01)


def test_the_slopes_say_that_volatility_clusters():
    prior = pool([market("BTC"), market("XAU")])
    names = feature_names(LF)[0]
    up_to_a_day = [names.index(f"log_size_{half_life:g}") for half_life in (3, 12, 48, 144, 288)]
    for part in prior.blend:
        assert part.slope[up_to_a_day].sum() > 0.1
        assert np.isfinite(part.slope).all()


def test_an_asset_whose_bars_ended_still_has_its_window():
    old = market("BTC", end=END - 400 * DAY_S)
    window = pool_window(old, END)
    assert len(window.bars) == len(old.bars)
    assert len(pool_window(old, END - 500 * DAY_S).bars) == 0
