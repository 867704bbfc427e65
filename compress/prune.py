"""Structured pruning of MLP neurons: scores, choice and the cut, as pure tensor functions.

Shapes: O output features, I input features of the consumer (down projection), so I is the
number of neurons; K of them are kept. A pruning method is a function from the consumer's
weight to one score per neuron, and a row in `NEURON_SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compress.families import LayerRoles
from contracts.errors import UserError


def magnitude(consumer_OI: Tensor) -> Tensor:
    """Half the squared norm of each consumer column, `[I]` float64: the objective's rise when it is removed.

    This is the OSSCAR removal score (arXiv 2403.12983, section 3) for inputs whose Gram
    matrix is the identity, so it looks at no data.
    """
    return consumer_OI.double().square().sum(dim=0) / 2


def peak_magnitude(consumer_OI: Tensor) -> Tensor:
    """Largest magnitude in each consumer column, `[I]` float64.

    Keeps the neurons that write one large value, which the squared norm does not see and
    without which small models fall apart (SmolLM2-135M, docs/log.md 2026-11-24).
    """
    return consumer_OI.double().abs().amax(dim=0)


NEURON_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude, "peak_magnitude": peak_magnitude}


def kept_width(width: int, remove_frac: float, multiple: int) -> int:
    """Neurons to keep of `width`: `1 - remove_frac` of them, rounded to the nearest `multiple` (at least one).

    Raises UserError where the multiple does not fit the width or nothing would be removed.
    """
    kept = max(multiple, round(width * (1 - remove_frac) / multiple) * multiple)
    if kept >= width:
        raise UserError(
            "remove_frac",
            remove_frac,
            f"removes nothing of {width} neurons in steps of {multiple}",
            "remove more, or lower `multiple`",
        )
    return kept


def choose_kept(scores_I: Tensor, num_kept: int) -> Tensor:
    """Indices `[K]` of the `num_kept` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores_I, descending=True, stable=True).indices
    return torch.sort(order[:num_kept]).values


def cut_mlp(block: Mapping[str, Tensor], roles: LayerRoles, kept_K: Tensor) -> dict[str, Tensor]:
    """A block whose MLP has only the neurons `kept_K`: producer rows and biases, consumer columns.

    `block` maps names relative to the block to tensors and is not changed; the results
    own their memory.
    """
    cut = dict(block)
    for layer in roles.mlp_producers:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in cut:
                cut[name] = cut[name][kept_K].contiguous()
    consumer = f"{roles.mlp_consumer}.weight"
    cut[consumer] = cut[consumer][:, kept_K].contiguous()
    return cut
