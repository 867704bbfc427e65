from dataclasses import replace

import pytest

from slimserve.compare.plan import (
    FULL,
    Endpoint,
    Finished,
    describe_plan,
    judged_rate,
    load_seed,
    parse_endpoint,
    parse_finished,
    parse_rates,
    parse_share,
    parse_slos,
    rates_of,
)
from slimserve.core.errors import UserError
from slimserve.workloads.interface import Estimate
from tests.compare.made_up import comparison, variant


def test_finished_models_are_named() -> None:
    assert parse_finished("student=models/a=b") == Finished("student", "models/a=b")
    for text in ("student", "student=", "=dir", "a b=dir"):
        with pytest.raises(UserError, match="--variant: .* is no named model"):
            parse_finished(text)


def test_endpoints_are_named_urls_with_a_model_if_they_have_several() -> None:
    assert parse_endpoint("prod=http://h:8000") == Endpoint("prod", "http://h:8000", None)
    assert parse_endpoint("a.b-1=https://h/x#org/model") == Endpoint("a.b-1", "https://h/x", "org/model")


@pytest.mark.parametrize("text", ["http://h:8000", "prod=h:8000", "=http://h", "a/b=http://h", "prod"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--endpoint: .* is no endpoint"):
        parse_endpoint(text)


def test_rates_and_objectives_are_by_workload() -> None:
    assert parse_rates(["recommendation=4,2", "reasoning=0.5"]) == {"recommendation": (2.0, 4.0), "reasoning": (0.5,)}
    assert parse_slos(["reasoning:itl_p99=50ms", "reasoning:errors=1%"]) == {"reasoning": ("itl_p99=50ms", "errors=1%")}


@pytest.mark.parametrize("text", ["2", "chess=2", "reasoning=", "reasoning=0", "reasoning=x"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--rate: .* is no rate of a workload"):
        parse_rates([text])


@pytest.mark.parametrize("text", ["e2e_p99=2s", "chess:e2e_p99=2s", "reasoning:e2e_p99"])
def test_what_is_no_objective_of_a_workload_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--slo"):
        parse_slos([text])


def test_shares_are_percent_or_fractions() -> None:
    assert parse_share("--tolerance", "3%") == pytest.approx(0.03)
    assert parse_share("--tolerance", "0.05") == 0.05
    for text in ("3", "-1%", "100%", "a lot"):
        with pytest.raises(UserError, match="--tolerance: .* is no share"):
            parse_share("--tolerance", text)


def test_rates_are_shares_of_the_references_capacity_unless_they_were_asked_for() -> None:
    made = comparison([variant("dense", [80.0, 90.0], Estimate(0.7, 0.6, 0.8, 9))])
    # 80 items/s in slates of 16 are 5 requests/s in the first round.
    assert rates_of(made, "recommendation") == [2.5, 4.0]
    assert rates_of(made, "recommendation", 2) == [2.5], "a curve takes one round"
    assert judged_rate(made, "recommendation") == 2.5
    made.effort = replace(made.effort, rates={"recommendation": (1.0, 3.0)})
    assert rates_of(made, "recommendation") == rates_of(made, "recommendation", 2) == [1.0, 3.0]
    assert judged_rate(made, "recommendation") == 3.0


def test_no_two_loads_share_a_seed() -> None:
    seeds = {load_seed(FULL, number, index) for number in range(1, 4) for index in range(30)}
    assert len(seeds) == 90


def test_the_plan_says_what_and_how_long() -> None:
    text = "\n".join(describe_plan(FULL, ["recommendation", "reasoning"], ["dense", "w8a8"], "dense"))
    assert "plan: 2 variants in 2 round(s), dense first: dense, w8a8" in text
    assert "128 recommendation, 256 reasoning" in text
    assert "10 runs of 16 s" in text
