"""Interfaces of a recipe's steps for the build, which walks over the blocks of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from slimserve.compress.decoder import Block
from slimserve.compress.stream import Stream

Detail = dict[str, Any]
"""Results of a step for one block, plain JSON."""


class Visitor(Protocol):
    """An object that gets one block after another on a walk over a checkpoint."""

    needs_data: bool
    """True if `on_block` needs the stream of calibration data."""
    wants_dense: bool
    """True if `on_block` also needs the stream through the model as it was before the walk."""
    wants_short: bool
    """True if the streams should also hold short sequences that start with many different tokens."""

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        """Return the changed block and its detail. A stream that is given must be advanced past the block."""
        ...


class BoundStep(Visitor, Protocol):
    """One step of a recipe for one model."""

    name: str
    planned_config: dict[str, Any]
    """Config with the sizes that the step will leave, for checking the steps after it."""

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        """Return the block to write, given the details of all blocks, or None to leave the block out.

        `original` reads the block as it was before the step. By default every block is written.
        """
        return block

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors to write, by full name, for a tensor outside the blocks; by default the tensor itself."""
        return {name: tensor}

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        """Return the model's config.json after the step, given the one before it."""
        ...

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        """Return the step's entry in the manifest, plain JSON."""
        ...
