"""Tests of a model's bytes and FLOPs against a count by hand, and of its roofline on known hardware."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimserve.compress.formats import get_format
from slimserve.compress.quantize import round_to_nearest
from slimserve.core.hardware import Hardware
from slimserve.core.model_cost import ModelCost, read_model_cost
from slimserve.core.roofline import Roofline

_CONFIG = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
_INT8 = {"input_activations": {"type": "int", "num_bits": 8}, "weights": {"num_bits": 8}}
HARDWARE = Roofline(bandwidth=1e9, bf16_flops=2e12, int8_flops=6e12, source="measured")


def save(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(_CONFIG | config))
    return directory


def layer(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.0.{name}.weight": torch.zeros(outputs, inputs, dtype=torch.bfloat16)}


def test_a_tied_embedding_table_is_read_at_every_decode_step_and_costs_no_prefill_flops(tmp_path: Path) -> None:
    table = {"model.embed_tokens.weight": torch.zeros(11, 8, dtype=torch.bfloat16)}
    norm = {"model.norm.weight": torch.zeros(8, dtype=torch.bfloat16)}
    cost = read_model_cost(save(tmp_path, table | norm | layer("mlp.up_proj", 5, 8)))
    assert cost.weight_bytes == cost.decode_bytes == 2 * (11 * 8 + 8 + 5 * 8)
    assert cost.prefill_flops == 2 * 5 * 8
    assert cost.kv_bytes == 2 * 2 * 3 * 2 * 2  # key and value, 2 bytes, 3 layers, 2 heads, 2 values each
    assert cost.precision == "bf16"


def test_a_cpu_that_serves_in_float32_reads_twice_the_bytes_unless_the_model_is_quantized(tmp_path: Path) -> None:
    avx2 = Hardware(cpu="x", cores=(0,), memory_gib=1.0, isa=("avx2",), gpus=())
    directory = save(tmp_path, layer("mlp.up_proj", 5, 8))
    half, full = read_model_cost(directory), read_model_cost(directory, avx2)
    assert (full.weight_bytes, full.decode_bytes, full.kv_bytes) == (
        2 * half.weight_bytes,
        2 * half.decode_bytes,
        2 * half.kv_bytes,
    )
    assert full.prefill_flops == half.prefill_flops
    quantized = save(tmp_path, layer("mlp.up_proj", 5, 8), quantization_config={"config_groups": {"group_0": _INT8}})
    assert read_model_cost(quantized, avx2) == read_model_cost(quantized)


def test_an_untied_embedding_table_is_not_read_and_the_output_layer_costs_no_prefill_flops(
    tmp_path: Path,
) -> None:
    ends = {
        "model.embed_tokens.weight": torch.zeros(11, 8, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(11, 8, dtype=torch.int8),
    }
    cost = read_model_cost(save(tmp_path, ends | layer("mlp.up_proj", 5, 8), head_dim=5))
    assert cost.weight_bytes == 2 * 11 * 8 + 11 * 8 + 2 * 5 * 8
    assert cost.decode_bytes == 11 * 8 + 2 * 5 * 8
    assert cost.prefill_flops == 2 * 5 * 8
    assert cost.kv_bytes == 2 * 2 * 3 * 2 * 5


def test_int8_and_packed_weights_are_counted_as_weights_not_as_tensors(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(5, 8, dtype=torch.int8),
        "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(5, 1, dtype=torch.bfloat16),
    }
    cost = read_model_cost(save(tmp_path, tensors, quantization_config={"config_groups": {"group_0": _INT8}}))
    assert (cost.precision, cost.weight_bytes, cost.prefill_flops) == ("int8", 5 * 8 + 5 * 2, 2 * 5 * 8)
    packed = {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(5, 4, dtype=torch.int32)}
    int4 = {"weights": {"num_bits": 4}, "input_activations": None}
    cost = read_model_cost(save(tmp_path, packed, quantization_config={"config_groups": {"group_0": int4}}))
    assert (cost.precision, cost.weight_bytes, cost.prefill_flops) == ("bf16", 5 * 4 * 4, 2 * 5 * 32)


def test_a_group_for_the_output_layer_alone_does_not_set_the_precision_or_the_bits_of_the_layers(
    tmp_path: Path,
) -> None:
    packed = {
        "model.layers.0.mlp.up_proj.weight_packed": torch.zeros(5, 4, dtype=torch.int32),
        "lm_head.weight": torch.zeros(11, 8, dtype=torch.int8),
    }
    int4 = {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": None}
    groups = {"group_0": int4, "group_1": _INT8 | {"targets": ["lm_head"]}}
    cost = read_model_cost(save(tmp_path, packed, quantization_config={"config_groups": groups}))
    assert (cost.precision, cost.prefill_flops) == ("bf16", 2 * 5 * 32)


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "fp8", "nf4", "int8-bnb"])
def test_every_format_has_two_flops_for_each_weight_of_the_dense_model(tmp_path: Path, name: str) -> None:
    """The tensors and the `quantization_config` are those that a build of the format writes."""
    fmt = get_format(name)
    num_outputs, num_inputs = 16, 128
    weight_OI = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))
    grid = None if fmt.has_fixed_rounding else fmt.make_grid()
    (packed,) = fmt.pack([weight_OI], grid, lambda weight_OI, grid: round_to_nearest(weight_OI, None, grid))
    tensors = {f"model.layers.0.mlp.up_proj.{suffix}": tensor for suffix, tensor in packed.tensors.items()}
    config = fmt.quantization_config(grid, ["lm_head"])
    cost = read_model_cost(save(tmp_path, tensors | layer("mlp.down_proj", 6, 8), quantization_config=config))
    assert cost.prefill_flops == 2 * (num_outputs * num_inputs + 6 * 8)
    assert cost.precision == {"nf4": "bf16", "w4a16": "bf16", "fp8": "float8"}.get(name, "int8")


def test_an_fp8_checkpoint_without_groups_is_recognised(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(5, 8, dtype=torch.float8_e4m3fn)}
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    cost = read_model_cost(save(tmp_path, tensors, quantization_config=config))
    assert (cost.precision, cost.prefill_flops, cost.weight_bytes) == ("float8", 2 * 5 * 8, 5 * 8)


def test_packed_4_bit_weights_in_another_storage_dtype_count_by_their_bytes(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: torch.zeros(64, 1, dtype=torch.bfloat16), f"{name}.absmax": torch.zeros(4)}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
    assert read_model_cost(save(tmp_path, tensors, quantization_config=config)).prefill_flops == 2 * 256


def test_a_roofline_is_the_hardwares_rate_over_the_cost_of_a_token() -> None:
    cost = ModelCost(
        weight_bytes=4_000_000, decode_bytes=2_000_000, prefill_flops=1_000_000, kv_bytes=1024, precision="bf16"
    )
    assert (cost.decode_tokens_per_s(HARDWARE), cost.prefill_tokens_per_s(HARDWARE)) == (500.0, 2e6)
    int8 = replace(cost, precision="int8")
    assert int8.prefill_tokens_per_s(HARDWARE) == 6e6
    assert int8.prefill_tokens_per_s(Roofline(1e9, 2e12, 0.0, "measured")) is None
    fp8 = replace(cost, precision="float8")
    assert fp8.prefill_tokens_per_s(replace(HARDWARE, fp8_flops=4e12)) == 4e6
    assert fp8.prefill_tokens_per_s(HARDWARE) == 2e6, "without FP8 tensor cores the model is computed in bf16"
