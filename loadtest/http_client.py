"""HTTP/1.1 exchanges over gevent's sockets, each read kept with the time at which its bytes had come.

Where the system says when the kernel received the bytes of a read (SO_TIMESTAMPNS, Linux, no TLS), that time counts:
a client that is late, because another stream's bytes came at the same moment, does not make the server look late.
Nothing is parsed while a stream runs but its HTTP framing; events and tokens are read out of the kept bytes after its
end (loadtest/sse.py).
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
"""A control message's header and one timespec, on 64-bit Linux."""
_CONNECT_S = 10.0
"""Longest wait for one address of the server, and for its TLS handshake."""
_IDLE_S = 2.0
"""uvicorn closes a connection that was idle for 5 s; one that it closes while a request is on its way is lost."""
_room = memoryview(bytearray(2**18))
"""Where every read lands: the parser copies it out before any other greenlet can run."""


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


class HttpClient:
    """Connections to one server, kept open between requests and used last in, first out.

    The server's name is looked up once, as gevent asks a thread for it each time, which takes longer than to connect:
    later connections go to the address that answered first, until it no longer does.
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
        """Family and address that answered last."""

    def post(self, path: str, body: bytes) -> Exchange:
        """Send `body` and read the answer to its end; never raises for what the network or the server does.

        An `error` is one of: unknown host, connection refused, connection failed, tls failed, connection reset, closed
        before an answer, closed in mid-answer (of events: closed in mid-stream), broken http, timeout. What had come
        before it is kept.
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
                # The server had closed the idle connection before it saw the request; it goes out once more.
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
            stream.settimeout(None)  # from here on the timeout of the whole exchange counts
            return _Connection(stream, is_stamped=self._tls is None and _ask_for_stamps(plain))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; a name that none can have, a ValueError
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
    """The connection ended before any byte of an answer."""


class _Connection:
    """One socket and the parser of its answers."""

    def __init__(self, stream: Any, is_stamped: bool) -> None:
        self._stream = stream
        self._hub = gevent.get_hub()
        # To wait before a read spares the failed read by which gevent's sockets find out that there is nothing yet.
        self._readable = self._hub.loop.io(stream.fileno(), 1) if is_stamped else None
        self.used_s = 0.0
        self._exchange: Exchange
        self._parser: HttpResponseParser
        self._at_s = 0.0
        self._is_whole = False
        self._is_kept = False
        self._has_length = False

    def ask(self, request: bytes, done: Exchange) -> bool:
        """Write the request and read into `done` until the answer is whole; whether the connection can be kept."""
        self._exchange, self._is_whole, self._is_kept, self._has_length = done, False, False, False
        self._parser = HttpResponseParser(self)
        feed, read = self._parser.feed_data, self._read_stamped if self._readable else self._read
        is_begun = False
        try:
            self._stream.sendall(request)
            while not self._is_whole:
                num_bytes = read()
                if not num_bytes:
                    break
                is_begun = True
                feed(_room[:num_bytes])
        except HttpParserError as error:
            raise ExchangeError("broken http") from error
        except OSError as error:
            raise ExchangeError("connection reset") if is_begun else _UnansweredError("connection reset") from error
        if not is_begun:
            raise _UnansweredError("closed before an answer")
        if not self._is_whole and (self._has_length or not done.status):  # else the connection's end is the answer's
            is_stream = done.headers.get("content-type", "").startswith("text/event-stream")
            raise ExchangeError("closed in mid-stream" if is_stream else "closed in mid-answer")
        done.end_s = self.used_s = self._at_s
        return self._is_kept

    def close(self) -> None:
        if self._readable:
            self._readable.close()
        self._stream.close()

    def _read(self) -> int:
        num_bytes: int = self._stream.recv_into(_room)
        self._at_s = time.perf_counter()
        return num_bytes

    def _read_stamped(self) -> int:
        num_bytes: int
        self._hub.wait(self._readable)
        num_bytes, ancillary, _, _ = self._stream.recvmsg_into((_room,), _ANCILLARY_BYTES)
        self._at_s = time.perf_counter()
        for _, kind, stamp in ancillary:
            if kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack(stamp)
                late_s = time.time() - seconds - nanoseconds * 1e-9
                if 0 < late_s < 1:  # else the system's clock was set meanwhile
                    self._at_s -= late_s
        return num_bytes

    # What httptools calls while it is fed.

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.decode("latin-1").lower()
        self._exchange.headers[lower] = value.decode("latin-1")
        self._has_length |= lower in {"content-length", "transfer-encoding"}

    def on_headers_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._exchange.pieces.append((self._at_s, body))

    def on_message_complete(self) -> None:
        self._is_whole = self._exchange.status >= 200  # before it come interim answers, such as 103 Early Hints
        self._is_kept = self._is_whole and self._parser.should_keep_alive()


def _make_tls() -> ssl.SSLContext:
    """Trusts what the system trusts, or the file that SSL_CERT_FILE names; gevent has no default context of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context


def _ask_for_stamps(stream: socket.socket) -> bool:
    """Whether the socket will say when the kernel received its bytes."""
    if sys.platform != "linux":
        return False
    try:
        stream.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True
