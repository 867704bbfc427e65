"""W4A8: INT4 weights in groups with BF16 scales; INT8 or FP8 inputs with one scale per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.compress.quantize import Grid
from slimserve.core.hardware import Hardware


class _W4A8(CompressedTensorsFormat):
    """INT4 weights and INT8 inputs for GPUs.

    The weights are packed, as vLLM's GPU kernel reads them. llm-compressor writes this layout if it is called with
    `quantization_format="pack-quantized"`; its default is that of vLLM's kernel for Arm CPUs, with a byte per weight.
    """

    name = "w4a8"
    layout = "pack-quantized"
    num_bits = 4
    group_sizes: tuple[int, ...] = (128, 64, 32)
    scale_dtype = torch.bfloat16
    inputs = Grid("int", 8)
    needs_gpu = True
    gpu_reason = "vLLM has a kernel of packed W4A8 for GPUs of capability 7.5 or newer; a CPU gets the kernel of w4a16"

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        return f"not measured by this project: {self.gpu_reason}"


class _W4A8Fp8(_W4A8):
    """INT4 weights and FP8 inputs, for Hopper alone: vLLM's kernel has groups of 128 and capability 9.0."""

    name = "w4a8-fp8"
    group_sizes = ()
    group_size = 128
    inputs = Grid("float", 8)
    gpu_reason = "vLLM's kernel of w4a8-fp8 needs a GPU of capability 9.0 (Hopper)"

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        return f"cannot run: {self.gpu_reason}"


W4A8 = _W4A8()
W4A8_FP8 = _W4A8Fp8()
