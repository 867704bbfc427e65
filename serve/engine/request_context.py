"""The context of one HTTP request: what it is, what was sent of its answer, and how it is ended from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimserve.serve.policy.cors import CorsRules, is_preflight
from slimserve.serve.policy.errors import Rejection
from slimserve.serve.policy.metrics import RequestMetrics
from slimserve.serve.policy.request_id import HEADER, request_id_of
from slimserve.serve.policy.timeouts import LINGER_S, timed_out

WIND_UP_S = 1.0
"""Seconds for the engine to notice that a request was interrupted, and for its client to take the error."""


class Connections(Protocol):
    """The server's connections, for the two actions on them that ASGI has no message for."""

    def abort_connection(self, scope: Scope) -> None:
        """Reset the connection of a request, with what its client has not read."""

    def end_by_closing(self, scope: Scope, num_bytes: int) -> None:
        """Let the end of the connection end an answer of unknown length, whose next part has `num_bytes` bytes."""


class RequestContext:
    """One HTTP request. `interrupt` may be called at any time and ends it with an error.

    Plain ASGI: a streamed chunk costs two clock reads and one histogram update. The deadline and the check for a
    stalled reader are timers, never a task around the stream.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        metrics: RequestMetrics,
        connections: Connections,
        stall_timeout_s: float,
        cors: CorsRules,
    ) -> None:
        self._send = send
        self._metrics = metrics
        self._connections = connections
        self._stall_timeout_s = stall_timeout_s
        self._cors = cors
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timers: list[asyncio.TimerHandle] = []
        self._stall_timer: asyncio.TimerHandle | None = None
        self._interrupted: asyncio.Future[None] = self._loop.create_future()
        self._watch: asyncio.Task[None] | None = None
        self._in_engine = False
        self._sending_since = 0.0
        self._is_stream = False
        self._ends_by_closing = False
        """Whether the client speaks HTTP/1.0, which has no chunks, and the answer has no length."""
        self._last_chunk_at = 0.0
        self._body: bytes | None = b""
        self._body_is_read = False
        self._answer_started = False
        self._answer_complete = False
        self._is_rejected = False
        self.raw_receive = receive
        self.scope = scope
        self.method: str = scope["method"]
        self.path = route_path(scope)
        self.is_preflight = is_preflight(self.method, scope["headers"])
        self.id = request_id_of(self.header(HEADER))
        self.started_at = self.now()
        self.queue_s = 0.0
        """Seconds that the request waited for a slot."""
        self.status = 0
        """HTTP status of the answer; 0 before there is one."""
        self.interruption: Rejection | None = None
        """The error that ends the request, once it was interrupted."""
        self.was_cancelled = False
        """Whether this context cancelled the request's task; otherwise a cancellation comes from the server."""

    def now(self) -> float:
        """Return the event loop's clock in seconds."""
        return self._loop.time()

    def header(self, name: bytes) -> bytes:
        """Return the first value of a request header, or nothing."""
        return next((bytes(value) for key, value in self.scope["headers"] if key == name), b"")

    def disconnected(self) -> asyncio.Task[None]:
        """Return a task that ends when the client disconnects; from the first call on, nobody else may receive."""
        if self._watch is None:
            self._watch = self._loop.create_task(self._wait_for_disconnect())
        return self._watch

    def set_body(self, body: bytes) -> None:
        """Provide the complete body, which `receive` then passes to the engine."""
        self._body = body
        self._body_is_read = True

    def set_deadline(self, seconds: float) -> None:
        """Interrupt the request after `seconds`, wherever it is then."""
        self._timers.append(self._loop.call_later(seconds, self.interrupt, timed_out(seconds)))

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Let the engine answer the request."""
        self._in_engine = True
        self._check_stall()
        try:
            await app(scope, self.receive, self.send)
        finally:
            self._in_engine = False

    async def receive(self) -> Message:
        """Give the engine the complete body, then a disconnect, be it the client's or an interruption."""
        if self._body is not None and self.interruption is None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.interruption is None:
            await asyncio.wait({self.disconnected(), self._interrupted}, return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send a message of the engine to the client; messages after an interruption are dropped."""
        if self.interruption is not None:
            return
        now = self._loop.time()
        if message["type"] == "http.response.body":
            if self._is_stream and message.get("body"):
                if self._last_chunk_at:
                    self._metrics.inter_token_s.observe(now - self._last_chunk_at)
                else:
                    self._metrics.first_token_s.observe(now - self.started_at)
                self._last_chunk_at = now
            if not message.get("more_body", False):
                self._answer_complete = True
        elif message["type"] == "http.response.start":
            self._answer_started = True
            self.status = message["status"]
            headers = [(name, value) for name, value in message.get("headers", ()) if name != HEADER]
            self._is_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            headers.append((HEADER, self.id.encode()))
            self._ends_by_closing = self.scope.get("http_version") == "1.0" and all(
                name != b"content-length" for name, _ in headers
            )
            if self._is_stream:
                headers.append((b"x-accel-buffering", b"no"))  # nginx would hold tokens back until it has a page.
            message = {**message, "headers": headers}
        if self._ends_by_closing:
            self._connections.end_by_closing(self.scope, len(message.get("body", b"")))
        self._sending_since = now
        await self._send(message)
        self._sending_since = 0.0

    def interrupt(self, rejection: Rejection) -> None:
        """End the request: the engine sees the client disconnect, and the client gets this error."""
        if self.interruption is not None or self._answer_complete or self._is_rejected:
            return
        self.interruption = rejection
        if not self._interrupted.done():
            self._interrupted.set_result(None)
        if self._in_engine and not self._sending_since:
            self._timers.append(self._loop.call_later(WIND_UP_S, self._cancel_task))
        else:
            self._cancel_task()

    async def send_interruption(self) -> None:
        """Send the error of an interrupted request: as the answer, as the last event of a stream, or by a reset."""
        rejection = self.interruption
        assert rejection is not None
        self.close()
        self.status = rejection.status
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WIND_UP_S):
                if not self._answer_started:
                    await self._send_rejection(rejection)
                elif self._is_stream:
                    event = b"data: " + json.dumps(rejection.body()).encode() + b"\n\n"
                    if self._ends_by_closing:
                        self._connections.end_by_closing(self.scope, len(event))
                    await self._send({"type": "http.response.body", "body": event, "more_body": False})
                    self._answer_complete = True
        if not self._answer_complete:
            self._connections.abort_connection(self.scope)

    async def reject(self, rejection: Rejection) -> None:
        """Answer with an error; if an answer has begun already, reset the connection instead."""
        self._is_rejected = True
        self.close()
        self.status = rejection.status
        if self._answer_started:
            self._connections.abort_connection(self.scope)
        else:
            await self._send_rejection(rejection)

    async def answer(self, status: int, body: dict[str, Any]) -> None:
        """Answer with a JSON object."""
        self.status = status
        await self._send_json(status, body, [])

    def close(self) -> None:
        """Cancel all timers and tasks of this context."""
        for timer in (*self._timers, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._timers.clear()
        if self._watch is not None:
            self._watch.cancel()

    async def _send_rejection(self, rejection: Rejection) -> None:
        headers = [(name.encode(), value.encode()) for name, value in rejection.headers()]
        if rejection.close:
            headers.append((b"connection", b"close"))
        linger = rejection.close and not self._body_is_read
        await self._send_json(rejection.status, rejection.body(), headers, linger)

    async def _send_json(
        self, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]], linger: bool = False
    ) -> None:
        text = json.dumps(body).encode()
        own = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(text)).encode()),
            (HEADER, self.id.encode()),
            *((name.encode(), value.encode()) for name, value in self._cors.answer_headers(self.scope["headers"])),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
        self._answer_started = True
        await self._send({"type": "http.response.body", "body": text, "more_body": linger})
        if linger:
            await self._discard_body()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self._answer_complete = True

    async def _discard_body(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await self.raw_receive()).get("more_body", False):
                    pass

    async def _wait_for_disconnect(self) -> None:
        while (await self.raw_receive())["type"] != "http.disconnect":
            pass

    def _cancel_task(self) -> None:
        self.was_cancelled = True
        if self._task is not None:
            self._task.cancel()

    def _check_stall(self) -> None:
        timeout_s = self._stall_timeout_s
        if self._sending_since and self.now() - self._sending_since > timeout_s:
            self.interrupt(Rejection(408, "reader_stalled", f"the client read nothing for {timeout_s:g} s"))
        elif self._in_engine:
            self._stall_timer = self._loop.call_later(timeout_s / 4, self._check_stall)


def route_path(scope: Scope) -> str:
    """Return the path that Starlette's router matches; reading it in another way would let requests avoid the keys."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and (path == root or path.startswith(root + "/")) else path
