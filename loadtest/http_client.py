"""HTTP/1.1 client over gevent's sockets that keeps the arrival time of every read.

On Linux without TLS the arrival time is the kernel's receive time (SO_TIMESTAMPNS), so a client that is busy with
another stream does not make the server look slow. A running stream costs only its HTTP framing: events and tokens are
parsed after its end (loadtest/sse.py). Existing HTTP libraries report neither the receive time nor single reads.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import gevent
from gevent import socket, ssl
from httptools import HttpParserError, HttpResponseParser

_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")
_ANCILLARY_BYTES = 16 + _TIMESPEC.size
"""Size of a control message's header and one timespec on 64-bit Linux."""
_CONNECT_S = 10.0
"""Timeout in seconds of connecting to one address, and of the TLS handshake."""
_MAX_CLOCK_STEP_S = 0.05
"""Change of the system clock against `perf_counter` between two reads from which on a receive time is not used."""
_IDLE_S = 2.0
"""Seconds after which an idle connection is not reused; uvicorn closes idle connections after 5 s."""
_buffer = memoryview(bytearray(2**18))
"""Buffer of every read; the parser copies the bytes before another greenlet can run."""


class ExchangeError(Exception):
    """No complete response arrived; the message is the kind of failure."""


@dataclass
class Exchange:
    """One request and its response; times in seconds of `perf_counter`."""

    sent_s: float
    """Time just before the first byte was written."""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """Response headers; names in lower case."""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """Arrival time and bytes of each read of the response body."""
    end_s: float = 0.0
    error: str | None = None
    """Kind of failure; None for a complete response of any status."""

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class HttpClient:
    """Keep-alive connections to one server; the most recently used one is reused first.

    The host name is resolved once, because gevent's resolver takes longer than a connection. Later connections use the
    address that worked, until it fails.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float = 300.0) -> None:
        parts = urlsplit(url)
        self._tls = _make_tls() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        host = parts.netloc.rpartition("@")[2]
        fixed = {"Host": host, "Content-Type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fixed.items()).encode("latin-1")
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._address: tuple[int, Any] | None = None
        """Address family and address of the last successful connection."""

    def post(self, path: str, body: bytes) -> Exchange:
        """Send `body` and read the full response. Failures of the network or the server are not raised.

        `error` of the exchange is one of: unknown host, connection refused, connection failed, tls failed, connection
        reset, closed before an answer, closed in mid-answer (for events: closed in mid-stream), broken http, timeout.
        Everything that arrived before is kept.
        """
        head = b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (
            f"{self._path}{path}".encode(),
            self._head,
            len(body),
        )
        done = Exchange(time.perf_counter())
        try:
            with gevent.Timeout(self._timeout_s, ExchangeError("timeout")):
                self._exchange(head + body, done)
        except ExchangeError as error:
            done.error = str(error)
            done.end_s = time.perf_counter()
        return done

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _exchange(self, request: bytes, done: Exchange) -> None:
        connection = self._take()
        if connection is not None:
            try:
                return self._ask(connection, request, done)
            except _UnansweredError:
                # The server closed the idle connection before it saw the request, so the request is sent again.
                pass
        try:
            return self._ask(self._connect(), request, done)
        except _UnansweredError as error:
            raise ExchangeError(str(error)) from error

    def _ask(self, connection: _Connection, request: bytes, done: Exchange) -> None:
        is_kept = False
        try:
            is_kept = connection.ask(request, done)
        finally:
            if is_kept:
                self._idle.append(connection)
            else:
                connection.close()

    def _take(self) -> _Connection | None:
        if self._idle and time.perf_counter() - self._idle[-1].used_s < _IDLE_S:
            return self._idle.pop()
        self.close()
        return None

    def _connect(self) -> _Connection:
        try:
            plain = self._dial()
        except (socket.gaierror, UnicodeError) as error:
            raise ExchangeError("unknown host") from error
        except ConnectionRefusedError as error:
            raise ExchangeError("connection refused") from error
        except OSError as error:
            raise ExchangeError("connection failed") from error
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = self._tls.wrap_socket(plain, server_hostname=self._host) if self._tls else plain
            stream.settimeout(None)  # from here on the timeout of the exchange applies
            return _Connection(stream, has_timestamps=self._tls is None and _enable_timestamps(plain))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; an impossible host name raises ValueError
            plain.close()
            raise ExchangeError("tls failed" if self._tls else "connection failed") from error
        except BaseException:
            plain.close()
            raise

    def _dial(self) -> Any:
        if self._address is None:
            plain = socket.create_connection((self._host, self._port), _CONNECT_S)
            self._address = plain.family, plain.getpeername()
            return plain
        family, address = self._address
        plain = socket.socket(family, socket.SOCK_STREAM)
        try:
            plain.settimeout(_CONNECT_S)
            plain.connect(address)
        except BaseException:
            plain.close()
            self._address = None
            raise
        return plain


class _UnansweredError(Exception):
    """The connection ended before the first byte of a response."""


class _Connection:
    """One socket with the parser of its responses."""

    def __init__(self, stream: Any, has_timestamps: bool) -> None:
        self._stream = stream
        self._hub = gevent.get_hub()
        # Waiting before each read avoids the failed read with which gevent's sockets detect that no data is there.
        self._readable = self._hub.loop.io(stream.fileno(), 1) if has_timestamps else None
        self.used_s = 0.0
        self._exchange: Exchange
        self._parser: HttpResponseParser
        self._at_s = 0.0
        self._clock_offset_s = 0.0
        """The system clock minus `perf_counter`, in seconds."""
        self._is_complete = False
        self._is_kept = False
        self._has_length = False

    def ask(self, request: bytes, done: Exchange) -> bool:
        """Write the request and read the full response into `done`; return whether the connection stays open."""
        self._exchange, self._is_complete, self._is_kept, self._has_length = done, False, False, False
        self._parser = HttpResponseParser(self)
        feed, read = self._parser.feed_data, self._read_timestamped if self._readable else self._read
        is_begun = False
        self._clock_offset_s = time.time() - time.perf_counter()
        try:
            self._stream.sendall(request)
            while not self._is_complete:
                num_bytes = read()
                if not num_bytes:
                    break
                is_begun = True
                feed(_buffer[:num_bytes])
        except HttpParserError as error:
            raise ExchangeError("broken http") from error
        except OSError as error:
            raise ExchangeError("connection reset") if is_begun else _UnansweredError("connection reset") from error
        if not is_begun:
            raise _UnansweredError("closed before an answer")
        # Without a length, the end of the connection ends the response.
        if not self._is_complete and (self._has_length or not done.status):
            is_stream = done.headers.get("content-type", "").startswith("text/event-stream")
            raise ExchangeError("closed in mid-stream" if is_stream else "closed in mid-answer")
        done.end_s = self.used_s = self._at_s
        return self._is_kept

    def close(self) -> None:
        if self._readable:
            self._readable.close()
        self._stream.close()

    def _read(self) -> int:
        num_bytes: int = self._stream.recv_into(_buffer)
        self._at_s = time.perf_counter()
        return num_bytes

    def _read_timestamped(self) -> int:
        num_bytes: int
        self._hub.wait(self._readable)
        num_bytes, ancillary, _, _ = self._stream.recvmsg_into((_buffer,), _ANCILLARY_BYTES)
        self._at_s, system_s = time.perf_counter(), time.time()
        last_offset_s, self._clock_offset_s = self._clock_offset_s, system_s - self._at_s
        for _, kind, stamp in ancillary:
            if kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack(stamp)
                late_s = system_s - seconds - nanoseconds * 1e-9
                # The receive time is of the system clock, so it is of no use if that was changed since then.
                if late_s > 0 and abs(self._clock_offset_s - last_offset_s) < _MAX_CLOCK_STEP_S:
                    self._at_s -= late_s
        return num_bytes

    # Callbacks of httptools.

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.decode("latin-1").lower()
        self._exchange.headers[lower] = value.decode("latin-1")
        self._has_length |= lower in {"content-length", "transfer-encoding"}

    def on_headers_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._exchange.pieces.append((self._at_s, body))

    def on_message_complete(self) -> None:
        self._is_complete = self._exchange.status >= 200  # interim responses such as 103 Early Hints come first
        self._is_kept = self._is_complete and self._parser.should_keep_alive()


def _make_tls() -> ssl.SSLContext:
    """Return a TLS context with the system's certificates or those of SSL_CERT_FILE; gevent has no default context."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context


def _enable_timestamps(stream: socket.socket) -> bool:
    """Ask the kernel for receive times; return whether the socket supports them."""
    if sys.platform != "linux":
        return False
    try:
        stream.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True
