"""One request on its way through the guard: what it is, what was sent of its answer, how it is ended from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimserve.serve.policy.limits import error_body

if TYPE_CHECKING:
    from slimserve.serve.engine.middleware import Guard

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_LINGER_S = 2.0
WIND_UP_S = 1.0
"""How long the engine may take to notice that a request is over, and a client to take the news."""


class Refusal(Exception):  # noqa: N818
    """An answer of ours instead of the engine's."""

    def __init__(
        self, status: int, reason: str, message: str, *, retry_after_s: int | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.close = close
        """Whether the connection must end, as its body is not going to be read."""

    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), code=self.reason)


class Call:
    """One HTTP request. The guard calls the methods in the order in which they stand here; `fail` comes at any time."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard = guard
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timers: list[asyncio.TimerHandle] = []
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._watch: asyncio.Task[None] | None = None
        self._in_engine = False
        self._sending_since = 0.0
        self._streams = False
        self._chunk_at = 0.0
        self._body: bytes | None = b""
        self._body_is_read = False
        self._started = False
        self._complete = False
        self._is_refused = False
        self.raw_receive = receive
        self.scope = scope
        self.method: str = scope["method"]
        self.path = route_path(scope)
        given = header_of(scope, b"x-request-id")
        self.id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        self.begin = self.now()
        self.queued_s = 0.0
        self.status = 0
        self.failure: Refusal | None = None
        self.interrupted = False
        """Whether the task's cancellation came from `fail`, not from the server."""

    def now(self) -> float:
        return self._loop.time()

    def gone(self) -> asyncio.Task[None]:
        """Done when the client has disconnected; started by the first who asks, as nobody else may receive then."""
        if self._watch is None:
            self._watch = self._loop.create_task(self._wait_for_disconnect())
        return self._watch

    def take_body(self, body: bytes) -> None:
        self._body = body
        self._body_is_read = True

    def arm(self, deadline_s: float) -> None:
        """End the request so many seconds from now, wherever it is then."""
        message = f"the request was not done within {deadline_s:g} s"
        self._timers.append(self._loop.call_later(deadline_s, self.fail, 504, "timeout", message))

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        self._in_engine = True
        self._check_stall()
        try:
            await app(scope, self.receive, self.send)
        finally:
            self._in_engine = False

    async def receive(self) -> Message:
        """ASGI's receive for the engine: the whole body, then the disconnect, real or by `fail`."""
        if self._body is not None and self.failure is None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.failure is None:
            await asyncio.wait({self.gone(), self._failed}, return_when=asyncio.FIRST_COMPLETED)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI's send for the engine; what comes after `fail` is dropped."""
        if self.failure is not None:
            return
        now = self._loop.time()
        if message["type"] == "http.response.body":
            if self._streams and message.get("body"):
                metrics = self._guard.metrics
                if self._chunk_at:
                    metrics.inter_token_s.observe(now - self._chunk_at)
                else:
                    metrics.first_token_s.observe(now - self.begin)
                self._chunk_at = now
            if not message.get("more_body", False):
                self._complete = True
        elif message["type"] == "http.response.start":
            self._started = True
            self.status = message["status"]
            headers = [(name, value) for name, value in message.get("headers", ()) if name != b"x-request-id"]
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode())]}
        self._sending_since = now
        await self._send(message)
        self._sending_since = 0.0

    def fail(self, status: int, code: str, message: str) -> None:
        """End the request from outside: the engine sees the client go, the client gets this error."""
        if self.failure is not None or self._complete or self._is_refused:
            return
        self.failure = Refusal(status, code, message)
        if not self._failed.done():
            self._failed.set_result(None)
        if self._in_engine and not self._sending_since:
            self._timers.append(self._loop.call_later(WIND_UP_S, self._interrupt))
        else:
            self._interrupt()

    async def finish_failed(self) -> None:
        """Tell the client of `failure`, if it still reads."""
        failure = self.failure
        assert failure is not None
        self.close()
        self.status = failure.status
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WIND_UP_S):
                if not self._started:
                    await self._respond(failure)
                elif self._streams:
                    event = b"data: " + json.dumps(failure.body()).encode() + b"\n\n"
                    await self._send({"type": "http.response.body", "body": event, "more_body": False})
                    self._complete = True
        if not self._complete:
            self._guard.abort_connection(self.scope)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error of ours; once an answer has begun, only its end can tell."""
        self._is_refused = True
        self.close()
        self.status = refusal.status
        if self._started:
            self._guard.abort_connection(self.scope)
        else:
            await self._respond(refusal)

    async def answer(self, status: int, body: dict[str, Any]) -> None:
        self.status = status
        await self._json(status, body, [])

    def close(self) -> None:
        """Let go of every timer and task."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._watch is not None:
            self._watch.cancel()

    async def _respond(self, refusal: Refusal) -> None:
        headers = []
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refusal.close:
            headers.append((b"connection", b"close"))
        await self._json(refusal.status, refusal.body(), headers, linger=refusal.close and not self._body_is_read)

    async def _json(
        self, status: int, body: dict[str, Any], headers: Iterable[tuple[bytes, bytes]], linger: bool = False
    ) -> None:
        text = json.dumps(body).encode()
        own = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(text)).encode()),
            (b"x-request-id", self.id.encode()),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
        self._started = True
        await self._send({"type": "http.response.body", "body": text, "more_body": linger})
        if linger:
            await self._discard_body()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self._complete = True

    async def _discard_body(self) -> None:
        """Read on a little: closing with unread bytes resets the connection, and the client never sees the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while (await self.raw_receive()).get("more_body", False):
                    pass

    async def _wait_for_disconnect(self) -> None:
        while (await self.raw_receive())["type"] != "http.disconnect":
            pass

    def _interrupt(self) -> None:
        self.interrupted = True
        if self._task is not None:
            self._task.cancel()

    def _check_stall(self) -> None:
        timeout_s = self._guard.stall_timeout_s
        if self._sending_since and self.now() - self._sending_since > timeout_s:
            self.fail(408, "reader_stalled", f"the answer was not read for {timeout_s:g} s")
        elif self._in_engine:
            self._timers[1:] = [self._loop.call_later(timeout_s / 4, self._check_stall)]


def header_of(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def route_path(scope: Scope) -> str:
    """The path that Starlette's router matches; another reading of it would be a way around the keys."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and (path == root or path.startswith(root + "/")) else path
