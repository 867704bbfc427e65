"""The cost of a training step: FLOPs from the models' shapes, and peak memory from the system.

A product of `[T, I]` and `[I, O]` is 2·T·I·O FLOPs. Causal attention over T tokens has T(T + 1)/2 query-key pairs, each
of 4·heads·head_dim FLOPs for the scores and the weighted sums. The output layer is counted at the targets only. Norms,
activations and the loss are not counted. A backward pass costs twice the forward pass, and activation checkpointing
repeats the blocks' forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimserve.core.model_config import head_dim_of, num_kv_heads_of

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine the FLOPs of a decoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the shape of a decoder with a gated MLP from the content of its config.json."""
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            num_kv_heads_of(config),
            head_dim_of(config),
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def block_weights(self) -> int:
        """Number of weights in the linear layers of all blocks."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.mlp_size)

    def block_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of the blocks' forward pass over sequences of these lengths."""
        num_pairs = sum(length * (length + 1) / 2 for length in lengths)
        attention = 4.0 * self.num_layers * self.num_heads * self.head_dim * num_pairs
        return 2.0 * self.block_weights * sum(lengths) + attention

    def head_flops(self, num_targets: int) -> float:
        """Return the FLOPs of the output layer's forward pass."""
        return 2.0 * self.hidden_size * self.vocab_size * num_targets


def training_flops(
    student: ModelShape,
    teacher: ModelShape | None,
    lengths: Sequence[int],
    num_targets: int,
    *,
    is_checkpointed: bool = False,
) -> float:
    """Return the FLOPs of a step: student forward and backward, teacher forward (None: no teacher runs)."""
    blocks = student.block_flops(lengths) * (4 if is_checkpointed else 3)
    flops = blocks + 3 * student.head_flops(num_targets)
    if teacher is not None:
        flops += teacher.block_flops(lengths) + teacher.head_flops(num_targets)
    return flops


class PeakMemory:
    """Peak memory of this process: torch's allocations on a GPU, otherwise the resident set."""

    def __init__(self, is_cuda: bool = False) -> None:
        self._is_cuda = is_cuda

    def now_bytes(self) -> int:
        """Return the bytes in use now."""
        if self._is_cuda:
            import torch

            return int(torch.cuda.memory_allocated())
        return _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Return the peak since the last reset, or since the process began if the kernel allows no reset."""
        if self._is_cuda:
            import torch

            return int(torch.cuda.max_memory_allocated())
        return _status_bytes("VmHWM")

    def reset(self) -> None:
        """Restart the peak at the current usage."""
        if self._is_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            _RESET.write_text("5", encoding="ascii")


def _status_bytes(name: str) -> int:
    line = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return int(line[1]) * 1024 if line else 0
