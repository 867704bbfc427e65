"""The report of a load test or of a search over rates: tables on the terminal and a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimserve.core.openai_client import Target
from slimserve.core.storage import write_atomically
from slimserve.loadtest.rows import Row
from slimserve.loadtest.slo import Metric, samples_of
from slimserve.loadtest.summary import LoadSummary, load_summary
from slimserve.report import plots
from slimserve.report.load_tables import LATENCY_HEADINGS, interval_cell, objective_lines, parts_of
from slimserve.report.page import Plot, environment_lines, ms_text, number_text, render_page, setting_lines
from slimserve.report.terminal import print_table

CurvePoint = tuple[float, LoadSummary, bool]
"""An offered rate in requests/s, the summary of its run, and whether every objective was met."""


def print_summary(suite: str, target: Target, summary: LoadSummary) -> None:
    """Print the results of a run to standard output; reasons why it is invalid come first."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for reason in summary.invalid:
        console.print(Text(f"INVALID: {reason}", style="bold red"))
    title = f"{suite} on {target.model} at {target.url}, {summary.window_s:.0f} s"
    for part in parts_of(title, summary):
        console.print(Text(f"{part.title}\n", style="bold"))
        if part.latencies:
            rows = [[label, *("\n".join(filter(None, cell)) for cell in cells)] for label, *cells in part.latencies]
            print_table(console, LATENCY_HEADINGS, rows)
        label_width = max(len(line.label) for _, lines in part.sections for line in lines)
        for section, lines in part.sections:
            console.print(Text(f"\n{section}", style="bold"))
            pairs = [(f"  {line.label:{label_width}}", line.text) for line in lines]
            print_table(console, ("", ""), pairs, numbers=False)
        console.print()
    for warning in summary.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def print_curve(points: Sequence[CurvePoint]) -> None:
    """Print the results of each rate to standard output."""
    from rich.console import Console

    ordered = [_curve_row(*point) for point in sorted(points, key=lambda point: point[0])]
    rows = [[rate, *(text for text, _ in cells)] for rate, *cells in ordered]
    print_table(Console(), ("requests/s", *_CURVE_HEADINGS), rows)


def write_html(document: Mapping[str, Any], rows: Sequence[Row], directory: Path) -> Path:
    """Write `SUITE.html` from the content of a run's SUITE.json and its raw rows, and return its path."""
    summary = load_summary(document["summary"])
    settings = document["settings"]
    window = plots.Window(settings["warmup_s"], settings["warmup_s"] + summary.window_s)
    page = render_page(
        "load.html.j2",
        title=f"{document['suite']} on {document['target']['model']}",
        css_class=_css_class(summary),
        conclusion=_conclusion(document, summary),
        answered=_answered_text(document, summary),
        warnings=summary.warnings,
        objectives=objective_lines(summary),
        plots=_plots(rows, window, summary),
        headings=LATENCY_HEADINGS,
        parts=parts_of("Results", summary),
        calibration=list(setting_lines(document.get("calibration", {}))),
        settings=list(setting_lines(_used(settings))),
        environment=environment_lines(document),
        suite=document["suite"],
    )
    path = directory / f"{document['suite']}.html"
    write_atomically(path, page)
    return path


def write_curve_html(
    document: Mapping[str, Any], points: Sequence[CurvePoint], directory: Path, found_rate: float | None = None
) -> Path:
    """Write `SUITE.curve.html`, which shows latency and goodput against the offered rate of a sweep or a search.

    `document` holds suite, target, settings and provenance, like that of a run. `found_rate` is the highest rate in
    requests/s at which a search met every objective.
    """
    ordered = sorted(points, key=lambda point: point[0])
    page = render_page(
        "curve.html.j2",
        title=f"{document['suite']} on {document['target']['model']}: latency over rate",
        conclusion=_curve_conclusion(document, ordered, found_rate),
        css_class="good" if found_rate or all(meets for _, _, meets in ordered) else "bad",
        plots=_curve_plots(ordered, found_rate),
        headings=("requests/s", *_CURVE_HEADINGS),
        rows=[_curve_row(*point) for point in ordered],
        settings=list(setting_lines({**document["settings"], "rate": "", "users": ""})),
        environment=environment_lines(document),
        suite=document["suite"],
    )
    path = directory / f"{document['suite']}.curve.html"
    write_atomically(path, page)
    return path


def _css_class(summary: LoadSummary) -> str:
    if summary.invalid or not all(objective.is_met for objective in summary.objectives):
        return "bad"
    return "good" if summary.objectives else ""


def _conclusion(document: Mapping[str, Any], summary: LoadSummary) -> str:
    """Return the first sentence of the page: whether the run is valid and whether it met its objectives."""
    if summary.invalid:
        return f"INVALID: these results do not describe the server. {'; '.join(summary.invalid)}."
    model, load = document["target"]["model"], traffic_text(document["settings"])
    missed = [objective for objective in summary.objectives if not objective.is_met]
    if missed:
        return f"{model} missed {len(missed)} of {len(summary.objectives)} objectives under {load}."
    if summary.objectives:
        count = len(summary.objectives)
        return f"{model} met {'the objective' if count == 1 else f'all {count} objectives'} under {load}."
    return f"{model} under {load}: the run is valid, and no objective was given."


def _used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that this kind of load uses."""
    unused = {"users"} if settings["rate"] or settings["trace"] else {"arrival", "burstiness"}
    return {name: value for name, value in settings.items() if name not in unused}


def traffic_text(settings: Mapping[str, Any]) -> str:
    """Describe the traffic of a run's settings."""
    if settings["trace"]:
        return f"the trace {settings['trace']}"
    if settings["rate"]:
        return f"{settings['rate']} requests/s ({settings['arrival'].replace('poisson', 'Poisson')} arrivals)"
    users = settings["users"]
    return f"{users} closed-loop user{'s' if users > 1 else ''}"


def _answered_text(document: Mapping[str, Any], summary: LoadSummary) -> str:
    """Return one sentence on the answered requests and their latency."""
    num_failed = sum(summary.errors.values())
    parts = [
        f"{summary.num_requests - num_failed:,} of {summary.num_requests:,} requests to {document['target']['url']} "
        f"in {summary.window_s:.0f} s were answered"
    ]
    for name, latency in (("first token", summary.ttft_s), ("complete answer", summary.e2e_s)):
        if latency.n:
            parts.append(f"{name}: p50 {ms_text(latency.p50)} ms, p99 {ms_text(latency.p99)} ms")
    return "; ".join(parts) + "."


def _plots(rows: Sequence[Row], window: plots.Window, summary: LoadSummary) -> list[Plot]:
    if not rows:
        return []
    page_plots = []
    metrics: dict[str, Metric] = {"between tokens": "itl", "first token": "ttft", "end to end": "e2e"}
    due = [row for row in rows if window.begin_s <= row.scheduled_s < window.end_s and row.error is None]
    for kind in summary.by_kind or [""]:
        of_kind = [row for row in due if not kind or row.kind == kind]
        series = [
            (name, [sample for row in of_kind for sample in samples_of(row, metric)])
            for name, metric in metrics.items()
        ]
        known = [(name, samples) for name, samples in series if samples]
        if known:
            hint = "Further left is better. Measured window only, logarithmic axis."
            title = f"Distribution of latency{', ' + kind if kind else ''}"
            page_plots.append(Plot(title, hint, plots.plot_distribution(known, "latency (ms)", log=True)))
    hint = "Latency of each request over its scheduled time. Rising latencies mean that the server falls behind."
    page_plots.append(Plot("Latency of each request", hint, plots.plot_requests(rows, window)))
    hint = "Requests that are sent and not yet answered; below, the arrivals."
    page_plots.append(Plot("Requests in flight, and arrivals", hint, plots.plot_flow(rows, window)))
    output = plots.plot_output(rows, window)
    if output is not None:
        page_plots.append(Plot("Output over time", "Output in each second.", output))
    return page_plots


_CURVE_HEADINGS = (
    "objectives",
    "answered/s",
    "goodput/s",
    "TTFT p50, ms",
    "TTFT p99, ms",
    "e2e p50, ms",
    "e2e p99, ms",
)


def _curve_row(rate: float, summary: LoadSummary, meets: bool) -> list[Any]:
    objectives = ("met" if meets else "MISSED") if summary.objectives else "none"
    return [
        number_text(rate),
        (f"{objectives}{', INVALID' if summary.invalid else ''}", ""),
        (number_text(summary.requests_per_s), ""),
        (number_text(summary.goodput_per_s), ""),
        *(interval_cell(latency, name) for latency in (summary.ttft_s, summary.e2e_s) for name in ("p50", "p99")),
    ]


def _curve_conclusion(document: Mapping[str, Any], points: Sequence[CurvePoint], found_rate: float | None) -> str:
    model, slos = document["target"]["model"], ", ".join(document["settings"]["slos"])
    search = document.get("max_rate")
    if search:
        kept = "none of the tested rates" if found_rate is None else f"{number_text(found_rate)} requests/s"
        bound = "at" if found_rate is None else "up to" if search["is_found"] else "at least up to"
        return f"{model} meets {slos} {bound} {kept} ({search['ended']})."
    if not slos:
        return f"{model} at {len(points)} rates; no objective was given."
    rates = [number_text(rate) for rate, _, meets in points if meets]
    if not rates:
        return f"{model} meets {slos} at none of these rates."
    return f"{model} meets {slos} at {', '.join(rates)} requests/s; {len(points)} rates were tested."


def _curve_plots(points: Sequence[CurvePoint], found_rate: float | None) -> list[Plot]:
    page_plots = []
    for metric, label in (("ttft_s", "time to first token"), ("e2e_s", "end-to-end latency")):
        if any(getattr(summary, metric).n for _, summary, _ in points):
            hint = "Lower is better. The bend is where the server reaches its capacity."
            svg = plots.plot_curve(points, metric, label, found_rate)
            page_plots.append(Plot(f"{label.capitalize()} against request rate", hint, svg))
    hint = "On the grey line every offered request is answered."
    page_plots.append(Plot("Answered requests and goodput against rate", hint, plots.plot_answered(points, found_rate)))
    return page_plots
