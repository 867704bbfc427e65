"""Tests of the chunked loss against the plain one: values, and gradients of hidden states and output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import slimserve.distill.chunked
from slimserve.distill.chunked import TeacherMixture, TeacherStates, chunk_size, chunked_loss, plain_losses
from slimserve.distill.losses import Targets, TopK, mixture_logits, top_k_of
from slimserve.distill.recipe import LossSettings

N, D, WIDER, V, PADDED = 23, 12, 20, 57, 64


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[Tensor, Tensor, Tensor, TeacherStates]:
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    teacher = TeacherStates(draw(N, WIDER, seed=3), draw(PADDED, WIDER, seed=4))
    return draw(N, D, seed=1).requires_grad_(), draw(V, D, seed=2).requires_grad_(), labels, teacher


@pytest.mark.parametrize("kind", ["none", "states", "top", "mixture", "targets"])
@pytest.mark.parametrize("name", ["forward_kl", "js"])
@pytest.mark.parametrize(("chunk", "block"), [(1, 256), (7, 256), (23, 256), (100, 256), (3, 7), (5, 10), (7, 5)])
def test_the_chunked_loss_equals_the_plain_loss(
    chunk: int, block: int, name: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slimserve.distill.chunked, "_HEAD_GRADIENT_TOKENS", block)
    hidden, head, tokens, states = inputs()
    labels: Any = tokens
    if kind == "targets":
        labels = Targets(tokens, tokens.roll(1), draw(N, seed=5).sigmoid(), draw(N, seed=6).abs())
    settings = LossSettings(divergence=name, kd_weight=0.0 if kind == "none" else 0.7, temperature=1.5)
    theirs = states.hidden_ND @ states.head_VD.T
    top = top_k_of(theirs[:, :V], 5, 1.5)
    other = TeacherStates(draw(N, D, seed=7), draw(V, D, seed=8))
    mixture = TeacherMixture((states, other), (0.3, 0.7))
    mixed = mixture_logits([theirs, other.hidden_ND @ other.head_VD.T], (0.3, 0.7), 1.5)
    teachers: dict[str, tuple[Any, Any]] = {"none": (None, None), "top": (top, top), "mixture": (mixture, mixed)}
    teacher, plain_teacher = teachers.get(kind, (states, theirs))

    chunked = chunked_loss(hidden, head, labels, teacher, settings, chunk)
    gradients = torch.autograd.grad(3 * chunked.total, (hidden, head))

    losses = plain_losses(hidden @ head.T, labels, plain_teacher, settings)
    expected = torch.autograd.grad(3 * losses[0].sum(), (hidden, head))
    for ours, plain in zip(chunked, losses, strict=True):
        torch.testing.assert_close(ours, plain.sum(), rtol=1e-5, atol=1e-5)
    for ours, plain in zip(gradients, expected, strict=True):
        assert float((ours - plain).norm() / plain.norm()) < 1e-5


def test_logits_are_computed_for_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels, states = inputs()
    chunk_sizes: list[int] = []

    def watch(logits: Tensor, *rest: Any) -> Tensor:
        chunk_sizes.append(len(logits))
        return plain_losses(logits, *rest)

    monkeypatch.setattr(slimserve.distill.chunked, "plain_losses", watch)
    chunked_loss(hidden, head, labels, states, LossSettings(), 5).total.backward()
    assert chunk_sizes == [5, 5, 5, 5, 3]
    assert hidden.grad is not None
    assert head.grad is not None


def test_a_chunk_on_a_gpu_has_a_gibibyte_of_logits_and_on_a_cpu_few_tokens() -> None:
    # The meta device stands for a GPU: neither has the CPU's memory.
    assert chunk_size(torch.empty(2**16, 8, device="meta")) * 2**16 * 4 == 2**30
    assert chunk_size(torch.empty(2**28, 1, device="meta")) == chunk_size(torch.empty(2**16, 8)) == 64


def test_a_frozen_output_layer_gets_no_gradient_and_a_frozen_student_none_at_all() -> None:
    hidden, head, labels, states = inputs()
    chunked_loss(hidden, head.detach(), labels, states, LossSettings(), 5).total.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not chunked_loss(hidden, head, labels, states, LossSettings()).total.requires_grad


def test_bfloat16_states_keep_a_float32_output_layer_and_loss() -> None:
    hidden, head, labels, _ = inputs()
    narrow = hidden.detach().bfloat16().requires_grad_()
    chunked = chunked_loss(narrow, head, labels, None, LossSettings(kd_weight=0.0), 7)
    chunked.total.backward()
    exact = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="sum")
    assert chunked.total.dtype == torch.float32
    torch.testing.assert_close(chunked.total, exact, rtol=0.02, atol=0.1)
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_a_loss_without_targets_is_zero() -> None:
    hidden, head, labels, _ = inputs()
    chunked = chunked_loss(hidden[:0], head, labels[:0], None, LossSettings(kd_weight=0.0))
    chunked.total.backward()
    assert float(chunked.total.detach()) == 0
    top = TopK(torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 3))
    assert float(chunked_loss(hidden[:0], head, labels[:0], top, LossSettings()).total) == 0
