"""The loss from hidden states, some tokens at a time: no `[tokens, vocabulary]` matrix of a whole sequence exists.

The output layer of a small model is the largest thing in it: 2,048 tokens of a vocabulary of 49,152 are 400 MB in
float32, and a distillation loss keeps about eight such matrices for its backward pass. Here the gradient of a chunk is
computed as soon as its loss is, and only the gradients of the hidden states and of the output layer stay. That costs no
second forward pass, as the loss is the last thing: what comes after it only scales it.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimserve.distill.losses import (
    LossSettings,
    TopK,
    cross_entropy_per_token,
    divergence_from_top,
    divergence_per_token,
)

CHUNK = 64
"""Tokens at a time: few enough that a chunk's matrices are small, enough that its products are not."""


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's last hidden states `[N, D']` and its output layer `[V', D']`: its logits are made chunk by chunk."""

    hidden_ND: Tensor
    head_VD: Tensor


Teacher = TeacherStates | TopK | None
"""None: cross-entropy alone."""


class TokenLosses(NamedTuple):
    """Sums over the tokens of a batch; only `total` has a gradient."""

    total: Tensor
    divergence: Tensor
    """T² included; 0 without a teacher."""
    cross_entropy: Tensor


def chunked_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    teacher: Teacher,
    settings: LossSettings,
    chunk: int = CHUNK,
) -> TokenLosses:
    """Sums of the loss over N tokens, with gradients for the student's hidden states and output layer.

    `hidden_ND` are the student's last hidden states at the places before the N labels. Products run in their dtype, the
    loss in float32; the output layer's gradient is summed in float32 and given in its own dtype.
    """
    return TokenLosses(*_ChunkedLoss.apply(hidden_ND, head_VD, labels_N, teacher, settings, chunk))


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, teacher: Teacher, settings: LossSettings, chunk: int = CHUNK
) -> Tensor:
    """`[3, N]`: each token's loss, divergence and cross-entropy, float32, without gradients."""
    head = head_VD.to(hidden_ND.dtype)
    found = [
        plain_losses(hidden_ND[part] @ head.T, labels_N[part], _teacher_of(teacher, part), settings)
        for begin in range(0, len(labels_N), chunk)
        for part in [slice(begin, begin + chunk)]
    ]
    return torch.cat(found, dim=1) if found else torch.zeros(3, 0, device=hidden_ND.device)


def _teacher_of(teacher: Teacher, part: slice) -> Tensor | TopK | None:
    """What `plain_losses` wants of a teacher for some tokens."""
    if isinstance(teacher, TopK):
        return TopK(teacher.tokens_NK[part], teacher.logprobs_NK[part])
    if teacher is None:
        return None
    return teacher.hidden_ND[part] @ teacher.head_VD.to(teacher.hidden_ND.dtype).T


def plain_losses(logits_NV: Tensor, labels_N: Tensor, teacher: Tensor | TopK | None, settings: LossSettings) -> Tensor:
    """`[3, N]`: each token's loss, divergence and cross-entropy, from whole logits; the teacher's are a tensor."""
    cross_entropy = cross_entropy_per_token(logits_NV, labels_N)
    if teacher is None:
        return torch.stack((cross_entropy, torch.zeros_like(cross_entropy), cross_entropy))
    compare = divergence_from_top if isinstance(teacher, TopK) else divergence_per_token
    divergence = compare(logits_NV, teacher, settings)
    total = (1 - settings.kd_weight) * cross_entropy + settings.kd_weight * divergence
    return torch.stack((total, divergence, cross_entropy))


class _ChunkedLoss(torch.autograd.Function):
    """Computes gradients in its forward pass, which its backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        teacher: Teacher,
        settings: LossSettings,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        head = head_VD.detach().to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head = torch.zeros(head_VD.shape, dtype=torch.float32, device=head.device) if needs_head else None
        sums = torch.zeros(3, dtype=torch.float64, device=head.device)
        with torch.autocast(head.device.type, enabled=False):
            for begin in range(0, len(labels_N), chunk):
                part = slice(begin, begin + chunk)
                hidden = hidden_ND[part].detach()
                logits, theirs = hidden @ head.T, _teacher_of(teacher, part)
                with torch.enable_grad():
                    logits.requires_grad_(needs_hidden or needs_head)
                    losses = plain_losses(logits, labels_N[part], theirs, settings)
                    total = losses[0].sum()
                sums += losses.detach().double().sum(-1)
                if not total.requires_grad:
                    continue
                (grad_logits,) = torch.autograd.grad(total, logits)
                if grad_hidden is not None:
                    torch.mm(grad_logits, head, out=grad_hidden[part])
                if grad_head is not None:
                    if grad_logits.dtype == torch.float32:
                        grad_head.addmm_(grad_logits.T, hidden)
                    else:
                        grad_head += grad_logits.T @ hidden
        ctx.gradients = (grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
        total, divergence, cross_entropy = sums.float().unbind()
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return total, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = ()
        # In place: nothing else holds them, and a copy of the output layer's gradient is as large as the layer.
        scaled = [None if grad is None else grad.mul_(scale) for grad in (grad_hidden, grad_head)]
        return (*scaled, None, None, None, None)
