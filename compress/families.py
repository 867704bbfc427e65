"""Tensor names of each model family by role. A new family of gated decoders is one row in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from slimserve.core.errors import UserError
from slimserve.core.model_config import head_dim_of, num_kv_heads_of

Sublayer = Literal["attention", "mlp"]
"""Part of a decoder block: a norm, the producers that read it, attention or gating, and the consumer.

The consumer's output is added to the residual stream.
"""

SUBLAYERS: tuple[Sublayer, Sublayer] = ("attention", "mlp")


@dataclass(frozen=True)
class LayerRoles:
    """Names of a decoder's tensors; names inside a block are relative to the block."""

    block: str
    """Prefix of the tensors of block `{index}` in the checkpoint."""
    embedding: str
    final_norm: str
    head: str
    """Weight of the output layer; a checkpoint with tied embeddings has none."""
    attention_norm: str
    query: str
    key: str
    value: str
    query_norm: str
    """RMS norm over the features of each query head; absent from the blocks of families without it."""
    key_norm: str
    attention_consumer: str
    """Output projection of attention; its input columns are the outputs of the heads."""
    mlp_norm: str
    gate: str
    up: str
    mlp_consumer: str
    """Down projection of the MLP; its input columns are the neurons."""
    always_biased: tuple[str, ...] = ()
    """Layers that have a bias whatever the config says."""
    biased_if: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layers that have a bias if the config's key is true."""
    norms_heads: bool = False
    """True if the blocks have norms of the query and key heads."""
    reads_sliding_window: bool = True
    """False if transformers and vLLM attend to all tokens even if the config states a sliding window."""
    reads_head_dim: bool = True
    """True if vLLM reads head_dim from the config. Else it divides the hidden size by the heads, so all heads stay."""

    @property
    def attention_producers(self) -> tuple[str, ...]:
        """Layers that read the attention's input; their rows are the features of heads."""
        return (self.query, self.key, self.value)

    @property
    def mlp_producers(self) -> tuple[str, ...]:
        """Layers that read the MLP's input; their rows are neurons."""
        return (self.gate, self.up)

    def norm(self, sublayer: Sublayer) -> str:
        """Return the name of the norm at the start of a sublayer."""
        return self.attention_norm if sublayer == "attention" else self.mlp_norm

    def producers(self, sublayer: Sublayer) -> tuple[str, ...]:
        """Return the names of the layers that read a sublayer's norm. Engines fuse them into one layer."""
        return self.attention_producers if sublayer == "attention" else self.mlp_producers

    def consumer(self, sublayer: Sublayer) -> str:
        """Return the name of the layer at the end of a sublayer."""
        return self.attention_consumer if sublayer == "attention" else self.mlp_consumer

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all linear layers of a block, in the order of the forward pass."""
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

_ATTENTION = (*_GATED.attention_producers, _GATED.attention_consumer)
_MLP = (*_GATED.mlp_producers, _GATED.mlp_consumer)

FAMILIES: dict[str, LayerRoles] = {
    "llama": replace(_GATED, biased_if={"attention_bias": _ATTENTION, "mlp_bias": _MLP}, reads_sliding_window=False),
    "mistral": _GATED,
    "qwen2": replace(_GATED, always_biased=_GATED.attention_producers, reads_head_dim=False),
    "qwen3": replace(_GATED, biased_if={"attention_bias": _ATTENTION}, norms_heads=True),
}
"""Layer roles by the `model_type` of config.json. Qwen2.5 has the type qwen2, SmolLM2 the type llama."""


def with_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with explicit head_dim and number of KV heads, which older configs leave to be derived."""
    return {**config, "head_dim": head_dim_of(config), "num_key_value_heads": num_kv_heads_of(config)}


def input_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the input features of the producers, of attention's consumer and of the MLP's consumer."""
    return config["hidden_size"], config["num_attention_heads"] * head_dim_of(config), config["intermediate_size"]


def roles_of(config: Mapping[str, Any]) -> LayerRoles:
    """Return the layer roles of a model's family. Raises UserError that lists the supported families if it has none."""
    model_type = config["model_type"]
    if model_type not in FAMILIES:
        raise UserError(
            "model_type", model_type, "is not a supported model family", f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


Dimension = tuple[str, int]
"""One dimension of a tensor: the keys of the config that state it, and its size."""


def expected_tensors(config: Mapping[str, Any], roles: LayerRoles) -> dict[str, tuple[Dimension, ...]]:
    """Return the dimensions of every tensor that transformers and vLLM read for a dense model, by name.

    `config` must state all sizes.
    """
    head_dim = head_dim_of(config)
    hidden, vocabulary = ("hidden_size", config["hidden_size"]), ("vocab_size", config["vocab_size"])
    neurons = ("intermediate_size", config["intermediate_size"])
    queries = ("num_attention_heads and head_dim", config["num_attention_heads"] * head_dim)
    keys = ("num_key_value_heads and head_dim", num_kv_heads_of(config) * head_dim)
    layers = {
        roles.query: (queries, hidden),
        roles.key: (keys, hidden),
        roles.value: (keys, hidden),
        roles.attention_consumer: (hidden, queries),
        roles.gate: (neurons, hidden),
        roles.up: (neurons, hidden),
        roles.mlp_consumer: (hidden, neurons),
    }
    biased = set(roles.always_biased).union(*(roles.biased_if[key] for key in roles.biased_if if config.get(key)))
    block: dict[str, tuple[Dimension, ...]] = {f"{layer}.weight": sizes for layer, sizes in layers.items()}
    block |= {f"{layer}.bias": layers[layer][:1] for layer in biased}
    block |= {f"{norm}.weight": (hidden,) for norm in (roles.attention_norm, roles.mlp_norm)}
    if roles.norms_heads:
        block |= {f"{norm}.weight": (("head_dim", head_dim),) for norm in (roles.query_norm, roles.key_norm)}
    tensors: dict[str, tuple[Dimension, ...]] = {
        roles.embedding: (vocabulary, hidden),
        roles.final_norm: (hidden,),
    }
    if not config.get("tie_word_embeddings"):
        tensors[roles.head] = (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        prefix = roles.block.format(index=index)
        tensors |= {prefix + name: sizes for name, sizes in block.items()}
    return tensors
