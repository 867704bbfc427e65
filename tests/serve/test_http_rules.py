"""One set of HTTP rules: a single engine and a gateway answer alike, also to browsers, proxies and HTTP/1.0."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httptools
import httpx
import pytest

from slimserve.core.errors import UserError
from slimserve.serve.policy.cors import CorsRules, is_preflight
from tests.conftest import measures_time
from tests.serve.fake_engine import Message
from tests.serve.http_servers import EVENTS, KEY, MAX_BODY, Servers, running

PAGE = "https://page.example"
BEARER = {"Authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"
ASK = {"model": "a", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
CLIENT = httpx.Client(timeout=20)
BOTH = pytest.mark.parametrize("kind", ["single", "gateway"])


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running(["*"], tmp_path_factory.mktemp("model")) as all_servers:
        yield all_servers


@pytest.fixture(scope="module")
def strict_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running([PAGE, "null"], tmp_path_factory.mktemp("model")) as all_servers:
        yield all_servers


@dataclass
class Sent:
    """One request."""

    method: str
    path: str
    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=lambda: dict(BEARER))
    code: str | int | None = None
    """Code in the error object; None if the answer is no error."""

    @property
    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return b"" if self.body is None else json.dumps(self.body).encode()


def ask(port: int, sent: Sent, **more: str) -> httpx.Response:
    url = f"http://127.0.0.1:{port}{sent.path}"
    return CLIENT.request(sent.method, url, content=sent.content, headers=sent.headers | more)


REQUESTS = {
    "a chat": Sent("POST", CHAT, 200, ASK),
    "the models": Sent("GET", "/v1/models", 200),
    "a probe": Sent("GET", "/live", 200, headers={}),
    "a probe for its head": Sent("HEAD", "/health", 200, headers={}),
    "no key": Sent("POST", CHAT, 401, ASK, {}, "invalid_api_key"),
    "a wrong key": Sent("GET", "/v1/models", 401, None, {"Authorization": "Bearer x"}, "invalid_api_key"),
    "no key for an unknown route": Sent("GET", "/v1/nothing", 401, None, {}, "invalid_api_key"),
    "an unknown route": Sent("GET", "/v1/nothing", 404, code="not_found"),
    "an unknown route of POST": Sent("POST", "/v1/nothing", 404, {"prompt": "x"}, code="not_found"),
    "an unknown route with a model": Sent("POST", "/v1/nothing", 404, ASK, code="not_found"),
    "an unknown route of DELETE": Sent("DELETE", "/v1/files/3", 404, code="not_found"),
    "the root": Sent("GET", "/", 404, code="not_found"),
    "a closed route": Sent("POST", "/scale_elastic_ep", 404, {"model": "a"}, code="not_found"),
    "GET for a chat": Sent("GET", CHAT, 405, code="method_not_allowed"),
    "DELETE for a chat": Sent("DELETE", CHAT, 405, {"model": "a"}, code="method_not_allowed"),
    "POST for a probe": Sent("POST", "/ready", 405, {"model": "a"}, {}, "method_not_allowed"),
    "OPTIONS that is no preflight": Sent("OPTIONS", CHAT, 401, None, {}, "invalid_api_key"),
    "too long a body": Sent("POST", CHAT, 413, {"model": "a", "messages": "x" * MAX_BODY}, code="body_too_large"),
    "a body that is too deep": Sent("POST", CHAT, 400, b'{"model":' + b"[" * 500, code="invalid_body"),
    "no UTF-8": Sent("POST", CHAT, 400, b'{"model": "a\xff"}', code="invalid_body"),
}


@BOTH
@pytest.mark.parametrize("name", REQUESTS)
def test_both_servers_answer_alike_and_every_page_can_read_it(kind: str, name: str, servers: Servers) -> None:
    sent = REQUESTS[name]
    answer = ask(servers.port(kind), sent, Origin=PAGE)
    assert answer.status_code == sent.status, answer.text
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["x-request-id"]
    if sent.code is not None:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == sent.code, error
    if sent.status == 405:
        assert answer.headers["allow"]
    plain = ask(servers.port(kind), sent)
    assert "access-control-allow-origin" not in plain.headers


@BOTH
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/rerank", "/live", "/metrics", "/v1/nothing"])
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_a_preflight_needs_no_key(kind: str, path: str, method: str, servers: Servers) -> None:
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,content-type"}
    answer = ask(servers.port(kind), Sent("OPTIONS", path, 200, None, {"Origin": PAGE} | asked))
    assert answer.status_code == 200, answer.text
    assert answer.headers["access-control-allow-origin"] == "*"
    assert method in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"


@BOTH
@pytest.mark.parametrize(("origin", "is_allowed"), [(PAGE, True), ("null", True), ("https://other.example", False)])
def test_only_the_allowed_origins_can_call_and_read(
    kind: str, origin: str, is_allowed: bool, strict_servers: Servers
) -> None:
    port = strict_servers.port(kind)
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = ask(port, Sent("OPTIONS", CHAT, 200, None, preflight))
    assert answer.status_code == (200 if is_allowed else 400)
    for name in ("a chat", "no key", "an unknown route", "the models", "a probe"):
        answer = ask(port, REQUESTS[name], Origin=origin)
        assert answer.status_code == REQUESTS[name].status
        assert answer.headers.get("access-control-allow-origin") == (origin if is_allowed else None)
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    ("arguments", "allowed", "refused"),
    [
        ([], PAGE, None),
        (["--allowed-origins", f'["{PAGE}"]'], PAGE, "https://other.example"),
        ([f'--allowed-origins=["{PAGE}"]', "--enforce-eager"], PAGE, "https://other.example"),
        (["--allowed_origins", f'["{PAGE}"]', "--max-model-len", "64"], PAGE, "https://other.example"),
        (["--allow-credentials"], PAGE, None),
    ],
)
def test_the_gateway_reads_vllms_arguments(arguments: list[str], allowed: str, refused: str | None) -> None:
    rules = CorsRules.of_arguments([arguments, arguments])
    headers = dict(rules.answer_headers([(b"origin", allowed.encode())]))
    assert {name.lower(): value for name, value in headers.items()}["access-control-allow-origin"] in {allowed, "*"}
    if refused:
        headers = dict(rules.answer_headers([(b"origin", refused.encode())]))
        assert "access-control-allow-origin" not in {name.lower() for name in headers}
    assert rules.answer_headers([(b"host", b"x")]) == []


@pytest.mark.parametrize(
    "arguments_of", [[[], ["--allowed-origins", '["x"]']], [["--allowed-origins", "x"]], [["--allowed-origins", "3"]]]
)
def test_rules_that_differ_or_cannot_be_read_are_refused(arguments_of: list[list[str]]) -> None:
    with pytest.raises(UserError, match="--allowed-origins"):
        CorsRules.of_arguments(arguments_of)


def test_only_the_questions_of_browsers_are_preflights() -> None:
    headers = [(b"origin", b"x"), (b"access-control-request-method", b"POST")]
    assert is_preflight("OPTIONS", headers)
    assert not is_preflight("GET", headers)
    assert not is_preflight("OPTIONS", headers[:1])
    assert not is_preflight("OPTIONS", headers[1:])


# HTTP/1.0, as nginx speaks it to its upstreams by default


def ask_1_0(port: int, sent: Sent, first_headers: str = "Host: upstream\r\nConnection: close\r\n") -> Message:
    """Send a request in HTTP/1.0 and read until the server closes the connection."""
    body = sent.content
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    head = f"{sent.method} {sent.path} HTTP/1.0\r\n{first_headers}{lines}{length}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while data := connection.recv(65536):
            received += data
    message = Message()
    parser = httptools.HttpResponseParser(message)
    head_end = received.index(b"\r\n\r\n") + 4
    assert b"transfer-encoding" not in received[:head_end].lower()
    parser.feed_data(received[:head_end])
    message.status, message.parts = parser.get_status_code(), [received[head_end:]]
    return message


@BOTH
@pytest.mark.parametrize("name", REQUESTS)
def test_http_1_0_gets_the_same_answers(kind: str, name: str, servers: Servers) -> None:
    sent = REQUESTS[name]
    answer = ask_1_0(servers.port(kind), sent)
    assert answer.status == sent.status
    if sent.method == "HEAD":
        assert answer.body == b""
        return
    assert len(answer.body) == int(answer.header("content-length") or -1)
    if sent.code is not None:
        assert answer.json()["error"]["code"] == sent.code


@BOTH
@pytest.mark.parametrize("headers", ["", "Host: x\r\n", "Host: x\r\nConnection: keep-alive\r\n"])
def test_http_1_0_gets_a_stream_without_chunks(kind: str, headers: str, servers: Servers) -> None:
    answer = ask_1_0(servers.port(kind), Sent("POST", CHAT, 200, ASK | {"stream": True}), headers)
    assert answer.status == 200
    assert answer.body.decode() == "".join(f"data: {event}\n\n" for event in [*EVENTS, "[DONE]"])
    assert answer.header("x-accel-buffering") == "no"


@BOTH
def test_http_1_0_gets_each_event_at_once(kind: str, servers: Servers) -> None:
    servers.goes_on.clear()
    body = json.dumps(ASK | {"stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", servers.port(kind)), timeout=5) as connection:
        connection.sendall(head + body)
        received = b""
        while EVENTS[0].encode() not in received:
            received += connection.recv(65536)
        assert EVENTS[1].encode() not in received
        servers.goes_on.set()
        while data := connection.recv(65536):
            received += data
    assert received.endswith(b"data: [DONE]\n\n")


@measures_time
@BOTH
@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0"])
def test_other_versions_are_refused(kind: str, version: str, servers: Servers) -> None:
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", servers.port(kind)), timeout=20) as connection:
        connection.sendall(f"GET /v1/models HTTP/{version}\r\nHost: x\r\n\r\n".encode())
        assert int(connection.recv(65536).split()[1]) >= 400
    assert time.monotonic() - begin < 10
