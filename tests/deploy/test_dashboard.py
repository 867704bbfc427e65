"""Tests of the dashboard and the alert rules: every expression parses and uses only metrics that are exported."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from slimserve.serve.policy.metrics import GatewayMetrics, RequestMetrics, RooflineMetrics, ScoreMetrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "slimserve.json").read_text())
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
OURS = re.compile(r"\b(?:slimserve[_:]|vllm:)[a-z0-9_:]+")
LABELS = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')
OF_PROMETHEUS = {"job", "instance", "le", "variant", "alertname", "alertstate"}


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> list[str]:
    """Return the PromQL of every panel and annotation, with Grafana's variables filled in."""
    texts = [target["expr"] for panel in panels() for target in panel["targets"]]
    texts += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    return [text.replace("$__rate_interval", "1m").replace("$variant", "dense|w8a8") for text in texts]


def our_metrics() -> dict[str, set[str]]:
    """Return the labels of every series that serve/policy/metrics.py exports, by name."""
    labels_of: dict[str, set[str]] = {}
    for kind in (RequestMetrics, ScoreMetrics, GatewayMetrics, RooflineMetrics):
        for metric in vars(kind(CollectorRegistry())).values():
            assert isinstance(metric, MetricWrapperBase)
            for suffix in SUFFIXES[str(metric._type)]:
                labels_of[f"{metric._name}{suffix}"] = set(metric._labelnames)
    return labels_of


def vllm_metrics() -> set[str]:
    """Return the names of vLLM's series, read from its source because importing vLLM takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    names = set()
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        kind = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        name = next((word.value for word in call.keywords if word.arg == "name"), None)
        if isinstance(name, ast.Constant) and kind in {"_counter_cls", "_gauge_cls", "_histogram_cls"}:
            suffixes = SUFFIXES[kind.removeprefix("_").removesuffix("_cls")]
            names |= {str(name.value) + suffix for suffix in suffixes}
    return names


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")
def test_promtool_parses_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{index}", "expr": text} for index, text in enumerate(expressions())]
    assert len(rules) > 40
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["dashboard", "alerts"])
def test_every_queried_metric_is_exported_with_its_labels(where: str) -> None:
    ours, recorded = our_metrics(), {rule["record"] for rule in RULES if "record" in rule}
    known = ours.keys() | vllm_metrics() | recorded
    for text in expressions() if where == "dashboard" else [rule["expr"] for rule in RULES]:
        names = set(OURS.findall(text))
        assert names <= known, text
        labels = set(LABELS.findall(text)) - OF_PROMETHEUS
        assert labels <= set().union(*(ours.get(name, set()) for name in names)), text


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    shown = " ".join(expressions())
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in our_metrics()}
    assert {family for family in families if family not in shown} == set()


def test_the_latency_limits_of_the_alerts_are_bucket_limits() -> None:
    # A `le` without a bucket selects no series, and an alert on it never fires.
    metrics = RequestMetrics(CollectorRegistry())
    limits = {
        "slimserve_time_to_first_token_seconds_bucket": metrics.first_token_s,
        "slimserve_inter_token_seconds_bucket": metrics.inter_token_s,
    }
    used = [match for rule in RULES for match in re.findall(r'(\w+_bucket)\{le="([^"]+)"\}', rule["expr"])]
    assert {name for name, _ in used} == limits.keys()
    for name, limit in used:
        samples = next(iter(limits[name].collect())).samples
        assert limit in {sample.labels["le"] for sample in samples if "le" in sample.labels}


def test_panels_have_titles_and_descriptions_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        position = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(position["x"], position["x"] + position["w"])
            for y in range(position["y"], position["y"] + position["h"])
        }
        assert not cells & taken, panel["title"]
        assert position["x"] + position["w"] <= 24
        taken |= cells
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_the_variable_variant_offers_the_variants_that_prometheus_knows() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    query = re.fullmatch(r"label_values\((\w+), variant\)", variables["variant"]["definition"])
    assert query is not None
    assert query[1] in our_metrics()
    assert variables["variant"]["multi"]
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())


def test_grafana_finds_dashboard_and_datasource_where_compose_mounts_them() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = dict(mount.split(":")[:2] for mount in services["grafana"]["volumes"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    provider = yaml.safe_load((provisioning / "dashboards" / "slimserve.yml").read_text())["providers"][0]
    assert mounts["./grafana/slimserve.json"] == f"{provider['options']['path']}/slimserve.json"
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
