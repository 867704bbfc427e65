"""Comparisons with invented values, for tests of the verdict and the results file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from slimserve.compare.results import (
    Comparison,
    LoadRun,
    Preset,
    QualityOutcome,
    Requirements,
    Round,
    Signal,
    VariantResult,
)
from slimserve.loadtest.summary import LoadSummary, ObjectiveResult, percentiles, summarize
from slimserve.workloads.interface import Estimate

PRESET = Preset({"recommendation": 5, "reasoning": 6}, {"recommendation": 2, "reasoning": 8}, 4.0, 1.0)
RATE = 2.0
SLO = "e2e_p90=1s"


def summary(items_per_s: float = 0.0, e2e_s: float = 0.5, output_tokens_per_s: float = 0.0) -> LoadSummary:
    return replace(
        summarize([], 0.0, 10.0),
        requests_per_s=items_per_s / 16,
        items_per_s=items_per_s,
        output_tokens_per_s=output_tokens_per_s,
        e2e_s=percentiles([e2e_s]),
        objectives=[ObjectiveResult(SLO, e2e_s, 1.0, e2e_s <= 1.0)],
    )


def variant(
    name: str, items_per_s: Sequence[float], auc: Estimate, e2e_s: Sequence[float] = (0.5, 0.5)
) -> VariantResult:
    """Return a variant with one speed and one latency per round; an infinite latency marks an overloaded rate."""
    rounds = []
    for number, (speed, latency) in enumerate(zip(items_per_s, e2e_s, strict=True), start=1):
        one = Round(number, ready_s=30.0, capacity={"recommendation": LoadRun(None, 2, summary(speed), "capacity")})
        if math.isinf(latency):
            one.overloaded = {"recommendation": [RATE]}
        else:
            one.at_rate = {"recommendation": [LoadRun(RATE, None, summary(speed, latency), "rate")]}
        rounds.append(one)
    return VariantResult(
        name=name, recipe=name, summary="", directory="there", rounds=rounds, quality={"recommendation": {"auc": auc}}
    )


def comparison(variants: Sequence[VariantResult], slos: Mapping[str, tuple[str, ...]] | None = None) -> Comparison:
    """Return a comparison of variants; the first one is the reference."""
    return Comparison(
        model="a-model",
        workloads={"recommendation": "auc"},
        preset=PRESET,
        requirements=Requirements(slos=dict({"recommendation": (SLO,)} if slos is None else slos)),
        started="2026-01-01T00:00:00+00:00",
        reference=variants[0].name,
        signals={"recommendation": Signal("auc", 0.5, is_informative=True)},
        slo_rates={"recommendation": RATE},
        variants=list(variants),
    )


def kept(frac: float, probability: float, prompts_needed: int | None = 400) -> dict[str, QualityOutcome]:
    return {"recommendation": QualityOutcome("auc", frac, probability, 80, prompts_needed)}
