"""Build a variant: check the recipe against the model, reuse an earlier build, or run the steps and write the result.

`runner.py` walks over the blocks, `artifacts.py` keeps the files of an unfinished build, `budget_search.py` chooses the
shape of a recipe with a budget. The variant appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from slimserve.compress.artifacts import RESUMABLE, place_checkpoint
from slimserve.compress.budget_search import BudgetSearch
from slimserve.compress.calibration import CalibrationData, check_source, load_calibration, source_files
from slimserve.compress.decoder import decoder_of
from slimserve.compress.formats import get_format
from slimserve.compress.preflight import check_model, needed_bytes
from slimserve.compress.prune import pruning_method
from slimserve.compress.recipe import MIXED, Quantize, Recipe
from slimserve.compress.runner import BetweenRounds, RunResult, StepRunner, peak_rss_bytes
from slimserve.compress.steps import BoundStep, bind
from slimserve.core.device import choose_device
from slimserve.core.errors import UserError
from slimserve.core.model import model_name, text_model_of
from slimserve.core.model_config import read_decoder_config
from slimserve.core.model_files import model_hash, stored_dtype
from slimserve.core.progress import print_status
from slimserve.core.storage import (
    atomic_directory,
    cache_dir,
    check_free_space,
    sha256_of_files,
    work_folder,
    write_remedy,
)
from slimserve.core.variant import BaseModelRecord, Manifest, StepRecord, disk_bytes, read_manifest, write_manifest
from slimserve.workloads import workload_names

_BUILD_FORMAT = 7
"""Raise this number if the same recipe starts to give other bytes, so that old builds are not reused."""


def build_variant(
    model: str,
    directory: Path,
    recipe_name: str,
    recipe: Recipe,
    target: Path | None,
    between_rounds: BetweenRounds | None = None,
    device: str = "cpu",
) -> Path:
    """Compress the model in `directory` and return the variant's directory.

    `model` is the argument as the user gave it, for the manifest. Without `target` the variant goes to the cache, under
    a name that depends on the model's content and the recipe. An earlier build of the same is reused, and an
    interrupted one is resumed. `between_rounds` is called after each step that another step follows, again if a build
    is resumed; it has no influence on reuse.

    Everything that building, loading and serving will need is checked first. Raises UserError if the model's family is
    unknown, its files do not fit each other, a step does not fit the model's shapes, `target` holds something
    else, the disk is full, or a weight or activation is not finite.
    """
    chosen = choose_device(device)
    directory = text_model_of(directory)
    plan = _make_plan(model, directory, recipe_name, recipe)
    target = target or cache_dir("variants") / f"{plan.name}-{plan.key}"
    if target.exists():
        return _reuse(target, plan)
    _check(plan, target)
    try:
        with work_folder(target, plan.key, RESUMABLE) as work:
            calibration = _load_calibration(directory, recipe, chosen) if plan.needs_data else None
            runner = StepRunner(plan.name, work, calibration, between_rounds, chosen)
            result = _run(plan, runner, device)
            manifest = _write_variant(target, plan, result, calibration)
    except (OSError, SafetensorError) as error:
        raise UserError(
            "output directory",
            target,
            f"could not be written ({getattr(error, 'strerror', None) or error})",
            f"{write_remedy(error)} and run the same command again: it resumes at the last finished block",
        ) from error
    print_status(f"built {plan.name}: {disk_bytes(target) / 2**20:.0f} MiB in {manifest.build_s:.1f} s at {target}")
    return target


@dataclass(frozen=True)
class _Plan:
    """A recipe that was checked against a model."""

    model: str
    directory: Path
    recipe_name: str
    recipe: Recipe
    name: str
    base: BaseModelRecord
    config: dict[str, Any]
    """config.json with all sizes stated."""
    steps: list[BoundStep]
    """Steps on the dense shapes, without the first one if it has a budget: its shape is not known yet."""
    needs_data: bool
    source_sha256: str
    """Hash of the calibration file; empty for a workload."""
    inputs: str
    """JSON of everything that determines the variant's bytes."""

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{_BUILD_FORMAT} {self.inputs}".encode()).hexdigest()[:12]


def _make_plan(model: str, directory: Path, recipe_name: str, recipe: Recipe) -> _Plan:
    config = read_decoder_config(directory)
    if recipe.steps and "quantization_config" in config:
        raise UserError("model", model, "is quantized already", "give the dense model that it was made from")
    decoder_of(config)  # raises if transformers has no such decoder
    budget = recipe.budget
    if budget and budget.method:
        pruning_method(budget.method)  # raises now instead of after the search, which takes minutes
    steps = bind(recipe.steps[1:] if budget else recipe.steps, config, recipe.calibration.seed)
    needs_data = budget is not None or any(step.needs_data for step in steps)
    source_sha256 = ""
    if needs_data:
        check_source(recipe.calibration.source)
        files = source_files(recipe.calibration.source)
        source_sha256 = sha256_of_files(files) if files else ""
    manifest = read_manifest(directory)
    base = BaseModelRecord(model=model, sha256=model_hash(directory), note=manifest.base.note if manifest else "")
    return _Plan(
        model=model,
        directory=directory,
        recipe_name=recipe_name,
        recipe=recipe,
        name=f"{model_name(model, directory)}-{recipe_name}",
        base=base,
        config=config,
        steps=steps,
        needs_data=needs_data,
        source_sha256=source_sha256,
        inputs=_inputs(base.sha256, recipe.model_dump(mode="json"), needs_data, source_sha256),
    )


def _check(plan: _Plan, target: Path) -> None:
    """Raise UserError for everything that would fail later, and print what is repaired."""
    for line in check_model(plan.directory, plan.config):
        print_status(line)
    last = plan.recipe.steps[-1] if plan.recipe.steps else None
    quantize = last if isinstance(last, Quantize) else None
    if quantize is not None and stored_dtype(plan.directory) == "float16":
        print_status(
            f"{plan.name}: the variant states the dtype bfloat16, because vLLM's CPU kernels of quantized layers have "
            "no float16"
        )
    if plan.recipe.budget is None:  # a budget's shape is not known yet; its finalists are built as recipes of their own
        planned = plan.steps[-1].planned_config if plan.steps else plan.config
        bits = get_format(quantize.format).num_bits if quantize else None
        check_free_space(target, needed_bytes(plan.directory, planned, len(plan.steps), bits))


def _inputs(model_sha256: str, resolved_recipe: dict[str, Any], needs_data: bool, source_sha256: str) -> str:
    """Return the JSON of what determines the bytes; calibration settings count only if a step uses them."""
    steps, calibration = resolved_recipe["steps"], resolved_recipe["calibration"]
    used: dict[str, Any] = {"steps": steps}
    if needs_data:
        # A file counts by its name and its content, which is hashed, and not by its folder.
        names = ",".join(Path(one).name for one in calibration["source"].split(","))
        if names == ",".join(workload_names()):
            names = MIXED
        used["calibration"] = calibration | {"source": names}
    elif any(pruning_method(one["method"]).uses_seed for one in steps if one["step"] == "prune" and one["method"]):
        used["seed"] = calibration["seed"]
    return json.dumps([model_sha256, used, source_sha256], sort_keys=True)


def _reuse(target: Path, plan: _Plan) -> Path:
    """Return the target if it holds the planned variant, else raise UserError."""
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest and {"steps", "calibration"} <= manifest.resolved_recipe.keys():
        source_sha256 = manifest.calibration.get("source_sha256", "")
        if plan.inputs == _inputs(manifest.base.sha256, manifest.resolved_recipe, plan.needs_data, source_sha256):
            print_status(f"variant {manifest.name}: reused, built earlier at {target}")
            return target
    raise UserError("output directory", target, "exists and holds something else", "name another, or delete it")


def _load_calibration(directory: Path, recipe: Recipe, device: torch.device) -> CalibrationData:
    settings = recipe.calibration
    sizes = (settings.num_samples, settings.sequence_length)
    data = load_calibration(directory, settings.source, *sizes, settings.seed, device)
    if len(data.tokens_NT) < settings.num_samples:
        print_status(
            f"calibration: {settings.source} has only {len(data.tokens_NT)} of {settings.num_samples} sequences"
        )
    return data


def _run(plan: _Plan, runner: StepRunner, device: str) -> RunResult:
    """Run the budget search, if there is one, and all other steps."""
    recipe, budget = plan.recipe, plan.recipe.budget
    if budget is None:
        return runner.run(plan.directory, plan.steps)

    def build_finalist(name: str, finalist: Recipe, target: Path) -> Path:
        return build_variant(plan.model, plan.directory, name, finalist, target, device=device)

    pruned, records = BudgetSearch(runner, plan.directory, recipe, budget).run(build_finalist)
    if runner.between_rounds and recipe.steps[1:]:
        pruned = runner.between_rounds(pruned)
    steps = bind(recipe.steps[1:], read_decoder_config(pruned), recipe.calibration.seed)
    result = runner.run(pruned, steps)
    return RunResult(result.checkpoint, result.num_parameters, [*records, *result.records])


def _write_variant(target: Path, plan: _Plan, result: RunResult, calibration: CalibrationData | None) -> Manifest:
    with atomic_directory(target) as output:
        start = time.monotonic()
        # Without steps the result is the user's own model, which must not share files with the variant.
        place_checkpoint(result.checkpoint, output, link=bool(plan.recipe.steps))
        manifest = Manifest(
            name=plan.name,
            recipe=plan.recipe_name,
            resolved_recipe=plan.recipe.model_dump(mode="json"),
            base=plan.base,
            steps=[*result.records, StepRecord(name="write", seconds=time.monotonic() - start)],
            num_parameters=result.num_parameters,
            calibration_sha256=calibration.sha256 if calibration else None,
            calibration={**calibration.detail, "source_sha256": plan.source_sha256} if calibration else {},
            seed=plan.recipe.calibration.seed,
            peak_rss_bytes=peak_rss_bytes(),
        )
        write_manifest(output, manifest)
    return manifest
