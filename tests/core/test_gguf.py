"""GGUF files as llama.cpp writes them: their quantizations, and an output layer of their own or the embedding's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimserve.core.model import resolve_model
from slimserve.core.model_config import read_config
from slimserve.core.variant import read_manifest

# Blocks of K-quants have 256 values, so all sizes are multiples of it.
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 256, 512, 4, 2, 64, 2, 320
_HALVES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q8_0: (0,)}
"""Places of the 16-bit scales in a block, in bytes."""
_MIXES = {
    "Q4_K_M": (Kind.Q4_K, Kind.Q6_K),
    "Q5_K_M": (Kind.Q5_K, Kind.Q6_K),
    "Q8_0": (Kind.Q8_0, Kind.Q8_0),
    "F16": (Kind.F16, Kind.F16),
}
"""Kinds of most tensors, and of those that lose most: values, the down projection and the output layer."""
_NAMES = {
    "attn_q": ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
    "attn_k": ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
    "ffn_up": ("mlp.up_proj", INTERMEDIATE, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, INTERMEDIATE),
}
"""Name in transformers, outputs and inputs of the layers of a block."""

Floats = NDArray[np.float32]


def random_tensor(draw: np.random.Generator, kind: Kind, rows: int, columns: int) -> NDArray[np.generic]:
    """Return a tensor as a file holds it: float16, or blocks of random bytes with small scales."""
    if kind == Kind.F16:
        return (0.05 * draw.standard_normal((rows, columns))).astype(np.float16)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (rows * columns // block_size, block_bytes), dtype=np.uint8)
    for place in _HALVES[kind]:
        scales = draw.uniform(1e-5, 1e-4, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def in_order_of_transformers(weight: Floats, num_heads: int) -> Floats:
    """Undo llama.cpp's order of queries and keys, which keeps the two halves of a rotation beside each other."""
    return weight.reshape(num_heads, HEAD_DIM // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, mix: str, has_output: bool) -> dict[str, Floats]:
    """Write a random Llama, and return its tensors as transformers names and orders them."""
    draw = np.random.default_rng(7)
    most, sensitive = _MIXES[mix]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *(chr(256 + number) for number in range(VOCABULARY - 2)), "Āā"])
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["Ā ā"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    expected: dict[str, Floats] = {}

    def add(name: str, ours: str, kind: Kind, rows: int, columns: int) -> None:
        stored = random_tensor(draw, kind, rows, columns)
        writer.add_tensor(name, stored, raw_dtype=kind)
        expected[ours] = gguf.dequantize(stored, kind).reshape(rows, columns)

    add("token_embd.weight", "model.embed_tokens.weight", most, VOCABULARY, HIDDEN)
    if has_output:
        add("output.weight", "lm_head.weight", sensitive, VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name, (ours, rows, columns) in _NAMES.items():
            kind = sensitive if name in {"attn_v", "ffn_down"} else most
            add(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{ours}.weight", kind, rows, columns)
        for name, ours in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            norm = draw.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
            expected[f"model.layers.{layer}.{ours}.weight"] = norm
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            expected[key] = in_order_of_transformers(expected[key], heads)
    expected["model.norm.weight"] = norm = draw.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("has_output", [False, True])
@pytest.mark.parametrize("mix", _MIXES)
def test_a_gguf_file_is_unpacked_to_its_values_in_bfloat16(
    mix: str, has_output: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "cache"))
    expected = write_gguf(tmp_path / f"model.{mix}.gguf", mix, has_output)
    directory = resolve_model(str(tmp_path / f"model.{mix}.gguf"))
    manifest = read_manifest(directory)
    assert manifest is not None
    assert manifest.base.note == f"dequantized {mix}"
    assert read_config(directory)["tie_word_embeddings"] == (not has_output)
    tensors = load_file(directory / "model.safetensors")
    assert set(tensors) - {"lm_head.weight"} == set(expected) - {"lm_head.weight"}
    for name, values in expected.items():
        torch.testing.assert_close(tensors[name], torch.from_numpy(values).bfloat16(), rtol=0, atol=0, msg=name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    output = expected["lm_head.weight" if has_output else "model.embed_tokens.weight"]
    torch.testing.assert_close(model.lm_head.weight.detach(), torch.from_numpy(output).bfloat16().float())
    assert AutoTokenizer.from_pretrained(directory).convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "Ā"]
