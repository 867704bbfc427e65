"""A comparison as a person sees it: one self-contained page with the verdict on top, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

from slimserve.compare.results import (
    RESULTS_FILE,
    Comparison,
    LoadRun,
    Spread,
    VariantResult,
    load_comparison,
    spread,
)
from slimserve.core.progress import print_status
from slimserve.core.storage import write_atomically
from slimserve.loadtest.rows import read_rows
from slimserve.loadtest.slo import samples_of
from slimserve.report import comparison_plots as plots
from slimserve.report.comparison_tables import Cell, Table, Tables, VariantLine
from slimserve.report.page import Line, Plot, number_text, origin_lines, percent_text, render_page, setting_lines, words
from slimserve.report.plots import plot_distribution
from slimserve.workloads import load_workload

REPORT_FILE = "report.html"


def write_report(comparison: Comparison, directory: Path) -> Path:
    """Render `report.html` from a comparison and the raw rows that its loads left in `directory`.

    The page embeds its plots and styles, so it opens without a network.
    """
    tables = Tables(comparison)
    page = render_page(
        "comparison.html.j2",
        comparison=comparison,
        facts=_facts(comparison, tables),
        faults=list(_faults(comparison)),
        tables=[tables.overview(), *(tables.workload(workload) for workload in comparison.workloads)],
        plots=_plots(comparison, tables, directory),
        details=[*tables.quality(), *tables.bottlenecks(), *tables.rank_agreement()],
        losses=_losses(comparison),
        variants=[Line(variant.name, _described(variant)) for variant in comparison.variants],
        settings=list(setting_lines({**asdict(comparison.preset), **asdict(comparison.requirements)})),
        judged=[Line(name, f"{number_text(rate)} requests/s") for name, rate in comparison.slo_rates.items()],
        origin=origin_lines(vars(comparison)),
    )
    path = directory / REPORT_FILE
    write_atomically(path, page)
    return path


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Report the comparison that runs in this context and writes its results.json to `folder`.

    Writes report.html and prints the tables. After Ctrl-C or SIGTERM the page shows the measurements so far.
    """
    try:
        yield
    except SystemExit:
        if (folder / RESULTS_FILE).exists():
            report = write_report(load_comparison(folder), folder)
            print_status(f"interrupted; measurements so far: {report}")
        raise
    comparison = load_comparison(folder)
    report = write_report(comparison, folder)
    print_table(comparison)
    print_status(f"open: {report}")


def print_table(comparison: Comparison) -> None:
    """Print the report's first tables, without their intervals, and the verdict to standard output."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    tables = Tables(comparison)
    kinds = [tables.overview(), *(tables.workload(workload) for workload in comparison.workloads)]
    for table in kinds:
        shown = RichTable(title=table.title, box=SIMPLE, padding=(0, 1, 0, 0))
        for place, heading in enumerate(table.headings):
            shown.add_column(Text(heading), justify="right" if place else "left", overflow="fold")
        for line in table.lines:
            shown.add_row(*map(Text, [line.name, *(text for text, _ in line.cells)]))
        console.print(shown)
    for fault in _faults(comparison):
        console.print(Text(fault, style="yellow"))
    for line in kinds[0].lines:
        console.print(Text(f"{line.name}: {line.status}"))
    for number, sentence in enumerate(comparison.verdict.sentences if comparison.verdict else ()):
        console.print(Text(sentence, style="" if number else "bold"))


def _facts(comparison: Comparison, tables: Tables) -> list[tuple[str, Cell]]:
    """The winner against the reference at a glance; empty where there is no winner or it is the reference."""
    verdict = comparison.verdict
    if verdict is None or verdict.winner is None:
        return []
    name, winner, reference = verdict.winner, comparison.variant(verdict.winner), comparison.reference
    sure: tuple[str, Cell] = ("how sure", (percent_text(verdict.confidence), verdict.confidence_words))
    if name == reference:
        return [sure]
    overview = next(line for line in tables.overview().lines if line.name == name).cells
    whole = comparison.variant(reference)
    facts: list[tuple[str, Cell]] = [("cost of a unit of work", (f"{overview[0][0]} of {reference}'s", overview[0][1]))]
    for number, workload in enumerate(comparison.workloads, 1):
        view = load_workload(workload).view
        ratio = spread(
            getattr(ours.capacity[workload].summary, view.speed) / speed
            for ours, theirs in zip(winner.rounds, whole.rounds, strict=False)
            if workload in ours.capacity and workload in theirs.capacity
            if (speed := getattr(theirs.capacity[workload].summary, view.speed)) > 0
        )
        if ratio:
            span = f"{ratio.min:.2f} to {ratio.max:.2f} over {ratio.n} rounds" if ratio.n > 1 else ""
            facts.append((f"{workload}, {view.speed_label}", (f"{ratio.median:.2f} × {reference}'s", span)))
        least = 1 - comparison.requirements.max_quality_loss_frac
        text, interval = overview[number]
        facts.append((f"{workload} quality kept", (text, f"{interval}; asked for: {least:.0%}".removeprefix("; "))))
    if winner.disk_bytes and whole.disk_bytes:
        sizes = f"{winner.disk_bytes / 2**20:,.0f} MiB instead of {whole.disk_bytes / 2**20:,.0f}"
        facts.append(("size on disk", (f"{winner.disk_bytes / whole.disk_bytes:.0%} of {reference}'s", sizes)))
    return [*facts, sure]


def _loads(comparison: Comparison) -> Iterator[tuple[str, LoadRun]]:
    """Every load that was run, with words that name it."""
    for variant in comparison.variants:
        for one in variant.rounds:
            for workload, run in one.capacity.items():
                yield f"{variant.name}, {workload} in closed loop, round {one.number}", run
            for workload, runs in one.at_rate.items():
                for run in runs:
                    yield f"{variant.name}, {workload} at {run.rate_rps or 0:.3g} requests/s, round {one.number}", run


def _faults(comparison: Comparison) -> Iterator[str]:
    """Loads whose figures are not the server's."""
    for name, run in _loads(comparison):
        if run.summary.invalid:
            yield f"INVALID load ({name}): {'; '.join(run.summary.invalid)}."


def _losses(comparison: Comparison) -> Table | None:
    """What was lost since an earlier run."""
    baseline = comparison.baseline
    if baseline is None:
        return None
    lines = [
        VariantLine(
            loss.variant,
            "LOST TOO MUCH" if loss.fails else "within the limit",
            "",
            [
                (f"{loss.workload}: {words(loss.metric)}", ""),
                (percent_text(loss.loss_frac, 1), f"{loss.low:.1%} to {loss.high:.1%}"),
                (percent_text(loss.limit_frac, 1), ""),
            ],
        )
        for loss in baseline.losses
    ]
    return Table(
        f"Against the earlier run {baseline.baseline}",
        " ".join(baseline.notes),
        ["variant", "figure", "loss (negative: gain)", "limit"],
        lines,
    )


def _described(variant: VariantResult) -> str:
    where = f"at {variant.url}, not started here" if variant.url else variant.directory or ""
    built = "" if variant.build_s is None else f"; built in {variant.build_s:.1f} s"
    return f"{variant.summary}{'; ' if variant.summary and where else ''}{where}{built}"


def _plots(comparison: Comparison, tables: Tables, directory: Path) -> list[Plot]:
    found = []
    for workload in comparison.workloads:
        found += [
            *_tradeoffs(comparison, tables, workload),
            *_recovery(comparison, tables, workload),
            *_over_rate(comparison, workload),
            *_distribution(comparison, workload, directory),
        ]
    return found


def _tradeoffs(comparison: Comparison, tables: Tables, workload: str) -> Iterator[Plot]:
    """Quality against cost and against speed."""
    view, primary_metric = load_workload(workload).view, comparison.workloads[workload]
    tolerance = comparison.requirements.max_quality_loss_frac
    whole = comparison.variant(comparison.reference).quality.get(workload, {}).get(primary_metric)
    least = whole.value * (1 - tolerance) if whole and whole.value == whole.value else None
    cost_label = f"{comparison.cost_unit} {words(view.cost)}"
    axes: tuple[tuple[str, str, str, Callable[[VariantResult], Spread | None]], ...] = (
        ("cost", cost_label, "Up and to the left", lambda one: one.costs.get(workload, {}).get(view.cost)),
        (
            "speed",
            view.speed_label,
            "Up and to the right",
            lambda one: spread(map(attrgetter(view.speed), one.capacity(workload))),
        ),
    )
    for against, x_label, better, pick in axes:
        points = []
        for number, variant in enumerate(comparison.variants):
            x, quality = pick(variant), variant.quality.get(workload, {}).get(primary_metric)
            if x is None or quality is None or quality.value != quality.value:
                continue
            decision = tables.decisions.get(variant.name)
            dominated = decision.dominated_by if decision else []
            is_winner = comparison.verdict is not None and comparison.verdict.winner == variant.name
            notes = ["ship this"] * is_winner + ([f"dominated by {', '.join(dominated)}"] if dominated else [])
            label = f"{variant.name}{' (' + '; '.join(notes) + ')' if notes else ''}"
            points.append(plots.Point(number, label, quality, x, bool(dominated), is_winner))
        if points:
            hint = f"{better} is better. Bars: 95% interval, range over rounds. Ring: ship this. Hollow: dominated."
            asked = f"asked for: {1 - tolerance:.0%} of {comparison.reference}"
            svg = plots.plot_tradeoff(points, x_label, view.quality_label, least, asked)
            yield Plot(f"{workload.capitalize()}: quality against {against}", hint, svg)


def _recovery(comparison: Comparison, tables: Tables, workload: str) -> Iterator[Plot]:
    recoveries = []
    for number, variant in enumerate(comparison.variants):
        decision = tables.decisions.get(variant.name)
        if decision and workload in decision.quality and variant.name != comparison.reference:
            low, high = tables.kept_interval(variant, workload) or (None, None)
            recoveries.append(plots.Recovery(number, variant.name, decision.quality[workload].kept_frac, low, high))
    if recoveries:
        label = f"{load_workload(workload).view.quality_label}, % of {comparison.reference}"
        svg = plots.plot_recovery(recoveries, label, 1 - comparison.requirements.max_quality_loss_frac)
        hint = "Further right is better. Bars are 95% intervals, paired prompt by prompt."
        yield Plot(f"{workload.capitalize()}: quality kept", hint, svg)


def _over_rate(comparison: Comparison, workload: str) -> Iterator[Plot]:
    rates = comparison.rates(workload)
    if len(rates) < 2:
        return
    name, latency = next(iter(load_workload(workload).view.latencies.items()))
    series = []
    for number, variant in enumerate(comparison.variants):
        course = [
            (rate, spread(getattr(load, latency).p99 for load in variant.at_rate(workload, rate))) for rate in rates
        ]
        known = [(rate, found) for rate, found in course if found]
        if known:
            series.append((number, variant.name, known))
    if series:
        svg = plots.plot_over_rate(series, f"{name}, p99 (ms)", comparison.slo_rates.get(workload))
        hint = "Lower is better. Medians over rounds with their range; a missing point is a rate far beyond capacity."
        yield Plot(f"{workload.capitalize()}: latency over rate", hint, svg)


def _distribution(comparison: Comparison, workload: str, directory: Path) -> Iterator[Plot]:
    """Latency at the judged rate, or of the closed loop where there is none, over all rounds."""
    view, rate = load_workload(workload).view, comparison.slo_rates.get(workload)
    begin_s = comparison.preset.warmup_s
    end_s = begin_s + comparison.preset.duration_s
    series: list[tuple[str, list[float]]] = []
    for variant in comparison.variants:
        samples: list[float] = []
        for one in variant.rounds:
            closed = [one.capacity[workload]] if workload in one.capacity else []
            at_rate = [run for run in one.at_rate.get(workload, []) if run.rate_rps == rate]
            for file in (directory / run.rows_file for run in (closed if rate is None else at_rate)):
                rows = read_rows(file) if file.exists() else []
                due = (row for row in rows if row.error is None and begin_s <= row.due_s < end_s)
                samples += [sample for row in due for sample in samples_of(row, view.distribution)]
        series.append((variant.name, samples))
    if any(samples for _, samples in series):
        load = "in closed loop" if rate is None else f"at {number_text(rate)} requests/s"
        hint = "Further left is better. All rounds together; the axis ends a little after the largest p99."
        svg = plot_distribution(series, view.distribution_label)
        yield Plot(f"{workload.capitalize()}: distribution {load}", hint, svg)
