"""Tests of two real engines behind the real command: OpenAI's client, a killed engine and SIGTERM under load.

The tests run in the order of the file; the last one ends the server. Three engine starts take most of their time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from slimserve.serve.launch.process import free_port

pytestmark = pytest.mark.engine

KEY = "the-right-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
DRAIN_S = 4.0
NUM_STREAMS = 8
_START_S = 150.0


@dataclass(frozen=True)
class RunningServer:
    """A running `slimserve serve` with two variants, `a` and `b`."""

    url: str
    process: subprocess.Popen[bytes]

    def server_of(self, variant: str) -> psutil.Process:
        """Return the process of a variant's API server."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("SLIMSERVE_VARIANT") == variant:
                return child
        raise AssertionError(f"{variant} has no process")

    def ask(self, variant: str) -> httpx.Response:
        body = {"model": variant, "prompt": "x", "max_tokens": 2}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=HEADERS, timeout=30)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready", timeout=2).status_code == 200
        return False

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self.is_ready():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, httpx.get(f"{self.url}/ready").text
            time.sleep(0.1)


@pytest.fixture(scope="module")
def running_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys.txt").write_text(f"{KEY}\n")
    (folder / "keys.txt").chmod(0o600)
    port = free_port()
    options = ["--alias", "chat=a:50,b:50", "--port", str(port), "--drain", f"{DRAIN_S:g}"]
    options += ["--api-key-file", str(folder / "keys.txt")]
    vllm = ["--enforce-eager", "--kv-cache-memory-bytes", str(2**28), "--block-size", "32", "--max-num-seqs", "16"]
    models = [f"a={tiny_model}", f"b={tiny_model}"]
    command = [sys.executable, "-m", "slimserve", "serve", *models, *options, "--", *vllm]
    # Without `nobind`, two engines on two cores may bind to the same core.
    environment = os.environ | {"SLIMSERVE_CACHE": str(folder / "cache"), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(command, env=environment)
    running = RunningServer(f"http://127.0.0.1:{port}", process)
    try:
        running.wait_until_ready()
        yield running
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


@dataclass(frozen=True)
class Stream:
    """The events that a client received of one streamed completion."""

    num_tokens: int
    """Number of tokens that the engine reports at the end."""
    error: str | None
    """Code of the error event, if there was one."""
    is_finished: bool
    """Whether the model finished."""
    is_ended: bool
    """Whether `[DONE]` arrived."""


async def stream(client: httpx.AsyncClient, variant: str, num_tokens: int, begun: asyncio.Semaphore) -> Stream:
    """Request a streamed completion; release `begun` at its first event."""
    options = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    body = {"model": variant, "prompt": "x", "max_tokens": num_tokens, **options}
    has_begun, seen_tokens, error, is_finished, is_ended = False, 0, None, False, False
    async with client.stream("POST", "/v1/completions", json=body, headers=HEADERS) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_ended = True
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                error = event["error"]["code"]
                continue
            if not has_begun:
                begun.release()
            has_begun = True
            is_finished |= any(choice["finish_reason"] == "length" for choice in event["choices"])
            if event.get("usage"):
                seen_tokens = event["usage"]["completion_tokens"]
        return Stream(seen_tokens, error, is_finished, is_ended)


async def wait_for(begun: asyncio.Semaphore, num_streams: int) -> None:
    async with asyncio.timeout(30):
        for _ in range(num_streams):
            await begun.acquire()


def test_openais_client_lists_chats_and_streams_through_the_gateway(running_server: RunningServer) -> None:
    client = OpenAI(base_url=f"{running_server.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["a", "b", "chat"]
    assert client.models.retrieve("b").id == "b"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for model in ("a", "b", "chat"):
        answered = client.chat.completions.create(model=model, messages=question, max_tokens=8, user="me")
        assert answered.usage.completion_tokens == 8
        assert answered.choices[0].message.content
    options = {"stream_options": {"include_usage": True}, "temperature": 0}
    chunks = list(client.chat.completions.create(model="a", messages=question, max_tokens=8, stream=True, **options))
    assert chunks[-1].usage.completion_tokens == 8
    complete = client.chat.completions.create(model="a", messages=question, max_tokens=8, temperature=0)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == complete.choices[0].message.content


def test_an_engine_killed_under_load_restarts_and_does_not_affect_the_other(running_server: RunningServer) -> None:
    async def scenario() -> None:
        begun = asyncio.Semaphore(0)
        async with httpx.AsyncClient(base_url=running_server.url, timeout=60) as client:
            lost = [asyncio.create_task(stream(client, "a", 5000, begun)) for _ in range(NUM_STREAMS)]
            kept = [asyncio.create_task(stream(client, "b", 300, begun)) for _ in range(NUM_STREAMS)]
            await wait_for(begun, 2 * NUM_STREAMS)
            assert not any(task.done() for task in kept), "they are still running"
            running_server.server_of("a").kill()
            for seen in await asyncio.gather(*lost):
                assert (seen.error, seen.is_ended, seen.is_finished) == ("engine_lost", True, False)
            rejected = await asyncio.to_thread(running_server.ask, "a")
            assert rejected.status_code == 503
            assert 1 <= int(rejected.headers["Retry-After"]) <= 60
            assert rejected.json()["error"]["code"] == "model_unavailable"
            assert (await asyncio.to_thread(running_server.ask, "chat")).status_code == 200, "the other variant answers"
            for seen in await asyncio.gather(*kept):
                assert seen == Stream(300, None, is_finished=True, is_ended=True)

    asyncio.run(scenario())
    running_server.wait_until_ready()
    assert running_server.ask("a").status_code == 200
    page = httpx.get(f"{running_server.url}/metrics", timeout=30).text
    values = {
        (sample.name, sample.labels["variant"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "variant" in sample.labels
    }
    assert (values["slimserve_restarts_total", "a"], values["slimserve_restarts_total", "b"]) == (1, 0)
    assert (values["slimserve_variant_up", "a"], values["slimserve_gateway_in_flight", "a"]) == (1, 0)
    assert values["vllm:num_requests_running", "b"] == 0


_SHORT_TOKENS = 20
"""Length of a stream that ends within the drain, also on a CPU with AVX2 alone."""


def test_sigterm_under_load_ends_every_stream_in_time_and_leaves_no_process(
    running_server: RunningServer,
) -> None:
    family = [
        psutil.Process(running_server.process.pid),
        *psutil.Process(running_server.process.pid).children(recursive=True),
    ]
    assert len(family) >= 3

    async def scenario() -> tuple[list[Stream], list[Stream], httpx.Response, float]:
        begun = asyncio.Semaphore(0)
        async with httpx.AsyncClient(base_url=running_server.url, timeout=60) as client:
            short = [asyncio.create_task(stream(client, name, _SHORT_TOKENS, begun)) for name in "ab" * 3]
            long = [asyncio.create_task(stream(client, name, 8000, begun)) for name in "ab" * 3]
            await wait_for(begun, len(short) + len(long))
            begin = time.monotonic()
            running_server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            late = await asyncio.to_thread(running_server.ask, "a")
            seen = await asyncio.gather(*short), await asyncio.gather(*long)
            return *seen, late, time.monotonic() - begin

    short, long, late, seconds = asyncio.run(scenario())
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert late.headers["Retry-After"]
    for seen in short:
        assert seen == Stream(_SHORT_TOKENS, None, is_finished=True, is_ended=True)
    for seen in long:
        assert seen.is_ended
        assert seen.is_finished if seen.error is None else seen.error == "shutdown"
    assert any(seen.error for seen in long), "at least one must outlast the drain for the test to be meaningful"
    assert seconds < DRAIN_S + 1
    assert running_server.process.wait(30) == 0
    _, alive = psutil.wait_procs(family, timeout=2)
    assert not alive
