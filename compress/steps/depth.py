"""Pruning the depth: which decoder blocks to leave out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.compress.families import SUBLAYERS
from slimserve.compress.forward import Block
from slimserve.compress.steps.interface import Detail
from slimserve.compress.stream import Stream
from slimserve.core.errors import UserError

_SEARCH_SEQUENCES = 8
"""Calibration sequences on which a search for the block to remove compares its candidates."""


class PruneDepthStep:
    """Whole blocks out: those whose output is most like their input (block influence, arXiv 2403.03853 §3.1)."""

    name = "prune_depth"
    method = "influence"
    needs_data = True
    wants_dense = False

    def __init__(self, config: Mapping[str, Any], num_removed: int) -> None:
        self._num_removed = num_removed
        self._depth = config["num_hidden_layers"]
        self.planned_config = {**config, "num_hidden_layers": self._depth - num_removed}

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        for sublayer in SUBLAYERS:
            stream.pass_sublayer(sublayer, block)
        similar = [
            functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
            for before, after in stream.changes()
        ]
        return block, {"influence": _finite(1 - float(torch.cat(similar).mean()), index)}

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        return None if index in self._removed(details) else block

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor}

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        config = {**before, "num_hidden_layers": self._depth - self._num_removed}
        if config.get("layer_types"):
            removed = self._removed(details)
            config["layer_types"] = [kind for i, kind in enumerate(config["layer_types"]) if i not in removed]
        return config

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
    """The one block out without which the last hidden states, normed, change least.

    Every candidate, the model without one block, flows along as a branch of the stream, so a pass costs about half
    as many block evaluations as the square of the depth, of the first few calibration sequences only.
    """

    method = "search"

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        branches = [stream.branch(f"without-{removed:05d}", _SEARCH_SEQUENCES) for removed in range(index + 1)]
        for sublayer in SUBLAYERS:
            stream.pass_sublayer(sublayer, block)
        for branch in branches[:-1]:
            for sublayer in SUBLAYERS:
                branch.pass_sublayer(sublayer, block)
        branches[-1].pass_over(stream)
        if index < self._depth - 1:
            return block, {}
        errors = [_finite(_normed_distance(stream, branch), removed) for removed, branch in enumerate(branches)]
        return block, {"error_without": errors}

    def _removed(self, details: Sequence[Detail]) -> set[int]:
        return _least(self._num_removed, details[-1]["error_without"])


def _finite(score: float, index: int) -> float:
    if not math.isfinite(score):
        raise UserError(
            "activations",
            f"around block {index}",
            "hold NaN or infinity",
            "check the model: does it generate sensible text as it is?",
        )
    return score


def _least(count: int, values: Sequence[float]) -> set[int]:
    """Indices of the smallest values; of equal ones the lower index."""
    return set(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])


def _normed_distance(stream: Stream, other: Stream) -> float:
    """Mean squared difference of the hidden states after the block, each state scaled to a root mean square of 1.

    Over the sequences that `other` has, which may be the first ones only.
    """
    total, count = 0.0, 0
    for two_BTD, one_BTD in zip(other.results(), stream.results(), strict=False):
        one_BTD, two_BTD = (
            functional.rms_norm(state.float(), state.shape[-1:]) for state in (one_BTD[: len(two_BTD)], two_BTD)
        )
        total += float((one_BTD - two_BTD).square().sum(dtype=torch.float64))
        count += one_BTD.numel()
    return total / count
