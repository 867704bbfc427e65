"""Tests of faults: kills at random blocks, a full disk, two builds of one target, dead inputs."""

import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from slimserve.compress import build
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import Calibrate, Prune, Quantize, Recipe, load_recipe
from slimserve.core.errors import UserError
from slimserve.core.model_files import weight_files
from slimserve.core.storage import sha256_of_files

from .conftest import TinyModel, make_tiny

CONFIG = LlamaConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=9,
    num_attention_heads=6,
    num_key_value_heads=2,
)
RECIPE = """
summary = "killed"
[calibration]
source = "{ids}"
num_samples = 4
sequence_length = 16
[[steps]]
step = "prune"
mlp_remove_frac = 0.3
kv_remove_frac = 0.5
multiple = 4
[[steps]]
step = "quantize"
format = "w8a8"
method = "gptq"
"""
# Forks one child per number of blocks to survive. Each child starts with torch imported and is killed by SIGKILL.
FORKING = """
import os, signal, sys
from pathlib import Path
import torch, transformers.models.llama.modeling_llama  # what every child would import
from slimserve.compress import artifacts, build
from slimserve.compress.recipe import load_recipe
model, recipe, target, *lives = sys.argv[1:]
name, loaded = load_recipe(recipe)
saved = artifacts.save_file
for life in [*map(int, lives), 10**6]:
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        left = life
        def save_or_die(*arguments):
            global left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            saved(*arguments)
        artifacts.save_file = save_or_die
        build.build_variant("tiny", Path(model), name, loaded, Path(target))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def deep(tmp_path: Path) -> TinyModel:
    return make_tiny(CONFIG, tmp_path / "dense")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    ids = tmp_path / "ids.jsonl"
    tokens = torch.randint(0, 67, (4, 16), generator=torch.Generator().manual_seed(2))
    ids.write_text("\n".join(json.dumps({"input_ids": row}) for row in tokens.tolist()))
    recipe = tmp_path / "own.toml"
    recipe.write_text(RECIPE.format(ids=ids))
    return recipe


def test_ten_kills_do_not_change_the_bytes(deep: TinyModel, recipe_file: Path, tmp_path: Path) -> None:
    draw = random.Random(5)
    lives = [str(draw.randint(0, 2)) for _ in range(10)]
    targets = {name: tmp_path / name for name in ("killed", "uninterrupted")}
    for name, blocks_to_survive in (("killed", lives), ("uninterrupted", [])):
        arguments = [str(deep.directory), str(recipe_file), str(targets[name]), *blocks_to_survive]
        done = subprocess.run(
            [sys.executable, "-c", FORKING, *arguments], capture_output=True, text=True, timeout=200, check=True
        )
        assert done.stdout.split() == [*[str(-signal.SIGKILL)] * len(blocks_to_survive), "0"], done.stderr
    for file in targets["uninterrupted"].iterdir():
        if file.name != "slimserve.json":
            assert (targets["killed"] / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list(tmp_path.glob(".killed*"))


def test_a_disk_that_fills_up_is_one_clear_line_and_no_variant(run_cli: RunCli, smollm2: Path, tmp_path: Path) -> None:
    """A limit on file sizes simulates a full disk: the write fails in the same place with an OSError."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))

    target = tmp_path / "variant"
    arguments = ("--recipe", "prune25", "--set", "prune.method=magnitude", "-o", str(target))
    done = run_cli("compress", str(smollm2), *arguments, preexec_fn=limit, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "could not be written" in done.stderr.splitlines()[-1]
    assert "free some disk space" in done.stderr.splitlines()[-1]
    assert not target.exists()


def test_a_full_file_system_gives_one_error_and_the_build_resumes_when_there_is_room(
    deep: TinyModel, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another process may fill the disk after the check.
    monkeypatch.setattr(build, "check_free_space", lambda *_: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        _, recipe = load_recipe(str(recipe_file))
        with pytest.raises(UserError, match="could not be written .* free some disk space"):
            build_variant("tiny", deep.directory, "own", recipe, disk / "variant")
        assert not (disk / "variant").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = build_variant("tiny", deep.directory, "own", recipe, disk / "variant")
        reference = build_variant("tiny", deep.directory, "own", recipe, tmp_path / "reference")
        assert sha256_of_files(weight_files(again)) == sha256_of_files(weight_files(reference))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_second_build_of_the_same_target_is_rejected(deep: TinyModel, tmp_path: Path) -> None:
    work = tmp_path / ".variant.building"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being built by another process"):
            build_variant("tiny", deep.directory, "dense", Recipe(summary=""), tmp_path / "variant")


def test_dead_inputs_and_a_single_sample_are_handled_and_recorded(deep: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from slimserve.core.variant import read_manifest

    file = deep.directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.gate_proj.weight"][:7] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"input_ids": list(range(9))}))
    calibration = Calibrate(source=str(ids), num_samples=8, sequence_length=9)
    steps = (
        Prune(step="prune", mlp_remove_frac=0.1, multiple=4),
        Quantize(step="quantize", format="w8a8", method="gptq"),
    )
    recipe = Recipe(summary="", calibration=calibration, steps=steps)
    manifest = read_manifest(build_variant("tiny", deep.directory, "own", recipe, tmp_path / "variant"))
    assert manifest is not None
    assert manifest.calibration["num_sequences"] == 1
    assert manifest.calibration["num_sequences_requested"] == 8
    assert manifest.steps[0].detail["per_block"][0]["mlp.down_proj"]["num_dead_inputs"] == 7
