"""A recipe's steps bound to a model: what each does to one decoder block, and to the config.

A step is checked against the model's sizes when it is made, before any work begins. `on_block` then gets one
block after another, with the calibration stream standing before it; `emit` may still change or drop a block
once all have been seen. A new kind of step is a class in a file here and a row in `bind`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from slimserve.compress import prune
from slimserve.compress.families import LayerRoles, with_sizes
from slimserve.compress.recipe import AnyStep, Prune, PruneDepth
from slimserve.compress.steps.depth import PruneDepthStep, SearchDepthStep
from slimserve.compress.steps.interface import BoundStep, Detail, Visitor
from slimserve.compress.steps.profile import Profile
from slimserve.compress.steps.quantizing import QuantizeStep
from slimserve.compress.steps.width import PruneStep
from slimserve.core.errors import UserError

__all__ = ["BoundStep", "Detail", "Profile", "Visitor", "bind"]


def bind(steps: Sequence[AnyStep], config: Mapping[str, Any], roles: LayerRoles, seed: int) -> list[BoundStep]:
    """Every step on the model that those before it leave; UserError where one does not fit its sizes."""
    config = with_sizes(copy.deepcopy(dict(config)))
    bound: list[BoundStep] = []
    for step in steps:
        if isinstance(step, Prune):
            bound.extend(_prune_rounds(step, config, roles, seed))
        elif isinstance(step, PruneDepth):
            bound.extend(_prune_depth_rounds(step, config))
        else:
            bound.append(QuantizeStep(step, config, roles))
        config = bound[-1].planned_config
    return bound


def _prune_rounds(step: Prune, config: Mapping[str, Any], roles: LayerRoles, seed: int) -> list[BoundStep]:
    """One bound step per round; each round keeps the same share of what the round before left."""
    width, groups = config["intermediate_size"], config["num_key_value_heads"]
    last_width = prune.kept_width(width, step.mlp_remove_frac, step.multiple) if step.mlp_remove_frac else width
    last_groups = _kept_groups(groups, step.kv_remove_frac)
    if last_groups < groups and not roles.reads_head_dim:
        raise UserError(
            "kv_remove_frac",
            step.kv_remove_frac,
            f"would give a {config['model_type']} that vLLM cannot load: it derives the heads' width from their number",
            "remove MLP neurons or blocks instead",
        )
    rounds: list[BoundStep] = []
    for number in range(1, step.rounds + 1):
        share = number / step.rounds
        to_width = last_width if number == step.rounds else _between(width, last_width, share, step.multiple)
        to_groups = last_groups if number == step.rounds else _between(groups, last_groups, share, 1)
        pruned = PruneStep(step, config, roles, to_width, to_groups, seed)
        rounds.append(pruned)
        config = pruned.planned_config
    return rounds


def _prune_depth_rounds(step: PruneDepth, config: Mapping[str, Any]) -> list[BoundStep]:
    """One bound step, or one per block that is searched for."""
    depth = config["num_hidden_layers"]
    if step.num_blocks >= depth:
        raise UserError("num_blocks", step.num_blocks, f"leaves none of {depth} blocks", "remove fewer")
    if step.method == "influence":
        return [PruneDepthStep(config, step.num_blocks)]
    return [SearchDepthStep({**config, "num_hidden_layers": depth - number}, 1) for number in range(step.num_blocks)]


def _between(first: int, last: int, share: float, multiple: int) -> int:
    """The size after a `share` of the rounds, on the geometric way from `first` to `last`."""
    size: float = first * (last / first) ** share
    return min(first, max(last, multiple * round(size / multiple)))


def _kept_groups(num_groups: int, remove_frac: float) -> int:
    kept = round(num_groups * (1 - remove_frac))
    if remove_frac and not 0 < kept < num_groups:
        raise UserError(
            "kv_remove_frac",
            remove_frac,
            f"leaves {kept} of {num_groups} KV groups",
            f"remove at least {0.5 / num_groups:.2f} and leave one group" if num_groups > 1 else "leave it out",
        )
    return kept
