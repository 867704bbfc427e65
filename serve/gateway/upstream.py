"""Connections from the proxy to engines: they stay open between requests and relay answers as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from httptools import HttpParserError, HttpResponseParser

MAX_HEAD_BYTES = 64 * 1024
Headers = list[tuple[bytes, bytes]]
_IDLE_S = 2.0
"""Seconds after which an idle connection is not used again.

vLLM closes idle connections after 5 s. A request sent into a connection that is being closed must be sent again.
"""


class BodyWriter(Protocol):
    """Takes the bytes of an answer's body, with their framing."""

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""


class Reader(Protocol):
    """The client connection that receives the answer of an engine."""

    def relay_head(self, status: int, reason: bytes, headers: Headers, body: bytes) -> BodyWriter:
        """Take the head of the answer and the body bytes that came with it; return where further bytes go."""

    def relay_ended(self) -> None:
        """The answer is complete."""

    def relay_failed(self, can_append: bool, got_bytes: bool) -> None:
        """The engine's connection broke, or its bytes are not HTTP."""


class Backend:
    """Address of one engine and the idle connections to it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.idle: list[EngineSide] = []

    def take(self, now: float) -> EngineSide | None:
        """Return the connection that was used last if it is still fresh; drop all idle ones otherwise."""
        if self.idle and now - self.idle[-1].idle_since < _IDLE_S:
            return self.idle.pop()
        self.close()
        return None

    def close(self) -> None:
        """Drop the idle connections."""
        while self.idle:
            self.idle.pop().abort()


class EngineSide(asyncio.Protocol):
    """A connection to an engine; it carries one request at a time and stays open between them."""

    def __init__(self) -> None:
        self.backend: Backend
        self.sent_s = 0.0
        self.idle_since = 0.0
        self._transport: asyncio.Transport
        self._client: Reader | None = None
        self._to_client: BodyWriter
        self._parser = HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._head = b""
        self._headers: Headers = []
        self._reason = b""
        self._in_body = False
        self._in_chunk = False
        self._chunk_ended: Callable[[], None] | None = None
        self._is_complete = False
        self._is_kept = False
        self._num_messages = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def send(self, client: Reader, backend: Backend, message: bytes) -> None:
        """Send a request and relay the answer to `client` as it arrives."""
        self._client, self.backend = client, backend
        self._head, self._headers, self._reason = b"", [], b""
        self._in_body = self._in_chunk = self._is_complete = False
        self._num_messages = 0
        self.sent_s = asyncio.get_running_loop().time()
        self._transport.write(message)

    def data_received(self, data: bytes) -> None:
        if self._chunk_ended is not None:
            self._relay_rest(data, self._chunk_ended)
        elif self._in_body:
            try:
                self._feed(data)
            except HttpParserError:
                self._fail(can_append=False)
                return
            if self._is_complete:
                self._end(data)
            else:
                self._to_client.write(data)
        elif self._client is None:
            self.abort()  # No request is open, so these bytes answer nothing.
        else:
            self._read_head(data)

    def _read_head(self, data: bytes) -> None:
        assert self._client is not None
        self._head += data
        end = self._head.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(self._head) > MAX_HEAD_BYTES:
                self._fail(can_append=False)
            return
        body = self._head[end:]
        try:
            self._feed(self._head[:end])
            self._in_body = True
            if body:
                self._feed(body)
        except HttpParserError:
            self._fail(can_append=False)
            return
        status = self._parser.get_status_code()
        if self._num_messages > 1 or status < 200 or not (self._is_complete or self._is_framed()):
            self._fail(can_append=False)
            return
        self._to_client = self._client.relay_head(status, self._reason, self._headers, body)
        if self._is_complete:
            self._end(b"")

    def _is_framed(self) -> bool:
        """Whether the head states where the answer ends; the end of the connection alone could be a crash."""
        return any(name.lower() in {b"content-length", b"transfer-encoding"} for name, _ in self._headers)

    def _end(self, data: bytes) -> None:
        """Relay `data`, the last bytes of the answer, and free the connection."""
        if self._num_messages > 1:
            self._fail(can_append=False)
            return
        client, self._client = self._client, None
        assert client is not None
        self._in_body = False
        if data:
            self._to_client.write(data)
        if self._is_kept and not self._transport.is_closing():
            self.pause(False)
            self.idle_since = asyncio.get_running_loop().time()
            self.backend.idle.append(self)
        else:
            self.abort()
        client.relay_ended()

    @property
    def can_append(self) -> bool:
        """Whether events of the gateway may follow the bytes relayed so far."""
        return self._is_event_stream() and not self._in_chunk

    @property
    def is_within_chunk(self) -> bool:
        """Whether events of the gateway may follow once the current chunk is complete."""
        return self._is_event_stream() and self._in_chunk

    def _is_event_stream(self) -> bool:
        headers = {name.lower(): value for name, value in self._headers}
        kind = headers.get(b"content-type", b"")
        return kind.startswith(b"text/event-stream") and b"transfer-encoding" in headers and not self._is_complete

    def end_chunk(self, ended: Callable[[], None]) -> None:
        """Relay the rest of the current chunk, drop everything after it, and call `ended`."""
        self._chunk_ended = ended
        self.pause(False)

    def _relay_rest(self, data: bytes, ended: Callable[[], None]) -> None:
        for end in range(1, len(data) + 1):
            try:
                self._feed(data[end - 1 : end])
            except HttpParserError:
                self._fail(can_append=False)
                return
            if not self._in_chunk:
                self._to_client.write(data[:end])
                ended()
                return
        self._to_client.write(data)

    def pause(self, is_paused: bool) -> None:
        """Stop reading from the engine while the client does not keep up, or resume."""
        if self._transport.is_closing():
            return
        if is_paused:
            self._transport.pause_reading()
        elif not self._transport.is_reading():
            self._transport.resume_reading()

    def abort(self) -> None:
        self._client = self._chunk_ended = None
        self._in_body = False
        self._transport.abort()

    def connection_lost(self, _error: Exception | None) -> None:
        if self._client is not None:
            self._fail(can_append=self.can_append)
        elif hasattr(self, "backend") and self in self.backend.idle:
            self.backend.idle.remove(self)

    def _fail(self, can_append: bool) -> None:
        client = self._client
        assert client is not None
        self.abort()
        client.relay_failed(can_append, bool(self._head))

    # Callbacks of httptools for an answer

    def on_message_begin(self) -> None:
        self._num_messages += 1

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:
            self._headers.append((name, value))

    def on_chunk_header(self) -> None:
        self._in_chunk = True

    def on_chunk_complete(self) -> None:
        self._in_chunk = False

    def on_message_complete(self) -> None:
        self._is_complete = True
        self._is_kept = self._parser.should_keep_alive()


async def fetch(
    backend: Backend, path: str, headers: Sequence[tuple[str, str]] = (), timeout_s: float = 5.0
) -> tuple[int, bytes]:
    """Send GET `path` to an engine on a connection of its own; return status and body.

    Raises OSError if the engine does not answer within `timeout_s` or its answer is not HTTP.
    """
    collected = _Collected()
    parser = HttpResponseParser(collected)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(backend.host, backend.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {backend.host}\r\n{lines}Connection: close\r\n\r\n".encode())
            while not collected.is_complete:
                data = await reader.read(2**18)
                if not data:
                    raise ConnectionResetError("the connection ended before the answer did")
                parser.feed_data(data)
    except HttpParserError as error:
        raise OSError(f"no HTTP: {error}") from error
    finally:
        if writer is not None:
            writer.close()
    return parser.get_status_code(), b"".join(collected.parts)


class _Collected:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.is_complete = False

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.is_complete = True
