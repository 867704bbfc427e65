"""The decision rule: posterior probabilities against closed forms, error spending against published boundaries."""

import math

import numpy as np
import pytest
from scipy.stats import beta, norm

from slimserve.compare.decision import DecisionRule, Margin, is_informative, kept_frac, look_errors
from slimserve.workloads.interface import Estimate, MetricData
from slimserve.workloads.metrics import answer_metrics, mean_metric

RULE = DecisionRule(max_loss_frac=0.03, confidence=0.9)


def accuracy(outcomes: list[bool], floor: float = 0.0) -> MetricData:
    return answer_metrics(list(map(float, outcomes)), ["all"] * len(outcomes), [1] * len(outcomes), floor=floor)[
        "accuracy"
    ]


def pairs(both: int, gained: int, lost: int, neither: int) -> tuple[MetricData, MetricData]:
    ours = [True] * both + [True] * gained + [False] * lost + [False] * neither
    theirs = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return accuracy(ours), accuracy(theirs)


def test_quality_kept_counts_from_the_floor() -> None:
    assert kept_frac(0.65, 0.7, 0.5) == pytest.approx(0.75)
    assert kept_frac(3.0, 2.0, 6.0) == pytest.approx(0.75)  # lower is better
    assert math.isnan(kept_frac(0.6, 0.5, 0.5))
    assert math.isnan(kept_frac(0.6, 0.5, None))


@pytest.mark.parametrize(("gained", "lost"), [(9, 4), (0, 0), (1, 20), (0, 40), (300, 250)])
def test_with_no_tolerance_the_posterior_is_that_of_the_discordant_pairs(gained: int, lost: int) -> None:
    # With t = 0, D = p_gained - p_lost, and its sign depends on gained / (gained + lost) alone: a Beta posterior.
    ours, theirs = pairs(60, gained, lost, 30)
    margin = DecisionRule(max_loss_frac=0.0).margin(ours, theirs, 90 + gained + lost)
    expected = beta(gained + 0.5, lost + 0.5).sf(0.5)
    assert margin.keep_probability == pytest.approx(expected, abs=1e-6)
    assert margin.value == pytest.approx((gained - lost) / (90 + gained + lost))


@pytest.mark.parametrize("counts", [(60, 9, 4, 30), (0, 0, 0, 8), (3, 0, 1, 0), (500, 40, 60, 400)])
def test_the_posterior_is_that_of_dirichlet_draws(counts: tuple[int, int, int, int]) -> None:
    ours, theirs = pairs(*counts)
    margin = RULE.margin(ours, theirs, sum(counts))
    shares = np.random.default_rng(0).dirichlet(np.array(counts) + 0.5, 200_000)
    draws = shares @ np.array([0.03, 1.0, -0.97, 0.0])
    assert margin.keep_probability == pytest.approx(np.mean(draws >= 0), abs=0.005)
    assert margin.sd == pytest.approx(np.std(draws) * math.sqrt(sum(counts)), rel=0.01)


def test_the_posterior_equals_one_minus_the_p_value_in_large_samples() -> None:
    ours, theirs = pairs(1200, 100, 130, 570)
    values = np.repeat([0.03, 1.0, -0.97, 0.0], [1200, 100, 130, 570])  # v - 0.97 r of each kind of pair
    z = values.mean() / (values.std() / math.sqrt(2000))
    margin = RULE.margin(ours, theirs, 2000)
    assert margin.keep_probability == pytest.approx(norm.cdf(z), abs=0.01)
    assert margin.sd == pytest.approx(values.std(), rel=0.02)
    assert margin.tolerated == pytest.approx(0.03 * 1330 / 2000)


def test_a_floor_makes_the_same_loss_weigh_more() -> None:
    outcomes = [True] * 700 + [False] * 300
    worse = [True] * 685 + [False] * 315
    from_zero = RULE.margin(accuracy(worse), accuracy(outcomes), 1000)
    from_half = RULE.margin(accuracy(worse, 0.5), accuracy(outcomes, 0.5), 1000)
    assert from_zero.value > 0 > from_half.value
    assert from_half.keep_probability < from_zero.keep_probability


def test_means_of_groups_get_students_t_around_the_estimate() -> None:
    draw = np.random.default_rng(3)
    theirs = draw.normal(0.7, 0.2, 400)
    ours = theirs + draw.normal(-0.002, 0.05, 400)
    rule = DecisionRule(max_loss_frac=0.03)
    margin = rule.margin(mean_metric(list(ours), range(400), 0.5), mean_metric(list(theirs), range(400), 0.5), 400)
    values = (ours - 0.5) - 0.97 * (theirs - 0.5)
    assert margin.value == pytest.approx(values.mean())
    assert margin.sd == pytest.approx(values.std(), rel=0.06)
    assert margin.keep_probability == pytest.approx(norm.cdf(values.mean() / values.std() * 20), abs=0.03)


def test_a_metric_that_is_better_when_lower_is_mirrored() -> None:
    theirs = [1.0] * 50 + [2.0] * 50
    better, worse = [value - 0.1 for value in theirs], [value + 0.5 for value in theirs]

    def loss(values: list[float]) -> MetricData:
        made = mean_metric(values, range(100), floor=4.0)
        return MetricData(made.statistic, made.groups, made.n, None, made.values, 4.0, 0.0, higher_is_better=False)

    assert RULE.margin(loss(better), loss(theirs), 100).keep_probability > 0.99
    assert RULE.margin(loss(worse), loss(theirs), 100).keep_probability < 0.01


@pytest.mark.parametrize("metric", [accuracy([]), mean_metric([math.nan] * 9, range(9), 0.5), mean_metric([0.7], [0])])
def test_nothing_is_decided_without_a_value_or_a_floor(metric: MetricData) -> None:
    if len(metric.groups):
        probability = RULE.margin(metric, metric, 9).keep_probability
        assert math.isnan(probability)
        assert RULE.decide([probability]) == "undecided"
    assert RULE.decide([]) == "undecided"
    assert RULE.decide([1.0, math.nan]) == "undecided"
    assert RULE.decide([0.0, math.nan]) == "loses"


def test_decisions_count_variants_and_workloads() -> None:
    assert RULE.decide([0.91]) == "keeps"
    assert RULE.decide([0.95, 0.95]) == "keeps"
    assert RULE.decide([0.94, 0.94]) == "undecided"
    assert RULE.decide([0.09]) == "loses"
    assert RULE.decide([0.09, 1.0]) == "undecided"
    eight = DecisionRule(confidence=0.9, num_variants=8)
    assert eight.error == pytest.approx(0.0125)
    assert eight.decide([0.98]) == "undecided"
    assert eight.decide([0.988]) == "keeps"


def test_the_planned_number_of_prompts_decides_with_nine_in_ten() -> None:
    margin = Margin(value=0.01, keep_probability=0.7, sd=0.25, tolerated=0.02, num_prompts=256)
    needed = RULE.prompts_needed(margin)
    assert needed is not None
    z = 0.02 / (0.25 / math.sqrt(needed))
    assert norm.cdf(z - norm.isf(0.1)) == pytest.approx(0.9, abs=0.001)
    assert (RULE.prompts_needed(margin, effect=-0.1) or needed) < needed / 20
    assert RULE.prompts_needed(Margin(0, 0.5, 0.2, 0.0, 9)) is None


def test_all_looks_together_have_the_error_rate() -> None:
    looks = (0.2, 0.4, 0.6, 0.8, 1.0)
    bounds = norm.isf(look_errors(looks, 0.025))
    draw = np.random.default_rng(0)
    path = np.cumsum(draw.normal(0, math.sqrt(0.2), (200_000, 5)), axis=1) / np.sqrt(looks)
    assert np.mean((path >= bounds).any(axis=1)) == pytest.approx(0.025, abs=0.001)


def test_one_look_has_the_whole_error_and_bad_fractions_are_refused() -> None:
    assert look_errors((1.0,), 0.1) == pytest.approx((0.1,))
    assert look_errors((0.5,), 0.1) == pytest.approx((0.05,))
    for fractions in ((0.5, 0.5), (0.0, 1.0), (0.5, 1.2)):
        with pytest.raises(ValueError, match="do not ascend"):
            look_errors(fractions, 0.1)


def test_a_reference_at_chance_is_not_informative() -> None:
    metric = accuracy([True, False], 0.25)
    assert is_informative(Estimate(0.5, 0.3, 0.7, 9), metric)
    assert not is_informative(Estimate(0.3, 0.2, 0.4, 9), metric)
    assert not is_informative(Estimate(math.nan, math.nan, math.nan, 0), metric)
    assert not is_informative(Estimate(0.5, 0.4, 0.6, 9), mean_metric([0.5], [0]))
