"""The report's plots as inline SVG: readable at a phone's width, in colours that the colour-blind tell apart."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtest.rows import Row
from loadtest.summary import percentiles
from workloads.interface import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")
_NUM_STEPS = 300


@dataclass(frozen=True)
class QualityPoint:
    """One variant in a quality-against-speed plot."""

    name: str
    speed: float
    quality: Estimate


def plot_quality(points: Sequence[QualityPoint], speed_label: str, quality_label: str) -> str:
    """Quality with its interval against speed; up and to the right is better."""

    def draw(axes: Axes) -> None:
        for index, point in enumerate(points):
            estimate = point.quality
            axes.errorbar(
                point.speed,
                estimate.value,
                yerr=[[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]],
                marker=_MARKERS[index % len(_MARKERS)],
                color=_COLOURS[index % len(_COLOURS)],
                markersize=9,
                capsize=4,
                linestyle="none",
                label=point.name,
            )
        axes.set_xlabel(speed_label)
        axes.set_ylabel(quality_label)
        axes.set_xlim(left=0, right=max(point.speed for point in points) * 1.15 or 1)

    return _svg(draw)


def plot_latency(samples: Sequence[tuple[str, Sequence[float]]], latency_label: str) -> str:
    """Share of samples that took at most so long, per variant; further left is better.

    The axis ends a little after the largest 99th percentile, so that one straggler does
    not squeeze the rest.
    """

    def draw(axes: Axes) -> None:
        for index, (name, seconds) in enumerate(samples):
            ordered = sorted(seconds)
            if not ordered:
                continue
            ranks = sorted({round(step * (len(ordered) - 1) / _NUM_STEPS) for step in range(_NUM_STEPS + 1)})
            axes.step(
                [ordered[rank] * 1000 for rank in ranks],
                [(rank + 1) / len(ordered) * 100 for rank in ranks],
                where="post",
                color=_COLOURS[index % len(_COLOURS)],
                linestyle=_LINES[index % len(_LINES)],
                linewidth=2,
                label=f"{name} (n={len(ordered)})",
            )
        axes.set_xlabel(latency_label)
        axes.set_ylabel("answers at most so late (%)")
        tails = [percentiles(seconds).p99 or 0.0 for _, seconds in samples]
        axes.set_xlim(0, max(tails, default=0.0) * 1000 * 1.1 or 1)
        axes.set_ylim(0, 101)

    return _svg(draw)


def end_to_end(rows: Sequence[Row]) -> list[float]:
    return [row.e2e_s for row in rows if row.error is None]


def inter_token(rows: Sequence[Row]) -> list[float]:
    return [gap for row in rows if row.error is None for gap in row.inter_token_gaps_s()]


def _svg(draw: Callable[[Axes], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.7), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", fontsize=9, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" aria-hidden="true">',
        svg[svg.index("<svg") :],
        count=1,
    )
