"""Sizes in a model's config, changes of them, and model types whose sizes vLLM reads in another way.

No list names the layers of a model: `decoder.py` reads them from transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimserve.core.model_config import head_dim_of, num_kv_heads_of, size_of

VLLM_DERIVES_HEAD_DIM = frozenset({"qwen2", "olmoe", "opt", "stablelm"})
"""Model types for which vLLM 0.32 divides the hidden size by the number of heads, whatever head_dim the config has."""


def with_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with explicit head_dim, KV heads and MLP width, which some configs derive or name otherwise."""
    sizes = {"head_dim": head_dim_of(config), "num_key_value_heads": num_kv_heads_of(config)}
    width = size_of(config, "intermediate_size")
    return {**config, **sizes, **({} if width is None else {"intermediate_size": width})}


def input_sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the input features of a model's linear layers as far as its config states them."""
    attention = (size_of(config, "num_attention_heads") or 0) * head_dim_of(config)
    sizes = (size_of(config, "hidden_size"), attention, size_of(config, "intermediate_size"))
    return tuple(dict.fromkeys(size for size in (*sizes, config.get("moe_intermediate_size")) if size))


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the changes, also under the older names that its model type has for the same keys."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    older = getattr(CONFIG_MAPPING[config["model_type"]], "attribute_map", {})
    native = {older[key]: value for key, value in changes.items() if older.get(key) in config}
    return {**config, **changes, **native}


def is_per_layer(key: str, value: object, depth: int) -> bool:
    """Tell whether a value of a config has one entry per decoder layer."""
    return "layer" in key and isinstance(value, list) and len(value) == depth


def without_layers(config: Mapping[str, Any], removed: set[int]) -> dict[str, Any]:
    """Return the config of the model without some layers: their entries in lists per layer go, numbers of layers move.

    Lists that transformers derives from the layers' numbers, such as the layers with a sliding window, are written out.
    """
    from transformers import AutoConfig

    depth = config["num_hidden_layers"]
    known = {key: value for key, value in config.items() if key not in {"quantization_config", "model_type"}}
    parsed = AutoConfig.for_model(config["model_type"], **known).to_dict()
    left = [index for index in range(depth) if index not in removed]
    changes: dict[str, Any] = {
        key: [value[index] for index in left] for key, value in parsed.items() if is_per_layer(key, value, depth)
    }
    if "mlp_only_layers" in parsed:  # the other layers have experts, or every nth of them
        step, dense = parsed.get("decoder_sparse_step") or 1, parsed["mlp_only_layers"] or []
        changes["mlp_only_layers"] = [i for i, index in enumerate(left) if index in dense or (index + 1) % step]
        changes["decoder_sparse_step"] = 1
    if parsed.get("first_k_dense_replace"):
        changes["first_k_dense_replace"] = sum(index < parsed["first_k_dense_replace"] for index in left)
    return with_changes(config, {**changes, "num_hidden_layers": len(left)})
