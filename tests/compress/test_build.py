import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimserve.compress import artifacts, checkpoint
from slimserve.compress.build import build_variant
from slimserve.compress.calibration import document_ids
from slimserve.compress.prune import choose_kept, peak_magnitude
from slimserve.compress.recipe import AnyStep, Calibrate, Prune, PruneDepth, Quantize, Recipe
from slimserve.core.errors import UserError
from slimserve.core.storage import write_atomically
from slimserve.core.tokenizer import load_tokenizer
from slimserve.core.variant import read_manifest
from slimserve.workloads import load_workload

from .conftest import GPTQ, KV, QUANTIZE, TinyModel, build_on_data, ids_file, logits, save_tokenizer

PRUNE = Prune(step="prune", mlp_remove_frac=0.3, multiple=4, method="peak_magnitude")


def build(tiny: TinyModel, *steps: AnyStep, target: Path) -> Path:
    return build_variant("tiny", tiny.directory, "own", Recipe(summary="", steps=steps), target)


def mask_pruned_neurons(model: Any, num_kept: int, sort: bool = False) -> None:
    """Set the consumer columns of the neurons that PRUNE removes to zero; `sort` first moves them to the end."""
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
    """Fake-quantize each weight by the definition of INT8, as a slow reference."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = torch.round(module.weight.data / scale) * scale


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
    # Activations are rounded as well, dynamically per token, so the logits agree only roughly.
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
    assert all(0 < block["mlp.down_proj"]["removed_score_frac"] < 0.3 for block in prune.detail["per_block"])
    errors = [block["output_error"] for block in quantize.detail["per_block"]]
    assert [len(block) for block in errors] == [7, 7, 7]
    assert all(0 < value < 0.01 for block in errors for value in block.values())
    assert manifest.peak_rss_bytes is not None


def test_shards_are_read_and_written(tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_file(build(tiny_llama, PRUNE, target=tmp_path / "reference") / "model.safetensors")
    sharded = TinyModel(tmp_path / "sharded", tiny_llama.model)
    tiny_llama.model.save_pretrained(sharded.directory, max_shard_size="20KB")
    save_tokenizer(sharded.directory)
    assert len(list(sharded.directory.glob("*.safetensors"))) > 1
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 20_000)
    variant = build(sharded, PRUNE, target=tmp_path / "variant")
    assert len(list(variant.glob("model-*-of-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(variant).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in reference.items())


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


def test_the_cache_distinguishes_recipes_and_models(
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
    with pytest.raises(UserError, match="'model.layers.1.mlp.up_proj.weight' contains NaN or infinity"):
        build(tiny_llama, PRUNE, target=tmp_path / "out" / "variant")
    assert not (tmp_path / "out").exists()


def test_a_missing_block_is_named(tiny_llama: TinyModel, tmp_path: Path) -> None:
    config = json.loads((tiny_llama.directory / "config.json").read_text())
    (tiny_llama.directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match="'model.layers.3.' is missing"):
        build(tiny_llama, PRUNE, target=tmp_path / "variant")


def test_a_model_that_is_no_decoder_is_refused(tiny_llama: TinyModel, tmp_path: Path) -> None:
    config = json.loads((tiny_llama.directory / "config.json").read_text())
    (tiny_llama.directory / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(UserError, match="'t5' is not a supported model family: transformers has no decoder-only model"):
        build(tiny_llama, PRUNE, target=tmp_path / "variant")


def test_a_quantized_model_is_not_compressed_again(tiny_llama: TinyModel, tmp_path: Path) -> None:
    variant = build(tiny_llama, QUANTIZE, target=tmp_path / "variant")
    with pytest.raises(UserError, match="is quantized already"):
        build(TinyModel(variant, None), PRUNE, target=tmp_path / "again")


def test_a_pruned_smollm2_equals_the_masked_dense_model(smollm2: Path, tmp_path: Path) -> None:
    """BF16 logits are equal if the masked model sums its neurons in the same order.

    Logits near 40 are 0.25 apart in BF16, and masking in place changes the order of the sums. The neurons of the masked
    model are therefore sorted first, which does not change what the model computes.
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


@torch.no_grad()
def test_a_smollm2_without_a_kv_group_keeps_its_attention_sinks(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 writes a norm of thousands into the first token of a sequence, to which later tokens attend.

    Calibrated on 8 sequences with 8 first tokens alone, the cut model loses that norm for 24 of these 100 first tokens.
    """
    tokenizer = load_tokenizer(smollm2)
    prompts = [load_workload(name).make_prompts("quality", 20) for name in ("recommendation", "reasoning")]
    texts = [document_ids(tokenizer, prompt) for prompt in itertools.chain(*prompts)]
    frequent = [token for token, _ in Counter(itertools.chain(*texts)).most_common(100)]
    sequences = torch.tensor([[token, *texts[0][100:115]] for token in frequent])

    def first_norms(directory: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        states = model.model(sequences, output_hidden_states=True).hidden_states
        return states[len(states) // 2][:, 0].norm(dim=-1)

    step = Prune(step="prune", kv_remove_frac=1 / 3)
    recipe = Recipe(summary="", calibration=Calibrate(source="mixed", num_samples=8), steps=(step,))
    variant = build_variant("smollm2", smollm2, "kv", recipe, tmp_path / "variant")
    is_broken = first_norms(variant) < first_norms(smollm2) / 2
    assert float(is_broken.float().mean()) < 0.15


def test_settings_without_effect_do_not_make_another_variant(tiny_llama: TinyModel, tmp_path: Path) -> None:
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


def test_a_calibration_file_that_changed_is_not_the_same_build(tiny_llama: TinyModel, tmp_path: Path) -> None:
    target = tmp_path / "variant"
    assert build_on_data(tiny_llama, GPTQ, target=target) == build_on_data(tiny_llama, GPTQ, target=target)
    recipe = Recipe(
        summary="", steps=(GPTQ,), calibration=Calibrate(source=ids_file(tmp_path), num_samples=6, sequence_length=16)
    )
    assert build_variant("tiny", tiny_llama.directory, "own", recipe, target) == target, "the folder does not matter"
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [3] * 200}))
    with pytest.raises(UserError, match="exists and holds something else"):
        build_variant("tiny", tiny_llama.directory, "own", recipe, target)


class _KilledError(BaseException):
    """Stands for a kill; no handler for errors catches it."""


@pytest.mark.parametrize("die_at", [1, 3, 4])
def test_an_interrupted_build_resumes_to_the_same_bytes(
    tiny_llama: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    die_at: int,
) -> None:
    reference = build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "reference")
    saved, calls = safetensors.torch.save_file, iter(range(100))

    def save_or_die(*arguments: Any) -> None:
        if next(calls) == die_at:
            raise _KilledError
        saved(*arguments)

    monkeypatch.setattr(artifacts, "save_file", save_or_die)
    with pytest.raises(_KilledError):
        build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "variant")
    assert not (tmp_path / "variant").exists()
    capsys.readouterr()
    resumed = build_on_data(tiny_llama, KV, GPTQ, target=tmp_path / "variant")
    if die_at != 3:  # at 3 the second step had not begun
        assert "resumed after block 1 of 3" in capsys.readouterr().err
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (reference / name).read_bytes()
    assert not list(tmp_path.glob(".variant*"))


@pytest.mark.parametrize("file", ["done.json", "state.json"])
def test_a_build_killed_just_before_a_record_is_written_resumes(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    reference = build_on_data(tiny_llama, KV, target=tmp_path / "reference")

    def write_or_die(path: Path, text: str) -> None:
        if path.name == file:
            raise _KilledError
        write_atomically(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "write_atomically", write_or_die)
        with pytest.raises(_KilledError):
            build_on_data(tiny_llama, KV, target=tmp_path / "variant")
    resumed = build_on_data(tiny_llama, KV, target=tmp_path / "variant")
    assert (resumed / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


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

        patched.setattr(artifacts, "save_file", save_or_die)
        with pytest.raises(_KilledError):
            build_on_data(tiny_llama, KV, target=tmp_path / "variant")
    other = build_on_data(tiny_llama, GPTQ, target=tmp_path / "variant")
    assert json.loads((other / "config.json").read_text())["intermediate_size"] == 44


def test_sizes_that_do_not_fit_are_rejected_before_any_work(tiny_llama: TinyModel, tmp_path: Path) -> None:
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
