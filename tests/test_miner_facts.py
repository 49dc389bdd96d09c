"""Facts read off a real engine: prices, ages, models, scores, and what is added to them."""

from dataclasses import replace

import pytest

import miner_facts
import scheduled_events
from chain import ChainHealth
from config import Frequency
from errors import UnknownAsset
from forecast_engine import ForecastEngine
from miner_facts import (
    FAN_PATHS,
    STALE_BARS,
    STALE_CHAIN_S,
    AxonFacts,
    EngineFacts,
    MarketFacts,
    MinerFacts,
    with_axon,
)
from own_scores import OwnScore
from settings import Settings
from wire_format import parse_iso_minute

OWN = OwnScore(
    answers=12, score=490.0, ewma_t=500.0, covered=0.79, covered_by_interval={}, course=()
)


@pytest.fixture(scope="module")
def engine(archive, model_dir, tmp_path_factory):
    settings = Settings(
        source="archive", model_dir=model_dir, state_dir=tmp_path_factory.mktemp("state")
    )
    return ForecastEngine.open(archive, settings)


def test_every_market_is_told_with_its_price_and_models(engine):
    facts = EngineFacts(engine, source="archive", own=lambda: {("BTC", Frequency.HF): OWN}).facts()
    assert facts.now == engine.now()
    assert facts.assets == ("BTC", "XAU")
    assert (facts.obstacles, facts.warnings) == ((), ())
    minute = facts.markets[0]
    assert minute.pair == ("BTC", Frequency.HF)
    assert minute.own is OWN
    history = engine.history("BTC", Frequency.HF)
    assert (minute.price, minute.price_ts) == (history.anchor_price, history.anchor_ts)
    assert (minute.price_feed, minute.price_source) == (history.price_bars.feed, "last_bar")
    assert minute.scored_ts == history.anchor_ts
    assert minute.calibration == engine.calibration("BTC", Frequency.HF) != {}
    assert minute.last_bar_ts == history.bars.end_ts
    assert minute.trained_until == engine.trained()["BTC", Frequency.HF]
    gold = facts.markets[-1]
    assert gold.asset == "XAU"
    assert (gold.trained_until, gold.own, gold.is_due) == (None, None, True)


def test_a_fan_is_an_answer_to_the_next_prompt(engine):
    forecast, history = EngineFacts(engine, source="archive").fan("BTC", Frequency.LF)
    assert forecast.paths.shape == (FAN_PATHS, 289)
    assert 0 <= forecast.request.start_ts - engine.now() < 60
    assert history.frequency is Frequency.LF


def test_a_fan_of_an_asset_that_is_not_served_is_refused(engine):
    with pytest.raises(UnknownAsset):
        EngineFacts(engine, source="archive").fan("HYPE", Frequency.LF)


def test_only_a_live_source_can_have_old_bars(engine):
    class Later:
        """The same engine, its clock gone on."""

        def __getattr__(self, name):
            return getattr(engine, name)

        def now(self):
            return engine.now() + 60 * STALE_BARS + 1

    live = EngineFacts(Later(), source="venue", is_live=True).facts()  # type: ignore[arg-type]
    assert live.warnings == ("BTC hf: the last bar is 5 minutes old",)
    replayed = EngineFacts(Later(), source="archive").facts()  # type: ignore[arg-type]
    assert replayed.warnings == ()


@pytest.mark.parametrize(
    ("asset", "now", "are_late"),
    [
        ("XAU", "2026-01-16T22:30:00Z", False),  # Friday 17:30 in New York: just closed
        ("XAU", "2026-01-18T12:00:00Z", False),
        ("XAU", "2026-01-18T23:20:00Z", False),  # open again for twenty minutes
        ("XAU", "2026-01-18T23:30:00Z", True),
        ("XAU", "2026-01-20T12:00:00Z", True),
        ("BTC", "2026-01-16T22:20:00Z", False),
        ("BTC", "2026-01-16T22:30:00Z", True),
        ("SP500", "2026-01-18T12:00:00Z", False),
        ("SP500", "2026-01-20T12:00:00Z", True),
    ],
)
def test_bars_are_late_only_where_the_market_was_open(asset, now, are_late):
    facts = MarketFacts(
        asset=asset,
        frequency=Frequency.LF,
        last_bar_ts=parse_iso_minute("2026-01-16T22:00:00Z"),
        price=1.0,
        price_ts=None,
        price_feed=None,
    )
    assert facts.bars_are_late(parse_iso_minute(now)) is are_late


def told_at_the_end_of(dates, engine):
    """Warnings of a live miner whose clock stands there."""

    class AtTheEnd:
        """The same engine, its clock gone on."""

        def __getattr__(self, name):
            return getattr(engine, name)

        def now(self):
            return dates

    return EngineFacts(AtTheEnd(), source="venue", is_live=True).facts().warnings  # type: ignore[arg-type]


def test_a_calendar_of_releases_that_has_ended_is_named_in_a_warning(engine):
    kinds = scheduled_events.load_events()
    first, last = (pick(kinds, key=lambda kind: kind.expires_ts) for pick in (min, max))
    said = f"the dates of {first.name} in scheduled_events.toml ended"
    before, after = (told_at_the_end_of(first.expires_ts + late, engine) for late in (-1, 0))
    assert not any("scheduled_events" in entry for entry in before)
    assert sum(entry.startswith(said) for entry in after) == 1
    ended = told_at_the_end_of(last.expires_ts, engine)
    assert sum("scheduled_events" in entry for entry in ended) == len(kinds)


def test_a_calendar_that_cannot_be_read_is_a_warning_and_no_more(engine, monkeypatch, tmp_path):
    def unreadable(now):
        return scheduled_events.known_events(now, tmp_path / "calendar.toml")

    monkeypatch.setattr(miner_facts, "known_events", unreadable)
    facts = EngineFacts(engine, source="venue", is_live=True).facts()
    (said,) = (entry for entry in facts.warnings if "calendar.toml" in entry)
    assert said.endswith("cannot be read (No such file or directory); restore it from the release.")
    assert facts.obstacles == ()


def test_a_feed_that_stands_in_is_named_in_a_warning(engine):
    class StandingIn:
        """The same engine, as if all bars were another feed's."""

        def __getattr__(self, name):
            return getattr(engine, name)

        def held(self, asset, frequency):
            return replace(engine.held(asset, frequency), stand_in="pyth:Crypto.BTC/USD")

    facts = EngineFacts(StandingIn(), source="venue", is_live=True).facts()  # type: ignore[arg-type]
    said = "BTC hf: no bar of the scored feed is stored, pyth:Crypto.BTC/USD stands in"
    assert said in facts.warnings
    assert facts.markets[0].stand_in == "pyth:Crypto.BTC/USD"


def test_without_any_bars_there_is_an_obstacle(archive, tmp_path):
    empty = ForecastEngine(archive, Settings(state_dir=tmp_path, model_dir=tmp_path))
    facts = EngineFacts(empty, source="archive").facts()
    assert (facts.obstacles, facts.warnings) == (("no asset has any bars yet",), ())
    assert facts.assets == ()


def test_a_served_market_without_bars_has_its_facts_and_a_warning(archive, tmp_path):
    class Wider:
        """The archive, as if ETH were to be served from it as well."""

        def __getattr__(self, name):
            return getattr(archive, name)

        def frequencies(self):
            return archive.frequencies() | {"ETH": tuple(Frequency)}

    settings = Settings(source="archive", model_dir=tmp_path, state_dir=tmp_path)
    engine = ForecastEngine.open(Wider(), settings)
    facts = EngineFacts(engine, source="archive").facts()
    assert facts.warnings == ("ETH: no price yet, its prompts are refused",)
    assert (facts.obstacles, facts.assets) == ((), ("BTC", "XAU"))
    minute, day = (market for market in facts.markets if market.asset == "ETH")
    assert (minute.frequency, day.frequency) == (Frequency.HF, Frequency.LF)
    assert minute == MarketFacts(
        asset="ETH",
        frequency=Frequency.HF,
        last_bar_ts=None,
        price=None,
        price_ts=None,
        price_feed=None,
    )


def test_whoever_wires_the_miner_can_add_what_the_engine_does_not_know(engine):
    def add(facts):
        return replace(facts, warnings=(*facts.warnings, "the chain is silent"))

    assert EngineFacts(engine, source="archive", extra=add).facts().warnings == (
        "the chain is silent",
    )


# ---------------------------------------------------------------- axon and chain

BARE = MinerFacts(now=1.0, source="venue", is_live=True, markets=(), warnings=("a feed fails",))
WELL = ChainHealth(age_s=61.0, uid=7, fault=None)


def told(chain=WELL, *, is_up=True):
    return with_axon(BARE, AxonFacts(port=8091, is_up=is_up, chain=chain))


def test_an_axon_that_is_well_adds_nothing_to_worry_about():
    facts = told()
    assert (facts.obstacles, facts.warnings) == ((), ("a feed fails",))
    assert facts.details == (("axon", "on port 8091"), ("uid", "7"), ("chain", "read 1 min ago"))


def test_an_axon_that_has_stopped_is_an_obstacle():
    facts = told(is_up=False)
    assert facts.obstacles == ("the axon on port 8091 has stopped; restart the miner",)
    assert facts.details[0] == ("axon", "stopped")


def test_a_static_chain_is_nothing_to_warn_of():
    facts = told(None)
    assert facts.warnings == BARE.warnings
    assert facts.details == (("axon", "on port 8091"),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fault": "the chain did not take our address."}, "the chain did not take our address"),
        ({"uid": None}, "our hotkey is not registered"),
        ({"age_s": STALE_CHAIN_S + 1}, "the chain was last read 30 minutes ago"),
        ({"age_s": None, "uid": None}, "the chain was not read yet"),
    ],
)
def test_a_chain_that_is_not_well_is_a_warning_and_no_obstacle(changes, words):
    facts = told(replace(WELL, **changes))
    assert facts.obstacles == ()
    (added,) = facts.warnings[1:]
    assert added.startswith(words)
    assert not added.endswith(".")
