"""Which feeds are read, and how."""

from config import Venue
from feed_plans import HOST_LIMITS, FeedHost, feed_plans
from protocol import (
    PROTOCOL_PROFILES,
    protocol_profile,
)
from settings import Settings


def test_every_host_has_an_address_and_a_limit():
    for host in FeedHost:
        assert Settings().feed_url(host).startswith("https://")
        assert HOST_LIMITS[host].weight > 0


def test_the_venue_source_reads_the_feed_that_the_profile_scores():
    now, before = (feed_plans("venue", protocol_profile(name)) for name in ("2026-09", "2026-05"))
    assert now["BTC"].scored.name == "binance:BTCUSDT"
    assert now["XAU"].scored.name == "hyperliquid:xyz:GOLD"
    assert [feed.name for feed in now["XAU"].others] == ["pyth:Crypto.XAUT/USD", "binance:PAXGUSDT"]
    assert before["XAU"].scored.name == "pyth:Crypto.XAUT/USD"
    assert {plan.scored.venue for plan in before.values()} == {Venue.PYTH}


def test_a_plan_is_made_for_exactly_what_the_profile_asks():
    for profile in PROTOCOL_PROFILES.values():
        asked = {
            (asset, entry.frequency)
            for entry in profile.competitions.values()
            for asset in entry.assets
        }
        plans = feed_plans("venue", profile)
        assert {(p.asset, f) for p in plans.values() for f in p.frequencies} == asked


def test_the_pyth_source_reads_pyth_alone_and_leaves_out_what_pyth_does_not_price():
    plans = feed_plans("pyth", protocol_profile("2026-09"))
    assert {plan.scored.venue for plan in plans.values()} == {Venue.PYTH}
    assert {plan.others for plan in plans.values()} == {()}
    assert {"SP500", "SPCX"}.isdisjoint(plans)  # SPYX moves like SP500, at a tenth of its price
