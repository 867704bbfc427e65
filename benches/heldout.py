"""Token sequences from the workloads, and the loss of a checkpoint on them.

The workloads' splits are disjoint: compressors calibrate on `calibration` and are evaluated on `quality`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimserve.compress.calibration import document_ids
from slimserve.compress.reference import nll_per_token, reference_logits
from slimserve.workloads.interface import Split, Workload
from slimserve.workloads.reasoning import Reasoning
from slimserve.workloads.recommendation import Recommendation

SEQUENCE_LENGTH = 512
_PROMPTS_DRAWN = 400
"""Number of prompts drawn from each workload."""


def packed_tokens(
    model: Path, split: Split, num_sequences: int, *, seed: int = 0, length: int = SEQUENCE_LENGTH
) -> list[Tensor]:
    """Return `num_sequences` int64 token sequences `[length]`, alternately from recommendation and reasoning.

    Prompts with their reference answers are drawn from `split` in the order of `seed`, concatenated and cut. Raises
    RuntimeError if the split has too few tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    per_workload = [(num_sequences + 1) // 2, num_sequences // 2]
    sequences = []
    workloads: tuple[Workload, Workload] = (Recommendation(), Reasoning())
    for workload, num_wanted in zip(workloads, per_workload, strict=True):
        prompts = workload.make_prompts(split, _PROMPTS_DRAWN, seed)
        tokens: list[int] = []
        for prompt in prompts:
            if len(tokens) >= num_wanted * length:
                break
            tokens += document_ids(tokenizer, prompt)
        if len(tokens) < num_wanted * length:
            raise RuntimeError(f"{workload.name} has {len(tokens)} {split} tokens, {num_wanted * length} are needed")
        sequences.append(torch.tensor(tokens[: num_wanted * length]).reshape(num_wanted, length))
    return [rows[index] for index in range(per_workload[0]) for rows in sequences if index < len(rows)]


def write_tokens(sequences: Sequence[Tensor], file: Path) -> None:
    """Write the sequences as JSON Lines with `input_ids`, which slimserve and the peers read."""
    lines = [json.dumps({"input_ids": sequence.tolist()}) for sequence in sequences]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def negative_log_likelihood(directory: Path, sequences: Sequence[Tensor]) -> float:
    """Return the mean of -ln P(token) over all predicted tokens, in nats, with the checkpoint computed in float32."""
    losses = [
        nll_per_token(logits_TV, tokens_T)
        for logits_TV, tokens_T in zip(reference_logits(directory, sequences), sequences, strict=True)
    ]
    return float(torch.cat(losses).double().mean())
