"""What all tests share: a clean environment, seeded properties, real bars."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from config import ENVIRONMENT_PREFIX

ROOT = Path(__file__).resolve().parent.parent

# The first example of a property may pay for an import or a compiled cache, so
# time says nothing; the working directory is changed once per test, not once
# per example, and that is enough.
settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use real bars, so that `-m "not real_bars"` leaves them out."""
    for item in items:
        if "real_bars" in getattr(item, "fixturenames", ()):
            item.add_marker("real_bars")


@pytest.fixture(scope="session")
def real_bars() -> Path:
    """The folder that holds `recent/`, `short/` and `year-2019/`."""
    folder = Path(os.environ.get("REAL_BARS_DIR") or ROOT.parent / "shared" / "data").resolve()
    if (folder / "recent").is_dir():
        return folder
    reason = f"no real bars in {folder}; set REAL_BARS_DIR to a folder that holds recent/"
    if os.environ.get("REQUIRE_REAL_BARS"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _clean_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the developer's leaks in, and nothing is written beside the code."""
    for name in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
