"""Tests of the training loop: accumulation, packing, resuming and several processes do not change the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimserve.core.errors import UserError
from slimserve.distill.components import rate_frac
from slimserve.distill.cost import ModelShape
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import LOG_FILE, distill
from tests.distill.conftest import Killed, kill_after, make_recipe

STUDENT_AND_TEACHER = """
import json, sys
from pathlib import Path
from slimserve.core.config import validated
from slimserve.distill.components import rate_frac
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.core.errors import UserError
student, teacher, target, recipe = sys.argv[1:]
try:
    distill(student, teacher or None, validated(DistillRecipe, json.loads(recipe), "recipe", "test"), Path(target))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def steps_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / LOG_FILE).read_text().splitlines()]


def detail_of(directory: Path) -> dict[str, Any]:
    """Return what the manifest says about the training."""
    return dict(json.loads((directory / "slimserve.json").read_text())["steps"][0]["detail"])


def losses_of(directory: Path) -> list[float]:
    return [row["loss"] for row in steps_of(directory)]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(directory / "model.safetensors"))


def assert_same_weights(one: Path, other: Path, **tolerances: float) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], **tolerances)


SUMMED = {"seconds": "train_s", "tokens": "tokens_read", "flops": "flops"}
"""Keys of a cost, and of the training steps that it is added to."""

FULLY_SHARDED = """
import accelerate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def prepare(_, module, optimizer):
    named = lambda: module.named_parameters(remove_duplicate=False)
    names = {id(parameter): name for name, parameter in named()}
    mesh = init_device_mesh("cpu", (2,))
    for part in [*module.student.get_decoder().layers, module]:
        fully_shard(part, mesh=mesh)
    divided = dict(named())
    for group in optimizer.param_groups:
        group["params"] = [divided[names[id(parameter)]] for parameter in group["params"]]
    return module, optimizer

accelerate.Accelerator.prepare = prepare
"""
"""Replacement for `Accelerator.prepare` with fsdp_version 2, which accelerate supports on GPUs only."""


def start_distill(
    student: Path,
    teacher: Path | str,
    target: Path,
    recipe: DistillRecipe,
    *launcher: str,
    before: str = "",
) -> subprocess.Popen[str]:
    """Start a distillation in its own process; `before` is code that runs first."""
    script = target.with_suffix(".py")
    script.write_text(before + STUDENT_AND_TEACHER)
    recipe_json = json.dumps(recipe.model_dump(mode="json"))
    command = [sys.executable, *launcher, str(script), str(student), str(teacher), str(target), recipe_json]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two_processes(
    kind: str, student: Path, teacher: Path | str, target: Path, recipe: DistillRecipe
) -> subprocess.Popen[str]:
    """Start a distillation in two processes, under DDP or FSDP."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    before = FULLY_SHARDED if kind == "fsdp" else ""
    return start_distill(student, teacher, target, recipe, *launcher, before=before)


def test_a_student_learns_from_its_teacher(tiny_student: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    recipe = make_recipe(stages=[{"steps": 12}], loss={"kd_weight": 1.0}, training={"learning_rate": 5e-3})
    target = distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "out")
    losses = losses_of(target)
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    manifest = json.loads((target / "slimserve.json").read_text())
    detail = detail_of(target)
    assert [row["step"] for row in detail["validation"]] == [0, 4, 8, 12]
    assert detail["validation"][-1]["loss"] < detail["validation"][0]["loss"]
    assert detail["tokens_read"] == sum(row["tokens"] for row in steps_of(target))
    assert detail["flops"] == pytest.approx(sum(row["flops"] for row in steps_of(target)))
    assert manifest["base"]["model"] == str(tiny_student)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
    assert not list(tmp_path.glob(".out*")), "no working files remain"


def test_micro_batches_packing_and_checkpointing_do_not_change_the_result(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    def train(name: str, **training: Any) -> Path:
        recipe = make_recipe(training={"keep": "last", **training})
        return distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / name)

    reference = train("reference", micro_batch_tokens=10_000)
    for name, options in {
        "single": {"micro_batch_tokens": 1},
        "divided": {"micro_batch_tokens": 1000},
        "packed": {"micro_batch_tokens": 10_000, "packed": True},
        "checkpointed": {"micro_batch_tokens": 10_000, "checkpointing": True},
    }.items():
        other = train(name, **options)
        assert losses_of(other) == pytest.approx(losses_of(reference), rel=1e-5), name
        assert_same_weights(other, reference, rtol=2e-2, atol=1e-3)


def test_a_student_equal_to_its_teacher_has_no_divergence_and_does_not_change(
    tiny_student: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(loss={"kd_weight": 1.0}, training={"weight_decay": 0.0, "keep": "last", "learning_rate": 1e-6})
    target = distill(str(tiny_student), str(tiny_student), recipe, tmp_path / "out")
    assert max(map(abs, losses_of(target))) < 1e-5
    assert max(row["gradient_norm"] for row in steps_of(target)) < 1e-3
    before = {name: weight.bfloat16() for name, weight in weights_of(tiny_student).items()}
    for name, weight in weights_of(target).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-2, atol=1e-5)


TWO_STAGES = make_recipe(stages=[{"steps": 4}, {"kind": "on_policy", "steps": 3, "max_new_tokens": 6}])


def test_a_run_interrupted_at_any_step_resumes_with_the_same_result(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    uninterrupted = distill(str(tiny_student), str(tiny_teacher), TWO_STAGES, tmp_path / "uninterrupted")
    target = tmp_path / "killed"
    for num_steps in (1, 3, 2, 2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_after(num_steps, patch)
            distill(str(tiny_student), str(tiny_teacher), TWO_STAGES, target)
    distill(str(tiny_student), str(tiny_teacher), TWO_STAGES, target)
    assert losses_of(target) == losses_of(uninterrupted)
    assert_same_weights(target, uninterrupted, rtol=0, atol=0)
    assert not list(tmp_path.glob(".killed*"))


def test_a_killed_process_is_resumed_with_the_same_losses(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    target = tmp_path / "killed"
    recipe = make_recipe(stages=[{"steps": 30}], training={"validate_every": 30})
    process = start_distill(tiny_student, tiny_teacher, target, recipe)
    log = tmp_path / ".killed.building" / "steps.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.wait()
    num_done = len(log.read_text().splitlines())
    assert num_done < 30
    distill(str(tiny_student), str(tiny_teacher), recipe, target)
    uninterrupted = distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "uninterrupted")
    assert losses_of(target) == losses_of(uninterrupted)
    assert len(losses_of(target)) == 30


def test_an_interrupted_run_is_not_resumed_with_another_recipe(
    tiny_student: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(2, patch)
        distill(str(tiny_student), str(tiny_teacher), TWO_STAGES, target)
    assert (tmp_path / ".out.building" / "state" / "progress.json").is_file()
    distill(str(tiny_student), str(tiny_teacher), make_recipe(stages=[{"steps": 2}]), target)
    assert "resumed" not in capfd.readouterr().err
    assert len(losses_of(target)) == 2


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("ddp", {"training": {"keep": "last"}}),
        (
            "fsdp",
            {
                "data": {"source": "recommendation", "num_validation": 4, "max_tokens": 1024},
                "supervision": {"sections": "answer"},
                "training": {"keep": "best", "validate_every": 1, "lora_rank": 4, "save_every_s": 0},
            },
        ),
        ("fsdp", {"loss": {"kd_weight": 1.0, "top_k": 50}, "training": {"keep": "best", "learning_rate": 1e-2}}),
    ],
    ids=["full-ddp", "lora-fsdp", "cached-fsdp"],
)
def test_two_processes_give_the_same_result_as_one(
    tables: dict[str, Any], kind: str, tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(**tables)
    alone = distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "alone")
    process = start_two_processes(kind, tiny_student, tiny_teacher, tmp_path / "two", recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("distilled two") == 1, "only one process prints"
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(alone), rel=1e-4)
    assert_same_weights(tmp_path / "two", alone, rtol=2e-2, atol=1e-3)


def test_fsdp_resumes_after_a_kill_and_rejects_on_policy_steps(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    uninterrupted = distill(str(tiny_student), str(tiny_teacher), make_recipe(), tmp_path / "uninterrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(2, patch)
        distill(str(tiny_student), str(tiny_teacher), make_recipe(), tmp_path / "two")
    process = start_two_processes("fsdp", tiny_student, tiny_teacher, tmp_path / "two", make_recipe())
    output, _ = process.communicate(timeout=300)
    assert "resumed at step" in output
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(uninterrupted), rel=1e-4)
    recipe = make_recipe(stages=[{"kind": "on_policy", "steps": 1, "max_new_tokens": 8}])
    process = start_two_processes("fsdp", tiny_student, tiny_teacher, tmp_path / "three", recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "cannot run under FSDP" in output
    assert not list(tmp_path.glob("*three*/*"))


def test_plain_fine_tuning_needs_no_teacher_and_no_validation(tiny_student: Path, tmp_path: Path) -> None:
    recipe = make_recipe(loss={"kd_weight": 0.0}, data={"num_validation": 0})
    target = distill(str(tiny_student), None, recipe, tmp_path / "out")
    rows = steps_of(target)
    assert all(row["loss"] == row["cross_entropy"] and row["divergence"] == 0 for row in rows)


def test_a_cached_teacher_reports_its_error_and_still_lowers_the_loss(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    def train(name: str, top_k: int) -> Path:
        loss = {"kd_weight": 1.0, "top_k": top_k}
        return distill(str(tiny_student), str(tiny_teacher), make_recipe(loss=loss), tmp_path / name)

    online, cached = train("online", 0), train("cached", 2000)
    error = detail_of(cached)["cache_error"]
    assert 0 < error["missing_mass"] < 1
    assert 0 < error["divergence_frac"] < 1
    num_targets = sum(row["targets"] for row in steps_of(cached))
    assert error["num_bytes"] == num_targets * 2000 * 8, (
        "each example is stored once, with four bytes per token id and four per probability"
    )
    # The missing tokens lower the divergence and change nothing else.
    ratio = losses_of(cached)[0] / losses_of(online)[0]
    assert 1 - error["missing_mass"] - 0.3 < ratio < 1
    assert losses_of(cached)[-1] < losses_of(cached)[0]
    # The teacher read every sequence once for the cache, and in every step without it.
    detail = detail_of(cached)
    teacher, student = (ModelShape.of(json.loads((one / "config.json").read_text())) for one in (tiny_teacher, cached))
    assert detail["teacher_cache"]["tokens"] == detail["tokens_read"], "three steps of four are one epoch"
    running = detail_of(online)["flops"] - detail["flops"]
    assert detail["teacher_cache"]["flops"] == pytest.approx(running)
    assert running > teacher.block_flops([1]) * detail["tokens_read"] > 0
    assert detail["flops"] > 3 * student.block_flops([1]) * detail["tokens_read"]
    total = {key: detail["teacher_cache"][key] + detail[name] for key, name in SUMMED.items()}
    assert detail["total"] == pytest.approx(total)
    assert detail["teacher_cache"]["seconds"] > 0


def test_hidden_states_are_matched_through_a_width_map(tiny_student: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    for kind in ("cosine", "mse"):
        loss = {"hidden_weight": 1.0, "hidden_kind": kind, "hidden_pairs": 2}
        target = distill(str(tiny_student), str(tiny_teacher), make_recipe(loss=loss), tmp_path / kind)
        row = steps_of(target)[0]
        assert row["loss"] > 0.5 * row["divergence"] + 0.5 * row["cross_entropy"]
        assert not [name for name in weights_of(target) if "maps" in name]
    same = distill(
        str(tiny_student),
        str(tiny_student),
        make_recipe(loss={"hidden_weight": 1.0, "kd_weight": 1.0}),
        tmp_path / "same",
    )
    assert abs(losses_of(same)[0]) < 1e-4


def test_lora_weights_are_merged_when_saved(tiny_student: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    recipe = make_recipe(training={"lora_rank": 3, "learning_rate": 1e-2, "keep": "last"})
    target = distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "out")
    before, after = weights_of(tiny_student), weights_of(target)
    assert before.keys() == after.keys()
    embedding, layer = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(after[embedding], before[embedding].bfloat16(), rtol=0, atol=0)
    change = after[layer].double() - before[layer].double()
    assert float(change.abs().max()) > 1e-3
    lora = load_file(target / "adapter" / "adapter_model.safetensors")
    name = f"base_model.model.{layer.removesuffix('.weight')}"
    product = 2 * lora[f"{name}.lora_B.weight"].double() @ lora[f"{name}.lora_A.weight"].double()
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    assert float((change - product).abs().max()) <= 2**-7 * float(after[layer].abs().max())
    assert str(tiny_student) not in (target / "adapter" / "adapter_config.json").read_text()


def test_on_policy_steps_train_on_text_that_the_student_wrote(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    def sampler(student: Any, prompts: Any, settings: Any, seed: int) -> list[list[int]]:
        assert settings.max_new_tokens == 7
        return [[100 + len(prompt), 5, 6, 2] for prompt in prompts]

    recipe = make_recipe(stages=[{"kind": "on_policy", "steps": 2, "fraction": 1.0, "max_new_tokens": 7}])
    target = distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "out", sampler=sampler)
    rows = steps_of(target)
    assert [row["targets"] for row in rows] == [16, 16], "four replies of four tokens"
    assert all(row["loss"] == pytest.approx(row["divergence"]) for row in rows)
    half = make_recipe(stages=[{"kind": "on_policy", "steps": 1, "fraction": 0.5, "max_new_tokens": 7}])
    row = steps_of(distill(str(tiny_student), str(tiny_teacher), half, tmp_path / "half", sampler=sampler))[0]
    assert row["targets"] > 8


def test_the_cost_of_sampled_replies_is_counted(tiny_student: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    prompts_read: list[int] = []

    def sampler(student: Any, prompts: Any, settings: Any, seed: int) -> list[list[int]]:
        prompts_read.extend(map(len, prompts))
        time.sleep(0.05)
        return [[5, 6, 2] for _ in prompts]

    recipe = make_recipe(stages=[{"kind": "on_policy", "steps": 2, "fraction": 0.5, "max_new_tokens": 7}])
    target = distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "out", sampler=sampler)
    detail, shape = detail_of(target), ModelShape.of(json.loads((target / "config.json").read_text()))
    assert len(prompts_read) == 4
    # A reply's last token is not read; each of its tokens is predicted.
    by_hand = sum(shape.block_flops([length + 2]) + 3 * shape.head_flops(1) for length in prompts_read)
    assert detail["sampling"]["tokens"] == sum(prompts_read) + 4 * 3
    assert detail["sampling"]["flops"] == pytest.approx(by_hand)
    assert 0.1 <= detail["sampling"]["seconds"] < 60
    total = {key: detail["sampling"][key] + detail[name] for key, name in SUMMED.items()}
    assert detail["total"] == pytest.approx(total)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_sequences(tiny_student: Path, tmp_path: Path) -> None:
    recipe = make_recipe(loss={"kd_weight": 0.0}, training={"learning_rate": 1e30}, data={"num_validation": 0})
    with pytest.raises(UserError, match="is not finite at step") as caught:
        distill(str(tiny_student), None, recipe, tmp_path / "out")
    file = tmp_path / "out.bad-batch.json"
    assert str(file) in str(caught.value)
    assert json.loads(file.read_text())["sequences"][0].startswith("reasoning/")
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_rises_and_then_falls() -> None:
    fractions = [rate_frac(step, 100, 0.1) for step in range(100)]
    assert fractions[0] == pytest.approx(0.1)
    assert max(fractions) == pytest.approx(1.0)
    assert fractions.index(max(fractions)) in (9, 10)
    assert all(after <= before for before, after in pairwise(fractions[10:]))
    assert fractions[-1] == pytest.approx(0.1, abs=0.01)
    assert rate_frac(0, 1, 0.0) == 1.0
