"""`slimserve check DIR --rank`: asks a served model known-answer pairs, and compares its scores with transformers.

Wrong rerank scores are silent: a prompt that the model was not trained with, or swapped labels, still gives numbers
between 0 and 1. Three findings tell them apart. The prompt must be the one that the model's family was trained with.
The answering document must come before the other one. And transformers, given the family's own prompt, must compute
the served scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from slimserve.compare.backend import Backend
from slimserve.compare.check import Finding
from slimserve.core.device import choose_device
from slimserve.core.errors import UserError
from slimserve.core.model_config import CONFIG_FILE, read_config
from slimserve.core.openai_client import auth_headers
from slimserve.core.storage import cache_dir
from slimserve.core.tokenizer import load_tokenizer
from slimserve.serve.launch.rerankers import is_classifier
from slimserve.serve.policy.rerank_templates import TEMPLATES, RerankTemplate, known_reranker, load_template
from slimserve.workloads import workload_names


@dataclass(frozen=True)
class KnownAnswer:
    """A query, a document that answers it, and one on another subject."""

    query: str
    answer: str
    other: str


Scores = list[tuple[float, float]]
"""Relevance of the answer and of the other document, for each known answer."""
KNOWN_ANSWERS = tuple(
    KnownAnswer(query, answer, other)
    for query, answer, other in (
        ("What is the capital of France?", "Paris is the capital of France.", "Bread is made of flour and water."),
        ("How do plants make food?", "Plants make sugar from light by photosynthesis.", "The train leaves at nine."),
        ("Who wrote Hamlet?", "Hamlet is a tragedy by William Shakespeare.", "Copper conducts electricity well."),
        ("What is the boiling point of water?", "Water boils at 100 degrees Celsius.", "Lions live in groups."),
        ("Why is the sky blue?", "Air scatters blue light more than red light.", "Chess has 64 squares."),
        ("What is the largest planet?", "Jupiter is the largest planet.", "A violin has four strings."),
        ("How many legs does a spider have?", "A spider has eight legs.", "The bridge was opened in 1937."),
        ("What is gravity?", "Gravity is a force that pulls masses together.", "She bought a red coat in town."),
        ("Where do penguins live?", "Penguins live in Antarctica.", "The contract ends in March."),
        ("What is the chemical symbol of gold?", "The symbol of gold is Au.", "Rice grows in flooded fields."),
        ("How long is a marathon?", "A marathon is 42.195 kilometres long.", "The museum is closed on Mondays."),
        ("What causes tides?", "The Moon's gravity causes the tides.", "Python is a programming language."),
    )
)
_LEAST_RIGHT = 0.75
"""Least share of known answers that come first; a coin has 0.5."""
_MAX_DIFFERENCE = 0.05
"""Largest accepted mean difference of scores from transformers; bf16 alone causes 0.003 on SmolLM2."""


def check_rank(directory: Path, device: str = "cpu") -> Iterator[Finding]:
    """Serve the model in a directory, ask the known answers, and yield the findings; transformers uses `device`."""
    chosen = choose_device(device)
    log = cache_dir("logs") / f"check-rank-{directory.name}.log"
    with Backend(str(directory), workload_names()[:1]).serve(directory, log) as served:
        scores = ask_served(served.target.url, served.target.model, KNOWN_ANSWERS)
    yield from rank_findings(directory, scores, partial(reference_scores, device=chosen))


def rank_findings(
    directory: Path, served: Scores, reference: Callable[[Path, RerankTemplate, Sequence[KnownAnswer]], Scores]
) -> Iterator[Finding]:
    """Yield the findings about the `served` scores of KNOWN_ANSWERS.

    `reference(directory, template, known)` computes the scores without the server.
    """
    used, family = load_template(directory), known_reranker(directory)
    right = TEMPLATES[family.template] if family else used
    if family is not None:
        name = family.template
        wrong = [
            field
            for field in ("template", "labels", "apply_chat_template")
            if getattr(used, field) != getattr(right, field)
        ]
        detail = f"the model's template has another {' and '.join(wrong)} than {name}, which the model was trained with"
        yield Finding("rank prompt", not wrong, detail if wrong else f"the prompt and the labels are those of {name}")
    share = sum(answer > other for answer, other in served) / len(served)
    detail = f"{share:.0%} of {len(served)} known answers come before the other document"
    if share < 1 - _LEAST_RIGHT:
        detail += "; the labels are probably swapped: the first label must mean relevant"
    elif share < _LEAST_RIGHT:
        detail += "; the model was not trained to rank with this prompt, or the template is wrong"
    yield Finding("rank order", share >= _LEAST_RIGHT, detail)
    try:
        expected = reference(directory, right, KNOWN_ANSWERS)
    except Exception as error:  # loading may raise anything, and this is the result of the check
        yield Finding("rank scores", False, f"transformers does not load it: {type(error).__name__}: {error}"[:300])
        return
    differences = [
        abs(one - two)
        for ours, theirs in zip(served, expected, strict=True)
        for one, two in zip(ours, theirs, strict=True)
    ]
    mean, largest = sum(differences) / len(differences), max(differences)
    detail = f"differ from transformers by {mean:.3f} on average and {largest:.3f} at most"
    yield Finding("rank scores", mean <= _MAX_DIFFERENCE, detail)


def ask_served(url: str, model: str, known: Sequence[KnownAnswer]) -> Scores:
    """Return the relevance of both documents of each known answer from `/v1/rerank`; UserError if a request fails."""
    scores = []
    with httpx.Client(base_url=url, headers=auth_headers(), timeout=600) as client:
        for one in known:
            body = {"model": model, "query": one.query, "documents": [one.answer, one.other]}
            response = client.post("/v1/rerank", json=body)
            if response.status_code != 200:
                problem = f"is answered with {response.status_code}: {response.text[:200]}"
                raise UserError("rerank request", f"{url}/v1/rerank", problem, "read the server's log")
            relevance = {result["index"]: float(result["relevance_score"]) for result in response.json()["results"]}
            scores.append((relevance[0], relevance[1]))
    return scores


@torch.inference_mode()
def reference_scores(
    directory: Path, template: RerankTemplate, known: Sequence[KnownAnswer], device: torch.device | str = "cpu"
) -> Scores:
    """Return the scores that transformers computes in float32, one prompt after the other.

    Raises whatever transformers raises, and UserError if a label is not one token.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(directory)
    if is_classifier(read_config(directory)):
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
        classifier = classifier.to(device).eval()
        if classifier.config.num_labels != 1:
            problem = f"has {classifier.config.num_labels} classes, which give no relevance"
            raise UserError(CONFIG_FILE, directory / CONFIG_FILE, problem, "use a model with one class")
        is_templated = known_reranker(directory) is not None

        def relevance(query: str, document: str) -> float:
            texts = (_text(template, query, document),) if is_templated else (query, document)
            logits = classifier(**tokenizer(*texts, return_tensors="pt").to(device)).logits
            return float(logits[0, 0].sigmoid())

    else:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model = model.to(device).eval()

        def relevance(query: str, document: str) -> float:
            text = _text(template, query, document)
            if template.apply_chat_template:
                messages = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            special = not template.apply_chat_template
            prompt = tokenizer.encode(text, add_special_tokens=special)
            labels = [tokenizer.encode(text + label, add_special_tokens=special) for label in template.labels]
            for label, tokens in zip(template.labels, labels, strict=True):
                if len(tokens) != len(prompt) + 1:
                    raise UserError("rerank template", label, "is not one token here", "choose another label")
            logits = model(torch.tensor([prompt], device=device)).logits[0, -1, [tokens[-1] for tokens in labels]]
            return float(logits.double().softmax(-1)[0])

    return [(relevance(one.query, one.answer), relevance(one.query, one.other)) for one in known]


def _text(template: RerankTemplate, query: str, document: str) -> str:
    before, between, after = template.parts()
    return f"{before}{query}{between}{document}{after}"
