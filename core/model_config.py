"""A model's config.json, and the sizes that it states or leaves to be derived."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of config.json in a model directory that `resolve_model` has checked."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def num_kv_heads_of(config: Mapping[str, Any]) -> int:
    """Return the number of key-value heads; a config that states none has one per attention head."""
    config = _text_config(config)
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Return the number of features of one attention head; by default the hidden size divided by the heads."""
    config = _text_config(config)
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `text_config` of a multimodal model, and any other config unchanged."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "num_attention_heads" not in config else config
