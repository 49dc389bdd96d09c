"""Feeds that fail, in the log: once while it lasts, once when it is over."""

import logging

import pytest

from feed_faults import FaultLog

AWAY = "binance is away; wait."
BTC, ETH = "binance:BTCUSDT", "binance:ETHUSDT"


@pytest.fixture
def lines(caplog):
    """What was logged so far, as (level, event, feed, other feeds)."""
    caplog.set_level(logging.INFO)

    def found():
        held = [
            (line.levelname, line.getMessage(), line.feed, vars(line).get("also"))
            for line in caplog.records
        ]
        caplog.clear()
        return held

    return found


def test_a_host_that_is_down_is_one_line_for_all_of_its_feeds_and_all_who_ask(lines):
    faults = FaultLog()
    down = {BTC: AWAY, ETH: AWAY}
    for _ in range(3):
        faults.report("feed failing", down, down)
        faults.report("no price", down, down)
    assert lines() == [("WARNING", "feed failing", BTC, ETH)]
    assert faults.failing("feed failing") == faults.failing("no price") == down
    faults.report("no price", {}, down)
    assert lines() == []  # it is still failing for the other
    faults.report("feed failing", {}, down)
    assert lines() == [("INFO", "feed works again", BTC, ETH)]
    assert faults.failing("feed failing") == {}


def test_feeds_that_fail_for_reasons_of_their_own_have_lines_of_their_own(lines):
    faults = FaultLog()
    faults.report("no price", {BTC: AWAY, ETH: "no such symbol; do without."}, {BTC, ETH})
    assert lines() == [("WARNING", "no price", BTC, None), ("WARNING", "no price", ETH, None)]


def test_a_feed_that_was_not_asked_stays_as_it_was(lines):
    faults = FaultLog()
    faults.report("no price", {BTC: AWAY}, {BTC})
    faults.report("no price", {}, {ETH})
    assert faults.failing("no price") == {BTC: AWAY}
    assert len(lines()) == 1


def test_a_sentence_that_changes_is_no_news_and_replaces_the_former(lines):
    faults = FaultLog()
    faults.report("no price", {BTC: "no answer within 8.0 s."}, {BTC})
    faults.report("no price", {BTC: "no answer within 8.1 s."}, {BTC})
    assert len(lines()) == 1
    assert faults.failing("no price") == {BTC: "no answer within 8.1 s."}


def test_many_feeds_are_named_shortly(lines):
    faults = FaultLog()
    faults.report("no price", {f"pyth:{number}": AWAY for number in range(9)}, ())
    assert lines()[0][2:] == ("pyth:0", "pyth:1, pyth:2, pyth:3 and 5 more")
