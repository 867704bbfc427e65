"""The port that answers while vLLM loads, and contract tests for the internals of vLLM that we use.

The contract tests need no engine. One fails if a new vLLM has moved something; its message names the internal and the
file to change.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from slimserve.serve.engine.entry import StartingResponder
from slimserve.serve.engine.middleware import RequestMiddleware
from slimserve.serve.launch.process import free_port
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import RequestMetrics
from tests.conftest import measures_time

pytestmark = measures_time


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield listening


@pytest.fixture
def url(listener: socket.socket) -> Iterator[str]:
    """Yield the URL of a server that is starting."""
    responder = StartingResponder(listener)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        responder.stop()


# The early port


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/nowhere"])
def test_every_get_is_503_starting(url: str, path: str) -> None:
    answer = httpx.get(url + path)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["connection"] == "close"
    body = answer.json()
    assert body["status"] == "starting"
    assert body["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("num_bytes", [0, 10, 3_000_000])
def test_a_post_of_any_size_gets_its_answer_and_no_reset(url: str, num_bytes: int) -> None:
    for _ in range(5):
        # Not httpx nor requests: both forgive a reset while they send.
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        connection.request("POST", "/v1/chat/completions", b"x" * num_bytes)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"]["code"]) == (503, "starting")
        connection.close()


def test_silent_clients_do_not_delay_a_probe(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection((host, int(port))))
        assert httpx.get(f"{url}/health", timeout=5).status_code == 503


class Ready(BaseHTTPRequestHandler):
    """Answers 200, as the next server on the socket does."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        """Write no log line."""


@contextlib.contextmanager
def polled(url: str, num_clients: int) -> Iterator[list[int]]:
    """Yield a growing list of the statuses that polling clients get; 0 if there was no answer."""
    statuses: list[int] = []
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            try:
                statuses.append(httpx.get(url).status_code)
            except httpx.HTTPError:
                statuses.append(0)

    clients = [threading.Thread(target=poll) for _ in range(num_clients)]
    for client in clients:
        client.start()
    try:
        yield statuses
    finally:
        done.set()
        for client in clients:
            client.join()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def test_the_socket_is_handed_over_without_a_refused_connection(listener: socket.socket) -> None:
    address = listener.getsockname()
    responder = StartingResponder(listener)
    server = HTTPServer(address, Ready, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    with polled("http://{}:{}/ready".format(*address), num_clients=4) as statuses:
        eventually(lambda: statuses.count(503) > 20)
        responder.stop()
        before = len(statuses)
        time.sleep(0.3)  # no server answers now; new clients wait
        assert len(statuses) - before <= 4
        listener.setblocking(True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        eventually(lambda: statuses.count(200) > 20)
    server.shutdown()
    thread.join()
    assert set(statuses) == {503, 200}
    assert 503 not in statuses[statuses.index(200) + 4 :], "only requests in flight during the handover may get 503"


def test_the_command_answers_before_vllm_is_imported_and_ends_on_sigterm() -> None:
    port = free_port()
    begin = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "slimserve.serve.engine.entry",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--model",
        "/nowhere",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        status = 0
        while not status:
            assert time.monotonic() - begin < 5, "importing vLLM takes longer than this"
            with contextlib.suppress(httpx.ConnectError):
                status = httpx.get(f"http://127.0.0.1:{port}/health").status_code
        assert status == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) != 0
    finally:
        process.kill()
        process.wait()


# Internals of vLLM that the sources alone do not show (others: vllm_contract.py)


def test_the_connector_overrides_what_vllm_calls_and_reads_what_vllm_has() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from slimserve.serve.engine.partial_prefix import PartialPrefixConnector

    assert not PartialPrefixConnector.__abstractmethods__, (
        "vLLM asks more of a connector than serve/engine/partial_prefix.py"
    )
    for name in vars(PartialPrefixConnector):
        known = hasattr(KVConnectorBase_V1, name) or hasattr(SupportsHMA, name)
        assert name.startswith("_") or known, f"vLLM calls no {name} any more; see serve/engine/partial_prefix.py"
    bound = inspect.getsource(KVConnectorBase_V1.bind_kv_cache_manager)
    assert "self._kv_cache_manager = " in bound, "serve/engine/partial_prefix.py reads _kv_cache_manager"
    request = inspect.getsource(Request)
    for name in ("request_id", "prompt_token_ids", "num_prompt_tokens", "num_computed_tokens", "lora_request"):
        assert f"self.{name}" in request, f"vLLM's Request has no {name}; serve/engine/partial_prefix.py reads it"
    for name in ("kv_transfer_params", "block_hashes", "cache_salt"):
        assert f"self.{name}" in request, f"vLLM's Request has no {name}; serve/engine/partial_prefix.py reads it"
    assert "num_scheduled_tokens" in SchedulerOutput.__dataclass_fields__, "serve/engine/partial_prefix.py reads it"


def test_our_middleware_is_the_outermost_of_vllms_middlewares(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_PLUGINS", "slimserve")
    monkeypatch.setenv("VLLM_API_KEY", "inner")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--middleware", "slimserve.serve.engine.middleware.RequestMiddleware"]
    )
    app = build_app(args, ("generate",))
    kinds = [middleware.cls.__name__ for middleware in app.user_middleware]
    assert kinds[0] == "RequestMiddleware", f"vLLM answers some requests before serve/engine/middleware.py: {kinds}"
    assert "AuthenticationMiddleware" in kinds


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_drains_vllms_server_before_the_engine_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our middleware must replace the signal handler of vLLM's launcher, which stops the engine at once."""
    from vllm.entrypoints.launchers.launcher import serve_http

    app = FastAPI()
    stopped: list[float] = []
    app.state.engine_client = SimpleNamespace(
        errored=False,
        is_running=True,
        vllm_config=SimpleNamespace(shutdown_timeout=0),
        shutdown=lambda timeout: stopped.append(timeout),
    )

    @app.post("/v1/completions")
    async def answer() -> str:
        await asyncio.sleep(0.5)
        return "in full"

    @app.get("/health")
    async def health() -> None:
        """Report a healthy engine."""

    limits, metrics = Limits(drain_s=5.0), RequestMetrics(CollectorRegistry())
    app.add_middleware(RequestMiddleware, limits=limits, keys=frozenset(), metrics=metrics)

    async def test(listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        server = asyncio.create_task(serve_http(app, listener, host="127.0.0.1", port=port, log_level="critical"))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.get("/ready")).json() == {"status": "ready"}
            running = asyncio.create_task(http.post("/v1/completions", json={}))
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), getattr(signal, name))
            await asyncio.sleep(0.1)
            assert (await http.get("/ready")).json() == {"status": "draining"}, (
                "serve/engine/lifecycle.py has not received the signal"
            )
            assert (await running).json() == "in full"
            await (await asyncio.wait_for(server, 5))
        assert stopped == [], "vLLM's handler ran too; see _start in serve/engine/lifecycle.py"

    monkeypatch.delenv("SLIMSERVE_MODEL_DIR", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        asyncio.run(test(listener))
