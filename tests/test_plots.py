"""Fan charts."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest

from config import Frequency
from domain import Bars, Diagnostics, Forecast, ForecastRequest, MarketHistory
from errors import StateError
from plots import (
    coverage_figure,
    dot_figure,
    fan_chart,
    line_figure,
    loss_figure,
    pit_figure,
    save_figure,
    sideways_dot_figure,
    small_fan,
    svg_markup,
)

START_TS = 1_764_685_500
PNG = b"\x89PNG\r\n\x1a\n"


def history(*, source="archive", gap=False):
    open_ts = START_TS - 60 * np.arange(3000, 1, -1, dtype=np.int64)
    if gap:
        open_ts = open_ts[(open_ts < START_TS - 1800) | (open_ts > START_TS - 600)]
    rng = np.random.default_rng(1)
    close = 90_000 * np.exp(np.cumsum(rng.normal(0, 5e-4, len(open_ts))))
    nan = np.full(len(close), np.nan)
    bars = Bars(
        open_ts=open_ts,
        open=nan,
        high=nan,
        low=nan,
        close=close,
        volume=nan,
        bar_s=60,
        feed="test",
    )
    return MarketHistory(
        asset="BTC", frequency=Frequency.HF, bars=bars, price_bars=bars, source=source
    )


def forecast(past):
    request = ForecastRequest(
        asset="BTC", start_ts=START_TS, increment_s=60, length_s=3600, num_paths=200
    )
    steps = np.random.default_rng(2).normal(0, 5e-4, (200, request.n_points))
    diagnostics = Diagnostics(
        rung="full",
        frequency="hf",
        anchor_price=past.anchor_price,
        anchor_ts=past.anchor_ts,
        price_age_s=0,
        model_id=None,
        trained_until=None,
        models_saw_later_bars=False,
    )
    paths = past.anchor_price * np.exp(np.cumsum(steps, axis=1))
    return Forecast(request=request, paths=paths, diagnostics=diagnostics)


def chart(past, **extra):
    return fan_chart(forecast(past), past, title="BTC", subtitle="an hour", **extra)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_chart_shows_what_was_known_and_the_bands():
    assert legend(chart(history())) == [
        "known",
        "95 % of paths",
        "80 % of paths",
        "50 % of paths",
        "median",
    ]


def test_what_came_true_is_drawn_when_it_is_known():
    past = history()
    realised = np.median(forecast(past).paths, axis=0)
    realised[40:] = np.nan
    assert "came true" in legend(chart(past, realised=realised))


@pytest.mark.parametrize(("source", "marked"), [("simulated", True), ("archive", False)])
def test_a_simulated_market_is_labelled_as_such(source, marked):
    texts = [text.get_text() for text in chart(history(source=source)).axes[0].texts]
    assert ("SIMULATED MARKET" in texts) is marked


def test_nothing_after_the_start_is_drawn_as_known():
    past = history()
    known = chart(past).axes[0].lines[0]
    assert known.get_label() == "known"
    assert known.get_xdata().max() * 86_400 <= START_TS + 1e-3


def test_a_gap_is_not_bridged():
    line = chart(history(gap=True)).axes[0].lines[0]
    assert np.isnan(line.get_ydata()).sum() == 1


def test_the_bands_are_the_quantiles_of_the_paths():
    past = history()
    axes = chart(past).axes[0]
    outer = axes.collections[0].get_paths()[0].get_extents()
    low, high = np.quantile(forecast(past).paths, (0.025, 0.975), axis=0)
    assert (outer.ymin, outer.ymax) == pytest.approx((low.min(), high.max()))


def test_a_wild_path_leaves_the_picture_instead_of_setting_the_scale():
    past = history()
    tame = forecast(past)
    wild = replace(tame, paths=np.vstack([tame.paths[:1] * 3, tame.paths[1:]]))
    limits = [
        fan_chart(entry, past, title="", subtitle="").axes[0].get_ylim()[1]
        for entry in (tame, wild)
    ]
    assert limits[1] < 1.01 * limits[0]


def test_labels_at_the_right_edge_do_not_overlap():
    axes = chart(history()).axes[0]
    low, high = axes.get_ylim()
    heights = sorted(
        (text.xy[1] - low) / (high - low) for text in axes.texts if hasattr(text, "xy")
    )
    assert len(heights) >= 3
    assert min(np.diff(heights)) > 0.03


def test_the_names_of_the_clocks_stand_clear_of_the_times():
    past = history()
    day = replace(
        forecast(past),
        request=ForecastRequest(
            # Ends at midnight UTC: the last time is a date, and long.
            asset="BTC", start_ts=1_764_633_600, increment_s=1440, length_s=86_400, num_paths=200
        ),
    )  # fmt: skip
    figure = fan_chart(day, past, title="BTC", subtitle="a day")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    names = [text for text in axes.texts if text.get_text() in {"UTC", "New York"}]
    ticks = [*axes.get_xticklabels(), *axes.child_axes[0].get_xticklabels()]
    shown = [tick.get_window_extent() for tick in ticks if tick.get_text()]
    assert len(names) == 2
    assert len(shown) > 8
    assert not any(name.get_window_extent().overlaps(box) for name in names for box in shown)


def elements(markup):
    return fromstring(markup)  # noqa: S314  # our own


def small_figures():
    """Every figure of a report, by name; some values are unknown."""
    times = START_TS + 86_400 * np.arange(5)
    values = np.array([0.98, 1.01, np.nan, 0.95, 1.0])
    errors = np.array([0.01, 0.02, np.nan, np.inf, 0.01])
    labels = ["1min", "a & b", "$x$", "<i>", "gaps"]
    past = history()
    paths = forecast(past)
    return {
        "lines": line_figure(times, {"engine": values, "oracle": values - 0.1}, level=1.0),
        "dots": dot_figure(labels, values, errors, level=1.0),
        "sideways": sideways_dot_figure(labels, values, errors, level=1.0),
        "pit": pit_figure(dict.fromkeys(labels, np.arange(20.0)), columns=3),
        "coverage": coverage_figure(labels, {0.8: (values, errors)}),
        "losses": loss_figure(labels, 100 * values, errors, errors),
        "fan": small_fan(paths, past, np.median(paths.paths, axis=0)),
    }


@pytest.mark.parametrize("name", list(small_figures()))
def test_a_small_figure_becomes_markup_that_can_stand_in_any_page(name):
    markup = svg_markup(small_figures()[name], label='a "figure" & more')
    root = elements(markup)  # well-formed
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == 'a "figure" & more'
    assert not re.search(r"https?:|font-family|<style|<metadata", markup)
    assert not re.search(r"(?:fill|stroke): #", markup)


def test_the_text_of_a_figure_is_kept_as_it_is_and_escaped():
    texts = elements(svg_markup(small_figures()["sideways"], label="")).itertext()
    assert {"a & b", "$x$", "<i>", "1min"} <= {text.strip() for text in texts}


def test_numbers_in_the_text_of_a_figure_keep_their_decimals():
    values = np.array([1.0025, 1.0050, 1.0075])
    figure = dot_figure(["a", "b", "c"], values, np.full(3, 1e-4), level=1.0)
    texts = [text.strip() for text in elements(svg_markup(figure, label="")).itertext()]
    assert "1.002" in texts


def test_figures_of_one_page_do_not_share_the_names_of_their_parts():
    values = np.ones(3)
    figures = [dot_figure(["a", "b", "c"], values, 0.1 * values, level=1.0) for _ in range(2)]
    names = [
        set(re.findall(r' id="([^"]+)"', svg_markup(figure, label=label)))
        for figure, label in zip(figures, ("one", "two"), strict=True)
    ]
    assert names[0]
    assert not names[0] & names[1]


def test_a_figure_has_the_same_markup_every_time():
    first, second = (svg_markup(small_figures()["fan"], label="fan") for _ in range(2))
    assert first == second


def test_a_whisker_of_few_prompts_does_not_set_the_scale():
    values = np.array([0.99, 1.01, 1.0, 1.0])
    wild = np.array([0.01, 0.01, 0.01, 5.0])
    low, high = dot_figure(list("abcd"), values, wild, level=1.0).axes[0].get_ylim()
    assert 0.9 < low < values.min()
    assert values.max() < high < 1.1


@pytest.mark.parametrize("figure_of", [dot_figure, sideways_dot_figure])
def test_usual_whiskers_are_whole_and_the_level_is_a_tick(figure_of):
    values, errors = np.array([0.925, 0.99, 0.98, 0.99]), np.array([0.021, 0.01, 0.01, 0.008])
    axes = figure_of(list("abcd"), values, errors, level=1.0).axes[0]
    is_upright = figure_of is dot_figure
    low, high = axes.get_ylim() if is_upright else axes.get_xlim()
    ticks = axes.get_yticks() if is_upright else axes.get_xticks()
    assert low < 0.925 - 2 * 0.021
    assert high > 1.01
    assert np.abs(ticks - 1.0).min() == 0
    assert 3 <= np.sum((ticks >= low) & (ticks <= high)) <= 8


def test_dots_whose_errors_are_not_known_are_not_cut_off_at_the_rim():
    values = np.array([0.9, 1.1])
    low, high = dot_figure(["0 h", "1 h"], values, np.full(2, np.nan), level=1.0).axes[0].get_ylim()
    assert low < 0.9 - 0.01
    assert high > 1.1 + 0.01


def test_times_within_a_day_are_told_with_its_date():
    noon = 1_764_547_200 + 12 * 3600  # of 2025-12-01
    axes = line_figure(np.array([noon]), {"engine": np.ones(1)}, level=None).axes[0]
    first, *others = (text.get_text() for text in axes.get_xticklabels())
    assert first.startswith("1 Dec 11:")
    assert all(re.fullmatch(r"1[123]:\d\d", text) for text in others)


@pytest.mark.parametrize("days", [0.0, 0.2, 2.5, 40.0, 900.0])
def test_times_are_few_and_round(days):
    times = np.linspace(START_TS, START_TS + 86_400 * days, 7)
    axes = line_figure(times, {"engine": np.ones(7)}, level=None).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert 1 <= len(labels) <= 6
    assert len(set(labels)) == len(labels)


def test_a_figure_is_saved_as_png_in_a_new_folder():
    path = Path("plots/deep/btc.png")
    save_figure(chart(history()), path)
    assert path.read_bytes().startswith(PNG)
    assert [entry.name for entry in path.parent.iterdir()] == ["btc.png"]


def test_a_figure_that_cannot_be_written_is_refused_in_one_sentence():
    Path("plots").write_text("a file, not a folder", encoding="utf-8")
    with pytest.raises(StateError, match=r"plots/btc\.png cannot be written") as caught:
        save_figure(chart(history()), Path("plots/btc.png"))
    assert "\n" not in str(caught.value)
