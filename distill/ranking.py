"""The listwise loss of rankers, as pure functions: the labels of one sequence are one list of candidates.

A label has two tokens, such as " yes" and " no", and a target probability of the first one, its share: 1 or 0 if the
label is hard, or a soft label or grade between them. A candidate's score is the log-odds of the two tokens. Over a list
of candidates j the scores s and the shares g are two distributions (ListNet's top-one probabilities, Cao et al., ICML
2007, with the grades as target):

    q_j = softmax(s)_j        p_j = g_j / Σ g

A list's loss is the cross-entropy -Σ p ln q, which is 0 for a list without a relevant label. With a teacher it is mixed
with T² times the divergence between the softmaxes of the teacher's and the student's scores at temperature T.

Shapes: N targets, M lists of at most K labels, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.distill.chunked import TeacherMixture, TeacherPrediction, TeacherStates
from slimserve.distill.losses import MIN_LOG, Targets, divergence_of, mixture_logits
from slimserve.distill.recipe import LossSettings
from slimserve.distill.sections import Label


@dataclass(frozen=True)
class LabelLists:
    """The labels of a batch's sequences, padded to lists of one length."""

    target_MK: Tensor
    """Number of each label's target in the batch; 0 where a list is shorter."""
    first_MK: Tensor
    second_MK: Tensor
    share_MK: Tensor
    """Target probability of the first token; 0 where a list is shorter."""
    is_label_MK: Tensor
    is_soft: bool
    """True if a share is neither 0 nor 1."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[int, Label]]]) -> LabelLists | None:
        """Return the lists of sequences, given as pairs of a label's target and the label; None without labels."""
        lists = [row for row in rows if row]
        if not lists:
            return None
        shape = len(lists), max(map(len, lists))
        integers = torch.zeros(3, *shape, dtype=torch.int64)
        shares, is_label = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(lists):
            values = [(target, label.first, label.second) for target, label in row]
            integers[:, number, : len(row)] = torch.tensor(values).T
            shares[number, : len(row)] = torch.tensor([label.share for _, label in row])
            is_label[number, : len(row)] = True
        is_soft = any(0 < label.share < 1 for row in lists for _, label in row)
        targets, first, second = integers
        return cls(targets, first, second, shares, is_label, is_soft)

    def to(self, device: torch.device) -> LabelLists:
        """Return the lists with their tensors on `device`."""
        return LabelLists(
            self.target_MK.to(device),
            self.first_MK.to(device),
            self.second_MK.to(device),
            self.share_MK.to(device),
            self.is_label_MK.to(device),
            self.is_soft,
        )

    def targets(self, labels_N: Tensor, loss: LossSettings) -> Tensor | Targets:
        """Return all N targets with the labels' shares, and with the rest of the listwise loss's weight at labels.

        Without soft labels and a listwise loss these are the tokens of the text.
        """
        is_soft = self.is_soft and loss.labels == "soft"
        if not (is_soft or loss.list_weight):
            return labels_N
        first_N, second_N = labels_N.clone(), labels_N.clone()
        share_N, weight_N = (torch.ones(len(labels_N), device=labels_N.device) for _ in range(2))
        target_L = self.target_MK[self.is_label_MK]
        weight_N[target_L] = 1 - loss.list_weight
        if is_soft:
            first_N[target_L] = self.first_MK[self.is_label_MK]
            second_N[target_L] = self.second_MK[self.is_label_MK]
            share_N[target_L] = self.share_MK[self.is_label_MK]
        return Targets(first_N, second_N, share_N, weight_N)

    def shares(self, labels_N: Tensor, loss: LossSettings) -> Tensor:
        """Return the shares `[M, K]` of the lists' target: those of the data, or 1 and 0 by the label in the text."""
        if loss.labels == "soft":
            return self.share_MK
        return ((labels_N[self.target_MK] == self.first_MK) & self.is_label_MK).float()


def log_odds(hidden_ND: Tensor, head_VD: Tensor, lists: LabelLists) -> Tensor:
    """Return ln(P(first token) / P(second token)) of each label, `[M, K]` float32."""
    rows_MKD = (head_VD[lists.first_MK] - head_VD[lists.second_MK]).float()
    return (hidden_ND[lists.target_MK].float() * rows_MKD).sum(-1)


def teacher_log_odds(teacher: TeacherPrediction, lists: LabelLists, temperature: float) -> Tensor | None:
    """Return the teacher's scores; several teachers' list distributions are mixed. None if no teacher runs."""
    if isinstance(teacher, TeacherStates):
        return log_odds(teacher.hidden_ND, teacher.head_VD, lists)
    if isinstance(teacher, TeacherMixture):
        scores = [
            log_odds(one.hidden_ND, one.head_VD, lists).masked_fill(~lists.is_label_MK, MIN_LOG)
            for one in teacher.parts
        ]
        return mixture_logits(scores, teacher.weights, temperature)
    return None


def listwise_loss(
    student_MK: Tensor, share_MK: Tensor, is_label_MK: Tensor, teacher_MK: Tensor | None, settings: LossSettings
) -> Tensor:
    """Return the loss of each list, `[M]`, from the candidates' scores; differentiable in the student's."""

    def log_softmax(scores_MK: Tensor, temperature: float = 1.0) -> Tensor:
        return functional.log_softmax(scores_MK.masked_fill(~is_label_MK, MIN_LOG) / temperature, dim=-1)

    shares = share_MK / share_MK.sum(-1, keepdim=True).clamp_min(torch.finfo(share_MK.dtype).tiny)
    cross_entropy = -(shares * log_softmax(student_MK)).sum(-1)
    if teacher_MK is None:
        return cross_entropy
    temperature = settings.temperature
    log_q, log_p = log_softmax(student_MK, temperature), log_softmax(teacher_MK, temperature)
    divergence = divergence_of(log_q, log_p, settings) * temperature**2
    return (1 - settings.kd_weight) * cross_entropy + settings.kd_weight * divergence
