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
from typing import Any, Literal

from slimserve.core.hardware import Hardware, openmp_library, probe_hardware
from slimserve.core.progress import print_status
from slimserve.core.storage import cache_dir, write_atomically

_FORMAT = 2
"""Version of the cached measurement."""
_MEASURE_TIMEOUT_S = 60
_MATRIX_SIZES = (128, 256, 512, 1024, 2048)
_LONG_PRODUCT_S = 0.05
"""Duration of a product from which larger matrices bring no better estimate."""


Precision = Literal["bf16", "int8", "float8"]
"""Type of the factors of a matrix product."""


@dataclass(frozen=True)
class Roofline:
    """The upper limits of the hardware."""

    bandwidth: float
    """Memory read bandwidth in bytes/s."""
    bf16_flops: float
    """FLOP/s of a large matrix product in `dense_dtype`."""
    int8_flops: float
    """FLOP/s of a large int8 matrix product; 0 if torch cannot compute it here."""
    source: str
    """`measured` for a CPU, `datasheet` for a GPU."""
    fp8_flops: float = 0.0
    """FLOP/s of a large FP8 matrix product; 0 for hardware that computes FP8 models in bfloat16."""
    dense_dtype: str = "bf16"
    """Type in which unquantized models are computed: bf16, or float32 on a CPU without bfloat16 products."""

    def computed_precision(self, precision: Precision) -> Precision:
        """Return the precision in which this hardware computes a model whose activations have `precision`."""
        return "bf16" if precision == "float8" and not self.fp8_flops else precision

    def flops(self, precision: Precision) -> float:
        """Return the FLOP/s for a model whose activations have `precision`; 0 if they are unknown."""
        rates = {"bf16": self.bf16_flops, "int8": self.int8_flops, "float8": self.fp8_flops}
        return rates[self.computed_precision(precision)]


def _gpu(gb_per_s: float, bf16_tflops: float, has_fp8: bool, int8_ratio: int = 2) -> Roofline:
    """Return the roofline of a GPU from its datasheet.

    FP8 products that add up in float32 are twice as fast as bfloat16's. Int8 products are `int8_ratio` times as fast.
    """
    bf16 = bf16_tflops * 1e12
    return Roofline(gb_per_s * 1e9, bf16, int8_ratio * bf16, "datasheet", 2 * bf16 if has_fp8 else 0.0)


_GPUS = {
    "A100-SXM4-40GB": _gpu(1555, 312, has_fp8=False),
    "A100-SXM4-80GB": _gpu(2039, 312, has_fp8=False),
    "A100-PCIE-40GB": _gpu(1555, 312, has_fp8=False),
    "A100 80GB PCIe": _gpu(1935, 312, has_fp8=False),
    "H100 80GB HBM3": _gpu(3352, 989, has_fp8=True),
    "H100 PCIe": _gpu(2039, 756, has_fp8=True),
    "H100 NVL": _gpu(3938, 835, has_fp8=True),
    "H200": _gpu(4800, 989, has_fp8=True),
    "H200 NVL": _gpu(4800, 835, has_fp8=True),
    "B200": _gpu(8000, 2250, has_fp8=True),
    "L4": _gpu(300, 121, has_fp8=True),
    "L40S": _gpu(864, 362, has_fp8=True),
    "GeForce RTX 4090": _gpu(1008, 165.2, has_fp8=True, int8_ratio=4),
}
"""Datasheet values by the name that nvidia-smi and torch print after "NVIDIA ". Dense products, no sparsity.

A name must match completely: an L40S is no L4, and an H100 NVL has other memory than an H100 SXM ("H100 80GB HBM3").
"""


def load_roofline(hardware: Hardware | None = None, measure: bool = True) -> Roofline | None:
    """Return the roofline of this machine; None for an unknown GPU, or if `measure` is false and none is cached.

    Measuring takes two seconds on all cores in a process that imports torch, so call it before an engine starts. The
    process preloads the same OpenMP library as engines, which makes int8 products eight times as fast.
    """
    hardware = hardware or probe_hardware()
    if hardware.gpus:
        name = hardware.gpus[0].partition(",")[0].strip()
        return _GPUS.get(name.removeprefix("NVIDIA "))
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
    name = re.sub(r"\W+", "-", f"{hardware.cpu} {len(hardware.cores)} {_FORMAT}").strip("-").lower()
    return cache_dir("roofline") / f"{name}.json"


def _measure() -> Roofline:
    """Measure for about two seconds; the best of several runs excludes the load of other programs."""
    import torch

    hardware = probe_hardware()
    torch.set_num_threads(len(hardware.cores))
    memory, vector = torch.ones(8192, 16384), torch.ones(16384)  # 512 MiB, above any cache
    bandwidth = memory.numel() * 4 / _best_s(lambda: memory @ vector)
    dtype, name = (torch.bfloat16, "bf16") if hardware.has_bf16_products else (torch.float32, "float32")
    dense = _matrix_flops(lambda size: torch.ones(size, size, dtype=dtype), torch.matmul)
    try:
        int8 = _matrix_flops(lambda size: torch.ones(size, size, dtype=torch.int8), torch._int_mm)
    except RuntimeError:
        int8 = 0.0
    return Roofline(bandwidth, dense, int8, "measured", dense_dtype=name)


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
