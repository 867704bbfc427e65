"""W4A16: INT4 weights in groups with BF16 scales, with or without zero points; inputs stay in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slimserve.compress.families import input_sizes
from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.core.hardware import Hardware
from slimserve.core.model_config import has_experts, head_dim_of, num_kv_heads_of

_NOT_FOR_EXPERTS = 32
"""Group size that only vLLM's kernel for layers without experts has."""


class _W4A16(CompressedTensorsFormat):
    name = "w4a16"
    layout = "pack-quantized"
    num_bits = 4
    group_sizes = (128, 64, 32)
    has_zero_points = True
    allows_int8_head = True
    scale_dtype = torch.bfloat16

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        if not set(hardware.isa) & {"avx512f", "asimd"}:
            return "cannot run: vLLM's 4-bit CPU kernel needs AVX-512 or NEON"
        if has_experts(config):
            if "amx_tile" not in hardware.isa:
                return "cannot run: vLLM 0.32's kernel for INT4 experts needs AMX"
            if _NOT_FOR_EXPERTS in _group_sizes(config):
                return f"cannot run: vLLM 0.32's kernel for INT4 experts has no groups of {_NOT_FOR_EXPERTS} inputs"
        # vLLM computes q, k and v as one layer.
        qkv_outputs = (config["num_attention_heads"] + 2 * num_kv_heads_of(config)) * head_dim_of(config)
        odd = [size for size in (*input_sizes(config), qkv_outputs) if size % 32]
        if odd:
            return f"cannot run: the kernel needs sizes that are multiples of 32, but a layer has {odd[0]}"
        if "amx_tile" in hardware.isa:
            return "CPUWNA16LinearKernel with AMX; it rounds activations to INT8 unless VLLM_CPU_INT4_W4A8=0"
        return "CPUWNA16LinearKernel: unpacks weights to BF16 before the product, so it saves more memory than time"


W4A16 = _W4A16()


def _group_sizes(config: Mapping[str, Any]) -> set[int | None]:
    """Return the numbers of inputs in a group of the weights in a quantized model's config; None for a complete row."""
    groups = config.get("quantization_config", {}).get("config_groups", {})
    return {group["weights"].get("group_size") for group in groups.values()}
