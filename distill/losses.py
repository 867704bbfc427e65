"""How far a student's next-token distribution is from the teacher's, token by token.

With p the teacher's and q the student's softmax at temperature T, over the tokens that both know (models pad their
vocabularies to different sizes; a logit that only one side has is never used):

    forward_kl          KL(p ‖ q)                       covers all that the teacher may say
    reverse_kl          KL(q ‖ p)                       keeps to what the teacher would say (MiniLLM, arXiv 2306.08543)
    skewed_forward_kl   KL(p ‖ αp + (1-α)q)             bounded gradients (DistiLLM, arXiv 2402.03898, section 3.1)
    skewed_reverse_kl   KL(q ‖ (1-α)p + αq)
    js                  βKL(p ‖ m) + (1-β)KL(q ‖ m)     m = βp + (1-β)q (GKD, arXiv 2306.13649, section 2)

times T², so that gradients keep their size at any temperature (Hinton et al., arXiv 1503.02531, section 2). Each is
zero where student and teacher agree: the teacher's entropy is taken off, which the released code of arXiv 2512.21002
leaves in. Everything is computed in float32. Shapes: N tokens, V vocabulary, K kept tokens of a cached teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Divergence = Literal["forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl", "js"]

_LEAST_LOG = -1e30
"""Of a share that is zero: finite, as gradients of infinity are not numbers."""


@dataclass(frozen=True)
class LossSettings:
    """The loss of a token: (1 - kd_weight) × cross-entropy + kd_weight × T² × divergence."""

    divergence: Divergence = "forward_kl"
    kd_weight: float = 0.5
    temperature: float = 1.0
    skew: float = 0.1
    """α of the skewed divergences."""
    beta: float = 0.5
    """β of js."""


@dataclass(frozen=True)
class TopK:
    """A teacher's likeliest next tokens, as a cache keeps them: log-probabilities at the temperature of the loss."""

    tokens_NK: Tensor
    logprobs_NK: Tensor


def divergence_per_token(student_NV: Tensor, teacher_NV: Tensor, settings: LossSettings) -> Tensor:
    """The divergence of each token `[N]`, float32, T² included, from logits; differentiable in the student's."""
    known = min(student_NV.shape[-1], teacher_NV.shape[-1])
    temperature = settings.temperature
    log_q = functional.log_softmax(student_NV[..., :known].float() / temperature, dim=-1)
    log_p = functional.log_softmax(teacher_NV[..., :known].float() / temperature, dim=-1)
    return _divergence(log_q, log_p, settings) * temperature**2


def divergence_from_top(student_NV: Tensor, teacher: TopK, settings: LossSettings) -> Tensor:
    """The divergence `[N]` from a teacher of which only the likeliest tokens are known.

    All other tokens are one outcome of both sides, with the mass that is left. Merging outcomes never raises a KL or JS
    divergence, so this is a lower bound of the whole one, exact where the teacher's rest is nothing, and still zero at
    equality; the student is free how it divides the rest.
    """
    temperature = settings.temperature
    log_q_NV = functional.log_softmax(student_NV.float() / temperature, dim=-1)
    log_q = log_q_NV.gather(-1, teacher.tokens_NK.long())
    log_p = teacher.logprobs_NK.float()
    log_q, log_p = (torch.cat((kept, _log_rest(kept)), dim=-1) for kept in (log_q, log_p))
    return _divergence(log_q, log_p, settings) * temperature**2


def top_of(teacher_NV: Tensor, num_kept: int, temperature: float) -> TopK:
    """A teacher's `num_kept` likeliest tokens at a temperature, from its logits."""
    logprobs = functional.log_softmax(teacher_NV.float() / temperature, dim=-1)
    kept = logprobs.topk(min(num_kept, logprobs.shape[-1]), dim=-1)
    return TopK(kept.indices.int(), kept.values)


def cross_entropy_per_token(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-ln q(label) of each token `[N]`, float32, at temperature 1."""
    return functional.cross_entropy(student_NV.float(), labels_N, reduction="none")


def hidden_distance(student_ND: Tensor, teacher_ND: Tensor, kind: Literal["cosine", "mse"]) -> Tensor:
    """Distance of each token's hidden states `[N]`: 1 - cosine, or the squared error over the teacher's mean square."""
    student, teacher = student_ND.float(), teacher_ND.float()
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp_min(1e-12)


def _divergence(log_q: Tensor, log_p: Tensor, settings: LossSettings) -> Tensor:
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
    """log(share × a + (1 - share) × b)."""
    if share in (0.0, 1.0):
        return log_a if share else log_b
    weights = torch.tensor((share, 1 - share)).log().tolist()
    return torch.logaddexp(log_a + weights[0], log_b + weights[1])


def _log_rest(logprobs: Tensor) -> Tensor:
    """Log of the mass that the given outcomes leave, `[N, 1]`."""
    # Of a sum near 1 the rest is rounding; below that it is held, with no gradient.
    kept = logprobs.logsumexp(-1, keepdim=True).clamp_max(-1e-7)
    return torch.log(-torch.expm1(kept)).clamp_min(_LEAST_LOG)
