"""The steps of a recipe bound to a model: what each changes in a decoder block and in config.json.

`bind` checks a step against the model's sizes before any work begins. During the build, `on_block` gets one block after
another together with the calibration stream before it. `emit` may still change or drop a block after all were seen.

A new kind of step is a settings class in `recipe.py`, a file here with a function `bind`, and one row in `_STEPS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimserve.compress.families import with_sizes
from slimserve.compress.recipe import AnyStep, Prune, PruneDepth, Quantize
from slimserve.compress.steps import depth, quantizing, width
from slimserve.compress.steps.interface import BoundStep, Detail, Visitor
from slimserve.compress.steps.profile import ErrorProfile

__all__ = ["BoundStep", "Detail", "ErrorProfile", "Visitor", "bind"]

_STEPS: dict[type[AnyStep], Callable[[Any, Mapping[str, Any], int], Sequence[BoundStep]]] = {
    Prune: width.bind,
    PruneDepth: depth.bind,
    Quantize: quantizing.bind,
}
"""Functions from (settings, config with all sizes, seed) to bound steps, by the class of the settings."""


def bind(steps: Sequence[AnyStep], config: Mapping[str, Any], seed: int) -> list[BoundStep]:
    """Return the bound steps, each for the model that the steps before it leave.

    Raises UserError if a step names an unknown method or does not fit the model's architecture.
    """
    config = with_sizes(copy.deepcopy(dict(config)))
    bound: list[BoundStep] = []
    for step in steps:
        bound.extend(_STEPS[type(step)](step, config, seed))
        config = bound[-1].planned_config
    return bound
