"""What stands between the network and the engine, inside the engine's own server process.

vLLM adds it with `--middleware slimserve.serve.engine.middleware.Guard`, outside of its own middlewares. A request passes, in this order:
its id, the key, the drain, the size of its body, a look at the body, a place inside (serve/policy/admission.py), the engine
under a deadline. Every refusal is an OpenAI error object with the request's id. Nothing logged holds a key, a header
or a byte of a body.

Plain ASGI: a streamed chunk costs two clock reads and one histogram count. What has to happen later (deadline, stalled
reader) is a timer, never a task around the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import traceback
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimserve.serve.engine.request_context import WIND_UP_S, Call, Refusal, header_of
from slimserve.serve.policy.admission import Admission, Gone, Refused
from slimserve.serve.policy.limits import KeyRing, Limits, load_api_keys
from slimserve.serve.policy.metrics import RequestMetrics, request_metrics

OPEN_PATHS = frozenset({"/health", "/live", "/metrics", "/ping", "/ready"})
"""Answered without a key; everything else needs one where one is set, /version and /docs included."""
INFERENCE_PATHS = frozenset(
    {
        *("/classify", "/cohere/v2/chat", "/generative_scoring", "/inference/v1/generate", "/invocations", "/pooling"),
        *("/rerank", "/score", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/chat/completions"),
        *("/v1/chat/completions/batch", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/rerank"),
        *("/v1/responses", "/v1/score", "/v1/systemone", "/v2/embed", "/v2/rerank"),
    }
)
"""POSTs to these take one of the engine's places."""
CLOSED_PATHS = frozenset({"/is_scaling_elastic_ep", "/scale_elastic_ep"})
"""vLLM's administration, with or without a key: a key to ask the model is no key to rebuild its engine."""
_OTHER_PATHS = frozenset({"/detokenize", "/docs", "/load", "/openapi.json", "/tokenize", "/v1/models", "/version"})
_ROUTES = OPEN_PATHS | INFERENCE_PATHS | _OTHER_PATHS
_BODY_METHODS = frozenset({"DELETE", "PATCH", "POST", "PUT"})

_STALL_S = 60.0
_UPLOAD_S = 30.0
_POLL_S = 0.05
_EXIT_S = 2
_MAX_UPLOADS = 32
"""Bodies of full size that may be in memory before their requests have a place."""
_MAX_DEPTH = 100
"""Nesting of a JSON body: far above any tool schema, far below the recursion limits of the parsers behind us."""
_CLIENT_GONE = 499
_CLIENT_ERRORS = frozenset({"RecursionError", "TemplateError", "UnicodeDecodeError", "UnicodeEncodeError"})
"""Exceptions, by name or a base's name, that only a request can cause; vLLM lets some of them through as a 500."""

_log = logging.getLogger("slimserve.guard")
_access = logging.getLogger("slimserve.access")
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_JSON_BRACKET = re.compile(rb"[\[\]{}]")
_NO_LONE_SURROGATE = re.compile(
    rb"(?:[^\\]++|\\(?!u[dD][89a-fA-F]).|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+", re.DOTALL
)


class Guard:
    """The ASGI middleware. Limits and keys come from the environment (serve/policy/limits.py) unless given."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits | None = None,
        keys: frozenset[str] | None = None,
        metrics: RequestMetrics | None = None,
        stall_timeout_s: float = _STALL_S,
        upload_timeout_s: float = _UPLOAD_S,
    ) -> None:
        self.app = app
        self.limits = limits or Limits.from_environment()
        self._keys = KeyRing(load_api_keys() if keys is None else keys)
        self._inner_key = os.environ.get("VLLM_API_KEY", "")
        self.metrics = metrics or request_metrics()
        self._admission = Admission(self.limits, self._show_places)
        self.stall_timeout_s = stall_timeout_s
        self._upload_timeout_s = upload_timeout_s
        self._upload_bytes = 0
        self._calls: set[Call] = set()
        self._server: Any = None
        self._started = False
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    # One request

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(self, scope, receive, send)
        self._calls.add(call)
        try:
            await self._answer(call)
        except Refusal as refusal:
            self.metrics.rejections.labels(refusal.reason).inc()
            await call.refuse(refusal)
        except Gone:
            pass
        except asyncio.CancelledError:
            if not call.interrupted:
                raise
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
        except Exception as error:
            if call.failure is None:
                await call.refuse(_inner_error(error, call.id))
        finally:
            if call.failure is not None:
                await call.finish_failed()
            self._calls.discard(call)
            call.close()
            self._account(call)

    async def _answer(self, call: Call) -> None:
        scope = call.scope
        if call.method == "OPTIONS":
            await self.app(scope, call.receive, call.send)
            return
        path = call.path
        if path not in OPEN_PATHS:
            self._check_key(scope)
        if path in CLOSED_PATHS:
            raise Refusal(404, "not_found", "this server has no such route")
        if path == "/live":
            await call.answer(200, {"status": "live"})
        elif path == "/ready":
            await call.answer(*await self._readiness(scope))
        elif path in OPEN_PATHS and call.method in {"GET", "HEAD"}:
            await self.app(scope, call.receive, call.send)
        else:
            if self._drain is not None:
                raise self._draining()
            call.arm(self._deadline_s(scope))
            is_inference = call.method == "POST" and path in INFERENCE_PATHS
            if is_inference:
                self._check_place()
            if call.method in _BODY_METHODS:
                await self._read_body(call)
            if is_inference:
                await self._run_with_place(call)
            else:
                await self._run(call)

    async def _run_with_place(self, call: Call) -> None:
        begin = call.now()
        try:
            await self._admission.enter(call.gone)
        except Refused as refused:
            raise self._refusal(refused) from None
        admitted = call.now()
        call.queued_s = admitted - begin
        self.metrics.queue_s.observe(call.queued_s)
        try:
            await self._run(call)
        finally:
            self._admission.leave(call.now() - admitted)

    async def _run(self, call: Call) -> None:
        scope = call.scope
        headers = [(name, value) for name, value in scope["headers"] if name not in {b"x-request-id"}]
        headers.append((b"x-request-id", call.id.encode()))
        if self._keys and self._inner_key:
            # vLLM knows one key of its own, and the client may have shown another of ours.
            headers = [(name, value) for name, value in headers if name != b"authorization"]
            headers.append((b"authorization", b"Bearer " + self._inner_key.encode()))
        await call.run(self.app, dict(scope, headers=headers))

    def _check_key(self, scope: Scope) -> None:
        if self._keys and not self._keys.admits(scope["headers"]):
            raise Refusal(401, "invalid_api_key", "no API key, or one that this server does not know")

    def _check_place(self) -> None:
        try:
            self._admission.check()
        except Refused as refused:
            raise self._refusal(refused) from None

    def _refusal(self, refused: Refused) -> Refusal:
        if refused.reason == "draining":
            return self._draining()
        message = "the server is at its limit; try again later"
        return Refusal(429, refused.reason, message, retry_after_s=refused.retry_after_s)

    def _draining(self) -> Refusal:
        return Refusal(503, "draining", "the server is shutting down", retry_after_s=5, close=True)

    def _deadline_s(self, scope: Scope) -> float:
        text = header_of(scope, b"x-request-timeout")
        if not text:
            return self.limits.request_timeout_s
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise Refusal(400, "invalid_timeout", "X-Request-Timeout must be a number of seconds above 0")
        return min(seconds, self.limits.request_timeout_s)

    async def _read_body(self, call: Call) -> None:
        limit = self.limits.max_body_bytes
        too_large = Refusal(413, "body_too_large", f"the body is larger than {limit} bytes", close=True)
        declared = header_of(call.scope, b"content-length")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._upload_timeout_s):
                while True:
                    message = await call.raw_receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    if part := message.get("body", b""):
                        parts.append(part)
                        size += len(part)
                        self._upload_bytes += len(part)
                        if size > limit:
                            raise too_large
                        if self._upload_bytes > limit * _MAX_UPLOADS:
                            retry_after_s = self._admission.retry_after_s()
                            message_text = "too many bodies are being sent; try again later"
                            raise Refusal(429, "uploads", message_text, retry_after_s=retry_after_s, close=True)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            problem = f"the body did not arrive within {self._upload_timeout_s:g} s"
            raise Refusal(408, "body_timeout", problem, close=True) from None
        finally:
            self._upload_bytes -= size
        body = b"".join(parts)
        call.take_body(body)
        if not header_of(call.scope, b"content-type").startswith(b"multipart/"):
            _check_json(body)

    async def _readiness(self, scope: Scope) -> tuple[int, dict[str, Any]]:
        """Status and body of /ready: no drain, and an engine that says it is healthy."""
        if self._drain is not None:
            return 503, {"status": "draining"}
        if not self._started:
            return 503, {"status": "starting"}
        status = 503

        async def keep_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        await self.app(dict(scope, method="GET", path="/health", raw_path=b"/health"), nothing, keep_status)
        return (503, {"status": "engine dead"}) if status >= 500 else (200, {"status": "ready"})

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_key(scope)
            if self._drain is not None:
                raise self._draining()
        except Refusal as refusal:
            self.metrics.rejections.labels(refusal.reason).inc()
            await receive()  # the handshake
            await send({"type": "websocket.close", "code": 1008 if refusal.status == 401 else 1012})
            return
        await self.app(scope, receive, send)

    def _show_places(self, running: int, queued: int) -> None:
        self.metrics.in_flight.set(running)
        self.metrics.queued.set(queued)

    def _account(self, call: Call) -> None:
        seconds = call.now() - call.begin
        status = call.status or _CLIENT_GONE
        route = call.path if call.path in _ROUTES else "other"
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.request_s.labels(route).observe(seconds)
        level = logging.DEBUG if call.path in OPEN_PATHS and status < 400 else logging.INFO
        if _access.isEnabledFor(level):
            line = "id=%s method=%s route=%s status=%d ms=%.1f queued_ms=%.1f"
            _access.log(level, line, call.id, call.method, route, status, seconds * 1e3, call.queued_s * 1e3)

    # The server's life

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        background: list[asyncio.Task[None]] = []

        async def watched_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._start(scope, background)
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        finally:
            for task in background:
                task.cancel()

    def _start(self, scope: Scope, background: list[asyncio.Task[None]]) -> None:
        _set_up_logs()
        self._started = True
        self._server = getattr(getattr(scope.get("app"), "state", None), "server", None)
        if directory := os.environ.get("SLIMSERVE_MODEL_DIR"):
            from slimserve.serve.engine.roofline import watch_roof

            background.append(asyncio.create_task(watch_roof(directory)))
        if self._server is not None:
            # vLLM has set its handlers by now. They stop the engine first, so that every running request fails.
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self.begin_drain)

    def begin_drain(self) -> None:
        """Take nothing new, let the running finish for `drain_s`, end the server. Called again: end it at once."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_and_stop())
        else:
            _log.info("stopping at once")
            for call in list(self._calls):
                call.fail(503, "shutdown", "the server was stopped")
            self._stop_server(at_once=True)

    async def _drain_and_stop(self) -> None:
        _log.info("draining %d requests for at most %g s", len(self._calls), self.limits.drain_s)
        self._admission.close()
        await self._wait_for_calls(self.limits.drain_s)
        for call in list(self._calls):
            call.fail(503, "shutdown", f"the server is shutting down and waited {self.limits.drain_s:g} s")
        await self._wait_for_calls(2 * WIND_UP_S)
        _log.info("drained; %d requests left", len(self._calls))
        self._stop_server(at_once=False)

    async def _wait_for_calls(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while self._calls and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)

    def _stop_server(self, at_once: bool) -> None:
        if self._server is not None:
            # uvicorn would wait for ever for a client that does not read the last bytes of its answer.
            self._server.config.timeout_graceful_shutdown = _EXIT_S
            self._server.force_exit = at_once
            self._server.should_exit = True

    def abort_connection(self, scope: Scope) -> None:
        """Drop the connection of a request, with what it has not read yet; ASGI has no word for it."""
        state = getattr(self._server, "server_state", None)
        for connection in list(getattr(state, "connections", ())):
            if getattr(connection, "client", None) == scope.get("client"):
                connection.transport.abort()


def _check_json(body: bytes) -> None:
    """Raise Refusal for a body that no JSON parser behind us could read without failing in its own way."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise Refusal(400, "invalid_body", f"the body is not UTF-8 (byte {error.start})") from None
    if body.count(b"[") + body.count(b"{") > _MAX_DEPTH:
        depth = 0
        for bracket in _JSON_BRACKET.finditer(_JSON_STRING.sub(b"", body)):
            depth += 1 if bracket[0] in b"[{" else -1
            if depth > _MAX_DEPTH:
                raise Refusal(400, "invalid_body", f"the body is nested deeper than {_MAX_DEPTH} levels")
    if (b"\\ud" in body or b"\\uD" in body) and not _NO_LONE_SURROGATE.fullmatch(body):
        raise Refusal(400, "invalid_body", "the body holds half of a surrogate pair, which is no character")


def _inner_error(error: Exception, request_id: str) -> Refusal:
    """What the client hears of an exception that vLLM let through; its message is not logged, as it may quote."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _CLIENT_ERRORS or _is_from_validation(error):
        return Refusal(400, "invalid_request", f"the request could not be read ({type(error).__name__})")
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("id=%s failed with %s\n%s", request_id, type(error).__name__, frames)
    return Refusal(500, "internal_error", "the server failed; its log has the request's id")


def _is_from_validation(error: Exception) -> bool:
    """Whether it was raised while pydantic checked a body: vLLM's validators read fields of what may be a list."""
    return any(
        frame.f_globals.get("__name__") == "pydantic.type_adapter" and frame.f_code.co_name.startswith("validate_")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _set_up_logs() -> None:
    """Give our loggers a handler where nobody else has, as vLLM sets up only its own, and take uvicorn's access log's.

    Its line for a request quotes the query string, in which some client sends its key, and knows no request id.
    """
    uvicorn_access = logging.getLogger("uvicorn.access")
    uvicorn_access.handlers, uvicorn_access.propagate = [], False
    ours = logging.getLogger("slimserve")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
