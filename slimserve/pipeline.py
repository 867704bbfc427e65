"""A chain from a model to a verdict: distil, prune, distil again, quantize, serve, compare, as a TOML file says.

    model = "smollm2-135m-instruct"

    [[steps]]
    name = "student"                 # its folder under the output
    step = "distill"                 # of the step before, or the model; of = "NAME" names another one
    teacher = "smollm2-135m-instruct"  # a step's name, or any model; none: fine-tuning (loss.kd_weight = 0)
    recipe.data.source = "reasoning"

    [[steps]]
    name = "pruned"
    step = "compress"
    recipe = "prune50"               # a shipped recipe or a .toml file
    settings = ["prune.rounds=2"]
    between = { teacher = "student", recipe.stages = [{ steps = 50 }] }   # distil between the rounds

    [compare]
    variants = ["student", "pruned"]   # the first one is what the others are measured against
    workloads = ["reasoning"]
    quick = true

Every step is resumable by itself, so the same command goes on where it was interrupted. This file alone drives all
parts; none of them knows another one that comes after it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from slimserve.compare.settings import CompareSettings, ComparisonSettings, ExistingModel
from slimserve.core.config import StrictModel, invalid_key_error
from slimserve.core.errors import UserError
from slimserve.core.model import model_hash, resolve_model
from slimserve.core.progress import print_status
from slimserve.core.storage import write_atomically
from slimserve.distill.recipe import DistillRecipe

_COMPARISON = "compare"


class _Step(StrictModel):
    name: str = Field(pattern=r"^[\w.-]+$")
    of: str | None = None
    """The step whose model this one changes; the one before if not given."""


class Distill(_Step):
    """Train the model."""

    step: Literal["distill"]
    teacher: str | None = None
    recipe: DistillRecipe = DistillRecipe()


class Between(StrictModel):
    """Distillation between the rounds of a pruning."""

    teacher: str | None = None
    recipe: DistillRecipe = DistillRecipe()


class Compress(_Step):
    """Prune or quantize the model."""

    step: Literal["compress"]
    recipe: str
    settings: tuple[str, ...] = ()
    between: Between | None = None


class Compare(ComparisonSettings):
    """Compare some of the models: serve, evaluate and load-test them."""

    variants: tuple[str, ...]
    """Names of steps; the first one is the reference."""


class Pipeline(StrictModel):
    """All steps in their order."""

    model: str
    steps: tuple[Annotated[Distill | Compress, Field(discriminator="step")], ...]
    compare: Compare | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Pipeline:
        known: list[str] = []
        for step in self.steps:
            if step.name in known or step.name == _COMPARISON:
                raise ValueError(f"the name {step.name!r} stands twice or is the comparison's")
            if step.of is not None and step.of not in known:
                raise ValueError(f"{step.name}: of = {step.of!r} is no earlier step")
            known.append(step.name)
        unknown = [name for name in (self.compare.variants if self.compare else ()) if name not in known]
        if unknown:
            raise ValueError(f"compare: {unknown[0]!r} is no step")
        return self


def load_pipeline(file: Path) -> Pipeline:
    """The pipeline of a TOML file; UserError names the key that is refused."""
    try:
        return Pipeline.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError("pipeline", file, f"cannot be read ({error})", "give the path of a TOML file") from error
    except ValidationError as error:
        raise invalid_key_error("pipeline", error, "steps", file) from error


def run_pipeline(pipeline: Pipeline, output: Path) -> dict[str, Path]:
    """Make every step's model under `output`, then compare; returns the models' directories by name.

    Raises UserError as the parts do; what is done by then stays, and the same call goes on from there.
    """
    from slimserve.compress.build import build_variant
    from slimserve.compress.recipe import load_recipe
    from slimserve.distill.run import distill

    made: dict[str, Path] = {}
    before = pipeline.model
    for number, step in enumerate(pipeline.steps, start=1):
        print_status(f"--- step {number} of {len(pipeline.steps)}: {step.name} ---")
        source = str(made[step.of]) if step.of is not None else before
        target = output / step.name
        if isinstance(step, Distill):
            teacher = _model_of(step.teacher, made)
            made[step.name] = distill(source, teacher, step.recipe, target, recipe_name=step.name)
        else:
            recipe_name, recipe = load_recipe(step.recipe, step.settings)
            hook = _between(step, made, output)
            _check_between(step, target)
            made[step.name] = build_variant(source, resolve_model(source), recipe_name, recipe, target, hook)
        before = str(made[step.name])
    if pipeline.compare is not None:
        _compare(pipeline, pipeline.compare, made, output)
    return made


def _model_of(name: str | None, made: dict[str, Path]) -> str | None:
    """A step's model by its name, or any model argument."""
    return str(made[name]) if name in made else name


def _between(step: Compress, made: dict[str, Path], output: Path) -> Callable[[Path], Path] | None:
    """What distils the checkpoints between a pruning's rounds; each in a folder of its own, so that it is done once."""
    from slimserve.distill.run import distill

    between = step.between
    if between is None:
        return None
    teacher = _model_of(between.teacher, made)

    def recover(checkpoint: Path) -> Path:
        target = output / f"{step.name}-between-{model_hash(checkpoint)[:8]}"
        return distill(str(checkpoint), teacher, between.recipe, target, recipe_name=f"{step.name}-between")

    return recover


def _check_between(step: Compress, target: Path) -> None:
    """A variant's own key does not tell what was done between its rounds, so that is noted beside it."""
    told = step.between.model_dump_json() if step.between else ""
    note = target.with_name(f"{target.name}.between.json")
    if target.exists() and told != (note.read_text(encoding="utf-8") if note.is_file() else ""):
        raise UserError("output", target, "was made with another distillation between its rounds", "delete it")
    if told:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, told)


def _compare(pipeline: Pipeline, table: Compare, made: dict[str, Path], output: Path) -> None:
    from slimserve.compare.run import compare
    from slimserve.report.comparison import reported

    variants = [ExistingModel(name, str(made[name])) for name in table.variants]
    settings = CompareSettings(**{**dict(table), "recipes": (), "variants": variants})
    with reported(output / _COMPARISON):
        compare(pipeline.model, settings, output / _COMPARISON)
