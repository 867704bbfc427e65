"""Formats of bitsandbytes: 4-bit NormalFloat (QLoRA, arXiv 2305.14314) and LLM.int8() (arXiv 2208.07339).

The tensors are those that transformers saves for a model that it quantized, made by bitsandbytes' own functions on the
CPU. transformers loads them directly; vLLM needs the package vllm-bnb-plugin.

Shape suffixes: O output features; I input features; T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimserve.compress.families import input_sizes
from slimserve.compress.formats.interface import HEAD_TARGET, LayerSizes, PackedLayer, QuantFormat, Rounding
from slimserve.compress.quantize import Grid
from slimserve.core.errors import UserError
from slimserve.core.hardware import Hardware

_BLOCK_SIZE = 64
"""Weights that share one scale in nf4: the value that transformers writes and all loaders expect."""
_OUTLIER_THRESHOLD = 6.0
"""Magnitude from which LLM.int8() keeps an input feature in float16."""
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that vLLM computes as one, by vLLM's name for them."""


class _BnbFormat(QuantFormat):
    """A format whose library rounds the weights; nothing of the rounding can be chosen."""

    has_fixed_rounding = True
    config: ClassVar[dict[str, Any]]
    """Entries of `quantization_config` besides the list of ignored layers."""

    @abstractmethod
    def pack_layer(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Return the tensors of one layer by their suffix."""

    @abstractmethod
    def unpack_layer(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that the engine computes with, `[O, I]` float32."""

    def pack(self, weights: Sequence[Tensor], grid: Grid | None, rounding: Rounding) -> list[PackedLayer]:
        packed = [self.pack_layer(weight_OI) for weight_OI in weights]
        return [PackedLayer(tensors, partial(self.unpack_layer, tensors)) for tensors in packed]

    def unpack(self, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> Tensor:
        return self.unpack_layer(tensors)

    def quantization_config(self, grid: Grid | None, ignored_layers: Sequence[str] = (HEAD_TARGET,)) -> dict[str, Any]:
        """Return the `quantization_config` of config.json.

        If all parts of a layer that vLLM fuses are ignored, the list has its fused name too. vLLM looks for that name;
        without it, vLLM rounds the parts to nf4 while loading, or fails at the first request for int8.
        """
        modules = sorted({layer.rpartition(".")[0] for layer in ignored_layers})
        fused = [
            f"{module}.{name}"
            for module in modules
            for name, parts in _FUSED.items()
            if {f"{module}.{part}" for part in parts} <= set(ignored_layers)
        ]
        return {
            "quant_method": "bitsandbytes",
            **self.config,
            "llm_int8_skip_modules": [*ignored_layers, *fused],
        }

    def recognises(self, quantization_config: Mapping[str, Any]) -> bool:
        is_int8 = bool(quantization_config.get("load_in_8bit"))
        return quantization_config.get("quant_method") == "bitsandbytes" and is_int8 == (self.num_bits == 8)

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        return "small but slow: the package vllm-bnb-plugin dequantizes the weights for every product"


class _Nf4(_BnbFormat):
    name = "nf4"
    num_bits = 4
    config: ClassVar[dict[str, Any]] = {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }

    def check_layers(self, layers: Mapping[str, LayerSizes]) -> None:
        """Raise UserError unless 64 divides the inputs: bitsandbytes 0.50 decodes others wrongly on a CPU."""
        for name, (_, num_inputs) in layers.items():
            if num_inputs % _BLOCK_SIZE:
                raise UserError(
                    f"inputs of {name}",
                    num_inputs,
                    f"are no multiple of {_BLOCK_SIZE}; bitsandbytes decodes such a layer wrongly on a CPU",
                    f"prune with multiple = {_BLOCK_SIZE}, or use another format",
                )

    def pack_layer(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Return `weight`, its two levels of scales, both code books and the state as JSON bytes.

        `weight` is uint8 `[ceil(O*I/2), 1]`, two codes each. `weight.absmax` is uint8, one scale per 64 weights, and is
        itself scaled in blocks of 256 by `weight.nested_absmax`. Raises UserError as `check_layers` does.
        """
        from bitsandbytes import functional

        self.check_layers({"a layer": (weight_OI.shape[0], weight_OI.shape[1])})
        codes, state = functional.quantize_4bit(
            weight_OI.to(torch.bfloat16).contiguous(), blocksize=_BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        return {"weight": codes} | {f"weight.{suffix}": tensor for suffix, tensor in state.as_dict(packed=True).items()}

    def unpack_layer(self, tensors: Mapping[str, Tensor]) -> Tensor:
        from bitsandbytes import functional

        stats = {suffix: tensor for suffix, tensor in tensors.items() if suffix.startswith("weight.")}
        state = functional.QuantState.from_dict(stats, device=torch.device("cpu"))
        shape = state.shape
        # With several rows, the CPU code starts row r at block r * floor(I / 64), but blocks continue across rows.
        state.shape = torch.Size((shape.numel(),))
        weight_OI: Tensor = functional.dequantize_4bit(tensors["weight"], state).view(shape)
        return weight_OI.float()

    def layer_bytes(self, num_outputs: int, num_inputs: int, group_size: int | None, symmetric: bool) -> float:
        # Per 64 weights a scale of one byte; per 256 scales another one of four bytes.
        return num_outputs * num_inputs * (1 / 2 + 1 / 64 + 1 / 4096)

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        odd = [size for size in input_sizes(config) if size % _BLOCK_SIZE]
        if odd:
            return (
                f"gives wrong results: bitsandbytes' CPU code needs multiples of {_BLOCK_SIZE} inputs, "
                f"but a layer has {odd[0]}"
            )
        return super().explain_cpu_kernel(hardware, config)


class _Int8(_BnbFormat):
    name = "int8-bnb"
    num_bits = 8
    config: ClassVar[dict[str, Any]] = {
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": _OUTLIER_THRESHOLD,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }

    def pack_layer(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Return `weight` (int8 `[O, I]`), `SCB` (float32 `[O]`, peak of each row) and `weight_format` (0: rows).

        Raises UserError for a weight beyond float16, in which bitsandbytes rounds.
        """
        from bitsandbytes import functional

        peak = float(weight_OI.abs().max())
        if peak > torch.finfo(torch.float16).max:
            remedy = "choose a format that does not round in float16"
            raise UserError("weights", peak, "is beyond float16, in which bitsandbytes rounds int8", remedy)
        codes_OI, scale_O, _ = functional.int8_vectorwise_quant(weight_OI.to(torch.float16))
        return {"weight": codes_OI, "SCB": scale_O, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def unpack_layer(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float() * (tensors["SCB"].float() / 127)[:, None]

    @property
    def rounds_activations(self) -> bool:
        return True

    def round_inputs(self, x_TI: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the inputs `[..., I]` as LLM.int8() multiplies them (arXiv 2208.07339, section 3), in the same dtype.

        Each token is rounded to 127 steps of its largest magnitude. A feature that reaches 6 in any token stays in
        float16, so the result for one token depends on the tokens that are computed with it.
        """
        flat_TI = x_TI.reshape(-1, x_TI.shape[-1]).to(torch.float16).float()
        is_outlier_TI = flat_TI.abs() >= _OUTLIER_THRESHOLD
        kept_I = is_outlier_TI.any(dim=0)
        rest_TI = flat_TI.masked_fill(is_outlier_TI, 0.0)
        peak_T1 = rest_TI.abs().amax(dim=1, keepdim=True)
        step_T1 = torch.where(peak_T1 > 0, peak_T1 / 127, torch.ones_like(peak_T1))
        rounded_TI = (rest_TI / step_T1).round_() * step_T1
        return torch.where(kept_I, flat_TI, rounded_TI).to(x_TI.dtype).view(x_TI.shape)

    def layer_bytes(self, num_outputs: int, num_inputs: int, group_size: int | None, symmetric: bool) -> float:
        return num_outputs * num_inputs + 4 * num_outputs


NF4 = _Nf4()
INT8_BNB = _Int8()
