"""Replies that the student writes itself, for on-policy distillation (GKD, arXiv 2306.13649, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True)
class SamplingSettings:
    """How the student writes."""

    temperature: float = 0.8
    max_new_tokens: int = 300


Sampler = Callable[[nn.Module, Sequence[Sequence[int]], SamplingSettings, int], list[list[int]]]
"""Gets the student, prompts as tokens, settings and a seed; returns a reply's tokens, stop token included, for each."""


def make_process_sampler(stop: frozenset[int], pad: int, batch_size: int = 32) -> Sampler:
    """A sampler that generates in this process, `batch_size` prompts of similar length at a time."""

    @torch.no_grad()
    def sample(
        student: nn.Module, prompts: Sequence[Sequence[int]], settings: SamplingSettings, seed: int
    ) -> list[list[int]]:
        model: Any = student
        device = next(model.parameters()).device
        torch.manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        replies: list[list[int]] = [[] for _ in prompts]
        was_training = model.training
        model.eval()
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            longest = max(len(prompts[number]) for number in numbers)
            # Padding on the left, so that all rows begin to write at the same place.
            rows = [[pad] * (longest - len(prompts[number])) + list(prompts[number]) for number in numbers]
            mask = [[0] * (longest - len(prompts[number])) + [1] * len(prompts[number]) for number in numbers]
            written = model.generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                do_sample=True,
                temperature=settings.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=sorted(stop),
                pad_token_id=pad,
            )[:, longest:].tolist()
            for number, tokens in zip(numbers, written, strict=True):
                end = next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))
                replies[number] = tokens[:end]
        model.train(was_training)
        return replies

    return cast("Sampler", sample)
