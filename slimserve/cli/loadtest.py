"""`slimserve loadtest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimserve.cli.folders import new_run_folder
from slimserve.core.config import takes_settings
from slimserve.core.errors import UserError
from slimserve.loadtest.settings import LoadtestOptions

if TYPE_CHECKING:
    from slimserve.loadtest.rates import CurvePoint


@takes_settings(LoadtestOptions)
def loadtest(
    suite: Annotated[
        str,
        typer.Argument(metavar="SUITE", help="recommendation, reasoning, mixed, chat, or the TOML file of a workload."),
    ],
    settings: LoadtestOptions,
) -> None:
    """Load a running OpenAI-compatible server through Locust and report latency, throughput and objectives.

    VLLM_API_KEY is sent as the key. Start each worker of --master N on its machine with the suite's locustfile:
    `locust -f loadtest/suites/SUITE.py --worker --master-host HOST` (workload.py for a workload's file).
    """
    from slimserve.core.openai_client import find_target
    from slimserve.loadtest.rates import find_rate, sweep_rates
    from slimserve.loadtest.run import Cluster, run_suite
    from slimserve.report.load import print_summary, write_html

    settings.load.check()
    if settings.find_max_rate and settings.sweep:
        raise UserError("--sweep", settings.sweep, "conflicts with --find-max-rate", "give only one of them")
    target = find_target(settings.url, settings.model)
    folder = settings.output or new_run_folder(Path(suite).stem)
    accuracy = None
    if settings.calibrate:
        from slimserve.loadtest.calibrate import calibrate

        accuracy = calibrate().as_dict()
    if settings.find_max_rate:
        is_met = find_rate(suite, target, settings.load, folder, write_html, _report_curve).is_found
    elif settings.sweep:
        points = sweep_rates(suite, target, settings.load, settings.sweep, folder, write_html, _report_curve)
        is_met = all(point.met for point in points)
    else:
        cluster = Cluster(settings.master, settings.master_host, settings.master_port) if settings.master else None
        summary, _ = run_suite(
            suite, target, settings.load, folder, cluster=cluster, calibration=accuracy, on_result=write_html
        )
        print_summary(suite, target, summary)
        is_met = not summary.objectives or (not summary.invalid and all(one.is_met for one in summary.objectives))
        is_met = is_met and summary.num_succeeded > 0
    typer.echo(f"report, metrics and raw rows: {folder}")
    if not is_met:
        raise typer.Exit(1)


def _report_curve(
    document: Mapping[str, Any], points: Sequence[CurvePoint], folder: Path, found_rate: float | None
) -> None:
    from slimserve.report.load import print_curve, write_curve_html

    write_curve_html(document, points, folder, found_rate)
    print_curve(points)
