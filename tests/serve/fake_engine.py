"""In-process engines with scripted answers behind a real gateway, and a client that controls the bytes it sends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import uvloop
from prometheus_client import CollectorRegistry

from slimserve.serve.gateway.messages import Timeouts
from slimserve.serve.gateway.proxy import ProxyServer
from slimserve.serve.gateway.routing import Gateway
from slimserve.serve.gateway.supervisor import State, SupervisedEngine
from slimserve.serve.gateway.upstream import Backend
from slimserve.serve.launch.config import Alias, Variant
from slimserve.serve.launch.plan import LaunchPlan
from slimserve.serve.launch.process import EngineSpec
from slimserve.serve.policy.metrics import GatewayMetrics

MAX_BODY = 100_000


@dataclass
class Message:
    """One HTTP message as parsed by httptools."""

    target: str = ""
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    is_complete: bool = False

    def on_url(self, url: bytes) -> None:
        self.target += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode().lower(), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.is_complete = True

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Message, asyncio.StreamWriter], Awaitable[None]]


class FakeEngine:
    """Answers each request with its `script`; by default with its own name and the request."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[Message] = []
        self.num_connections = 0
        self.num_open = 0
        self.disconnected = asyncio.Event()
        """Set when a client disconnects while its script runs."""
        self.script: Script = self._echo
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.num_open += 1
        try:
            while request := await read_message(reader, httptools.HttpRequestParser):
                self.requests.append(request)
                script = asyncio.ensure_future(self.script(request, writer))
                left = asyncio.ensure_future(reader.read(1))
                await asyncio.wait({script, left}, return_when=asyncio.FIRST_COMPLETED)
                if not script.done():
                    script.cancel()
                    self.disconnected.set()
                    return
                script.result()
                if writer.is_closing():
                    return
                # The byte belongs to the next request; put it back in front of the rest.
                reader = _Rejoined(left, reader)  # type: ignore[assignment]
        except (ConnectionError, asyncio.CancelledError):
            self.disconnected.set()
        finally:
            self.num_open -= 1
            writer.close()

    async def _echo(self, request: Message, writer: asyncio.StreamWriter) -> None:
        await answer(writer, {"engine": self.name, "target": request.target, "body": request.body.decode()})


class _Rejoined:
    """A reader that returns a byte which was already read, and then the rest."""

    def __init__(self, first: asyncio.Future[bytes], rest: Any) -> None:
        self._first: asyncio.Future[bytes] | None = first
        self._rest = rest

    async def read(self, num_bytes: int) -> bytes:
        if self._first is not None:
            first, self._first = await self._first, None
            return first
        data: bytes = await self._rest.read(num_bytes)
        return data


async def answer(writer: asyncio.StreamWriter, document: object, head: str = "") -> None:
    body = json.dumps(document).encode()
    writer.write(
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{head}content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def read_message(reader: Any, kind: Any) -> Message | None:
    """Return the next message; None at a clean end of the connection."""
    message = Message()
    parser = kind(message)
    any_bytes = False
    while not message.is_complete:
        data = await reader.read(2**16)
        if not data:
            if any_bytes:
                raise ConnectionResetError("cut")
            return None
        any_bytes = True
        parser.feed_data(data)
    if kind is httptools.HttpResponseParser:
        message.status = parser.get_status_code()
    return message


class Client:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, path: str, body: object = None, headers: str = "", method: str = "") -> Message:
        self.send(path, body, headers, method)
        return await self.answer()

    def send(self, path: str, body: object = None, headers: str = "", method: str = "") -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        length = f"Content-Length: {len(data)}\r\n" if data else ""
        self.writer.write(f"{method} {path} HTTP/1.1\r\nHost: test\r\n{length}{headers}\r\n".encode() + data)

    async def answer(self) -> Message:
        message = await asyncio.wait_for(read_message(self.reader, httptools.HttpResponseParser), 10)
        assert message is not None, "closed without an answer"
        return message

    async def is_closed(self) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(), 5) == b""
        except ConnectionError:
            return True

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()


@dataclass
class Served:
    """A running gateway with its fake engines."""

    port: int
    server: ProxyServer
    gateway: Gateway
    engines: dict[str, FakeEngine]
    supervised: dict[str, SupervisedEngine]
    registry: CollectorRegistry

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def ask(self, path: str, body: object = None, headers: str = "", method: str = "") -> Message:
        async with await self.connect() as client:
            return await client.ask(path, body, headers, method)


@asynccontextmanager
async def served(
    *names: str,
    aliases: tuple[Alias, ...] = (),
    default: str | None = None,
    keys: frozenset[str] = frozenset(),
    directory: Path | None = None,
    timeouts: Timeouts | None = None,
) -> AsyncIterator[Served]:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    engines, supervised = {}, {}
    for name in names:
        engines[name] = FakeEngine(name)
        await engines[name].start()
        spec = EngineSpec(Path(), name, LaunchPlan(), Path("/dev/null"), engines[name].port)
        supervised[name] = SupervisedEngine(spec, metrics, str)
        supervised[name].state = State.READY
        supervised[name].backend = Backend("127.0.0.1", engines[name].port)
    variants = [Variant(name, "m", directory, "balanced") for name in names if directory]
    gateway = Gateway(variants, supervised, metrics, aliases, default, keys, registry)
    server = ProxyServer(gateway, MAX_BODY, timeouts)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    await server.start(listener)
    try:
        yield Served(port, server, gateway, engines, supervised, registry)
    finally:
        await server.close()
        for engine in engines.values():
            engine.stop()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario on uvloop, as the server does; fail after 60 s."""
    uvloop.run(asyncio.wait_for(scenario, 60))


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
