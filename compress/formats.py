"""How quantized layers are written; the only file that touches compressed-tensors.

Stock vLLM and transformers read `quantization_config` in config.json, which this file
makes with the library's own types, and the tensors beside it. A new format is a row in
`FORMATS`. `unpack_layer` reads a layer back from any checkpoint of these formats, whoever
wrote it. Shapes: O output features, I input features, G groups of inputs with one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.quantize import Grid, Quantized
from contracts.errors import UserError

GROUP_SIZES = (128, 64, 32)
"""Input features per scale that every vLLM kernel for 4 bits takes, largest first."""

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Activations:
    """How the engine rounds a layer's inputs: symmetric, one scale per token, found while it runs."""

    kind: Literal["int", "fp8"]
    """8-bit integers, or float8_e4m3fn."""

    def fake_quantize(self, x_TI: Tensor) -> Tensor:
        """Inputs as the engine's product sees them, `[..., I]` in the dtype given.

        As vLLM does it: scale = absmax / 127 or absmax / 448 in float32, ties to even. (compressed-tensors'
        own fake quantization divides by 127.5.)
        """
        x = x_TI.float()
        top = 127.0 if self.kind == "int" else torch.finfo(_FP8).max
        peak_T1 = x.abs().amax(dim=-1, keepdim=True)
        scale_T1 = torch.where(peak_T1 > 0, peak_T1 / top, torch.ones_like(peak_T1))
        codes = (x / scale_T1).clamp_(-top, top)
        codes = codes.round_() if self.kind == "int" else codes.to(_FP8).float()
        return (codes * scale_T1).to(x_TI.dtype)


@dataclass(frozen=True)
class Format:
    """One quantized format as compressed-tensors names it."""

    preset: str
    """Name of the library's preset scheme, which fixes bits and activation handling."""
    layout: str
    """The library's name for how the numbers lie in the file."""
    kind: Literal["int", "fp8"]
    num_bits: int
    scale_dtype: torch.dtype
    """What vLLM holds scales in; finer ones would be rounded when it loads them."""
    grouped: bool
    """Whether groups of inputs may share a scale, and scales have zero points; else one scale per row."""
    activations: Activations | None


FORMATS: dict[str, Format] = {
    "w8a8": Format("W8A8", "int-quantized", "int", 8, torch.float32, False, Activations("int")),
    "w4a16": Format("W4A16", "pack-quantized", "int", 4, torch.bfloat16, True, None),
    "fp8": Format("FP8_DYNAMIC", "float-quantized", "fp8", 8, torch.float32, False, Activations("fp8")),
}


def make_grid(format_name: str, symmetric: bool = True, group_size: int | None = None) -> Grid:
    """The grid of a format's weights; raises UserError for what the format cannot hold."""
    spec = FORMATS[format_name]
    if not spec.grouped and not symmetric:
        raise UserError("symmetric", symmetric, f"is not possible in {format_name}", "use w4a16, or symmetric = true")
    if not spec.grouped and group_size is not None:
        raise UserError("group_size", group_size, f"is not possible in {format_name}", "use w4a16, or leave it out")
    if group_size is not None and group_size not in GROUP_SIZES:
        choices = ", ".join(map(str, GROUP_SIZES))
        raise UserError("group_size", group_size, "is no size that kernels take", f"choose {choices} or leave it out")
    return Grid(spec.kind, spec.num_bits, symmetric, group_size, spec.scale_dtype)


def choose_group_size(requested: int | None, input_sizes: Sequence[int]) -> tuple[int | None, str]:
    """The largest group, at most `requested`, that divides the inputs of all layers, and a note if it is another.

    None stands for one scale per output channel: what was requested, or what is left where no group fits.
    """
    if requested is None:
        return None, ""
    fitting = [size for size in GROUP_SIZES if size <= requested and all(inputs % size == 0 for inputs in input_sizes)]
    chosen = fitting[0] if fitting else None
    if chosen == requested:
        return chosen, ""
    odd = next(inputs for inputs in input_sizes if inputs % requested)
    instead = f"groups of {chosen}" if chosen else "one scale per output channel"
    return chosen, f"groups of {requested} do not divide a layer of {odd} inputs: {instead} instead"


def pack_layer(quantized: Quantized) -> dict[str, Tensor]:
    """Tensors of one linear layer by their suffix, as the library's own compressors write them.

    8 bits: `weight` (int8 or float8_e4m3fn `[O, I]`) and `weight_scale`. 4 bits: `weight_packed` (int32, eight
    codes each along I), `weight_scale`, `weight_shape` (int64 `[2]`) and, where asymmetric, `weight_zero_point`
    (int32 `[O/8, G]`, packed along O). Scales `[O, G]` have the grid's dtype.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scales = {"weight_scale": quantized.scale_OG.to(quantized.grid.scale_dtype)}
    if quantized.grid.num_bits == 8:
        return {"weight": quantized.codes_OI, **scales}
    packed = {
        "weight_packed": pack_to_int32(quantized.codes_OI, quantized.grid.num_bits),
        **scales,
        "weight_shape": torch.tensor(quantized.codes_OI.shape),
    }
    if quantized.zero_OG is not None:
        zero = pack_to_int32(quantized.zero_OG, quantized.grid.num_bits, packed_dim=0)
        packed["weight_zero_point"] = zero.contiguous()
    return packed


def unpack_layer(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """A layer read back from the tensors of `pack_layer`, or of any other writer of the format."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scale_OG = tensors["weight_scale"].float()
    scale_OG = scale_OG[:, None] if scale_OG.dim() == 1 else scale_OG
    if grid.num_bits == 8:
        return Quantized(tensors["weight"], scale_OG, None, grid)
    shape = torch.Size(tensors["weight_shape"].tolist())
    codes_OI = unpack_from_int32(tensors["weight_packed"], grid.num_bits, shape)
    zero_OG = None
    if not grid.symmetric:
        zero_OG = unpack_from_int32(
            tensors["weight_zero_point"], grid.num_bits, torch.Size(scale_OG.shape), packed_dim=0
        )
    return Quantized(codes_OI, scale_OG, zero_OG, grid)


def quantization_config(format_name: str, grid: Grid, ignored_layers: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a model whose linear layers, but the ignored, are on `grid`."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        QuantizationStrategy,
        preset_name_to_scheme,
    )

    spec = FORMATS[format_name]
    scheme = preset_name_to_scheme(spec.preset, ["Linear"])
    weights = scheme.weights.model_dump()
    weights |= {"symmetric": grid.symmetric, "group_size": grid.group_size}
    weights["strategy"] = QuantizationStrategy.CHANNEL if grid.group_size is None else QuantizationStrategy.GROUP
    scheme.weights = type(scheme.weights).model_validate(weights)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        quant_method="compressed-tensors",
        quantization_status=QuantizationStatus.COMPRESSED,
        format=spec.layout,
        ignore=list(ignored_layers),
    )
    described: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return described


def read_scheme(quantization_config: Mapping[str, Any]) -> tuple[Grid, Activations | None]:
    """Grid of the weights and rounding of the activations that a config.json describes.

    Raises UserError for what none of `FORMATS` is, and what would be read wrongly: several groups of layers, other
    bits or layouts, blocks that share a scale, group/dynamic activation ordering, static or missing activations.
    """
    groups = list(quantization_config.get("config_groups", {}).values())
    layouts = {spec.layout: spec for spec in FORMATS.values()}
    layout = (groups[0].get("format") if groups else None) or quantization_config.get("format")
    if len(groups) != 1 or layout not in layouts or groups[0]["weights"]["num_bits"] != layouts[layout].num_bits:
        raise UserError(
            "quantization_config", layout, "is not a format that slimserve reads", f"supported: {', '.join(FORMATS)}"
        )
    spec, weights, inputs = layouts[layout], groups[0]["weights"], groups[0].get("input_activations")
    strategies = {"channel", "group"} if spec.grouped else {"channel", "tensor"}
    _expect("strategy", weights.get("strategy"), strategies)
    # vLLM 0.32 refuses these too: their columns are permuted by weight_g_idx.
    _expect("actorder", weights.get("actorder"), {None, False, "weight", "static"})
    if spec.activations is None:
        _expect("input_activations", inputs, {None})
    else:
        rounding = {key: (inputs or {}).get(key) for key in ("num_bits", "dynamic", "symmetric", "strategy")}
        expected = {"num_bits": 8, "dynamic": True, "symmetric": True, "strategy": "token"}
        for key, value in expected.items():
            _expect(f"input_activations.{key}", rounding[key], {value})
    group_size = weights.get("group_size") if weights.get("strategy") == "group" else None
    grid = Grid(spec.kind, spec.num_bits, weights.get("symmetric", True), group_size, spec.scale_dtype)
    return grid, spec.activations


def _expect(key: str, value: object, allowed: set[Any]) -> None:
    if isinstance(value, Mapping) or value not in allowed:
        names = ", ".join(sorted(map(str, allowed)))
        raise UserError(f"quantization_config {key}", value, "is not what slimserve reads", f"supported: {names}")
