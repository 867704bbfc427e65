"""Runs `slimserve serve`: one engine on the public address, or several engines behind the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvloop

from slimserve.core.errors import UserError
from slimserve.core.hardware import Hardware
from slimserve.core.roofline import load_roofline
from slimserve.core.storage import cache_dir
from slimserve.serve.gateway.messages import Timeouts
from slimserve.serve.gateway.proxy import ProxyServer
from slimserve.serve.gateway.routing import Gateway
from slimserve.serve.gateway.supervisor import SupervisedEngine, supervise
from slimserve.serve.launch.config import ResolvedServeConfig
from slimserve.serve.launch.plan import LaunchPlan
from slimserve.serve.launch.process import Engine, EngineSpec, base_url, exit_reason
from slimserve.serve.launch.roofline import describe_start
from slimserve.serve.launch.tune import kept_launch, tune_launch
from slimserve.serve.policy.access_log import log_to_stderr
from slimserve.serve.policy.cors import CorsRules
from slimserve.serve.policy.keys import KEY_VARIABLES
from slimserve.serve.policy.metrics import gateway_metrics

_GRACE_S = 30.0
"""Seconds after an engine's own deadline until the gateway ends a request that the engine did not end."""


def engine_specs(config: ResolvedServeConfig, plans: Sequence[LaunchPlan]) -> list[EngineSpec]:
    """Return the engine to start for each variant.

    A single variant gets the public address. Several get ports of the loopback interface, behind the gateway.
    """
    is_only = len(config.variants) == 1
    return [
        EngineSpec(
            variant.directory,
            variant.name,
            plan,
            cache_dir("logs") / f"serve-{variant.name}-{config.port}.log",
            config.port if is_only else 0,
            config.host if is_only else "127.0.0.1",
            variant.vllm_args,
            aliases=config.aliases_of(variant.name),
            limits=config.limits,
            api_key_file=config.api_key_file,
        )
        for variant, plan in zip(config.variants, plans, strict=True)
    ]


def run_app(config: ResolvedServeConfig, plans: Sequence[LaunchPlan], print_status: Callable[[str], object]) -> None:
    """Serve until Ctrl-C or SIGTERM; raise UserError if no engine is left.

    With one variant, SystemExit ends the serving; with several, this function handles the signals.
    """
    specs = engine_specs(config, plans)
    load_roofline()  # Measured now, while no engine uses the cores.
    for spec in specs:
        print_status(f"{spec.name}: engine log {spec.log}")
        for warning in spec.plan.warnings:
            print_status(f"{spec.name}: warning: {warning}")
    if len(specs) == 1:
        for line in _serve_one(config, specs[0]):
            print_status(line)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_several(config, specs, print_status))


def _serve_one(config: ResolvedServeConfig, spec: EngineSpec) -> Iterator[str]:
    with Engine(spec) as engine:
        yield f"ready in {engine.ready_s:.1f} s: {spec.name} at {spec.url}/v1, metrics at {spec.url}/metrics"
        yield from describe_start(spec.directory, spec.log)
        yield _curl_line(config, spec.url, spec.name)
        yield "press Ctrl-C to stop"
        status = engine.wait()
        problem = f"exited by itself ({exit_reason(spec.log, status)})"
        raise UserError("engine", spec.name, problem, f"read {spec.log}")


async def _serve_several(
    config: ResolvedServeConfig, specs: Sequence[EngineSpec], print_status: Callable[[str], object]
) -> None:
    log_to_stderr()
    keys = config.api_keys()
    cors = CorsRules.of_arguments([variant.vllm_args for variant in config.variants])
    limits = config.limits
    metrics = gateway_metrics()
    engines = {spec.name: SupervisedEngine(spec, metrics, print_status) for spec in specs}
    gateway = Gateway(config.variants, engines, metrics, config.aliases, config.default, keys, cors=cors)
    server = ProxyServer(gateway, limits.max_body_bytes, Timeouts(answer_s=limits.request_timeout_s + _GRACE_S))
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    await server.start(listener)
    url = base_url(config.host, config.port)
    print_status(f"gateway at {url}/v1, metrics at {url}/metrics; each variant answers when it is ready")
    print_status(_curl_line(config, url, specs[0].name))
    print_status("press Ctrl-C to stop")

    stopped = asyncio.Event()
    supervision = asyncio.create_task(supervise(list(engines.values())))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopped.is_set():
            supervision.cancel()
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    waiting = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({supervision, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not supervision.done():
            gateway.is_draining = True
            draining = asyncio.create_task(server.drain(limits.drain_s))
            print_status(f"stopping: running requests have {limits.drain_s:g} s; a second Ctrl-C ends them now")
            await asyncio.wait({draining, supervision}, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
    finally:
        waiting.cancel()
        supervision.cancel()
        await asyncio.wait({supervision})
        await server.close()
    if not supervision.cancelled() and (error := supervision.exception()):
        raise error
    print_status("stopped")


def _curl_line(config: ResolvedServeConfig, url: str, name: str) -> str:
    shown = next((f"${name}" for name in KEY_VARIABLES if os.environ.get(name)), "")
    if config.api_key_file and not shown:
        shown = f"$(grep -m 1 -v '^#' {shlex.quote(str(config.api_key_file))})"
    key = f'-H "Authorization: Bearer {shown}" ' if shown else ""
    question = {"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    header = f"{key}-H 'Content-Type: application/json'"
    return f"try: curl {url}/v1/chat/completions {header} -d {shlex.quote(json.dumps(question))}"


def explain_launches(config: ResolvedServeConfig, plans: Sequence[LaunchPlan]) -> Iterator[str]:
    """Return lines with every launch choice of every variant and its reason."""
    for variant, plan in zip(config.variants, plans, strict=True):
        if len(config.variants) > 1:
            yield f"variant {variant.name} ({variant.model})"
        yield plan.explain(variant.vllm_args)
        if variant.vllm_args:
            yield f"{' '.join(variant.vllm_args)}\n    your own arguments, which override the plan"
        yield "limits: " + ", ".join(f"{name}={value}" for name, value in config.limits.model_dump().items())


def plan_launches(config: ResolvedServeConfig, hardware: Hardware, is_tuned: bool) -> list[LaunchPlan]:
    """Return one launch plan per variant; `is_tuned` measures first, otherwise earlier measurements are used."""
    choose = tune_launch if is_tuned else kept_launch
    num_variants = len(config.variants)
    return [
        choose(variant.directory, hardware, variant.profile, num_variants, variant.vllm_args)
        for variant in config.variants
    ]
