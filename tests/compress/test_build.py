import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import budget, checkpoint
from compress import build as build_module
from compress.build import build_variant
from compress.prune import choose_kept, peak_magnitude
from compress.recipe import AnyStep, Calibrate, Keep, Prune, PruneDepth, Quantize, Recipe
from compress.reference import kl_per_token, reference_logits
from contracts.errors import UserError
from contracts.storage import write_atomically
from contracts.variant import read_manifest

from .conftest import TinyModel

PRUNE = Prune(step="prune", mlp_remove_frac=0.3, multiple=4, method="peak_magnitude")
QUANTIZE = Quantize(step="quantize", format="w8a8")
INPUT_IDS = torch.tensor([[5, 41, 0, 66, 23, 8, 8]])


def build(tiny: TinyModel, *steps: AnyStep, target: Path) -> Path:
    return build_variant("tiny", tiny.directory, "own", Recipe(summary="", steps=steps), target)


def mask_pruned_neurons(model: Any, num_kept: int, sort: bool = False) -> None:
    """Zero the consumer columns of the neurons that PRUNE removes; `sort` moves those to the end first."""
    for layer in model.model.layers:
        mlp = layer.mlp
        kept = choose_kept(peak_magnitude(mlp.down_proj.weight.data), num_kept)
        gone = torch.ones(mlp.down_proj.weight.shape[1], dtype=torch.bool)
        gone[kept] = False
        mlp.down_proj.weight.data[:, gone] = 0
        if sort:
            order = torch.cat([kept, gone.nonzero().flatten()])
            mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order].contiguous()
            for producer in (mlp.gate_proj, mlp.up_proj):
                producer.weight.data = producer.weight.data[order].contiguous()


def quantize_linears(model: torch.nn.Module) -> None:
    """The slow reference: fake-quantize each weight by its definition."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = torch.round(module.weight.data / scale) * scale


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(INPUT_IDS).logits


def test_a_pruned_model_of_every_family_equals_the_masked_one_in_stock_transformers(
    tiny: TinyModel, tmp_path: Path
) -> None:
    variant = build(tiny, PRUNE, target=tmp_path / "variant")
    loaded = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32)
    assert loaded.config.intermediate_size == 32
    assert loaded.num_parameters() < tiny.model.num_parameters()
    mask_pruned_neurons(tiny.model, 32)
    torch.testing.assert_close(logits(loaded), logits(tiny.model), atol=1e-5, rtol=1e-5)


def test_a_quantized_model_of_every_family_holds_the_rounded_weights(tiny: TinyModel, tmp_path: Path) -> None:
    variant = build(tiny, PRUNE, QUANTIZE, target=tmp_path / "variant")
    loaded = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32)
    mask_pruned_neurons(tiny.model, 32)
    quantize_linears(tiny.model)
    # Activations are rounded too, per token and dynamically, so logits agree but roughly.
    difference = (logits(loaded) - logits(tiny.model)).norm() / logits(tiny.model).norm()
    assert float(difference) < 0.1


def test_the_manifest_counts_what_the_files_hold(tiny_llama: TinyModel, tmp_path: Path) -> None:
    variant = build(tiny_llama, PRUNE, QUANTIZE, target=tmp_path / "variant")
    manifest = read_manifest(variant)
    assert manifest is not None
    removed = 3 * 3 * 24 * (44 - 32)
    assert manifest.num_parameters == tiny_llama.model.num_parameters() - removed
    prune, quantize, _ = manifest.steps
    assert (prune.detail["neurons_before"], prune.detail["neurons_after"]) == (44, 32)
    assert all(0 < block["mlp.down_proj"]["removed_score_share"] < 0.3 for block in prune.detail["per_block"])
    errors = [block["output_error"] for block in quantize.detail["per_block"]]
    assert [len(block) for block in errors] == [7, 7, 7]
    assert all(0 < value < 0.01 for block in errors for value in block.values())
    assert manifest.peak_rss_bytes is not None


def test_shards_are_read_and_written(tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(build(tiny_llama, PRUNE, target=tmp_path / "whole") / "model.safetensors")
    sharded = TinyModel(tmp_path / "sharded", tiny_llama.model)
    tiny_llama.model.save_pretrained(sharded.directory, max_shard_size="20KB")
    (sharded.directory / "tokenizer.json").write_text("{}")
    assert len(list(sharded.directory.glob("*.safetensors"))) > 1
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 20_000)
    variant = build(sharded, PRUNE, target=tmp_path / "variant")
    assert len(list(variant.glob("model-*-of-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(variant).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_two_builds_give_the_same_bytes(tiny_llama: TinyModel, tmp_path: Path) -> None:
    files = [
        (build(tiny_llama, PRUNE, QUANTIZE, target=tmp_path / name) / "model.safetensors").read_bytes()
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_an_earlier_build_is_reused_and_another_is_not_overwritten(
    tiny_llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "variant"
    build(tiny_llama, PRUNE, target=target)
    before = (target / "slimserve.json").read_bytes()
    build(tiny_llama, PRUNE, target=target)
    assert "reused" in capsys.readouterr().err
    assert (target / "slimserve.json").read_bytes() == before
    with pytest.raises(UserError, match="exists and holds something else"):
        build(tiny_llama, QUANTIZE, target=target)


def test_the_cache_tells_recipes_and_models_apart(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "cache"))

    def cached(*steps: AnyStep) -> Path:
        return build_variant("tiny", tiny_llama.directory, "own", Recipe(summary="", steps=steps), None)

    first = cached(PRUNE)
    assert cached(PRUNE) == first
    assert cached(QUANTIZE) != first
    config = json.loads((tiny_llama.directory / "config.json").read_text())
    (tiny_llama.directory / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert cached(PRUNE) != first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named_and_nothing_is_left(tiny_llama: TinyModel, tmp_path: Path, value: float) -> None:
    file = tiny_llama.directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="'model.layers.1.mlp.up_proj.weight' holds NaN or infinity"):
        build(tiny_llama, PRUNE, target=tmp_path / "out" / "variant")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_block_is_named(tiny_llama: TinyModel, tmp_path: Path) -> None:
    config = json.loads((tiny_llama.directory / "config.json").read_text())
    (tiny_llama.directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match="'model.layers.3.' is missing"):
        build(tiny_llama, PRUNE, target=tmp_path / "variant")


def test_an_unknown_family_lists_the_known_ones(tiny_llama: TinyModel, tmp_path: Path) -> None:
    config = json.loads((tiny_llama.directory / "config.json").read_text())
    (tiny_llama.directory / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UserError, match="'mamba' is not a family .* supported: llama, mistral, qwen2, qwen3"):
        build(tiny_llama, PRUNE, target=tmp_path / "variant")


def test_a_quantized_model_is_not_compressed_again(tiny_llama: TinyModel, tmp_path: Path) -> None:
    variant = build(tiny_llama, QUANTIZE, target=tmp_path / "variant")
    with pytest.raises(UserError, match="is quantized already"):
        build(TinyModel(variant, None), PRUNE, target=tmp_path / "again")


def test_smollm2_pruned_equals_the_masked_dense_model(smollm2: Path, tmp_path: Path) -> None:
    """To the last bit in bf16, given that the masked model adds up its neurons in the same order.

    bf16 logits near 40 lie 0.25 apart, and masking in place changes the order of sums; so the
    masked model's neurons are sorted first, which changes nothing that it computes.
    """
    recipe = Recipe(summary="", steps=(Prune(step="prune", mlp_remove_frac=0.25, method="peak_magnitude"),))
    variant = build_variant("smollm2", smollm2, "prune25", recipe, tmp_path / "variant")
    tokens = torch.randint(0, 49152, (2, 33), generator=torch.Generator().manual_seed(3))
    difference = {}
    for dtype in (torch.float32, torch.bfloat16):
        pruned = AutoModelForCausalLM.from_pretrained(variant, dtype=dtype)
        assert pruned.config.intermediate_size == 1152
        masked = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
        mask_pruned_neurons(masked, 1152, sort=dtype == torch.bfloat16)
        with torch.no_grad():
            difference[dtype] = float((pruned(tokens).logits - masked(tokens).logits).abs().max())
    assert difference[torch.bfloat16] < 0.15
    assert difference[torch.float32] < 1e-3


KV = Prune(step="prune", kv_remove_frac=0.5, mlp_remove_frac=0.3, multiple=4)
GPTQ = Quantize(step="quantize", format="w8a8", method="gptq")


def ids_file(folder: Path, num_sequences: int = 6, num_tokens: int = 16) -> str:
    """Random calibration token ids for the tiny models."""
    tokens = torch.randint(0, 67, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(2))
    file = folder / "ids.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": row}) for row in tokens.tolist()))
    return str(file)


def build_on_data(tiny: TinyModel, *steps: AnyStep, target: Path, **options: Any) -> Path:
    calibration = Calibrate(source=ids_file(tiny.directory.parent), num_samples=6, sequence_length=16)
    recipe = Recipe(summary="", calibration=calibration, steps=steps)
    return build_variant("tiny", tiny.directory, "own", recipe, target, **options)


@pytest.mark.parametrize("method", ["random", "magnitude", "refit", "wanda", "osscar", "osscar_search"])
@pytest.mark.parametrize("target", ["current", "dense"])
def test_neurons_and_kv_groups_go_by_every_method(tiny: TinyModel, tmp_path: Path, method: str, target: str) -> None:
    step = KV.model_copy(update={"method": method, "target": target})
    groups, heads = tiny.model.config.num_key_value_heads, tiny.model.config.num_attention_heads
    if tiny.model.config.model_type == "qwen2":
        # vLLM 0.32 derives the heads' width from their number there.
        with pytest.raises(UserError, match="kv_remove_frac: '0.5' would give a qwen2 that vLLM cannot load"):
            build_on_data(tiny, step, target=tmp_path / "variant")
        step, groups, heads = step.model_copy(update={"kv_remove_frac": 0}), 2 * groups, 2 * heads
    variant = build_on_data(tiny, step, target=tmp_path / "variant")
    loaded = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32)
    assert loaded.config.num_key_value_heads == groups // 2
    assert loaded.config.num_attention_heads == heads // 2
    assert loaded.config.intermediate_size == 32
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    torch.testing.assert_close(own, logits(loaded)[0], atol=2e-4, rtol=1e-4)


def test_osscar_loses_less_of_a_model_than_random_and_magnitude(tiny_llama: TinyModel, tmp_path: Path) -> None:
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
def test_a_calibrated_quantization_computes_what_the_dense_model_does(
    tiny: TinyModel, tmp_path: Path, method: str, smoothquant: float | None
) -> None:
    step = GPTQ.model_copy(update={"method": method, "smoothquant": smoothquant})
    variant = build_on_data(tiny, step, target=tmp_path / "variant")
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    assert float((own - logits(tiny.model)[0]).norm() / logits(tiny.model).norm()) < 0.08


def test_rounds_end_at_the_same_width_and_call_the_hook_between(tiny_llama: TinyModel, tmp_path: Path) -> None:
    seen = []

    def between(checkpoint: Path) -> Path:
        seen.append(json.loads((checkpoint / "config.json").read_text())["intermediate_size"])
        return checkpoint

    step = Prune(step="prune", mlp_remove_frac=0.5, multiple=2, rounds=3)
    variant = build_on_data(tiny_llama, step, target=tmp_path / "variant", between_rounds=between)
    assert json.loads((variant / "config.json").read_text())["intermediate_size"] == 22
    assert len(seen) == 2
    assert 44 > seen[0] > seen[1] > 22


def test_the_least_influential_blocks_go_and_the_others_close_up(tiny: TinyModel, tmp_path: Path) -> None:
    # A block that adds next to nothing to the hidden states must be the one to go.
    file = tiny.directory / "model.safetensors"
    tensors = load_file(file)
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[f"model.layers.1.{name}"] *= 1e-4
        tensors.pop(f"model.layers.1.{name.replace('weight', 'bias')}", None)
    save_file(tensors, file, metadata={"format": "pt"})
    variant = build_on_data(tiny, PruneDepth(step="prune_depth", num_blocks=1), target=tmp_path / "variant")
    manifest = read_manifest(variant)
    assert manifest is not None
    assert manifest.steps[0].detail["removed_blocks"] == [1]
    after = load_file(variant / "model.safetensors")
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"])
    assert AutoModelForCausalLM.from_pretrained(variant).config.num_hidden_layers == 2


def test_a_search_removes_the_blocks_without_which_the_output_changes_least(tiny: TinyModel, tmp_path: Path) -> None:
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
            # A norm without a weight scales every state to a root mean square of 1.
            tiny.model.model.layers = torch.nn.ModuleList(kept)
            tiny.model.model.norm.weight.data.fill_(1)
            return tiny.model.model(tokens_NT, use_cache=False).last_hidden_state

        with torch.no_grad():
            whole = last_states(layers)
            change = [
                float((last_states(layers[:index] + layers[index + 1 :]) - whole).square().mean())
                for index in range(len(layers))
            ]
        found = done.detail["per_block"][-1]["error_without"]
        torch.testing.assert_close(found, change, atol=1e-4, rtol=1e-3)
        assert done.detail["removed_blocks"] == [change.index(min(change))]
        del layers[change.index(min(change))]


def test_an_interrupted_search_goes_on_with_the_same_errors(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PruneDepth(step="prune_depth", num_blocks=1, method="search")
    left = [2]

    def save_or_stop(*arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save_file(*arguments)

    monkeypatch.setattr(build_module, "save_file", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        build_on_data(tiny_llama, step, target=tmp_path / "variant")
    left[0] = 100
    resumed = read_manifest(build_on_data(tiny_llama, step, target=tmp_path / "variant"))
    whole = read_manifest(build_on_data(tiny_llama, step, target=tmp_path / "whole"))
    assert resumed is not None
    assert whole is not None
    assert resumed.steps[0].detail == whole.steps[0].detail


def weight_bytes(directory: Path) -> int:
    """Bytes of all tensors, without the files' headers."""
    return sum(tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values())


def test_the_dense_models_outputs_are_those_of_the_first_block_itself(tiny: TinyModel, tmp_path: Path) -> None:
    # Nothing has been cut before block 0, so both targets are the same there, biases included.
    step = KV if tiny.model.config.model_type != "qwen2" else KV.model_copy(update={"kv_remove_frac": 0})
    weights = {}
    for target in ("current", "dense"):
        variant = build_on_data(tiny, step.model_copy(update={"target": target}), target=tmp_path / f"to-{target}")
        weights[target] = load_file(variant / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(weights["dense"][name], weights["current"][name], atol=1e-3, rtol=1e-3)
    if step.kv_remove_frac == 0:
        name = "model.layers.0.mlp.down_proj.weight"
        torch.testing.assert_close(weights["dense"][name], weights["current"][name], atol=1e-3, rtol=1e-3)


def test_what_does_not_matter_does_not_make_another_variant(tiny_llama: TinyModel, tmp_path: Path) -> None:
    def build_with(summary: str, seed: int, step: AnyStep) -> Path:
        recipe = Recipe(summary=summary, calibration=Calibrate(seed=seed), steps=(step,))
        return build_variant("tiny", tiny_llama.directory, "own", recipe, tmp_path / step.step)

    drawn = PRUNE.model_copy(update={"method": "random"})
    for step in (QUANTIZE, drawn):
        build_with("one", 0, step)
        build_with("two", 0, step)
    build_with("one", 1, QUANTIZE)
    with pytest.raises(UserError, match="exists and holds something else"):
        build_with("one", 1, drawn)


@pytest.mark.parametrize("keep", [{"parameters": 0.8}, {"bytes": 0.8}, {"speedup": 1.1}])
def test_a_budget_is_met_by_the_finalist_nearest_to_the_dense_model(
    tiny: TinyModel, tmp_path: Path, keep: dict[str, float]
) -> None:
    quantize: tuple[Quantize, ...] = ()
    if "bytes" in keep:
        quantize = (QUANTIZE.model_copy(update={"head": "int8"}),)
        keep = {"bytes": 0.8 * weight_bytes(build_on_data(tiny, *quantize, target=tmp_path / "whole"))}
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
        # Norms and biases, a file's header among them, are counted with what pruning leaves alone.
        assert weight_bytes(variant) == pytest.approx(best["cost"], rel=0.12)
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    assert bool(torch.isfinite(own).all())


def test_an_interrupted_budget_goes_on_with_the_shapes_that_it_had_chosen(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = Prune(step="prune", keep=Keep(speedup=1.1), multiple=4)

    def stop(*_: Any) -> list[float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(build_module, "divergences", stop)
        with pytest.raises(KeyboardInterrupt):
            build_on_data(tiny_llama, prune, target=tmp_path / "variant")
    (chosen,) = tmp_path.glob(".variant.building/step-budget/finalists.json")
    shapes = [one["shape"] for one in json.loads(chosen.read_text())["finalists"]]
    monkeypatch.setattr(budget.Budget, "shapes", stop)  # a speed measured anew might rank others
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


def test_a_budget_out_of_reach_and_one_that_is_met_already_are_refused(tiny_llama: TinyModel, tmp_path: Path) -> None:
    for share, problem in ((0.01, "out of reach"), (1.0, "met by the model as it is")):
        prune = Prune(step="prune", keep=Keep(parameters=share), multiple=4)
        with pytest.raises(UserError, match=f"keep: 'parameters = .*{problem}"):
            build_on_data(tiny_llama, prune, target=tmp_path / "variant")
    assert not list(tmp_path.glob(".variant*"))


def test_a_calibration_file_that_changed_is_not_the_same_build(tiny_llama: TinyModel, tmp_path: Path) -> None:
    target = tmp_path / "variant"
    assert build_on_data(tiny_llama, GPTQ, target=target) == build_on_data(tiny_llama, GPTQ, target=target)
    recipe = Recipe(
        summary="", steps=(GPTQ,), calibration=Calibrate(source=ids_file(tmp_path), num_samples=6, sequence_length=16)
    )
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [3] * 200}))
    with pytest.raises(UserError, match="exists and holds something else"):
        build_variant("tiny", tiny_llama.directory, "own", recipe, target)


def test_the_worst_layers_stay_as_they_were(tiny_llama: TinyModel, tmp_path: Path) -> None:
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


def test_a_layer_kept_beside_a_smoothed_norm_is_smoothed_with_it(tiny: TinyModel, tmp_path: Path) -> None:
    step = GPTQ.model_copy(update={"smoothquant": 0.8, "keep_worst": 11})
    variant = build_on_data(tiny, step, target=tmp_path / "variant")
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    # All but one fused layer of twelve is dense: next to nothing may be lost.
    assert float((own - logits(tiny.model)[0]).norm() / logits(tiny.model).norm()) < 0.03


class _KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("die_at", [1, 3, 4])
def test_an_interrupted_build_resumes_to_the_same_bytes(
    tiny_llama: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    die_at: int,
) -> None:
    whole = build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "whole")
    saved, calls = safetensors.torch.save_file, iter(range(100))

    def save_or_die(*arguments: Any) -> None:
        if next(calls) == die_at:
            raise _KilledError
        saved(*arguments)

    monkeypatch.setattr(build_module, "save_file", save_or_die)
    with pytest.raises(_KilledError):
        build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "variant")
    assert not (tmp_path / "variant").exists()
    capsys.readouterr()
    resumed = build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "variant")
    if die_at != 3:  # at 3 the second step had not begun
        assert "resumed after block 1 of 3" in capsys.readouterr().err
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert not list(tmp_path.glob(".variant*"))


@pytest.mark.parametrize("file", ["done.json", "state.json"])
def test_a_build_killed_just_before_a_record_is_written_resumes(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    whole = build_on_data(tiny_llama, KV, target=tmp_path / "whole")

    def write_or_die(path: Path, text: str) -> None:
        if path.name == file:
            raise _KilledError
        write_atomically(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(build_module, "write_atomically", write_or_die)
        with pytest.raises(_KilledError):
            build_on_data(tiny_llama, KV, target=tmp_path / "variant")
    resumed = build_on_data(tiny_llama, KV, target=tmp_path / "variant")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_work_of_another_recipe_is_not_resumed(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        calls = iter(range(100))
        saved = safetensors.torch.save_file

        def save_or_die(*arguments: Any) -> None:
            if next(calls) == 2:
                raise _KilledError
            saved(*arguments)

        patched.setattr(build_module, "save_file", save_or_die)
        with pytest.raises(_KilledError):
            build_on_data(tiny_llama, KV, target=tmp_path / "variant")
    other = build_on_data(tiny_llama, GPTQ, target=tmp_path / "variant")
    assert json.loads((other / "config.json").read_text())["intermediate_size"] == 44


def test_sizes_that_do_not_fit_are_refused_before_any_work(tiny_llama: TinyModel, tmp_path: Path) -> None:
    for step, message in (
        (Prune(step="prune", kv_remove_frac=0.9), "kv_remove_frac: '0.9' leaves 0 of 2 KV groups"),
        (Prune(step="prune", mlp_remove_frac=0.01, multiple=4), "removes nothing of 44"),
        (PruneDepth(step="prune_depth", num_blocks=3), "num_blocks: '3' leaves none of 3 blocks"),
        (Quantize(step="quantize", format="w8a8", group_size=32), "group_size: '32' is not possible in w8a8"),
        (Quantize(step="quantize", format="w8a8", symmetric=False), "symmetric: 'False' is not possible"),
        (Quantize(step="quantize", format="w8a8", keep_worst=12), "keep_worst: '12' keeps all 12"),
    ):
        with pytest.raises(UserError, match=message):
            build_on_data(tiny_llama, step, target=tmp_path / "out" / "variant")
    assert not (tmp_path / "out").exists()
