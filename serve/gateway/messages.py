"""Types that the proxy and the application behind it share: requests, answers, timeouts and the server's state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from slimserve.serve.gateway.upstream import Backend, Headers
from slimserve.serve.policy.cors import CorsRules
from slimserve.serve.policy.errors import Rejection
from slimserve.serve.policy.timeouts import BODY_TIMEOUT_S, STALL_TIMEOUT_S
from slimserve.serve.policy.uploads import UploadLimits


@dataclass(slots=True)
class ProxyRequest:
    """One request of a client; header names are in lower case."""

    begin_s: float
    """Time of the first byte, on the event loop's clock."""
    id: str = ""
    method: str = "-"
    is_http_1_0: bool = False
    """Whether the client speaks HTTP/1.0, as nginx does by default; it knows no chunks and one request a connection."""
    target: bytes = b""
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    variant: str = ""
    """Name of the variant; the application sets it in `route`."""
    is_counted: bool = False
    """Whether the application counts the request as in flight."""
    head_s: float | None = None
    """Seconds from sending the request to the engine until the head of its answer arrived."""

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")

    def header(self, name: bytes) -> bytes:
        """Return the first value of a header, or empty bytes."""
        return next((value for key, value in self.headers if key == name), b"")


@dataclass(frozen=True)
class Answer:
    """A complete answer that the gateway itself makes."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False
    """Whether to close the connection after the answer."""


def rejection_answer(rejection: Rejection) -> Answer:
    """Return a rejection as an answer."""
    headers = tuple(rejection.headers())
    return Answer(rejection.status, json.dumps(rejection.body()).encode(), headers=headers, close=rejection.close)


@dataclass(frozen=True)
class Timeouts:
    """Time limits of a client connection, in seconds."""

    idle_s: float = 60.0
    """Longest time without a request before the connection is closed."""
    head_s: float = 10.0
    """Longest time from the first byte of a request to the end of its head."""
    body_s: float = BODY_TIMEOUT_S
    """Longest time from the end of the head to the end of the body."""
    stall_s: float = STALL_TIMEOUT_S
    """Longest time in which a client may read nothing of its answer."""
    answer_s: float = 330.0
    """Longest time from a request to the end of its answer; only reached if the engine's own deadline failed."""


class Application(Protocol):
    """Decides what the proxy does with each request."""

    cors: CorsRules
    """The rules for pages of other origins; they apply to the proxy's own answers."""

    def admit(self, request: ProxyRequest) -> None:
        """Raise Rejection to reject a request by its head, before its body is read."""

    def route(self, request: ProxyRequest) -> Backend | Answer | Coroutine[Any, Any, Answer]:
        """Return the engine that a complete request goes to, or the answer to it."""

    def unreachable(self, request: ProxyRequest) -> Answer:
        """Return the answer to a request whose engine accepts no connection."""

    def finished(self, request: ProxyRequest, status: int, seconds: float) -> None:
        """Record the end of a request; called once per request.

        `status` is what the client received, or 502 or 503 if its answer was cut off.
        """


class ClientConnection(Protocol):
    """The part of a client's connection that the server needs."""

    @property
    def is_busy(self) -> bool:
        """Whether a request is being read or answered."""

    def interrupt(self, error: Rejection) -> None:
        """End the request in flight, if there is one, with an error that the client can read."""

    def close_if_idle(self) -> None:
        """Close the connection unless a request is being read or answered."""

    def abort(self) -> None:
        """Drop the connection, including the bytes that the client has not read."""


class ServerState:
    """State that all client connections of one server share."""

    def __init__(self, application: Application, max_body_bytes: int, timeouts: Timeouts | None = None) -> None:
        self.application = application
        self.uploads = UploadLimits(max_body_bytes)
        self.timeouts = timeouts or Timeouts()
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self.request_ended = asyncio.Event()
        """Set at the end of every request; `drain` waits for it."""
