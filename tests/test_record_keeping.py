"""What the desk tells reaches the ledger, and what no validator scores is not sketched."""

import asyncio

import numpy as np
import pytest

from answer_desk import AnswerDesk, Caller
from config import DAY_S
from domain import Diagnostics, Forecast, ForecastRequest
from errors import NoPriceError
from ledger import Ledger
from protocol import protocol_profile
from record_keeping import keeper
from wire_format import PROMPT_JSON

START = 1_766_102_700 // 60 * 60
CALLER = Caller(name="5Validator", transport="axon")


class Walks:
    """Answers BTC, and has no price of anything else."""

    def now(self):
        return START - 50

    def assets(self):
        return ("BTC",)

    def answer(self, request, *, origin=None):
        if request.asset != "BTC":
            raise NoPriceError("no price is known; wait.")
        steps = np.random.default_rng(0).normal(0, 1e-3, (request.num_paths, request.n_points))
        return Forecast(
            request=request,
            paths=98_000 * np.exp(np.cumsum(steps, axis=1)),
            diagnostics=Diagnostics(
                rung="lightgbm",
                frequency="hf" if request.increment_s == 60 else "lf",
                anchor_price=98_000.0,
                anchor_ts=START - 60,
                price_age_s=10,
                model_id="BTC-hf-1",
                trained_until=None,
                models_saw_later_bars=False,
            ),
        )


@pytest.fixture
def book(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite3") as opened:
        yield opened


@pytest.fixture
def desk(book):
    opened = AnswerDesk(Walks(), observers=[keeper(book, protocol_profile("2026-09"))])
    yield opened
    opened.close()


def ask(desk, increment_s=60, length_s=3600, asset="BTC", origin=None, ahead_s=50.0):
    request = ForecastRequest(
        asset=asset, start_ts=START, increment_s=increment_s, length_s=length_s, num_paths=50
    )
    asyncio.run(
        desk.answer(request, encoder=PROMPT_JSON, caller=CALLER, now=START - ahead_s, origin=origin)
    )


def test_every_request_is_kept_and_every_answer_once(desk, book):
    for _ in range(2):
        ask(desk)
    ask(desk, 300, 86_400)
    with pytest.raises(NoPriceError):
        ask(desk, asset="ETH")
    book.flush()
    rows = book.prompts(since=0)[::-1]
    assert [row["outcome"] for row in rows] == ["computed", "repeated", "computed", "no_price"]
    assert [row["rung"] for row in rows] == ["lightgbm", "lightgbm", "lightgbm", None]
    assert rows[3]["reason"] == "no price is known; wait."
    assert (rows[0]["caller"], rows[0]["price_age_s"]) == ("5Validator", 10)
    assert book.pending_pairs(START + 2 * DAY_S) == [("BTC", "hf"), ("BTC", "lf")]


def test_replays_and_prompts_of_other_forms_are_not_to_be_scored(desk, book):
    ask(desk, origin=START)
    ask(desk, 60, 7200)
    book.flush()
    assert len(book.prompts(since=0)) == 2
    assert book.pending_pairs(START + 2 * DAY_S) == []


def test_an_answer_of_an_hour_ahead_does_not_take_the_place_of_the_one_that_is_scored(book):
    """Whoever tries the miner early must not have own scores tell of old forecasts."""
    keep = keeper(book, protocol_profile("2026-09"))
    for ahead_s, scored in ((3500.0, []), (50.0, [("BTC", "hf")])):
        desk = AnswerDesk(Walks(), observers=[keep])
        ask(desk, ahead_s=ahead_s)
        desk.close()
        book.flush()
        assert book.pending_pairs(START + DAY_S) == scored


def test_what_was_turned_away_unread_is_not_kept(desk, book):
    desk.turn_away(CALLER, "the signature is missing.", now=START)
    book.flush()
    assert book.prompts(since=0) == []
