"""`slimserve compare`: models × recipes × workloads, each variant really served and really loaded."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from compare.quality import measure_quality
from compare.report import print_table, write_report
from compare.results import Comparison, VariantResult
from compress.recipe import load_recipe
from contracts.errors import UserError
from contracts.hardware import probe_hardware
from contracts.model import count_parameters, model_name, resolve_model
from contracts.progress import say
from contracts.variant import disk_bytes, read_manifest
from loadtest.run import LoadSettings, run_suite
from loadtest.target import Target
from serve.engine import Engine, EngineSpec, free_port
from serve.plan import plan_launch
from workloads import load_workload
from workloads.interface import Workload


@dataclass(frozen=True)
class Effort:
    """How long to look: prompts per quality figure and seconds per load."""

    quality_prompts: dict[str, int]
    users: dict[str, int]
    duration_s: float
    warmup_s: float


QUICK = Effort({"recommendation": 48, "reasoning": 100}, {"recommendation": 2, "reasoning": 8}, 20.0, 4.0)
FULL = Effort({"recommendation": 300, "reasoning": 400}, {"recommendation": 2, "reasoning": 8}, 90.0, 10.0)


def compare(model: str, recipes: Sequence[str], workload_names: Sequence[str], effort: Effort, output: Path) -> Path:
    """Build, serve, judge and load every variant in turn; returns the path of the HTML report.

    `output` gets results.json (rewritten after every variant), report.html and, per
    variant, the engine's log and the load's raw rows. Raises UserError before any work
    where a name is unknown.
    """
    start, started = time.monotonic(), datetime.now(UTC).replace(microsecond=0)
    if not recipes or not workload_names:
        raise UserError("recipes or workloads", "", "name nothing", "give at least one of each")
    names = [load_recipe(recipe)[0] for recipe in recipes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError("recipes", twice[0], "stands twice", "name each recipe once, under a name of its own")
    workloads = [load_workload(name) for name in workload_names]
    base = resolve_model(model)
    output.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(
        model=model,
        workloads={workload.name: workload.headline for workload in workloads},
        settings=effort.__dict__,
        started=started.isoformat(),
    )
    built = [build(model, base, recipe, started) for recipe in recipes]
    for number, variant in enumerate(built, start=1):
        say(f"--- variant {number} of {len(built)}: {variant.name} ---")
        _serve_and_measure(model_name(model, Path(variant.directory)), variant, workloads, effort, output)
        comparison.variants.append(variant)
        comparison.seconds = time.monotonic() - start
        results = comparison.write(output)
    report = write_report(comparison, output)
    print_table(comparison)
    say(f"took {comparison.seconds:.0f} s; figures: {results}")
    say(f"open: {report}")
    return report


def build(model: str, base: Path, recipe_name: str, started: datetime) -> VariantResult:
    """Build in a process of its own, so that neither its memory nor its torch stays with the measuring."""
    name, recipe = load_recipe(recipe_name)
    directory = base
    if recipe.steps:
        command = [sys.executable, "-m", "slimserve", "compress", model, "--recipe", recipe_name]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if finished.returncode != 0:
            raise UserError("recipe", recipe_name, "could not be built", "see the message above")
        directory = Path(finished.stdout.strip().splitlines()[-1])
    manifest = read_manifest(directory)
    return VariantResult(
        name=name,
        recipe=name,
        summary=recipe.summary,
        directory=str(directory),
        disk_bytes=disk_bytes(directory),
        num_parameters=manifest.num_parameters if manifest else count_parameters(directory),
        build_s=manifest.build_s if manifest else 0.0,
        build_reused=manifest is None or datetime.fromisoformat(manifest.created) < started,
    )


def _serve_and_measure(
    served_name: str, variant: VariantResult, workloads: Sequence[Workload], effort: Effort, output: Path
) -> None:
    directory = Path(variant.directory)
    folder = output / variant.name
    spec = EngineSpec(
        directory=directory,
        name=served_name,
        plan=plan_launch(directory, probe_hardware()),
        log=folder / "engine.log",
        port=free_port(),
    )
    with Engine(spec) as engine:
        variant.ready_s = engine.ready_s
        target = Target(spec.url, spec.name)
        for workload in workloads:
            variant.quality[workload.name] = measure_quality(target, workload, effort.quality_prompts[workload.name])
        for workload in workloads:
            settings = LoadSettings(
                users=effort.users[workload.name], duration_s=effort.duration_s, warmup_s=effort.warmup_s
            )
            variant.load[workload.name], _ = run_suite(workload.name, target, settings, folder)
        variant.peak_rss_bytes = engine.peak_rss_bytes()
