"""The error that pruning would cause in each block at several sizes, measured in one walk that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slimserve.compress import prune
from slimserve.compress.budget import profile_sizes
from slimserve.compress.decoder import Block, decoder_of
from slimserve.compress.recipe import Prune
from slimserve.compress.roles import KINDS, Kind, PruneRole
from slimserve.compress.steps.interface import Detail
from slimserve.compress.stream import Stream


class ErrorProfile:
    """Measure the error curves of every block for `budget.rank`. The blocks are neither changed nor kept.

    The detail of a block holds, per sublayer, [size, error] pairs, and the error `without` the block. Errors are
    relative to the squared norm of the hidden states after the block.
    """

    needs_data = True
    wants_dense = False
    wants_short = False

    def __init__(self, step: Prune, config: Mapping[str, Any], roles: Mapping[Kind, PruneRole]) -> None:
        self._decoder, self._roles, self._damping = decoder_of(config), roles, step.damping
        self._methods = {kind: prune.pruning_method(step.method or prune.DEFAULT_METHODS[kind]) for kind in roles}
        self._sizes = profile_sizes(config)

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        losses: dict[Kind, list[float]] = {kind: [0.0] * len(self._sizes[kind]) for kind in KINDS}
        for sublayer in self._decoder.sublayers[index]:
            role = self._roles.get("attention" if sublayer.is_attention else "mlp")
            if role is not None:
                method = self._methods[role.kind]
                hessian_II = stream.consumer_hessian(sublayer, block).mean().double()
                problem = prune.PruneProblem(
                    weight_OI=block[f"{role.consumer}.weight"].double(),
                    hessian_II=hessian_II,
                    target_IO=None,
                    group_size=role.columns,
                    damping=self._damping or method.damping,
                )
                losses[role.kind] = prune.loss_curve(problem, self._sizes[role.kind], method)
            stream.advance(sublayer, block)
        change, inverse_norm = _relative_change(stream)
        curves: Detail = {
            sublayer: [
                [size, loss * inverse_norm] for size, loss in zip(self._sizes[sublayer], losses[sublayer], strict=True)
            ]
            for sublayer in KINDS
        }
        return {}, {**curves, "without": change}


def _relative_change(stream: Stream) -> tuple[float, float]:
    """Return the mean over all tokens of ‖after - before‖² / ‖after‖² and of 1 / ‖after‖² for the block."""
    changes, inverse_norms = [], []
    for before_BTD, after_BTD in stream.changes():
        inverse_norm_BT = 1 / after_BTD.float().square().sum(-1).clamp_(min=1e-12)
        changes.append(((after_BTD.float() - before_BTD.float()).square().sum(-1) * inverse_norm_BT).flatten())
        inverse_norms.append(inverse_norm_BT.flatten())
    return float(torch.cat(changes).mean()), float(torch.cat(inverse_norms).mean())
