"""How quantized layers are written; the only file that touches compressed-tensors.

Stock vLLM and transformers read `quantization_config` in config.json, which this file
makes with the library's own types, and the tensors beside it. A new format is a row in
`FORMATS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.quantize import Quantized


@dataclass(frozen=True)
class Format:
    """One quantized format as compressed-tensors names it."""

    preset: str
    """Name of the library's preset scheme, which fixes bits, symmetry and activation handling."""
    layout: str
    """The library's name for how the integers lie in the file."""
    num_bits: int


FORMATS: dict[str, Format] = {"w8a8": Format(preset="W8A8", layout="int-quantized", num_bits=8)}


def pack_layer(quantized: Quantized) -> dict[str, Tensor]:
    """Tensors of one linear layer by their suffix, in the int-quantized layout."""
    return {"weight": quantized.integers_OI, "weight_scale": quantized.scale_O1}


def quantization_config(format_name: str, ignored_layers: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a model whose linear layers, but the ignored, have the format."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    spec = FORMATS[format_name]
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(spec.preset, ["Linear"])},
        quant_method="compressed-tensors",
        quantization_status=QuantizationStatus.COMPRESSED,
        format=spec.layout,
        ignore=ignored_layers,
    )
    described: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return described
