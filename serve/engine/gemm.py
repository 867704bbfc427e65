"""The choice between vLLM's two bf16 matrix products on a CPU with AMX.

vLLM 0.32 has a packed AMX kernel, which it uses for weights up to 1 MiB, and oneDNN for larger ones. With two threads
oneDNN runs layers with fewer than about 1,024 outputs at half speed if a step has 500 to 1,300 tokens. The packed
kernel does not (docs/log.md).
"""

from __future__ import annotations

import os

from slimserve.serve.policy.engine_environment import PACKED_GEMM_VARIABLE


def register_gemm() -> None:
    """Use the packed kernel for narrow layers if the environment variable sets the number of outputs below which."""
    max_outputs = int(os.environ.get(PACKED_GEMM_VARIABLE, "0"))
    if not max_outputs:
        return
    import torch
    from vllm.model_executor.layers import utils

    vllm_choice = utils.check_cpu_sgl_kernel

    def uses_packed_kernel(n: int, k: int, dtype: torch.dtype) -> bool:
        is_narrow = dtype == torch.bfloat16 and n < max_outputs and n % 16 == 0 and k % 32 == 0
        return bool(vllm_choice(n, k, dtype) or (is_narrow and torch.cpu._is_amx_tile_supported()))

    utils.check_cpu_sgl_kernel = uses_packed_kernel
