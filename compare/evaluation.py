"""Evaluation of raw data: estimates, paired differences, rank agreement, costs and objectives.

Everything is computed from the kept answers and the raw rows, without a server. New objectives, another price or
another maximum loss therefore need no new measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slimserve.compare.quality import Answers, quality_metrics, read_answers
from slimserve.compare.results import (
    TEXT,
    Comparison,
    Difference,
    LoadRun,
    QualityOutcome,
    Round,
    Spread,
    VariantResult,
    spread,
)
from slimserve.loadtest.rows import Row, read_rows
from slimserve.loadtest.slo import goodput, parse_objective
from slimserve.loadtest.summary import LoadSummary
from slimserve.workloads import metrics
from slimserve.workloads.interface import Estimate, MetricData

_TOP = 10
_SECONDS_PER_HOUR = 3600


def answers_file(folder: Path, variant: str, workload: str) -> Path:
    """Return the file of a variant's raw answers to the quality prompts of a workload."""
    return folder / variant / "quality" / f"{workload}.jsonl"


def evaluate_quality(comparison: Comparison, folder: Path) -> dict[str, dict[str, QualityOutcome]]:
    """Fill in every variant's quality and its differences from the reference.

    Returns, by variant and workload, whether the primary metric is kept and with which probability.
    """
    preset, max_loss_frac = comparison.preset, comparison.requirements.max_quality_loss_frac
    outcomes: dict[str, dict[str, QualityOutcome]] = {variant.name: {} for variant in comparison.variants}
    for workload in (*comparison.workloads, *([TEXT] if preset.num_texts else [])):
        num_prompts = preset.quality_prompts.get(workload, 0)
        theirs = _kept_answers(folder, comparison.reference, workload)
        reference = quality_metrics(workload, num_prompts, preset.seed, theirs) if theirs else {}
        for variant in comparison.variants:
            ours = _kept_answers(folder, variant.name, workload)
            if ours is None:
                continue
            is_reference = variant.name == comparison.reference
            data = quality_metrics(workload, num_prompts, preset.seed, ours, None if is_reference else theirs)
            variant.quality[workload] = {name: metrics.estimate(metric) for name, metric in data.items()}
            samples = {} if is_reference else paired_metric_samples(data, reference, ours, theirs)
            if samples:
                variant.differences[workload] = {
                    name: _difference(data[name], reference[name], drawn) for name, drawn in samples.items()
                }
            if primary := comparison.workloads.get(workload):
                outcomes[variant.name][workload] = _quality_outcome(
                    primary, data[primary], reference.get(primary), samples.get(primary), max_loss_frac
                )
    return outcomes


def _kept_answers(folder: Path, variant: str, workload: str) -> Answers | None:
    """Return the kept answers; None if there are no answers yet or the server could not answer."""
    file = answers_file(folder, variant, workload)
    answers = read_answers(file) if file.exists() else None
    return answers if answers and answers.answers else None


def paired_metric_samples(
    data: Mapping[str, MetricData], others: Mapping[str, MetricData], ours: Answers, theirs: Answers | None
) -> dict[str, np.ndarray]:
    """Return paired bootstrap samples of each metric on both sides; none if the prompts differ."""
    if theirs is None or ours.prompts_sha256 != theirs.prompts_sha256:
        return {}
    return {name: metrics.paired_samples(data[name], others[name]) for name in data if name in others}


def _difference(metric: MetricData, reference: MetricData, samples: np.ndarray) -> Difference:
    """Return the metric minus the reference's; shares of correct answers get McNemar's exact test."""
    low, high, p_value = metrics.paired_difference(samples)
    value = metric.value - reference.value
    if metric.successes is not None and reference.successes is not None:
        p_value = metrics.mcnemar(metric.successes, reference.successes)
        return Difference(value, low, high, p_value, len(metric.successes), "mcnemar")
    return Difference(value, low, high, p_value, len(set(metric.groups)), "bootstrap")


def _quality_outcome(
    name: str, metric: MetricData, reference: MetricData | None, samples: np.ndarray | None, max_loss_frac: float
) -> QualityOutcome:
    # There are no samples for the reference itself, and a reference at 0 has nothing to lose.
    if reference is None or samples is None or not len(samples) or not reference.value > 0:
        return QualityOutcome(name, 1.0, is_kept=True, probability=1.0)
    kept_frac = metric.value / reference.value
    probability = metrics.probability_kept(metric, reference, samples, 1 - max_loss_frac)
    return QualityOutcome(name, kept_frac, kept_frac >= 1 - max_loss_frac, probability)


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
    return metrics.bootstrap_by_group(
        lambda rows: sum(values[row] for row in rows) / len(rows), range(len(values)), len(values)
    )
