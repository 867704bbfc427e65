"""Plots as inline SVG for all reports: readable on a phone, on light and dark pages, and without colour vision."""

from __future__ import annotations

import hashlib
import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimserve.core.statistics import percentile
from slimserve.loadtest.rows import Row
from slimserve.loadtest.summary import LoadSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""The palette of Okabe and Ito. Black and white become the page's colours, and blue is lighter on a dark page."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
_NUM_STEPS = 300
_MAX_POINTS = 1_500
_MAX_BINS = 120
_TIME_LABEL = "seconds since the start of the load; grey: not measured"
_STYLE = {"svg.hashsalt": "slimserve", "text.parse_math": False, "font.size": 10}


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of one series, so that no series depends on its colour alone."""

    color: str
    marker: str
    linestyle: Any


def style_of(index: int) -> Style:
    """Return the style of series number `index`; after the seventh, colours repeat with other markers and lines."""
    number = index + index // len(COLOURS)
    return Style(COLOURS[index % len(COLOURS)], MARKERS[number % len(MARKERS)], LINES[number % len(LINES)])


@dataclass(frozen=True)
class Window:
    """The measured window of a load, in seconds since its start."""

    begin_s: float
    end_s: float


def svg_of(draw: Callable[..., None], num_panels: int = 1, height_in: float = 3.0) -> str:
    """Call `draw` with `num_panels` stacked axes and return SVG that takes its text colour from the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, height_in), layout="constrained")
        panels = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
        draw(*panels)
        handles, labels = [], []
        for axes in panels:
            axes.grid(color="black", alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            legend = axes.get_legend_handles_labels()
            handles += legend[0]
            labels += legend[1]
        if labels:
            figure.set_figheight(height_in + 0.2 * len(labels))
            figure.legend(handles, labels, loc="outside upper left", fontsize=9, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _for_a_page(buffer.getvalue())


def _for_a_page(svg: str) -> str:
    """Make SVG that scales with the page, uses its text colour for black and has unique ids."""
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = svg.replace(COLOURS[0], f"var(--blue, {COLOURS[0]})").replace("#ffffff", "var(--page, #fff)")
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    mark = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{mark}-", svg)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" fill="currentColor" aria-hidden="true">',
        svg,
        count=1,
    )


def plot_distribution(series: Sequence[tuple[str, Sequence[float]]], label: str, log: bool = False) -> str:
    """Plot the cumulative distribution of latency samples (in seconds) per series; further left is better.

    A linear axis ends slightly above the largest 99th percentile, so that one outlier does not squeeze the rest.
    """

    def draw(axes: Axes) -> None:
        tails = []
        for index, (name, seconds) in enumerate(series):
            ordered = sorted(seconds)
            if not ordered:
                continue
            style = style_of(index)
            ranks = sorted({round(step * (len(ordered) - 1) / _NUM_STEPS) for step in range(_NUM_STEPS + 1)})
            axes.step(
                [ordered[rank] * 1000 for rank in ranks],
                [(rank + 1) / len(ordered) * 100 for rank in ranks],
                where="post",
                color=style.color,
                linestyle=style.linestyle,
                linewidth=2,
                label=f"{name} (n {len(ordered):,})",
            )
            tails.append(percentile(ordered, 0.99))
        axes.set_xlabel(label)
        axes.set_ylabel("samples within this time (%)")
        axes.set_ylim(0, 101)
        if log:
            axes.set_xscale("log")
            label_decades(axes.xaxis)
        else:
            axes.set_xlim(0, max(tails, default=0.0) * 1100 or 1)

    return svg_of(draw)


def plot_requests(rows: Sequence[Row], window: Window) -> str:
    """Plot the latency of each request over its scheduled time; failed requests are crosses.

    Of many requests, evenly spaced ones are drawn, and always the slowest 1%.
    """

    def draw(axes: Axes) -> None:
        good = [row for row in rows if row.error is None]
        for index, (name, pick) in enumerate((("end to end", _e2e_s), ("first token", _ttft_s))):
            points = [(row.scheduled_s, value) for row in good if (value := pick(row)) is not None]
            shown = _thinned(points)
            if shown:
                axes.plot(
                    [at for at, _ in shown],
                    [value * 1000 for _, value in shown],
                    linestyle="none",
                    marker=MARKERS[index],
                    markersize=3.5,
                    markerfacecolor="none" if index else COLOURS[index],
                    markeredgecolor=COLOURS[index],
                    label=name if len(shown) == len(points) else f"{name} ({len(shown):,} of {len(points):,})",
                )
        failed = [(row.scheduled_s, max(row.e2e_s, 1e-4)) for row in rows if row.error is not None]
        if failed:
            axes.plot(
                [at for at, _ in _thinned(failed)],
                [value * 1000 for _, value in _thinned(failed)],
                linestyle="none",
                marker="x",
                color="black",
                label=f"failed ({len(failed):,})",
            )
        axes.set_yscale("log")
        label_decades(axes.yaxis)
        axes.set_ylabel("latency (ms)")
        _shade(axes, rows, window)
        axes.set_xlabel(_TIME_LABEL)

    return svg_of(draw)


def plot_flow(rows: Sequence[Row], window: Window) -> str:
    """Plot requests in flight over time and, below, scheduled requests per second."""

    def draw(upper: Axes, lower: Axes) -> None:
        changes = sorted([(row.sent_s, 1) for row in rows] + [(row.end_s, -1) for row in rows])
        times, counts, count = [], [], 0
        for at, change in changes:
            count += change
            times.append(at)
            counts.append(count)
        step = max(1, len(times) // _MAX_POINTS)
        upper.step(times[::step], counts[::step], where="post", color=COLOURS[0], linewidth=1)
        upper.set_ylabel("in flight")
        upper.set_ylim(bottom=0)
        _shade(upper, rows, window)
        _draw_rate(lower, [(row.scheduled_s, 1) for row in rows], _bin_s(rows), COLOURS[1])
        lower.set_ylabel("scheduled per second")
        _shade(lower, rows, window)
        lower.set_xlabel(_TIME_LABEL)

    return svg_of(draw, num_panels=2, height_in=3.4)


def plot_output(rows: Sequence[Row], window: Window) -> str | None:
    """Plot streamed tokens and scored items per second; None if there are neither."""
    tokens = [arrival for row in rows for arrival in row.arrivals]
    items = [(row.end_s, row.num_items) for row in rows if row.error is None and row.num_items]
    series = [(name, events) for name, events in (("output tokens", tokens), ("scored items", items)) if events]
    if not series:
        return None

    def draw(*panels: Axes) -> None:
        for index, (axes, (name, events)) in enumerate(zip(panels, series, strict=True)):
            _draw_rate(axes, events, _bin_s(rows), COLOURS[index])
            axes.set_ylabel(f"{name} per second")
            _shade(axes, rows, window)
        panels[-1].set_xlabel(_TIME_LABEL)

    return svg_of(draw, num_panels=len(series), height_in=1.4 + 1.6 * len(series))


def plot_curve(
    points: Sequence[tuple[float, LoadSummary, bool]], metric: str, label: str, max_rate: float | None
) -> str:
    """Plot p50 and p99 of a latency (`ttft_s`, `e2e_s`) against the offered rate.

    Each run is a marker, hollow if it missed an objective; a line connects the medians of the runs at each rate.
    """

    def draw(axes: Axes) -> None:
        for index, name in enumerate(("p50", "p99")):
            style = style_of(index)
            known = [
                (rate, value * 1000, meets)
                for rate, summary, meets in points
                if (value := getattr(getattr(summary, metric), name)) is not None
            ]
            label_text = f"{name}; hollow: an objective was missed" if index else name
            axes.plot(*_medians(known), color=style.color, linestyle=style.linestyle, label=label_text)
            for meets in (True, False):
                axes.plot(
                    [rate for rate, _, met in known if met is meets],
                    [value for _, value, met in known if met is meets],
                    marker=style.marker,
                    color=style.color,
                    markerfacecolor=style.color if meets else "white",
                    markersize=7,
                    linestyle="none",
                )
        axes.set_yscale("log")
        label_decades(axes.yaxis)
        axes.set_ylabel(f"{label} (ms)")
        _rate_axis(axes, points, max_rate)

    return svg_of(draw)


def plot_answered(points: Sequence[tuple[float, LoadSummary, bool]], max_rate: float | None) -> str:
    """Plot answered requests per second and goodput against the offered rate."""

    def draw(axes: Axes) -> None:
        most = max(rate for rate, _, _ in points)
        axes.plot([0, most], [0, most], color="black", alpha=0.4, linewidth=1, label="all offered requests")
        served = [
            ("answered", [(rate, summary.requests_per_s, meets) for rate, summary, meets in points]),
            (
                "goodput: within every objective",
                [
                    (rate, summary.goodput_per_s, meets)
                    for rate, summary, meets in points
                    if summary.goodput_per_s is not None
                ],
            ),
        ]
        for index, (name, known) in enumerate(served):
            if known:
                style = style_of(index)
                rates, values = _medians(known)
                axes.plot(rates, values, color=style.color, linestyle=style.linestyle, marker=style.marker, label=name)
        axes.set_ylabel("requests/s")
        axes.set_ylim(bottom=0)
        _rate_axis(axes, points, max_rate)

    return svg_of(draw)


def _medians(points: Sequence[tuple[float, float, bool]]) -> tuple[list[float], list[float]]:
    """Return the rates and the median of the runs at each rate."""
    values: dict[float, list[float]] = {}
    for rate, value, _ in points:
        values.setdefault(rate, []).append(value)
    return list(values), [statistics.median(values[rate]) for rate in values]


def _rate_axis(axes: Axes, points: Sequence[tuple[float, LoadSummary, bool]], max_rate: float | None) -> None:
    if max_rate is not None:
        axes.axvline(
            max_rate,
            color="black",
            linestyle=":",
            linewidth=1.5,
            label=f"maximum rate: {max_rate:.3g}/s",
        )
    axes.set_xlabel("offered rate (requests/s)")
    axes.set_xlim(0, max(rate for rate, _, _ in points) * 1.05 or 1)


def _e2e_s(row: Row) -> float | None:
    return row.e2e_s


def _ttft_s(row: Row) -> float | None:
    return row.ttft_s


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MAX_POINTS` evenly spaced points, plus the slowest 1% of all points."""
    step = math.ceil(len(points) / _MAX_POINTS)
    if step <= 1:
        return list(points)
    slowest = sorted(points, key=lambda point: -point[1])[: min(len(points) // 100, _MAX_POINTS)]
    return sorted({*points[::step], *slowest})


def _bin_s(rows: Sequence[Row]) -> float:
    """Return the bin width of a rate over time: a whole number of seconds that gives at most `_MAX_BINS` bins."""
    return max(1.0, math.ceil(max((row.end_s for row in rows), default=0.0) / _MAX_BINS))


def _draw_rate(axes: Axes, events: Sequence[tuple[float, int]], bin_s: float, color: str) -> None:
    """Draw events per second in bins of time."""
    import numpy as np

    times = np.array([at for at, _ in events])
    edges = np.arange(0, times.max() + 2 * bin_s, bin_s)
    counts, _ = np.histogram(times, edges, weights=[count for _, count in events])
    axes.stairs(counts / bin_s, edges, color=color, linewidth=1.5)
    axes.set_ylim(bottom=0)


def _shade(axes: Axes, rows: Sequence[Row], window: Window) -> None:
    """Shade warm-up and cool-down in grey."""
    last_s = max([window.end_s, *(row.end_s for row in rows)])
    for begin_s, end_s in ((0.0, window.begin_s), (window.end_s, last_s)):
        if end_s > begin_s:
            axes.axvspan(begin_s, end_s, color="black", alpha=0.08, linewidth=0)
    axes.set_xlim(0, last_s)


def label_decades(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, as many as fit; the axis must already have its data."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < 1:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
