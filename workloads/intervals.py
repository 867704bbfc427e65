"""Confidence intervals of quality metrics, and paired tests of two models over the same prompts.

`estimate` gives a metric (`MetricData`) its 95% interval. `paired_samples` draws two models' metrics over the same
groups of prompts, so that prompts that are difficult for both models cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from slimserve.workloads.interface import Estimate, MetricData

_CONFIDENCE = 0.95
_NUM_RESAMPLES = 400
_NUM_PAIRED_RESAMPLES = 1000


def estimate(metric: MetricData) -> Estimate:
    """Return the metric with its 95% interval: Wilson's for a share of successes, else a bootstrap by group."""
    if metric.successes is not None:
        return proportion(sum(metric.successes), len(metric.successes))
    if metric.values is not None:
        samples = _resampled_means(metric, _NUM_RESAMPLES, 0)
        return _with_interval(metric.value, samples, metric.n)
    return bootstrap_by_group(metric.statistic, metric.groups, metric.n)


def num_groups(metric: MetricData) -> int:
    """Return the number of groups of rows, which are the independent samples."""
    return len(set(metric.groups))


def paired_samples(metric: MetricData, reference: MetricData, seed: int = 0) -> NDArray[np.float64]:
    """Return both metrics `[resamples, 2]` over the same bootstrap draws of groups.

    Both must have the same rows in the same groups, as two models have that answered the same prompts; else ValueError.
    Draws that leave one of them undefined are left out.
    """
    if list(metric.groups) != list(reference.groups):
        raise ValueError("paired metrics have different rows")
    if metric.values is not None and reference.values is not None:
        sides = [_resampled_means(side, _NUM_PAIRED_RESAMPLES, seed) for side in (metric, reference)]
        samples = np.stack(sides, axis=1)
        return samples[~np.isnan(samples).any(axis=1)]
    rows_of = _rows_of(metric.groups)
    random = np.random.default_rng(seed)
    samples = np.empty((_NUM_PAIRED_RESAMPLES, 2))
    for index in range(_NUM_PAIRED_RESAMPLES):
        drawn = random.choice(len(rows_of), size=len(rows_of))
        rows = [row for group in drawn for row in rows_of[group]]
        samples[index] = metric.statistic(rows), reference.statistic(rows)
    return samples[~np.isnan(samples).any(axis=1)]


def paired_standard_error(metric: MetricData, reference: MetricData, weight: float) -> float:
    """Return the standard error of `metric` minus `weight` times `reference`, two means over the same rows.

    It is the linearized (delta method) error of a difference of two ratios with complete groups as the independent
    units, G / (G - 1) times the sum of squared influences (Cochran, Sampling Techniques, 1977, chapter 6). NaN with
    fewer than two groups; ValueError if a metric is not a mean or the rows differ.
    """
    if metric.values is None or reference.values is None or list(metric.groups) != list(reference.groups):
        raise ValueError("paired means need values of the same rows")
    group_of = np.unique(np.asarray(metric.groups), return_inverse=True)[1]
    influences = [_influences(np.asarray(side.values, dtype=np.float64), group_of) for side in (metric, reference)]
    combined = influences[0] - weight * influences[1]
    count = len(combined)
    return float(np.sqrt(count / (count - 1) * np.sum(combined**2))) if count > 1 else float("nan")


def _influences(values: NDArray[np.float64], group_of: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return each group's influence on the mean of the known values."""
    is_known = ~np.isnan(values)
    centred = np.where(is_known, values - np.mean(values[is_known]), 0.0) if is_known.any() else values
    return np.asarray(np.bincount(group_of, centred) / max(1, is_known.sum()), dtype=np.float64)


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
    return _with_interval(statistic(list(range(len(groups)))), np.array(samples), n)


def _with_interval(value: float, samples: NDArray[np.float64], n: int) -> Estimate:
    known = samples[~np.isnan(samples)]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (value, value)
    return Estimate(value, float(low), float(high), n)


def _resampled_means(metric: MetricData, num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the mean of a metric's values in each bootstrap draw of groups; NaN where a draw has no value."""
    values = np.asarray(metric.values, dtype=np.float64)
    group_of = np.unique(np.asarray(metric.groups), return_inverse=True)[1]
    is_known = ~np.isnan(values)
    sums = np.bincount(group_of, np.where(is_known, values, 0.0))
    counts = np.bincount(group_of, is_known)
    draws = _group_counts(len(sums), num_resamples, seed)
    with np.errstate(invalid="ignore"):
        return np.asarray((draws @ sums) / (draws @ counts))


@lru_cache(maxsize=4)
def _group_counts(num_groups: int, num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each bootstrap draw contains each group, `[resamples, groups]`."""
    random = np.random.default_rng(seed)
    return random.multinomial(num_groups, np.full(num_groups, 1 / num_groups), num_resamples).astype(np.float64)


def _rows_of(groups: Sequence[int]) -> list[list[int]]:
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    return list(rows_of.values())
