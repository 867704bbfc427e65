"""The pipeline: distills and compresses a model in the steps of a TOML file, then compares the results.

    model = "smollm2-135m-instruct"

    [[steps]]
    name = "student"                   # name of the step and of its directory
    step = "distill"                   # trains the model of the previous step; of = "NAME" selects another step
    teacher = "smollm2-135m-instruct"  # a step or any model; fine-tuning (loss.kd_weight = 0) needs none
    recipe.data.source = "reasoning"

    [[steps]]
    name = "pruned"
    step = "compress"
    recipe = "prune50"               # a shipped recipe or a .toml file
    settings = ["prune.rounds=2"]
    between = { teacher = "student", recipe.stages = [{ steps = 50 }] }   # distills between pruning rounds

    [compare]
    variants = ["student", "pruned"]   # the first one is the reference
    workloads = ["reasoning"]
    quick = true

Every step can resume, so the same command continues an interrupted pipeline. Only this module runs all parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimserve.compare.settings import CompareSettings, ComparisonSettings, ExistingModel
from slimserve.compress.recipe import Recipe, load_recipe
from slimserve.core.config import Settings, StrictModel, load_toml, setting, validated
from slimserve.core.errors import UserError
from slimserve.core.model import resolve_model
from slimserve.core.model_files import model_hash
from slimserve.core.progress import print_status
from slimserve.core.storage import write_atomically
from slimserve.distill.recipe import DistillRecipe
from slimserve.workloads import load_workload

_COMPARISON = "compare"


class PipelineSettings(Settings):
    """The options of `slimserve pipeline`."""

    output: Path = setting(
        ..., "Directory of every step's model and the comparison.", option=("-o", "--output"), metavar="DIR"
    )


class _Step(StrictModel):
    name: str = Field(pattern=r"^[\w.-]+$")
    of: str | None = None
    """Name of the step whose model is changed (default: the previous step)."""


class DistillStep(_Step):
    """Trains the model."""

    step: Literal["distill"]
    teacher: str | None = None
    recipe: DistillRecipe = DistillRecipe()


class BetweenRounds(StrictModel):
    """Distillation between the rounds of a pruning."""

    teacher: str | None = None
    recipe: DistillRecipe = DistillRecipe()


class CompressStep(_Step):
    """Prunes or quantizes the model, calibrated on the comparison's workloads unless the recipe names a source."""

    step: Literal["compress"]
    recipe: str
    settings: tuple[str, ...] = ()
    between: BetweenRounds | None = None


class Comparison(ComparisonSettings):
    """Compares some of the models: serves, evaluates and load-tests them."""

    variants: tuple[str, ...]
    """Names of steps; the first one is the reference."""


class Pipeline(StrictModel):
    """The steps in their order, and the comparison of their models."""

    model: str
    steps: tuple[Annotated[DistillStep | CompressStep, Field(discriminator="step")], ...]
    compare: Comparison | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Pipeline:
        known: list[str] = []
        for step in self.steps:
            if step.name in known or step.name == _COMPARISON:
                raise ValueError(f"the name {step.name!r} is used twice, or is reserved for the comparison")
            if step.of is not None and step.of not in known:
                raise ValueError(f"{step.name}: of = {step.of!r} is not an earlier step")
            known.append(step.name)
        unknown = [name for name in (self.compare.variants if self.compare else ()) if name not in known]
        if unknown:
            raise ValueError(f"compare: {unknown[0]!r} is not a step")
        return self


def load_pipeline(file: Path) -> Pipeline:
    """Return the pipeline of a TOML file; UserError names the first invalid key."""
    return validated(Pipeline, load_toml(file, "pipeline"), "pipeline", file)


def run_pipeline(pipeline: Pipeline, output: Path) -> dict[str, Path]:
    """Make the model of every step under `output`, compare them, and return the models' directories by step.

    Raises UserError before any work if a recipe, model or data source does not exist, and later if a step fails.
    Finished steps are kept, and the same call resumes.
    """
    from slimserve.compress.build import build_variant
    from slimserve.distill.run import distill

    recipes = check_references(pipeline)
    models: dict[str, Path] = {}
    previous = pipeline.model
    for number, step in enumerate(pipeline.steps, start=1):
        print_status(f"--- step {number} of {len(pipeline.steps)}: {step.name} ---")
        source = str(models[step.of]) if step.of is not None else previous
        target = output / step.name
        if isinstance(step, DistillStep):
            teacher = _model_of(step.teacher, models)
            models[step.name] = distill(source, teacher, _recipe_of(step.recipe, models), target, recipe_name=step.name)
        else:
            recipe_name, recipe = recipes[step.name]
            recipe = recipe.calibrated_on(pipeline.compare.workloads if pipeline.compare else ())
            hook = _distill_between(step, models, output)
            _check_between(step, target)
            models[step.name] = build_variant(
                source, resolve_model(source), recipe_name, recipe, target, hook, device="auto"
            )
        previous = str(models[step.name])
    if pipeline.compare is not None:
        _compare(pipeline, pipeline.compare, models, output)
    return models


def check_references(pipeline: Pipeline) -> dict[str, tuple[str, Recipe]]:
    """Return the name and the recipe of each compression by its step.

    Raises UserError if a recipe, model, workload or file does not exist, so that no training runs in vain before it.
    """
    from slimserve.compress import calibration
    from slimserve.distill import data

    recipes: dict[str, tuple[str, Recipe]] = {}
    models, earlier = [pipeline.model], set[str]()
    for step in pipeline.steps:
        training = step if isinstance(step, DistillStep) else step.between
        if isinstance(step, CompressStep):
            recipes[step.name] = load_recipe(step.recipe, step.settings)
            calibration.check_source(recipes[step.name][1].calibration.source)
        if training is not None:
            data.check_source(training.recipe.data.source)
            teachers = [training.teacher, *(one.model for one in training.recipe.teachers)]
            models += [one for one in teachers if one is not None and one not in earlier]
        earlier.add(step.name)
    for model in dict.fromkeys(models):
        if not model.startswith(("http://", "https://")):
            resolve_model(model)
    for workload in pipeline.compare.workloads if pipeline.compare else ():
        load_workload(workload)
    return recipes


def _model_of(name: str | None, models: dict[str, Path]) -> str | None:
    """Return the directory of a step's model; any other model argument is returned unchanged."""
    return str(models[name]) if name in models else name


def _recipe_of(recipe: DistillRecipe, models: dict[str, Path]) -> DistillRecipe:
    """Return a recipe whose further teachers are the models of steps."""
    teachers = [one.model_copy(update={"model": _model_of(one.model, models)}) for one in recipe.teachers]
    return recipe.model_copy(update={"teachers": tuple(teachers)})


def _distill_between(step: CompressStep, models: dict[str, Path], output: Path) -> Callable[[Path], Path] | None:
    """Return a hook that distills the checkpoints between pruning rounds, each into a directory of its own."""
    from slimserve.distill.run import distill

    between = step.between
    if between is None:
        return None
    teacher, recipe = _model_of(between.teacher, models), _recipe_of(between.recipe, models)

    def recover(checkpoint: Path) -> Path:
        target = output / f"{step.name}-between-{model_hash(checkpoint)[:8]}"
        return distill(str(checkpoint), teacher, recipe, target, recipe_name=f"{step.name}-between")

    return recover


def _check_between(step: CompressStep, target: Path) -> None:
    """Record the distillation between rounds in a file beside the variant, whose own manifest does not contain it.

    Raises UserError if the variant exists and was made with another one.
    """
    settings = step.between.model_dump_json() if step.between else ""
    note = target.with_name(f"{target.name}.between.json")
    if target.exists() and settings != (note.read_text(encoding="utf-8") if note.is_file() else ""):
        raise UserError(
            "output",
            target,
            "was made with another distillation between its rounds",
            "delete it or name another output directory",
        )
    if settings:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, settings)


def _compare(pipeline: Pipeline, table: Comparison, models: dict[str, Path], output: Path) -> None:
    from slimserve.compare.run import compare
    from slimserve.report.comparison import reported

    variants = [ExistingModel(name, str(models[name])) for name in table.variants]
    settings = CompareSettings(**{**dict(table), "recipes": (), "variants": variants})
    with reported(output / _COMPARISON):
        compare(pipeline.model, settings, output / _COMPARISON)
