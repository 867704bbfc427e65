"""Summaries of raw rows: exact percentiles with intervals, throughput in the measured window, errors by kind."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slimserve.core.statistics import percentile, percentile_interval
from slimserve.loadtest.rows import Row
from slimserve.workloads.interface import Estimate

FRACTIONS = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
_STEADY_ALPHA = 0.01
_STEADY_CHANGE = 0.20
_FEWEST_FOR_STEADY = 20


@dataclass(frozen=True)
class Percentiles:
    """Nearest-rank percentiles and mean of raw samples in seconds; None without samples."""

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    mean: float | None
    n: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95% confidence interval by percentile; absent if there are too few samples."""


@dataclass(frozen=True)
class ObjectiveResult:
    """An objective with its measured value; value and limit in seconds, or a fraction for errors."""

    text: str
    value: float | None
    limit: float
    is_met: bool


@dataclass(frozen=True)
class ServerCounts:
    """The server's own counts from /metrics, over all requests between two readings, warm-up included."""

    requests: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    prefix_cache_hit_frac: float | None = None
    """Fraction of prompt tokens that the engine found in its prefix cache."""
    preemptions: float | None = None
    queue_mean_s: float | None = None
    """Mean seconds from a request's arrival in the engine to its first step."""
    num_waiting_peak: float | None = None
    """Largest number of waiting requests; read once a second."""
    ttft_p50_bracket_s: tuple[float, float] | None = None
    """Histogram bucket in seconds that holds the server's own median; likewise for the two below."""
    itl_p50_bracket_s: tuple[float, float] | None = None
    e2e_p50_bracket_s: tuple[float, float] | None = None


@dataclass(frozen=True)
class ClientCounts:
    """Facts about the load generator itself."""

    num_processes: int = 1
    cpu_frac: float = 0.0
    """CPU seconds per second of its busiest process."""
    send_lag: Percentiles | None = None
    """Delay between scheduled and actual send times, in seconds."""
    longest_stall_s: float = 0.0
    """Longest time in seconds for which one of its processes stood still while requests of the window were open."""


@dataclass(frozen=True)
class LoadSummary:
    """Results of a load run between warm-up and cool-down; docs/metrics.md defines each metric."""

    window_s: float
    num_requests: int
    """Number of requests that were scheduled in the window."""
    errors: dict[str, int]
    """Number of failed requests among them, by kind."""
    e2e_s: Percentiles
    ttft_s: Percentiles
    itl_s: Percentiles
    tpot_s: Percentiles
    answer_s: Percentiles
    """Time from the schedule to the first token after the chain of thought."""
    offered_per_s: float
    """Scheduled requests per second of the window."""
    requests_per_s: float
    """Successful requests that ended in the window, per second."""
    output_tokens_per_s: float
    """Tokens that arrived in the window, per second; those of an answer without a stream arrive at its end."""
    items_per_s: float
    prompt_tokens_mean: float | None
    output_tokens_mean: float | None
    cached_frac: float | None
    """Fraction of prompt tokens that the server reports as cached; None if it reports none."""
    finish_reasons: dict[str, int]
    num_repeats: int
    """Number of requests of the run that repeat an earlier prompt, without intended repeat visits."""
    objectives: list[ObjectiveResult] = field(default_factory=list)
    goodput_per_s: float | None = None
    """Requests per second that met every objective; None without objectives."""
    quality: dict[str, Estimate] = field(default_factory=dict)
    """Quality metrics of the workload, from the answers in the window."""
    num_correct: int | None = None
    """Number of answers that the verifier accepts; None for workloads without a verifier."""
    costs: dict[str, float] = field(default_factory=dict)
    """Costs at the given price: per million output tokens, per million items and per correct answer."""
    server: ServerCounts = field(default_factory=ServerCounts)
    client: ClientCounts = field(default_factory=ClientCounts)
    invalid: list[str] = field(default_factory=list)
    """Reasons why the results do not describe the server; empty for a valid run."""
    warnings: list[str] = field(default_factory=list)
    by_kind: dict[str, LoadSummary] = field(default_factory=dict)
    """Summary of each workload of a mixed run."""
    error_sentences: dict[str, str] = field(default_factory=dict)
    """The server's most frequent explanation of each kind of error."""

    @property
    def num_succeeded(self) -> int:
        """Number of requests of the window that were answered without an error."""
        return self.num_requests - sum(self.errors.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_summary(document: dict[str, Any]) -> LoadSummary:
    """Return the summary that `as_dict` turned into `document`."""
    from pydantic import TypeAdapter

    return TypeAdapter(LoadSummary).validate_python(document)


def summarize(rows: Sequence[Row], begin_s: float, end_s: float) -> LoadSummary:
    """Summarize the window [begin_s, end_s) of a run from its rows alone.

    Latencies are those of requests scheduled in the window, even if they end later. Throughput counts what arrives in
    the window, even if it was requested earlier.
    """
    scheduled = [row for row in rows if begin_s <= row.scheduled_s < end_s]
    good = [row for row in scheduled if row.error is None]
    ended = [row for row in rows if row.error is None and begin_s <= row.end_s < end_s]
    arrived = sum(count for row in rows for at, count in row.arrivals if begin_s <= at < end_s)
    arrived += sum(row.output_tokens for row in ended if not row.arrivals)
    window_s = end_s - begin_s
    counted = [row for row in good if row.cached_tokens is not None]
    num_counted = sum(row.prompt_tokens for row in counted)
    kinds = sorted({row.kind for row in rows})
    return LoadSummary(
        window_s=window_s,
        num_requests=len(scheduled),
        errors=dict(Counter(row.error for row in scheduled if row.error is not None)),
        e2e_s=percentiles([row.e2e_s for row in good]),
        ttft_s=percentiles(_known(row.ttft_s for row in good)),
        itl_s=percentiles([gap for row in good for gap in row.inter_token_gaps_s()]),
        tpot_s=percentiles(_known(row.tpot_s for row in good)),
        answer_s=percentiles([row.first_answer_s - row.scheduled_s for row in good if row.first_answer_s is not None]),
        offered_per_s=len(scheduled) / window_s,
        requests_per_s=len(ended) / window_s,
        output_tokens_per_s=arrived / window_s,
        items_per_s=sum(row.num_items for row in ended) / window_s,
        prompt_tokens_mean=sum(row.prompt_tokens for row in good) / len(good) if good else None,
        output_tokens_mean=sum(row.output_tokens for row in good) / len(good) if good else None,
        cached_frac=sum(row.cached_tokens or 0 for row in counted) / num_counted if num_counted else None,
        finish_reasons=dict(Counter(row.finish_reason for row in good if row.finish_reason)),
        num_repeats=len(rows) - len({(row.kind, row.prompt) for row in rows}) if rows and rows[0].prompt >= 0 else 0,
        warnings=[warning] if (warning := steady_state_warning(good)) else [],
        client=ClientCounts(send_lag=percentiles([row.send_lag_s for row in scheduled])),
        by_kind={kind: summarize([row for row in rows if row.kind == kind], begin_s, end_s) for kind in kinds}
        if len(kinds) > 1
        else {},
    )


def steady_state_warning(rows: Sequence[Row]) -> str | None:
    """Return a warning if the latency differs between the first and the last third of the window.

    The Mann-Whitney test at 1% must reject equality, and the medians must differ by more than a fifth.
    """
    ordered = sorted(rows, key=lambda row: row.scheduled_s)
    third = len(ordered) // 3
    if third < _FEWEST_FOR_STEADY:
        return None
    from scipy.stats import mannwhitneyu

    first, last = ([row.e2e_s for row in part] for part in (ordered[:third], ordered[-third:]))
    before, after = percentile(first, 0.5), percentile(last, 0.5)
    if mannwhitneyu(first, last).pvalue >= _STEADY_ALPHA or abs(after - before) <= _STEADY_CHANGE * before:
        return None
    direction = "rose" if after > before else "fell"
    return f"not steady: the median latency {direction} from {before:.3f} s to {after:.3f} s within the window"


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Return the percentiles of the samples with their confidence intervals, and the mean."""
    if not samples:
        return Percentiles(None, None, None, None, None, 0)
    values = {name: percentile(samples, frac) for name, frac in FRACTIONS.items()}
    intervals = {
        name: interval
        for name, frac in FRACTIONS.items()
        if (interval := percentile_interval(samples, frac)) is not None
    }
    return Percentiles(**values, mean=statistics.fmean(samples), n=len(samples), intervals=intervals)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
