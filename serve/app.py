"""`slimserve serve`: one engine on the public address, or several behind the gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
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
from slimserve.serve.launch.process import Engine, EngineSpec, base_url, last_error
from slimserve.serve.launch.roofline import describe_start
from slimserve.serve.launch.tune import kept_launch, tune_launch
from slimserve.serve.policy.keys import KEY_VARIABLES
from slimserve.serve.policy.metrics import gateway_metrics

_GRACE_S = 30.0
"""On top of the engines' own deadline, before the gateway ends a request that they did not end."""


def engine_specs(stack: ResolvedServeConfig, plans: Sequence[LaunchPlan]) -> list[EngineSpec]:
    """What to start for every variant: the only one on the stack's address, several on ports of the loopback."""
    is_only = len(stack.variants) == 1
    return [
        EngineSpec(
            variant.directory,
            variant.name,
            plan,
            cache_dir("logs") / f"serve-{variant.name}-{stack.port}.log",
            stack.port if is_only else 0,
            stack.host if is_only else "127.0.0.1",
            variant.vllm_args,
            aliases=stack.aliases_of(variant.name),
            limits=stack.limits,
            api_key_file=stack.api_key_file,
        )
        for variant, plan in zip(stack.variants, plans, strict=True)
    ]


def run_app(stack: ResolvedServeConfig, plans: Sequence[LaunchPlan], print_status: Callable[[str], object]) -> None:
    """Serve until SystemExit (one variant) or a signal (several); UserError where nothing is left that serves."""
    specs = engine_specs(stack, plans)
    load_roofline()  # measured before an engine takes the cores
    for spec in specs:
        print_status(f"{spec.name}: engine log {spec.log}")
    if len(specs) == 1:
        for line in _serve_one(stack, specs[0]):
            print_status(line)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_several(stack, specs, print_status))


def _serve_one(stack: ResolvedServeConfig, spec: EngineSpec) -> Iterator[str]:
    with Engine(spec) as engine:
        yield f"ready in {engine.ready_s:.1f} s: {spec.name} at {spec.url}/v1, metrics at {spec.url}/metrics"
        yield from describe_start(spec.directory, spec.log)
        yield _curl_line(stack, spec.url, spec.name)
        yield "stop with Ctrl-C"
        status = engine.wait()
        problem = f"ended by itself (exit status {status}: {last_error(spec.log)})"
        raise UserError("engine", spec.name, problem, f"read {spec.log}")


async def _serve_several(
    stack: ResolvedServeConfig, specs: Sequence[EngineSpec], print_status: Callable[[str], object]
) -> None:
    _log_to_stderr()
    keys = stack.api_keys()
    limits = stack.limits
    metrics = gateway_metrics()
    engines = {spec.name: SupervisedEngine(spec, metrics, print_status) for spec in specs}
    gateway = Gateway(stack.variants, engines, metrics, stack.aliases, stack.default, keys)
    server = ProxyServer(gateway, limits.max_body_bytes, Timeouts(answer_s=limits.request_timeout_s + _GRACE_S))
    family = socket.AF_INET6 if ":" in stack.host else socket.AF_INET
    listener = socket.create_server((stack.host, stack.port), family=family, backlog=2048)
    await server.start(listener)
    url = base_url(stack.host, stack.port)
    print_status(f"gateway at {url}/v1, metrics at {url}/metrics; each variant answers when it is ready")
    print_status(_curl_line(stack, url, specs[0].name))
    print_status("stop with Ctrl-C")

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
            print_status(f"ending: requests in flight have {limits.drain_s:g} s; a second Ctrl-C ends them now")
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


def _curl_line(stack: ResolvedServeConfig, url: str, name: str) -> str:
    shown = next((f"${name}" for name in KEY_VARIABLES if os.environ.get(name)), "")
    if stack.api_key_file and not shown:
        shown = f"$(grep -m 1 -v '^#' {shlex.quote(str(stack.api_key_file))})"
    key = f'-H "Authorization: Bearer {shown}" ' if shown else ""
    question = {"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    header = f"{key}-H 'Content-Type: application/json'"
    return f"try: curl {url}/v1/chat/completions {header} -d {shlex.quote(json.dumps(question))}"


def explain_launches(stack: ResolvedServeConfig, plans: Sequence[LaunchPlan]) -> Iterator[str]:
    """Every launch choice of every variant with its reason."""
    for variant, plan in zip(stack.variants, plans, strict=True):
        if len(stack.variants) > 1:
            yield f"variant {variant.name} ({variant.model})"
        yield plan.explain()
        if variant.vllm_args:
            yield f"{' '.join(variant.vllm_args)}\n    your own arguments, which win"
        yield "limits: " + ", ".join(f"{name}={value}" for name, value in stack.limits.model_dump().items())


def plan_launches(stack: ResolvedServeConfig, hardware: Hardware, is_tuned: bool) -> list[LaunchPlan]:
    """One launch plan per variant: measured now if it is to be tuned, else with what was measured earlier."""
    choose = tune_launch if is_tuned else kept_launch
    num_variants = len(stack.variants)
    return [choose(variant.directory, hardware, variant.profile, num_variants) for variant in stack.variants]


def _log_to_stderr() -> None:
    """The gateway's access lines and warnings; the engines write into their own logs."""
    ours = logging.getLogger("slimserve")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
