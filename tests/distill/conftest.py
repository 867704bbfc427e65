"""Tiny random models that read SmolLM2's tokens, so that real texts, templates and workloads can be used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from slimserve.core.config import validated
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.train import Trainer

VOCABULARY = 49_152


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def save_tiny(smollm2: Path, directory: Path, seed: int, **sizes: Any) -> Path:
    """Save a random Llama of odd sizes with SmolLM2's tokenizer; by default grouped-query and tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            **sizes,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (smollm2 / name).exists():
            shutil.copyfile(smollm2 / name, directory / name)
    return directory


@pytest.fixture
def tiny_student(smollm2: Path, tmp_path: Path) -> Path:
    return save_tiny(smollm2, tmp_path / "student", 1)


@pytest.fixture
def tiny_teacher(smollm2: Path, tmp_path: Path) -> Path:
    return save_tiny(smollm2, tmp_path / "teacher", 2, hidden_size=36, num_hidden_layers=3, tie_word_embeddings=False)


def make_recipe(**tables: Any) -> DistillRecipe:
    """Return a recipe of a few short steps in float32, with `tables` merged into it."""
    raw: dict[str, Any] = {
        "data": {"source": "reasoning", "num_examples": 12, "num_validation": 1, "max_tokens": 512},
        # A vocabulary of 49,152 makes every target expensive.
        "supervision": {"sections": "cot+answer"},
        "training": {
            "batch_size": 4,
            "micro_batch_tokens": 1000,
            "precision": "float32",
            "learning_rate": 1e-3,
            "save_every_s": 0,
            "validate_every": 4,
        },
        "stages": [{"steps": 3}],
    }
    for name, table in tables.items():
        raw[name] = {**raw.get(name, {}), **table} if isinstance(table, dict) else table
    return validated(DistillRecipe, raw, "recipe", "test")


class Killed(BaseException):
    """Stands for a kill; a BaseException, so that no handler for errors catches it."""


def kill_after(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run end after `num_steps` steps, before it can save the last one."""
    real, left = Trainer.record, [num_steps]

    def record(trainer: Trainer, *arguments: Any) -> None:
        real(trainer, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(Trainer, "record", record)
