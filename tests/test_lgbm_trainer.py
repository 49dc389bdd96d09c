"""Training: deterministic, without leakage, every part weighed out of sample."""

from dataclasses import replace

import numpy as np
import orjson
import pytest
from scipy.signal import lfilter
from threadpoolctl import threadpool_limits

import lgbm_trainer
import training_rows
from config import DAY_S, FREQUENCIES, Frequency
from data_fetcher import SimulatedSource
from domain import Bars
from errors import InsufficientHistory
from features import return_grid
from lgbm_predictor import Calibration, centre_file, centre_names, scale_names
from lgbm_trainer import fit_window, progress_steps, train
from model_store import MANIFEST, digest
from pool_store import histories_of
from pooling import fit_pooled_prior
from protocol import protocol_profile
from training_rows import rolling_splits

HF, LF = FREQUENCIES[Frequency.HF], FREQUENCIES[Frequency.LF]
PROFILE = protocol_profile("2026-09")

pytestmark = pytest.mark.usefixtures("quick_search")


@pytest.fixture
def past(archive):
    """BTC at a frequency, as it was known two days before the archive ends."""
    return lambda frequency: archive.load("BTC", frequency).history.known_at(
        archive.now() - 2 * DAY_S
    )


@pytest.fixture
def few_rounds(monkeypatch):
    """Leave the fits that a test does not look at as small as can be."""
    monkeypatch.setattr(lgbm_trainer, "MAX_ROUNDS", 2)
    monkeypatch.setattr(lgbm_trainer, "SHAPE_PROMPTS", dict.fromkeys(Frequency, 0))


def without(history, rows):
    """The history with some of its bars missing."""
    keep = np.setdiff1d(np.arange(len(history.bars)), rows)
    bars = pick(history.bars, keep)
    return replace(history, bars=bars, price_bars=bars)


def pick(bars, rows):
    columns = {
        name: getattr(bars, name)[rows]
        for name in ("open_ts", "open", "high", "low", "close", "volume")
    }
    return Bars(**columns, bar_s=bars.bar_s, feed=bars.feed)


def with_close(history, close):
    bars = replace(history.bars, close=close)
    return replace(history, bars=bars, price_bars=bars)


def corrupted_from(history, row, seed=1):
    """The history with wild prices from a bar on."""
    close = history.bars.close.copy()
    noise = 0.05 * np.random.default_rng(seed).standard_normal(len(close) - row)
    close[row:] *= np.exp(noise)
    return with_close(history, close)


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize(("frequency", "days"), [(Frequency.HF, 4), (Frequency.LF, 8)])
def test_the_same_bars_and_seed_give_the_same_files_byte_for_byte(trained, past, frequency, days):
    again = train(past(frequency), days=days, seed=0, profile=PROFILE)
    assert again.files == trained[frequency].files
    assert again.model_id == trained[frequency].model_id


@pytest.mark.usefixtures("few_rounds")
def test_another_seed_gives_other_models_under_another_name(past):
    one, other = (
        train(past(Frequency.LF), days=6.5, seed=seed, profile=PROFILE) for seed in (0, 1)
    )
    assert one.files[centre_file(300)] != other.files[centre_file(300)]
    assert one.model_id != other.model_id


@pytest.mark.usefixtures("few_rounds")
def test_bars_before_the_asked_days_and_their_warm_up_change_nothing():
    days = 6.5 + lgbm_trainer.WARM_UP_DAYS
    history = SimulatedSource(days=days + 3, assets=("BTC",)).load("BTC", Frequency.LF).history
    old = len(history.bars) - round(days * LF.bars_per_day) - 1  # a return needs the bar before
    close = history.bars.close.copy()
    close[:old] *= np.linspace(1, 2, old)
    one, other = (
        train(entry, days=6.5, seed=0, profile=PROFILE)
        for entry in (history, with_close(history, close))
    )
    assert one.files == other.files


# ---------------------------------------------------------------- stochastic lead sampling


def test_every_base_time_teaches_exactly_one_lead():
    rows = np.arange(100, 1_103)
    groups = lgbm_trainer._rows_by_lead(HF, rows, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), rows)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("few_rounds")
def test_training_rows_do_not_grow_with_the_number_of_leads(past, monkeypatch):
    monkeypatch.setattr(training_rows, "FOLDS", 1)
    totals = {}
    for count in (6, 12, 24):
        bars = np.linspace(60 / count, 60, count).round().astype(int)
        spec = replace(HF, leads_s=tuple((60 * bars).tolist()))
        monkeypatch.setattr(lgbm_trainer, "FREQUENCIES", {Frequency.HF: spec})
        result = train(past(Frequency.HF), days=4, seed=0, profile=PROFILE)
        assert len(result.leads) == count
        totals[count] = sum(lead.rows for lead in result.leads)
    assert max(totals.values()) - min(totals.values()) <= 24  # one run of the longest list
    assert totals[24] > 4_000


# ---------------------------------------------------------------- no leakage


def bars_of(history):
    recent, grid, warm_up = lgbm_trainer._recent(history, days=365)
    return lgbm_trainer._Bars(history=recent, grid=grid, warm_up=warm_up, priors=())


@pytest.mark.usefixtures("few_rounds")
def test_bars_after_the_moment_of_training_change_no_byte(archive):
    history = archive.load("BTC", Frequency.LF).history
    until = archive.now() - 3 * DAY_S
    later = int(np.searchsorted(history.bars.close_ts, until, "right"))
    assert later < len(history.bars) - 800
    one, other = (
        train(entry.known_at(until), days=6.5, seed=0, profile=PROFILE)
        for entry in (history, corrupted_from(history, later))
    )
    assert one.files == other.files


def test_a_fold_is_judged_one_horizon_after_what_it_learned_from():
    for fold in rolling_splits(20_000, LF.horizon_bars):
        assert fold.begin - fold.train_end == LF.horizon_bars


def test_a_fold_learns_nothing_from_the_bars_that_judge_it(past):
    history = past(Frequency.HF)
    fold = rolling_splits(len(return_grid(history.bars)), HF.horizon_bars)[1]

    def learned_from(entry):
        market = bars_of(entry).market(fold.train_end)
        rows = training_rows.training_rows(market, fold.train_end)
        rng = np.random.default_rng(0)
        blend = lgbm_trainer._fit_blend(market, fold.train_end, rng)
        scale = lgbm_trainer._scale_rows(market, blend, rows, fold.train_end, rng)
        by_lead = lgbm_trainer._rows_by_lead(HF, rows, rng)
        centres = [
            lgbm_trainer._centre_rows(market, lead, by_lead[lead], fold.train_end, rng)
            for lead in range(len(HF.leads_s))
        ]
        sets = [np.column_stack([part.data, part.label, part.weight]) for part in (scale, *centres)]
        return [market.standardiser.to_dict(), [part.to_dict() for part in blend], sets]

    with threadpool_limits(1):
        seen = learned_from(history)
        corrupted = learned_from(corrupted_from(history, fold.train_end))
        leaking = learned_from(corrupted_from(history, fold.train_end - 200))
    assert seen[:2] == corrupted[:2]
    for one, other in zip(seen[2], corrupted[2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert seen[1] != leaking[1]  # the corruption is one that would be seen


# ---------------------------------------------------------------- too little history


def test_too_short_a_time_is_refused_with_the_flag_that_makes_it_longer(past):
    with pytest.raises(InsufficientHistory) as refusal:
        train(past(Frequency.HF), days=2, seed=0, profile=PROFILE)
    assert str(refusal.value) == (
        "BTC hf: 2880 bars over 2.0 days are too short a time; training needs 3 days: there are "
        "earlier ones, so raise --days."
    )


def test_what_is_missing_is_told_where_there_is_no_more(past):
    history = past(Frequency.HF)
    two_days = replace(history, bars=history.bars.between(history.bars.end_ts - 2 * DAY_S, None))
    with pytest.raises(InsufficientHistory, match=r"needs 3 days: collect or import more\.$"):
        train(two_days, days=365, seed=0, profile=PROFILE)
    n = len(history.bars)
    sparse = without(history, np.setdiff1d(np.arange(n - 1), np.arange(0, n, 100)))
    with pytest.raises(
        InsufficientHistory, match=r" are too few bars; training needs 720: collect or import more"
    ):
        train(sparse, days=365, seed=0, profile=PROFILE)


def test_a_market_that_rested_where_it_would_be_judged_is_refused(past):
    history = past(Frequency.HF).known_at(1_768_000_000)
    n = len(history.bars)
    one_bar_after_the_rest = without(history, np.arange(n - 2_000, n - 1))
    with pytest.raises(
        InsufficientHistory, match=r"BTC hf: 3761 bars over 4\.0 days are too few to"
    ):
        train(one_bar_after_the_rest, days=4, seed=0, profile=PROFILE)


@pytest.mark.usefixtures("few_rounds")
def test_a_fold_in_which_the_market_rested_is_left_out(past):
    history = past(Frequency.HF)
    n = len(history.bars)
    begin, _, end = (fold.begin for fold in rolling_splits(4 * HF.bars_per_day, HF.horizon_bars))
    start = n - 4 * HF.bars_per_day
    rested = without(history, np.arange(start + begin - 10, start + end + 10))
    assert all(lead.rows > 100 for lead in train(rested, days=4, seed=0, profile=PROFILE).leads)


@pytest.mark.usefixtures("few_rounds")
def test_a_short_history_is_trained_with_a_warning_that_says_how_short(past):
    short = train(past(Frequency.LF), days=6.5, seed=0, profile=PROFILE)
    assert short.warnings == (
        "BTC lf: trained on only 6.5 days of bars; below 30 days the calibration is rough.",
    )
    assert short.days == pytest.approx(6.5)


@pytest.mark.usefixtures("few_rounds")
def test_a_long_history_is_trained_without_a_warning():
    history = SimulatedSource(days=31, assets=("BTC",)).load("BTC", Frequency.LF).history
    assert train(history, days=365, seed=0, profile=PROFILE).warnings == ()


# ---------------------------------------------------------------- what a set holds


def test_progress_is_told_of_every_step(past):
    steps: list[str] = []
    train(past(Frequency.HF), days=4, seed=0, profile=PROFILE, progress=steps.append)
    assert len(steps) == progress_steps(Frequency.HF)
    assert set(steps) == {"scale", "path shape", *(f"centre {lead} s" for lead in HF.leads_s)}


@pytest.mark.parametrize("frequency", list(Frequency))
def test_the_manifest_says_what_the_set_is(trained, archive, frequency):
    spec, result = FREQUENCIES[frequency], trained[frequency]
    manifest = orjson.loads(result.files[MANIFEST])
    until = archive.now() - 2 * DAY_S
    assert (manifest["asset"], manifest["frequency"]) == ("BTC", frequency.value)
    assert (manifest["source"], manifest["feed"]) == ("archive", "archive:BTC_1m")
    assert manifest["trained_until"] == until
    assert until - manifest["trained_from"] == {"hf": 4, "lf": 8}[frequency.value] * DAY_S
    assert manifest["seed"] == 0
    assert manifest["features"] == {"scale": scale_names(spec), "centre": centre_names(spec)}
    assert manifest["files"] == {
        name: digest(data) for name, data in result.files.items() if name != MANIFEST
    }
    assert set(manifest["libraries"]) == {"lightgbm", "numpy", "scipy"}
    assert set(manifest["weights"]["centre"]) == {str(lead) for lead in spec.leads_s}
    assert manifest["path_shape"]["tail_dof"] > 2
    assert manifest["leads"]["bucket_ends"] == list(spec.bucket_ends)
    assert [entry["lead_s"] for entry in manifest["validation"]] == list(spec.leads_s)
    for entry, lead in zip(manifest["validation"], result.leads, strict=True):
        assert entry["rows"] == lead.rows > 0
        assert entry["best_iteration"] >= 1
        assert np.isfinite([entry["centre_skill"], entry["scale_skill"]]).all()


@pytest.mark.parametrize("frequency", list(Frequency))
def test_every_centre_is_kept_also_without_weight(trained, frequency):
    result = trained[frequency]
    files = {centre_file(lead) for lead in FREQUENCIES[frequency].leads_s}
    assert files < set(result.files)
    weights = [lead.centre_weight for lead in result.leads]
    assert 0.0 in weights  # a random walk: what is kept is not used
    for lead in result.leads:
        if lead.centre_weight == 0.0:
            assert lead.centre_skill == 0.0


def test_the_calibration_survives_being_written(trained):
    for result in trained.values():
        stored = orjson.loads(result.files["calibration.json"])
        assert orjson.loads(orjson.dumps(Calibration.from_dict(stored).to_dict())) == stored


@pytest.mark.parametrize("spec", [HF, LF])
def test_rows_lose_half_their_weight_in_one_recency_half_life(past, spec):
    history = past(spec.frequency)
    bars = bars_of(history)
    n = len(bars.grid)
    market = bars.market(n)
    rows = training_rows.training_rows(market, n)
    data = lgbm_trainer._centre_rows(market, 0, rows, n, np.random.default_rng(0))
    known = len(data.weight)
    age_days = (market.frame.end_ts[-1] - market.frame.end_ts[rows[:known]]) / DAY_S
    half_life = {Frequency.HF: 14, Frequency.LF: 60}[spec.frequency]
    np.testing.assert_allclose(data.weight, 0.5 ** (age_days / half_life))
    assert age_days.max() > 11


# ---------------------------------------------------------------- weights are earned


def test_a_market_that_follows_its_last_move_earns_its_centre_a_weight(archive):
    history = archive.load("BTC", Frequency.LF).history
    shocks = 5e-4 * np.random.default_rng(3).standard_t(5, len(history.bars))
    moves = lfilter([1.0], [1.0, -0.4], shocks)
    leaning = with_close(history, 1e5 * np.exp(np.cumsum(moves)))
    first, *_ = train(leaning, days=365, seed=0, profile=PROFILE).leads
    # one step ahead an AR(1) of 0.4 explains 0.4² = 16 % of the variance
    assert 0.04 < first.centre_skill < 0.17
    assert first.centre_weight > 0.5


@pytest.mark.usefixtures("few_rounds")
def test_a_blend_that_sees_more_than_the_ewma_earns_its_share(archive):
    """Loud quarters of an hour at no fixed time: two hours' average is slow to notice."""
    history = archive.load("BTC", Frequency.HF).history
    loud = np.where(history.bars.open_ts // 900 % 7 == 0, 4.0, 1.0)
    moves = 3e-4 * loud * np.random.default_rng(3).standard_normal(len(loud))
    result = train(
        with_close(history, 1e5 * np.exp(np.cumsum(moves))), days=9, seed=0, profile=PROFILE
    )
    shares = orjson.loads(result.files[MANIFEST])["weights"]["blend_shares"]
    assert min(shares[:4]) >= 0.5  # the first quarter of an hour
    assert all(lead.scale_skill > 0.01 for lead in result.leads[:4])


# ---------------------------------------------------------------- leaning on other markets


def test_the_window_of_fits_begins_with_the_first_fold_and_ends_with_the_bars(past):
    history = past(Frequency.HF)
    recent, grid, _ = lgbm_trainer._recent(history, days=8)
    first, last = fit_window(history, 8)
    fold = rolling_splits(len(grid), HF.horizon_bars)[0]
    assert first == recent.bars.open_ts[0] + fold.train_end * HF.bar_s
    assert last == history.bars.end_ts


@pytest.mark.usefixtures("few_rounds")
def test_a_short_history_leans_on_the_pool_that_was_known(past):
    history = past(Frequency.LF)
    short = history.known_at(int(history.bars.open_ts[0]) + 9 * DAY_S)
    first, last = fit_window(short, 365)
    market = SimulatedSource(end_ts=first, days=20, assets=("BTC", "XAU"))
    known = fit_pooled_prior(histories_of(market, Frequency.LF), first, ())
    assert known is not None
    later = replace(known, until=last + 1, blend=())
    alone, leaning, careless = (
        train(short, days=365, seed=0, profile=PROFILE, priors=priors)
        for priors in ((), (known,), (known, later))
    )
    assert leaning.files != alone.files
    assert leaning.files == careless.files
    manifests = [orjson.loads(result.files[MANIFEST]) for result in (alone, leaning)]
    assert [manifest["pooled_with"] for manifest in manifests] == [[], ["BTC", "XAU"]]
