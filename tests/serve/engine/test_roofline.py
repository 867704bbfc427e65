"""Bytes and FLOPs of a model counted by hand, roofs from a known machine, rates from known counters."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter
from safetensors.torch import save_file

import slimserve.serve.engine.roofline
from slimserve.core.roofline import Roofline
from slimserve.serve.engine.roofline import (
    Cost,
    Rates,
    chosen_kernels,
    describe_roof,
    describe_start,
    read_cost,
    register_roof,
)
from slimserve.serve.policy.metrics import RoofMetrics

_CONFIG = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
_INT8 = {"input_activations": {"type": "int", "num_bits": 8}, "weights": {"num_bits": 8}}
MACHINE = Roofline(bandwidth=1e9, bf16_flops=2e12, int8_flops=6e12, source="measured")


def save(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(_CONFIG | config))
    return directory


def layer(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.0.{name}.weight": torch.zeros(outputs, inputs, dtype=torch.bfloat16)}


def test_a_tied_table_is_read_at_every_step_and_is_no_work_for_a_prompt_token(tmp_path: Path) -> None:
    table = {"model.embed_tokens.weight": torch.zeros(11, 8, dtype=torch.bfloat16)}
    norm = {"model.norm.weight": torch.zeros(8, dtype=torch.bfloat16)}
    cost = read_cost(save(tmp_path, table | norm | layer("mlp.up_proj", 5, 8)))
    assert cost.weight_bytes == cost.decode_bytes == 2 * (11 * 8 + 8 + 5 * 8)
    assert cost.prefill_flops == 2 * 5 * 8
    assert cost.kv_bytes == 2 * 2 * 3 * 2 * 2  # key and value, 2 bytes, 3 layers, 2 heads, 2 values each
    assert not cost.is_int8


def test_an_untied_table_is_not_read_and_its_head_is_no_work_for_a_prompt_token(tmp_path: Path) -> None:
    ends = {
        "model.embed_tokens.weight": torch.zeros(11, 8, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(11, 8, dtype=torch.int8),
    }
    cost = read_cost(save(tmp_path, ends | layer("mlp.up_proj", 5, 8), head_dim=5))
    assert cost.weight_bytes == 2 * 11 * 8 + 11 * 8 + 2 * 5 * 8
    assert cost.decode_bytes == 11 * 8 + 2 * 5 * 8
    assert cost.prefill_flops == 2 * 5 * 8
    assert cost.kv_bytes == 2 * 2 * 3 * 2 * 5


def test_int8_and_packed_weights_are_counted_as_weights_not_as_tensors(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(5, 8, dtype=torch.int8),
        "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(5, 1, dtype=torch.bfloat16),
    }
    cost = read_cost(save(tmp_path, tensors, quantization_config={"config_groups": {"group_0": _INT8}}))
    assert (cost.is_int8, cost.weight_bytes, cost.prefill_flops) == (True, 5 * 8 + 5 * 2, 2 * 5 * 8)
    packed = {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(5, 4, dtype=torch.int32)}
    int4 = {"weights": {"num_bits": 4}, "input_activations": None}
    cost = read_cost(save(tmp_path, packed, quantization_config={"config_groups": {"group_0": int4}}))
    assert (cost.is_int8, cost.weight_bytes, cost.prefill_flops) == (False, 5 * 4 * 4, 2 * 5 * 32)


def test_the_roofs_are_what_the_machine_can_do_over_what_a_token_costs() -> None:
    cost = Cost(weight_bytes=4_000_000, decode_bytes=2_000_000, prefill_flops=1_000_000, kv_bytes=1024, is_int8=False)
    assert (cost.decode_roof(MACHINE), cost.prefill_roof(MACHINE)) == (500.0, 2e6)
    int8 = Cost(**asdict(cost) | {"is_int8": True})
    assert int8.prefill_roof(MACHINE) == 6e6
    assert int8.prefill_roof(Roofline(1e9, 2e12, 0.0, "measured")) is None
    lines = "\n".join(describe_roof(int8, MACHINE, {"W8A8": "SomeKernel"}))
    assert "W8A8: SomeKernel" in lines
    assert "decode roof 500 tokens/s a stream at 1.0 GB/s (measured)" in lines
    assert "prefill roof 6000000 tokens/s at 6.00 int8 TFLOP/s (measured)" in lines
    assert "unknown" in describe_roof(int8, None, {})[-1]

    registry = CollectorRegistry()
    register_roof(RoofMetrics(registry), int8, MACHINE, {"W8A8": "SomeKernel"})
    value = registry.get_sample_value
    assert value("slimserve_kernel_info", {"format": "W8A8", "kernel": "SomeKernel"}) == 1
    assert value("slimserve_decode_bytes_per_token") == 2_000_000
    assert value("slimserve_decode_roof_tokens_per_second") == 500
    assert value("slimserve_prefill_roof_tokens_per_second") == 6e6


def test_a_start_is_told_by_its_phases_and_a_model_that_cannot_be_read_is_no_reason_to_fail(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("x\nserve.entry: imported after 6.2 s\nINFO y\nserve.entry: engine ready after 20.1 s\n")
    phases, roof = describe_start(tmp_path, log)
    assert phases == "start: imported after 6.2 s, engine ready after 20.1 s"
    assert "config.json" in roof
    log.write_text("")
    assert describe_start(tmp_path, log) == [roof]


def test_kernels_are_read_from_the_lines_that_vllm_writes() -> None:
    log = (
        "(EngineCore pid=1) INFO 11-25 09:00:00 [__init__.py:846] Selected CPUInt8ScaledMMLinearKernel for "
        "CompressedTensorsW8A8Int8\n"
        "INFO 11-25 09:00:00 [x.py:1] Using MacheteLinearKernel for CompressedTensorsWNA16\n"
        "INFO 11-25 09:00:00 [model.py:2152] Using max model len 8192\n"
    )
    assert chosen_kernels(log) == {
        "CompressedTensorsW8A8Int8": "CPUInt8ScaledMMLinearKernel",
        "CompressedTensorsWNA16": "MacheteLinearKernel",
    }
    assert chosen_kernels("") == {}


def test_rates_are_what_was_counted_since_the_last_look_cached_prompts_left_out() -> None:
    source, registry = CollectorRegistry(), CollectorRegistry()
    generated = Counter("vllm:generation_tokens", "", ["model_name"], registry=source)
    prompt = Counter("vllm:prompt_tokens", "", registry=source)
    cached = Counter("vllm:prompt_tokens_cached", "", registry=source)
    now = 0.0
    rates, metrics = Rates(source, lambda: now), RoofMetrics(registry)
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


def test_the_watch_sets_the_gauges_of_a_model_and_its_engines_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    metrics = RoofMetrics(registry)
    log = tmp_path / "engine.log"
    log.write_text("Selected SomeLinearKernel for SomeFormat\n")
    monkeypatch.setenv("SLIMSERVE_ENGINE_LOG", str(log))
    monkeypatch.setattr("slimserve.serve.engine.roofline.roof_metrics", lambda: metrics)
    monkeypatch.setattr("slimserve.serve.engine.roofline.load_roofline", lambda hardware, measure: MACHINE)
    save(tmp_path, layer("mlp.up_proj", 5, 8))

    async def watch() -> None:
        task = asyncio.create_task(slimserve.serve.engine.roofline.watch_roof(str(tmp_path), window_s=0.01))
        await asyncio.sleep(0.2)
        task.cancel()

    asyncio.run(watch())
    assert registry.get_sample_value("slimserve_weight_bytes") == 80
    assert (
        registry.get_sample_value("slimserve_kernel_info", {"format": "SomeFormat", "kernel": "SomeLinearKernel"}) == 1
    )
    assert registry.get_sample_value("slimserve_decode_tokens_per_second") == 0
