"""Which tensor plays which role in a model: one table row per model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from slimserve.core.errors import UserError

Sublayer = Literal["attention", "mlp"]
"""A block is two halves: a norm, producers, what stands between, and a consumer that adds to the residual."""

SUBLAYERS: tuple[Sublayer, Sublayer] = ("attention", "mlp")


@dataclass(frozen=True)
class LayerRoles:
    """Names of a decoder's tensors; those of a block are relative to the block."""

    block: str
    """Prefix of block `{index}` in the checkpoint."""
    embedding: str
    final_norm: str
    head: str
    """The output layer's weight; a checkpoint with tied embeddings has none."""
    attention_norm: str
    query: str
    key: str
    value: str
    query_norm: str
    """RMS norm over head_dim of every query head, where the family has it; the block's tensors tell."""
    key_norm: str
    attention_consumer: str
    """The layer whose columns are the attention heads' outputs."""
    mlp_norm: str
    gate: str
    up: str
    mlp_consumer: str
    """The layer whose columns are the MLP's neurons."""
    reads_head_dim: bool = True
    """Whether vLLM reads head_dim from the config; else it divides the hidden size by the heads, so all must stay."""

    @property
    def attention_producers(self) -> tuple[str, ...]:
        """Layers that read the attention's input and whose rows are heads."""
        return (self.query, self.key, self.value)

    @property
    def mlp_producers(self) -> tuple[str, ...]:
        """Layers that read the MLP's input and whose rows are neurons."""
        return (self.gate, self.up)

    def norm(self, sublayer: Sublayer) -> str:
        """The norm that a half begins with."""
        return self.attention_norm if sublayer == "attention" else self.mlp_norm

    def producers(self, sublayer: Sublayer) -> tuple[str, ...]:
        """The layers that read a half's norm; engines fuse them into one."""
        return self.attention_producers if sublayer == "attention" else self.mlp_producers

    def consumer(self, sublayer: Sublayer) -> str:
        """The layer that ends a half."""
        return self.attention_consumer if sublayer == "attention" else self.mlp_consumer

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of a block, in the order of the forward pass."""
        return (*self.attention_producers, self.attention_consumer, *self.mlp_producers, self.mlp_consumer)


_GATED = LayerRoles(
    block="model.layers.{index}.",
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    attention_consumer="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    mlp_consumer="mlp.down_proj",
)

FAMILIES: dict[str, LayerRoles] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": replace(_GATED, reads_head_dim=False),
    "qwen3": _GATED,
}
"""Layer roles by the `model_type` of config.json; Qwen2.5 calls itself qwen2, SmolLM2 llama."""


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Features of one attention head, which a config states or leaves to be derived."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def with_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that states what older ones leave to be derived: head_dim, and as many KV heads as heads."""
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return {**config, "head_dim": head_dim_of(config), "num_key_value_heads": kv_heads}


def input_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Input features of a block's linear layers: of the producers, of attention's consumer and of the MLP's."""
    return config["hidden_size"], config["num_attention_heads"] * head_dim_of(config), config["intermediate_size"]


def roles_of(config: Mapping[str, Any]) -> LayerRoles:
    """The layer roles of a model's family; UserError lists the families that are known."""
    model_type = config["model_type"]
    if model_type not in FAMILIES:
        raise UserError(
            "model_type", model_type, "is not a family that compress knows", f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
