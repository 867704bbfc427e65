"""The examples: the workload's problems, chains of thought and verifier, and the plan of the pipeline."""

import ast
import contextlib
import operator
import re
from pathlib import Path
from typing import Any, cast

import pytest

import slimserve.compare.run
import slimserve.compress.build
import slimserve.distill.run
import slimserve.report.comparison
from slimserve.pipeline import load_pipeline, run_pipeline
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ChatPrompt

FILE = Path(__file__).parents[1] / "examples" / "checked_sums.py"
SIGNS = {"+": operator.add, "-": operator.sub, "×": operator.mul}


def problems(split: str, count: int) -> list[ChatPrompt]:
    return cast("list[ChatPrompt]", load_workload(str(FILE)).make_prompts(split, count))  # type: ignore[arg-type]


def test_every_step_of_a_chain_is_right_and_it_ends_in_the_answer() -> None:
    for problem in problems("quality", 100):
        steps = re.findall(r"(\d+) ([-+×]) (\d+) = (\d+)", problem.chain_of_thought)
        assert len(steps) >= 6
        assert all(SIGNS[sign](int(left), int(right)) == int(result) for left, sign, right, result in steps)
        assert problem.chain_of_thought.endswith(f"So {problem.answer} is right.")


def test_the_answer_is_that_of_the_question() -> None:
    kinds = {kind: [one for one in problems("quality", 100) if one.kind == kind] for kind in ("sum", "purchase")}
    for problem in kinds["sum"]:
        expression = problem.question.removeprefix("What is ").removesuffix("?")
        assert sum(ast.literal_eval(one) for one in re.findall(r"[-+]?\d+", expression.replace(" ", ""))) == int(
            problem.answer
        )
    for problem in kinds["purchase"]:
        first, price, second, other, paid = map(int, re.findall(r"\d+", problem.question))
        assert paid - first * price - second * other == int(problem.answer)


def test_questions_are_unique_across_splits_and_their_solutions_are_accepted() -> None:
    workload = load_workload(str(FILE))
    everything = [one for split in ("calibration", "quality", "load") for one in problems(split, 200)]
    assert len({one.question for one in everything}) == 600
    assert all(workload.is_correct(one, one.solution) for one in everything)
    assert not workload.is_correct(everything[0], everything[0].solution + "1")


def test_the_pipeline_changes_the_right_models_and_compares_them(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str, str | None]] = []
    comparisons: list[Any] = []

    def link(source: str, teacher: str | None, target: Path) -> Path:
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(smollm2)
        made.append((target.name, Path(source).name, Path(teacher).name if teacher else None))
        return target

    def distill(student: str, teacher: str | None, recipe: Any, target: Path, **options: Any) -> Path:
        assert recipe.data.source == "examples/checked_sums.py"
        assert bool(recipe.loss.kd_weight) == (teacher is not None)
        return link(student, teacher, target)

    def build(model: str, directory: Path, name: str, recipe: Any, target: Path, *rest: Any, **options: Any) -> Path:
        assert recipe.calibration.source == "examples/checked_sums.py"
        return link(model, None, target)

    monkeypatch.chdir(FILE.parents[1])
    monkeypatch.setattr(slimserve.distill.run, "distill", distill)
    monkeypatch.setattr(slimserve.compress.build, "build_variant", build)
    monkeypatch.setattr(slimserve.report.comparison, "reported", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr(slimserve.compare.run, "compare", lambda model, settings, folder: comparisons.append(settings))
    run_pipeline(load_pipeline(Path("examples/reasoning.toml")), tmp_path / "out")
    assert made == [
        ("dense", "smollm2-135m-instruct", None),
        ("w8a8", "dense", None),
        ("pruned", "dense", None),
        ("distilled", "pruned", "dense"),
        ("distilled-w8a8", "distilled", None),
    ]
    (settings,) = comparisons
    assert [one.name for one in settings.variants] == [name for name, *_ in made]
    assert settings.workloads == ("examples/checked_sums.py",)
    assert settings.slos_by_workload() == {"checked_sums": ("ttft_p95=1s", "itl_p95=100ms")}
