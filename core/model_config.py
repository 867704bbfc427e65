"""The JSON files that describe a model, config.json and generation_config.json, and the sizes that they state.

Every command reads them here, so that a null, an empty file or a nested `text_config` means the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_ABSENT_IF_EMPTY = ("quantization_config", "compression_config", "text_config")
"""Keys whose null or empty value means the same as no key. Elsewhere a null may replace a default of the model type."""
_LARGEST = {
    "vocab_size": 10**8,
    "hidden_size": 10**7,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "max_position_embeddings": 10**9,
}
"""Sizes that are whole numbers above 0 wherever a config states them, with bounds that no model reaches."""
_MAY_BE_LISTS = {"intermediate_size", "num_attention_heads"}
"""Sizes that some model types state for each layer."""
_MAY_BE_NULL = {"intermediate_size"}
"""Sizes that some model types derive if they are null."""
_OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len"),
}
"""Names of a size in the configs of older model types, such as GPT-2."""
_STATED = (
    *_LARGEST,
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rms_norm_eps",
    "hidden_act",
)
"""Settings of a decoder that `read_decoder_config` states even if config.json leaves them to the model type."""


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of config.json; keys whose null means that they are absent are left out.

    Raises UserError that names the file and the key if it is not a JSON object or a size is not a whole number.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UserError(
            "model", directory, "has no config.json", "give the directory that save_pretrained or a download made"
        )
    config = read_json_object(file)
    for key in _ABSENT_IF_EMPTY:
        if not config.get(key, True):
            del config[key]
    stated = text_config_of(config)
    for key in _LARGEST:
        value = stated.get(key, 1)
        if key in _MAY_BE_LISTS and isinstance(value, list) and all(type(one) is int and one > 0 for one in value):
            continue
        if not (value is None and key in _MAY_BE_NULL) and (type(value) is not int or not 0 < value < _LARGEST[key]):
            raise UserError(
                CONFIG_FILE,
                file,
                f"has {key} {json.dumps(value)[:60]}, which is not a whole number from 1 to {_LARGEST[key] - 1}",
                "write the value of the original model",
            )
    for key in ("quantization_config", "text_config"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(
                CONFIG_FILE, file, f"has a {key} that is not an object", "restore the file from the original model"
            )
    return config


def read_decoder_config(directory: Path) -> dict[str, Any]:
    """Return config.json with every size stated, as transformers' class of the model type completes and checks it.

    Raises UserError that names the key if transformers refuses the file, as it then does when anything is loaded.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config, file = read_config(directory), directory / CONFIG_FILE
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        return config
    known = {key: value for key, value in config.items() if key not in {"quantization_config", "model_type"}}
    try:
        parsed = AutoConfig.for_model(model_type, **known)
    except Exception as error:  # each model type raises types of its own
        raise UserError(
            CONFIG_FILE, file, f"is refused by transformers ({error})", "write the value of the original model"
        ) from error
    dtype = getattr(parsed, "dtype", None)
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise UserError(
            CONFIG_FILE, file, f"has the dtype {dtype}, which is no float type", "write a dtype as bfloat16"
        )
    stated = {key: getattr(parsed, key) for key in _STATED if hasattr(parsed, key)}
    config |= {key: value for key, value in stated.items() if value is not None}
    heads, kv_heads = config.get("num_attention_heads", 1), num_kv_heads_of(config) if "hidden_size" in config else 1
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(
            CONFIG_FILE,
            file,
            f"has num_key_value_heads {kv_heads}, which does not divide num_attention_heads {heads}",
            "write the value of the original model",
        )
    return config


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Return the content of generation_config.json; a missing or empty file is the same as no settings.

    Raises UserError if it is not a JSON object.
    """
    file = directory / GENERATION_FILE
    if not file.is_file() or not file.read_bytes().strip():
        return {}
    return read_json_object(file)


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `text_config` of a multimodal model, and any other config unchanged."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "num_attention_heads" not in config else config


def size_of(config: Mapping[str, Any], key: str) -> int | None:
    """Return a size of the text model by its usual or an older name; None if the config does not state it."""
    config = text_config_of(config)
    values = (config.get(name) for name in (key, *_OTHER_NAMES.get(key, ())))
    return next((int(value) for value in values if isinstance(value, int)), None)


def num_kv_heads_of(config: Mapping[str, Any]) -> int:
    """Return the number of key-value heads; a config that states none has one per attention head.

    Multi-query attention (`multi_query` in the configs of GPT-BigCode and the first Falcon) has a single one. Raises
    KeyError if the config states neither.
    """
    stated = text_config_of(config)
    if stated.get("multi_query") is True and not stated.get("new_decoder_architecture"):
        return 1
    return size_of(config, "num_key_value_heads") or _required(config, "num_attention_heads")


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Return the number of features of one attention head; by default the hidden size divided by the heads.

    Raises KeyError if the config states no sizes.
    """
    return size_of(config, "head_dim") or _required(config, "hidden_size") // _required(config, "num_attention_heads")


def kv_values_of(config: Mapping[str, Any]) -> int:
    """Return the number of keys and values of one token of context over all layers; KeyError without sizes.

    Layers of convolution, linear attention or a state-space model keep none, if `layer_types` names them.
    """
    num_layers = _required(config, "num_hidden_layers")
    types = text_config_of(config).get("layer_types")
    if isinstance(types, list) and len(types) == num_layers:
        num_layers = sum("attention" in str(kind) and "linear" not in str(kind) for kind in types) or num_layers
    return 2 * num_layers * num_kv_heads_of(config) * head_dim_of(config)


def has_experts(config: Mapping[str, Any]) -> bool:
    """Tell whether a config describes a mixture of experts, by the keys of different families for their number."""
    return any(map(config.get, ("num_experts", "num_local_experts", "n_routed_experts")))


def dtype_of(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config states, such as `float16`; None if it states none."""
    for one in (config, text_config_of(config)):
        value = one.get("dtype") or one.get("torch_dtype")
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return None


def _required(config: Mapping[str, Any], key: str) -> int:
    value = size_of(config, key)
    if value is None:
        raise KeyError(key)
    return value


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object of a model's JSON file; UserError names the file if it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            file.name, file, f"is not JSON ({error})", "restore the file from the original model"
        ) from error
    if not isinstance(value, dict):
        raise UserError(file.name, file, "is not a JSON object", "restore the file from the original model")
    return value
