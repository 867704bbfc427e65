"""Which of vLLM's two bf16 matrix products a layer gets on a CPU with AMX.

vLLM 0.32 has a packed AMX kernel, which it keeps for weights up to 1 MiB, and oneDNN for the others. With two threads
oneDNN runs layers of fewer than about 1,024 outputs at half speed wherever a step has 500 to 1,300 tokens; the packed
kernel does not (docs/log.md). vLLM loads `register` as a general plugin into each of its processes.
"""

from __future__ import annotations

import os

PACKED_BELOW = "SLIMSERVE_PACKED_GEMM_BELOW"
"""Environment variable: layers of fewer outputs get the packed kernel whatever their size; unset: vLLM's own choice."""


def register() -> None:
    """Give narrow layers the packed kernel, where the environment asks for it."""
    below = int(os.environ.get(PACKED_BELOW, "0"))
    if not below:
        return
    import torch
    from vllm.model_executor.layers import utils

    choose = utils.check_cpu_sgl_kernel

    def takes_packed(n: int, k: int, dtype: torch.dtype) -> bool:
        is_narrow = dtype == torch.bfloat16 and n < below and n % 16 == 0 and k % 32 == 0
        return bool(choose(n, k, dtype) or (is_narrow and torch.cpu._is_amx_tile_supported()))

    utils.check_cpu_sgl_kernel = takes_packed
