"""Figures: the fan chart of a forecast, and the small figures of a report.

Everything is drawn on `Figure` objects: no window, no global state, so figures
may be made in any thread. Small figures become SVG text (`svg_markup`, by one
thread at a time) whose colours are CSS variables, so that a page can show them light
and dark.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np

from config import DAY_S, FREQUENCIES
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
WIDEST_WHISKER: Final = 3.0  # of the usual one, that an axis makes room for
DOT_SHARE: Final = 0.06  # of an axis of dots, kept free at its ends
HISTORY_SHARE: Final = 0.75  # of the horizon, drawn before the start
LEFT: Final = 0.08  # of the figure's width, where the axes and the titles begin
# Where the paths end: the outermost and the middle matter most and get their label first.
END_LABELS: Final = (
    (0.5, "median"), (0.975, "97.5 %"), (0.025, "2.5 %"),
    (0.9, "90 %"), (0.1, "10 %"), (0.75, "75 %"), (0.25, "25 %"),
)  # fmt: skip
LABEL_HEIGHT: Final = 0.035  # of the axes' height
GRID: Final = "#ececec"
RULE: Final = "#bbbbbb"

# Of the small figures. Forecasters differ in dash as well as in colour.
SMALL: Final = (4.3, 2.5)  # inches; drawn so that it is still legible on a phone
SMALL_FONT: Final = 8.0
PARTS_FONT: Final = 7.5
TICK_STEPS_S: Final = (
    *(60 * minutes for minutes in (5, 10, 15, 30, 60, 120, 180, 360, 720)),
    *(DAY_S * days for days in (1, 2, 5, 10, 20, 50, 100, 365)),
)
FORECASTERS: Final[Mapping[str, tuple[str, Any]]] = {
    "engine": ("#1f5f9b", "solid"),
    "reference": ("#8c5aa8", (0, (1, 1.5))),
    "ewma_t": ("#7a7a7a", "solid"),
    "har": ("#2f8f5b", (0, (4, 1.5))),
    "garch_t": ("#b0487f", (0, (5, 1, 1, 1))),
    "oracle": ("#b8860b", (0, (2, 1.5))),
}
# Every colour by the CSS variable that may replace it.
CSS_COLOURS: Final[Mapping[str, str]] = {
    "ink": HISTORY,
    "muted": MUTED,
    "grid": GRID,
    "rule": RULE,
    "realised": REALISED,
    "median": MEDIAN,
    **{f"band{100 * share:.0f}": colour for share, colour in BANDS},
    **{name.replace("_", "-"): colour for name, (colour, _) in FORECASTERS.items()},
}


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
    _draw_bands(axes, forecast)
    chosen = np.linspace(0, len(forecast.paths) - 1, SAMPLE_PATHS).astype(int)
    # The bands set the scale; a single wild path may leave the picture.
    axes.autoscale(enable=False, axis="y")
    axes.plot(when, forecast.paths[chosen].T, color=SAMPLE, linewidth=0.5, alpha=0.45, zorder=2)


def _draw_bands(axes: Any, forecast: Forecast) -> None:
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
    median = np.median(forecast.paths, axis=0)
    axes.plot(when, median, color=MEDIAN, linewidth=1.6, label="median", zorder=3)


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
    return np.asarray(ts, dtype=np.float64) / DAY_S


def _dress_axes(axes: Any, forecast: Forecast) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    request = forecast.request
    first = request.start_ts - HISTORY_SHARE * request.length_s
    axes.set_xlim(_when(first), _when(request.start_ts + request.length_s))
    axes.axvline(_when(request.start_ts), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
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
            1.06, height, zone, transform=axes.transAxes, ha="left", va=side,
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


# ---------------------------------------------------------------- small figures of a report


def line_figure(times: Any, lines: Mapping[str, FloatArray], *, level: float | None) -> Figure:
    """Values of several forecasters along time; `times` (n,) Unix seconds, lines (n,) each.

    `level` is drawn as a horizontal rule.
    """
    figure, axes = _small_axes()
    for name, values in lines.items():
        colour, dash = FORECASTERS[name]
        axes.plot(
            _when(times),
            values,
            color=colour,
            linestyle=dash,
            linewidth=2.0 if name == "engine" else 1.1,
            marker="o" if len(values) == 1 else None,
            label=name,
            zorder=3 if name == "engine" else 2,
        )
    if level is not None:
        axes.axhline(level, color=MUTED, linewidth=0.8)
    margin = 0.03 * (times[-1] - times[0]) + 3600  # a single time must have some width too
    axes.set_xlim(_when(times[0] - margin), _when(times[-1] + margin))
    _small_time_axis(axes)
    _legend_above(figure, axes)
    return figure


def _small_time_axis(axes: Any) -> None:
    """A few round times, UTC; the date where a day begins, or at the first of them."""
    low, high = (DAY_S * limit for limit in axes.get_xlim())
    step = next((step for step in TICK_STEPS_S if (high - low) / step <= 5), TICK_STEPS_S[-1])
    ticks = np.arange(np.ceil(low / step) * step, high, step)
    moments = [datetime.fromtimestamp(float(tick), UTC) for tick in ticks]
    texts = [_tick_text(moment, step) for moment in moments]
    if texts and all(":" in text for text in texts):
        texts[0] = f"{moments[0]:%-d %b} {texts[0]}"
    axes.set_xticks(_when(ticks), texts)


def _tick_text(moment: datetime, step_s: int) -> str:
    if step_s >= 50 * DAY_S:
        return f"{moment:%b %Y}"
    return f"{moment:%H:%M}" if moment.hour or moment.minute else f"{moment:%-d %b}"


def dot_figure(
    labels: Sequence[str], values: FloatArray, errors: FloatArray, *, level: float
) -> Figure:
    """Values with whiskers of two standard errors, around a level; all (n,).

    Unknown values leave their place empty.
    """
    figure, axes = _small_axes(top=0.97)
    place = np.arange(len(labels))
    colour = FORECASTERS["engine"][0]
    axes.axhline(level, color=MUTED, linewidth=0.8)
    axes.vlines(place, values - 2 * errors, values + 2 * errors, color=colour, linewidth=1.2)
    axes.plot(place, values, "o", color=colour, markersize=3.6, zorder=3)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    shown = place[:: max(len(labels) // 8, 1)]
    axes.set_xticks(shown, [labels[index] for index in shown])
    if limits := _limits(values, errors, level):
        axes.set_yticks(_ticks(*limits, level))
        axes.set_ylim(*limits)
    return figure


def sideways_dot_figure(
    labels: Sequence[str], values: FloatArray, errors: FloatArray, *, level: float
) -> Figure:
    """As `dot_figure`, from top to bottom: for labels that are long."""
    figure, axes = _sideways_axes(labels)
    place = np.arange(len(labels))[::-1]
    colour = FORECASTERS["engine"][0]
    axes.axvline(level, color=MUTED, linewidth=0.8)
    axes.hlines(place, values - 2 * errors, values + 2 * errors, color=colour, linewidth=1.2)
    axes.plot(values, place, "o", color=colour, markersize=3.6, zorder=3)
    if limits := _limits(values, errors, level):
        axes.set_xticks(_ticks(*limits, level))
        axes.set_xlim(*limits)
    return figure


def _limits(values: FloatArray, errors: FloatArray, level: float) -> tuple[float, float] | None:
    """What to show of an axis: dots and whiskers; those of a few prompts may leave the picture."""
    known = np.isfinite(values)
    lengths = 2 * np.nan_to_num(errors[known], posinf=0.0)
    if lengths.any():
        lengths = np.minimum(lengths, WIDEST_WHISKER * np.median(lengths[lengths > 0]))
    low = float(np.append(values[known] - lengths, level).min())
    high = float(np.append(values[known] + lengths, level).max())
    margin = DOT_SHARE * (high - low)  # on the rim a dot would be cut in half
    return (low - margin, high + margin) if high > low else None


def _ticks(low: float, high: float, level: float) -> FloatArray:
    """A few round steps from the level, which is a tick itself."""
    from matplotlib.ticker import MaxNLocator

    step = float(np.diff(MaxNLocator(5).tick_values(low, high))[0])
    steps = np.arange(np.ceil((low - level) / step), np.floor((high - level) / step) + 1)
    return np.asarray(level + step * steps, dtype=np.float64)


def pit_figure(histograms: Mapping[str, FloatArray], *, columns: int) -> Figure:
    """Small multiples of PIT histograms; each (bins,) counts.

    The grey band holds 95 % of the bars of a calibrated forecast whose outcomes are
    independent.
    """
    from matplotlib.figure import Figure as NewFigure

    rows = -(-len(histograms) // columns)
    height = 0.25 + 0.95 * rows
    figure = NewFigure(figsize=(SMALL[0], height), dpi=100)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    figure.subplots_adjust(
        left=0.02, right=0.98, bottom=0.2 / height, top=1 - 0.22 / height, hspace=0.45
    )
    for axes in grid.flat[len(histograms) :]:
        axes.set_visible(False)
    for axes, (name, counts) in zip(grid.flat, histograms.items(), strict=False):
        _draw_pit(axes, name, np.asarray(counts, dtype=np.float64))
    return figure


def _draw_pit(axes: Any, name: str, counts: FloatArray) -> None:
    bins, total = len(counts), max(float(counts.sum()), 1.0)
    density = counts * bins / total
    spread = 1.96 * float(np.sqrt((1 - 1 / bins) * bins / total))
    axes.axhspan(max(1 - spread, 0), 1 + spread, color=GRID, zorder=0)
    axes.axhline(1.0, color=MUTED, linewidth=0.7, zorder=3)
    axes.bar(
        (np.arange(bins) + 0.5) / bins, density, width=0.86 / bins,
        color=FORECASTERS["engine"][0], zorder=2,
    )  # fmt: skip
    axes.set_ylim(0, max(2.0, 1.05 * float(density.max())))
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    _plain_frame(axes)
    axes.set_title(name, fontsize=SMALL_FONT, color=HISTORY, pad=2, loc="left", parse_math=False)
    axes.tick_params(labelsize=PARTS_FONT)


def coverage_figure(
    leads: Sequence[str], found: Mapping[float, tuple[FloatArray, FloatArray]]
) -> Figure:
    """Share of outcomes inside central intervals by lead, in per cent.

    `found`: by nominal share, shares and standard errors (leads,); whiskers are two.
    """
    figure, axes = _small_axes(top=0.97)
    place = np.arange(len(leads))
    for nominal, (share, error) in found.items():
        colour = FORECASTERS["engine"][0]
        axes.axhline(100 * nominal, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        low, high = 100 * (share - 2 * error), 100 * np.minimum(share + 2 * error, 1)
        axes.vlines(place, low, high, color=colour, linewidth=1.2)
        axes.plot(place, 100 * share, "o", color=colour, markersize=3.6, zorder=3)
    axes.set_xlim(-0.6, len(leads) - 0.4)
    axes.set_xticks(place, leads)
    axes.set_yticks([100 * nominal for nominal in found])
    axes.yaxis.set_major_formatter("{x:.0f} %")
    return figure


def loss_figure(
    labels: Sequence[str], lost: FloatArray, errors: FloatArray, expected: FloatArray
) -> Figure:
    """What parts of a forecast cost, one bar each from the top; all (n,), in bp.

    Whiskers are two standard errors; a tick marks what is lost where nothing is wrong.
    """
    figure, axes = _sideways_axes(labels)
    place = np.arange(len(labels))[::-1]
    axes.barh(place, lost, height=0.62, color=FORECASTERS["engine"][0], alpha=0.8, zorder=2)
    axes.hlines(place, lost - 2 * errors, lost + 2 * errors, color=HISTORY, linewidth=1, zorder=3)
    axes.vlines(expected, place - 0.38, place + 0.38, color=REALISED, linewidth=1.8, zorder=4)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    return figure


def small_fan(
    forecast: Forecast, history: MarketHistory, realised: FloatArray | None = None
) -> Figure:
    """A fan chart in little: what was known, the bands, the median, what came true if given."""
    from matplotlib.ticker import FuncFormatter

    figure, axes = _small_axes(left=0.15, top=0.97)
    _draw_history(axes, forecast, history)
    _draw_bands(axes, forecast)
    if realised is not None:
        _draw_realised(axes, forecast, realised)
    first = forecast.request.start_ts - HISTORY_SHARE * forecast.request.length_s
    axes.set_xlim(_when(first), _when(forecast.request.start_ts + forecast.request.length_s))
    axes.axvline(
        _when(forecast.request.start_ts), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3))
    )
    _small_time_axis(axes)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda price, _: _price(price, axes)))
    return figure


def _sideways_axes(labels: Sequence[str]) -> tuple[Figure, Any]:
    """Axes with one line per label, the first on top."""
    figure, axes = _small_axes(left=0.27, top=0.98, height=0.4 + 0.24 * len(labels))
    axes.set_yticks(np.arange(len(labels))[::-1], labels, parse_math=False)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _small_axes(
    *, left: float = 0.125, top: float = 0.9, height: float = SMALL[1]
) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import MaxNLocator

    figure = NewFigure(figsize=(SMALL[0], height), dpi=100)
    below = 0.24 / height
    axes = figure.add_axes((left, below, 0.985 - left, top - below))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(labelsize=SMALL_FONT)
    _plain_frame(axes)
    return figure, axes


def _plain_frame(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, pad=3)


def _legend_above(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.0, 1.02), ncols=6, frameon=False,
        fontsize=PARTS_FONT, labelcolor=HISTORY, handlelength=1.6, columnspacing=1.0,
        handletextpad=0.4, borderaxespad=0.0,
    )  # fmt: skip


# ---------------------------------------------------------------- figures in a page


def svg_markup(figure: Figure, *, label: str) -> str:
    """The figure as an `<svg>` element for a page, `label` read out by screen readers.

    Text stays text in the page's font; colours become CSS variables with their light
    value behind; nothing refers to anything outside the page.
    """
    from html import escape

    from matplotlib import rc_context

    image = BytesIO()
    # The salt keeps names of clip paths apart between figures of one page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        blank = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(image, format="svg", transparent=True, metadata=blank)
    svg = image.getvalue().decode("utf-8")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    inner = svg[svg.index(">", svg.index("<svg")) + 1 :]
    opening = (
        f'<svg {view_box.group() if view_box else ""} role="img" aria-label="{escape(label)}">'
    )
    return opening + _themed(_slim(inner))


def _slim(svg: str) -> str:
    """Without metadata, unused names, the font of this machine and needless decimals."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # Only where drawings are: text may hold numbers too.
    return re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, svg)


def _rounded(attribute: re.Match[str]) -> str:
    text = re.sub(r"\d+\.\d+", lambda m: f"{float(m.group()):.1f}", attribute.group())
    return text.replace("\n", "").replace(" z", "z")


def _themed(svg: str) -> str:
    """Every colour behind the CSS variable of its name."""
    for name, colour in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    return svg
