"""Tests of score and rerank requests to a model with a classification head, with a stand-in for vLLM's scoring."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest as VllmRerankRequest
from vllm.entrypoints.pooling.scoring.protocol import ScoreQueriesDocumentsRequest, ScoreTextRequest

from slimserve.serve.engine.classifier import Classifier
from slimserve.serve.engine.score_request import RequestError

USAGE = {"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0}


class Serving:
    """Scores a document by its length, in vLLM's form of answers, which need not be in the order of the documents."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.delay_s = 0.0

    async def __call__(self, request: Any, raw_request: Any) -> JSONResponse:
        self.requests.append(request)
        await asyncio.sleep(self.delay_s)
        if isinstance(request, VllmRerankRequest):
            scored = [{"index": i, "relevance_score": len(text) / 100} for i, text in enumerate(request.documents)]
            return JSONResponse({"model": "m", "usage": USAGE, "results": sorted(scored, key=lambda one: one["index"])})
        texts = request.data_2 if isinstance(request.data_2, list) else [request.data_2]
        data = [{"index": index, "score": len(text) / 100} for index, text in enumerate(texts)]
        return JSONResponse({"model": "m", "usage": USAGE, "data": data[::-1]})


@pytest.fixture
def serving() -> Serving:
    return Serving()


def scorer(serving: Serving | None) -> Classifier:
    return Classifier(State({"serving_scores": serving} if serving else {}))


def score(serving: Serving, **body: Any) -> Any:
    return asyncio.run(scorer(serving).score(json.dumps(body).encode(), SimpleNamespace()))  # type: ignore[arg-type]


def test_a_score_request_in_sglangs_form_has_one_score_per_item(serving: Serving) -> None:
    answer = score(serving, query="q", items=["abc", "a"], model="m", apply_softmax=False, label_token_ids=None)
    assert answer == {"scores": [[0.03], [0.01]], "model": "m", "usage": USAGE, "object": "scoring"}
    (asked,) = serving.requests
    assert isinstance(asked, ScoreQueriesDocumentsRequest)
    assert (asked.queries, asked.documents, asked.model) == ("q", ["abc", "a"], "m")
    assert score(serving, query="q", items="abcd")["scores"] == [[0.04]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", [" yes"]),
        ("label_token_ids", [1]),
        ("apply_softmax", True),
        ("temperature", 2.0),
        ("item_first", True),
    ],
)
def test_what_only_a_generative_model_can_do_is_refused_by_name(serving: Serving, field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        score(serving, query="q", items=["a"], **{field: value})
    assert caught.value.param == field
    assert not serving.requests


@pytest.mark.parametrize(
    "body", [{"query": [1], "items": ["a"]}, {"query": "q", "items": [[1]]}, {"query": "q", "items": []}]
)
def test_items_that_cannot_be_paired_are_refused(serving: Serving, body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        score(serving, **body)
    assert caught.value.param == "items"


def test_vllms_own_forms_pass_through(serving: Serving) -> None:
    answer = score(serving, text_1="q", text_2=["abc"])
    assert isinstance(answer, JSONResponse)
    assert isinstance(serving.requests[0], ScoreTextRequest)
    assert json.loads(bytes(answer.body))["data"] == [{"index": 0, "score": 0.03}]


@pytest.mark.parametrize(("api_version", "has_documents"), [(1, True), (2, False)])
def test_a_rerank_answer_is_the_one_of_generative_models(
    serving: Serving, api_version: int, has_documents: bool
) -> None:
    body = {"query": "q", "documents": ["a", {"text": "abc"}, "ab"], "top_n": 2, "max_tokens_per_doc": 7}
    answer = asyncio.run(
        scorer(serving).rerank(json.dumps(body).encode(), SimpleNamespace(), "id-1", api_version)  # type: ignore[arg-type]
    )
    assert [result["index"] for result in answer["results"]] == [1, 2]
    assert answer["results"][0]["relevance_score"] == pytest.approx(0.03)
    assert all(("document" in result) == has_documents for result in answer["results"])
    assert answer["id"] == "id-1"
    assert answer["meta"]["tokens"] == {"input_tokens": 9, "output_tokens": 0}
    assert serving.requests[0].max_tokens_per_doc == 7


def test_a_request_ends_at_its_deadline(serving: Serving) -> None:
    serving.delay_s = 5
    with pytest.raises(RequestError) as caught:
        score(serving, query="q", items=["a"], timeout_s=0.02)
    assert caught.value.status == 504


def test_a_pooler_without_scores_is_one_clear_line() -> None:
    with pytest.raises(RequestError, match="gives no scores of pairs"):
        asyncio.run(scorer(None).score(b'{"query": "q", "items": ["a"]}', SimpleNamespace()))  # type: ignore[arg-type]
