"""Tests of activations that stay in memory; a GPU is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimserve.compress import stream
from slimserve.compress.activations import ActivationFile, MemoryActivations
from slimserve.compress.device import make_store

from .conftest import GPTQ, KV, TinyModel, build_on_data


def test_activations_leave_the_gpu_for_pinned_memory_and_then_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def record(*_: Any, **options: Any) -> torch.Tensor:
        made.append(options)
        return torch.zeros(1)

    monkeypatch.setattr(torch, "empty", record)
    for num_tokens, place in ((2**9, "cuda"), (2**20, "cpu"), (2**30, "file")):
        store = make_store(tmp_path / "x", 4, num_tokens, 256, torch.bfloat16, torch.device("cuda"))
        if place == "file":
            assert isinstance(store, ActivationFile)
        else:
            assert (str(made[-1]["device"]), made[-1]["pin_memory"]) == (place, place == "cpu")
    assert isinstance(make_store(tmp_path / "y", 1, 1, 1, torch.float32, torch.device("cpu")), ActivationFile)


def test_activations_in_memory_give_the_same_bytes_as_files(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_files = load_file(build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "files") / "model.safetensors")
    monkeypatch.setattr(
        stream, "make_store", lambda _, n, t, i, dtype, device: MemoryActivations(torch.empty(n, t, i, dtype=dtype))
    )
    in_memory = load_file(build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "memory") / "model.safetensors")
    assert all(torch.equal(in_files[name], in_memory[name]) for name in in_files)
