"""Pruning the width of every block: MLP neurons and KV groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from slimserve.compress import prune
from slimserve.compress.families import SUBLAYERS, LayerRoles, Sublayer
from slimserve.compress.forward import Block
from slimserve.compress.recipe import Prune
from slimserve.compress.steps.interface import Detail
from slimserve.compress.stream import Stream


class PruneStep:
    """MLP neurons and KV groups out of every block; the consumers make up for them where the method refits."""

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
        self.needs_data = step.method in prune.NEEDS_DATA
        self.wants_dense = self.needs_data and step.target == "dense"
        self._changes = {
            "intermediate_size": num_neurons,
            "num_key_value_heads": num_kv,
            "num_attention_heads": num_kv * self._num_q_per_kv,
            "head_dim": self._head_dim,  # the hidden size no longer tells
        }
        self.planned_config = {**config, **self._changes}

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        details: Detail = {}
        dense_block = block
        for sublayer in SUBLAYERS:
            if self._after[sublayer] == self._before[sublayer]:
                for one in (stream, dense):
                    if one is not None:
                        one.pass_sublayer(sublayer, block if one is stream else dense_block)
                continue
            layer = self._roles.consumer(sublayer)
            hessian_II, cross_IO = None, None
            if stream is not None:
                hessian_II, cross_IO = self._look(sublayer, index, block, stream, dense_block, dense)
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
            pruned = prune.METHODS[self._step.method](problem, self._after[sublayer])
            if sublayer == "mlp":
                block = prune.cut_mlp(block, self._roles, pruned.kept_U)
            else:
                block = prune.cut_attention(block, self._roles, pruned.kept_U, self._num_q_per_kv, self._head_dim)
            block[f"{layer}.weight"] = pruned.weight_OK.to(weight_OI.dtype).contiguous()
            details[layer] = pruned.detail
            if stream is not None:
                stream.skip(sublayer, block, pruned.kept_I)
        return block, details

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        return block

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor}

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

    def _look(
        self, sublayer: Sublayer, index: int, block: Block, stream: Stream, dense_block: Block, dense: Stream | None
    ) -> tuple[Tensor, Tensor | None]:
        """Hessian of the consumer's inputs and, where the dense outputs are aimed at, their product with these."""
        name = f"block {index} {self._roles.consumer(sublayer)}"
        if dense is None:
            return stream.consumer_hessian(sublayer, block, name).mean().double(), None
        hessian, cross_IO = stream.consumer_hessian(sublayer, block, name), None
        for _ in dense.run(sublayer, dense_block):
            pass
        bias_D = dense_block.get(f"{self._roles.consumer(sublayer)}.bias")
        for inner_BTI, output_BTD in zip(stream.inner(), dense.advance(sublayer, dense_block), strict=True):
            if bias_D is not None:  # it stays in the block, so the weight must not aim at it too
                output_BTD = output_BTD - bias_D.to(output_BTD.dtype)
            part_IO = inner_BTI.flatten(0, 1).float().T @ output_BTD.flatten(0, 1).float()
            cross_IO = part_IO if cross_IO is None else cross_IO.add_(part_IO)
        assert cross_IO is not None
        return hessian.mean().double(), cross_IO.double() / hessian.num_tokens
