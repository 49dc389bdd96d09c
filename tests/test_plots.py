"""Fan charts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config import Frequency
from domain import Bars, Diagnostics, Forecast, ForecastRequest, MarketHistory
from errors import StateError
from plots import fan_chart, save_figure

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
