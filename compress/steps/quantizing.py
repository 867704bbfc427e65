"""Quantizing every linear layer of the blocks and, if requested, the output layer (head)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimserve.compress import quantize, rounding
from slimserve.compress.families import SUBLAYERS, LayerRoles, Sublayer, input_sizes
from slimserve.compress.formats import get_format
from slimserve.compress.formats.head import add_head, pack_head
from slimserve.compress.formats.interface import HEAD_TARGET
from slimserve.compress.forward import Block
from slimserve.compress.recipe import Quantize
from slimserve.compress.steps.interface import Detail
from slimserve.compress.stream import Stream
from slimserve.core.errors import UserError
from slimserve.core.model_config import dtype_of


class QuantizeStep:
    """Round every linear layer to a format's grid, on inputs computed with the rounded layers before it."""

    name = "quantize"
    wants_dense = False

    def __init__(self, step: Quantize, config: Mapping[str, Any], roles: LayerRoles) -> None:
        self._step, self._roles = step, roles
        self._format = get_format(step.format)
        self._method = rounding.rounding_method(step.method)
        self.needs_data = self._method.needs_data or step.smoothquant is not None or step.scales == "mse"
        self._note = ""
        inputs = input_sizes(config)
        for num_inputs in inputs:
            self._format.check_input_size(num_inputs)
        # Raises for an invalid request, which the fallback below would hide.
        self._format.make_grid(step.symmetric, step.group_size)
        group, self._note = self._format.choose_group_size(step.group_size, inputs)
        self._grid = self._format.make_grid(step.symmetric, group)
        self._options = quantize.RoundingOptions(
            damping=step.damping, order=step.order, sweeps=step.sweeps, scales=step.scales
        )
        fused = 2 * len(SUBLAYERS) * config["num_hidden_layers"]
        if step.keep_worst >= fused:
            raise UserError("keep_worst", step.keep_worst, f"keeps all {fused} fused layers", "keep fewer")
        self.planned_config = dict(config)
        self._is_tied = bool(config.get("tie_word_embeddings", False))

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        packed = dict(block)
        effective = dict(block)
        errors: dict[str, float] = {}
        notes: dict[str, Any] = {}
        for sublayer in SUBLAYERS:
            producers, consumer = self._roles.producers(sublayer), self._roles.consumer(sublayer)
            hessian_II: Tensor | None = None
            if stream is not None:
                wants_peak = self._step.smoothquant is not None
                hessian = stream.producer_hessian(sublayer, effective, f"block {index} {producers[0]}", wants_peak)
                hessian_II = hessian.mean()
                if hessian.peak_I is not None:
                    hessian_II = self._smooth(sublayer, producers, effective, packed, hessian.peak_I, hessian_II)
            self._round(producers, effective, packed, hessian_II, errors, notes)
            hessian_II = None
            if stream is not None:
                hessian_II = stream.consumer_hessian(sublayer, effective, f"block {index} {consumer}").mean()
            self._round((consumer,), effective, packed, hessian_II, errors, notes)
            if stream is not None:
                stream.advance(sublayer, effective)
        return packed, {"output_error": errors, **({"notes": notes} if notes else {})}

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        kept = [layer for position, layers in self._kept(details) if position == index for layer in layers]
        if not kept:
            return block
        source = original()
        restored = {name: tensor for name, tensor in block.items() if not _belongs(name, kept)}
        restored |= {name: tensor for name, tensor in source.items() if _belongs(name, kept)}
        if self._step.smoothquant is not None:
            # The kept layers read smoothed norms, so their columns need the inverse factors.
            for sublayer in SUBLAYERS:
                scale_I = _norm_ratio(source, block, self._roles.norm(sublayer))
                for layer in set(kept) & set(self._roles.producers(sublayer)):
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
            packed = {stem + suffix: values for suffix, values in pack_head(tensor).items()}
            return packed if name == head else {name: tensor, **packed}
        return {name: tensor}

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        kept = [
            self._roles.block.format(index=index) + layer for index, layers in self._kept(details) for layer in layers
        ]
        int8_head = self._step.head == "int8"
        ignored = kept if int8_head else [HEAD_TARGET, *kept]
        described = self._format.quantization_config(self._grid, ignored)
        if int8_head:
            described = add_head(described)
        untied = {"tie_word_embeddings": False} if int8_head else {}
        return {**_without_float16(before), **untied, "quantization_config": described}

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        described: dict[str, Any] = {"format": self._step.format, "method": self._step.method}
        if self._grid is not None:
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
        hessian_II: Tensor | None,
        errors: dict[str, float],
        notes: dict[str, Any],
    ) -> None:
        """Round layers that share their input together: rows are independent, and the Hessian is factorized once.

        `effective` gets the dequantized weights, `packed` the tensors to write, `errors` and `notes` one entry per
        layer.
        """
        weights = [effective[f"{layer}.weight"] for layer in layers]

        def rounding(weight_OI: Tensor, grid: quantize.Grid) -> quantize.Quantized:
            return self._method(weight_OI, hessian_II, grid, self._options)

        results = self._format.pack(weights, self._grid, rounding)
        if results[0].notes:
            notes["+".join(layers)] = dict(results[0].notes)
        for layer, weight_OI, result in zip(layers, weights, results, strict=True):
            rounded_OI = result.dequantize()
            errors[layer] = quantize.output_error(weight_OI, rounded_OI, hessian_II)
            effective[f"{layer}.weight"] = rounded_OI.to(weight_OI.dtype)
            del packed[f"{layer}.weight"]
            packed.update({f"{layer}.{suffix}": tensor for suffix, tensor in result.tensors.items()})

    def _smooth(
        self,
        sublayer: Sublayer,
        producers: Sequence[str],
        effective: Block,
        packed: Block,
        peak_I: Tensor,
        hessian_II: Tensor,
    ) -> Tensor:
        """Divide the norm's outputs by the smoothing factors, multiply the producers' columns; return the new H."""
        assert self._step.smoothquant is not None
        norm = self._roles.norm(sublayer)
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
        return hessian_II / scale_I[:, None] / scale_I[None, :]

    def _kept(self, details: Sequence[Detail]) -> list[tuple[int, tuple[str, ...]]]:
        """Return block index and layer names of the fused layers that stay unquantized, in order of blocks.

        Engines fuse query, key and value, and gate and up, so these are kept together.
        """
        fused = [
            layers
            for sublayer in SUBLAYERS
            for layers in (self._roles.producers(sublayer), (self._roles.consumer(sublayer),))
        ]
        ranked = sorted(
            ((index, layers) for index in range(len(details)) for layers in fused),
            key=lambda one: -max(details[one[0]]["output_error"][layer] for layer in one[1]),
        )
        return sorted(ranked[: self._step.keep_worst])


def _without_float16(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with bfloat16 in place of float16, for which vLLM's CPU kernels of quantized layers abort."""
    if dtype_of(config) not in {None, "float16"}:
        return dict(config)
    keys = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
    return {**config, **dict.fromkeys(sorted(keys), "bfloat16")}


def _belongs(name: str, layers: Sequence[str]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def _norm_ratio(before: Block, after: Block, norm: str) -> Tensor:
    """Return the factor `[I]` that divided a norm's weight, after rounding to its dtype; 1 where the weight is zero."""
    before_I, after_I = before[f"{norm}.weight"].float(), after[f"{norm}.weight"].float()
    return torch.where(after_I != 0, before_I / after_I, torch.ones_like(after_I))


def bind(step: Quantize, config: Mapping[str, Any], roles: LayerRoles, _seed: int) -> list[QuantizeStep]:
    """Return the one bound step. Raises UserError if the format, the method or a size does not fit."""
    return [QuantizeStep(step, config, roles)]
