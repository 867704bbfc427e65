"""`slimserve compress`, `check` and `inspect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from slimserve.compress.settings import CompressSettings, InspectSettings
from slimserve.core.config import takes_settings
from slimserve.core.errors import UserError


@takes_settings(CompressSettings)
def compress(
    settings: CompressSettings,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model directory, Hugging Face id, .gguf file or built-in model name."),
    ] = None,
) -> None:
    """Prune and quantize a model by a recipe, and print the directory of the new variant.

    An interrupted build resumes if the same command is run again.
    """
    from slimserve.compress.recipe import list_recipes, load_recipe

    if settings.list_recipes:
        for name, summary in list_recipes().items():
            typer.echo(f"{name:16} {summary}")
        return
    if model is None:
        raise UserError("MODEL", "", "is missing", "write: slimserve compress MODEL --recipe NAME")
    changes = settings.changes
    if settings.workload is not None:
        changes = (f"calibration.source={json.dumps(str(settings.workload))}", *changes)
    name, recipe = load_recipe(settings.recipe, changes)
    from slimserve.compress.build import build_variant
    from slimserve.core.model import resolve_model

    typer.echo(build_variant(model, resolve_model(model), name, recipe, settings.output, device=settings.device))


def check(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Variant directory, or any model.")],
    rank: Annotated[
        bool, typer.Option("--rank", help="Check the served rerank scores instead, with known answers.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="Device of PyTorch and transformers: auto takes a GPU if PyTorch sees one.",
            metavar="auto|cpu|cuda[:N]",
        ),
    ] = "auto",
) -> None:
    """Check that a variant loads, and that transformers and vLLM compute the same logits as plain PyTorch.

    Exits with code 1 if a check fails.
    """
    from slimserve.compare.check import check_variant
    from slimserve.compare.check_rank import check_rank
    from slimserve.core.model import resolve_model

    passed = True
    model = resolve_model(directory)
    for finding in check_rank(model, device) if rank else check_variant(model, device):
        passed &= finding.passed
        typer.echo(f"{'ok  ' if finding.passed else 'FAIL'} {finding.name:13} {finding.detail}")
    if not passed:
        raise typer.Exit(1)


@takes_settings(InspectSettings)
def inspect(
    settings: InspectSettings,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Variant directory that `slimserve compress` wrote.")],
) -> None:
    """Show the steps and sizes of a variant, the error of each layer, and the kernel that vLLM uses on this machine."""
    from slimserve.compress.inspect import describe_variant, plot_errors
    from slimserve.core.model import resolve_model

    variant = resolve_model(directory)
    for line in describe_variant(variant):
        typer.echo(line)
    if settings.plot is not None:
        plot_errors(variant, settings.plot)
        typer.echo(f"plot: {settings.plot}")
