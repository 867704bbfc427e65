"""Reranking with a generative model: Cohere's and Jina's `POST /v1/rerank` as a score request.

A template asks the model for each document whether it answers the query. The relevance is the probability of the
first label against the second, P(yes) / (P(yes) + P(no)). The query comes first, so that all documents share it as
their prefix.

A model's template is the first of these that exists:

1. the TOML file named by the environment variable `SLIMSERVE_RERANK_TEMPLATE`,
2. `slimserve_rerank.toml` in the model's directory,
3. the key `rerank` of `slimserve.json` in that directory,
4. the template "default".

All have the same keys; only `template` is required:

    template = "Query: {query}\\nDocument: {document}\\nRelevant:"   # or a name in TEMPLATES
    labels = [" yes", " no"]             # for relevant and for other documents; one token each
    apply_chat_template = false          # true: make the text a user message
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, field_validator

from slimserve.core.errors import UserError
from slimserve.core.text import read_text
from slimserve.serve.engine.score_request import RequestError, ScoreRequest
from slimserve.serve.engine.scoring import ScoringPlan, probabilities, usage

TEMPLATE_VARIABLE = "SLIMSERVE_RERANK_TEMPLATE"
TEMPLATE_FILE = "slimserve_rerank.toml"
_MANIFEST = "slimserve.json"


class RerankTemplate(BaseModel):
    """The prompt that asks a model whether a document answers a query."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    template: str
    """Text with {query} and, after it, {document}, once each; or a name in TEMPLATES."""
    labels: list[str] = Field(default=[" yes", " no"], min_length=2, max_length=2)
    """Answer of the model for a relevant document, and for any other document."""
    apply_chat_template: bool = False
    """Make the text a user message in the model's own chat template."""

    @field_validator("template")
    @classmethod
    def _has_both_fields(cls, template: str) -> str:
        query, document = template.find("{query}"), template.find("{document}")
        once = template.count("{query}") == template.count("{document}") == 1
        if template not in TEMPLATES and not (once and query < document):
            raise ValueError(
                "write {query} and after it {document}, once each, or one of the names " + ", ".join(TEMPLATES)
            )
        return template

    def parts(self) -> tuple[str, str, str]:
        """Return the text before the query, between query and document, and after the document."""
        before, rest = self.template.split("{query}")
        between, after = rest.split("{document}")
        return before, between, after


TEMPLATES: dict[str, RerankTemplate] = {}
"""Templates by name, some for models that were trained with them and some for any model."""
TEMPLATES["default"] = RerankTemplate(
    template="Does the document answer the query? Say yes or no.\n\n"
    "Query: {query}\n\nDocument: {document}\n\nDoes the document answer the query? Answer:"
)
TEMPLATES["chat"] = RerankTemplate(
    template='Judge whether the document answers the query. Say only "yes" or "no".\n\n'
    "Query: {query}\n\nDocument: {document}",
    labels=["yes", "no"],
    apply_chat_template=True,
)
TEMPLATES["qwen3-reranker"] = RerankTemplate(
    template="<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    labels=["yes", "no"],
)


class RerankRequest(BaseModel):
    """The body of `POST /rerank`: the fields of Cohere's v1 and v2 and of Jina's clients; others are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    query: str
    documents: list[str | dict[str, Any]]
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


def load_template(model: Path, environment: Mapping[str, str] | None = None) -> RerankTemplate:
    """Return the template of the model in directory `model`; raises UserError if its file is invalid."""
    named = (os.environ if environment is None else environment).get(TEMPLATE_VARIABLE)
    beside, manifest = model / TEMPLATE_FILE, model / _MANIFEST
    source = Path(named) if named else beside if beside.is_file() else manifest
    try:
        if source == manifest:
            content = json.loads(manifest.read_text(encoding="utf-8")).get("rerank") if manifest.is_file() else None
            if content is None:
                return TEMPLATES["default"]
        else:
            content = tomllib.loads(read_text(source, "rerank template"))
        given = RerankTemplate.model_validate(content)
    except (OSError, ValueError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(
            "rerank template", source, f"is invalid ({problem})", 'write template = "… {query} … {document} …"'
        ) from error
    known = TEMPLATES.get(given.template)
    return known.model_copy(update=given.model_dump(exclude_unset=True, exclude={"template"})) if known else given


def as_score_request(
    request: RerankRequest, template: RerankTemplate, first_tokens_end: Callable[[str, int], int]
) -> ScoreRequest:
    """Return the score request that answers a rerank request; raises RequestError if a document has no text.

    `first_tokens_end(text, n)` returns the number of characters that the first n tokens of a text cover.
    """
    before, between, after = template.parts()
    texts = [document_text(document, index, request.rank_fields) for index, document in enumerate(request.documents)]
    if not texts:
        raise RequestError("documents", "is empty; give at least one document")
    if request.max_tokens_per_doc is not None:
        texts = [text[: first_tokens_end(text, request.max_tokens_per_doc)] for text in texts]
    return ScoreRequest(
        query=f"{before}{request.query}{between}",
        items=[text + after for text in texts],
        labels=template.labels,
        apply_softmax=True,
        apply_chat_template=template.apply_chat_template,
        model=request.model,
        timeout_s=request.timeout_s,
    )


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
    scored = [(index, relevance[task]) for index, task in enumerate(plan.task_of_item)]
    best = sorted(scored, key=lambda pair: (-pair[1], pair[0]))[: request.top_n or None]
    with_documents = api_version == 1 if request.return_documents is None else request.return_documents
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in best]
    if with_documents:
        for result in results:
            document = request.documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else document
    return {
        "id": request_id,
        "object": "list",
        "model": model,
        "results": results,
        "usage": usage(plan, cached_tokens),
        "meta": {
            "api_version": {"version": str(api_version)},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": plan.num_prompt_tokens, "output_tokens": 0},
        },
    }
