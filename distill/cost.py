"""The cost of a training: FLOPs from the models' shapes, and peak memory from the system.

A product of `[T, I]` and `[I, O]` is 2·T·I·O FLOPs. Causal attention over T tokens has T(T + 1)/2 query-key pairs, each
of 4·heads·head_dim FLOPs for the scores and the weighted sums. The output layer is counted at the targets only. Norms,
activations and the loss are not counted.

A backward pass costs twice the forward pass: one product for the gradient of the inputs, and one for that of the
weights. Frozen weights, which LoRA leaves as they are, need only the first. Activation checkpointing repeats the
blocks' forward pass.
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
class Cost:
    """The cost of a part of a training."""

    seconds: float = 0.0
    tokens: int = 0
    """Number of tokens that the model read or wrote."""
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.tokens + other.tokens, self.flops + other.flops)


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
    lora_rank: int = 0
    """Rank of the adapters on each linear layer of the blocks; all other weights are then frozen."""

    @classmethod
    def of(cls, config: Mapping[str, Any], lora_rank: int = 0) -> ModelShape:
        """Read the shape of a decoder with a gated MLP from the content of its config.json."""
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            num_kv_heads_of(config),
            head_dim_of(config),
            config["intermediate_size"],
            config["vocab_size"],
            lora_rank,
        )

    @property
    def block_weights(self) -> int:
        """Number of weights in the linear layers of all blocks."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.mlp_size)

    @property
    def adapter_weights(self) -> int:
        """Number of weights in the adapters of all blocks: rank × (inputs + outputs) of each linear layer."""
        attention = 4 * self.hidden_size + 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * self.lora_rank * (attention + 3 * (self.hidden_size + self.mlp_size))

    def attention_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of the causal scores and weighted sums in one pass over sequences of these lengths."""
        num_pairs = sum(length * (length + 1) / 2 for length in lengths)
        return 4.0 * self.num_layers * self.num_heads * self.head_dim * num_pairs

    def block_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of the blocks' forward pass over sequences of these lengths."""
        return 2.0 * (self.block_weights + self.adapter_weights) * sum(lengths) + self.attention_flops(lengths)

    def head_flops(self, num_targets: int) -> float:
        """Return the FLOPs of the output layer's forward pass."""
        return 2.0 * self.hidden_size * self.vocab_size * num_targets

    def forward_flops(self, lengths: Sequence[int], num_targets: int) -> float:
        """Return the FLOPs of a forward pass over sequences of these lengths that predicts some of their tokens."""
        return self.block_flops(lengths) + self.head_flops(num_targets)

    def sampling_flops(self, replies: Sequence[tuple[int, int]]) -> float:
        """Return the FLOPs of replies, given as the numbers of tokens of each prompt and reply.

        Keys and values are cached, so every token is read once, except the last one, which is not read. The padding of
        a batch and the tokens after a reply's end are not counted.
        """
        lengths = [prompt + reply - 1 for prompt, reply in replies]
        return self.forward_flops(lengths, sum(reply for _, reply in replies))


def training_flops(
    student: ModelShape,
    lengths: Sequence[int],
    num_targets: int,
    *,
    is_checkpointed: bool = False,
) -> float:
    """Return the FLOPs of the student's forward and backward pass over sequences of these lengths."""
    weights = 2.0 * student.block_weights * sum(lengths) + student.head_flops(num_targets)
    adapters = 2.0 * student.adapter_weights * sum(lengths)
    flops = (2 if student.lora_rank else 3) * weights + 3 * (adapters + student.attention_flops(lengths))
    return flops + (student.block_flops(lengths) if is_checkpointed else 0.0)


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
