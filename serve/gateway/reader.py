"""Reads and checks the requests of one client connection, one after the other.

llhttp parses the framing strictly: no two lengths, no length beside a transfer coding, no bare line feeds. Heads,
bodies and waiting times are bounded.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

from slimserve.serve.gateway.messages import ProxyRequest, ServerState
from slimserve.serve.gateway.upstream import MAX_HEAD_BYTES
from slimserve.serve.policy.errors import Rejection
from slimserve.serve.policy.request_id import HEADER, request_id_of
from slimserve.serve.policy.uploads import Upload

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_log = logging.getLogger("slimserve.proxy")


class RequestReader(asyncio.Protocol, ABC):
    """The reading part of a client connection; a subclass answers the requests."""

    def __init__(self, server: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._transport: asyncio.Transport
        self._parser = HttpRequestParser(self)
        self._request: ProxyRequest | None = None
        self._upload = Upload(server.uploads)
        self._is_reading = False
        """Whether a request has begun to arrive and is incomplete."""
        self._in_head = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive = True
        self._ignores_input = False
        """Whether arriving bytes are dropped because the connection is about to end."""

    @abstractmethod
    def _answer_request(self, request: ProxyRequest) -> None:
        """Answer a complete request."""

    @abstractmethod
    def _reject(self, rejection: Rejection) -> None:
        """Answer a request that may be incomplete, and ignore further input on this connection."""

    @abstractmethod
    def abort(self) -> None:
        """Drop the connection, including the bytes that the client has not read."""

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
                self._reject(Rejection(400, None, f"this is not HTTP/1.1: {error}"[:200]))
            else:  # It follows a request that is being answered.
                self._ignores_input, self._keep_alive = True, False
        else:
            if self._in_head and not self._ignores_input:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._reject(_head_too_large())

    # Callbacks of httptools for a request

    def on_message_begin(self) -> None:
        if self._ignores_input:
            return
        if self._request is not None:
            # HTTP allows closing after the first answer when a client pipelines.
            self._ignores_input, self._keep_alive = True, False
            return
        self._request = ProxyRequest(self._loop.time())
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
        request.id = request_id_of(request.header(HEADER))
        request.method = self._parser.get_method().decode()
        request.is_http_1_0 = self._parser.get_http_version() == "1.0"
        self._keep_alive = self._parser.should_keep_alive() and not request.is_http_1_0
        try:
            self._check_head(request)
            self._server.application.admit(request)
        except Rejection as rejection:
            self._reject(rejection)
            return
        self._set_timer(self._server.timeouts.body_s, self._request_timed_out)
        if request.header(b"expect").lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_head(self, request: ProxyRequest) -> None:
        size = sum(len(name) + len(value) for name, value in request.headers) + len(request.target)
        if size > MAX_HEAD_BYTES:
            raise _head_too_large()
        if self._parser.should_upgrade():
            raise Rejection(400, None, "protocol upgrades are not supported")
        version = self._parser.get_http_version()
        if version not in {"1.0", "1.1"}:
            raise Rejection(505, None, "use HTTP/1.1 or HTTP/1.0")
        if request.method not in _METHODS:
            raise Rejection(405, None, "unknown method")
        if not request.target.startswith(b"/"):
            raise Rejection(400, None, "the request target is not a path; begin it with /")
        num_hosts = sum(name == b"host" for name, _ in request.headers)
        if num_hosts > 1 or (version == "1.1" and not num_hosts):
            raise Rejection(400, None, "exactly one Host header is required")
        self._server.uploads.check_content_length(request.header(b"content-length"))

    def on_body(self, body: bytes) -> None:
        if self._request is None or self._ignores_input:
            return
        try:
            self._upload.add(body)
        except Rejection as rejection:
            self._reject(rejection)

    def on_message_complete(self) -> None:
        request = self._request
        if request is None or self._ignores_input:
            return
        self._is_reading = False
        request.body = self._upload.body()
        self._upload.close()
        self._answer_request(request)

    def _request_timed_out(self) -> None:
        self._reject(Rejection(408, None, "the request did not arrive in time"))

    def _set_timer(self, seconds: float, action: Callable[[], object]) -> None:
        """Replace the connection's timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, action)


def _head_too_large() -> Rejection:
    return Rejection(431, None, f"the head is larger than {MAX_HEAD_BYTES} bytes")
