"""Tests of bitsandbytes layers on disk against the library, transformers and the definitions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from slimserve.compress.formats.bnb import INT8_BNB, NF4
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware

from .conftest import make_tiny


def weight(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()


def nf4_by_hand(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Decode by the definition: two codes per byte, high nibble first; 64 codes per scale; 256 scales per block."""
    text = bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist())
    absmax = tensors["weight.nested_quant_map"][tensors["weight.absmax"].long()]
    absmax = absmax * tensors["weight.nested_absmax"].repeat_interleave(256)[: len(absmax)]
    absmax = absmax + json.loads(text)["nested_offset"]
    data = tensors["weight"].flatten()
    codes = torch.stack([data >> 4, data & 15], dim=1).flatten()[: shape[0] * shape[1]].long()
    return (tensors["weight.quant_map"][codes] * absmax.repeat_interleave(64)[: len(codes)]).view(shape)


@pytest.mark.parametrize("shape", [(5, 64), (7, 192), (300, 64)])
def test_nf4_follows_its_definition(shape: tuple[int, int]) -> None:
    tensors = NF4.pack_layer(weight(*shape))
    expected = nf4_by_hand(tensors, shape)
    assert torch.allclose(NF4.unpack_layer(tensors), expected, atol=0.02)
    assert (expected - weight(*shape).float()).norm() < 0.12 * weight(*shape).float().norm()


def test_int8_follows_its_definition() -> None:
    tensors = INT8_BNB.pack_layer(weight(5, 13))
    assert torch.equal(tensors["SCB"], weight(5, 13).float().abs().amax(dim=1))
    expected = torch.round(weight(5, 13).float() / tensors["SCB"][:, None] * 127)
    assert torch.equal(tensors["weight"].float(), expected)
    assert torch.allclose(INT8_BNB.unpack_layer(tensors), expected * tensors["SCB"][:, None] / 127)


def test_the_tensors_are_those_that_the_librarys_layers_save() -> None:
    four = Linear4bit(64, 5, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    four.weight = Params4bit(weight(5, 64), False, quant_type="nf4", compress_statistics=True, module=four)
    eight = Linear8bitLt(64, 5, bias=False, has_fp16_weights=False)
    eight.weight = Int8Params(weight(5, 64), requires_grad=False, has_fp16_weights=False)
    for layer, quant_format in ((four, NF4), (eight, INT8_BNB)):
        expected, packed = layer.to("cpu").state_dict(), quant_format.pack_layer(weight(5, 64))
        assert packed.keys() == expected.keys()
        for suffix, tensor in expected.items():
            assert packed[suffix].dtype == tensor.dtype, suffix
            assert torch.equal(packed[suffix], tensor), suffix


@pytest.mark.parametrize("inputs", [48, 80, 96, 1520])
def test_nf4_widths_that_bitsandbytes_decodes_wrongly_are_rejected(inputs: int) -> None:
    with pytest.raises(UserError, match="no multiple of 64"):
        NF4.pack_layer(weight(4, inputs))
    assert INT8_BNB.pack_layer(weight(4, inputs))


def test_nf4_of_another_writer_is_decoded_correctly_where_bitsandbytes_decodes_it_wrongly() -> None:
    """This fails once bitsandbytes corrects its CPU code; then `pack_layer` can accept these widths."""
    codes, state = functional.quantize_4bit(weight(6, 96), blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors = {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    expected = nf4_by_hand(tensors, (6, 96))
    assert torch.allclose(NF4.unpack_layer(tensors), expected, atol=0.02)
    if "avx512f" in probe_hardware().isa:  # the fault is in the code for AVX-512; other CPUs decode rightly
        assert not torch.allclose(functional.dequantize_4bit(codes, state).float(), expected, atol=0.1)


def test_int8_rejects_weights_outside_the_range_of_float16() -> None:
    with pytest.raises(UserError, match="beyond float16"):
        INT8_BNB.pack_layer(torch.full((2, 64), 1e5))


def test_inputs_are_rounded_as_llm_int8_rounds_them() -> None:
    inputs = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(2))
    inputs[0, 2, 5], inputs[2, 6, 40], inputs[1, 1] = 90.0, -6.5, 0.0
    layer = Linear8bitLt(64, 5, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = Int8Params(weight(5, 64), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    with torch.inference_mode():
        expected = layer(inputs.half()).float()
    dequantized = INT8_BNB.unpack_layer(INT8_BNB.pack_layer(weight(5, 64)))
    ours = torch.nn.functional.linear(INT8_BNB.round_inputs(inputs, {}), dequantized)
    scale = expected.abs().amax(dim=-1)
    is_compared = torch.ones(3, 7, dtype=torch.bool)
    is_compared[1, 1] = False  # bitsandbytes divides a token of zeros by zero
    assert float(((ours - expected).abs().amax(dim=-1) / scale)[is_compared].max()) < 2e-3
    plain = torch.nn.functional.linear(inputs, dequantized)
    assert float(((plain - expected).abs().amax(dim=-1) / scale)[is_compared].max()) > 4e-3
    assert torch.equal(ours[1, 1], torch.zeros(5))


def test_fused_layers_are_left_unquantized_if_all_their_parts_are() -> None:
    attention = [f"model.layers.2.self_attn.{part}_proj" for part in "qkv"]
    mlp = ["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"]
    skipped = NF4.quantization_config(None, ["lm_head", *attention, *mlp])["llm_int8_skip_modules"]
    added = {"model.layers.2.self_attn.qkv_proj", "model.layers.3.mlp.gate_up_proj"}
    assert set(skipped) == {"lm_head", *attention, *mlp} | added
    assert INT8_BNB.quantization_config(None, ["lm_head", *attention[:2]])["llm_int8_skip_modules"] == [
        "lm_head",
        *attention[:2],
    ]


@pytest.mark.parametrize("quant_format", [NF4, INT8_BNB], ids=lambda one: one.name)
def test_transformers_loads_the_layers_and_computes_the_intended_weights(quant_format: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    dense = make_tiny(LlamaConfig(**sizes, **heads, tie_word_embeddings=True), tmp_path / "dense")
    tensors, meant = {}, dense.model.float()
    for key, tensor in load_file(dense.directory / "model.safetensors").items():
        layer = key.removesuffix(".weight")
        if not layer.endswith("_proj"):
            tensors[key] = tensor.bfloat16()
            continue
        packed = quant_format.pack_layer(tensor)
        tensors.update({f"{layer}.{suffix}": part for suffix, part in packed.items()})
        meant.get_submodule(layer).weight.data = quant_format.unpack_layer(packed)
    target = tmp_path / "bnb"
    target.mkdir()
    config = json.loads((dense.directory / "config.json").read_text())
    (target / "config.json").write_text(
        json.dumps(config | {"quantization_config": quant_format.quantization_config(None)})
    )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    expected_type = Linear4bit if quant_format is NF4 else Linear8bitLt
    assert isinstance(loaded.model.layers[1].mlp.down_proj, expected_type)
    tokens = torch.arange(1, 12)[None]
    with torch.inference_mode():
        ours, theirs = meant(tokens).logits, loaded(tokens).logits.float()
    assert (ours - theirs).norm() < 0.05 * ours.norm()
