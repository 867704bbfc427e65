"""`slimserve calibrate`."""

from __future__ import annotations

from typing import Annotated

import typer


def calibrate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Variant directory, or any model.")],
    workload: Annotated[
        str, typer.Option(metavar="NAME|FILE.toml", help="Workload whose calibration split the scores are fitted on.")
    ],
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts of the calibration split.")] = 256,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Server that already serves the variant (default: start an engine)."),
    ] = None,
) -> None:
    """Fit the map from a variant's label scores to probabilities, and keep it in the variant's manifest.

    Requests to /v1/score with "calibrated": true then get probabilities that hold on the workload. A running server
    reads the manifest when it starts.
    """
    from slimserve.compare.backend import Backend
    from slimserve.compare.calibrate import calibrate_target, keep_calibration
    from slimserve.core.model import resolve_model
    from slimserve.core.openai_client import find_target
    from slimserve.core.storage import cache_dir
    from slimserve.workloads import load_workload

    name = load_workload(workload).name
    variant = resolve_model(directory)
    if url is not None:
        calibration = calibrate_target(find_target(url, None), name, prompts)
    else:
        log = cache_dir("logs") / f"calibrate-{variant.name}.log"
        with Backend(directory, [name]).serve(variant, log) as served:
            calibration = calibrate_target(served.target, name, prompts)
    file = keep_calibration(variant, calibration)
    before, after = calibration.before, calibration.after
    typer.echo(
        f"{calibration.method} map of {calibration.num_items} items of {calibration.num_groups} groups; "
        f"held out by group: calibration error {before.calibration_error:.3f} -> {after.calibration_error:.3f}, "
        f"Brier score {before.brier:.3f} -> {after.brier:.3f}"
    )
    typer.echo(f"kept in {file}")
