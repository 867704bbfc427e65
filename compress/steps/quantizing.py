"""Quantizing every linear layer of the blocks and, if requested, the output layer (head)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimserve.compress import quantize, rounding
from slimserve.compress.decoder import Block, Sublayer, decoder_of
from slimserve.compress.experts import expert_role
from slimserve.compress.formats import get_format
from slimserve.compress.formats.head import add_head, pack_head
from slimserve.compress.formats.kv_cache import KeyValuePeaks, add_kv_cache
from slimserve.compress.recipe import Quantize
from slimserve.compress.roles import find_smoothing, smooth
from slimserve.compress.steps.interface import Detail
from slimserve.compress.stream import Stream
from slimserve.core.errors import UserError
from slimserve.core.model_config import dtype_of

_FEW_TOKENS = 128
"""Calibration tokens below which an expert's rounding rests on too little."""


class QuantizeStep:
    """Round every linear layer to a format's grid, on inputs computed with the rounded layers before it."""

    name = "quantize"
    wants_dense = False
    wants_short = False

    def __init__(self, step: Quantize, config: Mapping[str, Any]) -> None:
        self._step, self._decoder = step, decoder_of(config)
        self._format = get_format(step.format)
        self._method = rounding.rounding_method(step.method)
        self._is_smoothing = step.awq or step.smoothquant is not None
        self._has_fp8_cache = step.kv_cache != "dense"
        self.needs_data = (
            self._method.needs_data
            or self._is_smoothing
            or step.scales == "mse"
            or self._format.needs_input_peak
            or self._has_fp8_cache
        )
        self._note = ""
        depth = config["num_hidden_layers"]
        shapes = [self._decoder.block_shapes(index) for index in range(depth)]
        inputs: dict[int, None] = {}
        for index, sublayers in enumerate(self._decoder.sublayers):
            for group in (group for sublayer in sublayers for stage in sublayer.stages for group in stage):
                sizes = {layer: shapes[index][f"{layer}.weight"] for layer in group}
                self._format.check_layers({layer: (size[0], size[1]) for layer, size in sizes.items()})
                inputs |= dict.fromkeys(size[1] for size in sizes.values())
        if not inputs:
            raise UserError(
                "quantize", config["model_type"], "has no linear layers that PyTorch knows", "use another model"
            )
        # Raises for an invalid request, which the fallback below would hide.
        self._format.make_grid(step.symmetric, step.group_size)
        group_size, self._note = self._format.choose_group_size(step.group_size, list(inputs))
        self._grid = self._format.make_grid(step.symmetric, group_size)
        self._options = quantize.RoundingOptions(
            damping=step.damping, order=step.order, sweeps=step.sweeps, scales=step.scales
        )
        fused = sum(len(sublayer.fused) for sublayers in self._decoder.sublayers for sublayer in sublayers)
        if step.keep_worst >= fused:
            raise UserError("keep_worst", step.keep_worst, f"keeps all {fused} fused layers", "keep fewer")
        self.planned_config = dict(config)
        self._is_tied = bool(config.get("tie_word_embeddings", False))
        if self._is_smoothing and not any(self._norms(index) for index in range(depth)):
            raise UserError(
                "awq" if step.awq else "smoothquant",
                step.awq or step.smoothquant,
                f"is not possible for {config['model_type']}: no norm can take over the factors of the layers after it",
                "leave it out",
            )

    def _norms(self, index: int) -> dict[str, float]:
        """Return the norms of a layer that are smoothed, with their offsets."""
        return find_smoothing(self._decoder, index) if self._is_smoothing else {}

    def on_block(self, index: int, block: Block, stream: Stream | None, dense: Stream | None) -> tuple[Block, Detail]:
        packed = dict(block)
        effective = dict(block)
        errors: dict[str, float] = {}
        notes: dict[str, Any] = {}
        norms = self._norms(index)
        num_experts, num_few = 0, 0
        for sublayer in self._decoder.sublayers[index]:
            peaks = KeyValuePeaks() if self._has_fp8_cache and sublayer.is_attention else None
            for stage in sublayer.stages:
                if stream is None:
                    for group in stage:
                        self._round(group, effective, packed, None, None, errors, notes)
                    continue
                is_smoothed = stage is sublayer.stages[0] and sublayer.norm in norms
                # The cache is seen once, when the consumer's inputs are computed from the rounded layers before it.
                stream.on_key_value = peaks if stage is sublayer.stages[-1] else None
                wants_peak = is_smoothed or self._format.needs_input_peak
                for group, hessian in stream.hessians(sublayer, stage, effective, wants_peak):
                    if expert_role(group[0]) != group[0]:
                        num_experts += 1
                        num_few += hessian.num_tokens < _FEW_TOKENS
                    hessian_II = hessian.mean() if hessian.num_tokens else None
                    peak_I = hessian.peak_I
                    if is_smoothed and peak_I is not None and hessian_II is not None:
                        assert sublayer.norm is not None
                        scale_I = self._smooth(sublayer, norms[sublayer.norm], effective, packed, hessian_II, peak_I)
                        hessian_II = hessian_II / scale_I[:, None] / scale_I[None, :]
                        peak_I = peak_I / scale_I
                    self._round(group, effective, packed, hessian_II, peak_I, errors, notes)
            if stream is not None:
                stream.on_key_value = None
            if peaks is not None:
                packed.update({f"{sublayer.path}.{suffix}": scale for suffix, scale in peaks.tensors().items()})
            if stream is not None:
                stream.advance(sublayer, effective)
        detail: Detail = {"output_error": errors, **({"notes": notes} if notes else {})}
        if num_experts:
            detail["experts"] = {"num_groups": num_experts, "num_with_few_tokens": num_few}
        return packed, detail

    def emit(self, index: int, block: Block, original: Callable[[], Block], details: Sequence[Detail]) -> Block | None:
        kept = [layer for position, layers in self._kept(details) if position == index for layer in layers]
        if not kept:
            return block
        source = original()
        restored = {name: tensor for name, tensor in block.items() if not _belongs(name, kept)}
        restored |= {name: tensor for name, tensor in source.items() if _belongs(name, kept)}
        # The kept layers read smoothed norms, so their columns need the inverse factors.
        for norm, offset in self._norms(index).items():
            scale_I = _norm_ratio(source, block, norm, offset)
            sublayer = next(one for one in self._decoder.sublayers[index] if one.norm == norm)
            for layer in set(kept) & set(sublayer.stages[0][0]):
                weight_OI = source[f"{layer}.weight"]
                restored[f"{layer}.weight"] = (weight_OI.float() * scale_I).to(weight_OI.dtype)
        return restored

    def emit_outer(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if self._step.head == "dense":
            return {name: tensor}
        head, embedding = self._decoder.head, self._decoder.embedding
        if name == head and self._is_tied:
            return {}
        if name == head or (name == embedding and self._is_tied):
            stem = head.removesuffix("weight")
            packed = {stem + suffix: values for suffix, values in pack_head(tensor).items()}
            return packed if name == head else {name: tensor, **packed}
        return {name: tensor}

    def config(self, before: Mapping[str, Any], details: Sequence[Detail]) -> dict[str, Any]:
        kept = [
            self._decoder.block.format(index=index) + layer for index, layers in self._kept(details) for layer in layers
        ]
        int8_head = self._step.head == "int8"
        is_ignored = [
            name for name in self._decoder.dense_modules if not (int8_head and name == self._decoder.head_module)
        ]
        ignored = [*is_ignored, *kept]
        described = self._format.quantization_config(self._grid, ignored)
        if int8_head:
            described = add_head(described)
        if self._has_fp8_cache:
            described = add_kv_cache(described)
        untied = {"tie_word_embeddings": False} if int8_head else {}
        return {**_without_float16(before), **untied, "quantization_config": described}

    def describe(self, details: Sequence[Detail]) -> dict[str, Any]:
        described: dict[str, Any] = {"format": self._step.format, "method": self._step.method}
        if self._grid is not None:
            described |= {"symmetric": self._grid.symmetric, "group_size": self._grid.group_size}
        if self._step.head != "dense":
            described["head"] = self._step.head
        if self._has_fp8_cache:
            described["kv_cache"] = self._step.kv_cache
        notes = [self._note] if self._note else []
        experts = [detail["experts"] for detail in details if "experts" in detail]
        few = sum(one["num_with_few_tokens"] for one in experts)
        if few:
            total = sum(one["num_groups"] for one in experts)
            described["experts_with_few_tokens"] = f"{few} of {total}"
            notes.append(f"{few} of {total} expert layers saw fewer than {_FEW_TOKENS} calibration tokens")
        if notes:
            described["fallback"] = "; ".join(notes)
        kept = self._kept(details)
        if kept:
            described["kept_unquantized"] = [
                self._decoder.block.format(index=index) + layer for index, layers in kept for layer in layers
            ]
        return {**described, "per_block": list(details)}

    def _round(
        self,
        layers: Sequence[str],
        effective: Block,
        packed: Block,
        hessian_II: Tensor | None,
        peak_I: Tensor | None,
        errors: dict[str, float],
        notes: dict[str, Any],
    ) -> None:
        """Round layers that share their input together: rows are independent, and the Hessian is factorized once.

        `effective` gets the dequantized weights, `packed` the tensors to write, `errors` and `notes` one entry per
        layer.
        """
        weights = [effective[f"{layer}.weight"] for layer in layers]

        # An expert that saw no token is rounded to nearest.
        method = rounding.rounding_method("rtn") if hessian_II is None and self.needs_data else self._method

        def rounded(weight_OI: Tensor, grid: quantize.Grid) -> quantize.Quantized:
            return method(weight_OI, hessian_II, grid, self._options)

        results = self._format.pack(weights, self._grid, rounded)
        if results[0].notes:
            notes["+".join(layers)] = dict(results[0].notes)
        for layer, weight_OI, result in zip(layers, weights, results, strict=True):
            rounded_OI = result.dequantize()
            role = expert_role(layer)
            errors[role] = max(errors.get(role, 0.0), quantize.output_error(weight_OI, rounded_OI, hessian_II))
            effective[f"{layer}.weight"] = rounded_OI.to(weight_OI.dtype)
            del packed[f"{layer}.weight"]
            tensors = result.tensors
            if self._format.needs_input_peak:
                # An expert that saw no token gets the scale of inputs up to 1.
                tensors = tensors | self._format.input_tensors(1.0 if peak_I is None else float(peak_I.max()))
            packed.update({f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()})

    def _smooth(
        self,
        sublayer: Sublayer,
        offset: float,
        effective: Block,
        packed: Block,
        hessian_II: Tensor,
        peak_I: Tensor,
    ) -> Tensor:
        """Divide the norm's outputs by the smoothing factors, multiply the producers' columns; return the factors."""
        assert sublayer.norm is not None
        norm, producers = sublayer.norm, sublayer.stages[0][0]
        weights = [effective[f"{layer}.weight"] for layer in producers]
        if self._step.smoothquant is None:
            scale_I = quantize.awq_scales(torch.cat(weights).float(), hessian_II, self._to_nearest)
        else:
            weight_peak_I = torch.stack([weight_OI.float().abs().amax(0) for weight_OI in weights]).amax(0)
            scale_I = quantize.smooth_scales(peak_I, weight_peak_I, self._step.smoothquant)
        weight, bias = f"{norm}.weight", f"{norm}.bias"
        before = dict(effective)
        effective[weight] = packed[weight] = smooth(before, norm, offset, (), scale_I)[weight]
        scale_I = _norm_ratio(before, effective, norm, offset)
        if bias in before:  # it gets the factors that the weight's dtype could hold
            effective[bias] = packed[bias] = smooth(before, norm, offset, (), scale_I)[bias]
        for layer in producers:
            effective[f"{layer}.weight"] = effective[f"{layer}.weight"].float() * scale_I
        return scale_I

    def _to_nearest(self, weight_OI: Tensor) -> Tensor:
        (result,) = self._format.pack(
            [weight_OI], self._grid, lambda weight_OI, grid: quantize.round_to_nearest(weight_OI, None, grid)
        )
        return result.dequantize()

    def _kept(self, details: Sequence[Detail]) -> list[tuple[int, tuple[str, ...]]]:
        """Return block index and layer names of the fused layers that stay unquantized, in order of blocks.

        Engines fuse query, key and value, gate and up, and all experts, so these are kept together.
        """
        ranked = sorted(
            (
                (index, layers)
                for index in range(len(details))
                for sublayer in self._decoder.sublayers[index]
                for layers in sublayer.fused
            ),
            key=lambda one: -max(details[one[0]]["output_error"][expert_role(layer)] for layer in one[1]),
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


def _norm_ratio(before: Block, after: Block, norm: str, offset: float) -> Tensor:
    """Return the factor `[I]` that divided a norm's outputs, after rounding to its dtype; 1 where it is zero."""
    before_I, after_I = before[f"{norm}.weight"].float() + offset, after[f"{norm}.weight"].float() + offset
    return torch.where(after_I != 0, before_I / after_I, torch.ones_like(after_I))


def bind(step: Quantize, config: Mapping[str, Any], _seed: int) -> list[QuantizeStep]:
    """Return the one bound step. Raises UserError if the format, the method or a size does not fit."""
    return [QuantizeStep(step, config)]
