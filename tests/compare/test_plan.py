from dataclasses import replace

from slimserve.compare.plan import describe_plan, load_seed, make_preset, round_rates, slo_rate
from slimserve.workloads.interface import Estimate
from tests.compare.invented import comparison, variant

FULL = make_preset("full", ["recommendation", "reasoning"])


def test_rates_are_fractions_of_the_references_capacity_unless_the_user_gives_them() -> None:
    made = comparison([variant("dense", [80.0, 90.0], Estimate(0.7, 0.6, 0.8, 9))])
    # 80 items/s in lists of 16 are 5 requests/s in the first round.
    assert round_rates(made, "recommendation") == [2.5, 4.0]
    assert round_rates(made, "recommendation", 2) == [2.5], "a curve takes one round"
    assert slo_rate(made, "recommendation") == 2.5
    made.preset = replace(made.preset, rates={"recommendation": (1.0, 3.0)})
    assert round_rates(made, "recommendation") == round_rates(made, "recommendation", 2) == [1.0, 3.0]
    assert slo_rate(made, "recommendation") == 3.0


def test_no_two_load_tests_share_a_seed() -> None:
    seeds = {load_seed(FULL, number, index) for number in range(1, 4) for index in range(30)}
    assert len(seeds) == 90


def test_the_plan_says_what_is_measured() -> None:
    text = "\n".join(describe_plan(FULL, ["recommendation", "reasoning"], ["dense", "w8a8"], "dense"))
    assert "plan: 2 variants in 2 round(s), dense first: dense, w8a8" in text
    assert "160 recommendation, 256 reasoning" in text
    assert "10 tests of 16 s" in text
