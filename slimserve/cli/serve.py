"""`slimserve serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from slimserve.core.config import takes_settings
from slimserve.serve.launch.config import ServeConfig


class WithVllmArguments(TyperCommand):
    """A command that passes the arguments after `--` to vLLM; click would read them as more models."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        super().parse_args(ctx, args[:split])
        ctx.args = args[split + 1 :]
        return args[split + 1 :]


@takes_settings(ServeConfig, only_given=True)
def serve(
    context: typer.Context,
    settings: dict[str, Any],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL | NAME=MODEL ...", help="One model, or several models with a name each."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="TOML file with variants, aliases and limits.", rich_help_panel="Models"
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=V1:95,V2:5",
            help="Model name whose traffic is split between variants by weight. May be repeated.",
            rich_help_panel="Models",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Measure a few launch settings first and keep the fastest.", rich_help_panel="Models"
        ),
    ] = False,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="Workload whose kind of traffic the launch is tuned for; sets --profile.",
            rich_help_panel="Models",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each launch choice with its reason, and exit.")
    ] = False,
) -> None:
    """Serve one model, or several variants behind one address, until Ctrl-C.

    The launch is tuned to this machine. Arguments after `--` go to vLLM unchanged and override the launch plan.
    """
    from slimserve.core.hardware import probe_hardware
    from slimserve.serve.app import explain_launches, plan_launches, run_app
    from slimserve.serve.launch.config import load_serve_config
    from slimserve.serve.launch.process import check_port_is_free

    if workload is not None:
        from slimserve.workloads import load_workload

        settings["profile"] = load_workload(workload).launch_profile
    resolved = load_serve_config(models or [], config, alias or [], vllm_args=context.args, **settings)
    check_port_is_free(resolved.host, resolved.port)
    plans = plan_launches(resolved, probe_hardware(), tune)
    if explain:
        for line in explain_launches(resolved, plans):
            typer.echo(line)
        return
    try:
        run_app(resolved, plans, typer.echo)
    except SystemExit:
        typer.echo("stopped")


COMMAND_CLASS = WithVllmArguments
