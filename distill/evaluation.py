"""Figures of a student's validation beside its loss: for recommendation, how well it ranks films by their labels.

Every label in a member's sequence is a question: given all before it, is P(label) high where it is true? The first
films of a history have little before them, so judging begins at the 9th.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimserve.distill.batches import make_batches
from slimserve.distill.data import Examples
from slimserve.distill.models import head_of
from slimserve.distill.sections import Example, Section
from slimserve.distill.supervision import Supervised, Supervision
from slimserve.workloads import metrics
from slimserve.workloads.interface import Estimate

FIRST_JUDGED = 8
"""Labels of a sequence that are not judged."""


def make_judge(examples: Examples, most_tokens: int) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """The AUC of the validation examples' labels; None where they have none."""
    if not examples.labels or not examples.validation:
        return None

    def judge(student: nn.Module) -> Mapping[str, float]:
        figures = label_figures(student, examples.validation, examples.labels, examples.groups, most_tokens)
        return {name: figures[name].value for name in ("auc", "within_user_auc")}

    return judge


@torch.no_grad()
def label_scores(
    model: Any, examples: Sequence[Example], labels: tuple[int, ...], most_tokens: int
) -> list[tuple[list[bool], list[float]]]:
    """Per example, whether each judged label is the first one, and the first one's share of both's probability."""
    supervision = Supervision(frozenset({Section.ANSWER}))
    sequences = [_without_first(supervision.apply(example)) for example in examples]
    found: list[tuple[list[bool], list[float]]] = [([], []) for _ in examples]
    device = next(model.parameters()).device
    for batch in make_batches(sequences, [n for n, one in enumerate(sequences) if one.targets], most_tokens):
        placed = batch.to(device)
        states = model.get_decoder()(input_ids=placed.tokens_BT, use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1)[placed.before_N].float()
        logits = hidden @ head_of(model)[list(labels)].float().T
        scores = iter(logits.softmax(-1)[:, 0].tolist())
        for number in batch.numbers:
            for place in sequences[number].targets:
                found[number][0].append(sequences[number].tokens[place] == labels[0])
                found[number][1].append(next(scores))
    return found


def label_figures(
    model: Any, examples: Sequence[Example], labels: tuple[int, ...], groups: Sequence[int], most_tokens: int
) -> dict[str, Estimate]:
    """Pooled `auc`, mean `within_user_auc` and others of judged labels, with intervals by member."""
    scored = label_scores(model, examples, labels, most_tokens)
    figures = metrics.ranking_metrics([truth for truth, _ in scored], [scores for _, scores in scored], groups)
    return {name: metrics.estimate(figure) for name, figure in figures.items()}


def _without_first(sequence: Supervised) -> Supervised:
    return Supervised(sequence.name, sequence.tokens, sequence.targets[FIRST_JUDGED:])
