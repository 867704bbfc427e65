"""What every step of a recipe offers to the walk over a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from slimserve.compress.forward import Block
from slimserve.compress.stream import Stream

Detail = dict[str, Any]
"""What a step has to tell of one block; plain JSON."""


class Visitor(Protocol):
    """What sees one block after another on a walk through a model."""

    needs_data: bool
    wants_dense: bool
    """Whether it needs the stream through the model as it was before the walk, too."""

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        """The block as it leaves it. A given stream must be advanced past the block."""
        ...


class BoundStep(Visitor, Protocol):
    """One step of a recipe on one model."""

    name: str
    planned_config: dict[str, Any]
    """The sizes that the step will leave, for checking those after it."""

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        """The block as it is written, or None to leave it out, knowing the details of all blocks."""
        ...

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is written for a tensor outside the blocks, by full names."""
        ...

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        """The model's config.json after the step, given the one before it."""
        ...

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        """What the manifest says of the step."""
        ...
