"""W8A8: INT8 weights with one scale per output feature, INT8 inputs with one scale per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.compress.quantize import Grid
from slimserve.core.hardware import Hardware
from slimserve.core.model_config import has_experts


class _W8A8(CompressedTensorsFormat):
    name = "w8a8"
    layout = "int-quantized"
    num_bits = 8
    inputs = Grid("int", 8)
    allows_int8_head = True

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        isa = set(hardware.isa)
        if not isa & {"avx2", "avx512f", "asimd"}:
            return "cannot run: the kernel needs AVX2, AVX-512 or NEON"
        if has_experts(config) and not isa & {"amx_tile", "asimd"}:
            return "cannot run: vLLM 0.32's kernel for INT8 experts needs AMX or NEON"
        best = "AMX" if "amx_tile" in isa else "AVX-512 VNNI" if "avx512_vnni" in isa else "the baseline instructions"
        explanation = f"oneDNN INT8 product (CPUInt8ScaledMMLinearKernel) with {best}"
        if isa.isdisjoint({"avx512f", "amx_tile", "asimd"}):
            # Measured with vLLM 0.32 against plain torch: 0.13 to 0.23 nats per token instead of 0.02 to 0.06.
            explanation += ", which is inexact there; judge its quality on the CPU that will serve it"
        return explanation


W8A8 = _W8A8()
