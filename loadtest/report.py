"""A load summary as a table on the terminal."""

from __future__ import annotations

from loadtest.summary import LoadSummary
from loadtest.target import Target


def print_summary(suite: str, target: Target, summary: LoadSummary) -> None:
    """Print latencies in milliseconds and throughput to standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{suite} on {target.model} at {target.url}, {summary.window_s:.0f} s")
    for heading in ("", "p50", "p90", "p99", "n"):
        table.add_column(heading, justify="right" if heading else "left")
    latencies = {
        "end to end, ms": summary.e2e_s,
        "first token, ms": summary.ttft_s,
        "between tokens, ms": summary.itl_s,
    }
    for label, figure in latencies.items():
        if figure.p50 is not None and figure.p90 is not None and figure.p99 is not None:
            values = [f"{value * 1000:.1f}" for value in (figure.p50, figure.p90, figure.p99)]
            table.add_row(label, *values, str(figure.n))
    table.add_section()
    table.add_row("requests/s", f"{summary.requests_per_s:.2f}")
    table.add_row("output tokens/s", f"{summary.output_tokens_per_s:.1f}")
    table.add_row("scored items/s", f"{summary.items_per_s:.1f}")
    if summary.prefix_cache_hit_frac is not None:
        table.add_row("prefix cache hits", f"{summary.prefix_cache_hit_frac:.0%}")
    errors = ", ".join(f"{count} × {kind}" for kind, count in summary.errors.items())
    table.add_row("errors", errors or f"none of {summary.num_requests}")
    Console().print(table)
