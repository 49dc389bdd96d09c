"""Duties beside answering: none can stop another, and all keep their own pace."""

import logging
import threading
from contextlib import contextmanager

import pytest

from clock import RehearsalClock
from errors import SourceUnavailable
from tests.waiting import PATIENCE_S, wait_for
from upkeep import Duty, Upkeep, attempt, each, every


@contextmanager
def upkeep_of(*duties):
    upkeep = Upkeep(duties)
    upkeep.start()
    try:
        yield upkeep
    finally:
        upkeep.stop(0.05)


def test_a_duty_that_can_wait_is_first_done_after_its_time_and_not_at_the_stop():
    done, began = [], threading.Event()
    with upkeep_of(
        Duty("later", lambda: done.append("later"), every(3600), after_s=3600),
        Duty("now", began.set, every(3600)),
    ):
        assert began.wait(PATIENCE_S)
    assert done == []
    soon = Duty("soon", began.set, every(3600), after_s=0.01)
    began.clear()
    with upkeep_of(soon):
        assert began.wait(PATIENCE_S)


def test_a_duty_whose_pause_cannot_be_told_goes_on(caplog, monkeypatch):
    monkeypatch.setattr("upkeep.FAILED_PAUSE_S", 0.0)
    done = []

    def pause():
        raise ZeroDivisionError("a bug")

    with upkeep_of(Duty("work", lambda: done.append(1), pause)):
        wait_for(lambda: len(done) >= 3)
    assert {entry.getMessage() for entry in caplog.records} == {"duty failed"}


def test_a_failing_duty_stops_no_other(caplog):
    caplog.set_level(logging.INFO, logger="upkeep")
    done = []

    def fail():
        raise ZeroDivisionError("a bug")

    def refuse():
        raise SourceUnavailable("the feed is away; wait.")

    duties = [
        Duty("bug", fail, every(0)),
        Duty("feed", refuse, every(0)),
        Duty("work", lambda: done.append(1), every(0)),
    ]
    with upkeep_of(*duties):
        wait_for(lambda: len(done) >= 5)
    failures = {entry.duty: entry for entry in caplog.records}
    # each was logged once, although the third was done five times: it waits a while
    assert sorted(entry.duty for entry in caplog.records) == ["bug", "feed"]
    assert failures["bug"].exc_info is not None
    assert failures["feed"].exc_info is None
    assert failures["feed"].reason == "the feed is away; wait."


def test_a_hanging_duty_keeps_nobody_waiting_and_does_not_hold_up_the_end():
    release, entered = threading.Event(), threading.Event()
    done = []

    def hang():
        entered.set()
        release.wait(PATIENCE_S)

    with upkeep_of(
        Duty("hung", hang, every(0)), Duty("work", lambda: done.append(1), every(0))
    ) as upkeep:
        assert entered.wait(PATIENCE_S)
        wait_for(lambda: len(done) >= 5)
    hung, work = upkeep._threads
    assert hung.is_alive()
    release.set()
    for thread in (hung, work):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_duties_keep_their_own_pace_and_can_be_woken():
    counts = {"often": 0, "once": 0}

    def count(name):
        counts[name] += 1

    once = Duty("once", lambda: count("once"), every(3600))
    with upkeep_of(Duty("often", lambda: count("often"), every(0)), once):
        wait_for(lambda: counts["often"] >= 5)
        assert counts["once"] == 1
        once.wake()
        wait_for(lambda: counts["once"] == 2)


@pytest.mark.parametrize(
    ("now", "speed", "expected"), [(120, 1, 3), (123, 1, 60), (122.5, 1, 0.5), (150, 60, 0.55)]
)
def test_a_duty_of_the_market_keeps_to_the_markets_clock(now, speed, expected):
    clock = RehearsalClock(start=now, origin=0.0, speed=speed, wall=lambda: 0.0)
    assert each(clock, 60, offset_s=3)() == pytest.approx(expected)


@pytest.mark.parametrize(("over", "told"), [(False, "duty failed"), (True, "duty cut off")])
def test_what_the_end_cuts_off_is_no_fault(caplog, over, told):
    caplog.set_level("INFO")

    def fail():
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    assert not attempt(Duty("collect", fail, every(60)), is_over=lambda: over)
    (line,) = caplog.records
    assert (line.getMessage(), line.exc_info is None) == (told, over)
