"""A comparison as a person sees it: one self-contained HTML page, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare.plots import QualityPoint, end_to_end, inter_token, plot_latency, plot_quality
from compare.results import Comparison, VariantResult
from contracts.storage import write_atomically
from loadtest.rows import Row, read_rows
from loadtest.summary import LoadSummary, Percentiles
from workloads.interface import Estimate

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class _View:
    """How a workload's speed and latency are named and read."""

    speed_label: str
    speed: Callable[[LoadSummary], float]
    latency_label: str
    latency: Callable[[Sequence[Row]], list[float]]
    latencies: tuple[tuple[str, Callable[[LoadSummary], Percentiles]], ...]


_VIEWS = {
    "recommendation": _View(
        "scored candidates per second",
        lambda load: load.items_per_s,
        "end-to-end latency of a slate (ms)",
        end_to_end,
        (("slate latency", lambda load: load.e2e_s),),
    ),
    "reasoning": _View(
        "output tokens per second",
        lambda load: load.output_tokens_per_s,
        "time between tokens (ms)",
        inter_token,
        (
            ("time to first token", lambda load: load.ttft_s),
            ("time between tokens", lambda load: load.itl_s),
            ("answer latency", lambda load: load.e2e_s),
        ),
    ),
}
_QUALITY_LABELS = {"auc": "ranking quality (AUC)", "accuracy": "answers right (share)"}


@dataclass(frozen=True)
class _Line:
    """One row of the table: a figure, and per variant its text."""

    label: str
    texts: list[str]


@dataclass(frozen=True)
class _Plot:
    title: str
    hint: str
    svg: str


def write_report(comparison: Comparison, directory: Path) -> Path:
    """Render `report.html` from a comparison and the raw rows that its loads left in `directory`.

    The page embeds its plots and styles, so it opens without a network.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("compare", "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        comparison=comparison,
        sections=_sections(comparison),
        statements=_statements(comparison),
        plots=_plots(comparison, directory),
        hardware=comparison.origin["hardware"],
    )
    path = directory / REPORT_FILE
    write_atomically(path, page)
    return path


def print_table(comparison: Comparison) -> None:
    """Print the report's table to standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{comparison.model} on {comparison.origin['hardware']['cpu']}")
    table.add_column("")
    for variant in comparison.variants:
        table.add_column(variant.recipe, justify="right")
    for title, lines in _sections(comparison):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for line in lines:
            table.add_row(line.label, *line.texts)
    Console().print(table)


def _sections(comparison: Comparison) -> list[tuple[str, list[_Line]]]:
    variants = comparison.variants
    size = [
        _Line("size on disk, MiB", [f"{variant.disk_bytes / 2**20:.0f}" for variant in variants]),
        _Line("parameters, millions", [f"{variant.num_parameters / 1e6:.1f}" for variant in variants]),
        _Line("engine memory, peak, GiB", [f"{(variant.peak_rss_bytes or 0) / 2**30:.2f}" for variant in variants]),
        _Line("time to build, s", [_build_text(variant) for variant in variants]),
        _Line("time until ready, s", [f"{variant.ready_s or 0:.0f}" for variant in variants]),
    ]
    return [
        ("size and start", size),
        *((workload, _workload_lines(variants, workload)) for workload in comparison.workloads),
    ]


def _workload_lines(variants: Sequence[VariantResult], workload: str) -> list[_Line]:
    view = _VIEWS[workload]
    qualities = [variant.quality[workload] for variant in variants]
    loads = [variant.load[workload] for variant in variants]
    return [
        *(
            _Line(name.replace("_", " "), [_estimate_text(quality[name]) for quality in qualities])
            for name in qualities[0]
        ),
        _Line(view.speed_label, [f"{view.speed(load):.1f}" for load in loads]),
        *(
            _Line(f"{label}, p50 / p90 / p99, ms", [_percentiles_text(pick(load)) for load in loads])
            for label, pick in view.latencies
        ),
        _Line("prompt tokens from the prefix cache", [_share_text(load) for load in loads]),
        _Line("requests, errors", [_requests_text(load) for load in loads]),
    ]


def _statements(comparison: Comparison) -> list[str]:
    """One sentence per variant after the first: what it gains and what it costs against the first."""
    reference, *others = comparison.variants
    sentences = []
    for variant in others:
        parts = [f"{variant.disk_bytes / reference.disk_bytes:.0%} of the bytes on disk"]
        for workload, headline in comparison.workloads.items():
            speed = _VIEWS[workload].speed
            before, after = speed(reference.load[workload]), speed(variant.load[workload])
            if before > 0:
                parts.append(f"{after / before:.2f}× the {_VIEWS[workload].speed_label}")
            ours, theirs = variant.quality[workload][headline], reference.quality[workload][headline]
            overlap = ours.low <= theirs.high and theirs.low <= ours.high
            verdict = "the 95% intervals overlap" if overlap else "the 95% intervals do not overlap"
            parts.append(f"{workload} {headline} {ours.value:.3f} against {theirs.value:.3f} ({verdict})")
        sentences.append(f"{variant.recipe} against {reference.recipe}: {'; '.join(parts)}.")
    return sentences


def _plots(comparison: Comparison, directory: Path) -> list[_Plot]:
    plots = []
    for workload, headline in comparison.workloads.items():
        view = _VIEWS[workload]
        points = [
            QualityPoint(variant.recipe, view.speed(variant.load[workload]), variant.quality[workload][headline])
            for variant in comparison.variants
        ]
        plots.append(
            _Plot(
                f"{workload}: quality against speed",
                "Up and to the right is better. Bars are 95% confidence intervals.",
                plot_quality(points, view.speed_label, _QUALITY_LABELS[headline]),
            )
        )
        samples = [
            (
                variant.recipe,
                view.latency(_window_rows(comparison, directory / variant.name / f"{workload}.rows.jsonl")),
            )
            for variant in comparison.variants
        ]
        plots.append(
            _Plot(
                f"{workload}: latency distribution",
                "Further left is better. Share of samples that took at most so long, up to the largest p99.",
                plot_latency(samples, view.latency_label),
            )
        )
    return plots


def _window_rows(comparison: Comparison, path: Path) -> list[Row]:
    """The rows of the measured window, as summarize chooses them."""
    start = comparison.settings["warmup_s"]
    end = start + comparison.settings["duration_s"]
    return [row for row in read_rows(path) if start <= row.due_s < end]


def _build_text(variant: VariantResult) -> str:
    return f"{variant.build_s:.1f}{' (reused)' if variant.build_reused else ''}"


def _estimate_text(estimate: Estimate) -> str:
    digits = 3 if abs(estimate.value) < 10 else 1
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}] n={estimate.n}"


def _percentiles_text(figure: Percentiles) -> str:
    if figure.p50 is None:
        return "no answer"
    values = [f"{(value or 0) * 1000:.0f}" for value in (figure.p50, figure.p90, figure.p99)]
    return f"{' / '.join(values)} n={figure.n}"


def _share_text(load: LoadSummary) -> str:
    return "unknown" if load.prefix_cache_hit_frac is None else f"{load.prefix_cache_hit_frac:.0%}"


def _requests_text(load: LoadSummary) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in load.errors.items())
    return f"{load.num_requests}, {kinds or 'none'}"
