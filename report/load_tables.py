"""The tables of a load test, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slimserve.loadtest.summary import LoadSummary, ObjectiveResult, Percentiles
from slimserve.report.page import NOT_KNOWN, Line, estimate_text, ms_text, number_text, percent_text, words

LATENCY_HEADINGS = ("latency, ms", "p50", "p90", "p95", "p99", "mean", "n")
Cell = tuple[str, str]
"""A value and its interval; the interval is empty if there is none."""


@dataclass(frozen=True)
class Part:
    """The tables of a run, or of one workload in a mixed run."""

    title: str
    latencies: list[list[Any]]
    """One row per kind of latency: its name, then its cells."""
    sections: list[tuple[str, list[Line]]]


def parts_of(title: str, summary: LoadSummary) -> list[Part]:
    """Return the tables of the whole run, then those of each workload in a mixed run."""
    total = Part(
        title,
        _latency_rows(summary),
        [
            *_metric_sections(summary),
            ("counted by the server, with warm-up and cool-down", _server_lines(summary)),
            ("load generator", _client_lines(summary)),
        ],
    )
    kinds = [
        Part(f"{kind} only", _latency_rows(part), _metric_sections(part)) for kind, part in summary.by_kind.items()
    ]
    return [
        Part(part.title, part.latencies, [entry for entry in part.sections if entry[1]]) for part in (total, *kinds)
    ]


def _latency_rows(summary: LoadSummary) -> list[list[Any]]:
    """Return percentiles in ms per kind of latency with samples; p50 and p99 have 95% intervals."""
    named = {
        "first token (TTFT)": summary.ttft_s,
        "first token of the answer": summary.answer_s,
        "between tokens (ITL)": summary.itl_s,
        "mean per token (TPOT)": summary.tpot_s,
        "end to end": summary.e2e_s,
    }
    return [
        [
            label,
            interval_cell(metric, "p50"),
            (ms_text(metric.p90), ""),
            (ms_text(metric.p95), ""),
            interval_cell(metric, "p99"),
            (ms_text(metric.mean), ""),
            (f"{metric.n:,}", ""),
        ]
        for label, metric in named.items()
        if metric.n
    ]


def interval_cell(latency: Percentiles, name: str) -> Cell:
    """Return a percentile in ms and its 95% interval."""
    interval = latency.intervals.get(name)
    return ms_text(getattr(latency, name)), f"{ms_text(interval[0])}–{ms_text(interval[1])}" if interval else ""


def _metric_sections(summary: LoadSummary) -> list[tuple[str, list[Line]]]:
    return [
        ("objectives", objective_lines(summary)),
        ("throughput", _throughput_lines(summary)),
        ("requests", _request_lines(summary)),
        (
            "quality of the answers under load, with 95% intervals",
            [Line(words(name), estimate_text(metric)) for name, metric in summary.quality.items()],
        ),
        (
            "cost at the given price",
            [Line(words(name), number_text(value)) for name, value in summary.costs.items()],
        ),
    ]


def objective_lines(summary: LoadSummary) -> list[Line]:
    return [Line(outcome.text, _outcome_text(outcome)) for outcome in summary.objectives]


def _outcome_text(outcome: ObjectiveResult) -> str:
    is_error_rate = outcome.text.strip().startswith("errors")
    if outcome.value is None:
        return "MISSED: requests failed, or there is no sample"
    value = percent_text(outcome.value, 2) if is_error_rate else f"{ms_text(outcome.value)} ms"
    limit = percent_text(outcome.limit, 2) if is_error_rate else f"{ms_text(outcome.limit)} ms"
    return f"met: {value}, at most {limit}" if outcome.is_met else f"MISSED: {value}, more than {limit}"


def _throughput_lines(summary: LoadSummary) -> list[Line]:
    lines = [
        Line("offered requests/s", number_text(summary.offered_per_s)),
        Line("answered requests/s", number_text(summary.requests_per_s)),
    ]
    if summary.goodput_per_s is not None:
        lines.append(Line("goodput, requests/s within every objective", number_text(summary.goodput_per_s)))
    if summary.output_tokens_per_s:
        lines.append(Line("output tokens/s", number_text(summary.output_tokens_per_s)))
    if summary.items_per_s:
        lines.append(Line("scored items/s", number_text(summary.items_per_s)))
    return lines


def _request_lines(summary: LoadSummary) -> list[Line]:
    lines = [
        Line("scheduled in the window", f"{summary.num_requests:,}"),
        Line("errors", _counts_text(summary.errors) or "none"),
        *(Line(f"reason of {error}", sentence) for error, sentence in summary.error_sentences.items()),
        Line("finish reasons", _counts_text(summary.finish_reasons) or NOT_KNOWN),
        Line(
            "mean prompt / output tokens",
            f"{number_text(summary.prompt_tokens_mean)} / {number_text(summary.output_tokens_mean)}",
        ),
        Line("prompt tokens from the prefix cache", _cached_text(summary)),
    ]
    if summary.num_correct is not None:
        lines.append(Line("correct answers", f"{summary.num_correct:,}"))
    if summary.num_repeats:
        lines.append(Line("prompts sent more than once", f"{summary.num_repeats:,}"))
    return lines


def _cached_text(summary: LoadSummary) -> str:
    """Return the cached fraction according to the answers and according to the server's metrics."""
    reported = {"in its answers": summary.cached_frac, "in its metrics": summary.server.prefix_cache_hit_frac}
    return (
        ", ".join(f"{percent_text(frac)} {where}" for where, frac in reported.items() if frac is not None)
        or "not reported"
    )


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in counts.items())


def _count_text(count: float | None) -> str:
    return NOT_KNOWN if count is None else f"{count:,.0f}"


def _server_lines(summary: LoadSummary) -> list[Line]:
    server = summary.server
    lines = [
        Line(label, text)
        for label, value, text in (
            ("requests", server.requests, _count_text(server.requests)),
            ("prompt tokens", server.prompt_tokens, _count_text(server.prompt_tokens)),
            ("output tokens", server.output_tokens, _count_text(server.output_tokens)),
            ("mean time in the queue", server.queue_mean_s, f"{ms_text(server.queue_mean_s)} ms"),
            ("peak number of waiting requests", server.num_waiting_peak, _count_text(server.num_waiting_peak)),
            ("preemptions", server.preemptions, _count_text(server.preemptions)),
        )
        if value is not None
    ]
    brackets = (
        ("first token, p50", server.ttft_p50_bracket_s, summary.ttft_s),
        ("between tokens, p50", server.itl_p50_bracket_s, summary.itl_s),
        ("end to end, p50", server.e2e_p50_bracket_s, summary.e2e_s),
    )
    lines += [
        Line(
            label,
            f"server: {ms_text(bracket[0])} to {ms_text(bracket[1])} ms, measured: {ms_text(ours.p50)} ms",
        )
        for label, bracket, ours in brackets
        if bracket is not None
    ]
    return lines


def _client_lines(summary: LoadSummary) -> list[Line]:
    client = summary.client
    lines = [
        Line("processes", str(client.num_processes)),
        Line("CPU of the busiest process (100% = one core)", percent_text(client.cpu_frac)),
    ]
    if client.send_lag is not None and client.send_lag.n:
        text = f"{ms_text(client.send_lag.p50)} ms at p50, {ms_text(client.send_lag.p99)} ms at p99"
        lines.append(Line("delay of sending", text))
    return lines
