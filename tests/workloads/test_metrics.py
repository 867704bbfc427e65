import math
import random

import numpy as np
import pytest

from slimserve.workloads import intervals, metrics
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
    estimate = intervals.proportion(right, n)
    assert estimate.value == share
    assert estimate.low == pytest.approx(centre - half, abs=1e-12)
    assert estimate.high == pytest.approx(centre + half, abs=1e-12)


def test_resampling_groups_is_wider_than_resampling_rows_that_are_alike() -> None:
    values = [float(group % 2) for group in range(20) for _ in range(50)]

    def mean(rows: list[int]) -> float:
        return float(np.mean([values[row] for row in rows]))

    by_group = intervals.bootstrap_by_group(mean, [row // 50 for row in range(1000)], 1000)
    by_row = intervals.bootstrap_by_group(mean, list(range(1000)), 1000)
    assert by_group.value == by_row.value == 0.5
    normal = 2 * 1.96 * 0.5 / math.sqrt(20)
    assert by_group.high - by_group.low == pytest.approx(normal, rel=0.25)
    assert by_row.high - by_row.low == pytest.approx(normal * math.sqrt(20 / 1000), rel=0.25)


def test_undefined_resamples_are_left_out() -> None:
    truth, scores = [True, False, True], [0.9, 0.1, 0.8]

    def auc(rows: list[int]) -> float:
        return metrics.roc_auc([truth[row] for row in rows], [scores[row] for row in rows])

    estimate = intervals.bootstrap_by_group(auc, [0, 1, 2], 3)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def mean_figure(values: list[float], groups: list[int] | None = None) -> MetricData:
    def statistic(rows: list[int]) -> float:
        return sum(values[row] for row in rows) / len(rows)

    return MetricData(statistic, groups or list(range(len(values))), len(values))


def test_a_paired_interval_is_that_of_the_mean_difference() -> None:
    draw = np.random.default_rng(1)
    hardness = draw.normal(0, 5, 300)  # what both find hard; it must cancel
    ours, theirs = hardness + draw.normal(0.2, 1, 300), hardness + draw.normal(0, 1, 300)
    samples = intervals.paired_samples(mean_figure(list(ours)), mean_figure(list(theirs)))
    low, high, p_value = intervals.paired_difference(samples)
    differences = ours - theirs
    half = 1.96 * differences.std(ddof=1) / math.sqrt(300)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.03)
    normal_p = math.erfc(abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(300)) / math.sqrt(2))
    assert p_value == pytest.approx(normal_p, abs=0.02)


def test_paired_draws_keep_groups_whole_and_sides_together() -> None:
    values = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    samples = intervals.paired_samples(
        mean_figure(values, [7, 7, 7, 9, 9, 9]), mean_figure([value + 3 for value in values], [7, 7, 7, 9, 9, 9])
    )
    assert set(samples[:, 0]) == {0.0, 0.5, 1.0}
    assert np.allclose(samples[:, 1] - samples[:, 0], 3)
    low, high, p_value = intervals.paired_difference(samples)
    assert low == high == pytest.approx(-3)
    assert p_value < 0.005


def test_metrics_of_different_rows_are_not_paired() -> None:
    with pytest.raises(ValueError, match="different rows"):
        intervals.paired_samples(mean_figure([1.0, 2.0]), mean_figure([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(("gained", "lost", "same"), [(0, 0, 5), (1, 9, 20), (6, 6, 1), (12, 3, 0)])
def test_mcnemar_is_the_exact_binomial_test_of_the_pairs_that_differ(gained: int, lost: int, same: int) -> None:
    ours = [True] * gained + [False] * lost + [True] * same
    theirs = [False] * gained + [True] * lost + [True] * same
    num = gained + lost
    # By its definition: twice the smaller tail of a fair coin, at most 1.
    tail = sum(math.comb(num, count) for count in range(min(gained, lost) + 1)) / 2**num
    assert intervals.mcnemar(ours, theirs) == pytest.approx(min(1.0, 2 * tail))


def test_a_share_of_successes_gets_wilsons_interval() -> None:
    results = metrics.answer_metrics([True, False, True, True], ["sum", "word", "sum", "word"], [1, 2, 3, 4])
    assert intervals.estimate(results["accuracy"]) == intervals.proportion(3, 4)
    assert intervals.estimate(results["accuracy_sum"]) == intervals.proportion(2, 2)
    assert results["tokens_per_answer"].value == 2.5


def random_lists(seed: int, count: int = 40, ties: bool = False) -> tuple[list[list[float]], list[list[float]]]:
    draw = np.random.default_rng(seed)
    grades = [[float(grade) for grade in draw.integers(0, 3, size)] for size in draw.integers(2, 15, count)]
    scores = [list(map(float, draw.integers(0, 4, len(row)) if ties else draw.normal(size=len(row)))) for row in grades]
    return grades, scores


@pytest.mark.parametrize("seed", range(3))
def test_ranking_metrics_equal_trec_evals(seed: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    grades, scores = random_lists(seed)
    qrels = {str(q): {f"d{n}": int(grade) for n, grade in enumerate(row)} for q, row in enumerate(grades)}
    run = {str(q): {f"d{n}": score for n, score in enumerate(row)} for q, row in enumerate(scores)}
    measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "map", "recip_rank"}).evaluate(run)
    rows = [row for number, row in measured.items() if any(grades[int(number)])]
    ours = metrics.ranking_metrics(grades, scores, range(len(grades)))
    for name, theirs in (("ndcg_at_10", "ndcg_cut_10"), ("map", "map"), ("mrr", "recip_rank")):
        assert ours[name].value == pytest.approx(np.mean([row[theirs] for row in rows]), abs=1e-6)


def test_auc_brier_and_macro_f1_equal_scikit_learns() -> None:
    from sklearn.metrics import brier_score_loss, f1_score, roc_auc_score

    grades, scores = random_lists(5, ties=True)
    relevant = [float(grade > 0) for row in grades for grade in row]
    probabilities = [[score / 4 for score in row] for row in scores]
    flat = [score for row in probabilities for score in row]
    ours = metrics.ranking_metrics(grades, probabilities, range(len(grades)))
    assert ours["auc"].value == pytest.approx(roc_auc_score(relevant, flat))
    assert ours["brier"].value == pytest.approx(brier_score_loss(relevant, flat))
    draw = np.random.default_rng(6)
    truth, chosen = draw.integers(0, 4, 200), draw.integers(0, 4, 200)
    assert metrics.macro_f1(truth.tolist(), chosen.tolist()) == pytest.approx(f1_score(truth, chosen, average="macro"))


@pytest.mark.parametrize("seed", range(3))
def test_ties_count_as_the_mean_over_all_orders(seed: int) -> None:
    grades, scores = random_lists(seed, ties=True)
    draw = np.random.default_rng(seed)
    for row, given in zip(grades, scores, strict=True):
        if any(row):
            orders = [
                metrics.reciprocal_rank(row, list(np.array(given) + draw.uniform(0, 0.1, len(row))))
                for _ in range(2000)
            ]
            assert metrics.reciprocal_rank(row, given) == pytest.approx(np.mean(orders), abs=0.04)


def test_floors_are_what_random_answers_reach() -> None:
    grades, _ = random_lists(9, 200)
    draw = np.random.default_rng(9)
    drawn = [
        metrics.ranking_metrics(grades, [list(draw.random(len(row))) for row in grades], range(len(grades)))
        for _ in range(30)
    ]
    for name in ("auc", "within_group_auc", "ndcg_at_10", "map", "mrr"):
        floor = drawn[0][name].floor
        assert floor is not None
        assert np.mean([one[name].value for one in drawn]) == pytest.approx(floor, abs=0.01), name
    truths = list(draw.choice(4, 3000, p=[0.7, 0.1, 0.1, 0.1]))
    guesses = metrics.choice_metrics(truths, draw.random((3000, 4)).tolist(), range(3000))
    for name in ("accuracy", "macro_f1"):
        assert guesses[name].value == pytest.approx(guesses[name].floor, abs=0.02), name


def test_the_floor_of_the_brier_score_is_the_base_rate() -> None:
    grades = [[1.0, 0.0, 0.0, 0.0]] * 50
    constant = metrics.ranking_metrics(grades, [[0.25] * 4] * 50, range(50))["brier"]
    assert constant.value == constant.floor == pytest.approx(0.1875)
    assert not constant.higher_is_better


def test_intervals_of_a_mean_are_the_same_with_and_without_its_values() -> None:
    draw = np.random.default_rng(2)
    values, groups = list(draw.normal(size=300)), list(draw.integers(0, 60, 300))
    fast = metrics.mean_metric(values, groups)
    slow = MetricData(fast.statistic, groups, 300)
    ours, theirs = intervals.estimate(fast), intervals.estimate(slow)
    assert ours.value == pytest.approx(theirs.value, rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    other = metrics.mean_metric([value + 0.1 for value in values], groups)
    samples = intervals.paired_samples(other, fast)
    assert np.allclose(samples[:, 0] - samples[:, 1], 0.1)


def test_the_paired_standard_error_is_that_of_a_bootstrap_over_groups_and_of_the_textbook() -> None:
    random = np.random.default_rng(3)
    theirs = random.normal(size=600)
    ours = theirs + random.normal(size=600)
    ours[::7] = np.nan
    groups = [row // 4 for row in range(600)]

    def metric(values: np.ndarray, of_rows: list[int]) -> MetricData:
        return MetricData(lambda rows: float(np.nanmean(values[rows])), of_rows, 600, values=tuple(values))

    both = metric(ours, groups), metric(theirs, groups)
    samples = intervals.paired_samples(*both)
    bootstrap = float(np.std(samples[:, 0] - 0.97 * samples[:, 1]))
    assert intervals.paired_standard_error(*both, 0.97) == pytest.approx(bootstrap, rel=0.08)

    alone = list(range(600))
    shifted = theirs + random.normal(size=600)
    expected = np.std(shifted - 0.5 * theirs, ddof=1) / np.sqrt(600)
    assert intervals.paired_standard_error(metric(shifted, alone), metric(theirs, alone), 0.5) == pytest.approx(
        expected
    )
    assert np.isnan(intervals.paired_standard_error(metric(theirs[:1], [0]), metric(theirs[:1], [0]), 1.0))
