"""MXFP4 of the OCP: 4-bit floats in groups of 32 whose scale is a power of two; inputs the same or in 16 bits."""

from __future__ import annotations

import torch

from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.compress.quantize import Grid


class _Mxfp4A16(CompressedTensorsFormat):
    """MXFP4 weights for GPUs.

    vLLM 0.32 loads this like `mxfp4`: on Blackwell (capability 10.0) it rounds the inputs too, on older GPUs never.
    """

    name = "mxfp4a16"
    layout = "mxfp4-pack-quantized"
    kind = "float"
    num_bits = 4
    group_size = 32
    scale_dtype = torch.float8_e8m0fnu
    needs_gpu = True
    gpu_reason = "vLLM has MXFP4 kernels for GPUs of capability 8.0 or newer, and none for a CPU"


class _Mxfp4(_Mxfp4A16):
    """MXFP4 weights and inputs; every token's groups of 32 inputs get a scale of their own."""

    name = "mxfp4"
    inputs = Grid("float", 4, group_size=32, scale_dtype=torch.float8_e8m0fnu)


MXFP4A16 = _Mxfp4A16()
MXFP4 = _Mxfp4()
