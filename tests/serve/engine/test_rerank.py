"""Tests of reranking without an engine: templates, documents, order, and both vendors' answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from slimserve.core.errors import UserError
from slimserve.serve.engine.rerank import RerankRequest, as_score_request, rerank_response
from slimserve.serve.engine.score_request import RequestError
from slimserve.serve.engine.scoring import ScoringPlan, ScoringTask
from slimserve.serve.policy.rerank_templates import (
    TEMPLATE_FILE,
    TEMPLATE_VARIABLE,
    TEMPLATES,
    RerankTemplate,
    load_template,
)

TEMPLATE = RerankTemplate(template="Q {query} D {document} A", labels=[" ja", " nein"])
LABELS = ((1,), (2,))
PLAN = ScoringPlan(tuple(ScoringTask((token,), LABELS) for token in (10, 11, 12)), (0, 1, 2, 1), 0)


def first_tokens_end(text: str, num_tokens: int) -> int:
    return num_tokens


def test_the_query_comes_first_and_the_document_is_the_item() -> None:
    request = RerankRequest(query="who?", documents=["me {query}", {"text": "you"}])
    scoring = as_score_request(request, TEMPLATE, first_tokens_end)
    assert scoring.query == "Q who? D "
    assert scoring.items == ["me {query} A", "you A"]
    assert scoring.labels == [" ja", " nein"]
    assert scoring.apply_softmax


def test_rank_fields_are_joined_in_their_order() -> None:
    request = RerankRequest(
        query="q", documents=[{"title": "T", "text": "x", "author": "A"}], rank_fields=["author", "title"]
    )
    assert as_score_request(request, TEMPLATE, first_tokens_end).items == ["A\nT A"]


def test_a_document_is_cut_only_on_request() -> None:
    request = RerankRequest(query="q", documents=["abcdef"], max_tokens_per_doc=3)
    assert as_score_request(request, TEMPLATE, first_tokens_end).items == ["abc A"]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "is empty"),
        ([{"image": "x"}], r"documents\[0\]: has no text in its field 'text'"),
        (["a", {"text": 3}], r"\[1\]"),
    ],
)
def test_documents_without_text_are_rejected(documents: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        as_score_request(RerankRequest(query="q", documents=documents), TEMPLATE, first_tokens_end)


def answer(request: RerankRequest, api_version: int = 1) -> dict[str, object]:
    logprobs = [[math.log(yes), math.log(no)] for yes, no in ((0.1, 0.3), (0.2, 0.2), (0.06, 0.02))]
    return rerank_response(
        request, PLAN, logprobs, model="m", request_id="r", api_version=api_version, cached_tokens=[0, 0, 0]
    )


def test_the_best_results_come_first_and_ties_keep_their_order() -> None:
    body = json.loads(json.dumps(answer(RerankRequest(query="q", documents=["a", "b", "c", "b"]))))
    assert [result["index"] for result in body["results"]] == [2, 1, 3, 0]
    assert [result["relevance_score"] for result in body["results"]] == pytest.approx([0.75, 0.5, 0.5, 0.25])


def test_a_repeated_document_counts_as_cached() -> None:
    usage = json.loads(json.dumps(answer(RerankRequest(query="q", documents=["a", "b", "c", "b"]))))["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}


@pytest.mark.parametrize(("top_n", "count"), [(None, 4), (0, 4), (1, 1), (3, 3), (99, 4)])
def test_top_n_bounds_the_answer(top_n: int | None, count: int) -> None:
    body = answer(RerankRequest(query="q", documents=["a", "b", "c", "b"], top_n=top_n))
    assert len(body["results"]) == count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requested", "version", "expected"), [(None, 1, True), (None, 2, False), (True, 2, True), (False, 1, False)]
)
def test_documents_are_returned_by_each_vendors_default(requested: bool | None, version: int, expected: bool) -> None:
    given: list[Any] = ["a", {"text": "b", "id": 7}, "c", "b"]
    body = answer(RerankRequest(query="q", documents=given, return_documents=requested), version)
    best = body["results"][1]  # type: ignore[index]
    assert best.get("document") == ({"text": "b", "id": 7} if expected else None)
    assert body["meta"]["api_version"] == {"version": str(version)}  # type: ignore[index]


def test_the_template_is_taken_from_the_environment_then_the_model_then_its_manifest(tmp_path: Path) -> None:
    assert load_template(tmp_path, {}) == TEMPLATES["default"]
    manifest = {"recipe": "x", "rerank": {"template": "M {query} {document}"}}
    (tmp_path / "slimserve.json").write_text(json.dumps(manifest))
    assert load_template(tmp_path, {}).template == "M {query} {document}"
    (tmp_path / TEMPLATE_FILE).write_text('template = "F {query} {document}"\nlabels = ["+", "-"]')
    assert load_template(tmp_path, {}).labels == ["+", "-"]
    other = tmp_path / "other.toml"
    other.write_text('template = "qwen3-reranker"\nlabels = ["ja", "nein"]')
    chosen = load_template(tmp_path, {TEMPLATE_VARIABLE: str(other)})
    assert chosen.template == TEMPLATES["qwen3-reranker"].template
    assert chosen.labels == ["ja", "nein"]


@pytest.mark.parametrize(
    "text",
    [
        'template = "no fields"',
        'template = "{document} {query}"',
        'template = "{query} {query} {document}"',
        "labels = []",
        'template = "{query} {document}"\nlabels = ["one"]',
        'template = "{query} {document}"\nlable = 1',
        "not toml",
    ],
)
def test_an_invalid_template_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / TEMPLATE_FILE).write_text(text)
    with pytest.raises(UserError, match=f"rerank template: .*{TEMPLATE_FILE}"):
        load_template(tmp_path, {})


def test_every_template_has_both_fields() -> None:
    for template in TEMPLATES.values():
        before, between, after = template.parts()
        assert before + "{query}" + between + "{document}" + after == template.template


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        ({}, "Qwen3-Reranker-0.6B", "qwen3-reranker"),
        ({}, "qwen3-reranker-4b-w8a8", "qwen3-reranker"),
        ({}, "mxbai-rerank-base-v2", "mxbai-rerank-v2"),
        ({}, "mxbai-rerank-base-v1", "default"),
        ({}, "Qwen3-0.6B", "default"),
        ({"config.json": {"_name_or_path": "Qwen/Qwen3-Reranker-8B"}}, "x", "qwen3-reranker"),
        ({"slimserve.json": {"base": {"model": "Qwen/Qwen3-Reranker-8B"}}}, "x", "qwen3-reranker"),
        (
            {"tokenizer_config.json": {"chat_template": "Judge whether the Document meets the requirements"}},
            "x",
            "qwen3-reranker",
        ),
    ],
)
def test_a_known_reranker_gets_its_template_without_a_setting(
    tmp_path: Path, files: dict[str, Any], name: str, expected: str
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content))
    assert load_template(directory, {}) == TEMPLATES[expected]


def test_a_hubs_cache_names_the_model_above_the_snapshot(tmp_path: Path) -> None:
    directory = tmp_path / "models--Qwen--Qwen3-Reranker-0.6B" / "snapshots" / "abc"
    directory.mkdir(parents=True)
    assert load_template(directory, {}) == TEMPLATES["qwen3-reranker"]
    other = tmp_path / "Qwen3-Reranker-0.6B" / "another-model"
    other.mkdir(parents=True)
    assert load_template(other, {}) == TEMPLATES["default"]
