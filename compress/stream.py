"""Hidden states of the calibration samples as they pass through a model that is being compressed.

For each sublayer of a block, a step can ask for the Hessians of the inputs of one group of linear layers after another.
Then the stream advances through the changed sublayer. Every layer is therefore compressed on the inputs that it will
get, which include the errors of earlier layers. What a sublayer's last layer reads, and what finished sublayers gave,
is kept, so that the model runs only once.

Shape suffixes: N sequences; B sequences of a batch; T tokens; D hidden size; I input features; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimserve.compress.activations import ActivationFile, Activations, Hessian
from slimserve.compress.decoder import Decoder, KeyValueHook, Sublayer, Visit
from slimserve.compress.device import make_store

_TOKENS_AT_ONCE = 2048
"""Tokens of one batch."""
_HESSIAN_BYTES = 2**29
"""Bytes of the Hessians that are summed at the same time, if a stage has more than one."""


class Stream:
    """Hidden states of all calibration sequences before and after one block, in files under `folder`."""

    def __init__(self, decoder: Decoder, folder: Path, tokens_NT: Tensor, name: str = "x") -> None:
        self.decoder = decoder
        self.tokens_NT = tokens_NT
        self._folder = folder
        self._name = name
        self._shape = (tokens_NT.shape[0], tokens_NT.shape[1])
        self._batch = max(1, _TOKENS_AT_ONCE // tokens_NT.shape[1])
        self._inner: tuple[str, Activations] | None = None
        self._outputs: dict[str, Activations] = {}
        self._branches: list[Stream] = []
        self.on_key_value: KeyValueHook | None = None
        """Hook of the KV cache for the next runs."""

    @torch.no_grad()
    def embed(self, outer: Mapping[str, Tensor]) -> None:
        """Write the hidden states before block 0, given the tensors outside the blocks."""
        states: ActivationFile | None = None
        for first in range(0, len(self.tokens_NT), self._batch):
            tokens_BT = self.tokens_NT[first : first + self._batch].to(self.decoder.device)
            x_BTD = self.decoder.embed(outer, tokens_BT)
            states = states or self._states(0, x_BTD.shape[2])
            states.write(first, x_BTD)

    def enter(self, index: int) -> None:
        """Move to block `index`; `embed` or `advance` has written the hidden states before it."""
        width = self.decoder.hidden_size
        self._before = self._states(index, width)
        self._after = self._states(index + 1, width)
        self._width, self._index = width, index
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
        branch.enter(self._index)
        self._branches.append(branch)
        return branch

    def skip_block(self, stream: Stream) -> None:
        """Leave the block out: the states after it are those that `stream` has before it."""
        for first in range(0, len(self.tokens_NT), self._batch):
            count = min(self._batch, len(self.tokens_NT) - first)
            self._after.write(first, stream._before.read(first, count))

    def hessians(
        self,
        sublayer: Sublayer,
        groups: Sequence[tuple[str, ...]],
        block: Mapping[str, Tensor],
        wants_peak: bool = False,
    ) -> Iterator[tuple[tuple[str, ...], Hessian]]:
        """Yield each group of layers and the Hessian of the inputs that they share; the groups are of one stage.

        The inputs of the sublayer's consumer are kept for `advance`.
        """
        if groups == ((sublayer.consumer,),):
            yield groups[0], self.consumer_hessian(sublayer, block, wants_peak)
            return
        for some in self._portions(groups, block):
            hessians = {
                group[0]: Hessian(
                    block[f"{group[0]}.weight"].shape[1],
                    f"block {self._index} {group[0]}",
                    wants_peak,
                    self.decoder.device,
                )
                for group in some
            }
            visit = Visit(
                shown=frozenset(hessians),
                show=lambda layer, x, hessians=hessians: hessians[layer].add(x),  # type: ignore[misc]
                stops_after=sublayer.path if sublayer.has_experts else None,
            )
            for _ in self._visits(block, visit):
                pass
            yield from ((group, hessians[group[0]]) for group in some)

    def run(self, sublayer: Sublayer, block: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Compute the inputs of the sublayer's consumer, keep them for `advance`, and yield `[B, T, I]` per batch."""
        consumer = sublayer.consumer
        assert consumer is not None
        shown: list[Tensor] = []
        visit = Visit(shown=frozenset([consumer]), show=lambda _, x: shown.append(x))
        path = self._folder / f"{self._name}-inner.bin"
        width = block[f"{consumer}.weight"].shape[1]
        self._inner = (consumer, make_store(path, *self._shape, width, self.decoder.dtype, self.decoder.device))
        for first, _ in self._visits(block, visit):
            inner_BTI = shown.pop().reshape(-1, self._shape[1], width)
            self._inner[1].write(first, inner_BTI)
            yield inner_BTI

    def consumer_hessian(self, sublayer: Sublayer, block: Mapping[str, Tensor], wants_peak: bool = False) -> Hessian:
        """Return the Hessian of the consumer's inputs and keep them for `advance`."""
        width = block[f"{sublayer.consumer}.weight"].shape[1]
        hessian = Hessian(width, f"block {self._index} {sublayer.consumer}", wants_peak, self.decoder.device)
        for inner_BTI in self.run(sublayer, block):
            hessian.add(inner_BTI)
        return hessian

    def advance_batches(
        self, sublayer: Sublayer, block: Mapping[str, Tensor], kept_I: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Advance through the sublayer and yield its outputs `[B, T, D]` of each batch; the last one ends the block.

        `kept_I` are the input features that a pruned consumer still reads; None means all.
        """
        is_last = sublayer.path == self.decoder.sublayers[self._index][-1].path
        visit = Visit(stops_after=None if is_last or not sublayer.path else sublayer.path)
        path = self._folder / f"{self._name}-{sublayer.path.replace('.', '-')}.bin"
        outputs = None
        if visit.stops_after:
            outputs = make_store(path, *self._shape, self._width, self.decoder.dtype, self.decoder.device)
        for first, states_BTD in self._visits(block, visit, kept_I):
            output_BTD = visit.kept.get(sublayer.path)
            if output_BTD is None and sublayer.consumer in visit.kept:
                output_BTD = visit.kept[sublayer.consumer].reshape(-1, self._shape[1], self._width)
            if is_last:
                assert states_BTD is not None
                self._after.write(first, states_BTD)
            if outputs is not None:
                assert output_BTD is not None
                outputs.write(first, output_BTD)
            if output_BTD is not None:
                yield output_BTD
        if self._inner is not None:
            self._inner[1].delete()
            self._inner = None
        if outputs is not None:
            self._outputs[sublayer.path] = outputs
        if is_last:
            for file in self._outputs.values():
                file.delete()
            self._outputs = {}

    def before_sublayer(self) -> Iterator[Tensor]:
        """Yield the hidden states before the block plus the outputs of its finished sublayers, one batch at a time."""
        device = self.decoder.device
        for first, states_BTD in self._before.batches(self._batch):
            states_BTD = states_BTD.to(device)
            for outputs in self._outputs.values():
                states_BTD = states_BTD + outputs.read(first, self._batch).to(device)
            yield states_BTD

    def inner(self) -> Iterator[Tensor]:
        """Yield the consumer's inputs `[B, T, I]` that `run` kept, one batch at a time."""
        assert self._inner is not None
        for _, inner_BTI in self._inner[1].batches(self._batch):
            yield inner_BTI.to(self.decoder.device)

    def run_block(self, block: Mapping[str, Tensor]) -> None:
        """Advance through an unchanged block."""
        for first, states_BTD in self._visits(block, Visit()):
            assert states_BTD is not None
            self._after.write(first, states_BTD)

    def advance(self, sublayer: Sublayer, block: Mapping[str, Tensor], kept_I: Tensor | None = None) -> None:
        """Advance through the sublayer without looking at the outputs, see `advance_batches`."""
        for _ in self.advance_batches(sublayer, block, kept_I):
            pass

    def changes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the hidden states before and after the block, one batch at a time."""
        for first, before_BTD in self._before.batches(self._batch):
            yield before_BTD.to(self.decoder.device), self._after.read(first, self._batch).to(self.decoder.device)

    def results(self) -> Iterator[Tensor]:
        """Yield the hidden states after the block, one batch at a time."""
        for _, after_BTD in self._after.batches(self._batch):
            yield after_BTD.to(self.decoder.device)

    def _visits(
        self, block: Mapping[str, Tensor], visit: Visit, kept_I: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor | None]]:
        """Run the block on every batch, with what is known about it; yield the first index and the states after it."""
        device = self.decoder.device
        for first, x_BTD in self._before.batches(self._batch):
            visit.outputs = {path: file.read(first, self._batch).to(device) for path, file in self._outputs.items()}
            if self._inner is not None and self._inner[0] not in visit.shown:
                inner_BTI = self._inner[1].read(first, self._batch).to(device)
                visit.inputs = {self._inner[0]: inner_BTI if kept_I is None else inner_BTI[..., kept_I]}
            visit.kept, visit.on_key_value = {}, self.on_key_value
            yield first, self.decoder.run(self._index, block, x_BTD.to(device), visit)

    def _portions(
        self, groups: Sequence[tuple[str, ...]], block: Mapping[str, Tensor]
    ) -> Iterator[list[tuple[str, ...]]]:
        """Yield the groups in portions whose Hessians fit into the memory for them."""
        portion: list[tuple[str, ...]] = []
        num_bytes = 0
        for group in groups:
            size = 4 * block[f"{group[0]}.weight"].shape[1] ** 2
            if portion and num_bytes + size > _HESSIAN_BYTES:
                yield portion
                portion, num_bytes = [], 0
            portion.append(group)
            num_bytes += size
        yield portion

    def _states(self, index: int, hidden_size: int) -> ActivationFile:
        path = self._folder / f"{self._name}-{index:05d}.bin"
        return ActivationFile(path, *self._shape, hidden_size, self.decoder.dtype)
