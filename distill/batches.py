"""Turns sequences into batches of tensors, and chooses the sequences of each step.

The sequences of a step have similar lengths, so that a padded batch holds little padding. A step is divided into
micro-batches with a maximum number of tokens. The loss is divided by the number of targets of the full step, so this
does not change the result.

Padding is on the right, where causal attention never looks, so no mask is needed. Packed sequences are concatenated in
one row; positions that restart at 0 make transformers keep the sequences apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimserve.distill.ranking import LabelLists
from slimserve.distill.sections import Label
from slimserve.distill.supervision import SupervisedSequence

_SORT_WINDOW_STEPS = 16
"""Number of steps whose sequences are sorted by length together: more loses the shuffling, fewer pads more."""


@dataclass(frozen=True)
class Batch:
    """The sequences of one forward pass: B rows of T tokens with N targets."""

    tokens_BT: Tensor
    positions_BT: Tensor | None
    """Positions of packed sequences, which restart at 0 in each one; None counts from 0 in every row."""
    source_N: Tensor
    """Index in the flattened `[B·T]` of the hidden state that predicts each target."""
    labels_N: Tensor
    names: tuple[str, ...]
    indices: tuple[int, ...]
    """Indices of the sequences in the list that `make_batches` was given."""
    lengths: tuple[int, ...]
    lists: LabelLists | None = None
    """Labels of the sequences, if they are those of a ranker."""
    teacher: Batch | None = None
    """The same targets as the teacher reads them, if it has prompts of its own."""

    @property
    def num_targets(self) -> int:
        return len(self.labels_N)

    @property
    def for_teacher(self) -> Batch:
        """The batch as the teacher reads it."""
        return self.teacher or self

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device),
            positions_BT=None if self.positions_BT is None else self.positions_BT.to(device),
            source_N=self.source_N.to(device),
            labels_N=self.labels_N.to(device),
            lists=self.lists.to(device) if self.lists else None,
            teacher=self.teacher.to(device) if self.teacher else None,
        )


def make_batches(
    sequences: Sequence[SupervisedSequence], indices: Sequence[int], max_tokens: int, *, is_packed: bool = False
) -> list[Batch]:
    """Return batches of the sequences at `indices`, longest first, each of at most `max_tokens` tokens with padding.

    A longer sequence gets a batch of its own.
    """
    groups: list[list[int]] = []
    size = 0
    for index in sorted(indices, key=lambda index: (-len(sequences[index].tokens), index)):
        length = len(sequences[index].tokens)
        longest = len(sequences[groups[-1][0]].tokens) if groups else 0
        new_size = size + length if is_packed else longest * (len(groups[-1]) + 1 if groups else 1)
        if not groups or new_size > max_tokens:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += length
    combine = _packed if is_packed else _padded
    batches = []
    for group in groups:
        chosen = [sequences[index] for index in group]
        batch = combine(chosen, group)
        if any(one.teacher_tokens for one in chosen):
            batch = replace(batch, teacher=combine([one.for_teacher for one in chosen], group))
        batches.append(batch)
    return batches


def step_indices(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield the sequence indices of each step, without end; every epoch contains each sequence once.

    The order depends on the arguments alone, so a resumed run can skip to its position.
    """
    epoch = 0
    while True:
        order = list(range(len(lengths)))
        numbers = random.Random(f"{seed} {epoch}")
        numbers.shuffle(order)
        steps = []
        for begin in range(0, len(order), _SORT_WINDOW_STEPS * batch_size):
            window = sorted(order[begin : begin + _SORT_WINDOW_STEPS * batch_size], key=lambda index: lengths[index])
            steps += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
        numbers.shuffle(steps)
        yield from steps
        epoch += 1


def _padded(sequences: Sequence[SupervisedSequence], indices: Sequence[int]) -> Batch:
    length = max(len(sequence.tokens) for sequence in sequences)
    rows = [[*sequence.tokens, *([0] * (length - len(sequence.tokens)))] for sequence in sequences]
    begins = [row * length for row in range(len(rows))]
    return _batch(torch.tensor(rows), None, sequences, indices, begins)


def _packed(sequences: Sequence[SupervisedSequence], indices: Sequence[int]) -> Batch:
    tokens = [token for sequence in sequences for token in sequence.tokens]
    positions = [position for sequence in sequences for position in range(len(sequence.tokens))]
    begins = [0]
    for sequence in sequences[:-1]:
        begins.append(begins[-1] + len(sequence.tokens))
    return _batch(torch.tensor([tokens]), torch.tensor([positions]), sequences, indices, begins)


def _batch(
    tokens_BT: Tensor,
    positions_BT: Tensor | None,
    sequences: Sequence[SupervisedSequence],
    indices: Sequence[int],
    begins: Sequence[int],
) -> Batch:
    pairs = list(zip(begins, sequences, strict=True))
    sources = [begin + target - 1 for begin, sequence in pairs for target in sequence.targets]
    labels = [sequence.tokens[target] for sequence in sequences for target in sequence.targets]
    # Labels are found by their position in a sequence; the number of a target counts from the batch's first one.
    lists: list[list[tuple[int, Label]]] = []
    num_before = 0
    for sequence in sequences:
        numbers = {target: number for number, target in enumerate(sequence.targets, num_before)}
        lists.append([(numbers[one.position], one) for one in sequence.labels if one.position in numbers])
        num_before += len(numbers)
    return Batch(
        tokens_BT,
        positions_BT,
        torch.tensor(sources, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        tuple(sequence.name for sequence in sequences),
        tuple(indices),
        tuple(len(sequence.tokens) for sequence in sequences),
        LabelLists.of(lists),
    )
