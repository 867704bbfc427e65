"""Divergences between the next-token distributions of student and teacher, as pure functions of logits.

p is the teacher's and q the student's softmax at temperature T:

    forward_kl          KL(p ‖ q)                       mode-covering
    reverse_kl          KL(q ‖ p)                       mode-seeking (MiniLLM, arXiv 2306.08543)
    skewed_forward_kl   KL(p ‖ αp + (1-α)q)             bounded gradients (DistiLLM, arXiv 2402.03898, section 3.1)
    skewed_reverse_kl   KL(q ‖ (1-α)p + αq)
    js                  βKL(p ‖ m) + (1-β)KL(q ‖ m)     m = βp + (1-β)q (GKD, arXiv 2306.13649, section 2)

Each is multiplied by T², so that gradients keep their size at any temperature (Hinton et al., arXiv 1503.02531,
section 2). Each is zero where both distributions agree; the released code of arXiv 2512.21002 keeps the teacher's
entropy and is not. Models pad their vocabularies to different sizes, so logits that only one side has are ignored.

Everything is computed in float32. Shapes: N tokens, V vocabulary, K cached tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.distill.recipe import HiddenDistance, LossSettings

MIN_LOG = -1e30
"""Stands for the logarithm of zero; an infinite value would have NaN gradients."""


@dataclass(frozen=True)
class TopK:
    """A teacher's K likeliest next tokens with their log-probabilities at the temperature of the loss."""

    tokens_NK: Tensor
    logprobs_NK: Tensor


@dataclass(frozen=True)
class Targets:
    """Next tokens of N positions: the first one with the probability `share_N`, otherwise the second one."""

    first_N: Tensor
    second_N: Tensor
    share_N: Tensor
    weight_N: Tensor
    """Weight of each position in the loss."""

    def __len__(self) -> int:
        return len(self.first_N)

    def __getitem__(self, part: slice) -> Targets:
        return Targets(self.first_N[part], self.second_N[part], self.share_N[part], self.weight_N[part])


def divergence_per_token(student_NV: Tensor, teacher_NV: Tensor, settings: LossSettings) -> Tensor:
    """Return the divergence times T² of each token, `[N]` float32, from logits; differentiable in the student's."""
    num_shared = min(student_NV.shape[-1], teacher_NV.shape[-1])
    temperature = settings.temperature
    log_q = functional.log_softmax(student_NV[..., :num_shared].float() / temperature, dim=-1)
    log_p = functional.log_softmax(teacher_NV[..., :num_shared].float() / temperature, dim=-1)
    return divergence_of(log_q, log_p, settings) * temperature**2


def divergence_from_top_k(student_NV: Tensor, teacher: TopK, settings: LossSettings) -> Tensor:
    """Return the divergence `[N]` from a teacher of which only the K likeliest tokens are known.

    On both sides, all other tokens are merged into one outcome. Merging never raises a KL or JS divergence, so the
    result is a lower bound of the full divergence. It is exact if the other tokens have no mass, and zero at equality.
    """
    temperature = settings.temperature
    log_q_NV = functional.log_softmax(student_NV.float() / temperature, dim=-1)
    log_q = log_q_NV.gather(-1, teacher.tokens_NK.long())
    log_p = teacher.logprobs_NK.float()
    log_q, log_p = (torch.cat((known, _log_remaining_mass(known)), dim=-1) for known in (log_q, log_p))
    return divergence_of(log_q, log_p, settings) * temperature**2


def mixture_logits(teachers_NV: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Return logits whose distribution at a temperature is the weighted mixture of the teachers' distributions.

    Tokens that not all teachers have are left out.
    """
    num_shared = min(logits.shape[-1] for logits in teachers_NV)
    logs = [
        functional.log_softmax(logits[..., :num_shared].float() / temperature, dim=-1) + math.log(weight)
        for logits, weight in zip(teachers_NV, weights, strict=True)
    ]
    return temperature * torch.stack(logs).logsumexp(0)


def top_k_of(teacher_NV: Tensor, k: int, temperature: float) -> TopK:
    """Return the `k` likeliest tokens at a temperature, from the teacher's logits."""
    top = functional.log_softmax(teacher_NV.float() / temperature, dim=-1).topk(min(k, teacher_NV.shape[-1]), dim=-1)
    return TopK(top.indices.int(), top.values)


def cross_entropy_per_token(student_NV: Tensor, labels_N: Tensor | Targets) -> Tensor:
    """Return -ln q(label) of each token, `[N]` float32, at temperature 1; of two labels the mean by their shares."""
    if isinstance(labels_N, Tensor):
        return functional.cross_entropy(student_NV.float(), labels_N, reduction="none")
    log_q = functional.log_softmax(student_NV.float(), dim=-1)
    first, second = (log_q.gather(-1, one[:, None])[:, 0] for one in (labels_N.first_N, labels_N.second_N))
    return -(labels_N.share_N * first + (1 - labels_N.share_N) * second)


def hidden_distance(student_ND: Tensor, teacher_ND: Tensor, kind: HiddenDistance) -> Tensor:
    """Return the distance of each token's hidden states, `[N]` float32.

    `cosine` is 1 - cosine similarity; `mse` is the squared error divided by the teacher's mean square.
    """
    student, teacher = student_ND.float(), teacher_ND.float()
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp_min(1e-12)


def divergence_of(log_q: Tensor, log_p: Tensor, settings: LossSettings) -> Tensor:
    name = settings.divergence
    if name == "forward_kl":
        return _kl(log_p, log_q)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    if name == "skewed_forward_kl":
        return _kl(log_p, _mix(log_p, log_q, settings.skew))
    if name == "skewed_reverse_kl":
        return _kl(log_q, _mix(log_q, log_p, settings.skew))
    middle = _mix(log_p, log_q, settings.beta)
    return settings.beta * _kl(log_p, middle) + (1 - settings.beta) * _kl(log_q, middle)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log(share × a + (1 - share) × b)."""
    if share in (0.0, 1.0):
        return log_a if share else log_b
    weights = torch.tensor((share, 1 - share)).log().tolist()
    return torch.logaddexp(log_a + weights[0], log_b + weights[1])


def _log_remaining_mass(logprobs: Tensor) -> Tensor:
    """Return log(1 - sum of the probabilities), `[N, 1]`."""
    # Near 1, the remaining mass is rounding error: clamping bounds it and stops its gradient.
    log_sum = logprobs.logsumexp(-1, keepdim=True).clamp_max(-1e-7)
    return torch.log(-torch.expm1(log_sum)).clamp_min(MIN_LOG)
