"""Shapes that meet a size or speed budget: their costs, and a ranking by estimated output error.

A walk over the model (`ErrorProfile`) gives the error curves of every block: the loss of the step's pruning method at
several MLP widths and at each number of KV groups, and the error of leaving the block out. All are relative to the
hidden states. The sum over the blocks ranks the shapes; `budget_search.py` builds and evaluates the best ones.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from slimserve.compress.decoder import Block, Decoder, decoder_of
from slimserve.compress.families import without_layers
from slimserve.compress.formats import get_format
from slimserve.compress.formats.head import head_bytes
from slimserve.compress.recipe import AnyStep, Keep, Prune, PruneDepth, Quantize
from slimserve.compress.roles import Kind, PruneRole, find_role
from slimserve.core.errors import UserError

NUM_FINALISTS = 3
"""Shapes that are built and evaluated."""
_NUM_WIDTHS = 13
"""MLP widths at which the error curves are measured."""
_MIN_WIDTH_FRAC = 0.25
"""Smallest fraction of the MLP width that the search considers."""
_MIN_DEPTH_FRAC = 0.5
"""The search keeps more than this fraction of the blocks."""
_TIMED_TOKENS = 512
"""Sequence length at which blocks are timed."""
_NUM_TIMINGS = 5


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that pruning changes."""

    width: int
    """Neurons of each MLP."""
    kv_groups: int
    """KV heads of each attention, each together with its query heads."""
    depth: int
    """Decoder blocks."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Return the shape of a model whose config states all sizes, see `with_sizes`."""
        return cls(config["intermediate_size"], config["num_key_value_heads"], config["num_hidden_layers"])

    def apply_to(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of the model in this shape; `config` must state all sizes."""
        dense, after = Shape.of(config), dict(config)
        if self.width < dense.width:
            after = find_role(config, "mlp").config(after, self.width)
        if self.kv_groups < dense.kv_groups:
            after = find_role(config, "attention").config(after, self.kv_groups)
        return without_layers(after, set(range(self.depth, dense.depth)))


def usable_roles(config: Mapping[str, Any]) -> dict[Kind, PruneRole]:
    """Return the units that a budget can remove. Raises UserError if there are neither neurons nor KV groups."""
    roles: dict[Kind, PruneRole] = {"mlp": find_role(config, "mlp")}
    with suppress(UserError):
        roles["attention"] = find_role(config, "attention")
    return roles


@dataclass(frozen=True)
class ShapeCandidate:
    """A shape that meets the budget."""

    shape: Shape
    estimated_error: float
    """Sum of the error curves of all blocks at this shape."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> ShapeCandidate:
        """Return the candidate from the output of `dataclasses.asdict`."""
        return cls(Shape(**raw["shape"]), raw["estimated_error"])

    def steps(self, step: Prune, dense: Shape) -> list[AnyStep]:
        """Return the recipe steps that prune the model to this shape with the settings of `step`, depth first."""
        steps: list[AnyStep] = []
        if self.shape.depth < dense.depth:
            steps.append(PruneDepth(step="prune_depth", num_blocks=dense.depth - self.shape.depth))
        if (self.shape.width, self.shape.kv_groups) != (dense.width, dense.kv_groups):
            removed = {
                "keep": None,
                "mlp_remove_frac": 1 - self.shape.width / dense.width,
                "kv_remove_frac": 1 - self.shape.kv_groups / dense.kv_groups,
            }
            steps.append(step.model_copy(update=removed))
        return steps


class Budget:
    """The budget `keep` for one model: the costs of shapes, and the largest shapes within the limit."""

    def __init__(
        self,
        keep: Keep,
        config: Mapping[str, Any],
        num_parameters: int,
        num_bytes: int,
        quantization: Quantize | None,
    ) -> None:
        """Measure the dense model; `config` must state all sizes, `num_bytes` is the size of its weight files."""
        self.dense = Shape.of(config)
        self._keep, self._config, self._quantization = keep, config, quantization
        self.roles = usable_roles(config)
        self._decoder = decoder_of(config)
        self._timer = BlockTimer(config) if keep.speedup is not None else None
        self._outside = num_parameters - self._block_weights(self.dense) * self.dense.depth
        """Parameters that pruning does not remove: embedding, head, norms and biases."""
        self._bytes_each = num_bytes / num_parameters
        if keep.speedup is not None:
            self.limit = 1 / keep.speedup
        elif keep.parameters is not None:
            self.limit = keep.parameters if keep.parameters > 1 else keep.parameters * num_parameters
        else:
            assert keep.bytes is not None
            self.limit = keep.bytes if keep.bytes > 1 else keep.bytes * num_bytes

    def cost(self, shape: Shape) -> float:
        """Return the cost in the unit of the limit: parameters, bytes, or time relative to the dense model."""
        if self._timer is not None:
            return self._timer.relative_seconds(shape)
        if self._keep.parameters is not None:
            return self._outside + self._block_weights(shape) * shape.depth
        outside = self._outside * self._bytes_each
        if self._quantization is None:
            return outside + self._block_weights(shape) * shape.depth * self._bytes_each
        return outside + self._quantized_bytes(shape, self._quantization)

    def _quantized_bytes(self, shape: Shape, step: Quantize) -> float:
        """Return the bytes of all blocks, at most what `keep_worst` leaves dense, and what an INT8 head adds."""
        layers = self._layer_sizes(shape)
        quant_format = get_format(step.format)
        group, _ = quant_format.choose_group_size(step.group_size, [inputs for _, inputs in layers.values()])
        sizes = {
            layer: quant_format.layer_bytes(outputs, inputs, group, step.symmetric)
            for layer, (outputs, inputs) in layers.items()
        }
        total = sum(sizes.values()) * shape.depth
        mlp = list(self.roles["mlp"].producers)
        dense = sum(math.prod(layers[layer]) for layer in mlp) * self._bytes_each
        total += step.keep_worst * (dense - sum(sizes[layer] for layer in mlp))
        if step.head == "int8":
            vocabulary, hidden = self._config["vocab_size"], self._config["hidden_size"]
            total += head_bytes(vocabulary, hidden)
            if not self._config.get("tie_word_embeddings", False):
                total -= vocabulary * hidden * self._bytes_each
        return total

    def shapes(self, multiple: int) -> list[Shape]:
        """Return for every depth and number of KV groups the widest MLP within the budget.

        MLP widths are multiples of `multiple`. Raises UserError if the dense model already meets the budget, and if no
        shape does.
        """
        dense = self.dense
        if self.cost(dense) <= self.limit:
            raise UserError(
                "keep", self._requested, "is met by the dense model already", "lower the budget, or remove the step"
            )
        narrowest = max(multiple, round(dense.width * _MIN_WIDTH_FRAC / multiple) * multiple)
        widths = [dense.width, *range((dense.width - 1) // multiple * multiple, narrowest - 1, -multiple)]
        shapes = []
        for depth in range(dense.depth, int(dense.depth * _MIN_DEPTH_FRAC), -1):
            for kv_groups in range(dense.kv_groups, self._fewest_groups - 1, -1):
                fitting = (Shape(width, kv_groups, depth) for width in widths)
                shape = next((shape for shape in fitting if self.cost(shape) <= self.limit), None)
                if shape is not None:
                    shapes.append(shape)
        if not shapes:
            least = self.cost(Shape(narrowest, self._fewest_groups, int(dense.depth * _MIN_DEPTH_FRAC) + 1))
            if self._keep.speedup is not None:
                raise UserError(
                    "keep", self._requested, f"is out of reach: the maximum is {1 / least:.2f}", "request less"
                )
            raise UserError("keep", self._requested, f"is out of reach: the minimum is {least:.0f}", "keep more")
        return shapes

    @property
    def _fewest_groups(self) -> int:
        return 1 if "attention" in self.roles else self.dense.kv_groups

    def _layer_sizes(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """Return the output and input features of each linear layer of a block."""
        shapes = self._decoder.block_shapes(0)
        sizes = {layer: shapes[f"{layer}.weight"] for layer in self._decoder.linears(0)}
        for kind, role in self.roles.items():
            sizes |= role.layer_sizes(self._decoder, shape.width if kind == "mlp" else shape.kv_groups)
        return {layer: (size[0], size[1]) for layer, size in sizes.items()}

    def _block_weights(self, shape: Shape) -> int:
        """Return the number of weights in a block's linear layers."""
        return sum(outputs * inputs for outputs, inputs in self._layer_sizes(shape).values())

    def measure(self, shape: Shape) -> float:
        """Return the cost of one shape; a time is measured again instead of interpolated."""
        if self._timer is None:
            return self.cost(shape)
        seconds: list[float] = self._timer.seconds([self.dense, shape])
        return seconds[1] / seconds[0] * shape.depth / self.dense.depth

    @property
    def _requested(self) -> str:
        return ", ".join(f"{name} = {value:g}" for name, value in self._keep if value is not None)


def rank(shapes: Sequence[Shape], dense: Shape, curves: Sequence[Mapping[str, Any]]) -> list[ShapeCandidate]:
    """Return all shapes by estimated error, least first; `curves` are the details of `ErrorProfile` for each block."""
    influence = [block["without"] for block in curves]
    by_influence = sorted(range(len(curves)), key=lambda index: (influence[index], index))
    candidates = []
    for shape in shapes:
        removed = set(by_influence[: dense.depth - shape.depth])
        error = sum(influence[index] for index in removed)
        for index, block in enumerate(curves):
            if index not in removed:
                error += _interpolate(block["mlp"], shape.width) + _interpolate(block["attention"], shape.kv_groups)
        candidates.append(ShapeCandidate(shape, error))
    return sorted(candidates, key=lambda candidate: candidate.estimated_error)


def profile_sizes(config: Mapping[str, Any]) -> dict[Kind, list[int]]:
    """Return the sizes of each sublayer at which the error curves are measured, from the dense size down."""
    dense = Shape.of(config)
    widths = {round(dense.width * (1 - (1 - _MIN_WIDTH_FRAC) * i / (_NUM_WIDTHS - 1))) for i in range(_NUM_WIDTHS)}
    return {"mlp": sorted(widths, reverse=True), "attention": list(range(dense.kv_groups, 0, -1))}


class BlockTimer:
    """Time of a shape's decoder blocks relative to the dense model's, measured in plain PyTorch on this machine.

    One block with random BF16 weights computes 512 tokens; widths between the measured ones are interpolated. Embedding
    and head are not included, because pruning does not change them.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config, self._dense = config, Shape.of(config)
        self._curves: dict[int, list[list[float]]] = {}

    def relative_seconds(self, shape: Shape) -> float:
        """Return the relative time of all blocks, from curves that are measured at their first use."""
        dense = self._dense
        if shape.kv_groups not in self._curves:
            widths = [dense.width, dense.width // 2, int(dense.width * _MIN_WIDTH_FRAC)]
            dense_block, *shapes = [
                Shape(dense.width, dense.kv_groups, 1),
                *(Shape(w, shape.kv_groups, 1) for w in widths),
            ]
            # Time each shape once: a second timing of the dense block would differ from the first.
            distinct = list(dict.fromkeys([dense_block, *shapes]))
            seconds = dict(zip(distinct, self.seconds(distinct), strict=True))
            self._curves[shape.kv_groups] = [[one.width, seconds[one] / seconds[dense_block]] for one in shapes]
        per_block: float = _interpolate(self._curves[shape.kv_groups], shape.width)
        return per_block * shape.depth / dense.depth

    @torch.inference_mode()
    def seconds(self, shapes: Sequence[Shape]) -> list[float]:
        """Return the median seconds of one block of each shape; the shapes are timed in turn."""
        decoders = [
            Decoder(Shape(shape.width, shape.kv_groups, 1).apply_to(self._config), torch.bfloat16) for shape in shapes
        ]
        x_1TD = torch.randn(1, _TIMED_TOKENS, decoders[0].hidden_size, dtype=torch.bfloat16)
        blocks = [_random_block(decoder) for decoder in decoders]
        taken: list[list[float]] = [[] for _ in shapes]
        for number in range(_NUM_TIMINGS + 1):
            for decoder, block, times in zip(decoders, blocks, taken, strict=True):
                start = time.perf_counter()
                decoder.run(0, block, x_1TD)
                if number:  # the first round is a warm-up
                    times.append(time.perf_counter() - start)
        return [statistics.median(times) for times in taken]


def _random_block(decoder: Decoder) -> Block:
    return {
        name: torch.randn(shape).mul_(0.02).bfloat16() if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
        for name, shape in decoder.block_shapes(0).items()
    }


def _interpolate(points: Sequence[Sequence[float]], at: int) -> float:
    """Interpolate linearly between `[x, y]` points of falling x; beyond the ends the value is constant."""
    for (right, high), (left, low) in pairwise(points):
        if left <= at <= right:
            return high + (low - high) * (right - at) / (right - left)
    return points[0][1] if at > points[0][0] else points[-1][1]
