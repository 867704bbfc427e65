"""The verdict: which variant to ship, why, and with which confidence.

The winner is the cheapest variant that keeps quality and meets the objectives. `compare.decision` says when a variant
keeps quality, loses it or is undecided. Only a variant that keeps it may win. A variant meets the objectives if it met
all of them in every round at the SLO rate. Its cost is that of one unit of work (a scored item or a chat answer) at
capacity, over the reference's in the same round, as a mean over workloads. If a workload cannot compare these models,
because the reference is not clearly better than chance, there is no winner.

The confidence covers quality and the choice among variants. It does not cover the order of costs and the objectives,
which are ranges over rounds; the sentences say so.

One variant dominates another if it is at least as good in every primary metric, in cost and in latency, and clearly
better in one of them. "Clearly" means quality intervals, or ranges over at least two rounds, that do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slimserve.compare.evaluation import cost_ratio, decide_quality, decision_rule
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
        is_reference = variant.name == comparison.reference
        ruling = decide_quality(comparison, of_workloads)
        decision = VariantDecision(
            name=variant.name,
            quality=of_workloads,
            ruling="keeps" if is_reference and of_workloads else ruling,
            quality_probability=math.prod(one.probability for one in of_workloads.values()),
            slo=slo,
            meets_slo=all(one.num_rounds > 0 and one.num_met == one.num_rounds for one in slo.values()),
            cost_ratio=cost_ratio(variant, reference, list(comparison.workloads)),
            dominated_by=dominance[variant.name][0],
            indistinguishable_from=dominance[variant.name][1],
            reason="",
        )
        decisions.append(_with_reason(decision, comparison))
    unclear = [name for name in comparison.workloads if not comparison.signals[name].is_informative]
    if unclear:
        return _cannot_tell(comparison, unclear, decisions)
    ranked = sorted((one for one in decisions if one.qualifies), key=lambda one: _median(one.cost_ratio))
    if not ranked:
        return _no_winner(comparison, decisions)
    return _winner(comparison, ranked, decisions)


def confidence_words(confidence: float) -> str:
    """Return a probability in words."""
    return next((words for least, words in _WORDS if confidence >= least), "low")


def _cannot_tell(comparison: Comparison, unclear: Sequence[str], decisions: Sequence[VariantDecision]) -> Verdict:
    """Return a verdict without a winner: there is nothing that a variant could keep or lose."""
    sentences = [f"No verdict: {' and '.join(unclear)} cannot compare these models."]
    for name in unclear:
        signal = comparison.signals[name]
        value = comparison.variant(comparison.reference).quality.get(name, {}).get(signal.metric)
        if value is None or not math.isfinite(value.value):
            sentences.append(f"{name}: {comparison.reference} has no {_words(signal.metric)}.")
        elif not math.isfinite(signal.floor):
            sentences.append(f"{name}: {_words(signal.metric)} has no value that stands for knowing nothing.")
        else:
            sentences.append(
                f"{name}: {comparison.reference}'s {_words(signal.metric)} is {value.value:.3f} (95% interval "
                f"{value.low:.3f} to {value.high:.3f}), and a model that knows nothing has {signal.floor:.3f}. Use a "
                "task that the model can do, more prompts, or a model that was trained for the task."
            )
    sentences += _baseline_texts(comparison)
    return Verdict(None, sentences, math.nan, "none", list(unclear), list(decisions))


def _winner(comparison: Comparison, ranked: Sequence[VariantDecision], decisions: Sequence[VariantDecision]) -> Verdict:
    winner, reference = ranked[0], comparison.reference
    # A variant that was not loaded may be cheaper.
    cheaper = [
        one
        for one in decisions
        if not one.qualifies and (one.cost_ratio is None or _median(one.cost_ratio) < _median(winner.cost_ratio))
    ]
    undecided = [one for one in cheaper if one.meets_slo and one.ruling == "undecided"]
    num_tried = decision_rule(comparison).num_variants
    if winner.name == reference:
        # The reference loses nothing against itself; the risk is that a cheaper variant was rejected wrongly.
        counted = [one for one in cheaper if one.meets_slo or one.cost_ratio is None]
        confidence = min((1 - one.quality_probability for one in counted), default=1.0)
        wanted = "keeps quality and meets the objectives" if winner.slo else "keeps quality"
        known = f"no cheaper variant surely {wanted}" if undecided else f"no cheaper variant {wanted}"
        sentences = [f"Ship {winner.name}: {known if cheaper else 'no other is cheaper'}."]
    else:
        confidence = max(0.0, 1 - num_tried * (1 - winner.quality_probability))
        sentences = [
            f"Ship {winner.name}: a unit of work costs {_percent(winner.cost_ratio)} of {reference}'s cost, and "
            f"{_quality_text(winner, comparison)}."
        ]
    sentences = [*_baseline_texts(comparison), *sentences, _slo_text(winner)]
    sentences.append(
        f"Confidence: {confidence_words(confidence)} ({confidence:.0%}). "
        + _confidence_text(winner, comparison, num_tried, bool(cheaper))
    )
    if len(ranked) > 1 and not _is_below(winner.cost_ratio, ranked[1].cost_ratio):
        sentences.append(
            f"{ranked[1].name} also qualifies; its cost ({_percent(ranked[1].cost_ratio)}) is not distinguishable from "
            f"{winner.name}'s in this run."
        )
    sentences += [
        f"{one.name} would be cheaper ({_percent(one.cost_ratio)}), but it {_undecided_text(one, comparison)}."
        for one in undecided
    ]
    sentences += _dominated_texts(comparison, decisions)
    return Verdict(winner.name, sentences, confidence, confidence_words(confidence), [], list(decisions))


def _no_winner(comparison: Comparison, decisions: Sequence[VariantDecision]) -> Verdict:
    def failure_probability(one: VariantDecision) -> float:
        missed = [1 - slo.num_met / slo.num_rounds if slo.num_rounds else 1.0 for slo in one.slo.values()]
        return max([1 - one.quality_probability, *missed])

    confidence = min(map(failure_probability, decisions))
    sentences = [
        *_baseline_texts(comparison),
        "Ship none of these variants: none both keeps quality and meets the objectives.",
    ]
    sentences += [f"{one.name} {one.reason}." for one in decisions]
    sentences.append(f"Confidence: {confidence_words(confidence)} ({confidence:.0%}).")
    return Verdict(None, sentences, confidence, confidence_words(confidence), [], list(decisions))


def _baseline_texts(comparison: Comparison) -> list[str]:
    """Return a sentence for each workload on which a baseline without a language model reaches the reference."""
    texts = []
    for workload, signal in comparison.signals.items():
        value = comparison.variant(comparison.reference).quality.get(workload, {}).get(signal.metric)
        if value is not None and signal.better_baselines:
            name = max(signal.better_baselines, key=lambda name: abs(signal.baselines[name].value - signal.floor))
            texts.append(
                f"On {workload}, {_words(name)} alone, without a language model, does at least as well as "
                f"{comparison.reference}: {_words(signal.metric)} {signal.baselines[name].value:.3f} against "
                f"{value.value:.3f}."
            )
    return texts


def _with_reason(decision: VariantDecision, comparison: Comparison) -> VariantDecision:
    parts = []
    least = 1 - comparison.requirements.max_quality_loss_frac
    for workload, primary_metric in comparison.workloads.items():
        if workload not in decision.quality:
            parts.append(f"has no {primary_metric} of {workload}")
    if decision.ruling == "loses":
        quality = min(decision.quality.items(), key=lambda item: item[1].probability)
        workload, worst = quality
        kept = f"{worst.kept_frac:.1%} of {comparison.reference}'s {workload} {_words(worst.metric)} above chance"
        parts.append(f"keeps only {kept}; {least:.0%} is required")
    elif decision.ruling == "undecided" and not parts:
        parts.append(_undecided_text(decision, comparison))
    for workload, slo in decision.slo.items():
        if not slo.num_rounds:
            parts += [f"was not load-tested with {workload}"] if decision.ruling != "loses" else []
        elif slo.num_met < slo.num_rounds and not _has_requests(comparison, decision.name, workload):
            parts.append(
                f"had no {workload} request in the measured time at {slo.rate_rps:g} requests/s; load it longer"
            )
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
    return replace(decision, reason=". It ".join(parts))


def _has_requests(comparison: Comparison, name: str, workload: str) -> bool:
    """Tell whether a request of the workload was measured at the rate of the objectives, or skipped as overload."""
    variant, rate = comparison.variant(name), comparison.slo_rates.get(workload)
    if rate is None or variant.is_overloaded(workload, rate):
        return True
    return any(summary.e2e_s.n or summary.errors for summary in variant.at_rate(workload, rate))


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
            if other == name or not shared or ("cost" in ours) != ("cost" in theirs):
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
    return (
        f"it keeps {' and '.join(kept)}, counted from chance (required: "
        f"{1 - comparison.requirements.max_quality_loss_frac:.0%})"
    )


def _undecided_text(decision: VariantDecision, comparison: Comparison) -> str:
    """Say that the answers do not tell, and how many more prompts would."""
    least = 1 - comparison.requirements.max_quality_loss_frac
    more = {
        name: one.prompts_needed - one.num_prompts
        for name, one in decision.quality.items()
        if one.prompts_needed is not None and one.prompts_needed > one.num_prompts
    }
    text = f"may or may not keep {least:.0%} of the quality: the probability is {decision.quality_probability:.0%}"
    if not more:
        return f"{text}, and the estimate is close to the limit"
    asked = " and ".join(f"{_rounded(count):,} more prompts of {name}" for name, count in more.items())
    return f"{text}. If it loses nothing, about {asked} would decide"


def _rounded(count: int) -> int:
    """Round up to two digits."""
    digits: int = 10 ** max(0, len(str(count)) - 2)
    return math.ceil(count / digits) * digits


def _slo_text(decision: VariantDecision) -> str:
    if not decision.slo:
        return "No objective was given, so latency did not count; only quality and cost did."
    parts = []
    for workload, slo in decision.slo.items():
        worst = ", ".join(f"{text} (worst {_value_text(text, value)})" for text, value in slo.worst.items())
        parts.append(f"{workload} at {slo.rate_rps:g} requests/s in {slo.num_met} of {slo.num_rounds} rounds: {worst}")
    return f"It met every objective: {'; '.join(parts)}."


def _confidence_text(winner: VariantDecision, comparison: Comparison, num_tried: int, is_any_cheaper: bool) -> str:
    max_loss = comparison.requirements.max_quality_loss_frac
    left_out = "It does not cover the order of costs or the objectives, which are measured in rounds."
    if winner.name == comparison.reference and not is_any_cheaper:
        return "The reference loses nothing against itself, and no cheaper variant was rejected."
    if winner.name == comparison.reference:
        least = "This is the smallest probability that a cheaper variant, which is not shipped, loses too much quality."
        return f"{least} {left_out}"
    tried = f", with the choice among {num_tried} variants accounted for" if num_tried > 1 else ""
    return (
        f"This is the probability that its quality stays within {max_loss:.0%} of {comparison.reference}{tried}. "
        f"{left_out}"
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
