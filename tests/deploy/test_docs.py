"""Tests that docs/serve.md, docs/deploy.md and docs/metrics.md agree with the code."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import typer
import yaml
from prometheus_client import CollectorRegistry

from slimserve.serve.engine.rerank import RerankRequest
from slimserve.serve.engine.score_request import ScoreRequest
from slimserve.serve.launch.config import ServeConfig
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import GatewayMetrics, RequestMetrics, RooflineMetrics, ScoreMetrics

ROOT = Path(__file__).parents[2]
SERVE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
DEPLOY = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
SOURCES = {file: file.read_text(encoding="utf-8") for file in (ROOT / "serve").rglob("*.py")}


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", SERVE, re.MULTILINE | re.DOTALL)
    return [text for kind, text in fenced if kind == language]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its header row."""
    section = SERVE.split(f"\n## {heading}")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"][
        2:
    ]


def test_the_toml_example_is_a_valid_serve_config() -> None:
    for text in blocks("toml"):
        config = ServeConfig.model_validate(tomllib.loads(text))
        Limits.model_validate(config.limits)
        assert config.aliases["chat"].keys() == config.variants.keys()
    assert len(blocks("toml")) == 1


def test_the_score_example_is_a_request_and_its_answer_has_our_keys() -> None:
    curl = next(block for block in blocks("") if "/v1/score" in block)
    words = shlex.split(curl)
    request = ScoreRequest.model_validate_json(words[words.index("-d") + 1])
    answer = json.loads(blocks("json")[0])
    assert len(answer["scores"]) == len(request.items or ())
    assert all(len(row) == len(request.labels or ()) for row in answer["scores"])
    assert set(answer) == {"scores", "model", "usage", "object"}


def test_the_python_examples_parse_and_send_fields_that_we_accept() -> None:
    for text in blocks("python"):
        ast.parse(text)
    call = next(block for block in blocks("python") if "cohere" in block)
    fields = {word.arg for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Call) for word in node.keywords}
    assert fields - {"api_key", "base_url"} <= RerankRequest.model_fields.keys()


def test_every_error_code_that_we_send_is_in_the_table_and_no_other() -> None:
    documented = {code for row in rows("10. Errors") for code in re.findall(r"`([a-z_]+)`", row[1]) if code != "param"}
    call = re.compile(r"(?:Rejection\(|error_answer\(|_break_off\(|interrupt\()\s*[45]\d\d, ([^\n]*)")
    rest = [line for text in SOURCES.values() for line in call.findall(text)]
    sent = {
        code for line in rest for code in re.findall(r'"([a-z]+(?:_[a-z]+)+|draining|shutdown|timeout|uploads)"', line)
    }
    sent |= set(re.findall(r'_overloaded\("(\w+)"', SOURCES[ROOT / "serve" / "policy" / "admission.py"]))
    assert {"queue_full", "invalid_body", "timeout", "engine_lost", "model_unavailable"} <= sent
    assert sent - documented == set()
    everything = "".join(SOURCES.values())
    assert {code for code in documented if f'"{code}"' not in everything} == set()


def test_every_limit_is_in_the_table_with_its_default() -> None:
    table = {row[2].strip("`"): row[3] for row in rows("3. Keys and limits")}
    assert table.keys() == Limits.model_fields.keys()
    for name, default in Limits().model_dump().items():
        number = float(re.match(r"[\d.]+", table[name])[0])  # type: ignore[index]
        assert number * (2**20 if table[name].endswith("MiB") else 1) == default, name


def test_every_alert_is_explained() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert set(re.findall(r"Slimserve[A-Z]\w+", SERVE)) == alerts


def test_every_metric_of_ours_is_defined_once() -> None:
    section = METRICS.split("\n## Serving")[1].split("\n## ")[0]
    defined = re.findall(
        r"`(slimserve_\w+?)(?:_total)?(?:\{([\w,]+)\})?`", "\n".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE))
    )
    ours = {
        str(metric._name): set(metric._labelnames)
        for kind in (RequestMetrics, ScoreMetrics, GatewayMetrics, RooflineMetrics)
        for metric in vars(kind(CollectorRegistry())).values()
    }
    assert {name for name, _ in defined} == ours.keys()
    assert len(defined) == len(ours)
    assert all(set(labels.split(",")) == ours[name] for name, labels in defined if labels)


def test_files_that_the_docs_name_exist() -> None:
    for text in (SERVE, DEPLOY):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / "docs" / link).exists(), link
        for file in re.findall(r"deploy/[\w./-]+\w", text):
            assert (ROOT / file).exists(), file


def test_options_of_serve_in_the_docs_exist_in_the_command() -> None:
    import slimserve.cli

    command = typer.main.get_command(slimserve.cli.app).get_command(None, "serve")  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("slimserve serve")]
    used = {word for line in lines for word in re.findall(r"(?<!\S)--[a-z-]+", line.split(" -- ")[0])}
    used |= set(re.findall(r"`(--[a-z-]+)`", "".join(row[1] for row in rows("3. Keys and limits"))))
    assert len(lines) >= 8
    assert used - known == set()
