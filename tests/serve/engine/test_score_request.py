"""Names of the fields that errors are about."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from slimserve.serve.engine.rerank import RerankRequest
from slimserve.serve.engine.score_request import RequestError, ScoreRequest, validation_problem

RERANK = {"query": "a", "documents": ["b"]}
SCORE = {"query": "a", "items": ["b"], "label_token_ids": [1]}


@pytest.mark.parametrize(
    ("kind", "body", "name"),
    [
        (RerankRequest, RERANK | {"documents": ["b", 3]}, "documents[1]"),
        (RerankRequest, RERANK | {"documents": ["b", None]}, "documents[1]"),
        (RerankRequest, RERANK | {"documents": ["b", "c", ["d"]]}, "documents[2]"),
        (RerankRequest, RERANK | {"documents": "b"}, "documents"),
        (RerankRequest, {"query": "a"}, "documents"),
        (RerankRequest, {"documents": ["b"]}, "query"),
        (RerankRequest, RERANK | {"query": ["a"]}, "query"),
        (RerankRequest, RERANK | {"rank_fields": ["a", 3]}, "rank_fields[1]"),
        (RerankRequest, RERANK | {"timeout_s": "soon"}, "timeout_s"),
        (RerankRequest, RERANK | {"top_n": -1}, "top_n"),
        (ScoreRequest, SCORE | {"items": ["b", 3]}, "items[1]"),
        (ScoreRequest, SCORE | {"items": [[1, 2], [3, "x"]]}, "items[1][1]"),
        (ScoreRequest, SCORE | {"items": 3}, "items"),
        (ScoreRequest, SCORE | {"query": {"text": "a"}}, "query"),
        (ScoreRequest, SCORE | {"label_token_ids": [1, "2"]}, "label_token_ids[1]"),
        (ScoreRequest, SCORE | {"labels": [" yes", 0]}, "labels[1]"),
        (ScoreRequest, SCORE | {"nonsense": 1}, "nonsense"),
        (ScoreRequest, SCORE | {"label_scoring": "word"}, "label_scoring"),
        (ScoreRequest, [1], ""),
    ],
)
def test_an_error_names_the_field_as_the_body_has_it(kind: type[BaseModel], body: Any, name: str) -> None:
    text = json.dumps(body).encode()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(text)
    assert validation_problem(caught.value, text)[0] == name


def test_a_body_that_is_no_json_has_no_fields() -> None:
    with pytest.raises(ValidationError) as caught:
        RerankRequest.model_validate_json(b"{")
    field, problem = validation_problem(caught.value, b"{")
    assert field == ""
    assert "JSON" in problem


def test_an_item_of_a_score_request_is_a_document_of_a_rerank_request() -> None:
    assert RequestError("items[3]", "is too long").renamed("items", "documents").param == "documents[3]"


SGLANG = {
    "query": "a",
    "items": ["b"],
    "embed_override_token_id": None,
    "query_embed_overrides": None,
    "item_embed_overrides": None,
    "label_token_ids": [1, 2],
    "apply_softmax": True,
    "temperature": 2,
    "return_token_logprobs": True,
    "item_first": False,
    "return_pooled_hidden_states": False,
    "score_extraction_token": None,
    "model": "m",
}
"""Every field of SGLang 0.5.23, as its client sends them."""


def test_a_request_with_every_field_of_sglang_is_accepted() -> None:
    request = ScoreRequest.model_validate_json(json.dumps(SGLANG))
    assert (request.temperature, request.return_token_logprobs) == (2, True)
    per_item = ScoreRequest.model_validate_json(json.dumps(SGLANG | {"label_token_ids": [[1, 2]], "query": None}))
    assert per_item.label_token_ids == [[1, 2]]
    assert per_item.query == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embed_override_token_id", 7),
        ("query_embed_overrides", [[0.5]]),
        ("item_embed_overrides", [None]),
        ("score_extraction_token", "<score>"),
        ("return_pooled_hidden_states", True),
        ("temperature", 0),
        ("temperature", "hot"),
        ("calibrated", 3),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(field: str, value: Any) -> None:
    text = json.dumps(SGLANG | {field: value}).encode()
    with pytest.raises(ValidationError) as caught:
        ScoreRequest.model_validate_json(text)
    assert validation_problem(caught.value, text)[0] == field


def test_a_rerank_request_refuses_a_calibration() -> None:
    assert RerankRequest.model_validate(RERANK | {"calibrated": False}).query == "a"
    with pytest.raises(ValidationError, match="/v1/score"):
        RerankRequest.model_validate(RERANK | {"calibrated": True})
