"""Quality figures with confidence intervals: ranking metrics over slates, proportions, means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from workloads.interface import Estimate

_CONFIDENCE = 0.95
_NUM_RESAMPLES = 400


def proportion(successes: int, n: int) -> Estimate:
    """A share of successes with its Wilson score interval."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(_CONFIDENCE, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def grouped(statistic: Callable[[list[int]], float], groups: Sequence[int], n: int, seed: int = 0) -> Estimate:
    """`statistic` of all rows with a percentile bootstrap interval that resamples whole groups.

    `groups[i]` is the group of row i and `statistic` takes row numbers (with repeats).
    Resampling groups, not rows, keeps the interval honest where the rows of one group
    are alike. Resamples on which the statistic is undefined (NaN) are left out.
    """
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    members = list(rows_of)
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(_NUM_RESAMPLES):
        drawn = random.choice(len(members), size=len(members))
        samples.append(statistic([row for index in drawn for row in rows_of[members[index]]]))
    value = statistic(list(range(len(groups))))
    tail = (1 - _CONFIDENCE) / 2
    known = [sample for sample in samples if not np.isnan(sample)] or [value]
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n)


def roc_auc(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under the ROC curve, ties counted half; NaN where only one class is present."""
    from sklearn.metrics import roc_auc_score

    if len(set(truth)) < 2:
        return float("nan")
    return float(roc_auc_score(truth, scores))


def ndcg_at_10(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """Normalized discounted cumulative gain of the ten best-scored items; NaN where none is relevant."""
    from sklearn.metrics import ndcg_score

    if not any(truth):
        return float("nan")
    return float(ndcg_score([list(map(float, truth))], [list(scores)], k=10))


def calibration_error(truth: Sequence[bool], scores: Sequence[float], num_bins: int = 10) -> float:
    """Expected calibration error over equal-width bins (Guo et al. 2017, section 2)."""
    labels: NDArray[np.float64] = np.asarray(truth, dtype=np.float64)
    predicted = np.asarray(scores, dtype=np.float64)
    bins = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    gaps = [
        np.sum(bins == index) * abs(np.mean(labels[bins == index]) - np.mean(predicted[bins == index]))
        for index in np.unique(bins)
    ]
    return float(np.sum(gaps) / len(labels))
