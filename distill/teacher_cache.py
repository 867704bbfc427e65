"""A teacher's likeliest tokens at every target, computed once and then read from disk.

A cache pays off if the same sequences are read in several epochs, because the teacher runs only once. It holds K tokens
of the vocabulary; the error that this causes is measured when the cache is made. The source is a teacher in this
process, or a served one (served_teacher.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimserve.core.errors import UserError
from slimserve.core.progress import progress
from slimserve.core.storage import write_remedy
from slimserve.distill.batches import Batch, make_batches
from slimserve.distill.chunked import TeacherMixture, TeacherStates, chunk_size, teacher_logits
from slimserve.distill.cost import Cost
from slimserve.distill.losses import TopK, divergence_from_top_k, divergence_per_token, top_k_of
from slimserve.distill.recipe import LossSettings
from slimserve.distill.student import OnlineTeacher, TeacherOutput
from slimserve.distill.supervision import SupervisedSequence

_NUM_MEASURED_TARGETS = 512
"""Minimum number of targets on which the error of a cache is measured."""


@dataclass(frozen=True)
class CacheError:
    """The error of a cache."""

    missing_mass: float
    """Mean probability of the tokens that are not cached."""
    divergence_frac: float | None
    """Fraction of the divergence that is lost by merging all tokens that are not cached; None for a served teacher."""
    num_bytes: int


class CachedTeacher:
    """A teacher that is read from its cache."""

    def __init__(self, file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            self._tokens = tensors.get_tensor("tokens")
            self._logprobs = tensors.get_tensor("logprobs")
            self._begins = tensors.get_tensor("begins").tolist()
            self.error = CacheError(**json.loads(tensors.metadata()["error"]))
            self.cost = Cost(**json.loads(tensors.metadata()["cost"]))

    def predict(self, batch: Batch) -> TeacherOutput:
        rows = _rows_of(batch, self._begins)
        device = batch.tokens_BT.device
        return TeacherOutput(TopK(self._tokens[rows].to(device), self._logprobs[rows].to(device)))

    def flops(self, batch: Batch) -> float:
        del batch  # the pass that made the cache is counted once
        return 0.0


@torch.no_grad()
def make_cache(
    teacher: OnlineTeacher,
    sequences: Sequence[SupervisedSequence],
    loss: LossSettings,
    folder: Path,
    teacher_sha256: str,
    max_tokens: int,
) -> CachedTeacher:
    """Return the teacher's cache for these sequences, made in `folder` unless it is there already.

    The cache holds the `loss.top_k` likeliest tokens. Its name depends on the teacher, the sequences, the temperature
    and K. Log-probabilities are float32 at the temperature of the loss, because the mass of the other tokens is unknown
    at any other. The error is measured on some targets, for the divergence from the teacher to an equal mixture of its
    distribution and the uniform one.
    """
    file = folder / f"{cache_name(teacher_sha256, sequences, loss)}.safetensors"
    if file.is_file():
        return CachedTeacher(file)
    begun = time.monotonic()
    flops = 0.0
    begins = row_begins(sequences)
    tokens = torch.empty(begins[-1], loss.top_k, dtype=torch.int32)
    logprobs = torch.empty(begins[-1], loss.top_k)
    missing, full, merged, num_measured = 0.0, 0.0, 0.0, 0
    with progress(f"teacher's {loss.top_k} likeliest tokens", begins[-1], "targets") as tick:
        done = 0
        for batch in make_batches(sequences, range(len(sequences)), max_tokens):
            states = teacher.predict(batch.to(teacher.device)).prediction
            flops += teacher.flops(batch)
            assert isinstance(states, TeacherStates | TeacherMixture)
            rows = _rows_of(batch, begins)
            chunk = chunk_size(states.head_VD if isinstance(states, TeacherStates) else states.parts[0].head_VD)
            for begin in range(0, len(rows), chunk):
                part = slice(begin, begin + chunk)
                logits = teacher_logits(states, part, loss.temperature).float()
                top = top_k_of(logits, loss.top_k, loss.temperature)
                tokens[rows[part]], logprobs[rows[part]] = top.tokens_NK.cpu(), top.logprobs_NK.cpu()
                missing += float((1 - top.logprobs_NK.exp().sum(-1)).clamp_min(0).sum())
                if num_measured < _NUM_MEASURED_TARGETS:
                    other = _mixed_with_uniform(logits)
                    full += float(divergence_per_token(other, logits, loss).sum())
                    merged += float(divergence_from_top_k(other, top, loss).sum())
                    num_measured += len(logits)
            done += len(rows)
            tick(done)
    error = CacheError(missing / begins[-1], 1 - merged / full if full else 0.0, tokens.nbytes + logprobs.nbytes)
    cost = Cost(time.monotonic() - begun, sum(len(one.for_teacher.tokens) for one in sequences), flops)
    save_cache(file, TopK(tokens, logprobs), begins, error, cost)
    return CachedTeacher(file)


def cache_name(teacher: str, sequences: Sequence[SupervisedSequence], loss: LossSettings) -> str:
    """Return the name of a cache without suffix; `teacher` identifies the teacher."""
    identity = (
        teacher,
        loss.temperature,
        loss.top_k,
        [(one.tokens, one.targets, one.teacher_tokens) for one in sequences],
    )
    return f"teacher-top{loss.top_k}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def row_begins(sequences: Sequence[SupervisedSequence]) -> list[int]:
    """Return the first row of each sequence's targets in a cache, and the number of all rows."""
    return [0, *accumulate(len(sequence.targets) for sequence in sequences)]


def save_cache(file: Path, top: TopK, begins: Sequence[int], error: CacheError, cost: Cost) -> None:
    """Write a cache; UserError if it cannot be written."""
    tensors = {"tokens": top.tokens_NK, "logprobs": top.logprobs_NK, "begins": torch.tensor(begins)}
    write_tensors(file, tensors, {"error": json.dumps(vars(error)), "cost": json.dumps(vars(cost))})


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file that appears completely or not at all; UserError if it cannot be written."""
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        partial.rename(file)
    except (OSError, SafetensorError) as problem:
        partial.unlink(missing_ok=True)
        raise UserError(
            "teacher cache", file, f"could not be written ({problem})", f"{write_remedy(problem)} or lower loss.top_k"
        ) from problem


def _rows_of(batch: Batch, begins: Sequence[int]) -> Tensor:
    """Return the rows of a batch's targets in the cache; sequence i has the rows `begins[i]` to `begins[i + 1]`."""
    return torch.cat([torch.arange(begins[index], begins[index + 1]) for index in batch.indices])


def _mixed_with_uniform(logits_NV: Tensor) -> Tensor:
    """Return the logits of an equal mixture of the distribution and the uniform one."""
    shares = torch.softmax(logits_NV, dim=-1)
    return ((shares + 1 / logits_NV.shape[-1]) / 2).log()
