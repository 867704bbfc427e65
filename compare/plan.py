"""What a comparison is asked for: options as they are written, checked before any work, and how long it will take."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimserve.compare.results import Comparison, Preset
from slimserve.core.errors import UserError
from slimserve.loadtest.slo import parse_objective
from slimserve.workloads import is_workload, load_workload

REFERENCE = "dense"
_NAME = re.compile(r"[\w.-]+")
"""Of a row: it names a folder too."""
_BUILD_S, _START_S, _LOAD_OVERHEAD_S, _QUALITY_S = 40.0, 55.0, 6.0, 90.0
"""Of one variant; of an engine, the first start among them; of Locust's start and the last answers; of all quality
prompts of one variant. For a model of 0.1B parameters on two cores; only the estimate uses them."""

_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "duration_s": 15.0,
        "warmup_s": 3.0,
        "cooldown_s": 1.0,
        "num_rounds": 1,
        "num_texts": 4,
        "rate_fracs": (0.5,),
    },
    "full": {"duration_s": 16.0, "warmup_s": 3.0, "cooldown_s": 1.0, "num_rounds": 2},
}


def make_preset(name: str, workloads: Sequence[str], **changes: Any) -> Preset:
    """Return the preset `quick` or `full` with the sizes that each workload states for it."""
    objects = {workload: load_workload(workload) for workload in workloads}
    return Preset(
        quality_prompts={workload: one.preset_prompts[name] for workload, one in objects.items()},
        users={workload: one.load_users for workload, one in objects.items()},
        **{**_PRESETS[name], **changes},
    )


@dataclass(frozen=True)
class Endpoint:
    """A server that somebody else runs, as a row of the comparison."""

    name: str
    url: str
    model: str | None
    """None: the only one that it has."""


@dataclass(frozen=True)
class ExistingModel:
    """A model that is not to be built any more, as a row of the comparison."""

    name: str
    model: str
    """A model argument."""


@dataclass(frozen=True)
class Baseline:
    """An earlier comparison, and how much may be lost against it."""

    path: Path
    """Its folder, or its results.json."""
    max_quality_loss_frac: float = 0.01
    max_goodput_loss_frac: float = 0.05


def parse_existing_model(text: str) -> ExistingModel:
    """A existing model from NAME=MODEL."""
    name, _, model = text.partition("=")
    if not _NAME.fullmatch(name) or not model:
        raise UserError("--variant", text, "is no named model", "write NAME=DIR, or NAME= and any other model argument")
    return ExistingModel(name, model)


def parse_endpoint(text: str) -> Endpoint:
    """An endpoint from NAME=URL or NAME=URL#MODEL."""
    name, _, rest = text.partition("=")
    url, _, model = rest.partition("#")
    if not _NAME.fullmatch(name) or not url.startswith(("http://", "https://")):
        raise UserError("--endpoint", text, "is no endpoint", "write NAME=http://HOST:PORT or NAME=URL#MODEL")
    return Endpoint(name, url, model or None)


def parse_rates(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Open-loop rates by workload from WORKLOAD=RATE[,RATE…], ascending."""
    rates: dict[str, tuple[float, ...]] = {}
    for text in texts:
        workload, _, values = text.partition("=")
        try:
            found = sorted({float(value) for value in values.split(",")})
        except ValueError:
            found = []
        if not is_workload(workload) or not found or not found[0] > 0:
            raise UserError("--rate", text, "is no rate of a workload", "write recommendation=2 or reasoning=1,2,4")
        rates[workload] = tuple(found)
    return rates


def parse_slos(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Objectives by workload from WORKLOAD:OBJECTIVE."""
    slos: dict[str, tuple[str, ...]] = {}
    for text in texts:
        workload, _, objective = text.partition(":")
        if not is_workload(workload):
            raise UserError(
                "--slo", text, "names no workload", "write recommendation:e2e_p99=2s or reasoning:itl_p99=50ms"
            )
        slos[workload] = (*slos.get(workload, ()), parse_objective(objective).text)
    return slos


def parse_share(option: str, text: str) -> float:
    """A share from 3% or 0.03."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(option, text, "is no share", "write 3% or 0.03")
    return share


def rates_of(comparison: Comparison, workload: str, round_number: int = 1) -> list[float]:
    """The open-loop rates of a round: those asked for, else shares of the reference's capacity in the first round.

    Of shares, later rounds have only the lowest one, at which objectives count: the others draw a curve, for which one
    round is enough.
    """
    preset = comparison.preset
    if workload in preset.rates:
        return list(preset.rates[workload])
    capacity = comparison.variant(comparison.reference).rounds[0].capacity[workload].summary.requests_per_s
    rates = [rate for frac in sorted(preset.rate_fracs) if (rate := float(f"{frac * capacity:.3g}")) > 0]
    return rates if round_number == 1 else rates[:1]


def load_seed(preset: Preset, round_number: int, index: int) -> int:
    """The seed of the `index`-th load of a round: the same for all variants, another one for each load."""
    return preset.seed * 10_000 + round_number * 100 + index


def slo_rate(comparison: Comparison, workload: str) -> float | None:
    """The rate at which objectives count: the highest that was asked for, else the lowest share of capacity."""
    asked = comparison.preset.rates.get(workload)
    return max(asked) if asked else min(rates_of(comparison, workload), default=None)


def describe_plan(preset: Preset, workloads: Sequence[str], names: Sequence[str], reference: str) -> list[str]:
    """Lines for people: what will be done, and about how many minutes it takes."""
    load_s = preset.warmup_s + preset.duration_s + preset.cooldown_s + _LOAD_OVERHEAD_S
    firsts = [1 + len(preset.rates.get(workload, preset.rate_fracs)) for workload in workloads]
    laters = [1 + len(preset.rates.get(workload, preset.rate_fracs[:1])) for workload in workloads]
    num_loads = sum(firsts) + (preset.num_rounds - 1) * sum(laters)
    rounds_s = preset.num_rounds * _START_S + num_loads * load_s
    total_s = len(names) * (_BUILD_S + _QUALITY_S + rounds_s)
    prompts = ", ".join(f"{preset.quality_prompts[name]} {name}" for name in workloads)
    return [
        f"plan: {len(names)} variants in {preset.num_rounds} round(s), {reference} first: {', '.join(names)}",
        f"  quality, in the first round: prompts {prompts}, texts {preset.num_texts}",
        f"  load: {num_loads} runs of {preset.duration_s:.0f} s per variant over all rounds, capacity and stated rates",
        f"  about {math.ceil(total_s / 60)} minutes for a model of 0.1B parameters on 2 cores; less where variants are "
        "built or measured already",
    ]
