"""Replies that the student samples itself, for on-policy distillation (GKD, arXiv 2306.13649, algorithm 1)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from slimserve.core.errors import UserError
from slimserve.distill.cost import Cost, ModelShape
from slimserve.distill.parallel import ParallelStudent
from slimserve.distill.recipe import DistillRecipe, Stage
from slimserve.distill.sections import Example, sampled_example
from slimserve.distill.supervision import SupervisedSequence

Sampler = Callable[[nn.Module, Sequence[Sequence[int]], Stage, int], list[list[int]]]
"""Takes the student, prompts as tokens, the stage and a seed; returns each reply's tokens with its stop token."""


def make_process_sampler(stop: frozenset[int], pad: int, batch_size: int = 32) -> Sampler:
    """Return a sampler that generates in this process, `batch_size` prompts of similar length at a time."""

    def sample(student: nn.Module, prompts: Sequence[Sequence[int]], stage: Stage, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        was_training = student.training
        student.eval()
        temperature, max_tokens = stage.temperature, stage.max_new_tokens
        replies: list[list[int]] = generate(
            student, prompts, stop, pad, max_tokens, temperature=temperature, batch_size=batch_size
        )
        student.train(was_training)
        return replies

    return sample


@torch.no_grad()
def generate(
    student: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop: frozenset[int],
    pad: int,
    max_new_tokens: int,
    *,
    temperature: float,
    batch_size: int,
) -> list[list[int]]:
    """Return the tokens of each reply with its stop token; a temperature of 0 takes the most likely tokens."""
    model: Any = student
    device = next(student.parameters()).device
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        longest = max(len(prompts[index]) for index in indices)
        # Padding is on the left, so that all replies begin at the same position.
        rows = [[pad] * (longest - len(prompts[index])) + list(prompts[index]) for index in indices]
        mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in indices]
        generated = model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop),
            pad_token_id=pad,
            **sampling,
        )[:, longest:].tolist()
        for index, tokens in zip(indices, generated, strict=True):
            end = next((at + 1 for at, token in enumerate(tokens) if token in stop), len(tokens))
            replies[index] = tokens[:end]
    return replies


class ReplyWriter:
    """Lets the student reply to some prompts of an on-policy round, over all processes."""

    def __init__(
        self,
        student: ParallelStudent,
        recipe: DistillRecipe,
        examples: Sequence[Example],
        sequences: Sequence[SupervisedSequence],
        sampler: Sampler | None,
        tokenizer: Any,
        shape: ModelShape,
    ) -> None:
        self._student = student
        # Replies are never cut, whatever the lead span of the given text is.
        self._supervision = recipe.supervision.model_copy(update={"lead_span": 1.0})
        self._examples = {example.name: example for example in examples}
        self._sequences = sequences
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._shape = shape

    def write(
        self, steps: Sequence[Sequence[int]], stage: Stage, seed: int
    ) -> tuple[dict[int, SupervisedSequence], Cost]:
        """Return the sampled replies of a round by sequence index, and what they cost over all processes.

        Replies without a target are left out but counted. There is none in an off-policy stage. Raises UserError if no
        sequence has a prompt.
        """
        if stage.kind == "off_policy":
            return {}, Cost()
        assert self._sampler is not None
        begun = time.monotonic()
        chosen = self._choose(steps, stage, seed)
        examples = [self._examples[self._sequences[index].name] for index in chosen]
        prompts = [example.tokens[: example.num_prompt] for example in examples]
        mine = range(self._student.rank, len(prompts), self._student.num_processes)
        with self._student.plain_student() as student:
            own = self._sampler(student, [prompts[at] for at in mine], stage, seed + self._student.rank)
        replies, lengths = {}, []
        for at, tokens in self._student.gather(list(zip(mine, own, strict=True))):
            lengths.append((len(prompts[at]), len(tokens)))
            example = sampled_example(self._tokenizer, examples[at].name, prompts[at], tokens)
            sequence = self._supervision.apply(replace(example, teacher_prompt=examples[at].teacher_prompt))
            # The prompt is given text, which the other sequences train.
            targets = tuple(target for target in sequence.targets if target >= example.num_prompt)
            if targets:
                replies[chosen[at]] = replace(sequence, targets=targets)
        num_tokens = sum(map(sum, lengths))
        return replies, Cost(time.monotonic() - begun, num_tokens, self._shape.sampling_flops(lengths))

    def _choose(self, steps: Sequence[Sequence[int]], stage: Stage, seed: int) -> list[int]:
        """Draw each step's share of sequences; they are sorted by length, so the first ones would be the shortest."""
        chosen = []
        for number, indices in enumerate(steps):
            prompted = [index for index in indices if self._examples[self._sequences[index].name].num_prompt]
            num_replies = min(len(prompted), max(1, round(stage.fraction * len(indices))))
            chosen += random.Random(f"{seed} {number}").sample(prompted, num_replies)
        if not chosen:
            raise UserError(
                "stages", "on_policy", "has no prompt that the student could reply to", "use data of conversations"
            )
        return chosen
