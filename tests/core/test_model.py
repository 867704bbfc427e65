import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slimserve.core.errors import UserError
from slimserve.core.model import BUILTIN_MODELS, model_name, resolve_model
from slimserve.core.model_files import model_hash, read_tensors
from slimserve.core.variant import read_manifest


@pytest.fixture
def model_copy(smollm2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smollm2, tmp_path / "model"))


def test_the_builtin_model_is_unpacked_and_says_that_it_was_dequantized(smollm2: Path) -> None:
    manifest = read_manifest(smollm2)
    assert manifest is not None
    assert manifest.base.note == "dequantized Q4_1"
    assert manifest.num_parameters == 134_515_008
    assert read_tensors(smollm2)["model.embed_tokens.weight"].shape == (49152, 576)


def test_the_tuned_model_is_the_builtin_one_plus_its_adapter(smollm2: Path) -> None:
    adapter = BUILTIN_MODELS["smollm2-135m-tuned"].adapter
    assert adapter is not None
    assert sum(file.stat().st_size for file in adapter.iterdir()) <= 4 * 2**20
    tuned = resolve_model("smollm2-135m-tuned")
    manifest = read_manifest(tuned)
    assert manifest is not None
    assert manifest.base.note == "dequantized Q4_1, with a LoRA adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    lora = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.7.mlp.down_proj"
    low, high = (lora[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    base, merged = (load_file(folder / "model.safetensors")[f"{name}.weight"].double() for folder in (smollm2, tuned))
    expected = base + settings["lora_alpha"] / settings["r"] * high @ low
    assert ((merged - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()
    assert (expected - base).abs().max() > 1e-3


def test_a_directory_is_used_as_it_is(model_copy: Path) -> None:
    assert resolve_model(str(model_copy)) == model_copy


def test_a_models_name_is_that_of_its_manifest_or_the_last_part_of_its_path(model_copy: Path, smollm2: Path) -> None:
    assert model_name("whatever", smollm2) == "smollm2-135m-instruct"
    (model_copy / "slimserve.json").unlink()
    assert model_name(f"{model_copy}/", model_copy) == "model"
    assert model_name("org/model-1b", model_copy) == "model-1b"


def test_the_hash_depends_on_the_content_and_not_on_the_directory(model_copy: Path, smollm2: Path) -> None:
    assert model_hash(model_copy) == model_hash(smollm2)
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    assert model_hash(model_copy) != model_hash(smollm2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("no-such-model", "model: 'no-such-model' does not exist; give a Hugging Face directory"),
        ("/no/such/dir", "does not exist"),
        ("no-such.gguf", "is not a file"),
        ("nobody/no-such-model", "neither a local directory nor available from the Hugging Face hub"),
    ],
)
def test_a_model_that_does_not_exist_is_rejected(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_model(argument)


def test_a_broken_gguf_file_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, or so it says")
    with pytest.raises(UserError, match="cannot be unpacked"):
        resolve_model(str(file))


def test_a_directory_without_config_is_rejected(model_copy: Path) -> None:
    (model_copy / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        resolve_model(str(model_copy))


@pytest.mark.parametrize("text", ["{not json", "[]", '{"hidden_size": 3}'])
def test_a_broken_config_is_rejected(model_copy: Path, text: str) -> None:
    (model_copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^config.json: "):
        resolve_model(str(model_copy))


def test_weights_that_are_cut_short_are_rejected(model_copy: Path) -> None:
    file = model_copy / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1000)
    with pytest.raises(UserError, match="corrupt or cut short"):
        resolve_model(str(model_copy))


def test_garbage_in_place_of_weights_is_rejected(model_copy: Path) -> None:
    (model_copy / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match="corrupt or cut short"):
        resolve_model(str(model_copy))


def test_a_missing_shard_is_named(model_copy: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_copy / "model.safetensors").rename(model_copy / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="has no model-00002-of-00002.safetensors"):
        resolve_model(str(model_copy))


def test_a_model_without_tokenizer_is_rejected(model_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_copy / name).unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        resolve_model(str(model_copy))
