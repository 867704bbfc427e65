"""Tests that a format which a user adds as one object works in recipes, builds, the reference and `inspect`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slimserve.compress.formats import register_format
from slimserve.compress.formats.compressed_tensors import CompressedTensorsFormat
from slimserve.compress.inspect import describe_variant
from slimserve.compress.recipe import Keep, Prune, load_recipe
from slimserve.compress.reference import reference_logits
from slimserve.core.hardware import Hardware

from .conftest import INPUT_IDS, TinyModel, build_on_data, logits, weight_bytes


class _W8A16(CompressedTensorsFormat):
    """INT8 weights with one scale per output feature; inputs stay in 16 bits."""

    name = "w8a16"
    layout = "int-quantized"
    num_bits = 8

    def explain_cpu_kernel(self, hardware: Hardware, config: Mapping[str, Any]) -> str:
        return "no kernel at all"


register_format(_W8A16())


def test_a_registered_format_is_built_read_back_and_explained(tiny: TinyModel, tmp_path: Path) -> None:
    _, recipe = load_recipe("w8a8", ["quantize.format=w8a16"])
    variant = build_on_data(tiny, *recipe.steps, target=tmp_path / "variant")
    dense = logits(tiny.model)[0]
    for name, module in tiny.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tensors = load_file(variant / "model.safetensors")
            module.weight.data = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
    own = next(iter(reference_logits(variant, [INPUT_IDS[0]])))
    torch.testing.assert_close(own, logits(tiny.model)[0], atol=2e-4, rtol=1e-4)
    assert not torch.equal(own, dense)
    text = "\n".join(describe_variant(variant))
    assert "format w8a16, method gptq" in text
    assert "w8a16: " in text


def test_the_budget_search_counts_the_bytes_of_a_registered_format(tiny_llama: TinyModel, tmp_path: Path) -> None:
    _, recipe = load_recipe("w8a8", ["quantize.format=w8a16"])
    quantized_bytes = weight_bytes(build_on_data(tiny_llama, *recipe.steps, target=tmp_path / "quantized"))
    prune = Prune(step="prune", keep=Keep(bytes=0.8 * quantized_bytes), multiple=4)
    variant = build_on_data(tiny_llama, prune, *recipe.steps, target=tmp_path / "variant")
    assert weight_bytes(variant) <= 0.8 * quantized_bytes
