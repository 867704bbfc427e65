"""Token sequences of the workloads' own texts, and how well a checkpoint predicts them.

Calibration and held-out sequences come from the workloads' disjoint splits: `calibration`
for what a compressor may look at, `quality` for what its outcome is judged on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from slimserve.compress.calibration import document_ids
from slimserve.compress.reference import nll_per_token, reference_logits
from slimserve.workloads.interface import ChatPrompt, Prompt, Split, Workload
from slimserve.workloads.reasoning import Reasoning
from slimserve.workloads.recommendation import Recommendation

SEQUENCE_LENGTH = 512
_PROMPTS_DRAWN = 400
"""Of each workload, from which a seed chooses: the quality split has only about 600 different sums."""


def packed_tokens(
    model: Path, split: Split, num_sequences: int, *, seed: int = 0, length: int = SEQUENCE_LENGTH
) -> list[Tensor]:
    """`num_sequences` int64 sequences `[length]`, half of recommendation, half of reasoning, in turn.

    Prompts with their true answers are drawn from `split` in the order of `seed`, laid end to end and cut.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    per_workload = [(num_sequences + 1) // 2, num_sequences // 2]
    sequences = []
    workloads: tuple[Workload, Workload] = (Recommendation(), Reasoning())
    for workload, wanted in zip(workloads, per_workload, strict=True):
        prompts = workload.make_prompts(split, _PROMPTS_DRAWN, seed)
        tokens: list[int] = []
        for prompt in prompts:
            if len(tokens) >= wanted * length:
                break
            tokens += document_ids(tokenizer, _without_examples(prompt))
        if len(tokens) < wanted * length:
            raise RuntimeError(f"{workload.name} has {len(tokens)} {split} tokens, {wanted * length} are needed")
        sequences.append(torch.tensor(tokens[: wanted * length]).reshape(wanted, length))
    return [rows[index] for index in range(per_workload[0]) for rows in sequences if index < len(rows)]


def write_tokens(sequences: Sequence[Tensor], file: Path) -> None:
    """JSON Lines with `input_ids`, which both sides of a comparison read."""
    lines = [json.dumps({"input_ids": sequence.tolist()}) for sequence in sequences]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def negative_log_likelihood(directory: Path, sequences: Sequence[Tensor]) -> float:
    """Mean over all predicted tokens of -ln P(token), of a checkpoint computed in float32."""
    found = [
        nll_per_token(logits_TV, tokens_T)
        for logits_TV, tokens_T in zip(reference_logits(directory, sequences), sequences, strict=True)
    ]
    return float(torch.cat(found).double().mean())


def _without_examples(prompt: Prompt) -> Prompt:
    """A prompt without the worked examples that a reasoning prompt begins with: they are the same in every split."""
    return replace(prompt, messages=prompt.messages[-1:]) if isinstance(prompt, ChatPrompt) else prompt
