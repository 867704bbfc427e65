"""A teacher's likeliest tokens at every target, computed once and read from disk afterwards.

Worth it where the same sequences are read many times: the teacher's forward pass then costs once. A cache holds
`num_kept` tokens of a vocabulary, so it comes with an error, which is measured when it is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimserve.core.errors import UserError
from slimserve.core.progress import progress
from slimserve.core.storage import write_remedy
from slimserve.distill.batches import Batch, make_batches
from slimserve.distill.chunked import CHUNK, TeacherStates
from slimserve.distill.losses import LossSettings, TopK, divergence_from_top, divergence_per_token, top_of
from slimserve.distill.student import Guidance, OnlineTeacher
from slimserve.distill.supervision import Supervised

_JUDGED_TARGETS = 512


@dataclass(frozen=True)
class CacheError:
    """What a cache leaves out."""

    missing_mass: float
    """Mean probability of the tokens that are not kept."""
    divergence_frac: float
    """Of the divergence to another distribution, the share that kept tokens and one bucket for the rest do not see."""
    num_bytes: int


class CachedTeacher:
    """A teacher as its cache remembers it."""

    def __init__(self, file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            self._tokens = tensors.get_tensor("tokens")
            self._logprobs = tensors.get_tensor("logprobs")
            self._begins = tensors.get_tensor("begins").tolist()
            self.error = CacheError(**json.loads(tensors.metadata()["error"]))

    def guide(self, batch: Batch) -> Guidance:
        rows = torch.cat([torch.arange(self._begins[number], self._begins[number + 1]) for number in batch.numbers])
        device = batch.tokens_BT.device
        return Guidance(TopK(self._tokens[rows].to(device), self._logprobs[rows].to(device)))


@torch.no_grad()
def make_cache(
    teacher: OnlineTeacher,
    sequences: Sequence[Supervised],
    settings: LossSettings,
    num_kept: int,
    folder: Path,
    teacher_sha256: str,
    most_tokens: int,
) -> CachedTeacher:
    """The cache of these sequences, made in `folder` unless it lies there already.

    Its name depends on the teacher, the sequences, the temperature and `num_kept`. Log-probabilities are float32 at the
    temperature of the loss, since the mass of the rest at another one could not be told. The error is judged on some
    targets against the uniform distribution mixed with the teacher's own, half and half.
    """
    told = (teacher_sha256, settings.temperature, num_kept, [(one.tokens, one.targets) for one in sequences])
    key = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    file = folder / f"teacher-top{num_kept}-{key}.safetensors"
    if file.is_file():
        return CachedTeacher(file)
    begins = [0]
    for sequence in sequences:
        begins.append(begins[-1] + len(sequence.targets))
    tokens = torch.empty(begins[-1], num_kept, dtype=torch.int32)
    logprobs = torch.empty(begins[-1], num_kept)
    missing, whole, seen, judged = 0.0, 0.0, 0.0, 0
    device = next(teacher.model.parameters()).device
    with progress(f"teacher's {num_kept} likeliest tokens", begins[-1], "targets") as tick:
        done = 0
        for batch in make_batches(sequences, range(len(sequences)), most_tokens):
            states = teacher.guide(batch.to(device)).teacher
            assert isinstance(states, TeacherStates)
            rows = torch.cat([torch.arange(begins[number], begins[number + 1]) for number in batch.numbers])
            for begin in range(0, len(rows), CHUNK):
                part = slice(begin, begin + CHUNK)
                logits = (states.hidden_ND[part] @ states.head_VD.T).float()
                kept = top_of(logits, num_kept, settings.temperature)
                tokens[rows[part]], logprobs[rows[part]] = kept.tokens_NK.cpu(), kept.logprobs_NK.cpu()
                missing += float((1 - kept.logprobs_NK.exp().sum(-1)).clamp_min(0).sum())
                if judged < _JUDGED_TARGETS:
                    other = _half_uniform(logits)
                    whole += float(divergence_per_token(other, logits, settings).sum())
                    seen += float(divergence_from_top(other, kept, settings).sum())
                    judged += len(logits)
            done += len(rows)
            tick(done)
    error = CacheError(missing / begins[-1], 1 - seen / whole if whole else 0.0, tokens.nbytes + logprobs.nbytes)
    partial = file.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {"tokens": tokens, "logprobs": logprobs, "begins": torch.tensor(begins)},
            partial,
            metadata={"error": json.dumps(vars(error))},
        )
        partial.rename(file)
    except (OSError, SafetensorError) as problem:
        partial.unlink(missing_ok=True)
        raise UserError(
            "teacher cache", file, f"could not be written ({problem})", f"{write_remedy(problem)} or lower loss.top_k"
        ) from problem
    return CachedTeacher(file)


def _half_uniform(logits_NV: Tensor) -> Tensor:
    """Logits of the distribution halfway to the uniform one."""
    shares = torch.softmax(logits_NV, dim=-1)
    return ((shares + 1 / logits_NV.shape[-1]) / 2).log()
