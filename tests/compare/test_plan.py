from dataclasses import replace
from pathlib import Path

import pytest

from slimserve.compare import plan
from slimserve.compare.plan import calibration_warnings, describe_plan, load_seed, make_preset, round_rates, slo_rate
from slimserve.core.hardware import probe_hardware
from slimserve.workloads import load_workload
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
    assert "256 recommendation, 256 reasoning" in text
    assert "10 tests of 16 s" in text


@pytest.mark.parametrize(("isa", "minutes"), [(("avx2", "avx512f"), 15), (("avx2",), 52)])
def test_the_plan_expects_more_time_on_a_slow_cpu(
    monkeypatch: pytest.MonkeyPatch, isa: tuple[str, ...], minutes: int
) -> None:
    monkeypatch.setattr(plan, "probe_hardware", lambda: replace(probe_hardware(), isa=isa, gpus=()))
    quick = make_preset("quick", ["recommendation", "reasoning"])
    last = describe_plan(quick, ["recommendation", "reasoning"], ["a", "b", "c", "d"], "a")[-1]
    assert f"about {minutes} minutes" in last


def test_a_variant_that_was_calibrated_on_other_data_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n' * 4)
    (tmp_path / "own.toml").write_text(
        'kind = "generate"\ndata = "own.jsonl"\nprompt = "{question}"\nanswer = "answer"\n'
    )
    own = load_workload("own.toml").name
    sources = {"dense": "", "a": "mixed", "b": "reasoning", "c": "self-generated", "d": "own.toml", "e": "reasoning"}
    made = [
        replace(variant(name, [], Estimate(0.7, 0.6, 0.8, 9), []), calibration_source=source)
        for name, source in sources.items()
    ]
    assert calibration_warnings(made[:2], ["recommendation", "reasoning"]) == []
    assert calibration_warnings([made[4]], [own]) == []
    lines = calibration_warnings(made, ["reasoning", own])
    assert [line.split("differ: ")[1].split(";")[0] for line in lines] == [
        f"a was calibrated on mixed, not on {own}",
        f"b, e was calibrated on reasoning, not on {own}",
        f"c was calibrated on self-generated, not on reasoning, {own}",
        "d was calibrated on own.toml, not on reasoning",
    ]
