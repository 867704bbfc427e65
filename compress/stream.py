"""Hidden states of the calibration samples as they pass through a model that is being compressed.

For each sublayer of a block, a step can ask for the Hessian of the producers' inputs, then for that of the consumer's
inputs. Then the stream advances through the changed sublayer. Every layer is therefore compressed on the inputs that it
will get, which include the errors of earlier layers, and the model runs only once.

Shape suffixes: N sequences; B sequences of a batch; T tokens; D hidden size; I input features; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from slimserve.compress.activations import ActivationFile, Hessian
from slimserve.compress.families import Sublayer
from slimserve.compress.forward import Decoder, dense_linear

_TOKENS_AT_ONCE = 2048
"""Tokens of one batch."""


class Stream:
    """Hidden states of all calibration sequences before and after one block, in files under `folder`."""

    def __init__(self, decoder: Decoder, folder: Path, tokens_NT: Tensor, name: str = "x") -> None:
        self.decoder = decoder
        self.tokens_NT = tokens_NT
        self._folder = folder
        self._name = name
        self._shape = (tokens_NT.shape[0], tokens_NT.shape[1])
        self._batch = max(1, _TOKENS_AT_ONCE // tokens_NT.shape[1])
        self._inner: ActivationFile | None = None
        self._branches: list[Stream] = []

    @torch.inference_mode()
    def embed(self, embedding_VD: Tensor) -> None:
        """Write the hidden states before block 0."""
        states = self._states(0, embedding_VD.shape[1])
        for first in range(0, len(self.tokens_NT), self._batch):
            states.write(first, embedding_VD[self.tokens_NT[first : first + self._batch]])

    def enter(self, index: int, hidden_size: int) -> None:
        """Move to block `index`; `embed` or `advance` has written the hidden states before it."""
        self._before = self._states(index, hidden_size)
        self._after = self._states(index + 1, hidden_size)
        self._width, self._index = hidden_size, index
        self._branches = []

    def leave(self) -> None:
        """Delete the hidden states before the block, also those of branches; the states after it must be recorded."""
        for stream in (self, *self._branches):
            stream._before.delete()

    def branch(self, name: str, num_sequences: int) -> Stream:
        """Return a stream at the same block for a variation of the model, with the first `num_sequences` only.

        A new branch begins with `skip_block`. A branch of a name that exists continues with the states of that branch.
        """
        branch = Stream(self.decoder, self._folder, self.tokens_NT[:num_sequences], name)
        branch.enter(self._index, self._width)
        self._branches.append(branch)
        return branch

    def skip_block(self, stream: Stream) -> None:
        """Leave the block out: the states after it are those that `stream` has before it."""
        for first in range(0, len(self.tokens_NT), self._batch):
            count = min(self._batch, len(self.tokens_NT) - first)
            self._after.write(first, stream._before.read(first, count))

    def producer_hessian(
        self, sublayer: Sublayer, block: Mapping[str, Tensor], layer: str, wants_peak: bool = False
    ) -> Hessian:
        """Return the Hessian of the producers' inputs; `layer` names them in errors."""
        hessian = Hessian(self._width, layer, wants_peak)
        for _, x_BTD in self._residual(sublayer):
            hessian.add(self.decoder.producer_input(sublayer, block, x_BTD))
        return hessian

    def run(self, sublayer: Sublayer, block: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Compute the consumer's inputs, keep them for `advance`, and yield the inputs `[B, T, I]` of each batch."""
        linear = dense_linear(block)
        width = block[f"{self.decoder.roles.consumer(sublayer)}.weight"].shape[1]
        path = self._folder / f"{self._name}-inner.bin"
        self._inner = ActivationFile(path, *self._shape, width, self.decoder.dtype)
        for first, x_BTD in self._residual(sublayer):
            h_BTD = self.decoder.producer_input(sublayer, block, x_BTD)
            inner_BTI = self.decoder.consumer_input(sublayer, block, linear, h_BTD)
            self._inner.write(first, inner_BTI)
            yield first, inner_BTI

    def consumer_hessian(self, sublayer: Sublayer, block: Mapping[str, Tensor], layer: str) -> Hessian:
        """Return the Hessian of the consumer's inputs and keep them for `advance`; `layer` names it in errors."""
        hessian = Hessian(block[f"{self.decoder.roles.consumer(sublayer)}.weight"].shape[1], layer)
        for _, inner_BTI in self.run(sublayer, block):
            hessian.add(inner_BTI)
        return hessian

    def advance_batches(
        self, sublayer: Sublayer, block: Mapping[str, Tensor], kept_I: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Add the consumer's outputs to the hidden states and yield the outputs `[B, T, D]` of each batch.

        `kept_I` are the input features that a pruned consumer still reads; None means all.
        """
        assert self._inner is not None
        linear, layer = dense_linear(block), self.decoder.roles.consumer(sublayer)
        for first, x_BTD in self._residual(sublayer):
            inner_BTI = self._inner.read(first, self._batch)
            output_BTD = linear(layer, inner_BTI if kept_I is None else inner_BTI[..., kept_I])
            self._after.write(first, x_BTD + output_BTD)
            yield output_BTD
        self._inner.delete()

    def inner(self) -> Iterator[Tensor]:
        """Yield the consumer's inputs `[B, T, I]` that `run` kept, one batch at a time."""
        assert self._inner is not None
        for _, inner_BTI in self._inner.batches(self._batch):
            yield inner_BTI

    def run_sublayer(self, sublayer: Sublayer, block: Mapping[str, Tensor]) -> None:
        """Advance through an unchanged sublayer."""
        for _ in self.run(sublayer, block):
            pass
        self.advance(sublayer, block)

    def advance(self, sublayer: Sublayer, block: Mapping[str, Tensor], kept_I: Tensor | None = None) -> None:
        """Advance through the sublayer without looking at the outputs, see `advance_batches`."""
        for _ in self.advance_batches(sublayer, block, kept_I):
            pass

    def changes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the hidden states before and after the block, one batch at a time."""
        for first, before_BTD in self._before.batches(self._batch):
            yield before_BTD, self._after.read(first, self._batch)

    def results(self) -> Iterator[Tensor]:
        """Yield the hidden states after the block, one batch at a time."""
        for _, after_BTD in self._after.batches(self._batch):
            yield after_BTD

    def _residual(self, sublayer: Sublayer) -> Iterator[tuple[int, Tensor]]:
        states = self._before if sublayer == "attention" else self._after
        return states.batches(self._batch)

    def _states(self, index: int, hidden_size: int) -> ActivationFile:
        path = self._folder / f"{self._name}-{index:05d}.bin"
        return ActivationFile(path, *self._shape, hidden_size, self.decoder.dtype)
