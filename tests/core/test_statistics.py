import math
import random

import pytest

from slimserve.core.statistics import percentile, percentile_interval


@pytest.mark.parametrize("frac", [0.0, 0.29, 0.5, 0.57, 0.9, 0.95, 0.99, 0.999, 1.0])
def test_a_percentile_is_the_sample_of_the_nearest_rank(frac: float) -> None:
    for n in (1, 2, 3, 10, 99, 100, 101, 1000, 1001):
        samples = random.Random(n).sample(range(10 * n), n)
        assert percentile(samples, frac) == sorted(samples)[max(0, math.ceil(frac * n) - 1)]


def test_an_infinite_sample_is_a_percentile_too() -> None:
    assert percentile([1.0, math.inf], 0.99) == math.inf
    assert percentile([1.0, math.inf], 0.5) == 1.0


@pytest.mark.parametrize(("frac", "fewest"), [(0.95, 72), (0.99, 368)])
def test_an_interval_needs_enough_samples(frac: float, fewest: int) -> None:
    assert percentile_interval(list(range(fewest - 1)), frac) is None
    assert percentile_interval(list(range(fewest)), frac) is not None
