"""What flows through a model while it is compressed: hidden states on disk, Hessians in memory.

Shapes: N sequences, T tokens, I features. The files bound the memory whatever the number of samples, and
they are what an interrupted run resumes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from slimserve.core.errors import UserError

_PANEL = 192
"""Columns of a Hessian mirrored at once."""
_LEAST_BLOCK = 128
"""Blocks on a Hessian's diagonal are halved down to this many columns; what lies below them is not computed."""


class ActivationFile:
    """Activations `[N, T, I]` in a file, read and written a few sequences at a time."""

    def __init__(self, path: Path, num_sequences: int, num_tokens: int, width: int, dtype: torch.dtype) -> None:
        self.path = path
        self._shape = (num_tokens, width)
        self._num_sequences = num_sequences
        self._dtype = dtype
        self._sequence_bytes = num_tokens * width * dtype.itemsize
        path.touch()

    def write(self, first: int, x_BTI: Tensor) -> None:
        """Store sequences from index `first` on."""
        with self.path.open("r+b") as file:
            file.seek(first * self._sequence_bytes)
            file.write(_bytes_of(x_BTI.to(self._dtype).contiguous()))

    def read(self, first: int, count: int) -> Tensor:
        """Sequences from index `first` on, `[B, T, I]`."""
        x_BTI = torch.empty(min(count, self._num_sequences - first), *self._shape, dtype=self._dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(first * self._sequence_bytes)
            view, filled = _bytes_of(x_BTI), 0
            while filled < len(view):
                got = file.readinto(view[filled:])
                if not got:
                    raise UserError("activations", self.path, "is cut short", "delete its folder and start again")
                filled += got
        return x_BTI

    def batches(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """Index of the first sequence and up to `count` sequences, from the first to the last."""
        for first in range(0, self._num_sequences, count):
            yield first, self.read(first, count)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    return cast("memoryview", tensor.view(torch.uint8).flatten().numpy().data)


class Hessian:
    """XᵀX over all tokens that a layer reads and, where asked for, the largest magnitude of each feature.

    Sums are float32, blocks on and above the diagonal only, mirrored at the end: a Hessian is symmetric.
    """

    def __init__(self, width: int, layer: str, wants_peak: bool = False) -> None:
        self._layer = layer
        self._sum_II = torch.zeros(width, width)
        self.peak_I = torch.zeros(width) if wants_peak else None
        self.num_tokens = 0

    def add(self, x_BTI: Tensor) -> None:
        """Take in activations `[..., I]`."""
        x_NI = x_BTI.flatten(0, -2).float()
        if self.peak_I is not None:
            torch.maximum(self.peak_I, x_NI.abs().amax(dim=0), out=self.peak_I)
        self._add(x_NI, 0, x_NI.shape[1])
        self.num_tokens += x_NI.shape[0]

    def _add(self, x_NI: Tensor, start: int, stop: int) -> None:
        """The block on the diagonal from `start` to `stop`: a square above the diagonal, and two halves."""
        if stop - start <= _LEAST_BLOCK:
            x_NS = x_NI[:, start:stop]
            self._sum_II[start:stop, start:stop].addmm_(x_NS.T, x_NS)
            return
        middle = start + ((stop - start) // 2 + 63) // 64 * 64
        self._sum_II[start:middle, middle:stop].addmm_(x_NI[:, start:middle].T, x_NI[:, middle:stop])
        self._add(x_NI, start, middle)
        self._add(x_NI, middle, stop)

    def mean(self) -> Tensor:
        """XᵀX / number of tokens, `[I, I]` float32. Ends the sum: the memory is handed over.

        Raises UserError, which names the layer, where an activation was NaN or infinite: its square is on the diagonal.
        """
        if not bool(torch.isfinite(self._sum_II.diagonal()).all()):
            raise UserError(
                "activations",
                f"input of {self._layer}",
                "hold NaN or infinity",
                "check the model: does it generate sensible text as it is?",
            )
        width = self._sum_II.shape[0]
        for start in range(0, width, _PANEL):
            stop = min(start + _PANEL, width)
            diagonal = self._sum_II[start:stop, start:stop]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
            self._sum_II[stop:, start:stop] = self._sum_II[start:stop, stop:].T
        return self._sum_II.div_(self.num_tokens)
