"""Percentiles of samples, by one rule for the load test, the comparison and the benchmarks.

The rule is numpy's `inverted_cdf`, the nearest rank. numpy multiplies the fraction and the number of samples in
floating point, where 0.55 times 100 is above 55, and returns the 56th of 100 samples for p55. Ranks are therefore
computed in exact arithmetic here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def nearest_rank(frac: float | Fraction, num_samples: int | Fraction) -> int:
    """Return the rank, from 1, of the smallest sample with at least `frac` of all samples at or below it.

    A float stands for the decimal number that it prints as: 0.999 is 999/1000. `num_samples` may be a fraction if
    samples have weights.
    """
    exact = frac if isinstance(frac, Fraction) else Fraction(str(frac))
    return max(1, math.ceil(exact * num_samples))


def percentile(samples: Sequence[float], frac: float | Fraction) -> float:
    """Return the nearest-rank percentile of at least one sample, so that the result is one of the samples.

    `frac` is the percentile as a fraction from 0 to 1: 0.99 for p99. ValueError without samples.
    """
    import numpy as np

    if not len(samples):
        raise ValueError("no samples")
    index = nearest_rank(frac, len(samples)) - 1
    return float(np.partition(np.asarray(samples, dtype=float), index)[index])


def percentile_interval(
    samples: Sequence[float], frac: float | Fraction, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Return a distribution-free confidence interval of a percentile, or None if there are too few samples.

    The number of samples below the true percentile is binomial. So two order statistics enclose the percentile with at
    least this confidence if the samples are independent (David and Nagaraja, Order Statistics, section 7.1). At 95%
    confidence p95 needs 72 samples and p99 needs 368.
    """
    from scipy.stats import binom

    ordered, tail = sorted(samples), (1 - confidence) / 2
    # Ranks low < high with P(low <= number below < high) >= confidence.
    low = int(binom.ppf(tail, len(ordered), float(frac)))
    high = int(binom.ppf(1 - tail, len(ordered), float(frac))) + 1
    if low < 1 or high > len(ordered):
        return None
    return ordered[low - 1], ordered[high - 1]
