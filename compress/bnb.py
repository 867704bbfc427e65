"""How bitsandbytes layers are written: 4-bit NormalFloat (QLoRA, arXiv 2305.14314) and LLM.int8() (arXiv 2208.07339).

The tensors are those that transformers saves for a model it quantized, made by
bitsandbytes' own functions on the CPU. transformers loads them as they are; vLLM does so
with the package vllm-bnb-plugin. Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimserve.core.errors import UserError

_BLOCK = 64
"""Weights that share one scale in nf4: what transformers writes and all loaders expect."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's names for the layers that it computes as one."""


@dataclass(frozen=True)
class BnbFormat:
    """One bitsandbytes format as config.json describes it."""

    num_bits: int
    config: dict[str, Any]


BNB_FORMATS: dict[str, BnbFormat] = {
    "nf4": BnbFormat(
        4,
        {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    ),
    "int8": BnbFormat(
        8,
        {
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        },
    ),
}


def check_input_size(num_inputs: int, format_name: str) -> None:
    """Raise UserError for a layer of so many inputs that the format's CPU code decodes wrongly."""
    if BNB_FORMATS[format_name].num_bits == 4 and num_inputs % _BLOCK:
        raise UserError(
            "inputs of a layer",
            num_inputs,
            f"are no multiple of {_BLOCK}, which bitsandbytes decodes wrongly on a CPU",
            f"prune with multiple = {_BLOCK}, or use another format",
        )


def pack_layer(weight_OI: Tensor, format_name: str) -> dict[str, Tensor]:
    """Tensors of one linear layer by their suffix.

    nf4: `weight` (uint8 `[ceil(O*I/2), 1]`, two codes each), `weight.absmax` (uint8, itself quantized in blocks of
    256), `weight.nested_absmax`, both code books and `weight.quant_state.bitsandbytes__nf4` (JSON as bytes).
    int8: `weight` (int8 `[O, I]`), `SCB` (float32 `[O]`, the largest magnitude of each row) and `weight_format`
    (0: rows). Raises UserError for an int8 weight beyond float16, in which bitsandbytes rounds, and for an nf4
    weight whose inputs are no multiple of 64: bitsandbytes 0.50 decodes those wrongly on a CPU, without an error.
    """
    from bitsandbytes import functional

    check_input_size(weight_OI.shape[1], format_name)
    if BNB_FORMATS[format_name].num_bits == 8:
        peak = float(weight_OI.abs().max())
        if peak > torch.finfo(torch.float16).max:
            raise UserError("weights", peak, "is beyond float16, in which bitsandbytes rounds int8", "use w8a8 or nf4")
        codes_OI, scale_O, _ = functional.int8_vectorwise_quant(weight_OI.to(torch.float16))
        return {"weight": codes_OI, "SCB": scale_O, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    codes, state = functional.quantize_4bit(
        weight_OI.to(torch.bfloat16).contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return {"weight": codes} | {f"weight.{suffix}": tensor for suffix, tensor in state.as_dict(packed=True).items()}


def dequantize_layer(tensors: Mapping[str, Tensor], format_name: str) -> Tensor:
    """The weight that the engine computes with, `[O, I]` float32, from `pack_layer`'s tensors or a checkpoint's."""
    if BNB_FORMATS[format_name].num_bits == 8:
        return tensors["weight"].float() * (tensors["SCB"].float() / 127)[:, None]
    from bitsandbytes import functional

    stats = {suffix: tensor for suffix, tensor in tensors.items() if suffix.startswith("weight.")}
    state = functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    shape = state.shape
    # As one row: with several, the CPU code starts row r at block r * floor(I / 64), but blocks run on across rows.
    state.shape = torch.Size((shape.numel(),))
    weight_OI: Tensor = functional.dequantize_4bit(tensors["weight"], state).view(shape)
    return weight_OI.float()


def round_inputs(x: Tensor) -> Tensor:
    """Inputs of an int8 layer as LLM.int8() multiplies them, `[..., I]` in the dtype given (arXiv 2208.07339 §3).

    Each token is put on 127 steps of its largest magnitude; features that reach 6 in any token of the call stay
    in float16. So what a layer computes for one token depends on those that it is computed with.
    """
    flat_TI = x.reshape(-1, x.shape[-1]).to(torch.float16).float()
    is_outlier_TI = flat_TI.abs() >= BNB_FORMATS["int8"].config["llm_int8_threshold"]
    kept_I = is_outlier_TI.any(dim=0)
    rest_TI = flat_TI.masked_fill(is_outlier_TI, 0.0)
    peak_T1 = rest_TI.abs().amax(dim=1, keepdim=True)
    step_T1 = torch.where(peak_T1 > 0, peak_T1 / 127, torch.ones_like(peak_T1))
    rounded_TI = (rest_TI / step_T1).round_() * step_T1
    return torch.where(kept_I, flat_TI, rounded_TI).to(x.dtype).view(x.shape)


def quantization_config(format_name: str, ignored_layers: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The `quantization_config` of config.json for a model whose linear layers, but the ignored, have the format.

    Where all parts of a layer that vLLM fuses are ignored, its fused name is listed too: vLLM looks for that
    one, and without it rounds the parts to nf4 while loading, or fails at the first request for int8.
    """
    parents = sorted({layer.rpartition(".")[0] for layer in ignored_layers})
    fused = [
        f"{parent}.{name}"
        for parent in parents
        for name, parts in _FUSED.items()
        if {f"{parent}.{part}" for part in parts} <= set(ignored_layers)
    ]
    return {
        "quant_method": "bitsandbytes",
        **BNB_FORMATS[format_name].config,
        "llm_int8_skip_modules": [*ignored_layers, *fused],
    }
