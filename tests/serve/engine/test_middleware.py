"""Tests of RequestMiddleware around small ASGI apps, called directly and behind a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter
from starlette.types import ASGIApp, Receive, Scope, Send

from slimserve.serve.engine.middleware import RequestMiddleware
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import RequestMetrics
from slimserve.serve.policy.routes import CLOSED_PATHS, INFERENCE_PATHS, OPEN_PATHS
from tests.conftest import measures_time

KEY = "s3cret-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


class App:
    """An inner app that runs `behave` and records the scopes and bodies that it receives."""

    def __init__(self, behave: Callable[[Scope, Receive, Send, App], Awaitable[None]] | None = None) -> None:
        self.behave = behave
        self.seen: list[Scope] = []
        self.bodies: list[bytes] = []
        self.disconnected = 0
        self.release = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.seen.append(scope)
        if scope["type"] == "websocket":
            return
        self.bodies.append((await receive())["body"])
        if self.behave and scope["path"] != "/health":
            await self.behave(scope, receive, send, self)
        else:
            await reply(send, b"ok")


async def reply(send: Send, body: bytes, content_type: bytes = b"text/plain") -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
    await send({"type": "http.response.body", "body": body})


async def until_released(scope: Scope, receive: Receive, send: Send, app: App) -> None:
    """Answer unless the client disconnects first, as vLLM's handlers do; a cancelled handler would continue unseen."""
    gone = asyncio.ensure_future(receive())
    done, _ = await asyncio.wait({gone, asyncio.ensure_future(app.release.wait())}, return_when="FIRST_COMPLETED")
    if gone in done:
        assert gone.result() == {"type": "http.disconnect"}
        app.disconnected += 1
    gone.cancel()
    await reply(send, b"done")


async def endless_stream(scope: Scope, receive: Receive, send: Send, app: App) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    gone = asyncio.ensure_future(receive())
    while not gone.done():
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await asyncio.sleep(0.01)
    app.disconnected += 1


def protected(app: ASGIApp, *, keys: frozenset[str] = frozenset(), **options: Any) -> RequestMiddleware:
    limits = Limits(**options.pop("limits", {}))
    return RequestMiddleware(app, limits, keys, RequestMetrics(CollectorRegistry()), **options)


def client(target: RequestMiddleware) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(target), base_url="http://test")


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


@contextlib.asynccontextmanager
async def served(target: RequestMiddleware) -> AsyncIterator[int]:
    """Run the middleware behind uvicorn as vLLM does; yield the port."""
    config = uvicorn.Config(target, port=0, log_level="critical", lifespan="on", ws="none")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    target.lifecycle.server = server
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


async def eventually(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def count(target: RequestMiddleware, name: str, **labels: str) -> float:
    metric = getattr(target.metrics, name)
    return float((metric.labels(**labels) if labels else metric)._value.get())


@pytest.fixture(autouse=True)
def fresh_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the log handlers, which the middleware changes when a server starts."""
    for name in ("slimserve", "uvicorn.access"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


# Keys


@pytest.mark.parametrize(
    "path", sorted(INFERENCE_PATHS | {"/v1/models", "/version", "/docs", "/tokenize", "/health/", "/x"})
)
def test_every_route_but_the_open_ones_requires_a_key(path: str) -> None:
    async def test() -> None:
        app = App()
        async with client(protected(app, keys=frozenset({KEY, "other"}))) as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"x-api-key": "wrong"}):
                answer = await http.post(path, json={}, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            assert app.seen == []
            for headers in (AUTHORIZED, {"authorization": f"bearer {KEY}"}, {"x-api-key": "other"}):
                assert (await http.post(path, json={}, headers=headers)).status_code == 200

    run(test)


def test_open_routes_need_no_key_and_a_root_path_opens_no_other() -> None:
    async def test() -> None:
        app = App()
        target = protected(app, keys=frozenset({KEY}))
        await startup(target)
        async with client(target) as http:
            for path in OPEN_PATHS:
                assert (await http.get(path)).status_code == 200
        transport = httpx.ASGITransport(target, root_path="/health")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            assert (await http.get("/health/v1/models")).status_code == 401

    run(test)


def test_administration_routes_are_closed_even_with_a_key() -> None:
    async def test() -> None:
        app = App()
        async with client(protected(app, keys=frozenset({KEY}))) as http:
            for path in CLOSED_PATHS:
                assert (await http.post(path, json={}, headers=AUTHORIZED)).status_code == 404
        assert app.seen == []

    run(test)


def test_vllm_receives_its_own_key_whichever_key_the_client_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        app = App()
        async with client(protected(app, keys=frozenset({KEY, "inner"}))) as http:
            await http.get("/v1/models", headers=AUTHORIZED)
        assert dict(app.seen[0]["headers"])[b"authorization"] == b"Bearer inner"

    monkeypatch.setenv("VLLM_API_KEY", "inner")
    run(test)


def test_a_websocket_requires_a_key() -> None:
    async def test() -> None:
        app = App()
        target = protected(app, keys=frozenset({KEY}))
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope: dict[str, Any] = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        await target(scope, receive, send)
        assert (sent, app.seen) == ([{"type": "websocket.close", "code": 1008}], [])
        await target(scope | {"headers": [(b"authorization", f"Bearer {KEY}".encode())]}, receive, send)
        assert len(app.seen) == 1

    run(test)


def test_a_preflight_passes_without_a_key() -> None:
    async def test() -> None:
        app = App()
        async with client(protected(app, keys=frozenset({KEY}))) as http:
            headers = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
            assert (await http.options("/v1/completions", headers=headers)).status_code == 200
            assert (await http.options("/v1/completions", headers={"Origin": "http://a"})).status_code == 401

    run(test)


# Ids, logs, metrics


def test_a_valid_request_id_is_kept_and_reaches_the_engine_and_the_client() -> None:
    async def test() -> None:
        app = App()
        async with client(protected(app)) as http:
            kept = await http.post("/v1/score", json={}, headers={"X-Request-Id": "abc-1.2_3"})
            made = await http.post("/v1/score", json={}, headers={"X-Request-Id": "a b\tc"})
            rejected = await http.post("/v1/score", content=b"\xff", headers={"X-Request-Id": "mine"})
        assert kept.headers["x-request-id"] == "abc-1.2_3"
        assert len(made.headers["x-request-id"]) == 32
        assert (rejected.status_code, rejected.headers["x-request-id"]) == (400, "mine")
        for scope, answer in zip(app.seen, (kept, made), strict=True):
            ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
            assert ids == [answer.headers["x-request-id"].encode()]

    run(test)


def test_the_access_log_has_one_line_per_request_without_key_or_prompt(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send, app: App) -> None:
        raise KeyError(app.bodies[-1])

    async def test() -> None:
        async with client(protected(App(fail), keys=frozenset({KEY}))) as http:
            headers = {**AUTHORIZED, "X-Request-Id": "r1"}
            answer = await http.post(
                "/v1/chat/completions?key=private", json={"prompt": "a private prompt"}, headers=headers
            )
            assert answer.status_code == 500
            assert "private" not in answer.text
            await http.get("/health")

    with caplog.at_level(logging.INFO):
        run(test)
    access = [record.getMessage() for record in caplog.records if record.name == "slimserve.access"]
    assert len(access) == 1
    assert access[0].startswith("request_id=r1 method=POST route=/v1/chat/completions status=500 duration_ms=")
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("slimserve"))
    assert "KeyError" in ours
    assert "private" not in ours
    assert KEY not in ours


def test_every_log_line_during_a_request_has_its_id(caplog: pytest.LogCaptureFixture) -> None:
    async def odd(scope: Scope, receive: Receive, send: Send, app: App) -> None:
        if scope["path"] == "/v1/score":
            raise AttributeError("of the server")
        await endless_stream(scope, receive, send, app)

    async def test() -> None:
        target = protected(App(odd), keys=frozenset({KEY}), limits={"request_timeout_s": 0.1, "max_body_bytes": 10})
        async with client(target) as http:
            for number, (path, body, key) in enumerate(
                [
                    ("/v1/score", b"{}", KEY),  # fails
                    ("/v1/completions", b"{}", KEY),  # late
                    ("/v1/completions", b"{" * 20, KEY),  # too large
                    ("/v1/completions", b"\xff", KEY),  # garbage
                    ("/v1/completions", b"{}", "wrong"),
                ]
            ):
                headers = {"Authorization": f"Bearer {key}", "X-Request-Id": f"r{number}"}
                caplog.clear()
                await http.post(path, content=body, headers=headers)
                lines = [record.getMessage() for record in caplog.records if record.name.startswith("slimserve")]
                assert lines
                assert all(f"request_id=r{number} " in line for line in lines)
                assert sum("method=POST" in line for line in lines) == 1

    with caplog.at_level(logging.DEBUG):
        run(test)


def test_uvicorns_access_log_is_off_because_it_quotes_the_query(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        target = protected(App())
        config = uvicorn.Config(target, port=0, lifespan="on", ws="none")  # with uvicorn's own handlers
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            headers = {"X-Request-Id": "r1"}
            assert (await http.get("/v1/models?api_key=secret", headers=headers)).status_code == 200
        server.should_exit = True
        await task

    run(test)
    out, err = capfd.readouterr()
    assert "Application startup complete" in out + err
    assert "slimserve.access request_id=r1 method=GET route=/v1/models status=200" in err
    assert "api_key" not in out + err


def test_requests_are_counted_by_a_bounded_set_of_routes() -> None:
    async def test() -> None:
        target = protected(App())
        async with client(target) as http:
            await http.get("/v1/models")
            await http.get("/v1/responses/abc")
            await http.get("/anything")
            await http.post("/v1/completions", content=b"\xff")
        assert count(target, "requests", route="/v1/models", status="200") == 1
        assert count(target, "requests", route="other", status="200") == 2
        assert count(target, "requests", route="/v1/completions", status="400") == 1
        assert count(target, "rejections", reason="invalid_body") == 1
        assert count(target, "in_flight") == 0

    run(test)


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe",
        b"[" * 101 + b"]" * 101,
        b'{"a":' * 5000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\uD83D x \\uDE00"}',
        b'{"prompt": "\\\\\\udfff"}',
    ],
)
def test_a_body_that_breaks_parsers_gets_400(body: bytes) -> None:
    async def test() -> None:
        app = App()
        async with client(protected(app)) as http:
            answer = await http.post("/v1/score", content=body)
        assert (answer.status_code, app.seen) == (400, [])
        assert answer.json()["error"]["code"] == "invalid_body"

    run(test)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 100 + b"]" * 100,
        json.dumps({"prompt": "[" * 500 + '"' + "{" * 500}).encode(),
        json.dumps([{"a": [1]}] * 500).encode(),
        json.dumps({"prompt": "💥"}).encode(),
        b'{"prompt": "\\\\ud800"}',
    ],
)
def test_an_unusual_but_valid_body_reaches_the_engine_unchanged(body: bytes) -> None:
    async def test() -> None:
        app = App()
        async with client(protected(app)) as http:
            assert (await http.post("/v1/score", content=body)).status_code == 200
        assert app.bodies == [body]

    run(test)


@measures_time
def test_a_hostile_string_is_checked_in_linear_time() -> None:
    async def test() -> None:
        async with client(protected(App())) as http:
            begin = time.process_time()  # of the processor, which other tests on the same cores do not lengthen
            for body in (b'"' + b'\\"' * 1_000_000 + b"[" * 200, b'"\\ud83d\\ude00' * 300_000, b"[]" * 500_000):
                await http.post("/v1/score", content=body)
            assert time.process_time() - begin < 3

    run(test)


def test_an_exception_in_validation_gets_400_and_any_other_500() -> None:
    class Odd:
        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            from pydantic_core import core_schema

            return core_schema.no_info_plain_validator_function(lambda value: value.get("field"))

    async def validate(scope: Scope, receive: Receive, send: Send, app: App) -> None:
        if scope["path"] == "/v1/score":
            TypeAdapter(Odd).validate_python([])
        raise AttributeError("of the server")

    async def test() -> None:
        async with client(protected(App(validate))) as http:
            assert (await http.post("/v1/score", json=[])).status_code == 400
            assert (await http.post("/v1/rerank", json=[])).status_code == 500

    run(test)


def test_a_body_over_the_limit_gets_413_by_its_length_or_while_it_arrives() -> None:
    async def test() -> None:
        app = App()
        target = protected(app, limits={"max_body_bytes": 1000})

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(500):
                yield b" " * 1000

        async with served(target) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.post("/v1/score", content=b" " * 1001)).status_code == 413
            assert (await http.post("/v1/score", content=parts())).status_code == 413
            assert (await http.post("/tokenize", content=b" " * 1_000_000)).status_code == 413
            assert (await http.post("/v1/score", content=b" " * 1000)).status_code == 200
        assert app.bodies == [b" " * 1000]
        assert target.uploads.num_bytes == 0

    run(test)


def test_a_body_that_never_ends_gets_408_and_holds_no_slot() -> None:
    async def test() -> None:
        target = protected(App(), upload_timeout_s=0.2, limits={"max_running": 1, "max_queued": 0})
        async with served(target) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                assert (await http.post("/v1/score", json={})).status_code == 200
            assert b"408" in await reader.readline()
            writer.close()

    run(test)


# Slots and time


def test_requests_over_the_limits_get_429_with_retry_after() -> None:
    async def test() -> None:
        app = App(until_released)
        target = protected(app, limits={"max_running": 2, "max_queued": 1})
        async with client(target) as http:
            tasks = [asyncio.create_task(http.post("/v1/score", json={})) for _ in range(6)]
            await eventually(lambda: sum(task.done() for task in tasks) == 3)
            assert (count(target, "in_flight"), count(target, "queued")) == (2, 1)
            rejected = [task.result() for task in tasks if task.done()]
            for answer in rejected:
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
                assert int(answer.headers["retry-after"]) >= 1
            app.release.set()
            answers = await asyncio.gather(*tasks)
            assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429, 429, 429]
        assert count(target, "rejections", reason="queue_full") == 3

    run(test)


def test_at_its_deadline_a_request_disconnects_from_the_engine_and_gets_504() -> None:
    async def test() -> None:
        app = App(until_released)
        target = protected(app, limits={"request_timeout_s": 5.0, "max_running": 1})
        async with client(target) as http:
            answer = await http.post("/v1/score", json={}, headers={"X-Request-Timeout": "0.1"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            assert (app.disconnected, count(target, "in_flight")) == (1, 0)
            for text in ("0", "-1", "nan", "inf", "soon"):
                assert (await http.post("/v1/score", json={}, headers={"X-Request-Timeout": text})).status_code == 400

    run(test)


def test_a_deadline_during_a_rejection_changes_nothing() -> None:
    async def test() -> None:
        target = protected(App(), limits={"max_body_bytes": 10, "request_timeout_s": 0.1})
        async with served(target) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            assert b"413" in await reader.readline()
            await asyncio.sleep(0.3)
            assert count(target, "requests", route="/v1/score", status="504") == 0
            writer.write(b" " * 99)
            assert (await reader.read()).endswith(b"}")
            await eventually(lambda: count(target, "requests", route="/v1/score", status="413") == 1)
            writer.close()

    run(test)


def test_a_deadline_ends_a_stream_with_an_error_event() -> None:
    async def test() -> None:
        app = App(endless_stream)
        target = protected(app, limits={"request_timeout_s": 0.2})
        async with served(target) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            answer = await http.post("/v1/completions", json={})
            events = answer.text.strip().split("\n\n")
            assert events[0] == "data: {}"
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
            assert [event for event in events if "error" in event] == events[-1:]
        assert app.disconnected == 1
        assert count(target, "requests", route="/v1/completions", status="504") == 1

    run(test)


def test_a_handler_that_ignores_the_disconnect_is_cancelled() -> None:
    async def sleep(scope: Scope, receive: Receive, send: Send, app: App) -> None:
        await asyncio.sleep(60)

    async def test() -> None:
        async with client(protected(App(sleep), limits={"request_timeout_s": 0.05})) as http:
            assert (await http.post("/v1/score", json={})).status_code == 504

    run(test)


def test_a_deadline_in_the_queue_frees_the_queue() -> None:
    async def test() -> None:
        app = App(until_released)
        target = protected(app, limits={"max_running": 1})
        async with client(target) as http:
            first = asyncio.create_task(http.post("/v1/score", json={}))
            await eventually(lambda: count(target, "in_flight") == 1)
            late = await http.post("/v1/score", json={}, headers={"X-Request-Timeout": "0.1"})
            assert (late.status_code, count(target, "queued")) == (504, 0)
            app.release.set()
            assert (await first).status_code == 200

    run(test)


def test_a_client_that_disconnects_leaves_the_queue_and_the_engine() -> None:
    async def test() -> None:
        app = App(until_released)
        target = protected(app, limits={"max_running": 1})
        async with served(target) as port:
            request = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
            writers = []
            for _ in range(2):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                writers.append(writer)
                await asyncio.sleep(0.05)
            assert (count(target, "in_flight"), count(target, "queued")) == (1, 1)
            writers[1].close()
            await eventually(lambda: count(target, "queued") == 0)
            writers[0].close()
            await eventually(lambda: count(target, "in_flight") == 0)
            assert app.disconnected == 1
            await eventually(lambda: count(target, "requests", route="/v1/score", status="499") >= 1)

    run(test)


def test_the_connection_of_a_client_that_stops_reading_is_reset() -> None:
    async def flood(scope: Scope, receive: Receive, send: Send, app: App) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})

    async def test() -> None:
        target = protected(App(flood), stall_timeout_s=0.3)
        async with served(target) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
            await reader.readline()
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            await eventually(lambda: count(target, "in_flight") == 1)
            await eventually(lambda: count(target, "in_flight") == 0)
            await eventually(lambda: not target.lifecycle.server.server_state.connections)
            writer.close()

    run(test)


def test_the_chunks_of_a_streamed_answer_are_timed() -> None:
    async def three(scope: Scope, receive: Receive, send: Send, app: App) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(3):
            await asyncio.sleep(0.02)
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        target = protected(App(three))
        async with client(target) as http:
            await http.post("/v1/completions", json={})
        gaps, first = target.metrics.inter_token_s, target.metrics.first_token_s
        assert sum(bucket.get() for bucket in gaps._buckets) == 2
        assert sum(bucket.get() for bucket in first._buckets) == 1
        assert 0.04 <= gaps._sum.get() < 0.5

    run(test)


# Start and shutdown


async def startup(target: RequestMiddleware) -> asyncio.Task[None]:
    """Run the lifespan until the server has started."""
    started = asyncio.Event()
    events: asyncio.Queue[Any] = asyncio.Queue()
    events.put_nowait({"type": "lifespan.startup"})

    async def send(message: Any) -> None:
        started.set()

    task = asyncio.create_task(target({"type": "lifespan"}, events.get, send))
    await started.wait()
    return task


def test_ready_reports_the_start_the_engine_and_the_drain() -> None:
    async def test() -> None:
        status = 503

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await send({"type": "lifespan.startup.complete"})
                return
            assert (scope["path"], scope["method"]) == ("/health", "GET")
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        target = protected(inner)
        async with client(target) as http:
            assert (await http.get("/ready")).json() == {"status": "starting"}
            await startup(target)
            assert (await http.get("/ready")).json() == {"status": "engine dead"}
            status = 200
            ready = await http.get("/ready")
            assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
            target.lifecycle.begin_drain()
            draining = await http.get("/ready")
            assert (draining.status_code, draining.json()) == (503, {"status": "draining"})
            assert (await http.get("/live")).status_code == 200
            assert (await http.get("/health")).status_code == 200

    run(test)


def test_a_drain_rejects_new_requests_lets_running_ones_finish_and_stops_the_server() -> None:
    async def test() -> None:
        app = App(until_released)
        target = protected(app, limits={"max_running": 1, "drain_s": 5.0})
        async with served(target) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            running = asyncio.create_task(http.post("/v1/score", json={}))
            await eventually(lambda: count(target, "in_flight") == 1)
            queued = asyncio.create_task(http.post("/v1/score", json={}))
            await eventually(lambda: count(target, "queued") == 1)
            target.lifecycle.begin_drain()
            for answer in (await queued, await http.post("/v1/score", json={}), await http.get("/v1/models")):
                assert (answer.status_code, answer.headers["connection"]) == (503, "close")
                assert int(answer.headers["retry-after"]) >= 1
            assert not target.lifecycle.server.should_exit
            app.release.set()
            assert (await running).status_code == 200
            await eventually(lambda: target.lifecycle.server.should_exit)
            assert not target.lifecycle.server.force_exit

    run(test)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_request_that_outlives_the_drain_ends_with_an_error(signals: int) -> None:
    async def test() -> None:
        target = protected(App(endless_stream), limits={"drain_s": 0.2 if signals == 1 else 60.0})
        async with served(target) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            running = asyncio.create_task(http.post("/v1/completions", json={}))
            await eventually(lambda: count(target, "in_flight") == 1)
            for _ in range(signals):
                target.lifecycle.begin_drain()
            last = (await running).text.strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutdown"
            await eventually(lambda: target.lifecycle.server.should_exit)
            assert target.lifecycle.server.force_exit == (signals == 2)

    run(test)
