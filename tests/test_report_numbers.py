"""The numbers of a report equal those of the document it is made from."""

import numpy as np
import pytest

from config import DAY_S
from protocol import protocol_profile
from report_numbers import (
    Coverage,
    against,
    by_hour,
    by_interval,
    by_weekday,
    coverage_by_lead,
    over_time,
    read_market,
    simulated_rewards,
    worst_prompts,
)

# Monday 2025-12-01 05:00 UTC: midnight in New York.
START_TS = 1_764_565_200
HOUR_S = 3_600
LEVELS = {"engine": 0.97, "reference": 1.2, "ewma_t": 1.0, "har": 0.98, "oracle": 0.93}


def card(total, names):
    return {"total": total, "intervals": {name: total / len(names) for name in names}}


def entry(*, prompts=48, spacing_s=HOUR_S, asset="BTC", frequency="hf", levels=LEVELS, seed=0):
    """A market whose scores are those levels times a common, random size."""
    rng = np.random.default_rng(seed)
    names = ("1min", "0_5min_gaps", "0_10min_gaps", "volatility_60min", "volatility_5min")
    rows = []
    for index in range(prompts):
        size = float(rng.uniform(400, 800))
        scores = {
            name: card(level * size * float(rng.uniform(0.98, 1.02)), names)
            for name, level in levels.items()
        }
        rows.append(
            {
                "start_ts": START_TS + index * spacing_s,
                "scores": scores,
                "pit": {"60": float(rng.uniform()), "3600": None},
                "model_id": "a",
                "rung": "lightgbm",
            }
        )
    competition = "crypto-1h" if frequency == "hf" else "crypto-24h"
    return {
        "asset": asset,
        "frequency": frequency,
        "competition": competition,
        "prompts": rows,
        "pit_histogram": {"1min": [5] * 20},
    }


def ratio_to(source, name, interval=None):
    found = against(read_market(source), name, interval=interval)
    assert found is not None
    return found.ratio


def totals(source, name):
    return np.array([prompt["scores"][name]["total"] for prompt in source["prompts"]])


def test_ratios_are_those_of_mean_scores():
    source = entry()
    expected = totals(source, "engine").mean() / totals(source, "har").mean()
    assert ratio_to(source, "har") == pytest.approx(expected)


def test_prompts_on_which_somebody_missed_are_left_out_for_all_and_counted():
    source = entry()
    source["prompts"][3]["scores"]["har"] = {"total": None, "intervals": {}}
    source["prompts"][5]["scores"]["engine"]["total"] = -1.0
    market = read_market(source)
    assert market.missed == 2
    assert all(len(values) == 46 for values in market.totals.values())
    assert np.isfinite(list(market.totals.values())).all()


def test_hours_and_weekdays_are_those_of_new_york():
    source = entry(prompts=48)
    hours, days = by_hour(read_market(source)), by_weekday(read_market(source))
    assert [hour.prompts for hour in hours] == [2] * 24
    assert [(day.label, day.prompts) for day in days if day.prompts] == [("Mon", 24), ("Tue", 24)]
    first = [0, 24]  # prompts at midnight
    ratio = totals(source, "engine")[first].sum() / totals(source, "ewma_t")[first].sum()
    assert hours[0].ratio == pytest.approx(ratio)


def test_a_group_without_prompts_has_no_ratio():
    assert np.isnan(by_weekday(read_market(entry(prompts=3)))[6].ratio)


def test_periods_hold_every_prompt_once():
    source = entry(prompts=50)
    periods = over_time(read_market(source))
    ours = periods.scores["engine"]
    edges = np.linspace(0, 50 * HOUR_S - HOUR_S + 1, len(ours) + 1)
    place = np.searchsorted(edges, np.arange(50) * HOUR_S, "right") - 1
    for period in range(len(ours)):
        assert ours[period] == pytest.approx(totals(source, "engine")[place == period].mean())


def test_an_empty_period_is_unknown_and_not_zero():
    source = entry(prompts=40)
    for prompt in source["prompts"][20:]:
        prompt["start_ts"] += 30 * DAY_S
    ours = over_time(read_market(source)).scores["engine"]
    assert np.isnan(ours[1:-1]).any()
    assert np.nanmin(ours) > 100


def test_intervals_add_up_and_families_have_a_row_of_their_own():
    source = entry()
    rows = {row.name: row for row in by_interval(read_market(source))}
    mean = totals(source, "engine").mean()
    assert rows["all gaps"].score == pytest.approx(0.4 * mean)
    assert rows["volatility term"].score == pytest.approx(0.4 * mean)
    assert sum(row.share for row in rows.values() if not row.member) == pytest.approx(1)
    assert {name for name, row in rows.items() if row.member} == {
        "0_5min_gaps", "0_10min_gaps", "volatility_60min", "volatility_5min",
    }  # fmt: skip
    one = rows["1min"].against["ewma_t"]
    assert one is not None
    assert one.ratio == pytest.approx(ratio_to(source, "ewma_t", "1min"))


def test_coverage_counts_outcomes_inside_and_leaves_unknown_leads_out():
    source = entry(prompts=100)
    pits = np.array([prompt["pit"]["60"] for prompt in source["prompts"]])
    found = coverage_by_lead(read_market(source))
    assert list(found) == [60]
    assert [one.nominal for one in found[60]] == [0.5, 0.8, 0.95]
    assert found[60][1].found == pytest.approx(np.mean((pits >= 0.1) & (pits <= 0.9)))
    assert 0 < found[60][1].error < 0.1


@pytest.mark.parametrize(
    ("found", "error", "verdict"),
    [
        (0.82, 0.001, "right"),
        (0.90, 0.06, "right"),
        (0.90, 0.02, "too wide"),
        (0.72, 0.01, "too narrow"),
    ],
)
def test_coverage_is_right_within_three_points_or_two_errors(found, error, verdict):
    assert Coverage(nominal=0.8, found=found, error=error).verdict == verdict


def test_the_worst_prompts_have_the_highest_ratio_and_name_what_cost_most():
    source = entry()
    bad = source["prompts"][7]["scores"]["engine"]
    bad["intervals"]["0_10min_gaps"] += 500
    bad["total"] += 500
    worst = worst_prompts(read_market(source))
    assert len(worst) == 10
    assert worst[0].start_ts == source["prompts"][7]["start_ts"]
    assert worst[0].costliest == "0_10min_gaps"
    ratios = [prompt.ratio for prompt in worst]
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) >= np.median(totals(source, "engine") / totals(source, "ewma_t"))


def test_without_ewma_t_the_next_baseline_is_the_yardstick():
    levels = {name: LEVELS[name] for name in ("engine", "reference", "har")}
    assert read_market(entry(levels=levels)).yardstick == "har"
    alone = read_market(entry(levels={"engine": 1.0}))
    assert alone.yardstick is None
    assert worst_prompts(alone) == []


def rewards(*sources):
    return simulated_rewards(
        [read_market(source) for source in sources], protocol_profile("2026-09")
    )


def test_the_best_of_the_field_is_paid_most_and_the_oracle_does_not_compete():
    (found,) = rewards(entry(prompts=60))
    assert found.name == "crypto-1h"
    assert {row.name for row in found.rows} == {"engine", "reference", "ewma_t", "har"}
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found.rows[0].share == max(row.share for row in found.rows)


def test_a_long_test_is_several_windows_and_a_short_one_is_one():
    (short,) = rewards(entry(prompts=20))
    (long,) = rewards(entry(prompts=64, spacing_s=6 * HOUR_S))
    assert (short.windows, long.windows) == (1, 3)
    engine = next(row for row in long.rows if row.name == "engine")
    assert engine.lowest <= engine.share <= engine.highest


def test_a_market_that_no_competition_scores_is_not_paid():
    assert rewards(entry(asset="XAU")) == []
    found = rewards(entry(asset="XAU", frequency="lf"), entry(frequency="lf"))
    assert [competition.markets for competition in found] == [("BTC lf",), ("XAU lf",)]
