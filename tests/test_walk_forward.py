"""One market replayed with the models that a miner would have had at each prompt."""

import re
import shutil
from dataclasses import replace

import numpy as np
import orjson
import pytest

from backtest_store import load_prediction, load_scores, prediction_file, scores_file
from config import DAY_S, Frequency
from domain import MarketHistory
from errors import ConfigError, DataError, InsufficientHistory, ModelError
from model_store import publish_set, published_sets
from replay import known_at_prompt, last_prompt, realised_path, usual_request
from scoring import score_paths
from settings import Settings
from tests.conftest import TRAINED_DAYS_BEFORE_END
from tests.pools import do_here
from walk_forward import (
    EngineViews,
    Market,
    Prompts,
    Scores,
    _past,
    _set_folder,
    plan_market,
    replay_jobs,
    training_job,
    training_moment,
)

DAYS = {Frequency.HF: 4.0, Frequency.LF: 8.0}  # as the fixture `trained` has them


def keep_as_trained(market, result):
    """Put a set into the market's work folder, as if it had been trained there."""
    history = market.history()
    past = _past(market, history, training_moment(market, history, market.train_until))
    folder = _set_folder(market, past)
    publish_set(folder, market.asset, market.frequency, result.model_id, result.files)


@pytest.fixture
def make_market(archive, archive_dir, trained, tmp_path):
    """Markets of the small archive, whose work folder has the trained sets already."""

    def make(frequency=Frequency.HF, work_dir=tmp_path / "work", **changes):
        settings = Settings(source="archive", archive_dir=archive_dir, days=DAYS[frequency])
        options = {
            "train_until": archive.now() - TRAINED_DAYS_BEFORE_END * DAY_S + 60,
            "baselines": ("reference", "ewma_t"),
        }
        market = Market(
            asset="BTC",
            frequency=frequency,
            settings=settings,
            work_dir=work_dir,
            **(options | changes),
        )
        if market.train_until is not None:
            keep_as_trained(market, trained[frequency])
        return market

    return make


def asked(count=4, **changes):
    return Prompts(**{"start": None, "end": None, "count": count, "times": None, **changes})


def replayed(market, prompts):
    """All scores of the prompts, by start time."""
    plan = plan_market(market, prompts)
    for moment in plan.missing:
        do_here(replay_jobs(plan, moment, 1, Scores(plan)))
    return {time: load_scores(plan.scores)[time] for time in plan.times.tolist()}


# ---------------------------------------------------------------- what models may know


@pytest.mark.parametrize("frequency", Frequency)
@pytest.mark.parametrize("train_until", [None, 1_768_000_000 // 60 * 60])
def test_models_never_know_more_than_the_prompt(make_market, frequency, train_until):
    market = replace(make_market(frequency), train_until=train_until)
    history = market.history()
    first = train_until or 1_767_950_000 // 60 * 60
    for start in (first, first + 60, first + 7 * 3600):
        moment = training_moment(market, history, start)
        assert moment <= start - history.scored_lag_s
        known = known_at_prompt(history, start)
        assert len(_past(market, history, moment).bars) <= len(known.bars)


def test_walking_forward_models_are_at_most_a_cadence_old_and_shared(make_market):
    market = make_market(train_until=None)
    history = market.history()
    starts = 1_768_000_020 + 900 * np.arange(400)
    moments = [training_moment(market, history, int(start)) for start in starts]
    ages = starts - 60 - np.array(moments)
    assert 0 <= ages.min() < 900
    assert DAY_S - 900 <= ages.max() < DAY_S
    assert len(set(moments)) == 6  # midnights, for a little more than four days


def test_prompts_before_the_end_of_training_are_refused(make_market):
    market = make_market()
    with pytest.raises(ConfigError, match=r"BTC hf: .* is before --train-until .* its outcome"):
        plan_market(market, asked(start=market.train_until - 3600))
    times = np.array([market.train_until - 60])
    with pytest.raises(ConfigError, match="is before --train-until"):
        plan_market(market, asked(times=times))


def test_no_bars_before_training_is_one_sentence(make_market):
    market = make_market(train_until=None)
    history = market.history()
    with pytest.raises(DataError, match=r"no bars are known by .* choose a later --train-until"):
        _past(market, history, int(history.bars.open_ts[0]))


def test_too_little_history_to_learn_from_is_one_sentence(make_market):
    market = make_market(train_until=None)
    moment = int(market.history().bars.open_ts[0]) + 6 * 3600
    with pytest.raises(
        InsufficientHistory, match=r"too short a time.*or choose a later --train-until"
    ):
        do_here([training_job(market, moment, list)])


@pytest.mark.usefixtures("quick_search")
def test_what_is_missing_is_trained_once_and_answers(make_market):
    market = make_market(work_dir=make_market().work_dir / "fresh", train_until=None)
    start = last_prompt(market.history())
    plan = plan_market(market, asked(times=np.array([start])))
    assert len(plan.untrained) == 1
    do_here([training_job(market, plan.untrained[0], list)])
    again = plan_market(market, asked(times=np.array([start])))
    assert again.untrained == ()
    scores = replayed(market, asked(times=np.array([start])))
    folder = _set_folder(market, _past(market, market.history(), plan.untrained[0]))
    (found,) = published_sets(folder, "BTC", Frequency.HF)[:1]
    assert scores[start]["model_id"] == found.name


def test_a_set_that_was_damaged_since_is_named_with_its_folder_and_trained_again(make_market):
    market = make_market()
    plan = plan_market(market, asked(2))
    (moment,) = plan.missing
    folder = _set_folder(market, _past(market, market.history(), moment))
    (found,) = published_sets(folder, "BTC", Frequency.HF)
    tree = next(found.glob("*.txt"))
    tree.write_text("junk")
    told = rf"{re.escape(str(tree))} .*; remove {re.escape(str(found.parent))} and repeat"
    with pytest.raises(ModelError, match=told):
        replay_jobs(plan, moment, 1, Scores(plan))
    shutil.rmtree(found.parent)
    assert plan_market(market, asked(2)).untrained == (moment,)


# ---------------------------------------------------------------- what is kept


def test_what_was_scored_is_not_scored_again(make_market):
    market = make_market()
    assert plan_market(market, asked(4)).todo == 4
    first = replayed(market, asked(4))
    assert plan_market(market, asked(4)).todo == 0
    # The first and the last of seven are also among four, and one between.
    more = plan_market(market, asked(7))
    assert more.todo < 7
    assert replayed(market, asked(4)) == first


def test_chunks_and_order_change_no_byte(make_market, tmp_path):
    whole = replayed(make_market(), asked(5))
    market = make_market(work_dir=tmp_path / "other")
    plan = plan_market(market, asked(5))
    ((moment, times),) = plan.missing.items()
    for chunk in (times[3:], times[:1], times[1:3]):
        part = replace(plan, missing={moment: chunk})
        do_here(replay_jobs(part, moment, 1, Scores(part)))
    assert load_scores(plan.scores) == whole


@pytest.mark.parametrize("frequency", Frequency)
def test_in_closed_form_too_chunks_and_order_change_no_byte(make_market, tmp_path, frequency):
    options = {"closed_form": True, "baselines": ("reference", "ewma_t", "har", "oracle")}
    whole = replayed(make_market(frequency, **options), asked(5))
    market = make_market(frequency, work_dir=tmp_path / "other", **options)
    plan = plan_market(market, asked(5))
    ((moment, times),) = plan.missing.items()
    for chunk in (times[3:], times[:1], times[1:3]):
        part = replace(plan, missing={moment: chunk})
        do_here(replay_jobs(part, moment, 1, Scores(part)))
    assert load_scores(plan.scores) == whole
    assert plan_market(market, asked(5)).todo == 0


@pytest.mark.parametrize(
    "change",
    ["seed", "days", "profile", "train_until", "baselines", "closed_form", "walk_forward"],
)
def test_other_settings_have_other_files(make_market, change):
    market = make_market()
    settings = market.settings
    changed = {
        "seed": replace(market, settings=replace(settings, seed=1)),
        "days": replace(market, settings=replace(settings, days=3.0)),
        "profile": replace(market, settings=replace(settings, profile="2026-05")),
        "train_until": replace(market, train_until=market.train_until + 60),
        "baselines": replace(market, baselines=("reference",)),
        "closed_form": replace(market, closed_form=True),
        "walk_forward": replace(market, train_until=None),
    }[change]
    times = np.array([last_prompt(market.history())])
    here = plan_market(market, asked(times=times))
    there = plan_market(changed, asked(times=times))
    assert here.scores != there.scores


def test_scores_are_those_of_the_exported_answers(make_market, tmp_path):
    market = make_market(export_dir=tmp_path / "out")
    scores = replayed(market, asked(3))
    history = market.history()
    for start, entry in scores.items():
        request = usual_request(history, start)
        paths = load_prediction(prediction_file(tmp_path / "out", request))
        assert paths is not None
        assert paths.shape == (1000, 61)
        card = score_paths(
            paths, realised_path(history, request), market.competition, increment_s=60
        )
        assert entry["scores"]["engine"]["total"] == card.total
        assert entry["scores"]["engine"]["intervals"] == dict(card.by_interval)


def test_an_export_that_is_missing_is_made_and_a_conflicting_one_refused(make_market, tmp_path):
    market = make_market()
    replayed(market, asked(2))
    exporting = replace(market, export_dir=tmp_path / "out")
    assert plan_market(exporting, asked(2)).todo == 2
    replayed(exporting, asked(2))
    assert plan_market(exporting, asked(2)).todo == 0
    start = int(plan_market(exporting, asked(2)).times[0])
    file = prediction_file(tmp_path / "out", usual_request(market.history(), start))
    document = orjson.loads(file.read_bytes())
    document["paths"][7][5] *= 1.5
    file.write_bytes(orjson.dumps(document))
    with pytest.raises(DataError, match="holds another answer"):
        plan_market(exporting, asked(2))


def test_views_for_the_report_are_those_of_the_replay(make_market, tmp_path):
    market = make_market(export_dir=tmp_path / "out")
    plan = plan_market(market, asked(3))
    scores = replayed(market, asked(3))
    views = EngineViews(market, plan.times)
    for start in plan.times.tolist():
        view = views(known_at_prompt(market.history(), start))
        assert view.model_id == scores[start]["model_id"]
        assert view.anchor_ts == start - 60


def test_corrupting_everything_after_a_prompt_changes_no_answer(
    archive, make_market, write_bars, tmp_path
):
    """Through the whole back-test: other files, read, replayed and exported."""
    market = make_market(baselines=("ewma_t",))
    history: MarketHistory = market.history()
    start = last_prompt(history) - 6 * 3600
    known = start - 60
    honest = replayed(market, asked(times=np.array([start])))[start]

    rng = np.random.default_rng(3)
    bars = history.price_bars
    noise = bars.close * np.exp(rng.normal(size=len(bars)))
    spoiled = replace(bars, close=np.where(bars.close_ts <= known, bars.close, noise))
    folder = tmp_path / "spoiled"
    write_bars(folder, "BTC", spoiled)
    settings = replace(market.settings, archive_dir=folder)
    other = replace(market, settings=settings)
    blind = replayed(other, asked(times=np.array([start])))[start]
    assert blind["answer"] == honest["answer"]
    assert blind["model_id"] == honest["model_id"]
    assert blind["scores"] != honest["scores"]


def test_scores_of_different_bars_are_not_mixed(make_market, write_bars, tmp_path):
    market = make_market()
    bars = market.history().price_bars
    write_bars(tmp_path / "other", "BTC", replace(bars, close=bars.close * 1.0000001))
    other = replace(market, settings=replace(market.settings, archive_dir=tmp_path / "other"))
    times = np.array([last_prompt(market.history())])
    one, two = (plan_market(each, asked(times=times)) for each in (market, other))
    assert one.bars != two.bars
    assert one.scores != two.scores
    assert one.scores.parent == scores_file(market.work_dir, "BTC", Frequency.HF, "x").parent
