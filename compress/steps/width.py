"""Pruning the width of every block: MLP neurons and KV groups (a KV head with its query heads)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from slimserve.compress import osscar, prune
from slimserve.compress.families import SUBLAYERS, LayerRoles, Sublayer
from slimserve.compress.forward import Block
from slimserve.compress.recipe import Prune
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
        roles: LayerRoles,
        num_neurons: int,
        num_kv: int,
        seed: int,
    ) -> None:
        self._step, self._roles, self._seed = step, roles, seed
        self._head_dim: int = config["head_dim"]
        self._num_q_per_kv = config["num_attention_heads"] // config["num_key_value_heads"]
        self._before = {"mlp": config["intermediate_size"], "attention": config["num_key_value_heads"]}
        self._after = {"mlp": num_neurons, "attention": num_kv}
        self._method = prune.pruning_method(step.method)
        self.needs_data = self._method.needs_data
        self.wants_dense = self.needs_data and step.target == "dense"
        self._changes = {
            "intermediate_size": num_neurons,
            "num_key_value_heads": num_kv,
            "num_attention_heads": num_kv * self._num_q_per_kv,
            "head_dim": self._head_dim,  # no longer hidden_size / num_attention_heads
        }
        self.planned_config = {**config, **self._changes}

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        details: Detail = {}
        dense_block = block
        for sublayer in SUBLAYERS:
            if self._after[sublayer] == self._before[sublayer]:
                if stream is not None:
                    stream.run_sublayer(sublayer, block)
                if dense is not None:
                    dense.run_sublayer(sublayer, dense_block)
                continue
            layer = self._roles.consumer(sublayer)
            hessian_II, cross_IO = None, None
            if stream is not None:
                hessian_II, cross_IO = self._consumer_statistics(sublayer, index, block, stream, dense_block, dense)
            weight_OI = block[f"{layer}.weight"]
            problem = prune.PruneProblem(
                weight_OI=weight_OI.double(),
                hessian_II=hessian_II,
                target_IO=None
                if cross_IO is None or hessian_II is None
                else prune.dense_target(cross_IO, weight_OI.double(), hessian_II, self._step.damping),
                group_size=1 if sublayer == "mlp" else self._num_q_per_kv * self._head_dim,
                damping=self._step.damping,
                seed=self._seed + index,
            )
            pruned = self._method(problem, self._after[sublayer])
            if sublayer == "mlp":
                block = cut_mlp(block, self._roles, pruned.kept_U)
            else:
                block = cut_attention(block, self._roles, pruned.kept_U, self._num_q_per_kv, self._head_dim)
            block[f"{layer}.weight"] = pruned.weight_OK.to(weight_OI.dtype).contiguous()
            details[layer] = pruned.detail
            if stream is not None:
                stream.advance(sublayer, block, pruned.kept_I)
        return block, details

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        return {**before, **self._changes}

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        return {
            "method": self._step.method,
            "target": self._step.target,
            "neurons_before": self._before["mlp"],
            "neurons_after": self._after["mlp"],
            "kv_groups_before": self._before["attention"],
            "kv_groups_after": self._after["attention"],
            "per_block": list(details),
        }

    def _consumer_statistics(
        self, sublayer: Sublayer, index: int, block: Block, stream: Stream, dense_block: Block, dense: Stream | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return XᵀX / T of the consumer's inputs and, if the target is dense, XᵀY / T with the dense outputs Y."""
        name = f"block {index} {self._roles.consumer(sublayer)}"
        if dense is None:
            return stream.consumer_hessian(sublayer, block, name).mean().double(), None
        hessian, cross_IO = stream.consumer_hessian(sublayer, block, name), None
        for _ in dense.run(sublayer, dense_block):
            pass
        bias_D = dense_block.get(f"{self._roles.consumer(sublayer)}.bias")
        for inner_BTI, output_BTD in zip(stream.inner(), dense.advance_batches(sublayer, dense_block), strict=True):
            if bias_D is not None:  # the pruned block keeps the bias, so the weight must not reproduce it
                output_BTD = output_BTD - bias_D.to(output_BTD.dtype)
            part_IO = inner_BTI.flatten(0, 1).float().T @ output_BTD.flatten(0, 1).float()
            cross_IO = part_IO if cross_IO is None else cross_IO.add_(part_IO)
        assert cross_IO is not None
        return hessian.mean().double(), cross_IO.double() / hessian.num_tokens


def bind(step: Prune, config: Mapping[str, Any], roles: LayerRoles, seed: int) -> list[PruneStep]:
    """Return one step per round; each round keeps the same fraction of what the round before it left.

    Raises UserError if the fractions do not fit the model's sizes, or vLLM could not load the result.
    """
    width, groups = config["intermediate_size"], config["num_key_value_heads"]
    last_width = kept_width(width, step.mlp_remove_frac, step.multiple) if step.mlp_remove_frac else width
    last_groups = _kept_groups(groups, step.kv_remove_frac)
    if last_groups < groups and not roles.reads_head_dim:
        raise UserError(
            "kv_remove_frac",
            step.kv_remove_frac,
            f"would give a {config['model_type']} that vLLM cannot load: it derives the heads' width from their number",
            "remove MLP neurons or blocks instead",
        )
    rounds: list[PruneStep] = []
    for number in range(1, step.rounds + 1):
        progress = number / step.rounds
        to_width = last_width if number == step.rounds else _between(width, last_width, progress, step.multiple)
        to_groups = last_groups if number == step.rounds else _between(groups, last_groups, progress, 1)
        rounds.append(PruneStep(step, config, roles, to_width, to_groups, seed))
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


def cut_mlp(block: Mapping[str, Tensor], roles: LayerRoles, kept_K: Tensor) -> dict[str, Tensor]:
    """Return a block whose MLP has only the neurons `kept_K`: producer rows and biases, consumer columns.

    `block` maps names relative to the block to tensors and is not changed; the new tensors own their memory.
    """
    return _cut(block, dict.fromkeys(roles.mlp_producers, kept_K), roles.mlp_consumer, kept_K)


def cut_attention(
    block: Mapping[str, Tensor], roles: LayerRoles, kept_groups_U: Tensor, num_q_per_kv: int, head_dim: int
) -> dict[str, Tensor]:
    """Return a block whose attention has only the KV groups `kept_groups_U`, each one KV head with its query heads.

    Rows and biases of query, key and value are cut, and columns of the output projection, which keeps its bias. Norms
    of queries and keys are per `head_dim` feature and stay. `block` is not changed.
    """
    kv_rows = osscar.expand_groups(kept_groups_U, head_dim)
    query_rows = osscar.expand_groups(kept_groups_U, num_q_per_kv * head_dim)
    rows = {roles.query: query_rows, roles.key: kv_rows, roles.value: kv_rows}
    return _cut(block, rows, roles.attention_consumer, query_rows)


def _cut(block: Mapping[str, Tensor], rows: Mapping[str, Tensor], consumer: str, columns: Tensor) -> dict[str, Tensor]:
    cut = dict(block)
    for layer, kept in rows.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in cut:
                cut[name] = cut[name][kept].contiguous()
    cut[f"{consumer}.weight"] = cut[f"{consumer}.weight"][:, columns].contiguous()
    return cut
