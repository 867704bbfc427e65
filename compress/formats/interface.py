"""Interface of a quantization format: one object that knows everything about the format.

To add a format, subclass `QuantFormat` (or `CompressedTensorsFormat`, if that library has a layout for it) in a file of
this package and add the object to `_BUILT_IN` in `__init__.py`. A program can call `register_format` instead. Recipes,
the build, the reference, the budget search, `slimserve check` and `slimserve inspect` ask only the object.

Shape suffixes: O output features; I input features; T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slimserve.compress.quantize import Grid, Quantized
from slimserve.core.errors import UserError
from slimserve.core.hardware import Hardware

HEAD_TARGET = "lm_head"
"""vLLM's name for the output layer of a model."""

LayerSizes = tuple[int, int]
"""Output and input features of a linear layer."""

Rounding = Callable[[Tensor, Grid], Quantized]
"""Rounds a weight `[O, I]` float32 to a grid by the recipe's method, on the inputs that the layer reads."""


@dataclass(frozen=True)
class PackedLayer:
    """One linear layer in a format."""

    tensors: dict[str, Tensor]
    """Tensors of the checkpoint by the suffix after the layer's name, such as `weight` and `weight_scale`."""
    dequantize: Callable[[], Tensor]
    """Returns the weight `[O, I]` float32 that the engine computes with."""
    notes: dict[str, int | float] = field(default_factory=dict)
    """Deviations of the rounding from the recipe, see `Quantized.notes`."""


class QuantFormat(ABC):
    """One quantization format of linear layers. The objects hold no state and can be shared."""

    name: str
    """Value of the recipe key `quantize.format`."""
    num_bits: int
    """Bits of one weight."""
    group_sizes: tuple[int, ...] = ()
    """Input features per scale that the kernels support, largest first; empty means one scale per output feature."""
    has_zero_points: bool = False
    """Whether `symmetric = false` is possible."""
    has_fixed_rounding: bool = False
    """Whether the format's own library rounds, so that a recipe cannot choose the method."""
    allows_int8_head: bool = False
    """Whether vLLM loads the format beside an INT8 output layer."""
    allows_fp8_kv_cache: bool = False
    """Whether config.json can describe an FP8 KV cache beside the format."""
    needs_gpu: bool = False
    """Whether `slimserve check` leaves out vLLM on a machine without a GPU, because it has no general CPU kernel."""
    gpu_reason: str | None = None
    """Reason to run the format on a GPU only; None if vLLM has a fast CPU kernel for it."""

    @property
    def rounds_activations(self) -> bool:
        """Whether the engine rounds the inputs of a layer too, see `round_inputs`."""
        return False

    @property
    def needs_input_peak(self) -> bool:
        """Whether the format stores the range of a layer's inputs, which takes calibration data."""
        return False

    def make_grid(self, symmetric: bool = True, group_size: int | None = None) -> Grid | None:
        """Return the grid of the weights; None for fixed rounding. UserError names a setting that is impossible."""
        return None

    def check_layers(self, layers: Mapping[str, LayerSizes]) -> None:
        """Raise UserError that names a layer whose sizes are impossible in this format.

        `layers` read the same input; engines fuse them into one layer, in this order.
        """
        return

    def choose_group_size(self, requested: int | None, input_sizes: Sequence[int]) -> tuple[int | None, str]:
        """Return the largest group, at most `requested`, that divides the inputs of all layers, and a note.

        None stands for one scale per output feature. The note is empty if the result equals `requested`.
        """
        if requested is None:
            return None, ""
        fitting = [
            size for size in self.group_sizes if size <= requested and all(inputs % size == 0 for inputs in input_sizes)
        ]
        chosen = fitting[0] if fitting else None
        if chosen == requested:
            return chosen, ""
        odd = next(inputs for inputs in input_sizes if inputs % requested)
        instead = f"groups of {chosen}" if chosen else "one scale per output channel"
        return chosen, f"groups of {requested} do not divide a layer with {odd} inputs; used {instead} instead"

    @abstractmethod
    def pack(self, weights: Sequence[Tensor], grid: Grid | None, rounding: Rounding) -> list[PackedLayer]:
        """Round and pack the layers that share an input. Weights are `[O, I]` in any float dtype."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> Tensor:
        """Return the weight `[O, I]` float32 of a layer in a checkpoint; it may come from another writer.

        Raises UserError if the config describes a variation that would be read wrongly.
        """

    def input_tensors(self, peak: float) -> dict[str, Tensor]:
        """Return the tensors that describe a layer's inputs, by suffix; `peak` is the largest calibrated magnitude.

        Only called if `needs_input_peak`. Layers that read the same input get the same tensors.
        """
        return {}

    def round_inputs(self, x_TI: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the inputs `[..., I]` as the engine's product sees them, in the same dtype.

        `tensors` are those of the layer, by suffix; formats that store nothing about inputs do not read them.
        """
        return x_TI

    @abstractmethod
    def layer_bytes(self, num_outputs: int, num_inputs: int, group_size: int | None, symmetric: bool) -> float:
        """Return the bytes of a layer's tensors in a checkpoint."""

    @abstractmethod
    def quantization_config(self, grid: Grid | None, ignored_layers: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config` of config.json for a model whose linear layers have the format.

        `ignored_layers` stay dense.
        """

    @abstractmethod
    def recognises(self, quantization_config: Mapping[str, Any]) -> bool:
        """Tell whether a config.json describes this format."""

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        """Return one line on how vLLM computes this format on the CPU; `config` is the model's config.json."""
        if self.needs_gpu:
            return f"cannot run: {self.gpu_reason}"
        return "vLLM chooses a kernel at start; slimserve knows no rule for this format"

    def refuse(self, key: str, value: object, remedy: str) -> UserError:
        """Return the error for a recipe key that the format does not have."""
        return UserError(key, value, f"is not possible in {self.name}", remedy)

    def refuse_size(self, layer: str, dimension: str, size: int, multiple: int) -> UserError:
        """Return the error for a layer with `size` features in a dimension, which must be a multiple of a number."""
        return UserError(
            f"{dimension} of {layer}",
            size,
            f"are no multiple of {multiple}, as {self.name} needs",
            f"prune to a multiple of {multiple} if the recipe prunes, or use a format without this limit, such as w8a8",
        )
