"""Tests of rates from known counters, and of the metrics of a model and its engine's log."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter
from safetensors.torch import save_file

import slimserve.serve.engine.roofline
from slimserve.core.hardware import Hardware
from slimserve.core.model_cost import ModelCost
from slimserve.core.roofline import Roofline
from slimserve.serve.engine.roofline import TokenRates, set_constants
from slimserve.serve.policy.metrics import RooflineMetrics

COST = ModelCost(
    weight_bytes=4_000_000, decode_bytes=2_000_000, prefill_flops=1_000_000, kv_bytes=1024, precision="int8"
)
HARDWARE = Roofline(bandwidth=1e9, bf16_flops=2e12, int8_flops=6e12, source="measured")


def test_the_constants_are_set_from_the_model_and_the_hardware() -> None:
    registry = CollectorRegistry()
    set_constants(RooflineMetrics(registry), COST, HARDWARE, {"W8A8": "SomeKernel"})
    value = registry.get_sample_value
    assert value("slimserve_kernel_info", {"format": "W8A8", "kernel": "SomeKernel"}) == 1
    assert value("slimserve_decode_bytes_per_token") == 2_000_000
    assert value("slimserve_decode_roofline_tokens_per_second") == 500
    assert value("slimserve_prefill_roofline_tokens_per_second") == 6e6


def test_rates_count_tokens_since_the_last_update_without_cached_prompts() -> None:
    source, registry = CollectorRegistry(), CollectorRegistry()
    generated = Counter("vllm:generation_tokens", "", ["model_name"], registry=source)
    prompt = Counter("vllm:prompt_tokens", "", registry=source)
    cached = Counter("vllm:prompt_tokens_cached", "", registry=source)
    now = 0.0
    rates, metrics = TokenRates(source, lambda: now), RooflineMetrics(registry)
    generated.labels("a").inc(30)
    prompt.inc(500)
    cached.inc(400)
    now = 10.0
    rates.update(metrics)
    assert registry.get_sample_value("slimserve_decode_tokens_per_second") == 3
    assert registry.get_sample_value("slimserve_prefill_tokens_per_second") == 10
    now = 20.0
    rates.update(metrics)
    assert registry.get_sample_value("slimserve_decode_tokens_per_second") == 0


def test_the_metrics_of_a_model_and_its_engines_log_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    metrics = RooflineMetrics(registry)
    log = tmp_path / "engine.log"
    log.write_text("Selected SomeLinearKernel for SomeFormat\n")
    monkeypatch.setenv("SLIMSERVE_ENGINE_LOG", str(log))
    monkeypatch.setattr("slimserve.serve.engine.roofline.roofline_metrics", lambda: metrics)
    monkeypatch.setattr("slimserve.serve.engine.roofline.load_roofline", lambda hardware, measure: HARDWARE)
    cpu = Hardware(cpu="x", cores=(0,), memory_gib=1.0, isa=("avx512f",), gpus=())
    monkeypatch.setattr("slimserve.serve.engine.roofline.probe_hardware", lambda: cpu)
    weight = {"model.layers.0.mlp.up_proj.weight": torch.zeros(5, 8, dtype=torch.bfloat16)}
    save_file(weight, tmp_path / "model.safetensors")
    sizes = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(sizes))

    async def export() -> None:
        task = asyncio.create_task(slimserve.serve.engine.roofline.export_roofline(str(tmp_path), window_s=0.01))
        await asyncio.sleep(0.2)
        task.cancel()

    asyncio.run(export())
    assert registry.get_sample_value("slimserve_weight_bytes") == 80
    assert (
        registry.get_sample_value("slimserve_kernel_info", {"format": "SomeFormat", "kernel": "SomeLinearKernel"}) == 1
    )
    assert registry.get_sample_value("slimserve_decode_tokens_per_second") == 0
