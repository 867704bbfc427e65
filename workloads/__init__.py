"""Workloads: what is asked of a model, and how its answers are evaluated.

A workload argument is a built-in name, the path of a TOML file that describes the user's data (workloads.kinds), or the
path of a Python file that assigns a `Workload` object to `WORKLOAD`. The built-in ones are the rows of the table below;
a new one is one file and one row.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
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
_FILE_SUFFIXES = (".toml", ".py")
_arguments: dict[str, str] = {}
"""File of each workload that was loaded from a file, by the workload's name."""


def workload_names() -> list[str]:
    """Return the names of the built-in workloads that have reference answers."""
    return list(_BUILT_IN)


def load_suite_names() -> list[str]:
    """Return the names of all built-in workloads that can generate load."""
    return [*_BUILT_IN, *_LOAD_ONLY]


def is_workload(argument: str) -> bool:
    """Tell whether `load_workload` accepts the argument: a built-in name, a loaded workload or a workload's file."""
    is_known = argument in _BUILT_IN or argument in _LOAD_ONLY or argument in _arguments
    return is_known or argument.endswith(_FILE_SUFFIXES)


def load_workload(argument: str) -> Workload:
    """Return the workload of a built-in name, of a TOML file, or of a Python file that assigns it to `WORKLOAD`.

    Naming a Python file runs its code. Afterwards the workload's own name is accepted as well, for the same object.
    Raises UserError for an unknown name and for a file without a workload.
    """
    module = (_BUILT_IN | _LOAD_ONLY).get(argument)
    if module is not None:
        return _object_in(vars(importlib.import_module(module)), argument)
    file = Path(_arguments.get(argument, argument)).resolve()
    if file.suffix not in _FILE_SUFFIXES:
        choices = ", ".join(workload_names())
        remedy = f"choose from {choices}, or give the path of a .toml or .py file"
        raise UserError("workload", argument, "is unknown", remedy)
    workload = _from_file(str(file))
    if workload.name in _BUILT_IN or workload.name in _LOAD_ONLY:
        raise UserError("workload", workload.name, "is the name of a built-in workload", "give yours another name")
    _arguments[workload.name] = str(file)
    return workload


def workload_files(argument: str) -> list[Path]:
    """Return the files whose content decides a workload's prompts; none for a built-in one."""
    workload = load_workload(argument)
    own = _arguments.get(workload.name)
    return workload.files or ([Path(own)] if own else [])


@cache
def _from_file(file: str) -> Workload:
    """Return the workload of a file; the same object each time, so that its data is read once."""
    if file.endswith(".toml"):
        from slimserve.workloads.kinds import load_workload_file

        return load_workload_file(Path(file))
    return _object_in(_run(Path(file)), file)


def workload_argument(name: str) -> str:
    """Return the argument with which another process loads the same workload: its file if it has one, or its name."""
    return _arguments.get(name, name)


def _run(file: Path) -> dict[str, object]:
    spec = importlib.util.spec_from_file_location(f"slimserve_workload_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError("workload", file, "does not exist", "give the path of a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
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
