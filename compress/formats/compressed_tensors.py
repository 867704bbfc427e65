"""Base class of the formats that compressed-tensors defines and that stock vLLM and transformers read.

A format consists of `quantization_config` in config.json and of the tensors beside it. Both are written here instead of
by the library, because importing the library takes 5 s and 250 MiB, as much as the rest of a small build. Tests compare
them with the library's own compressors and types.

Shape suffixes: O output features; I input features; G groups of input features with one scale; T tokens; R rows; C
columns; P packed columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.compress.formats.interface import HEAD_TARGET, LayerSizes, PackedLayer, QuantFormat, Rounding
from slimserve.compress.quantize import Grid, Quantized, fp4_global_scale
from slimserve.core.errors import UserError

_FP8, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Values of the 4-bit floats by their code without the sign."""
_DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False}
"""Settings that a config.json may leave out."""


class CompressedTensorsFormat(QuantFormat):
    """A format of compressed-tensors: weights on a grid, inputs in 16 bits or rounded at run time."""

    layout: str
    """The library's name for the layout of the tensors, such as `int-quantized`."""
    kind: Literal["int", "float"] = "int"
    """Type of the codes: integers or floats."""
    scale_dtype: torch.dtype = torch.float32
    """Dtype in which vLLM holds scales; it would round finer ones while loading."""
    group_size: int | None = None
    """Input features per scale where a recipe has no choice."""
    block_rows: int = 1
    """Output features that share a scale."""
    inputs: Grid | None = None
    """Grid to which the engine rounds inputs; its scales come from each token, or from each group of a token."""
    allows_fp8_kv_cache = True

    @property
    def rounds_activations(self) -> bool:
        return self.inputs is not None

    @property
    def needs_input_peak(self) -> bool:
        return self.inputs is not None and self.inputs.scale_dtype == _FP8

    def make_grid(self, symmetric: bool = True, group_size: int | None = None) -> Grid:
        if not self.has_zero_points and not symmetric:
            raise self.refuse("symmetric", symmetric, "set symmetric = true")
        if group_size is not None and group_size not in self.group_sizes:
            choices = ", ".join(map(str, self.group_sizes))
            remedy = f"choose from {choices}, or leave it out" if choices else "leave it out"
            raise self.refuse("group_size", group_size, remedy)
        return self._grid(symmetric, group_size or self.group_size)

    def _grid(self, symmetric: bool, group_size: int | None) -> Grid:
        is_block = self.block_rows > 1
        return Grid(self.kind, self.num_bits, symmetric, group_size, self.scale_dtype, self.block_rows, is_block)

    def check_layers(self, layers: Mapping[str, LayerSizes]) -> None:
        if self.group_size is None:
            return
        for name, (_, num_inputs) in layers.items():
            if num_inputs % self.group_size:
                raise self.refuse_size(name, "inputs", num_inputs, self.group_size)

    def pack(self, weights: Sequence[Tensor], grid: Grid | None, rounding: Rounding) -> list[PackedLayer]:
        """Round the layers stacked along O: rows do not interact, and the method reads the Hessian only once.

        Layers are filled up with rows of zeros, so that no block has rows of two layers. A global scale is that of the
        complete stack, because vLLM fuses its layers and keeps only one.
        """
        assert grid is not None
        padded = [functional.pad(one.float(), (0, 0, 0, -len(one) % grid.block_rows)) for one in weights]
        stacked_OI = torch.cat(padded)
        if grid.scale_dtype == _FP8:
            grid = replace(grid, global_scale=fp4_global_scale(float(stacked_OI.abs().max())))
        layers = rounding(stacked_OI, grid).split([len(one) for one in padded])
        layers = [layer.head(len(one)) for layer, one in zip(layers, weights, strict=True)]
        return [PackedLayer(pack_codes(layer), layer.dequantize, layer.notes) for layer in layers]

    def unpack(self, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> Tensor:
        return unpack_codes(tensors, self.read_grid(quantization_config)).dequantize()

    def input_tensors(self, peak: float) -> dict[str, Tensor]:
        return {"input_global_scale": torch.tensor([fp4_global_scale(peak)])} if self.needs_input_peak else {}

    def round_inputs(self, x_TI: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Round as vLLM does, with scales from the largest magnitudes: peak / 127, peak / 448, or peak / 6.

        The fake quantization of compressed-tensors differs for integers: it divides by 127.5.
        """
        if self.inputs is None:
            return x_TI
        if self.needs_input_peak:
            return replace(self.inputs, global_scale=float(tensors["input_global_scale"].max())).nearest(x_TI)
        return self.inputs.nearest(x_TI)

    def layer_bytes(self, num_outputs: int, num_inputs: int, group_size: int | None, symmetric: bool) -> float:
        group_size = group_size or self.group_size
        num_groups = -(-num_inputs // group_size) if group_size else 1
        scales = -(-num_outputs // self.block_rows) * num_groups
        bytes_per_scale: float = self.scale_dtype.itemsize + (0 if symmetric else self.num_bits / 8)
        global_scales: float = 4 * ((self.scale_dtype == _FP8) + self.needs_input_peak)
        return num_outputs * num_inputs * self.num_bits / 8 + scales * bytes_per_scale + global_scales

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
        weights = _describe(grid, "channel") | {"dynamic": False}
        scheme: dict[str, Any] = {"targets": [target], "weights": weights, "format": self.layout}
        if self.inputs is not None:
            # The scale of an NVFP4 input has a part that is fixed, the global scale.
            dynamic = "local" if self.needs_input_peak else True
            scheme["input_activations"] = _describe(self.inputs, "token") | {"dynamic": dynamic}
        return scheme

    def recognises(self, quantization_config: Mapping[str, Any]) -> bool:
        groups = _layer_groups(quantization_config)
        if quantization_config.get("quant_method") != "compressed-tensors" or len(groups) != 1:
            return False
        weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
        layout = groups[0].get("format") or quantization_config.get("format")
        ours = None if self.inputs is None else (self.inputs.kind, self.inputs.num_bits)
        theirs = None if inputs is None else (inputs.get("type", "int"), inputs.get("num_bits"))
        is_block = weights.get("strategy") == "block"
        return (layout, weights["num_bits"], theirs, is_block) == (
            self.layout,
            self.num_bits,
            ours,
            self.block_rows > 1,
        )

    def read_grid(self, quantization_config: Mapping[str, Any]) -> Grid:
        """Return the grid of the weights in a config that the format recognises.

        Raises UserError for what would be read wrongly, such as other groups or blocks, group or dynamic activation
        ordering, and activations that are rounded in another way.
        """
        (group,) = _layer_groups(quantization_config)
        weights = group["weights"]
        described = _describe(self._grid(True, self.group_size), "channel")
        strategies = {described["strategy"]}
        if self.group_size is None:
            strategies |= {"group"} if self.group_sizes else {"tensor"}
        _expect("strategy", weights.get("strategy"), strategies)
        for key in ("group_size", "block_structure"):
            if key in described:
                _expect(key, weights.get(key), [described[key]])
        # vLLM 0.32 refuses the other orders too: their columns are permuted by weight_g_idx.
        _expect("actorder", weights.get("actorder"), {None, False, "weight", "static"})
        if self.inputs is not None:
            given = _DEFAULTS | group["input_activations"]
            for key, value in self.scheme(self._grid(True, self.group_size), "")["input_activations"].items():
                if key != "scale_dtype":
                    _expect(f"input_activations.{key}", given.get(key), [value])
        group_size = weights.get("group_size") if weights.get("strategy") == "group" else self.group_size
        return self._grid(weights.get("symmetric", True), group_size)


def _describe(grid: Grid, strategy: str) -> dict[str, Any]:
    """Return the library's words for a grid; `strategy` is that of a grid without groups."""
    described: dict[str, Any] = {"num_bits": grid.num_bits, "type": grid.kind, "symmetric": grid.symmetric}
    if grid.block_rows > 1:
        return described | {"strategy": "block", "block_structure": [grid.block_rows, grid.group_size]}
    if grid.group_size is None:
        return described | {"strategy": strategy}
    described |= {"strategy": "group", "group_size": grid.group_size}
    if grid.scale_dtype == _FP8:
        described |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    if grid.scale_dtype == _E8M0:
        described |= {"scale_dtype": "torch.uint8"}
    return described


def pack_codes(quantized: Quantized) -> dict[str, Tensor]:
    """Return the tensors of a layer by their suffix, as the library's own compressors write them.

    8 bits: `weight` (int8 or float8_e4m3fn `[O, I]`) and `weight_scale`. 4-bit integers: `weight_packed` (int32, eight
    codes each along I), `weight_scale`, `weight_shape` (int64 `[2]`) and, for asymmetric grids, `weight_zero_point`
    (int32 `[O/8, G]`, packed along O). 4-bit floats: `weight_packed` (uint8, two codes each along I), `weight_scale`
    and, if the scales are FP8, `weight_global_scale` (float32 `[1]`). Scales `[O, G]` have the grid's dtype; powers of
    two are uint8, the exponent plus 127. Rows that share a scale have it once.
    """
    grid = quantized.grid
    scale = (quantized.scale_OG[:: grid.block_rows] * grid.global_scale).to(grid.scale_dtype)
    scales = {"weight_scale": scale.view(torch.uint8) if grid.scale_dtype == _E8M0 else scale.contiguous()}
    if grid.num_bits == 8:
        return {"weight": quantized.codes_OI, **scales}
    if grid.kind == "float":
        if grid.scale_dtype == _FP8:
            scales["weight_global_scale"] = torch.tensor([grid.global_scale])
        return {"weight_packed": _pack_e2m1(quantized.codes_OI), **scales}
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
    scale_OG = tensors["weight_scale"]
    scale_OG = (scale_OG.view(_E8M0) if grid.scale_dtype == _E8M0 else scale_OG).float()
    scale_OG = scale_OG[:, None] if scale_OG.dim() == 1 else scale_OG
    if grid.num_bits == 8:
        codes_OI = tensors["weight"]
        return Quantized(codes_OI, scale_OG.repeat_interleave(grid.block_rows, 0)[: len(codes_OI)], None, grid)
    if grid.kind == "float":
        if grid.scale_dtype == _FP8:
            grid = replace(grid, global_scale=float(tensors["weight_global_scale"].max()))
        return Quantized(_unpack_e2m1(tensors["weight_packed"]), scale_OG / grid.global_scale, None, grid)
    codes_OI = _unpack_nibbles(tensors["weight_packed"], int(tensors["weight_shape"][1]))
    zero_OG = None
    if not grid.symmetric:
        zero_OG = _unpack_nibbles(tensors["weight_zero_point"].T, len(scale_OG)).T
    return Quantized(codes_OI, scale_OG, zero_OG, grid)


def _pack_nibbles(codes_RC: Tensor) -> Tensor:
    """Pack eight codes from -8 to 7 into each int32 along the columns, the first in the lowest bits."""
    nibbles_RC = functional.pad((codes_RC + 8).to(torch.int32), (0, -codes_RC.shape[1] % 8))
    return (nibbles_RC.unflatten(1, (-1, 8)) << _SHIFTS.to(nibbles_RC.device)).sum(2, dtype=torch.int32)


def _unpack_nibbles(packed_RP: Tensor, num_columns: int) -> Tensor:
    nibbles_RC = ((packed_RP[:, :, None] >> _SHIFTS.to(packed_RP.device)) & 15).flatten(1)[:, :num_columns]
    return (nibbles_RC - 8).to(torch.int8)


def _pack_e2m1(codes_RC: Tensor) -> Tensor:
    """Pack two 4-bit floats into each uint8 along the columns, the first in the lower bits; zero has no sign."""
    values_RC = codes_RC.float()
    nibbles_RC = torch.searchsorted(_E2M1.to(values_RC.device), values_RC.abs().contiguous()) + 8 * (values_RC < 0)
    return (nibbles_RC[:, ::2] + 16 * nibbles_RC[:, 1::2]).to(torch.uint8)


def _unpack_e2m1(packed_RP: Tensor) -> Tensor:
    nibbles_RC = torch.stack((packed_RP & 15, packed_RP >> 4), dim=2).flatten(1).long()
    return torch.cat((_E2M1, -_E2M1)).to(nibbles_RC.device)[nibbles_RC].to(_FP8)


def _layer_groups(quantization_config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of layers that a config.json describes, without the group of an INT8 output layer."""
    groups = quantization_config.get("config_groups", {}).values()
    return [group for group in groups if group["targets"] != [HEAD_TARGET]]


def _expect(key: str, value: object, allowed: Sequence[Any] | set[Any]) -> None:
    if not any(value == one for one in allowed):
        names = ", ".join(sorted(map(str, allowed)))
        raise UserError(f"quantization_config {key}", value, "is not what slimserve reads", f"supported: {names}")
