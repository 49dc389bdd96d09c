"""What all tests share: a clean environment, seeded properties, real bars."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings

import lgbm_trainer
import path_fitting
from config import DAY_S, Frequency
from console import _ConsoleHandler
from data_fetcher import ArchiveSource, SimulatedSource
from domain import Bars
from feed_plans import BINANCE_HOST_VARIABLE
from lgbm_trainer import TrainingResult
from model_store import publish_set
from protocol import protocol_profile
from settings import ENVIRONMENT_PREFIX

ROOT = Path(__file__).resolve().parent.parent

# The first example of a property may pay for an import or a compiled cache, so
# time says nothing; the working directory is changed once per test, not once
# per example, and that is enough.
settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A shell that runs the suite in the background has it ignore SIGINT, and with it
# every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
    monkeypatch.delenv(BINANCE_HOST_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was() -> Iterator[None]:
    """A script that was run in the process sends no later test's lines to stderr."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [entry for entry in root.handlers if isinstance(entry, _ConsoleHandler)]:
        root.removeHandler(handler)


# ---------------------------------------------------------------- a small trained market

ARCHIVE_DAYS = 16  # more than the ten days that a saved state stands back
TRAINED_DAYS_BEFORE_END = 2


def _write_bars(folder: Path, asset: str, bars: Bars) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"ts": bars.open_ts, "close": bars.close}
    path = folder / f"{asset}_{bars.bar_s // 60}m.parquet"
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="session")
def write_bars() -> Callable[[Path, str, Bars], None]:
    """Store bars of an asset in a folder, the way an archive keeps them."""
    return _write_bars


@pytest.fixture(scope="session")
def archive_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bars of a simulated market: BTC by the minute, XAU by five minutes."""
    folder = tmp_path_factory.mktemp("archive")
    market = SimulatedSource(days=ARCHIVE_DAYS, assets=("BTC", "XAU"))
    for asset, frequency in (("BTC", Frequency.HF), ("XAU", Frequency.LF)):
        _write_bars(folder, asset, market.load(asset, frequency).history.bars)
    return folder


@pytest.fixture(scope="session")
def archive(archive_dir: Path) -> ArchiveSource:
    """The archive, opened. Nobody changes it."""
    return ArchiveSource(archive_dir)


@contextmanager
def _quick_search() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lgbm_trainer, "SHAPE_PROMPTS", dict.fromkeys(Frequency, 3))
        for module in (path_fitting, lgbm_trainer):
            patch.setattr(module, "VARIATIONS", path_fitting.VARIATIONS[:2])
        yield


@pytest.fixture
def quick_search() -> Iterator[None]:
    """Let the search of path shapes, most of a small training's time, try little."""
    with _quick_search():
        yield


@pytest.fixture(scope="session")
def trained(archive: ArchiveSource) -> Mapping[Frequency, TrainingResult]:
    """Small sets of BTC that have not seen the archive's last two days."""
    until = archive.now() - TRAINED_DAYS_BEFORE_END * DAY_S
    results = {}
    for frequency, days in ((Frequency.HF, 4.0), (Frequency.LF, 8.0)):
        history = archive.load("BTC", frequency).history.known_at(until)
        with _quick_search():
            results[frequency] = lgbm_trainer.train(
                history, days=days, seed=0, profile=protocol_profile("2026-09")
            )
    return results


@pytest.fixture(scope="session")
def model_dir(
    trained: Mapping[Frequency, TrainingResult], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The small sets, published. Nobody changes them: copy the folder first."""
    folder = tmp_path_factory.mktemp("models")
    for frequency, result in trained.items():
        publish_set(folder, "BTC", frequency, result.model_id, result.files)
    return folder
