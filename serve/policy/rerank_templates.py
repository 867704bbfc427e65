"""Templates that ask a generative model whether a document answers a query, and the models trained with one of them.

A model's template is the first of these that exists:

1. the TOML file named by the environment variable `SLIMSERVE_RERANK_TEMPLATE`,
2. `slimserve_rerank.toml` in the model's directory,
3. the key `rerank` of `slimserve.json` in that directory,
4. the template that the model was trained with, if it is one of `KNOWN_RERANKERS`,
5. the template "default".

All have the same keys; only `template` is required:

    template = "Query: {query}\\nDocument: {document}\\nRelevant:"   # or a name in TEMPLATES
    labels = [" yes", " no"]             # for relevant and for other documents; one token each
    apply_chat_template = false          # true: make the text a user message
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slimserve.core.errors import UserError
from slimserve.core.model_config import read_json_object
from slimserve.core.text import read_text

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
TEMPLATES["mxbai-rerank-v2"] = RerankTemplate(
    template="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nquery: {query}\ndocument: {document}\n"
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 "
    "for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n",
    labels=["1", "0"],
)


@dataclass(frozen=True)
class KnownReranker:
    """A family of models that was trained to rank with one of the templates."""

    template: str
    """Name in TEMPLATES."""
    name: re.Pattern[str]
    """Pattern of the family's model names."""
    chat_template: str | None = None
    """Text that the family's own chat template contains."""


KNOWN_RERANKERS = (
    KnownReranker(
        "qwen3-reranker", re.compile(r"qwen3-reranker", re.IGNORECASE), "Judge whether the Document meets the"
    ),
    KnownReranker("mxbai-rerank-v2", re.compile(r"mxbai-rerank-(?:\w+-)?v2", re.IGNORECASE), "search relevance expert"),
)


def known_reranker(model: Path) -> KnownReranker | None:
    """Return the family of the model in a directory, by the names that its files state and by its chat template."""
    names = [model.name, *([model.parent.parent.name] if model.parent.name == "snapshots" else [])]
    for file, keys in ((model / _MANIFEST, ("name", "base")), (model / "config.json", ("_name_or_path",))):
        if file.is_file():
            content = read_json_object(file)
            stated = [content.get(key) for key in keys]
            names += [str(value.get("model") if isinstance(value, dict) else value) for value in stated if value]
    files = [model / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    for known in KNOWN_RERANKERS:
        if any(known.name.search(name) for name in names) or (known.chat_template and known.chat_template in text):
            return known
    return None


def load_template(model: Path, environment: Mapping[str, str] | None = None) -> RerankTemplate:
    """Return the template of the model in directory `model`; raises UserError if its file is invalid."""
    named = (os.environ if environment is None else environment).get(TEMPLATE_VARIABLE)
    beside, manifest = model / TEMPLATE_FILE, model / _MANIFEST
    source = Path(named) if named else beside if beside.is_file() else manifest
    try:
        if source == manifest:
            content = json.loads(manifest.read_text(encoding="utf-8")).get("rerank") if manifest.is_file() else None
            if content is None:
                family = known_reranker(model)
                return TEMPLATES[family.template if family else "default"]
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
