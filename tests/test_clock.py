"""The market's clock: real, or rehearsed."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clock import RehearsalClock, SystemClock, agreed_offset, market_speed, open_clock
from errors import ConfigError
from settings import Settings


def test_without_a_rehearsal_the_time_is_the_systems():
    before = time.time()
    now = open_clock(Settings()).now()
    assert before <= now <= time.time()
    assert isinstance(open_clock(Settings()), SystemClock)


def test_a_rehearsal_starts_at_its_moment_and_runs_at_its_speed():
    moments = iter([1000.0, 1001.0, 1060.5])
    clock = RehearsalClock.parse("2025-12-15T00:00:00Z@1000×60", wall=lambda: next(moments))
    assert clock.now() == 1765756800
    assert clock.now() == 1765756860
    assert clock.now() == 1765756800 + 60 * 60.5


def test_two_processes_with_the_same_setting_agree_on_the_time():
    settings = Settings(rehearsal="2025-12-15T00:00:00Z@1766400000x60")
    first, second = open_clock(settings), open_clock(settings)
    assert first == second
    earlier = first.now()
    assert 0 <= second.now() - earlier < 3600


def test_the_market_runs_at_the_speed_of_its_rehearsal_and_else_at_its_own():
    assert market_speed(open_clock(Settings(rehearsal="2025-12-15@1766400000x60"))) == 60
    assert market_speed(SystemClock()) == 1


@given(
    st.integers(946_684_800, 4_102_444_799),
    st.floats(0, 4e9).map(lambda value: round(value, 3)),
    st.integers(1, 3600),
)
def test_a_rehearsal_can_be_written_down_and_read_again(start, origin, speed):
    clock = RehearsalClock(start=start, origin=origin, speed=speed)
    assert RehearsalClock.parse(str(clock)) == clock


@pytest.mark.parametrize(
    "text",
    ["", "soon", "2025-12-15@1000", "2025-12-15@1000×0", "yesterday@1×60", "2025-12-15@later×60"],
)
def test_a_rehearsal_that_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"rehearsal .* cannot be read; write START@ORIGIN×SPEED"):
        open_clock(Settings(rehearsal=text))


@pytest.mark.parametrize(
    ("offsets", "agreed"),
    [
        ([], None),
        ([-7.0], -7.0),
        ([-900.0, 0.2], 0.2),  # a stale cache
        ([900.0, 0.2, -0.1], 0.2),
        ([15.2, 14.9], 14.9),
        ([-900.0, 15.2, 14.9], 14.9),
        ([-900.0, 15.2, 14.9, 15.0], 14.9),
    ],
)
def test_our_clock_is_off_by_what_most_others_say(offsets, agreed):
    assert agreed_offset(offsets) == agreed
    assert agreed_offset(reversed(offsets)) == agreed
