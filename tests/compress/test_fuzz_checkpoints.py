"""Fuzz of model directories: mutated configs and file sets give a variant that `slimserve check` accepts, or one line.

The mutations come from public bug reports: nulls, wrong types and other sizes in config.json, adapters and other
layouts beside the weights, renamed, missing, cast and spare tensors, broken side files.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from slimserve.compare.check import check_variant
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import Prune, Quantize, Recipe
from slimserve.core.errors import UserError
from slimserve.core.model import resolve_model

from .conftest import make_tiny

NUM_CASES = 200
CONFIG = LlamaConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    tie_word_embeddings=True,
)
RECIPES = (
    Recipe(summary=""),
    Recipe(summary="", steps=(Prune(step="prune", mlp_remove_frac=0.3, multiple=4, method="peak_magnitude"),)),
    Recipe(summary="", steps=(Quantize(step="quantize", format="w8a8"),)),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 6, 24, 67, 10**9, 0.5, 1e-6, float("nan"), float("inf"), "3", "", [], {}, [1]),
    *(
        "float16",
        "torch.bfloat16",
        "float32",
        "gelu",
        "silu",
        "nonsense",
        {"a": 1},
        {"rope_type": "linear", "factor": 2.0},
    ),
    *({"rope_type": "yarn", "factor": None}, {"type": "dynamic", "factor": 2.0}, ["LlamaModel"], ["LlamaForCausalLM"]),
)
MORE_KEYS = (
    *(
        "quantization_config",
        "text_config",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "sliding_window",
        "layer_types",
    ),
    *("auto_map", "temperature", "partial_rotary_factor", "num_experts", "compression_config"),
)
SPARE_FILES = (
    *(
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "model.bf16.safetensors",
        "model-00001-of-00009.safetensors",
    ),
    *("flax_model.msgpack", "tf_model.h5", "pytorch_model.bin", "model.onnx", "optimizer.pt", "training_args.bin"),
    *(
        "model.gguf",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "original/consolidated.00.pth",
        "trainer_state.json",
    ),
)
SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
SIDE_TEXTS = (
    *("", "{}", "null", "[]", "{not json", '{"do_sample": false, "temperature": 0.9}', '{"eos_token_id": "x"}'),
    *("{{ messages[0]['content'] }}", "{% if %}", "{{ raise_exception('system role not supported') }}", "\\ufeff{}"),
    *(
        '{"max_new_tokens": -1}',
        '{"top_k": 3, "num_beams": 1, "early_stopping": true}',
        '{"chat_template": "{{ 1/0 }}"}',
    ),
)


def change_config(draw: random.Random, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    key = draw.choice([*config, *MORE_KEYS])
    value = draw.choice([*VALUES, "delete"])
    config[key] = value
    if value == "delete":
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(draw: random.Random, folder: Path) -> None:
    file = folder / "model.safetensors"
    if not file.is_file():
        return
    tensors = load_file(file)
    name = draw.choice(list(tensors))
    other = tensors[name].clone()
    mutations: dict[str, Callable[[], Any]] = {
        "cast all": lambda: {key: value.to(dtype) for key, value in tensors.items()},
        "cast one": lambda: {**tensors, name: other.to(dtype)},
        "drop": lambda: {key: value for key, value in tensors.items() if key != name},
        "strip": lambda: {key.removeprefix("model."): value for key, value in tensors.items()},
        "wrap": lambda: {f"_orig_mod.{key}": value for key, value in tensors.items()},
        "rotary": lambda: {**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        "spare": lambda: {**tensors, "v_head.summary.weight": torch.ones(1, 24)},
        "spare block": lambda: {**tensors, "model.layers.2.mlp.up_proj.weight": torch.ones(44, 24)},
        "bias": lambda: {**tensors, "model.layers.0.mlp.up_proj.bias": torch.ones(44)},
        "head": lambda: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        "other head": lambda: {**tensors, "lm_head.weight": torch.ones(67, 24)},
        "rows": lambda: {**tensors, name: other[:-1].contiguous()},
        "scalar": lambda: {**tensors, name: other.flatten()[0].clone()},
        "transposed": lambda: {**tensors, name: other.T.contiguous()},
        "nan": lambda: {**tensors, name: other.fill_(float("nan"))},
        "zero": lambda: {**tensors, name: other.zero_()},
    }
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn])
    save_file(mutations[draw.choice(list(mutations))](), file, {"format": "pt"})


def change_files(draw: random.Random, folder: Path) -> None:
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    kind = draw.choice(["spare", "spare", "spare", "shards", "lost shard", "index", "cut", "bin", "gone"])
    if kind == "spare":
        file = folder / draw.choice(SPARE_FILES)
        file.parent.mkdir(exist_ok=True)
        if weights.is_file() and draw.random() < 0.5:
            shutil.copyfile(weights, file)
        else:
            file.write_bytes(b"not a tensor")
    elif kind == "index":
        index.write_text(draw.choice(["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}']))
    elif weights.is_file() and kind in {"shards", "lost shard"}:
        names = list(load_file(weights))
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        tensors = load_file(weights)
        for shard, chosen in halves.items():
            save_file({name: tensors[name] for name in chosen}, folder / shard, {"format": "pt"})
        weight_map = {name: shard for shard in halves for name in halves[shard]}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        weights.unlink()
        if kind == "lost shard":
            (folder / "model-00002-of-00002.safetensors").unlink()
    elif weights.is_file() and kind == "cut":
        weights.write_bytes(weights.read_bytes()[: -draw.randint(1, 2000)])
    elif weights.is_file():
        weights.rename(folder / ("pytorch_model.bin" if kind == "bin" else "weights.safetensors"))


def change_side_file(draw: random.Random, folder: Path) -> None:
    (folder / draw.choice(SIDE_FILES)).write_text(draw.choice(SIDE_TEXTS))


MUTATIONS = (change_config, change_config, change_tensors, change_files, change_side_file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(CONFIG, tmp_path_factory.mktemp("fuzz") / "base").directory


def test_a_mutated_model_gives_a_variant_that_check_accepts_or_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("slimserve.core.storage._fsync", lambda path: None)
    outcomes: Counter[str] = Counter()
    problems = []
    for case in range(NUM_CASES):
        draw = random.Random(case)
        folder = Path(shutil.copytree(base, tmp_path / f"model-{case}"))
        recipe = RECIPES[case % len(RECIPES)]
        for mutate in draw.sample(MUTATIONS, draw.choice([1, 1, 2])):
            with suppress(SafetensorError):  # an earlier mutation has cut the file
                mutate(draw, folder)
        try:
            directory = resolve_model(str(folder))
            variant = build_variant(str(folder), directory, "own", recipe, tmp_path / f"variant-{case}")
            # transformers takes long, most of all for a quantized model, so it loads every second other variant.
            findings = islice(check_variant(variant), 2 if case % len(RECIPES) == 2 or case % 2 else 3)
            problems += [f"case {case}: {finding}" for finding in findings if not finding.passed]
            odd = {file.name for file in variant.iterdir()} & {Path(name).name for name in SPARE_FILES}
            if odd - {"additional_chat_templates"}:
                problems.append(f"case {case}: the variant holds {odd}")
            outcomes["built"] += 1
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                problems.append(f"case {case}: not one line: {error}")
            outcomes["refused"] += 1
        except Exception as error:  # what the fuzz looks for
            problems.append(f"case {case}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    assert not problems, "\n".join(problems)
    assert outcomes["built"] >= NUM_CASES // 5, outcomes
    assert outcomes["refused"] >= NUM_CASES // 5, outcomes
