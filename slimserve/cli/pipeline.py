"""`slimserve pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pipeline(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The steps; see docs/distill.md")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for every step's model and the comparison")],
) -> None:
    """A chain of distilling and compressing, then a comparison of what came of it; goes on where it was interrupted."""
    from slimserve.pipeline import load_pipeline, run_pipeline

    for name, directory in run_pipeline(load_pipeline(file), output).items():
        typer.echo(f"{name}: {directory}")
