"""State files of every earlier schema: one of each is kept here as it was written then."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from bar_store import BarStore
from config import Frequency
from data_fetcher import ArchiveSource
from domain import Bars
from forecast_engine import STATE_KIND, STATE_SCHEMA, ForecastEngine
from settings import Settings
from state_store import StateStore

KEPT = Path(__file__).resolve().parent / "data" / "state"
START = 1_764_547_200  # 2025-12-01 00:00 UTC


def test_one_file_of_every_earlier_schema_is_kept():
    kept = sorted(file.name for file in KEPT.iterdir())
    assert kept == [
        "bars_schema_1.msgpack",
        *(f"market_schema_{schema}.msgpack" for schema in range(1, STATE_SCHEMA)),
    ]
    assert STATE_SCHEMA == 4  # a new schema leaves a file of this one here


def test_a_day_of_bars_of_schema_1_is_read_and_grows(tmp_path):
    day = tmp_path / "bars" / "binance" / "BTC_60s" / "2025-12-01.msgpack"
    day.parent.mkdir(parents=True)
    shutil.copy(KEPT / "bars_schema_1.msgpack", day)
    store = BarStore(tmp_path)
    bars = store.load("binance", "BTC", 60)
    assert bars is not None
    assert (len(bars), bars.feed, int(bars.open_ts[0])) == (120, "binance:BTCUSDT", START)
    close = np.full(1, 91_000.0)
    later = Bars(
        open_ts=np.array([START + 7200]), open=close, high=close, low=close, close=close,
        volume=close, bar_s=60, feed=bars.feed,
    )  # fmt: skip
    assert store.append("binance", "BTC", later).new == 1
    again = BarStore(tmp_path).load("binance", "BTC", 60)
    assert again is not None
    np.testing.assert_array_equal(again.close[:-1], bars.close)
    assert not list(tmp_path.rglob("*.damaged-*"))


@pytest.mark.parametrize("schema", range(1, STATE_SCHEMA))
def test_a_market_state_of_an_earlier_schema_costs_at_most_a_recomputation(
    tmp_path: Path, archive: ArchiveSource, model_dir: Path, schema: int
) -> None:
    state = tmp_path / STATE_KIND / "archive" / "BTC_hf.msgpack"
    state.parent.mkdir(parents=True)
    shutil.copy(KEPT / f"market_schema_{schema}.msgpack", state)
    settings = Settings(source="archive", model_dir=model_dir, state_dir=tmp_path)
    engine = ForecastEngine.open(archive, settings)
    assert ("BTC", Frequency.HF) in engine.trained()
    engine.checkpoint()
    assert not list(tmp_path.rglob("*.damaged-*"))
    assert StateStore(tmp_path).load(STATE_KIND, "archive/BTC_hf", STATE_SCHEMA) is not None


def test_a_schema_from_the_future_is_set_aside(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save(STATE_KIND, "archive/BTC_hf", STATE_SCHEMA + 1, {"x": 1})
    assert store.load(STATE_KIND, "archive/BTC_hf", STATE_SCHEMA) is None
    assert len(list(tmp_path.rglob("*.damaged-*"))) == 1


@pytest.mark.parametrize("name", sorted(file.name for file in KEPT.iterdir()))
def test_the_kept_files_are_of_the_schema_that_they_are_named_after(
    tmp_path: Path, name: str
) -> None:
    kind, schema = name.removesuffix(".msgpack").split("_schema_")
    file = tmp_path / kind / "x.msgpack"
    file.parent.mkdir()
    shutil.copy(KEPT / name, file)
    assert StateStore(tmp_path).load(kind, "x", int(schema)) is not None
