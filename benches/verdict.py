"""Measure the error rates of the decision rule on simulated answers.

    make bench-verdict

The decision code of `slimserve compare` decides about simulated variants whose true quality is known. Each comparison
has 1, 3 or 8 variants beside the reference, on a task with accuracy 0.3, accuracy 0.7 or AUC 0.7 within lists of 16
items. Variants keep 90% of the reference's quality above the floor (too little: the tolerance is 3%), 97% (exactly the
limit) or 100%. Answers of a variant and the reference agree as those of W8A8 and dense SmolLM2 did in the comparison
of 2026-11-26 (commit 398c360): 20% of the discordance of two independent models, and a Kendall's tau of 0.62 between
scores.

Each comparison starts with a pilot of 256 prompts. The number of prompts that the rule then recommends is asked, in a
fixed design and in a sequential one that looks at tenths of its maximum. That maximum is 1.2 times as large, because
looking costs power. `sequential_prompts_frac` is the number of prompts that the sequential design asked a variant, over
the fixed design's, as a mean over variants that keep 90% and variants that keep 100%. The reference answers all prompts
in both. Finished cases are kept in the cache, so an interrupted run resumes. The last line of output is one JSON
object.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from slimserve.compare import decision, plan
from slimserve.compare.decision import DecisionRule, Ruling, look_errors
from slimserve.compare.plan import LOOKS
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.storage import cache_dir, cached_result, sha256_of_files
from slimserve.workloads import interface, intervals
from slimserve.workloads.interface import MetricData

NUM_COMPARISONS = int(os.environ.get("BENCH_COMPARISONS", "1000"))
NUM_VARIANTS = (1, 3, 8)
PILOT = 256
INFLATION = 1.2
"""Maximum of the sequential design over the number of prompts of the fixed design."""
_DISCORDANCE = 0.2
_TAU = 0.62
_NUM_POSITIVE = 8
"""Relevant items among the 16 of a list."""


@dataclass(frozen=True)
class Task:
    """Simulated answers to a task: a share of right answers, or an AUC within lists."""

    name: str
    quality: float
    floor: float

    def draw(self, random: np.random.Generator, num_prompts: int, kept: list[float]) -> list[NDArray[np.float64]]:
        """Return the value of each prompt, of the reference and of variants that truly keep these fractions."""
        return (self._answers if self.floor == 0 else self._aucs)(random, num_prompts, kept)

    def _answers(self, random: np.random.Generator, num_prompts: int, kept: list[float]) -> list[NDArray[np.float64]]:
        p = self.quality
        reference = random.random(num_prompts) < p
        gained, lost = _DISCORDANCE * p, _DISCORDANCE * (1 - p)  # equal numbers of answers are gained and lost
        sides = [reference]
        for frac in kept:
            chance = np.where(reference, 1 - lost - (1 - frac), gained)
            sides.append(random.random(num_prompts) < chance)
        return [side.astype(np.float64) for side in sides]

    def _aucs(self, random: np.random.Generator, num_prompts: int, kept: list[float]) -> list[NDArray[np.float64]]:
        correlation = np.sin(np.pi / 2 * _TAU)
        shared = random.normal(size=(num_prompts, 2 * _NUM_POSITIVE))
        sides = [self._auc_of(shared, self.quality)]
        for frac in kept:
            noise = random.normal(size=shared.shape)
            scores = correlation * shared + np.sqrt(1 - correlation**2) * noise
            sides.append(self._auc_of(scores, self.floor + frac * (self.quality - self.floor)))
        return sides

    @staticmethod
    def _auc_of(noise: NDArray[np.float64], quality: float) -> NDArray[np.float64]:
        """Return each list's AUC if the relevant items' scores are shifted so that its expectation is `quality`."""
        positive = noise[:, :_NUM_POSITIVE] + np.sqrt(2) * norm.ppf(quality)
        order = positive[:, :, None] > noise[:, None, _NUM_POSITIVE:]
        return np.asarray(order.mean(axis=(1, 2)))

    def metric(self, values: NDArray[np.float64]) -> MetricData:
        """Return the metric of these values, as the workloads make it."""
        return MetricData(
            lambda rows: float(values[rows].mean()),
            range(len(values)),
            len(values),
            successes=values > 0 if self.floor == 0 else None,  # type: ignore[arg-type]
            values=values,  # type: ignore[arg-type]
            floor=self.floor,
        )


TASKS = (Task("accuracy_0.3", 0.3, 0.0), Task("accuracy_0.7", 0.7, 0.0), Task("auc_0.7", 0.7, 0.5))
TRUTHS = {"bad": (0.9, 0.9), "good": (1.0, 0.9), "limit": (0.97, 0.97)}
"""Fractions that the first variant and the others truly keep."""


class Case(NamedTuple):
    task: Task
    num_variants: int
    truth: str
    number: int


class Outcome(NamedTuple):
    num_prompts: int
    """Number of prompts that the rule recommends after the pilot."""
    fixed: list[Ruling]
    sequential: list[Ruling]
    asked: list[int]
    """Number of prompts that the sequential design asked each variant."""


def compare(case: Case) -> Outcome:
    """Simulate one comparison: pilot, fixed design and sequential design."""
    task, count = case.task, case.num_variants
    random = np.random.default_rng(abs(hash((case.number, count, TASKS.index(task), list(TRUTHS).index(case.truth)))))
    rule = DecisionRule(num_variants=count)
    first, others = TRUTHS[case.truth]
    kept = [first] + [others] * (count - 1)
    pilot = task.draw(random, PILOT, kept)
    needed = [
        rule.prompts_needed(rule.margin(task.metric(side), task.metric(pilot[0]), PILOT)) or PILOT for side in pilot[1:]
    ]
    num_prompts = max(PILOT, *needed)
    values = task.draw(random, round(INFLATION * num_prompts), kept)
    fixed = [_decide(rule, task, values[0], side, num_prompts, rule.error) for side in values[1:]]
    sequential: list[Ruling] = []
    asked = []
    errors = look_errors(LOOKS, rule.error)
    for side in values[1:]:
        ruling: Ruling = "undecided"
        for look, error in zip(LOOKS, errors, strict=True):
            until = round(look * len(side))
            ruling = _decide(rule, task, values[0], side, until, error)
            if ruling != "undecided":
                break
        sequential.append(ruling)
        asked.append(until)
    return Outcome(num_prompts, fixed, sequential, asked)


def _decide(
    rule: DecisionRule, task: Task, reference: NDArray[np.float64], side: NDArray[np.float64], count: int, error: float
) -> Ruling:
    margin = rule.margin(task.metric(side[:count]), task.metric(reference[:count]), count)
    return rule.decide([margin.keep_probability], error)


def main() -> None:
    metrics: dict[str, list[float]] = {}
    cases: list[dict[str, float]] = []
    folder, inputs = cache_dir("bench-verdict"), (sha256_of_files(_code()), NUM_COMPARISONS)
    with multiprocessing.Pool() as pool:
        for task in TASKS:
            for count in NUM_VARIANTS:
                name = f"{task.name}_{count}"
                result = cached_result(folder, name, inputs, partial(_measure, pool, task, count))
                metrics[f"{name}_recommended_prompts"] = result["recommended_prompts"]
                metrics |= {f"{name}_{key}": [value] for key, value in result["rates"].items()}
                cases.append(result["rates"])
                text = ", ".join(f"{key} {value:.3f}" for key, value in result["rates"].items())
                print_status(f"{name}: {result['recommended_prompts'][1]:.0f} prompts; {text}")
                sys.stderr.flush()
    worst = {key: [(min if "undecided" in key else max)(case[key] for case in cases)] for key in cases[0]}
    print(bench_line("verdict", {**worst, **metrics, "num_comparisons": [float(NUM_COMPARISONS)]}))


def _code() -> list[Path]:
    """Return the files that determine the results."""
    return [Path(__file__), *(Path(inspect.getfile(module)) for module in (decision, plan, intervals, interface))]


def _measure(pool: Pool, task: Task, count: int) -> dict[str, Any]:
    """Return the error rates of one case, and the quartiles of the recommended number of prompts."""
    outcomes = {
        truth: pool.map(compare, [Case(task, count, truth, number) for number in range(NUM_COMPARISONS)], 10)
        for truth in TRUTHS
    }
    prompts = [one.num_prompts for truth in TRUTHS for one in outcomes[truth]]
    return {"recommended_prompts": np.quantile(prompts, [0.25, 0.5, 0.75]).tolist(), "rates": _rates(outcomes)}


def _rates(outcomes: dict[str, list[Outcome]]) -> dict[str, float]:
    """Return the error rates of one case; the summary keeps the worst over all cases."""
    rates = {}
    for prefix, design in (("", "fixed"), ("sequential_", "sequential")):
        shipped = {truth: [getattr(one, design) for one in ones] for truth, ones in outcomes.items()}
        rates[f"{prefix}false_ship_rate"] = float(np.mean(["keeps" in one for one in shipped["bad"]]))
        rates[f"{prefix}missed_ship_rate"] = float(np.mean([one[0] != "keeps" for one in shipped["good"]]))
        rates[f"{prefix}limit_ship_rate"] = float(np.mean(["keeps" in one for one in shipped["limit"]]))
        rates[f"{prefix}limit_undecided_rate"] = float(
            np.mean([ruling == "undecided" for one in shipped["limit"] for ruling in one])
        )
    fracs = [[one.asked[0] / one.num_prompts for one in outcomes[truth]] for truth in ("bad", "good")]
    rates["sequential_prompts_frac"] = float(np.mean([np.mean(frac) for frac in fracs]))
    rates["sequential_prompts_frac_keeps_90"] = float(np.mean(fracs[0]))
    rates["sequential_prompts_frac_keeps_100"] = float(np.mean(fracs[1]))
    return rates


if __name__ == "__main__":
    main()
