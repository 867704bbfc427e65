"""A recipe's steps bound to a model: what each does to one decoder block, and to the config.

A step is checked against the model's sizes when it is made, before any work begins. `on_block` then gets one
block after another, with the calibration stream standing before it; `emit` may still change or drop a block
once all have been seen. A new kind of step is a class here and a row in `bind`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from compress import bnb, formats, gptq, prune, quantize
from compress.budget import profile_sizes
from compress.families import HALVES, Half, LayerRoles, head_dim_of, input_sizes, with_sizes
from compress.forward import Block
from compress.recipe import AnyStep, Prune, PruneDepth, Quantize
from compress.stream import Stream
from contracts.errors import UserError

_SEARCH_SEQUENCES = 8
"""Calibration sequences on which a search for the block to remove compares its candidates."""

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

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is written for a tensor outside the blocks, by full names."""
        ...

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        """The model's config.json after the step, given the one before it."""
        ...

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        """What the manifest says of the step."""
        ...


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
        config = bound[-1].planned_config  # type: ignore[attr-defined]
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
        self, half: Half, index: int, block: Block, stream: Stream, dense_block: Block, dense: Stream | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gram of the consumer's inputs and, where the dense outputs are aimed at, their product with these."""
        name = f"block {index} {self._roles.consumer(half)}"
        if dense is None:
            return stream.consumer_gram(half, block, name).mean().double(), None
        gram, cross_IO = stream.consumer_gram(half, block, name), None
        for _ in dense.run(half, dense_block):
            pass
        bias_D = dense_block.get(f"{self._roles.consumer(half)}.bias")
        for inner_BTI, output_BTD in zip(stream.inner(), dense.advance(half, dense_block), strict=True):
            if bias_D is not None:  # it stays in the block, so the weight must not aim at it too
                output_BTD = output_BTD - bias_D.to(output_BTD.dtype)
            part_IO = inner_BTI.flatten(0, 1).float().T @ output_BTD.flatten(0, 1).float()
            cross_IO = part_IO if cross_IO is None else cross_IO.add_(part_IO)
        assert cross_IO is not None
        return gram.mean().double(), cross_IO.double() / gram.num_tokens


class PruneDepthStep:
    """Whole blocks out: those whose output is most like their input (block influence, arXiv 2403.03853 §3.1)."""

    name = "prune_depth"
    method = "influence"
    needs_data = True
    wants_dense = False

    def __init__(self, config: Mapping[str, Any], num_removed: int) -> None:
        self._num_removed = num_removed
        self._depth = config["num_hidden_layers"]
        self.planned_config = {**config, "num_hidden_layers": self._depth - num_removed}

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        for half in HALVES:
            stream.pass_half(half, block)
        similar = [
            functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten()
            for before, after in stream.changes()
        ]
        return block, {"influence": _finite(1 - float(torch.cat(similar).mean()), index)}

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        return None if index in self._removed(details) else block

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor}

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        config = {**before, "num_hidden_layers": self._depth - self._num_removed}
        if config.get("layer_types"):
            removed = self._removed(details)
            config["layer_types"] = [kind for i, kind in enumerate(config["layer_types"]) if i not in removed]
        return config

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        return {
            "method": self.method,
            "blocks_before": self._depth,
            "blocks_after": self._depth - self._num_removed,
            "removed_blocks": sorted(self._removed(details)),
            "per_block": list(details),
        }

    def _removed(self, details: Sequence[Detail]) -> set[int]:
        return _least(self._num_removed, [detail["influence"] for detail in details])


class SearchDepthStep(PruneDepthStep):
    """The one block out without which the last hidden states, normed, change least.

    Every candidate, the model without one block, flows along as a branch of the stream, so a pass costs about half
    as many block evaluations as the square of the depth, of the first few calibration sequences only.
    """

    method = "search"

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        branches = [stream.branch(f"without-{removed:05d}", _SEARCH_SEQUENCES) for removed in range(index + 1)]
        for half in HALVES:
            stream.pass_half(half, block)
        for branch in branches[:-1]:
            for half in HALVES:
                branch.pass_half(half, block)
        branches[-1].pass_over(stream)
        if index < self._depth - 1:
            return block, {}
        errors = [_finite(_normed_distance(stream, branch), removed) for removed, branch in enumerate(branches)]
        return block, {"error_without": errors}

    def _removed(self, details: Sequence[Detail]) -> set[int]:
        return _least(self._num_removed, details[-1]["error_without"])


def _finite(score: float, index: int) -> float:
    if not math.isfinite(score):
        raise UserError(
            "activations",
            f"around block {index}",
            "hold NaN or infinity",
            "check the model: does it generate sensible text as it is?",
        )
    return score


def _least(count: int, values: Sequence[float]) -> set[int]:
    """Indices of the smallest values; of equal ones the lower index."""
    return set(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])


def _normed_distance(stream: Stream, other: Stream) -> float:
    """Mean squared difference of the hidden states after the block, each state scaled to a root mean square of 1.

    Over the sequences that `other` has, which may be the first ones only.
    """
    total, count = 0.0, 0
    for two_BTD, one_BTD in zip(other.results(), stream.results(), strict=False):
        one_BTD, two_BTD = (
            functional.rms_norm(state.float(), state.shape[-1:]) for state in (one_BTD[: len(two_BTD)], two_BTD)
        )
        total += float((one_BTD - two_BTD).square().sum(dtype=torch.float64))
        count += one_BTD.numel()
    return total / count


class ProfileStep:
    """Changes nothing, and writes no blocks: its details hold every block's error curves."""

    name = "profile"
    needs_data = True
    wants_dense = False

    def __init__(self, step: Prune, config: Mapping[str, Any], roles: LayerRoles) -> None:
        self._roles, self._damping = roles, step.damping
        self._sizes = profile_sizes(config)
        num_q_per_kv = config["num_attention_heads"] // config["num_key_value_heads"]
        self._group_size: dict[Half, int] = {"mlp": 1, "attention": num_q_per_kv * head_dim_of(config)}

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        assert stream is not None
        losses: dict[Half, list[float]] = {}
        for half in HALVES:
            layer = self._roles.consumer(half)
            gram_II = stream.consumer_gram(half, block, f"block {index} {layer}").mean().double()
            problem = prune.PruneProblem(
                weight_OI=block[f"{layer}.weight"].double(),
                gram_II=gram_II,
                target_IO=None,
                group_size=self._group_size[half],
                damping=self._damping,
            )
            losses[half] = prune.loss_curve(problem, self._sizes[half])
            stream.skip(half, block)
        change, weakness = _relative_change(stream)
        curves: Detail = {
            half: [[size, loss * weakness] for size, loss in zip(self._sizes[half], losses[half], strict=True)]
            for half in HALVES
        }
        return {}, {**curves, "without": change}

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        return None

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor}

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        return dict(before)

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        return {"per_block": list(details)}


def _relative_change(stream: Stream) -> tuple[float, float]:
    """Of all tokens the mean of ‖after - before‖² / ‖after‖² for the block, and the mean of 1 / ‖after‖²."""
    changes, weaknesses = [], []
    for before_BTD, after_BTD in stream.changes():
        weakness_BT = 1 / after_BTD.float().square().sum(-1).clamp_(min=1e-12)
        changes.append(((after_BTD.float() - before_BTD.float()).square().sum(-1) * weakness_BT).flatten())
        weaknesses.append(weakness_BT.flatten())
    return float(torch.cat(changes).mean()), float(torch.cat(weaknesses).mean())


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
        self._is_tied = bool(config.get("tie_word_embeddings", False))

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

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if self._step.head == "dense":
            return {name: tensor}
        head, embedding = self._roles.head, self._roles.embedding
        if name == head and self._is_tied:
            return {}
        if name == head or (name == embedding and self._is_tied):
            stem = head.removesuffix("weight")
            packed = {stem + suffix: values for suffix, values in formats.pack_head(tensor).items()}
            return packed if name == head else {name: tensor, **packed}
        return {name: tensor}

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        kept = [
            self._roles.block.format(index=index) + layer for index, layers in self._kept(details) for layer in layers
        ]
        int8_head = self._step.head == "int8"
        ignored = kept if int8_head else [formats.HEAD_TARGET, *kept]
        if self._is_bnb:
            described = bnb.quantization_config(self._bnb_format, ignored)
        else:
            described = formats.quantization_config(self._step.format, self._grid, ignored, int8_head)
        untied = {"tie_word_embeddings": False} if int8_head else {}
        return {**before, **untied, "quantization_config": described}

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        described: dict[str, Any] = {"format": self._step.format, "method": self._step.method}
        if not self._is_bnb:
            described |= {"symmetric": self._grid.symmetric, "group_size": self._grid.group_size}
        if self._step.head != "dense":
            described["head"] = self._step.head
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
