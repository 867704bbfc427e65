"""From rows to figures: exact percentiles, throughput in the measured window, errors by kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.rows import Row


@dataclass(frozen=True)
class Percentiles:
    """Exact percentiles of raw samples, in seconds; None where there is no sample."""

    p50: float | None
    p90: float | None
    p99: float | None
    n: int


@dataclass(frozen=True)
class LoadSummary:
    """What a load run measured between warm-up and end; docs/metrics.md defines each figure."""

    window_s: float
    num_requests: int
    """Requests due in the window."""
    errors: dict[str, int]
    """Failed ones among them, by kind."""
    e2e_s: Percentiles
    ttft_s: Percentiles
    itl_s: Percentiles
    requests_per_s: float
    """Good answers completed in the window, over its length."""
    output_tokens_per_s: float
    """Streamed tokens that arrived in the window, over its length."""
    items_per_s: float
    prompt_tokens_mean: float | None
    prefix_cache_hit_frac: float | None = None
    """Prompt tokens that the engine found in its prefix cache, of all; None where it does not say."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    rows: Sequence[Row], warmup_s: float, end_s: float, prefix_cache_hit_frac: float | None = None
) -> LoadSummary:
    """Figures of the window [warmup_s, end_s) of a run.

    Latency is that of requests due in the window, however late they ended; throughput is
    what arrived in it, whenever it was asked for.
    """
    due = [row for row in rows if warmup_s <= row.due_s < end_s]
    good = [row for row in due if row.error is None]
    ended = [row for row in rows if row.error is None and warmup_s <= row.end_s < end_s]
    arrived = sum(count for row in rows for at, count in row.arrivals if warmup_s <= at < end_s)
    window_s = end_s - warmup_s
    return LoadSummary(
        window_s=window_s,
        num_requests=len(due),
        errors=dict(Counter(row.error for row in due if row.error is not None)),
        e2e_s=percentiles([row.e2e_s for row in good]),
        ttft_s=percentiles([row.ttft_s for row in good if row.ttft_s is not None]),
        itl_s=percentiles([gap for row in good for gap in row.inter_token_gaps_s()]),
        requests_per_s=len(ended) / window_s,
        output_tokens_per_s=arrived / window_s,
        items_per_s=sum(row.num_items for row in ended) / window_s,
        prompt_tokens_mean=sum(row.prompt_tokens for row in good) / len(good) if good else None,
        prefix_cache_hit_frac=prefix_cache_hit_frac,
    )


def percentiles(samples: Sequence[float]) -> Percentiles:
    """The nearest-rank 50th, 90th and 99th percentile: each is one of the samples."""
    ordered = sorted(samples)

    def rank(frac: float) -> float | None:
        return ordered[max(0, math.ceil(frac * len(ordered)) - 1)] if ordered else None

    return Percentiles(rank(0.50), rank(0.90), rank(0.99), len(ordered))
