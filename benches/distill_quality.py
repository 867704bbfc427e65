"""How much of the AUC that pruning costs comes back by distillation, and what is left of it in INT8 behind the server.

    make bench-distill-quality

On MovieLens, every label of a member's films supervised: SmolLM2-135M is fine-tuned (the teacher), loses a quarter of
its MLP neurons and one of three KV groups (the pruned student), and learns again from the same histories for equally
many steps, from the labels alone (`sft`) and half from the teacher (`kd`), with three seeds each; the `kd` students
become W8A8 and are asked through the served endpoint. AUC is that of the labels of the 9th to the 24th of a member's
latest 24 films, pooled over all members that nothing was trained or calibrated on; within-member AUC beside it.
Earlier films of the same members are harder, so the teacher's AUC over windows of any time is told too.
`auc_recovered_frac` is (kd - pruned) / (teacher - pruned) of a seed. Every student is kept in the cache, so an
interrupted run goes on. Last line: one JSON object. About an hour; `--quick` takes one seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from benches.served import MODEL, our_spec
from slimserve.compare.quality import ask_prompts
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import Calibrate, Prune, Recipe, load_recipe
from slimserve.core.model import model_hash, resolve_model
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, write_atomically
from slimserve.distill.data import load_examples
from slimserve.distill.models import load_model, load_tokenizer
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.distill.sections import label_example
from slimserve.distill.validation import NUM_SKIPPED_LABELS, label_metrics
from slimserve.serve.launch.process import Engine
from slimserve.workloads import metrics
from slimserve.workloads.interface import Estimate, ScoringPrompt
from slimserve.workloads.recommendation import Recommendation, label_prompts

NUM_SEEDS = 3
TEACHER_STEPS, TEACHER_BATCH = 60, 8
STUDENT_STEPS, STUDENT_BATCH = 40, 4
LEARNING_RATE = 5e-5
"""At 1e-4 the loss on a member's own, noisy labels rises, and a step on one of the few sequences that pruning broke
altogether (their first token no longer draws the attention that it did) shakes everything."""
KD_WEIGHT = 0.5
TEST_FILMS = 24
NUM_WINDOWS = 192
MAX_TOKENS = 1024
_MICRO_TOKENS = 2048


def main() -> None:
    num_seeds = 1 if "--quick" in sys.argv[1:] else NUM_SEEDS
    folder = cache_dir("bench-distill-quality")
    figures: dict[str, list[float]] = {}

    def note(name: str, found: dict[str, Estimate]) -> float:
        for figure, key in (("auc", f"auc_{name}"), ("within_user_auc", f"within_member_auc_{name}")):
            figures.setdefault(key, []).append(found[figure].value)
        told = found["auc"]
        print_status(f"{name}: AUC {told.value:.4f} [{told.low:.4f}, {told.high:.4f}] of {told.n} labels")
        return told.value

    note("untrained", _in_process(folder, resolve_model(MODEL)))
    teacher = distill(MODEL, None, _recipe(TEACHER_STEPS, TEACHER_BATCH, 42), folder / "teacher")
    auc_teacher = note("teacher", _in_process(folder, teacher))
    note("teacher_any_time", _in_process(folder, teacher, is_latest_only=False))
    pruned = build_variant(str(teacher), teacher, "cut", _cut(), folder / "pruned")
    auc_pruned = note("pruned", _in_process(folder, pruned))

    def note_student(name: str, figure: str, directory: Path) -> None:
        recovered = (note(name, _in_process(folder, directory)) - auc_pruned) / (auc_teacher - auc_pruned)
        figures.setdefault(figure, []).append(recovered)

    for seed in range(num_seeds):
        soft = _recipe(STUDENT_STEPS, STUDENT_BATCH, seed, KD_WEIGHT)
        hard = _recipe(STUDENT_STEPS, STUDENT_BATCH, seed)
        kd = distill(str(pruned), str(teacher), soft, folder / f"kd-{seed}")
        note_student("kd", "auc_recovered_frac", kd)
        sft = distill(str(pruned), None, hard, folder / f"sft-{seed}")
        note_student("sft", "auc_recovered_frac_sft", sft)
        quantized = build_variant(str(kd), kd, *load_recipe("w8a8"), folder / f"w8a8-{seed}")
        note("served_w8a8", _served(folder, quantized))
    print(bench_line("distill-quality", figures))


def _recipe(num_steps: int, batch_size: int, seed: int, kd_weight: float = 0.0) -> DistillRecipe:
    return DistillRecipe.model_validate(
        {
            "data": {
                "source": "recommendation",
                "num_examples": num_steps * batch_size,
                "num_validation": 8,
                "max_tokens": MAX_TOKENS,
                "seed": seed,
            },
            "supervision": {"sections": "answer"},
            "loss": {"kd_weight": kd_weight},
            "training": {
                "learning_rate": LEARNING_RATE,
                "batch_size": batch_size,
                "micro_batch_tokens": _MICRO_TOKENS,
                "validate_every": 1000,
                "save_every_s": 120,
                "keep": "last",
            },
            "stages": [{"steps": num_steps}],
        },
    )


def _cut() -> Recipe:
    cut = Prune(step="prune", mlp_remove_frac=0.25, kv_remove_frac=0.34)
    return Recipe(summary="", calibration=Calibrate(source="recommendation", num_samples=32), steps=(cut,))


def _test_prompts(is_latest_only: bool = True) -> list[ScoringPrompt]:
    workload = Recommendation(
        history_len=NUM_SKIPPED_LABELS, num_candidates=TEST_FILMS - NUM_SKIPPED_LABELS, is_latest_only=is_latest_only
    )
    return cast("list[ScoringPrompt]", workload.make_prompts("quality", NUM_WINDOWS))


def _in_process(folder: Path, directory: Path, is_latest_only: bool = True) -> dict[str, Estimate]:
    """AUC of every judged label by torch, in one pass over each member's films; kept by the model's hash."""
    file = folder / f"auc-{'latest' if is_latest_only else 'any'}-{model_hash(directory)[:16]}.json"
    if not file.is_file():
        tokenizer = load_tokenizer(directory)
        prompts = _test_prompts(is_latest_only)
        examples = [label_example(tokenizer, one, str(number), 8192) for number, one in enumerate(prompts)]
        labels = load_examples(tokenizer, directory, "recommendation", 1, 0, MAX_TOKENS, 0).labels
        model = load_model(directory, torch.float32).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = label_metrics(model, examples, labels, [one.group for one in prompts], 4096)
        write_atomically(file, json.dumps({name: vars(one) for name, one in found.items()}))
    return _read(file)


def _served(folder: Path, directory: Path) -> dict[str, Estimate]:
    """The same labels, each asked of the server as the one candidate behind all films before it."""
    file = folder / f"served-{model_hash(directory)[:16]}.json"
    if not file.is_file():
        prompts = _test_prompts()
        asked = [label_prompts(one, NUM_SKIPPED_LABELS) for one in prompts]
        with Engine(our_spec(folder / "engine.log", directory, "prefill")) as engine:
            target = Target(engine.spec.url, engine.spec.name)
            flat = ask_prompts(target, f"labels, {directory.name}", [one for several in asked for one in several])
        scores = iter(cast("Sequence[tuple[float, ...]]", flat))
        truths = [[one.truth[0] for one in several] for several in asked]
        given = [[next(scores)[0] for _ in several] for several in asked]
        figures = metrics.ranking_metrics(truths, given, [one.group for one in prompts])
        found = {name: metrics.estimate(figure) for name, figure in figures.items()}
        write_atomically(file, json.dumps({name: vars(one) for name, one in found.items()}))
    return _read(file)


def _read(file: Path) -> dict[str, Estimate]:
    told = json.loads(file.read_text(encoding="utf-8"))
    return {name: Estimate(**one) for name, one in told.items()}


if __name__ == "__main__":
    main()
