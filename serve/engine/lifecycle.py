"""The life of one engine's server: start, readiness, graceful shutdown on SIGTERM, and its open connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimserve.serve.engine.request_context import WIND_UP_S, RequestContext
from slimserve.serve.policy.access_log import log_to_stderr
from slimserve.serve.policy.admission import Admission
from slimserve.serve.policy.drain import drain
from slimserve.serve.policy.engine_environment import MODEL_DIR_VARIABLE
from slimserve.serve.policy.errors import Rejection, draining

_EXIT_S = 2
_log = logging.getLogger("slimserve.lifecycle")


class Lifecycle:
    """State of the server process; `in_flight` holds the contexts of all requests that are not yet answered."""

    def __init__(self, app: ASGIApp, admission: Admission, drain_s: float) -> None:
        self._app = app
        self._admission = admission
        self._drain_s = drain_s
        self._is_started = False
        self._drain_task: asyncio.Task[None] | None = None
        self.server: Any = None
        """The uvicorn server, which vLLM puts into the app's state."""
        self.in_flight: set[RequestContext] = set()

    def check_draining(self) -> None:
        """Raise Rejection (503) if the server shuts down."""
        if self._drain_task is not None:
            raise draining()

    async def readiness(self, scope: Scope) -> tuple[int, dict[str, str]]:
        """Return status and body of /ready: the server has started, does not drain, and the engine is healthy."""
        if self._drain_task is not None:
            return 503, {"status": "draining"}
        if not self._is_started:
            return 503, {"status": "starting"}
        status = 503

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def keep_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        await self._app(dict(scope, method="GET", path="/health", raw_path=b"/health"), receive, keep_status)
        return (503, {"status": "engine dead"}) if status >= 500 else (200, {"status": "ready"})

    async def run_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the lifespan on to vLLM's app and start our own tasks once it is complete."""
        background: list[asyncio.Task[None]] = []

        async def watched_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._start(scope, background)
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            for task in background:
                task.cancel()

    def begin_drain(self) -> None:
        """Reject new requests, let running ones finish for `drain_s` seconds, then stop the server.

        A second call stops it at once.
        """
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain_and_stop())
        else:
            _log.info("stopping at once")
            for context in list(self.in_flight):
                context.interrupt(Rejection(503, "shutdown", "the server was stopped"))
            self._stop_server(at_once=True)

    def abort_connection(self, scope: Scope) -> None:
        """Reset the connection of a request, with what its client has not read; ASGI has no message for this."""
        for connection in self._connections(scope):
            connection.transport.abort()

    def end_by_closing(self, scope: Scope, num_bytes: int) -> None:
        """Let the end of the connection end an answer of unknown length, whose next part has `num_bytes` bytes.

        HTTP/1.0 has no chunks, but uvicorn's httptools protocol sends them to such clients as well.
        """
        for connection in self._connections(scope):
            answer: Any = getattr(connection, "cycle", None)
            if hasattr(answer, "chunked_encoding"):
                answer.chunked_encoding, answer.expected_content_length = False, num_bytes

    def _connections(self, scope: Scope) -> list[Any]:
        """Return uvicorn's connection of a request, if there is one."""
        state = getattr(self.server, "server_state", None)
        connections = list(getattr(state, "connections", ()))
        return [one for one in connections if getattr(one, "client", None) == scope.get("client")]

    def _start(self, scope: Scope, background: list[asyncio.Task[None]]) -> None:
        # uvicorn's access log quotes query strings, in which some clients send their key.
        uvicorn_access = logging.getLogger("uvicorn.access")
        uvicorn_access.handlers, uvicorn_access.propagate = [], False
        log_to_stderr()
        self._is_started = True
        self.server = getattr(getattr(scope.get("app"), "state", None), "server", None)
        if directory := os.environ.get(MODEL_DIR_VARIABLE):
            from slimserve.serve.engine.roofline import export_roofline

            background.append(asyncio.create_task(export_roofline(directory)))
        if self.server is not None:
            # vLLM's own handlers are set by now. They stop the engine first, which fails every running request.
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self.begin_drain)

    async def _drain_and_stop(self) -> None:
        _log.info("draining %d requests for at most %g s", len(self.in_flight), self._drain_s)
        self._admission.close()
        await drain(lambda: self.in_flight, self._drain_s, 2 * WIND_UP_S)
        _log.info("drained; %d requests left", len(self.in_flight))
        self._stop_server(at_once=False)

    def _stop_server(self, at_once: bool) -> None:
        if self.server is not None:
            # Without a limit uvicorn waits indefinitely for a client that does not read the end of its answer.
            self.server.config.timeout_graceful_shutdown = _EXIT_S
            self.server.force_exit = at_once
            self.server.should_exit = True
