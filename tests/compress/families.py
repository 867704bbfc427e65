"""Tiny random models of many architectures with odd sizes, and what compression can do with each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDTHS = {
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "word_embed_proj_dim"),
    *("head_dim", "query_pre_attn_scalar"),
}
_ALL_HEADS = "its norm of queries spans all heads"
_DERIVES = "vLLM derives the heads' width from their number"
_DERIVES_TOO = "transformers derives the heads' width from their number"
_EXPERTS = "its MLP consists of experts"


@dataclass(frozen=True)
class Family:
    """An architecture of transformers."""

    changes: dict[str, Any]
    """Keys of the tiny config besides the usual sizes."""
    mlp: str = ""
    """The reason why no MLP neurons can be removed; empty if they can."""
    kv: str = ""
    """The reason why no KV groups can be removed; empty if they can."""
    vllm: str = "its own class"
    """Class with which vLLM 0.32 loads the outcomes, by its sources."""
    is_new: bool = False
    """True for an architecture that no code was written or changed for."""


_WINDOW = {"sliding_window": 8}
_MOE = {"num_experts": 5, "num_experts_per_tok": 2}
FAMILIES: dict[str, Family] = {
    "llama": Family({"tie_word_embeddings": True}),
    "mistral": Family(_WINDOW),
    "qwen2": Family({}, kv=_DERIVES),
    "qwen3": Family({"head_dim": 10}),
    "gemma2": Family({**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": Family({**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": Family({"num_attention_heads": 6, "num_key_value_heads": 3}),
    "granite": Family({"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "olmo2": Family({}, kv=_ALL_HEADS, vllm="transformers' modules"),
    "smollm3": Family({"no_rope_layer_interval": 2}, vllm="transformers' modules"),
    "qwen3_moe": Family({**_MOE, "moe_intermediate_size": 20, "head_dim": 8, "mlp_only_layers": [1]}, mlp=_EXPERTS),
    "olmoe": Family({**_MOE, "intermediate_size": 20}, mlp=_EXPERTS, kv=_DERIVES),
    "gpt_neox": Family({"num_key_value_heads": 6}, kv=_DERIVES_TOO, vllm="transformers' modules"),
    "opt": Family({"ffn_dim": 44, "word_embed_proj_dim": 24, "num_key_value_heads": 6, "init_std": 0.3}, kv=_DERIVES),
    "cohere2": Family(_WINDOW, is_new=True),
    "exaone4": Family({**_WINDOW, "sliding_window_pattern": 2}, is_new=True),
    "nemotron": Family({"head_dim": 4}, is_new=True),
    "stablelm": Family({}, kv=_DERIVES, is_new=True),
    "starcoder2": Family({"sliding_window": None}, vllm="transformers' modules", is_new=True),
}


def tiny_config(name: str, factor: int = 1) -> PreTrainedConfig:
    """Return the config of a tiny random model of an architecture; all widths are multiplied by `factor`."""
    sizes = {**_SIZES, **FAMILIES[name].changes}
    sizes |= {key: sizes[key] * factor for key in _WIDTHS & sizes.keys()}
    return AutoConfig.for_model(name, **sizes)


def table() -> str:
    """Return the table of docs/compress.md."""
    lines = ["| model type | remove MLP neurons | remove KV groups | vLLM 0.32 loads it with |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        cells = [f"no: {reason}" if reason else "yes" for reason in (family.mlp, family.kv)]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} | {family.vllm} |")
    return "\n".join(lines)
