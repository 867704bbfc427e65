"""Tests of the kernel rules against the classes that vLLM itself chooses on this CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from slimserve.compress.formats import find_format, format_names, get_format
from slimserve.compress.kernels import explain_variant
from slimserve.core.hardware import Hardware, probe_hardware
from tests.conftest import needs_avx512

HARDWARE = Hardware(cpu="some CPU", cores=(0,), memory_gib=8.0, isa=("avx2", "avx512f", "avx512_vnni"), gpus=())
GPU_FORMATS = {"fp8-block", "w4a8", "w4a8-fp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"}
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}

ASK_VLLM = """
import json, sys, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_int8_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym
from vllm.scalar_type import scalar_types
def w4a16(inputs, outputs):
    try:
        return choose_mp_linear_kernel(MPLinearLayerConfig(
            full_weight_shape=(inputs, outputs), partition_weight_shape=(inputs, outputs), group_size=-1,
            weight_type=scalar_types.uint4b8, act_type=torch.bfloat16, zero_points=False)).__name__
    except ValueError as error:
        return str(error)
with set_current_vllm_config(VllmConfig()):
    int8 = init_int8_linear_kernel(True, False, True, "test")
    fp8 = init_fp8_linear_kernel(kFp8DynamicTokenSym, kFp8StaticChannelSym, torch.bfloat16, torch.bfloat16, (64, 64))
    kernels = {"w8a8": type(int8).__name__, "fp8": type(fp8).__name__, "w4a16": w4a16(576, 960)}
    kernels |= {"inputs": w4a16(1520, 576), "outputs": w4a16(576, 1000)}
print("RESULT" + json.dumps(kernels))
"""

ASK_AVX2 = """
import torch
try:
    import vllm._C_AVX2
except ImportError:
    pass  # the import loads the library, which is not a Python module
print("RESULT", hasattr(torch.ops._C, "cpu_gemm_wna16"), hasattr(torch.ops._C, "onednn_scaled_mm"))
"""


def config(name: str | None, **sizes: int) -> dict[str, Any]:
    if name is None:
        return {**SIZES, **sizes}
    quant_format = get_format(name)
    return {**SIZES, **sizes, "quantization_config": quant_format.quantization_config(quant_format.make_grid(), [])}


def explain(hardware: Hardware, name: str | None, **sizes: int) -> str:
    return "\n".join(explain_variant(hardware, config(name, **sizes)))


def ask(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-2000:]
    return lines[0].removeprefix("RESULT").strip()


@needs_avx512
def test_vllm_chooses_the_kernels_that_the_rules_name() -> None:
    pytest.importorskip("vllm")
    here = replace(probe_hardware(), gpus=())
    kernels = json.loads(ask(ASK_VLLM))
    for name in ("w8a8", "fp8", "w4a16"):
        assert kernels[name] in explain(here, name), name
    assert "multiples of 32" in kernels["inputs"]
    assert "multiples of 32" in kernels["outputs"]


def test_vllms_avx2_library_has_the_int8_product_but_no_4_bit_one() -> None:
    pytest.importorskip("vllm")
    assert ask(ASK_AVX2).split() == ["False", "True"]
    avx2 = replace(HARDWARE, isa=("avx2",))
    assert "needs AVX-512" in explain(avx2, "w4a16")
    assert "CPUInt8ScaledMMLinearKernel" in explain(avx2, "w8a8")
    assert "inexact" in explain(avx2, "w8a8")
    assert "inexact" not in explain(HARDWARE, "w8a8")
    assert "kernel for INT8 experts needs AMX" in explain(avx2, "w8a8", num_experts=8)
    assert "cannot run" not in explain(avx2, "w8a8", num_experts=0)
    amx = replace(HARDWARE, isa=("avx512f", "amx_tile"))
    assert "cannot run" not in explain(amx, "w8a8", num_experts=8)
    assert "kernel for INT4 experts needs AMX" in explain(HARDWARE, "w4a16", num_experts=8)


def test_int4_experts_need_groups_of_more_than_32_inputs() -> None:
    amx = replace(HARDWARE, isa=("avx512f", "amx_tile"))
    int4 = get_format("w4a16")
    for group_size, can_run in ((32, False), (64, True), (128, True)):
        quantized = int4.quantization_config(int4.make_grid(group_size=group_size), [])
        of_group = {**SIZES, "num_experts": 8, "quantization_config": quantized}
        assert ("no groups of 32 inputs" not in "\n".join(explain_variant(amx, of_group))) == can_run
        assert "cannot run" not in "\n".join(explain_variant(amx, of_group | {"num_experts": 0}))


@pytest.mark.parametrize(
    ("sizes", "odd"),
    [
        ({"intermediate_size": 1520}, 1520),
        ({"hidden_size": 580, "head_dim": 64}, 580),
        ({"num_attention_heads": 7, "head_dim": 24}, 168),
        ({"num_attention_heads": 4, "num_key_value_heads": 3, "head_dim": 8}, 80),
    ],
)
def test_a_size_that_the_4_bit_kernel_rejects_is_named(sizes: dict[str, int], odd: int) -> None:
    assert f"a layer has {odd}" in explain(HARDWARE, "w4a16", **sizes)
    assert "cannot run" not in explain(HARDWARE, "w8a8", **sizes)


def test_nf4_widths_that_bitsandbytes_decodes_wrongly_are_named() -> None:
    assert "wrong results" in explain(HARDWARE, "nf4", intermediate_size=1504)
    assert "wrong results" not in explain(HARDWARE, "nf4")
    assert "wrong results" not in explain(HARDWARE, "int8-bnb", intermediate_size=1504)


def test_the_activations_of_4_bit_models_are_rounded_on_cpus_with_amx() -> None:
    assert "VLLM_CPU_INT4_W4A8=0" in explain(replace(HARDWARE, isa=(*HARDWARE.isa, "amx_tile")), "w4a16")
    assert "VLLM_CPU_INT4_W4A8" not in explain(HARDWARE, "w4a16")


def test_formats_for_gpus_say_so_and_a_cpu_still_runs_fp8() -> None:
    assert {name for name in format_names() if get_format(name).needs_gpu} == GPU_FORMATS
    assert {name for name in format_names() if get_format(name).gpu_reason} == {"fp8", *GPU_FORMATS}
    for name in GPU_FORMATS:
        assert str(get_format(name).gpu_reason) in explain(HARDWARE, name)
    assert "AMX" in explain(replace(HARDWARE, isa=("amx_tile",)), "fp8-block")
    assert "needs a GPU of capability 8.9" in str(get_format("fp8").gpu_reason)
    assert "cannot run" not in explain(HARDWARE, "fp8")


@pytest.mark.parametrize("name", format_names())
def test_a_format_is_recognised_by_its_config(name: str) -> None:
    assert find_format(config(name)["quantization_config"]) is get_format(name)
    assert "CUDA" in explain(replace(HARDWARE, gpus=("NVIDIA L4, 23034 MiB",)), name)
