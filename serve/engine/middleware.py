"""Middlewares between the network and vLLM's app, inside the engine's server process.

vLLM adds them with `--middleware slimserve.serve.engine.middleware.RequestMiddleware`, outside of its own. Each class
has one job and passes the request's context on to the next handler; RequestMiddleware builds the chain. Every error
is an OpenAI error object with the request's id. No log line has a key, a header or a part of a body.
"""

from __future__ import annotations

import asyncio
import logging
import os
import traceback
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from slimserve.serve.engine.json_body import check_json_body
from slimserve.serve.engine.lifecycle import Lifecycle
from slimserve.serve.engine.request_context import RequestContext
from slimserve.serve.policy.access_log import CLIENT_CLOSED_REQUEST, log_request
from slimserve.serve.policy.admission import Admission
from slimserve.serve.policy.cors import CorsRules
from slimserve.serve.policy.errors import ClientDisconnected, Rejection, no_such_route, wrong_method
from slimserve.serve.policy.keys import KeyRing, load_api_keys
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import RequestMetrics, request_metrics
from slimserve.serve.policy.request_id import HEADER
from slimserve.serve.policy.routes import BODY_METHODS, CLOSED_PATHS, OPEN_PATHS, is_inference, route_label
from slimserve.serve.policy.timeouts import BODY_TIMEOUT_S, STALL_TIMEOUT_S, request_timeout_s
from slimserve.serve.policy.uploads import Upload, UploadLimits

_CLIENT_ERRORS = frozenset({"RecursionError", "TemplateError", "UnicodeDecodeError", "UnicodeEncodeError"})
"""Exception classes, or their bases, that only a bad request causes; vLLM answers some of them with 500."""
_log = logging.getLogger("slimserve.middleware")

Handler = Callable[[RequestContext], Awaitable[None]]


class RequestMiddleware:
    """The ASGI middleware that vLLM loads: the chain of all middlewares below.

    Limits and keys come from the environment (serve/policy) unless they are passed. The order is: access log,
    errors, API key, probes, drain, deadline, overload check, body, slot, vLLM.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits | None = None,
        keys: frozenset[str] | None = None,
        metrics: RequestMetrics | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        upload_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        limits = limits or Limits.from_environment()
        self._app = app
        self._keys = KeyRing(load_api_keys() if keys is None else keys)
        self._cors = CorsRules.of_app(app)
        self._stall_timeout_s = stall_timeout_s
        self.metrics = metrics or request_metrics()
        admission = Admission(limits, self._show_slots)
        self.uploads = UploadLimits(limits.max_body_bytes, admission.retry_after_s)
        self.lifecycle = Lifecycle(app, admission, limits.drain_s)
        handler: Handler = EngineHandler(app, os.environ.get("VLLM_API_KEY", "") if self._keys else "")
        handler = AdmissionMiddleware(handler, admission, self.metrics)
        handler = BodyMiddleware(handler, self.uploads, upload_timeout_s)
        handler = OverloadMiddleware(handler, admission)
        handler = DeadlineMiddleware(handler, limits.request_timeout_s)
        handler = DrainMiddleware(handler, self.lifecycle)
        handler = ProbeMiddleware(handler, app, self.lifecycle)
        handler = AuthMiddleware(handler, self._keys)
        handler = ErrorMiddleware(handler, self.metrics)
        self._handler: Handler = AccessLogMiddleware(handler, self.metrics, self.lifecycle)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection: a request, a WebSocket or the lifespan."""
        if scope["type"] == "lifespan":
            await self.lifecycle.run_lifespan(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            context = RequestContext(
                scope,
                receive,
                send,
                metrics=self.metrics,
                connections=self.lifecycle,
                stall_timeout_s=self._stall_timeout_s,
                cors=self._cors,
            )
            await self._handler(context)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._keys.check(scope["headers"])
            self.lifecycle.check_draining()
        except Rejection as rejection:
            self.metrics.rejections.labels(rejection.code).inc()
            await receive()  # the handshake
            await send({"type": "websocket.close", "code": 1008 if rejection.status == 401 else 1012})
            return
        await self._app(scope, receive, send)

    def _show_slots(self, num_running: int, num_queued: int) -> None:
        self.metrics.in_flight.set(num_running)
        self.metrics.queued.set(num_queued)


class AccessLogMiddleware:
    """Count every request, write its log line, and keep it among those in flight."""

    def __init__(self, handler: Handler, metrics: RequestMetrics, lifecycle: Lifecycle) -> None:
        self._handler = handler
        self._metrics = metrics
        self._in_flight = lifecycle.in_flight

    async def __call__(self, context: RequestContext) -> None:
        self._in_flight.add(context)
        try:
            await self._handler(context)
        finally:
            self._in_flight.discard(context)
            context.close()
            duration_s = context.now() - context.started_at
            status = context.status or CLIENT_CLOSED_REQUEST
            route = route_label(context.path)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_s.labels(route).observe(duration_s)
            queue_ms = f"{context.queue_s * 1e3:.1f}"
            log_request(context.id, context.method, context.path, route, status, duration_s, queue_ms=queue_ms)


class ErrorMiddleware:
    """Turn rejections, interruptions and exceptions into error answers."""

    def __init__(self, handler: Handler, metrics: RequestMetrics) -> None:
        self._handler = handler
        self._metrics = metrics

    async def __call__(self, context: RequestContext) -> None:
        try:
            await self._handler(context)
        except Rejection as rejection:
            self._metrics.rejections.labels(rejection.code).inc()
            await context.reject(rejection)
        except ClientDisconnected:
            pass
        except asyncio.CancelledError:
            if not context.was_cancelled:
                raise
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
        except Exception as error:
            if context.interruption is None:
                await context.reject(_rejection_of(error, context.id))
        finally:
            if context.interruption is not None:
                await context.send_interruption()


class AuthMiddleware:
    """Require an API key on all but the open paths, and hide vLLM's administration; CORS preflights need no key."""

    def __init__(self, handler: Handler, keys: KeyRing) -> None:
        self._handler = handler
        self._keys = keys

    async def __call__(self, context: RequestContext) -> None:
        if not context.is_preflight:
            if context.path not in OPEN_PATHS:
                self._keys.check(context.scope["headers"])
            if context.path in CLOSED_PATHS:
                raise no_such_route()
        await self._handler(context)


class ProbeMiddleware:
    """Answer liveness and readiness; preflights and the other open paths skip the rest of the chain."""

    def __init__(self, handler: Handler, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._handler = handler
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, context: RequestContext) -> None:
        if context.is_preflight:
            await self._app(context.scope, context.receive, context.send)
        elif context.path in {"/live", "/ready"} and context.method not in {"GET", "HEAD"}:
            raise wrong_method("GET, HEAD")
        elif context.path == "/live":
            await context.answer(200, {"status": "live"})
        elif context.path == "/ready":
            await context.answer(*await self._lifecycle.readiness(context.scope))
        elif context.path in OPEN_PATHS and context.method in {"GET", "HEAD"}:
            # vLLM's own routes do not take HEAD; the server leaves out the body.
            await self._app(dict(context.scope, method="GET"), context.receive, context.send)
        else:
            await self._handler(context)


class DrainMiddleware:
    """Reject requests while the server shuts down."""

    def __init__(self, handler: Handler, lifecycle: Lifecycle) -> None:
        self._handler = handler
        self._lifecycle = lifecycle

    async def __call__(self, context: RequestContext) -> None:
        self._lifecycle.check_draining()
        await self._handler(context)


class DeadlineMiddleware:
    """Interrupt a request at its deadline: the limit, or the client's `X-Request-Timeout` if that is shorter."""

    def __init__(self, handler: Handler, max_s: float) -> None:
        self._handler = handler
        self._max_s = max_s

    async def __call__(self, context: RequestContext) -> None:
        context.set_deadline(request_timeout_s(context.header(b"x-request-timeout"), self._max_s))
        await self._handler(context)


class OverloadMiddleware:
    """Reject inference requests before their body is read if the queue is full."""

    def __init__(self, handler: Handler, admission: Admission) -> None:
        self._handler = handler
        self._admission = admission

    async def __call__(self, context: RequestContext) -> None:
        if is_inference(context.method, context.path):
            self._admission.check()
        await self._handler(context)


class BodyMiddleware:
    """Read the complete body within the size and time limits and check its JSON."""

    def __init__(self, handler: Handler, uploads: UploadLimits, timeout_s: float) -> None:
        self._handler = handler
        self._uploads = uploads
        self._timeout_s = timeout_s

    async def __call__(self, context: RequestContext) -> None:
        if context.method in BODY_METHODS:
            body = await self._read(context)
            context.set_body(body)
            if not context.header(b"content-type").startswith(b"multipart/"):
                check_json_body(body)
        await self._handler(context)

    async def _read(self, context: RequestContext) -> bytes:
        self._uploads.check_content_length(context.header(b"content-length"))
        upload = Upload(self._uploads)
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await context.raw_receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    if part := message.get("body", b""):
                        upload.add(part)
                    if not message.get("more_body", False):
                        return upload.body()
        except TimeoutError:
            problem = f"the body did not arrive within {self._timeout_s:g} s"
            raise Rejection(408, "body_timeout", problem, close=True) from None
        finally:
            upload.close()


class AdmissionMiddleware:
    """Wait for a slot in the engine before an inference request runs, and return it afterwards."""

    def __init__(self, handler: Handler, admission: Admission, metrics: RequestMetrics) -> None:
        self._handler = handler
        self._admission = admission
        self._metrics = metrics

    async def __call__(self, context: RequestContext) -> None:
        if not is_inference(context.method, context.path):
            await self._handler(context)
            return
        queued_at = context.now()
        await self._admission.acquire(context.disconnected)
        admitted_at = context.now()
        context.queue_s = admitted_at - queued_at
        self._metrics.queue_s.observe(context.queue_s)
        try:
            await self._handler(context)
        finally:
            self._admission.release(context.now() - admitted_at)


class EngineHandler:
    """Pass the request to vLLM with its id, and with vLLM's own key if `vllm_key` is not empty.

    vLLM knows a single key, and the client may have sent another one of the server's keys.
    """

    def __init__(self, app: ASGIApp, vllm_key: str) -> None:
        self._app = app
        self._replaced = {HEADER, b"authorization"} if vllm_key else {HEADER}
        self._added = [(b"authorization", b"Bearer " + vllm_key.encode())] if vllm_key else []

    async def __call__(self, context: RequestContext) -> None:
        headers = [header for header in context.scope["headers"] if header[0] not in self._replaced]
        headers += [(HEADER, context.id.encode()), *self._added]
        await context.run(self._app, dict(context.scope, headers=headers))


def _rejection_of(error: Exception, request_id: str) -> Rejection:
    """Return the answer to an exception that vLLM did not handle; its message is not logged, as it may quote a body."""
    names = {base.__name__ for base in type(error).__mro__}
    if names & _CLIENT_ERRORS or _is_from_validation(error):
        return Rejection(400, "invalid_request", f"the request could not be read ({type(error).__name__})")
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("request_id=%s failed with %s\n%s", request_id, type(error).__name__, frames)
    return Rejection(500, "internal_error", "the server failed; look for the request's id in its log")


def _is_from_validation(error: Exception) -> bool:
    """Return whether pydantic was validating a body: vLLM's validators read fields of what may be a list."""
    return any(
        frame.f_globals.get("__name__") == "pydantic.type_adapter" and frame.f_code.co_name.startswith("validate_")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
