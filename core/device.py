"""The device that computes: the choice that `--device` gives."""

from __future__ import annotations

import torch

from slimserve.core.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device of `auto`, `cpu`, `cuda` or `cuda:N`. Raises UserError if PyTorch does not see it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise UserError("--device", name, "is no device", "choose from auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"PyTorch sees {torch.cuda.device_count()} CUDA devices"
        raise UserError("--device", name, f"is not available: {found}", "choose cpu, or install PyTorch for CUDA")
    return device
