import math
import random

import numpy as np
import pytest

from slimserve.workloads import metrics
from slimserve.workloads.interface import MetricData


def brute_force_auc(truth: list[bool], scores: list[float]) -> float:
    pairs = [
        (p, n)
        for p, yes in zip(scores, truth, strict=True)
        if yes
        for n, no in zip(scores, truth, strict=True)
        if not no
    ]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_ordered_pairs_and_halves_ties(seed: int) -> None:
    draw = random.Random(seed)
    truth = [draw.random() < 0.4 for _ in range(37)] + [True, False]
    scores = [draw.randint(0, 9) / 10 for _ in truth]
    assert metrics.roc_auc(truth, scores) == pytest.approx(brute_force_auc(truth, scores))


def test_auc_of_one_class_is_undefined() -> None:
    assert math.isnan(metrics.roc_auc([True, True], [0.1, 0.2]))


def test_ndcg_follows_its_definition() -> None:
    truth = [False, True, False, True, True]
    scores = [0.9, 0.8, 0.7, 0.6, 0.1]
    gain = 1 / math.log2(3) + 1 / math.log2(5) + 1 / math.log2(6)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert metrics.ndcg_at_10(truth, scores) == pytest.approx(gain / ideal)
    assert math.isnan(metrics.ndcg_at_10([False, False], [0.1, 0.2]))


def test_ndcg_looks_at_ten_items_only() -> None:
    scores = [1 - position / 20 for position in range(12)]
    truth = [False] * 10 + [True, False]
    assert metrics.ndcg_at_10(truth, scores) == 0.0


def test_calibration_error_by_hand() -> None:
    truth = [True, False, True, True]
    scores = [0.15, 0.11, 0.95, 1.0]
    assert metrics.calibration_error(truth, scores) == pytest.approx((2 * abs(0.5 - 0.13) + 2 * abs(1 - 0.975)) / 4)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (45, 120), (120, 120)])
def test_a_proportion_has_wilsons_interval(right: int, n: int) -> None:
    z = 1.959963984540054
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    estimate = metrics.proportion(right, n)
    assert estimate.value == share
    assert estimate.low == pytest.approx(centre - half, abs=1e-12)
    assert estimate.high == pytest.approx(centre + half, abs=1e-12)


def test_resampling_groups_is_wider_than_resampling_rows_that_are_alike() -> None:
    values = [float(group % 2) for group in range(20) for _ in range(50)]

    def mean(rows: list[int]) -> float:
        return float(np.mean([values[row] for row in rows]))

    by_group = metrics.bootstrap_by_group(mean, [row // 50 for row in range(1000)], 1000)
    by_row = metrics.bootstrap_by_group(mean, list(range(1000)), 1000)
    assert by_group.value == by_row.value == 0.5
    normal = 2 * 1.96 * 0.5 / math.sqrt(20)
    assert by_group.high - by_group.low == pytest.approx(normal, rel=0.25)
    assert by_row.high - by_row.low == pytest.approx(normal * math.sqrt(20 / 1000), rel=0.25)


def test_undefined_resamples_are_left_out() -> None:
    truth, scores = [True, False, True], [0.9, 0.1, 0.8]

    def auc(rows: list[int]) -> float:
        return metrics.roc_auc([truth[row] for row in rows], [scores[row] for row in rows])

    estimate = metrics.bootstrap_by_group(auc, [0, 1, 2], 3)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def mean_figure(values: list[float], groups: list[int] | None = None) -> MetricData:
    def statistic(rows: list[int]) -> float:
        return sum(values[row] for row in rows) / len(rows)

    return MetricData(statistic, groups or list(range(len(values))), len(values))


def test_a_paired_interval_is_that_of_the_mean_difference() -> None:
    draw = np.random.default_rng(1)
    hardness = draw.normal(0, 5, 300)  # what both find hard; it must cancel
    ours, theirs = hardness + draw.normal(0.2, 1, 300), hardness + draw.normal(0, 1, 300)
    samples = metrics.paired_samples(mean_figure(list(ours)), mean_figure(list(theirs)))
    low, high, p_value = metrics.paired_difference(samples)
    differences = ours - theirs
    half = 1.96 * differences.std(ddof=1) / math.sqrt(300)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.03)
    normal_p = math.erfc(abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(300)) / math.sqrt(2))
    assert p_value == pytest.approx(normal_p, abs=0.02)


def test_paired_draws_keep_groups_whole_and_sides_together() -> None:
    values = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    samples = metrics.paired_samples(
        mean_figure(values, [7, 7, 7, 9, 9, 9]), mean_figure([value + 3 for value in values], [7, 7, 7, 9, 9, 9])
    )
    assert set(samples[:, 0]) == {0.0, 0.5, 1.0}
    assert np.allclose(samples[:, 1] - samples[:, 0], 3)
    low, high, p_value = metrics.paired_difference(samples)
    assert low == high == pytest.approx(-3)
    assert p_value < 0.005


def test_metrics_of_different_rows_are_not_paired() -> None:
    with pytest.raises(ValueError, match="different rows"):
        metrics.paired_samples(mean_figure([1.0, 2.0]), mean_figure([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(("gained", "lost", "same"), [(0, 0, 5), (1, 9, 20), (6, 6, 1), (12, 3, 0)])
def test_mcnemar_is_the_exact_binomial_test_of_the_pairs_that_differ(gained: int, lost: int, same: int) -> None:
    ours = [True] * gained + [False] * lost + [True] * same
    theirs = [False] * gained + [True] * lost + [True] * same
    num = gained + lost
    # By its definition: twice the smaller tail of a fair coin, at most 1.
    tail = sum(math.comb(num, count) for count in range(min(gained, lost) + 1)) / 2**num
    assert metrics.mcnemar(ours, theirs) == pytest.approx(min(1.0, 2 * tail))


def test_a_share_of_successes_gets_wilsons_interval() -> None:
    results = metrics.answer_metrics([True, False, True, True], ["sum", "word", "sum", "word"], [1, 2, 3, 4])
    assert metrics.estimate(results["accuracy"]) == metrics.proportion(3, 4)
    assert metrics.estimate(results["accuracy_sum"]) == metrics.proportion(2, 2)
    assert results["tokens_per_answer"].value == 2.5
