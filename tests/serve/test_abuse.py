"""One real engine under no key, garbage, overload, clients that go, readers that do not read, and SIGTERM.

The tests run in the order of the file; the last one ends the engine. `SLIMSERVE_LONG_TESTS=1` overloads for 60 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from serve.engine import Engine, EngineSpec, free_port
from serve.guard import CLOSED_PATHS, OPEN_PATHS
from serve.limits import Limits
from serve.plan import Choice, LaunchPlan
from tests.serve.garbage import Answer, Request, garbage, read_answer, send_all, send_one

pytestmark = pytest.mark.engine

NAME = "tiny"
KEY = "the-right-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
LIMITS = Limits(max_body_bytes=2**20, max_running=8, max_queued=4, request_timeout_s=60.0, drain_s=1.0)
_OVERLOAD_S = 60.0 if os.environ.get("SLIMSERVE_LONG_TESTS") else 8.0
_MIB = 2**20


@pytest.fixture(scope="module")
def tiny_directory(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers under SmolLM2's tokenizer: these tests are about the server, not the model."""
    directory = tmp_path_factory.mktemp("abuse") / NAME
    vocabulary = json.loads((smollm2 / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / file, directory / file)
    return directory


@dataclass(frozen=True)
class Server:
    """The engine under test, and what its processes and its page say about it."""

    engine: Engine

    @property
    def url(self) -> str:
        return self.engine.spec.url

    @property
    def port(self) -> int:
        return self.engine.spec.port

    def series(self, name: str) -> float:
        """Sum of all series of a metric."""
        page = requests.get(f"{self.url}/metrics", timeout=10).text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    def num_running(self) -> float:
        """What vLLM says it is running. Its gauge changes with a step only, so a request of one token comes first."""
        assert self.complete().status_code == 200
        return self.series("vllm:num_requests_running") + self.series("vllm:num_requests_waiting")

    def complete(self, num_tokens: int = 1) -> requests.Response:
        body = {"model": NAME, "prompt": "x", "max_tokens": num_tokens}
        return requests.post(f"{self.url}/v1/completions", json=body, headers=HEADERS, timeout=30)

    def rss_bytes(self) -> int:
        root = psutil.Process(self.engine.pid)
        return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))


@pytest.fixture(scope="module")
def server(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    plan = LaunchPlan(
        environment=(
            Choice("VLLM_PLUGINS", "slimserve", "our routes"),
            Choice("SLIMSERVE_API_KEY", KEY, "a key"),
            Choice("VLLM_CPU_OMP_THREADS_BIND", "nobind", "any cores"),
        )
    )
    extra = ["--enforce-eager", "--kv-cache-memory-bytes", str(2**28), "--block-size", "32", "--max-num-seqs", "16"]
    extra += ["--max-model-len", "768"]
    log = tmp_path_factory.mktemp("abuse") / "engine.log"
    spec = EngineSpec(tiny_directory, NAME, plan, log, free_port(), extra=tuple(extra), limits=LIMITS)
    with Engine(spec) as engine:
        yield Server(engine)


def long_request(num_tokens: int = 700, **options: Any) -> Request:
    body = {"model": NAME, "prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": True, **options}
    return Request("/v1/completions", json.dumps(body).encode())


@contextlib.asynccontextmanager
async def open_streams(
    server: Server, num: int
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """Long streamed answers that have begun; the connections end with the block."""
    pairs = []
    for _ in range(num):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
        writer.write(long_request().encode(KEY))
        pairs.append((reader, writer))
    for reader, _ in pairs:
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
    try:
        yield pairs
    finally:
        for _, writer in pairs:
            writer.transport.abort()


def eventually(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def test_no_route_but_the_open_ones_answers_without_the_right_key(server: Server) -> None:
    paths = requests.get(f"{server.url}/openapi.json", headers=HEADERS, timeout=10).json()["paths"]
    assert {"/v1/chat/completions", "/v1/score", "/v1/rerank", "/generative_scoring", "/tokenize"} <= set(paths)
    # Routes that FastAPI does not list, and ways to write a path that a router might read differently.
    hidden = ["/docs", "/redoc", "/openapi.json", "/pause", "/sleep", "/collective_rpc", "/v1/load_lora_adapter"]
    odd = ["//v1/models", "/v1//models", "/%761/models", "/metrics/../v1/models", "/health/", "/metricsx", "/V1/models"]
    routes = [(path, method) for path, methods in paths.items() for method in methods]
    checked = 0
    with requests.Session() as session:
        for path, method in routes + [(path, verb) for path in hidden + odd for verb in ("get", "post")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                prepared = session.prepare_request(requests.Request(method, server.url, headers=headers, json={}))
                prepared.url = server.url + path.replace("{response_id}", "x")
                answer = session.send(prepared, timeout=10)
                if path in OPEN_PATHS:
                    assert answer.status_code == 200
                else:
                    assert (path, method, answer.status_code) == (path, method, 401)
                    checked += 1
    assert checked > 3 * 30
    assert {requests.get(server.url + path, timeout=10).status_code for path in OPEN_PATHS} == {200}
    for path in CLOSED_PATHS:
        assert requests.post(server.url + path, headers=HEADERS, json={}, timeout=10).status_code == 404


def test_the_right_key_opens_our_routes_and_vllms(server: Server) -> None:
    assert server.complete().status_code == 200
    body = {"model": NAME, "query": "q", "items": ["a", "b"], "label_token_ids": [5, 6]}
    assert requests.post(f"{server.url}/v1/score", json=body, headers={"x-api-key": KEY}, timeout=30).status_code == 200
    assert requests.get(f"{server.url}/ready", timeout=10).json() == {"status": "ready"}
    assert f'slimserve_requests_total{{variant="{NAME}",' in requests.get(f"{server.url}/metrics", timeout=10).text


def test_one_request_id_on_many_requests_at_once_harms_none(server: Server) -> None:
    async def send() -> list[Answer]:
        encoded = long_request(20, stream=False).encode(KEY).replace(b"Host: a", b"Host: a\r\nX-Request-Id: same")

        async def one() -> Answer:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(encoded)
            answer = await read_answer(reader)
            writer.close()
            return answer

        return await asyncio.gather(*(one() for _ in range(8)))

    answers = asyncio.run(send())
    assert [answer.status for answer in answers] == [200] * 8
    assert all(b"x-request-id: same" in answer.headers for answer in answers)


def test_ten_thousand_garbage_bodies_cause_no_server_error_and_leave_nothing_behind(server: Server) -> None:
    asyncio.run(send_all(server.port, KEY, list(garbage(NAME, 2000, seed=1)), connections=12))
    before = server.rss_bytes()
    answers = asyncio.run(send_all(server.port, KEY, list(garbage(NAME, 8000, seed=2)), connections=12))
    statuses = Counter(answer.status for _, answer in answers)
    wrong = [(request, answer.body[:200]) for request, answer in answers if answer.status >= 500]
    assert wrong == []
    assert sum(statuses.values()) == 8000
    assert statuses[400] > 3000
    assert statuses[200] > 500  # some mutations stay sound, so the engine was reached
    assert server.num_running() == 0
    assert server.series("slimserve_requests_in_flight") == 0
    assert server.rss_bytes() - before < 64 * _MIB


def test_a_schema_driven_fuzzer_finds_no_server_error_on_our_routes(server: Server) -> None:
    paths = [part for path in ("/v1/score", "/v1/rerank", "/rerank", "/v2/rerank") for part in ("--include-path", path)]
    run = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", *paths),
            *("-H", f"Authorization: Bearer {KEY}", "--checks", "not_a_server_error", "--phases", "coverage,fuzzing"),
            *(
                "--max-examples",
                "40",
                "--seed",
                "1",
                "--suppress-health-check",
                "all",
                "--warnings",
                "off",
                "--no-color",
            ),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "Tested: 4" in run.stdout or "4 selected" in run.stdout, run.stdout[-4000:]


def test_streams_whose_clients_go_are_aborted_within_two_seconds(server: Server) -> None:
    async def streams() -> None:
        async with open_streams(server, 6):
            assert await asyncio.to_thread(server.num_running) >= 6

    asyncio.run(streams())
    eventually(lambda: server.num_running() == 0, seconds=2)
    assert server.series("slimserve_requests_in_flight") == 0


def test_readers_that_do_not_read_hold_up_nobody(server: Server) -> None:
    async def streams() -> None:
        async with open_streams(server, 6):
            before = server.rss_bytes()
            for _ in range(10):
                begin = time.monotonic()
                answer = await asyncio.to_thread(server.complete, 8)
                assert answer.status_code == 200
                assert time.monotonic() - begin < 2
            assert server.rss_bytes() - before < 32 * _MIB

    asyncio.run(streams())
    eventually(lambda: server.num_running() == 0, seconds=2)


def test_ten_times_the_load_leaves_the_accepted_their_latency_and_tells_the_rest_when_to_come_back(
    server: Server,
) -> None:
    request = long_request(100, stream=False)

    async def timed() -> tuple[float, Answer]:
        begin = time.monotonic()
        answer = await send_one(server.port, KEY, request)
        return time.monotonic() - begin, answer

    async def at_capacity(seconds: float) -> list[float]:
        end = time.monotonic() + seconds

        async def client() -> list[float]:
            taken = []
            while time.monotonic() < end:
                took, answer = await timed()
                assert answer.status == 200
                taken.append(took)
            return taken

        every = await asyncio.gather(*(client() for _ in range(LIMITS.max_running)))
        return [took for taken in every for took in taken]

    async def overloaded(rate: float, seconds: float) -> list[tuple[float, Answer]]:
        tasks: list[asyncio.Task[tuple[float, Answer]]] = []
        begin = time.monotonic()
        while (elapsed := time.monotonic() - begin) < seconds:
            tasks += [asyncio.create_task(timed()) for _ in range(int(elapsed * rate) - len(tasks))]
            await asyncio.sleep(0.005)
        return await asyncio.gather(*tasks)

    before = server.rss_bytes()
    for attempt in range(3):  # a neighbour on the machine may steal a second of any one
        calm_s = sorted(asyncio.run(at_capacity(_OVERLOAD_S / 2)))
        answers = asyncio.run(overloaded(10 * len(calm_s) / (_OVERLOAD_S / 2), _OVERLOAD_S))
        accepted_s = sorted(took for took, answer in answers if answer.status == 200)
        figures = f"p99 {p99(accepted_s):.3f} s, at capacity {p99(calm_s):.3f} s; {len(accepted_s)} of {len(answers)}"
        print(f"overload, attempt {attempt}: {figures}")
        refused = [answer for _, answer in answers if answer.status != 200]
        assert {answer.status for answer in refused} == {429}
        assert all(int(answer.headers.split(b"retry-after: ")[1].split()[0]) >= 1 for answer in refused)
        assert len(refused) > 0.7 * len(answers), figures
        if p99(accepted_s) <= 2 * p99(calm_s):
            break
    else:
        pytest.fail(figures)
    assert len(accepted_s) > 0.6 * len(calm_s) * 2, figures  # refusing costs the engine little
    assert server.rss_bytes() - before < 32 * _MIB


def p99(sorted_s: list[float]) -> float:
    return sorted_s[int(len(sorted_s) * 0.99) - 1]


def test_no_key_and_no_prompt_is_in_the_log(server: Server) -> None:
    secret = "a very private prompt"
    body = {"model": NAME, "prompt": secret, "max_tokens": 1}
    assert requests.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=30).status_code == 200
    body["temperature"] = secret
    assert requests.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=30).status_code == 400
    log = server.engine.spec.log.read_text(encoding="utf-8", errors="replace")
    assert "route=/v1/completions status=400" in log
    assert secret not in log
    assert KEY not in log
    assert "hello there" not in log  # of the garbage


def test_sigterm_lets_streams_finish_ends_the_rest_properly_and_leaves_no_process(server: Server) -> None:
    processes = psutil.Process(server.engine.pid).children(recursive=True)

    async def drain() -> tuple[list[Answer], Answer, float]:
        lengths = [50, 50, 50, 700, 700, 700]
        tasks = [asyncio.create_task(send_one(server.port, KEY, long_request(length))) for length in lengths]
        await asyncio.sleep(0.3)
        begin = time.monotonic()
        os.kill(server.engine.pid, signal.SIGTERM)
        await asyncio.sleep(0.1)
        late = await send_one(server.port, KEY, long_request())
        return await asyncio.gather(*tasks), late, time.monotonic() - begin

    answers, late, took_s = asyncio.run(drain())
    assert (late.status, b"retry-after: " in late.headers, b"connection: close" in late.headers) == (503, True, True)
    assert [answer.status for answer in answers] == [200] * 6
    assert all(answer.body.rstrip().endswith(b"data: [DONE]") for answer in answers[:3])
    for answer in answers[3:]:
        last = answer.body.rstrip().split(b"\n\n")[-1]
        assert last == b"data: [DONE]" or json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutdown"
    assert took_s < LIMITS.drain_s + 2
    assert server.engine.wait() == 0
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []
