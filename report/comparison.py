"""The report of a comparison: one self-contained page with the verdict on top, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import cast

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
from slimserve.loadtest.slo import Metric, samples_of
from slimserve.report import comparison_plots as plots
from slimserve.report import terminal
from slimserve.report.comparison_tables import Cell, Table, Tables, VariantRow
from slimserve.report.page import (
    Line,
    Plot,
    environment_lines,
    number_text,
    percent_text,
    render_page,
    setting_lines,
    words,
)
from slimserve.report.plots import plot_distribution
from slimserve.workloads import load_workload

REPORT_FILE = "report.html"


def write_report(comparison: Comparison, directory: Path) -> Path:
    """Render `report.html` from a comparison and the raw rows of its load tests in `directory`.

    The page embeds its plots and styles, so it opens without a network.
    """
    tables = Tables(comparison)
    page = render_page(
        "comparison.html.j2",
        comparison=comparison,
        facts=_facts(comparison, tables),
        invalid=list(_invalid_loads(comparison)),
        tables=[tables.overview(), *(tables.workload(workload) for workload in comparison.workloads)],
        plots=_plots(comparison, tables, directory),
        details=[*tables.signals(), *tables.quality(), *tables.bottlenecks(), *tables.rank_agreement()],
        losses=_losses(comparison),
        variants=[Line(variant.name, _description(variant)) for variant in comparison.variants],
        settings=list(setting_lines({**asdict(comparison.preset), **asdict(comparison.requirements)})),
        slo_rates=[Line(name, f"{number_text(rate)} requests/s") for name, rate in comparison.slo_rates.items()],
        environment=environment_lines(vars(comparison)),
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
    from rich.console import Console
    from rich.text import Text

    console = Console()
    tables = Tables(comparison)
    overview = tables.overview()
    for table in (overview, *(tables.workload(workload) for workload in comparison.workloads)):
        rows = [[row.name, *(text for text, _ in row.cells)] for row in table.rows]
        terminal.print_table(console, table.headings, rows, title=table.title)
        console.print()
    for sentence in _invalid_loads(comparison):
        console.print(Text(sentence, style="yellow"))
    for row in overview.rows:
        console.print(Text(f"{row.name}: {row.status}"))
    for number, sentence in enumerate(comparison.verdict.sentences if comparison.verdict else ()):
        console.print(Text(sentence, style="" if number else "bold"))


def _facts(comparison: Comparison, tables: Tables) -> list[tuple[str, Cell]]:
    """Return the winner against the reference in a few values; only the confidence if the reference wins."""
    verdict = comparison.verdict
    if verdict is None or verdict.winner is None:
        return []
    name, winner, reference = verdict.winner, comparison.variant(verdict.winner), comparison.reference
    confidence: tuple[str, Cell] = ("confidence", (percent_text(verdict.confidence), verdict.confidence_words))
    if name == reference:
        return [confidence]
    overview = next(row for row in tables.overview().rows if row.name == name).cells
    base = comparison.variant(reference)
    facts: list[tuple[str, Cell]] = [("cost per unit of work", (f"{overview[0][0]} of {reference}'s", overview[0][1]))]
    for number, workload in enumerate(comparison.workloads, 1):
        view = load_workload(workload).view
        ratio = spread(
            getattr(ours.capacity[workload].summary, view.speed) / speed
            for ours, theirs in zip(winner.rounds, base.rounds, strict=False)
            if workload in ours.capacity and workload in theirs.capacity
            if (speed := getattr(theirs.capacity[workload].summary, view.speed)) > 0
        )
        if ratio:
            span = f"{ratio.min:.2f} to {ratio.max:.2f} over {ratio.n} rounds" if ratio.n > 1 else ""
            facts.append((f"{workload}, {view.speed_label}", (f"{ratio.median:.2f} × {reference}'s", span)))
        required = f"required: {1 - comparison.requirements.max_quality_loss_frac:.0%}"
        text, interval = overview[number]
        facts.append((f"{workload} quality kept", (text, "; ".join(filter(None, (interval, required))))))
    if winner.disk_bytes and base.disk_bytes:
        sizes = f"{winner.disk_bytes / 2**20:,.0f} MiB instead of {base.disk_bytes / 2**20:,.0f}"
        facts.append(("size on disk", (f"{winner.disk_bytes / base.disk_bytes:.0%} of {reference}'s", sizes)))
    return [*facts, confidence]


def _loads(comparison: Comparison) -> Iterator[tuple[str, LoadRun]]:
    """Yield every load test with a description."""
    for variant in comparison.variants:
        for one in variant.rounds:
            for workload, run in one.capacity.items():
                yield f"{variant.name}, {workload} in closed loop, round {one.number}", run
            for workload, runs in one.at_rate.items():
                for run in runs:
                    yield f"{variant.name}, {workload} at {run.rate_rps or 0:.3g} requests/s, round {one.number}", run


def _invalid_loads(comparison: Comparison) -> Iterator[str]:
    """Yield a sentence for each load test whose values do not describe the server."""
    for name, run in _loads(comparison):
        if run.summary.invalid:
            yield f"INVALID load test ({name}): {'; '.join(run.summary.invalid)}."


def _losses(comparison: Comparison) -> Table | None:
    baseline = comparison.baseline
    if baseline is None:
        return None
    rows = [
        VariantRow(
            loss.variant,
            "LOSS ABOVE THE LIMIT" if loss.fails else "within the limit",
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
        f"Comparison with {baseline.baseline}",
        " ".join(f"{note}." for note in baseline.notes),
        ["variant", "metric", "loss (negative: gain)", "limit"],
        rows,
    )


def _description(variant: VariantResult) -> str:
    location = f"at {variant.url}, an external server" if variant.url else variant.directory or ""
    build = "" if variant.build_s is None else f"built in {variant.build_s:.1f} s"
    return "; ".join(filter(None, (variant.summary, location, build)))


def _plots(comparison: Comparison, tables: Tables, directory: Path) -> list[Plot]:
    return [
        plot
        for workload in comparison.workloads
        for plot in (
            *_tradeoffs(comparison, tables, workload),
            *_recovery(comparison, tables, workload),
            *_latency_over_rate(comparison, workload),
            *_distribution(comparison, workload, directory),
        )
    ]


def _tradeoffs(comparison: Comparison, tables: Tables, workload: str) -> Iterator[Plot]:
    """Yield the plots of quality against cost and against speed."""
    view, metric = load_workload(workload).view, comparison.workloads[workload]
    required_frac = 1 - comparison.requirements.max_quality_loss_frac
    base = comparison.variant(comparison.reference).quality.get(workload, {}).get(metric)
    signal = comparison.signals.get(workload)
    required = None
    if base and signal and base.value == base.value and signal.floor == signal.floor:
        required = signal.floor + (base.value - signal.floor) * required_frac
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
            x, quality = pick(variant), variant.quality.get(workload, {}).get(metric)
            if x is None or quality is None or quality.value != quality.value:
                continue
            decision = tables.decisions.get(variant.name)
            dominated = decision.dominated_by if decision else []
            is_winner = comparison.verdict is not None and comparison.verdict.winner == variant.name
            notes = ["ship this"] * is_winner + ([f"dominated by {', '.join(dominated)}"] if dominated else [])
            label = f"{variant.name}{' (' + '; '.join(notes) + ')' if notes else ''}"
            points.append(plots.TradeoffPoint(number, label, quality, x, bool(dominated), is_winner))
        if points:
            hint = f"{better} is better. Bars: 95% interval, range over rounds. Ring: ship this. Hollow: dominated."
            label = f"required: {required_frac:.0%} of {comparison.reference} above chance"
            svg = plots.plot_tradeoff(points, x_label, view.quality_label, required, label)
            yield Plot(f"{workload.capitalize()}: quality against {against}", hint, svg)


def _recovery(comparison: Comparison, tables: Tables, workload: str) -> Iterator[Plot]:
    recoveries = []
    for number, variant in enumerate(comparison.variants):
        decision = tables.decisions.get(variant.name)
        if decision and workload in decision.quality and variant.name != comparison.reference:
            low, high = tables.kept_interval(variant, workload) or (None, None)
            recoveries.append(plots.Recovery(number, variant.name, decision.quality[workload].kept_frac, low, high))
    if recoveries:
        label = f"{load_workload(workload).view.quality_label}, % of {comparison.reference} above chance"
        svg = plots.plot_recovery(recoveries, label, 1 - comparison.requirements.max_quality_loss_frac)
        hint = "Further right is better. Bars are 95% intervals, paired prompt by prompt."
        yield Plot(f"{workload.capitalize()}: quality kept", hint, svg)


def _latency_over_rate(comparison: Comparison, workload: str) -> Iterator[Plot]:
    rates = comparison.rates(workload)
    if len(rates) < 2:
        return
    name, latency = next(iter(load_workload(workload).view.latencies.items()))
    series = []
    for number, variant in enumerate(comparison.variants):
        spreads = [
            (rate, spread(getattr(load, latency).p99 for load in variant.at_rate(workload, rate))) for rate in rates
        ]
        known = [(rate, one) for rate, one in spreads if one]
        if known:
            series.append((number, variant.name, known))
    if series:
        svg = plots.plot_latency_over_rate(series, f"{name}, p99 (ms)", comparison.slo_rates.get(workload))
        hint = "Lower is better. Medians over rounds with their range. A rate far beyond capacity has no point."
        yield Plot(f"{workload.capitalize()}: latency against request rate", hint, svg)


def _distribution(comparison: Comparison, workload: str, directory: Path) -> Iterator[Plot]:
    """Yield the latency distribution over all rounds, at the SLO rate or else in the closed loop."""
    view, rate = load_workload(workload).view, comparison.slo_rates.get(workload)
    metric = cast("Metric", view.distribution)
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
                window = (row for row in rows if row.error is None and begin_s <= row.scheduled_s < end_s)
                samples += [sample for row in window for sample in samples_of(row, metric)]
        series.append((variant.name, samples))
    if any(samples for _, samples in series):
        load = "in closed loop" if rate is None else f"at {number_text(rate)} requests/s"
        hint = "Further left is better. All rounds together; the axis ends slightly above the largest p99."
        svg = plot_distribution(series, view.distribution_label)
        yield Plot(f"{workload.capitalize()}: distribution {load}", hint, svg)
