"""The memory that holds the activations of a build's calibration samples.

On a GPU, one decoder layer and its Hessian are there at a time. Hidden states
between layers are always in files, so that a build resumes; what is needed only within a layer stays on the GPU or in
pinned memory as long as it fits the budget.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from slimserve.compress.activations import ActivationFile, Activations, MemoryActivations

_GPU_BYTES = 2**30
"""Bytes of one store of activations that may lie on the GPU."""
_PINNED_BYTES = 8 * 2**30
"""Bytes of one store of activations that may lie in pinned memory."""


def make_store(
    path: Path, num_sequences: int, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> Activations:
    """Return a store for activations that are needed only within a layer."""
    num_bytes = num_sequences * num_tokens * width * dtype.itemsize
    if device.type == "cuda" and num_bytes <= _PINNED_BYTES:
        on_gpu = num_bytes <= _GPU_BYTES
        shape = (num_sequences, num_tokens, width)
        return MemoryActivations(
            torch.empty(shape, dtype=dtype, device=device if on_gpu else "cpu", pin_memory=not on_gpu)
        )
    return ActivationFile(path, num_sequences, num_tokens, width, dtype)


def peak_gpu_bytes(device: torch.device) -> int | None:
    """Return the largest GPU memory of this process so far, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors on the device; on the CPU they are the same objects."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
