"""Activations of the calibration samples: hidden states in files, Hessians in memory.

The files bound the memory for any number of samples, and an interrupted build resumes from them.

Shape suffixes: N sequences; B sequences of a batch; T tokens; I features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from slimserve.core.errors import UserError

_PANEL = 192
"""Columns of a Hessian that are mirrored at once."""
_MIN_BLOCK = 128
"""Columns of the diagonal blocks at which the recursion ends; only these blocks are computed below the diagonal."""


class Activations(Protocol):
    """Activations `[N, T, I]`, read and written a few sequences at a time."""

    num_sequences: int

    def write(self, first: int, x_BTI: Tensor) -> None:
        """Store a batch of sequences; the first has the index `first`."""

    def read(self, first: int, count: int) -> Tensor:
        """Return up to `count` sequences from index `first` on, `[B, T, I]`."""

    def delete(self) -> None:
        """Free the space."""


class MemoryActivations:
    """Activations `[N, T, I]` in one tensor, on a GPU or in pinned memory."""

    def __init__(self, values_NTI: Tensor) -> None:
        self.num_sequences = len(values_NTI)
        self._values_NTI = values_NTI

    def write(self, first: int, x_BTI: Tensor) -> None:
        self._values_NTI[first : first + len(x_BTI)] = x_BTI

    def read(self, first: int, count: int) -> Tensor:
        return self._values_NTI[first : first + count]

    def delete(self) -> None:
        self._values_NTI = self._values_NTI[:0].clone()


class ActivationFile:
    """Activations `[N, T, I]` in a file, read and written a few sequences at a time."""

    def __init__(self, path: Path, num_sequences: int, num_tokens: int, width: int, dtype: torch.dtype) -> None:
        self.path = path
        self._shape = (num_tokens, width)
        self.num_sequences = num_sequences
        self._dtype = dtype
        self._sequence_bytes = num_tokens * width * dtype.itemsize
        path.touch()

    def write(self, first: int, x_BTI: Tensor) -> None:
        """Store a batch of sequences; the first has the index `first`."""
        with self.path.open("r+b") as file:
            file.seek(first * self._sequence_bytes)
            file.write(_bytes_of(x_BTI.to(self._dtype).cpu().contiguous()))

    def read(self, first: int, count: int) -> Tensor:
        """Return up to `count` sequences from index `first` on, `[B, T, I]`.

        Raises UserError if the file is shorter than that.
        """
        x_BTI = torch.empty(min(count, self.num_sequences - first), *self._shape, dtype=self._dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(first * self._sequence_bytes)
            view, filled = _bytes_of(x_BTI), 0
            while filled < len(view):
                got = file.readinto(view[filled:])
                if not got:
                    raise UserError(
                        "activations", self.path, "is truncated", "delete its folder and run the command again"
                    )
                filled += got
        return x_BTI

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


class JoinedActivations:
    """Activations of sequences of several lengths: one store per length, whose sequences are counted through."""

    def __init__(self, stores: Sequence[Activations]) -> None:
        self.num_sequences = sum(store.num_sequences for store in stores)
        self._stores = stores

    def write(self, first: int, x_BTI: Tensor) -> None:
        """Store a batch of sequences of one length; the first has the index `first`."""
        store, offset = self._find(first)
        store.write(offset, x_BTI)

    def read(self, first: int, count: int) -> Tensor:
        """Return up to `count` sequences of one length from index `first` on, `[B, T, I]`."""
        store, offset = self._find(first)
        return store.read(offset, count)

    def delete(self) -> None:
        """Free the space."""
        for store in self._stores:
            store.delete()

    def _find(self, first: int) -> tuple[Activations, int]:
        for store in self._stores:
            if first < store.num_sequences:
                return store, first
            first -= store.num_sequences
        raise IndexError(first)


def _bytes_of(tensor: Tensor) -> memoryview:
    return cast("memoryview", tensor.view(torch.uint8).flatten().numpy().data)


class Hessian:
    """The Hessian XᵀX of a layer: X are the inputs of all tokens. Optionally also the peak magnitude of each feature.

    The sums are float32. A Hessian is symmetric, so only blocks on and above the diagonal are computed, and mirrored at
    the end.
    """

    def __init__(self, width: int, layer: str, wants_peak: bool = False, device: torch.device | str = "cpu") -> None:
        self._layer = layer
        self._sum_II = torch.zeros(width, width, device=device)
        self.peak_I = torch.zeros(width, device=device) if wants_peak else None
        self.num_tokens = 0

    def add(self, x_BTI: Tensor) -> None:
        """Add activations `[..., I]`."""
        x_NI = x_BTI.flatten(0, -2).float()
        if self.peak_I is not None:
            torch.maximum(self.peak_I, x_NI.abs().amax(dim=0), out=self.peak_I)
        self._add(x_NI, 0, x_NI.shape[1])
        self.num_tokens += x_NI.shape[0]

    def _add(self, x_NI: Tensor, start: int, stop: int) -> None:
        """Add to the diagonal block from `start` to `stop`: the square above its diagonal, then its two halves."""
        if stop - start <= _MIN_BLOCK:
            x_NS = x_NI[:, start:stop]
            self._sum_II[start:stop, start:stop].addmm_(x_NS.T, x_NS)
            return
        middle = start + ((stop - start) // 2 + 63) // 64 * 64
        self._sum_II[start:middle, middle:stop].addmm_(x_NI[:, start:middle].T, x_NI[:, middle:stop])
        self._add(x_NI, start, middle)
        self._add(x_NI, middle, stop)

    def mean(self) -> Tensor:
        """Return XᵀX / num_tokens, `[I, I]` float32. The result takes over the memory, so nothing can be added later.

        Raises UserError that names the layer if an activation was NaN or infinite: its square is on the diagonal.
        """
        if not bool(torch.isfinite(self._sum_II.diagonal()).all()):
            raise UserError(
                "activations",
                f"input of {self._layer}",
                "contain NaN or infinity",
                "check that the model itself generates sensible text",
            )
        width = self._sum_II.shape[0]
        for start in range(0, width, _PANEL):
            stop = min(start + _PANEL, width)
            diagonal = self._sum_II[start:stop, start:stop]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
            self._sum_II[stop:, start:stop] = self._sum_II[start:stop, stop:].T
        return self._sum_II.div_(self.num_tokens)
