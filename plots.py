"""Figures: the fan chart of a forecast.

Everything is drawn on `Figure` objects with matplotlib's Agg renderer: no
window, no global state, so figures may be made in any thread.
"""

from datetime import UTC, tzinfo
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np

from config import FREQUENCIES
from domain import FloatArray, Forecast, MarketHistory
from state_store import write_atomically

Figure: TypeAlias = Any  # matplotlib.figure.Figure; imported only where it is drawn

NEW_YORK: Final = ZoneInfo("America/New_York")
BANDS: Final = ((0.95, "#d5e3f0"), (0.80, "#a9c6e2"), (0.50, "#78a5d0"))  # share of paths, colour
MEDIAN: Final = "#0b3c68"
SAMPLE: Final = "#1f5f9a"
HISTORY: Final = "#2b2b2b"
REALISED: Final = "#c8511b"
MUTED: Final = "#6b6b6b"
SAMPLE_PATHS: Final = 12
HISTORY_SHARE: Final = 0.75  # of the horizon, drawn before the start
LEFT: Final = 0.08  # of the figure's width, where the axes and the titles begin
# Where the paths end: the outermost and the middle matter most and get their label first.
END_LABELS: Final = (
    (0.5, "median"), (0.975, "97.5 %"), (0.025, "2.5 %"),
    (0.9, "90 %"), (0.1, "10 %"), (0.75, "75 %"), (0.25, "25 %"),
)  # fmt: skip
LABEL_HEIGHT: Final = 0.035  # of the axes' height


def fan_chart(
    forecast: Forecast,
    history: MarketHistory,
    *,
    title: str,
    subtitle: str,
    realised: FloatArray | None = None,
) -> Figure:
    """Draw what was known and what is expected.

    `history`: known when the forecast was made. `realised` (n_points,): prices on
    the forecast's grid that came true, NaN where unknown.
    """
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(11, 6), dpi=150, facecolor="white")
    axes = figure.add_axes((LEFT, 0.135, 0.745, 0.69))
    _draw_history(axes, forecast, history)
    if realised is not None:
        _draw_realised(axes, forecast, realised)
    _draw_fan(axes, forecast)
    _dress_axes(axes, forecast)
    _label_ends(axes, forecast)
    figure.text(LEFT, 0.952, title, fontsize=16, fontweight="bold", color=HISTORY, va="center")
    figure.text(LEFT, 0.905, subtitle, fontsize=10.5, color=MUTED, va="center")
    figure.legend(
        loc="lower left",
        bbox_to_anchor=(LEFT - 0.012, 0.012),
        ncols=6,
        frameon=False,
        fontsize=10,
        labelcolor=HISTORY,
        handlelength=1.6,
        columnspacing=1.8,
    )
    if history.source == "simulated":
        _watermark(axes)
    return figure


def _draw_history(axes: Any, forecast: Forecast, history: MarketHistory) -> None:
    request = forecast.request
    bars = history.price_bars.between(
        int(request.start_ts - HISTORY_SHARE * request.length_s), request.start_ts + 60
    )
    # The price for grid time g is taken `scored_lag_s` later; so is the past here.
    ts = bars.close_ts - history.scored_lag_s
    spacing = max(bars.bar_s, FREQUENCIES[history.frequency].bar_s)
    close = np.where(np.diff(ts, append=ts[-1:]) <= 3 * spacing, bars.close, np.nan)
    close[-1:] = bars.close[-1:]
    axes.plot(_when(ts), close, color=HISTORY, linewidth=1.2, label="known", zorder=4)


def _draw_fan(axes: Any, forecast: Forecast) -> None:
    when = _when(forecast.request.grid_ts)
    for share, colour in BANDS:
        low, high = np.quantile(forecast.paths, (0.5 - share / 2, 0.5 + share / 2), axis=0)
        axes.fill_between(
            when,
            low,
            high,
            color=colour,
            linewidth=0,
            label=f"{100 * share:.0f} % of paths",
            zorder=1,
        )
    chosen = np.linspace(0, len(forecast.paths) - 1, SAMPLE_PATHS).astype(int)
    median = np.median(forecast.paths, axis=0)
    axes.plot(when, median, color=MEDIAN, linewidth=1.6, label="median", zorder=3)
    # The bands set the scale; a single wild path may leave the picture.
    axes.autoscale(enable=False, axis="y")
    axes.plot(when, forecast.paths[chosen].T, color=SAMPLE, linewidth=0.5, alpha=0.45, zorder=2)


def _draw_realised(axes: Any, forecast: Forecast, realised: FloatArray) -> None:
    axes.plot(
        _when(forecast.request.grid_ts),
        realised,
        color=REALISED,
        linewidth=1.3,
        label="came true",
        zorder=5,
    )


def _when(ts: Any) -> Any:
    """Unix seconds as matplotlib dates."""
    return np.asarray(ts, dtype=np.float64) / 86_400


def _dress_axes(axes: Any, forecast: Forecast) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    request = forecast.request
    first = request.start_ts - HISTORY_SHARE * request.length_s
    axes.set_xlim(_when(first), _when(request.start_ts + request.length_s))
    axes.axvline(_when(request.start_ts), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda price, _: _price(price, axes)))
    axes.tick_params(colors=MUTED, labelsize=10, length=0, pad=6)
    _time_axis(axes.xaxis, UTC, request.length_s)
    # Above, the same time on the clock that volatility follows.
    top = axes.secondary_xaxis("top")
    top.tick_params(colors=MUTED, labelsize=10, length=0, pad=4)
    top.spines["top"].set_visible(False)
    _time_axis(top.xaxis, NEW_YORK, request.length_s)
    for zone, height, side in (("UTC", -0.017, "top"), ("New York", 1.014, "bottom")):
        axes.text(
            1.035, height, zone, transform=axes.transAxes, ha="left", va=side,
            fontsize=9.5, fontweight="bold", color=MUTED,
        )  # fmt: skip


def _price(price: float, axes: Any) -> str:
    """As many decimals as the visible range needs."""
    low, high = axes.get_ylim()
    decimals = int(np.clip(np.ceil(2 - np.log10(max(high - low, 1e-12))), 0, 8))
    return f"{price:,.{decimals}f}"


def _time_axis(axis: Any, zone: tzinfo, length_s: int) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(tz=zone, minticks=5, maxticks=9)
    axis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator, tz=zone, show_offset=False)
    formatter.zero_formats[3] = "%a %-d %b" if length_s >= 43_200 else "%H:%M"
    axis.set_major_formatter(formatter)


def _label_ends(axes: Any, forecast: Forecast) -> None:
    """Where the bands end, in price and per cent, beside the right edge."""
    start = float(np.median(forecast.paths[:, 0]))
    low, high = axes.get_ylim()
    placed: list[float] = []
    for quantile, name in END_LABELS:
        end = float(np.quantile(forecast.paths[:, -1], quantile))
        height = (end - low) / (high - low)
        if any(abs(height - other) < LABEL_HEIGHT for other in placed):
            continue
        placed.append(height)
        change = f"{round(100 * (end / start - 1), 2) + 0.0:+.2f} %".replace("-", "\N{MINUS SIGN}")
        axes.annotate(
            f"{name}   {_price(end, axes)}   {change}",
            (1.01, end),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=MEDIAN if quantile == 0.5 else MUTED,
            annotation_clip=False,
        )


def _watermark(axes: Any) -> None:
    axes.text(
        0.99,
        0.03,
        "SIMULATED MARKET",
        transform=axes.transAxes,
        ha="right",
        fontsize=20,
        fontweight="bold",
        color="#000000",
        alpha=0.13,
        zorder=6,
    )


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, whole or not at all; creates the folder.

    Raises: StateError if it cannot be written.
    """
    image = BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())
