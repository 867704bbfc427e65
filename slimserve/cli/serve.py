"""`slimserve serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class WithVllmArguments(TyperCommand):
    """A command whose arguments after `--` are vLLM's; click would take them for more models."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        super().parse_args(ctx, args[:split])
        ctx.args = args[split + 1 :]
        return args[split + 1 :]


def serve(
    context: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL | NAME=MODEL …", help="One model, or several, each with a name")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="The same as a file")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Traffic to expect: recommendation, reasoning or balanced (the default)")
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V1:95,V2:5", help="A name that splits its traffic between variants by weight"),
    ] = None,
    default: Annotated[str | None, typer.Option(help="Variant or alias of requests that name no model")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; 8000 if not given")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Keys that clients must show, one a line")] = None,
    max_running: Annotated[int | None, typer.Option(min=1, help="Requests inside an engine at once")] = None,
    max_queued: Annotated[int | None, typer.Option(min=0, help="Requests that wait for a place; more get 429")] = None,
    max_body_mib: Annotated[int | None, typer.Option(min=1, help="Largest request body")] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Longest life of a request")] = None,
    drain: Annotated[float | None, typer.Option(metavar="SECONDS", help="For running requests after SIGTERM")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each launch choice and its reason, and stop")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="First measure which settings suit the model and profile, and keep the best")
    ] = False,
) -> None:
    """Serve one model, or several variants behind one address, with the launch tuned to this machine, until Ctrl-C.

    Arguments after `--` go to vLLM unchanged and win. --api-key-file or VLLM_API_KEY make it ask for a key.
    """
    from slimserve.core.hardware import probe_hardware
    from slimserve.serve.app import explain_launches, plan_launches, run_app
    from slimserve.serve.launch.config import load_serve_config
    from slimserve.serve.launch.process import check_port_is_free

    limits = {
        "max_running": max_running,
        "max_queued": max_queued,
        "max_body_bytes": None if max_body_mib is None else max_body_mib * 2**20,
        "request_timeout_s": timeout,
        "drain_s": drain,
    }
    stack = load_serve_config(
        models or [],
        config,
        alias or [],
        profile=profile,
        default=default,
        host=host,
        port=port,
        api_key_file=None if api_key_file is None else str(api_key_file),
        vllm_args=context.args,
        limits={name: value for name, value in limits.items() if value is not None},
    )
    check_port_is_free(stack.host, stack.port)
    plans = plan_launches(stack, probe_hardware(), tune)
    if explain:
        for line in explain_launches(stack, plans):
            typer.echo(line)
        return
    try:
        run_app(stack, plans, typer.echo)
    except SystemExit:
        typer.echo("stopped")
