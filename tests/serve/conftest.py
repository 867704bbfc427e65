"""Fixtures for tests with real engines: an engine that scores, and a tiny model for tests of the server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from slimserve.serve.launch.plan import PREFIX_CONNECTOR, Choice, LaunchPlan
from slimserve.serve.launch.process import STOCK_COMMAND, Engine, EngineSpec, free_port

NAME = "smol"
MAX_LEN = 2048
BLOCK = 32


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a random model of two layers with SmolLM2's tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = json.loads((smollm2 / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    model.generation_config.max_new_tokens = 16  # random weights never generate an end token
    model.to(torch.bfloat16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / file, directory / file)
    return directory


@pytest.fixture(scope="session")
def scoring_url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start stock vLLM with our plugin and connector, and yield its URL.

    It runs in float32. At this size, rounding to bf16 changes probabilities by up to 0.05, also in transformers, and
    a comparison with transformers could miss a mistake.
    """
    plan = LaunchPlan(
        environment=(Choice("VLLM_PLUGINS", "slimserve", "for the test"), Choice("SLIMSERVE_VARIANT", "one", "a label"))
    )
    extra = ["--enforce-eager", "--dtype", "float32", "--max-model-len", str(MAX_LEN), "--block-size", str(BLOCK)]
    # Short steps, because vLLM's gauges change once per step.
    extra += ["--max-num-batched-tokens", "256", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(2**29)]
    extra += ["--kv-transfer-config", json.dumps(PREFIX_CONNECTOR)]
    log = tmp_path_factory.mktemp("scoring") / "engine.log"
    spec = EngineSpec(smollm2, NAME, plan, log, free_port(), extra=tuple(extra), command=STOCK_COMMAND)
    with Engine(spec) as engine:
        yield engine.spec.url
