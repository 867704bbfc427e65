"""Tests that everything a variant will need is checked before the first step, with the true cause in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slimserve.compress import build
from slimserve.compress.build import build_variant
from slimserve.compress.decoder import decoder_of
from slimserve.compress.preflight import needed_bytes
from slimserve.compress.recipe import Prune, Recipe
from slimserve.core import storage
from slimserve.core.errors import UserError
from slimserve.core.model import model_name, resolve_model
from slimserve.core.model_config import read_decoder_config
from slimserve.core.model_files import read_tensors

from .conftest import GPTQ, QUANTIZE, TinyModel, build_on_data

PRUNE = Prune(step="prune", mlp_remove_frac=0.3, multiple=4, method="peak_magnitude")
Tensors = dict[str, torch.Tensor]


def set_config(tiny: TinyModel, **changes: Any) -> None:
    file = tiny.directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def set_tensors(tiny: TinyModel, change: Callable[[Tensors], Tensors]) -> None:
    file = tiny.directory / "model.safetensors"
    save_file({name: one.clone() for name, one in change(load_file(file)).items()}, file, {"format": "pt"})


def make(tiny: TinyModel, target: Path, *steps: Any, model: str = "tiny") -> Path:
    return build_variant(model, resolve_model(str(tiny.directory)), "own", Recipe(summary="", steps=steps), target)


def test_the_expected_tensors_are_those_that_transformers_makes(tiny: TinyModel) -> None:
    config = read_decoder_config(tiny.directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny.directory))
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del stored["lm_head.weight"]
    assert decoder_of(config).shapes == stored


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"tie_word_embeddings": False}, "has tie_word_embeddings false, but the weights have no lm_head.weight"),
    ({"vocab_size": 60}, "has vocab_size 60, but model.embed_tokens.weight has 67 rows"),
    ({"vocab_size": 70}, "has vocab_size 70, but model.embed_tokens.weight has 67 rows"),
    ({"hidden_size": 30}, "has 24 instead of 30, the size by hidden_size"),
    ({"intermediate_size": 48}, "has 44 instead of 48, the size by intermediate_size"),
    ({"num_key_value_heads": 3}, "has 8 instead of 12, the size by num_key_value_heads and head_dim"),
    ({"num_key_value_heads": 4}, "which does not divide num_attention_heads 6"),
    ({"head_dim": 8}, "has 24 instead of 48, the size by num_attention_heads and head_dim"),
    ({"num_hidden_layers": 4}, "'model.layers.3.' is missing"),
    ({"attention_bias": True}, "_proj.bias' is missing"),
    ({"max_position_embeddings": None}, "has max_position_embeddings null"),
    ({"hidden_act": "nonsense"}, "describes no model that transformers can build"),
    ({"dtype": 67}, "has the dtype 67, which is no float type"),
    ({"sliding_window": {}}, "has sliding_window {}, which is neither a whole number nor null"),
    ({"text_config": {"hidden_size": 24}}, "has a text_config of no decoder-only model"),
    ({"rms_norm_eps": -1e9}, "does not let the first block be computed"),
    (
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        "describes no model that transformers can build",
    ),
    ({"architectures": ["LlamaForSequenceClassification"]}, "would not load it as a model that generates text"),
    ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_a_config_that_does_not_fit_the_tensors_is_refused_before_any_work(
    tiny_llama: TinyModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    set_config(tiny_llama, **changes)
    with pytest.raises(UserError, match=message) as caught:
        make(tiny_llama, tmp_path / "out" / "variant", PRUNE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


NORM = "model.norm.weight"
TENSORS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (lambda all_: {name: one for name, one in all_.items() if name != NORM}, f"'{NORM}' is missing"),
    (lambda all_: {name.removeprefix("model."): one for name, one in all_.items()}, "names lack the prefix 'model.'"),
    (lambda all_: {f"_orig_mod.{name}": one for name, one in all_.items()}, "the names begin with '_orig_mod.'"),
    (lambda all_: {f"module.{name}": one for name, one in all_.items()}, "the names begin with 'module.'"),
    (lambda all_: {**all_, NORM: torch.ones(23)}, "has 23 instead of 24, the size by hidden_size"),
    (lambda all_: {**all_, NORM: torch.ones(1, 24)}, r"has the shape \(1, 24\)"),
    (lambda all_: {**all_, NORM: torch.ones(24, dtype=torch.int8)}, "the dtype I8, although config.json describes no"),
    (lambda all_: {**all_, NORM: torch.full((24,), float("nan"))}, f"'{NORM}' contains NaN"),
    (lambda all_: {**all_, "lm_head.weight": torch.ones(67, 24)}, "lm_head.weight differs from model.embed_tokens"),
    (lambda all_: {**all_, "model.embed_tokens.weight": torch.ones(64, 24)}, "has 64 rows"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_that_do_not_fit_the_config_are_refused_before_any_work(
    tiny_llama: TinyModel, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    set_tensors(tiny_llama, change)
    with pytest.raises(UserError, match=message):
        make(tiny_llama, tmp_path / "out" / "variant", PRUNE)
    assert not (tmp_path / "out").exists()


SIDE_FILES = [
    ("tokenizer.json", "{}", "tokenizer: .* cannot be loaded"),
    ("tokenizer.json", "{not json", "tokenizer.json: .* is not JSON"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: .* is not a JSON object"),
    ("chat_template.jinja", "{% if %}", "chat template, which fails in line 1: Expected an expression"),
    ("chat_template.jinja", "{{ raise_exception('no') }}", "chat template, which fails: no"),
    ("chat_template.jinja", "{{ 1 // 0 }}", "which fails: integer division or modulo by zero"),
    ("chat_template.jinja", "{{ messages[0]['no']['x'] }}", "which fails: .* has no attribute 'no'"),
    ("generation_config.json", "{", "generation_config.json: .* is not JSON"),
    ("generation_config.json", "[]", "generation_config.json: .* is not a JSON object"),
]


@pytest.mark.parametrize(("name", "text", "message"), SIDE_FILES)
def test_a_broken_side_file_is_named_before_any_work(
    tiny_llama: TinyModel, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tiny_llama.directory / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        make(tiny_llama, tmp_path / "out" / "variant", PRUNE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_chat_template_that_refuses_a_calibration_prompt_is_one_line(
    tiny_llama: TinyModel,
) -> None:
    from slimserve.compress.calibration import document_ids
    from slimserve.core.tokenizer import load_tokenizer
    from slimserve.workloads.interface import ChatPrompt

    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}w1"
    (tiny_llama.directory / "chat_template.jinja").write_text(template)
    messages = ({"role": "system", "content": "w1"}, {"role": "user", "content": "w2"})
    with pytest.raises(UserError, match="which fails: no system role"):
        document_ids(load_tokenizer(tiny_llama.directory), ChatPrompt(messages, 9, "chat", "w3", "w3", {}))


def test_half_a_surrogate_pair_in_calibration_data_is_one_line(tiny_llama: TinyModel, tmp_path: Path) -> None:
    from slimserve.compress.recipe import Calibrate

    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1 w2"}\n{"text": "w1 \\ud83d"}\n')
    recipe = Recipe(summary="", calibration=Calibrate(source=str(data), sequence_length=2), steps=(GPTQ,))
    with pytest.raises(UserError, match="data.jsonl:2'") as caught:
        build_variant("tiny", tiny_llama.directory, "own", recipe, tmp_path / "variant")
    assert "\n" not in str(caught.value)


def test_calibration_ids_outside_the_vocabulary_are_named(tiny_llama: TinyModel, tmp_path: Path) -> None:
    from slimserve.compress.recipe import Calibrate

    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input_ids": [1, 2**70]}))
    recipe = Recipe(summary="", calibration=Calibrate(source=str(data), sequence_length=2), steps=(GPTQ,))
    with pytest.raises(UserError, match=f"token id {2**70} outside 0 to 66"):
        build_variant("tiny", tiny_llama.directory, "own", recipe, tmp_path / "variant")


SPARE: dict[str, tuple[int, ...]] = {
    "model.layers.1.self_attn.rotary_emb.inv_freq": (2,),
    "v_head.summary.weight": (1, 24),
    "model.layers.3.mlp.up_proj.weight": (44, 24),
    "model.layers.0.mlp.up_proj.bias": (44,),
}


@pytest.mark.parametrize("steps", [(), (PRUNE,), (QUANTIZE,)])
def test_tensors_that_no_loader_reads_are_left_out_of_the_variant(
    tiny_llama: TinyModel, tmp_path: Path, steps: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    reference = load_file(make(tiny_llama, tmp_path / "reference", *steps) / "model.safetensors")
    spare = {name: torch.ones(shape) for name, shape in SPARE.items()}
    set_tensors(tiny_llama, lambda all_: {**all_, **spare, "lm_head.weight": all_["model.embed_tokens.weight"]})
    capsys.readouterr()
    variant = load_file(make(tiny_llama, tmp_path / "variant", *steps) / "model.safetensors")
    assert variant.keys() == reference.keys()
    assert all(torch.equal(variant[name], reference[name]) for name in reference)
    assert "3 tensors that config.json does not describe are left out" in capsys.readouterr().err


def test_a_null_quantization_config_is_a_dense_model(tiny_llama: TinyModel, tmp_path: Path) -> None:
    set_config(tiny_llama, quantization_config=None)
    assert (make(tiny_llama, tmp_path / "variant", QUANTIZE) / "model.safetensors").is_file()


def test_contradictory_generation_settings_are_repaired_with_a_line(
    tiny_llama: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_llama.directory / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    variant = make(tiny_llama, tmp_path / "variant", PRUNE)
    assert "do_sample is set to true" in capsys.readouterr().err
    assert json.loads((variant / "generation_config.json").read_text()) == {"do_sample": True, "temperature": 0.9}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_a_quantized_float16_model_states_bfloat16_and_says_why(
    tiny_llama: TinyModel, tmp_path: Path, key: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    set_tensors(tiny_llama, lambda all_: {name: one.half() for name, one in all_.items()})
    config = json.loads((tiny_llama.directory / "config.json").read_text())
    del config["dtype"]
    (tiny_llama.directory / "config.json").write_text(json.dumps(config | ({key: "float16"} if key else {})))
    written = json.loads((make(tiny_llama, tmp_path / "variant", QUANTIZE) / "config.json").read_text())
    assert written[key or "dtype"] == "bfloat16"
    assert "kernels of quantized layers have no float16" in capsys.readouterr().err
    dense = json.loads((make(tiny_llama, tmp_path / "pruned", PRUNE) / "config.json").read_text())
    assert dense.get(key or "dtype") in {"float16", None}


def test_a_disk_without_room_for_the_variant_is_refused_before_any_work(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_decoder_config(tiny_llama.directory)
    stored = sum(4 * one.num_elements for one in read_tensors(tiny_llama.directory).values())
    assert needed_bytes(tiny_llama.directory, config, 0, None) == stored
    outside = 4 * (67 * 24 + 24)
    assert needed_bytes(tiny_llama.directory, config, 1, None) == 2 * stored - outside
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=stored))
    with pytest.raises(UserError, match="could not be written .* MiB free, and the work needs .* free some disk space"):
        make(tiny_llama, tmp_path / "out" / "variant", PRUNE)
    assert not (tmp_path / "out").exists()
    make(tiny_llama, tmp_path / "variant")


def test_a_link_keeps_its_name(tiny_llama: TinyModel, tmp_path: Path) -> None:
    link = tmp_path / "our-ranker"
    link.symlink_to(tiny_llama.directory)
    assert model_name(str(link), resolve_model(str(link))) == "our-ranker"
    variant = build_variant(str(link), resolve_model(str(link)), "own", Recipe(summary=""), tmp_path / "variant")
    assert json.loads((variant / "slimserve.json").read_text())["name"] == "our-ranker-own"
    to_variant = tmp_path / "live"
    to_variant.symlink_to(variant)
    assert model_name(str(to_variant), resolve_model(str(to_variant))) == "live"
    assert model_name(f"{variant}/", variant) == "our-ranker-own"


class _KilledError(BaseException):
    """Stands for a kill; no handler for errors catches it."""


def test_unfinished_work_of_another_recipe_is_set_aside_and_used_again(
    tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise _KilledError

    target = tmp_path / "variant"
    for steps in ((PRUNE, GPTQ), (GPTQ,)):
        with monkeypatch.context() as patched:
            patched.setattr(build, "_write_variant", interrupt)
            with pytest.raises(_KilledError):
                build_on_data(tiny_llama, *steps, target=target)
    (aside,) = tmp_path.glob(".variant.building-*")
    assert f"was set aside in {aside}" in capsys.readouterr().err
    assert (aside / "step-1" / "done.json").is_file()
    build_on_data(tiny_llama, PRUNE, GPTQ, target=target)
    shown = capsys.readouterr().err
    assert "continuing the work that was set aside" in shown
    assert "quantize (2 of 2)" not in shown
    (kept,) = tmp_path.glob(".variant.building*")
    assert (kept / "step-0" / "done.json").is_file()


def test_work_that_ended_with_a_user_error_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError), storage.work_folder(tmp_path / "out", "key", "state.json") as work:
        (work / "state.json").write_text("{}")
        raise UserError("student", "x", "could not be saved", "correct it")
    assert f"unfinished work is in {work}" in capsys.readouterr().err
    assert (work / "state.json").is_file()
