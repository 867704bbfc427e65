"""Validation: losses on full sequences, and for scoring workloads the ranking metrics of their labels.

Every label in a user's sequence is one sample: given everything before it, is P(label) high if it is the true one? The
first items of a history have little before them, so the metrics skip their labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimserve.core.progress import print_status
from slimserve.distill.batches import make_batches
from slimserve.distill.data import Examples
from slimserve.distill.models import head_of
from slimserve.distill.parallel import ParallelStudent
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.sections import Example, Section
from slimserve.distill.student import TeacherModel, TeacherOutput
from slimserve.distill.supervision import SupervisedSequence, Supervision
from slimserve.workloads import intervals, metrics
from slimserve.workloads.interface import Estimate

NUM_SKIPPED_LABELS = 8
"""Number of leading labels of a sequence that the ranking metrics skip."""


def validation_sequences(examples: Sequence[Example], recipe: DistillRecipe) -> list[SupervisedSequence]:
    """Return full sequences with all sections, so that the losses of different recipes refer to the same tokens.

    Nothing predicts item tokens, so with items only the recipe's sections can be measured.
    """
    sections = recipe.supervision.sections if recipe.items.file is not None else "all"
    return Supervision(sections=sections).apply_all(examples) if examples else []


class Validator:
    """Measures the student on the validation examples.

    `teacher` knows the sequences of `validation_sequences`; a cache of the training sequences does not.
    """

    def __init__(
        self,
        student: ParallelStudent,
        recipe: DistillRecipe,
        examples: Sequence[Example],
        teacher: TeacherModel | None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
    ) -> None:
        self._student = student
        self._recipe = recipe
        self._examples = examples
        self._teacher = teacher if recipe.loss.kd_weight else None
        self._evaluate = evaluate
        self._sequences = validation_sequences(examples, recipe)

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, Any]:
        """Return the mean losses and further metrics as one row; an empty one without validation examples."""
        if not self._sequences:
            return {}
        begun = time.monotonic()
        student = self._student
        student.module.eval()
        losses: list[Tensor] = []
        sections: list[Section] = []
        max_tokens = self._recipe.training.micro_batch_tokens
        for batch in make_batches(self._sequences, range(len(self._sequences)), max_tokens):
            batch_here = batch.to(student.device)
            output = self._teacher.predict(batch_here) if self._teacher else TeacherOutput()
            with student.autocast:
                losses.append(student.module(batch_here, output, self._recipe.loss, is_measuring=True).double().cpu())
            for index in batch.indices:
                own = self._examples[index].sections
                sections += [own[target] for target in self._sequences[index].targets]
        chosen = self._recipe.supervision.section_set
        row: dict[str, Any] = {"step": step, **_mean_losses(torch.cat(losses, dim=1), sections, chosen)}
        if self._evaluate:
            with student.plain_student() as plain:
                row |= self._evaluate(plain)
        student.module.train()
        if student.is_first:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
            print_status(f"step {step}, validation in {time.monotonic() - begun:.0f} s: {shown}")
        return row


def _mean_losses(losses_3N: Tensor, sections: Sequence[Section], chosen: Collection[Section]) -> dict[str, float]:
    """Return the mean loss, divergence and cross-entropy over the chosen sections, and the last two by section."""

    def mean_over(wanted: Collection[Section]) -> list[float]:
        means: list[float] = (
            losses_3N[:, [at for at, section in enumerate(sections) if section in wanted]].mean(1).tolist()
        )
        return means

    row = dict(zip(("loss", "divergence", "cross_entropy"), mean_over(chosen), strict=True))
    for section in sorted(set(sections)):
        name = section.name.lower()
        _, row[f"divergence_{name}"], row[f"cross_entropy_{name}"] = mean_over({section})
    return row


def make_evaluator(examples: Examples, max_tokens: int) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """Return a function that measures the AUC of the validation examples' labels; None if they have none."""
    by_user = [
        (example, user) for example, user in zip(examples.validation, examples.groups, strict=True) if user is not None
    ]
    if not by_user:
        return None
    scored, users = zip(*by_user, strict=True)

    def evaluate(student: nn.Module) -> Mapping[str, float]:
        estimates = label_metrics(student, scored, examples.labels, users, max_tokens)
        return {name: estimates[name].value for name in ("auc", "within_group_auc")}

    return evaluate


@torch.no_grad()
def label_scores(
    model: Any, examples: Sequence[Example], labels: tuple[int, ...], max_tokens: int
) -> list[tuple[list[bool], list[float]]]:
    """Return for each example the truths and scores of its labels after the skipped ones.

    A truth tells whether the label is `labels[0]`; a score is the share of `labels[0]` in the labels' probability.
    """
    answers = [Supervision(sections="answer").apply(example) for example in examples]
    sequences = [replace(one, targets=one.targets[NUM_SKIPPED_LABELS:]) for one in answers]
    results: list[tuple[list[bool], list[float]]] = [([], []) for _ in examples]
    device = next(model.parameters()).device
    for batch in make_batches(sequences, [n for n, one in enumerate(sequences) if one.targets], max_tokens):
        batch_here = batch.to(device)
        states = model.get_decoder()(input_ids=batch_here.tokens_BT, use_cache=False).last_hidden_state
        hidden_ND = states.flatten(0, 1)[batch_here.source_N]
        scores = iter(label_probability(model, labels, hidden_ND).tolist())
        for index in batch.indices:
            for target in sequences[index].targets:
                results[index][0].append(sequences[index].tokens[target] == labels[0])
                results[index][1].append(next(scores))
    return results


def label_probability(model: Any, labels: tuple[int, ...], hidden_ND: Tensor) -> Tensor:
    """Return the share of `labels[0]` in the probability of both labels after hidden states, `[N]` float32.

    A matrix product would be in bfloat16 under autocast, whose steps at a logit of 16 are 0.125 and make ties.
    """
    first_D, second_D = head_of(model)[list(labels)].float()
    return (hidden_ND.float() * (first_D - second_D)).sum(-1).sigmoid()


def label_metrics(
    model: Any, examples: Sequence[Example], labels: tuple[int, ...], groups: Sequence[int], max_tokens: int
) -> dict[str, Estimate]:
    """Return the ranking metrics of the labels, such as pooled `auc` and `within_group_auc`, with intervals by user."""
    scored = label_scores(model, examples, labels, max_tokens)
    data = metrics.ranking_metrics([truth for truth, _ in scored], [scores for _, scores in scored], groups)
    return {name: intervals.estimate(one) for name, one in data.items()}
