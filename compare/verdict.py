"""The verdict: which variant to ship, why, and with which confidence.

The winner is the cheapest variant that keeps quality and meets the objectives. A variant keeps quality if each
workload's primary metric is at least (1 - maximum loss) of the reference's, over the same prompts. The confidence is
the fraction of resamples of these prompts in which that holds. A variant meets the objectives if it met all of them in
every round at the SLO rate. Its cost is that of one unit of work (a scored item or a chat answer) at capacity, over the
reference's in the same round, as a mean over workloads.

One variant dominates another if it is at least as good in every primary metric, in cost and in latency, and clearly
better in one of them. "Clearly" means quality intervals, or ranges over at least two rounds, that do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slimserve.compare.evaluation import cost_ratio
from slimserve.compare.results import (
    Comparison,
    QualityOutcome,
    SloOutcome,
    Spread,
    VariantDecision,
    VariantResult,
    Verdict,
    spread,
)

_WORDS = ((0.95, "very high"), (0.8, "high"), (0.6, "moderate"))
_NEAR_MISS = 0.2
"""A cheaper variant that fails on quality is mentioned if it keeps quality in at least this fraction of resamples."""


def make_verdict(comparison: Comparison, quality: Mapping[str, Mapping[str, QualityOutcome]]) -> Verdict:
    """Decide over all variants; `quality` holds the outcome of each primary metric by variant and workload."""
    reference = comparison.variant(comparison.reference)
    dominance = _dominance(comparison)
    decisions = []
    for variant in comparison.variants:
        of_workloads = dict(quality.get(variant.name, {}))
        slo = {
            workload: _slo_outcome(comparison, variant, workload)
            for workload, texts in comparison.requirements.slos.items()
            if texts and workload in comparison.workloads
        }
        kept = len(of_workloads) == len(comparison.workloads) and all(one.is_kept for one in of_workloads.values())
        decision = VariantDecision(
            name=variant.name,
            quality=of_workloads,
            keeps_quality=kept,
            quality_probability=math.prod(one.probability for one in of_workloads.values()),
            slo=slo,
            meets_slo=all(one.num_rounds > 0 and one.num_met == one.num_rounds for one in slo.values()),
            cost_ratio=cost_ratio(variant, reference, list(comparison.workloads)),
            dominated_by=dominance[variant.name][0],
            indistinguishable_from=dominance[variant.name][1],
            reason="",
        )
        decisions.append(_with_reason(decision, comparison))
    ranked = sorted((one for one in decisions if one.qualifies), key=lambda one: _median(one.cost_ratio))
    if not ranked:
        return _no_winner(decisions)
    return _winner(comparison, ranked, decisions)


def confidence_words(confidence: float) -> str:
    """Return a probability in words."""
    return next((words for least, words in _WORDS if confidence >= least), "low")


def _winner(comparison: Comparison, ranked: Sequence[VariantDecision], decisions: Sequence[VariantDecision]) -> Verdict:
    winner, reference = ranked[0], comparison.reference
    cheaper = [one for one in decisions if _median(one.cost_ratio) < _median(winner.cost_ratio) and not one.qualifies]
    near = [one for one in cheaper if one.meets_slo and one.quality_probability >= _NEAR_MISS]
    if winner.name == reference:
        # The reference loses nothing against itself; the risk is that a cheaper variant was rejected wrongly.
        confidence = min((1 - one.quality_probability for one in cheaper if one.meets_slo), default=1.0)
        wanted = "keeps quality and meets the objectives" if winner.slo else "keeps quality"
        sentences = [f"Ship {winner.name}: {f'no cheaper variant {wanted}' if cheaper else 'no other is cheaper'}."]
    else:
        confidence = winner.quality_probability
        sentences = [
            f"Ship {winner.name}: a unit of work costs {_percent(winner.cost_ratio)} of {reference}'s cost, and "
            f"{_quality_text(winner, comparison)}."
        ]
    sentences.append(_slo_text(winner))
    sentences.append(
        f"Confidence: {confidence_words(confidence)} ({confidence:.0%}). "
        + _confidence_text(winner, comparison, confidence, bool(cheaper))
    )
    if len(ranked) > 1 and not _is_below(winner.cost_ratio, ranked[1].cost_ratio):
        sentences.append(
            f"{ranked[1].name} also qualifies; its cost ({_percent(ranked[1].cost_ratio)}) is not distinguishable from "
            f"{winner.name}'s in this run."
        )
    sentences += [
        f"{one.name} would be cheaper ({_percent(one.cost_ratio)}), and the probability that it loses too much quality "
        f"is only {1 - one.quality_probability:.0%}; more quality prompts would decide."
        for one in near
        if one.name != winner.name
    ]
    sentences += _dominated_texts(comparison, decisions)
    return Verdict(winner.name, sentences, confidence, confidence_words(confidence), list(decisions))


def _no_winner(decisions: Sequence[VariantDecision]) -> Verdict:
    def failure_probability(one: VariantDecision) -> float:
        missed = [1 - slo.num_met / slo.num_rounds if slo.num_rounds else 1.0 for slo in one.slo.values()]
        return max([1 - one.quality_probability, *missed])

    confidence = min(map(failure_probability, decisions))
    sentences = ["Ship none of these variants: none both keeps quality and meets the objectives."]
    sentences += [f"{one.name} {one.reason}." for one in decisions]
    sentences.append(f"Confidence: {confidence_words(confidence)} ({confidence:.0%}).")
    return Verdict(None, sentences, confidence, confidence_words(confidence), list(decisions))


def _with_reason(decision: VariantDecision, comparison: Comparison) -> VariantDecision:
    parts = []
    least = 1 - comparison.requirements.max_quality_loss_frac
    for workload, primary_metric in comparison.workloads.items():
        quality = decision.quality.get(workload)
        if quality is None:
            parts.append(f"has no {primary_metric} of {workload}")
        elif not quality.is_kept:
            kept = f"{quality.kept_frac:.1%} of {comparison.reference}'s {workload} {_words(primary_metric)}"
            parts.append(f"keeps only {kept}; {least:.0%} is required")
    for workload, slo in decision.slo.items():
        if not slo.num_rounds:
            parts.append(f"was not load-tested with {workload}")
        elif slo.num_met < slo.num_rounds:
            named = ", ".join(slo.worst) or "every objective, because the rate is far beyond its capacity,"
            parts.append(
                f"misses {named} of {workload} at {slo.rate_rps:g} requests/s in {slo.num_rounds - slo.num_met} of "
                f"{slo.num_rounds} rounds"
            )
    if not parts:
        met = " and meets the objectives" if decision.slo else ""
        if decision.name == comparison.reference:
            parts = [f"is the reference{met}"]
        else:
            parts = [f"keeps quality{met} at {_percent(decision.cost_ratio)} of {comparison.reference}'s cost"]
    return replace(decision, reason=", and ".join(parts))


def _slo_outcome(comparison: Comparison, variant: VariantResult, workload: str) -> SloOutcome:
    rate = comparison.slo_rates.get(workload)
    summaries = variant.at_rate(workload, rate) if rate is not None else []
    num_overloaded = sum(rate in one.overloaded.get(workload, []) for one in variant.rounds)
    values: dict[str, list[float | None]] = {}
    for summary in summaries:
        for objective in summary.objectives:
            values.setdefault(objective.text, []).append(objective.value)
    worst = {text: _largest(rounds) for text, rounds in values.items()}
    num_met = sum(bool(one.objectives) and all(objective.is_met for objective in one.objectives) for one in summaries)
    return SloOutcome(rate, num_met, len(summaries) + num_overloaded, worst)


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class _Axis:
    """A variant on one axis, where less is better; `low` and `high` are the bounds of its interval in this run."""

    value: float
    low: float
    high: float


def _axes(comparison: Comparison, variant: VariantResult) -> dict[str, _Axis]:
    axes = {}
    for workload, primary_metric in comparison.workloads.items():
        if (quality := variant.quality.get(workload, {}).get(primary_metric)) and quality.value == quality.value:
            axes[f"{workload} quality"] = _Axis(-quality.value, -quality.high, -quality.low)
        rate = comparison.slo_rates.get(workload)
        if rate is not None:
            seen = spread(summary.e2e_s.p90 for summary in variant.at_rate(workload, rate))
            if variant.is_overloaded(workload, rate):
                axes[f"{workload} latency"] = _Axis(math.inf, math.inf, math.inf)
            elif seen:
                axes[f"{workload} latency"] = _ranged(seen)
    if ratio := cost_ratio(variant, comparison.variant(comparison.reference), list(comparison.workloads)):
        axes["cost"] = _ranged(ratio)
    return axes


def _ranged(ratio: Spread) -> _Axis:
    """Return the axis of a spread; the bounds of a single round are infinite, because its variation is unknown."""
    return _Axis(ratio.median, *((ratio.min, ratio.max) if ratio.n > 1 else (-math.inf, math.inf)))


def _dominance(comparison: Comparison) -> dict[str, tuple[list[str], list[str]]]:
    """Return, by variant, the variants that dominate it and those that no axis distinguishes from it."""
    axes = {variant.name: _axes(comparison, variant) for variant in comparison.variants}
    dominance = {}
    for name, ours in axes.items():
        above, indistinguishable_from = [], []
        for other, theirs in axes.items():
            shared = [(ours[axis], theirs[axis]) for axis in ours if axis in theirs]
            if other == name or not shared:
                continue
            is_clear = any(their.high < our.low for our, their in shared)
            if is_clear and all(their.value <= our.value for our, their in shared):
                above.append(other)
            if not is_clear and not any(our.high < their.low for our, their in shared):
                indistinguishable_from.append(other)
        dominance[name] = above, indistinguishable_from
    return dominance


def _dominated_texts(comparison: Comparison, decisions: Sequence[VariantDecision]) -> list[str]:
    if comparison.preset.num_rounds == 1 and len(decisions) > 1:
        return [
            "There was only one round, so the variation of speeds is unknown and small differences mean nothing. Run "
            "at least two rounds to find which variants are clearly worse."
        ]
    texts = [
        f"{one.name} is dominated by {' and '.join(one.dominated_by)}: no better in quality, cost or latency, and "
        "clearly worse in one of them."
        for one in decisions
        if one.dominated_by
    ]
    pairs = sorted({tuple(sorted((one.name, other))) for one in decisions for other in one.indistinguishable_from})
    return texts + [f"{first} and {second} are not distinguishable in this run." for first, second in pairs]


def _quality_text(decision: VariantDecision, comparison: Comparison) -> str:
    kept = [f"{one.kept_frac:.1%} of its {name} {_words(one.metric)}" for name, one in decision.quality.items()]
    return f"it keeps {' and '.join(kept)} (required: {1 - comparison.requirements.max_quality_loss_frac:.0%})"


def _slo_text(decision: VariantDecision) -> str:
    if not decision.slo:
        return "No objective was given, so latency did not count; only quality and cost did."
    parts = []
    for workload, slo in decision.slo.items():
        worst = ", ".join(f"{text} (worst {_value_text(text, value)})" for text, value in slo.worst.items())
        parts.append(f"{workload} at {slo.rate_rps:g} requests/s in {slo.num_met} of {slo.num_rounds} rounds: {worst}")
    return f"It met every objective: {'; '.join(parts)}."


def _confidence_text(winner: VariantDecision, comparison: Comparison, confidence: float, is_any_cheaper: bool) -> str:
    max_loss = comparison.requirements.max_quality_loss_frac
    if winner.name == comparison.reference and not is_any_cheaper:
        return "The reference loses nothing against itself, and no cheaper variant was rejected."
    if winner.name == comparison.reference:
        return "This is the smallest probability that a rejected cheaper variant really loses too much quality."
    advice = "" if confidence >= _WORDS[1][0] else " More quality prompts would decide."
    return (
        f"In {confidence:.0%} of the resamples of the prompts, quality stays within {max_loss:.0%} of "
        f"{comparison.reference}.{advice}"
    )


def _value_text(text: str, value: float | None) -> str:
    if value is None:
        return "no answer"
    return f"{value:.1%}" if text.startswith("errors") else f"{value:.3g} s"


def _percent(ratio: Spread | None) -> str:
    if ratio is None:
        return "an unknown share"
    return f"{ratio.median:.0%}" + (
        f" ({ratio.min:.0%} to {ratio.max:.0%} over {ratio.n} rounds)" if ratio.n > 1 else ""
    )


def _median(ratio: Spread | None) -> float:
    return ratio.median if ratio else math.inf


def _is_below(ours: Spread | None, theirs: Spread | None) -> bool:
    return theirs is None or (ours is not None and ours.n > 1 and theirs.n > 1 and ours.max < theirs.min)


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("auc", "AUC")
