"""Quality metrics with confidence intervals, and paired tests of two models over the same prompts.

`estimate` gives a metric (`MetricData`) its 95% interval. `paired_samples` draws two models' metrics over the same
groups of prompts, so that prompts that are difficult for both models cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from slimserve.workloads.interface import Answer, Estimate, MetricData, Prompt, Workload

_Metric = Callable[[Sequence[bool], Sequence[float]], float]
_CONFIDENCE = 0.95
_NUM_RESAMPLES = 400
_NUM_PAIRED_RESAMPLES = 1000
_NUM_POSTERIOR = 20_000


def evaluate(workload: Workload, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Estimate]:
    """Return a workload's quality metrics with intervals, for answers in the order of their prompts."""
    return {name: estimate(metric) for name, metric in workload.metric_data(prompts, answers).items()}


def estimate(metric: MetricData) -> Estimate:
    """Return the metric with its 95% interval: Wilson's for a share of successes, else a bootstrap by group."""
    if metric.successes is not None:
        return proportion(sum(metric.successes), len(metric.successes))
    return bootstrap_by_group(metric.statistic, metric.groups, metric.n)


def ranking_metrics(
    truths: Sequence[Sequence[bool]], scores: Sequence[Sequence[float]], users: Sequence[int]
) -> dict[str, MetricData]:
    """Return metrics of scored candidate lists: pooled AUC and calibration error, mean AUC and NDCG@10 per list."""

    def pooled(metric: _Metric) -> MetricData:
        def statistic(rows: list[int]) -> float:
            labels = [label for row in rows for label in truths[row]]
            return metric(labels, [score for row in rows for score in scores[row]])

        return MetricData(statistic, users, sum(map(len, truths)))

    def mean(metric: _Metric) -> MetricData:
        values = [metric(truth, given) for truth, given in zip(truths, scores, strict=True)]

        def statistic(rows: list[int]) -> float:
            known = [values[row] for row in rows if values[row] == values[row]]
            return sum(known) / len(known) if known else float("nan")

        return MetricData(statistic, users, sum(value == value for value in values))

    return {
        "auc": pooled(roc_auc),
        "within_user_auc": mean(roc_auc),
        "ndcg_at_10": mean(ndcg_at_10),
        "calibration_error": pooled(calibration_error),
    }


def answer_metrics(correct: Sequence[bool], kinds: Sequence[str], num_tokens: Sequence[int]) -> dict[str, MetricData]:
    """Return metrics of verified answers: `accuracy` over all and by kind, and mean `tokens_per_answer`."""

    def share(rows_of_kind: Sequence[int]) -> MetricData:
        outcomes = tuple(correct[row] for row in rows_of_kind)
        return MetricData(
            lambda rows: sum(outcomes[row] for row in rows) / len(rows), range(len(outcomes)), len(outcomes), outcomes
        )

    of_kind = {kind: [row for row, its in enumerate(kinds) if its == kind] for kind in dict.fromkeys(kinds)}
    return {
        "accuracy": share(range(len(correct))),
        **{f"accuracy_{kind}": share(rows) for kind, rows in of_kind.items()},
        "tokens_per_answer": MetricData(
            lambda rows: sum(num_tokens[row] for row in rows) / len(rows), range(len(num_tokens)), len(num_tokens)
        ),
    }


def paired_samples(metric: MetricData, reference: MetricData, seed: int = 0) -> NDArray[np.float64]:
    """Return both metrics `[resamples, 2]` over the same bootstrap draws of groups.

    Both must have the same rows in the same groups, as two models have that answered the same prompts; else ValueError.
    Draws that leave one of them undefined are left out.
    """
    if list(metric.groups) != list(reference.groups):
        raise ValueError("paired metrics have different rows")
    rows_of = _rows_of(metric.groups)
    random = np.random.default_rng(seed)
    samples = np.empty((_NUM_PAIRED_RESAMPLES, 2))
    for index in range(_NUM_PAIRED_RESAMPLES):
        drawn = random.choice(len(rows_of), size=len(rows_of))
        rows = [row for group in drawn for row in rows_of[group]]
        samples[index] = metric.statistic(rows), reference.statistic(rows)
    return samples[~np.isnan(samples).any(axis=1)]


def paired_difference(samples: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the 95% interval of the first metric minus the second, and the two-sided p-value of no difference."""
    if not len(samples):
        return float("nan"), float("nan"), float("nan")
    differences = samples[:, 0] - samples[:, 1]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    # One is added to counts and draws, so that a finite number of draws never gives a p-value of 0.
    below, above = (1 + np.sum(differences <= 0)), (1 + np.sum(differences >= 0))
    return float(low), float(high), float(min(1.0, 2 * min(below, above) / (1 + len(differences))))


def probability_kept(
    metric: MetricData, reference: MetricData, samples: NDArray[np.float64], least_frac: float, seed: int = 0
) -> float:
    """Return the probability that `metric` is at least `least_frac` of `reference`.

    It is the share of the paired bootstrap draws `samples` in which this holds. For shares of successes the draws come
    from the posterior of the four kinds of pairs (Jeffreys' prior), because a bootstrap of a few discordant pairs looks
    certain.
    """
    if metric.successes is not None and reference.successes is not None:
        kinds = [(ours, theirs) for ours in (True, False) for theirs in (True, False)]
        pairs = list(zip(metric.successes, reference.successes, strict=True))
        shares = np.random.default_rng(seed).dirichlet([pairs.count(kind) + 0.5 for kind in kinds], _NUM_POSTERIOR)
        samples = np.stack([shares[:, 0] + shares[:, 1], shares[:, 0] + shares[:, 2]], axis=1)
    return float(np.mean(samples[:, 0] >= least_frac * samples[:, 1])) if len(samples) else float("nan")


def mcnemar(successes: Sequence[bool], reference: Sequence[bool]) -> float:
    """Return the exact two-sided p-value that both succeed equally often, from the discordant pairs (McNemar 1947)."""
    from scipy.stats import binomtest

    gained = sum(ours and not theirs for ours, theirs in zip(successes, reference, strict=True))
    lost = sum(theirs and not ours for ours, theirs in zip(successes, reference, strict=True))
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def proportion(successes: int, n: int) -> Estimate:
    """Return a share of successes with its Wilson score interval."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(_CONFIDENCE, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def bootstrap_by_group(
    statistic: Callable[[list[int]], float], groups: Sequence[int], n: int, seed: int = 0
) -> Estimate:
    """Return `statistic` of all rows with a percentile bootstrap interval that resamples complete groups.

    `groups[i]` is the group of row i, and `statistic` takes row numbers, which may repeat. Rows of one group are alike,
    so resampling rows would give too narrow an interval. Resamples with an undefined statistic (NaN) are left out.
    """
    rows_of = _rows_of(groups)
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(_NUM_RESAMPLES):
        drawn = random.choice(len(rows_of), size=len(rows_of))
        samples.append(statistic([row for index in drawn for row in rows_of[index]]))
    value = statistic(list(range(len(groups))))
    tail = (1 - _CONFIDENCE) / 2
    known = [sample for sample in samples if not np.isnan(sample)] or [value]
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n)


def roc_auc(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """Return the area under the ROC curve, with ties counted half; NaN if only one class is present.

    It is computed from the sum of ranks (Mann and Whitney 1947), because a bootstrap needs it thousands of times.
    """
    from scipy.stats import rankdata

    positive = np.asarray(truth, dtype=bool)
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def ndcg_at_10(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """Return the normalized discounted cumulative gain of the ten best-scored items; NaN if no item is relevant."""
    from sklearn.metrics import ndcg_score

    if not any(truth):
        return float("nan")
    return float(ndcg_score([list(map(float, truth))], [list(scores)], k=10))


def calibration_error(truth: Sequence[bool], scores: Sequence[float], num_bins: int = 10) -> float:
    """Return the expected calibration error over equal-width bins (Guo et al. 2017, section 2)."""
    labels: NDArray[np.float64] = np.asarray(truth, dtype=np.float64)
    predicted = np.asarray(scores, dtype=np.float64)
    bins = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    gaps = [
        np.sum(bins == index) * abs(np.mean(labels[bins == index]) - np.mean(predicted[bins == index]))
        for index in np.unique(bins)
    ]
    return float(np.sum(gaps) / len(labels))


def _rows_of(groups: Sequence[int]) -> list[list[int]]:
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    return list(rows_of.values())
