"""Calibration text that the model writes itself, for users who name no workload (arXiv 2410.17170).

The model answers a few general requests in its own chat format. The text therefore starts as served prompts start, and
covers what the model does, not one task. A model without a chat template continues its first token.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimserve.core.chat_template import render_chat
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.model_files import count_parameters, model_hash
from slimserve.core.progress import progress
from slimserve.core.storage import cache_dir, cached_result

REQUESTS = (
    "Explain how something in nature works.",
    "Make up a maths problem and solve it step by step.",
    "Write a short story.",
    "Write a short Python function and explain it.",
    "Tell me about an event in history.",
    "Recommend some books and films, and say why.",
    "Write an email to a colleague.",
    "What are the advantages and disadvantages of living in a city?",
    "Translate a few everyday sentences into another language.",
    "Compare two animals in a table.",
    "Answer a question that many people ask about health.",
    "Describe how to cook a dinner.",
    "Write a dialogue between two people who disagree.",
    "Ask yourself a difficult question, think step by step, and answer it.",
    "Write a JSON object that describes a product.",
    "Summarize a news article.",
)
"""General requests, which the model answers in turn."""
_BATCH = 64
"""Number of replies that are sampled at once."""
_REPLY_TOKENS = 256
"""Maximum number of tokens of a reply. Short replies give more sequences, and so more first tokens."""
_MEMORY_SHARE = 0.8
"""Share of the machine's memory that the weights may take; sampling holds the complete model."""


def self_generated_documents(
    directory: Path, tokenizer: Any, seed: int, device: torch.device | str, requests: Sequence[str] = REQUESTS
) -> Iterator[list[int]]:
    """Yield the token ids of one conversation after another, indefinitely, sampled from the model at temperature 1.

    The conversations answer the requests in turn. Batches are cached by the hash of the model, the requests and the
    seed. Raises UserError if the model does not fit into memory.
    """
    prompts = [request_ids(tokenizer, request) for request in requests]
    settings = (model_hash(directory), prompts, _BATCH, _REPLY_TOKENS, seed)
    model: Any = None

    def sampled(number: int) -> dict[str, Any]:
        nonlocal model
        model = model or _load(directory, device)
        batch = [prompts[(number * _BATCH + index) % len(prompts)] for index in range(_BATCH)]
        return {"conversations": _sample(model, batch, f"{seed} {number}")}

    for number in itertools.count():
        found = cached_result(cache_dir("calibration"), "text", (*settings, number), partial(sampled, number))
        yield from found["conversations"]


def request_ids(tokenizer: Any, request: str) -> list[int]:
    """Return the token ids of a request in the model's chat format; its first token if it has no chat template."""
    if tokenizer.chat_template is None:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first or 0]
    question = [{"role": "user", "content": request}]
    text = render_chat(tokenizer, question, "a request for calibration", add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _load(directory: Path, device: torch.device | str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    hardware = probe_hardware()
    size_gib = count_parameters(directory) * (2 if hardware.has_bf16_products else 4) / 2**30
    if size_gib > _MEMORY_SHARE * hardware.memory_gib:
        raise UserError(
            "calibration source",
            directory,
            f"has {size_gib:.0f} GiB of weights, too much to sample from in {hardware.memory_gib:.0f} GiB of memory",
            "name a workload or a file of text to calibrate on",
        )
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto" if hardware.has_bf16_products else torch.float32
    )
    return model.to(device).eval()


@torch.no_grad()
def _sample(model: Any, prompts: list[list[int]], seed: str) -> list[list[int]]:
    """Return the prompts, each followed by a reply with its stop token if that came in time."""
    from transformers import GenerationConfig, StoppingCriteriaList

    stop = model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    longest = max(map(len, prompts))
    # Padding is on the left, so that all replies begin at the same position.
    rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=_REPLY_TOKENS,
        eos_token_id=sorted(stops) or None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(), progress("sampling calibration text", _REPLY_TOKENS, "tokens") as tick:

        def count(tokens_BT: Tensor, *_: Any, **__: Any) -> Tensor:
            tick(tokens_BT.shape[1] - longest)
            return torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)  # stops nothing

        torch.manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
        generated = model.generate(
            rows, attention_mask=mask, generation_config=settings, stopping_criteria=StoppingCriteriaList([count])
        )
    conversations = []
    for prompt, reply in zip(prompts, generated[:, longest:].tolist(), strict=True):
        end = next((at + 1 for at, token in enumerate(reply) if token in stops), len(reply))
        conversations.append(prompt + reply[:end])
    return conversations
