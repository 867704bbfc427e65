"""`slimserve pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimserve.core.config import takes_settings
from slimserve.pipeline import PipelineSettings, load_pipeline, run_pipeline


@takes_settings(PipelineSettings)
def pipeline(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="TOML file of the steps (docs/distill.md).")],
    settings: PipelineSettings,
) -> None:
    """Distill and compress a model in steps, then compare the results.

    The same command resumes an interrupted pipeline.
    """
    for name, directory in run_pipeline(load_pipeline(file), settings.output).items():
        typer.echo(f"{name}: {directory}")
