"""`slimserve compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimserve.cli.folders import new_run_folder


def compare(
    model: Annotated[str, typer.Option(help="The model to make variants of")],
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas")] = "dense,w8a8,prune25-w8a8",
    workloads: Annotated[str, typer.Option(help="Workloads, separated by commas")] = "recommendation,reasoning",
    quick: Annotated[bool, typer.Option("--quick", help="One round, fewer prompts, wider intervals")] = False,
    variant: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="A existing model as one more row")
    ] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(metavar="NAME=URL[#MODEL]", help="A running server as one more row")
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORKLOAD=R[,R…]", help="Requests/s of the open loops; default: 50 and 80% of dense's capacity"
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="WORKLOAD:SLO", help="What a variant must keep to win, as reasoning:ttft_p95=1s"),
    ] = None,
    max_quality_loss: Annotated[str, typer.Option(help="Of dense's, that a winner may lose")] = "3%",
    price_per_hour: Annotated[float | None, typer.Option(help="Of the machine, for costs in money")] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="DIR", help="An earlier comparison; a loss against it is exit code 1")
    ] = None,
    baseline_quality_loss: Annotated[str, typer.Option(help="Loss against the baseline that is no failure")] = "1%",
    baseline_goodput_loss: Annotated[str, typer.Option(help="Loss against the baseline that is no failure")] = "5%",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for report and results")] = None,
) -> None:
    """Build, serve, judge and load each variant in rounds, then name the one to ship, in one report.

    The same command with the same -o goes on where it was interrupted.
    """
    from slimserve.compare.plan import (
        Baseline,
        make_preset,
        parse_endpoint,
        parse_existing_model,
        parse_rates,
        parse_share,
        parse_slos,
    )
    from slimserve.compare.results import Requirements
    from slimserve.compare.run import compare as run_comparison

    names = [[name.strip() for name in option.split(",") if name.strip()] for option in (recipes, workloads)]
    requirements = Requirements(
        parse_share("--max-quality-loss", max_quality_loss), parse_slos(slo or ()), price_per_hour
    )
    against = None
    if baseline is not None:
        against = Baseline(
            baseline,
            parse_share("--baseline-quality-loss", baseline_quality_loss),
            parse_share("--baseline-goodput-loss", baseline_goodput_loss),
        )
    comparison = run_comparison(
        model,
        names[0],
        names[1],
        make_preset("quick" if quick else "full", names[1], rates=parse_rates(rate or ())),
        output or new_run_folder(model.rstrip("/").rsplit("/", 1)[-1]),
        requirements=requirements,
        existing=[parse_existing_model(text) for text in variant or ()],
        endpoints=[parse_endpoint(text) for text in endpoint or ()],
        baseline=against,
    )
    if comparison.baseline is not None and not comparison.baseline.passed:
        raise typer.Exit(1)
