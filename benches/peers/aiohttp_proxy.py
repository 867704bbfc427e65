"""A streaming proxy on aiohttp: the simplest alternative to slimserve's own gateway, measured by `make bench-gateway`.

    python -m benches.peers.aiohttp_proxy PORT NAME=ENGINE_PORT ...

It does what a gateway of several models needs, with aiohttp's own server and client:

- The field `model` of the JSON body selects the engine.
- The proxy forwards each chunk of a response as soon as it arrives.
- A client's disconnection cancels the request to the engine.
- Connections to engines are pooled and kept open.
- Errors are JSON in the format of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from typing import Any

import aiohttp
import msgspec
import uvloop
from aiohttp import web

MAX_BODY_BYTES = 8 * 2**20
REQUEST_TIMEOUT_S = 330.0
DRAIN_S = 30.0
IDLE_ENGINE_CONNECTION_S = 2.0
"""vLLM closes an idle connection after 5 s; a shorter time avoids sending a request into a closing connection."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOP_BY_HOP = frozenset(
    {"connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)


class RoutingFields(msgspec.Struct):
    """The part of a request body that selects an engine."""

    model: str


_decoder = msgspec.json.Decoder(RoutingFields)


class Proxy:
    """Forward each request to the engine that serves its model."""

    def __init__(self, engine_urls: dict[str, str]) -> None:
        self._engine_urls = engine_urls
        self._session: aiohttp.ClientSession
        self.num_in_flight = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.cleanup_ctx.append(self._open_session)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/{path:.*}", self.forward)
        return app

    async def _open_session(self, _app: web.Application) -> Any:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_ENGINE_CONNECTION_S)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=5.0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as self._session:
            yield

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ready", "in_flight": self.num_in_flight})

    async def models(self, _request: web.Request) -> web.Response:
        entries = [{"id": name, "object": "model"} for name in self._engine_urls]
        return web.json_response({"object": "list", "data": entries})

    async def forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        try:
            model = _decoder.decode(body).model
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return error_response(400, f"The body is not a request in JSON: {error}", "invalid_body")
        url = self._engine_urls.get(model)
        if url is None:
            return error_response(404, f"The model `{model[:128]}` does not exist.", "model_not_found")
        client_id = request.headers.get("X-Request-Id", "")
        request_id = client_id if _REQUEST_ID.fullmatch(client_id) else os.urandom(16).hex()
        headers = end_to_end(request.headers) | {"X-Request-Id": request_id}
        self.num_in_flight += 1
        try:
            async with self._session.post(url + request.path_qs, data=body, headers=headers) as answer:
                return await stream_answer(request, answer, request_id)
        except aiohttp.ClientConnectorError:
            return error_response(503, f"The model `{model}` does not answer.", "model_unavailable")
        except aiohttp.ClientError as error:
            return error_response(502, f"The engine stopped answering: {error}", "engine_lost")
        finally:
            self.num_in_flight -= 1


async def stream_answer(request: web.Request, answer: aiohttp.ClientResponse, request_id: str) -> web.StreamResponse:
    """Forward an engine's response chunk by chunk; send an error event if the engine dies during a stream."""
    headers = end_to_end(answer.headers) | {"X-Request-Id": request_id}
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
    response.content_length = answer.content_length
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except aiohttp.ClientError:
        if answer.content_type != "text/event-stream":
            raise
        event = json.dumps(error_body("The engine stopped answering.", "engine_lost"))
        await response.write(f"\n\ndata: {event}\n\ndata: [DONE]\n\n".encode())
    await response.write_eof()
    return response


def end_to_end(headers: Any) -> dict[str, str]:
    """Return the headers that a proxy forwards, without the hop-by-hop headers of RFC 9110."""
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


def error_body(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def error_response(status: int, message: str, code: str) -> web.Response:
    return web.json_response(error_body(message, code), status=status)


async def main(port: int, engines: list[str]) -> None:
    """Serve until the process ends."""
    engine_urls = {name: f"http://127.0.0.1:{engine_port}" for name, engine_port in (e.split("=") for e in engines)}
    # handler_cancellation stops the engine's work when the client disconnects.
    runner = web.AppRunner(
        Proxy(engine_urls).application(), access_log=None, handler_cancellation=True, shutdown_timeout=DRAIN_S
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=2048).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2:]))
