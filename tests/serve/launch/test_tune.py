from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.core.hardware import Hardware
from slimserve.serve.launch import tune as module
from slimserve.serve.launch.plan import Choice, LaunchPlan, TrafficProfile
from slimserve.serve.launch.tune import best_candidate, candidates, kept_launch, tune_launch

CPU = Hardware(cpu="x", cores=(0, 1), memory_gib=24.0, isa=(), gpus=())
FAST = "steps of 8,192 tokens"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "cache"))
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def rates_by_steps(fast: float) -> object:
    """Return a measurement in which steps of 8,192 tokens run at a rate of `fast` and everything else at 100."""

    def measure(directory: Path, plan: LaunchPlan, profile: TrafficProfile) -> float:
        return fast if ("--max-num-batched-tokens", "8192") in named(plan.arguments) else 100.0

    return measure


def named(choices: tuple[Choice, ...]) -> set[tuple[str, str]]:
    return {(choice.name, choice.value) for choice in choices}


def test_the_fastest_candidate_is_used_at_once_and_at_later_starts(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_measure", rates_by_steps(130.0))
    before = kept_launch(model, CPU, "balanced")
    tuned = tune_launch(model, CPU, "balanced")
    assert ("--max-num-batched-tokens", "8192") in named(tuned.arguments)
    assert named(tuned.arguments) > named(before.arguments)
    assert kept_launch(model, CPU, "balanced") == tuned
    assert kept_launch(model, CPU, "decode") != tuned, "another profile was not measured"
    other = Hardware(cpu="y", cores=(0, 1), memory_gib=24.0, isa=(), gpus=())
    assert kept_launch(model, other, "balanced") == before, "another machine was not measured"


def test_a_gain_within_the_spread_changes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measure", rates_by_steps(102.0))
    before = kept_launch(model, CPU, "balanced")
    assert tune_launch(model, CPU, "balanced") == before == kept_launch(model, CPU, "balanced")


@pytest.mark.parametrize(("rates", "is_kept"), [((130.0, 90.0), False), ((130.0, 120.0), True)])
def test_a_candidate_must_be_fast_in_both_measurements(
    rates: tuple[float, float], is_kept: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(rates)

    def measure(directory: Path, plan: LaunchPlan, profile: TrafficProfile) -> float:
        return left.pop(0) if ("--max-num-batched-tokens", "8192") in named(plan.arguments) else 100.0

    monkeypatch.setattr(module, "_measure", measure)
    tuned = tune_launch(model, CPU, "balanced")
    assert (("--max-num-batched-tokens", "8192") in named(tuned.arguments)) == is_kept
    assert not left


def test_a_candidate_that_does_not_start_is_skipped_but_the_plan_itself_must_start(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(directory: Path, plan: LaunchPlan, profile: TrafficProfile) -> float:
        if any(choice.name == "--max-num-batched-tokens" for choice in plan.arguments):
            raise UserError("engine", "tuned", "ended", "read its log")
        return 100.0

    monkeypatch.setattr(module, "_measure", measure)
    assert tune_launch(model, CPU, "balanced") == kept_launch(model, CPU, "balanced")

    def fail(directory: Path, plan: LaunchPlan, profile: TrafficProfile) -> float:
        raise UserError("engine", "tuned", "ended", "read its log")

    monkeypatch.setattr(module, "_measure", fail)
    with pytest.raises(UserError, match="read its log"):
        tune_launch(model, CPU, "balanced")


def test_a_broken_cache_file_is_ignored(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measure", rates_by_steps(130.0))
    before = kept_launch(model, CPU, "balanced")
    tune_launch(model, CPU, "balanced")
    (file,) = (model / "cache" / "tuned").iterdir()
    for garbage in ("", "{", "[]", '{"name": "x", "environment": [{}], "arguments": []}'):
        file.write_text(garbage)
        assert kept_launch(model, CPU, "balanced") == before


def test_a_single_core_is_never_left_to_the_server() -> None:
    single = Hardware(cpu="x", cores=(0,), memory_gib=24.0, isa=(), gpus=())
    assert "a core left to the server" not in {candidate.name for candidate in candidates(single)}
    assert best_candidate(single, {"as planned": 1.0, FAST: 2.0}).name == FAST
