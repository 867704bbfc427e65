"""The verdict on invented values whose correct result is computed by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from slimserve.compare.results import Signal, VariantResult, Verdict, load_comparison
from slimserve.compare.verdict import confidence_words, make_verdict
from slimserve.loadtest.summary import percentiles
from slimserve.workloads.interface import Estimate
from tests.compare.invented import comparison, kept, variant

AUC = Estimate(0.75, 0.70, 0.80, 80)
WORSE = Estimate(0.60, 0.55, 0.65, 80)


def dense() -> VariantResult:
    return variant("dense", [50.0, 52.0], AUC)


def decision_names(verdict: Verdict, field: str) -> dict[str, list[str]]:
    return {one.name: getattr(one, field) for one in verdict.decisions}


def test_a_rate_without_a_request_is_not_reported_as_a_missed_latency() -> None:
    slow = variant("w8a8", [100.0, 104.0], AUC, (2.0, 2.0))
    for one in slow.rounds:
        (load,) = one.at_rate["recommendation"]
        missed = [replace(objective, value=None) for objective in load.summary.objectives]
        empty = replace(load.summary, e2e_s=percentiles([]), objectives=missed)
        one.at_rate = {"recommendation": [replace(load, summary=empty)]}
    verdict = make_verdict(comparison([dense(), slow]), {"dense": kept(1, 1), "w8a8": kept(0.99, 0.96)})
    (reason,) = [one.reason for one in verdict.decisions if one.name == "w8a8"]
    assert reason == "had no recommendation request in the measured time at 2 requests/s; load it longer"


def test_the_cheapest_that_keeps_quality_and_objectives_wins() -> None:
    w8a8 = variant("w8a8", [100.0, 104.0], AUC)
    pruned = variant("prune25", [200.0, 208.0], WORSE)
    verdict = make_verdict(
        comparison([dense(), w8a8, pruned]), {"dense": kept(1, 1), "w8a8": kept(0.99, 0.96), "prune25": kept(0.8, 0.0)}
    )
    assert verdict.winner == "w8a8"
    assert verdict.confidence == pytest.approx(0.92)  # two variants were tried: 1 - 2 * 0.04
    assert verdict.confidence_words == "high"
    costs = {one.name: one.cost_ratio for one in verdict.decisions}
    assert costs["w8a8"] is not None
    assert costs["w8a8"].median == 0.5
    reasons = {one.name: one.reason for one in verdict.decisions}
    assert reasons["prune25"].startswith("keeps only 80.0% of dense's recommendation AUC above chance; 97% is required")
    assert reasons["w8a8"] == "keeps quality and meets the objectives at 50% (50% to 50% over 2 rounds) of dense's cost"
    assert verdict.sentences[0].startswith("Ship w8a8: a unit of work costs 50%")
    assert "2 of 2 rounds" in verdict.sentences[1]


def test_a_variant_that_misses_the_objective_in_one_round_does_not_win() -> None:
    late = variant("w8a8", [100.0, 104.0], AUC, [0.9, 1.1])
    verdict = make_verdict(comparison([dense(), late]), {"dense": kept(1, 1), "w8a8": kept(1, 1)})
    assert verdict.winner == "dense"
    assert verdict.decisions[1].slo["recommendation"].num_met == 1
    assert verdict.decisions[1].slo["recommendation"].worst == {"e2e_p90=1s": 1.1}
    assert "misses e2e_p90=1s of recommendation at 2 requests/s in 1 of 2 rounds" in verdict.decisions[1].reason


def test_a_rate_far_beyond_capacity_is_a_missed_objective() -> None:
    slow = variant("nf4", [5.0, 5.0], AUC, [math.inf, math.inf])
    verdict = make_verdict(comparison([dense(), slow]), {"dense": kept(1, 1), "nf4": kept(1, 1)})
    assert not verdict.decisions[1].meets_slo
    assert "far beyond its capacity" in verdict.decisions[1].reason
    assert decision_names(verdict, "dominated_by")["nf4"] == ["dense"]


def test_an_undecided_variant_is_not_shipped_and_the_number_of_prompts_is_said() -> None:
    close = variant("w8a8", [100.0, 104.0], AUC)
    verdict = make_verdict(comparison([dense(), close]), {"dense": kept(1, 1), "w8a8": kept(0.96, 0.3)})
    assert verdict.winner == "dense"
    assert verdict.confidence == pytest.approx(0.7)
    assert verdict.decisions[1].ruling == "undecided"
    assert "no cheaper variant surely keeps quality" in verdict.sentences[0]
    assert any(
        "w8a8 would be cheaper" in sentence and "If it loses nothing, about 320 more prompts" in sentence
        for sentence in verdict.sentences
    )


@pytest.mark.parametrize("value", [Estimate(0.52, 0.48, 0.56, 80), Estimate(math.nan, math.nan, math.nan, 0)])
def test_a_reference_at_chance_gives_no_verdict(value: Estimate) -> None:
    made = comparison([variant("dense", [50.0, 52.0], value), variant("w8a8", [100.0, 104.0], AUC)])
    made.signals = {"recommendation": Signal("auc", 0.5, is_informative=False)}
    verdict = make_verdict(made, {"dense": kept(1, 1), "w8a8": kept(1.1, 1)})
    assert (verdict.winner, verdict.uninformative) == (None, ["recommendation"])
    assert verdict.sentences[0] == "No verdict: recommendation cannot compare these models."


def test_a_baseline_that_does_as_well_as_the_reference_is_said_first() -> None:
    made = comparison([dense(), variant("w8a8", [100.0, 104.0], AUC)])
    baselines = {"history_share": Estimate(0.76, 0.7, 0.8, 80), "item_popularity": Estimate(0.7, 0.6, 0.8, 80)}
    made.signals = {"recommendation": Signal("auc", 0.5, True, baselines, ["history_share"])}
    verdict = make_verdict(made, {"dense": kept(1, 1), "w8a8": kept(1, 1)})
    assert verdict.sentences[0] == (
        "On recommendation, history share alone, without a language model, does at least as well as dense: AUC 0.760 "
        "against 0.750."
    )
    assert verdict.winner == "w8a8"


def test_with_looks_the_error_rate_of_the_look_decides() -> None:
    made = comparison([dense(), variant("w8a8", [100.0, 104.0], AUC)])
    made.preset = replace(made.preset, quality_prompts={"recommendation": 800}, looks=(0.1, 0.5, 1.0))
    for probability, ruling in ((0.98, "undecided"), (0.991, "keeps"), (0.005, "loses")):
        outcome = kept(1, probability)  # 80 of 800 prompts: the first look, which may spend 0.1 * 0.1
        assert make_verdict(made, {"dense": kept(1, 1), "w8a8": outcome}).decisions[1].ruling == ruling


def test_the_reference_wins_where_nothing_is_cheaper() -> None:
    verdict = make_verdict(
        comparison([dense(), variant("nf4", [20.0, 21.0], WORSE)]), {"dense": kept(1, 1), "nf4": kept(0.8, 0.1)}
    )
    assert (verdict.winner, verdict.confidence) == ("dense", 1.0)
    assert verdict.sentences[0] == "Ship dense: no other is cheaper."
    assert "nf4 is dominated by dense" in verdict.sentences[-1]


def test_none_qualifies() -> None:
    late = variant("dense", [50.0, 52.0], AUC, [1.5, 1.6])
    pruned = variant("prune25", [100.0, 104.0], WORSE)
    verdict = make_verdict(comparison([late, pruned]), {"dense": kept(1, 1), "prune25": kept(0.8, 0.02)})
    assert verdict.winner is None
    assert verdict.sentences[0] == "Ship none of these variants: none both keeps quality and meets the objectives."
    assert any(sentence.startswith("dense misses e2e_p90=1s") for sentence in verdict.sentences)
    assert verdict.confidence == pytest.approx(0.98)


def test_objectives_without_a_rate_are_not_met_and_survive_a_round_trip(tmp_path: Path) -> None:
    made = comparison([dense()])
    made.slo_rates = {}
    made.verdict = make_verdict(made, {"dense": kept(math.nan, math.nan)})
    made.write(tmp_path)
    verdict = load_comparison(tmp_path).verdict
    assert verdict is not None
    assert verdict.decisions[0].slo["recommendation"].rate_rps is None
    assert not verdict.decisions[0].meets_slo
    assert math.isnan(verdict.decisions[0].quality_probability)


def test_without_objectives_only_quality_and_cost_count() -> None:
    late = variant("w8a8", [100.0, 104.0], AUC, [9.0, 9.0])
    verdict = make_verdict(comparison([dense(), late], slos={}), {"dense": kept(1, 1), "w8a8": kept(1, 1)})
    assert verdict.winner == "w8a8"
    assert "No objective was given" in verdict.sentences[1]


def test_a_tie_in_cost_is_said() -> None:
    first, second = variant("w8a8", [100.0, 130.0], AUC), variant("fp8", [101.0, 120.0], AUC)
    verdict = make_verdict(
        comparison([dense(), first, second]), {name: kept(1, 1) for name in ("dense", "w8a8", "fp8")}
    )
    assert verdict.winner == "w8a8"
    assert any(sentence.startswith("fp8 also qualifies") for sentence in verdict.sentences)
    assert "fp8 and w8a8 are not distinguishable in this run." in verdict.sentences


def test_dominated_takes_no_worse_everywhere_and_clearly_better_somewhere() -> None:
    better = variant("a", [100.0, 104.0], AUC, [0.4, 0.4])
    slower_and_worse = variant("b", [50.0, 52.0], WORSE, [0.6, 0.7])
    cheaper_but_worse = variant("c", [300.0, 304.0], WORSE, [0.4, 0.4])
    verdict = make_verdict(
        comparison([better, slower_and_worse, cheaper_but_worse]), {name: kept(1, 1) for name in "abc"}
    )
    assert decision_names(verdict, "dominated_by") == {"a": [], "b": ["a", "c"], "c": []}


def test_one_round_says_nothing_clear_of_speed() -> None:
    one, two = variant("a", [50.0], AUC, [0.5]), variant("b", [100.0], AUC, [0.4])
    made = comparison([one, two])
    made.preset = replace(made.preset, num_rounds=1)
    verdict = make_verdict(made, {"a": kept(1, 1), "b": kept(1, 1)})
    assert any(sentence.startswith("There was only one round") for sentence in verdict.sentences)
    assert decision_names(verdict, "dominated_by") == {"a": [], "b": []}
    assert decision_names(verdict, "indistinguishable_from") == {"a": ["b"], "b": ["a"]}


def test_a_variant_without_quality_does_not_qualify() -> None:
    verdict = make_verdict(comparison([dense(), variant("w8a8", [100.0, 100.0], AUC)]), {"dense": kept(1, 1)})
    assert verdict.winner == "dense"
    assert verdict.decisions[1].reason.startswith("has no auc of recommendation")


@pytest.mark.parametrize(("share", "words"), [(1.0, "very high"), (0.8, "high"), (0.79, "moderate"), (0.3, "low")])
def test_confidence_in_words(share: float, words: str) -> None:
    assert confidence_words(share) == words
