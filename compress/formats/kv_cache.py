"""FP8 KV cache: float8_e4m3fn keys and values with one calibrated scale each per decoder block.

Both are rounded as they enter the cache, keys after rotary position embedding. The scales are tensors of the attention
module, and config.json has a `kv_cache_scheme` beside the formats of the layers. vLLM then chooses an FP8 cache by
itself (`--kv-cache-dtype auto`).

Shape suffixes: B sequences; H heads; T tokens; E features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slimserve.core.errors import UserError

_FP8 = torch.float8_e4m3fn
_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


class KeyValuePeaks:
    """Records the largest magnitudes of keys and values; call it with what enters the cache."""

    def __init__(self) -> None:
        self.key, self.value = 0.0, 0.0

    def __call__(self, key_BHTE: Tensor, value_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arguments unchanged."""
        self.key = max(self.key, float(key_BHTE.abs().max()))
        self.value = max(self.value, float(value_BHTE.abs().max()))
        return key_BHTE, value_BHTE

    def tensors(self) -> dict[str, Tensor]:
        """Return the scales by their suffix after the attention module's name: float32 `[1]`, the peak becomes 448."""
        peaks = {"k_scale": self.key, "v_scale": self.value}
        return {name: torch.tensor([peak / torch.finfo(_FP8).max if peak else 1.0]) for name, peak in peaks.items()}


class KeyValueRounding:
    """Rounds keys and values as an FP8 cache does; call it with what enters the cache."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the scales of `KeyValuePeaks.tensors`, or those of another writer. UserError if one is missing."""
        for name in ("k_scale", "v_scale"):
            if name not in tensors:
                raise UserError("weights", name, "of an attention layer is missing", "build the variant again")
        self._key_scale, self._value_scale = float(tensors["k_scale"]), float(tensors["v_scale"])

    def __call__(self, key_BHTE: Tensor, value_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are read back from the cache, in the same dtype."""
        return _round(key_BHTE, self._key_scale), _round(value_BHTE, self._value_scale)


def scale_names(attention: str) -> set[str]:
    """Return the full names of the scales, given the name of the attention module."""
    return {f"{attention}.k_scale", f"{attention}.v_scale"}


def add_kv_cache(quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` with an FP8 KV cache."""
    return {**quantization_config, "kv_cache_scheme": dict(_SCHEME)}


def has_fp8_kv_cache(quantization_config: Mapping[str, Any] | None) -> bool:
    """Tell whether a config.json describes this KV cache. Raises UserError if it describes another one."""
    scheme = (quantization_config or {}).get("kv_cache_scheme")
    if scheme is None:
        return False
    for key, value in _SCHEME.items():
        if scheme.get(key) != value:
            raise UserError(
                f"quantization_config kv_cache_scheme {key}",
                scheme.get(key),
                "is not what slimserve reads",
                f"supported: {value}",
            )
    return True


def _round(x: Tensor, scale: float) -> Tensor:
    highest = torch.finfo(_FP8).max
    return ((x.float() / scale).clamp_(-highest, highest).to(_FP8).float() * scale).to(x.dtype)
