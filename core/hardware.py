"""The hardware of this machine: cores, memory, instruction sets and GPUs."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "bf16")


@dataclass(frozen=True)
class Hardware:
    """The facts of one machine that launch plans and reports need."""

    cpu: str
    cores: tuple[int, ...]
    """Logical cores that this process may use, ascending: its affinity mask, limited by a container's CPU quota."""
    memory_gib: float
    """Memory of the machine, or of the container if that is less."""
    isa: tuple[str, ...]
    gpus: tuple[str, ...]
    """Name and memory of each NVIDIA GPU; empty without a GPU."""
    numa_nodes: int = 1

    @property
    def has_bf16_products(self) -> bool:
        """Tell whether this machine has instructions for products in bfloat16, or emulates them in AVX-512.

        On a CPU with AVX2 alone, torch's products in bfloat16 take six times as long as in float32 (measured). AVX-512
        without bfloat16 instructions, and Arm, were not measured.
        """
        return bool(self.gpus) or bool({"avx512f", "amx_tile", "bf16"} & set(self.isa))

    def serves_in_float32(self, config: Mapping[str, Any]) -> bool:
        """Tell whether engines here compute the model of this config.json in float32: it is not quantized."""
        return not (self.has_bf16_products or config.get("quantization_config"))

    def as_dict(self) -> dict[str, object]:
        """Return the facts as JSON types, with lists instead of tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@cache
def probe_hardware() -> Hardware:
    """Read the facts once per process. It does not import torch and starts no program except `nvidia-smi`."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    facts: dict[str, str] = {}
    for line in cpuinfo.split("\n"):
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    if hasattr(os, "sched_getaffinity"):
        cores = tuple(sorted(os.sched_getaffinity(0)))
    else:
        cores = tuple(range(os.cpu_count() or 1))
    return Hardware(
        cpu=facts.get("model name") or platform.processor() or platform.machine(),
        cores=cores[: _cpu_quota(_CGROUP) or None],
        memory_gib=round(min(psutil.virtual_memory().total, _memory_limit(_CGROUP)) / 2**30, 1),
        isa=tuple(flag for flag in _ISA_FLAGS if flag in flags),
        gpus=_probe_gpus(),
        numa_nodes=len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
    )


def openmp_library() -> str | None:
    """Return the library of the `intel-openmp` package, which vLLM's CPU guide preloads on x86; None if absent."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return str(library) if library.exists() else None


def _cpu_quota(cgroup: Path) -> int:
    """Return the number of cores in a container's quota (cgroup v2), at least 1; 0 without a quota."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
        if quota != "max":
            return max(1, int(quota) // int(period))
    return 0


def _memory_limit(cgroup: Path) -> float:
    """Return the memory limit of a container (cgroup v2) in bytes; infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):
        return float((cgroup / "memory.max").read_text(encoding="utf-8").replace("max", "inf"))
    return float("inf")


def _probe_gpus() -> tuple[str, ...]:
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in listing.stdout.split("\n") if line.strip())
