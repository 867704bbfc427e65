"""Several variants behind one address: which engine a request goes to, and the answers that concern all of them.

The `model` of a request's body names a variant, or an alias that splits between several by weight, always the same
one for a `user`. GET /v1/models, /metrics, /health and /ready are answered here, out of all engines. A request without
a body (/version, /docs) goes to the default variant or the first one that is ready, as all answer it alike.
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
from slimserve.serve.gateway.messages import Answer, ProxyRequest, error_answer
from slimserve.serve.gateway.supervisor import State, SupervisedEngine
from slimserve.serve.gateway.upstream import Backend, fetch
from slimserve.serve.launch.config import Alias, Variant
from slimserve.serve.policy.errors import error_body
from slimserve.serve.policy.exposition import label_series, merge_expositions
from slimserve.serve.policy.keys import KeyRing
from slimserve.serve.policy.metrics import GatewayMetrics
from slimserve.serve.policy.routes import OPEN_PATHS

_SCRAPE_S = 3.0
_PRINTABLE_PATH = re.compile(r"[\w./-]{1,64}", re.ASCII)
_access = logging.getLogger("slimserve.access")


class _Routing(msgspec.Struct):
    """What the gateway reads of a body; the parser skips the rest without building it."""

    model: str | None = None
    user: str | None = None


_routing_of = msgspec.json.Decoder(_Routing)


class Gateway:
    """The proxy's application (serve/gateway/proxy.py)."""

    def __init__(
        self,
        variants: Sequence[Variant],
        engines: Mapping[str, SupervisedEngine],
        metrics: GatewayMetrics,
        aliases: Sequence[Alias] = (),
        default: str | None = None,
        keys: frozenset[str] = frozenset(),
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._engines = engines
        self._aliases = {alias.name: alias for alias in aliases}
        self._default = default
        self._keys = KeyRing(keys)
        self._metrics = metrics
        self._registry = registry
        self._described = {variant.name: _describe(variant) for variant in variants}
        self.is_draining = False

    # What the proxy asks

    def admit(self, request: ProxyRequest) -> Answer | None:
        path = request.path
        if path not in OPEN_PATHS:
            if self.is_draining:
                return error_answer(503, "the server is shutting down", "draining", retry_after_s=5, close=True)
            if not self._keys.accepts(request.headers):
                return error_answer(401, "no API key, or one that this server does not know", "invalid_api_key")
        if _is_local(path) and request.method not in {"GET", "HEAD"}:
            return error_answer(405, f"use GET for {path}")
        return None

    def route(self, request: ProxyRequest) -> Backend | Answer | Coroutine[Any, Any, Answer]:
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
        return error_answer(503, message, "model_unavailable", retry_after_s=engine.retry_after_s())

    def finished(self, request: ProxyRequest, status: int, seconds: float) -> None:
        variant = request.variant
        self._metrics.requests.labels(variant, str(status)).inc()
        if request.is_counted:
            self._metrics.in_flight.labels(variant).dec()
        if request.head_s is not None:
            self._metrics.upstream_header_s.labels(variant).observe(request.head_s)
        level = logging.DEBUG if request.path in OPEN_PATHS and status < 400 else logging.INFO
        if _access.isEnabledFor(level):
            route = request.path if _PRINTABLE_PATH.fullmatch(request.path) else "other"
            line = "id=%s method=%s route=%s variant=%s status=%d ms=%.1f"
            _access.log(level, line, request.id, request.method, route, variant or "-", status, seconds * 1e3)

    # Where a request goes

    def _pick_variant(self, request: ProxyRequest) -> str | Answer:
        model, user = self._default, None
        if request.body and not request.header(b"content-type").startswith(b"multipart/"):
            try:
                routing = _routing_of.decode(request.body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                return error_answer(400, f"the body cannot be read as a request in JSON: {error}"[:200], "invalid_body")
            model, user = routing.model or self._default, routing.user
        elif not request.body and model is None and request.method != "POST":
            model = next(iter(self._ready() or self._engines))
        if model is None:
            names = ", ".join((*self._engines, *self._aliases))
            return error_answer(400, f"`model` is missing; choose from {names}", "model_missing")
        if alias := self._aliases.get(model):
            return alias.pick(user, self._ready())
        if model in self._engines:
            return model
        body = error_body(404, f"The model `{model[:128]}` does not exist.", "NotFoundError", param="model")
        return Answer(404, json.dumps(body).encode())

    def _ready(self) -> frozenset[str]:
        return frozenset(name for name, engine in self._engines.items() if engine.state is State.READY)

    # What concerns all variants

    def _answer_locally(self, request: ProxyRequest) -> Answer | Coroutine[Any, Any, Answer]:
        path = request.path
        if path == "/metrics":
            return self._metrics_page()
        if path.startswith("/v1/models"):
            return self._models(request)
        is_ready = len(self._ready()) == len(self._engines) if path == "/ready" else bool(self._ready())
        is_fine = path == "/live" or (is_ready and not (path == "/ready" and self.is_draining))
        described = {name: engine.describe() for name, engine in self._engines.items()}
        status = "draining" if self.is_draining else "ready" if is_ready else "not ready"
        return Answer(200 if is_fine else 503, json.dumps({"status": status, "variants": described}).encode())

    async def _models(self, request: ProxyRequest) -> Answer:
        """vLLM's own entry of every variant, with what the manifest says of it; aliases after them."""
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
        return error_answer(404, f"The model `{wanted[:128]}` does not exist.")

    async def _model(self, name: str, credentials: Sequence[tuple[str, str]]) -> dict[str, Any]:
        engine = self._engines[name]
        entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "vllm"}
        if engine.state is State.READY:
            try:
                _, body = await fetch(engine.backend, "/v1/models", credentials, _SCRAPE_S)
                entry = next((model for model in json.loads(body)["data"] if model["id"] == name), entry)
            except (OSError, ValueError, KeyError, TypeError):
                _access.warning("variant %s did not name its models", name)
        return entry | {"slimserve": self._described[name] | {"state": engine.state.value}}

    async def _metrics_page(self) -> Answer:
        """The gateway's series and those of every engine that answers in time."""
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
    """What clients may want to know when they choose between variants."""
    facts: dict[str, Any] = {"size_bytes": disk_bytes(variant.directory)}
    if manifest := read_manifest(variant.directory):
        facts |= {
            "num_parameters": manifest.num_parameters,
            "base": manifest.base.model,
            "recipe": manifest.recipe,
        }
    return facts
