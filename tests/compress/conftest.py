"""Tiny random models of every family, with odd sizes, saved as their users would save them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_GQA = {"num_attention_heads": 6, "num_key_value_heads": 2}
_MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class TinyModel:
    """A saved model and what it is in memory."""

    directory: Path
    model: Any


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-tied-gqa": LlamaConfig(**_SIZES, **_GQA, tie_word_embeddings=True),
    "llama-untied-mha-bias": LlamaConfig(**_SIZES, **_MHA, mlp_bias=True, attention_bias=True),
    "mistral": MistralConfig(**_SIZES, **_GQA, sliding_window=None),
    "qwen2-qkv-bias": Qwen2Config(**_SIZES, **_GQA, tie_word_embeddings=True),
    "qwen3-head-dim": Qwen3Config(**_SIZES, **_GQA, head_dim=10),
}


def make_tiny(config: PreTrainedConfig, directory: Path) -> TinyModel:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return TinyModel(directory, model)


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> TinyModel:
    return make_tiny(CONFIGS[request.param], tmp_path / "dense")


@pytest.fixture
def tiny_llama(tmp_path: Path) -> TinyModel:
    return make_tiny(CONFIGS["llama-tied-gqa"], tmp_path / "dense")
