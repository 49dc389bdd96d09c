"""What a rehearsal found, held against what must hold."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import DAY_S, Frequency
from domain import Bars
from log_lines import KeyValueFormatter
from rehearsal_findings import (
    FLAT_MB_PER_MARKET_HOUR,
    TRAINING_ALLOWANCE_S,
    BarsFound,
    DiskUse,
    Findings,
    Growth,
    PairScores,
    PairTrainings,
    Published,
    Restart,
    Vitals,
    compare_bars,
    complaints,
    judge,
    judge_trainings,
    memory_growth,
    passed,
    read_log_line,
)
from rehearsal_plan import Fate, PairAsks

START = 1_766_102_400
BTC = ("BTC", Frequency.HF)
PAIRS = 5

# ---------------------------------------------------------------- bars


def minutes(rows):
    ts = START + 60 * np.array(sorted(rows), dtype=np.int64)
    none = np.full(len(ts), np.nan)
    return Bars(
        open_ts=ts,
        open=none,
        high=none,
        low=none,
        close=100.0 + (ts % 7).astype(np.float64),
        volume=none,
        bar_s=60,
        feed="binance:BTCUSDT",
    )


@given(
    st.sets(st.integers(0, 99), min_size=1),
    st.sets(st.integers(0, 99)),
    st.sets(st.integers(0, 99)),
)
def test_every_missing_changed_and_invented_bar_is_counted(served, lost, changed):
    stored_rows = sorted((served - lost) | (changed - served))
    stored = minutes(stored_rows)
    altered = np.isin((stored.open_ts - START) // 60, sorted(changed & served))
    stored = replace(stored, close=stored.close + altered)
    found = compare_bars(stored, minutes(served), START, START + 6000)
    assert found.served == len(served)
    assert found.missing == len(served & lost)
    assert found.different == len((changed & served) - lost)
    assert found.invented == len(changed - served)
    first = min(served & lost, default=None)
    assert found.first_missing_ts == (None if first is None else START + 60 * first)
    assert found.is_whole == (not served & lost and not changed)


def test_only_bars_of_the_compared_time_count():
    found = compare_bars(minutes(range(10, 20)), minutes(range(30)), START + 600, START + 1200)
    assert found.is_whole
    assert found.served == 10


def test_an_empty_store_lacks_everything_and_nothing_served_proves_nothing():
    assert compare_bars(None, minutes(range(5)), START, START + 300).missing == 5
    assert not compare_bars(None, minutes(range(5)), START - 300, START).is_whole


# ---------------------------------------------------------------- trainings


def published(*moments):
    """Sets that were seen some days after the start, of bars until shortly before."""
    return [
        Published(
            pair=BTC,
            seen_ts=START + days * DAY_S,
            trained_until=int(START + (days - 0.05) * DAY_S),
            seconds=40.0,
        )
        for days in moments
    ]


def trainings(*moments, days=2.5, speed=60):
    return judged(published(*moments), START + days * DAY_S, speed)


OPEN = np.arange(START - DAY_S, START + 5 * DAY_S, 60)  # closes of a market that never rests


def judged(sets, end, speed=60, closes=OPEN):
    return judge_trainings(
        sets, BTC, START, end, closes=closes, interval_days=1, pairs=PAIRS, speed=speed
    )


def test_a_set_a_day_is_on_cadence():
    found = trainings(0.1, 1.15, 2.2)
    assert found.on_cadence
    assert (found.sets, found.due, found.seconds) == (3, 2, (40.0, 40.0, 40.0))
    assert found.oldest_days == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("moments", "what"),
    [((), "never"), ((0.1,), "once"), ((2.4,), "late"), ((0.1, 2.0), "with a day left out")],
)
def test_a_set_that_comes_too_late_or_never_is_off_cadence(moments, what):
    assert not trainings(*moments).on_cadence


def test_what_cannot_be_due_yet_is_not_missed():
    days = 0.9 * TRAINING_ALLOWANCE_S * PAIRS * 60 / DAY_S
    assert trainings(days=days).on_cadence
    assert trainings(days=days).sets == 0


def test_in_a_closed_market_nothing_is_due_until_it_opens_again():
    sets, end = published(0.1), START + 2.5 * DAY_S
    before = OPEN[OPEN <= START]
    found = judged(sets, end, closes=before)
    assert (found.on_cadence, found.due) == (True, 1)
    for opens, in_time in ((START + 1.2 * DAY_S, False), (end - 600, True)):
        closes = np.concatenate((before, OPEN[opens < OPEN]))
        assert judged(sets, end, closes=closes).on_cadence is in_time


def test_sets_of_other_pairs_do_not_count():
    other = [replace(entry, pair=("BTC", Frequency.LF)) for entry in published(0.1, 1.1)]
    found = judged(other, START + 2 * DAY_S)
    assert found.sets == 0


# ---------------------------------------------------------------- log lines


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(
            lambda key: key not in vars(logging.makeLogRecord({})) and key not in {"time", "event"}
        ),
        st.text(max_size=20) | st.integers(),
        max_size=4,
    ),
    st.text(min_size=1, max_size=20),
)
def test_a_log_line_is_read_as_it_was_meant(extra, message):
    record = logging.makeLogRecord({"msg": message.replace("%", ""), "levelname": "INFO", **extra})
    line = KeyValueFormatter().format(record)
    found = read_log_line(line)
    for key, value in extra.items():
        text = str(value)
        if not set(text) & set("\\\b\f\n\r\t") and text.isprintable():
            assert found[key] == text
    assert found["level"] == "info"


def test_warnings_and_tracebacks_are_counted():
    lines = [
        'time=1 level=warning logger=a event="feed failing" feed=b',
        'time=2 level=warning logger=a event="feed failing" feed=c',
        "time=3 level=error logger=a event=failed",
        "Traceback (most recent call last):",
        '  File "miner.py", line 1, in main',
        "time=4 level=info logger=a event=answered",
    ]
    assert complaints(lines) == {"warning: feed failing": 2, "error: failed": 1, "traceback": 1}


# ---------------------------------------------------------------- memory


def life(megabytes_per_hour, minutes_=30, noise=()):
    seconds = np.arange(0, 60 * minutes_)
    rss = 400 + megabytes_per_hour * seconds / 3600
    rss[list(noise)] += 200
    return [
        Vitals(at_s=float(s), rss_mb=float(r), threads=20, handles=30)
        for s, r in zip(seconds, rss, strict=True)
    ]


def leaking(what):
    """A life in which one handle or thread a minute is never given back."""
    return [replace(entry, **{what: 20 + int(entry.at_s) // 60}) for entry in life(0)]


def growth_of(entries):
    found = memory_growth(entries)
    assert found is not None
    return found.mb_per_hour


@pytest.mark.parametrize("rate", [0, 5, 120, -40])
def test_the_growth_of_memory_is_told_through_peaks(rate):
    assert growth_of(life(rate, noise=range(400, 1700, 9))) == pytest.approx(rate, abs=1)


def test_what_waits_to_be_given_back_is_no_growth():
    entries = [
        replace(entry, rss_mb=entry.rss_mb + entry.at_s % 60 * entry.at_s / 3600)
        for entry in life(5, minutes_=60)
    ]
    assert growth_of(entries) == pytest.approx(5, abs=1)


def test_a_short_life_tells_nothing_about_memory():
    assert memory_growth(life(0, minutes_=14)) is None
    assert memory_growth([]) is None


def test_the_warm_up_does_not_count():
    entries = life(0)
    entries[:290] = life(3000)[:290]
    assert growth_of(entries) == pytest.approx(0, abs=1)
    longer = life(0, minutes_=120)
    longer[:1700] = life(300, minutes_=120)[:1700]
    assert growth_of(longer) == pytest.approx(0, abs=0.1)


def test_answers_that_are_kept_are_no_growth_and_excuse_none():
    kept = [int(entry.at_s) // 60 * 7 % 30 for entry in life(0)]  # MB, other ones each minute
    for rate in (0, 120):
        entries = [
            replace(entry, rss_mb=entry.rss_mb + mb, kept_mb=mb)
            for entry, mb in zip(life(rate), kept, strict=True)
        ]
        assert growth_of(entries) == pytest.approx(rate, abs=0.1)


def test_small_bounds_of_a_growth_are_told_to_a_tenth():
    assert str(Growth(mb_per_hour=0.81, low=0.58, high=1.007)) == "+0.8 (+0.6 to +1.0)"
    assert str(Growth(mb_per_hour=29.4, low=-13.2, high=51.4)) == "+29.4 (-13 to +51)"


def test_the_beginning_of_a_window_is_no_floor():
    """A life that ends in a peak, a second after two whole minutes, has not grown."""
    entries = life(0, minutes_=24)[:-1]
    entries += [replace(entries[-1], at_s=24 * 60.0 + late, rss_mb=480.0) for late in range(3)]
    found = memory_growth(entries)
    assert found is not None
    assert found.high == pytest.approx(0, abs=0.1)


# What whole two minutes of a miner at 60 times the market's speed needed at least, MB.
FLOORS = (382, 370, 383, 379, 378, 380, 385, 392, 379)


@pytest.mark.parametrize(("leak_mb", "flat"), [(0, True), (120, False)])
def test_the_interval_tells_scatter_from_a_leak(leak_mb, flat):
    entries = [
        replace(entry, rss_mb=entry.rss_mb + FLOORS[int((entry.at_s - 360) // 120) % 9])
        for entry in life(leak_mb, minutes_=24.1)
    ]
    found = memory_growth(entries)
    assert found is not None
    assert (found.low <= 0 <= found.high) is flat
    assert (found.low > 60 * FLAT_MB_PER_MARKET_HOUR) is not flat


# ---------------------------------------------------------------- verdict

ASKS = PairAsks(
    prompts=100,
    asks=120,
    fates={fate: 120 if fate is Fate.IN_TIME else 0 for fate in Fate},
    p50_ms=20,
    p95_ms=40,
    max_ms=100,
    rungs={"lightgbm": 120},
    anchors={"quote": 120},
    disagreements=0,
)
BARS = BarsFound(
    feed="binance:BTCUSDT",
    bar_s=60,
    served=1000,
    missing=0,
    different=0,
    invented=0,
    first_missing_ts=None,
)
TRAININGS = PairTrainings(
    sets=2, due=2, first_after_s=600, oldest_days=1.1, seconds=(40.0,), on_cadence=True
)
RESTART = Restart(
    exit_code=0,
    stopped_after_s=2,
    first_answer_after_s=4,
    compared=2,
    different=(),
    states_carried_on=1,
)
DISK = DiskUse(at_ts=0.0, ledger_mb=1.0, bars_mb=20.0, rest_mb=0.1, models_mb=5.0, files=40)
GOOD = Findings(
    pairs=(BTC,),
    market_days=2.0,
    speed=60.0,
    complete=True,
    bars={"BTC": [BARS]},
    trainings={BTC: TRAININGS},
    asks={BTC: ASKS},
    scores={BTC: PairScores(matured=100, scored=100, mean_bp=600.0, ratio=0.97)},
    lives=[life(1), life(2)],
    disk=(DISK, replace(DISK, at_ts=2 * 86_400.0, ledger_mb=100.0)),
    ledger_days=30.0,
    restart=RESTART,
    exit_code=0,
    stopped_after_s=1.0,
)


def failing(findings):
    return [point.name for point in judge(findings) if point.held is False]


def test_a_good_rehearsal_passes_on_every_point():
    points = judge(GOOD)
    assert all(point.held for point in points)
    assert passed(points)


FATES_WITH_ONE_LATE = {**ASKS.fates, Fate.IN_TIME: 119, Fate.LATE: 1}


@pytest.mark.parametrize(
    ("change", "point"),
    [
        ({"complete": False}, "ran to its end"),
        ({"bars": {"BTC": [replace(BARS, missing=1)]}}, "bars collected without a gap"),
        ({"bars": {"BTC": [replace(BARS, different=1)]}}, "bars collected without a gap"),
        ({"bars": {}}, "bars collected without a gap"),
        ({"trainings": {BTC: replace(TRAININGS, on_cadence=False)}}, "retrained on cadence"),
        (
            {"asks": {BTC: replace(ASKS, fates=FATES_WITH_ONE_LATE)}},
            "every prompt answered in time and valid",
        ),
        (
            {"asks": {BTC: replace(ASKS, disagreements=1)}},
            "every prompt answered in time and valid",
        ),
        ({"asks": {}}, "every prompt answered in time and valid"),
        (
            {"scores": {BTC: PairScores(matured=100, scored=94, mean_bp=600.0, ratio=1.0)}},
            "own scores in the ledger",
        ),
        ({"lives": [life(1), life(2 * 60 * FLAT_MB_PER_MARKET_HOUR)]}, "memory flat"),
        ({"speed": 1.0}, "memory flat"),  # where two megabytes an hour are a leak
        ({"lives": [leaking("handles")]}, "handles and threads steady"),
        ({"lives": [leaking("threads")]}, "handles and threads steady"),
        ({"disk": (DISK, replace(DISK, at_ts=2 * 86_400.0, ledger_mb=150.0))}, "state bounded"),
        ({"restart": replace(RESTART, exit_code=1)}, "clean restart, identical continuation"),
        (
            {"restart": replace(RESTART, different=("BTC hf",))},
            "clean restart, identical continuation",
        ),
        (
            {"restart": replace(RESTART, states_astray=("BTC lf",))},
            "clean restart, identical continuation",
        ),
        (
            {"restart": replace(RESTART, first_answer_after_s=None)},
            "clean restart, identical continuation",
        ),
        (
            {"restart": replace(RESTART, stopped_after_s=11)},
            "clean restart, identical continuation",
        ),
        ({"exit_code": None}, "nothing left behind"),
        ({"left_behind": 1}, "nothing left behind"),
        ({"log": {"traceback": 1}}, "no fault in the log"),
    ],
)
def test_every_fault_fails_its_own_point(change, point):
    found = replace(GOOD, **change)
    assert failing(found) == [point]
    assert not passed(judge(found))


def test_what_a_short_rehearsal_cannot_tell_does_not_fail():
    nothing_due = replace(TRAININGS, sets=0)
    unscored = PairScores(matured=0, scored=0, mean_bp=None, ratio=None)
    found = replace(
        GOOD,
        trainings={BTC: nothing_due},
        scores={BTC: unscored},
        lives=[life(0, minutes_=2)],
        disk=(DISK, replace(DISK, at_ts=3600.0)),
        restart=None,
    )
    held = {point.name: point.held for point in judge(found)}
    assert list(held.values()).count(None) == 6
    assert passed(judge(found))
