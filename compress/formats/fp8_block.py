"""FP8 in blocks: float8_e4m3fn weights with one scale per 128 x 128 block, FP8 inputs with one per token and 128."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.compress.formats.interface import LayerSizes
from slimserve.compress.quantize import Grid
from slimserve.core.hardware import Hardware

_BLOCK = 128


class _Fp8Block(CompressedTensorsFormat):
    """The format of DeepSeek-V3. GPUs of capability 7.5 to 8.8 compute it with 16-bit inputs."""

    name = "fp8-block"
    layout = "float-quantized"
    kind = "float"
    num_bits = 8
    group_size = _BLOCK
    block_rows = _BLOCK
    inputs = Grid("float", 8, group_size=_BLOCK, allows_short_group=True)
    needs_gpu = True
    gpu_reason = "fp8-block needs a GPU of capability 8.9 or newer to be fast, or a CPU with AMX"

    def check_layers(self, layers: Mapping[str, LayerSizes]) -> None:
        """Raise UserError that names a layer with incomplete blocks.

        vLLM accepts them at the last outputs alone, and compressed-tensors 0.17 reads them with wrong scales.
        """
        super().check_layers(layers)
        for name, (num_outputs, _) in layers.items():
            if num_outputs % _BLOCK:
                raise self.refuse_size(name, "outputs", num_outputs, _BLOCK)

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        if "amx_tile" not in hardware.isa:
            return super().explain_cpu_kernel(hardware, config)
        return "CPUFp8W8A8BlockScaledMMKernel or CPUFp8BlockScaledMMKernel with AMX (not measured by this project)"


FP8_BLOCK = _Fp8Block()
