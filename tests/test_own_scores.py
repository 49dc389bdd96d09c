"""Own answers are scored as a validator would, once what happened is known."""

from dataclasses import replace

import numpy as np
import pytest

import own_scores
from baselines import EwmaStudentT
from config import DAY_S, Frequency
from data_fetcher import SimulatedSource
from domain import ForecastRequest, MarketHistory
from errors import UnknownAsset
from forecast_engine import request_rng
from ledger import AnswerEntry, Ledger
from own_scores import Pair, ScoreKeeper, score_matured, scored_by, summarise
from protocol import competition_like, protocol_profile
from replay import known_at_prompt, realised_path, usual_request
from scoring import score_paths
from tests.entries import prompt_entry

PROFILE = protocol_profile("2026-09")


@pytest.fixture(scope="module")
def market():
    source = SimulatedSource(days=4, assets=("BTC", "XAU"))
    return {
        (asset, frequency): source.load(asset, frequency).history
        for asset, frequency in (
            ("BTC", Frequency.HF),
            ("BTC", Frequency.LF),
            ("XAU", Frequency.LF),
        )
    }


class Histories(dict[Pair, MarketHistory]):
    """Bars by asset and frequency, as the engine gives them."""

    def history(self, asset, frequency):
        try:
            return self[asset, frequency]
        except KeyError:
            raise UnknownAsset("none.") from None

    def until(self, ts, *pairs):
        return Histories({p: h.known_at(ts) if p in pairs else h for p, h in self.items()})


@pytest.fixture
def histories(market):
    return Histories(market)


@pytest.fixture
def book(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite3") as opened:
        yield opened


def wide_walk(request, known, seed):
    """An answer of twice the yardstick's spread."""
    yardstick = EwmaStudentT(cap_bps=100.0)
    paths = yardstick.paths(request, known, np.random.default_rng(seed))
    return known.anchor_price * (paths / known.anchor_price) ** 2


def answered(book, history, start_ts, seed=0):
    """Keep an answer to the usual prompt; returns the request and the paths."""
    request = usual_request(history, start_ts)
    paths = wide_walk(request, known_at_prompt(history, start_ts), seed)
    prompt = prompt_entry(request)
    answer = AnswerEntry(
        frequency=history.frequency.value,
        rung="lightgbm",
        model_id=None,
        paths=paths,
        competition=competition_like(PROFILE, history.asset, history.frequency),
    )
    book.keep(prompt, answer)
    book.flush()
    return request, paths


def start_of(history, hours_before_end):
    return history.price_bars.end_ts // 300 * 300 - int(hours_before_end * 3600)


@pytest.mark.parametrize(
    ("pair", "hours"),
    [(("BTC", Frequency.HF), 3), (("BTC", Frequency.LF), 30), (("XAU", Frequency.LF), 40)],
)
def test_an_answer_gets_the_validators_score_and_so_does_the_yardstick(
    book, histories, pair, hours
):
    history = histories[pair]
    request, paths = answered(book, history, start_of(history, hours))
    assert score_matured(book, histories, history.price_bars.end_ts + 200, PROFILE, seed=7) == 1
    (found,) = list(book.scored(0))
    competition = competition_like(PROFILE, *pair)
    realised = realised_path(history, request)
    exact = score_paths(paths, realised, competition, increment_s=request.increment_s)
    assert found.score == pytest.approx(exact.total, rel=2e-3)
    assert dict(found.intervals) == pytest.approx(dict(exact.by_interval), rel=1e-2, abs=0.05)
    known = known_at_prompt(history, request.start_ts)
    theirs = EwmaStudentT.fit(history).paths(request, known, request_rng(7, request))
    expected = score_paths(theirs, realised, competition, increment_s=request.increment_s).total
    assert found.ewma_t == pytest.approx(expected, rel=2e-3)
    assert found.ewma_t < found.score  # twice too wide is worse


def test_an_answer_waits_until_its_last_price_can_be_known(book, histories):
    history = histories["BTC", Frequency.HF]
    start = start_of(history, 3)
    answered(book, history, start)
    last_known = start + 3600 + 60  # the candle that opens at the last point has closed
    early = last_known - 60 + own_scores.LATE_BARS_S
    assert score_matured(book, histories, early - 1, PROFILE) == 0
    without_last = histories.until(last_known - 60, ("BTC", Frequency.HF))
    assert score_matured(book, without_last, early + 600, PROFILE) == 0
    with_last = histories.until(last_known, ("BTC", Frequency.HF))
    assert score_matured(book, with_last, early + 600, PROFILE) == 1
    assert score_matured(book, with_last, early + 600, PROFILE) == 0


def test_prices_of_a_feed_that_stands_in_score_nothing(book, histories):
    """The answer waits for the scored feed's bars, and is given up without them."""
    history = histories["BTC", Frequency.HF]
    request, _ = answered(book, history, start_of(history, 3))
    other = Histories({("BTC", Frequency.HF): replace(history, stand_in="pyth:Crypto.BTC/USD")})
    known = request.start_ts + 2 * 3600
    assert score_matured(book, other, known, PROFILE) == 0
    assert score_matured(book, histories, known, PROFILE) == 1
    answered(book, history, start_of(history, 2))
    assert score_matured(book, other, known + own_scores.GIVE_UP_S + 7200, PROFILE) == 0
    assert not book.pending("BTC", "hf", known + 7200, 10)


def test_what_comes_later_changes_no_score(book, histories, tmp_path):
    history = histories["BTC", Frequency.HF]
    start = start_of(history, 5)
    answered(book, history, start)
    later = {**histories}
    cut = histories.until(start + 3720, ("BTC", Frequency.HF))
    score_matured(book, cut, start + 4000, PROFILE)
    with Ledger(tmp_path / "other.sqlite3") as other:
        answered(other, history, start)
        score_matured(other, Histories(later), start + 4000, PROFILE)
        (one,), (two,) = list(book.scored(0)), list(other.scored(0))
    assert one.score == two.score
    # The cap is learned from more bars; it binds once in two thousand returns.
    assert one.ewma_t == pytest.approx(two.ewma_t, rel=1e-2)


def test_an_asset_without_bars_holds_up_no_other(book, histories, monkeypatch):
    monkeypatch.setattr(own_scores, "MOST_AT_ONCE", 2)
    gold, bitcoin = histories["XAU", Frequency.LF], histories["BTC", Frequency.LF]
    for minutes in range(4):
        answered(book, gold, start_of(gold, 30) - 300 * minutes)
    answered(book, bitcoin, start_of(bitcoin, 30))
    now = bitcoin.price_bars.end_ts + 200
    silent = histories.until(gold.price_bars.end_ts - DAY_S, ("XAU", Frequency.LF))
    assert score_matured(book, silent, now, PROFILE) == 1
    assert [found.asset for found in list(book.scored(0))] == ["BTC"]


def test_an_answer_whose_outcome_never_became_known_is_given_up(book, histories):
    history = histories["XAU", Frequency.LF]
    start = start_of(history, 30)
    answered(book, history, start)
    silent = histories.until(start - 60, ("XAU", Frequency.LF))
    end = start + DAY_S
    assert score_matured(book, silent, end + own_scores.GIVE_UP_S - 10, PROFILE) == 0
    assert len(book.pending("XAU", "lf", end, limit=9)) == 1
    assert score_matured(book, silent, end + own_scores.GIVE_UP_S + 10, PROFILE) == 0
    assert book.pending("XAU", "lf", end, limit=9) == []


def test_an_outcome_with_a_gap_is_scored_by_what_is_known(book, histories):
    history = histories["BTC", Frequency.HF]
    start = start_of(history, 3)
    answered(book, history, start)
    bars = history.price_bars
    keep = (bars.open_ts < start + 600) | (bars.open_ts >= start + 1200)
    columns = ("open_ts", "open", "high", "low", "close", "volume")
    holed = replace(bars, **{name: getattr(bars, name)[keep] for name in columns})
    gappy = Histories({("BTC", Frequency.HF): replace(history, price_bars=holed)})
    assert score_matured(book, gappy, bars.end_ts + 200, PROFILE) == 1
    (found,) = list(book.scored(0))
    assert found.covered["1min"][1] == 60 - 11


def test_an_asset_that_is_served_no_more_is_given_up_in_the_end(book, histories):
    history = histories["XAU", Frequency.LF]
    start = start_of(history, 30)
    answered(book, history, start)
    gone = Histories()
    assert score_matured(book, gone, start + DAY_S + 200, PROFILE) == 0
    assert book.pending_pairs(start + DAY_S)
    score_matured(book, gone, start + DAY_S + own_scores.GIVE_UP_S + 200, PROFILE)
    assert not book.pending_pairs(start + DAY_S)


@pytest.mark.parametrize(
    ("increment_s", "length_s", "name"),
    [(60, 3600, "crypto-1h"), (300, 86_400, "crypto-24h"), (60, 7200, None), (600, 86_400, None)],
)
def test_prompts_of_the_usual_form_are_scored(increment_s, length_s, name):
    request = ForecastRequest(
        asset="BTC", start_ts=60, increment_s=increment_s, length_s=length_s, num_paths=10
    )
    competition = scored_by(PROFILE, request)
    assert (competition.name if competition else None) == name


def test_the_summary_holds_ratio_and_coverage_of_the_last_days(book, histories):
    history = histories["BTC", Frequency.HF]
    starts = [start_of(history, hours) for hours in (40, 6, 4)]
    for seed, start in enumerate(starts):
        answered(book, history, start, seed)
    now = history.price_bars.end_ts + 200
    score_matured(book, histories, now, PROFILE)
    (pair,) = found = summarise(book, now, days=1)
    assert pair == ("BTC", Frequency.HF)
    own = found[pair]
    assert own.answers == 2
    assert [at for at, _, _ in own.course] == [start // 900 * 900 for start in starts[1:]]
    assert sum(score for _, score, _ in own.course) == pytest.approx(2 * own.score)
    assert own.ratio == pytest.approx(own.score / own.ewma_t)
    assert own.ratio > 1.1  # twice too wide
    assert own.covered > 0.85
    assert own.covered_by_interval["1min"] > 0.85
    assert summarise(book, now, days=9)[pair].answers == 3
    assert summarise(book, now + 9 * DAY_S, days=1) == {}


def test_the_keeper_has_the_latest_summary_ready(book, histories):
    history = histories["BTC", Frequency.HF]
    end = history.price_bars.end_ts
    keeper = ScoreKeeper(book, histories, PROFILE)
    assert keeper.latest() == {}
    answered(book, history, start_of(history, 6))
    assert keeper.step(end + 200) == 1
    assert keeper.latest()["BTC", Frequency.HF].answers == 1
    answered(book, history, start_of(history, 4))
    assert keeper.step(end + 200 + own_scores.SUMMARY_S - 1) == 1
    assert keeper.latest()["BTC", Frequency.HF].answers == 1
    keeper.step(end + 200 + own_scores.SUMMARY_S)
    assert keeper.latest()["BTC", Frequency.HF].answers == 2


def test_a_clock_that_is_set_back_does_not_hold_the_summary_up(book, histories):
    history = histories["BTC", Frequency.HF]
    end = history.price_bars.end_ts
    keeper = ScoreKeeper(book, histories, PROFILE)
    keeper.step(end + 200 + 7 * DAY_S)
    answered(book, history, start_of(history, 6))
    keeper.step(end + 200)
    assert keeper.latest()["BTC", Frequency.HF].answers == 1
