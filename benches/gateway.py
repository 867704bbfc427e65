"""What the gateway costs: the same engine asked directly and through the gateway, alternating, and a fake engine.

    make bench-gateway

Each of seven rounds asks a real SmolLM2 engine three times for 8 and for 64 streams of 64 tokens, directly and by a
gateway process beside it (the order swaps), and takes the ratio within the round; then for single streams in turn,
of which the medians' difference is the added time to the first token. The client is a process of its own and keeps
raw bytes, as it shares the cores; a stream that does not end within a minute ends the benchmark. The last part gives
the gateway a core of its own before a fake engine of 64 streams, and counts chunks per second of that core's work: with
a chunk each 10 ms per stream every chunk is read and written alone, as from a real engine; emitted at once, many are
read together. Last line: one JSON object. About five minutes on 2 cores.
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

from slimserve.core.hardware import probe_hardware
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.serve.gateway.proxy import ProxyServer
from slimserve.serve.gateway.routing import Gateway
from slimserve.serve.gateway.supervisor import State, SupervisedEngine
from slimserve.serve.launch.plan import LaunchPlan, plan_launch
from slimserve.serve.launch.process import Engine, EngineSpec, free_port
from slimserve.serve.policy.limits import Limits
from slimserve.serve.policy.metrics import gateway_metrics

MODEL = "smollm2-135m-instruct"
NAME = "model"
NUM_ROUNDS = 7
NUM_FAKE_ROUNDS = 3
NUM_TOKENS = 64
NUM_BURSTS = 3
"""Per side and round, in turn: one of 64 streams lasts three seconds, in which the machine's own noise is 3%."""
NUM_SINGLE = 24
"""Single streams per side and round, for the time to the first token."""
FAKE_STREAMS = 64
FAKE_GAP_MS, FAKE_CHUNKS = 10, 400
INSTANT_CHUNKS = 4000
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_LONGEST_S = 60.0
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
        with Engine(spec), _beside("gateway", spec.port) as gateway, _client_process() as client:
            sides = [("direct", spec.port), ("gateway", gateway.port)]
            for _, port in sides:
                client.ask(port, 8)
            for number in range(NUM_ROUNDS):
                measured = _measure_round(client, sides if number % 2 == 0 else sides[::-1])
                print_status(
                    f"round {number + 1}/{NUM_ROUNDS}: {', '.join(f'{k} {v:.3f}' for k, v in measured.items())}"
                )
                for name, value in measured.items():
                    figures.setdefault(name, []).append(value)
    for _ in range(NUM_FAKE_ROUNDS):
        rates = {
            "gateway_chunks_per_s_per_core": _chunks_per_core_second(FAKE_GAP_MS, FAKE_CHUNKS),
            "gateway_instant_chunks_per_s_per_core": _chunks_per_core_second(0, INSTANT_CHUNKS),
        }
        for name, rate in rates.items():
            figures.setdefault(name, []).append(rate)
    print(bench_line("gateway", figures))


def _measure_round(client: Client, sides: list[tuple[str, int]]) -> dict[str, float]:
    measured = {}
    for num_streams in (8, 64):
        seconds = dict.fromkeys(dict(sides), 0.0)
        for _ in range(NUM_BURSTS):
            for side, port in sides:
                seconds[side] += client.ask(port, num_streams).seconds
        for side, total_s in seconds.items():
            measured[f"{side}{num_streams}_tokens_per_s"] = NUM_BURSTS * num_streams * NUM_TOKENS / total_s
        ratio = measured[f"gateway{num_streams}_tokens_per_s"] / measured[f"direct{num_streams}_tokens_per_s"]
        measured[f"gateway{num_streams}_throughput_ratio"] = ratio
    ttfts: dict[str, list[float]] = {"direct": [], "gateway": []}
    for _ in range(NUM_SINGLE):
        for side, port in sides:
            ttfts[side] += client.ask(port, 1, 2).ttfts_s
    measured["direct_ttft_ms"] = statistics.median(ttfts["direct"]) * 1e3
    measured["gateway_added_ttft_ms"] = statistics.median(ttfts["gateway"]) * 1e3 - measured["direct_ttft_ms"]
    return measured


def _chunks_per_core_second(gap_ms: int, num_chunks: int) -> float:
    """Chunks that one second of the gateway's core forwards, from a fake engine on another core."""
    *others, own = probe_hardware().cores
    with (
        _beside("fake", gap_ms, num_chunks, cores=others) as fake,
        _beside("gateway", fake.port, cores=[own]) as gateway,
        _client_process(cores=others) as client,
    ):
        client.ask(gateway.port, FAKE_STREAMS)
        before = sum(gateway.process.cpu_times()[:2])
        burst = client.ask(gateway.port, FAKE_STREAMS)
        used_s = sum(gateway.process.cpu_times()[:2]) - before
    assert burst.num_chunks == FAKE_STREAMS * (num_chunks + 1)
    print_status(
        f"fake engine, a chunk each {gap_ms} ms: {burst.num_chunks} chunks in {burst.seconds:.2f} s, CPU {used_s:.2f} s"
    )
    return float(burst.num_chunks / used_s)


class Client:
    """The process that asks; it reads what to ask line by line, as its start takes longer than most bursts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, port: int, num_streams: int, num_tokens: int = NUM_TOKENS) -> Burst:
        """Ask for streams at once and wait for their ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{port} {num_streams} {num_tokens}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the client of port {port} failed with {num_streams} streams")
        return Burst(**json.loads(answer))


@contextmanager
def _client_process(cores: Sequence[int] | None = None) -> Iterator[Client]:
    with subprocess.Popen(_command("client"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            psutil.Process(process.pid).cpu_affinity(cores)
            yield Client(process)
        finally:
            process.kill()


@dataclass(frozen=True)
class Beside:
    """A process that serves on a port."""

    port: int
    process: psutil.Process


@contextmanager
def _beside(role: str, *arguments: int, cores: Sequence[int] | None = None) -> Iterator[Beside]:
    port = free_port()
    process = subprocess.Popen(_command(role, port, *arguments))
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


async def _client() -> None:
    """Ask as the lines of the standard input say, and print a Burst for each."""
    for line in sys.stdin:
        port, num_streams, num_tokens = map(int, line.split())
        print(json.dumps(asdict(await _burst(port, num_streams, num_tokens))), flush=True)


async def _burst(port: int, num_streams: int, num_tokens: int) -> Burst:
    loop = asyncio.get_running_loop()
    streams = []
    start = time.perf_counter()
    for _ in range(num_streams):
        stream = _Stream(num_tokens, loop.create_future())
        streams.append(stream)
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)  # type: ignore[misc]
    try:
        async with asyncio.timeout(_LONGEST_S):
            await asyncio.gather(*(stream.done for stream in streams))
    except TimeoutError:
        tails = [stream.tail for stream in streams if not stream.tail.endswith(_END)]
        raise RuntimeError(
            f"{len(tails)} of {num_streams} streams did not end; the first so far: {tails[0]!r}"
        ) from None
    seconds = time.perf_counter() - start
    for stream in streams:
        stream.transport.close()
    num_chunks = sum(b"".join(stream.pieces).count(b"data: ") for stream in streams)
    return Burst(seconds, num_chunks, [stream.first - stream.start for stream in streams])


class _Stream(asyncio.Protocol):
    """One streamed completion, kept as raw bytes."""

    def __init__(self, num_tokens: int, done: asyncio.Future[None]) -> None:
        self.done = done
        self.pieces: list[bytes] = []
        self.tail = b""
        """The last bytes, as the end of a stream may come in pieces."""
        self.start = self.first = 0.0
        prompt = random.choices(range(100, 49_000), k=32)
        wanted = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        self._body = json.dumps({"model": NAME, **wanted}).encode()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        self.start = time.perf_counter()
        transport.write(f"{head}Content-Length: {len(self._body)}\r\n\r\n".encode() + self._body)

    def data_received(self, data: bytes) -> None:
        if not self.first and b"data: " in data:
            self.first = time.perf_counter()
        self.pieces.append(data)
        self.tail = (self.tail + data[-len(_END) :])[-len(_END) :]
        if self.tail == _END:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            answer = b"".join(self.pieces)[-300:]
            self.done.set_exception(error or ConnectionResetError(f"the stream was cut: {answer!r}"))


async def _gateway(port: int, engine_port: int) -> None:
    """The gateway as `slimserve serve` runs it, with an engine that somebody else started."""
    spec = EngineSpec(Path(), NAME, LaunchPlan(), Path(os.devnull), engine_port)
    engine = SupervisedEngine(spec, gateway_metrics(), print_status)
    engine.state = State.READY
    server = ProxyServer(Gateway([], {NAME: engine}, gateway_metrics()), Limits().max_body_bytes)
    await server.start(socket.create_server(("127.0.0.1", port)))
    await asyncio.Event().wait()


async def _fake(port: int, gap_ms: int, num_chunks: int) -> None:
    """An engine that emits a chunk to every stream each so many milliseconds, or as fast as it is read."""
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: _FakeEngine(gap_ms / 1e3, num_chunks), "127.0.0.1", port, backlog=2048)
    await asyncio.Event().wait()


class _FakeEngine(asyncio.Protocol):
    def __init__(self, gap_s: float, num_chunks: int) -> None:
        self._gap_s = gap_s
        self._num_chunks = num_chunks
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
            self._num_left = self._num_chunks
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
