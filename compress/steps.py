"""A recipe's steps bound to a model: what each does to one decoder block, and to the config.

A step is checked against the model's sizes when it is made, before any work begins. `on_block` then gets one
block after another, with the calibration stream standing before it; `emit` may still change or drop a block
once all have been seen. A new kind of step is a class here and a row in `bind`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from compress import bnb, formats, gptq, prune, quantize
from compress.families import HALVES, Half, LayerRoles, head_dim_of, input_sizes
from compress.forward import Block
from compress.recipe import AnyStep, Prune, PruneDepth, Quantize
from compress.stream import Stream
from contracts.errors import UserError

Detail = dict[str, Any]
"""What a step has to tell of one block; plain JSON."""


class BoundStep(Protocol):
    """One step of a recipe on one model."""

    name: str
    needs_data: bool
    wants_dense: bool
    """Whether it needs the stream through the model as it was before the step, too."""

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        """The block after the step. A given stream must be advanced past the block."""
        ...

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        """The block as it is written, or None to leave it out, knowing the details of all blocks."""
        ...

    def config(self, details: Sequence[Detail]) -> dict[str, Any]:
        """The model's config.json after the step."""
        ...

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        """What the manifest says of the step."""
        ...


def bind(steps: Sequence[AnyStep], config: Mapping[str, Any], roles: LayerRoles, seed: int) -> list[BoundStep]:
    """Every step on the model that those before it leave; UserError where one does not fit its sizes."""
    config = {**copy.deepcopy(dict(config)), "head_dim": head_dim_of(config)}
    bound: list[BoundStep] = []
    for step in steps:
        if isinstance(step, Prune):
            bound.extend(_prune_rounds(step, config, roles, seed))
        elif isinstance(step, PruneDepth):
            bound.append(PruneDepthStep(step, config))
        else:
            bound.append(QuantizeStep(step, config, roles))
        config = bound[-1].planned_config  # type: ignore[attr-defined]
    return bound


def _prune_rounds(step: Prune, config: Mapping[str, Any], roles: LayerRoles, seed: int) -> list[BoundStep]:
    """One bound step per round; each round keeps the same share of what the round before left."""
    width, groups = config["intermediate_size"], config["num_key_value_heads"]
    last_width = prune.kept_width(width, step.mlp_remove_frac, step.multiple) if step.mlp_remove_frac else width
    last_groups = _kept_groups(groups, step.kv_remove_frac)
    rounds: list[BoundStep] = []
    for number in range(1, step.rounds + 1):
        share = number / step.rounds
        to_width = last_width if number == step.rounds else _between(width, last_width, share, step.multiple)
        to_groups = last_groups if number == step.rounds else _between(groups, last_groups, share, 1)
        pruned = PruneStep(step, config, roles, to_width, to_groups, seed)
        rounds.append(pruned)
        config = pruned.planned_config
    return rounds


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
        self.planned_config = {
            **config,
            "intermediate_size": num_neurons,
            "num_key_value_heads": num_kv,
            "num_attention_heads": num_kv * self._num_q_per_kv,
        }

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        details: Detail = {}
        dense_block = block
        for half in HALVES:
            if self._after[half] == self._before[half]:
                for one in (stream, dense):
                    if one is not None:
                        one.pass_half(half, block if one is stream else dense_block)
                continue
            layer = self._roles.consumer(half)
            gram_II, cross_IO = None, None
            if stream is not None:
                gram_II, cross_IO = self._look(half, index, block, stream, dense_block, dense)
            weight_OI = block[f"{layer}.weight"]
            problem = prune.PruneProblem(
                weight_OI=weight_OI.double(),
                gram_II=gram_II,
                target_IO=None
                if cross_IO is None or gram_II is None
                else prune.dense_target(cross_IO, weight_OI.double(), gram_II, self._step.damping),
                group_size=1 if half == "mlp" else self._num_q_per_kv * self._head_dim,
                damping=self._step.damping,
                seed=self._seed + index,
            )
            pruned = prune.METHODS[self._step.method](problem, self._after[half])
            if half == "mlp":
                block = prune.cut_mlp(block, self._roles, pruned.kept_U)
            else:
                block = prune.cut_attention(block, self._roles, pruned.kept_U, self._num_q_per_kv, self._head_dim)
            block[f"{layer}.weight"] = pruned.weight_OK.to(weight_OI.dtype).contiguous()
            details[layer] = pruned.detail
            if stream is not None:
                stream.skip(half, block, pruned.kept_I)
        return block, details

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        return block

    def config(self, details: Sequence[Detail]) -> dict[str, Any]:
        return self.planned_config

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
        self, half: Half, index: int, block: Block, stream: Stream, dense_block: Block, dense: Stream | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gram of the consumer's inputs and, where the dense outputs are aimed at, their product with these."""
        name = f"block {index} {self._roles.consumer(half)}"
        if dense is None:
            return stream.consumer_gram(half, block, name).mean().double(), None
        gram, cross_IO = stream.consumer_gram(half, block, name), None
        for _ in dense.run(half, dense_block):
            pass
        for inner_BTI, output_BTD in zip(stream.inner(), dense.advance(half, dense_block), strict=True):
            part_IO = inner_BTI.flatten(0, 1).float().T @ output_BTD.flatten(0, 1).float()
            cross_IO = part_IO if cross_IO is None else cross_IO.add_(part_IO)
        assert cross_IO is not None
        return gram.mean().double(), cross_IO.double() / gram.num_tokens


class PruneDepthStep:
    """Whole blocks out: those whose output is most like their input (block influence, arXiv 2403.03853 §3.1)."""

    name = "prune_depth"
    needs_data = True
    wants_dense = False

    def __init__(self, step: PruneDepth, config: Mapping[str, Any]) -> None:
        depth = config["num_hidden_layers"]
        if step.num_blocks >= depth:
            raise UserError("num_blocks", step.num_blocks, f"leaves none of {depth} blocks", "remove fewer")
        self._num_removed = step.num_blocks
        self._config = config
        self.planned_config = {**config, "num_hidden_layers": depth - step.num_blocks}

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        for half in HALVES:
            stream.pass_half(half, block)
        similar = [
            functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
            for before, after in stream.changes()
        ]
        return block, {"influence": 1 - float(torch.cat(similar).mean())}

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        return None if index in self._removed(details) else block

    def config(self, details: Sequence[Detail]) -> dict[str, Any]:
        config = dict(self.planned_config)
        if config.get("layer_types"):
            removed = self._removed(details)
            config["layer_types"] = [kind for i, kind in enumerate(config["layer_types"]) if i not in removed]
        return config

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        return {
            "method": "block influence",
            "blocks_before": self._config["num_hidden_layers"],
            "blocks_after": self.planned_config["num_hidden_layers"],
            "removed_blocks": sorted(self._removed(details)),
            "per_block": list(details),
        }

    def _removed(self, details: Sequence[Detail]) -> set[int]:
        ranked = sorted(range(len(details)), key=lambda index: (details[index]["influence"], index))
        return set(ranked[: self._num_removed])


class QuantizeStep:
    """Every linear layer onto a format's grid; each is rounded on inputs that the rounded layers before it made."""

    name = "quantize"
    wants_dense = False

    def __init__(self, step: Quantize, config: Mapping[str, Any], roles: LayerRoles) -> None:
        self._step, self._roles = step, roles
        self._is_bnb = step.format not in formats.FORMATS
        self._bnb_format = "int8" if step.format == "int8-bnb" else step.format
        self.needs_data = step.method in gptq.NEEDS_DATA or step.smoothquant is not None or step.scales == "mse"
        self._note = ""
        inputs = input_sizes(config)
        if self._is_bnb:
            for num_inputs in inputs:
                bnb.check_input_size(num_inputs, self._bnb_format)
        else:
            formats.make_grid(step.format, step.symmetric, step.group_size)  # refuses what was asked, not what fits
            group, self._note = formats.choose_group_size(step.group_size, inputs)
            self._grid = formats.make_grid(step.format, step.symmetric, group)
        self._options = quantize.RoundingOptions(
            damping=step.damping, order=step.order, sweeps=step.sweeps, scales=step.scales
        )
        fused = 2 * len(HALVES) * config["num_hidden_layers"]
        if step.keep_worst >= fused:
            raise UserError("keep_worst", step.keep_worst, f"keeps all {fused} fused layers", "keep fewer")
        self.planned_config = dict(config)

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        packed = dict(block)
        effective = dict(block)
        errors: dict[str, float] = {}
        notes: dict[str, Any] = {}
        for half in HALVES:
            producers, consumer = self._roles.producers(half), self._roles.consumer(half)
            gram_II: Tensor | None = None
            if stream is not None:
                wants_peak = self._step.smoothquant is not None
                gram = stream.producer_gram(half, effective, f"block {index} {producers[0]}", wants_peak)
                gram_II = gram.mean()
                if gram.peak_I is not None:
                    gram_II = self._smooth(half, producers, effective, packed, gram.peak_I, gram_II)
            self._round(producers, effective, packed, gram_II, errors, notes)
            gram_II = None
            if stream is not None:
                gram_II = stream.consumer_gram(half, effective, f"block {index} {consumer}").mean()
            self._round((consumer,), effective, packed, gram_II, errors, notes)
            if stream is not None:
                stream.skip(half, effective)
        return packed, {"output_error": errors, **({"notes": notes} if notes else {})}

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        kept = [layer for where, layers in self._kept(details) if where == index for layer in layers]
        if not kept:
            return block
        source = original()
        restored = {name: tensor for name, tensor in block.items() if not _belongs(name, kept)}
        restored |= {name: tensor for name, tensor in source.items() if _belongs(name, kept)}
        if self._step.smoothquant is not None:
            # The norms have changed, and what reads them must change with them.
            for half in HALVES:
                scale_I = _norm_ratio(source, block, self._roles.norm(half))
                for layer in set(kept) & set(self._roles.producers(half)):
                    weight_OI = source[f"{layer}.weight"]
                    restored[f"{layer}.weight"] = (weight_OI.float() * scale_I).to(weight_OI.dtype)
        return restored

    def config(self, details: Sequence[Detail]) -> dict[str, Any]:
        kept = [
            self._roles.block.format(index=index) + layer for index, layers in self._kept(details) for layer in layers
        ]
        ignored = ["lm_head", *kept]
        if self._is_bnb:
            described = bnb.quantization_config(self._bnb_format, ignored)
        else:
            described = formats.quantization_config(self._step.format, self._grid, ignored)
        return {**self.planned_config, "quantization_config": described}

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        described: dict[str, Any] = {"format": self._step.format, "method": self._step.method}
        if not self._is_bnb:
            described |= {"symmetric": self._grid.symmetric, "group_size": self._grid.group_size}
        if self._note:
            described["fallback"] = self._note
        kept = self._kept(details)
        if kept:
            described["kept_unquantized"] = [
                self._roles.block.format(index=index) + layer for index, layers in kept for layer in layers
            ]
        return {**described, "per_block": list(details)}

    def _round(
        self,
        layers: Sequence[str],
        effective: Block,
        packed: Block,
        gram_II: Tensor | None,
        errors: dict[str, float],
        notes: dict[str, Any],
    ) -> None:
        """Round layers that share their input together: rows do not interact, and the gram is factorised once."""
        if self._is_bnb:
            for layer in layers:
                weight_OI = effective[f"{layer}.weight"]
                tensors = bnb.pack_layer(weight_OI, self._bnb_format)
                rounded_OI = bnb.dequantize_layer(tensors, self._bnb_format)
                errors[layer] = float((weight_OI.float() - rounded_OI).norm() / weight_OI.float().norm().clamp(1e-30))
                del packed[f"{layer}.weight"]
                packed.update({f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()})
            return
        weights = [effective[f"{layer}.weight"] for layer in layers]
        stacked_OI = torch.cat([weight.float() for weight in weights])
        rounded = gptq.ROUNDINGS[self._step.method](stacked_OI, gram_II, self._grid, self._options)
        if rounded.notes:
            notes["+".join(layers)] = dict(rounded.notes)
        for layer, weight_OI, quantized in zip(
            layers, weights, rounded.split([len(weight) for weight in weights]), strict=True
        ):
            errors[layer] = quantize.output_error(weight_OI, quantized, gram_II)
            effective[f"{layer}.weight"] = quantized.dequantize().to(weight_OI.dtype)
            del packed[f"{layer}.weight"]
            packed.update({f"{layer}.{suffix}": tensor for suffix, tensor in formats.pack_layer(quantized).items()})

    def _smooth(
        self, half: Half, producers: Sequence[str], effective: Block, packed: Block, peak_I: Tensor, gram_II: Tensor
    ) -> Tensor:
        """Divide the norm's outputs by the smoothing scales and multiply the producers' columns; the new gram."""
        assert self._step.smoothquant is not None
        norm = self._roles.norm(half)
        weight_peak_I = torch.stack([effective[f"{layer}.weight"].float().abs().amax(0) for layer in producers]).amax(0)
        scale_I = quantize.smooth_scales(peak_I, weight_peak_I, self._step.smoothquant)
        before = dict(effective)
        before_I = before[f"{norm}.weight"]
        after_I = (before_I.float() / scale_I).to(before_I.dtype)
        effective[f"{norm}.weight"] = packed[f"{norm}.weight"] = after_I
        scale_I = _norm_ratio(before, effective, norm)
        for layer in producers:
            weight_OI = effective[f"{layer}.weight"]
            effective[f"{layer}.weight"] = weight_OI.float() * scale_I
        return gram_II / scale_I[:, None] / scale_I[None, :]

    def _kept(self, details: Sequence[Detail]) -> list[tuple[int, tuple[str, ...]]]:
        """Block and layers of the fused layers that stay unquantized; engines fuse q-k-v and gate-up."""
        fused = [layers for half in HALVES for layers in (self._roles.producers(half), (self._roles.consumer(half),))]
        ranked = sorted(
            ((index, layers) for index in range(len(details)) for layers in fused),
            key=lambda one: -max(details[one[0]]["output_error"][layer] for layer in one[1]),
        )
        return sorted(ranked[: self._step.keep_worst])


def _belongs(name: str, layers: Sequence[str]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def _norm_ratio(before: Block, after: Block, norm: str) -> Tensor:
    """What a norm's outputs have been divided by, `[I]`: what its dtype really did, and 1 where it is zero."""
    before_I, after_I = before[f"{norm}.weight"].float(), after[f"{norm}.weight"].float()
    return torch.where(after_I != 0, before_I / after_I, torch.ones_like(after_I))
