"""A calibration set on its way through a model, block by block and half by half, as a step changes the blocks.

For each half of a block a step may ask for the Hessian of what its producers read, then of what its
consumer reads, and then lets the stream advance through the half as it has become. So every layer is
chosen on what it will really read, errors of the layers before included, and the model runs only once.
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


class Stream:
    """Hidden states of all calibration sequences before one block, in files under `folder`."""

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
        """Make the hidden states before block 0."""
        states = self._states(0, embedding_VD.shape[1])
        for first in range(0, len(self.tokens_NT), self._batch):
            states.write(first, embedding_VD[self.tokens_NT[first : first + self._batch]])

    def enter(self, index: int, hidden_size: int) -> None:
        """Stand before block `index`, whose hidden states an earlier `advance` or `embed` left on disk."""
        self._before = self._states(index, hidden_size)
        self._after = self._states(index + 1, hidden_size)
        self._width, self._index = hidden_size, index
        self._branches = []

    def leave(self) -> None:
        """Forget the hidden states before the block, of branches too, once those after it are safe."""
        for stream in (self, *self._branches):
            stream._before.delete()

    def branch(self, name: str, num_sequences: int) -> Stream:
        """A stream of its own that stands before the same block: of a model that differs in an earlier block.

        It has the first `num_sequences` only. A new branch begins with `pass_over`; one that has been there before
        goes on where it stood.
        """
        branch = Stream(self.decoder, self._folder, self.tokens_NT[:num_sequences], name)
        branch.enter(self._index, self._width)
        self._branches.append(branch)
        return branch

    def pass_over(self, stream: Stream) -> None:
        """Stand after the block with the hidden states that `stream` has before it: leave the block out."""
        for first in range(0, len(self.tokens_NT), self._batch):
            count = min(self._batch, len(self.tokens_NT) - first)
            self._after.write(first, stream._before.read(first, count))

    def producer_hessian(
        self, sublayer: Sublayer, block: Mapping[str, Tensor], layer: str, wants_peak: bool = False
    ) -> Hessian:
        """Hessian of what the half's producers read; `layer` names them in an error."""
        hessian = Hessian(self._width, layer, wants_peak)
        for _, x_BTD in self._residual(sublayer):
            hessian.add(self.decoder.producer_input(sublayer, block, x_BTD))
        return hessian

    def run(self, sublayer: Sublayer, block: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Compute what the half's consumer reads and keep it for `advance`; yields it batch by batch."""
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
        """Hessian of what the half's consumer reads; `layer` names it in an error."""
        hessian = Hessian(block[f"{self.decoder.roles.consumer(sublayer)}.weight"].shape[1], layer)
        for _, inner_BTI in self.run(sublayer, block):
            hessian.add(inner_BTI)
        return hessian

    def advance(
        self, sublayer: Sublayer, block: Mapping[str, Tensor], kept_I: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Add the consumer's outputs to the hidden states; yields them batch by batch, `[B, T, D]`.

        `kept_I` are the columns of what `run` kept that the consumer still reads; None: all.
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
        """What `run` kept, batch by batch, `[B, T, I]`."""
        assert self._inner is not None
        for _, inner_BTI in self._inner.batches(self._batch):
            yield inner_BTI

    def pass_sublayer(self, sublayer: Sublayer, block: Mapping[str, Tensor]) -> None:
        """Go through a half as it is."""
        for _ in self.run(sublayer, block):
            pass
        self.skip(sublayer, block)

    def skip(self, sublayer: Sublayer, block: Mapping[str, Tensor], kept_I: Tensor | None = None) -> None:
        """`advance` for those who do not look at the outputs."""
        for _ in self.advance(sublayer, block, kept_I):
            pass

    def changes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states before and after the block, batch by batch."""
        for first, before_BTD in self._before.batches(self._batch):
            yield before_BTD, self._after.read(first, self._batch)

    def results(self) -> Iterator[Tensor]:
        """Hidden states after the block, batch by batch."""
        for _, after_BTD in self._after.batches(self._batch):
            yield after_BTD

    def _residual(self, sublayer: Sublayer) -> Iterator[tuple[int, Tensor]]:
        states = self._before if sublayer == "attention" else self._after
        return states.batches(self._batch)

    def _states(self, index: int, hidden_size: int) -> ActivationFile:
        path = self._folder / f"{self._name}-{index:05d}.bin"
        return ActivationFile(path, *self._shape, hidden_size, self.decoder.dtype)
