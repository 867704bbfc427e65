"""Tests of the one reader of config.json and generation_config.json, and of what every command makes of odd ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimserve.core.errors import UserError
from slimserve.core.generation import repair_generation_config, write_generation_config
from slimserve.core.model_config import (
    dtype_of,
    head_dim_of,
    kv_values_of,
    num_kv_heads_of,
    read_config,
    read_decoder_config,
    read_generation_config,
    size_of,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "text_config"])
@pytest.mark.parametrize("value", [None, {}])
def test_a_null_or_empty_table_is_the_same_as_none(tmp_path: Path, key: str, value: Any) -> None:
    assert key not in read_config(write(tmp_path, **{key: value}))
    assert key not in read_decoder_config(tmp_path)


def test_a_null_that_replaces_a_default_is_kept(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, model_type="mistral", sliding_window=None))["sliding_window"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": None}, "max_position_embeddings null, which is not a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings 0"),
        ({"hidden_size": "24"}, 'hidden_size "24"'),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers 2.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"vocab_size": True}, "vocab_size true"),
        ({"num_attention_heads": -6}, "num_attention_heads -6"),
        ({"quantization_config": "awq"}, "has a quantization_config that is not an object"),
    ],
)
def test_an_impossible_size_is_named_by_the_light_reader(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": None}, "field 'rms_norm_eps'"),
        ({"tie_word_embeddings": None}, "field 'tie_word_embeddings'"),
        ({"hidden_act": None}, "field 'hidden_act'"),
        ({"eos_token_id": "</s>"}, "field 'eos_token_id'"),
        ({"dtype": "float99"}, "float99"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4, which does not divide num_attention_heads 6"),
    ],
)
def test_what_transformers_refuses_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_decoder_config(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_sizes_that_the_file_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    config = read_decoder_config(write(tmp_path, num_key_value_heads=None))
    assert (config["num_key_value_heads"], config["head_dim"], config["tie_word_embeddings"]) == (6, 4, False)
    # Qwen3 has heads of 128 features by default, whatever the hidden size.
    assert read_decoder_config(write(tmp_path, model_type="qwen3", num_key_value_heads=2))["head_dim"] == 128


def test_sizes_are_found_in_a_text_config_and_under_older_names() -> None:
    nested = {"text_config": {**LLAMA, "num_key_value_heads": 2}, "model_type": "gemma3"}
    assert (num_kv_heads_of(nested), head_dim_of(nested), kv_values_of(nested)) == (2, 4, 2 * 3 * 2 * 4)
    gpt2 = {"n_layer": 3, "n_head": 6, "n_embd": 24, "n_positions": 64}
    assert (num_kv_heads_of(gpt2), head_dim_of(gpt2), size_of(gpt2, "max_position_embeddings")) == (6, 4, 64)
    assert size_of({"hidden_size": 24}, "num_hidden_layers") is None


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float32"}, "float32"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"dtype": None}, None),
    ],
)
def test_the_dtype_is_found_under_both_names(config: dict[str, Any], dtype: str | None) -> None:
    assert dtype_of(config) == dtype


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_or_missing_generation_config_has_no_settings(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert read_generation_config(tmp_path) == {}


GENERATION: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"do_sample": False, "temperature": 0.9}, {"do_sample": True, "temperature": 0.9}),
    ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
    ({"do_sample": None, "top_k": 1}, {"do_sample": True, "top_k": 1}),
    ({"min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
    ({"do_sample": False, "temperature": 0.0}, {"do_sample": False}),
    ({"max_new_tokens": -1, "eos_token_id": 2}, {"eos_token_id": 2}),
    ({"pad_token_id": -1}, {}),
    ({"early_stopping": True}, {}),
    ({"cache_implementation": "nonsense"}, {}),
    ({"streamer": 1, "eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
    ({"eos_token_id": "</s>"}, {}),
    ({"do_sample": True, "temperature": "0.9"}, {"do_sample": True}),
    ({"do_sample": True, "temperature": float("nan")}, {"do_sample": True}),
]


@pytest.mark.parametrize(("settings", "expected"), GENERATION)
def test_generation_settings_that_cannot_be_saved_are_repaired_with_a_line(
    tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    from transformers import GenerationConfig

    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    repaired, notes = repair_generation_config(tmp_path)
    assert repaired == expected
    assert notes
    output = tmp_path / "output"
    output.mkdir()
    write_generation_config(tmp_path, output)
    GenerationConfig.from_pretrained(output).save_pretrained(output / "again")


def test_sound_generation_settings_are_copied_byte_by_byte(tmp_path: Path) -> None:
    text = '{"do_sample":true,\n "temperature": 0.7, "eos_token_id": [1, 2]}'
    (tmp_path / "generation_config.json").write_text(text)
    (tmp_path / "output").mkdir()
    write_generation_config(tmp_path, tmp_path / "output")
    assert (tmp_path / "output" / "generation_config.json").read_text() == text
    assert repair_generation_config(tmp_path)[1] == []
