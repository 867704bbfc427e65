"""Changes to vLLM's matrix products on a CPU with AMX: which of the bf16 ones is used, and the INT8 one's inputs.

vLLM 0.32 has a packed AMX kernel, which it uses for weights up to 1 MiB, and oneDNN for larger ones. With two threads
oneDNN runs layers with fewer than about 1,024 outputs at half speed if a step has 500 to 1,300 tokens. The packed
kernel does not (docs/log.md).

The packed INT8 kernel takes matrices only. Models that vLLM runs with transformers' modules, such as SmolLM3, give it
a batch dimension too, and so end with "mat1 must be a 2D tensor".
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from slimserve.serve.policy.engine_environment import PACKED_GEMM_VARIABLE


def register_gemm() -> None:
    """Use the packed kernel for narrow layers if the environment variable sets the number of outputs below which."""
    max_outputs = int(os.environ.get(PACKED_GEMM_VARIABLE, "0"))
    if not max_outputs:
        return
    from vllm.model_executor.layers import utils

    vllm_choice = utils.check_cpu_sgl_kernel

    def uses_packed_kernel(n: int, k: int, dtype: torch.dtype) -> bool:
        is_narrow = dtype == torch.bfloat16 and n < max_outputs and n % 16 == 0 and k % 32 == 0
        return bool(vllm_choice(n, k, dtype) or (is_narrow and torch.cpu._is_amx_tile_supported()))

    utils.check_cpu_sgl_kernel = uses_packed_kernel


def register_int8_inputs() -> None:
    """On a CPU with AMX, let the packed INT8 kernel take inputs `[B, T, K]`, as vLLM's other kernels do."""
    if not torch.cpu._is_amx_tile_supported():
        return
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    of_matrices = CPUInt8ScaledMMLinearKernel._apply_weights_sgl
    if hasattr(of_matrices, "__wrapped__"):
        return

    @wraps(of_matrices)
    def of_any_shape(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dim() == 2:
            return of_matrices(self, layer, x, bias)
        return of_matrices(self, layer, x.reshape(-1, x.shape[-1]), bias).unflatten(0, x.shape[:-1])

    CPUInt8ScaledMMLinearKernel._apply_weights_sgl = of_any_shape
