"""Export the model's roofline and the rates that the engine achieves as Prometheus metrics."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry

from slimserve.core.hardware import probe_hardware
from slimserve.core.model_cost import ModelCost, read_model_cost
from slimserve.core.roofline import Roofline, load_roofline
from slimserve.serve.policy.engine_environment import ENGINE_LOG_VARIABLE
from slimserve.serve.policy.engine_log import chosen_kernels
from slimserve.serve.policy.metrics import RooflineMetrics, roofline_metrics

_WINDOW_S = 10.0
_COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:prompt_tokens_cached_total")


async def export_roofline(directory: str, window_s: float = _WINDOW_S) -> None:
    """Set the roofline metrics of the model in `directory`, then update the rates every `window_s` until cancelled.

    The hardware is not measured here, because the engine already uses the cores.
    """
    log = os.environ.get(ENGINE_LOG_VARIABLE, "")
    text = await asyncio.to_thread(Path(log).read_text, encoding="utf-8", errors="replace") if log else ""
    cost = await asyncio.to_thread(read_model_cost, Path(directory), probe_hardware())
    hardware = await asyncio.to_thread(load_roofline, None, False)
    metrics = roofline_metrics()
    set_constants(metrics, cost, hardware, chosen_kernels(text))
    rates = TokenRates()
    while True:
        await asyncio.sleep(window_s)
        rates.update(metrics)


def set_constants(
    metrics: RooflineMetrics, cost: ModelCost, hardware: Roofline | None, kernels: Mapping[str, str]
) -> None:
    """Set the metrics that do not change while the engine runs; `kernels` maps layer formats to kernels."""
    for layer, kernel in kernels.items():
        metrics.kernel.labels(layer, kernel).set(1)
    metrics.weight_bytes.set(cost.weight_bytes)
    metrics.decode_bytes.set(cost.decode_bytes)
    if hardware is not None:
        metrics.decode_roofline.set(cost.decode_tokens_per_s(hardware))
        if (prefill := cost.prefill_tokens_per_s(hardware)) is not None:
            metrics.prefill_roofline.set(prefill)


class TokenRates:
    """Tokens per second between two readings of vLLM's counters, idle time included."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._last = (clock(), *self._read())

    def update(self, metrics: RooflineMetrics) -> None:
        """Set the two rates from the tokens since the last update."""
        now, generated, computed = (self._clock(), *self._read())
        last, last_generated, last_computed = self._last
        if now > last:
            metrics.decode_rate.set((generated - last_generated) / (now - last))
            metrics.prefill_rate.set((computed - last_computed) / (now - last))
            self._last = (now, generated, computed)

    def _read(self) -> tuple[float, float]:
        """Return the generated tokens and the computed prompt tokens, which exclude those from the prefix cache."""
        totals = dict.fromkeys(_COUNTERS, 0.0)
        for family in self._registry.restricted_registry(_COUNTERS).collect():
            for sample in family.samples:
                totals[sample.name] += sample.value
        generated, prompt, cached = (totals[name] for name in _COUNTERS)
        return generated, prompt - cached
