"""Tests of `check --rank` on planted faults: a stand-in for a reranker answers only the prompt it was trained with."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from slimserve.compare.check_rank import (
    KNOWN_ANSWERS,
    KnownAnswer,
    Scores,
    check_rank,
    rank_findings,
    reference_scores,
)
from slimserve.core.errors import UserError
from slimserve.serve.engine.rerank import RerankRequest, as_score_request
from slimserve.serve.policy.rerank_templates import TEMPLATES, RerankTemplate, load_template

TRAINED = TEMPLATES["qwen3-reranker"]


def yes_probability(prompt: str) -> float:
    """Return P(yes) of a model that was trained with one prompt; any other prompt gets noise around its prior."""
    before, between, after = TRAINED.parts()
    for known in KNOWN_ANSWERS:
        for document, probability in ((known.answer, 0.9), (known.other, 0.02)):
            if prompt == f"{before}{known.query}{between}{document}{after}":
                return probability
    return 0.4 + 0.2 * (hash(len(prompt) * 7919) % 97) / 97


def served(directory: Path) -> Scores:
    """Score as the server does: with the template of the directory, whose first label means relevant."""
    template = load_template(directory, {})
    scores = []
    for known in KNOWN_ANSWERS:
        request = RerankRequest(query=known.query, documents=[known.answer, known.other])
        scoring = as_score_request(request, template, lambda text, _: len(text))
        values = []
        for item in scoring.items or ():
            yes = yes_probability(f"{scoring.query}{item}")
            values.append(yes if scoring.labels is not None and scoring.labels[0] == "yes" else 1 - yes)
        scores.append((values[0], values[1]))
    return scores


def reference(_directory: Path, template: RerankTemplate, known: Sequence[KnownAnswer]) -> Scores:
    before, between, after = template.parts()
    return [
        (
            yes_probability(f"{before}{one.query}{between}{one.answer}{after}"),
            yes_probability(f"{before}{one.query}{between}{one.other}{after}"),
        )
        for one in known
    ]


@pytest.fixture
def reranker(tmp_path: Path) -> Path:
    directory = tmp_path / "Qwen3-Reranker-0.6B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    return directory


def failed(directory: Path) -> dict[str, str]:
    return {one.name: one.detail for one in rank_findings(directory, served(directory), reference) if not one.passed}


def test_a_known_reranker_passes_without_any_setting(reranker: Path) -> None:
    assert failed(reranker) == {}


def test_swapped_labels_are_found(reranker: Path) -> None:
    (reranker / "slimserve_rerank.toml").write_text('template = "qwen3-reranker"\nlabels = ["no", "yes"]\n')
    found = failed(reranker)
    assert set(found) == {"rank prompt", "rank order", "rank scores"}
    assert "another labels than qwen3-reranker" in found["rank prompt"]
    assert "labels are probably swapped" in found["rank order"]


def test_a_wrong_template_is_found(reranker: Path) -> None:
    wrong = TRAINED.template.replace("<think>\\n\\n</think>\\n\\n", "").replace("<Instruct>", "Instruct")
    (reranker / "slimserve_rerank.toml").write_text(f'template = {json.dumps(wrong)}\nlabels = ["yes", "no"]\n')
    found = failed(reranker)
    assert {"rank prompt", "rank scores"} <= set(found)
    assert "another template than qwen3-reranker" in found["rank prompt"]


def test_without_a_known_family_the_order_and_transformers_decide(tmp_path: Path) -> None:
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (directory / "slimserve_rerank.toml").write_text('template = "qwen3-reranker"\n')
    assert failed(directory) == {}
    (directory / "slimserve_rerank.toml").write_text('template = "qwen3-reranker"\nlabels = ["no", "yes"]\n')
    assert "swapped" in failed(directory)["rank order"]
    (directory / "slimserve_rerank.toml").unlink()
    assert "not trained to rank with this prompt" in failed(directory)["rank order"]


def test_a_server_that_computes_something_else_is_found(reranker: Path) -> None:
    off = [(min(1.0, answer + 0.09), other + 0.09) for answer, other in served(reranker)]
    found = {one.name: one for one in rank_findings(reranker, off, reference)}
    assert found["rank order"].passed
    assert not found["rank scores"].passed
    assert "0.090 on average" in found["rank scores"].detail


def test_a_model_that_transformers_cannot_load_is_a_finding(reranker: Path) -> None:
    def broken(*_: object) -> Scores:
        raise OSError("no weights")

    found = {one.name: one for one in rank_findings(reranker, served(reranker), broken)}
    assert "OSError: no weights" in found["rank scores"].detail


def test_transformers_scores_are_the_share_of_the_first_label(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    model.save_pretrained(tmp_path)
    template = RerankTemplate(template="{query} ? {document} :", labels=[" yes", " no"])
    known = [KnownAnswer("a query", "an answer", "another text")]
    [(answer, other)] = reference_scores(tmp_path, template, known)
    with torch.inference_mode():
        logits = model(tokenizer("a query ? an answer :", return_tensors="pt").input_ids).logits[0, -1]
    yes, no = (tokenizer.encode(label, add_special_tokens=False)[0] for label in (" yes", " no"))
    assert answer == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-6)
    assert answer != other
    swapped = RerankTemplate(template="{query} ? {document} :", labels=[" no", " yes"])
    assert reference_scores(tmp_path, swapped, known)[0] == pytest.approx((1 - answer, 1 - other), abs=1e-6)


def test_a_device_that_is_not_there_is_refused_before_the_server_starts(reranker: Path) -> None:
    with pytest.raises(UserError, match="cuda:99"):
        next(check_rank(reranker, "cuda:99"))
