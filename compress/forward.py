"""The forward pass of a decoder in plain torch, by block and by sublayer.

Compression needs the inputs of single layers while the checkpoint is read block by block, and a transformers model must
be in memory completely. So the pass is implemented here once for all families in `families.py`; a test compares it with
transformers. Shape suffixes: B sequences; T tokens; D hidden size; I input features of a consumer; H head dimension;
E half of it; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimserve.compress.checkpoint import CheckpointReader
from slimserve.compress.families import SUBLAYERS, LayerRoles, Sublayer
from slimserve.core.errors import UserError
from slimserve.core.model_config import head_dim_of

Block = dict[str, Tensor]
"""Tensors of one decoder block by their names relative to the block."""

Linear = Callable[[str, Tensor], Tensor]
"""A function that applies the linear layer of the given name: `[..., I]` to `[..., O]`."""


def dense_linear(block: Mapping[str, Tensor]) -> Linear:
    """Return a `Linear` with the weights and biases of the block, computed in the dtype of the input."""

    def linear(layer: str, x: Tensor) -> Tensor:
        bias = block.get(f"{layer}.bias")
        return functional.linear(x, block[f"{layer}.weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    return linear


class Decoder:
    """The forward pass of one model's blocks. It holds rotary tables and sizes, but no weights."""

    def __init__(self, config: Mapping[str, Any], roles: LayerRoles, num_tokens: int, dtype: torch.dtype) -> None:
        """Prepare for sequences of up to `num_tokens` tokens; hidden states have `dtype`.

        Raises UserError for an unsupported activation function, and if the sequence is longer than a sliding window
        that only some blocks have.
        """
        from transformers import AutoConfig

        known = {key: value for key, value in config.items() if key not in {"quantization_config", "model_type"}}
        parsed = AutoConfig.for_model(config["model_type"], **known)
        self.roles = roles
        self.dtype = dtype
        self._eps = float(parsed.rms_norm_eps)
        self.head_dim = head_dim_of(config)
        self._activation = _activation(parsed.hidden_act)
        self._mask = _window_mask(parsed, num_tokens) if roles.reads_sliding_window else None
        self._cos_TH, self._sin_TH = _rotary_tables(parsed, self.head_dim, num_tokens, dtype)

    def producer_input(self, sublayer: Sublayer, block: Mapping[str, Tensor], x_BTD: Tensor) -> Tensor:
        """Return the input of a sublayer's producers, the normed residual stream, `[B, T, D]`."""
        return self._norm(x_BTD, block[f"{self.roles.norm(sublayer)}.weight"])

    def consumer_input(self, sublayer: Sublayer, block: Mapping[str, Tensor], linear: Linear, h_BTD: Tensor) -> Tensor:
        """Return the input of a sublayer's consumer, `[B, T, I]`: the outputs of the heads, or the neurons."""
        if sublayer == "mlp":
            gated: Tensor = self._activation(linear(self.roles.gate, h_BTD)) * linear(self.roles.up, h_BTD)
            return gated
        return self._attend(block, linear, h_BTD)

    def block(self, block: Mapping[str, Tensor], linear: Linear, x_BTD: Tensor) -> Tensor:
        """Return the residual stream `[B, T, D]` after the block."""
        for sublayer in SUBLAYERS:
            inner = self.consumer_input(sublayer, block, linear, self.producer_input(sublayer, block, x_BTD))
            x_BTD = x_BTD + linear(self.roles.consumer(sublayer), inner)
        return x_BTD

    def final_norm(self, x_BTD: Tensor, weight_D: Tensor) -> Tensor:
        return self._norm(x_BTD, weight_D)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply RMS norm in float32, then the weight in the input's dtype, as transformers does."""
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self._eps)
        return weight.to(x.dtype) * normed.to(x.dtype)

    def _attend(self, block: Mapping[str, Tensor], linear: Linear, h_BTD: Tensor) -> Tensor:
        B, T, _ = h_BTD.shape
        split = (B, T, -1, self.head_dim)
        query, key, value = (linear(layer, h_BTD).view(split) for layer in self.roles.attention_producers)
        if f"{self.roles.query_norm}.weight" in block:
            query = self._norm(query, block[f"{self.roles.query_norm}.weight"])
            key = self._norm(key, block[f"{self.roles.key_norm}.weight"])
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        query, key = self._rotate(query), self._rotate(key)
        mask = None if self._mask is None else self._mask[:T, :T]
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )
        return attended.transpose(1, 2).reshape(B, T, -1)

    def _rotate(self, heads_BHTE: Tensor) -> Tensor:
        T = heads_BHTE.shape[2]
        low, high = heads_BHTE.chunk(2, dim=-1)
        return heads_BHTE * self._cos_TH[:T] + torch.cat((-high, low), dim=-1) * self._sin_TH[:T]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise UserError(
            "hidden_act", name, "is not a supported activation function", f"supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _rotary_tables(config: Any, head_dim: int, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[T, H]` of positions 0 to `num_tokens` - 1, with transformers' long-context scaling.

    The default case is implemented here: transformers has it in each model's file, whose import takes 3 s and 190 MiB.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    if parameters["rope_type"] == "default":
        step_E = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequency_E, scale = 1.0 / parameters["rope_theta"] ** step_E, 1.0
    else:
        frequency_E, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=num_tokens)
    angle_TE = torch.arange(num_tokens, dtype=torch.float32)[:, None] * frequency_E
    angle_TH = torch.cat((angle_TE, angle_TE), dim=-1)
    return (angle_TH.cos() * scale).to(dtype), (angle_TH.sin() * scale).to(dtype)


def _window_mask(config: Any, num_tokens: int) -> Tensor | None:
    """Return the bool mask `[T, T]` of a sliding window that is shorter than the sequence, else None (plain causal)."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True) or num_tokens <= window:
        return None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise UserError(
            "sequence length",
            num_tokens,
            f"exceeds the sliding window of {window} tokens, which only some of the model's blocks have",
            f"set calibration.sequence_length to at most {window}",
        )
    position = torch.arange(num_tokens)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


@dataclass(frozen=True)
class OuterTensors:
    """Tensors before the first block and after the last one, in the checkpoint's dtype."""

    embedding_VD: Tensor
    final_norm_D: Tensor
    head_VD: Tensor


def read_outer_tensors(reader: CheckpointReader, roles: LayerRoles) -> OuterTensors:
    """Read embedding, final norm and head. Without a head in the checkpoint, the head is the embedding (tied)."""
    embedding = reader.read(roles.embedding)
    head = reader.read(roles.head) if roles.head in reader.names else embedding
    return OuterTensors(embedding, reader.read(roles.final_norm), head)
