"""Tiny random models of every family, with odd sizes, saved with transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from slimserve.compress.build import build_variant
from slimserve.compress.recipe import AnyStep, Calibrate, Prune, Quantize, Recipe

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
KV = Prune(step="prune", kv_remove_frac=0.5, mlp_remove_frac=0.3, multiple=4)
GPTQ = Quantize(step="quantize", format="w8a8", method="gptq")
QUANTIZE = Quantize(step="quantize", format="w8a8")
INPUT_IDS = torch.tensor([[5, 41, 0, 66, 23, 8, 8]])


@dataclass(frozen=True)
class TinyModel:
    """A saved model and the same model in memory."""

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
    save_tokenizer(directory, config.vocab_size)
    return TinyModel(directory, model)


def save_tokenizer(directory: Path, vocab_size: int = 67) -> None:
    """Save a tokenizer of whole words with as many tokens as the tiny models have."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> TinyModel:
    return make_tiny(CONFIGS[request.param], tmp_path / "dense")


@pytest.fixture
def uncompiled_fp4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the compiled function of compressed-tensors that rounds to 4-bit floats: compiling takes a minute."""
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    plain = FP4_E2M1_DATA.cast_to_fp4._torchdynamo_orig_callable
    monkeypatch.setattr(FP4_E2M1_DATA, "cast_to_fp4", staticmethod(plain))


@pytest.fixture
def tiny_llama(tmp_path: Path) -> TinyModel:
    return make_tiny(CONFIGS["llama-tied-gqa"], tmp_path / "dense")


def ids_file(folder: Path, num_sequences: int = 6, num_tokens: int = 16) -> str:
    """Return random token ids as calibration data for the tiny models."""
    tokens = torch.randint(0, 67, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(2))
    file = folder / "ids.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": row}) for row in tokens.tolist()))
    return str(file)


def build_on_data(tiny: TinyModel, *steps: AnyStep, target: Path, **options: Any) -> Path:
    calibration = Calibrate(source=ids_file(tiny.directory.parent), num_samples=6, sequence_length=16)
    recipe = Recipe(summary="", calibration=calibration, steps=steps)
    return build_variant("tiny", tiny.directory, "own", recipe, target, **options)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(INPUT_IDS).logits


def weight_bytes(directory: Path) -> int:
    """Return the bytes of all tensors, without the headers of the files."""
    return sum(tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values())
