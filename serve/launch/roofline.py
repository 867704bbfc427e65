"""Lines for the terminal once an engine is ready: the phases of its start, its kernels and its roofline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.model_cost import ModelCost, read_model_cost
from slimserve.core.roofline import Roofline, load_roofline
from slimserve.serve.policy.engine_log import chosen_kernels, start_phases


def describe_start(directory: Path, log: Path) -> list[str]:
    """Return what the engine's log tells about its start, and the roofline of the model in `directory`."""
    lines = []
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
        phases = ", ".join(f"{phase} after {seconds} s" for phase, seconds in start_phases(text))
        if phases:
            lines.append(f"start: {phases}")
        roofline = load_roofline(measure=False)
        return lines + describe_roofline(read_model_cost(directory, probe_hardware()), roofline, chosen_kernels(text))
    except (OSError, UserError, KeyError) as error:  # these lines are information only; serving continues
        return [*lines, f"the roofline is unknown: the log or the model's cost could not be read ({error})"]


def describe_roofline(cost: ModelCost, hardware: Roofline | None, kernels: Mapping[str, str]) -> list[str]:
    """Return lines that name the kernels, the bytes of a decode step and the rooflines."""
    lines = [f"{layer}: {kernel}" for layer, kernel in kernels.items()] or [
        "plain matrix products, no quantized kernel"
    ]
    lines.append(
        f"a decode step reads {cost.decode_bytes / 2**20:.1f} MiB of weights "
        f"and {cost.kv_bytes / 2**10:.1f} KiB per token of context"
    )
    if hardware is None:
        return [*lines, "the roofline is unknown: this machine was not measured"]
    decode, prefill = cost.decode_tokens_per_s(hardware), cost.prefill_tokens_per_s(hardware)
    bandwidth = f"{hardware.bandwidth / 1e9:.1f} GB/s ({hardware.source})"
    lines.append(f"decode roofline {decode:.0f} tokens/s per stream at {bandwidth}")
    if prefill is not None:
        flops = prefill * cost.prefill_flops
        kind = hardware.computed_precision(cost.precision)
        products = hardware.dense_dtype if kind == "bf16" else kind
        tflops = f"{flops / 1e12:#.3g} {products} TFLOP/s ({hardware.source})"
        lines.append(f"prefill roofline {prefill:.0f} tokens/s at {tflops}")
    return lines
