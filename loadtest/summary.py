"""From rows to figures: exact percentiles with intervals, throughput in the measured window, errors by kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slimserve.loadtest.rows import Row
from slimserve.workloads.interface import Estimate

FRACTIONS = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
_CONFIDENCE = 0.95
_STEADY_ALPHA = 0.01
_STEADY_CHANGE = 0.20
_FEWEST_FOR_STEADY = 20


@dataclass(frozen=True)
class Percentiles:
    """Exact percentiles of raw samples, in seconds; None where there is no sample."""

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    mean: float | None
    n: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By percentile, its 95% interval; absent where there are too few samples for one."""


@dataclass(frozen=True)
class ObjectiveResult:
    """What an objective asked for and what was measured, in seconds or as a share."""

    text: str
    value: float | None
    limit: float
    is_met: bool


@dataclass(frozen=True)
class ServerCounts:
    """What the server's own /metrics say of a run, of all requests between two readings, warm-up included."""

    requests: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    prefix_cache_hit_frac: float | None = None
    """Prompt tokens that the engine found in its prefix cache, of all."""
    preemptions: float | None = None
    queue_mean_s: float | None = None
    """Mean seconds from arrival in the engine to its first step."""
    num_waiting_peak: float | None = None
    """Largest number of waiting requests among readings each second."""
    ttft_p50_bracket_s: tuple[float, float] | None = None
    """Buckets of the server's histograms in which its medians lie."""
    itl_p50_bracket_s: tuple[float, float] | None = None
    e2e_p50_bracket_s: tuple[float, float] | None = None


@dataclass(frozen=True)
class ClientCounts:
    """What the load generator says of itself."""

    num_processes: int = 1
    cpu_frac: float = 0.0
    """CPU seconds over wall seconds, of the busiest of its processes."""
    send_lag: Percentiles | None = None
    """How late requests were sent."""


@dataclass(frozen=True)
class LoadSummary:
    """What a load run measured between warm-up and cool-down; docs/metrics.md defines each figure."""

    window_s: float
    num_requests: int
    """Requests due in the window."""
    errors: dict[str, int]
    """Failed ones among them, by kind."""
    e2e_s: Percentiles
    ttft_s: Percentiles
    itl_s: Percentiles
    tpot_s: Percentiles
    answer_s: Percentiles
    """From due until the first token after the chain of thought."""
    offered_per_s: float
    """Requests due in the window, over its length."""
    requests_per_s: float
    """Good answers completed in the window, over its length."""
    output_tokens_per_s: float
    """StreamedReply tokens that arrived in the window, over its length."""
    items_per_s: float
    prompt_tokens_mean: float | None
    output_tokens_mean: float | None
    cached_frac: float | None
    """Prompt tokens that the server says, per answer, it did not compute, of all; None where it does not say."""
    finish_reasons: dict[str, int]
    num_repeats: int
    """Requests of the whole run whose prompt an earlier one had asked already, repeat visits left out."""
    objectives: list[ObjectiveResult] = field(default_factory=list)
    goodput_per_s: float | None = None
    """Requests per second that kept every objective; None where there is none."""
    quality: dict[str, Estimate] = field(default_factory=dict)
    """The workload's quality figures, from the answers of the window."""
    num_correct: int | None = None
    """Good answers that the verifier accepts; None for workloads without one."""
    costs: dict[str, float] = field(default_factory=dict)
    """At the price that the user gave: per million output tokens, per million items, per correct answer."""
    server: ServerCounts = field(default_factory=ServerCounts)
    client: ClientCounts = field(default_factory=ClientCounts)
    invalid: list[str] = field(default_factory=list)
    """Why the figures are not the server's; empty for a valid run."""
    warnings: list[str] = field(default_factory=list)
    by_kind: dict[str, LoadSummary] = field(default_factory=dict)
    """Of each workload of a mixed run."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_summary(document: dict[str, Any]) -> LoadSummary:
    """The summary that as_dict turned into `document`."""
    from pydantic import TypeAdapter

    return TypeAdapter(LoadSummary).validate_python(document)


def summarize(rows: Sequence[Row], begin_s: float, end_s: float) -> LoadSummary:
    """Figures of the window [begin_s, end_s) of a run that rows alone give.

    Latency is that of requests due in the window, however late they ended; throughput is
    what arrived in it, whenever it was asked for.
    """
    due = [row for row in rows if begin_s <= row.scheduled_s < end_s]
    good = [row for row in due if row.error is None]
    ended = [row for row in rows if row.error is None and begin_s <= row.end_s < end_s]
    arrived = sum(count for row in rows for at, count in row.arrivals if begin_s <= at < end_s)
    window_s = end_s - begin_s
    told = [row for row in good if row.cached_tokens is not None]
    asked = sum(row.prompt_tokens for row in told)
    kinds = sorted({row.kind for row in rows})
    return LoadSummary(
        window_s=window_s,
        num_requests=len(due),
        errors=dict(Counter(row.error for row in due if row.error is not None)),
        e2e_s=percentiles([row.e2e_s for row in good]),
        ttft_s=percentiles(_known(row.ttft_s for row in good)),
        itl_s=percentiles([gap for row in good for gap in row.inter_token_gaps_s()]),
        tpot_s=percentiles(_known(row.tpot_s for row in good)),
        answer_s=percentiles([row.first_answer_s - row.scheduled_s for row in good if row.first_answer_s is not None]),
        offered_per_s=len(due) / window_s,
        requests_per_s=len(ended) / window_s,
        output_tokens_per_s=arrived / window_s,
        items_per_s=sum(row.num_items for row in ended) / window_s,
        prompt_tokens_mean=sum(row.prompt_tokens for row in good) / len(good) if good else None,
        output_tokens_mean=sum(row.output_tokens for row in good) / len(good) if good else None,
        cached_frac=sum(row.cached_tokens or 0 for row in told) / asked if asked else None,
        finish_reasons=dict(Counter(row.finish_reason for row in good if row.finish_reason)),
        num_repeats=len(rows) - len({(row.kind, row.prompt) for row in rows}) if rows and rows[0].prompt >= 0 else 0,
        warnings=[drift] if (drift := steady_state_warning(good)) else [],
        client=ClientCounts(send_lag=percentiles([row.send_lag_s for row in due])),
        by_kind={kind: summarize([row for row in rows if row.kind == kind], begin_s, end_s) for kind in kinds}
        if len(kinds) > 1
        else {},
    )


def steady_state_warning(rows: Sequence[Row]) -> str | None:
    """What speaks against a steady state: a latency that differs between the first and the last third of the window.

    Both a test (Mann-Whitney, 1%) and a size (medians more than a fifth apart) must say so.
    """
    ordered = sorted(rows, key=lambda row: row.scheduled_s)
    third = len(ordered) // 3
    if third < _FEWEST_FOR_STEADY:
        return None
    from scipy.stats import mannwhitneyu

    first, last = ([row.e2e_s for row in part] for part in (ordered[:third], ordered[-third:]))
    before, after = percentile(sorted(first), 0.5), percentile(sorted(last), 0.5)
    if mannwhitneyu(first, last).pvalue >= _STEADY_ALPHA or abs(after - before) <= _STEADY_CHANGE * before:
        return None
    way = "rose" if after > before else "fell"
    return f"not steady: the median latency {way} from {before:.3f} s to {after:.3f} s within the window"


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Nearest-rank percentiles, so that each is one of the samples, with their intervals."""
    ordered = sorted(samples)
    n = len(ordered)
    if not n:
        return Percentiles(None, None, None, None, None, 0)
    values = {name: percentile(ordered, frac) for name, frac in FRACTIONS.items()}
    found = {name: percentile_interval(ordered, frac) for name, frac in FRACTIONS.items()}
    intervals = {name: interval for name, interval in found.items() if interval is not None}
    return Percentiles(**values, mean=math.fsum(ordered) / n, n=n, intervals=intervals)


def percentile(ordered: Sequence[float], frac: float) -> float:
    """The nearest-rank percentile of ascending samples, of which there is at least one."""
    return ordered[max(0, math.ceil(frac * len(ordered)) - 1)]


def percentile_interval(
    ordered: Sequence[float], frac: float, confidence: float = _CONFIDENCE
) -> tuple[float, float] | None:
    """A distribution-free interval of a percentile from ascending samples; None where there are too few for one.

    The number of samples below the true percentile is binomial, so two of the order statistics enclose it with at
    least this confidence where samples are independent (David and Nagaraja, Order Statistics, section 7.1). Of p95 it
    takes 72 samples, of p99 368.
    """
    from scipy.stats import binom

    n, tail = len(ordered), (1 - confidence) / 2
    # Ranks low < high with P(low <= number below < high) >= confidence.
    low = int(binom.ppf(tail, n, frac))
    high = int(binom.ppf(1 - tail, n, frac)) + 1
    if low < 1 or high > n:
        return None
    return ordered[low - 1], ordered[high - 1]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
