"""From what was measured to figures: estimates, paired differences, rank drift, costs, objectives.

Nothing here asks a server: all of it is computed from the kept answers and raw rows, so that other objectives, another
price or another tolerance need no new measurement.
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
from slimserve.workloads.interface import Estimate
from slimserve.workloads.metrics import MetricData

_TOP = 10
_SECONDS_PER_HOUR = 3600


def answers_file(folder: Path, variant: str, workload: str) -> Path:
    """Where a variant's raw answers to the quality prompts are kept."""
    return folder / variant / "quality" / f"{workload}.jsonl"


def evaluate_quality(comparison: Comparison, folder: Path) -> dict[str, dict[str, QualityOutcome]]:
    """Fill in every variant's quality and its differences to the reference.

    Returns, by variant and workload, whether the primary_metric is kept within the tolerance, and how sure that is.
    """
    preset, tolerance = comparison.preset, comparison.requirements.max_quality_loss_frac
    decisions: dict[str, dict[str, QualityOutcome]] = {variant.name: {} for variant in comparison.variants}
    for workload in (*comparison.workloads, *([TEXT] if preset.num_texts else [])):
        num_prompts = preset.quality_prompts.get(workload, 0)
        theirs = _kept_answers(folder, comparison.reference, workload)
        reference = quality_metrics(workload, num_prompts, preset.seed, theirs) if theirs else {}
        for variant in comparison.variants:
            ours = _kept_answers(folder, variant.name, workload)
            if ours is None:
                continue
            is_reference = variant.name == comparison.reference
            figures = quality_metrics(workload, num_prompts, preset.seed, ours, None if is_reference else theirs)
            variant.quality[workload] = {name: metrics.estimate(figure) for name, figure in figures.items()}
            samples = {} if is_reference else paired_metric_samples(figures, reference, ours, theirs)
            if samples:
                variant.differences[workload] = {
                    name: difference(figures[name], reference[name], drawn) for name, drawn in samples.items()
                }
            if primary_metric := comparison.workloads.get(workload):
                decisions[variant.name][workload] = _quality_outcome(
                    primary_metric,
                    figures[primary_metric],
                    reference.get(primary_metric),
                    samples.get(primary_metric),
                    tolerance,
                )
    return decisions


def _kept_answers(folder: Path, variant: str, workload: str) -> Answers | None:
    """None where nothing was asked, or the server could not answer."""
    file = answers_file(folder, variant, workload)
    answers = read_answers(file) if file.exists() else None
    return answers if answers and answers.answers else None


def paired_metric_samples(
    figures: Mapping[str, MetricData], others: Mapping[str, MetricData], ours: Answers, theirs: Answers | None
) -> dict[str, np.ndarray]:
    """Paired draws of each figure that both have; none where the answers are to different prompts."""
    if theirs is None or ours.prompts_sha256 != theirs.prompts_sha256:
        return {}
    return {name: metrics.paired_samples(figures[name], others[name]) for name in figures if name in others}


def difference(figure: MetricData, reference: MetricData, samples: np.ndarray) -> Difference:
    """The figure minus the reference's; right answers are tested exactly, prompt by prompt."""
    low, high, p_value = metrics.paired_difference(samples)
    value = figure.value - reference.value
    if figure.successes is not None and reference.successes is not None:
        p_value = metrics.mcnemar(figure.successes, reference.successes)
        return Difference(value, low, high, p_value, len(figure.successes), "mcnemar")
    return Difference(value, low, high, p_value, len(set(figure.groups)), "bootstrap")


def _quality_outcome(
    name: str, figure: MetricData, reference: MetricData | None, samples: np.ndarray | None, tolerance: float
) -> QualityOutcome:
    if reference is None or samples is None or not len(samples):  # the reference itself
        return QualityOutcome(name, 1.0, is_kept=True, probability=1.0)
    if not reference.value > 0:  # nothing to lose
        return QualityOutcome(name, 1.0, is_kept=True, probability=1.0)
    kept_frac = figure.value / reference.value
    probability = metrics.probability_kept(figure, reference, samples, 1 - tolerance)
    return QualityOutcome(name, kept_frac, kept_frac >= 1 - tolerance, probability)


def evaluate_loads(comparison: Comparison, folder: Path) -> None:
    """Fill in what depends on requirements: objectives and goodput of every run, costs; and rank drift."""
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
            drifts = {name: rank_agreement(variant, reference, name, folder) for name in comparison.workloads}
            variant.rank_agreement = {name: drift for name, drift in drifts.items() if drift}


def _with_objectives(run: LoadRun, slos: Sequence[str], comparison: Comparison, folder: Path) -> LoadRun:
    begin_s = comparison.preset.warmup_s
    end_s = begin_s + comparison.preset.duration_s
    window = [row for row in read_rows(folder / run.rows_file) if begin_s <= row.due_s < end_s]
    objectives = [parse_objective(text) for text in slos]
    summary = replace(
        run.summary,
        objectives=[objective.judge(window) for objective in objectives],
        goodput_per_s=goodput(window, objectives, run.summary.window_s) if objectives else None,
    )
    return replace(run, summary=summary)


def unit_s(variant: VariantResult, workload: str, summary: LoadSummary) -> float | None:
    """Seconds of the machine per item of a slate, or per answer of a chat; None where none was brought.

    An answer counts with its mean tokens in the quality run, where all variants answer the same prompts: in a window of
    load the few answers that end differ too much.
    """
    if summary.items_per_s > 0:
        return 1 / summary.items_per_s
    told = variant.quality.get(workload, {}).get("tokens_per_answer")
    tokens = told.value if told else summary.output_tokens_mean
    return tokens / summary.output_tokens_per_s if tokens and summary.output_tokens_per_s > 0 else None


def costs(variant: VariantResult, workload: str, price_per_hour: float | None) -> dict[str, Spread]:
    """At capacity, in the price's currency or in machine-seconds; units that were not brought are left out."""
    per_s = 1.0 if price_per_hour is None else price_per_hour / _SECONDS_PER_HOUR
    accuracy = variant.quality.get(workload, {}).get("accuracy")
    found: dict[str, list[float | None]] = {}
    for summary in variant.capacity(workload):
        each_s = unit_s(variant, workload, summary)
        if summary.items_per_s > 0:
            found.setdefault("per_million_items", []).append(per_s * 1e6 / summary.items_per_s)
        elif each_s is not None:
            found.setdefault("per_million_output_tokens", []).append(per_s * 1e6 / summary.output_tokens_per_s)
            found.setdefault("per_thousand_answers", []).append(per_s * 1e3 * each_s)
            if accuracy and accuracy.value > 0:
                found.setdefault("per_correct_answer", []).append(per_s * each_s / accuracy.value)
    known = {name: spread(values) for name, values in found.items()}
    return {name: figure for name, figure in known.items() if figure}


def cost_ratio(variant: VariantResult, reference: VariantResult, workloads: Sequence[str]) -> Spread | None:
    """Cost over the reference's in the same round, mean over workloads, over rounds; None where a side lacks one."""
    theirs = {one.number: one for one in reference.rounds}
    ratios: list[float | None] = []
    for one in variant.rounds:
        if one.number not in theirs:
            continue
        pairs = [
            (unit_s(variant, name, one.capacity[name].summary), unit_s(reference, name, other.capacity[name].summary))
            for name in workloads
            for other in [theirs[one.number]]
            if name in one.capacity and name in other.capacity
        ]
        known = [ours / other for ours, other in pairs if ours is not None and other]
        ratios.append(sum(known) / len(known) if len(known) == len(workloads) else None)
    return spread(ratios) if None not in ratios else None


def rank_agreement(
    variant: VariantResult, reference: VariantResult, workload: str, folder: Path
) -> dict[str, Estimate]:
    """How much the order of candidates under load differs from the reference's, over slates that both scored.

    `kendall_tau` is tau-b (1: the same order), `top10_overlap` the share of its ten best that are the reference's too.
    """
    ours, theirs = _scores(variant, workload, folder), _scores(reference, workload, folder)
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs and len(ours[key]) == len(theirs[key])]
    taus = [tau for pair in pairs if (tau := _kendall_tau(*pair)) == tau]
    overlaps = [_top_overlap(*pair) for pair in pairs]
    return {name: _mean(values) for name, values in (("kendall_tau", taus), ("top10_overlap", overlaps)) if values}


def _scores(variant: VariantResult, workload: str, folder: Path) -> dict[tuple[int, str, int], tuple[float, ...]]:
    """By round, load and prompt number; seeds are the same for all variants, so the key names one slate."""
    return {
        (one.number, str(run.rate_rps), row.prompt): row.scores
        for one in variant.rounds
        for run in runs_of(one, workload)
        for row in _rows(folder / run.rows_file)
        if row.scores and row.error is None
    }


def runs_of(one: Round, workload: str) -> list[LoadRun]:
    """All loads that a workload had in a round."""
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
