import math
import random
from fractions import Fraction

import pytest

from slimserve.core.statistics import nearest_rank, percentile, percentile_interval


@pytest.mark.parametrize("frac", ["0.0", "0.07", "0.29", "0.5", "0.55", "0.57", "0.9", "0.95", "0.99", "0.999", "1.0"])
def test_a_percentile_is_the_sample_of_the_nearest_rank(frac: str) -> None:
    for n in (1, 2, 3, 10, 99, 100, 101, 1000, 1001):
        samples = random.Random(n).sample(range(10 * n), n)
        ordered = sorted(samples)
        expected = next(one for one in ordered if sum(other <= one for other in samples) >= Fraction(frac) * n)
        assert percentile(samples, float(frac)) == expected


@pytest.mark.parametrize("per_mille", [1, 70, 290, 500, 550, 570, 900, 950, 990, 999])
def test_ranks_are_exact_for_every_number_of_samples(per_mille: int) -> None:
    for n in range(1, 20_001):
        expected = -(-per_mille * n // 1000)  # ceiling division of integers
        assert nearest_rank(per_mille / 1000, n) == nearest_rank(Fraction(per_mille, 1000), n) == expected


def test_an_infinite_sample_is_a_percentile_too() -> None:
    assert percentile([1.0, math.inf], 0.99) == math.inf
    assert percentile([1.0, math.inf], 0.5) == 1.0


def test_a_percentile_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


@pytest.mark.parametrize(("frac", "fewest"), [(0.95, 72), (0.99, 368)])
def test_an_interval_needs_enough_samples(frac: float, fewest: int) -> None:
    assert percentile_interval(list(range(fewest - 1)), frac) is None
    assert percentile_interval(list(range(fewest)), frac) is not None
