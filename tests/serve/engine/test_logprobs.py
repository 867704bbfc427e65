"""Log-probabilities of completions in engine steps that also read labels: in the sampler, and on a real engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from typing import Any

import httpx
import pytest
import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from slimserve.serve.engine.label_logits import LABELS_ALONE
from slimserve.serve.engine.logprobs import register
from tests.serve.conftest import NAME

_SECONDS = float(os.environ.get("MIXED_TRAFFIC_S", "10"))
"""Duration of the mixed traffic on a real engine."""
_TOLERANCE_NATS = 2e-3


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """Return vLLM's sampler with our change, which is undone afterwards."""
    restore_vllm(monkeypatch)
    register()
    return Sampler()


def restore_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo our changes for one test, in case that another test loaded vLLM's plugins into this process."""
    for changed in (Sampler, LogitsProcessor):
        vllm_methods = changed.__dict__.get("vllm_methods") or {
            name: getattr(changed, name) for name in METHODS[changed]
        }
        for name in METHODS[changed]:
            monkeypatch.setattr(changed, name, vllm_methods[name])
        monkeypatch.setattr(changed, "vllm_methods", None, raising=False)
        monkeypatch.delattr(changed, "vllm_methods")


METHODS = {Sampler: ("forward", "gather_specific_token_logprobs"), LogitsProcessor: ("__init__", "forward")}
"""vLLM's methods that `register` replaces."""


def sample(sampler: Sampler, logits: torch.Tensor, most_likely: int | None, labels: dict[int, list[int]]) -> Any:
    none = torch.zeros(len(logits))
    metadata = SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=most_likely, no_penalties=True, prompt_token_ids=None, frequency_penalties=none,
        presence_penalties=none, repetition_penalties=none, output_token_ids=[[] for _ in logits],
        allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=LogitsProcessors(), logprob_token_ids=labels,
    )  # fmt: skip
    return sampler(logits, metadata).logprobs_tensors


@pytest.mark.parametrize("most_likely", [0, 3, 7, -1])
def test_each_request_of_a_mixed_step_gets_what_it_gets_alone(sampler: Sampler, most_likely: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 32)
    logprobs = logits.log_softmax(-1)
    labels = {1: [5, 30], 2: [9, 4, 11, 0, 2]}
    mixed = sample(sampler, logits.clone(), most_likely, labels)
    count = 32 if most_likely == -1 else most_likely
    for row in (0, 3):
        top = logprobs[row].topk(count)
        assert mixed.logprob_token_ids[row, 0] == logits[row].argmax()
        assert mixed.logprob_token_ids[row, 1 : count + 1].tolist() == top.indices.tolist()
        assert torch.allclose(mixed.logprobs[row, 1 : count + 1], top.values)
    for row, tokens in labels.items():
        assert mixed.logprob_token_ids[row, 1 : len(tokens) + 1].tolist() == tokens
        assert torch.allclose(mixed.logprobs[row, 1 : len(tokens) + 1], logprobs[row, tokens])
    assert mixed.selected_token_ranks.tolist() == [1, 1, 1, 1]


def test_steps_of_one_kind_are_as_in_stock_vllm(sampler: Sampler) -> None:
    logits = torch.randn(2, 16)
    only_labels = sample(sampler, logits.clone(), None, {0: [1], 1: [2, 3]})
    assert only_labels.logprobs.shape == (2, 3)
    only_likely = sample(sampler, logits.clone(), 2, {})
    assert only_likely.logprob_token_ids[:, 1:].tolist() == logits.topk(2).indices.tolist()


def test_stock_vllm_still_needs_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    restore_vllm(monkeypatch)
    torch.manual_seed(0)
    mixed = sample(Sampler(), torch.randn(2, 16), 2, {0: [1, 2]})
    assert torch.isinf(mixed.logprobs[1, 1:]).all(), (
        "vLLM is mended; serve/engine/logprobs.py needs no merging of two kinds of rows"
    )


@pytest.mark.engine
def test_mixed_traffic_gives_the_answers_of_requests_alone(scoring_url: str) -> None:
    completions = [
        {"prompt": f"Number {n} is followed by", "max_tokens": 8, "temperature": 0, "logprobs": 3} for n in range(16)
    ]
    scores = [
        {"query": f"Item {n} costs", "items": [" one", " two dollars"], "labels": [" a", " the", " in"]}
        for n in range(16)
    ]

    async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await client.post(path, json={"model": NAME, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def run() -> tuple[int, int]:
        # uvicorn closes connections that are idle for 5 s, which is also httpx's own limit.
        limits = httpx.Limits(keepalive_expiry=2)
        async with httpx.AsyncClient(base_url=scoring_url, timeout=120, limits=limits) as client:
            alone = [await post(client, "/v1/completions", body) for body in completions]
            alone_scores = [await post(client, "/v1/score", body) for body in scores]
            wrong = total = 0
            end = time.monotonic() + _SECONDS
            while time.monotonic() < end:
                answers = await asyncio.gather(
                    *(post(client, "/v1/completions", body) for body in completions),
                    *(post(client, "/v1/score", body) for body in scores),
                )
                for mine, theirs in zip(answers[:16], alone, strict=True):
                    wrong += _num_wrong(mine["choices"][0]["logprobs"], theirs["choices"][0]["logprobs"])
                    total += 8
                for mine, theirs in zip(answers[16:], alone_scores, strict=True):
                    both = (itertools.chain(*answer["scores"]) for answer in (mine, theirs))
                    pairs = zip(*both, strict=True)
                    wrong += sum(abs(ours - its) > _TOLERANCE_NATS for ours, its in pairs)
                    total += 6
            return wrong, total

    wrong, total = asyncio.run(run())
    assert total > 100
    assert wrong == 0, f"{wrong} of {total} entries differ from those of requests alone"


@pytest.mark.engine
def test_scores_without_other_logits_are_those_with_all_logits(scoring_url: str) -> None:
    body = {
        "model": NAME,
        "query": "The colour of the sky is",
        "items": [" on a clear day", " at night", " at dawn"],
        "labels": [" blue", " black", " red"],
        "apply_softmax": True,
    }
    with httpx.Client(base_url=scoring_url, timeout=120) as client:
        compared, complete = (
            client.post("/v1/score", json=body | extra).json() for extra in ({}, {"return_logprobs": True})
        )
        # A client can set the same argument on a request that needs all logits.
        completion = {
            "model": NAME,
            "prompt": "Once upon a",
            "max_tokens": 1,
            "temperature": 0,
            "structured_outputs": {"choice": [" time", " day"]},
        }
        answers = [
            client.post("/v1/completions", json=completion | extra).json()["choices"][0]["text"]
            for extra in ({}, {"vllm_xargs": {LABELS_ALONE: 1}})
        ]
    assert compared["scores"] == [pytest.approx(row, abs=1e-6) for row in complete["scores"]]
    assert answers[0] == answers[1]


def _num_wrong(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Return the number of positions whose most likely tokens or log-probabilities differ beyond rounding."""
    wrong = 0
    for mine, its in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
        values, expected = sorted(mine.values()), sorted(its.values())
        close = len(values) == len(expected) and all(
            abs(one - other) <= _TOLERANCE_NATS for one, other in zip(values, expected, strict=True)
        )
        wrong += not close
    return wrong
