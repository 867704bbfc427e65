"""Measure how much of the AUC that pruning costs is recovered by distillation, and the AUC of the served INT8 students.

    make bench-distill-quality

All models use MovieLens, with every label of a user's items supervised. The teacher is a fine-tuned SmolLM2-135M. The
pruned student is the teacher without a quarter of its MLP neurons and one of three KV groups. It is trained again on
the same histories for the same number of steps, with three seeds. `sft` trains on the labels alone; `kd` gives half of
the loss weight to the teacher. The `kd` students are then quantized to W8A8 and evaluated through the served endpoint.

AUC covers the 9th to the 24th label of a user's latest 24 items. It is pooled over all users that are in no training or
calibration data; the within-user AUC is also reported. A user's earlier items are harder to predict, so the teacher's
AUC over windows of any time is also reported. `auc_recovered_frac` is (kd - pruned) / (teacher - pruned) for one seed.
The cache keeps every student, so an interrupted run resumes. The last line of output is one JSON object. The benchmark
takes about an hour; `--quick` runs one seed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from benches.rankers import ranker_recipe, sequence_scores
from benches.served import MODEL, our_spec
from slimserve.compare.quality import ask_prompts
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import Calibrate, Prune, Recipe, load_recipe
from slimserve.core.allocator import restart_with_fast_allocator
from slimserve.core.model import resolve_model
from slimserve.core.model_files import model_hash
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, cached_result
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.distill.validation import NUM_SKIPPED_LABELS
from slimserve.serve.launch.process import Engine
from slimserve.workloads import intervals, metrics
from slimserve.workloads.interface import Estimate, ScoringPrompt
from slimserve.workloads.recommendation import Recommendation, label_prompts

NUM_SEEDS = 3
TEACHER_STEPS, TEACHER_BATCH = 60, 8
STUDENT_STEPS, STUDENT_BATCH = 40, 4
LEARNING_RATE = 5e-5
"""Peak learning rate. At 1e-4 the loss on a user's noisy labels rises. Pruning also breaks the attention sink of a few
sequences, and at that rate a step on one of them destabilizes the student."""
KD_WEIGHT = 0.5
NUM_TEST_ITEMS = 24
NUM_WINDOWS = 192


def main() -> None:
    restart_with_fast_allocator()
    num_seeds = 1 if "--quick" in sys.argv[1:] else NUM_SEEDS
    folder = cache_dir("bench-distill-quality")
    samples: dict[str, list[float]] = {}

    def record(name: str, results: dict[str, Estimate]) -> float:
        for metric, key in (("auc", f"auc_{name}"), ("within_group_auc", f"within_member_auc_{name}")):
            samples.setdefault(key, []).append(results[metric].value)
        auc = results["auc"]
        print_status(f"{name}: AUC {auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}] over {auc.n} labels")
        return auc.value

    record("untrained", _in_process(folder, resolve_model(MODEL)))
    teacher = distill(MODEL, None, _recipe(TEACHER_STEPS, TEACHER_BATCH, 42), folder / "teacher")
    auc_teacher = record("teacher", _in_process(folder, teacher))
    record("teacher_any_time", _in_process(folder, teacher, is_latest_only=False))
    pruned = build_variant(str(teacher), teacher, "cut", _prune_recipe(), folder / "pruned")
    auc_pruned = record("pruned", _in_process(folder, pruned))

    def record_student(name: str, key: str, directory: Path) -> None:
        recovered = (record(name, _in_process(folder, directory)) - auc_pruned) / (auc_teacher - auc_pruned)
        samples.setdefault(key, []).append(recovered)

    for seed in range(num_seeds):
        soft = _recipe(STUDENT_STEPS, STUDENT_BATCH, seed, KD_WEIGHT)
        hard = _recipe(STUDENT_STEPS, STUDENT_BATCH, seed)
        kd = distill(str(pruned), str(teacher), soft, folder / f"kd-{seed}")
        record_student("kd", "auc_recovered_frac", kd)
        sft = distill(str(pruned), None, hard, folder / f"sft-{seed}")
        record_student("sft", "auc_recovered_frac_sft", sft)
        w8a8 = load_recipe("w8a8", ["calibration.source=mixed"])
        quantized = build_variant(str(kd), kd, *w8a8, folder / f"w8a8-{seed}")
        record("served_w8a8", _served(folder, quantized))
    print(bench_line("distill-quality", samples))


def _recipe(num_steps: int, batch_size: int, seed: int, kd_weight: float = 0.0) -> DistillRecipe:
    return ranker_recipe(num_steps, batch_size, seed, LEARNING_RATE, {"kd_weight": kd_weight}, num_validation=8)


def _prune_recipe() -> Recipe:
    prune = Prune(step="prune", mlp_remove_frac=0.25, kv_remove_frac=0.34)
    return Recipe(summary="", calibration=Calibrate(source="recommendation", num_samples=32), steps=(prune,))


def _test_prompts(is_latest_only: bool = True) -> list[ScoringPrompt]:
    workload = Recommendation(
        history_len=NUM_SKIPPED_LABELS,
        num_candidates=NUM_TEST_ITEMS - NUM_SKIPPED_LABELS,
        is_latest_only=is_latest_only,
    )
    return cast("list[ScoringPrompt]", workload.make_prompts("quality", NUM_WINDOWS))


def _in_process(folder: Path, directory: Path, is_latest_only: bool = True) -> dict[str, Estimate]:
    """Return metrics of all test labels from one torch pass per user."""
    prompts = _test_prompts(is_latest_only)

    def measure() -> dict[str, Estimate]:
        truths, scores = zip(*sequence_scores(directory, prompts), strict=True)
        data = metrics.ranking_metrics(truths, scores, [one.group for one in prompts])
        return {name: intervals.estimate(one) for name, one in data.items()}

    return _kept(folder, "auc", directory, prompts, measure)


def _served(folder: Path, directory: Path) -> dict[str, Estimate]:
    """Return metrics of the same labels from a server; each label is the only candidate after all earlier items."""
    prompts = _test_prompts()

    def measure() -> dict[str, Estimate]:
        queries = [label_prompts(one, NUM_SKIPPED_LABELS) for one in prompts]
        with Engine(our_spec(folder / "engine.log", directory, "prefill")) as engine:
            target = Target(engine.spec.url, engine.spec.name)
            flat_queries = [one for user_queries in queries for one in user_queries]
            answers = ask_prompts(target, f"labels, {directory.name}", flat_queries)
        scores = iter(cast("Sequence[tuple[float, ...]]", answers))
        labels = [[one.truth[0] for one in user_queries] for user_queries in queries]
        predicted = [[next(scores)[0] for _ in user_queries] for user_queries in queries]
        data = metrics.ranking_metrics(labels, predicted, [one.group for one in prompts])
        return {name: intervals.estimate(one) for name, one in data.items()}

    return _kept(folder, "served", directory, prompts, measure)


def _kept(
    folder: Path,
    name: str,
    directory: Path,
    prompts: Sequence[ScoringPrompt],
    measure: Callable[[], dict[str, Estimate]],
) -> dict[str, Estimate]:
    """Return what `measure` returns; the cache keeps it by the model, the test prompts and the skipped labels."""
    inputs = (model_hash(directory), prompts, NUM_SKIPPED_LABELS)
    kept = cached_result(folder, name, inputs, lambda: {key: vars(one) for key, one in measure().items()})
    return {key: Estimate(**one) for key, one in kept.items()}


if __name__ == "__main__":
    main()
