"""`slimserve distill`: options into recipes; whatever is heavy is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimserve.core.errors import UserError

app = typer.Typer(
    help="Make a student: let a small model follow a teacher, or fine-tune it, on chosen sections of sequences.",
    epilog="For example: slimserve distill --teacher T --student S --workload reasoning --sections cot --lead-span 0.5 "
    "-o DIR. Every key of a recipe is in docs/distill.md.",
    invoke_without_command=True,
    no_args_is_help=True,
)

Teacher = Annotated[str | None, typer.Option(metavar="MODEL", help="Whom to follow; none: fine-tune on the data alone")]
Student = Annotated[str, typer.Option(metavar="MODEL", help="What to train, as it is at the start")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE.toml", help="See docs/distill.md")]
Source = Annotated[
    str | None,
    typer.Option("--workload", metavar="NAME | FILE.jsonl", help="What to learn from: reasoning if not given"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="A key of the recipe; may be given again")
]


@app.callback()
def distill(
    context: typer.Context,
    student: Annotated[str, typer.Option(metavar="MODEL", help="What to train, as it is at the start")] = "",
    teacher: Teacher = None,
    recipe: RecipeFile = None,
    workload: Source = None,
    sections: Annotated[
        str | None, typer.Option(help="What is learnt: all, or prompt, cot, answer joined by +")
    ] = None,
    lead_span: Annotated[float | None, typer.Option(help="Share of each sequence that is read at all")] = None,
    window: Annotated[str | None, typer.Option(help="Which share: left, middle or right")] = None,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the student goes")] = None,
) -> None:
    """Make a student: let a small model follow a teacher, or fine-tune it; prints its directory.

    The same command goes on where it was interrupted.
    """
    if context.invoked_subcommand is not None:
        return
    if not student or output is None:
        lacking = "--student" if not student else "-o"
        raise UserError(lacking, "", "is missing", "write: slimserve distill --teacher T --student S -o DIR")
    from accelerate import PartialState

    from slimserve.distill.run import distill as run

    loaded = _recipe(recipe, settings, workload, sections, lead_span, window)
    made = run(student, teacher, loaded, output, recipe_name=recipe.stem if recipe else "distill")
    if PartialState().is_main_process:
        typer.echo(made)


@app.command()
def sweep(
    student: Student,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for students, table and plot")],
    teacher: Teacher = None,
    recipe: RecipeFile = None,
    workload: Source = None,
    lead_spans: Annotated[str, typer.Option(help="Shares of each sequence")] = "0.25,0.5,0.75,1",
    windows: Annotated[str, typer.Option(help="Beside the left ones, as right@0.5,middle@0.5")] = "",
    sections: Annotated[str, typer.Option(help="What is learnt, as all,cot: further ones of whole sequences")] = "all",
    controls: Annotated[
        bool, typer.Option("--controls", help="Each shorter span again with as many tokens as whole sequences")
    ] = False,
    settings: Settings = None,
) -> None:
    """Students over lead spans, windows and sections: a table and a plot of quality and cost."""
    from slimserve.distill.sweep import make_points, markdown
    from slimserve.distill.sweep import sweep as run

    points = make_points(lead_spans, windows, sections, controls)
    rows = run(student, teacher, _recipe(recipe, settings, workload), points, output)
    typer.echo(markdown(rows))
    typer.echo(output)


@app.command()
def traces(
    url: Annotated[str, typer.Option(help="The served teacher, for example http://127.0.0.1:8000")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.jsonl", help="Where right replies go")],
    model: Annotated[str | None, typer.Option(help="Its name there; default: the only one")] = None,
    workload: Annotated[str, typer.Option(help="Whose problems, and whose verifier")] = "reasoning",
    num_problems: Annotated[int, typer.Option(min=1, help="How many to ask")] = 500,
    num_tries: Annotated[int, typer.Option(min=1, help="Replies to a problem until one is right")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling")] = 0.8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply")] = 512,
    seed: Annotated[int, typer.Option(help="Of problems and replies")] = 0,
) -> None:
    """Let a served teacher write training data: its replies that the workload's verifier finds right."""
    from slimserve.core.openai_client import find_target
    from slimserve.distill.traces import write_traces

    found = write_traces(
        find_target(url, model),
        workload,
        num_problems,
        output,
        temperature=temperature,
        num_tries=num_tries,
        max_tokens=max_tokens,
        seed=seed,
    )
    typer.echo(
        f"{found.num_kept} of {found.num_asked} problems solved, {found.num_replies} replies asked for: {output}"
    )


def _recipe(
    file: Path | None,
    settings: list[str] | None,
    workload: str | None,
    sections: str | None = None,
    lead_span: float | None = None,
    window: str | None = None,
) -> Any:
    from slimserve.distill.recipe import load_distill_recipe

    options = {
        "data.source": workload,
        "supervision.sections": sections,
        "supervision.lead_span": lead_span,
        "supervision.window": window,
    }
    return load_distill_recipe(file, settings or (), options)
