"""Quantization formats by name. `interface.py` says how to add one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimserve.compress.formats.bnb import INT8_BNB, NF4
from slimserve.compress.formats.fp8 import FP8
from slimserve.compress.formats.fp8_block import FP8_BLOCK
from slimserve.compress.formats.int4 import W4A16
from slimserve.compress.formats.int8 import W8A8
from slimserve.compress.formats.interface import QuantFormat
from slimserve.compress.formats.mxfp4 import MXFP4, MXFP4A16
from slimserve.compress.formats.nvfp4 import NVFP4, NVFP4A16
from slimserve.compress.formats.w4a8 import W4A8, W4A8_FP8
from slimserve.core.errors import UserError

_BUILT_IN = (W8A8, W4A16, FP8, FP8_BLOCK, W4A8, W4A8_FP8, NVFP4, NVFP4A16, MXFP4, MXFP4A16, NF4, INT8_BNB)
_formats: dict[str, QuantFormat] = {}


def register_format(quant_format: QuantFormat) -> None:
    """Make a format available to recipes and readers in this process. Raises ValueError if the name is taken."""
    if _formats.setdefault(quant_format.name, quant_format) is not quant_format:
        raise ValueError(f"a format named {quant_format.name} is registered already")


def format_names() -> list[str]:
    """Return the names of all registered formats."""
    return list(_formats)


def get_format(name: str) -> QuantFormat:
    """Return the format of a name; UserError lists the known names."""
    if name not in _formats:
        raise UserError("format", name, "is unknown", f"choose from {', '.join(_formats)}")
    return _formats[name]


def find_format(quantization_config: Mapping[str, Any]) -> QuantFormat:
    """Return the format that a config.json describes, a program's own before a built-in one.

    Raises UserError if no registered format recognises it.
    """
    for quant_format in reversed(_formats.values()):
        if quant_format.recognises(quantization_config):
            return quant_format
    raise UserError(
        "quantization_config",
        dict(quantization_config),
        "is not a format that slimserve reads",
        f"use a model in one of these formats: {', '.join(_formats)}",
    )


for _built_in in _BUILT_IN:
    register_format(_built_in)
