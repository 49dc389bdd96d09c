"""A whole miner but for its process: its duties, and what its pages tell of loopback venues."""

import asyncio
import logging
import re
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf

import httpx
import numpy as np
import pytest

from answer_desk import SHARED_S, Caller
from clock import RehearsalClock, SystemClock
from config import DAY_S, FREQUENCIES, Frequency
from data_fetcher import LiveSource, open_source
from domain import ForecastRequest
from feed_plans import FeedHost
from http_service import bind, server_for
from ledger import KEPT_DAYS, PromptEntry
from live_market import LiveMarket
from loopback_venues import Fault, FaultRule, LoopbackVenues, serve_venues
from miner import COLLECT_OFFSET_S, TRIM_OFFSET_S, TRIM_S, Miner, duties
from model_store import publish_set
from retraining import Retrainer
from settings import Settings
from tests.faults.live_world import walk
from upkeep import Duty
from wire_format import SHADOW_JSON

HF = Frequency.HF
MINUTES = 180
NOW = 1_765_800_000  # 2025-12-15 12:00 UTC


@pytest.fixture(autouse=True)
def _handlers_stay(monkeypatch):
    """A miner adds one to the root logger, for its page."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers])


# ---------------------------------------------------------------- live


@dataclass
class Live:
    """A miner on loopback venues; its duties are done by hand."""

    miner: Miner
    market: LiveMarket
    venues: LoopbackVenues
    client: httpx.Client
    plan: dict[str, Duty]

    def do(self, *names):
        for name in names:
            self.plan[name].run()

    def health(self):
        return self.client.get("/healthz").json()

    def metric(self, name, asset="BTC", frequency="hf"):
        """The value of a market's gauge; None if it is not told."""
        series = rf'^lgbm_miner_{name}{{asset="{asset}",frequency="{frequency}"}} (\S+)$'
        found = re.search(series, self.client.get("/metrics").text, flags=re.MULTILINE)
        return float(found[1]) if found else None

    def ask(self, asset="BTC"):
        asked = {"asset": asset, "horizon_seconds": 3600, "interval_seconds": 60, "num_paths": 5}
        return self.client.post("/predict", json=asked)


def minutes(ended_s_ago=-120.0):
    """Minutes of a walk that ended so long ago; by default they still come in."""
    start = (int(time.time() - ended_s_ago) // 60 - MINUTES) * 60
    return walk(3, 90_000.0, start, MINUTES)


@contextmanager
def pages(miner):
    """A client of the miner's pages."""
    listener, server = bind("127.0.0.1", 0), server_for(miner.app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=base, timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def live(folder, market, *assets, clock=None, **changes):
    with serve_venues(market, clock or SystemClock()) as venues:
        settings = Settings(
            state_dir=folder,
            model_dir=folder,
            served_assets=assets,
            days=1.0,
            **venues.urls,
            **changes,
        )
        source = open_source(settings)
        assert isinstance(source, LiveSource)
        with LiveMarket.open(settings, source) as opened:
            miner = Miner(settings, opened, source)
            plan = duties(miner, settings, Retrainer(miner.due, lambda _pair: ()))
            try:
                with pages(miner) as client:
                    by_name = {duty.name: duty for duty in plan}
                    yield Live(miner, opened, venues, client, by_name)
            finally:
                miner.close()


def test_a_served_asset_without_bars_is_seen_everywhere(tmp_path):
    with live(tmp_path, {"BTC": minutes()}, "BTC", "ETH") as world:
        world.do("collect binance", "quotes binance", "refresh")
        assert (world.ask("BTC").status_code, world.ask("ETH").status_code) == (200, 503)
        health = world.health()
        assert (health["status"], health["assets"]) == ("degraded", ["BTC"])
        assert "ETH: no price yet, its prompts are refused" in health["warnings"]
        assert [world.metric("has_price", asset) for asset in ("BTC", "ETH")] == [1, 0]
        assert world.metric("price", "ETH") is world.metric("price_age_seconds", "ETH") is None
        page = world.client.get("/").text
        assert "No price is known yet, so its prompts are refused." in page
        text = world.client.get("/metrics").text
        assert 'lgbm_miner_requests_total{outcome="no_price",transport="http"} 1.0' in text


def test_a_wild_ticker_is_not_told_as_the_price_of_answers(tmp_path):
    held = minutes(ended_s_ago=1800)
    with live(tmp_path, {"binance:BTCUSDT": held}, "BTC") as world:
        world.do("collect binance", "refresh")
        world.venues.faults.add(FaultRule(fault=Fault.SPIKE, host=FeedHost.BINANCE))
        world.do("quotes binance")
        wild = world.market.prices.quote("BTC")
        assert wild is not None
        assert wild.price > 50 * held.close[-1]
        told = world.ask().json()
        last = world.miner.engine.history("BTC", HF).anchor_price
        assert world.metric("price") == told["diagnostics"]["anchor_price"] == last
        assert world.metric("price_age_seconds") >= 1740
        # an undated ticker beside candles that stand still is as old as they are
        assert world.metric("scored_price_age_seconds") >= 1740
        assert told["diagnostics"]["anchor_age_s"] >= 1740
        assert any("minutes old at the start" in note for note in told["diagnostics"]["notes"])
        text = world.client.get("/metrics").text
        assert 'by_anchor_total{anchor="last_bar",asset="BTC",stale="true"} 1.0' in text


def test_with_the_scored_feed_down_the_age_told_is_that_of_the_second_source(tmp_path):
    market = {"binance:BTCUSDT": minutes(ended_s_ago=1800), "pyth:Crypto.BTC/USD": minutes()}
    with live(tmp_path, market, "BTC") as world:
        world.do("collect binance", "refresh")
        world.venues.faults.add(FaultRule(fault=Fault.NOT_FOUND, host=FeedHost.BINANCE))
        world.do("quotes binance")
        second = world.ask().json()["diagnostics"]
        assert second["anchor_source"] == "second_source"
        assert world.metric("price") == second["anchor_price"]
        assert world.metric("price_age_seconds") < 600
        assert world.metric("scored_price_age_seconds") >= 1740
        assert any("binance" in sentence for sentence in world.health()["warnings"])
        assert "second source from pyth:Crypto.BTC/USD" in world.client.get("/").text


def test_each_venue_has_duties_of_its_own(tmp_path):
    with live(tmp_path, {"BTC": minutes(), "XAU": minutes()}, "BTC", "XAU") as world:
        world.do("collect binance", "quotes binance", "refresh")
        assert (world.ask("BTC").status_code, world.ask("XAU").status_code) == (200, 503)
        assert world.market.prices.quote("XAU") is None
        world.do("collect hyperliquid", "quotes hyperliquid", "refresh")
        assert world.ask("XAU").status_code == 200
        assert world.market.prices.quote("XAU") is not None


@pytest.mark.parametrize("ahead_s", [0, 4, 90, -4])
def test_candles_are_asked_for_once_they_have_closed_by_the_venues_clock(tmp_path, ahead_s):
    theirs = RehearsalClock(start=NOW, origin=time.time(), speed=1.0)
    ours = RehearsalClock(start=NOW + ahead_s, origin=theirs.origin, speed=1.0)
    bars = walk(3, 90_000.0, NOW - 60 * MINUTES, MINUTES + 2)
    with live(tmp_path, {"BTC": bars}, "BTC", clock=theirs, rehearsal=str(ours)) as world:
        for _ in range(2):
            world.do("quotes binance")
        pause = world.plan["collect binance"].pause()
        clock = theirs if ahead_s > 0 else ours  # what we do not know of is not asked for
        assert (clock.now() + pause) % 60 == pytest.approx(COLLECT_OFFSET_S, abs=1.5)


def test_a_minute_that_was_collected_is_not_collected_again_for_a_tenth_of_a_second(
    tmp_path, monkeypatch
):
    """Where our clock's distance seems larger after the run than it did before it."""
    clock = RehearsalClock(start=NOW + 58, origin=0.0, speed=1.0, wall=lambda: wall[0])
    wall, ahead, ran = [0.0], [0.3], []
    with live(tmp_path, {"BTC": minutes()}, "BTC") as world:
        monkeypatch.setattr(world.miner, "clock", clock)
        monkeypatch.setattr(LiveMarket, "clock_offset_s", lambda _self: ahead[0])
        monkeypatch.setattr(LiveMarket, "collect", lambda _self, _venues: ran.append(clock.now()))
        plan = duties(world.miner, Settings(), Retrainer(world.miner.due, lambda _: ()))
        (duty,) = (duty for duty in plan if duty.name == "collect binance")
        for distance in (0.3, 0.7, 0.2, 0.9, 0.4, 0.9):
            duty.run()
            ahead[0], wall[0] = distance, wall[0] + 0.05
            wall[0] += duty.pause()
    assert len({int(at) // 60 for at in ran}) == len(ran)
    assert np.diff(ran) == pytest.approx([5, 60, 60, 60, 60], abs=1)


def test_the_duties_of_a_live_miner_bring_its_bars_and_prices(tmp_path):
    with live(tmp_path, {"BTC": minutes()}, "BTC") as world:
        assert set(world.plan) == {*QUIET_DUTIES, "collect binance", "quotes binance", "backfill"}
        assert world.health()["reasons"] == ["no asset has any bars yet"]
        world.do("collect binance", "refresh")
        assert world.miner.engine.assets() == ("BTC",)
        world.do("quotes binance")
        assert world.market.prices.quote("BTC") is not None
        assert world.miner.due() == ()
        world.do("backfill")
        assert world.market.has_past
        assert world.miner.due()


# ---------------------------------------------------------------- duties

QUIET_DUTIES = {"refresh", "retrain", "checkpoint", "own scores", "prune", "trim", "review"}


@pytest.fixture
def settings(archive_dir, model_dir, tmp_path):
    own = shutil.copytree(model_dir, tmp_path / "models")
    return Settings(
        source="archive", archive_dir=archive_dir, model_dir=own, state_dir=tmp_path / "state"
    )


@pytest.fixture
def miner(settings):
    opened = Miner(settings, None, open_source(settings))
    yield opened
    opened.close()


def run(name, miner, settings, due=lambda: ()):
    """Do one duty of the miner, as its thread would."""
    plan = {duty.name: duty for duty in duties(miner, settings, Retrainer(due, lambda _pair: ()))}
    assert set(plan) == QUIET_DUTIES
    plan[name].run()


def test_a_refresh_takes_up_what_was_published_since(settings, trained):
    shutil.rmtree(settings.model_dir)
    untrained = Miner(settings, None, open_source(settings))
    try:
        assert untrained.engine.trained() == {}
        publish_set(settings.model_dir, "BTC", HF, trained[HF].model_id, trained[HF].files)
        run("refresh", untrained, settings)
        assert list(untrained.engine.trained()) == [("BTC", HF)]
    finally:
        untrained.close()


def kept(miner):
    """Prompts on record, and answers that wait for their outcome."""
    end = miner.engine.now() + DAY_S
    return len(miner.ledger.prompts(since=0)), len(miner.ledger.pending("BTC", "hf", end, 10))


@pytest.mark.parametrize("ahead_days", [3, 40, 400])
def test_a_clock_that_jumps_ahead_makes_nothing_old_that_is_kept(
    miner, settings, monkeypatch, ahead_days
):
    request = ForecastRequest(
        asset="BTC", start_ts=miner.engine.now() + 60, increment_s=60, length_s=3600, num_paths=20
    )
    caller = Caller(name="5Validator", transport="axon")
    asyncio.run(miner.desk.answer(request, encoder=SHADOW_JSON, caller=caller, now=miner.now()))
    miner.ledger.flush()
    assert kept(miner) == (1, 1)
    jumped = miner.now() + ahead_days * DAY_S
    monkeypatch.setattr(miner, "now", lambda: jumped)
    run("own scores", miner, settings)
    run("prune", miner, settings)
    assert kept(miner) == (1, 1)
    miner.scores.step(jumped)  # what the jump would cost
    miner.ledger.prune(jumped)
    assert kept(miner) == (1 if ahead_days < KEPT_DAYS else 0, 0)


def test_before_the_first_bar_nothing_is_old(settings, tmp_path):
    empty = replace(settings, source="venue", state_dir=tmp_path / "empty")
    opened = Miner(empty, None, open_source(empty))
    try:
        assert opened.settled_now() == -inf
        opened.score()
        opened.prune()
    finally:
        opened.close()


def test_a_retraining_looks_at_what_is_due(miner, settings):
    looked = []

    def due():
        looked.append(True)
        return ()

    run("retrain", miner, settings, due=due)
    assert looked == [True]


def test_a_checkpoint_is_written(miner, settings):
    kept = settings.state_dir / "market" / "archive"
    assert not kept.exists()
    run("checkpoint", miner, settings)
    assert {path.name.split(".")[0] for path in kept.iterdir()} == {"BTC_hf", "BTC_lf"}


def test_own_answers_are_scored_once_their_hour_has_passed(miner, settings):
    spec, start = FREQUENCIES[HF], miner.engine.now() - 7200
    request = ForecastRequest(
        asset="BTC",
        start_ts=start,
        increment_s=spec.prompt_increment_s,
        length_s=spec.prompt_length_s,
        num_paths=50,
    )
    caller = Caller(name="5Validator", transport="axon")
    asked = miner.desk.answer(request, encoder=SHADOW_JSON, caller=caller, now=start - 60.0)
    asyncio.run(asked)
    miner.ledger.flush()
    run("own scores", miner, settings)
    assert miner.scores.latest()["BTC", HF].answers == 1


def test_old_records_are_pruned(miner, settings):
    request = ForecastRequest(asset="BTC", start_ts=0, increment_s=60, length_s=3600, num_paths=1)
    for days in (KEPT_DAYS + 1, KEPT_DAYS - 1):
        entry = PromptEntry(
            at=miner.now() - 86_400 * days,
            caller="5Validator",
            transport="axon",
            request=request,
            origin=None,
            outcome="too_late",
            rung=None,
            price_age_s=None,
            ms=1.0,
            size=0,
            reason="it has passed.",
        )
        miner.ledger.keep(entry)
    miner.ledger.flush()
    run("prune", miner, settings)
    (left,) = miner.ledger.prompts(since=0)
    assert left["at"] == miner.now() - 86_400 * (KEPT_DAYS - 1)


def test_old_answers_are_let_go_and_free_memory_is_given_back(miner, settings, monkeypatch):
    trimmed = []
    monkeypatch.setattr("miner.trim", lambda: trimmed.append(miner.desk.load().cached))
    clock = [1000.0]
    monkeypatch.setattr(miner.desk, "_monotonic", lambda: clock[0])
    request = ForecastRequest(
        asset="BTC", start_ts=miner.engine.now(), increment_s=60, length_s=3600, num_paths=5
    )
    asked = miner.desk.answer(
        request, encoder=SHADOW_JSON, caller=Caller(name="http", transport="http"), now=0.0
    )
    asyncio.run(asked)
    run("trim", miner, settings)
    clock[0] += SHARED_S + 1
    run("trim", miner, settings)
    assert trimmed == [1, 0]


@pytest.mark.parametrize("speed", [1.0, 60.0])
def test_memory_is_given_back_once_a_real_minute_when_the_minutes_work_is_done(
    miner, settings, monkeypatch, speed
):
    wall = [0.0]
    clock = RehearsalClock(start=NOW, origin=0.0, speed=speed, wall=lambda: wall[0])
    monkeypatch.setattr(miner, "clock", clock)
    plan = {duty.name: duty for duty in duties(miner, settings, Retrainer(miner.due, lambda _: ()))}
    pauses = []
    for _ in range(3):
        pauses.append(plan["trim"].pause())
        wall[0] += pauses[-1]
        assert clock.now() % 60 == pytest.approx(TRIM_OFFSET_S)
    assert pauses[1:] == pytest.approx([TRIM_S, TRIM_S])


def test_a_new_set_is_reviewed(miner, settings, caplog):
    publish_set(settings.model_dir, "BTC", HF, "a-damaged-set", {"manifest.json": b"{}"})
    run("review", miner, settings)
    (line,) = [entry for entry in caplog.records if entry.getMessage() == "review failed"]
    assert (line.asset, line.frequency) == ("BTC", "hf")
