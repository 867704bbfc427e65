"""What a step costs: FLOPs from the models' shapes, and peak memory as the system counts it.

A product of `[T, I]` and `[I, O]` is 2·T·I·O FLOPs. Of attention the causal half is counted, which is what has to be
computed: the tokens of a sequence of T look at T(T + 1)/2 others, and every look is 4·heads·head_dim FLOPs, for the
scores and the sums. The output layer is counted at the targets only. Norms, activations and the loss are left out. A
student's backward pass is twice its forward pass, and checkpointing computes the blocks' forward pass once more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class ModelShape:
    """What the FLOPs of a decoder follow from."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the content of a config.json of a gated-MLP decoder."""
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def block_weights(self) -> int:
        """Weights of the linear layers of all blocks."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.mlp_size)

    def block_flops(self, lengths: Sequence[int]) -> float:
        """Of the blocks' forward pass over sequences of these lengths."""
        looks = sum(length * (length + 1) / 2 for length in lengths)
        attention = 4.0 * self.num_layers * self.num_heads * self.head_dim * looks
        return 2.0 * self.block_weights * sum(lengths) + attention

    def head_flops(self, num_targets: int) -> float:
        """Of the output layer's forward pass."""
        return 2.0 * self.hidden_size * self.vocab_size * num_targets


def training_flops(
    student: ModelShape,
    teacher: ModelShape | None,
    lengths: Sequence[int],
    num_targets: int,
    *,
    is_checkpointed: bool = False,
) -> float:
    """FLOPs of a step: the student forward and backward, the teacher forward; None: no teacher is run."""
    blocks = student.block_flops(lengths) * (4 if is_checkpointed else 3)
    flops = blocks + 3 * student.head_flops(num_targets)
    if teacher is not None:
        flops += teacher.block_flops(lengths) + teacher.head_flops(num_targets)
    return flops


class PeakMemory:
    """Bytes that this process needs at most: on a GPU what torch allocated, else the resident set."""

    def __init__(self, is_cuda: bool = False) -> None:
        self._is_cuda = is_cuda

    def now_bytes(self) -> int:
        """At this moment."""
        if self._is_cuda:
            import torch

            return int(torch.cuda.memory_allocated())
        return _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        """Since the last reset, or since the process began where the kernel allows none."""
        if self._is_cuda:
            import torch

            return int(torch.cuda.max_memory_allocated())
        return _status_bytes("VmHWM")

    def reset(self) -> None:
        """Begin anew from what is in use now."""
        if self._is_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            _CLEAR.write_text("5", encoding="ascii")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
