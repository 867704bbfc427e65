"""Compare ways to train a ranker by distillation: hard labels, a teacher's probabilities, lists, and two teachers.

    make bench-ranker-kd

The data is MovieLens, with the workload's own texts. The first teacher is `smollm2-135m-tuned`. The student is this
teacher without a part of its MLP neurons: the smallest of several cuts that costs 0.05 of the within-user AUC on the
development users, so that there is something to gain. The second teacher is the first one, trained further on hard
labels for as many steps as a student. The ways to train the student are the rows:

- `hard`: cross-entropy on the labels in the data.
- `soft`: divergence from the first teacher's probabilities at the labels, nearly all of which lies on yes and no.
- `mixed`: half of each.
- `listwise`: as `mixed`, but half of the weight at labels is the listwise loss over all labels of a user's sequence.
- `two-teachers`: as `mixed`, but both teachers have half of the weight.

All rows have the same steps, order of the data, seeds and learning rate. The rate is the one at which `hard` has the
best within-user AUC on the development users, which favors `hard`. Development users are those of the `load` split. The
`quality` split (test) is evaluated once, after all trainings, on the workload's own candidate lists. Differences from
`hard` are means over the seeds. Their 95% intervals resample the users, paired over the same lists. They do not contain
the spread over seeds, which the JSON line states.

It runs on a GPU if there is one, with more steps. The cache keeps every model and all scores, so an interrupted run
resumes. The last line of output is one JSON object. `--quick` trains for two steps, and `--model DIR` takes another
model: both only try the steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benches.cuts import smallest_costly_cut
from benches.rankers import list_scores, ranker_recipe
from slimserve.compress.build import build_variant
from slimserve.compress.recipe import Calibrate, Prune, Recipe
from slimserve.core.allocator import restart_with_fast_allocator
from slimserve.core.model import resolve_model
from slimserve.core.model_files import model_hash
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, cached_result
from slimserve.distill.recipe import DistillRecipe
from slimserve.distill.run import distill
from slimserve.workloads import intervals, metrics
from slimserve.workloads.interface import MetricData, ScoringPrompt, Split
from slimserve.workloads.recommendation import WORKLOAD

MODEL = "smollm2-135m-tuned"
METRICS = {"ndcg_at_10": "NDCG@10", "within_group_auc": "within-user AUC", "auc": "pooled AUC"}
CHOSEN_BY = "within_group_auc"
"""Metric on the development users that chooses the cut and the learning rate."""
LEAST_LOSS = 0.05
"""Value of this metric that the cut must cost."""
HARD = "hard"
LOSSES = {
    HARD: {"kd_weight": 0.0},
    "soft": {"kd_weight": 1.0},
    "mixed": {"kd_weight": 0.5},
    "listwise": {"kd_weight": 0.5, "list_weight": 0.5},
    "two-teachers": {"kd_weight": 0.5},
}
SECOND_WEIGHT, SECOND_SEED = 0.5, 100

Data = dict[str, MetricData]
"""Metrics by name."""


@dataclass(frozen=True)
class Size:
    """Size of a run."""

    num_steps: int = 40
    batch_size: int = 4
    rates: tuple[float, ...] = (2e-5, 5e-5, 1e-4)
    num_seeds: int = 3
    num_development: int = 128
    num_test: int = 112
    """Number of lists; the quality split has 112 users with one or more lists each, 346 in total."""
    num_calibration: int = 32
    """Number of sequences that the pruning reads."""


SIZES = {
    "cpu": Size(),
    "cuda": Size(num_steps=120, batch_size=16, rates=(2e-5, 5e-5, 1e-4, 2e-4), num_development=512, num_test=346),
    "quick": Size(
        num_steps=2,
        batch_size=2,
        rates=(1e-4, 3e-4),
        num_seeds=2,
        num_development=6,
        num_test=12,
        num_calibration=4,
    ),
}


class Bench:
    """One run with its cache folder."""

    def __init__(self, model: str, kind: str) -> None:
        self.size, self.teacher = SIZES[kind], resolve_model(model)
        self.folder = cache_dir(f"bench-ranker-kd-{kind}-{model_hash(self.teacher)[:8]}")
        self.development = _prompts("load", self.size.num_development)
        self.test = _prompts("quality", self.size.num_test)
        before = self._development_value(self.teacher)
        self.pruned, self.removed_frac = smallest_costly_cut(self._cut, self._development_value, before, LEAST_LOSS)
        self.rate = self._choose_rate()
        second = self._recipe(HARD, self.rate, SECOND_SEED)
        self.second = distill(str(self.teacher), None, second, self.folder / f"second-{self.rate:g}")

    def student(self, row: str, rate: float, seed: int) -> Path:
        """Return the student of a row; train it if the cache does not hold it."""
        teacher = str(self.teacher) if LOSSES[row]["kd_weight"] else None
        recipe = self._recipe(row, rate, seed)
        return distill(str(self.pruned), teacher, recipe, self.folder / f"{row}-{rate:g}-{seed}", recipe_name=row)

    def evaluate(self, directory: Path, prompts: Sequence[ScoringPrompt]) -> Data:
        """Return the quality metrics of a model; the cache keeps its scores."""

        def measure() -> Mapping[str, Any]:
            return {"scores": list_scores(directory, prompts)}

        scores = cached_result(self.folder, "scores", (model_hash(directory), prompts), measure)["scores"]
        return metrics.ranking_metrics([one.gains for one in prompts], scores, [one.group for one in prompts])

    def _recipe(self, row: str, rate: float, seed: int) -> DistillRecipe:
        second = [{"model": str(self.second), "weight": SECOND_WEIGHT}] if row == "two-teachers" else []
        return ranker_recipe(self.size.num_steps, self.size.batch_size, seed, rate, LOSSES[row], second)

    def _cut(self, removed_frac: float) -> Path:
        """Return the first teacher without a fraction of its MLP neurons."""
        calibration = Calibrate(source=WORKLOAD.name, num_samples=self.size.num_calibration)
        prune = Prune(step="prune", mlp_remove_frac=removed_frac)
        recipe = Recipe(summary="", calibration=calibration, steps=(prune,))
        name, argument = f"cut-{removed_frac:g}", str(self.teacher)
        return build_variant(argument, self.teacher, name, recipe, self.folder / name, device="auto")

    def _choose_rate(self) -> float:
        """Return the learning rate at which hard labels alone are best on the development users."""
        values = {rate: self._development_value(self.student(HARD, rate, 0)) for rate in self.size.rates}
        print_status(", ".join(f"rate {rate:g}: {CHOSEN_BY} {value:.4f}" for rate, value in values.items()))
        return max(values, key=lambda rate: values[rate])

    def _development_value(self, directory: Path) -> float:
        return self.evaluate(directory, self.development)[CHOSEN_BY].value


def main() -> None:
    restart_with_fast_allocator()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="Train for two steps, to try the benchmark.")
    parser.add_argument(
        "--model", default=MODEL, help="First teacher, of which the student is cut (default: %(default)s)."
    )
    arguments = parser.parse_args()
    bench = Bench(arguments.model, "quick" if arguments.quick else "cuda" if torch.cuda.is_available() else "cpu")
    seeds = range(bench.size.num_seeds)
    students = {row: [bench.student(row, bench.rate, seed) for seed in seeds] for row in LOSSES}
    models = {"teacher": [bench.teacher], "second-teacher": [bench.second], "pruned": [bench.pruned], **students}
    results = {name: [bench.evaluate(one, bench.test) for one in of_name] for name, of_name in models.items()}
    samples: dict[str, list[float]] = {"learning_rate": [bench.rate], "mlp_remove_frac": [bench.removed_frac]}
    samples |= dict(_samples(results))
    Console(stderr=True).print(_table(results, samples))
    print(bench_line("ranker-kd", samples))


def _prompts(split: Split, count: int) -> list[ScoringPrompt]:
    return cast("list[ScoringPrompt]", WORKLOAD.make_prompts(split, count))


def over_seeds(of_seeds: Sequence[MetricData]) -> MetricData:
    """Return the mean of one metric over students that differ in the seed alone; its rows remain the lists."""
    by_seed = [one.values for one in of_seeds if one.values is not None]
    values = tuple(np.mean(np.array(by_seed), axis=0).tolist()) if by_seed else None

    def statistic(chosen: list[int]) -> float:
        return float(np.mean([one.statistic(chosen) for one in of_seeds]))

    return replace(of_seeds[0], statistic=statistic, values=values)


def _samples(results: Mapping[str, Sequence[Data]]) -> Iterator[tuple[str, list[float]]]:
    """Yield each metric by seed, and the differences from `hard` by seed and with the interval of their mean."""
    for metric in METRICS:
        yield f"{metric}_chance", [results[HARD][0][metric].floor or 0.0]
        hard = [one[metric] for one in results[HARD]]
        for name, of_seeds in results.items():
            own = [one[metric] for one in of_seeds]
            yield f"{metric}_{name}", [one.value for one in own]
            if name in LOSSES and name != HARD:
                pairs = zip(own, hard, strict=True)
                yield f"{metric}_{name}_minus_hard", [ours.value - theirs.value for ours, theirs in pairs]
                samples = intervals.paired_samples(over_seeds(own), over_seeds(hard))
                low, high, _ = intervals.paired_difference(samples)
                yield f"{metric}_{name}_minus_hard_low", [low]
                yield f"{metric}_{name}_minus_hard_high", [high]


def _table(results: Mapping[str, Sequence[Data]], samples: Mapping[str, Sequence[float]]) -> Table:
    """Return the table of all rows, which fits 80 columns."""
    title = "Test users: value (minus hard), and the difference's 95% interval"
    table = Table("", *METRICS.values(), title=title)

    def mean(key: str) -> float:
        return float(np.mean(samples[key]))

    for name in ("chance", *results):
        cells = []
        for metric in METRICS:
            cell, key = f"{mean(f'{metric}_{name}'):.4f}", f"{metric}_{name}_minus_hard"
            if key in samples:
                cell += f" ({mean(key):+.4f})\n[{mean(f'{key}_low'):+.3f}, {mean(f'{key}_high'):+.3f}]"
            cells.append(cell)
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    main()
