"""FP8: float8_e4m3fn weights with one scale per output feature, FP8 inputs with one scale per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.compress.quantize import Grid
from slimserve.core.hardware import Hardware


class _FP8(CompressedTensorsFormat):
    """FP8 for GPUs.

    vLLM runs it on a CPU through torch._scaled_mm, correctly but slowly: SmolLM2-135M decoded 1.8 tokens/s against 28
    in BF16 (one thread, eager). GPUs of capability 7.5 to 8.8 compute it with BF16 activations.
    """

    name = "fp8"
    layout = "float-quantized"
    kind = "float"
    num_bits = 8
    inputs = Grid("float", 8)
    gpu_reason = "fp8 needs a GPU of capability 8.9 or newer to be fast; a CPU emulates it"

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        return f"runs many times slower than BF16 (ChannelWiseTorchFP8ScaledMMLinearKernel): {self.gpu_reason}"


FP8 = _FP8()
