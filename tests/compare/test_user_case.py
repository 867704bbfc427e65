"""A user's own data from an empty folder: check, calibrated build, load test and comparison with a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from slimserve.compare.plan import make_preset
from slimserve.compare.run import compare
from slimserve.compare.settings import CompareSettings
from slimserve.report.comparison import reported
from slimserve.workloads import load_workload

RunCli = Callable[..., subprocess.CompletedProcess[str]]
SHOP = 'kind = "rank"\ndata = "shop.jsonl"\nquery = "{history}"\nitem = "{item}:"\ngroup = "user"\n'
SUMS = 'kind = "generate"\ndata = "sums.jsonl"\nprompt = "{question}"\nverifier = "number"\nmax_tokens = 8\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two workload files and 200 rows of data for each."""
    shop = [
        {"user": n, "history": f"visit {n}: yes\n", "items": [f"item {n % 5}", f"thing {n % 3}"], "grades": [1, 0]}
        for n in range(200)
    ]
    sums = [{"question": f"What is {n} + {n % 9}?", "answer": str(n + n % 9)} for n in range(200)]
    for name, rows, keys in (("shop", shop, SHOP), ("sums", sums, SUMS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.toml").write_text(keys)
    return tmp_path


@pytest.fixture
def tiny(smollm2: Path, tmp_path: Path) -> Path:
    """Create a random model of two layers with SmolLM2's tokenizer."""
    directory = tmp_path / "tiny"
    vocabulary = json.loads((smollm2 / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": vocabulary}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.to(torch.bfloat16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / file, directory / file)
    return directory


def test_check_shows_what_a_file_makes_of_the_data(folder: Path, run_cli: RunCli) -> None:
    done = run_cli("workload", "check", "shop.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    for text in ("200 rows, 0 not usable", "calibration", "tokens p50", "visit ", "item popularity", "0.500"):
        assert text in done.stdout
    with (folder / "sums.jsonl").open("a") as file:
        file.write('{"question": "What is 1 + 1?", "answer": "2"}\n' * 20)
    done = run_cli("workload", "check", "sums.toml", "--model", "", cwd=folder)
    assert done.returncode == 1
    assert "LEAK" in done.stdout
    done = run_cli("workload", "check", "none.toml", cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_build_calibrates_on_the_users_data(folder: Path, tiny: Path, run_cli: RunCli) -> None:
    short = ("--set", "calibration.num_samples=4", "--set", "calibration.sequence_length=32")
    command = ("compress", str(tiny), "--recipe", "w8a8", "--workload", "shop.toml,sums.toml", *short)
    done = run_cli(*command, "-o", "built", cwd=folder)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "built" / "slimserve.json").read_text())
    assert manifest["calibration"]["source"] == "shop.toml,sums.toml"
    before = manifest["calibration"]["source_sha256"]
    with (folder / "shop.jsonl").open("a") as file:
        file.write('{"user": "new", "history": "", "items": ["a", "b"], "grades": [1, 0]}\n')
    done = run_cli(*command, "-o", "built", cwd=folder)
    assert done.returncode == 2, "changed data make another variant"
    done = run_cli(*command, "-o", "again", cwd=folder)
    manifest = json.loads((folder / "again" / "slimserve.json").read_text())
    assert manifest["calibration"]["source_sha256"] != before


@pytest.mark.engine
def test_a_comparison_on_the_users_data_says_that_a_random_model_cannot_be_compared(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSERVE_CACHE", str(folder / "cache"))
    recipe = folder / "rounded.toml"
    recipe.write_text('summary = "rounded"\n[[steps]]\nstep = "quantize"\nformat = "w8a8"\nmethod = "rtn"\n')
    files = [str(folder / "shop.toml"), str(folder / "sums.toml")]
    names = [load_workload(file).name for file in files]
    preset = replace(make_preset("quick", names, prompts=40, rates={"shop": (0.5,), "sums": (0.5,)}), num_texts=0)
    preset = replace(preset, duration_s=4.0, warmup_s=1.0, users=dict.fromkeys(names, 2), loads_losers=True)
    settings = CompareSettings(recipes=("dense", str(recipe)), workloads=tuple(files))
    with reported(folder / "out"):
        comparison = compare(str(tiny), settings, folder / "out", preset=preset)
    assert comparison.verdict is not None
    assert comparison.verdict.winner is None
    assert "sums" in comparison.verdict.uninformative
    assert comparison.signals["shop"].baselines["item_popularity"].value == 1.0
    for variant in comparison.variants:
        assert variant.quality["shop"]["within_group_auc"].n == 40
        assert variant.quality["sums"]["accuracy"].value == 0.0
        assert not variant.rounds[0].capacity["shop"].summary.errors
    assert "No verdict" in (folder / "out" / "report.html").read_text()
