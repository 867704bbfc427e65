"""`slimserve compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimserve.cli.folders import new_run_folder
from slimserve.compare.settings import CompareSettings
from slimserve.core.config import takes_settings

NOT_INFORMATIVE = 3
"""Exit code of a comparison on a workload that cannot compare these models."""


@takes_settings(CompareSettings)
def compare(
    model: Annotated[str, typer.Option(help="Model that the recipes compress.")],
    settings: CompareSettings,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for the report and the results (default: a new one in results/)."),
    ] = None,
) -> None:
    """Build, serve, evaluate and load-test each variant in rounds, and report which one to ship.

    The same command with the same -o resumes an interrupted comparison. Exit code 1 means a loss against --baseline,
    and 3 that a workload cannot compare these models.
    """
    from slimserve.compare.run import compare as run_comparison
    from slimserve.report.comparison import reported

    folder = output or new_run_folder(model.rstrip("/").rsplit("/", 1)[-1])
    with reported(folder):
        comparison = run_comparison(model, settings, folder)
    if comparison.verdict is not None and comparison.verdict.uninformative:
        raise typer.Exit(NOT_INFORMATIVE)
    if comparison.baseline is not None and not comparison.baseline.passed:
        raise typer.Exit(1)
