"""The API behind Debian's nginx with its defaults, called by a page of another origin in Chromium."""

from __future__ import annotations

import contextlib
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from slimserve.serve.launch.process import free_port
from tests.serve.http_servers import EVENTS, KEY, Servers, running

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(not NGINX, reason="needs Debian's nginx, which `make test` installs")
BOTH = pytest.mark.parametrize("kind", ["single", "gateway"])
CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SITE = """
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
        }}
    }}
"""
CONFIG = """
{user}
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{sites}
}}
"""
"""Nothing but folders and addresses: the rest is nginx's defaults, such as HTTP/1.0 and buffers towards upstreams."""


class Proxied:
    """nginx in front of both servers."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.single, self.gateway = free_port(), free_port()

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{getattr(self, kind)}"


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    folder = tmp_path_factory.mktemp("nginx")
    with running(["*"], folder) as servers:
        proxied = Proxied(servers)
        kinds = ("single", "gateway")
        sites = "".join(SITE.format(port=getattr(proxied, kind), upstream=servers.port(kind)) for kind in kinds)
        # Started by root, nginx would read and write as a user that cannot enter pytest's folders.
        user = "user root;" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, sites=sites, user=user))
        process = subprocess.Popen([str(NGINX), "-c", folder / "nginx.conf", "-e", folder / "error.log"])
        try:
            for kind in kinds:
                _wait_for(proxied.url(kind) + "/live")
            yield proxied
        finally:
            process.terminate()
            process.wait(20)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@BOTH
def test_openais_client_works_through_nginx(nginx: Proxied, kind: str) -> None:
    client = openai.OpenAI(base_url=f"{nginx.url(kind)}/v1", api_key=KEY, max_retries=0)
    assert "a" in [model.id for model in client.models.list()]
    answer = client.chat.completions.create(model="a", messages=QUESTION)
    assert answer.choices[0].message.content == "Paris"
    stream = client.chat.completions.create(model="a", messages=QUESTION, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Paris é 🙂"
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", cast_to=object, body={"model": "a"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="x").models.list()


@BOTH
def test_nginx_passes_each_event_on_at_once(nginx: Proxied, kind: str) -> None:
    nginx.servers.goes_on.clear()
    body = {"model": "a", "messages": QUESTION, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", nginx.url(kind) + CHAT, json=body, headers=headers, timeout=5) as answer:
        pieces = answer.iter_text()
        received = ""
        while EVENTS[0] not in received:
            received += next(pieces)
        assert EVENTS[1] not in received
        nginx.servers.goes_on.set()
        received += "".join(pieces)
    assert received.endswith("data: [DONE]\n\n")


PAGE = """<!doctype html><title>page</title><pre id="out"></pre><script>
const ask = async (base, path, key, body) => {
    const headers = {"Content-Type": "application/json", "X-Request-Id": "page-1"};
    if (key) headers.Authorization = `Bearer ${key}`;
    try {
        const method = body ? "POST" : "GET";
        const answer = await fetch(base + path, {method, headers, body: body && JSON.stringify(body)});
        return {status: answer.status, text: await answer.text()};
    } catch (error) {
        return {failed: String(error)};
    }
};
const run = async () => {
    const results = {};
    for (const [name, base] of Object.entries(BASES)) {
        const chat = {model: "a", messages: [{role: "user", content: "x"}]};
        results[name] = {
            models: await ask(base, "/v1/models", KEY),
            chat: await ask(base, CHAT, KEY, chat),
            stream: await ask(base, CHAT, KEY, {...chat, stream: true}),
            wrong_key: await ask(base, CHAT, "x", chat),
            no_key: await ask(base, "/v1/models", ""),
            unknown_route: await ask(base, "/v1/nothing", KEY, chat),
            wrong_method: await ask(base, CHAT, KEY),
            too_long: await ask(base, CHAT, KEY, {...chat, user: "x".repeat(20000)}),
        };
    }
    document.getElementById("out").textContent = JSON.stringify(results);
};
run();
</script>"""
EXPECTED = {
    "models": 200,
    "chat": 200,
    "stream": 200,
    "wrong_key": 401,
    "no_key": 401,
    "unknown_route": 404,
    "wrong_method": 405,
    "too_long": 413,
}


@pytest.fixture(scope="module")
def called_by_page(nginx: Proxied, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what a page of another origin gets from both servers, each directly and behind nginx."""
    if not shutil.which("chromium"):
        pytest.skip("needs Debian's chromium, which `make test` installs")
    folder = tmp_path_factory.mktemp("page")
    bases = {f"{kind} behind nginx": nginx.url(kind) for kind in ("single", "gateway")}
    bases |= {kind: f"http://127.0.0.1:{nginx.servers.port(kind)}" for kind in ("single", "gateway")}
    page = PAGE.replace("BASES", json.dumps(bases)).replace("KEY", json.dumps(KEY)).replace("CHAT", json.dumps(CHAT))
    (folder / "index.html").write_text(page)
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: handler(*given, directory=str(folder)))
    threading.Thread(target=site.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    profile = f"--user-data-dir={folder / 'profile'}"
    address = f"http://localhost:{site.server_port}/index.html"
    try:
        done = subprocess.run(
            ["chromium", *flags, profile, "--virtual-time-budget=30000", "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        site.shutdown()
        site.server_close()
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout + done.stderr
    results: dict[str, dict[str, Any]] = json.loads(html.unescape(found[1]))
    return results


@pytest.mark.parametrize("request_name", EXPECTED)
@pytest.mark.parametrize("server", ["single", "gateway", "single behind nginx", "gateway behind nginx"])
def test_a_page_of_another_origin_can_call_with_a_key_and_read_errors(
    called_by_page: dict[str, dict[str, Any]], server: str, request_name: str
) -> None:
    result = called_by_page[server][request_name]
    assert result.get("status") == EXPECTED[request_name], result
    if request_name == "stream":
        assert result["text"].endswith("data: [DONE]\n\n")
    elif result["status"] >= 400:
        assert json.loads(result["text"])["error"].keys() == {"message", "type", "param", "code"}
