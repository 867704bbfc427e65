"""The plan of a comparison: amount of measurement, rates and seeds of the load tests, and the estimated duration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimserve.compare.results import Comparison, Preset, VariantResult
from slimserve.compress.recipe import MIXED
from slimserve.core.hardware import probe_hardware
from slimserve.workloads import load_workload, workload_argument, workload_names

LOOKS = tuple(number / 10 for number in range(1, 11))
"""Fractions of the quality prompts at which --until-decided looks at the answers."""
_MAX_PROMPTS = 2000
"""Number of quality prompts of each workload with --until-decided, if none is given."""
REFERENCE = "dense"
"""Recipe that is the reference if it is among the variants."""
_BUILD_S, _START_S, _LOAD_OVERHEAD_S, _TEXTS_S, _PROMPT_S = 40.0, 55.0, 6.0, 10.0, 0.13
"""Estimated seconds for a model of 0.1B parameters on two cores: to build a variant, to start an engine, to start
Locust and drain the last requests of a load test, to read the texts, and to answer one quality prompt."""
_SLOWNESS_OF_AVX2 = 4.7
"""Factor of all but the load tests on a CPU with AVX2 alone, from two demos of 48 and 57 minutes."""

_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "duration_s": 10.0,
        "warmup_s": 2.0,
        "cooldown_s": 1.0,
        "num_rounds": 1,
        "num_texts": 4,
        "rate_fracs": (0.5,),
        "loads_losers": False,
    },
    "full": {"duration_s": 16.0, "warmup_s": 3.0, "cooldown_s": 1.0, "num_rounds": 2},
}


def make_preset(
    name: str, workloads: Sequence[str], prompts: int | None = None, until_decided: bool = False, **changes: Any
) -> Preset:
    """Return the preset `quick` or `full` with the sizes that each workload states for it.

    `prompts` replaces the number of quality prompts. With `until_decided` a variant is asked only until its quality is
    decided.
    """
    objects = {workload: load_workload(workload) for workload in workloads}
    if until_decided:
        prompts, changes = prompts or _MAX_PROMPTS, {"looks": LOOKS, **changes}
    return Preset(
        quality_prompts={workload: prompts or one.preset_prompts[name] for workload, one in objects.items()},
        users={workload: one.load_users for workload, one in objects.items()},
        **{**_PRESETS[name], **changes},
    )


def round_rates(comparison: Comparison, workload: str, round_number: int = 1) -> list[float]:
    """Return the open-loop rates of a round in requests/s, ascending.

    They are the rates that the user gave, or else fractions of the reference's capacity in the first round. Of the
    fractions, later rounds use only the lowest, at which objectives are evaluated: the others only draw a curve.
    """
    preset = comparison.preset
    if workload in preset.rates:
        return list(preset.rates[workload])
    capacity = comparison.variant(comparison.reference).rounds[0].capacity[workload].summary.requests_per_s
    rates = [rate for frac in sorted(preset.rate_fracs) if (rate := float(f"{frac * capacity:.3g}")) > 0]
    return rates if round_number == 1 else rates[:1]


def load_seed(preset: Preset, round_number: int, index: int) -> int:
    """Return the seed of load test number `index` of a round: the same for all variants, different for each test."""
    return preset.seed * 10_000 + round_number * 100 + index


def slo_rate(comparison: Comparison, workload: str) -> float | None:
    """Return the rate at which objectives are evaluated: the highest given rate, or the lowest fraction of capacity."""
    given = comparison.preset.rates.get(workload)
    return max(given) if given else min(round_rates(comparison, workload), default=None)


def calibration_warnings(variants: Sequence[VariantResult], workloads: Sequence[str]) -> list[str]:
    """Return one line for each calibration source that lacks some of the workloads on which variants are evaluated."""
    lines = []
    for source in dict.fromkeys(one.calibration_source for one in variants if one.calibration_source):
        covered = set(workload_names() if source == MIXED else source.split(","))
        covered |= {str(Path(part).resolve()) for part in covered}
        missing = [name for name in workloads if not covered & {name, workload_argument(name)}]
        if missing:
            names = ", ".join(one.name for one in variants if one.calibration_source == source)
            lines.append(
                f"warning: calibration and evaluation differ: {names} was calibrated on {source}, not on "
                f"{', '.join(missing)}; build it with --workload {','.join(map(workload_argument, workloads))}"
            )
    return lines


def describe_plan(preset: Preset, workloads: Sequence[str], names: Sequence[str], reference: str) -> list[str]:
    """Return lines that say what will be measured and about how many minutes it takes."""
    load_s = preset.warmup_s + preset.duration_s + preset.cooldown_s + _LOAD_OVERHEAD_S
    num_first = sum(1 + len(preset.rates.get(workload, preset.rate_fracs)) for workload in workloads)
    num_later = sum(1 + len(preset.rates.get(workload, preset.rate_fracs[:1])) for workload in workloads)
    num_loads = num_first + (preset.num_rounds - 1) * num_later
    slowness = 1.0 if probe_hardware().has_bf16_products else _SLOWNESS_OF_AVX2
    rounds_s = preset.num_rounds * _START_S * slowness + num_loads * load_s
    quality_s = _TEXTS_S + _PROMPT_S * sum(preset.quality_prompts[name] for name in workloads)
    total_s = len(names) * ((_BUILD_S + quality_s) * slowness + rounds_s)
    prompts = ", ".join(f"{preset.quality_prompts[name]} {name}" for name in workloads)
    return [
        f"plan: {len(names)} variants in {preset.num_rounds} round(s), {reference} first: {', '.join(names)}",
        f"  quality in the first round: at most {prompts} prompts, {preset.num_texts} texts",
        f"  load: {num_loads} tests of {preset.duration_s:.0f} s per variant, at capacity and at fixed rates",
        f"  about {math.ceil(total_s / 60)} minutes for a model of 0.1B parameters on 2 such cores; less if variants "
        "are already built or measured",
    ]
