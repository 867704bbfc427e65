"""Kernel that vLLM uses for a model's linear layers on a machine; the rules come from vLLM 0.32's source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slimserve.compress.formats import find_format
from slimserve.core.hardware import Hardware


def explain_variant(hardware: Hardware, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that name the kernel for a model's config.json on this machine, or why the model cannot run.

    Raises UserError if the model has a format that slimserve does not read.
    """
    quantization = config.get("quantization_config")
    quant_format = None if quantization is None else find_format(quantization)
    if hardware.gpus:
        explanation = "vLLM chooses among its CUDA kernels at start (not measured by this project)"
    elif quant_format is not None:
        explanation = quant_format.explain_cpu_kernel(hardware, config)
    else:
        has_bf16 = {"avx512_bf16", "amx_tile"} & set(hardware.isa)
        explanation = "oneDNN BF16 product" + ("" if has_bf16 else ", emulated in float32")
    yield f"on this machine ({hardware.gpus[0] if hardware.gpus else hardware.cpu}):"
    yield f"  {quant_format.name if quant_format else 'bf16'}: {explanation}"
