"""What the gateway costs: the same engine asked directly and through the gateway, alternating, and a fake engine.

    make bench-gateway

Each of seven rounds asks a real SmolLM2 engine for 8 and for 64 streams at once of 64 tokens, directly and through a
gateway process beside it (the order swaps), and takes the ratio within the round; then for single streams in turn,
of which the medians' difference is the added time to the first token. The client is a process of its own and keeps
raw bytes, as it shares the cores. The last part gives the gateway a core of its own before a fake engine of 64
streams, and counts chunks per second of that core's work: with a chunk each 10 ms per stream every chunk is read and
written alone, as from a real engine; emitted at once, many are read together. Last line: one JSON object. About five
minutes on 2 cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from contracts.hardware import probe_hardware
from contracts.model import resolve_model
from contracts.progress import say
from contracts.provenance import bench_line
from serve.engine import Engine, EngineSpec, free_port
from serve.gateway import Gateway
from serve.limits import Limits
from serve.metrics import gateway_metrics
from serve.plan import LaunchPlan, plan_launch
from serve.proxy import ProxyServer
from serve.supervisor import State, SupervisedEngine

MODEL = "smollm2-135m-instruct"
NAME = "model"
NUM_ROUNDS = 7
NUM_FAKE_ROUNDS = 3
NUM_TOKENS = 64
NUM_SINGLE = 8
"""Single streams per side and round, for the time to the first token."""
FAKE_STREAMS, FAKE_CHUNKS = 64, 400
FAKE_GAP_MS = 10
_CHUNK = b'data: {"id":"cmpl-0123456789abcdef","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'


@dataclass(frozen=True)
class Burst:
    """What a client saw of streams that it asked for at once."""

    seconds: float
    num_chunks: int
    ttfts_s: list[float]


def main() -> None:
    roles: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"client": _client, "gateway": _gateway, "fake": _fake}
    if len(sys.argv) > 1:
        uvloop.run(roles[sys.argv[1]](*map(int, sys.argv[2:])))
        return
    figures: dict[str, list[float]] = {}
    directory = resolve_model(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_launch(directory, probe_hardware())
        spec = EngineSpec(directory, NAME, plan, Path(folder) / "engine.log", free_port())
        with Engine(spec), _beside("gateway", spec.port) as gateway:
            sides = [("direct", spec.port), ("gateway", gateway.port)]
            for _, port in sides:
                _ask(port, 8)
            for number in range(NUM_ROUNDS):
                measured = _measure_round(sides if number % 2 == 0 else sides[::-1])
                say(f"round {number + 1}/{NUM_ROUNDS}: {', '.join(f'{k} {v:.3f}' for k, v in measured.items())}")
                for name, value in measured.items():
                    figures.setdefault(name, []).append(value)
    for _ in range(NUM_FAKE_ROUNDS):
        figures.setdefault("gateway_chunks_per_s_per_core", []).append(_chunks_per_core_second(FAKE_GAP_MS))
        figures.setdefault("gateway_instant_chunks_per_s_per_core", []).append(_chunks_per_core_second(0))
    print(bench_line("gateway", figures))


def _measure_round(sides: list[tuple[str, int]]) -> dict[str, float]:
    measured = {}
    for num_streams in (8, 64):
        for side, port in sides:
            measured[f"{side}{num_streams}_tokens_per_s"] = num_streams * NUM_TOKENS / _ask(port, num_streams).seconds
        ratio = measured[f"gateway{num_streams}_tokens_per_s"] / measured[f"direct{num_streams}_tokens_per_s"]
        measured[f"gateway{num_streams}_throughput_ratio"] = ratio
    ttfts: dict[str, list[float]] = {"direct": [], "gateway": []}
    for _ in range(NUM_SINGLE):
        for side, port in sides:
            ttfts[side] += _ask(port, 1, 2).ttfts_s
    measured["direct_ttft_ms"] = statistics.median(ttfts["direct"]) * 1e3
    measured["gateway_added_ttft_ms"] = statistics.median(ttfts["gateway"]) * 1e3 - measured["direct_ttft_ms"]
    return measured


def _chunks_per_core_second(gap_ms: int) -> float:
    """Chunks that one second of the gateway's core forwards, from a fake engine on another core."""
    *others, own = probe_hardware().cores
    with _beside("fake", gap_ms, cores=others) as fake, _beside("gateway", fake.port, cores=[own]) as gateway:
        _ask(gateway.port, FAKE_STREAMS, cores=others)
        before = sum(gateway.process.cpu_times()[:2])
        burst = _ask(gateway.port, FAKE_STREAMS, cores=others)
        used_s = sum(gateway.process.cpu_times()[:2]) - before
    assert burst.num_chunks == FAKE_STREAMS * (FAKE_CHUNKS + 1)
    say(
        f"fake engine, a chunk each {gap_ms} ms: {burst.num_chunks} chunks in {burst.seconds:.2f} s, CPU {used_s:.2f} s"
    )
    return float(burst.num_chunks / used_s)


def _ask(port: int, num_streams: int, num_tokens: int = NUM_TOKENS, cores: Sequence[int] | None = None) -> Burst:
    """Ask for streams at once, from a process of its own."""
    command = _command("client", port, num_streams, num_tokens)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        psutil.Process(client.pid).cpu_affinity(cores)
        output, _ = client.communicate()
    return Burst(**json.loads(output))


@dataclass(frozen=True)
class Beside:
    """A process that serves on a port."""

    port: int
    process: psutil.Process


@contextmanager
def _beside(role: str, argument: int, cores: Sequence[int] | None = None) -> Iterator[Beside]:
    port = free_port()
    process = subprocess.Popen(_command(role, port, argument))
    try:
        psutil.Process(process.pid).cpu_affinity(cores)
        while True:
            assert process.poll() is None, f"{role} ended"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Beside(port, psutil.Process(process.pid))
    finally:
        process.kill()
        process.wait()


def _command(role: str, *arguments: int) -> list[str]:
    return [sys.executable, "-m", "benches.gateway", role, *map(str, arguments)]


async def _client(port: int, num_streams: int, num_tokens: int) -> None:
    loop = asyncio.get_running_loop()
    streams = []
    start = time.perf_counter()
    for _ in range(num_streams):
        streams.append(_Stream(num_tokens, loop.create_future()))
        await loop.create_connection(lambda: streams[-1], "127.0.0.1", port)
    await asyncio.gather(*(stream.done for stream in streams))
    seconds = time.perf_counter() - start
    num_chunks = sum(b"".join(stream.pieces).count(b"data: ") for stream in streams)
    print(json.dumps(asdict(Burst(seconds, num_chunks, [stream.first - stream.start for stream in streams]))))


class _Stream(asyncio.Protocol):
    """One streamed completion, kept as raw bytes."""

    def __init__(self, num_tokens: int, done: asyncio.Future[None]) -> None:
        self.done = done
        self.pieces: list[bytes] = []
        self.start = self.first = 0.0
        prompt = random.choices(range(100, 49_000), k=32)
        wanted = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        self._body = json.dumps({"model": NAME, **wanted}).encode()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(self._body)}\r\n\r\n"
        self.start = time.perf_counter()
        transport.write(head.encode() + self._body)

    def data_received(self, data: bytes) -> None:
        if not self.first and b"data: " in data:
            self.first = time.perf_counter()
        self.pieces.append(data)
        if data.endswith(b"0\r\n\r\n") and b"data: [DONE]" in b"".join(self.pieces[-3:]):
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            answer = b"".join(self.pieces)[-300:]
            self.done.set_exception(error or ConnectionResetError(f"the stream was cut: {answer!r}"))


async def _gateway(port: int, engine_port: int) -> None:
    """The gateway as `slimserve serve` runs it, with an engine that somebody else started."""
    spec = EngineSpec(Path(), NAME, LaunchPlan(), Path(os.devnull), engine_port)
    engine = SupervisedEngine(spec, gateway_metrics(), say)
    engine.state = State.READY
    server = ProxyServer(Gateway([], {NAME: engine}, gateway_metrics()), Limits().max_body_bytes)
    await server.start(socket.create_server(("127.0.0.1", port)))
    await asyncio.Event().wait()


async def _fake(port: int, gap_ms: int) -> None:
    """An engine that emits a chunk to every stream each so many milliseconds, or as fast as it is read."""
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: _FakeEngine(gap_ms / 1e3), "127.0.0.1", port)
    await asyncio.Event().wait()


class _FakeEngine(asyncio.Protocol):
    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._loop = asyncio.get_running_loop()
        self._asked = b""
        self._num_left = 0
        self._is_paused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._asked += data
        if self._asked.endswith(b"}"):
            self._asked = b""
            self._num_left = FAKE_CHUNKS
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self._transport.write(head)
            self._emit()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._emit()

    def _emit(self) -> None:
        if self._is_paused or self._transport.is_closing() or self._num_left < 0:
            return
        event = _CHUNK if self._num_left else b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n%b\r\n%b" % (len(event), event, b"" if self._num_left else b"0\r\n\r\n"))
        self._num_left -= 1
        if self._gap_s:
            self._loop.call_later(self._gap_s, self._emit)
        else:
            self._loop.call_soon(self._emit)


if __name__ == "__main__":
    main()
