"""Pruning the width of every block: MLP neurons and KV groups (a KV head with its query heads)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from slimserve.compress import prune
from slimserve.compress.decoder import Block, Sublayer, decoder_of
from slimserve.compress.families import with_sizes
from slimserve.compress.recipe import Prune
from slimserve.compress.roles import Kind, PruneRole, find_role, sublayer_of
from slimserve.compress.steps.interface import BoundStep, Detail
from slimserve.compress.stream import Stream
from slimserve.core.errors import UserError


class PruneStep(BoundStep):
    """Remove the same number of MLP neurons and KV groups from every block; the method may refit the consumers."""

    name = "prune"

    def __init__(
        self,
        step: Prune,
        config: Mapping[str, Any],
        roles: Mapping[Kind, PruneRole],
        kept: Mapping[Kind, int],
        seed: int,
    ) -> None:
        """Plan to keep `kept` units of each sublayer in `roles`, for the model of `config`."""
        self._step, self._roles, self._kept, self._seed = step, roles, kept, seed
        self._decoder = decoder_of(config)
        self._names = {kind: step.method or prune.DEFAULT_METHODS[kind] for kind in roles}
        self._methods = {kind: prune.pruning_method(name) for kind, name in self._names.items()}
        self.needs_data = any(method.needs_data for method in self._methods.values())
        self._targets = {kind: step.target or method.target for kind, method in self._methods.items()}
        self.wants_dense = self.needs_data and set(self._targets.values()) != {"current"}
        # The first token of a sequence attends only to itself. A cut that is fitted to later tokens changes its hidden
        # state so much that the attention sinks of many first tokens are lost (docs/log.md 2026-11-29).
        self.wants_short = self.needs_data and "attention" in roles
        self._sizes = with_sizes(config)
        self.planned_config = self.config(config, [])

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        details: Detail = {}
        dense_block = block
        by_path = {one.path: role for role in self._roles.values() if (one := self._sublayer(index, role)) is not None}
        for sublayer in self._decoder.sublayers[index]:
            role = by_path.get(sublayer.path)
            if role is None:
                if stream is not None:
                    stream.advance(sublayer, block)
                if dense is not None:
                    dense.advance(sublayer, dense_block)
                continue
            layer, method, target = role.consumer, self._methods[role.kind], self._targets[role.kind]
            notes: Detail = {}
            if target == "residual" and dense is not None and not self._adds_outputs(index, dense_block, dense):
                # This block norms or scales the outputs of its sublayers, so a refit cannot restore earlier losses.
                target = "dense"
                notes["fallback"] = "target dense, as the block norms or scales its sublayers' outputs"
            hessian_II, cross_IO = None, None
            if stream is not None:
                hessian_II, cross_IO = _consumer_statistics(sublayer, block, stream, dense_block, dense, target)
            weight_OI, damping = block[f"{layer}.weight"], self._step.damping or method.damping
            problem = prune.PruneProblem(
                weight_OI=weight_OI.double(),
                hessian_II=hessian_II,
                target_IO=None
                if cross_IO is None or hessian_II is None
                else prune.dense_target(cross_IO, weight_OI.double(), hessian_II, damping),
                group_size=role.columns,
                damping=damping,
                seed=self._seed + index,
            )
            pruned = method(problem, self._kept[role.kind])
            block = role.cut(block, pruned.kept_U)
            block[f"{layer}.weight"] = pruned.weight_OK.to(weight_OI.dtype).contiguous()
            details[layer] = {**pruned.detail, **notes}
            if stream is not None:
                stream.advance(sublayer, block, pruned.kept_I)
        return block, details

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        after = dict(before)
        for kind, role in self._roles.items():
            after = role.config(after, self._kept[kind])
        return after

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        described: dict[str, Any] = {
            "method": " and ".join(dict.fromkeys(self._names.values())),
            "target": " and ".join(dict.fromkeys(self._targets.values())),
            "with_short_sequences": self.wants_short,
        }
        names: dict[Kind, tuple[str, str]] = {
            "mlp": ("neurons", "intermediate_size"),
            "attention": ("kv_groups", "num_key_value_heads"),
        }
        for kind, (name, key) in names.items():
            before = self._roles[kind].num_units if kind in self._roles else self._sizes.get(key)
            described |= {f"{name}_before": before, f"{name}_after": self._kept.get(kind, before)}
        return {**described, "per_block": list(details)}

    def _sublayer(self, index: int, role: PruneRole) -> Sublayer | None:
        return sublayer_of(self._decoder, index, role.kind)

    def _adds_outputs(self, index: int, block: Block, dense: Stream) -> bool:
        return decoder_of(self._decoder.config, device=dense.decoder.device).adds_outputs(index, block)


def _consumer_statistics(
    sublayer: Sublayer, block: Block, stream: Stream, dense_block: Block, dense: Stream | None, target: prune.Target
) -> tuple[Tensor, Tensor | None]:
    """Return XᵀX / T of the consumer's inputs and, unless the target is current, XᵀY / T with the target Y.

    The dense stream is advanced through the sublayer.
    """
    hessian, cross_IO = stream.consumer_hessian(sublayer, block), None
    if dense is None or target == "current":
        if dense is not None:
            dense.advance(sublayer, dense_block)
        return hessian.mean().double(), None
    for _ in dense.run(sublayer, dense_block):
        pass
    bias_D = dense_block.get(f"{sublayer.consumer}.bias")
    wanted = _wanted_outputs(sublayer, stream, dense_block, dense, target)
    for inner_BTI, wanted_BTD in zip(stream.inner(), wanted, strict=True):
        if bias_D is not None:  # the pruned block keeps the bias, so the weight must not reproduce it
            wanted_BTD = wanted_BTD - bias_D.to(wanted_BTD.dtype)
        part_IO = inner_BTI.flatten(0, 1).float().T @ wanted_BTD.flatten(0, 1).float()
        cross_IO = part_IO if cross_IO is None else cross_IO.add_(part_IO)
    assert cross_IO is not None
    return hessian.mean().double(), cross_IO.double() / hessian.num_tokens


def _wanted_outputs(
    sublayer: Sublayer, stream: Stream, dense_block: Block, dense: Stream, target: prune.Target
) -> Iterator[Tensor]:
    """Advance the dense stream through the sublayer and yield what its outputs should be, `[B, T, D]`."""
    outputs = dense.advance_batches(sublayer, dense_block)
    if target == "dense":
        yield from outputs
        return
    before = zip(dense.before_sublayer(), stream.before_sublayer(), strict=True)
    for (dense_BTD, own_BTD), output_BTD in zip(before, outputs, strict=True):
        yield output_BTD + (dense_BTD - own_BTD)


def bind(step: Prune, config: Mapping[str, Any], seed: int) -> list[PruneStep]:
    """Return one step per round; each round keeps the same fraction of what the round before it left.

    Raises UserError if the fractions do not fit the model's sizes, the model's architecture does not allow the cut, or
    vLLM could not load the result.
    """
    first: dict[Kind, int] = {}
    last: dict[Kind, int] = {}
    if step.mlp_remove_frac:
        first["mlp"] = find_role(config, "mlp").num_units
        last["mlp"] = kept_width(first["mlp"], step.mlp_remove_frac, step.multiple)
    if step.kv_remove_frac:
        first["attention"] = with_sizes(config)["num_key_value_heads"]
        last["attention"] = _kept_groups(first["attention"], step.kv_remove_frac)
        find_role(config, "attention")
    rounds: list[PruneStep] = []
    for number in range(1, step.rounds + 1):
        progress = number / step.rounds
        kept = {
            kind: last[kind]
            if number == step.rounds
            else _between(first[kind], last[kind], progress, step.multiple if kind == "mlp" else 1)
            for kind in first
        }
        roles = {kind: role for kind in first if (role := find_role(config, kind)).num_units > kept[kind]}
        rounds.append(PruneStep(step, config, roles, kept, seed))
        config = rounds[-1].planned_config
    return rounds


def kept_width(width: int, remove_frac: float, multiple: int) -> int:
    """Return the number of neurons to keep of `width`, rounded to the nearest multiple of `multiple`, at least one.

    Raises UserError if the multiple does not fit the width or nothing would be removed.
    """
    kept = max(multiple, round(width * (1 - remove_frac) / multiple) * multiple)
    if kept >= width:
        raise UserError(
            "mlp_remove_frac",
            remove_frac,
            f"removes nothing of {width} neurons in steps of {multiple}",
            "remove more, or lower `multiple`",
        )
    return kept


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


def _between(first: int, last: int, progress: float, multiple: int) -> int:
    """Return the size at `progress` (0 to 1) on the geometric path from `first` to `last`."""
    size: float = first * (last / first) ** progress
    return min(first, max(last, multiple * round(size / multiple)))
