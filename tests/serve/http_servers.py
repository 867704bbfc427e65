"""The two servers of `slimserve serve` around apps that answer as vLLM's does: one engine alone, and a gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from slimserve.serve.engine.middleware import RequestMiddleware
from slimserve.serve.engine.plugin import http_error
from slimserve.serve.gateway.proxy import ProxyServer
from slimserve.serve.gateway.routing import Gateway
from slimserve.serve.gateway.supervisor import State, SupervisedEngine
from slimserve.serve.gateway.upstream import Backend
from slimserve.serve.launch.config import Variant
from slimserve.serve.launch.plan import LaunchPlan
from slimserve.serve.launch.process import EngineSpec
from slimserve.serve.policy.cors import CorsRules
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import GatewayMetrics, RequestMetrics

KEY = "s3cret-key"
MAX_BODY = 10_000
EVENTS = [json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) for text in ("Par", "is", " é 🙂")]


@dataclass
class Servers:
    """The ports of both servers, and what a test needs to control their engines."""

    single: int = 0
    gateway: int = 0
    goes_on: threading.Event = field(default_factory=threading.Event)
    """A stream waits for this after its first event."""

    def port(self, kind: str) -> int:
        port: int = getattr(self, kind)
        return port


def vllm_app(name: str, origins: list[str], goes_on: threading.Event) -> FastAPI:
    """Return an app with vLLM's routes and CORS middleware, slimserve's middleware around it and its error handler."""
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    metrics, limits = RequestMetrics(CollectorRegistry()), Limits(max_body_bytes=MAX_BODY)
    app.add_middleware(RequestMiddleware, limits=limits, keys=frozenset({KEY}), metrics=metrics)
    app.add_exception_handler(HTTPException, http_error)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        if not body.get("stream"):
            return {"model": name, "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris"}}]}

        async def events() -> AsyncIterator[str]:
            for index, event in enumerate([*EVENTS, "[DONE]"]):
                if index == 1:
                    await asyncio.to_thread(goes_on.wait, 20)
                yield f"data: {event}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model"}]}

    @app.get("/health")
    async def health() -> Any:
        return JSONResponse({})

    @app.get("/version")
    async def version() -> Any:
        return {"version": "0.32.0"}

    @app.get("/metrics")
    async def metrics_page() -> Any:
        return PlainTextResponse("")

    return app


@contextlib.asynccontextmanager
async def engine(name: str, origins: list[str], goes_on: threading.Event) -> AsyncIterator[int]:
    app = vllm_app(name, origins, goes_on)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    app.middleware_stack = app.middleware_stack or app.build_middleware_stack()
    app.middleware_stack.app.lifecycle.server = server  # type: ignore[attr-defined]
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


@contextlib.asynccontextmanager
async def gateway(ports: dict[str, int], origins: list[str], directory: Path) -> AsyncIterator[int]:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    supervised = {}
    for name, port in ports.items():
        spec = EngineSpec(Path(), name, LaunchPlan(), Path("/dev/null"), port)
        supervised[name] = SupervisedEngine(spec, metrics, str)
        supervised[name].state = State.READY
        supervised[name].backend = Backend("127.0.0.1", port)
    cors = CorsRules.of_arguments([["--allowed-origins", json.dumps(origins)]] * len(ports))
    variants = [Variant(name, "m", directory, "balanced") for name in ports]
    application = Gateway(variants, supervised, metrics, keys=frozenset({KEY}), registry=registry, cors=cors)
    server = ProxyServer(application, MAX_BODY)
    listener = socket.create_server(("127.0.0.1", 0))
    await server.start(listener)
    try:
        yield listener.getsockname()[1]
    finally:
        await server.close()


@contextlib.contextmanager
def running(origins: list[str], directory: Path) -> Iterator[Servers]:
    """Run a single engine, and a gateway with two others, in a thread of their own; `directory` stands for a model."""
    servers = Servers()
    servers.goes_on.set()
    started, stopped = threading.Event(), threading.Event()

    async def serve() -> None:
        async with contextlib.AsyncExitStack() as stack:
            start = stack.enter_async_context
            servers.single = await start(engine("a", origins, servers.goes_on))
            ports = {name: await start(engine(name, origins, servers.goes_on)) for name in ("a", "b")}
            servers.gateway = await start(gateway(ports, origins, directory))
            started.set()
            await asyncio.to_thread(stopped.wait)

    thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield servers
    finally:
        servers.goes_on.set()
        stopped.set()
        thread.join(20)
