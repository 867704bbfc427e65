"""HTTP/1.1 exchanges over sockets, each read kept with the time at which its bytes had come; under gevent, as Locust is.

Where the system says when the kernel received the bytes of a read (SO_TIMESTAMPNS, Linux, no TLS), that time counts:
a client that is late, because another stream's bytes came at the same moment, does not make the server look late. Nothing is
parsed while a stream runs but its HTTP framing; events and tokens are read out of the kept bytes after its end
(loadtest/sse.py).
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import gevent
from httptools import HttpParserError, HttpResponseParser

_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")
_ANCILLARY = socket.CMSG_SPACE(_TIMESPEC.size)
_READ_BYTES = 2**18
_IDLE_S = 2.0
"""uvicorn closes a connection that was idle for 5 s; one that it closes while a request is on its way is lost."""


class ExchangeError(Exception):
    """No whole answer came; the message is the kind under which it is counted."""


@dataclass
class Exchange:
    """One request and what came back; times in seconds of `perf_counter`."""

    sent_s: float
    """Before the first byte was written."""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """Of the answer, names in lower case."""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """The answer's body as it came: arrival and bytes of each read."""
    end_s: float = 0.0
    error: str | None = None
    """Kind of failure; None where the answer is whole, whatever its status."""

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class Wire:
    """Connections to one server, kept open between requests and used last in, first out."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float = 300.0) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        host = parts.netloc.rpartition("@")[2]
        fixed = {"Host": host, "Content-Type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fixed.items()).encode("latin-1")
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Exchange:
        """Send `body` and read the answer to its end; never raises for what the network or the server does."""
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items()).encode("latin-1")
        request = b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (
            f"{self._path}{path}".encode(),
            self._head,
            more,
            len(body),
            body,
        )
        done = Exchange(time.perf_counter())
        try:
            with gevent.Timeout(self._timeout_s, ExchangeError("timeout")):
                self._exchange(request, done)
        except ExchangeError as error:
            done.error = str(error)
        done.end_s = done.end_s or time.perf_counter()
        return done

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _exchange(self, request: bytes, done: Exchange) -> None:
        connection = self._take()
        while True:
            is_reused = connection is not None
            connection = connection or self._connect()
            try:
                connection.ask(request, done)
            except _StaleError:
                connection.close()
                if not is_reused:
                    raise ExchangeError("closed before an answer") from None
                # The server had closed this idle connection before it saw the request; that happens once at most.
                connection = None
                continue
            except BaseException:
                connection.close()
                raise
            break
        if connection.is_kept:
            self._idle.append(connection)
        else:
            connection.close()

    def _take(self) -> _Connection | None:
        now = time.perf_counter()
        if self._idle and now - self._idle[-1].used_s < _IDLE_S:
            return self._idle.pop()
        self.close()
        return None

    def _connect(self) -> _Connection:
        try:
            plain = socket.create_connection((self._host, self._port))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except socket.gaierror as error:
            raise ExchangeError("unknown host") from error
        except ConnectionRefusedError as error:
            raise ExchangeError("connection refused") from error
        except OSError as error:
            raise ExchangeError("connection failed") from error
        if self._tls is None:
            return _Connection(plain, is_stamped=_ask_for_stamps(plain))
        try:
            return _Connection(self._tls.wrap_socket(plain, server_hostname=self._host), is_stamped=False)
        except OSError as error:  # ssl.SSLError is one
            plain.close()
            raise ExchangeError("tls failed") from error


class _StaleError(Exception):
    """The connection ended before any byte of an answer."""


class _Connection:
    """One socket and the parser of its answers."""

    def __init__(self, stream: Any, is_stamped: bool) -> None:
        self._stream = stream
        self._is_stamped = is_stamped
        self.is_kept = False
        self.used_s = 0.0
        self._exchange: Exchange
        self._at_s = 0.0
        self._is_complete = False
        self._has_length = False

    def ask(self, request: bytes, done: Exchange) -> None:
        """Write the request and read into `done` until the answer is whole."""
        self._exchange, self._is_complete, self._has_length, self.is_kept = done, False, False, False
        parser = HttpResponseParser(self)
        is_begun = False
        try:
            self._stream.sendall(request)
            while not self._is_complete:
                data = self._read()
                if not data:
                    if is_begun and not self._has_length and done.status:
                        break  # an answer whose end is the end of the connection
                    raise ExchangeError("closed in mid-answer") if is_begun else _StaleError
                is_begun = True
                parser.feed_data(data)
                done.status = done.status or (parser.get_status_code() if done.headers else 0)
        except HttpParserError as error:
            raise ExchangeError("broken http") from error
        except OSError as error:
            raise ExchangeError("connection reset") if is_begun else _StaleError from error
        done.end_s = self.used_s = self._at_s

    def close(self) -> None:
        self._stream.close()

    def _read(self) -> bytes:
        if not self._is_stamped:
            data = self._stream.recv(_READ_BYTES)
            self._at_s = time.perf_counter()
            return bytes(data)
        data, ancillary, _, _ = self._stream.recvmsg(_READ_BYTES, _ANCILLARY)
        self._at_s = time.perf_counter()
        for level, kind, stamp in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(stamp) == _TIMESPEC.size:
                seconds, nanoseconds = _TIMESPEC.unpack(stamp)
                late_s = time.time() - (seconds + nanoseconds * 1e-9)
                if 0 < late_s < 1:  # else the system's clock was set meanwhile
                    self._at_s -= late_s
        return bytes(data)

    # httptools, while it reads an answer

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.decode("latin-1").lower()
        self._exchange.headers[lower] = value.decode("latin-1")
        self._has_length |= lower in {"content-length", "transfer-encoding"}

    def on_body(self, body: bytes) -> None:
        self._exchange.pieces.append((self._at_s, body))

    def on_message_complete(self) -> None:
        self._is_complete = True
        self.is_kept = self._exchange.headers.get("connection", "").lower() != "close"


def _ask_for_stamps(stream: socket.socket) -> bool:
    """Whether the socket will say when the kernel received its bytes."""
    try:
        stream.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return hasattr(stream, "recvmsg")
