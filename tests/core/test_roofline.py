"""Tests of the rooflines of GPUs from datasheets and of a CPU from a measurement."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import slimserve.core.roofline
from slimserve.core.hardware import Hardware
from slimserve.core.roofline import Roofline, load_roofline

_CPU = Hardware("Some CPU @ 2.0GHz", (0, 1), 8.0, (), ())
MACHINE = Roofline(bandwidth=1e9, bf16_flops=2e12, int8_flops=6e12, source="measured")


@pytest.mark.parametrize(
    ("gpu", "gb_per_s", "bf16_tflops", "fp8_tflops", "int8_tflops"),
    [
        ("NVIDIA A100-SXM4-40GB, 40960 MiB", 1555, 312, 312, 624),
        ("NVIDIA A100-SXM4-80GB, 81920 MiB", 2039, 312, 312, 624),
        ("NVIDIA A100-PCIE-40GB, 40960 MiB", 1555, 312, 312, 624),
        ("NVIDIA A100 80GB PCIe, 81920 MiB", 1935, 312, 312, 624),
        ("NVIDIA H100 80GB HBM3, 81559 MiB", 3352, 989, 1979, 1979),
        ("NVIDIA H100 PCIe, 81559 MiB", 2039, 756, 1513, 1513),
        ("NVIDIA H100 NVL, 95830 MiB", 3938, 835, 1671, 1671),
        ("NVIDIA H200, 143771 MiB", 4800, 989, 1979, 1979),
        ("NVIDIA B200, 183359 MiB", 8000, 2250, 4500, 4500),
        ("NVIDIA L4, 23034 MiB", 300, 121, 242, 242),
        ("NVIDIA L40S, 46068 MiB", 864, 362, 733, 733),
        ("NVIDIA GeForce RTX 4090, 24564 MiB", 1008, 165.2, 330.3, 660.6),
    ],
)
def test_a_known_gpu_has_its_datasheet_values(
    gpu: str, gb_per_s: float, bf16_tflops: float, fp8_tflops: float, int8_tflops: float
) -> None:
    """The numbers are those of NVIDIA's datasheets without sparsity, which round; an A100 computes FP8 in bf16."""
    machine = load_roofline(Hardware("cpu", (0,), 1.0, (), (gpu,)))
    assert machine is not None
    assert machine.bandwidth == pytest.approx(gb_per_s * 1e9)
    assert machine.source == "datasheet"
    rates = [machine.flops(precision) / 1e12 for precision in ("bf16", "float8", "int8")]
    assert rates == pytest.approx([bf16_tflops, fp8_tflops, int8_tflops], rel=0.02)
    assert machine.computed_precision("float8") == ("bf16" if "A100" in gpu else "float8")


@pytest.mark.parametrize("gpu", ["NVIDIA GeForce RTX 3090", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA H1000"])
def test_a_gpu_whose_name_only_contains_a_known_one_is_unknown(gpu: str) -> None:
    assert load_roofline(Hardware("cpu", (0,), 1.0, (), (f"{gpu}, 24576 MiB",))) is None


def test_a_cpu_is_measured_once_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path))
    assert load_roofline(_CPU, measure=False) is None
    runs: list[dict[str, str]] = []

    def measure(command: list[str], env: dict[str, str], **options: object) -> None:
        assert command[-1] == "slimserve.core.roofline"
        runs.append(env)
        slimserve.core.roofline._cache_file(_CPU).write_text(json.dumps(asdict(MACHINE)))

    monkeypatch.setattr("slimserve.core.roofline.subprocess.run", measure)
    monkeypatch.setattr("slimserve.core.roofline.openmp_library", lambda: "x")
    assert [load_roofline(_CPU) for _ in range(2)] == [MACHINE, MACHINE]
    assert [env["LD_PRELOAD"] for env in runs] == ["x"]
    assert load_roofline(Hardware("Some CPU @ 2.0GHz", (0,), 8.0, (), ()), measure=False) is None


def test_a_measurement_gives_plausible_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    real = slimserve.core.roofline._best_s
    monkeypatch.setattr("slimserve.core.roofline._best_s", lambda run: real(run, 0.05))
    machine = slimserve.core.roofline._measure()
    assert 1e8 < machine.bandwidth < 1e13
    assert 1e8 < machine.bf16_flops < 1e16, "0.6 GFLOP/s were measured on a CPU with AVX2 only"
    assert machine.source == "measured"
