"""A client's connection to the proxy: it reads a request, sends it to an engine and relays the answer.

A chunk of a stream costs one `data_received`, one run of the C parser, which only looks for the end, and one `write`.
There is no task, queue, copy or second framing.

The connection protects the engines. It handles one request at a time, and llhttp parses the framing strictly: no two
lengths, no length beside a transfer coding, no bare line feeds. The request is written again with a Content-Length, so
an engine cannot see another request than the one that was checked. Heads, bodies, connections and waiting times are
bounded. A slow reader pauses the engine's connection. A client that leaves closes it, and the engine aborts its work.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import os
import re
from collections.abc import Coroutine
from typing import Any

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

from slimserve.serve.gateway.messages import Answer, ProxyRequest, ServerState, error_answer
from slimserve.serve.gateway.upstream import MAX_HEAD_BYTES, Backend, EngineSide, Headers
from slimserve.serve.policy.errors import error_body

MAX_CONNECTIONS = 4096
MAX_FULL_BODIES = 32
"""Number of request bodies of the largest size that may be incomplete in memory at once."""
CLIENT_GONE = 499
"""Status in logs and metrics of a request whose client left before the end of its answer."""
CHUNK_TIMEOUT_S = 0.5
"""Seconds to wait for the rest of a chunk before an error of the gateway follows it."""
_CONNECT_TIMEOUT_S = 5.0
_RESEND_WITHIN_S = 1.0
_LINGER_S = 2.0
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
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


class ClientSide(asyncio.Protocol):
    """One client connection; it answers requests one after the other."""

    def __init__(self, server: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._transport: asyncio.Transport
        self._parser = HttpRequestParser(self)
        self._request: ProxyRequest | None = None
        self._is_reading = False
        """Whether a request has begun to arrive and is incomplete."""
        self._in_head = False
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._engine: EngineSide | None = None
        self._resend: bytes | None = None
        """The request as sent to the engine, while it may be sent once more."""
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._keep_alive = True
        self._sent_status = 0
        self._is_paused = False
        self._ignores_input = False
        """Whether arriving bytes are dropped because the connection is about to end."""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._server.connections.add(self)
        if len(self._server.connections) > MAX_CONNECTIONS:
            self._reject(error_answer(503, "too many connections", retry_after_s=1))
        else:
            self._set_timer(self._server.timeouts.idle_s, self._transport.close)

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            return
        try:
            self._parser.feed_data(data)
        except HttpParserCallbackError:
            _log.exception("the gateway failed to handle a request")
            self.abort()
        except HttpParserUpgrade:
            assert self._ignores_input, "the request was rejected when its head was complete"
        except HttpParserError as error:
            if self._request is None or self._is_reading:
                self._reject(error_answer(400, f"this is not HTTP/1.1: {error}"[:200]))
            else:  # It follows a request that is being answered.
                self._ignores_input, self._keep_alive = True, False
        else:
            if self._in_head and not self._ignores_input:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._reject(error_answer(431, f"the head is larger than {MAX_HEAD_BYTES} bytes"))

    def eof_received(self) -> None:
        """Close the connection, which returning None does: a client that shut its side has left."""

    def connection_lost(self, _error: Exception | None) -> None:
        self._ignores_input = True
        self._server.connections.discard(self)
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        self._drop_engine()
        self._end_request(CLIENT_GONE)

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

    # Callbacks of httptools for a request

    def on_message_begin(self) -> None:
        if self._ignores_input:
            return
        if self._request is not None:
            # HTTP allows closing after the first answer when a client pipelines.
            self._ignores_input, self._keep_alive = True, False
            return
        self._request = ProxyRequest(self._loop.time())
        self._sent_status = 0
        self._is_reading = self._in_head = True
        self._head_bytes = 0
        self._set_timer(self._server.timeouts.head_s, self._request_timed_out)

    def on_url(self, url: bytes) -> None:
        if self._request is not None and not self._ignores_input:
            self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._request is None or self._ignores_input:
            return
        if self._in_head:  # Else it is a trailer, which is dropped.
            self._request.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        request = self._request
        if request is None or self._ignores_input:
            return
        self._in_head = False
        sent_id = request.header(b"x-request-id")
        request.id = sent_id.decode() if _ID.fullmatch(sent_id) else os.urandom(16).hex()
        request.method = self._parser.get_method().decode()
        self._keep_alive = self._parser.should_keep_alive()
        if rejection := self._check_head(request) or self._server.application.admit(request):
            self._reject(rejection)
            return
        self._set_timer(self._server.timeouts.body_s, self._request_timed_out)
        if request.header(b"expect").lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_head(self, request: ProxyRequest) -> Answer | None:
        size = sum(len(name) + len(value) for name, value in request.headers) + len(request.target)
        if size > MAX_HEAD_BYTES:
            return error_answer(431, f"the head is larger than {MAX_HEAD_BYTES} bytes")
        if self._parser.should_upgrade():
            return error_answer(400, "protocol upgrades are not supported")
        version = self._parser.get_http_version()
        if version not in {"1.0", "1.1"}:
            return error_answer(505, "use HTTP/1.1")
        if request.method not in _METHODS:
            return error_answer(405, "unknown method")
        if not request.target.startswith(b"/"):
            return error_answer(400, "the request target is not a path; begin it with /")
        num_hosts = sum(name == b"host" for name, _ in request.headers)
        if num_hosts > 1 or (version == "1.1" and not num_hosts):
            return error_answer(400, "exactly one Host header is required")
        # The parser has checked that the length is one number.
        if int(request.header(b"content-length") or 0) > self._server.max_body_bytes:
            return self._too_large()
        return None

    def on_body(self, body: bytes) -> None:
        if self._request is None or self._ignores_input:
            return
        self._body.append(body)
        self._body_bytes += len(body)
        self._server.num_waiting_bytes += len(body)
        if self._body_bytes > self._server.max_body_bytes:
            self._reject(self._too_large())
        elif self._server.num_waiting_bytes > self._server.max_body_bytes * MAX_FULL_BODIES:
            self._reject(error_answer(429, "too many bodies are being sent; try again later", retry_after_s=1))

    def on_message_complete(self) -> None:
        request = self._request
        if request is None or self._ignores_input:
            return
        self._is_reading = False
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._drop_body()
        self._set_timer(self._server.timeouts.answer_s, self._answer_timed_out)
        decision = self._server.application.route(request)
        if isinstance(decision, Answer):
            self._answer(decision)
        elif not isinstance(decision, Backend):
            self._begin_task(self._answer_later(decision))
        elif request.method == "HEAD":
            self._answer(error_answer(405, "HEAD is not supported here"))
        elif self._parser.get_http_version() != "1.1":
            self._answer(error_answer(505, "use HTTP/1.1", close=True))
        else:
            self._send_to(decision, request)

    # The engine's answer

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
            self.interrupt(500, "the gateway failed", "internal_error")

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

    def relay_head(self, status: int, reason: bytes, headers: Headers, body: bytes) -> asyncio.Transport:
        """Write the head of the engine's answer and the body bytes that came with it; return where further bytes go."""
        request = self._request
        assert request is not None
        assert self._engine is not None
        self._resend = None
        self._sent_status = status
        request.head_s = self._loop.time() - self._engine.sent_s
        if not self._keep_alive or self._server.draining:
            self._keep_alive = False
        self._transport.write(
            b"HTTP/1.1 %d %b\r\n%b%bx-request-id: %b\r\n\r\n%b"
            % (
                status,
                reason,
                b"".join(
                    b"%b: %b\r\n" % header for header in headers if header[0].lower() not in _DROPPED_FROM_ANSWERS
                ),
                b"" if self._keep_alive else b"connection: close\r\n",
                request.id.encode(),
                body,
            )
        )
        return self._transport

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
            self._break_off(502, "the engine stopped answering", "engine_lost", can_append)

    def interrupt(self, status: int, message: str, code: str) -> None:
        """End the request in flight, if there is one, with an error that the client can read."""
        if self._engine is not None and self._engine.is_within_chunk:
            self._engine.end_chunk(lambda: self._interrupt_now(status, message, code))
            self._set_timer(CHUNK_TIMEOUT_S, lambda: self._interrupt_now(status, message, code))
        else:
            self._interrupt_now(status, message, code)

    def _interrupt_now(self, status: int, message: str, code: str) -> None:
        if self.is_busy:
            can_append = self._engine is not None and self._engine.can_append
            self._drop_engine()
            self._break_off(status, message, code, can_append)

    def _break_off(self, status: int, message: str, code: str, can_append: bool) -> None:
        self._keep_alive = False
        if not self._sent_status:
            self._answer(error_answer(status, message, code, retry_after_s=1 if status == 503 else None))
            return
        if can_append:
            event = json.dumps(error_body(status, message, code=code)).encode()
            # Blank lines end an event that was cut off; elsewhere they have no effect.
            events = b"\n\ndata: %b\n\ndata: [DONE]\n\n" % event
            self._transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(events), events))
            self._finish(status)
        else:
            self._end_request(status)
            self.abort()

    # Answers of the gateway itself

    async def _answer_later(self, decision: Coroutine[Any, Any, Answer]) -> None:
        self._answer(await decision)

    def _answer(self, answer: Answer) -> None:
        request = self._request
        assert request is not None
        self._keep_alive &= not (answer.close or self._server.draining)
        headers = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body))), *answer.headers]
        if request.id:
            headers.append(("X-ProxyRequest-Id", request.id))
        if not self._keep_alive:
            headers.append(("Connection", "close"))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        head = f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}\r\n{lines}\r\n"
        self._sent_status = answer.status
        self._transport.write(head.encode() + (b"" if request.method == "HEAD" else answer.body))
        self._finish(answer.status)

    def _reject(self, answer: Answer) -> None:
        """Answer a request that may be incomplete, and ignore further input on this connection."""
        if self._request is None:
            self._request = ProxyRequest(self._loop.time())
        self._ignores_input, self._keep_alive = True, False
        self._drop_body()
        self._answer(answer)

    def _too_large(self) -> Answer:
        return error_answer(413, f"the body is larger than {self._server.max_body_bytes} bytes", "body_too_large")

    def _request_timed_out(self) -> None:
        self._reject(error_answer(408, "the request did not arrive in time"))

    def _answer_timed_out(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.interrupt(504, f"no answer within {self._server.timeouts.answer_s:g} s", "timeout")

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
        self._drop_body()
        if request is not None:
            self._server.application.finished(request, status, self._loop.time() - request.begin_s)
            self._server.request_ended.set()

    def _close_after_reading(self) -> None:
        """Close when the client has closed, or after a short time.

        Closing at once would reset the connection, and the client could lose an answer that it has not read.
        """
        self._ignores_input = True
        if not self._transport.is_closing():
            self._set_timer(_LINGER_S, self._close)
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

    def _drop_body(self) -> None:
        self._server.num_waiting_bytes -= self._body_bytes
        self._body, self._body_bytes = [], 0

    def _set_timer(self, seconds: float, action: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, action)
