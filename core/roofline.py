"""What the machine could do at most: bytes and FLOPs a second.

A CPU is measured once and kept (`python -m slimserve.core.roofline` measures now); a GPU's figures are its datasheet's.
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

from slimserve.core.hardware import Hardware, openmp_library, probe_hardware
from slimserve.core.progress import print_status
from slimserve.core.storage import cache_dir, write_atomically

_MEASURE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Roofline:
    """What the hardware can do."""

    bandwidth: float
    """Bytes a second read from memory."""
    bf16_flops: float
    """FLOP a second of a large product of bfloat16 matrices."""
    int8_flops: float
    """The same of int8 matrices; 0 where nothing was found that computes it."""
    source: str
    """`measured`, or `datasheet` of a GPU."""


_GPUS = {
    "H200": Roofline(4.8e12, 989e12, 1979e12, "datasheet"),
    "H100 PCIe": Roofline(2.0e12, 756e12, 1513e12, "datasheet"),
    "H100": Roofline(3.35e12, 989e12, 1979e12, "datasheet"),
    "A100-PCIE-40GB": Roofline(1.555e12, 312e12, 624e12, "datasheet"),
    "A100-SXM4-40GB": Roofline(1.555e12, 312e12, 624e12, "datasheet"),
    "A100": Roofline(1.935e12, 312e12, 624e12, "datasheet"),
    "L4": Roofline(0.3e12, 121e12, 242e12, "datasheet"),
}
"""By a part of the name that nvidia-smi gives, the first that fits; dense products, no sparsity."""


def load_roofline(hardware: Hardware | None = None, measure: bool = True) -> Roofline | None:
    """What this machine can do; None for an unknown GPU, and where it was never measured and must not be now.

    Measuring takes two seconds of every core and a process that imports torch: call it before an engine starts. That
    process preloads the OpenMP library that engines do, which makes int8 products eight times as fast.
    """
    hardware = hardware or probe_hardware()
    if hardware.gpus:
        return next((machine for name, machine in _GPUS.items() if name in hardware.gpus[0]), None)
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
            return None  # a figure for the curious is no reason to stop
    try:
        return Roofline(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _cache_file(hardware: Hardware) -> Path:
    name = re.sub(r"\W+", "-", f"{hardware.cpu} {len(hardware.cores)}").strip("-").lower()
    return cache_dir("roof") / f"{name}.json"


def _measure() -> Roofline:
    """Best of several runs, so that a neighbour on the machine does not become its limit. About two seconds."""
    import torch

    torch.set_num_threads(len(probe_hardware().cores))
    memory, vector = torch.ones(8192, 16384), torch.ones(16384)  # 512 MiB, above any cache
    size = 2048
    a, b = torch.ones(size, size, dtype=torch.bfloat16), torch.ones(size, size, dtype=torch.bfloat16)
    bandwidth = memory.numel() * 4 / _best_s(lambda: memory @ vector)
    bf16 = 2 * size**3 / _best_s(lambda: a @ b)
    try:
        a8, b8 = a.to(torch.int8), b.to(torch.int8)
        int8 = 2 * size**3 / _best_s(lambda: torch._int_mm(a8, b8))
    except RuntimeError:
        int8 = 0.0
    return Roofline(bandwidth, bf16, int8, "measured")


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
