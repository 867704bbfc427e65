"""The roofline of this machine: its highest memory bandwidth and FLOP rate.

A CPU is measured once and the result is cached; `python -m slimserve.core.roofline` measures it again. The values of a
GPU come from its datasheet.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimserve.core.hardware import Hardware, openmp_library, probe_hardware
from slimserve.core.progress import print_status
from slimserve.core.storage import cache_dir, write_atomically

_MEASURE_TIMEOUT_S = 60
_MATRIX_SIZES = (128, 256, 512, 1024, 2048)
_LONG_PRODUCT_S = 0.05
"""Duration of a product from which larger matrices bring no better estimate."""


@dataclass(frozen=True)
class Roofline:
    """The upper limits of the hardware."""

    bandwidth: float
    """Memory read bandwidth in bytes/s."""
    bf16_flops: float
    """FLOP/s of a large bfloat16 matrix product."""
    int8_flops: float
    """FLOP/s of a large int8 matrix product; 0 if torch cannot compute it here."""
    source: str
    """`measured` for a CPU, `datasheet` for a GPU."""


_GPUS = {
    "H200": Roofline(4.8e12, 989e12, 1979e12, "datasheet"),
    "H100 PCIe": Roofline(2.0e12, 756e12, 1513e12, "datasheet"),
    "H100": Roofline(3.35e12, 989e12, 1979e12, "datasheet"),
    "A100-PCIE-40GB": Roofline(1.555e12, 312e12, 624e12, "datasheet"),
    "A100-SXM4-40GB": Roofline(1.555e12, 312e12, 624e12, "datasheet"),
    "A100": Roofline(1.935e12, 312e12, 624e12, "datasheet"),
    "L4": Roofline(0.3e12, 121e12, 242e12, "datasheet"),
}
"""Datasheet values by part of the name that nvidia-smi prints; the first match counts. Dense products, no sparsity."""


def load_roofline(hardware: Hardware | None = None, measure: bool = True) -> Roofline | None:
    """Return the roofline of this machine; None for an unknown GPU, or if `measure` is false and none is cached.

    Measuring takes two seconds on all cores in a process that imports torch, so call it before an engine starts. The
    process preloads the same OpenMP library as engines, which makes int8 products eight times as fast.
    """
    hardware = hardware or probe_hardware()
    if hardware.gpus:
        return next((roofline for name, roofline in _GPUS.items() if name in hardware.gpus[0]), None)
    file = _cache_file(hardware)
    if not file.exists() and measure:
        print_status("measuring this machine's memory bandwidth and FLOP/s, once")
        try:
            subprocess.run(
                [sys.executable, "-m", "slimserve.core.roofline"],
                env=os.environ | ({"LD_PRELOAD": library} if (library := openmp_library()) else {}),
                timeout=_MEASURE_TIMEOUT_S,
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None  # the roofline is informative only, so a failure does not stop the command
    try:
        return Roofline(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _cache_file(hardware: Hardware) -> Path:
    name = re.sub(r"\W+", "-", f"{hardware.cpu} {len(hardware.cores)}").strip("-").lower()
    return cache_dir("roofline") / f"{name}.json"


def _measure() -> Roofline:
    """Measure for about two seconds; the best of several runs excludes the load of other programs."""
    import torch

    torch.set_num_threads(len(probe_hardware().cores))
    memory, vector = torch.ones(8192, 16384), torch.ones(16384)  # 512 MiB, above any cache
    bandwidth = memory.numel() * 4 / _best_s(lambda: memory @ vector)
    bf16 = _matrix_flops(lambda size: torch.ones(size, size, dtype=torch.bfloat16), torch.matmul)
    try:
        int8 = _matrix_flops(lambda size: torch.ones(size, size, dtype=torch.int8), torch._int_mm)
    except RuntimeError:
        int8 = 0.0
    return Roofline(bandwidth, bf16, int8, "measured")


def _matrix_flops(make: Callable[[int], Any], multiply: Callable[[Any, Any], object]) -> float:
    """Return the FLOP/s of a product of square matrices, the largest that does not take long.

    A CPU without bfloat16 instructions needs minutes for a size that others multiply in milliseconds.
    """
    matrix = make(_MATRIX_SIZES[0])
    multiply(matrix, matrix)  # the first product of a type also loads its kernel
    for size in _MATRIX_SIZES:
        matrix = make(size)
        begin = time.perf_counter()
        multiply(matrix, matrix)
        if time.perf_counter() - begin > _LONG_PRODUCT_S:
            break
    return float(2 * size**3 / _best_s(lambda: multiply(matrix, matrix)))


def _best_s(run: Callable[[], object], budget_s: float = 0.5) -> float:
    run()
    best, end = math.inf, time.monotonic() + budget_s
    while time.monotonic() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    measured = json.dumps(asdict(_measure()))
    write_atomically(_cache_file(probe_hardware()), measured)
    sys.stdout.write(measured + "\n")
