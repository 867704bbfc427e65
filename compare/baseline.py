"""Against an earlier comparison: what was lost in quality and in goodput since.

The rule: a figure fails where its loss, as a share of the earlier one, is above the limit AND its interval excludes no
loss. Quality is paired prompt by prompt with the answers that the earlier run kept, and its interval is that of the
paired bootstrap. Speed is paired round by round: where the earlier variant's directory still holds the model that was
measured then, and it is another one than today's, it is served in the same rounds as today's, and its interval is from
the least to the largest loss of a round. Where it is gone, or is the same, the earlier run's rounds are taken as they
were recorded; the interval is from the least to the largest loss over all pairs of rounds, and drift of the machine
between the runs is not excluded, which a note says.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slimserve.compare.evaluation import answers_file, paired
from slimserve.compare.plan import Baseline
from slimserve.compare.quality import figures_of, read_answers
from slimserve.compare.results import BaselineOutcome, Comparison, Effort, Loss, VariantResult, load_comparison
from slimserve.core.errors import UserError
from slimserve.loadtest.summary import LoadSummary
from slimserve.workloads import metrics


def load_baseline(baseline: Baseline, output: Path) -> Comparison:
    """The earlier comparison; UserError where it is the one that is to be written."""
    folder = _folder(baseline)
    if folder.resolve() == output.resolve():
        raise UserError("--baseline", baseline.path, "is where this comparison goes", "name another folder with -o")
    return load_comparison(baseline.path)


def effort_like(baseline: Comparison, effort: Effort, workloads: Sequence[str]) -> Effort:
    """`effort` with the earlier run's rates, as only equal loads compare.

    Raises UserError where prompts, users or seed differ.
    """
    before = baseline.effort
    for workload in workloads:
        pairs = [
            ("quality prompts", before.quality_prompts.get(workload), effort.quality_prompts.get(workload)),
            ("users", before.users.get(workload), effort.users.get(workload)),
            ("seed", before.seed, effort.seed),
        ]
        for name, then, now in pairs:
            if then != now:
                remedy = "measure with the settings of the baseline, or measure the baseline anew"
                raise UserError("--baseline", f"{name} of {workload}", f"were {then} and are {now}", remedy)
    if effort.rates:
        return effort
    rates = {workload: tuple(baseline.rates(workload)) for workload in workloads}
    return replace(effort, rates={workload: found for workload, found in rates.items() if found})


def counterparts(comparison: Comparison, baseline: Comparison, identify: Callable[[Path], str]) -> list[VariantResult]:
    """Earlier variants to be served beside today's of the same names: still there, as they were, and different."""
    found = []
    for variant in comparison.variants:
        before = _named(baseline, variant.name)
        if before is None or before.directory is None or variant.directory is None:
            continue
        directory = Path(before.directory)
        if before.identity != variant.identity and directory.is_dir() and identify(directory) == before.identity:
            found.append(replace(before, rounds=[], quality={}, differences={}, rank_drift={}, regime={}, costs={}))
    return found


def check_baseline(comparison: Comparison, folder: Path, baseline: Baseline, before: Comparison) -> BaselineOutcome:
    """Losses of every variant that both comparisons have; UserError where there is none."""
    losses: list[Loss] = []
    notes: list[str] = []
    for variant in comparison.variants:
        earlier = _named(before, variant.name)
        if earlier is None:
            notes.append(f"{variant.name} is new: the baseline has no variant of that name")
            continue
        again = next((one for one in comparison.counterparts if one.name == variant.name), None)
        if again is None:
            why = "is the same as then" if earlier.identity == variant.identity else "of then is gone"
            notes.append(
                f"{variant.name}: the model {why}, so speed is compared with what was recorded then; "
                "drift of the machine since is not excluded"
            )
        for workload, primary_metric in comparison.workloads.items():
            files = [
                answers_file(_folder(baseline), variant.name, workload),
                answers_file(folder, variant.name, workload),
            ]
            if all(file.exists() for file in files):
                found = _quality_loss(comparison, variant.name, workload, primary_metric, files, baseline)
                losses += [found] if isinstance(found, Loss) else []
                notes += [found] if isinstance(found, str) else []
            else:
                notes.append(f"{variant.name}: raw answers of {workload} are missing, so its quality is not compared")
            losses += _speed_losses(comparison, variant, again or earlier, workload, again is not None, baseline)
    if not losses:
        remedy = "compare the same variants and workloads"
        raise UserError("--baseline", baseline.path, "shares no measured variant with this comparison", remedy)
    return BaselineOutcome(str(baseline.path), losses, notes)


def _quality_loss(
    comparison: Comparison, name: str, workload: str, primary_metric: str, files: Sequence[Path], baseline: Baseline
) -> Loss | str:
    effort = comparison.effort
    then, now = (read_answers(file) for file in files)
    if then.prompts_sha256 != now.prompts_sha256:
        return f"{name}: the prompts of {workload} are not those of the baseline, so its quality is not compared"
    before, after = (
        figures_of(workload, effort.quality_prompts[workload], effort.seed, answers)[primary_metric]
        for answers in (then, now)
    )
    samples = paired({primary_metric: after}, {primary_metric: before}, now, then)[primary_metric]
    samples = samples[samples[:, 1] > 0]
    if not before.value > 0 or not len(samples):
        return f"{name}: the baseline had no {primary_metric} of {workload} to lose"
    kept = samples[:, 0] / samples[:, 1]
    low, high, _ = metrics.paired_difference(np.stack([np.ones_like(kept), kept], axis=1))
    loss = 1 - after.value / before.value
    limit = baseline.max_quality_loss_frac
    return Loss(name, workload, primary_metric, "quality", loss, low, high, limit, fails=loss > limit and low > 0)


def _speed_losses(
    comparison: Comparison,
    variant: VariantResult,
    before: VariantResult,
    workload: str,
    is_interleaved: bool,
    baseline: Baseline,
) -> list[Loss]:
    """Of throughput at capacity, and of goodput at the judged rate where there are objectives."""
    rate = comparison.judged_rates.get(workload, 0.0)
    sides: dict[str, tuple[list[float], list[float]]] = {}
    capacity = variant.capacity(workload), before.capacity(workload)
    if all(capacity):
        figure = "items_per_s" if capacity[0][0].items_per_s > 0 else "output_tokens_per_s"
        sides[figure] = tuple([getattr(one, figure) for one in side] for side in capacity)  # type: ignore[assignment]
    goodputs = _goodputs(variant.at_rate(workload, rate)), _goodputs(before.at_rate(workload, rate))
    if all(goodputs):
        sides["goodput_per_s"] = goodputs
    losses = []
    limit = baseline.max_goodput_loss_frac
    for figure, (now, then) in sides.items():
        pairs = list(zip(now, then, strict=False)) if is_interleaved else list(itertools.product(now, then))
        lost = [1 - after / earlier for after, earlier in pairs if earlier > 0]
        if not lost:
            continue
        middle = statistics.median(lost)
        fails = middle > limit and min(lost) > 0
        losses.append(Loss(variant.name, workload, figure, "goodput", middle, min(lost), max(lost), limit, fails))
    return losses


def _goodputs(summaries: Sequence[LoadSummary]) -> list[float]:
    return [one.goodput_per_s for one in summaries if one.goodput_per_s is not None]


def _named(comparison: Comparison, name: str) -> VariantResult | None:
    return next((variant for variant in comparison.variants if variant.name == name), None)


def _folder(baseline: Baseline) -> Path:
    return baseline.path if baseline.path.is_dir() else baseline.path.parent
