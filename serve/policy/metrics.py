"""The Prometheus metrics of the engine process and the gateway, one class for each part of the code that counts.

A class takes the registry to count into. The cached functions return the one instance of this process in the default
registry, which /metrics exports.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_HEADER_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMetrics:
    """Metrics of the middlewares in front of one engine."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "slimserve_requests", "Number of answered requests", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge(
            "slimserve_requests_in_flight", "Number of inference requests that hold a slot", registry=registry
        )
        self.queued = Gauge(
            "slimserve_requests_queued", "Number of inference requests that wait for a slot", registry=registry
        )
        self.queue_s = Histogram(
            "slimserve_queue_seconds",
            "Seconds that an admitted inference request waited for its slot",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_s = Histogram(
            "slimserve_request_seconds",
            "Seconds from the headers of a request to the last byte of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "slimserve_time_to_first_token_seconds",
            "Seconds from the headers of a request to the first chunk of its streamed answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token_s = Histogram(
            "slimserve_inter_token_seconds",
            "Seconds between two chunks of a streamed answer",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.rejections = Counter(
            "slimserve_rejections", "Number of requests rejected before they ran", ["reason"], registry=registry
        )


class ScoreMetrics:
    """Metrics of the scoring endpoints."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.items = Counter("slimserve_score_items", "Number of items in score requests", registry=registry)
        self.computed_items = Counter(
            "slimserve_score_computed_items",
            "Number of items that the engine computed; duplicates count once",
            registry=registry,
        )
        self.unknown_items = Counter(
            "slimserve_score_unknown_items",
            "Number of item ids in requests that the catalogue lacks",
            ["outcome"],
            registry=registry,
        )
        self.tokens = Counter(
            "slimserve_score_tokens",
            "Number of prompt tokens of score requests (a shared prefix once), and of those that warm requests compute",
            ["part"],
            registry=registry,
        )
        self.seconds = Histogram(
            "slimserve_score_seconds", "Seconds to score one request", buckets=_SECONDS, registry=registry
        )


class GatewayMetrics:
    """Metrics of the gateway and of the supervisor of its engines."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "slimserve_gateway_requests",
            "Number of requests that the gateway answered",
            ["variant", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "slimserve_gateway_in_flight",
            "Number of requests that the gateway has passed to an engine and that have not ended",
            ["variant"],
            registry=registry,
        )
        self.upstream_header_s = Histogram(
            "slimserve_gateway_upstream_header_seconds",
            "Seconds from sending a request to the engine until the headers of its answer",
            ["variant"],
            buckets=_HEADER_SECONDS,
            registry=registry,
        )
        self.restarts = Counter(
            "slimserve_restarts",
            "Number of times that a variant's engine ended and was restarted",
            ["variant"],
            registry=registry,
        )
        self.up = Gauge(
            "slimserve_variant_up", "1 if the variant is ready to answer, else 0", ["variant"], registry=registry
        )
        self.ready_s = Gauge(
            "slimserve_ready_seconds", "Seconds that the last start took until ready", ["variant"], registry=registry
        )


class RooflineMetrics:
    """Metrics of the hardware's roofline and of the rates achieved (serve/engine/roofline.py)."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.kernel = Gauge(
            "slimserve_kernel_info",
            "1 for the kernel that computes a weight format",
            ["format", "kernel"],
            registry=registry,
        )
        self.weight_bytes = Gauge("slimserve_weight_bytes", "Bytes of all weights", registry=registry)
        self.decode_bytes = Gauge(
            "slimserve_decode_bytes_per_token",
            "Bytes of weights that one decode step reads",
            registry=registry,
        )
        self.decode_roofline = Gauge(
            "slimserve_decode_roofline_tokens_per_second",
            "Maximum tokens per second of one stream: memory bandwidth over the bytes of a decode step",
            registry=registry,
        )
        self.prefill_roofline = Gauge(
            "slimserve_prefill_roofline_tokens_per_second",
            "Maximum prompt tokens per second: FLOP/s over the FLOPs of a prompt token",
            registry=registry,
        )
        self.decode_rate = Gauge(
            "slimserve_decode_tokens_per_second", "Generated tokens per second in the last window", registry=registry
        )
        self.prefill_rate = Gauge(
            "slimserve_prefill_tokens_per_second",
            "Computed prompt tokens per second in the last window",
            registry=registry,
        )


@cache
def request_metrics() -> RequestMetrics:
    """Return this process's request metrics."""
    return RequestMetrics()


@cache
def score_metrics() -> ScoreMetrics:
    """Return this process's score metrics."""
    return ScoreMetrics()


@cache
def gateway_metrics() -> GatewayMetrics:
    """Return this process's gateway metrics."""
    return GatewayMetrics()


@cache
def roofline_metrics() -> RooflineMetrics:
    """Return this process's roofline metrics."""
    return RooflineMetrics()
