"""Tests of pruning to a budget: shapes that fit, the chosen finalist, and resuming after an interruption."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from slimserve.compress import budget, budget_search
from slimserve.compress.recipe import Keep, Prune, PruneDepth, Quantize
from slimserve.compress.reference import reference_logits
from slimserve.core.errors import UserError
from slimserve.core.variant import read_manifest

from .conftest import INPUT_IDS, QUANTIZE, TinyModel, build_on_data, weight_bytes


def known_seconds(self: budget.BlockTimer, shapes: Sequence[budget.Shape]) -> list[float]:
    """Return seconds proportional to neurons and heads, because tiny blocks cannot be timed."""
    return [shape.width + 10.0 * shape.kv_groups for shape in shapes]


@pytest.mark.parametrize("keep", [{"parameters": 0.8}, {"bytes": 0.8}, {"speedup": 1.1}])
def test_a_budget_is_met_by_the_finalist_nearest_to_the_dense_model(
    tiny: TinyModel, tmp_path: Path, keep: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget.BlockTimer, "seconds", known_seconds)
    quantize: tuple[Quantize, ...] = ()
    if "bytes" in keep:
        quantize = (QUANTIZE.model_copy(update={"head": "int8"}),)
        keep = {"bytes": 0.8 * weight_bytes(build_on_data(tiny, *quantize, target=tmp_path / "quantized"))}
    prune = Prune(step="prune", keep=Keep(**keep), multiple=4)
    variant = build_on_data(tiny, prune, *quantize, target=tmp_path / "variant")
    manifest = read_manifest(variant)
    assert manifest is not None
    fit = manifest.steps[0]
    assert fit.name == "fit_budget"
    finalists = fit.detail["finalists"]
    fitting = [one for one in finalists if one["cost"] <= 1.03 * fit.detail["limit"]] or finalists
    best = min(fitting, key=lambda one: one["kl"])
    assert fit.detail["chosen"] == {key: best[key] for key in ("width", "kv_groups", "depth")}
    config = json.loads((variant / "config.json").read_text())
    assert config["intermediate_size"] == best["width"]
    assert config["num_key_value_heads"] == best["kv_groups"]
    assert config["num_hidden_layers"] == best["depth"]
    dense = tiny.model.num_parameters()
    if "parameters" in keep:
        assert manifest.num_parameters <= 0.8 * dense
        assert AutoModelForCausalLM.from_pretrained(variant).num_parameters() == manifest.num_parameters
    if "bytes" in keep:
        assert weight_bytes(variant) <= keep["bytes"]
        # The budget counts norms, biases and the file header as bytes that pruning does not change.
        assert weight_bytes(variant) == pytest.approx(best["cost"], rel=0.12)
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    assert bool(torch.isfinite(own).all())


def test_block_times_are_relative_to_the_dense_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.BlockTimer, "seconds", known_seconds)
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_key_value_heads=4, head_dim=32).to_dict()
    timer, dense = budget.BlockTimer(config), budget.Shape.of(config)
    assert timer.relative_seconds(dense) == 1
    for width, kv_groups, depth in ((512, 4, 4), (768, 4, 3), (2048, 1, 4), (1536, 2, 2)):
        expected = (width + 10 * kv_groups) / (2048 + 10 * 4) * depth / 4
        assert timer.relative_seconds(budget.Shape(width, kv_groups, depth)) == pytest.approx(expected)


def test_an_interrupted_budget_search_resumes_with_the_shapes_that_it_had_chosen(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget.BlockTimer, "seconds", known_seconds)
    prune = Prune(step="prune", keep=Keep(speedup=1.1), multiple=4)

    def stop(*_: Any) -> list[float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(budget_search, "divergences", stop)
        with pytest.raises(KeyboardInterrupt):
            build_on_data(tiny_llama, prune, target=tmp_path / "variant")
    (chosen,) = tmp_path.glob(".variant.building/step-budget/finalists.json")
    shapes = [one["shape"] for one in json.loads(chosen.read_text())["finalists"]]
    monkeypatch.setattr(budget.Budget, "shapes", stop)  # new timings might rank others first
    manifest = read_manifest(build_on_data(tiny_llama, prune, target=tmp_path / "variant"))
    assert manifest is not None
    assert [{key: one[key] for key in shapes[0]} for one in manifest.steps[0].detail["finalists"]] == shapes


def test_a_budget_leaves_what_the_next_step_needs(tiny_llama: TinyModel, tmp_path: Path) -> None:
    prune, depth = (
        Prune(step="prune", keep=Keep(parameters=0.8), multiple=4),
        PruneDepth(step="prune_depth", num_blocks=2),
    )
    manifest = read_manifest(build_on_data(tiny_llama, prune, depth, target=tmp_path / "variant"))
    assert manifest is not None
    assert {one["depth"] for one in manifest.steps[0].detail["finalists"]} == {3}


def test_a_budget_that_cannot_be_met_and_one_that_is_met_already_are_rejected(
    tiny_llama: TinyModel, tmp_path: Path
) -> None:
    for share, problem in ((0.01, "out of reach"), (1.0, "met by the dense model already")):
        prune = Prune(step="prune", keep=Keep(parameters=share), multiple=4)
        with pytest.raises(UserError, match=f"keep: 'parameters = .*{problem}"):
            build_on_data(tiny_llama, prune, target=tmp_path / "variant")
    assert not list(tmp_path.glob(".variant*"))
