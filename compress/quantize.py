"""Quantization of linear layers: the grid and the rounding, as pure tensor functions.

Shapes: O output features, I input features. A method is a function from a weight and a
number of bits to the integers and scales that stand for it, and a row in `ROUNDINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """A weight on a symmetric integer grid with one scale per output channel."""

    integers_OI: Tensor
    """Integers in [-(2**(bits-1)), 2**(bits-1) - 1], int8."""
    scale_O1: Tensor
    """Step of each row's grid, float32, positive."""

    def dequantize(self) -> Tensor:
        """The weight that the engine computes with, `[O, I]` float32."""
        return self.integers_OI.float() * self.scale_O1


def round_to_nearest(weight_OI: Tensor, num_bits: int) -> Quantized:
    """Symmetric round-to-nearest with the largest magnitude of each row on the grid's end.

    A row of zeros gets the scale 1, so that nothing divides by zero.
    """
    top = 2 ** (num_bits - 1) - 1
    weight = weight_OI.float()
    peak_O1 = weight.abs().amax(dim=1, keepdim=True)
    scale_O1 = torch.where(peak_O1 > 0, peak_O1 / top, torch.ones_like(peak_O1))
    integers_OI = torch.clamp(torch.round(weight / scale_O1), -top - 1, top).to(torch.int8)
    return Quantized(integers_OI, scale_O1)


ROUNDINGS: dict[str, Callable[[Tensor, int], Quantized]] = {"rtn": round_to_nearest}


def relative_error(weight_OI: Tensor, quantized: Quantized) -> float:
    """Frobenius norm of the rounding error over that of the weight; 0 for a weight of zeros."""
    norm = weight_OI.float().norm()
    return float((weight_OI.float() - quantized.dequantize()).norm() / norm) if norm > 0 else 0.0
