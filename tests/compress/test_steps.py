"""Tests of steps with calibration data on tiny models, against definitions and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimserve.compress import artifacts
from slimserve.compress.build import build_variant
from slimserve.compress.calibration import load_calibration, short_sequences
from slimserve.compress.prune import METHODS
from slimserve.compress.recipe import AnyStep, Calibrate, Keep, Prune, PruneDepth, Quantize, Recipe
from slimserve.compress.reference import kl_per_token, reference_logits
from slimserve.core.errors import UserError
from slimserve.core.variant import read_manifest

from .conftest import GPTQ, INPUT_IDS, KV, TinyModel, build_on_data, ids_file, logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [None, "dense"])
def test_every_method_removes_neurons_and_kv_groups(
    tiny: TinyModel, tmp_path: Path, method: str, target: str | None
) -> None:
    step = KV.model_copy(update={"method": method, "target": target})
    groups, heads = tiny.model.config.num_key_value_heads, tiny.model.config.num_attention_heads
    if tiny.model.config.model_type == "qwen2":
        # For qwen2, vLLM 0.32 derives the heads' width from their number.
        with pytest.raises(UserError, match="cannot lose KV groups: vLLM cannot load a cut model of type qwen2"):
            build_on_data(tiny, step, target=tmp_path / "variant")
        step, groups, heads = step.model_copy(update={"kv_remove_frac": 0}), 2 * groups, 2 * heads
    variant = build_on_data(tiny, step, target=tmp_path / "variant")
    loaded = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32)
    assert loaded.config.num_key_value_heads == groups // 2
    assert loaded.config.num_attention_heads == heads // 2
    assert loaded.config.intermediate_size == 32
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    torch.testing.assert_close(own, logits(loaded)[0], atol=2e-4, rtol=1e-4)


def test_each_kind_of_unit_has_a_method_of_its_own_by_default(tiny_llama: TinyModel, tmp_path: Path) -> None:
    by_default = build_on_data(tiny_llama, KV, target=tmp_path / "default")
    manifest = read_manifest(by_default)
    assert manifest is not None
    assert manifest.steps[0].detail["method"] == "wanda_refit and osscar_search"
    named = {
        method: build_on_data(tiny_llama, KV.model_copy(update={"method": method}), target=tmp_path / method)
        for method in ("wanda_refit", "osscar_search")
    }
    tensors = {name: load_file(path / "model.safetensors") for name, path in {**named, "default": by_default}.items()}
    name = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(tensors["default"][name], tensors["osscar_search"][name])
    widths = {method: tensors[method]["model.layers.0.mlp.gate_proj.weight"] for method in tensors}
    assert not torch.equal(widths["default"], widths["osscar_search"])


@torch.no_grad()
def test_a_cut_of_kv_groups_is_fitted_to_short_sequences_as_well(tiny_llama: TinyModel, tmp_path: Path) -> None:
    """The refitted weight solves the normal equations over the calibration sequences and the short ones."""
    step = Prune(step="prune", kv_remove_frac=0.5)
    file = ids_file(tmp_path, 4, 32)
    recipe = Recipe(summary="", calibration=Calibrate(source=file, num_samples=4, sequence_length=32), steps=(step,))
    variant = build_variant("tiny", tiny_llama.directory, "own", recipe, tmp_path / "variant")
    tokens_NT = load_calibration(tiny_llama.directory, file, 4, 32).tokens_NT
    before = tiny_llama.model.model.layers[0].self_attn
    after = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32).model.layers[0].self_attn
    seen: list[torch.Tensor] = []
    before.o_proj.register_forward_hook(lambda _, given, __: seen.append(given[0].flatten(0, 1).double()))
    for sequences in (tokens_NT, short_sequences(tokens_NT)):
        tiny_llama.model(sequences)
    x_TI, weight_OI = torch.cat(seen), before.o_proj.weight.double()
    half = len(weight_OI) // 2
    is_first = torch.equal(after.v_proj.weight, before.v_proj.weight[: len(after.v_proj.weight)])
    kept = slice(0, half) if is_first else slice(half, None)
    ridge = (0.01 * x_TI.square().mean() * len(x_TI)).sqrt() * torch.eye(half, dtype=torch.float64)
    rows = torch.cat([x_TI[:, kept], ridge])
    wanted = torch.cat([x_TI @ weight_OI.T, ridge @ weight_OI[:, kept].T])
    solution_KO = torch.linalg.lstsq(rows, wanted).solution
    torch.testing.assert_close(after.o_proj.weight.double(), solution_KO.T, atol=1e-3, rtol=1e-3)
    manifest = read_manifest(variant)
    assert manifest is not None
    assert manifest.steps[0].detail["with_short_sequences"]


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_osscar_has_a_lower_loss_than_random_and_magnitude(tiny_llama: TinyModel, tmp_path: Path) -> None:
    ids = json.loads(Path(ids_file(tmp_path)).read_text().splitlines()[0])["input_ids"]
    dense = next(iter(reference_logits(tiny_llama.directory, [torch.tensor(ids)])))
    loss = {}
    for method in ("random", "magnitude", "osscar_search"):
        step = Prune(step="prune", mlp_remove_frac=0.5, multiple=2, method=method)
        variant = build_on_data(tiny_llama, step, target=tmp_path / method)
        pruned = next(iter(reference_logits(variant, [torch.tensor(ids)])))
        loss[method] = float(kl_per_token(dense, pruned).mean())
    assert loss["osscar_search"] < min(loss["random"], loss["magnitude"])


@pytest.mark.parametrize("method", ["gptq", "quantease"])
@pytest.mark.parametrize("smoothquant", [None, 0.5])
def test_a_calibrated_quantization_stays_near_the_dense_model(
    tiny: TinyModel, tmp_path: Path, method: str, smoothquant: float | None
) -> None:
    step = GPTQ.model_copy(update={"method": method, "smoothquant": smoothquant})
    variant = build_on_data(tiny, step, target=tmp_path / "variant")
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    assert float((own - logits(tiny.model)[0]).norm() / logits(tiny.model).norm()) < 0.08


def test_pruning_in_rounds_reaches_the_same_width_and_calls_the_hook_between_rounds(
    tiny_llama: TinyModel, tmp_path: Path
) -> None:
    widths = []

    def between(checkpoint: Path) -> Path:
        widths.append(json.loads((checkpoint / "config.json").read_text())["intermediate_size"])
        return checkpoint

    step = Prune(step="prune", mlp_remove_frac=0.5, multiple=2, rounds=3)
    variant = build_on_data(tiny_llama, step, target=tmp_path / "variant", between_rounds=between)
    assert json.loads((variant / "config.json").read_text())["intermediate_size"] == 22
    assert len(widths) == 2
    assert 44 > widths[0] > widths[1] > 22


def test_the_least_influential_blocks_are_removed_and_the_others_renumbered(tiny: TinyModel, tmp_path: Path) -> None:
    # The block that adds almost nothing to the hidden states must be removed.
    file = tiny.directory / "model.safetensors"
    tensors = load_file(file)
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[f"model.layers.1.{name}"] *= 1e-4
        tensors.get(f"model.layers.1.{name.replace('weight', 'bias')}", torch.zeros(1)).zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    variant = build_on_data(tiny, PruneDepth(step="prune_depth", num_blocks=1), target=tmp_path / "variant")
    manifest = read_manifest(variant)
    assert manifest is not None
    assert manifest.steps[0].detail["removed_blocks"] == [1]
    after = load_file(variant / "model.safetensors")
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"])
    assert AutoModelForCausalLM.from_pretrained(variant).config.num_hidden_layers == 2


def test_search_removes_the_blocks_whose_removal_changes_the_output_least(tiny: TinyModel, tmp_path: Path) -> None:
    step = PruneDepth(step="prune_depth", num_blocks=2, method="search")
    variant = build_on_data(tiny, step, target=tmp_path / "variant")
    manifest = read_manifest(variant)
    assert manifest is not None
    assert [done.name for done in manifest.steps] == ["prune_depth", "prune_depth", "write"]
    lines = Path(ids_file(tmp_path)).read_text().splitlines()
    tokens_NT = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    layers = list(tiny.model.model.layers)
    for done in manifest.steps[:2]:

        def last_states(kept: list[torch.nn.Module]) -> torch.Tensor:
            # With weight 1, the norm scales every state to a root mean square of 1.
            tiny.model.model.layers = torch.nn.ModuleList(kept)
            tiny.model.model.norm.weight.data.fill_(1)
            return tiny.model.model(tokens_NT, use_cache=False).last_hidden_state

        with torch.no_grad():
            full = last_states(layers)
            change = [
                float((last_states(layers[:index] + layers[index + 1 :]) - full).square().mean())
                for index in range(len(layers))
            ]
        errors = done.detail["per_block"][-1]["error_without"]
        torch.testing.assert_close(errors, change, atol=1e-4, rtol=1e-3)
        assert done.detail["removed_blocks"] == [change.index(min(change))]
        del layers[change.index(min(change))]


def test_an_interrupted_search_resumes_with_the_same_errors(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PruneDepth(step="prune_depth", num_blocks=1, method="search")
    left = [2]

    def save_or_stop(*arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save_file(*arguments)

    monkeypatch.setattr(artifacts, "save_file", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        build_on_data(tiny_llama, step, target=tmp_path / "variant")
    left[0] = 100
    resumed = read_manifest(build_on_data(tiny_llama, step, target=tmp_path / "variant"))
    complete = read_manifest(build_on_data(tiny_llama, step, target=tmp_path / "complete"))
    assert resumed is not None
    assert complete is not None
    assert resumed.steps[0].detail == complete.steps[0].detail


def test_all_targets_are_equal_in_the_first_block(tiny: TinyModel, tmp_path: Path) -> None:
    # Nothing has been cut before block 0, so all targets are the same there, biases included.
    step = KV if tiny.model.config.model_type != "qwen2" else KV.model_copy(update={"kv_remove_frac": 0})
    weights = {}
    for target in ("current", "dense", "residual"):
        variant = build_on_data(tiny, step.model_copy(update={"target": target}), target=tmp_path / f"to-{target}")
        weights[target] = load_file(variant / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    for target in ("dense", "residual"):
        torch.testing.assert_close(weights[target][name], weights["current"][name], atol=1e-3, rtol=1e-3)
        if step.kv_remove_frac == 0:
            down = "model.layers.0.mlp.down_proj.weight"
            torch.testing.assert_close(weights[target][down], weights["current"][down], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_residual_target_makes_up_for_what_earlier_cuts_have_lost(tiny_llama: TinyModel, tmp_path: Path) -> None:
    """The refitted weight solves the normal equations for the dense model's hidden states after the block."""
    step = Prune(step="prune", mlp_remove_frac=0.5, multiple=2, method="wanda_residual")
    variant = build_on_data(tiny_llama, step, target=tmp_path / "variant")
    lines = Path(ids_file(tmp_path)).read_text().splitlines()
    tokens_NT = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    dense, pruned = tiny_llama.model, AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32)
    seen: dict[str, Any] = {}
    for index in range(3):
        ours, theirs = pruned.model.layers[index], dense.model.layers[index]
        ours.mlp.register_forward_hook(lambda _, given, out: seen.update(normed=given[0], mlp=out))
        ours.mlp.down_proj.register_forward_hook(lambda _, given, __: seen.update(kept=given[0]))
        ours.register_forward_hook(lambda _, __, out: seen.update(after=first_of(out)))
        theirs.register_forward_hook(lambda _, __, out: seen.update(wanted=first_of(out)))
        for model in (dense, pruned):
            model(tokens_NT)
        for module in (ours, ours.mlp, ours.mlp.down_proj, theirs):
            module._forward_hooks.clear()
        x_TK = seen["kept"].flatten(0, 1).double()
        y_TD = (seen["wanted"] - (seen["after"] - seen["mlp"])).flatten(0, 1).double()
        all_TI = (theirs.mlp.act_fn(theirs.mlp.gate_proj(seen["normed"])) * theirs.mlp.up_proj(seen["normed"])).flatten(
            0, 1
        )
        ridge = 0.1 * all_TI.double().square().mean()
        same_KI = (ours.mlp.gate_proj.weight[:, None] == theirs.mlp.gate_proj.weight[None]).all(dim=2)
        before_KD = theirs.mlp.down_proj.weight.double().T[same_KI.int().argmax(dim=1)]
        rows = torch.cat([x_TK, (ridge * len(x_TK)).sqrt() * torch.eye(x_TK.shape[1])])
        wanted = torch.cat([y_TD, (ridge * len(x_TK)).sqrt() * before_KD])
        solution_KD = torch.linalg.lstsq(rows, wanted).solution
        torch.testing.assert_close(ours.mlp.down_proj.weight.double().T, solution_KD, atol=2e-3, rtol=2e-3)


def test_the_layers_with_the_largest_error_stay_unquantized(tiny_llama: TinyModel, tmp_path: Path) -> None:
    step = Quantize(step="quantize", format="w8a8", keep_worst=2)
    variant = build_on_data(tiny_llama, step, target=tmp_path / "variant")
    config = json.loads((variant / "config.json").read_text())
    kept = [layer for layer in config["quantization_config"]["ignore"] if layer != "lm_head"]
    assert len(kept) in {2, 3, 4, 5, 6}
    before, after = load_file(tiny_llama.directory / "model.safetensors"), load_file(variant / "model.safetensors")
    assert all(torch.equal(after[f"{layer}.weight"], before[f"{layer}.weight"]) for layer in kept)
    manifest = read_manifest(variant)
    assert manifest is not None
    assert manifest.steps[0].detail["kept_unquantized"] == kept


@pytest.mark.parametrize("changes", [{"smoothquant": 0.8}, {"format": "w4a16", "awq": True}])
def test_an_unquantized_layer_compensates_for_its_smoothed_norm(
    tiny: TinyModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    step = GPTQ.model_copy(update={**changes, "keep_worst": 11})
    variant = build_on_data(tiny, step, target=tmp_path / "variant")
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    # Eleven of twelve fused layers are dense, so almost nothing may be lost.
    assert float((own - logits(tiny.model)[0]).norm() / logits(tiny.model).norm()) < 0.03


def test_awq_lowers_the_error_of_a_layer_with_a_few_large_inputs(tiny_llama: TinyModel, tmp_path: Path) -> None:
    file = tiny_llama.directory / "model.safetensors"
    tensors = load_file(file)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"][[2, 7, 11]] = 10.0
    save_file(tensors, file, metadata={"format": "pt"})
    errors = []
    for awq in (False, True):
        step = Quantize(step="quantize", format="w4a16", awq=awq)
        manifest = read_manifest(build_on_data(tiny_llama, step, target=tmp_path / str(awq)))
        assert manifest is not None
        errors.append(manifest.steps[0].detail["per_block"][0]["output_error"])
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert errors[1][layer] < errors[0][layer]
    assert errors[1]["self_attn.q_proj"] < 0.9 * errors[0]["self_attn.q_proj"]


@pytest.mark.parametrize(
    "step",
    [
        Prune(step="prune", mlp_remove_frac=0.5, method="oscar"),
        Prune(step="prune", keep=Keep(parameters=0.5), method="oscar"),
        PruneDepth(step="prune_depth", num_blocks=1, method="oscar"),
        Quantize(step="quantize", format="w8a8", method="oscar"),
    ],
    ids=["prune", "budget", "depth", "quantize"],
)
def test_an_unknown_method_is_an_error_that_lists_the_known_ones(
    tiny_llama: TinyModel, tmp_path: Path, step: AnyStep
) -> None:
    with pytest.raises(UserError, match=r"method: 'oscar' is not a .* method; choose from "):
        build_on_data(tiny_llama, step, target=tmp_path / "variant")
