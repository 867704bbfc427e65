import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils.chat_template_utils import render_jinja_template

from slimserve.core.hardware import Hardware
from slimserve.core.model_config import kv_values_of
from slimserve.serve.launch import plan as module
from slimserve.serve.launch.plan import Choice, LaunchPlan, TrafficProfile, plan_launch
from slimserve.serve.policy.engine_environment import PACKED_GEMM_VARIABLE
from slimserve.serve.policy.rerank_templates import TEMPLATES

CPU = Hardware(cpu="x", cores=(0, 1), memory_gib=24.0, isa=("avx512f",), gpus=())
CONFIG = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
}


def planned(directory: Path, hardware: Hardware = CPU, **changes: object) -> dict[str, str]:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    plan = plan_launch(directory, hardware)
    return {choice.name: choice.value for choice in (*plan.arguments, *plan.environment)}


def test_a_cpu_gives_every_core_to_the_worker_and_small_blocks_to_the_cache(tmp_path: Path) -> None:
    settings = planned(tmp_path)
    assert settings["OMP_NUM_THREADS"] == "2"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in settings
    assert settings["--block-size"] == "32"
    assert int(settings["--kv-cache-memory-bytes"]) == pytest.approx(2.4 * 2**30, rel=1e-6)
    assert settings["VLLM_NO_USAGE_STATS"] == "1"
    assert "--max-model-len" not in settings


def test_a_model_whose_longest_sequence_does_not_fit_gets_a_shorter_one(tmp_path: Path) -> None:
    settings = planned(tmp_path, num_hidden_layers=80, num_key_value_heads=9, max_position_embeddings=131072)
    longest = int(settings["--max-model-len"])
    bytes_per_token = 2 * 80 * 9 * 64 * 2
    kv_bytes = int(settings["--kv-cache-memory-bytes"])
    assert longest % 32 == 0
    assert longest * bytes_per_token <= kv_bytes < (longest + 32) * bytes_per_token


def test_a_cpu_without_bf16_products_computes_unquantized_models_in_float32(tmp_path: Path) -> None:
    avx2 = replace(CPU, isa=("avx2",))
    assert planned(tmp_path, avx2)["--dtype"] == "float32"
    assert "--dtype" not in planned(tmp_path, avx2, quantization_config={"quant_method": "compressed-tensors"})
    assert "--dtype" not in planned(tmp_path)
    assert "--dtype" not in planned(tmp_path, replace(avx2, gpus=("NVIDIA H100, 81559 MiB",)))
    long = {"num_hidden_layers": 80, "num_key_value_heads": 9, "max_position_embeddings": 131072}
    longest = [int(planned(tmp_path, machine, **long)["--max-model-len"]) for machine in (CPU, avx2)]
    assert longest[0] // 64 * 32 == longest[1]  # a key and a value take four bytes instead of two


@pytest.mark.parametrize("stated", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": None}])
def test_a_quantized_float16_model_is_computed_in_bfloat16_on_a_cpu(tmp_path: Path, stated: dict[str, object]) -> None:
    """vLLM's CPU kernels of quantized layers abort the engine's start for float16."""
    save_file({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(3, 1).half()}, tmp_path / "model.safetensors")
    config = CONFIG | stated
    for quantization, expected in (({"quant_method": "compressed-tensors"}, "bfloat16"), (None, None)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        arguments = {choice.name: choice for choice in plan_launch(tmp_path, CPU).arguments}
        assert (arguments["--dtype"].value if "--dtype" in arguments else None) == expected
        if expected:
            assert "no float16" in arguments["--dtype"].reason
            assert "--dtype" not in {
                choice.name for choice in plan_launch(tmp_path, replace(CPU, gpus=("NVIDIA H100",))).arguments
            }


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 8, "n_positions": 64},
        {"model_type": "gemma3", "text_config": CONFIG},
        {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 2},
        CONFIG | {"quantization_config": None, "num_key_value_heads": None, "head_dim": None},
    ],
)
def test_configs_with_other_names_nulls_or_a_text_config_get_a_plan(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "--block-size" in {choice.name for choice in plan_launch(tmp_path, CPU).arguments}


FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "gemma3n", "phi3", "granite", "olmo2"),
    *("smollm3", "qwen3_moe", "olmoe", "gpt_neox", "opt", "gpt2", "gpt_bigcode", "bloom", "falcon", "mpt", "mamba"),
    *("jamba", "lfm2", "deepseek_v3", "mistral3", "llama4", "qwen3_next", "t5", "rwkv", "openai-gpt"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_own_config_gets_a_plan(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    names = {choice.name for choice in plan_launch(tmp_path, CPU).arguments}
    assert {"--block-size", "--kv-cache-memory-bytes"} <= names


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"n_layer": 2, "n_head": 4, "n_embd": 32}, 2 * 2 * 4 * 8),  # gpt2
        ({"n_layer": 2, "n_head": 4, "n_embd": 32, "multi_query": True}, 2 * 2 * 1 * 8),  # gpt_bigcode
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "hidden_size": 32,
                "multi_query": True,
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
            },
            2 * 2 * 2 * 8,
        ),  # falcon
        ({"text_config": {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}}, 2 * 2 * 4 * 16),
        (
            {
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "head_dim": 16,
                "layer_types": ["conv", "full_attention", "linear_attention"],
            },
            2 * 1 * 4 * 16,
        ),
    ],
)
def test_the_context_memory_follows_from_old_nested_and_hybrid_configs(config: dict[str, Any], values: int) -> None:
    assert kv_values_of(config) == values


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "new"},
        {"model_type": "new", "architectures": None, "num_attention_heads": [4, 2], "num_hidden_layers": 2},
        {"model_type": "new", "architectures": "X", "layer_types": 7, "head_dim": "x", "hidden_size": 8},
        {"model_type": 3, "text_config": {}, "quantization_config": {}, "intermediate_size": [8, 16]},
        {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 16, "max_position_embeddings": 64},
    ],
)
def test_an_odd_config_gets_a_plan_or_one_clear_line(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_launch(tmp_path, CPU).environment


def test_a_model_with_a_classification_head_is_a_pooler_with_the_prompt_of_its_family(tmp_path: Path) -> None:
    directory = tmp_path / "Qwen3-Reranker-0.6B-seq-cls"
    directory.mkdir()
    config = CONFIG | {"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}
    (directory / "config.json").write_text(json.dumps(config))
    settings = {choice.name: choice.value for choice in plan_launch(directory, CPU).arguments}
    assert settings["--runner"] == "pooling"
    assert not {"--block-size", "--kv-transfer-config", "--tool-call-parser", "--max-model-len"} & settings.keys()
    template = Path(settings["--chat-template"]).read_text()
    messages = [{"role": "query", "content": "who {document}?"}, {"role": "document", "content": "me {query}"}]
    shown, _ = render_jinja_template([messages], chat_template=template)
    before, between, after = TEMPLATES["qwen3-reranker"].parts()
    assert shown == [f"{before}who {{document}}?{between}me {{query}}{after}"]
    other = tmp_path / "bge-reranker-v2-m3"
    other.mkdir()
    (other / "config.json").write_text(
        json.dumps({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"]})
    )
    assert "--chat-template" not in {choice.name for choice in plan_launch(other, CPU).arguments}


def test_only_a_cpu_with_amx_has_a_packed_kernel_to_choose(tmp_path: Path) -> None:
    assert PACKED_GEMM_VARIABLE not in planned(tmp_path)
    assert planned(tmp_path, replace(CPU, isa=("avx512f", "amx_tile")))[PACKED_GEMM_VARIABLE] == "1024"


def test_a_gpu_keeps_vllms_defaults_except_where_its_documentation_advises_otherwise(tmp_path: Path) -> None:
    gpu = Hardware(cpu="x", cores=(0,), memory_gib=64.0, isa=(), gpus=("NVIDIA H100, 81559 MiB",))
    assert set(planned(tmp_path, gpu)) == {"VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE", "VLLM_PLUGINS"}
    for profile, num_variants, expected in (
        ("prefill", 1, {"--max-num-batched-tokens": "16384"}),
        ("decode", 1, {"--max-num-batched-tokens": "2048"}),
        ("balanced", 3, {"--gpu-memory-utilization": "0.300"}),
    ):
        arguments = plan_launch(tmp_path, gpu, cast("TrafficProfile", profile), num_variants).arguments
        assert {choice.name: choice.value for choice in arguments} == expected
        assert all("unmeasured" in choice.reason for choice in arguments)


def test_libraries_that_are_not_there_are_not_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_fast_allocator", lambda: None)
    monkeypatch.setattr(module, "openmp_library", lambda: None)
    assert "LD_PRELOAD" not in planned(tmp_path)


@pytest.mark.parametrize(
    ("cores", "text"), [((0,), "0"), ((0, 1, 2, 3), "0-3"), ((0, 2, 3, 9), "0,2-3,9"), ((5, 7), "5,7")]
)
def test_cores_are_written_as_vllm_reads_them(tmp_path: Path, cores: tuple[int, ...], text: str) -> None:
    hardware = Hardware(cpu="x", cores=cores, memory_gib=24.0, isa=(), gpus=(), numa_nodes=2)
    assert planned(tmp_path, hardware)["VLLM_CPU_OMP_THREADS_BIND"] == text


def test_on_several_numa_nodes_vllm_keeps_its_own_worker_process(tmp_path: Path) -> None:
    two_nodes = Hardware(cpu="x", cores=(0, 1), memory_gib=24.0, isa=(), gpus=(), numa_nodes=2)
    assert "SLIMSERVE_FORK_ENGINE" in planned(tmp_path)
    assert not {"SLIMSERVE_FORK_ENGINE", "VLLM_ENABLE_V1_MULTIPROCESSING"} & planned(tmp_path, two_nodes).keys()


def test_candidates_share_partial_blocks_except_in_the_decode_profile(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    profiles: dict[TrafficProfile, bool] = {"balanced": True, "prefill": True, "decode": False}
    for profile, shared in profiles.items():
        names = {choice.name for choice in plan_launch(tmp_path, CPU, profile).arguments}
        assert ("--kv-transfer-config" in names) == shared


def test_variants_on_one_machine_divide_the_kv_cache(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    alone, beside = (
        next(choice for choice in plan_launch(tmp_path, CPU, num_variants=number).arguments if "memory" in choice.name)
        for number in (1, 2)
    )
    assert int(beside.value) == int(alone.value) // 2


@pytest.mark.parametrize("extra", [["--block-size", "64"], ["--block-size=64"]])
def test_the_users_flags_override_the_plan(extra: list[str]) -> None:
    plan = LaunchPlan((Choice("--block-size", "32", "why"), Choice("--max-model-len", "4096", "why")))
    assert plan.command_line(extra) == ["--max-model-len", "4096", *extra]


def test_every_choice_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    plan = plan_launch(tmp_path, CPU)
    for choice in (*plan.arguments, *plan.environment):
        assert f"{choice.name}={choice.value}\n    {choice.reason}" in plan.explain()
        assert len(choice.reason) > 10
