"""`slimserve loadtest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimserve.cli.folders import new_run_folder
from slimserve.core.errors import UserError


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
    folder = output or new_run_folder(suite)
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
