"""Tests of the Prometheus configuration with promtool, and of a real Prometheus that scrapes a gateway."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from slimserve.serve.launch.process import answers, free_port

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "stand_in_engine.py"
PROMETHEUS = ROOT / "deploy" / "prometheus"
ALERT_TESTS = Path(__file__).parent / "alerts.test.yml"

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alert_names() -> set[str]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    assert "SUCCESS" in promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_each_alert_fires_in_its_own_case_and_in_no_other() -> None:
    assert "SUCCESS" in promtool("test", "rules", ALERT_TESTS)


def test_each_alert_has_a_test_in_which_it_fires_a_severity_and_a_description() -> None:
    assert all(f'alertname="{name}"' in ALERT_TESTS.read_text() for name in alert_names())
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"] if "alert" in rule):
        assert rule["labels"]["severity"] in {"page", "ticket", "info"}
        assert rule["annotations"].keys() == {"summary", "description"}


def test_an_annotated_pod_becomes_one_target_of_the_job_slimserve(tmp_path: Path) -> None:
    # Debian's Prometheus has no Kubernetes support, so a file provides the pod's labels. The relabelling is ours.
    config = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text())
    job = config["scrape_configs"][0]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["file_sd_configs"] = [{"files": [str(tmp_path / "pods.yml")]}]
    pod = {
        "__meta_kubernetes_namespace": "shop",
        "__meta_kubernetes_pod_name": "slimserve-1",
        "__meta_kubernetes_pod_ip": "10.0.0.7",
        "__meta_kubernetes_pod_phase": "Running",
        "__meta_kubernetes_pod_label_app_kubernetes_io_name": "slimserve",
        "__meta_kubernetes_pod_annotation_prometheus_io_scrape": "true",
        "__meta_kubernetes_pod_annotation_prometheus_io_port": "8000",
        "__meta_kubernetes_pod_annotation_prometheus_io_path": "/metrics",
    }
    changes: tuple[dict[str, str], ...] = (
        {},
        {"__meta_kubernetes_pod_annotation_prometheus_io_scrape": "false"},
        {"__meta_kubernetes_pod_label_app_kubernetes_io_name": "another"},
        {"__meta_kubernetes_pod_phase": "Pending"},
    )
    pods = [{"targets": [f"10.0.0.7:{9000 + index}"], "labels": pod | change} for index, change in enumerate(changes)]
    (tmp_path / "pods.yml").write_text(yaml.safe_dump(pods))
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config | {"rule_files": []}))
    targets = json.loads(
        promtool("check", "service-discovery", "--timeout=2s", tmp_path / "prometheus.yml", "slimserve")
    )
    kept = [target["labels"] for target in targets if target["labels"]]
    assert len(kept) == 1
    assert kept[0] == {
        "__address__": "10.0.0.7:8000",
        "__metrics_path__": "/metrics",
        "__scheme__": "http",
        "__scrape_interval__": "15s",
        "__scrape_timeout__": "10s",
        "instance": "10.0.0.7:8000",
        "job": "slimserve",
        "namespace": "shop",
        "pod": "slimserve-1",
    }


def wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until `url` answers 200; kill the process and fail if it ends or takes longer than 20 s."""
    deadline = time.monotonic() + 20
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            pytest.fail(f"{url} does not answer")
        time.sleep(0.1)


class StandInServer:
    """Runs `slimserve serve` with two variants, an alias and an API key; stand_in_engine.py replaces vLLM."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._broken = folder / "broken"
        self._broken.write_text("")
        (folder / "keys.txt").write_text("secret\n")
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
        python.chmod(0o755)
        options = [f"dense={model}", f"small={model}", "--alias", "chat=dense:75,small:25"]
        options += ["--port", self.address.split(":")[1], "--api-key-file", str(folder / "keys.txt")]
        # The engines are started by sys.executable.
        code = f"import sys; sys.executable = {str(python)!r}; import slimserve.cli; slimserve.cli.main()"
        environment = os.environ | {"STAND_IN_BROKEN": str(self._broken), "SLIMSERVE_CACHE": str(folder / "cache")}
        self._process = subprocess.Popen([sys.executable, "-c", code, "serve", *options], cwd=ROOT, env=environment)
        wait_for_answer(f"http://{self.address}/ready", self._process)

    def __enter__(self) -> StandInServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def score(self, model: str, key: str, num_items: int = 1, user: str | None = None) -> int:
        """Send a score request and return its HTTP status."""
        body = {"model": model, "query": "a", "items": ["b"] * num_items, "label_token_ids": [1], "user": user}
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return httpx.post(f"http://{self.address}/v1/score", json=body, headers=headers, timeout=30).status_code

    def break_variant(self, name: str) -> None:
        """Kill the engine of a variant, and let every restart of it fail."""
        self._broken.write_text(name)
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.environ().get("SLIMSERVE_VARIANT") == name:
                    child.kill()


class Prometheus:
    """Runs a real Prometheus with the configuration of deploy/prometheus, which scrapes `target` every second."""

    def __init__(self, folder: Path, target: str) -> None:
        shutil.copytree(PROMETHEUS, folder / "config")
        config = folder / "config" / "prometheus.yml"
        config.write_text(
            config.read_text()
            .replace("scrape_interval: 10s", "scrape_interval: 1s")
            .replace("evaluation_interval: 10s", "evaluation_interval: 1s")
            .replace("scrape_timeout: 5s", "scrape_timeout: 1s")
        )
        (folder / "config" / "targets" / "slimserve.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self._process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
                *(f"--web.listen-address={address}", "--log.level=error"),
            ]
        )
        wait_for_answer(f"{self.url}/-/ready", self._process)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str) -> dict[str, float]:
        """Return the values of an expression by variant."""
        result = self.get("query", query=expression)["result"]
        return {row["metric"].get("variant", ""): float(row["value"][1]) for row in result}

    def wait_for(self, expression: str, expected: dict[str, float]) -> None:
        deadline = time.monotonic() + 20
        while (values := self.query(expression)) != expected:
            assert time.monotonic() < deadline, (values, self.get("targets")["activeTargets"])
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[StandInServer]:
    with StandInServer(tmp_path_factory.mktemp("server"), smollm2) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, server: StandInServer) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), server.address) as running:
        yield running


def test_a_real_prometheus_scrapes_a_server_and_distinguishes_its_variants(
    prometheus: Prometheus, server: StandInServer
) -> None:
    for index in range(40):
        assert server.score("chat", "secret", user=f"user {index}") == 200
    assert server.score("dense", "secret", num_items=32) == 200
    assert server.score("dense", "wrong") == 401
    # Wait for a scrape after all requests; the engines and the gateway both count them.
    at_engines = 'slimserve_requests_total{route="/v1/score",status="200"}'
    at_gateway = 'slimserve_gateway_requests_total{status="200",variant!=""}'
    prometheus.wait_for(f"sum({at_engines}) + sum({at_gateway})", {"": 2 * 41})
    items = prometheus.query("slimserve_score_items_total")
    assert 1 <= items["small"] <= 20
    assert items["dense"] == 72 - items["small"]
    assert prometheus.query("vllm:generation_tokens_total") == items
    sent = prometheus.query(at_gateway)
    assert sent == {"dense": items["dense"] - 31, "small": items["small"]}
    assert prometheus.query(at_engines) == sent
    assert prometheus.query('slimserve_request_seconds_bucket{route="/v1/score",le="300.0"}') == sent
    assert prometheus.query("slimserve_variant_up") == {"dense": 1, "small": 1}
    assert prometheus.query("slimserve_weight_bytes > 0").keys() == {"dense", "small"}
    assert prometheus.get("targets")["activeTargets"][0]["lastError"] == ""


def test_a_real_prometheus_runs_our_alert_rules_and_sees_a_variant_go_down(
    prometheus: Prometheus, server: StandInServer
) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == alert_names()
    server.break_variant("small")
    prometheus.wait_for('ALERTS{alertname="SlimserveVariantDown",alertstate="pending"}', {"small": 1})
    assert prometheus.query("slimserve_variant_up") == {"dense": 1, "small": 0}
    assert server.score("dense", "secret") == 200
    assert server.score("small", "secret") == 503
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert not [rule for rule in rules if rule["health"] == "err"]
