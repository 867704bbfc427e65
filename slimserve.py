"""The front door: `slimserve {compress,serve,loadtest,compare} …`; a part is imported only when it is called."""

from __future__ import annotations

import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from contracts.errors import UserError

app = typer.Typer(
    help="Make a small language model smaller, serve it on vLLM, load it with real traffic, and compare the variants.",
    epilog="MODEL is a Hugging Face directory or id, a .gguf file, or the built-in smollm2-135m-instruct.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, Hugging Face id, .gguf file or built-in name")]


@app.command()
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
    from compress import recipe as recipes

    if list_recipes:
        for name, listed in recipes.list_recipes().items():
            typer.echo(f"{name:16} {listed.summary}")
        return
    if model is None:
        raise UserError("MODEL", "", "is missing", "write: slimserve compress MODEL --recipe NAME")
    name, loaded = recipes.load_recipe(recipe, settings or ())
    from compress.build import build_variant
    from contracts.model import resolve_model

    typer.echo(build_variant(model, resolve_model(model), name, loaded, output))


@app.command()
def check(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A variant that compress wrote, or any model")],
) -> None:
    """Prove that a variant loads: shapes, stock transformers, stock vLLM, and the same logits from all."""
    from compare.check import check_variant
    from contracts.model import resolve_model

    passed = True
    for finding in check_variant(resolve_model(directory)):
        passed &= finding.passed
        typer.echo(f"{'ok  ' if finding.passed else 'FAIL'} {finding.what:13} {finding.detail}")
    if not passed:
        raise typer.Exit(1)


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A variant that compress wrote")],
    plot: Annotated[Path | None, typer.Option(help="Write the error per layer as a .png or .svg to this file")] = None,
) -> None:
    """Show what was done to a variant, its sizes, the error per layer, and the kernel that each format will use."""
    from compress.inspect import describe_variant, plot_errors
    from contracts.model import resolve_model

    where = resolve_model(directory)
    for line in describe_variant(where):
        typer.echo(line)
    if plot is not None:
        plot_errors(where, plot)
        typer.echo(f"plot: {plot}")


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each launch choice and its reason, and stop")
    ] = False,
) -> None:
    """Serve a model on vLLM with the launch tuned to this machine, until Ctrl-C.

    Arguments after `--` go to vLLM unchanged and win. Set VLLM_API_KEY to require a key.
    """
    from contracts.hardware import probe_hardware
    from contracts.model import resolve_model
    from serve.engine import check_port_is_free, serve_foreground
    from serve.plan import plan_launch

    check_port_is_free(host, port)
    directory = resolve_model(model)
    plan = plan_launch(directory, probe_hardware())
    if explain:
        typer.echo(plan.explain())
        return
    try:
        for line in serve_foreground(model, directory, plan, host, port, context.args):
            typer.echo(line)
    except SystemExit:
        typer.echo("stopped")


@app.command()
def loadtest(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="recommendation or reasoning")],
    url: Annotated[str, typer.Option(help="The server to load, for example http://127.0.0.1:8000")],
    model: Annotated[str | None, typer.Option(help="Model name on the server; default: the only one it has")] = None,
    users: Annotated[int, typer.Option(help="Users that each wait for an answer, then ask again")] = 4,
    duration: Annotated[float, typer.Option(help="Seconds to measure, after the warm-up")] = 60.0,
    warmup: Annotated[float, typer.Option(help="Seconds to leave out at the start")] = 5.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for figures and raw rows")] = None,
) -> None:
    """Load a running server with a workload through Locust and print what its clients saw."""
    from loadtest.report import print_summary
    from loadtest.run import LoadSettings, run_suite
    from loadtest.target import find_target

    target = find_target(url, model)
    settings = LoadSettings(users=users, duration_s=duration, warmup_s=warmup)
    folder = output or _new_run_folder(suite)
    summary, _ = run_suite(suite, target, settings, folder)
    print_summary(suite, target, summary)
    typer.echo(f"figures and raw rows: {folder}")


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="The model to make variants of")],
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas")] = "dense,w8a8,prune25-w8a8",
    workloads: Annotated[str, typer.Option(help="Workloads, separated by commas")] = "recommendation,reasoning",
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes per variant, wider intervals")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for report and results")] = None,
) -> None:
    """Build, serve, judge and load each variant in turn, then write one report."""
    from compare.run import FULL, QUICK
    from compare.run import compare as run_comparison

    names = [[name.strip() for name in option.split(",") if name.strip()] for option in (recipes, workloads)]
    folder = output or _new_run_folder(model.rstrip("/").rsplit("/", 1)[-1])
    run_comparison(model, names[0], names[1], QUICK if quick else FULL, folder)


def _new_run_folder(name: str) -> Path:
    return Path("results") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2, Ctrl-C 130, SIGTERM 143."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _leave(number: int, _frame: object) -> None:
    """End through SystemExit, so that every context manager on the way out cleans up."""
    sys.stderr.write(f"\nending on {signal.Signals(number).name} …\n")
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
