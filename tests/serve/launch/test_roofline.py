"""Tests of the printed lines about a start and a roofline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slimserve.core.model_cost import ModelCost
from slimserve.core.roofline import Roofline
from slimserve.serve.launch.roofline import describe_roofline, describe_start

COST = ModelCost(
    weight_bytes=4_000_000, decode_bytes=2_000_000, prefill_flops=1_000_000, kv_bytes=1024, precision="int8"
)
HARDWARE = Roofline(bandwidth=1e9, bf16_flops=2e12, int8_flops=6e12, source="measured")


def test_the_lines_name_kernels_and_rooflines() -> None:
    lines = "\n".join(describe_roofline(COST, HARDWARE, {"W8A8": "SomeKernel"}))
    assert "W8A8: SomeKernel" in lines
    assert "decode roofline 500 tokens/s per stream at 1.0 GB/s (measured)" in lines
    assert "prefill roofline 6000000 tokens/s at 6.00 int8 TFLOP/s (measured)" in lines
    assert "unknown" in describe_roofline(COST, None, {})[-1]


def test_the_precision_of_the_prefill_roofline_is_the_one_that_the_hardware_computes_in() -> None:
    fp8 = replace(COST, precision="float8")
    assert "at 2.00 bf16 TFLOP/s" in describe_roofline(fp8, HARDWARE, {})[-1], "without FP8 tensor cores"
    assert "at 4.00 float8 TFLOP/s" in describe_roofline(fp8, replace(HARDWARE, fp8_flops=4e12), {})[-1]


def test_a_start_lists_its_phases_and_an_unreadable_model_is_no_error(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("x\nslimserve.start: imported after 6.2 s\nINFO y\nslimserve.start: engine ready after 20.1 s\n")
    phases, roofline = describe_start(tmp_path, log)
    assert phases == "start: imported after 6.2 s, engine ready after 20.1 s"
    assert "config.json" in roofline
    log.write_text("")
    assert describe_start(tmp_path, log) == [roofline]


def test_a_deleted_log_is_no_error(tmp_path: Path) -> None:
    (line,) = describe_start(tmp_path, tmp_path / "deleted.log")
    assert "deleted.log" in line
