"""Plots of a comparison: quality against cost and speed, kept quality, and latency against the request rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimserve.compare.results import Spread
from slimserve.report.plots import label_decades, style_of, svg_of
from slimserve.workloads.interface import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TradeoffPoint:
    """One variant in a plot of quality against cost or speed; `number` is its position in the comparison."""

    number: int
    label: str
    quality: Estimate
    x: Spread
    is_dominated: bool
    is_winner: bool


@dataclass(frozen=True)
class Recovery:
    """Fraction of the reference's quality that a variant keeps, with its 95% interval if there is one."""

    number: int
    label: str
    kept_frac: float
    low: float | None
    high: float | None


def plot_tradeoff(
    points: Sequence[TradeoffPoint], x_label: str, y_label: str, required: float | None, required_label: str
) -> str:
    """Plot quality over cost or speed. Dominated variants are hollow, the winner has a ring, `required` is a line."""

    def draw(axes: Axes) -> None:
        for point in points:
            style, quality = style_of(point.number), point.quality
            axes.errorbar(
                point.x.median,
                quality.value,
                xerr=[[point.x.median - point.x.min], [point.x.max - point.x.median]],
                yerr=[[max(0.0, quality.value - quality.low)], [max(0.0, quality.high - quality.value)]],
                color=style.color,
                elinewidth=1.2,
                capsize=3,
            )
            axes.plot(
                point.x.median,
                quality.value,
                marker=style.marker,
                color=style.color,
                markerfacecolor="white" if point.is_dominated else style.color,
                markersize=9,
                markeredgewidth=1.8,
                linestyle="none",
                label=point.label,
            )
            if point.is_winner:
                axes.plot(point.x.median, quality.value, "o", markersize=19, markerfacecolor="none", color="black")
        if required is not None:
            axes.axhline(required, color="black", linestyle=":", linewidth=1.2, label=required_label)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_xlim(0, max(point.x.max for point in points) * 1.1 or 1)
        axes.locator_params(axis="x", nbins=5)

    return svg_of(draw)


def plot_latency_over_rate(
    series: Sequence[tuple[int, str, Sequence[tuple[float, Spread]]]], y_label: str, slo_rate: float | None
) -> str:
    """Plot a latency in ms against the offered rate per variant, as medians over rounds with their range."""

    def draw(axes: Axes) -> None:
        for number, label, curve in series:
            style = style_of(number)
            medians = [one.median * 1000 for _, one in curve]
            rates = [rate for rate, _ in curve]
            spans = [
                [(one.median - one.min) * 1000 for _, one in curve],
                [(one.max - one.median) * 1000 for _, one in curve],
            ]
            axes.errorbar(rates, medians, yerr=spans, color=style.color, linestyle="none", capsize=3)
            axes.plot(rates, medians, color=style.color, marker=style.marker, linestyle=style.linestyle, label=label)
        if slo_rate is not None:
            axes.axvline(slo_rate, color="black", linestyle=":", linewidth=1.2, label="SLO rate")
        axes.set_xlabel("offered rate (requests/s)")
        axes.set_xlim(left=0)
        axes.set_ylabel(y_label)
        axes.set_yscale("log")
        label_decades(axes.yaxis)

    return svg_of(draw)


def plot_recovery(recoveries: Sequence[Recovery], x_label: str, required_frac: float) -> str:
    """Plot the percentage of the reference's quality that each variant keeps; the dotted line is required."""

    def draw(axes: Axes) -> None:
        for place, one in enumerate(reversed(recoveries)):
            style = style_of(one.number)
            kept, low, high = (100 * (one.kept_frac if value is None else value) for value in (None, one.low, one.high))
            axes.errorbar(
                kept,
                place,
                xerr=[[max(0.0, kept - low)], [max(0.0, high - kept)]],
                marker=style.marker,
                color=style.color,
                markersize=8,
                capsize=3,
                linestyle="none",
            )
        axes.axvline(100, color="black", linewidth=1, label="the reference")
        axes.axvline(
            100 * required_frac, color="black", linestyle=":", linewidth=1.2, label=f"required: {required_frac:.0%}"
        )
        axes.set_yticks(range(len(recoveries)), [one.label for one in reversed(recoveries)])
        axes.set_ylim(-0.6, len(recoveries) - 0.4)
        axes.set_xlabel(x_label)

    return svg_of(draw, height_in=1.2 + 0.3 * len(recoveries))
