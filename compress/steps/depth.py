"""Pruning the depth: removing decoder blocks. A new method is a class like `PruneDepthStep` and a row in `METHODS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from slimserve.compress.decoder import Block, decoder_of
from slimserve.compress.families import without_layers
from slimserve.compress.recipe import PruneDepth
from slimserve.compress.steps.interface import BoundStep, Detail
from slimserve.compress.stream import Stream
from slimserve.core.errors import UserError

_SEARCH_SEQUENCES = 8
"""Number of calibration sequences on which the search compares its candidates."""


class PruneDepthStep(BoundStep):
    """Remove the blocks whose output is most similar to their input (arXiv 2403.03853, section 3.1)."""

    name = "prune_depth"
    method = "influence"
    one_block_per_pass = False
    needs_data = True
    wants_dense = False
    wants_short = False

    def __init__(self, config: Mapping[str, Any], num_removed: int) -> None:
        self._num_removed = num_removed
        self._depth = config["num_hidden_layers"]
        # Which blocks go is not known yet; the plan needs only their number.
        self.planned_config = without_layers(config, set(range(self._depth - num_removed, self._depth)))

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        stream.run_block(block)
        similar = [
            functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
            for before, after in stream.changes()
        ]
        return block, {"influence": _finite(1 - float(torch.cat(similar).mean()), index)}

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        return None if index in self._removed(details) else block

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        removed = self._removed(details)
        after = without_layers(before, removed)
        old, new = decoder_of(before), decoder_of(after)
        left = [index for index in range(self._depth) if index not in removed]
        if any(old.block_shapes(index) != new.block_shapes(number) for number, index in enumerate(left)):
            raise UserError(
                "num_blocks",
                self._num_removed,
                f"cannot be removed from a {before['model_type']}: the kind of a block follows from its number",
                "remove neurons instead, or only quantize",
            )
        return after

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        return {
            "method": self.method,
            "blocks_before": self._depth,
            "blocks_after": self._depth - self._num_removed,
            "removed_blocks": sorted(self._removed(details)),
            "per_block": list(details),
        }

    def _removed(self, details: Sequence[Detail]) -> set[int]:
        return _least(self._num_removed, [detail["influence"] for detail in details])


class SearchDepthStep(PruneDepthStep):
    """Remove the one block without which the last hidden states, normed, change least.

    Each candidate is the model without one block. All candidates are branches of the stream, so one pass costs about
    depth² / 2 block evaluations on the first few calibration sequences.
    """

    method = "search"
    one_block_per_pass = True

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        branches = [stream.branch(f"without-{removed:05d}", _SEARCH_SEQUENCES) for removed in range(index + 1)]
        stream.run_block(block)
        for branch in branches[:-1]:
            branch.run_block(block)
        branches[-1].skip_block(stream)
        if index < self._depth - 1:
            return block, {}
        errors = [_finite(_normed_distance(stream, branch), removed) for removed, branch in enumerate(branches)]
        return block, {"error_without": errors}

    def _removed(self, details: Sequence[Detail]) -> set[int]:
        return _least(self._num_removed, details[-1]["error_without"])


METHODS: dict[str, type[PruneDepthStep]] = {"influence": PruneDepthStep, "search": SearchDepthStep}
"""Classes of the methods by the name that a recipe gives them."""


def bind(step: PruneDepth, config: Mapping[str, Any], _seed: int) -> list[PruneDepthStep]:
    """Return the rounds of a depth-pruning step: one, or one per block if the method removes a single block per pass.

    Raises UserError if the method is unknown or no block would remain.
    """
    if step.method not in METHODS:
        raise UserError("method", step.method, "is not a depth-pruning method", f"choose from {', '.join(METHODS)}")
    depth, make = config["num_hidden_layers"], METHODS[step.method]
    if step.num_blocks >= depth:
        raise UserError("num_blocks", step.num_blocks, f"leaves none of {depth} blocks", "remove fewer")
    if not make.one_block_per_pass:
        return [make(config, step.num_blocks)]
    rounds: list[PruneDepthStep] = []
    for _ in range(step.num_blocks):
        rounds.append(make(rounds[-1].planned_config if rounds else config, 1))
    return rounds


def _finite(score: float, index: int) -> float:
    if not math.isfinite(score):
        raise UserError(
            "activations",
            f"around block {index}",
            "contain NaN or infinity",
            "check the model: does it generate sensible text as it is?",
        )
    return score


def _least(count: int, values: Sequence[float]) -> set[int]:
    """Return the indices of the `count` smallest values. The lower index wins a tie."""
    return set(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])


def _normed_distance(stream: Stream, other: Stream) -> float:
    """Return the mean squared difference of the hidden states after the block, each scaled to a root mean square of 1.

    The mean is over the sequences of `other`, which may have only the first ones.
    """
    total, count = 0.0, 0
    for other_BTD, own_BTD in zip(other.results(), stream.results(), strict=False):
        own_BTD, other_BTD = (
            functional.rms_norm(state.float(), state.shape[-1:]) for state in (own_BTD[: len(other_BTD)], other_BTD)
        )
        total += float((own_BTD - other_BTD).square().sum(dtype=torch.float64))
        count += own_BTD.numel()
    return total / count
