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

from slimserve.compress.activations import ActivationFile, Activations, Hessian, JoinedActivations
from slimserve.compress.decoder import Decoder, KeyValueHook, Sublayer, Visit
from slimserve.compress.device import make_store

_TOKENS_AT_ONCE = 2048
"""Tokens of one batch."""
_HESSIAN_BYTES = 2**29
"""Bytes of the Hessians that are summed at the same time, if a stage has more than one."""


class Stream:
    """Hidden states of all calibration sequences before and after one block, in files under `folder`.

    The sequences `short_MS`, if there are any, come after `tokens_NT`. They count in every sum and never share a batch
    with those.
    """

    def __init__(
        self, decoder: Decoder, folder: Path, tokens_NT: Tensor, name: str = "x", short_MS: Tensor | None = None
    ) -> None:
        self.decoder = decoder
        self._sequences = (tokens_NT,) if short_MS is None else (tokens_NT, short_MS)
        self._folder = folder
        self._name = name
        self._tokens_at_once = _TOKENS_AT_ONCE
        self._inner: tuple[str, Activations] | None = None
        self._outputs: dict[str, Activations] = {}
        self._branches: list[Stream] = []
        self.on_key_value: KeyValueHook | None = None
        """Hook of the KV cache for the next runs."""

    @torch.no_grad()
    def embed(self, outer: Mapping[str, Tensor]) -> None:
        """Write the hidden states before block 0, given the tensors outside the blocks."""
        states: Activations | None = None
        for first, tokens_BT in self._batches():
            x_BTD = self.decoder.embed(outer, tokens_BT.to(self.decoder.device))
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
        """Return a stream at the same block for a variation of the model.

        It has only the first `num_sequences` of `tokens_NT`. A new branch begins with `skip_block`. A branch of
        a name that exists continues with the states of that branch.
        """
        branch = Stream(self.decoder, self._folder, self._sequences[0][:num_sequences], name)
        branch.enter(self._index)
        self._branches.append(branch)
        return branch

    def skip_block(self, stream: Stream) -> None:
        """Leave the block out: the states after it are those that `stream` has before it."""
        for first, tokens_BT in self._batches():
            self._after.write(first, stream._before.read(first, len(tokens_BT)))

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
        width = block[f"{consumer}.weight"].shape[1]
        self._inner = (consumer, self._store("inner", width))
        for first, tokens_BT, _ in self._visits(block, visit):
            inner_BTI = shown.pop().reshape(*tokens_BT.shape, width)
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
        outputs = self._store(sublayer.path.replace(".", "-"), self._width) if visit.stops_after else None
        for first, tokens_BT, states_BTD in self._visits(block, visit, kept_I):
            output_BTD = visit.kept.get(sublayer.path)
            if output_BTD is None and sublayer.consumer in visit.kept:
                output_BTD = visit.kept[sublayer.consumer].reshape(*tokens_BT.shape, self._width)
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
        for first, tokens_BT in self._batches():
            states_BTD = self._before.read(first, len(tokens_BT)).to(device)
            for outputs in self._outputs.values():
                states_BTD = states_BTD + outputs.read(first, len(tokens_BT)).to(device)
            yield states_BTD

    def inner(self) -> Iterator[Tensor]:
        """Yield the consumer's inputs `[B, T, I]` that `run` kept, one batch at a time."""
        assert self._inner is not None
        yield from self._read(self._inner[1])

    def run_block(self, block: Mapping[str, Tensor]) -> None:
        """Advance through an unchanged block."""
        for first, _, states_BTD in self._visits(block, Visit()):
            assert states_BTD is not None
            self._after.write(first, states_BTD)

    def advance(self, sublayer: Sublayer, block: Mapping[str, Tensor], kept_I: Tensor | None = None) -> None:
        """Advance through the sublayer without looking at the outputs, see `advance_batches`."""
        for _ in self.advance_batches(sublayer, block, kept_I):
            pass

    def changes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the hidden states before and after the block, one batch at a time."""
        yield from zip(self._read(self._before), self._read(self._after), strict=True)

    def results(self) -> Iterator[Tensor]:
        """Yield the hidden states after the block, one batch at a time."""
        yield from self._read(self._after)

    def _visits(
        self, block: Mapping[str, Tensor], visit: Visit, kept_I: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Run the block on every batch, with what is known about it.

        Yield the index of the first sequence, the tokens `[B, T]`, and the states after the block.
        """
        device = self.decoder.device
        for first, tokens_BT in self._batches():
            count = len(tokens_BT)
            visit.outputs = {path: file.read(first, count).to(device) for path, file in self._outputs.items()}
            if self._inner is not None and self._inner[0] not in visit.shown:
                inner_BTI = self._inner[1].read(first, count).to(device)
                visit.inputs = {self._inner[0]: inner_BTI if kept_I is None else inner_BTI[..., kept_I]}
            visit.kept, visit.on_key_value = {}, self.on_key_value
            x_BTD = self._before.read(first, count).to(device)
            yield first, tokens_BT, self.decoder.run(self._index, block, x_BTD, visit)

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

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of the first sequence of each batch, and its tokens `[B, T]`."""
        first = 0
        for tokens_NT in self._sequences:
            for tokens_BT in tokens_NT.split(max(1, self._tokens_at_once // tokens_NT.shape[1])):
                yield first, tokens_BT
                first += len(tokens_BT)

    def _read(self, states: Activations) -> Iterator[Tensor]:
        """Yield one batch after another on the decoder's device."""
        for first, tokens_BT in self._batches():
            yield states.read(first, len(tokens_BT)).to(self.decoder.device)

    def _states(self, index: int, hidden_size: int) -> Activations:
        """Return the hidden states before block `index`: always in files, so that a build resumes."""
        stores = [
            ActivationFile(path, len(tokens_NT), tokens_NT.shape[1], hidden_size, self.decoder.dtype)
            for path, tokens_NT in self._files(f"{index:05d}")
        ]
        return JoinedActivations(stores)

    def _store(self, kind: str, width: int) -> Activations:
        """Return a store for activations that are needed only within a layer."""
        stores = [
            make_store(path, len(tokens_NT), tokens_NT.shape[1], width, self.decoder.dtype, self.decoder.device)
            for path, tokens_NT in self._files(kind)
        ]
        return JoinedActivations(stores)

    def _files(self, kind: str) -> Iterator[tuple[Path, Tensor]]:
        """Yield a path for each group of sequences of one length, and the group's tokens."""
        for name, tokens_NT in zip((self._name, f"{self._name}-short"), self._sequences, strict=False):
            yield self._folder / f"{name}-{kind}.bin", tokens_NT
