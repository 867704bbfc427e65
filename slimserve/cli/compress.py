"""`slimserve compress`, `check` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimserve.core.errors import UserError


def compress(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="What to compress")] = None,
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a .toml file; see --list")] = "w8a8",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write; default: the cache")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a key of the recipe")
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes and stop")] = False,
) -> None:
    """Prune and quantize a model by recipe; prints the directory of the variant."""
    from slimserve.compress import recipe as recipes

    if list_recipes:
        for name, listed in recipes.list_recipes().items():
            typer.echo(f"{name:16} {listed.summary}")
        return
    if model is None:
        raise UserError("MODEL", "", "is missing", "write: slimserve compress MODEL --recipe NAME")
    name, loaded = recipes.load_recipe(recipe, settings or ())
    from slimserve.compress.build import build_variant
    from slimserve.core.model import resolve_model

    typer.echo(build_variant(model, resolve_model(model), name, loaded, output))


def check(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A variant that compress wrote, or any model")],
) -> None:
    """Prove that a variant loads: shapes, stock transformers, stock vLLM, and the same logits from all."""
    from slimserve.compare.check import check_variant
    from slimserve.core.model import resolve_model

    passed = True
    for finding in check_variant(resolve_model(directory)):
        passed &= finding.passed
        typer.echo(f"{'ok  ' if finding.passed else 'FAIL'} {finding.what:13} {finding.detail}")
    if not passed:
        raise typer.Exit(1)


def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A variant that compress wrote")],
    plot: Annotated[Path | None, typer.Option(help="Write the error per layer as a .png or .svg to this file")] = None,
) -> None:
    """Show what was done to a variant, its sizes, the error per layer, and the kernel that each format will use."""
    from slimserve.compress.inspect import describe_variant, plot_errors
    from slimserve.core.model import resolve_model

    where = resolve_model(directory)
    for line in describe_variant(where):
        typer.echo(line)
    if plot is not None:
        plot_errors(where, plot)
        typer.echo(f"plot: {plot}")
