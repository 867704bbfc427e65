"""Base class of the formats that compressed-tensors defines and that stock vLLM and transformers read.

A format consists of `quantization_config` in config.json and of the tensors beside it. Both are written here instead of
by the library, because importing the library takes 5 s and 250 MiB, as much as the rest of a small build. Tests compare
them with the library's own compressors and types.

Shape suffixes: O output features; I input features; G groups of input features with one scale; T tokens; R rows; C
columns; P packed columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.compress.formats.interface import HEAD_TARGET, PackedLayer, QuantFormat, Rounding
from slimserve.compress.quantize import Grid, Quantized
from slimserve.core.errors import UserError

_FP8 = torch.float8_e4m3fn
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


class CompressedTensorsFormat(QuantFormat):
    """A format of compressed-tensors: weights on a grid, inputs in 16 bits or rounded per token at run time."""

    layout: str
    """The library's name for the layout of the tensors, such as `int-quantized`."""
    kind: Literal["int", "float"] = "int"
    """Type of the codes: integers or float8_e4m3fn."""
    scale_dtype: torch.dtype = torch.float32
    """Dtype in which vLLM holds scales; it would round finer ones while loading."""

    def make_grid(self, symmetric: bool = True, group_size: int | None = None) -> Grid:
        if not self.has_zero_points and not symmetric:
            raise self.refuse("symmetric", symmetric, "set symmetric = true")
        if group_size is not None and group_size not in self.group_sizes:
            choices = ", ".join(map(str, self.group_sizes))
            remedy = f"choose from {choices}, or leave it out" if choices else "leave it out"
            raise self.refuse("group_size", group_size, remedy)
        return Grid(self.kind, self.num_bits, symmetric, group_size, self.scale_dtype)

    def pack(self, weights: Sequence[Tensor], grid: Grid | None, rounding: Rounding) -> list[PackedLayer]:
        """Round the layers stacked along O: rows do not interact, and the method reads the Hessian only once."""
        assert grid is not None
        stacked = rounding(torch.cat([weight_OI.float() for weight_OI in weights]), grid)
        layers = stacked.split([len(weight_OI) for weight_OI in weights])
        return [PackedLayer(pack_codes(layer), layer.dequantize, layer.notes) for layer in layers]

    def unpack(self, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> Tensor:
        return unpack_codes(tensors, self.read_grid(quantization_config)).dequantize()

    def round_inputs(self, x_TI: Tensor) -> Tensor:
        """Round each token as vLLM does: scale = absmax / 127 or absmax / 448 in float32, ties to even.

        The fake quantization of compressed-tensors differs: it divides by 127.5.
        """
        if not self.rounds_activations:
            return x_TI
        x = x_TI.float()
        highest = 127.0 if self.kind == "int" else torch.finfo(_FP8).max
        peak_T1 = x.abs().amax(dim=-1, keepdim=True)
        scale_T1 = torch.where(peak_T1 > 0, peak_T1 / highest, torch.ones_like(peak_T1))
        codes = (x / scale_T1).clamp_(-highest, highest)
        codes = codes.round_() if self.kind == "int" else codes.to(_FP8).float()
        return (codes * scale_T1).to(x_TI.dtype)

    def layer_bytes(self, num_outputs: int, num_inputs: int, group_size: int | None, symmetric: bool) -> float:
        weights = num_outputs * num_inputs
        scales = num_outputs * (num_inputs // group_size if group_size else 1)
        bytes_per_scale: float = self.scale_dtype.itemsize + (0 if symmetric else self.num_bits / 8)
        return weights * self.num_bits / 8 + scales * bytes_per_scale

    def quantization_config(self, grid: Grid | None, ignored_layers: Sequence[str]) -> dict[str, Any]:
        assert grid is not None
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": self.scheme(grid, "Linear")},
            "ignore": list(ignored_layers),
        }

    def scheme(self, grid: Grid, target: str) -> dict[str, Any]:
        """Return the entry of `config_groups` for the layers that `target` names."""
        numbers = {"num_bits": self.num_bits, "type": self.kind}
        weights = numbers | {"symmetric": grid.symmetric, "strategy": "channel", "dynamic": False}
        if grid.group_size is not None:
            weights |= {"strategy": "group", "group_size": grid.group_size}
        scheme: dict[str, Any] = {"targets": [target], "weights": weights, "format": self.layout}
        if self.rounds_activations:
            scheme["input_activations"] = numbers | {"symmetric": True, "strategy": "token", "dynamic": True}
        return scheme

    def recognises(self, quantization_config: Mapping[str, Any]) -> bool:
        groups = _layer_groups(quantization_config)
        if quantization_config.get("quant_method") != "compressed-tensors" or len(groups) != 1:
            return False
        layout = groups[0].get("format") or quantization_config.get("format")
        has_activations = groups[0].get("input_activations") is not None
        num_bits = groups[0]["weights"]["num_bits"]
        return (layout, num_bits, has_activations) == (self.layout, self.num_bits, self.rounds_activations)

    def read_grid(self, quantization_config: Mapping[str, Any]) -> Grid:
        """Return the grid of the weights in a config that the format recognises.

        Raises UserError for what would be read wrongly: blocks that share a scale, group or dynamic activation
        ordering, and activations that are not rounded per token at run time.
        """
        (group,) = _layer_groups(quantization_config)
        weights = group["weights"]
        _expect(
            "strategy", weights.get("strategy"), {"channel", "group"} if self.group_sizes else {"channel", "tensor"}
        )
        # vLLM 0.32 refuses the other orders too: their columns are permuted by weight_g_idx.
        _expect("actorder", weights.get("actorder"), {None, False, "weight", "static"})
        if self.rounds_activations:
            for key, value in {"num_bits": 8, "dynamic": True, "symmetric": True, "strategy": "token"}.items():
                _expect(f"input_activations.{key}", group["input_activations"].get(key), {value})
        group_size = weights.get("group_size") if weights.get("strategy") == "group" else None
        return Grid(self.kind, self.num_bits, weights.get("symmetric", True), group_size, self.scale_dtype)


def pack_codes(quantized: Quantized) -> dict[str, Tensor]:
    """Return the tensors of a layer by their suffix, as the library's own compressors write them.

    8 bits: `weight` (int8 or float8_e4m3fn `[O, I]`) and `weight_scale`. 4 bits: `weight_packed` (int32, eight codes
    each along I), `weight_scale`, `weight_shape` (int64 `[2]`) and, for asymmetric grids, `weight_zero_point` (int32
    `[O/8, G]`, packed along O). Scales `[O, G]` have the grid's dtype.
    """
    scales = {"weight_scale": quantized.scale_OG.to(quantized.grid.scale_dtype)}
    if quantized.grid.num_bits == 8:
        return {"weight": quantized.codes_OI, **scales}
    packed = {
        "weight_packed": _pack_nibbles(quantized.codes_OI),
        **scales,
        "weight_shape": torch.tensor(quantized.codes_OI.shape),
    }
    if quantized.zero_OG is not None:
        packed["weight_zero_point"] = _pack_nibbles(quantized.zero_OG.T).T.contiguous()
    return packed


def unpack_codes(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """Return the layer of `pack_codes`, or of any other writer of the format."""
    scale_OG = tensors["weight_scale"].float()
    scale_OG = scale_OG[:, None] if scale_OG.dim() == 1 else scale_OG
    if grid.num_bits == 8:
        return Quantized(tensors["weight"], scale_OG, None, grid)
    codes_OI = _unpack_nibbles(tensors["weight_packed"], int(tensors["weight_shape"][1]))
    zero_OG = None
    if not grid.symmetric:
        zero_OG = _unpack_nibbles(tensors["weight_zero_point"].T, len(scale_OG)).T
    return Quantized(codes_OI, scale_OG, zero_OG, grid)


def _pack_nibbles(codes_RC: Tensor) -> Tensor:
    """Pack eight codes from -8 to 7 into each int32 along the columns, the first in the lowest bits."""
    nibbles_RC = functional.pad((codes_RC + 8).to(torch.int32), (0, -codes_RC.shape[1] % 8))
    return (nibbles_RC.unflatten(1, (-1, 8)) << _SHIFTS).sum(2, dtype=torch.int32)


def _unpack_nibbles(packed_RP: Tensor, num_columns: int) -> Tensor:
    nibbles_RC = ((packed_RP[:, :, None] >> _SHIFTS) & 15).flatten(1)[:, :num_columns]
    return (nibbles_RC - 8).to(torch.int8)


def _layer_groups(quantization_config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of layers that a config.json describes, without the group of an INT8 output layer."""
    groups = quantization_config.get("config_groups", {}).values()
    return [group for group in groups if group["targets"] != [HEAD_TARGET]]


def _expect(key: str, value: object, allowed: set[Any]) -> None:
    if isinstance(value, Mapping) or value not in allowed:
        names = ", ".join(sorted(map(str, allowed)))
        raise UserError(f"quantization_config {key}", value, "is not what slimserve reads", f"supported: {names}")
