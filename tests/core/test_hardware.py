from pathlib import Path

import pytest

from slimserve.core.hardware import _cpu_quota, _memory_limit, probe_hardware


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 0), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("", 0), ("x y", 0)],
)
def test_a_containers_cpu_quota_is_rounded_down_to_full_cores(tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert _cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("text", "limit"), [("max\n", float("inf")), ("1073741824\n", 2**30), ("?", float("inf"))])
def test_a_containers_memory_limit_is_read_in_bytes(tmp_path: Path, text: str, limit: float) -> None:
    (tmp_path / "memory.max").write_text(text)
    assert _memory_limit(tmp_path) == limit


def test_without_a_container_there_is_no_limit(tmp_path: Path) -> None:
    assert _cpu_quota(tmp_path) == 0
    assert _memory_limit(tmp_path) == float("inf")


def test_this_machine_has_a_core_and_memory() -> None:
    hardware = probe_hardware()
    assert hardware.cores
    assert 0 < hardware.memory_gib < 2**20
    assert hardware.numa_nodes >= 1
