"""Which kernel of vLLM each format will use on a machine, or why it cannot run: rules read from vLLM 0.32's source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slimserve.compress.families import input_sizes, with_sizes
from slimserve.compress.formats import FORMATS, layer_groups
from slimserve.core.hardware import Hardware

_GPU_CAPABILITY = {"fp8": "8.9"}
"""Formats without a CPU kernel of their own, and the least CUDA capability that has one."""


def gpu_only(format_name: str) -> str | None:
    """Why a format belongs on a GPU; None where a CPU has a kernel for it.

    vLLM does run fp8 on a CPU, through torch._scaled_mm, right but slow: SmolLM2-135M decoded 1.8 tokens/s against
    28 in bf16 (one thread, eager). GPUs of capability 7.5 to 8.8 compute it with bf16 activations.
    """
    capability = _GPU_CAPABILITY.get(format_name)
    if capability is None:
        return None
    return f"{format_name} needs a GPU of capability {capability} or newer to be fast; a CPU emulates it"


def format_of(config: Mapping[str, Any]) -> str | None:
    """The format that a config.json describes, by its name in recipes; None for a dense model."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if quantization.get("quant_method") == "bitsandbytes":
        return "int8-bnb" if quantization.get("load_in_8bit") else "nf4"
    layouts = {spec.layout: name for name, spec in FORMATS.items()}
    _, layout = layer_groups(quantization)
    return layouts.get(layout or "")


def explain_variant(hardware: Hardware, config: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say how this machine computes a model's linear layers."""
    name = format_of(config)
    where = hardware.gpus[0] if hardware.gpus else hardware.cpu
    yield f"on this machine ({where}):"
    yield f"  {name or 'bf16'}: {_explain(hardware, name, config)}"


def _explain(hardware: Hardware, name: str | None, config: Mapping[str, Any]) -> str:
    if hardware.gpus:
        return "vLLM chooses among its CUDA kernels at start (not measured by this project)"
    isa = set(hardware.isa)
    if name is not None and gpu_only(name):
        return f"runs, many times slower than bf16 (ChannelWiseTorchFP8ScaledMMLinearKernel): {gpu_only(name)}"
    if name in {"nf4", "int8-bnb"}:
        odd = [size for size in input_sizes(config) if size % 64]
        if name == "nf4" and odd:
            return f"gives wrong results: bitsandbytes' CPU code needs multiples of 64 inputs, and there is {odd[0]}"
        return "weights are dequantized for every product, by the package vllm-bnb-plugin: small, but slow"
    if name == "w8a8":
        if not isa & {"avx2", "avx512f", "asimd"}:
            return "cannot run: needs AVX2, AVX-512 or NEON"
        best = "AMX" if "amx_tile" in isa else "AVX-512 VNNI" if "avx512_vnni" in isa else "the baseline instructions"
        return f"oneDNN INT8 product (CPUInt8ScaledMMLinearKernel) with {best}"
    if name == "w4a16":
        if not isa & {"avx512f", "asimd"}:
            return "cannot run: vLLM's 4-bit CPU kernel needs AVX-512 or NEON"
        odd = [size for size in (*input_sizes(config), _qkv_size(config)) if size % 32]
        if odd:
            return f"cannot run: the kernel needs sizes that are multiples of 32, and there is {odd[0]}"
        if "amx_tile" in isa:
            return "CPUWNA16LinearKernel with AMX: rounds activations to int8 too, unless VLLM_CPU_INT4_W4A8=0"
        return "CPUWNA16LinearKernel: unpacks to bf16 and multiplies there, so it saves memory more than time"
    return "oneDNN bf16 product" + ("" if "avx512_bf16" in isa or "amx_tile" in isa else ", emulated in float32")


def _qkv_size(config: Mapping[str, Any]) -> int:
    """Output features of q, k and v, which vLLM computes as one layer."""
    sizes = with_sizes(config)
    return int((sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"]) * sizes["head_dim"])
