"""Tests of the names of our metrics."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from slimserve.serve.policy.metrics import GatewayMetrics, RequestMetrics, RooflineMetrics, ScoreMetrics


@pytest.mark.parametrize("metrics", [RequestMetrics, ScoreMetrics, GatewayMetrics, RooflineMetrics])
def test_metric_names_have_our_prefix_and_histograms_their_unit(metrics: Any) -> None:
    registry = CollectorRegistry()
    metrics(registry)
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.name.startswith("slimserve_")
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
