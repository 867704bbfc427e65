"""Compare what students of a pruned teacher learn from a part of each reasoning trace, and from other losses and data.

    make bench-truncation

Task, teacher, pruned model and the base recipe are those of bench-recovery, whose models are reused: chain of thought
and answer of complete sequences, and half of the loss is the divergence from the teacher. Each row changes the recipe
in one place and trains the pruned model for the same number of steps:

- `span`: the first 25, 50 or 75% of each sequence, or 50% at its end or in its middle.
- `tokens`: the shorter spans again, for as many tokens in total as the base.
- `sections`: other supervised sections.
- `loss`: without the teacher, with it alone, and with the reverse divergence.
- `data`: the second half of the steps on-policy, and half of the neurons cut after half of the steps (`gradual`).

The base and `left-0.5` have three seeds. All students are asked the test problems of bench-recovery. Settings come from
its development problems; no row chooses anything. Intervals are 95% and paired over the problems.

`retained_at_half` is (accuracy at half of each sequence - pruned) / (accuracy at complete sequences - pruned). The
table and the plot go to `results/truncation`. The cache keeps every model and answer, so an interrupted run resumes.
The last line of output is one JSON object. `--quick` trains for two steps, and `--model DIR` takes another model: both
only try the steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benches.recovery import MODEL, Student, Students, Values, bootstrap, difference, first_stage, interval, recovered
from slimserve.core.allocator import restart_with_fast_allocator
from slimserve.core.progress import print_status
from slimserve.core.provenance import provenance
from slimserve.core.storage import write_atomically

RESULTS = Path("results") / "truncation"
BASE, HALF = "base", "left-0.5"
COSTS = ("total_seconds", "tokens_read", "total_flops", "peak_bytes")
Metric = dict[str, float | None]
"""An estimate with its interval."""


@dataclass(frozen=True)
class Row:
    """A student: tables of the recipe that replace those of the base, and the factor of its steps."""

    table: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    steps_factor: float = 1.0
    has_seeds: bool = False


def _span(window: str, lead_span: float, steps_factor: float = 1.0) -> Row:
    name = f"{window}-{lead_span:g}"
    supervision = {"supervision": {"window": window, "lead_span": lead_span}}
    if steps_factor != 1:
        return Row("tokens", f"{name}-tokens", supervision, steps_factor)
    return Row("span", name, supervision, has_seeds=name == HALF)


def _sections(sections: str) -> Row:
    return Row("sections", sections, {"supervision": {"sections": sections}})


def _rows(num_steps: int) -> tuple[Row, ...]:
    half = num_steps // 2
    on_policy = {"kind": "on_policy", "steps": num_steps - half, "max_new_tokens": 480, "round_steps": 5}
    return (
        *(_span("left", part) for part in (0.25, 0.5, 0.75)),
        *(_span(window, 0.5) for window in ("right", "middle")),
        *(_span("left", part, 1 / part) for part in (0.25, 0.5, 0.75)),
        *map(_sections, ("all", "prompt+cot", "cot", "answer")),
        Row("loss", "teacher-alone", {"loss": {"kd_weight": 1.0}}),
        Row("loss", "reverse-kl", {"loss": {"divergence": "reverse_kl"}}),
        Row("data", "on-policy", {"stages": [{"steps": half}, on_policy]}),
    )


class Bench:
    """Trains and asks the students of all rows, on top of the first stage of bench-recovery."""

    def __init__(self, students: Students, outcome: Mapping[str, Any]) -> None:
        self._students, self._outcome = students, outcome
        self._rate = outcome["rates"]["distilled"]
        self._teacher = students.folder / "teacher"
        self._pruned = students.folder / f"cut-{outcome['mlp_remove_frac']:g}"
        self.correct: dict[str, list[Values]] = {}
        """Per row and seed, 1 for each test problem that is solved."""
        self.costs: dict[str, dict[str, float]] = {}
        self.tables: dict[str, str] = {}

    def run(self) -> None:
        for name, method in ((BASE, "distilled"), ("no-teacher", "sft")):
            seeds = range(self._students.sizes.num_seeds)
            own = [Student(method, self._outcome["rates"][method], seed).name for seed in seeds]
            self._add("loss" if method == "sft" else BASE, name, own)
            self.correct[name] = [np.array(self._outcome["correct"][one], dtype=float) for one in own]
        rows = _rows(self._students.sizes.student_steps)
        for number, row in enumerate(rows, start=1):
            print_status(f"row {number} of {len(rows) + 1}: {row.name}")
            seeds = range(self._students.sizes.num_seeds if row.has_seeds else 1)
            directories = [self._train(row, seed) for seed in seeds]
            self._add(row.table, row.name, [one.name for one in directories])
            self.correct[row.name] = [self._ask(one) for one in directories]
        print_status(f"row {len(rows) + 1} of {len(rows) + 1}: gradual")
        gradual = self._gradual()
        self._add("data", "gradual", [gradual.name])
        self.correct["gradual"] = [self._ask(gradual)]

    def _add(self, table: str, name: str, students: Sequence[str]) -> None:
        costs = {**self._outcome["costs"], **self._students.costs}
        self.tables[name] = table
        self.costs[name] = {key: float(np.median([costs[one][key] for one in students])) for key in COSTS}

    def _train(self, row: Row, seed: int) -> Path:
        num_steps = round(self._students.sizes.student_steps * row.steps_factor)
        return self._students.train(
            f"row-{row.name}-{seed}", self._pruned, str(self._teacher), self._rate, num_steps, seed, row.changes
        )

    def _ask(self, directory: Path) -> Values:
        return np.array(self._students.test_answers(directory), dtype=float)

    def _gradual(self) -> Path:
        """Cut and train in two rounds, each of which removes the same fraction of the neurons that are left."""
        steps = self._students.sizes.student_steps
        removed_frac = 1 - (1 - self._outcome["mlp_remove_frac"]) ** 0.5
        train = partial(self._students.train, teacher=str(self._teacher), rate=self._rate, seed=0)
        first_cut = self._students.cut(self._teacher, "gradual-cut-1", removed_frac)
        first = train("gradual-1", first_cut, num_steps=steps // 2)
        second_cut = self._students.cut(first, "gradual-cut-2", removed_frac)
        second = train("gradual-2", second_cut, num_steps=steps - steps // 2)
        costs = self._students.costs
        costs["gradual-2"] = {
            key: max(costs[one][key] for one in ("gradual-1", "gradual-2"))
            if key == "peak_bytes"
            else costs["gradual-1"][key] + costs["gradual-2"][key]
            for key in COSTS
        }
        return second

    def metrics(self) -> dict[str, Any]:
        """Return each row's accuracy and difference from the base, what half of a sequence retains, and cost ratios."""
        means = {name: np.mean(seeds, axis=0) for name, seeds in self.correct.items()}
        pruned = np.array(self._outcome["correct"]["pruned"], dtype=float)
        results: dict[str, Any] = {"accuracy_pruned": interval(pruned)}
        for name, mean in means.items():
            seeds = [float(one.mean()) for one in self.correct[name]]
            results[f"accuracy_{name}"] = interval(mean) | {"seeds": seeds}
            if name != BASE:
                results[f"{name}_minus_base"] = bootstrap(difference, mean, means[BASE])
        results["retained_at_half"] = bootstrap(recovered, means[HALF], means[BASE], pruned)
        for name, key in (("time", "total_seconds"), ("flops", "total_flops"), ("memory", "peak_bytes")):
            results[f"{name}_ratio"] = self.costs[HALF][key] / self.costs[BASE][key]
        return results


def markdown(bench: Bench, metrics: Mapping[str, Any]) -> str:
    """Return the table of all rows as Markdown."""
    lines = [
        "| table | row | accuracy | minus the base | minutes | tokens | TFLOP | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
        f"| | pruned, not trained | {_shown(metrics['accuracy_pruned'])} | | | | | |",
    ]
    for name, table in sorted(bench.tables.items(), key=lambda item: list(bench.tables.values()).index(item[1])):
        costs = bench.costs[name]
        difference = _shown(metrics[f"{name}_minus_base"]) if name != BASE else ""
        lines.append(
            f"| {table} | {name} | {_shown(metrics[f'accuracy_{name}'])} | {difference} "
            f"| {costs['total_seconds'] / 60:.1f} | {costs['tokens_read']:,.0f} | {costs['total_flops'] / 1e12:.0f} "
            f"| {costs['peak_bytes'] / 2**30:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _shown(metric: Metric) -> str:
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    return "" if value is None else f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def plot(bench: Bench, metrics: Mapping[str, Any], file: Path) -> None:
    """Plot the accuracy of each row with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(bench.tables)[::-1]
    figure, axis = pyplot.subplots(figsize=(7, 0.32 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        metric = metrics[f"accuracy_{name}"]
        axis.plot([metric["low"], metric["high"]], [place, place], color="tab:blue")
        axis.plot(metric["value"], place, "o", color="tab:blue")
    axis.axvline(metrics["accuracy_pruned"]["value"], color="gray", linestyle=":", label="pruned, not trained")
    axis.axvline(metrics[f"accuracy_{BASE}"]["value"], color="gray", linestyle="--", label="base")
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="share of the test problems solved")
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def main() -> None:
    restart_with_fast_allocator()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps and eight problems; results/ is not written")
    parser.add_argument("--model", default=MODEL, help=f"model that becomes the teacher (default {MODEL})")
    options = parser.parse_args()
    bench = Bench(*first_stage(options.model, options.quick))
    bench.run()
    metrics = bench.metrics()
    table = markdown(bench, metrics)
    print_status(f"all rows:\n{table}")
    if not options.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_atomically(RESULTS / "truncation.md", table)
        plot(bench, metrics, RESULTS / "truncation.png")
    print(json.dumps({"bench": "truncation", **provenance(), "costs": bench.costs, "metrics": metrics}))


if __name__ == "__main__":
    main()
