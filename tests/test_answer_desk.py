"""The desk between transports and the engine: shared bytes, deadlines, priorities, observers."""

import asyncio
import gc
import gzip
import json
import logging
import threading
import weakref
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answer_desk
from answer_desk import (
    AT_WILL_S,
    MAX_AHEAD_S,
    AnswerDesk,
    AnswerRecord,
    Caller,
    Outcome,
    prompt_budget,
    refusal_status,
)
from config import ASKED_AHEAD_S
from domain import Diagnostics, Forecast, ForecastRequest
from errors import (
    ChainUnavailable,
    InvalidAnswer,
    NoPriceError,
    NotAllowed,
    NotVerified,
    Overloaded,
    RequestError,
    TooLate,
    UnknownAsset,
)
from wire_format import PROMPT_JSON, SHADOW_JSON, Encoder

START = 1_766_102_700 // 60 * 60
NOW = START - 50.0
CALLER = Caller(name="5Validator", transport="axon")


def prompt(asset="BTC", start=START, paths=3, length=600):
    return ForecastRequest(
        asset=asset, start_ts=start, increment_s=60, length_s=length, num_paths=paths
    )


class Walks:
    """A different answer every time; assets SLOW wait until they are let go."""

    def __init__(self):
        self.computed: list[str] = []
        self.begun = threading.Semaphore(0)
        self.release = threading.Event()

    def now(self):
        return int(NOW)

    def assets(self):
        return ("BTC",)

    def answer(self, request, *, origin=None):
        self.computed.append(request.asset)
        if request.asset == "NONE":
            raise NoPriceError("no price of NONE is known; wait for the feed.")
        if request.asset == "BUG":
            raise ZeroDivisionError("a bug")
        if request.asset.startswith("SLOW"):
            self.begun.release()
            assert self.release.wait(20)
        steps = np.random.default_rng(len(self.computed)).normal(
            0, 1e-3, (request.num_paths, request.n_points)
        )
        return Forecast(
            request=request,
            paths=98_000 * np.exp(np.cumsum(steps, axis=1)),
            diagnostics=Diagnostics(
                rung="lightgbm",
                frequency="hf",
                anchor_price=98_000.0,
                anchor_ts=START - 60,
                price_age_s=10,
                model_id="BTC-hf-1",
                trained_until=None,
                models_saw_later_bars=False,
            ),
        )


@pytest.fixture
def walks():
    return Walks()


@pytest.fixture
def told():
    return []


@pytest.fixture
def desk(walks, told):
    opened = AnswerDesk(walks, observers=[told.append], threads=1, most_waiting=2)
    yield opened
    walks.release.set()
    opened.close()


def ask(desk, request, *, encoder=PROMPT_JSON, budget_s=50.0, **more):
    return desk.answer(request, encoder=encoder, caller=CALLER, now=NOW, budget_s=budget_s, **more)


def answered(desk, request, **more):
    return asyncio.run(ask(desk, request, **more))


async def begun(walks):
    """Once the only thread of the desk is busy with a slow request."""
    assert await asyncio.to_thread(walks.begun.acquire, timeout=20)


# ---------------------------------------------------------------- the same bytes


def test_who_asks_the_same_gets_the_same_bytes_without_new_work(desk, walks, told):
    first, second = (answered(desk, prompt()) for _ in range(2))
    assert first.body == second.body
    assert walks.computed == ["BTC"]
    assert [record.outcome for record in told] == [Outcome.COMPUTED, Outcome.REPEATED]


@pytest.mark.parametrize(
    "other",
    [
        {"request": prompt(paths=4)},
        {"request": prompt(length=660)},
        {"request": prompt(start=START + 60)},
        {"request": prompt(asset="ETH")},
        {"origin": START - 60},
    ],
)
def test_who_asks_something_else_gets_something_else(desk, walks, other):
    asked = {"request": prompt()} | other
    assert answered(desk, prompt()).body != answered(desk, **asked).body
    assert len(walks.computed) == 2


def packing(encoded):
    """Another encoding of what PROMPT_JSON says; notes each time that it is made."""

    def pack(forecast):
        encoded.append(threading.get_ident())
        return gzip.compress(PROMPT_JSON.encode(forecast))

    return Encoder("packed", pack)


def test_every_encoding_is_of_the_one_forecast_and_made_once(desk, walks, told):
    encoded: list[int] = []
    packed = packing(encoded)
    plain = answered(desk, prompt()).body
    bodies = {answered(desk, prompt(), encoder=packed).body for _ in range(3)}
    assert [gzip.decompress(body) for body in bodies] == [plain]
    assert len(encoded) == 1
    assert encoded[0] != threading.get_ident()  # the event loop only waits
    assert walks.computed == ["BTC"]
    outcomes = [record.outcome for record in told]
    assert outcomes == [Outcome.COMPUTED, *[Outcome.REPEATED] * 3]
    assert [record.forecast is None for record in told] == [False, True, True, True]


def test_what_is_shown_over_http_is_what_validators_got(desk, walks):
    sent = np.array(json.loads(answered(desk, prompt()).body)[2:])
    shown = json.loads(answered(desk, prompt(), encoder=SHADOW_JSON).body)
    moves = np.array(shown["paths"]) / shown["current_price"]
    np.testing.assert_allclose(moves, sent / sent[:, :1], rtol=1e-6)
    assert walks.computed == ["BTC"]


def test_callers_of_different_encodings_at_the_same_time_share_one_computation(desk, walks, told):
    encoded: list[int] = []
    encoders = [PROMPT_JSON, packing(encoded), SHADOW_JSON] * 2

    async def main():
        asked = [
            asyncio.create_task(ask(desk, prompt("SLOW"), encoder=encoder)) for encoder in encoders
        ]
        await begun(walks)
        walks.release.set()
        return await asyncio.gather(*asked)

    bodies = [answer.body for answer in asyncio.run(main())]
    assert bodies[:3] == bodies[3:]
    assert gzip.decompress(bodies[1]) == bodies[0]
    assert walks.computed == ["SLOW"]
    assert len(encoded) == 1
    assert [record.outcome for record in told].count(Outcome.COMPUTED) == 1
    load = desk.load()
    assert (load.waiting, load.running, load.cached) == (0, 0, 1)


def test_a_forecast_is_kept_no_longer_for_being_written_once_more(walks):
    clock = [1000.0]
    desk = AnswerDesk(walks, monotonic=lambda: clock[0])
    answered(desk, prompt(), budget_s=50)
    clock[0] += 50
    assert answered(desk, prompt(), budget_s=None, encoder=SHADOW_JSON).body
    assert walks.computed == ["BTC"]
    clock[0] += answer_desk.KEPT_AFTER_START_S + 1
    answered(desk, prompt(), budget_s=None)
    assert walks.computed == ["BTC", "BTC"]
    desk.close()


def test_an_encoding_that_fails_leaves_the_forecast_and_what_was_written_of_it(desk, walks):
    body = answered(desk, prompt()).body

    def refuse(_forecast):
        raise InvalidAnswer("it cannot be written.")

    for _ in range(2):
        with pytest.raises(InvalidAnswer):
            answered(desk, prompt(), encoder=Encoder("refusing", refuse))
    assert answered(desk, prompt()).body == body
    assert walks.computed == ["BTC"]


def test_callers_at_the_same_time_share_one_computation(desk, walks, told):
    async def main():
        asked = [asyncio.create_task(ask(desk, prompt("SLOW"))) for _ in range(9)]
        await begun(walks)
        walks.release.set()
        return await asyncio.gather(*asked)

    bodies = {answer.body for answer in asyncio.run(main())}
    assert len(bodies) == 1
    assert walks.computed == ["SLOW"]
    outcomes = [record.outcome for record in told]
    assert outcomes.count(Outcome.COMPUTED) == 1
    assert outcomes.count(Outcome.REPEATED) == 8


def test_callers_on_different_event_loops_share_one_computation(desk, walks):
    bodies = []
    callers = [
        threading.Thread(target=lambda: bodies.append(answered(desk, prompt("SLOW")).body))
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    assert walks.begun.acquire(timeout=20)
    walks.release.set()
    for caller in callers:
        caller.join(20)
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
    assert walks.computed == ["SLOW"]


def test_a_caller_that_hangs_up_does_not_take_the_answer_from_the_others(desk, walks, told):
    async def main():
        first = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        second = asyncio.create_task(ask(desk, prompt("SLOW")))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        walks.release.set()
        return await second

    assert asyncio.run(main()).body
    assert [record.outcome for record in told] == [Outcome.LEFT, Outcome.COMPUTED]
    assert [record.forecast is None for record in told] == [True, False]


@pytest.mark.parametrize("encoders", [(PROMPT_JSON, SHADOW_JSON), (SHADOW_JSON, PROMPT_JSON)])
def test_what_callers_did_not_wait_for_is_first_given_to_the_next_who_asks(
    desk, walks, told, encoders
):
    async def main():
        left = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        walks.release.set()
        for encoder in encoders:  # one of them is kept, the other is written now
            await ask(desk, prompt("SLOW"), encoder=encoder)

    asyncio.run(main())
    assert walks.computed == ["SLOW"]
    outcomes = [Outcome.LEFT, Outcome.COMPUTED, Outcome.REPEATED]
    assert [record.outcome for record in told] == outcomes
    assert [record.forecast is None for record in told] == [True, False, True]


def test_an_answer_that_took_until_after_the_start_is_too_late_and_not_scored(walks):
    """Time that nobody foresaw: another program took the processor."""
    clock = [1000.0]
    told: list[AnswerRecord] = []
    desk = AnswerDesk(walks, observers=[told.append], monotonic=lambda: clock[0])

    async def main():
        waiting = asyncio.create_task(ask(desk, prompt("SLOW"), budget_s=50))
        await begun(walks)
        clock[0] += 52
        walks.release.set()
        with pytest.raises(TooLate, match=r"2\.0 s after the start"):
            await waiting

    asyncio.run(main())
    assert [(record.outcome, record.forecast) for record in told] == [(Outcome.TOO_LATE, None)]
    desk.close()


def test_an_answer_is_kept_until_shortly_after_the_start(walks):
    clock = [1000.0]
    desk = AnswerDesk(walks, monotonic=lambda: clock[0])
    body = answered(desk, prompt(), budget_s=50).body
    clock[0] += 50 + answer_desk.KEPT_AFTER_START_S - 1
    assert answered(desk, prompt(), budget_s=None).body == body
    clock[0] += 2
    assert answered(desk, prompt(), budget_s=None).body != body
    desk.close()


def test_what_is_kept_for_nobody_any_more_can_be_let_go(walks):
    clock = [1000.0]
    desk = AnswerDesk(walks, monotonic=lambda: clock[0])
    answered(desk, prompt(), budget_s=10)
    answered(desk, prompt(start=START + 60), budget_s=60)
    clock[0] += 10 + answer_desk.KEPT_AFTER_START_S - 1
    desk.expire()
    assert desk.load().cached == 2
    clock[0] += 2
    desk.expire()
    assert desk.load().cached == 1
    clock[0] += 50
    desk.expire()
    assert (desk.load().cached, desk.load().cached_bytes) == (0, 0)
    desk.close()


def test_an_early_caller_does_not_decide_for_an_hour_what_the_others_get(walks):
    clock = [1000.0]
    desk = AnswerDesk(walks, monotonic=lambda: clock[0])
    early = answered(desk, prompt(), budget_s=3600).body
    clock[0] += answer_desk.SHARED_S + 1
    assert answered(desk, prompt(), budget_s=3600 - answer_desk.SHARED_S - 1).body != early
    desk.close()


@pytest.mark.parametrize("ahead_s", [answer_desk.SHARED_S + 30, 2 * answer_desk.SHARED_S])
def test_what_an_early_caller_got_is_not_what_validators_get(walks, told, ahead_s):
    clock = [1000.0]
    desk = AnswerDesk(walks, observers=[told.append], monotonic=lambda: clock[0])
    early = answered(desk, prompt(), budget_s=ahead_s).body
    clock[0] += ahead_s - answer_desk.SHARED_S + 1
    left_s = answer_desk.SHARED_S - 1
    assert answered(desk, prompt(), budget_s=left_s).body != early
    assert [record.outcome for record in told] == [Outcome.COMPUTED] * 2
    desk.close()


def test_encodings_are_looked_through_under_the_lock_alone(desk, monkeypatch):
    """Callers add to them at any moment."""
    looked, look = [], answer_desk._Job.next_order

    def guarded(job):
        looked.append(desk._lock.locked())
        return look(job)

    monkeypatch.setattr(answer_desk._Job, "next_order", guarded)
    assert answered(desk, prompt()).body
    assert looked
    assert all(looked)


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_the_cache_never_holds_more_than_its_bytes(sizes):
    desk = AnswerDesk(Walks(), cache_bytes=20_000)
    for number, paths in enumerate(sizes):
        answered(desk, prompt(start=START + 60 * number, paths=paths))
        assert desk.load().cached_bytes <= 20_000
    desk.close()


def test_the_cache_drops_what_was_not_asked_for_longest(walks):
    one = AnswerDesk(Walks())
    answered(one, prompt())
    size = one.load().cached_bytes
    one.close()
    desk = AnswerDesk(walks, cache_bytes=int(2.5 * size))
    for start in (START, START + 60, START, START + 120, START):
        answered(desk, prompt(start=start))
    assert len(walks.computed) == 3
    answered(desk, prompt(start=START + 60))
    assert len(walks.computed) == 4
    desk.close()


def test_nothing_is_held_beyond_what_the_bytes_of_the_cache_count(walks):
    held: list[weakref.ref[np.ndarray]] = []
    compute = walks.answer

    def watched(request, *, origin=None):
        forecast = compute(request, origin=origin)
        held.append(weakref.ref(forecast.paths))
        return forecast

    walks.answer = watched
    desk = AnswerDesk(walks, cache_bytes=200_000)
    sizes = []
    for number in range(60):
        for encoder in (PROMPT_JSON, SHADOW_JSON):
            answered(desk, prompt(start=START + 60 * number, paths=50), encoder=encoder)
        sizes.append(desk.load().cached_bytes)
    gc.collect()
    assert max(sizes) <= 200_000
    assert sum(ref() is not None for ref in held) == desk.load().cached == 200_000 // sizes[0]
    desk.close()


# ---------------------------------------------------------------- deadlines


def test_an_answer_that_would_come_too_late_is_refused_before_any_work(desk, walks, told):
    with pytest.raises(TooLate, match="left until the start"):
        answered(desk, prompt(), budget_s=0.5)
    assert walks.computed == []
    assert told[0].outcome is Outcome.TOO_LATE
    assert told[0].reason


def test_a_late_caller_still_gets_an_answer_that_lies_ready(desk, walks):
    body = answered(desk, prompt()).body
    assert answered(desk, prompt(), budget_s=0.1).body == body


def test_what_is_ahead_in_the_queue_counts(desk, walks):
    """With a first guess of 1 s for a day of paths and one thread, three fit no 3 s."""
    day = {"paths": 1000, "length": 86_400 // 5}

    async def main():
        slow = [asyncio.create_task(ask(desk, prompt("SLOW", **day)))]
        await begun(walks)
        slow.append(asyncio.create_task(ask(desk, prompt("SLOW2", **day), priority=5)))
        await asyncio.sleep(0)
        with pytest.raises(TooLate, match="ask earlier"):
            await ask(desk, prompt("BTC", **day), budget_s=3.0)
        walks.release.set()
        await asyncio.gather(*slow)

    asyncio.run(main())
    assert "BTC" not in walks.computed
    # alone it fits
    assert answered(desk, prompt("BTC", **day), budget_s=3.0).body


def test_a_request_overtaken_until_its_start_is_not_computed(walks):
    clock = [1000.0]
    desk = AnswerDesk(walks, threads=1, monotonic=lambda: clock[0])

    async def main():
        slow = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        late = asyncio.create_task(ask(desk, prompt("BTC"), budget_s=5.0))
        await asyncio.sleep(0)
        clock[0] += 5
        walks.release.set()
        await slow
        with pytest.raises(TooLate):
            await late

    asyncio.run(main())
    assert walks.computed == ["SLOW"]
    desk.close()


def test_a_slow_spell_locks_no_free_desk(walks):
    clock = [1000.0]
    desk = AnswerDesk(walks, threads=1, monotonic=lambda: clock[0])
    compute = walks.answer

    def slowly(request, *, origin=None):
        clock[0] += 300
        return compute(request, origin=origin)

    walks.answer = slowly
    for number in range(answer_desk._MEASURED):
        answered(desk, prompt(start=START + 60 * number), budget_s=3600)
    assert desk.load().seconds_per_day_answer > 300
    walks.answer = compute

    async def main():
        slow = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        with pytest.raises(TooLate, match="ask earlier"):  # here it would have to wait
            await ask(desk, prompt(start=START + 6000), budget_s=50)
        walks.release.set()
        await slow

    asyncio.run(main())
    assert answered(desk, prompt(start=START + 6000), budget_s=50).body
    desk.close()


@pytest.mark.parametrize(("ahead", "left"), [(0, 0), (0.5, 0.5), (MAX_AHEAD_S, MAX_AHEAD_S)])
def test_the_budget_is_the_time_to_the_start(ahead, left):
    assert prompt_budget(START, START - ahead) == left


@pytest.mark.parametrize("passed_s", [0, 1, 30, 60])
def test_a_rehearsal_leaves_a_prompt_its_real_minute(passed_s):
    asked, speed = START - ASKED_AHEAD_S, 60
    assert prompt_budget(START, asked + passed_s * speed, speed) == ASKED_AHEAD_S - passed_s
    with pytest.raises(TooLate):
        prompt_budget(START, asked + 60.1 * speed, speed)


def test_a_start_that_has_passed_is_too_late():
    with pytest.raises(TooLate, match="has passed"):
        prompt_budget(START, START + 0.1)


def test_a_start_far_ahead_is_refused():
    with pytest.raises(RequestError, match="3620 s ahead; ask at most 3600"):
        prompt_budget(START, START - MAX_AHEAD_S - 20)


# ---------------------------------------------------------------- the queue


def test_the_higher_stake_goes_first_and_equals_in_order_of_arrival(walks):
    desk = AnswerDesk(walks, threads=1)

    async def main():
        slow = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        asked = []
        for asset, stake in (("A", 1), ("B", 9), ("C", 5), ("D", 9)):
            asked.append(asyncio.create_task(ask(desk, prompt(asset), priority=stake)))
            await asyncio.sleep(0)
        walks.release.set()
        await asyncio.gather(slow, *asked)

    asyncio.run(main())
    assert walks.computed == ["SLOW", "B", "D", "C", "A"]
    desk.close()


def test_a_request_rises_with_the_stake_of_who_joins_it(walks):
    desk = AnswerDesk(walks, threads=1)

    async def main():
        slow = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        asked = []
        for asset, stake in (("A", 1), ("B", 5), ("A", 9)):
            asked.append(asyncio.create_task(ask(desk, prompt(asset), priority=stake)))
            await asyncio.sleep(0)
        walks.release.set()
        await asyncio.gather(slow, *asked)

    asyncio.run(main())
    assert walks.computed == ["SLOW", "A", "B"]
    desk.close()


def test_a_full_queue_refuses_the_lowest_stake(desk, walks, told):
    async def main():
        slow = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        low, middle = (
            asyncio.create_task(ask(desk, prompt(asset), priority=stake))
            for asset, stake in (("LOW", 1), ("MIDDLE", 5))
        )
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests"):
            await ask(desk, prompt("LATER"), priority=1)
        high = asyncio.create_task(ask(desk, prompt("HIGH"), priority=9))
        with pytest.raises(Overloaded):
            await low
        walks.release.set()
        await asyncio.gather(slow, middle, high)

    asyncio.run(main())
    assert walks.computed == ["SLOW", "HIGH", "MIDDLE"]
    assert [record.outcome for record in told].count(Outcome.OVERLOADED) == 2
    assert desk.load().waiting == desk.load().running == 0


def test_a_closed_desk_refuses_what_waits_and_finishes_what_runs(desk, walks):
    async def main():
        slow = asyncio.create_task(ask(desk, prompt("SLOW")))
        await begun(walks)
        waiting = asyncio.create_task(ask(desk, prompt("A")))
        await asyncio.sleep(0)
        desk.close()
        with pytest.raises(Overloaded, match="stopping"):
            await waiting
        with pytest.raises(Overloaded, match="stopping"):
            await ask(desk, prompt("B"))
        walks.release.set()
        assert (await slow).body

    asyncio.run(main())
    assert walks.computed == ["SLOW"]


# ---------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    ("asset", "error", "outcome"),
    [
        ("NONE", NoPriceError, Outcome.NO_PRICE),
        ("BUG", ZeroDivisionError, Outcome.FAILED),
    ],
)
def test_what_fails_is_raised_told_and_not_kept(desk, walks, told, asset, error, outcome):
    for _ in range(2):
        with pytest.raises(error):
            answered(desk, prompt(asset))
    assert walks.computed == [asset, asset]
    assert [record.outcome for record in told] == [outcome, outcome]
    assert desk.load().cached == desk.load().running == 0


def test_an_encoder_that_refuses_costs_no_other_answer(desk):
    def refuse(_forecast):
        raise UnknownAsset("no.")

    with pytest.raises(UnknownAsset):
        answered(desk, prompt(), encoder=Encoder("refusing", refuse))
    assert answered(desk, prompt()).body


def test_observers_learn_what_was_answered_and_to_whom(desk, told):
    answer = answered(desk, prompt(), origin=START - 60)
    (record,) = told
    assert (record.at, record.caller, record.origin) == (NOW, CALLER, START - 60)
    assert record.request == prompt()
    assert record.format == "prompt"
    assert record.size == len(answer.body)
    assert record.ms >= 0
    assert record.diagnostics is answer.diagnostics
    assert record.forecast.paths.shape == (3, 11)
    answered(desk, prompt(), origin=START - 60)
    assert told[1].forecast is None


def test_an_observer_that_fails_stops_neither_the_answer_nor_the_next_observer(walks, caplog):
    def fail(_record):
        raise ValueError("broken")

    told: list[AnswerRecord] = []
    desk = AnswerDesk(walks, observers=[fail, told.append])
    assert answered(desk, prompt()).body
    assert len(told) == 1
    assert "observer failed" in caplog.text
    desk.close()


def test_an_observer_may_come_later(desk, told):
    later: list[AnswerRecord] = []
    desk.watch(later.append)
    answered(desk, prompt())
    assert len(later) == len(told) == 1


def test_a_transport_reports_whom_it_turned_away(desk, told):
    desk.turn_away(CALLER, "the signature is missing.", now=NOW)
    (record,) = told
    assert (record.outcome, record.request) == (Outcome.TURNED_AWAY, None)
    assert record.reason == "the signature is missing."


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (TooLate, Outcome.TOO_LATE),
        (RequestError, Outcome.REFUSED),
        (NotAllowed, Outcome.NOT_ALLOWED),
        (ChainUnavailable, Outcome.NOT_ALLOWED),
        (NotVerified, Outcome.TURNED_AWAY),
        (Overloaded, Outcome.TURNED_AWAY),  # of strangers: our own queue has room
    ],
)
def test_a_prompt_refused_for_itself_or_its_sender_is_told_from_noise(desk, told, error, outcome):
    desk.turn_away(CALLER, error("so it is."), now=NOW, request=prompt())
    (record,) = told
    assert record.outcome is outcome
    assert (record.request, record.reason) == (prompt(), "so it is.")


def test_what_strangers_can_send_at_will_is_one_line_a_minute(walks, caplog):
    now, told = 1000.0, list[AnswerRecord]()
    opened = AnswerDesk(walks, observers=[told.append], monotonic=lambda: now)
    with closing(opened), caplog.at_level(logging.INFO, logger="answer_desk"):
        for _ in range(3):
            for _ in range(100):
                opened.turn_away(CALLER, "the signature is missing.", now=NOW)
            opened.turn_away(CALLER, NotAllowed("no stake."), now=NOW)
            opened.turn_away(CALLER, RequestError("no such asset."), now=NOW)
            now += AT_WILL_S
    assert len(told) == 3 * 102  # all of them are counted
    lines = [(entry.outcome, getattr(entry, "others_since", 0)) for entry in caplog.records]
    first = [("turned_away", 0), ("not_allowed", 0), ("refused", 0)]
    later = [("turned_away", 99), ("not_allowed", 0), ("refused", 0)]
    assert lines == [*first, *later, *later]


def test_every_outcome_leaves_one_log_line(desk, caplog):
    with caplog.at_level(logging.INFO, logger="answer_desk"):
        answered(desk, prompt())
        with pytest.raises(TooLate):
            answered(desk, prompt("ETH"), budget_s=0)
    line, refusal = caplog.records
    assert (line.getMessage(), line.asset, line.frequency) == ("answered", "BTC", "hf")
    assert (line.caller, line.transport, line.rung) == ("5Validator", "axon", "lightgbm")
    assert (line.anchor, line.price_age_s, line.outcome) == ("last_bar", 10, "computed")
    assert (refusal.getMessage(), refusal.outcome) == ("refused", "too_late")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TooLate("x"), 408),
        (RequestError("x"), 400),
        (UnknownAsset("x"), 400),
        (Overloaded("x"), 503),
        (NoPriceError("x"), 503),
    ],
)
def test_a_refusal_has_a_status(error, status):
    assert refusal_status(error) == status


def test_the_load_is_told(desk, walks):
    assert desk.load().seconds_per_day_answer == pytest.approx(0.927)
    answered(desk, prompt())
    load = desk.load()
    assert (load.waiting, load.running, load.cached) == (0, 0, 1)
    assert load.cached_bytes > 0
