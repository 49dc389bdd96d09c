"""Clocks that jump, are smeared or change to summer time: no bar is lost, no answer invalid."""

import time
import uuid
from dataclasses import dataclass

import httpx
import numpy as np
import pytest

from answer_desk import ANSWERED, AnswerDesk
from axon_adapter import AxonServer
from bar_cleaning import BarSieve
from bar_store import BarStore
from clock import RehearsalClock
from collector import Collector
from config import DAY_S, FREQUENCIES, Frequency, Venue
from data_fetcher import ArchiveSource, SimulatedSource
from domain import ForecastRequest, PriceQuote
from errors import FeedUnreachable
from feed_plans import feed_plans
from forecast_engine import ForecastEngine
from market_view import Rung
from operator_flags import AxonSettings
from price_board import PriceBoard
from protocol import protocol_profile
from quarantine import Quarantine
from settings import Settings
from tests import test_axon_adapter as axon
from tests.faults.small_sets import publish_small_set
from tests.faults.tally import count
from tests.faults.victims import GrowingArchive, growing_engine
from tests.waiting import wait_for
from upkeep import Duty, Upkeep, each
from wire_format import encode_prompt_answer, format_iso, validate_answer

NOON = 1_765_800_000  # 2025-12-15 12:00 UTC
PLANS = {"BTC": feed_plans("venue", protocol_profile("2026-09"))["BTC"]}
FOLLOWED = "A clock that jumps costs no bar and leaves no false one"


@dataclass
class Clocks:
    """The true time, and a clock that may be off."""

    true: float = NOON
    off: float = 0.0

    def now(self):
        """What the miner's clock shows."""
        return self.true + self.off


def price_at(ts):
    return 100 * np.exp(np.sin(ts / 5e4) / 20 + np.sin(ts / 7e2) / 1000)


@dataclass
class TrueVenue:
    """A venue that lives in the true time: its newest candle is still forming."""

    venue: Venue
    clocks: Clocks
    out: bool = False

    @property
    def name(self):
        return self.venue.value

    def candles(self, symbol, bar_s, start_ts, end_ts):
        """As the real clients: what has closed by the miner's clock, as they are told it."""
        if self.out:
            raise FeedUnreachable(f"{self.name} cannot be reached; wait.")
        first = -(-start_ts // bar_s) * bar_s
        last = min(end_ts, self.clocks.now(), self.clocks.true + bar_s) // bar_s * bar_s
        ts = np.arange(first, last, bar_s, dtype=np.int64)
        close = price_at(np.minimum(ts + bar_s, self.clocks.true))
        sieve = BarSieve.of(ts, {"close": close})
        return sieve.candles(bar_s=bar_s, feed=f"{self.name}:{symbol}"), ()

    def price(self, symbol):
        return PriceQuote(price=1.0, ts=int(self.clocks.now()), feed=f"{self.name}:{symbol}")

    def server_time(self):
        return self.clocks.true

    def close(self):
        pass


@pytest.mark.parametrize("jump_s", [3600, -3600, 90, -90, 7200])
@pytest.mark.parametrize("outage_min", [0, 45, 240])
def test_bars_are_whole_after_a_clock_jump(tmp_path, jump_s, outage_min):
    """After a clock jumped and was set right again every bar is there, as the venue has it."""
    clocks = Clocks()
    feeds = {venue: TrueVenue(venue, clocks) for venue in Venue}
    store = BarStore(tmp_path)
    collector = Collector(PLANS, feeds, store, Quarantine(tmp_path), clocks, days=0.25)
    collector.collect()

    def minutes(n, *, out=False):
        for feed in feeds.values():
            feed.out = out
        for _ in range(n):
            clocks.true += 60
            collector.collect()

    minutes(3)
    clocks.off = jump_s
    minutes(4)
    clocks.off = 0.0
    minutes(outage_min, out=True)
    minutes(70)
    bars = store.load("binance", "BTC", 60)
    assert bars is not None
    wanted = np.arange(NOON - DAY_S // 4, clocks.true, 60, dtype=np.int64)
    lost = len(np.setdiff1d(wanted, bars.open_ts))
    false = int((bars.close != price_at(bars.open_ts + 60)).sum())
    count(FOLLOWED, cases=1, bars_lost=lost)
    assert lost == 0
    assert false == 0


def quote(ts, price):
    return PriceQuote(price=price, ts=int(ts), feed=PLANS["BTC"].scored.name)


@pytest.mark.parametrize("jump_s", [3600, 900])
def test_a_quote_of_a_clock_that_was_fast_does_not_outlive_it(jump_s):
    """A quote stamped by a fast clock gives way to the first one after it was set right."""
    board = PriceBoard(PLANS)
    board.post("BTC", quote(NOON, 100.0))
    board.post("BTC", quote(NOON + jump_s, 101.0))  # the clock is fast
    board.post("BTC", quote(NOON + 5, 102.0))  # and right again
    anchor = board.anchor("BTC", quote(NOON - 60, 99.0), NOON + 6)
    count("A quote of a fast clock does not outlive it", cases=1)
    assert anchor.price == 102.0


# ---------------------------------------------------------------- answers

WHATEVER = "Whatever the clock shows, the engine's answer is valid, and the same once it is right"
NEAR = "A clock that is off by up to nine seconds costs no caller of the axon an answer"
FAR = "A clock that is off by more is named in every refusal, and every refusal is counted"


def ask(engine, start):
    request = ForecastRequest(
        asset="BTC", start_ts=start, increment_s=60, length_s=3600, num_paths=20
    )
    answer = engine.answer(request)
    validate_answer(encode_prompt_answer(answer), request)
    assert answer.diagnostics.rung == Rung.LIGHTGBM
    return answer


def trained_market(archive_dir, model_dir, state_dir):
    """An engine with a trained set whose moment can be moved, two days before the last bar."""
    settings = Settings(source="archive", model_dir=model_dir, state_dir=state_dir)
    history = ArchiveSource(archive_dir).load("BTC", Frequency.HF).history
    return growing_engine(archive_dir, settings, history.bars.end_ts - 2 * DAY_S)


@pytest.mark.parametrize("off_s", [3600, -3600, 86_400, -86_400, 0.9, -0.9])
def test_answers_are_valid_whatever_the_clock_shows(archive_dir, model_dir, tmp_path, off_s):
    """With a clock that is off by up to a day every prompt is answered, and the same after."""
    source, engine = trained_market(archive_dir, model_dir, tmp_path)
    end = source.moment
    start = end // 60 * 60 + 60
    expected = ask(engine, start).paths
    source.moment = int(end + off_s)
    for minute in range(5):
        engine.refresh()
        lost = 1
        try:
            ask(engine, start + 60 * minute)
            lost = 0
        finally:
            count(WHATEVER, cases=1, answers_lost=lost)
        source.moment += 60
    source.moment = end
    engine.refresh()
    np.testing.assert_array_equal(ask(engine, start).paths, expected)


@dataclass
class OffClock:
    """The axon of a miner whose clock is off, and callers whose clocks are right."""

    server: AxonServer
    desk: AnswerDesk
    client: httpx.Client
    true_now: int
    off_s: float = 0.0

    def prompts(self):
        """An hour's prompt fifty seconds ahead, and a day's two minutes ahead."""
        start = format_iso(self.true_now + 50)
        hour = {"asset": "BTC", "start_time": start, "time_increment": 60, "time_length": 3600}
        later = format_iso(self.true_now + 110)
        day = {"asset": "BTC", "start_time": later, "time_increment": 300, "time_length": 86_400}
        return [asked | {"num_simulations": 20} for asked in (hour, day)]

    def ask(self, asked):
        """The axon's answer to a validator that signs by the true time and waits for a minute.

        The nonce is from `off_s` ago by the miner's clock, whichever of both is off.
        """
        headers = axon.signed(self.server, age_s=self.off_s, timeout="60.0", uuid=uuid.uuid4().hex)
        return axon.post(self.client, headers, asked)


@pytest.fixture(scope="module")
def off_clock(archive_dir, model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clock")
    axon.make_wallet(folder, "miner")
    here = AxonSettings(
        wallet_name="miner", wallet_hotkey="hot", wallet_path=folder, ip="127.0.0.1", port=0,
        external_ip="127.0.0.1",
    )  # fmt: skip
    source, engine = trained_market(archive_dir, model_dir, folder / "state")
    true_now = source.moment // 60 * 60 + 10
    with axon.listening(here, engine) as (server, desk):
        base = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=base, timeout=60) as client:
            world = OffClock(server, desk, client, true_now)

            def set_off(off_s):
                world.off_s = off_s
                source.moment = int(true_now + off_s)  # `listening` takes its now from it
                engine.refresh()
                return world

            yield set_off


@pytest.mark.parametrize("off_s", [0.0, 9.0, -9.0, 3.0, -3.0])
def test_a_clock_that_is_off_by_seconds_costs_no_caller_an_answer(off_clock, off_s):
    """Signatures, deadlines and all: within the skew that is allowed every prompt is answered."""
    world = off_clock(off_s)
    for asked in world.prompts():
        answer = world.ask(asked)
        count(NEAR, cases=1, answers_lost=int(answer.status_code != 200))
        assert answer.status_code == 200, answer.text
        validate_answer(answer.json()["simulation_output"], axon.request_of(asked))


@pytest.mark.parametrize(
    ("off_s", "statuses", "words"),
    [
        (-12.0, {401}, "12 s in the future and 10 s are allowed; set the clock"),
        (-3600.0, {401}, "3600 s in the future and 10 s are allowed; set the clock"),
        (75.0, {401}, "75 s old and 70 s are allowed"),
        (3600.0, {401}, "3600 s old and 70 s are allowed"),
        (60.0, {200, 408}, "has passed, the present is"),  # the hour's start, not the day's
    ],
)
def test_a_clock_that_is_off_by_more_is_told_to_callers_and_counted(
    off_clock, off_s, statuses, words
):
    """Beyond what is allowed nobody is answered wrongly: refused, by how much, and counted."""
    world = off_clock(off_s)
    before = len(world.desk.told)
    answers = [world.ask(asked) for asked in world.prompts()]
    assert {answer.status_code for answer in answers} == statuses
    refused = [answer for answer in answers if answer.status_code != 200]
    assert all(words in answer.json()["message"] for answer in refused)
    told = [entry for entry in world.desk.told[before:] if entry.outcome not in ANSWERED]
    assert sorted(entry.reason or "" for entry in told) == sorted(
        answer.json()["message"] for answer in refused
    )
    count(FAR, cases=len(refused))


SUMMER_BEGINS = 1_772_953_200  # 2026-03-08 07:00 UTC, 02:00 in New York
SUMMER_ENDS = 1_762_063_200  # 2025-11-02 06:00 UTC, 02:00 in New York


@pytest.mark.parametrize("change", [SUMMER_BEGINS, SUMMER_ENDS])
@pytest.mark.parametrize(
    ("asset", "frequency"),
    [
        ("BTC", Frequency.HF),
        ("BTC", Frequency.LF),
        ("SP500", Frequency.LF),
        ("XAU", Frequency.LF),
    ],
)
def test_answers_across_the_change_of_summer_time_are_valid(tmp_path, change, asset, frequency):
    """Before, in and after the hour that New York's clocks repeat or leave out, answers go on.

    From a set that was trained before the change, on all of whose hours it looks ahead.
    """
    source = SimulatedSource(days=20, end_ts=change + 2 * 3600, assets=(asset,))
    history = source.load(asset, frequency).history
    growing = GrowingArchive(history, change - 7200, name=source.name)
    models = tmp_path / "models"
    publish_small_set(models, growing.recent(asset, frequency))
    settings = Settings(source="simulated", model_dir=models, state_dir=tmp_path / "state")
    engine = ForecastEngine.open(growing, settings)
    spec = FREQUENCIES[frequency]
    for moment in range(change - 5400, change + 7200, 1200):
        growing.moment = moment
        engine.refresh()
        request = ForecastRequest(
            asset=asset,
            start_ts=moment + 60,
            increment_s=spec.prompt_increment_s,
            length_s=spec.prompt_length_s,
            num_paths=5,
        )
        lost = 1
        try:
            answer = engine.answer(request)
            validate_answer(encode_prompt_answer(answer), request)
            assert answer.diagnostics.rung == Rung.LIGHTGBM
            lost = 0
        finally:
            count("The change of summer time costs no answer", cases=1, answers_lost=lost)


# ---------------------------------------------------------------- duties

FAST = 300.0  # market seconds per real second: a minute's duty comes five times a second


class Wall:
    """A clock on the wall that somebody sets, over one that nobody can."""

    def __init__(self):
        self.off = 0.0

    def __call__(self):
        return time.monotonic() + self.off


@pytest.mark.parametrize("jump_s", [86_400, -86_400, 3600, -3600, 1, -1])
def test_no_duty_waits_longer_than_its_period_after_a_jump(jump_s):
    """A clock set under a sleeping duty: it runs on, once a minute, and makes up for nothing.

    Who waited for the time of day would sleep for minutes after a day's jump back.
    """
    wall, ran, came = Wall(), [], []
    clock = RehearsalClock(start=NOON, origin=wall(), speed=FAST, wall=wall)

    def minutely():
        ran.append(int(clock.now() - 2) // 60)
        came.append(time.monotonic())

    duty = Duty("minutely", minutely, each(clock, 60, offset_s=2))
    upkeep = Upkeep([duty])
    upkeep.start()
    try:
        wait_for(lambda: len(ran) >= 2)
        wall.off = jump_s / FAST
        before = len(ran)
        wait_for(lambda: len(ran) >= before + 4)
    finally:
        upkeep.stop(5)
    minutes = np.array(ran[before + 1 :])  # the first one's sleep began before the jump
    assert (np.diff(minutes) > 0).all()
    if abs(jump_s) >= 3600:  # who slept for the time of day came an hour of the market later
        assert max(np.diff(came)) < 3600 / FAST / 2
    count("A clock that jumps delays no duty by more than its period", cases=1)


def test_a_smeared_leap_second_keeps_the_minutes(size):
    """Through a leap second that is smeared over a day every minute's duty runs once."""
    real = 0.0
    smeared = RehearsalClock(start=NOON, origin=0.0, speed=1 - 1 / DAY_S, wall=lambda: real)
    pause = each(smeared, 60, offset_s=2)
    ran = []
    for _ in range(size(1500, 3000)):
        real += pause() + 1e-3
        ran.append(int(smeared.now() - 2) // 60)
    assert np.diff(ran).tolist() == [1] * (len(ran) - 1)
    count("A smeared leap second leaves out no minute", cases=len(ran))
