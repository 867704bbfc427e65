"""A recipe's steps bound to a model: what each does to one decoder block, and to the config.

A step is checked against the model's sizes when it is made, before any work begins. `on_block` then gets one
block after another, with the calibration stream standing before it; `emit` may still change or drop a block
once all have been seen. A new kind of step is a class in a file here and a row in `bind`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from slimserve.compress.families import LayerRoles, with_sizes
from slimserve.compress.recipe import AnyStep, Prune, PruneDepth
from slimserve.compress.steps.depth import PruneDepthStep, SearchDepthStep
from slimserve.compress.steps.interface import BoundStep, Detail, Visitor
from slimserve.compress.steps.profile import Profile
from slimserve.compress.steps.quantizing import QuantizeStep
from slimserve.compress.steps.width import prune_rounds
from slimserve.core.errors import UserError

__all__ = ["BoundStep", "Detail", "Profile", "Visitor", "bind"]


def bind(steps: Sequence[AnyStep], config: Mapping[str, Any], roles: LayerRoles, seed: int) -> list[BoundStep]:
    """Every step on the model that those before it leave; UserError where one does not fit its sizes."""
    config = with_sizes(copy.deepcopy(dict(config)))
    bound: list[BoundStep] = []
    for step in steps:
        if isinstance(step, Prune):
            bound.extend(prune_rounds(step, config, roles, seed))
        elif isinstance(step, PruneDepth):
            bound.extend(_prune_depth_rounds(step, config))
        else:
            bound.append(QuantizeStep(step, config, roles))
        config = bound[-1].planned_config
    return bound


def _prune_depth_rounds(step: PruneDepth, config: Mapping[str, Any]) -> list[BoundStep]:
    """One bound step, or one per block that is searched for."""
    depth = config["num_hidden_layers"]
    if step.num_blocks >= depth:
        raise UserError("num_blocks", step.num_blocks, f"leaves none of {depth} blocks", "remove fewer")
    if step.method == "influence":
        return [PruneDepthStep(config, step.num_blocks)]
    return [SearchDepthStep({**config, "num_hidden_layers": depth - number}, 1) for number in range(step.num_blocks)]
