"""The result document of a comparison: what is known of each variant, as typed rows and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contracts.provenance import provenance
from contracts.storage import write_atomically
from loadtest.summary import LoadSummary
from workloads.interface import Estimate

RESULTS_FILE = "results.json"


@dataclass
class VariantResult:
    """One variant: how it was made, how good it is, how it serves."""

    name: str
    recipe: str
    summary: str
    """What the recipe does, in words."""
    directory: str
    disk_bytes: int
    num_parameters: int
    build_s: float
    """Seconds that building took, when it was built."""
    build_reused: bool
    """Whether this run found it built already."""
    ready_s: float | None = None
    """Seconds from the engine's start until it answered."""
    peak_rss_bytes: int | None = None
    """Peak resident memory of the engine's processes, the reserved KV cache included."""
    quality: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """By workload, then figure."""
    load: dict[str, LoadSummary] = field(default_factory=dict)
    """By workload."""


@dataclass
class Comparison:
    """One run of `slimserve compare`."""

    model: str
    workloads: dict[str, str]
    """Workload names, each with the quality figure that is its headline."""
    settings: dict[str, Any]
    started: str
    origin: dict[str, Any] = field(default_factory=provenance)
    """Commit, hardware and versions."""
    seconds: float = 0.0
    variants: list[VariantResult] = field(default_factory=list)

    def write(self, directory: Path) -> Path:
        """Write results.json; call it after every variant, so that an interrupted run keeps what it has."""
        described = asdict(self)
        origin = described.pop("origin")
        document = {"command": "compare", **origin, **described}
        path = directory / RESULTS_FILE
        write_atomically(path, json.dumps(_without_nan(document), indent=2, allow_nan=False) + "\n")
        return path


def _without_nan(value: Any) -> Any:
    """The same document with null for undefined figures, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
