"""What a process of ours counts, and the text operations that put several processes on one page.

Each process counts into its own registry and knows no variant names: the page of one
engine gets its label in `label_series`, and the gateway puts the pages together with
`merge_expositions`. Both work on the text, which is fifty times quicker than parsing it and
leaves every value as it was printed.
"""

from __future__ import annotations

import re
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_HEADER_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMetrics:
    """What the guard in front of one engine counts."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "slimserve_requests", "Requests answered, by route and status", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge(
            "slimserve_requests_in_flight", "Inference requests inside the engine now", registry=registry
        )
        self.queued = Gauge(
            "slimserve_requests_queued", "Inference requests that wait for a place inside now", registry=registry
        )
        self.queue_s = Histogram(
            "slimserve_queue_seconds",
            "Seconds that an admitted inference request waited for its place",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_s = Histogram(
            "slimserve_request_seconds",
            "Seconds from the request's headers to the last byte of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "slimserve_time_to_first_token_seconds",
            "Seconds from the request's headers to the first chunk of a streamed answer",
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
            "slimserve_rejections", "Requests refused before the engine saw them", ["reason"], registry=registry
        )


class ScoreMetrics:
    """What the scoring endpoints count."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.items = Counter("slimserve_score_items", "Items scored, as asked for", registry=registry)
        self.computed_items = Counter(
            "slimserve_score_computed_items", "Items that the engine computed: duplicates once", registry=registry
        )
        self.tokens = Counter(
            "slimserve_score_tokens",
            "Prompt tokens of scoring: shared prefix once a request, items each",
            ["part"],
            registry=registry,
        )
        self.seconds = Histogram(
            "slimserve_score_seconds", "Seconds to score one request", buckets=_SECONDS, registry=registry
        )


class GatewayMetrics:
    """What the gateway and the supervisor count."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "slimserve_gateway_requests",
            "Requests that the gateway answered, by variant and status",
            ["variant", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "slimserve_gateway_in_flight", "Requests passing through the gateway now", ["variant"], registry=registry
        )
        self.upstream_header_s = Histogram(
            "slimserve_gateway_upstream_header_seconds",
            "Seconds from the request sent upstream to the headers of its answer",
            ["variant"],
            buckets=_HEADER_SECONDS,
            registry=registry,
        )
        self.restarts = Counter(
            "slimserve_restarts",
            "Times that a variant's engine ended and was started again",
            ["variant"],
            registry=registry,
        )
        self.up = Gauge("slimserve_variant_up", "1 where the variant answers, else 0", ["variant"], registry=registry)
        self.ready_s = Gauge(
            "slimserve_ready_seconds", "Seconds from start to ready, of the last start", ["variant"], registry=registry
        )


class RoofMetrics:
    """What the hardware allows and what is reached; see serve/engine/roofline.py."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.kernel = Gauge(
            "slimserve_kernel_info",
            "1 for the kernel that computes a weight format",
            ["format", "kernel"],
            registry=registry,
        )
        self.weight_bytes = Gauge("slimserve_weight_bytes", "Bytes of all weights in the files", registry=registry)
        self.decode_bytes = Gauge(
            "slimserve_decode_bytes_per_token",
            "Bytes of weights that one decode step of one stream reads",
            registry=registry,
        )
        self.decode_roof = Gauge(
            "slimserve_decode_roof_tokens_per_second",
            "Memory bandwidth over the bytes of a token: the most that one stream can reach",
            registry=registry,
        )
        self.prefill_roof = Gauge(
            "slimserve_prefill_roof_tokens_per_second",
            "FLOP/s over the FLOPs of a prompt token: the most that prefill can reach",
            registry=registry,
        )
        self.decode_rate = Gauge(
            "slimserve_decode_tokens_per_second", "Generated tokens a second, last window", registry=registry
        )
        self.prefill_rate = Gauge(
            "slimserve_prefill_tokens_per_second", "Prompt tokens computed a second, last window", registry=registry
        )


@cache
def request_metrics() -> RequestMetrics:
    """This process's one set, in the default registry, which is the one that /metrics prints."""
    return RequestMetrics()


@cache
def score_metrics() -> ScoreMetrics:
    """This process's one set, in the default registry."""
    return ScoreMetrics()


@cache
def gateway_metrics() -> GatewayMetrics:
    """This process's one set, in the default registry."""
    return GatewayMetrics()


@cache
def roof_metrics() -> RoofMetrics:
    """This process's one set, in the default registry."""
    return RoofMetrics()


_SAMPLE = re.compile(r"^([^\s#{][^\s{]*)(?:[ \t]*\{([ \t]*\})?|(?=[ \t]))", re.MULTILINE)
"""A sample's name with what opens its labels; group 2 where there are none in the braces."""
_QUOTED_NAME = re.compile(r'^\{[ \t]*("(?:[^"\\\n]|\\.)*")', re.MULTILINE)
"""The newer form of a name that is not a legacy name: {"http.requests",code="200"} 1."""
_LABEL = re.compile(r'[{,][ \t]*([A-Za-z_]\w*)[ \t]*=[ \t]*"(?:[^"\\\n]|\\.)*"')
_FAMILY_SUFFIXES = {
    "histogram": ("", "_bucket", "_sum", "_count"),
    "summary": ("", "_sum", "_count"),
}


def label_series(exposition: str, variant: str) -> str:
    """Add `variant="…"` to every sample of a Prometheus text page that has no such label yet."""
    escaped = variant.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    label = f'variant="{escaped}"'

    def opened(match: re.Match[str]) -> str:
        return f"{match[1]}{{{label}}}" if match[2] or not match[0].endswith("{") else f"{match[1]}{{{label},"

    def add(text: str) -> str:
        text = _SAMPLE.sub(opened, text)
        return _QUOTED_NAME.sub(lambda match: f"{match[0]},{label}", text) if "\n{" in text or text[:1] == "{" else text

    if 'variant="' not in exposition:
        return add(exposition)
    return "\n".join(
        line if 'variant="' in line and line[:1] != "#" and "variant" in _LABEL.findall(line) else add(line)
        for line in exposition.split("\n")
    )


def merge_expositions(texts: list[str]) -> str:
    """One Prometheus text page of several: one HELP and TYPE per family, the first seen, and its samples together.

    Samples keep their order; nothing is summed, so the pages' series must differ in some label.
    """
    headers: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family, members = "", frozenset[str]()
        for line in text.split("\n"):
            if not line or line.isspace():
                continue
            if line[0] == "#":
                parts = line.split(None, 3)
                if len(parts) < 3 or parts[1] not in {"HELP", "TYPE"}:
                    continue
                family = parts[2]
                samples.setdefault(family, [])
                headers.setdefault(family, {}).setdefault(parts[1], line)
                suffixes = (
                    _FAMILY_SUFFIXES.get(parts[3].strip(), ("",)) if line.startswith("# TYPE") and parts[3:] else ("",)
                )
                members = frozenset(family + suffix for suffix in suffixes)
                continue
            name = _name_of(line)
            owner = family if name in members else name
            if owner not in samples:
                samples[owner] = []
            samples[owner].append(line)
    page = []
    for family, lines in samples.items():
        page += [headers[family][key] for key in ("HELP", "TYPE") if key in headers.get(family, ())]
        page += lines
    return "\n".join(page) + "\n" if page else ""


def _name_of(line: str) -> str:
    brace = line.find("{")
    if brace == 0:
        quoted = _QUOTED_NAME.match(line)
        return quoted[1] if quoted else line
    name = line if brace < 0 else line[:brace]
    return name.split(None, 1)[0]
