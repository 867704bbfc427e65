"""Tests of vLLM's matrix products after the plugin was registered."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers import utils

from slimserve.serve.engine.gemm import register_gemm, register_int8_inputs
from slimserve.serve.policy.engine_environment import PACKED_GEMM_VARIABLE

Chooser = Callable[[int, int, torch.dtype], bool]


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    """Return vLLM's own chooser on a machine with AMX; the test's changes are undone afterwards."""
    chooser: Chooser = utils.check_cpu_sgl_kernel
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", chooser)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    return chooser


def test_narrow_bf16_layers_of_any_size_get_the_packed_kernel(before: Chooser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PACKED_GEMM_VARIABLE, "1024")
    assert not before(576, 1536, torch.bfloat16), "vLLM has changed its rule; serve/engine/gemm.py is no longer needed"
    register_gemm()
    assert utils.check_cpu_sgl_kernel(576, 1536, torch.bfloat16)
    assert utils.check_cpu_sgl_kernel(1008, 8192, torch.bfloat16)
    for n, k, dtype in (
        (1024, 8192, torch.bfloat16),
        (576, 1535, torch.bfloat16),
        (577, 1536, torch.bfloat16),
        (576, 1536, torch.float32),
        (576, 1536, torch.int8),
        (3072, 576, torch.bfloat16),
    ):
        assert utils.check_cpu_sgl_kernel(n, k, dtype) == before(n, k, dtype)


def test_nothing_changes_without_the_setting_or_without_amx(before: Chooser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PACKED_GEMM_VARIABLE, raising=False)
    register_gemm()
    assert utils.check_cpu_sgl_kernel is before
    monkeypatch.setenv(PACKED_GEMM_VARIABLE, "1024")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    register_gemm()
    assert not utils.check_cpu_sgl_kernel(576, 1536, torch.bfloat16)


def test_int8_inputs_with_a_batch_dimension_give_the_outputs_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    of_matrices = CPUInt8ScaledMMLinearKernel._apply_weights_sgl
    assert "int8_scaled_mm_with_quant" in inspect.getsource(of_matrices)

    def product(_self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert x.dim() == 2, "mat1 must be a 2D tensor"
        return torch.nn.functional.linear(x, layer.weight, bias)

    monkeypatch.setattr(CPUInt8ScaledMMLinearKernel, "_apply_weights_sgl", product)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    register_int8_inputs()
    assert CPUInt8ScaledMMLinearKernel._apply_weights_sgl is product
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    register_int8_inputs()
    layer, bias = torch.nn.Linear(7, 5), torch.randn(5)
    for shape in ((3,), (2, 3), (2, 1, 3)):
        x = torch.randn(*shape, 7)
        found = CPUInt8ScaledMMLinearKernel._apply_weights_sgl(None, layer, x, bias)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, layer.weight, bias))
