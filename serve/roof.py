"""Why is it not faster? What one token costs, what the machine could do, and the kernels that vLLM chose.

Decoding one stream reads every weight once per token, so bandwidth over bytes is its roof (Pope et al. 2022,
arXiv 2211.05102, section 2). A prompt token costs two FLOPs per weight of the layers, so FLOP/s over FLOPs is the
roof of prefill; attention is left out, which a long prompt makes too kind. A CPU is measured once and kept
(`python -m serve.roof` measures now); a GPU's figures are its datasheet's.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from contracts.hardware import Hardware, probe_hardware
from contracts.progress import say
from contracts.storage import cache_dir, write_atomically
from serve.metrics import RoofMetrics, roof_metrics

ENGINE_LOG_VARIABLE = "SLIMSERVE_ENGINE_LOG"
_WINDOW_S = 10.0
_MEASURE_TIMEOUT_S = 60
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
class Machine:
    """What the hardware can do."""

    bandwidth: float
    """Bytes a second read from memory."""
    bf16_flops: float
    """FLOP a second of a large product of bfloat16 matrices."""
    int8_flops: float
    """The same of int8 matrices; 0 where nothing was found that computes it."""
    source: str
    """`measured`, or `datasheet` of a GPU."""


_GPUS = {
    "H200": Machine(4.8e12, 989e12, 1979e12, "datasheet"),
    "H100 PCIe": Machine(2.0e12, 756e12, 1513e12, "datasheet"),
    "H100": Machine(3.35e12, 989e12, 1979e12, "datasheet"),
    "A100-PCIE-40GB": Machine(1.555e12, 312e12, 624e12, "datasheet"),
    "A100-SXM4-40GB": Machine(1.555e12, 312e12, 624e12, "datasheet"),
    "A100": Machine(1.935e12, 312e12, 624e12, "datasheet"),
    "L4": Machine(0.3e12, 121e12, 242e12, "datasheet"),
}
"""By a part of the name that nvidia-smi gives, the first that fits; dense products, no sparsity."""


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

    def decode_roof(self, machine: Machine) -> float:
        """Tokens a second of one stream with a short context."""
        return machine.bandwidth / self.decode_bytes

    def prefill_roof(self, machine: Machine) -> float | None:
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
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return Cost(
        weight_bytes=weight_bytes,
        decode_bytes=weight_bytes - (embedding_bytes if has_head else 0),
        prefill_flops=2 * num_weights,
        kv_bytes=2 * 2 * config["num_hidden_layers"] * kv_heads * head_dim,
        is_int8=any(_is_int8(group) for group in (quantization.get("config_groups") or {}).values()),
    )


def machine_roof(
    hardware: Hardware | None = None, measure: bool = True, environment: Mapping[str, str] | None = None
) -> Machine | None:
    """What this machine can do; None for an unknown GPU, and where it was never measured and must not be now.

    Measuring takes two seconds of every core and a process that imports torch: call it before an engine starts, with
    the engine's environment (a launch plan's), as the OpenMP library that it preloads makes int8 products eight times
    as fast.
    """
    hardware = hardware or probe_hardware()
    if hardware.gpus:
        return next((machine for name, machine in _GPUS.items() if name in hardware.gpus[0]), None)
    file = _cache_file(hardware)
    if not file.exists() and measure:
        say("measuring this machine's memory bandwidth and FLOP/s, once")
        try:
            subprocess.run(
                [sys.executable, "-m", "serve.roof"],
                env=os.environ | dict(environment or {}),
                timeout=_MEASURE_TIMEOUT_S,
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None  # a figure for the curious is no reason not to serve
    try:
        return Machine(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def chosen_kernels(log: str) -> dict[str, str]:
    """Kernel by layer format, as the lines of vLLM's log name them; empty where all layers are plain matrices."""
    return {layer.strip(): kernel for kernel, layer in _KERNEL_LINE.findall(log)}


def describe_roof(cost: Cost, machine: Machine | None, kernels: Mapping[str, str]) -> list[str]:
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
        return lines + describe_roof(read_cost(directory), machine_roof(measure=False), chosen_kernels(text))
    except (OSError, ValueError, KeyError) as error:  # a figure for the curious is no reason not to serve
        return [*lines, f"the roof is unknown: the model's cost could not be read ({error})"]


def register_roof(metrics: RoofMetrics, cost: Cost, machine: Machine | None, kernels: Mapping[str, str]) -> None:
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
    machine = await asyncio.to_thread(machine_roof, None, False)
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


def _cache_file(hardware: Hardware) -> Path:
    name = re.sub(r"\W+", "-", f"{hardware.cpu} {len(hardware.cores)}").strip("-").lower()
    return cache_dir("roof") / f"{name}.json"


def _measure() -> Machine:
    """Best of several runs, so that a neighbour on the machine does not become its limit. About two seconds."""
    import torch

    torch.set_num_threads(len(probe_hardware().cores))
    memory, vector = torch.ones(8192, 16384), torch.ones(16384)  # 512 MiB, above any cache
    size = 2048
    a, b = torch.ones(size, size, dtype=torch.bfloat16), torch.ones(size, size, dtype=torch.bfloat16)
    bandwidth = memory.numel() * 4 / _best_s(lambda: memory @ vector)
    bf16 = 2 * size**3 / _best_s(lambda: a @ b)
    try:
        a8, b8 = a.to(torch.int8), b.to(torch.int8)
        int8 = 2 * size**3 / _best_s(lambda: torch._int_mm(a8, b8))
    except RuntimeError:
        int8 = 0.0
    return Machine(bandwidth, bf16, int8, "measured")


def _best_s(run: Callable[[], object], budget_s: float = 0.5) -> float:
    run()
    best, end = math.inf, time.monotonic() + budget_s
    while time.monotonic() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    measured = json.dumps(asdict(_measure()))
    write_atomically(_cache_file(probe_hardware()), measured)
    sys.stdout.write(measured + "\n")
