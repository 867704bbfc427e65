"""Launch of models with a classification head, which vLLM serves as poolers: cross-encoders and converted rerankers.

vLLM takes the runner from the architecture. What it cannot know is the prompt that a decoder was trained with; without
it, its scores are close to random. A known reranker therefore gets its template as a Jinja template of the roles
`query` and `document`, the form that vLLM's own scoring takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimserve.core.storage import cache_dir, write_atomically
from slimserve.serve.launch.choice import Choice
from slimserve.serve.policy.rerank_templates import TEMPLATES, RerankTemplate, known_reranker

_HEADS = ("ForSequenceClassification", "ForSequenceScoring", "ForRanking")


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes a model whose output is a class score and not a token."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and any(str(name).endswith(_HEADS) for name in architectures)


def plan_classifier(directory: Path, config: Mapping[str, Any]) -> tuple[Choice, ...]:
    """Return the arguments for a model with a classification head; nothing for any other model."""
    if not is_classifier(config):
        return ()
    choices = [Choice("--runner", "pooling", f"{config['architectures'][0]} gives scores, not text")]
    family = known_reranker(directory)
    if family is not None:
        file = cache_dir("templates") / f"{family.template}.jinja"
        write_atomically(file, score_template(TEMPLATES[family.template]))
        reason = f"the model was trained with the prompt of {family.template}; other prompts give wrong scores"
        choices.append(Choice("--chat-template", str(file), reason))
    return tuple(choices)


def score_template(template: RerankTemplate) -> str:
    """Return a rerank template as vLLM's scoring takes it; literal text is quoted, so that no line feed is lost."""
    before, between, after = (json.dumps(part) for part in template.parts())
    query, document = (
        f'{{{{ (messages | selectattr("role", "eq", "{role}") | first).content }}}}' for role in ("query", "document")
    )
    return f"{{{{ {before} }}}}{query}{{{{ {between} }}}}{document}{{{{ {after} }}}}"
