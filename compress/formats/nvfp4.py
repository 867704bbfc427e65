"""NVFP4: 4-bit floats in groups of 16 with FP8 scales and a float32 scale per layer; inputs the same or in 16 bits."""

from __future__ import annotations

import torch

from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.compress.quantize import Grid


class _Nvfp4A16(CompressedTensorsFormat):
    """NVFP4 weights for GPUs; the products are in 16 bits."""

    name = "nvfp4a16"
    layout = "nvfp4-pack-quantized"
    kind = "float"
    num_bits = 4
    group_size = 16
    scale_dtype = torch.float8_e4m3fn
    needs_gpu = True
    gpu_reason = "vLLM has NVFP4 kernels for GPUs of capability 7.5 or newer, and none for a CPU"


class _Nvfp4(_Nvfp4A16):
    """NVFP4 weights and inputs: products in 4 bits from Blackwell (capability 10.0) on, in 16 bits on older GPUs.

    The global scale of a layer's inputs is calibrated, that of a group of 16 inputs comes from each token.
    """

    name = "nvfp4"
    inputs = Grid("float", 4, group_size=16, scale_dtype=torch.float8_e4m3fn)


NVFP4A16 = _Nvfp4A16()
NVFP4 = _Nvfp4()
