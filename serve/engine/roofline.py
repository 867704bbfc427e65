"""Why is it not faster? What one token costs, what the machine could do, and the kernels that vLLM chose.

Decoding one stream reads every weight once per token, so bandwidth over bytes is its roof (Pope et al. 2022,
arXiv 2211.05102, section 2). A prompt token costs two FLOPs per weight of the layers, so FLOP/s over FLOPs is the
roof of prefill; attention is left out, which a long prompt makes too kind. What the machine could do is in
core/roofline.py.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from slimserve.core.model_config import head_dim_of, num_kv_heads_of
from slimserve.core.roofline import Roofline, load_roofline
from slimserve.serve.policy.metrics import RoofMetrics, roof_metrics

ENGINE_LOG_VARIABLE = "SLIMSERVE_ENGINE_LOG"
_WINDOW_S = 10.0
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "F8_E4M3", "F8_E5M2", "I8", "U8"), 1),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F64", "I64", "U64"), 8),
}
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.")
_HEAD = re.compile(r"(^|\.)lm_head\.")
_MATRIX = re.compile(r"\.(weight|weight_packed|qweight)$")
_KERNEL_LINE = re.compile(
    r"(?:Using|Selected) (\w*(?:Kernel|Experts)\w*) for (\w[\w. -]*?)\.?(?:\x1b\[0m)?\s*$", re.MULTILINE
)
_PHASE_LINE = re.compile(r"^serve\.entry: (.+) after ([\d.]+) s$", re.MULTILINE)
_COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:prompt_tokens_cached_total")


@dataclass(frozen=True)
class Cost:
    """What a model costs per token, from its files alone."""

    weight_bytes: int
    """All tensors."""
    decode_bytes: int
    """Weights that a decode step reads: all but the embedding table, unless that is the output layer too."""
    prefill_flops: int
    """Of one prompt token: two per weight of the layers. The output layer is computed once a prompt and not counted."""
    kv_bytes: int
    """Keys and values of one token of context, at 16 bits, which a later token reads."""
    is_int8: bool
    """Whether activations are int8 too, so that int8 FLOP/s are the roof."""

    def decode_roof(self, machine: Roofline) -> float:
        """Tokens a second of one stream with a short context."""
        return machine.bandwidth / self.decode_bytes

    def prefill_roof(self, machine: Roofline) -> float | None:
        """Prompt tokens a second; None where the machine's figure is not known."""
        flops = machine.int8_flops if self.is_int8 else machine.bf16_flops
        return flops / self.prefill_flops if flops else None


def read_cost(directory: Path) -> Cost:
    """Add up the headers of the safetensors files in `directory`, by the names that Hugging Face models give."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= _header(file)
    has_head = any(_HEAD.search(name) for name in tensors)
    sizes = {name: math.prod(shape) * _DTYPE_BYTES.get(dtype, 2) for name, (dtype, shape) in tensors.items()}
    weight_bytes = sum(sizes.values())
    embedding_bytes = sum(size for name, size in sizes.items() if _EMBEDDING.search(name))
    values_per_int32 = 32 // _num_bits(quantization)
    num_weights = sum(
        math.prod(shape) * (values_per_int32 if dtype == "I32" else 1)
        for name, (dtype, shape) in tensors.items()
        if _MATRIX.search(name) and len(shape) > 1 and not _EMBEDDING.search(name) and not _HEAD.search(name)
    )
    return Cost(
        weight_bytes=weight_bytes,
        decode_bytes=weight_bytes - (embedding_bytes if has_head else 0),
        prefill_flops=2 * num_weights,
        kv_bytes=2 * 2 * config["num_hidden_layers"] * num_kv_heads_of(config) * head_dim_of(config),
        is_int8=any(_is_int8(group) for group in (quantization.get("config_groups") or {}).values()),
    )


def chosen_kernels(log: str) -> dict[str, str]:
    """Kernel by layer format, as the lines of vLLM's log name them; empty where all layers are plain matrices."""
    return {layer.strip(): kernel for kernel, layer in _KERNEL_LINE.findall(log)}


def describe_roof(cost: Cost, machine: Roofline | None, kernels: Mapping[str, str]) -> list[str]:
    """Lines for people: why it is not faster."""
    lines = [f"{layer}: {kernel}" for layer, kernel in kernels.items()] or [
        "plain matrix products, no quantized kernel"
    ]
    lines.append(
        f"a decode step reads {cost.decode_bytes / 2**20:.1f} MiB of weights "
        f"and {cost.kv_bytes / 2**10:.1f} KiB per token of context"
    )
    if machine is None:
        return [*lines, "the roof is unknown: this machine was not measured"]
    prefill = cost.prefill_roof(machine)
    decode = cost.decode_roof(machine)
    bandwidth = f"{machine.bandwidth / 1e9:.1f} GB/s ({machine.source})"
    lines.append(f"decode roof {decode:.0f} tokens/s a stream at {bandwidth}")
    if prefill is not None:
        flops = prefill * cost.prefill_flops
        kind = "int8" if cost.is_int8 else "bf16"
        lines.append(f"prefill roof {prefill:.0f} tokens/s at {flops / 1e12:.2f} {kind} TFLOP/s ({machine.source})")
    return lines


def describe_start(directory: Path, log: Path) -> list[str]:
    """Lines for people once an engine is ready: where its start went, from its log, and why it is not faster."""
    text = log.read_text(encoding="utf-8", errors="replace")
    phases = ", ".join(f"{phase} after {seconds} s" for phase, seconds in _PHASE_LINE.findall(text))
    lines = [f"start: {phases}"] if phases else []
    try:
        return lines + describe_roof(read_cost(directory), load_roofline(measure=False), chosen_kernels(text))
    except (OSError, ValueError, KeyError) as error:  # a figure for the curious is no reason not to serve
        return [*lines, f"the roof is unknown: the model's cost could not be read ({error})"]


def register_roof(metrics: RoofMetrics, cost: Cost, machine: Roofline | None, kernels: Mapping[str, str]) -> None:
    """Set the gauges that do not change while the engine runs."""
    for layer, kernel in kernels.items():
        metrics.kernel.labels(layer, kernel).set(1)
    metrics.weight_bytes.set(cost.weight_bytes)
    metrics.decode_bytes.set(cost.decode_bytes)
    if machine is not None:
        metrics.decode_roof.set(cost.decode_roof(machine))
        if (prefill := cost.prefill_roof(machine)) is not None:
            metrics.prefill_roof.set(prefill)


class Rates:
    """Tokens a second between two looks at vLLM's counters, idle time included."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._last = (clock(), *self._read())

    def update(self, metrics: RoofMetrics) -> None:
        """Set the two gauges from what happened since the last call."""
        now, generated, computed = (self._clock(), *self._read())
        then, generated_then, computed_then = self._last
        if now > then:
            metrics.decode_rate.set((generated - generated_then) / (now - then))
            metrics.prefill_rate.set((computed - computed_then) / (now - then))
            self._last = (now, generated, computed)

    def _read(self) -> tuple[float, float]:
        """Tokens generated, and prompt tokens computed: those that the prefix cache had are not."""
        totals = dict.fromkeys(_COUNTERS, 0.0)
        for family in self._registry.restricted_registry(_COUNTERS).collect():
            for sample in family.samples:
                totals[sample.name] += sample.value
        generated, prompt, cached = (totals[name] for name in _COUNTERS)
        return generated, prompt - cached


async def watch_roof(directory: str, window_s: float = _WINDOW_S) -> None:
    """Keep the gauges of this process current until cancelled. Never measures: the engine has the cores by now."""
    log = os.environ.get(ENGINE_LOG_VARIABLE, "")
    text = ""
    if log:
        text = await asyncio.to_thread(Path(log).read_text, encoding="utf-8", errors="replace")
    cost = await asyncio.to_thread(read_cost, Path(directory))
    machine = await asyncio.to_thread(load_roofline, None, False)
    metrics = roof_metrics()
    register_roof(metrics, cost, machine, chosen_kernels(text))
    rates = Rates()
    while True:
        await asyncio.sleep(window_s)
        rates.update(metrics)


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor of a safetensors file."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(length))
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _num_bits(quantization: Mapping[str, Any]) -> int:
    """Bits of a weight where several are packed into an int32; 32 where none are."""
    groups = (quantization.get("config_groups") or {}).values()
    bits = [group["weights"]["num_bits"] for group in groups if group.get("weights")]
    return min(bits, default=int(quantization.get("bits") or 32))


def _is_int8(group: Mapping[str, Any]) -> bool:
    inputs = group.get("input_activations") or {}
    return inputs.get("type") == "int" and inputs.get("num_bits") == 8
