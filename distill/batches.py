"""From sequences to tensors: which sequences make a step, and how they lie side by side.

A step's sequences are of similar length, so that little of a padded batch is padding. A step is divided into
micro-batches of at most so many tokens; the loss is divided by the targets of the whole step, so dividing changes
nothing. Padding is on the right, where causal attention never looks, so no mask is needed; packed sequences lie end to
end in one row, with positions that begin anew, by which transformers keeps them from seeing each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimserve.distill.supervision import Supervised

_LOT = 16
"""Steps whose sequences are sorted by length together: more would sort the data, fewer would pad."""


@dataclass(frozen=True)
class Batch:
    """Sequences for one forward pass: B rows of T tokens, N targets."""

    tokens_BT: Tensor
    positions_BT: Tensor | None
    """Of packed sequences, beginning anew with each; None: from 0 on in every row."""
    before_N: Tensor
    """Where, in the flattened `[B·T]`, the hidden state lies that predicts each target."""
    labels_N: Tensor
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    """Of the sequences, as they were given."""
    lengths: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        return len(self.labels_N)

    def to(self, device: torch.device) -> Batch:
        positions = None if self.positions_BT is None else self.positions_BT.to(device)
        return Batch(
            self.tokens_BT.to(device),
            positions,
            self.before_N.to(device),
            self.labels_N.to(device),
            self.names,
            self.numbers,
            self.lengths,
        )


def make_batches(
    sequences: Sequence[Supervised], numbers: Sequence[int], most_tokens: int, *, is_packed: bool = False
) -> list[Batch]:
    """Batches of at most `most_tokens` tokens, padding included, of the sequences of these numbers, longest first.

    A sequence longer than that has a batch of its own.
    """
    left = sorted(numbers, key=lambda number: (-len(sequences[number].tokens), number))
    groups: list[list[int]] = []
    size = 0
    for number in left:
        length = len(sequences[number].tokens)
        longest = len(sequences[groups[-1][0]].tokens) if groups else 0
        after = size + length if is_packed else longest * (len(groups[-1]) + 1 if groups else 1)
        if not groups or after > most_tokens:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += length
    lay = _packed if is_packed else _padded
    return [lay([sequences[number] for number in group], group) for group in groups]


def step_numbers(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """For each step, without end, the numbers of its sequences: all of them once before any comes again.

    Depends on nothing but its arguments, so a resumed run skips to where it was.
    """
    epoch = 0
    while True:
        order = list(range(len(lengths)))
        numbers = random.Random(f"{seed} {epoch}")
        numbers.shuffle(order)
        steps = []
        for begin in range(0, len(order), _LOT * batch_size):
            lot = sorted(order[begin : begin + _LOT * batch_size], key=lambda number: lengths[number])
            steps += [lot[at : at + batch_size] for at in range(0, len(lot), batch_size)]
        numbers.shuffle(steps)
        yield from steps
        epoch += 1


def _padded(sequences: Sequence[Supervised], numbers: Sequence[int]) -> Batch:
    length = max(len(sequence.tokens) for sequence in sequences)
    rows = [[*sequence.tokens, *([0] * (length - len(sequence.tokens)))] for sequence in sequences]
    begins = [row * length for row in range(len(rows))]
    return _batch(torch.tensor(rows), None, sequences, numbers, begins)


def _packed(sequences: Sequence[Supervised], numbers: Sequence[int]) -> Batch:
    tokens = [token for sequence in sequences for token in sequence.tokens]
    positions = [place for sequence in sequences for place in range(len(sequence.tokens))]
    begins = [0]
    for sequence in sequences[:-1]:
        begins.append(begins[-1] + len(sequence.tokens))
    return _batch(torch.tensor([tokens]), torch.tensor([positions]), sequences, numbers, begins)


def _batch(
    tokens_BT: Tensor,
    positions_BT: Tensor | None,
    sequences: Sequence[Supervised],
    numbers: Sequence[int],
    begins: Sequence[int],
) -> Batch:
    pairs = list(zip(begins, sequences, strict=True))
    before = [begin + place - 1 for begin, sequence in pairs for place in sequence.targets]
    labels = [sequence.tokens[place] for sequence in sequences for place in sequence.targets]
    return Batch(
        tokens_BT,
        positions_BT,
        torch.tensor(before, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        tuple(sequence.name for sequence in sequences),
        tuple(numbers),
        tuple(len(sequence.tokens) for sequence in sequences),
    )
