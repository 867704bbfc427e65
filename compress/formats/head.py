"""INT8 output layer: a W8A8 layer, rounded to nearest, beside layers of another format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slimserve.compress.formats.compressed_tensors import pack_codes, unpack_codes
from slimserve.compress.formats.int8 import W8A8
from slimserve.compress.formats.interface import HEAD_TARGET
from slimserve.compress.quantize import round_to_nearest

_CHUNK_ROWS = 4096
"""Rows that are rounded at once; in float32 a complete output layer may take a gigabyte."""


def pack_head(weight_VD: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the output layer by their suffix."""
    grid = W8A8.make_grid()
    parts = [pack_codes(round_to_nearest(rows.float(), None, grid)) for rows in weight_VD.split(_CHUNK_ROWS)]
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


def unpack_head(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the output layer `[V, D]` float32; its inputs go through `round_head_inputs`."""
    return unpack_codes(tensors, W8A8.make_grid()).dequantize()


def round_head_inputs(x: Tensor) -> Tensor:
    """Return the inputs of the output layer as the engine's product sees them."""
    return W8A8.round_inputs(x, {})


def head_bytes(vocab_size: int, hidden_size: int) -> float:
    """Return the bytes of an INT8 output layer in a checkpoint."""
    return W8A8.layer_bytes(vocab_size, hidden_size, None, symmetric=True)


def add_head(quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` with the INT8 output layer as a group of its own."""
    groups = {**quantization_config["config_groups"], "group_1": W8A8.scheme(W8A8.make_grid(), HEAD_TARGET)}
    layout = quantization_config["format"]
    mixed = layout if layout == W8A8.layout else "mixed-precision"
    return {**quantization_config, "format": mixed, "config_groups": groups}
