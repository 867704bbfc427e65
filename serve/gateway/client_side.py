"""A client's connection to the proxy: it sends each request to an engine and relays the answer.

A chunk of a stream costs one `data_received`, one run of the C parser, which only looks for the end, and one `write`.
There is no task, queue, copy or second framing.

The connection protects the engines. The request is written again with a Content-Length, so an engine cannot see
another request than the one that was checked. A slow reader pauses the engine's connection. A client that leaves
closes it, and the engine aborts its work.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
from collections.abc import Coroutine
from typing import Any

from httptools import HttpResponseParser

from slimserve.serve.gateway.messages import Answer, ProxyRequest, ServerState, rejection_answer
from slimserve.serve.gateway.reader import RequestReader
from slimserve.serve.gateway.upstream import Backend, BodyWriter, EngineSide, Headers
from slimserve.serve.policy.access_log import CLIENT_CLOSED_REQUEST
from slimserve.serve.policy.cors import is_preflight
from slimserve.serve.policy.errors import Rejection, wrong_method
from slimserve.serve.policy.timeouts import LINGER_S, timed_out

MAX_CONNECTIONS = 4096
CHUNK_TIMEOUT_S = 0.5
"""Seconds to wait for the rest of a chunk before an error of the gateway follows it."""
_CONNECT_TIMEOUT_S = 5.0
_RESEND_WITHIN_S = 1.0
_DROPPED_FROM_REQUESTS = frozenset(
    {
        *(b"connection", b"content-length", b"expect", b"keep-alive", b"proxy-connection", b"te", b"trailer"),
        *(b"transfer-encoding", b"upgrade", b"x-request-id"),
        # Engines trust these headers when they come from the loopback interface.
        *(b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"),
    }
)
"""Request headers that are not passed on, or are written again."""
_DROPPED_FROM_ANSWERS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"upgrade", b"x-request-id"})
"""Answer headers that are not passed on; the framing headers stay, because the bytes of the body do."""
_log = logging.getLogger("slimserve.proxy")


class ClientSide(RequestReader):
    """One client connection; it answers requests one after the other."""

    def __init__(self, server: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop)
        self._engine: EngineSide | None = None
        self._resend: bytes | None = None
        """The request as sent to the engine, while it may be sent once more."""
        self._task: asyncio.Task[None] | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._sent_status = 0
        self._body_writer: BodyWriter
        self._is_paused = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._server.connections.add(self)
        if len(self._server.connections) > MAX_CONNECTIONS:
            self._reject(Rejection(503, None, "too many connections", retry_after_s=1))
        else:
            self._set_timer(self._server.timeouts.idle_s, self._transport.close)

    def eof_received(self) -> None:
        """Close the connection, which returning None does: a client that shut its side has left."""

    def connection_lost(self, _error: Exception | None) -> None:
        self._ignores_input = True
        self._server.connections.discard(self)
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        self._drop_engine()
        self._end_request(CLIENT_CLOSED_REQUEST)

    def pause_writing(self) -> None:
        self._is_paused = True
        self._stall = self._loop.call_later(self._server.timeouts.stall_s, self.abort)
        if self._engine is not None:
            self._engine.pause(True)

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._engine is not None:
            self._engine.pause(False)

    # The engine's answer

    def _answer_request(self, request: ProxyRequest) -> None:
        self._sent_status = 0
        self._set_timer(self._server.timeouts.answer_s, self._answer_timed_out)
        decision = self._server.application.route(request)
        if isinstance(decision, Answer):
            self._answer(decision)
        elif not isinstance(decision, Backend):
            self._begin_task(self._answer_later(decision))
        elif request.method == "HEAD":
            self._answer(rejection_answer(wrong_method("GET, POST")))
        else:
            self._send_to(decision, request)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being read or answered."""
        return self._request is not None

    def _send_to(self, backend: Backend, request: ProxyRequest) -> None:
        head = b"%b %b HTTP/1.1\r\n%b%b: %b\r\n" % (
            request.method.encode(),
            request.target,
            b"".join(b"%b: %b\r\n" % header for header in request.headers if header[0] not in _DROPPED_FROM_REQUESTS),
            b"x-request-id",
            request.id.encode(),
        )
        length = b"content-length: %d\r\n" % len(request.body) if request.body or request.method == "POST" else b""
        message = b"%b%b\r\n%b" % (head, length, request.body)
        if engine := backend.take(self._loop.time()):
            self._resend = message
            self._begin(engine, backend, message)
        else:
            self._begin_task(self._connect(backend, message))

    def _begin_task(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._loop.create_task(self._run_task(work))

    async def _run_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Answer with an error if `work` fails; the client would else wait for the timeout."""
        try:
            await work
        except Exception:
            _log.exception("the gateway failed to handle a request")
            self._task = None
            self.interrupt(Rejection(500, "internal_error", "the gateway failed; its log has the request id"))

    async def _connect(self, backend: Backend, message: bytes) -> None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, engine = await self._loop.create_connection(EngineSide, backend.host, backend.port)
        except OSError:  # TimeoutError is an OSError too.
            assert self._request is not None
            self._answer(self._server.application.unreachable(self._request))
        else:
            self._begin(engine, backend, message)

    def _begin(self, engine: EngineSide, backend: Backend, message: bytes) -> None:
        self._engine = engine
        engine.send(self, backend, message)
        if self._is_paused:
            engine.pause(True)

    def relay_head(self, status: int, reason: bytes, headers: Headers, body: bytes) -> BodyWriter:
        """Write the head of the engine's answer and the body bytes that came with it; return where further bytes go."""
        request = self._request
        assert request is not None
        assert self._engine is not None
        self._resend = None
        self._sent_status = status
        request.head_s = self._loop.time() - self._engine.sent_s
        if not self._keep_alive or self._server.draining:
            self._keep_alive = False
        kept = [header for header in headers if header[0].lower() not in _DROPPED_FROM_ANSWERS]
        self._body_writer = self._transport
        if request.is_http_1_0 and any(name.lower() == b"transfer-encoding" for name, _ in kept):
            kept = [header for header in kept if header[0].lower() != b"transfer-encoding"]
            self._body_writer = _Unchunked(self._transport)
        self._transport.write(
            b"HTTP/1.1 %d %b\r\n%b%bx-request-id: %b\r\n\r\n"
            % (
                status,
                reason,
                b"".join(b"%b: %b\r\n" % header for header in kept),
                b"" if self._keep_alive else b"connection: close\r\n",
                request.id.encode(),
            )
        )
        if body:
            self._body_writer.write(body)
        return self._body_writer

    def relay_ended(self) -> None:
        """The engine's answer is complete."""
        self._engine = None
        self._finish(self._sent_status)

    def relay_failed(self, can_append: bool, got_bytes: bool) -> None:
        """The engine's connection broke, or its bytes are not HTTP."""
        engine, self._engine = self._engine, None
        assert engine is not None
        message, self._resend = self._resend, None
        if message and not got_bytes and self._loop.time() - engine.sent_s < _RESEND_WITHIN_S:
            # The engine had closed this idle connection before it saw the request. A new connection is tried once.
            self._begin_task(self._connect(engine.backend, message))
        else:
            self._break_off(Rejection(502, "engine_lost", "the engine stopped answering"), can_append)

    def interrupt(self, error: Rejection) -> None:
        """End the request in flight, if there is one, with an error that the client can read."""
        if self._engine is not None and self._engine.is_within_chunk:
            self._engine.end_chunk(lambda: self._interrupt_now(error))
            self._set_timer(CHUNK_TIMEOUT_S, lambda: self._interrupt_now(error))
        else:
            self._interrupt_now(error)

    def _interrupt_now(self, error: Rejection) -> None:
        if self.is_busy:
            can_append = self._engine is not None and self._engine.can_append
            self._drop_engine()
            self._break_off(error, can_append)

    def _break_off(self, error: Rejection, can_append: bool) -> None:
        self._keep_alive = False
        if not self._sent_status:
            self._answer(rejection_answer(error))
            return
        if can_append:
            event = json.dumps(error.body()).encode()
            # Blank lines end an event that was cut off; elsewhere they have no effect.
            events = b"\n\ndata: %b\n\ndata: [DONE]\n\n" % event
            self._body_writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(events), events))
            self._finish(error.status)
        else:
            self._end_request(error.status)
            self.abort()

    # Answers of the gateway itself

    async def _answer_later(self, decision: Coroutine[Any, Any, Answer]) -> None:
        self._answer(await decision)

    def _answer(self, answer: Answer) -> None:
        request = self._request
        assert request is not None
        self._keep_alive &= not (answer.close or self._server.draining)
        headers = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body))), *answer.headers]
        if not is_preflight(request.method, request.headers):
            headers += self._server.application.cors.answer_headers(request.headers)
        if request.id:
            headers.append(("X-Request-Id", request.id))
        if not self._keep_alive:
            headers.append(("Connection", "close"))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        head = f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}\r\n{lines}\r\n"
        self._sent_status = answer.status
        self._transport.write(head.encode() + (b"" if request.method == "HEAD" else answer.body))
        self._finish(answer.status)

    def _reject(self, rejection: Rejection) -> None:
        if self._request is None:
            self._request = ProxyRequest(self._loop.time())
        self._ignores_input, self._keep_alive = True, False
        self._upload.close()
        self._answer(rejection_answer(rejection))

    def _answer_timed_out(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.interrupt(timed_out(self._server.timeouts.answer_s))

    # The end of a request

    def _finish(self, status: int) -> None:
        """End a request whose answer is written; wait for the next one or close."""
        self._end_request(status)
        if self._keep_alive and not self._ignores_input and not self._server.draining:
            self._set_timer(self._server.timeouts.idle_s, self._transport.close)
        else:
            self._close_after_reading()

    def _end_request(self, status: int) -> None:
        request, self._request = self._request, None
        self._task = None
        self._resend = None
        self._upload.close()
        if request is not None:
            self._server.application.finished(request, status, self._loop.time() - request.begin_s)
            self._server.request_ended.set()

    def _close_after_reading(self) -> None:
        """Close when the client has closed, or after a short time.

        Closing at once would reset the connection, and the client could lose an answer that it has not read.
        """
        self._ignores_input = True
        if not self._transport.is_closing():
            self._set_timer(LINGER_S, self._close)
            self._transport.write_eof()

    def _close(self) -> None:
        self._transport.close()
        self._set_timer(self._server.timeouts.stall_s, self.abort)

    def close_if_idle(self) -> None:
        if not self.is_busy:
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection, including the bytes that the client has not read."""
        self._transport.abort()

    def _drop_engine(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._engine is not None:
            self._engine.abort()
            self._engine = None


class _Unchunked:
    """Writes the content of a chunked body to an HTTP/1.0 client, for which the end of the connection is its end."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.on_body = transport.write
        self._parser = HttpResponseParser(self)
        self._parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    def write(self, data: bytes) -> None:
        """Write what `data` adds to the content."""
        self._parser.feed_data(data)
