"""`/v1/score` and `/v1/rerank` for models with a classification head: cross-encoders and converted rerankers.

vLLM's own scoring pairs query and document as the model wants it: with separator tokens, or in the score template that
the launch plan gives. This module translates the bodies that generative models take here, so that a client need not
know which kind of model it talks to. vLLM's own forms of `/v1/score` (`queries` and `documents`, and others) pass
through unchanged. A score is the model's probability of relevance, after the activation of its own head.
"""

from __future__ import annotations

import json
from typing import Any, cast

from fastapi import Request, Response
from pydantic import TypeAdapter
from starlette.datastructures import State
from vllm.entrypoints.pooling.scoring import protocol

from slimserve.serve.engine.rerank import RerankRequest, documents_texts, rerank_body
from slimserve.serve.engine.score_request import RequestError, ScoreRequest, time_limit

_SCORE_FIELDS = {"query", "items", "model", "timeout_s", "user"}
_OWN_FORMS = ({"queries"}, {"text_1"}, {"data_1"})
"""Fields that only vLLM's own forms of a score request have."""


class Classifier:
    """Answers score and rerank requests with vLLM's serving of scores."""

    def __init__(self, state: State) -> None:
        self._serving = getattr(state, "serving_scores", None)

    async def score(self, body: bytes, raw_request: Request) -> dict[str, Any] | Response:
        """Return SGLang's answer with one score per item, or vLLM's answer to one of its own forms.

        Raises RequestError for fields that only a generative model can serve, and pydantic's ValidationError.
        """
        given = json.loads(body) if body.lstrip().startswith(b"{") else {}
        if any(fields <= given.keys() for fields in _OWN_FORMS):
            own = TypeAdapter(protocol.ScoreRequest).validate_python(given)
            return cast("Response", await self._ask(own, raw_request))
        request = ScoreRequest.model_validate_json(body)
        changed = {name for name in request.model_fields_set if name not in _SCORE_FIELDS}
        for name in sorted(changed):
            if getattr(request, name) != ScoreRequest.model_fields[name].get_default(call_default_factory=True):
                problem = "is not supported: this model has a classification head and gives one score per item"
                raise RequestError(name, f"{problem}; remove the field")
        items = [request.items] if isinstance(request.items, str) else request.items or []
        if not isinstance(request.query, str) or not all(isinstance(item, str) for item in items):
            raise RequestError("items", "and query must be texts, because the model pairs them in its own form")
        if not items:
            raise RequestError("items", "is empty; give at least one item")
        asked = protocol.ScoreQueriesDocumentsRequest(model=request.model, queries=request.query, documents=items)
        answer = await self._content(asked, raw_request, request.timeout_s)
        scores = sorted(answer["data"], key=lambda one: int(one["index"]))
        return {
            "scores": [[one["score"]] for one in scores],
            "model": answer["model"],
            "usage": answer["usage"],
            "object": "scoring",
        }

    async def rerank(self, body: bytes, raw_request: Request, request_id: str, api_version: int) -> dict[str, Any]:
        """Return the answer for Cohere's and Jina's clients; raises RequestError and pydantic's ValidationError."""
        request = RerankRequest.model_validate_json(body)
        if request.item_ids is not None:
            raise RequestError("item_ids", "is not supported: this model has a classification head and reads texts")
        texts = documents_texts(request.documents or [], request.rank_fields)
        if not texts:
            raise RequestError("documents", "is empty; give at least one document")
        asked = protocol.RerankRequest(
            model=request.model,
            query=request.query,
            documents=texts,
            max_tokens_per_doc=request.max_tokens_per_doc or 0,
        )
        answer = await self._content(asked, raw_request, request.timeout_s)
        scored = [(int(one["index"]), float(one["relevance_score"])) for one in answer["results"]]
        return rerank_body(
            request,
            scored,
            model=answer["model"],
            request_id=request_id,
            api_version=api_version,
            usage=answer["usage"],
        )

    async def _content(self, asked: Any, raw_request: Request, timeout_s: float | None) -> dict[str, Any]:
        async with time_limit(timeout_s):
            answer = await self._ask(asked, raw_request)
        return cast("dict[str, Any]", json.loads(answer.body))

    async def _ask(self, asked: Any, raw_request: Request) -> Any:
        if self._serving is None:
            raise RequestError("model", "gives no scores of pairs; use /classify or /pooling")
        return await self._serving(asked, raw_request)
