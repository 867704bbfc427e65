"""`slimserve compare`: builds, serves, evaluates and load-tests several variants of a model and decides which to ship.

results.json is written after every measurement. The same command with the same output folder resumes an interrupted
comparison, and measures again only those variants whose files or launch changed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from slimserve.compare.backend import Backend
from slimserve.compare.baseline import check_baseline, find_baseline_variants, load_baseline, preset_like
from slimserve.compare.evaluation import answers_file, evaluate_loads, evaluate_quality
from slimserve.compare.plan import REFERENCE, calibration_warnings, describe_plan, make_preset, slo_rate
from slimserve.compare.results import (
    RESULTS_FILE,
    TEXT,
    Comparison,
    Preset,
    Requirements,
    VariantResult,
    load_comparison,
)
from slimserve.compare.rounds import Measurement
from slimserve.compare.settings import BaselineSettings, CompareSettings
from slimserve.compare.verdict import make_verdict
from slimserve.compress.recipe import load_recipe
from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target, find_target
from slimserve.core.progress import print_status
from slimserve.workloads import load_workload


def compare(
    model: str,
    settings: CompareSettings,
    output: Path,
    *,
    preset: Preset | None = None,
    backend: Backend | None = None,
) -> Comparison:
    """Build, serve, evaluate and load-test every variant; results.json and the raw data are written to `output`.

    The variants are those of the recipes, then the existing models, then the endpoints. The reference is `dense`, or
    else the first variant. `preset` replaces the one that the settings select.

    Resumes a comparison of the same settings in `output`. Raises UserError before any work if a name is unknown or if
    `output` holds a comparison of other settings.
    """
    workloads = [load_workload(argument).name for argument in settings.workloads]
    names = _variant_names(settings, workloads)
    reference = REFERENCE if REFERENCE in names else names[0]
    names.sort(key=lambda name: name != reference)  # its capacity sets the rates of all variants, so it comes first
    if preset is None:
        name = "quick" if settings.quick else "full"
        rates = settings.rates_by_workload()
        changes = {"rates": rates, "calibration_prompts": settings.calibrate}
        preset = make_preset(name, workloads, settings.prompts, settings.until_decided, **changes)
    before = load_baseline(settings.baseline, output)
    if before:
        preset = preset_like(before, preset, workloads)
    earlier = _load_earlier(output, model, workloads, preset, names)
    backend = backend or Backend(model, workloads)
    base = backend.resolve(model)
    directories = {one.name: backend.resolve(one.model) for one in settings.variants}
    targets = {one.name: find_target(one.url, one.model) for one in settings.endpoints}
    output.mkdir(parents=True, exist_ok=True)
    for line in describe_plan(preset, workloads, names, reference):
        print_status(line)
    started = datetime.now(UTC).replace(microsecond=0)
    begin = time.monotonic()
    variants = [backend.build(recipe, base, started) for recipe in settings.recipes]
    variants += [
        backend.describe(one.name, "", f"existing model {one.model}", directories[one.name], started)
        for one in settings.variants
    ]
    for line in calibration_warnings(variants, workloads):
        print_status(line)
    variants += [_endpoint_result(name, target) for name, target in targets.items()]
    comparison = Comparison(
        model=model,
        workloads={name: load_workload(name).primary_metric for name in workloads},
        preset=preset,
        requirements=Requirements(
            settings.max_quality_loss_frac, settings.confidence, settings.slos_by_workload(), settings.price_per_hour
        ),
        started=started.isoformat(),
        reference=reference,
        variants=sorted(variants, key=lambda variant: names.index(variant.name)),
    )
    for variant in comparison.variants:
        if variant.directory is not None:
            variant.identity = backend.identity(Path(variant.directory))
    if before:
        comparison.baseline_variants = find_baseline_variants(comparison, before, backend.identity)
    _reuse_measurements(comparison, earlier, output)
    if directories or settings.recipes:
        backend.measure_roofline()
    measurement = Measurement(comparison, output, targets, backend, begin)
    measurement.run()
    conclude(comparison, output, settings.baseline, before)
    results = measurement.write()
    print_status(f"built and measured in {comparison.elapsed_s:.0f} s; results: {results}")
    return comparison


def conclude(comparison: Comparison, folder: Path, baseline: BaselineSettings, before: Comparison | None) -> None:
    """Compute everything that follows from the raw data in `folder`: metrics, verdict and losses since a baseline."""
    rates = {name: slo_rate(comparison, name) for name in comparison.workloads}
    if before:
        rates |= {name: rate for name, rate in before.slo_rates.items() if rate in comparison.rates(name)}
    comparison.slo_rates = {name: rate for name, rate in rates.items() if rate is not None}
    print_status("computing metrics, intervals and the verdict …")
    quality = evaluate_quality(comparison, folder)
    evaluate_loads(comparison, folder)
    comparison.verdict = make_verdict(comparison, quality)
    comparison.baseline = check_baseline(comparison, folder, baseline, before) if before else None


def _endpoint_result(name: str, target: Target) -> VariantResult:
    summary = f"{target.model} at {target.url}, an external server"
    key = hashlib.sha256(f"{target.url} {target.model}".encode()).hexdigest()
    return VariantResult(name=name, recipe="", summary=summary, url=target.url, identity=key)


def _variant_names(settings: CompareSettings, workloads: Sequence[str]) -> list[str]:
    """Return the names of all variants; UserError if one is unknown or repeated, or if there is nothing to compare."""
    others = [*(one.name for one in settings.variants), *(one.name for one in settings.endpoints)]
    if not (settings.recipes or others) or not workloads:
        raise UserError("recipes or workloads", "", "are empty", "give at least one of each")
    names = [*(load_recipe(recipe)[0] for recipe in settings.recipes), *others]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError("variants", repeated[0], "is named twice", "give each variant a name of its own")
    return names


def _load_earlier(
    output: Path, model: str, workloads: Sequence[str], preset: Preset, names: Sequence[str]
) -> Comparison | None:
    """Return the comparison in `output`, complete or not; UserError if it has other settings."""
    if not (output / RESULTS_FILE).exists():
        return None
    earlier = load_comparison(output)
    settings = [
        ("model", earlier.model, model),
        ("workloads", list(earlier.workloads), list(workloads)),
        ("variants", [variant.name for variant in earlier.variants], list(names)),
        ("preset", earlier.preset, preset),
    ]
    for name, then, now in settings:
        if then != now:
            problem = f"holds a comparison of other settings ({name}: {then}, now {now})"
            raise UserError("output", output, problem, "name another folder with -o, or delete this one")
    return earlier


def _reuse_measurements(comparison: Comparison, earlier: Comparison | None, folder: Path) -> None:
    """Take over the measurements of unchanged variants, and delete the answers of changed ones."""
    known = {variant.name: variant for variant in earlier.variants} if earlier else {}
    known_baseline = {variant.name: variant for variant in earlier.baseline_variants} if earlier else {}
    is_same_reference = comparison.reference in known and (
        known[comparison.reference].identity == comparison.variant(comparison.reference).identity
    )
    for variants, earlier_variants in ((comparison.variants, known), (comparison.baseline_variants, known_baseline)):
        for variant in variants:
            same = earlier_variants.get(variant.name)
            if is_same_reference and same is not None and same.identity == variant.identity:
                variant.rounds = same.rounds
                variant.bottlenecks = same.bottlenecks
                variant.calibrations = same.calibrations | variant.calibrations
                continue
            if same is not None:
                changed = "it" if is_same_reference else "the reference"
                print_status(f"{variant.name}: {changed} changed, so it is measured again")
            for workload in (*comparison.workloads, TEXT):
                answers_file(folder, variant.name, workload).unlink(missing_ok=True)
    if earlier and is_same_reference:
        comparison.started, comparison.elapsed_s = earlier.started, earlier.elapsed_s
