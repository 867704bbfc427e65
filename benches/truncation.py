"""Measure quality and cost of students that are trained on a part of each reasoning trace, over the lead span.

    make bench-truncation

The problems are reasoning-gym's sums of four to eight terms. Each solution works term by term between think tags, so
that the chain of thought is about half of a sequence. SmolLM2-135M, fine-tuned on these traces, is the teacher. The
student is the original model with a quarter fewer MLP neurons. The students differ in the part that they learn from:

- The first 25, 50, 75 or 100% of each sequence.
- The last 50% of each sequence.
- Full sequences, with only the chain of thought supervised.
- Each shorter span again, with as many tokens in total as the full sequences.

Evaluation uses full unseen sequences: the loss, and the verifier through the served endpoint. The table and the plot go
to `results/truncation`. The cache keeps every student, so an interrupted run resumes. The last line of output is one
JSON object. The benchmark takes about half an hour; `--quick` runs a tenth of the steps and does not write `results/`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from benches.served import MODEL, built, our_spec
from slimserve.compare.quality import ask_prompts
from slimserve.core.openai_client import Target
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, write_atomically
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.distill.sweep import Evaluation, make_points, sweep
from slimserve.serve.launch.process import Engine
from slimserve.workloads.interface import Answer, ChatPrompt
from slimserve.workloads.metrics import evaluate
from slimserve.workloads.reasoning import Reasoning, chain_of_thought

NUM_STEPS, TEACHER_STEPS, BATCH_SIZE = 16, 80, 8
NUM_VALIDATION, NUM_EVALUATED = 32, 120
NUM_TRAINING = 640  # The control of the shortest span runs four times the steps.
RESULTS = Path("results") / "truncation"
_KIND = "chain_sum"
_MAX_REPLY = 160


def main() -> None:
    is_quick = "--quick" in sys.argv[1:]
    folder = cache_dir("bench-truncation-quick" if is_quick else "bench-truncation")
    scale = 10 if is_quick else 1
    problems = _problems()
    prompts = [_prompt(one) for one in islice(problems, NUM_EVALUATED)]
    # A hash of each conversation assigns a tenth of the file to validation.
    data = _write_traces(folder / "sums.jsonl", islice(problems, 5 * NUM_TRAINING // 4))

    evaluated = prompts[: NUM_EVALUATED // scale]
    evaluation = Evaluation(evaluated, lambda directory: _evaluate(folder / "engine.log", directory, evaluated))
    teacher = distill(MODEL, None, _recipe(data, TEACHER_STEPS // scale, 0.0), folder / "teacher")
    # The student is pruned from the original model, which was not trained on the sums.
    student = built("prune25")
    points = make_points("0.25,0.5,0.75,1", "right@0.5", "all,cot", has_controls=True)
    recipe = _recipe(data, NUM_STEPS // scale, 0.5)
    rows = sweep(str(student), str(teacher), recipe, points, folder / "students", evaluation)
    metrics: dict[str, list[float]] = {}
    for row in rows:
        name = row["name"].replace("-", "_")
        results = {**row["validation"], **row["evaluation"]}
        # Values by section are comparable; totals cover only the sections that a student learns.
        for metric in ("cross_entropy_prompt", "cross_entropy_cot", "cross_entropy_answer", "accuracy"):
            metrics[f"{metric}_{name}"] = [results[metric]]
        for metric in ("train_s", "peak_bytes", "flops"):
            metrics[f"{metric}_{name}"] = [row[metric]]
    for name, directory in (("teacher", teacher), ("pruned", student)):
        metrics[f"accuracy_{name}"] = [evaluation.of(directory, folder)["accuracy"]]
    if not is_quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = (folder / "students" / "sweep.json").read_text(encoding="utf-8")
        write_atomically(RESULTS / "sweep.json", text.replace(f"{folder}/", "").replace(f"{folder.parent}/", ""))
        for name in ("sweep.md", "sweep.png"):
            shutil.copyfile(folder / "students" / name, RESULTS / name)
    print(bench_line("truncation", metrics))


def _problems() -> Iterator[dict[str, Any]]:
    """Yield distinct sums in the order of their generator."""
    import reasoning_gym

    sizes = {"min_terms": 4, "max_terms": 8, "min_digits": 1, "max_digits": 1}
    seen = set()
    for entry in reasoning_gym.create_dataset(_KIND, size=100_000, seed=7, **sizes):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield entry


def _prompt(entry: dict[str, Any]) -> ChatPrompt:
    return ChatPrompt(
        ({"role": "user", "content": entry["question"]},),
        _MAX_REPLY,
        _KIND,
        chain_of_thought(entry),
        entry["answer"],
        entry,
    )


def _write_traces(file: Path, problems: Iterator[dict[str, Any]]) -> Path:
    prompts = map(_prompt, problems)
    rows = [{"prompt": one.messages[0]["content"], "completion": one.solution} for one in prompts]
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def _recipe(data: Path, num_steps: int, kd_weight: float) -> DistillRecipe:
    return DistillRecipe.model_validate(
        {
            "data": {
                "source": str(data),
                "num_examples": num_steps * BATCH_SIZE,
                "num_validation": NUM_VALIDATION,
            },
            "loss": {"kd_weight": kd_weight},
            "training": {
                "learning_rate": 1e-4,
                "batch_size": BATCH_SIZE,
                "validate_every": 1000,
                "save_every_s": 120,
                "keep": "last",
            },
            "stages": [{"steps": num_steps}],
        },
    )


def _evaluate(log: Path, directory: Path, prompts: Sequence[ChatPrompt]) -> Mapping[str, float]:
    """Serve a model; return its accuracy and its tokens per answer by the verifier."""
    with Engine(our_spec(log, directory, "decode")) as engine:
        target = Target(engine.spec.url, engine.spec.name)
        answers = ask_prompts(target, f"problems, {directory.name}", prompts)
    metrics = evaluate(Reasoning(), prompts, cast("list[Answer]", answers))
    return {name: metrics[name].value for name in ("accuracy", "tokens_per_answer")}


if __name__ == "__main__":
    main()
