"""Tests of the compose file and the Kubernetes manifests against their schemas, the code and each other."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from slimserve.serve.launch.config import ServeConfig
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import RequestMetrics
from slimserve.serve.policy.routes import OPEN_PATHS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
STACKS = sorted(DEPLOY.rglob("stack.toml"))
CUSTOM = {"ServiceMonitor"}
"""Kinds that operators define; Kubernetes has no schemas for them."""


def manifests() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every Kubernetes object of the base and of monitoring, with its file."""
    for file in sorted(KUBERNETES.rglob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if "kind" in document and document["kind"] != "Kustomization":
                yield file, document


def manifest(kind: str) -> dict[str, Any]:
    return next(document for _, document in manifests() if document["kind"] == kind)


POD: dict[str, Any] = manifest("Deployment")["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]


def labelled(document: dict[str, Any]) -> dict[str, Any]:
    """Add the labels and selectors that the schema requires and that kustomize adds before a manifest is applied."""
    labels = {"app.kubernetes.io/name": "slimserve"}
    if document["kind"] == "Deployment":
        document["spec"].setdefault("selector", {"matchLabels": labels})
        document["spec"]["template"].setdefault("metadata", {})["labels"] = labels
    return document


def problems(version: str, folder: Path, documents: list[dict[str, Any]]) -> str:
    """Return the errors of kubernetes-validate for one version's schemas; empty if the documents are valid."""
    file = folder / "manifests.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    command = [sys.executable, "-m", "kubernetes_validate", "--kubernetes-version", version, "--strict", "--quiet"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_schemas_accept_every_manifest_and_no_unknown_field(version: str, tmp_path: Path) -> None:
    documents = [labelled(document) for _, document in manifests() if document["kind"] not in CUSTOM]
    assert len(documents) == 6
    assert problems(version, tmp_path, documents) == ""
    documents[0]["spec"]["misspelt"] = 1
    assert "misspelt" in problems(version, tmp_path, documents)


def test_kustomize_lists_every_manifest() -> None:
    for file, _ in manifests():
        assert file.name in yaml.safe_load((file.parent / "kustomization.yaml").read_text())["resources"]


def test_the_compose_schema_accepts_the_compose_file() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", STACKS, ids=lambda file: file.parent.name)
def test_every_stack_file_is_a_valid_serve_config(file: Path) -> None:
    config = ServeConfig.model_validate(tomllib.loads(file.read_text()))
    Limits.model_validate(config.limits)
    assert all(weights.keys() <= config.variants.keys() for weights in config.aliases.values())


def test_mounted_files_exist_and_published_ports_are_on_loopback() -> None:
    for service in COMPOSE["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), mount
    assert (DEPLOY / COMPOSE["configs"]["stack"]["file"]).is_file()
    environment = [
        value for service in COMPOSE["services"].values() for value in service.get("environment", {}).items()
    ]
    assert all(name.endswith("__FILE") for name, _ in environment if "PASSWORD" in name or "KEY" in name)


def seconds(text: str) -> int:
    """Return the seconds of a duration such as 30s or 2m."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "m" else 1)


@pytest.mark.parametrize("file", STACKS, ids=lambda file: file.parent.name)
def test_a_drain_ends_before_the_container_is_killed(file: Path) -> None:
    drain_s = Limits.model_validate(ServeConfig.model_validate(tomllib.loads(file.read_text())).limits).drain_s
    stop_s = 10
    if file.parent.name == "compose":
        assert seconds(COMPOSE["services"]["slimserve"]["stop_grace_period"]) >= drain_s + stop_s
    else:
        pre_stop_s = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
        assert POD["terminationGracePeriodSeconds"] >= pre_stop_s + drain_s + stop_s


def test_probes_request_paths_that_need_no_key_on_the_served_port() -> None:
    port = CONTAINER["ports"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = CONTAINER[probe]["httpGet"]
        assert request["path"] in OPEN_PATHS
        assert request["port"] == port["name"]
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert str(port["containerPort"]) == CONTAINER["args"][CONTAINER["args"].index("--port") + 1]
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    assert manifest("ServiceMonitor")["spec"]["endpoints"][0]["port"] == manifest("Service")["spec"]["ports"][0]["name"]


def test_a_pod_runs_without_root_and_can_write_only_to_its_volumes() -> None:
    assert POD["securityContext"]["runAsNonRoot"]
    assert f"USER {POD['securityContext']['runAsUser']}" in (ROOT / "Dockerfile").read_text()
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert CONTAINER["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {volume["name"] for volume in POD["volumes"]} == {mount["name"] for mount in mounts.values()}
    home = next(value["value"] for value in CONTAINER["env"] if value["name"] == "HOME")
    assert home.startswith("/var/cache/slimserve/")
    assert not mounts["/var/cache/slimserve"].get("readOnly")
    keys = CONTAINER["args"][CONTAINER["args"].index("--api-key-file") + 1]
    assert mounts[str(Path(keys).parent)]["readOnly"]


def test_the_autoscaler_and_the_adapter_use_a_metric_that_an_engine_exports() -> None:
    name = manifest("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    registry = CollectorRegistry()
    RequestMetrics(registry)
    assert name in {family.name for family in registry.collect()}
    rule = yaml.safe_load((KUBERNETES / "monitoring" / "adapter-rules.yaml").read_text())["rules"]["custom"][0]
    assert name == rule["name"]["as"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
