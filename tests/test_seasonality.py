"""The clock of volatility: New York's wall clock, closing hours, and what is learned of them."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seasonality
from config import DAY_S, MarketHours
from domain import Bars
from features import move_sizes, return_grid
from seasonality import (
    FLOOR,
    PROFILE_POOL_DAYS,
    EventFactor,
    EventTimes,
    SeasonalProfile,
    fit_profile,
    flat_profile,
    is_closed,
    lean_on_pool,
    mean_profile,
    new_york_seconds,
    open_seconds,
    weekday_of,
)

BAR_S = 300
SLOTS = DAY_S // BAR_S
MONDAY = 1_756_684_800  # 2025-09-01 00:00 UTC, Labor Day


def utc(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def local_text(ts: int) -> str:
    local = int(new_york_seconds(np.array([ts]))[0])
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=local)).strftime("%Y-%m-%d %H:%M")


def closed(text: str, hours: MarketHours) -> bool:
    """Whether a moment of UTC falls into closing hours."""
    return bool(is_closed(new_york_seconds(np.array([utc(text)])), hours)[0])


def grid(days: float, start: int = MONDAY, bar_s: int = BAR_S) -> np.ndarray:
    return start + bar_s * np.arange(int(days * DAY_S / bar_s), dtype=np.int64)


def planted_profile(hours: MarketHours = MarketHours.CONTINUOUS) -> SeasonalProfile:
    """A bump in the New York morning, a quiet weekend and a sharp half hour."""
    second = BAR_S * np.arange(SLOTS)
    day = 0.7 + 0.9 * np.exp(-0.5 * ((second - 10 * 3600) / 7200) ** 2)
    day[second == 8.5 * 3600] *= 2.5
    within = np.ones(3600 // BAR_S)
    within[0] = 1.25
    return SeasonalProfile(
        bar_s=BAR_S,
        hours=hours,
        base=np.stack([day, 0.4 * np.ones(SLOTS)]),
        within_hour=within,
        weekly=np.ones((7, 8)),
    )


def any_profile(seed: int, bar_s: int = BAR_S) -> SeasonalProfile:
    rng = np.random.default_rng(seed)
    return SeasonalProfile(
        bar_s=bar_s,
        hours=MarketHours.EQUITY,
        base=rng.uniform(0.02, 3, (2, DAY_S // bar_s)),
        within_hour=rng.uniform(0.5, 2, 3600 // bar_s),
        weekly=rng.uniform(0.5, 2, (7, 8)),
    )


# ---------------------------------------------------------------- the wall clock


@pytest.mark.parametrize(
    ("moment", "local"),
    [
        ("2025-03-09T06:59", "2025-03-09 01:59"),  # one minute before clocks go forward
        ("2025-03-09T07:00", "2025-03-09 03:00"),
        ("2025-11-02T05:59", "2025-11-02 01:59"),  # one minute before they go back
        ("2025-11-02T06:00", "2025-11-02 01:00"),
        ("2025-07-01T13:30", "2025-07-01 09:30"),  # the opening bell in summer
        ("2025-12-01T14:30", "2025-12-01 09:30"),  # and in winter
        ("2026-01-01T02:00", "2025-12-31 21:00"),
    ],
)
def test_new_york_time_follows_daylight_saving(moment, local):
    assert local_text(utc(moment)) == local


@pytest.mark.parametrize(
    ("moment", "weekday"),
    [("2025-12-01T12:00", 0), ("2025-12-07T12:00", 6), ("1970-01-02T00:00", 4)],
)
def test_weekdays_count_from_monday(moment, weekday):
    assert weekday_of(np.array([utc(moment)])).tolist() == [weekday]


def test_the_same_local_time_has_the_same_factor_before_and_after_daylight_saving():
    profile = planted_profile()
    summer, winter = utc("2025-10-31T12:30"), utc("2025-11-03T13:30")  # 8:30 in New York
    factors = profile.at(np.array([summer, winter, winter - 3600]))
    assert factors[0] == factors[1] > 1.5 * factors[2]


# ---------------------------------------------------------------- closing hours


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2025-12-05T21:59", False),  # Friday 16:59 in New York
        ("2025-12-05T22:00", True),
        ("2025-12-06T15:00", True),
        ("2025-12-07T22:59", True),  # Sunday 17:59
        ("2025-12-07T23:00", False),
        ("2025-12-08T04:00", False),  # Sunday 23:00
        ("2025-07-11T20:59", False),  # Friday 16:59 in summer
        ("2025-07-11T21:00", True),
        ("2025-07-13T21:59", True),
        ("2025-07-13T22:00", False),
    ],
)
def test_the_weekend_runs_from_friday_five_to_sunday_six(moment, expected):
    assert [closed(moment, hours) for hours in MarketHours] == [expected] * 3


@pytest.mark.parametrize(
    ("moment", "holiday"),
    [
        ("2025-11-27T15:00", True),  # Thanksgiving
        ("2025-11-28T15:00", False),  # the day after is a short session, not a holiday
        ("2025-12-25T15:00", True),
        ("2025-12-26T04:59", True),  # still the 25th in New York
        ("2025-12-26T05:00", False),
        ("2026-07-03T15:00", True),  # Independence Day, observed
        ("2025-07-04T15:00", True),
        ("2025-10-13T15:00", False),  # Columbus Day: the exchange is open
    ],
)
def test_exchange_holidays_close_every_market_but_crypto(moment, holiday):
    assert closed(moment, MarketHours.EQUITY) is holiday
    assert closed(moment, MarketHours.COMMODITY) is holiday
    assert not closed(moment, MarketHours.CONTINUOUS)


@pytest.mark.parametrize(
    ("hours", "seconds"),
    [
        (MarketHours.CONTINUOUS, 7200),
        (MarketHours.COMMODITY, 3600),
        (MarketHours.EQUITY, 3600),
    ],
)
def test_crypto_is_open_at_weekends_and_nothing_else_is(hours, seconds):
    friday = utc("2025-12-05T21:00")  # 16:00 in New York
    assert open_seconds(hours, friday, friday + 7200) == seconds
    assert open_seconds(hours, friday - 7 * DAY_S, friday) == DAY_S


@pytest.fixture
def eager_threads():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_ask_for_the_same_new_year_all_see_its_holidays(eager_threads):
    days = np.array([utc(f"{year}-12-25T17:00") for year in range(1990, 2030)])
    moments = new_york_seconds(days)
    weekend = is_closed(moments, MarketHours.CONTINUOUS)
    for _ in range(5):
        seasonality._exchange_holidays.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: is_closed(moments, MarketHours.EQUITY), range(8)))
        assert all(np.array_equal(answer, answers[0]) for answer in answers)
        assert np.all(answers[0][weekend == 0] == 1)


# ---------------------------------------------------------------- variance along the clock


@given(
    seed=st.integers(0, 1000),
    start=st.integers(0, 14 * DAY_S),
    steps=st.lists(st.integers(1, 20_000), min_size=1, max_size=30),
)
@settings(max_examples=40)
def test_seasonal_variance_adds_up_over_any_partition(seed, start, steps):
    profile = any_profile(seed)
    times = MONDAY + start + np.concatenate(([0], np.cumsum(steps)))
    together = profile.variance_time(times)
    parts = [profile.variance_time(times[k : k + 2])[1] for k in range(len(steps))]
    assert together[0] == 0
    assert np.all(np.diff(together) > 0)
    np.testing.assert_allclose(np.diff(together), parts, rtol=1e-7, atol=1e-9)
    assert profile.variance_time(times[[0, -1]])[1] == pytest.approx(together[-1], rel=1e-9)


@pytest.mark.parametrize("bar_s", [60, 300])
def test_on_the_grid_seasonal_variance_is_the_sum_of_squared_factors(bar_s):
    profile = any_profile(3, bar_s)
    times = grid(2, bar_s=bar_s)
    expected = np.concatenate(([0], np.cumsum(profile.at(times[:-1]) ** 2)))
    np.testing.assert_allclose(profile.variance_time(times), expected, rtol=1e-12)


def test_a_part_of_a_bar_counts_for_its_share():
    profile = any_profile(4)
    first, second = profile.at(np.array([MONDAY, MONDAY + BAR_S])) ** 2
    times = MONDAY + np.array([60, 300, 360])
    assert profile.variance_time(times) == pytest.approx(
        [0, 0.8 * first, 0.8 * first + 0.2 * second]
    )


# ---------------------------------------------------------------- learning


def sizes(profile, open_ts, seed):
    """|Return| of a market with this clock, heavy tails and a slow level."""
    rng = np.random.default_rng(seed)
    level = 5 * np.exp(0.4 * np.sin(np.arange(len(open_ts)) / (9 * SLOTS)))
    return np.abs(rng.standard_t(5, len(open_ts))) * level * profile.at(open_ts)


def test_fitting_recovers_a_planted_clock():
    planted, open_ts = planted_profile(), grid(240)
    fitted = fit_profile(
        open_ts, sizes(planted, open_ts, 1), bar_s=BAR_S, hours=MarketHours.CONTINUOUS
    )
    week = grid(7, start=MONDAY + 14 * DAY_S)
    truth, found = planted.at(week), fitted.at(week)
    truth, found = truth / truth.mean(), found / found.mean()
    # About 110 effective days of √|t(5)|, of relative standard deviation 0.45,
    # doubled by the square: 9 % per slot, less as neighbours are smoothed. The
    # sharp slots are further off, being drawn to their neighbours on purpose.
    error = np.log(found / truth)
    assert np.sqrt(np.mean(error**2)) < 0.08
    assert np.abs(np.quantile(error, [0.02, 0.98])).max() < 0.2
    sharp = np.flatnonzero(week == utc("2025-09-16T12:30"))
    assert found[sharp] > 1.3 * found[[sharp - 2, sharp + 2]].max()


def test_a_market_without_a_clock_gets_a_nearly_flat_profile():
    flat, open_ts = flat_profile(BAR_S, MarketHours.CONTINUOUS), grid(120)
    fitted = fit_profile(open_ts, sizes(flat, open_ts, 2), bar_s=BAR_S, hours=flat.hours)
    assert np.std(np.log(fitted.at(open_ts[:2016]))) < 0.08
    np.testing.assert_array_equal(flat.at(open_ts), 1.0)


def test_full_hours_stand_out_before_single_slots_can():
    planted = any_profile(9)
    within = np.ones(3600 // BAR_S)
    within[0] = 2.0
    hourly = SeasonalProfile(
        bar_s=BAR_S, hours=planted.hours, base=np.ones((2, SLOTS)), within_hour=within,
        weekly=np.ones((7, 8)),
    )  # fmt: skip
    open_ts = grid(60)
    fitted = fit_profile(open_ts, sizes(hourly, open_ts, 9), bar_s=BAR_S, hours=hourly.hours)
    factor = fitted.at(grid(5)).reshape(-1, 3600 // BAR_S)
    assert factor[:, 0].mean() / factor[:, 3:-3].mean() == pytest.approx(2, rel=0.15)


def test_a_few_wild_days_do_not_pass_for_a_clock():
    open_ts = grid(84)
    rng = np.random.default_rng(10)
    day = (open_ts - open_ts[0]) // DAY_S
    wild = np.where((day % 7 == 2) & (day > 56), 12.0, 1.0)  # the last four Wednesdays
    fitted = fit_profile(
        open_ts,
        wild * np.abs(rng.standard_normal(len(open_ts))),
        bar_s=BAR_S,
        hours=MarketHours.CONTINUOUS,
    )
    factor = fitted.at(open_ts[:2016]).reshape(7, SLOTS).mean(axis=1)
    calm = factor[[0, 1, 3, 4]].mean()
    # 12 times as much in a third of the weeks. With the level divided out 1.41 is
    # left, and without it 1.63.
    assert factor[2] < 1.5 * calm


@given(seed=st.integers(0, 100), days=st.integers(3, 40), unit=st.floats(1e-3, 1e3))
@settings(max_examples=15)
def test_the_profile_is_positive_and_about_one_on_average_whatever_the_unit(seed, days, unit):
    open_ts = grid(days)
    size = unit * sizes(any_profile(seed), open_ts, seed)
    size[np.random.default_rng(seed).random(len(size)) < 0.2] = np.nan
    fitted = fit_profile(open_ts, size, bar_s=BAR_S, hours=MarketHours.EQUITY)
    factor = fitted.at(open_ts)
    assert factor.min() > 0
    recency = 0.5 ** ((open_ts[-1] - open_ts) / DAY_S / 90)
    known = np.isfinite(size)
    assert np.average(factor[known], weights=recency[known]) == pytest.approx(1, abs=0.02)


def session_bars(weeks: int, seed: int) -> Bars:
    """Bars of regular US hours alone; nights move four times a session bar, weekends six."""
    rng = np.random.default_rng(seed)
    open_ts = grid(7 * weeks, start=utc("2025-01-06T00:00"))
    local = new_york_seconds(open_ts)
    second = local % DAY_S
    inside = (weekday_of(local) < 5) & (second >= 34_200) & (second < 57_600)
    inside &= is_closed(local, MarketHours.EQUITY) == 0
    kept = open_ts[inside]
    pause = np.diff(kept, prepend=kept[0] - BAR_S) // BAR_S
    bps = np.where(pause == 1, 10.0, np.where(pause < 400, 40.0, 60.0))
    close = 200 * np.exp(np.cumsum(bps * rng.standard_normal(len(kept))) / 1e4)
    absent = np.full(len(kept), np.nan)
    return Bars(
        open_ts=kept, open=absent, high=absent, low=absent, close=close, volume=absent,
        bar_s=BAR_S, feed="test",
    )  # fmt: skip


def test_a_market_with_session_bars_alone_gets_sane_nights():
    returns = return_grid(session_bars(44, 5))
    fitted = fit_profile(
        returns.open_ts, move_sizes(returns), bar_s=BAR_S, hours=MarketHours.EQUITY
    )
    session = fitted.variance_time(np.array([utc("2025-10-14T13:30"), utc("2025-10-14T20:00")]))[1]
    night = fitted.variance_time(np.array([utc("2025-10-14T20:00"), utc("2025-10-15T13:30")]))[1]
    weekend = fitted.variance_time(np.array([utc("2025-10-17T20:00"), utc("2025-10-20T13:30")]))[1]
    # 78 session bars of 10 bps against one night of 40 and one weekend of 60.
    assert np.sqrt(night / session) == pytest.approx(40 / (10 * np.sqrt(78)), rel=0.3)
    assert np.sqrt(weekend / session) == pytest.approx(60 / (10 * np.sqrt(78)), rel=0.4)
    by_hour = np.diff(fitted.variance_time(utc("2025-10-14T20:30") + 3600 * np.arange(17)))
    assert by_hour.max() < 4 * by_hour.min()


def test_hours_that_were_never_seen_closed_are_taken_for_average():
    open_ts = grid(4, start=MONDAY + DAY_S)  # Tuesday to Friday, before the weekend
    open_ts = open_ts[is_closed(new_york_seconds(open_ts), MarketHours.CONTINUOUS) == 0]
    size = np.abs(np.random.default_rng(6).standard_normal(len(open_ts)))
    fitted = fit_profile(open_ts, size, bar_s=BAR_S, hours=MarketHours.CONTINUOUS)
    saturday = fitted.at(grid(1, start=utc("2025-09-06T06:00")))
    assert 0.5 < saturday.min() <= saturday.max() < 2


def test_no_hour_is_taken_to_be_motionless():
    open_ts = grid(60)
    size = np.abs(np.random.default_rng(7).standard_normal(len(open_ts)))
    size[is_closed(new_york_seconds(open_ts), MarketHours.COMMODITY) == 1] = 0.0
    fitted = fit_profile(open_ts, size, bar_s=BAR_S, hours=MarketHours.COMMODITY)
    assert fitted.base.min() == FLOOR
    saturday = fitted.at(grid(1, start=utc("2025-10-25T06:00")))
    assert 0.003 < saturday.max() < 0.1


@pytest.mark.parametrize("size", [np.zeros(2016), np.full(2016, np.nan), np.zeros(1)])
def test_a_price_that_never_moved_gets_the_flat_profile(size):
    fitted = fit_profile(grid(7)[: len(size)], size, bar_s=BAR_S, hours=MarketHours.COMMODITY)
    assert fitted.hours is MarketHours.COMMODITY
    np.testing.assert_array_equal(fitted.at(grid(7)), 1.0)


def test_recent_weeks_count_more_than_old_ones():
    open_ts = grid(200)
    old, new = planted_profile(), flat_profile(BAR_S, MarketHours.CONTINUOUS)
    half = len(open_ts) // 2
    rng = np.random.default_rng(8)
    noise = np.abs(rng.standard_normal(len(open_ts)))
    late_bump = noise * np.where(np.arange(len(open_ts)) < half, new.at(open_ts), old.at(open_ts))
    early_bump = noise * np.where(np.arange(len(open_ts)) < half, old.at(open_ts), new.at(open_ts))
    week = grid(5, start=MONDAY + 14 * DAY_S)
    spread = [
        np.std(np.log(fit_profile(open_ts, size, bar_s=BAR_S, hours=new.hours).at(week)))
        for size in (late_bump, early_bump)
    ]
    assert spread[0] > 1.3 * spread[1]


# ---------------------------------------------------------------- the manifest


@given(seed=st.integers(0, 1000), bar_s=st.sampled_from([60, 300]))
@settings(max_examples=20)
def test_a_profile_survives_json(seed, bar_s):
    profile = any_profile(seed, bar_s)
    again = SeasonalProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    assert (again.bar_s, again.hours) == (bar_s, MarketHours.EQUITY)
    times = grid(3, bar_s=bar_s)
    np.testing.assert_allclose(again.at(times), profile.at(times), rtol=1e-3)
    twice = SeasonalProfile.from_dict(json.loads(json.dumps(again.to_dict())))
    assert twice.at(times).tobytes() == again.at(times).tobytes()


# ---------------------------------------------------------------- scheduled releases


RELEASE = EventTimes(
    name="release",
    edges_s=(-1800, 0, 1800, 7200),
    times=MONDAY + DAY_S * np.array([2, 9, 16]) + 15 * 3600,
)


def test_the_time_around_a_release_is_cut_at_its_edges():
    at = RELEASE.times[1] + np.array([-1801, -1800, -1, 0, 1799, 1800, 7199, 7200])
    assert RELEASE.part_of(at).tolist() == [-1, 0, 0, 1, 1, 2, 2, -1]
    nothing = EventTimes(name="none", edges_s=(0, 60), times=np.array([], dtype=np.int64))
    assert nothing.part_of(at).tolist() == [-1] * 8


def test_a_planted_release_is_learned_and_put_back():
    open_ts = grid(21)
    louder = np.array([1.0, 3.0, 1.5, 1.0])[RELEASE.part_of(open_ts)]
    size = np.abs(np.random.default_rng(4).standard_normal(len(open_ts))) * louder
    profile = fit_profile(
        open_ts, size, bar_s=BAR_S, hours=MarketHours.CONTINUOUS, events=[RELEASE]
    )
    (event,) = profile.events
    # 18 bars of three releases against a prior of 10 that nothing happens
    assert 0.75 < event.factor[0] < 1.2
    assert 1.4 < event.factor[1] < 3.0
    assert 1.05 < event.factor[2] < 1.6
    at = RELEASE.times[:1]
    plain = replace(profile, events=())
    np.testing.assert_allclose(profile.at(at), plain.at(at) * event.factor[1])
    again = SeasonalProfile.from_dict(json.loads(json.dumps(profile.to_dict())))
    np.testing.assert_allclose(again.at(open_ts), profile.at(open_ts), rtol=1e-4)


def test_a_kind_without_a_release_so_far_changes_nothing():
    open_ts = grid(10)
    coming = replace(RELEASE, times=RELEASE.times + 100 * DAY_S)
    size = np.abs(np.random.default_rng(4).standard_normal(len(open_ts)))
    profile = fit_profile(open_ts, size, bar_s=BAR_S, hours=MarketHours.CONTINUOUS, events=[coming])
    np.testing.assert_array_equal(profile.events[0].factor, 1.0)


# ---------------------------------------------------------------- like markets


def with_event(profile: SeasonalProfile, name: str, factor: float) -> SeasonalProfile:
    event = replace(RELEASE, name=name)
    return replace(profile, events=(EventFactor(event=event, factor=np.full(3, factor)),))


def test_a_profile_leans_on_the_pool_by_its_days():
    own, pooled = any_profile(1), any_profile(2)
    half = lean_on_pool(own, pooled, PROFILE_POOL_DAYS)
    np.testing.assert_allclose(half.base, np.sqrt(own.base * pooled.base))
    np.testing.assert_allclose(lean_on_pool(own, pooled, 0).weekly, pooled.weekly)
    np.testing.assert_allclose(lean_on_pool(own, pooled, 1e9).within_hour, own.within_hour)


def test_releases_are_pooled_by_name_and_keep_their_own_times():
    own = with_event(any_profile(1), "cpi", 4.0)
    same = with_event(any_profile(2), "cpi", 1.0)
    other = with_event(any_profile(2), "fomc", 1.0)
    moved = replace(same, events=(replace(same.events[0], event=RELEASE),))
    np.testing.assert_allclose(lean_on_pool(own, same, PROFILE_POOL_DAYS).events[0].factor, 2.0)
    for stranger in (other, moved):
        leaning = lean_on_pool(own, stranger, PROFILE_POOL_DAYS)
        np.testing.assert_allclose(leaning.events[0].factor, 4.0)
        assert leaning.events[0].event is own.events[0].event


def test_the_mean_of_profiles_weighs_them():
    one, other = any_profile(1), any_profile(2)
    mean = mean_profile([one, other], [3, 1])
    np.testing.assert_allclose(mean.base, one.base**0.75 * other.base**0.25)
