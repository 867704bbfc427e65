"""The server's own Prometheus metrics of a run, and their disagreements with the client's measurement."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import httpx

from slimserve.core.openai_client import Target, auth_headers
from slimserve.loadtest.rows import Row
from slimserve.loadtest.summary import Percentiles, ServerCounts

_TIMEOUT_S = 5.0
_INTERVAL_S = 1.0
_TOLERANCE_FRAC = 0.01
_TOLERANCE = {"requests": 2, "output tokens": 2, "prompt tokens": 100}
"""Allowance for the one-token request that probes the server before the load."""
_TOLERANCE_S = 0.005

Samples = Mapping[str, Mapping[str, float]]
"""Values by series and bucket edge `le` ("" without buckets), summed over all other labels."""


def read_metrics(target: Target) -> Samples:
    """Return the Prometheus series of the target's model; empty if the server exports none."""
    from prometheus_client.parser import text_string_to_metric_families

    by_series: dict[str, dict[str, float]] = {}
    try:
        response = httpx.get(f"{target.url}/metrics", headers=auth_headers(), timeout=_TIMEOUT_S)
        response.raise_for_status()
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.labels.get("model_name", target.model) == target.model:
                    series = by_series.setdefault(sample.name, {})
                    edge = sample.labels.get("le", "")
                    series[edge] = series.get(edge, 0.0) + sample.value
    except (httpx.HTTPError, ValueError):
        return {}
    return by_series


@dataclass
class ServerMonitor:
    """Reads /metrics before and after a run, and the queue length every second; `counts` returns the difference."""

    target: Target
    _before: Samples = field(default_factory=dict)
    _after: Samples = field(default_factory=dict)
    _waiting: list[float] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ServerMonitor:
        self._before = read_metrics(self.target)
        self._thread = threading.Thread(target=self._poll, daemon=True)
        if self._before:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._before:
            self._thread.join()
            self._after = read_metrics(self.target)

    def counts(self) -> ServerCounts:
        """Return the growth of the counters between the two readings; None for a counter that is not exported."""
        return counts_between(self._before, self._after, self._waiting)

    def _poll(self) -> None:
        while not self._is_over.wait(_INTERVAL_S):
            waiting = read_metrics(self.target).get("vllm:num_requests_waiting", {})
            self._waiting += waiting.values()


def counts_between(before: Samples, after: Samples, waiting: Sequence[float] = ()) -> ServerCounts:
    """Return the growth of vLLM's counters and histograms between two readings."""

    def growth(name: str) -> float | None:
        if name not in after:
            return None
        return after[name].get("", 0.0) - before.get(name, {}).get("", 0.0)

    def median_bracket(name: str) -> tuple[float, float] | None:
        edges = after.get(f"{name}_bucket", {})
        return _median_bucket({edge: edges[edge] - before.get(f"{name}_bucket", {}).get(edge, 0.0) for edge in edges})

    queries, hits = growth("vllm:prefix_cache_queries_total"), growth("vllm:prefix_cache_hits_total")
    external_hits = growth("vllm:external_prefix_cache_hits_total") or 0.0
    queued, num_queued = growth("vllm:request_queue_time_seconds_sum"), growth("vllm:request_queue_time_seconds_count")
    return ServerCounts(
        requests=growth("vllm:request_success_total"),
        prompt_tokens=growth("vllm:prompt_tokens_total"),
        output_tokens=growth("vllm:generation_tokens_total"),
        prefix_cache_hit_frac=(hits + external_hits) / queries if queries and hits is not None else None,
        preemptions=growth("vllm:num_preemptions_total"),
        queue_mean_s=queued / num_queued if queued is not None and num_queued else None,
        num_waiting_peak=max(waiting) if waiting else None,
        ttft_p50_bracket_s=median_bracket("vllm:time_to_first_token_seconds"),
        itl_p50_bracket_s=median_bracket("vllm:inter_token_latency_seconds"),
        e2e_p50_bracket_s=median_bracket("vllm:e2e_request_latency_seconds"),
    )


def disagreements(rows: Sequence[Row], counts: ServerCounts, ttft: Percentiles, itl: Percentiles) -> list[str]:
    """Return a sentence for each value on which client and server disagree; `rows` are those of the complete run.

    Returns nothing if a request failed or scored items: the client cannot know how many engine requests those made.
    """
    if not rows or any(row.error or row.num_items for row in rows):
        return []
    messages = []
    pairs = {
        "output tokens": (sum(row.output_tokens for row in rows), counts.output_tokens),
        "prompt tokens": (sum(row.prompt_tokens for row in rows), counts.prompt_tokens),
        "requests": (len(rows), counts.requests),
    }
    for what, (ours, theirs) in pairs.items():
        if theirs is not None and abs(ours - theirs) > max(_TOLERANCE_FRAC * ours, _TOLERANCE[what]):
            messages.append(f"the client counted {ours} {what}, the server {theirs:.0f}: is it shared?")
    brackets = {
        "first token": (ttft.p50, counts.ttft_p50_bracket_s),
        "time between tokens": (itl.p50, counts.itl_p50_bracket_s),
    }
    for what, (median, bracket) in brackets.items():
        if median is None or bracket is None:
            continue
        low, high = bracket
        if median < low * (1 - _TOLERANCE_FRAC) or median > high * (1 + _TOLERANCE_FRAC) + _TOLERANCE_S:
            messages.append(
                f"the client's median {what} is {median * 1000:.1f} ms, the server's between "
                f"{low * 1000:.1f} and {high * 1000:.1f} ms: the network, a proxy or the client adds the difference"
            )
    return messages


def _median_bucket(grown: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the bucket of a cumulative histogram that holds its median; None if it is empty or unbounded."""
    edges = sorted((float(edge), count) for edge, count in grown.items())
    total = edges[-1][1] if edges else 0.0
    low = 0.0
    for edge, count in edges:
        if total and count >= total / 2:
            return (low, edge) if math.isfinite(edge) else None
        low = edge
    return None
