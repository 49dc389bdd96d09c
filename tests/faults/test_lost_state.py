"""What a lost state costs where bars are held for a window of days: next to nothing."""

from dataclasses import replace

import numpy as np
import pytest

from bar_store import BarStore
from config import DAY_S, FREQUENCIES, Frequency
from data_fetcher import ArchiveSource, LiveSource
from domain import ForecastRequest
from forecast_engine import STATE_KIND, ForecastEngine
from market_view import Rung
from settings import Settings
from state_store import StateStore
from tests.faults.live_world import Hand
from tests.faults.small_sets import publish_small_set
from tests.faults.tally import count

PROMISE = "A state that is lost and rebuilt changes the spread of an answer by less than 1 %"
MOST_CHANGE = 0.01


@pytest.mark.parametrize("frequency", list(Frequency))
@pytest.mark.parametrize("lives", [3, 14])
def test_a_lost_state_changes_spreads_by_next_to_nothing(real_bars, tmp_path, frequency, lives):
    """What is rebuilt lacks the days that have left the window, whose weight is small by then.

    A set goes on from its state for a day or three until the next is trained; a
    fortnight is that of a miner whose trainings fail.
    """
    settings = Settings(
        source="venue", served_assets=("BTC",), state_dir=tmp_path / "s", model_dir=tmp_path / "m"
    )
    minutes, _ = ArchiveSource(real_bars / "recent").load_bars("BTC", 60)
    minutes = replace(minutes, feed="binance:BTCUSDT")
    BarStore(settings.state_dir).append("binance", "BTC", minutes)
    began = minutes.end_ts // DAY_S * DAY_S - lives * DAY_S
    hand = Hand(began + 30)
    source = LiveSource(settings, hand.clock())
    publish_small_set(settings.model_dir, source.load("BTC", frequency).history)
    engine = ForecastEngine.open(source, settings)
    for _ in range(lives):
        hand.ts += DAY_S
        engine.refresh()
    engine.checkpoint()
    kept = scales(ForecastEngine.open(source, settings), frequency, hand)
    name = f"venue/BTC_{frequency.value}"
    StateStore(settings.state_dir).path(STATE_KIND, name).write_bytes(b"torn")
    rebuilt = scales(ForecastEngine.open(source, settings), frequency, hand)
    assert list(settings.state_dir.rglob("*.damaged-*"))
    change = np.abs(rebuilt / kept - 1).max()
    count(PROMISE, cases=1)
    assert change < MOST_CHANGE


def scales(engine, frequency, hand):
    """Standard deviation of every step of an answer, (steps,)."""
    spec = FREQUENCIES[frequency]
    request = ForecastRequest(
        asset="BTC",
        start_ts=int(hand.ts) // 60 * 60 + 60,
        increment_s=spec.prompt_increment_s,
        length_s=spec.prompt_length_s,
        num_paths=1000,
    )
    answer = engine.answer(request)
    assert answer.diagnostics.rung == Rung.LIGHTGBM
    return np.std(np.diff(np.log(answer.paths), axis=1), axis=0)
