"""Tests of the coarse Kullback-Leibler divergence against the divergence over the full vocabulary."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import entropy

from slimserve.workloads.text import coarse_kl


def listed(shares: NDArray[np.float64], count: int) -> dict[int, float]:
    """Return the log-probabilities of the `count` most likely tokens, as a server lists them."""
    best = np.argsort(-shares)[:count]
    return {int(token): float(np.log(shares[token])) for token in best}


def merged(shares: NDArray[np.float64], common: list[int]) -> NDArray[np.float64]:
    """Return the shares of the common tokens and, as one outcome, of all others."""
    return np.append(shares[common], np.delete(shares, common).sum())


@pytest.mark.parametrize("concentration", [0.003, 0.05, 1.0])
@pytest.mark.parametrize("num_listed", [1, 5, 20])
def test_the_divergence_is_that_of_the_merged_distributions_and_never_above_the_full_one(
    concentration: float, num_listed: int
) -> None:
    """Low concentrations give masses far below 1e-6, which must not be left out."""
    draw = np.random.default_rng(11)
    num_merged = 0
    for _ in range(200):
        # Both share a part, so that they have common likely tokens; a power makes some of them peaked.
        p, q = 0.5 * draw.dirichlet(np.full(60, concentration), 2) + 0.5 * draw.dirichlet(np.ones(60))
        p, q = (np.maximum(side, 1e-30) ** draw.choice((1.0, 8.0)) for side in (p, q))
        p, q = p / p.sum(), q / q.sum()
        tops = listed(p, num_listed), listed(q, num_listed)
        bound = coarse_kl(*tops)
        assert 0 <= bound <= entropy(p, q) + 1e-9
        common = sorted(tops[0].keys() & tops[1].keys())
        if np.delete(q, common).sum() > 1e-6:
            num_merged += 1
            assert bound == pytest.approx(entropy(merged(p, common), merged(q, common)), abs=1e-9)
        assert coarse_kl(listed(p, 60), listed(q, 60)) == pytest.approx(entropy(p, q), rel=1e-9, abs=1e-9)
    assert num_merged > 100


def test_tiny_masses_of_listed_tokens_count_as_they_are() -> None:
    rare, unlikely = 1e-7, 1e-9
    p = np.array([1 - 19 * rare, *[rare] * 19])
    uniform = np.full(20, 0.05)
    assert coarse_kl(listed(p, 20), listed(uniform, 20)) == pytest.approx(entropy(p, uniform), abs=1e-12)
    p, q = np.array([0.5, 0.5]), np.array([1 - unlikely, unlikely])
    assert coarse_kl(listed(p, 2), listed(q, 2)) == pytest.approx(entropy(p, q))


def test_all_other_tokens_may_have_no_mass_on_either_side() -> None:
    some, none = {1: math.log(0.5), 2: math.log(0.25)}, {1: math.log(0.5), 2: math.log(0.5)}
    assert coarse_kl(none, some) == pytest.approx(0.5 * math.log(2)), "0 log 0 is 0"
    # A rest that the second side lacks counts with the smallest mass, so that rounding gives no infinite divergence.
    assert coarse_kl(some, none) == pytest.approx(0.25 * math.log(0.5) + 0.25 * math.log(0.25 / 1e-6))
