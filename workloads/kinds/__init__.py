"""Workload files: TOML files beside the user's data that define a workload.

`kind` selects one of the modules below; each defines the keys of its files and the workload that they make.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from slimserve.core.config import load_toml, validated
from slimserve.core.errors import UserError
from slimserve.workloads.kinds.base import FileWorkload

_KINDS = {
    "rank": ("slimserve.workloads.kinds.rank", "RankSpec", "Rank"),
    "ratings": ("slimserve.workloads.kinds.ratings", "RatingsSpec", "Ratings"),
    "classify": ("slimserve.workloads.kinds.classify", "ClassifySpec", "Classify"),
    "generate": ("slimserve.workloads.kinds.generate", "GenerateSpec", "Generate"),
    "lm-eval": ("slimserve.workloads.kinds.lm_eval", "LmEvalSpec", "LmEval"),
    "text": ("slimserve.workloads.kinds.text", "TextSpec", "Text"),
}
"""Module of each kind, with the names of its keys and of its workload. A new kind is one module and one row."""


def kind_names() -> list[str]:
    """Return the kinds of workload files."""
    return list(_KINDS)


def load_workload_file(file: Path) -> FileWorkload:
    """Return the workload that a TOML file defines; UserError names the key that is wrong."""
    document: dict[str, Any] = load_toml(file, "workload")
    kind = document.get("kind")
    if kind not in _KINDS:
        raise UserError("kind", kind, f"is not a kind of workload (in {file})", f"choose from {', '.join(_KINDS)}")
    module, spec_name, workload_name = _KINDS[kind]
    namespace = vars(import_module(module))
    spec = validated(namespace[spec_name], document, "workload", file)
    workload: FileWorkload = namespace[workload_name].from_spec(spec, file)
    return workload
