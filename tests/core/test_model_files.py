"""Tests of the rule for a model's files, on folders as they lie on hubs and after trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimserve.core.errors import UserError
from slimserve.core.model import resolve_model
from slimserve.core.model_files import companion_files, copy_companions, model_hash, read_tensors, weight_files

EMBEDDING = "model.embed_tokens.weight"
CONFIG = {"model_type": "llama", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with weights of one tensor, a config and a tokenizer."""
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    save({EMBEDDING: torch.ones(5, 4)}, folder / "model.safetensors")
    return folder


def shard(model: Path) -> None:
    """Divide the weights of a model into two shards with an index."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save({EMBEDDING: torch.ones(5, 4)}, model / names[0])
    save({"model.norm.weight": torch.ones(4)}, model / names[1])
    weight_map = {EMBEDDING: names[0], "model.norm.weight": names[1]}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()


SPARE_WEIGHTS = [
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "model.bf16.safetensors",
    "model-00001-of-00004.safetensors",
    "original.safetensors",
]


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("spare", SPARE_WEIGHTS)
def test_other_weight_files_beside_the_model_do_not_count_and_no_loader_sees_them(
    model: Path, spare: str, is_sharded: bool
) -> None:
    if is_sharded:
        shard(model)
    expected = {file.name for file in weight_files(model)}
    before = model_hash(model)
    save({EMBEDDING: torch.zeros(7, 4)}, model / spare)
    directory = resolve_model(str(model))
    # vLLM reads every .safetensors file of a folder, unless an index names some.
    assert {file.name for file in directory.glob("*.safetensors")} == expected
    assert torch.equal(load_file(read_tensors(directory)[EMBEDDING].file)[EMBEDDING], torch.ones(5, 4))
    assert model_hash(directory) == before


def test_without_spare_weights_the_folder_itself_is_used(model: Path) -> None:
    assert resolve_model(str(model)) == model


def test_an_index_beside_model_safetensors_does_not_count(model: Path) -> None:
    """transformers looks for model.safetensors first, vLLM for the index, so vLLM must not see the index."""
    index = {"metadata": {}, "weight_map": {EMBEDDING: "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(model)] == ["model.safetensors"]
    directory = resolve_model(str(model))
    assert not (directory / "model.safetensors.index.json").exists()
    assert (directory / "tokenizer.json").read_text() == "{}"


def test_a_folder_of_links_follows_changes_of_the_model(model: Path) -> None:
    save({EMBEDDING: torch.zeros(7, 4)}, model / "adapter_model.safetensors")
    first = resolve_model(str(model))
    (model / "chat_template.jinja").write_text("new")
    assert resolve_model(str(model)) == first
    assert (first / "chat_template.jinja").read_text() == "new"


UNREADABLE = {
    "pytorch_model.bin": r"pickle files \(pytorch_model.bin\).*ForCausalLM as M; M.from_pretrained\('.*model'\)",
    "pytorch_model-00001-of-00002.bin": "in pickle files",
    "adapter_model.safetensors": r"is an adapter .* merge it, run: python -c .*merge_and_unload\(\)",
    "adapter_config.json": "is an adapter",
    "model-00001-of-00002.safetensors": "has model-00001-of-00002.safetensors but no model.safetensors.index.json",
    "consolidated.safetensors": "layout of the model's authors only",
    "consolidated.00.pth": "layout of the model's authors only",
    "model.Q4_K_M.gguf": "give the path of the file",
    "model.fp16.safetensors": "no loader looks for model.fp16.safetensors",
    "flax_model.msgpack": "has no .safetensors weights, only flax_model.msgpack",
    "tf_model.h5": "has no .safetensors weights, only tf_model.h5",
    "model.onnx": "has no .safetensors weights, only model.onnx",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_folder_with_other_weights_only_is_refused_with_the_conversion(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=UNREADABLE[name]):
        resolve_model(str(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight_map": {"a": "b.safetensors"}}', "KeyError.'metadata'"),
        ('{"metadata": {}, "weight_map": {}}', "names no files"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "names 3"),
        ('{"metadata": {}, "weight_map": {"a": "../b.safetensors"}}', "names '../b.safetensors'"),
        ('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "has no b.safetensors, which its index names"),
    ],
)
def test_a_broken_index_is_named(model: Path, text: str, message: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve_model(str(model))


def test_a_git_lfs_pointer_is_named(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(UserError, match="is a Git LFS pointer; run: git lfs pull"):
        resolve_model(str(model))


@pytest.mark.parametrize("name", ["inv_freq", "cos_cached", "sin_cached"])
def test_tensors_that_loaders_derive_are_not_part_of_a_model(model: Path, name: str) -> None:
    spare = f"model.layers.0.self_attn.rotary_emb.{name}"
    save({EMBEDDING: torch.ones(5, 4), spare: torch.ones(2)}, model / "model.safetensors")
    assert list(read_tensors(model)) == [EMBEDDING]


def test_the_index_decides_which_of_two_tensors_of_one_name_counts(model: Path) -> None:
    shard(model)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save({"model.norm.weight": torch.ones(4), EMBEDDING: torch.ones(9, 4)}, model / names[1])
    assert read_tensors(model)[EMBEDDING].shape == (5, 4)
    save({"model.norm.weight": torch.ones(3), EMBEDDING: torch.ones(5, 4)}, model / names[0])
    assert read_tensors(model)["model.norm.weight"].shape == (4,)


TAKEN = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "LICENSE",
    "slimserve_rerank.toml",
]
LEFT = [
    "flax_model.msgpack",
    "tf_model.h5",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.onnx",
    "onnx/model.onnx",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "original/params.json",
    "model.gguf",
    "coreml/model.mlpackage",
    "runs/events.out.tfevents",
    ".gitattributes",
    "slimserve.json",
    "quantize_config.json",
]


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_companions_are_those_of_a_list_with_folders(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("content")
    output = tmp_path / "output"
    output.mkdir()
    copy_companions(model, output)
    assert (output / name).is_file() == (name in TAKEN)
    assert (model / name in companion_files(model)) == (name in TAKEN)
