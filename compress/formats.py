"""How quantized layers are written: the formats of compressed-tensors that stock vLLM and transformers read.

That is `quantization_config` in config.json and the tensors beside it. Both are written out here, and tests hold
them to the library's own compressors and types: importing these takes 5 s and 250 MiB, as much as the rest of a small
build. A new format is a row in `FORMATS`. `unpack_layer` reads a layer back from any checkpoint of these formats,
whoever wrote it. Shapes: O output features, I input features, G groups of inputs with one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.compress.quantize import Grid, Quantized, round_to_nearest
from slimserve.core.errors import UserError

GROUP_SIZES = (128, 64, 32)
"""Input features per scale that every vLLM kernel for 4 bits takes, largest first."""

HEAD_TARGET = "lm_head"
"""What vLLM calls a model's output layer."""

_FP8 = torch.float8_e4m3fn
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
_HEAD_FORMAT = "w8a8"
_HEAD_ROWS = 4096
"""Rows of an output layer rounded at once: a whole one in float32 may be a gigabyte."""


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
    "w8a8": Format("int-quantized", "int", 8, torch.float32, False, Activations("int")),
    "w4a16": Format("pack-quantized", "int", 4, torch.bfloat16, True, None),
    "fp8": Format("float-quantized", "fp8", 8, torch.float32, False, Activations("fp8")),
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


def layer_bytes(format_name: str, num_outputs: int, num_inputs: int, group_size: int | None, symmetric: bool) -> float:
    """Bytes of a linear layer's tensors in a file: codes, scales and zero points."""
    weights = num_outputs * num_inputs
    if format_name not in FORMATS:
        # bitsandbytes: a float32 per row of int8; per 64 weights of nf4 a byte, itself scaled in blocks of 256.
        return weights + 4 * num_outputs if format_name == "int8-bnb" else weights * (1 / 2 + 1 / 64 + 1 / 4096)
    spec = FORMATS[format_name]
    scales = num_outputs * (num_inputs // group_size if group_size else 1)
    bytes_per_scale: float = spec.scale_dtype.itemsize + (0 if symmetric else spec.num_bits / 8)
    return weights * spec.num_bits / 8 + scales * bytes_per_scale


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


def unpack_layer(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """A layer read back from the tensors of `pack_layer`, or of any other writer of the format."""
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
    """Eight codes of 4 bits, -8 to 7, per int32 along the columns, the first in the lowest bits; zeros fill up."""
    nibbles_RC = functional.pad((codes_RC + 8).to(torch.int32), (0, -codes_RC.shape[1] % 8))
    return (nibbles_RC.unflatten(1, (-1, 8)) << _SHIFTS).sum(2, dtype=torch.int32)


def _unpack_nibbles(packed_RP: Tensor, num_columns: int) -> Tensor:
    """The codes of `_pack_nibbles`, int8."""
    nibbles_RC = ((packed_RP[:, :, None] >> _SHIFTS) & 15).flatten(1)[:, :num_columns]
    return (nibbles_RC - 8).to(torch.int8)


def pack_head(weight_VD: Tensor) -> dict[str, Tensor]:
    """The output layer in W8A8, rounded to nearest: tensors by their suffix, as `pack_layer` gives them."""
    grid = make_grid(_HEAD_FORMAT)
    parts = [pack_layer(round_to_nearest(rows.float(), None, grid)) for rows in weight_VD.split(_HEAD_ROWS)]
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


def unpack_head(tensors: Mapping[str, Tensor]) -> tuple[Quantized, Activations]:
    """The output layer of `pack_head` read back, and how the engine rounds its inputs."""
    activations = FORMATS[_HEAD_FORMAT].activations
    assert activations is not None
    return unpack_layer(tensors, make_grid(_HEAD_FORMAT)), activations


def quantization_config(
    format_name: str, grid: Grid, ignored_layers: Sequence[str], int8_head: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of config.json for a model whose linear layers, but the ignored, are on `grid`.

    With `int8_head` the output layer is a group of its own, in W8A8.
    """
    spec = FORMATS[format_name]
    groups, layout = {"group_0": _scheme(spec, grid, "Linear")}, spec.layout
    if int8_head:
        head = FORMATS[_HEAD_FORMAT]
        groups["group_1"] = _scheme(head, make_grid(_HEAD_FORMAT), HEAD_TARGET)
        layout = spec.layout if head.layout == spec.layout else "mixed-precision"
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored_layers),
    }


def _scheme(spec: Format, grid: Grid, target: str) -> dict[str, Any]:
    """A group of layers in the library's words."""
    numbers = {"num_bits": spec.num_bits, "type": "int" if spec.kind == "int" else "float"}
    weights = numbers | {"symmetric": grid.symmetric, "strategy": "channel", "dynamic": False}
    if grid.group_size is not None:
        weights |= {"strategy": "group", "group_size": grid.group_size}
    scheme: dict[str, Any] = {"targets": [target], "weights": weights, "format": spec.layout}
    if spec.activations is not None:
        scheme["input_activations"] = numbers | {"symmetric": True, "strategy": "token", "dynamic": True}
    return scheme


def layer_groups(quantization_config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Groups of layers that a config.json describes, without that of an INT8 head, and the first one's layout."""
    described = quantization_config.get("config_groups", {}).values()
    groups = [group for group in described if group["targets"] != [HEAD_TARGET]]
    return groups, (groups[0].get("format") if groups else None) or quantization_config.get("format")


def read_scheme(quantization_config: Mapping[str, Any]) -> tuple[Grid, Activations | None]:
    """Grid of the weights and rounding of the activations that a config.json describes, an INT8 head left aside.

    Raises UserError for what none of `FORMATS` is, and what would be read wrongly: several groups of layers, other
    bits or layouts, blocks that share a scale, group/dynamic activation ordering, static or missing activations.
    """
    groups, layout = layer_groups(quantization_config)
    layouts = {spec.layout: spec for spec in FORMATS.values()}
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
