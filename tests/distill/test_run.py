"""Tests of distillation as a user runs it: errors in one line, reuse of finished students, and written files."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimserve.core.errors import UserError
from slimserve.core.model_files import weight_files
from slimserve.core.storage import sha256_of_files
from slimserve.distill import run
from slimserve.distill.recipe import distill_recipe_names, load_distill_recipe
from slimserve.distill.run import distill
from tests.distill.conftest import make_recipe, save_tiny


def test_a_teacher_with_another_tokenizer_is_rejected(tiny_student: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    file = tiny_teacher / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="has another tokenizer than the student"):
        distill(str(tiny_student), str(tiny_teacher), make_recipe(), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["supervision.lead_span=0"], "recipe key supervision.lead_span: '0' is invalid"),
        (["supervision.lead_span=1.5"], "recipe key supervision.lead_span"),
        (["supervision.sections=thought"], "join some of prompt, cot, answer"),
        (["training.lernrate=1"], "recipe key training.lernrate"),
        (["loss.kd_weight=2"], "recipe key loss.kd_weight"),
        (["loss.top_k=8", "stages.0.kind=on_policy"], "needs a running teacher"),
        (["stages.0.steps=3", "stages.0.epochs=2"], "give steps or epochs, not both"),
        (["stages.1.steps=3"], "has no entry 1"),
        (["training"], "is not KEY=VALUE"),
        (["training.batch_size=4", "training.batch_size.a.b=4"], "names no key of a table"),
    ],
)
def test_the_error_names_the_invalid_key(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_distill_recipe(None, settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", distill_recipe_names())
def test_each_built_in_recipe_is_valid_and_has_a_summary(name: str) -> None:
    recipe = load_distill_recipe(
        Path(name), options={"items": {"file": "items.jsonl"}} if name == "item-tokens" else None
    )
    assert recipe.summary


def test_an_unknown_recipe_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe: 'fast' is unknown; choose from concise, item-tokens, "):
        load_distill_recipe(Path("fast"))
    with pytest.raises(UserError, match="recipe"):
        load_distill_recipe(tmp_path / "missing.toml")


def test_settings_without_anything_to_learn_are_rejected_before_any_work(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--teacher: '' is missing"):
        distill(str(tiny_student), None, make_recipe(), tmp_path / "out")
    with pytest.raises(UserError, match=r"has no effect, because loss.kd_weight is 0"):
        distill(str(tiny_student), str(tiny_teacher), make_recipe(loss={"kd_weight": 0.0}), tmp_path / "out")
    with pytest.raises(UserError, match="leaves no training example"):
        distill(str(tiny_student), str(tiny_teacher), make_recipe(data={"max_tokens": 8}), tmp_path / "out")
    cut = make_recipe(supervision={"sections": "answer", "lead_span": 0.3})
    with pytest.raises(UserError, match="leaves no target"):
        distill(str(tiny_student), str(tiny_teacher), cut, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_quantized_student_and_scaled_logits_are_rejected(smollm2: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    quantized = save_tiny(smollm2, tmp_path / "quantized", 3)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(UserError, match="is quantized and cannot be trained"):
        distill(str(quantized), str(tiny_teacher), make_recipe(), tmp_path / "out")
    from transformers import AutoModelForCausalLM, GraniteConfig

    scaled = tmp_path / "scaled"
    granite = GraniteConfig(
        vocab_size=49_152,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=1,
        num_attention_heads=4,
        logits_scaling=8.0,
    )
    AutoModelForCausalLM.from_config(granite).save_pretrained(scaled)
    shutil.copyfile(smollm2 / "tokenizer.json", scaled / "tokenizer.json")
    shutil.copyfile(smollm2 / "tokenizer_config.json", scaled / "tokenizer_config.json")
    with pytest.raises(UserError, match="scales, caps or biases its logits"):
        distill(str(scaled), str(tiny_teacher), make_recipe(), tmp_path / "out")


def test_the_same_student_is_reused_and_another_is_not_overwritten(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = distill(str(tiny_student), str(tiny_teacher), make_recipe(), tmp_path / "out")
    distill(str(tiny_student), str(tiny_teacher), make_recipe(training={"save_every_s": 9}), target)
    assert "reused from" in capfd.readouterr().err
    with pytest.raises(UserError, match="exists and holds something else"):
        distill(str(tiny_student), str(tiny_teacher), make_recipe(data={"seed": 1}), target)


@pytest.mark.parametrize("size", ["100k", "17m"])
def test_a_full_disk_is_one_error_and_the_run_resumes_when_there_is_room(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has no room for the saved state (14 MB), or room for the state but not for the student as well."""
    # Another process may fill the disk after the check.
    monkeypatch.setattr(run, "check_free_space", lambda *_: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        recipe = make_recipe(training={"keep": "last", "save_every_s": 9})
        with pytest.raises(UserError, match="could not be written .* free some disk space"):
            distill(str(tiny_student), str(tiny_teacher), recipe, disk / "student")
        assert not (disk / "student").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = distill(str(tiny_student), str(tiny_teacher), recipe, disk / "student")
        reference = distill(str(tiny_student), str(tiny_teacher), recipe, tmp_path / "reference")
        assert sha256_of_files(weight_files(again)) == sha256_of_files(weight_files(reference))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_student_with_contradictory_generation_settings_is_trained_and_saved(
    tiny_student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tiny_student / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "eos_token_id": 2}')
    (tiny_student / "additional_chat_templates").mkdir()
    (tiny_student / "additional_chat_templates" / "tool.jinja").write_text("{{ messages[0]['content'] }}")
    (tiny_student / "trainer_state.json").write_text("{}")
    recipe = make_recipe(loss={"kd_weight": 0.0}, stages=[{"steps": 1}])
    target = distill(str(tiny_student), None, recipe, tmp_path / "out")
    assert "do_sample is set to true" in capfd.readouterr().err
    settings = json.loads((target / "generation_config.json").read_text())
    assert settings == {"do_sample": True, "temperature": 0.9, "eos_token_id": 2}
    assert (target / "additional_chat_templates" / "tool.jinja").is_file()
    assert not (target / "trainer_state.json").exists()


def _set(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json: .* is not JSON"),
    (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), "chat template, which fails in line 1"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer: .* cannot be loaded"),
    (lambda folder: _set(folder / "config.json", max_position_embeddings=None), "has max_position_embeddings null"),
    (lambda folder: _set(folder / "config.json", tie_word_embeddings=False), "the weights have no lm_head.weight"),
    (lambda folder: _set(folder / "config.json", vocab_size=49_000), "has vocab_size 49000"),
    (lambda folder: _set(folder / "config.json", num_hidden_layers=3), "'model.layers.2.*' is missing from"),
    (lambda folder: _set(folder / "config.json", rms_norm_eps=None), "field 'rms_norm_eps'"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "in pickle files"),
    (lambda folder: _set(folder / "config.json", quantization_config={"quant_method": "x"}), "is quantized and cannot"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_student_that_could_not_be_saved_or_served_is_refused_before_the_training(
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    monkeypatch.setattr(run, "train", lambda _: pytest.fail("the training began"))
    damage(tiny_student)
    with pytest.raises(UserError, match=message) as caught:
        distill(str(tiny_student), None, make_recipe(loss={"kd_weight": 0.0}), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_what_transformers_refuses_to_save_is_known_before_the_training(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("of a reason that nobody foresaw")

    monkeypatch.setattr("transformers.PreTrainedConfig.save_pretrained", refuse)
    monkeypatch.setattr(run, "train", lambda _: pytest.fail("the training began"))
    with pytest.raises(UserError, match="could not be saved after the training .of a reason that nobody foresaw"):
        distill(str(tiny_student), None, make_recipe(loss={"kd_weight": 0.0}), tmp_path / "out")


def test_a_disk_without_room_for_the_training_is_refused_before_it(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=14_000_000))
    with pytest.raises(UserError, match="13.4 MiB free, and the work needs at least"):
        distill(str(tiny_student), None, make_recipe(loss={"kd_weight": 0.0}), tmp_path / "out")


def test_recommendation_is_validated_on_its_labels(tiny_student: Path, tmp_path: Path) -> None:
    data = {"source": "recommendation", "num_validation": 6, "max_tokens": 300}
    recipe = make_recipe(data=data, loss={"kd_weight": 0.0}, supervision={"sections": "answer"})
    target = distill(str(tiny_student), None, recipe, tmp_path / "out")
    history = json.loads((target / "slimserve.json").read_text())["steps"][0]["detail"]["validation"]
    assert all(0 < row["auc"] < 1 and 0 < row["within_group_auc"] < 1 for row in history)


def test_the_command_makes_a_student_and_reports_errors_in_one_line(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[data]\nnum_examples = 4\nnum_validation = 1\n[training]\nbatch_size = 2\n[[stages]]\nsteps = 1\n", "utf-8"
    )
    models = ("--teacher", str(tiny_teacher), "--student", str(tiny_student))
    options = ("--recipe", str(recipe), "--sections", "cot", "--lead-span", "0.95", "-o", str(tmp_path / "out"))
    done = run_cli("distill", *models, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    resolved = json.loads((tmp_path / "out" / "slimserve.json").read_text())["resolved_recipe"]
    assert resolved["supervision"] == {"sections": "cot", "lead_span": 0.95, "window": "left"}
    refused = run_cli("distill", *models, "--lead-span", "0", "-o", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "lead_span" in refused.stderr
