"""Routing of requests between several variants behind one address.

The field `model` of a request body names a variant, or an alias that splits its traffic between variants by weight.
An alias sends all requests of one `user` to the same variant. The gateway itself answers GET /v1/models, /metrics,
/health, /live and /ready for all engines together. A request without a body (/version, /docs) goes to the default
variant, or to the first ready one, because all variants answer it alike.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from slimserve.core.variant import disk_bytes, read_manifest
from slimserve.serve.gateway.messages import Answer, ProxyRequest, rejection_answer
from slimserve.serve.gateway.supervisor import State, SupervisedEngine
from slimserve.serve.gateway.upstream import Backend, fetch
from slimserve.serve.launch.config import Alias, Variant
from slimserve.serve.policy.access_log import log_request
from slimserve.serve.policy.cors import CorsRules, is_preflight
from slimserve.serve.policy.errors import Rejection, draining, error_body, no_such_route, wrong_method
from slimserve.serve.policy.exposition import label_series, merge_expositions
from slimserve.serve.policy.keys import KeyRing
from slimserve.serve.policy.metrics import GatewayMetrics
from slimserve.serve.policy.routes import CLOSED_PATHS, OPEN_PATHS, is_known

_SCRAPE_S = 3.0
_PRINTABLE_PATH = re.compile(r"[\w./-]{1,64}", re.ASCII)
_log = logging.getLogger("slimserve.gateway")


class _Routing(msgspec.Struct):
    """Fields of a request body that decide its route; the parser skips all others."""

    model: str | None = None
    user: str | None = None


_routing_of = msgspec.json.Decoder(_Routing)


class Gateway:
    """Application of the proxy: it routes requests to engines and answers those that concern all variants."""

    def __init__(
        self,
        variants: Sequence[Variant],
        engines: Mapping[str, SupervisedEngine],
        metrics: GatewayMetrics,
        aliases: Sequence[Alias] = (),
        default: str | None = None,
        keys: frozenset[str] = frozenset(),
        registry: CollectorRegistry = REGISTRY,
        cors: CorsRules | None = None,
    ) -> None:
        self._engines = engines
        self._aliases = {alias.name: alias for alias in aliases}
        self._default = default
        self._keys = KeyRing(keys)
        self._metrics = metrics
        self._registry = registry
        self.cors = cors or CorsRules()
        self._facts = {variant.name: _describe(variant) for variant in variants}
        self.is_draining = False

    # Calls of the proxy

    def admit(self, request: ProxyRequest) -> None:
        path = request.path
        if is_preflight(request.method, request.headers):
            return
        if path not in OPEN_PATHS:
            if self.is_draining:
                raise draining()
            self._keys.check(request.headers)
        if _is_local(path) and request.method not in {"GET", "HEAD"}:
            raise wrong_method("GET, HEAD")
        if path in CLOSED_PATHS:
            raise no_such_route()

    def route(self, request: ProxyRequest) -> Backend | Answer | Coroutine[Any, Any, Answer]:
        if is_preflight(request.method, request.headers):
            status, headers, body = self.cors.preflight(request.headers)
            return Answer(status, body, "text/plain; charset=utf-8", tuple(headers))
        if _is_local(request.path):
            return self._answer_locally(request)
        picked = self._pick_variant(request)
        if isinstance(picked, Answer):
            return picked
        request.variant = picked
        engine = self._engines[picked]
        if engine.state is not State.READY:
            return self.unreachable(request)
        self._metrics.in_flight.labels(picked).inc()
        request.is_counted = True
        return engine.backend

    def unreachable(self, request: ProxyRequest) -> Answer:
        engine = self._engines[request.variant]
        message = f"The model `{request.variant}` is {engine.state.value} and does not answer now."
        return rejection_answer(Rejection(503, "model_unavailable", message, retry_after_s=engine.retry_after_s()))

    def finished(self, request: ProxyRequest, status: int, seconds: float) -> None:
        variant = request.variant
        self._metrics.requests.labels(variant, str(status)).inc()
        if request.is_counted:
            self._metrics.in_flight.labels(variant).dec()
        if request.head_s is not None:
            self._metrics.upstream_header_s.labels(variant).observe(request.head_s)
        route = request.path if _PRINTABLE_PATH.fullmatch(request.path) else "other"
        log_request(request.id, request.method, request.path, route, status, seconds, variant=variant or "-")

    # Choice of the variant

    def _pick_variant(self, request: ProxyRequest) -> str | Answer:
        model, user = self._default, None
        if request.body and not request.header(b"content-type").startswith(b"multipart/"):
            try:
                routing = _routing_of.decode(request.body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                message = f"the body is not a request in JSON: {error}"[:200]
                return rejection_answer(Rejection(400, "invalid_body", message))
            model, user = routing.model or self._default, routing.user
        elif not request.body and model is None and request.method != "POST":
            model = next(iter(self._ready() or self._engines))
        if model is None and not is_known(request.path):
            return rejection_answer(no_such_route())
        if model is None:
            names = ", ".join((*self._engines, *self._aliases))
            return rejection_answer(Rejection(400, "model_missing", f"`model` is missing; choose from {names}"))
        if alias := self._aliases.get(model):
            return alias.pick(user, self._ready())
        if model in self._engines:
            return model
        body = error_body(404, f"The model `{model[:128]}` does not exist.", "NotFoundError", param="model")
        return Answer(404, json.dumps(body).encode())

    def _ready(self) -> frozenset[str]:
        return frozenset(name for name, engine in self._engines.items() if engine.state is State.READY)

    # Answers for all variants together

    def _answer_locally(self, request: ProxyRequest) -> Answer | Coroutine[Any, Any, Answer]:
        path = request.path
        if path == "/metrics":
            return self._metrics_page()
        if path.startswith("/v1/models"):
            return self._models(request)
        is_ready = len(self._ready()) == len(self._engines) if path == "/ready" else bool(self._ready())
        is_ok = path == "/live" or (is_ready and not (path == "/ready" and self.is_draining))
        described = {name: engine.describe() for name, engine in self._engines.items()}
        status = "draining" if self.is_draining else "ready" if is_ready else "not ready"
        return Answer(200 if is_ok else 503, json.dumps({"status": status, "variants": described}).encode())

    async def _models(self, request: ProxyRequest) -> Answer:
        """Return vLLM's entry of every variant with facts from its manifest, followed by the aliases."""
        credentials = [
            (name.decode(), value.decode("latin-1"))
            for name, value in request.headers
            if name in {b"authorization", b"x-api-key"}
        ]
        entries = list(await asyncio.gather(*(self._model(name, credentials) for name in self._engines)))
        for alias in self._aliases.values():
            entry = {"id": alias.name, "object": "model", "created": 0, "owned_by": "slimserve"}
            entries.append(entry | {"slimserve": {"alias_of": dict(alias.shares)}})
        wanted = request.path.removeprefix("/v1/models").removeprefix("/")
        if not wanted:
            return Answer(200, json.dumps({"object": "list", "data": entries}).encode())
        for entry in entries:
            if entry["id"] == wanted:
                return Answer(200, json.dumps(entry).encode())
        return rejection_answer(Rejection(404, None, f"The model `{wanted[:128]}` does not exist."))

    async def _model(self, name: str, credentials: Sequence[tuple[str, str]]) -> dict[str, Any]:
        engine = self._engines[name]
        entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "vllm"}
        if engine.state is State.READY:
            try:
                _, body = await fetch(engine.backend, "/v1/models", credentials, _SCRAPE_S)
                entry = next((model for model in json.loads(body)["data"] if model["id"] == name), entry)
            except (OSError, ValueError, KeyError, TypeError):
                _log.warning("variant %s did not list its models", name)
        return entry | {"slimserve": self._facts[name] | {"state": engine.state.value}}

    async def _metrics_page(self) -> Answer:
        """Return the gateway's metrics and those of every engine that answers in time."""
        pages = await asyncio.gather(*(self._scrape(name) for name in self._engines))
        own = generate_latest(self._registry).decode()
        page = await asyncio.to_thread(merge_expositions, [own, *pages])
        return Answer(200, page.encode(), content_type=CONTENT_TYPE_LATEST)

    async def _scrape(self, name: str) -> str:
        engine = self._engines[name]
        if engine.state is not State.READY:
            return ""
        try:
            status, body = await fetch(engine.backend, "/metrics", timeout_s=_SCRAPE_S)
        except OSError:
            return ""
        return await asyncio.to_thread(label_series, body.decode("utf-8", "replace"), name) if status == 200 else ""


def _is_local(path: str) -> bool:
    return path in OPEN_PATHS or path == "/v1/models" or path.startswith("/v1/models/")


def _describe(variant: Variant) -> dict[str, Any]:
    """Return facts that help clients to choose between variants."""
    facts: dict[str, Any] = {"size_bytes": disk_bytes(variant.directory)}
    if manifest := read_manifest(variant.directory):
        facts |= {
            "num_parameters": manifest.num_parameters,
            "base": manifest.base.model,
            "recipe": manifest.recipe,
        }
    return facts
