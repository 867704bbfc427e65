"""Tests of a sweep's points, of controls that read equally many tokens, and of a sweep's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.distill.sweep import Evaluation, SweepPoint, make_points, sweep
from tests.distill.conftest import make_recipe


def test_points_combine_spans_windows_sections_and_controls() -> None:
    assert [point.name for point in make_points("0.5,1", "right@0.5", "all,cot", True)] == [
        "prompt-cot-answer-left-0.5",
        "prompt-cot-answer-left-1",
        "prompt-cot-answer-right-0.5",
        "cot-left-1",
        "prompt-cot-answer-left-0.5-matched",
        "prompt-cot-answer-right-0.5-matched",
    ]
    for spans, windows, message in (
        ("half", "", "--lead-spans"),
        ("0.5", "right", "--windows"),
        ("0.5", "top@0.5", "--windows"),
        ("0", "", "greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_points(spans, windows, "all", False)


def test_a_control_reads_equally_many_tokens_from_more_examples() -> None:
    recipe = make_recipe(stages=[{"steps": 6}])
    control = SweepPoint(sections="cot", lead_span=0.25, is_control=True).apply_to(recipe)
    assert control.data.num_examples == 4 * recipe.data.num_examples
    assert control.stages[0].steps == 24
    assert (control.supervision.sections, control.supervision.lead_span) == ("cot", 0.25)
    assert SweepPoint(sections="cot", lead_span=0.25).apply_to(recipe).stages == recipe.stages


def test_a_sweep_writes_a_table_a_plot_and_metrics_and_resumes(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    points = make_points("0.8,1", "", "all", True)
    evaluated: list[str] = []

    def measure(directory: Path) -> dict[str, float]:
        evaluated.append(directory.name)
        return {"accuracy": 0.25}

    evaluation = Evaluation("prompts", measure)
    recipe = make_recipe(stages=[{"steps": 2}], data={"num_examples": 8})
    rows = sweep(str(tiny_student), str(tiny_teacher), recipe, points[:2], tmp_path, evaluation)
    rows = sweep(str(tiny_student), str(tiny_teacher), recipe, points, tmp_path, evaluation)
    assert evaluated == [point.name for point in points], "each student is evaluated once"
    short, full, control = rows
    assert short["tokens_read"] < 0.85 * full["tokens_read"]
    assert short["flops"] < 0.85 * full["flops"]
    assert control["steps"] == 2  # round(2 / 0.8)
    assert all(row["validation_before"] == rows[0]["validation_before"] for row in rows), (
        "validation always uses the same full sequences"
    )
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["points"] == json.loads(json.dumps(rows))
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 3
    assert "left, as many tokens | 0.8" in table[-1]
    assert table[-1].endswith("| 0.25 |")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_is_measured_again_for_another_student_or_other_prompts(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    values = iter((0.1, 0.2, 0.3))

    def evaluate(directory: Path, prompts: str) -> float:
        return Evaluation(prompts, lambda _: {"accuracy": next(values)}).of(directory, tmp_path)["accuracy"]

    student = tiny_student.rename(tmp_path / "point")
    assert evaluate(student, "prompts") == evaluate(student, "prompts") == 0.1
    assert evaluate(student, "other prompts") == 0.2
    # A sweep with another recipe has a student of the same name, but not the same weights.
    student.rename(tmp_path / "old")
    assert evaluate(tiny_teacher.rename(student), "prompts") == 0.3
