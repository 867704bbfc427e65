"""What is asked of a model, and how its answers are judged.

A workload is one definition that calibration, distillation, quality and load share:
prompts by split and seed, and a judge of the answers. `load_workload(name)` gives one;
a new workload is a new file here with a class of the `Workload` protocol, and a row below.
"""

from __future__ import annotations

from collections.abc import Callable

from slimserve.core.errors import UserError
from slimserve.workloads.interface import Workload


def _recommendation() -> Workload:
    from slimserve.workloads.recommendation import Recommendation

    return Recommendation()


def _reasoning() -> Workload:
    from slimserve.workloads.reasoning import Reasoning

    return Reasoning()


WORKLOADS: dict[str, Callable[[], Workload]] = {"recommendation": _recommendation, "reasoning": _reasoning}


def load_workload(name: str) -> Workload:
    """The workload of that name; UserError lists the names that exist."""
    if name not in WORKLOADS:
        raise UserError("workload", name, "is unknown", f"choose from {', '.join(WORKLOADS)}")
    return WORKLOADS[name]()
