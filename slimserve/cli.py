"""The front door: `slimserve {distill,compress,serve,loadtest,compare}`; a part is imported only when it is called."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from slimserve.core.errors import UserError
from slimserve.distill import command as distill_command

app = typer.Typer(
    help="Make a small language model smaller, serve it on vLLM, load it with real traffic, and compare the variants.",
    epilog="MODEL is a Hugging Face directory or id, a .gguf file, or the built-in smollm2-135m-instruct.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(distill_command.app, name="distill")

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
    from slimserve.compress import recipe as recipes

    if list_recipes:
        for name, listed in recipes.list_recipes().items():
            typer.echo(f"{name:16} {listed.summary}")
        return
    if model is None:
        raise UserError("MODEL", "", "is missing", "write: slimserve compress MODEL --recipe NAME")
    name, loaded = recipes.load_recipe(recipe, settings or ())
    from slimserve.compress.build import build_variant
    from slimserve.core.model import resolve_model

    typer.echo(build_variant(model, resolve_model(model), name, loaded, output))


@app.command()
def check(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A variant that compress wrote, or any model")],
) -> None:
    """Prove that a variant loads: shapes, stock transformers, stock vLLM, and the same logits from all."""
    from slimserve.compare.check import check_variant
    from slimserve.core.model import resolve_model

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
    from slimserve.compress.inspect import describe_variant, plot_errors
    from slimserve.core.model import resolve_model

    where = resolve_model(directory)
    for line in describe_variant(where):
        typer.echo(line)
    if plot is not None:
        plot_errors(where, plot)
        typer.echo(f"plot: {plot}")


class _WithVllmArguments(TyperCommand):
    """A command whose arguments after `--` are vLLM's; click would take them for more models."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        super().parse_args(ctx, args[:split])
        ctx.args = args[split + 1 :]
        return args[split + 1 :]


@app.command(cls=_WithVllmArguments)
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
    from slimserve.serve.app import explain_stack, plan_stack, serve_foreground
    from slimserve.serve.launch.config import load_stack
    from slimserve.serve.launch.process import check_port_is_free

    limits = {
        "max_running": max_running,
        "max_queued": max_queued,
        "max_body_bytes": None if max_body_mib is None else max_body_mib * 2**20,
        "request_timeout_s": timeout,
        "drain_s": drain,
    }
    stack = load_stack(
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
    plans = plan_stack(stack, probe_hardware(), tune)
    if explain:
        for line in explain_stack(stack, plans):
            typer.echo(line)
        return
    try:
        serve_foreground(stack, plans, typer.echo)
    except SystemExit:
        typer.echo("stopped")


@app.command()
def loadtest(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="recommendation, reasoning, mixed or chat")],
    url: Annotated[str, typer.Option(help="The server to load, for example http://127.0.0.1:8000")],
    model: Annotated[str | None, typer.Option(help="Model name on the server; default: the only one it has")] = None,
    rate: Annotated[
        str,
        typer.Option(
            help="Open loop: requests/s, as 5, 1..20 (rising evenly) or 5@0,20@30 (from these seconds on)",
            rich_help_panel="Traffic",
        ),
    ] = "",
    arrival: Annotated[
        str, typer.Option(help="Gaps between requests: constant, poisson or gamma", rich_help_panel="Traffic")
    ] = "poisson",
    burstiness: Annotated[
        float, typer.Option(help="Variance of gamma gaps over that of poisson", rich_help_panel="Traffic")
    ] = 1.0,
    trace: Annotated[
        str,
        typer.Option(metavar="FILE", help="Open loop: replay the timestamps of this file", rich_help_panel="Traffic"),
    ] = "",
    users: Annotated[
        int,
        typer.Option(help="Closed loop: users that each wait for an answer, then ask again", rich_help_panel="Traffic"),
    ] = 4,
    duration: Annotated[
        str, typer.Option(help="Length of the measured window: 60, 60s, 2m", rich_help_panel="Traffic")
    ] = "60s",
    warmup: Annotated[str, typer.Option(help="Left out before it", rich_help_panel="Traffic")] = "5s",
    cooldown: Annotated[str, typer.Option(help="How long traffic goes on after it", rich_help_panel="Traffic")] = "2s",
    timeout: Annotated[str, typer.Option(help="Longest wait for an answer", rich_help_panel="Traffic")] = "300s",
    slo: Annotated[
        list[str] | None,
        typer.Option(
            help="ttft_p99=500ms, itl_p95=50ms, tpot, e2e, answer, errors=1%; may be given again; missed: exit 1",
            rich_help_panel="Objectives and searches",
        ),
    ] = None,
    find_max_rate: Annotated[
        bool,
        typer.Option(
            "--find-max-rate",
            help="Search the highest rate that keeps --slo",
            rich_help_panel="Objectives and searches",
        ),
    ] = False,
    sweep: Annotated[
        str,
        typer.Option(
            metavar="RATE,RATE,…",
            help="One run at each rate, and their curve",
            rich_help_panel="Objectives and searches",
        ),
    ] = "",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="First measure this client's own error against a server of known latency",
            rich_help_panel="Objectives and searches",
        ),
    ] = False,
    processes: Annotated[
        int, typer.Option(help="Locust workers that share the load", rich_help_panel="Several processes or machines")
    ] = 1,
    master: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Be the master of N workers, started elsewhere",
            rich_help_panel="Several processes or machines",
        ),
    ] = 0,
    master_host: Annotated[
        str,
        typer.Option(
            help="Address where --master listens for workers", rich_help_panel="Several processes or machines"
        ),
    ] = "127.0.0.1",
    master_port: Annotated[
        int,
        typer.Option(help="Port where --master listens for workers", rich_help_panel="Several processes or machines"),
    ] = 5557,
    seed: Annotated[int, typer.Option(help="Of arrivals", rich_help_panel="Traffic")] = 0,
    endpoint: Annotated[
        str,
        typer.Option(
            help="Scoring by score, rerank, generative_scoring or completions; auto: what is there",
            rich_help_panel="Requests",
        ),
    ] = "auto",
    history: Annotated[
        str, typer.Option(help="Films in a history: 24, 8..32 or 8,16,32", rich_help_panel="Requests")
    ] = "24",
    candidates: Annotated[
        str, typer.Option(help="Candidates of a slate: 16, 8..32 or 8,16,32", rich_help_panel="Requests")
    ] = "16",
    repeat_visits: Annotated[
        float, typer.Option(help="Share of slates whose history was sent before", rich_help_panel="Requests")
    ] = 0.0,
    max_tokens: Annotated[
        str, typer.Option(help="Most tokens of an answer: 160, 64..256 or 64,256", rich_help_panel="Requests")
    ] = "160",
    exact_tokens: Annotated[
        bool, typer.Option("--exact-tokens", help="Answers go on until --max-tokens", rich_help_panel="Requests")
    ] = False,
    prompt_seed: Annotated[int, typer.Option(help="Of the order of prompts", rich_help_panel="Requests")] = 0,
    first_prompt: Annotated[
        int,
        typer.Option(help="Where in it to begin, to ask others than an earlier run", rich_help_panel="Requests"),
    ] = 0,
    share: Annotated[float, typer.Option(help="mixed: the share of slates", rich_help_panel="Requests")] = 0.5,
    data: Annotated[
        str,
        typer.Option(help="chat: a JSONL file; recommendation: a folder of atomic files", rich_help_panel="Requests"),
    ] = "",
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            help="Of the server, for costs per token, item, answer", rich_help_panel="Objectives and searches"
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for figures, page and raw rows")] = None,
) -> None:
    """Load a running server with a workload through Locust; say what its clients saw, and whether it keeps its SLOs.

    VLLM_API_KEY is sent as the key. Workers of --master: locust -f loadtest/suites/SUITE.py --worker --master-host H.
    """
    from typing import cast, get_args

    from slimserve.core.openai_client import find_target
    from slimserve.loadtest.arrivals import Arrival
    from slimserve.loadtest.rates import find_rate, sweep_rates
    from slimserve.loadtest.run import Cluster, run_suite
    from slimserve.loadtest.settings import LoadSettings, SuiteOptions, parse_duration

    if arrival not in get_args(Arrival):
        raise UserError("--arrival", arrival, "is unknown", f"choose from {', '.join(get_args(Arrival))}")
    options = SuiteOptions(
        endpoint, history, candidates, repeat_visits, max_tokens, exact_tokens, share, prompt_seed, first_prompt, data
    )
    settings = LoadSettings(
        rate=rate,
        arrival=cast("Arrival", arrival),
        burstiness=burstiness,
        trace=trace,
        users=users,
        duration_s=parse_duration("--duration", duration),
        warmup_s=parse_duration("--warmup", warmup),
        cooldown_s=parse_duration("--cooldown", cooldown),
        timeout_s=parse_duration("--timeout", timeout),
        seed=seed,
        processes=processes,
        slos=tuple(slo or ()),
        price_per_hour=price_per_hour,
        suite=options,
    )
    settings.check()
    if find_max_rate and sweep:
        raise UserError("--sweep", sweep, "is a search, and so is --find-max-rate", "give one of them")
    target = find_target(url, model)
    folder = output or _new_run_folder(suite)
    calibration = None
    if calibrate:
        from slimserve.loadtest.calibrate import calibrate as measure_client

        calibration = measure_client().as_dict()
    if find_max_rate:
        is_kept = find_rate(suite, target, settings, folder).is_found
    elif sweep:
        is_kept = all(point.met for point in sweep_rates(suite, target, settings, sweep, folder))
    else:
        from slimserve.report.load import print_summary

        cluster = Cluster(master, master_host, master_port) if master else None
        summary, _ = run_suite(suite, target, settings, folder, cluster=cluster, calibration=calibration)
        print_summary(suite, target, summary)
        is_kept = not summary.objectives or (not summary.invalid and all(one.is_met for one in summary.objectives))
    typer.echo(f"figures, page and raw rows: {folder}")
    if not is_kept:
        raise typer.Exit(1)


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The steps; see docs/distill.md")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for every step's model and the comparison")],
) -> None:
    """A chain of distilling and compressing, then a comparison of what came of it; goes on where it was interrupted."""
    from slimserve.pipeline import load_pipeline, run_pipeline

    for name, directory in run_pipeline(load_pipeline(file), output).items():
        typer.echo(f"{name}: {directory}")


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="The model to make variants of")],
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas")] = "dense,w8a8,prune25-w8a8",
    workloads: Annotated[str, typer.Option(help="Workloads, separated by commas")] = "recommendation,reasoning",
    quick: Annotated[bool, typer.Option("--quick", help="One round, fewer prompts, wider intervals")] = False,
    variant: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="A finished model as one more row")
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
        FULL,
        QUICK,
        Baseline,
        parse_endpoint,
        parse_finished,
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
        replace(QUICK if quick else FULL, rates=parse_rates(rate or ())),
        output or _new_run_folder(model.rstrip("/").rsplit("/", 1)[-1]),
        requirements=requirements,
        finished=[parse_finished(text) for text in variant or ()],
        endpoints=[parse_endpoint(text) for text in endpoint or ()],
        baseline=against,
    )
    if comparison.baseline is not None and not comparison.baseline.passed:
        raise typer.Exit(1)


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
