"""Tests of every family: forward pass, cut equals masked, and outcomes that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimserve.compress.decoder import decoder_of
from slimserve.compress.prune import choose_kept, peak_magnitude
from slimserve.compress.recipe import AnyStep, Prune, PruneDepth, Quantize
from slimserve.compress.reference import reference_logits
from slimserve.compress.roles import KINDS, find_role, sublayer_of
from slimserve.core.errors import UserError
from slimserve.core.model_config import read_decoder_config
from slimserve.core.variant import read_manifest

from .conftest import INPUT_IDS, TinyModel, build_on_data, make_tiny
from .families import FAMILIES, table, tiny_config

GPTQ = Quantize(step="quantize", format="w8a8", method="gptq")
_models: dict[str, TinyModel] = {}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    name: str = request.param
    if name not in _models:
        _models[name] = make_tiny(tiny_config(name), tmp_path_factory.mktemp(name) / "dense")
    return name


def outcome(name: str, tmp_path: Path, *steps: AnyStep) -> Path:
    return build_on_data(_models[name], *steps, target=tmp_path / "variant")


def assert_transformers_agrees(directory: Path, limit: float = 2e-4) -> torch.Tensor:
    """Compare our logits of a variant with those of stock transformers; return ours."""
    own_TV = next(iter(reference_logits(directory, [INPUT_IDS[0]])))
    attention = "eager" if "softcapping" in (directory / "config.json").read_text() else "sdpa"
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        expected_TV = loaded(INPUT_IDS).logits[0]
    assert float((own_TV - expected_TV).norm() / expected_TV.norm()) < limit
    return own_TV


def test_the_logits_equal_those_of_transformers(family: str) -> None:
    assert_transformers_agrees(_models[family].directory)


def test_a_quantized_model_stays_near_the_dense_one(family: str, tmp_path: Path) -> None:
    variant = outcome(family, tmp_path, GPTQ)
    dense_TV, own_TV = (
        next(iter(reference_logits(one, [INPUT_IDS[0]]))) for one in (_models[family].directory, variant)
    )
    assert float((own_TV - dense_TV).norm() / dense_TV.norm()) < 0.1
    manifest = read_manifest(variant)
    assert manifest is not None
    experts = [block["experts"] for block in manifest.steps[0].detail["per_block"] if "experts" in block]
    assert bool(experts) == ("experts" in FAMILIES[family].mlp)
    if not experts:
        # transformers rounds activations on a slightly different grid than engines do.
        assert_transformers_agrees(variant, limit=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_equals_the_masked_one_or_is_refused_with_the_reason(
    family: str, tmp_path: Path, kind: Any
) -> None:
    known, model = FAMILIES[family], _models[family]
    step = Prune(
        step="prune",
        method="peak_magnitude",
        multiple=4,
        mlp_remove_frac=0.3 if kind == "mlp" else 0,
        kv_remove_frac=0.5 if kind == "attention" else 0,
    )
    if known.mlp if kind == "mlp" else known.kv:
        with pytest.raises(UserError, match="cannot lose"):
            outcome(family, tmp_path, step)
        return
    variant = outcome(family, tmp_path, step)
    own_TV = assert_transformers_agrees(variant)
    config = read_decoder_config(model.directory)
    role, decoder = find_role(config, kind), decoder_of(config)
    kept = find_role(read_decoder_config(variant), kind).num_units if role.num_units > 2 else 1
    for index in range(config["num_hidden_layers"]):
        sublayer = sublayer_of(decoder, index, kind)
        assert sublayer is not None
        weight_OI = model.model.get_parameter(decoder.block.format(index=index) + f"{role.consumer}.weight")
        peaks_U = peak_magnitude(weight_OI.detach()).reshape(role.num_units, role.columns).amax(1)
        gone_U = torch.ones(role.num_units, dtype=torch.bool)
        gone_U[choose_kept(peaks_U, kept)] = False
        weight_OI.data[:, gone_U.repeat_interleave(role.columns)] = 0
    with torch.no_grad():
        expected_TV = model.model(INPUT_IDS).logits[0]
    del _models[family]  # its weights are changed
    assert float((own_TV - expected_TV).abs().max() / expected_TV.abs().max()) < 1e-3


def test_a_model_without_a_block_equals_one_that_skips_it(family: str, tmp_path: Path) -> None:
    model = _models[family]
    variant = outcome(family, tmp_path, PruneDepth(step="prune_depth", num_blocks=1))
    own_TV = assert_transformers_agrees(variant)
    manifest = read_manifest(variant)
    assert manifest is not None
    (removed,) = manifest.steps[0].detail["removed_blocks"]
    config = read_decoder_config(model.directory)
    layer = model.model.get_submodule(decoder_of(config).block.format(index=removed).rstrip("."))
    returns_tuple = decoder_of(config)._returns_tuple
    layer.forward = lambda x, *_, **__: (x,) if returns_tuple else x
    with torch.no_grad():
        expected_TV = model.model(INPUT_IDS).logits[0]
    del layer.forward
    assert float((own_TV - expected_TV).abs().max() / expected_TV.abs().max()) < 1e-3


def test_the_text_part_of_a_model_of_several_media_is_compressed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from .conftest import save_tokenizer

    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "cache"))
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    config.mm_tokens_per_image = 4
    torch.manual_seed(1)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "media")
    save_tokenizer(tmp_path / "media")
    variant = build_on_data(TinyModel(tmp_path / "media", model), target=tmp_path / "variant")
    assert json.loads((variant / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    own_TV = assert_transformers_agrees(variant)
    with torch.no_grad():
        expected_TV = model(input_ids=INPUT_IDS).logits[0]
    torch.testing.assert_close(own_TV, expected_TV, atol=1e-4, rtol=1e-4)


def test_the_table_in_the_docs_is_the_one_that_these_tests_prove() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "compress.md").read_text(encoding="utf-8")
