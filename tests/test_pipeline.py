"""Tests of a pipeline with tiny models: each step's input, distillation between pruning rounds, reuse and errors."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

import slimserve.compare.run
import slimserve.report.comparison
from slimserve.compare.settings import ExistingModel
from slimserve.core.errors import UserError
from slimserve.pipeline import load_pipeline, run_pipeline
from tests.distill.conftest import save_tiny

CHAIN = """
model = "{model}"

[[steps]]
name = "teacher"
step = "distill"
recipe.loss.kd_weight = 0
recipe.data = {data}
recipe.training = {training}
recipe.stages = [{{ steps = 1 }}]

[[steps]]
name = "pruned"
step = "compress"
recipe = "prune25"
settings = ["prune.rounds=2", "prune.multiple=4", "calibration.num_samples=2", "calibration.sequence_length=32"]

[steps.between]
teacher = "teacher"
recipe.data = {data}
recipe.training = {training}
recipe.stages = [{{ steps = {between_steps} }}]

[[steps]]
name = "student"
step = "distill"
teacher = "teacher"
recipe.data = {data}
recipe.training = {training}
recipe.stages = [{{ steps = 1 }}]

[compare]
variants = ["teacher", "student"]
workloads = ["reasoning"]
quick = true
slos = ["reasoning:ttft_p95=1s"]
"""


@pytest.fixture
def model(smollm2: Path, tmp_path: Path) -> Path:
    return save_tiny(smollm2, tmp_path / "model", 1, intermediate_size=48)


def write(folder: Path, model: Path, between_steps: int = 1) -> Path:
    file = folder / "chain.toml"
    data = '{ source = "reasoning", num_examples = 4, num_validation = 1, max_tokens = 512 }'
    training = '{ batch_size = 2, precision = "float32" }'
    file.write_text(CHAIN.format(model=model, data=data, training=training, between_steps=between_steps), "utf-8")
    return file


def test_a_pipeline_runs_from_a_model_to_a_comparison_and_reuses_finished_steps(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    comparisons: list[tuple[Any, ...]] = []
    monkeypatch.setattr(slimserve.report.comparison, "reported", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr(slimserve.compare.run, "compare", lambda *given, **named: comparisons.append((*given, named)))
    output = tmp_path / "out"
    directories = run_pipeline(load_pipeline(write(tmp_path, model)), output)
    assert directories == {name: output / name for name in ("teacher", "pruned", "student")}
    widths = [json.loads((directories[name] / "config.json").read_text())["intermediate_size"] for name in directories]
    assert widths == [48, 36, 36]
    (between,) = [path for path in output.glob("pruned-between-*") if path.is_dir()]
    assert json.loads((between / "config.json").read_text())["intermediate_size"] == 40, "after the first round"
    bases = [json.loads((directories[name] / "slimserve.json").read_text())["base"]["model"] for name in directories]
    assert bases == [str(model), str(directories["teacher"]), str(directories["pruned"])]
    given = comparisons[0]
    settings = given[1]
    assert (given[0], given[2]) == (str(model), output / "compare")
    assert (settings.recipes, settings.workloads, settings.quick) == ((), ("reasoning",), True)
    assert list(settings.variants) == [ExistingModel(name, str(directories[name])) for name in ("teacher", "student")]
    capfd.readouterr()
    run_pipeline(load_pipeline(write(tmp_path, model)), output)
    assert capfd.readouterr().err.count("reused") == 3
    with pytest.raises(UserError, match="was made with another distillation between its rounds"):
        run_pipeline(load_pipeline(write(tmp_path, model, between_steps=2)), output)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('teacher = "teacher"\nrecipe.data', 'tutor = "teacher"\nrecipe.data', "tutor"),
        ('name = "pruned"', 'name = "teacher"', "is used twice"),
        ('variants = ["teacher", "student"]', 'variants = ["nobody"]', "'nobody' is not a step"),
        ('name = "student"', 'name = "student"\nof = "later"', "is not an earlier step"),
        ("steps = 1", "steps = 0", "recipe.stages"),
        ("[[steps]]", "[[steps]", "cannot be read"),
    ],
)
def test_an_invalid_pipeline_is_rejected_before_any_work(
    model: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = write(tmp_path, model)
    file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.raises(UserError) as caught:
        load_pipeline(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('recipe = "prune25"', 'recipe = "prune26"', "'prune26' is unknown"),
        ('"prune.rounds=2"', '"prune.turns=2"', "turns"),
        ('"calibration.num_samples=2"', '"calibration.source=mine.py"', "mine.py"),
        ('[steps.between]\nteacher = "teacher"', '[steps.between]\nteacher = "student"', "'student' does not exist"),
        ('step = "distill"\nteacher = "teacher"', 'step = "distill"\nteacher = "tutor"', "'tutor' does not exist"),
        ('source = "reasoning"', 'source = "traces.jsonl"', "neither a workload nor a JSONL file"),
        ('workloads = ["reasoning"]', 'workloads = ["chess"]', "'chess' is unknown"),
    ],
)
def test_what_a_pipeline_names_must_exist_before_any_work(
    model: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = write(tmp_path, model)
    file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.raises(UserError) as caught:
        run_pipeline(load_pipeline(file), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
