"""Comparison with an earlier run: the quality and the goodput that were lost since.

A metric fails if its loss exceeds the limit AND the interval of the loss excludes 0. The loss is a fraction of the
earlier value.

Quality is paired prompt by prompt with the answers that the earlier run kept; the interval is that of the paired
bootstrap. Speed is paired round by round. If the earlier variant's directory still holds the same model, and it differs
from today's, that model is served again in the same rounds; the interval is the range over rounds. Otherwise the
earlier run's recorded rounds are used and the interval is the range over all pairs of rounds. A note then says that the
machine itself may have changed its speed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slimserve.compare.decision import kept_frac
from slimserve.compare.evaluation import answers_file
from slimserve.compare.quality import quality_metrics, read_answers
from slimserve.compare.results import BaselineOutcome, Comparison, Loss, Preset, VariantResult, load_comparison
from slimserve.compare.settings import BaselineSettings
from slimserve.core.errors import UserError
from slimserve.loadtest.summary import LoadSummary
from slimserve.workloads import intervals


def load_baseline(baseline: BaselineSettings, output: Path) -> Comparison | None:
    """Return the earlier comparison; None without a baseline. UserError if it is in the output folder itself."""
    if baseline.path is None:
        return None
    if _folder(baseline.path).resolve() == output.resolve():
        raise UserError("--baseline", baseline.path, "is the output folder", "name another folder with -o")
    return load_comparison(baseline.path)


def preset_like(baseline: Comparison, preset: Preset, workloads: Sequence[str]) -> Preset:
    """Return `preset` with the earlier run's rates, because only equal loads can be compared.

    Raises UserError if the numbers of prompts or users, or the seeds, differ.
    """
    before = baseline.preset
    for workload in workloads:
        pairs = [
            ("quality prompts", before.quality_prompts.get(workload), preset.quality_prompts.get(workload)),
            ("users", before.users.get(workload), preset.users.get(workload)),
            ("seed", before.seed, preset.seed),
        ]
        for name, then, now in pairs:
            if then != now:
                remedy = "use the settings of the baseline, or measure the baseline again"
                raise UserError("--baseline", f"{name} of {workload}", f"were {then} and are {now}", remedy)
    if preset.rates:
        return preset
    rates = {workload: tuple(baseline.rates(workload)) for workload in workloads}
    return replace(preset, rates={workload: known for workload, known in rates.items() if known})


def find_baseline_variants(
    comparison: Comparison, baseline: Comparison, identify: Callable[[Path], str]
) -> list[VariantResult]:
    """Return the earlier variants that can be served again: unchanged on disk, and different from today's."""
    served_again = []
    for variant in comparison.variants:
        before = _variant_named(baseline, variant.name)
        if before is None or before.directory is None or variant.directory is None:
            continue
        directory = Path(before.directory)
        if before.identity != variant.identity and directory.is_dir() and identify(directory) == before.identity:
            served_again.append(
                replace(before, rounds=[], quality={}, differences={}, rank_agreement={}, bottlenecks={}, costs={})
            )
    return served_again


def check_baseline(
    comparison: Comparison, folder: Path, baseline: BaselineSettings, before: Comparison
) -> BaselineOutcome:
    """Return the losses of every variant in both comparisons; UserError if they share no variant."""
    assert baseline.path is not None
    losses: list[Loss] = []
    notes: list[str] = []
    for variant in comparison.variants:
        earlier = _variant_named(before, variant.name)
        if earlier is None:
            notes.append(f"{variant.name} is new: the baseline has no variant of that name")
            continue
        again = next((one for one in comparison.baseline_variants if one.name == variant.name), None)
        if again is None:
            why = "is unchanged" if earlier.identity == variant.identity else "of the baseline no longer exists"
            notes.append(
                f"{variant.name}: the model {why}, so its speed is compared with the recorded one; the machine may "
                "have changed its speed since then"
            )
        for workload, primary_metric in comparison.workloads.items():
            files = [
                answers_file(_folder(baseline.path), variant.name, workload),
                answers_file(folder, variant.name, workload),
            ]
            if all(file.exists() for file in files):
                result = _quality_loss(comparison, variant.name, workload, primary_metric, files, baseline)
                losses += [result] if isinstance(result, Loss) else []
                notes += [result] if isinstance(result, str) else []
            else:
                notes.append(f"{variant.name}: raw answers of {workload} are missing, so its quality is not compared")
            if not variant.capacity(workload):
                notes.append(f"{variant.name}: was not load-tested with {workload}, so its speed is not compared")
            losses += _speed_losses(comparison, variant, again or earlier, workload, again is not None, baseline)
    if not losses:
        remedy = "compare the same variants and workloads"
        raise UserError("--baseline", baseline.path, "shares no measured variant with this comparison", remedy)
    return BaselineOutcome(str(baseline.path), losses, notes)


def _quality_loss(
    comparison: Comparison,
    name: str,
    workload: str,
    primary_metric: str,
    files: Sequence[Path],
    baseline: BaselineSettings,
) -> Loss | str:
    """Return the loss of the primary metric, or a note that says why there is none."""
    preset = comparison.preset
    then, now = (read_answers(file) for file in files)
    if then.prompts_sha256 != now.prompts_sha256:
        return f"{name}: the prompts of {workload} differ from the baseline's, so its quality is not compared"
    both = min(len(then.answers), len(now.answers))
    before, after = (
        quality_metrics(workload, preset.quality_prompts[workload], preset.seed, answers.first(both))[primary_metric]
        for answers in (then, now)
    )
    floor = before.floor or 0.0
    samples = intervals.paired_samples(after, before) - floor
    samples = samples[samples[:, 1] > 0]
    if not before.value > floor or not len(samples):
        return f"{name}: the {primary_metric} of {workload} was at its floor in the baseline, so no loss is possible"
    kept = samples[:, 0] / samples[:, 1]
    low, high, _ = intervals.paired_difference(np.stack([np.ones_like(kept), kept], axis=1))
    loss = 1 - kept_frac(after.value, before.value, floor)
    limit = baseline.max_quality_loss_frac
    return Loss(name, workload, primary_metric, "quality", loss, low, high, limit, fails=loss > limit and low > 0)


def _speed_losses(
    comparison: Comparison,
    variant: VariantResult,
    before: VariantResult,
    workload: str,
    is_interleaved: bool,
    baseline: BaselineSettings,
) -> list[Loss]:
    """Return the losses of throughput at capacity and, with objectives, of goodput at the SLO rate."""
    rate = comparison.slo_rates.get(workload, 0.0)
    sides: dict[str, tuple[list[float], list[float]]] = {}
    capacity = variant.capacity(workload), before.capacity(workload)
    if all(capacity):
        metric = "items_per_s" if capacity[0][0].items_per_s > 0 else "output_tokens_per_s"
        sides[metric] = tuple([getattr(one, metric) for one in side] for side in capacity)  # type: ignore[assignment]
    goodputs = _goodputs(variant.at_rate(workload, rate)), _goodputs(before.at_rate(workload, rate))
    if all(goodputs):
        sides["goodput_per_s"] = goodputs
    losses = []
    limit = baseline.max_goodput_loss_frac
    for metric, (now, then) in sides.items():
        pairs = list(zip(now, then, strict=False)) if is_interleaved else list(itertools.product(now, then))
        lost = [1 - after / earlier for after, earlier in pairs if earlier > 0]
        if not lost:
            continue
        median = statistics.median(lost)
        fails = median > limit and min(lost) > 0
        losses.append(Loss(variant.name, workload, metric, "goodput", median, min(lost), max(lost), limit, fails))
    return losses


def _goodputs(summaries: Sequence[LoadSummary]) -> list[float]:
    return [one.goodput_per_s for one in summaries if one.goodput_per_s is not None]


def _variant_named(comparison: Comparison, name: str) -> VariantResult | None:
    return next((variant for variant in comparison.variants if variant.name == name), None)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
