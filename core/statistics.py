"""Percentiles of samples, by one rule for the load test, the comparison and the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(samples: Sequence[float], frac: float) -> float:
    """Return the nearest-rank percentile of at least one sample, so that the result is one of the samples.

    `frac` is the percentile as a fraction: 0.99 for p99. The rule is numpy's `inverted_cdf`: the smallest sample with
    at least this fraction of the samples at or below it.
    """
    import numpy as np

    return float(np.quantile(samples, frac, method="inverted_cdf"))


def percentile_interval(samples: Sequence[float], frac: float, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return a distribution-free confidence interval of a percentile, or None if there are too few samples.

    The number of samples below the true percentile is binomial. So two order statistics enclose the percentile with at
    least this confidence if the samples are independent (David and Nagaraja, Order Statistics, section 7.1). At 95%
    confidence p95 needs 72 samples and p99 needs 368.
    """
    from scipy.stats import binom

    ordered, tail = sorted(samples), (1 - confidence) / 2
    # Ranks low < high with P(low <= number below < high) >= confidence.
    low = int(binom.ppf(tail, len(ordered), frac))
    high = int(binom.ppf(1 - tail, len(ordered), frac)) + 1
    if low < 1 or high > len(ordered):
        return None
    return ordered[low - 1], ordered[high - 1]
