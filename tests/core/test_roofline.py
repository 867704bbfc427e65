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
    ("gpu", "bandwidth"),
    [("NVIDIA H200, 143771 MiB", 4.8e12), ("NVIDIA H100 PCIe, 81559 MiB", 2.0e12), ("NVIDIA L4, 23034 MiB", 0.3e12)],
)
def test_a_known_gpu_has_its_datasheet_values(gpu: str, bandwidth: float) -> None:
    machine = load_roofline(Hardware("cpu", (0,), 1.0, (), (gpu,)))
    assert machine is not None
    assert (machine.bandwidth, machine.source) == (bandwidth, "datasheet")
    assert load_roofline(Hardware("cpu", (0,), 1.0, (), ("NVIDIA GeForce RTX 3090, 24576 MiB",))) is None


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
