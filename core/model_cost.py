"""The bytes and FLOPs of one token of a model, computed from the headers of its files.

Decoding one stream reads every weight once per token, so its roofline is memory bandwidth over bytes (Pope et al.
2022, arXiv 2211.05102, section 2). A prompt token costs two FLOPs per weight of the layers, so the roofline of
prefill is FLOP/s over FLOPs. Attention is not counted, so the prefill roofline is too high for long prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimserve.core.hardware import Hardware
from slimserve.core.model_config import kv_values_of, read_config
from slimserve.core.model_files import read_tensors
from slimserve.core.roofline import Precision, Roofline

_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "F8_E4M3", "F8_E5M2", "I8", "U8"), 1),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64"), 8),
}
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.")
_OUTPUT_LAYER = re.compile(r"(^|\.)lm_head\.")
_MATRIX = re.compile(r"\.(weight|weight_packed|qweight)$")


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model per token."""

    weight_bytes: int
    """Bytes of all tensors."""
    decode_bytes: int
    """Bytes of weights that a decode step reads: all but an embedding table that is not also the output layer."""
    prefill_flops: int
    """FLOPs of one prompt token in the layers; the output layer runs once per prompt and is not counted."""
    kv_bytes: int
    """Bytes of keys and values of one token of context, which each later token reads."""
    precision: Precision
    """Precision of the layers' activations, which decides the FLOP/s. If only weights are quantized, it is bf16."""

    def decode_tokens_per_s(self, hardware: Roofline) -> float:
        """Return the roofline of one stream with a short context, in tokens per second."""
        return hardware.bandwidth / self.decode_bytes

    def prefill_tokens_per_s(self, hardware: Roofline) -> float | None:
        """Return the roofline of prefill in prompt tokens per second; None if the hardware's FLOP/s are unknown."""
        flops = hardware.flops(self.precision)
        return flops / self.prefill_flops if flops else None


def read_model_cost(directory: Path, hardware: Hardware | None = None) -> ModelCost:
    """Add up the safetensors headers of a Hugging Face model; raises OSError, UserError or KeyError.

    On `hardware` that serves the model in float32, every value takes four bytes.
    """
    config = read_config(directory)
    is_float32 = hardware is not None and hardware.serves_in_float32(config)
    quantization = config.get("quantization_config") or {}
    tensors = {name: (header.dtype, header.shape) for name, header in read_tensors(directory).items()}
    has_output_layer = any(_OUTPUT_LAYER.search(name) for name in tensors)
    sizes = {
        name: math.prod(shape) * (4 if is_float32 else _DTYPE_BYTES.get(dtype, 2))
        for name, (dtype, shape) in tensors.items()
    }
    weight_bytes = sum(sizes.values())
    embedding_bytes = sum(size for name, size in sizes.items() if _EMBEDDING.search(name))
    num_weights = sum(
        _num_values(name, tensors, sizes[name], quantization)
        for name, (_, shape) in tensors.items()
        if _MATRIX.search(name) and len(shape) > 1 and not _EMBEDDING.search(name) and not _OUTPUT_LAYER.search(name)
    )
    return ModelCost(
        weight_bytes=weight_bytes,
        decode_bytes=weight_bytes - (embedding_bytes if has_output_layer else 0),
        prefill_flops=2 * num_weights,
        kv_bytes=(4 if is_float32 else 2) * kv_values_of(config),
        precision=_precision(quantization),
    )


def _num_values(
    name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], num_bytes: int, quantization: Mapping[str, Any]
) -> int:
    """Return the number of weights that a tensor holds, of which several may share an element."""
    dtype, shape = tensors[name]
    if f"{name}.absmax" in tensors:  # bitsandbytes packs two 4-bit codes into a byte, whatever the dtype
        return 2 * num_bytes
    return math.prod(shape) * (32 // _num_bits(quantization) if dtype == "I32" else 1)


def _num_bits(quantization: Mapping[str, Any]) -> int:
    """Return the bits of a weight if several are packed into an int32, else 32."""
    bits = [group["weights"]["num_bits"] for group in _layer_groups(quantization) if group.get("weights")]
    return min(bits, default=int(quantization.get("bits") or 32))


def _precision(quantization: Mapping[str, Any]) -> Precision:
    """Return the precision of the activations that a `quantization_config` describes."""
    inputs = [group.get("input_activations") or {} for group in _layer_groups(quantization)]
    kinds = {one.get("type") for one in inputs if one.get("num_bits") == 8}
    if "int" in kinds or quantization.get("load_in_8bit"):
        return "int8"
    # vLLM's own FP8 checkpoints have no groups; `activation_scheme` says how they round their inputs.
    return "float8" if "float" in kinds or "activation_scheme" in quantization else "bf16"


def _layer_groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of compressed-tensors without one for the output layer alone, which prefill does not count."""
    groups: list[Mapping[str, Any]] = list((quantization.get("config_groups") or {}).values())
    return [
        group
        for group in groups
        if not all(str(target).endswith("lm_head") for target in group.get("targets") or ["Linear"])
    ]
