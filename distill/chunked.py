"""The distillation loss from hidden states, computed in chunks of tokens to save memory.

The logits of a small model are its largest tensor: 2,048 tokens and a vocabulary of 49,152 take 400 MB in float32, and
a distillation loss keeps about eight such matrices for its backward pass. Here the gradient of each chunk is computed
right after its loss, and only the gradients of the hidden states and of the output layer are kept. No second forward
pass is needed, because the rest of the graph only scales the loss.

Shapes: N tokens, D hidden size, V vocabulary; D' and V' are the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimserve.distill.losses import (
    Targets,
    TopK,
    cross_entropy_per_token,
    divergence_from_top_k,
    divergence_per_token,
    mixture_logits,
)
from slimserve.distill.recipe import LossSettings

_CPU_CHUNK = 64
"""Number of tokens per chunk on a CPU: few enough for little memory, enough for efficient matrix products."""
_HEAD_GRADIENT_TOKENS = 256
"""Number of tokens in one product of the output layer's gradient, if chunks are not larger. Each product reads and
writes the whole gradient, 113 MB of a small model; one per chunk of 64 tokens would take half of the loss's time."""
_GPU_LOGITS_BYTES = 2**30
"""Size of a chunk's float32 logits on a GPU, where many small products would leave most of the device idle."""


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's last hidden states `[N, D']` and its output layer `[V', D']`; logits are made in chunks."""

    hidden_ND: Tensor
    head_VD: Tensor


@dataclass(frozen=True)
class TeacherMixture:
    """Several teachers' states; the prediction is the mixture of their distributions."""

    parts: tuple[TeacherStates, ...]
    weights: tuple[float, ...]
    """Weight of each teacher; they add up to 1."""


TeacherPrediction = TeacherStates | TeacherMixture | TopK | None
"""The teacher's next-token distributions; None trains on cross-entropy alone."""


class TokenLosses(NamedTuple):
    """Losses summed over the tokens of a batch; only `total` has a gradient."""

    total: Tensor
    divergence: Tensor
    """Divergence times T²; 0 without a teacher."""
    cross_entropy: Tensor


def chunk_size(head_VD: Tensor) -> int:
    """Return the number of tokens per chunk for an output layer on its device."""
    if head_VD.device.type == "cpu":
        return _CPU_CHUNK
    return max(_CPU_CHUNK, _GPU_LOGITS_BYTES // (4 * len(head_VD)))


def chunked_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor | Targets,
    teacher: TeacherPrediction,
    settings: LossSettings,
    chunk: int | None = None,
) -> TokenLosses:
    """Return the loss summed over N tokens, with gradients for the student's hidden states and output layer.

    `hidden_ND` holds the student's last hidden states at the positions before the N labels. Products use its dtype, the
    loss float32. The output layer's gradient is summed in float32 and returned in the layer's dtype. `chunk` is the
    number of tokens per chunk (None: by the device).
    """
    return TokenLosses(
        *_ChunkedLoss.apply(hidden_ND, head_VD, labels_N, teacher, settings, chunk or chunk_size(head_VD))
    )


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor | Targets,
    teacher: TeacherPrediction,
    settings: LossSettings,
    chunk: int | None = None,
) -> Tensor:
    """Return each token's loss, divergence and cross-entropy, `[3, N]` float32, without gradients."""
    head = head_VD.to(hidden_ND.dtype)
    chunk = chunk or chunk_size(head)
    chunks = [
        plain_losses(
            hidden_ND[part] @ head.T, labels_N[part], _teacher_chunk(teacher, part, settings.temperature), settings
        )
        for begin in range(0, len(labels_N), chunk)
        for part in [slice(begin, begin + chunk)]
    ]
    return torch.cat(chunks, dim=1) if chunks else torch.zeros(3, 0, device=hidden_ND.device)


def _teacher_chunk(teacher: TeacherPrediction, part: slice, temperature: float) -> Tensor | TopK | None:
    """Return the teacher's top tokens or its logits for a chunk of tokens."""
    if isinstance(teacher, TopK):
        return TopK(teacher.tokens_NK[part], teacher.logprobs_NK[part])
    return None if teacher is None else teacher_logits(teacher, part, temperature)


def teacher_logits(teacher: TeacherStates | TeacherMixture, part: slice, temperature: float) -> Tensor:
    """Return logits of a chunk of tokens whose distribution at a temperature is the teacher's or the mixture's."""
    if isinstance(teacher, TeacherMixture):
        logits = [teacher_logits(one, part, temperature) for one in teacher.parts]
        return mixture_logits(logits, teacher.weights, temperature)
    return teacher.hidden_ND[part] @ teacher.head_VD.to(teacher.hidden_ND.dtype).T


def plain_losses(
    logits_NV: Tensor, labels_N: Tensor | Targets, teacher: Tensor | TopK | None, settings: LossSettings
) -> Tensor:
    """Return each token's loss, divergence and cross-entropy, `[3, N]` float32, from all logits at once."""
    total = cross_entropy = cross_entropy_per_token(logits_NV, labels_N)
    divergence = torch.zeros_like(cross_entropy)
    if isinstance(teacher, TopK):
        divergence = divergence_from_top_k(logits_NV, teacher, settings)
    elif teacher is not None:
        divergence = divergence_per_token(logits_NV, teacher, settings)
    if teacher is not None:
        total = (1 - settings.kd_weight) * cross_entropy + settings.kd_weight * divergence
    if isinstance(labels_N, Targets):
        total = total * labels_N.weight_N
    return torch.stack((total, divergence, cross_entropy))


def _add_product(sum_VD: Tensor, left_NV: Tensor, right_ND: Tensor) -> None:
    """Add `left.T @ right` to a float32 sum in place."""
    if left_NV.dtype == torch.float32:
        sum_VD.addmm_(left_NV.T, right_ND)
    else:
        sum_VD += left_NV.T @ right_ND


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor | Targets,
        teacher: TeacherPrediction,
        settings: LossSettings,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        head = head_VD.detach().to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head = torch.zeros(head_VD.shape, dtype=torch.float32, device=head.device) if needs_head else None
        sums = torch.zeros(3, dtype=torch.float64, device=head.device)
        num_tokens, block = len(labels_N), chunk * max(1, _HEAD_GRADIENT_TOKENS // chunk)
        # Gradients of the logits are gathered over a block of chunks for one product.
        is_gathered = needs_head and block > chunk
        gathered_NV = hidden_ND.new_empty(min(block, num_tokens) if is_gathered else 0, len(head))
        with torch.autocast(head.device.type, enabled=False):
            for begin in range(0, num_tokens, chunk):
                part = slice(begin, min(begin + chunk, num_tokens))
                logits = hidden_ND[part].detach() @ head.T
                teacher_chunk = _teacher_chunk(teacher, part, settings.temperature)
                with torch.enable_grad():
                    logits.requires_grad_(needs_hidden or needs_head)
                    losses = plain_losses(logits, labels_N[part], teacher_chunk, settings)
                    total = losses[0].sum()
                sums += losses.detach().double().sum(-1)
                if not total.requires_grad:
                    continue
                (grad_logits,) = torch.autograd.grad(total, logits)
                if grad_hidden is not None:
                    torch.mm(grad_logits, head, out=grad_hidden[part])
                if grad_head is None:
                    continue
                first = begin - begin % block
                if is_gathered:
                    gathered_NV[begin - first : part.stop - first] = grad_logits
                    grad_logits = gathered_NV[: part.stop - first]
                if part.stop in {first + block, num_tokens}:
                    _add_product(grad_head, grad_logits, hidden_ND[first : part.stop].detach())
        ctx.gradients = (grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
        total, divergence, cross_entropy = sums.float().unbind()
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return total, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = ()
        # In place, because a copy of the output layer's gradient would be as large as the layer.
        scaled = [None if grad is None else grad.mul_(scale) for grad in (grad_hidden, grad_head)]
        return (*scaled, None, None, None, None)
