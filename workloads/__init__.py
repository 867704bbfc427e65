"""Workloads: what is asked of a model, and how its answers are evaluated.

A workload argument is a built-in name or the path of a Python file that assigns a `Workload` object to `WORKLOAD`. The
built-in ones are the rows of the table below; a new one is one file and one row.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.workloads.interface import Workload

_BUILT_IN = {
    "recommendation": "slimserve.workloads.recommendation",
    "reasoning": "slimserve.workloads.reasoning",
}
"""Modules of the workloads that calibration, quality and comparisons use when none is named."""
_LOAD_ONLY = {"chat": "slimserve.workloads.chat"}
"""Modules of the workloads that can only generate load, because their data has no reference answers."""
DEFAULT_TRAINING_WORKLOAD = "reasoning"
"""Workload that distillation uses if none is named."""
_arguments: dict[str, str] = {}
"""File of each workload that was loaded from a file, by the workload's name."""


def workload_names() -> list[str]:
    """Return the names of the built-in workloads that have reference answers."""
    return list(_BUILT_IN)


def load_suite_names() -> list[str]:
    """Return the names of all built-in workloads that can generate load."""
    return [*_BUILT_IN, *_LOAD_ONLY]


def is_workload(argument: str) -> bool:
    """Tell whether `load_workload` accepts the argument: a built-in name, a loaded workload or a Python file."""
    return argument in _BUILT_IN or argument in _LOAD_ONLY or argument in _arguments or argument.endswith(".py")


def load_workload(argument: str) -> Workload:
    """Return the workload of a built-in name or of a Python file that assigns it to `WORKLOAD`.

    Naming a file runs its code. Afterwards the workload's own name is accepted as well. Raises UserError for an unknown
    name and for a file without a workload.
    """
    module = (_BUILT_IN | _LOAD_ONLY).get(argument)
    if module is not None:
        return _object_in(vars(importlib.import_module(module)), argument)
    file = Path(_arguments.get(argument, argument))
    if file.suffix != ".py":
        choices = ", ".join(workload_names())
        raise UserError("workload", argument, "is unknown", f"choose from {choices}, or give the path of a .py file")
    workload = _object_in(_run(file), argument)
    _arguments[workload.name] = str(file.resolve())
    return workload


def workload_argument(name: str) -> str:
    """Return the argument with which another process loads the same workload: its file if it has one, or its name."""
    return _arguments.get(name, name)


def _run(file: Path) -> dict[str, object]:
    spec = importlib.util.spec_from_file_location(f"slimserve_workload_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError("workload", file, "does not exist", "give the path of a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise UserError("workload", file, f"cannot be imported ({error!r})", "correct the file") from error
    return vars(module)


def _object_in(namespace: dict[str, object], argument: str) -> Workload:
    workload = namespace.get("WORKLOAD")
    if not isinstance(workload, Workload):
        raise UserError("workload", argument, "has no WORKLOAD", "assign an object of a Workload subclass to WORKLOAD")
    return workload
