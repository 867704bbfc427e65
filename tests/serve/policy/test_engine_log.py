"""Tests of reading an engine's log."""

from __future__ import annotations

from slimserve.serve.policy.engine_log import chosen_kernels, phase_line, start_phases


def test_kernels_are_read_from_the_lines_that_vllm_logs() -> None:
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


def test_start_phases_are_read_back_from_the_lines_that_we_log() -> None:
    log = "x\n" + phase_line("imported", 6.2) + "\nINFO y\n" + phase_line("engine ready", 20.12) + "\n"
    assert start_phases(log) == [("imported", 6.2), ("engine ready", 20.1)]
