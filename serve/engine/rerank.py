"""Reranking with a generative model: Cohere's and Jina's `POST /v1/rerank` as a score request.

A template (serve/policy/rerank_templates.py) asks the model for each document whether it answers the query. The
relevance is the probability of the first label against the second, P(yes) / (P(yes) + P(no)). The query comes first,
so that all documents share it as their prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationInfo, field_validator

from slimserve.serve.engine.item_ids import NO_ITEMS, ItemTexts
from slimserve.serve.engine.score_request import RequestError, ScoreRequest, UnknownItems
from slimserve.serve.engine.scoring import ScoringPlan, probabilities, usage
from slimserve.serve.policy.rerank_templates import RerankTemplate


class RerankRequest(BaseModel):
    """The body of `POST /rerank`: the fields of Cohere's v1 and v2 and of Jina's clients; others are ignored.

    Calibrations are fitted on the prompts of a workload, which differ from those of a template. `calibrated` is
    therefore refused.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    query: str
    item_ids: list[str] | None = None
    """Ids of the documents in the catalogue of a model with item tokens, in place of `documents` or beside them."""
    unknown_items: UnknownItems = "error"
    """`error` rejects an id that the catalogue lacks; `text` takes the document in its place."""
    documents: list[str | dict[str, Any]] | None = Field(default=None, validate_default=True)
    """Texts, or objects with a `text` (Jina, Cohere v1) or with the fields in `rank_fields`."""
    model: str | None = None
    top_n: int | None = Field(default=None, ge=0)
    """Number of best documents to return; all by default, and for 0."""
    return_documents: bool | None = None
    """Return the documents; by default true under /rerank and /v1/rerank (Jina), false under /v2/rerank (Cohere)."""
    rank_fields: list[str] | None = Field(default=None, min_length=1)
    """Fields of the documents that are ranked, in this order (Cohere v1)."""
    max_tokens_per_doc: int | None = Field(default=None, gt=0)
    """Maximum number of tokens of each document that are ranked (Cohere v2); by default nothing is cut."""
    timeout_s: StrictFloat | StrictInt | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after which the request ends with 504."""
    calibrated: Literal[False] = False

    @field_validator("documents")
    @classmethod
    def _has_documents(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("item_ids") is None:
            raise ValueError("give the documents, or their item_ids")
        return value

    @field_validator("calibrated", mode="before")
    @classmethod
    def _has_no_calibration(cls, value: Any) -> Any:
        if value:
            raise ValueError("a calibration holds for the prompts of its workload; send them to /v1/score")
        return False


def as_score_request(
    request: RerankRequest,
    template: RerankTemplate,
    first_tokens_end: Callable[[str, int], int],
    item_texts: ItemTexts = NO_ITEMS,
) -> ScoreRequest:
    """Return the score request that answers a rerank request; raises RequestError if a document has no text.

    `first_tokens_end(text, n)` returns the number of characters that the first n tokens of a text cover. `item_texts`
    gives items of the catalogue their texts.
    """
    before, between, after = template.parts()
    texts = None if request.documents is None else documents_texts(request.documents, request.rank_fields)
    if texts is not None and request.max_tokens_per_doc is not None:
        texts = [text[: first_tokens_end(text, request.max_tokens_per_doc)] for text in texts]
    if request.item_ids is not None:
        texts = item_texts.candidates(request.item_ids, texts, request.unknown_items)
    if not texts:
        raise RequestError("documents", "is empty; give at least one document")
    return ScoreRequest(
        query=f"{before}{request.query}{between}",
        items=[text + after for text in texts],
        labels=template.labels,
        apply_softmax=True,
        apply_chat_template=template.apply_chat_template,
        model=request.model,
        timeout_s=request.timeout_s,
    )


def documents_texts(documents: Sequence[str | dict[str, Any]], rank_fields: Sequence[str] | None) -> list[str]:
    """Return the texts of documents that are ranked; raises RequestError if one has none."""
    return [document_text(document, index, rank_fields) for index, document in enumerate(documents)]


def document_text(document: str | Mapping[str, Any], index: int, rank_fields: Sequence[str] | None) -> str:
    """Return the text of a document that is ranked; raises RequestError if a field is missing."""
    if isinstance(document, str):
        return document
    values = [document.get(field) for field in rank_fields or ("text",)]
    for field, value in zip(rank_fields or ("text",), values, strict=True):
        if not isinstance(value, str):
            raise RequestError(f"documents[{index}]", f"has no text in its field {field!r}")
    return "\n".join(values)  # type: ignore[arg-type]  # checked above


def rerank_response(
    request: RerankRequest,
    plan: ScoringPlan,
    logprobs: Sequence[Sequence[float]],
    *,
    model: str,
    request_id: str,
    api_version: int,
    cached_tokens: Sequence[int],
) -> dict[str, Any]:
    """Return an answer for Cohere's clients of both versions and Jina's; best first, ties in the given order."""
    relevance = [probabilities(values, apply_softmax=True)[0] for values in logprobs]
    return rerank_body(
        request,
        [(index, relevance[task]) for index, task in enumerate(plan.task_of_item)],
        model=model,
        request_id=request_id,
        api_version=api_version,
        usage=usage(plan, cached_tokens),
    )


def rerank_body(
    request: RerankRequest,
    scored: Sequence[tuple[int, float]],
    *,
    model: str,
    request_id: str,
    api_version: int,
    usage: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the body of an answer from the number and the relevance of each document."""
    best = sorted(scored, key=lambda pair: (-pair[1], pair[0]))[: request.top_n or None]
    with_documents = api_version == 1 if request.return_documents is None else request.return_documents
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in best]
    for result in results:
        if request.item_ids is not None:
            result["item_id"] = request.item_ids[result["index"]]
        if with_documents and request.documents is not None:
            document = request.documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else document
    return {
        "id": request_id,
        "object": "list",
        "model": model,
        "results": results,
        "usage": usage,
        "meta": {
            "api_version": {"version": str(api_version)},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": usage["prompt_tokens"], "output_tokens": 0},
        },
    }
