"""Tests of every divergence against sums in float64, for odd shapes, temperatures and padded vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimserve.distill.losses import (
    TopK,
    divergence_from_top_k,
    divergence_per_token,
    hidden_distance,
    top_k_of,
)
from slimserve.distill.recipe import LossSettings

NAMES = ("forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl", "js")


def logits(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(q_NV: Tensor, p_NV: Tensor, settings: LossSettings) -> Tensor:
    """Return the divergence of each token by its definition, as a sum over the vocabulary in float64."""
    return torch.stack([_of_token(q, p, settings) for q, p in zip(q_NV.double(), p_NV.double(), strict=True)])


def _of_token(q_V: Tensor, p_V: Tensor, settings: LossSettings) -> Tensor:
    q, p = ((row / settings.temperature).exp() for row in (q_V, p_V))
    q, p = q / q.sum(), p / p.sum()
    alpha, beta = settings.skew, settings.beta

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return sum((x * (x / y).log() for x, y in zip(a, b, strict=True)), torch.tensor(0.0))

    middle = beta * p + (1 - beta) * q
    definitions = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skewed_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skewed_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "js": lambda: beta * kl(p, middle) + (1 - beta) * kl(q, middle),
    }
    return definitions[settings.divergence]() * settings.temperature**2


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_equals_its_definition(name: Any, temperature: float) -> None:
    settings = LossSettings(divergence=name, temperature=temperature, skew=0.3, beta=0.2)
    student, teacher = logits(5, 13, seed=1), logits(5, 13, seed=2)
    torch.testing.assert_close(
        divergence_per_token(student, teacher, settings).double(),
        by_hand(student, teacher, settings),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", NAMES)
def test_padding_of_either_vocabulary_is_ignored(name: Any) -> None:
    settings = LossSettings(divergence=name)
    student, teacher = logits(3, 11, seed=3), logits(3, 17, seed=4)
    expected = by_hand(student, teacher[:, :11], settings)
    torch.testing.assert_close(
        divergence_per_token(student, teacher, settings).double(), expected, rtol=1e-5, atol=1e-6
    )
    other = divergence_per_token(teacher, student, settings).double()
    torch.testing.assert_close(other, by_hand(teacher[:, :11], student, settings), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_equal_student_and_teacher_have_zero_divergence_and_zero_gradient(name: Any) -> None:
    student = logits(4, 9, seed=5).requires_grad_()
    loss = divergence_per_token(student, student.detach() + 2.5, LossSettings(divergence=name, temperature=1.7)).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(float(loss.detach())) < 1e-5
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_the_definition(name: Any) -> None:
    settings = LossSettings(divergence=name, temperature=1.3)
    teacher = logits(2, 7, seed=7)
    ours = logits(2, 7, seed=6).requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence_per_token(ours, teacher, settings).sum(), ours)
    (expected,) = torch.autograd.grad(by_hand(reference, teacher, settings).sum(), reference)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_logits_far_apart_give_finite_losses_and_gradients(name: Any) -> None:
    student = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 300.0, 0.0]])
    loss = divergence_per_token(student, teacher, LossSettings(divergence=name)).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_divergence_over_the_top_tokens_is_a_lower_bound_and_reaches_the_full_value(name: Any) -> None:
    settings = LossSettings(divergence=name, temperature=1.2)
    student, teacher = logits(6, 31, seed=8, scale=1.0), logits(6, 31, seed=9, scale=1.0)
    full = divergence_per_token(student, teacher, settings)
    before = torch.zeros(6)
    for kept in (1, 4, 12, 30):
        bound = divergence_from_top_k(student, top_k_of(teacher, kept, 1.2), settings)
        assert (bound <= full + 1e-4).all()
        assert (bound >= before - 1e-4).all(), "more tokens never lower the bound"
        before = bound
    torch.testing.assert_close(before, full, rtol=1e-3, atol=1e-4)
    same = divergence_from_top_k(teacher, top_k_of(teacher, 4, 1.2), settings)
    assert float(same.abs().max()) < 1e-5


def test_training_on_the_top_tokens_reaches_the_teachers_probability() -> None:
    teacher = TopK(torch.tensor([[2]], dtype=torch.int32), torch.tensor([[0.9]]).log())
    student = torch.zeros(1, 4, requires_grad=True)
    for _ in range(3000):
        loss = divergence_from_top_k(student, teacher, LossSettings()).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        student = (student - gradient).detach().requires_grad_()
    shares = student.softmax(-1)[0]
    torch.testing.assert_close(shares[2], torch.tensor(0.9), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shares[[0, 1, 3]], torch.full((3,), 0.1 / 3), rtol=1e-3, atol=1e-3)


def test_hidden_distances_equal_their_definitions() -> None:
    ours, theirs = logits(4, 5, seed=10), logits(4, 5, seed=11)
    cosine = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(ours.double(), theirs.double(), strict=True)]
    torch.testing.assert_close(hidden_distance(ours, theirs, "cosine").double(), torch.tensor(cosine).double())
    error = ((ours - theirs) ** 2).sum(-1) / (theirs**2).sum(-1)
    torch.testing.assert_close(hidden_distance(ours, theirs, "mse"), error)
    assert float(hidden_distance(ours, ours, "cosine").abs().max()) < 1e-6
    assert float(hidden_distance(ours, ours, "mse").max()) == 0
