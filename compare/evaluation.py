"""Evaluation of raw data: estimates, paired differences, rank agreement, costs and objectives.

Everything is computed from the kept answers and the raw rows, without a server. New objectives, another price or
another maximum loss therefore need no new measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slimserve.compare.decision import DecisionRule, Ruling, is_informative, kept_frac, look_errors
from slimserve.compare.quality import Answers, baseline_metrics, calibrated_metrics, quality_metrics, read_answers
from slimserve.compare.results import (
    TEXT,
    Comparison,
    Difference,
    LoadRun,
    QualityOutcome,
    Round,
    Signal,
    Spread,
    VariantResult,
    spread,
)
from slimserve.loadtest.rows import Row, read_rows
from slimserve.loadtest.slo import goodput, parse_objective
from slimserve.loadtest.summary import LoadSummary
from slimserve.workloads import intervals
from slimserve.workloads.interface import Estimate, MetricData

_TOP = 10
_SECONDS_PER_HOUR = 3600


def answers_file(folder: Path, variant: str, workload: str) -> Path:
    """Return the file of a variant's raw answers to the quality prompts of a workload."""
    return folder / variant / "quality" / f"{workload}.jsonl"


def decision_rule(comparison: Comparison) -> DecisionRule:
    """Return the rule that the requirements and the number of variants give."""
    requirements = comparison.requirements
    num_others = sum(variant.name != comparison.reference for variant in comparison.variants)
    return DecisionRule(requirements.max_quality_loss_frac, requirements.confidence, num_others)


def evaluate_quality(comparison: Comparison, folder: Path) -> dict[str, dict[str, QualityOutcome]]:
    """Fill in every variant's quality, its differences from the reference, and what each workload can tell.

    Returns the outcome of each primary metric by variant and workload.
    """
    preset = comparison.preset
    for workload in (*comparison.workloads, *([TEXT] if preset.num_texts else [])):
        num_prompts = preset.quality_prompts.get(workload, 0)
        theirs = kept_answers(folder, comparison.reference, workload)
        reference = quality_metrics(workload, num_prompts, preset.seed, theirs) if theirs else {}
        primary = comparison.workloads.get(workload)
        if primary:
            comparison.signals[workload] = _signal(comparison, workload, primary, reference.get(primary))
        for variant in comparison.variants:
            ours = kept_answers(folder, variant.name, workload)
            if not ours:
                continue
            is_reference = variant.name == comparison.reference
            data = quality_metrics(workload, num_prompts, preset.seed, ours, None if is_reference else theirs)
            if calibration := variant.calibrations.get(workload):
                data |= calibrated_metrics(workload, num_prompts, preset.seed, ours, calibration)
            variant.quality[workload] = {name: intervals.estimate(metric) for name, metric in data.items()}
            if not is_reference and (sides := _paired_metrics(workload, num_prompts, preset.seed, ours, theirs)):
                paired, base, _ = sides
                variant.differences[workload] = {
                    name: _difference(metric, base[name]) for name, metric in paired.items() if name in base
                }
    return {variant.name: quality_outcomes(comparison, folder, variant.name) for variant in comparison.variants}


def quality_outcomes(comparison: Comparison, folder: Path, variant: str) -> dict[str, QualityOutcome]:
    """Return the outcome of each primary metric of a variant by workload, from the answers that are kept so far."""
    rule, preset, outcomes = decision_rule(comparison), comparison.preset, {}
    for workload, primary in comparison.workloads.items():
        ours = kept_answers(folder, variant, workload)
        if not ours:
            continue
        if variant == comparison.reference:
            outcomes[workload] = QualityOutcome(primary, 1.0, 1.0, len(ours.answers))
            continue
        theirs = kept_answers(folder, comparison.reference, workload)
        sides = _paired_metrics(workload, preset.quality_prompts[workload], preset.seed, ours, theirs)
        if sides:
            paired, base, num_prompts = sides
            outcomes[workload] = _quality_outcome(rule, primary, paired[primary], base[primary], num_prompts)
    return outcomes


def _paired_metrics(
    workload: str, num_prompts: int, seed: int, ours: Answers, theirs: Answers | None
) -> tuple[dict[str, MetricData], dict[str, MetricData], int] | None:
    """Return both sides' metrics over the prompts that both answered, and their number; None for different prompts."""
    if theirs is None or theirs.prompts_sha256 != ours.prompts_sha256:
        return None
    both = min(len(ours.answers), len(theirs.answers))  # a variant that is decided early answers only the first ones
    theirs = theirs.first(both)
    paired = quality_metrics(workload, num_prompts, seed, ours.first(both), theirs)
    return paired, quality_metrics(workload, num_prompts, seed, theirs), both


def decide_quality(comparison: Comparison, outcomes: Mapping[str, QualityOutcome]) -> Ruling:
    """Decide from a variant's outcome on each workload; with looks, at the error rate of the look that was reached."""
    if len(outcomes) < len(comparison.workloads):
        return "undecided"
    rule, looks = decision_rule(comparison), comparison.preset.looks
    error = rule.error
    if looks:
        reached = [
            sum(one.num_prompts >= look_prompts(comparison, workload, look) for look in looks)
            for workload, one in outcomes.items()
        ]
        if not min(reached):
            return "undecided"
        error = look_errors(looks, rule.error)[min(reached) - 1]
    return rule.decide([one.probability for one in outcomes.values()], error)


def look_prompts(comparison: Comparison, workload: str, look: float) -> int:
    """Return the number of a workload's prompts that are answered at a look, given as a fraction."""
    return math.ceil(look * comparison.preset.quality_prompts[workload])


def _signal(comparison: Comparison, workload: str, primary: str, reference: MetricData | None) -> Signal:
    """Compare the reference with the floor and with baselines that use no language model, on the same prompts."""
    if reference is None:
        return Signal(primary, math.nan, is_informative=False)
    value = intervals.estimate(reference)
    sign = 1 if reference.higher_is_better else -1
    preset = comparison.preset
    baselines = {
        name: intervals.estimate(data[primary])
        for name, data in baseline_metrics(workload, preset.quality_prompts[workload], preset.seed).items()
        if primary in data
    }
    return Signal(
        primary,
        math.nan if reference.floor is None else reference.floor,
        is_informative(value, reference),
        baselines,
        [name for name, one in baselines.items() if sign * one.value >= sign * value.value],
    )


def kept_answers(folder: Path, variant: str, workload: str) -> Answers | None:
    """Return the kept answers; None if there are no answers yet or the server could not answer."""
    file = answers_file(folder, variant, workload)
    answers = read_answers(file) if file.exists() else None
    return answers if answers and answers.answers else None


def _difference(metric: MetricData, reference: MetricData) -> Difference:
    """Return the metric minus the reference's; shares of correct answers get McNemar's exact test."""
    low, high, p_value = intervals.paired_difference(intervals.paired_samples(metric, reference))
    value = metric.value - reference.value
    if metric.successes is not None and reference.successes is not None:
        p_value = intervals.mcnemar(metric.successes, reference.successes)
        return Difference(value, low, high, p_value, len(metric.successes), "mcnemar")
    return Difference(value, low, high, p_value, len(set(metric.groups)), "bootstrap")


def _quality_outcome(
    rule: DecisionRule, name: str, metric: MetricData, reference: MetricData, num_prompts: int
) -> QualityOutcome:
    margin = rule.margin(metric, reference, num_prompts)
    # A loss that is estimated as clearly too large is decided by fewer prompts than a variant that loses nothing.
    is_bad = margin.value < -margin.tolerated
    return QualityOutcome(
        name,
        kept_frac(metric.value, reference.value, reference.floor),
        margin.keep_probability,
        num_prompts,
        rule.prompts_needed(margin, margin.value if is_bad else None),
    )


def evaluate_loads(comparison: Comparison, folder: Path) -> None:
    """Fill in everything that depends on the requirements: objectives, goodput and costs; also the rank agreement."""
    reference = comparison.variant(comparison.reference)
    for variant in (*comparison.variants, *comparison.baseline_variants):
        for one in variant.rounds:
            for workload, runs in one.at_rate.items():
                slos = comparison.requirements.slos.get(workload, ())
                one.at_rate[workload] = [_with_objectives(run, slos, comparison, folder) for run in runs]
    for variant in comparison.variants:
        variant.costs = {
            workload: costs(variant, workload, comparison.requirements.price_per_hour)
            for workload in comparison.workloads
        }
        if variant is not reference:
            agreements = {name: rank_agreement(variant, reference, name, folder) for name in comparison.workloads}
            variant.rank_agreement = {name: agreement for name, agreement in agreements.items() if agreement}


def _with_objectives(run: LoadRun, slos: Sequence[str], comparison: Comparison, folder: Path) -> LoadRun:
    begin_s = comparison.preset.warmup_s
    end_s = begin_s + comparison.preset.duration_s
    window = [row for row in read_rows(folder / run.rows_file) if begin_s <= row.scheduled_s < end_s]
    objectives = [parse_objective(text) for text in slos]
    summary = replace(
        run.summary,
        objectives=[objective.evaluate(window) for objective in objectives],
        goodput_per_s=goodput(window, objectives, run.summary.window_s) if objectives else None,
    )
    return replace(run, summary=summary)


def _unit_s(variant: VariantResult, workload: str, summary: LoadSummary) -> float | None:
    """Return the machine's seconds per scored item or per chat answer; None if there was none.

    A chat answer counts with its mean number of tokens in the quality run, where all variants answer the same prompts.
    The few answers that end in a load window differ too much.
    """
    if summary.items_per_s > 0:
        return 1 / summary.items_per_s
    measured = variant.quality.get(workload, {}).get("tokens_per_answer")
    tokens = measured.value if measured else summary.output_tokens_mean
    return tokens / summary.output_tokens_per_s if tokens and summary.output_tokens_per_s > 0 else None


def costs(variant: VariantResult, workload: str, price_per_hour: float | None) -> dict[str, Spread]:
    """Return the costs at capacity by unit of work, in the price's currency or in machine-seconds."""
    per_s = 1.0 if price_per_hour is None else price_per_hour / _SECONDS_PER_HOUR
    accuracy = variant.quality.get(workload, {}).get("accuracy")
    values: dict[str, list[float | None]] = {}
    for summary in variant.capacity(workload):
        unit_s = _unit_s(variant, workload, summary)
        if summary.items_per_s > 0:
            values.setdefault("per_million_items", []).append(per_s * 1e6 / summary.items_per_s)
        elif unit_s is not None:
            values.setdefault("per_million_output_tokens", []).append(per_s * 1e6 / summary.output_tokens_per_s)
            values.setdefault("per_thousand_answers", []).append(per_s * 1e3 * unit_s)
            if accuracy and accuracy.value > 0:
                values.setdefault("per_correct_answer", []).append(per_s * unit_s / accuracy.value)
    spreads = {name: spread(rounds) for name, rounds in values.items()}
    return {name: cost for name, cost in spreads.items() if cost}


def cost_ratio(variant: VariantResult, reference: VariantResult, workloads: Sequence[str]) -> Spread | None:
    """Return the cost over the reference's cost in the same round, as a mean over workloads.

    None if a round lacks the cost of either side.
    """
    reference_rounds = {one.number: one for one in reference.rounds}
    ratios: list[float | None] = []
    for one in variant.rounds:
        other = reference_rounds.get(one.number)
        if other is None:
            continue
        pairs = [
            (_unit_s(variant, name, one.capacity[name].summary), _unit_s(reference, name, other.capacity[name].summary))
            for name in workloads
            if name in one.capacity and name in other.capacity
        ]
        known = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
        ratios.append(sum(known) / len(known) if len(known) == len(workloads) else None)
    return spread(ratios) if None not in ratios else None


def rank_agreement(
    variant: VariantResult, reference: VariantResult, workload: str, folder: Path
) -> dict[str, Estimate]:
    """Compare the order of candidates under load with the reference's, over the lists that both scored.

    `kendall_tau` is tau-b (1 is the same order); `top10_overlap` is the fraction of the ten best candidates that are
    also the reference's.
    """
    ours, theirs = _scores(variant, workload, folder), _scores(reference, workload, folder)
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs and len(ours[key]) == len(theirs[key])]
    taus = [tau for pair in pairs if (tau := _kendall_tau(*pair)) == tau]
    overlaps = [_top_overlap(*pair) for pair in pairs]
    return {name: _mean(values) for name, values in (("kendall_tau", taus), ("top10_overlap", overlaps)) if values}


def _scores(variant: VariantResult, workload: str, folder: Path) -> dict[tuple[int, str, int], tuple[float, ...]]:
    """Return scores by round, load and prompt number. Seeds are equal, so a key names one list for all variants."""
    return {
        (one.number, str(run.rate_rps), row.prompt): row.scores
        for one in variant.rounds
        for run in _runs_of(one, workload)
        for row in _rows(folder / run.rows_file)
        if row.scores and row.error is None
    }


def _runs_of(one: Round, workload: str) -> list[LoadRun]:
    return [*([one.capacity[workload]] if workload in one.capacity else []), *one.at_rate.get(workload, [])]


def _rows(file: Path) -> Iterator[Row]:
    yield from read_rows(file) if file.exists() else ()


def _kendall_tau(ours: Sequence[float], theirs: Sequence[float]) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(ours, theirs).statistic)


def _top_overlap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    count = min(_TOP, len(ours))
    best = [set(sorted(range(len(side)), key=lambda item: -side[item])[:count]) for side in (ours, theirs)]
    return len(best[0] & best[1]) / count


def _mean(values: Sequence[float]) -> Estimate:
    return intervals.bootstrap_by_group(
        lambda rows: sum(values[row] for row in rows) / len(rows), range(len(values)), len(values)
    )
