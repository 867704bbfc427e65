"""`slimserve distill` with its subcommands `sweep` and `traces`."""

from __future__ import annotations

from typing import Any

import typer

from slimserve.core.config import takes_settings
from slimserve.core.errors import UserError
from slimserve.distill.recipe import DataSettings, DistillRecipe, load_distill_recipe
from slimserve.distill.settings import DistillSettings, SweepSettings, TracesSettings

app = typer.Typer(
    help="Make a student: train a small model to imitate a teacher, or fine-tune it, on chosen sections of sequences.",
    epilog="Example: slimserve distill --teacher T --student S --workload reasoning --sections cot --lead-span 0.5 "
    "-o DIR. docs/distill.md lists every key of a recipe.",
    invoke_without_command=True,
    no_args_is_help=True,
)


@app.callback()
@takes_settings(DistillRecipe, parameter="keys", only_given=True)
@takes_settings(DistillSettings)
def distill(context: typer.Context, settings: DistillSettings, keys: dict[str, Any]) -> None:
    """Make a student: train a small model to imitate a teacher, or fine-tune it; print its directory.

    The same command resumes an interrupted run.
    """
    if context.invoked_subcommand is not None:
        return
    if not settings.student or settings.output is None:
        missing = "-o" if settings.student else "--student"
        raise UserError(missing, "", "is missing", "write: slimserve distill --teacher T --student S -o DIR")
    from accelerate import PartialState

    from slimserve.distill.run import distill as run

    recipe = load_distill_recipe(settings.recipe, settings.assignments, keys)
    name = settings.recipe.stem if settings.recipe else "distill"
    models = (settings.student, settings.teacher)
    directory = run(*models, recipe, settings.output, recipe_name=name, device=settings.device)
    if PartialState().is_main_process:
        typer.echo(directory)


@app.command()
@takes_settings(DataSettings, parameter="data", only_given=True)
@takes_settings(SweepSettings)
def sweep(settings: SweepSettings, data: dict[str, Any]) -> None:
    """Train students over lead spans, windows and sections; write a table and a plot of quality and cost.

    The same command resumes an interrupted sweep.
    """
    from rich.console import Console

    from slimserve.distill.sweep import make_points, table
    from slimserve.distill.sweep import sweep as run
    from slimserve.report.terminal import print_table

    points = make_points(settings.lead_spans, settings.windows, settings.sections, settings.controls)
    recipe = load_distill_recipe(settings.recipe, settings.assignments, {"data": data})
    rows = run(settings.student, settings.teacher, recipe, points, settings.output, device=settings.device)
    print_table(Console(), *table(rows), title="lead spans, windows and sections")
    typer.echo(settings.output)


@app.command()
@takes_settings(TracesSettings)
def traces(settings: TracesSettings) -> None:
    """Collect replies of a served teacher that the workload's verifier accepts, as training data.

    The same command resumes an interrupted run.
    """
    from slimserve.core.openai_client import find_target
    from slimserve.distill.traces import write_traces

    counts = write_traces(find_target(settings.url, settings.model), settings)
    typer.echo(
        f"{counts.num_solved} of {counts.num_problems} problems solved with {counts.num_replies} replies, "
        f"{counts.num_chains} with a chain of thought"
        + (f"; {counts.num_cut} replies were cut off by --max-tokens" if counts.num_cut else "")
        + f": {settings.output}"
    )
