"""Quality metrics: definitions, and their data per prompt for intervals and paired tests (workloads.intervals).

Every metric states its floor, the value of a model that knows nothing, its ceiling and its direction. A floor follows
from the data: that of an accuracy among k choices is 1/k, that of an NDCG is the mean over random orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from slimserve.workloads.interface import Answer, Estimate, MetricData, Prompt, Workload
from slimserve.workloads.intervals import estimate

_Metric = Callable[[Sequence[float], Sequence[float]], float]
_NUM_BINS = 10
_CUTOFF = 10


def evaluate(workload: Workload, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Estimate]:
    """Return a workload's quality metrics with intervals, for answers in the order of their prompts."""
    return {name: estimate(metric) for name, metric in workload.metric_data(prompts, answers).items()}


def ranking_metrics(
    grades: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], groups: Sequence[int]
) -> dict[str, MetricData]:
    """Return metrics of scored candidate lists; an item is relevant if its grade is above 0.

    `auc`, `calibration_error` and `brier` pool the items of all lists; the last two take scores as probabilities of
    being relevant. `within_group_auc`, `ndcg_at_10`, `map` and `mrr` are means over lists. A pooled AUC also rises if
    some users like more items than others, which needs no ranking; the others rise by ranking alone.
    """
    relevant = [[float(grade > 0) for grade in row] for row in grades]
    num_items = sum(map(len, grades))
    base_rate = sum(map(sum, relevant)) / num_items if num_items else math.nan

    def pooled(metric: _Metric, **facts: float | bool) -> MetricData:
        def statistic(rows: list[int]) -> float:
            labels = [label for row in rows for label in relevant[row]]
            return metric(labels, [score for row in rows for score in scores[row]])

        return MetricData(statistic, groups, num_items, **facts)  # type: ignore[arg-type]

    def mean(
        metric: _Metric, truths: Sequence[Sequence[float]], chance: Callable[[Sequence[float]], float]
    ) -> MetricData:
        values = [metric(truth, given) for truth, given in zip(truths, scores, strict=True)]
        floors = [chance(truth) for truth, value in zip(truths, values, strict=True) if not math.isnan(value)]
        return mean_metric(values, groups, floor=_mean(floors), ceiling=1.0)

    return {
        "auc": pooled(roc_auc, floor=0.5, ceiling=1.0),
        "within_group_auc": mean(roc_auc, relevant, lambda _: 0.5),
        "ndcg_at_10": mean(ndcg_at_10, grades, _chance_of_ndcg),
        "map": mean(average_precision, relevant, _chance_of_average_precision),
        "mrr": mean(reciprocal_rank, relevant, lambda row: reciprocal_rank(row, [0.0] * len(row))),
        "calibration_error": pooled(calibration_error, ceiling=0.0, higher_is_better=False),
        "brier": pooled(brier_score, floor=base_rate * (1 - base_rate), ceiling=0.0, higher_is_better=False),
    }


def choice_metrics(
    truths: Sequence[int], probabilities: Sequence[Sequence[float]], groups: Sequence[int]
) -> dict[str, MetricData]:
    """Return metrics of choices among labels: `accuracy`, `macro_f1` and `calibration_error` of the chosen label.

    `truths[i]` is the number of the true label of row i, and `probabilities[i]` has one probability per label. Rows may
    have different numbers of labels; a label is then known by its number.
    """
    chosen = [int(np.argmax(row)) for row in probabilities]
    correct = [float(ours == truth) for ours, truth in zip(chosen, truths, strict=True)]
    confidences = [float(max(row)) for row in probabilities]
    chance = _mean([1 / len(row) for row in probabilities])

    def f1(rows: list[int]) -> float:
        return macro_f1([truths[row] for row in rows], [chosen[row] for row in rows])

    def expected_calibration_error(rows: list[int]) -> float:
        return calibration_error([correct[row] for row in rows], [confidences[row] for row in rows])

    is_independent = len(set(groups)) == len(groups)
    return {
        "accuracy": MetricData(
            lambda rows: sum(correct[row] for row in rows) / len(rows),
            groups,
            len(correct),
            successes=tuple(map(bool, correct)) if is_independent else None,
            values=tuple(correct),
            floor=chance,
            ceiling=1.0,
        ),
        "macro_f1": MetricData(f1, groups, len(correct), floor=_chance_of_macro_f1(truths, chance), ceiling=1.0),
        "calibration_error": MetricData(
            expected_calibration_error, groups, len(correct), ceiling=0.0, higher_is_better=False
        ),
    }


def answer_metrics(
    correct: Sequence[float],
    kinds: Sequence[str],
    num_tokens: Sequence[float],
    *,
    floor: float = 0.0,
    groups: Sequence[int | None] = (),
) -> dict[str, MetricData]:
    """Return metrics of verified answers: `accuracy` over all and by kind, and mean `tokens_per_answer`.

    `correct[i]` is 0 or 1, or a share between them if several samples were drawn for prompt i. Rows without a group are
    independent.
    """
    group_of = _independent(groups, len(correct))

    def share(rows_of_kind: Sequence[int]) -> MetricData:
        outcomes = [float(correct[row]) for row in rows_of_kind]
        its_groups = [group_of[row] for row in rows_of_kind]
        metric = mean_metric(outcomes, its_groups, floor=floor, ceiling=1.0)
        is_proportion = set(outcomes) <= {0.0, 1.0} and len(set(its_groups)) == len(its_groups)
        return replace(metric, successes=tuple(map(bool, outcomes))) if is_proportion else metric

    of_kind = {kind: [row for row, its in enumerate(kinds) if its == kind] for kind in dict.fromkeys(kinds)}
    return {
        "accuracy": share(range(len(correct))),
        **({f"accuracy_{kind}": share(rows) for kind, rows in of_kind.items()} if len(of_kind) > 1 else {}),
        "tokens_per_answer": mean_metric(list(map(float, num_tokens)), group_of),
    }


def mean_metric(
    values: Sequence[float], groups: Sequence[int], floor: float | None = None, ceiling: float | None = None
) -> MetricData:
    """Return a metric that is the mean of one value per row; rows with NaN are left out."""
    known_values = list(values)

    def statistic(rows: list[int]) -> float:
        return _mean([known_values[row] for row in rows if not math.isnan(known_values[row])])

    n = sum(not math.isnan(value) for value in known_values)
    return MetricData(statistic, groups, n, values=tuple(known_values), floor=floor, ceiling=ceiling)


def _independent(groups: Sequence[int | None], count: int) -> list[int]:
    """Return the group of each row, with a new group for each row that has none."""
    return [-1 - row if group is None else group for row, group in enumerate(groups or [None] * count)]


def roc_auc(truth: Sequence[float], scores: Sequence[float]) -> float:
    """Return the area under the ROC curve, with ties counted half; NaN if only one class is present.

    It is computed from the sum of ranks (Mann and Whitney 1947), because a bootstrap needs it thousands of times.
    """
    from scipy.stats import rankdata

    positive = np.asarray(truth, dtype=bool)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def ndcg_at_10(grades: Sequence[float], scores: Sequence[float]) -> float:
    """Return the normalized discounted cumulative gain of the ten best-scored items; NaN if no item is relevant.

    Gains are the grades themselves, as in trec_eval; items of one score share the mean of their gains.
    """
    from sklearn.metrics import ndcg_score

    if not any(grades):
        return math.nan
    if len(grades) == 1:
        return 1.0
    return float(ndcg_score([list(grades)], [list(scores)], k=_CUTOFF))


def average_precision(truth: Sequence[float], scores: Sequence[float]) -> float:
    """Return the mean precision at the ranks of the relevant items; NaN if no item is relevant.

    Items of one score count as one step of the precision-recall curve, as in scikit-learn.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(list(truth), list(scores))) if any(truth) else math.nan


def reciprocal_rank(truth: Sequence[float], scores: Sequence[float]) -> float:
    """Return one over the rank of the best-ranked relevant item; NaN if no item is relevant.

    Items of one score are in random order, and the result is the mean over these orders.
    """
    relevant, given = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=np.float64)
    if not relevant.any():
        return math.nan
    best = given[relevant].max()
    above, tied = int(np.sum(given > best)), int(np.sum(given == best))
    num_relevant = int(np.sum(relevant & (given == best)))
    orders = math.comb(tied, num_relevant)
    return sum(
        math.comb(tied - place, num_relevant - 1) / orders / (above + place)
        for place in range(1, tied - num_relevant + 2)
    )


def macro_f1(truths: Sequence[int], chosen: Sequence[int]) -> float:
    """Return the F1 score of each label that is true or chosen at least once, as a mean over labels."""
    ours, theirs = np.asarray(chosen), np.asarray(truths)
    scores = []
    for label in np.union1d(ours, theirs):
        num_both = float(np.sum((ours == label) & (theirs == label)))
        scores.append(2 * num_both / float(np.sum(ours == label) + np.sum(theirs == label)))
    return _mean(scores)


def brier_score(truth: Sequence[float], scores: Sequence[float]) -> float:
    """Return the mean squared difference between the predicted probability and the outcome (Brier 1950)."""
    return float(np.mean((np.asarray(truth, dtype=np.float64) - np.asarray(scores, dtype=np.float64)) ** 2))


def calibration_error(truth: Sequence[float], scores: Sequence[float], num_bins: int = _NUM_BINS) -> float:
    """Return the expected calibration error over equal-width bins (Guo et al. 2017, section 2)."""
    labels: NDArray[np.float64] = np.asarray(truth, dtype=np.float64)
    predicted = np.asarray(scores, dtype=np.float64)
    bins = np.clip((predicted * num_bins).astype(int), 0, num_bins - 1)
    gaps = [
        np.sum(bins == index) * abs(np.mean(labels[bins == index]) - np.mean(predicted[bins == index]))
        for index in np.unique(bins)
    ]
    return float(np.sum(gaps) / len(labels))


def _chance_of_ndcg(grades: Sequence[float]) -> float:
    """Return the mean NDCG over all orders: every rank has the mean gain."""
    return ndcg_at_10(grades, [0.0] * len(grades)) if len(grades) > 1 else 1.0


def _chance_of_average_precision(truth: Sequence[float]) -> float:
    """Return the mean average precision over all orders of R relevant among N items (Bestgen 2015)."""
    n, num_relevant = len(truth), int(sum(truth))
    harmonic = sum(1 / rank for rank in range(1, n + 1))
    return (harmonic + (num_relevant - 1) / (n - 1) * (n - harmonic)) / n if n > 1 else 1.0


def _chance_of_macro_f1(truths: Sequence[int], chance: float) -> float:
    """Return about the macro F1 of uniform guesses among labels that are as frequent as in `truths`."""
    shares = np.unique(np.asarray(truths), return_counts=True)[1] / max(1, len(truths))
    return _mean([2 * share * chance / (share + chance) for share in shares])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) else math.nan
