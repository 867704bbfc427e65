"""Students that read the first part of each reasoning trace only: quality and cost over the lead span.

    make bench-truncation

SmolLM2-135M, fine-tuned on reasoning-gym's worked solutions, teaches its variant with a quarter fewer MLP neurons on
the first 25, 50, 75 and 100% of each sequence, on the last 50%, and on whole sequences with the chain of thought alone
supervised; each shorter span again with as many tokens as the whole sequences have. Judged on whole sequences by loss,
and by the verifier through the served endpoint. Table and plot go to `results/truncation`. Students are kept there, so
an interrupted run goes on. Last line: one JSON object. About an hour and a half; `--quick` takes a tenth of the steps.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from benches.served import MODEL, our_spec
from compare.quality import ask_prompts
from compress.build import build_variant
from compress.recipe import load_recipe
from contracts.provenance import bench_line
from contracts.storage import cache_dir
from contracts.target import Target
from distill.recipe import DistillRecipe, parse_distill_recipe
from distill.run import distill
from distill.sweep import make_points, sweep
from serve.engine import Engine
from workloads.interface import Answer, ChatAnswer
from workloads.reasoning import Reasoning

NUM_STEPS, TEACHER_STEPS, BATCH_SIZE = 40, 60, 8
NUM_JUDGED = 192
RESULTS = Path("results") / "truncation"


def main() -> None:
    is_quick = "--quick" in sys.argv[1:]
    folder = cache_dir("bench-truncation-quick" if is_quick else "bench-truncation")
    scale = 10 if is_quick else 1
    teacher = distill(MODEL, None, _recipe(TEACHER_STEPS // scale, 0.0), folder / "teacher")
    student = build_variant(str(teacher), teacher, *load_recipe("prune25"), folder / "pruned")
    points = make_points("0.25,0.5,0.75,1", "right@0.5", "all,cot", has_controls=True)
    recipe = _recipe(NUM_STEPS // scale, 0.5)
    rows = sweep(str(student), str(teacher), recipe, points, folder / "students", judge=_judge)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("sweep.json", "sweep.md", "sweep.png"):
        shutil.copyfile(folder / "students" / name, RESULTS / name)
    figures: dict[str, list[float]] = {}
    for row in rows:
        name = row["name"].replace("-", "_")
        known = {**row["validation"], **row["judged"]}
        for figure in ("cross_entropy", "divergence", "accuracy"):
            figures[f"{figure}_{name}"] = [known[figure]]
        for figure in ("train_s", "peak_bytes", "flops"):
            figures[f"{figure}_{name}"] = [row[figure]]
    for name, directory in (("teacher", teacher), ("pruned", student)):
        figures[f"accuracy_{name}"] = [_judge(directory)["accuracy"]]
    print(bench_line("truncation", figures))


def _recipe(num_steps: int, kd_weight: float) -> DistillRecipe:
    return parse_distill_recipe(
        {
            "data": {"source": "reasoning", "num_examples": num_steps * BATCH_SIZE, "num_validation": 48},
            "loss": {"kd_weight": kd_weight},
            "training": {
                "learning_rate": 3e-5,
                "batch_size": BATCH_SIZE,
                "micro_batch_tokens": 2048,
                "validate_every": 40,
                "save_every_s": 120,
                "keep": "last",
            },
            "stages": [{"steps": num_steps}],
        },
        "bench",
    )


def _judge(directory: Path) -> Mapping[str, float]:
    """Accuracy by the verifier, through the served endpoint."""
    workload = Reasoning()
    prompts = workload.make_prompts("quality", NUM_JUDGED)
    with Engine(our_spec(directory.parent / "engine.log", directory, "reasoning")) as engine:
        target = Target(engine.spec.url, engine.spec.name)
        answers = ask_prompts(target, f"problems, {directory.name}", prompts)
    figures = workload.judge(prompts, cast("list[Answer]", cast("list[ChatAnswer]", answers)))
    return {name: figures[name].value for name in ("accuracy", "tokens_per_answer")}


if __name__ == "__main__":
    main()
