"""The calendar of releases: its file, what was known when, and how it ends."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from errors import ConfigError
from scheduled_events import EVENTS_FILE, known_events, load_events

NEW_YORK = ZoneInfo("America/New_York")
SMALL = """
[[kind]]
name = "launch"
source = "https://example.org/schedule"
expires = 2026-01-01
edges_minutes = [-10, 0, 30]

[[kind.dates]]
announced = 2025-03-01
time = 08:30:00
days = [2025-07-03, 2025-03-10]

[[kind.dates]]
announced = 2025-06-01
time = 14:00:00
days = [2025-06-20]
"""


def utc(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "events.toml"
    file.write_text(SMALL)
    return file


def test_times_are_new_yorks_and_daylight_saving_moves_them(small):
    (kind,) = load_events(small)
    assert kind.times.tolist() == [
        utc("2025-03-10T12:30"),
        utc("2025-06-20T18:00"),
        utc("2025-07-03T12:30"),
    ]
    assert kind.edges_s == (-600, 0, 1800)


def test_nothing_is_known_before_it_was_announced(small):
    def known(at):
        events, warnings = known_events(utc(at), small)
        assert warnings == []
        return len(events[0].times)

    assert [known(at) for at in ("2025-02-28", "2025-03-02", "2025-06-02")] == [0, 2, 3]


def test_an_expired_kind_is_ignored_and_said_so_in_a_sentence(small):
    events, warnings = known_events(utc("2026-01-02"), small)
    assert events == ()
    (warning,) = warnings
    assert warning == (
        "the dates of launch in events.toml ended before this moment and are ignored; add the "
        "next ones from the source that the file names."
    )


@pytest.mark.parametrize("text", ["kind = 3", "[[kind]]\nname = 'x'", "no toml", "[[kind]]\n"])
def test_a_file_that_is_no_calendar_is_refused_by_name(tmp_path, text):
    file = tmp_path / "events.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"events\.toml is not a calendar of events"):
        load_events(file)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        load_events(tmp_path / "none.toml")


def test_the_calendar_that_is_shipped_keeps_the_habits_of_its_sources():
    kinds = {kind.name: kind for kind in load_events()}
    hours = {"fomc": (14, 0), "payrolls": (8, 30), "cpi": (8, 30)}
    assert kinds.keys() == hours.keys()
    for name, kind in kinds.items():
        local = [datetime.fromtimestamp(int(ts), NEW_YORK) for ts in kind.times]
        assert {(moment.hour, moment.minute) for moment in local} == {hours[name]}
        assert all(moment.weekday() < 5 for moment in local)
        assert np.all(np.diff(kind.times) > 86_400)
        assert np.all(kind.announced < kind.times)
        assert kind.expires_ts > kind.times[-1]
        span = kind.edges_s[-1] - kind.edges_s[0]
        assert span < np.diff(kind.times).min()  # neighbours do not overlap
    # Wednesdays, the second day of a meeting
    wednesdays = {datetime.fromtimestamp(int(ts), NEW_YORK).weekday() for ts in kinds["fomc"].times}
    assert wednesdays == {2}
    assert "source = " in EVENTS_FILE.read_text()
