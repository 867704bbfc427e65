"""Cost of the gateway, compared with nginx, HAProxy and a simple proxy on aiohttp.

    make bench-gateway

All proxies stand before the same engine, each in one process or one worker.

1. A real SmolLM2 engine serves 64 streams of 64 tokens, directly and through each proxy in turn. Every round yields
   the ratio of the throughputs, the CPU seconds of the proxy and, from single streams, the time that a proxy adds to
   the first token.
2. A fake engine emits a chunk every 10 ms on each of 64 streams. The proxy has a core of its own, and its CPU seconds
   are counted. They depend little on other load of the machine.

The client is a separate process that keeps raw bytes, because it shares the cores with what it measures.
nginx and HAProxy are Debian packages; where they are missing and cannot be installed, their rows are left out.
Last line: one JSON object. The run takes about ten minutes on 2 cores with AVX-512; a round takes about six
minutes with AVX2 alone. `--rounds 1` measures one round, and `--cpu-only` skips the real engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
PROXIES = ("gateway", "nginx", "haproxy", "aiohttp")
DEBIAN_PROXIES = ("nginx", "haproxy")
NUM_ROUNDS = 7
NUM_CPU_ROUNDS = 3
NUM_TOKENS = 64
NUM_BURSTS = 3
"""Bursts per side and round; one burst of 64 streams takes three seconds and varies by 3%."""
NUM_SINGLE_STREAMS = 24
"""Single streams per side and round, for the time to the first token."""
NUM_FAKE_STREAMS = 64
FAKE_GAP_MS, NUM_FAKE_CHUNKS = 10, 600
NUM_INSTANT_CHUNKS = 4000
_ROOT = Path(__file__).parent.parent
_STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_STREAM_TIMEOUT_S = 120.0
_EVENT = b'data: {"id":"cmpl-0123456789abcdef","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'
_NUM_TOKENS = re.compile(rb'"max_tokens": (\d+)')


@dataclass(frozen=True)
class Burst:
    """Measurements of a client whose streams start at the same time."""

    seconds: float
    num_chunks: int
    ttfts_s: list[float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu-only", action="store_true", help="Measure CPU seconds with the fake engine only.")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="Rounds on the real engine (default 7).")
    options = parser.parse_args()
    proxies = [name for name in PROXIES if name not in DEBIAN_PROXIES or _is_installed(name)]
    values: dict[str, list[float]] = {}
    if not options.cpu_only:
        _measure_real_engine(proxies, options.rounds, values)
    for number in range(NUM_CPU_ROUNDS):
        for proxy in proxies if number % 2 == 0 else proxies[::-1]:
            cpu_s_per_chunk = _cpu_s_per_chunk(proxy, FAKE_GAP_MS, NUM_FAKE_CHUNKS)
            values.setdefault(f"{proxy}_cpu_s_per_million_chunks", []).append(1e6 * cpu_s_per_chunk)
            if proxy == "gateway":
                values.setdefault("gateway_chunks_per_s_per_core", []).append(1 / cpu_s_per_chunk)
        instant = 1 / _cpu_s_per_chunk("gateway", 0, NUM_INSTANT_CHUNKS)
        values.setdefault("gateway_instant_chunks_per_s_per_core", []).append(instant)
    print(bench_line("gateway", values))


def _is_installed(program: str) -> bool:
    """Install the Debian package of `program` if it is missing and that is possible."""
    os.environ["PATH"] += ":/usr/sbin"
    script = ["sh", str(_ROOT / "requirements" / "system.sh"), program, program, "a row of make bench-gateway"]
    subprocess.run(script, check=False)
    return shutil.which(program) is not None


# Part 1: a real engine


def _measure_real_engine(proxies: Sequence[str], num_rounds: int, values: dict[str, list[float]]) -> None:
    directory = resolve_model(MODEL)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        plan = plan_launch(directory, probe_hardware())
        spec = EngineSpec(directory, NAME, plan, Path(folder) / "engine.log", free_port())
        stack.enter_context(Engine(spec))
        servers = {proxy: stack.enter_context(_server(proxy, spec.port)) for proxy in proxies}
        ports = {"direct": spec.port} | {proxy: server.port for proxy, server in servers.items()}
        client = stack.enter_context(_client_process())
        for port in ports.values():
            client.stream(port, 8)
        for number in range(num_rounds):
            # The order rotates, so that no side always follows the same one.
            shift = number % len(ports)
            sides = [*ports.items()][shift:] + [*ports.items()][:shift]
            measured = _measure_throughput(client, sides, servers) | _measure_ttft(client, sides)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
            print_status(f"round {number + 1}/{num_rounds}: {shown}")
            for name, value in measured.items():
                values.setdefault(name, []).append(value)


def _measure_throughput(
    client: Client, sides: list[tuple[str, int]], servers: Mapping[str, Server]
) -> dict[str, float]:
    """Tokens/s of each side, its ratio to `direct`, and the CPU seconds of each proxy while the engine computes."""
    measured = {}
    own_sides = [side for side in sides if side[0] in {"direct", "gateway"}]
    for num_streams, compared in ((8, own_sides), (64, sides)):
        seconds, cpu_s = dict.fromkeys(dict(compared), 0.0), dict.fromkeys(servers, 0.0)
        num_tokens = NUM_BURSTS * num_streams * NUM_TOKENS
        for _ in range(NUM_BURSTS):
            for side, port in compared:
                before_s = servers[side].cpu_s() if side in servers else 0.0
                seconds[side] += client.stream(port, num_streams).seconds
                if side in servers:
                    cpu_s[side] += servers[side].cpu_s() - before_s
        for side, total_s in seconds.items():
            measured[f"{side}{num_streams}_tokens_per_s"] = num_tokens / total_s
            if side != "direct":
                measured[f"{side}{num_streams}_throughput_ratio"] = seconds["direct"] / total_s
                measured[f"{side}{num_streams}_cpu_s_per_million_tokens"] = 1e6 * cpu_s[side] / num_tokens
    return measured


def _measure_ttft(client: Client, sides: list[tuple[str, int]]) -> dict[str, float]:
    ttfts: dict[str, list[float]] = {side: [] for side, _ in sides}
    for _ in range(NUM_SINGLE_STREAMS):
        for side, port in sides:
            ttfts[side] += client.stream(port, 1, 2).ttfts_s
    direct_s = statistics.median(ttfts.pop("direct"))
    added_ms = {f"{side}_added_ttft_ms": (statistics.median(times) - direct_s) * 1e3 for side, times in ttfts.items()}
    return {"direct_ttft_ms": direct_s * 1e3} | added_ms


# Part 2: a fake engine


def _cpu_s_per_chunk(proxy: str, gap_ms: int, num_chunks: int) -> float:
    """CPU seconds of a proxy on a core of its own for one chunk; the engine and the client share the other cores."""
    *other_cores, own_core = probe_hardware().cores
    with (
        _server("fake", gap_ms, cores=other_cores) as fake,
        _server(proxy, fake.port, cores=[own_core]) as server,
        _client_process(cores=other_cores) as client,
    ):
        client.stream(server.port, NUM_FAKE_STREAMS, 20)
        before_s = server.cpu_s()
        burst = client.stream(server.port, NUM_FAKE_STREAMS, num_chunks)
        used_s = server.cpu_s() - before_s
    assert burst.num_chunks == NUM_FAKE_STREAMS * (num_chunks + 1), burst.num_chunks
    print_status(
        f"{proxy}, one chunk per {gap_ms} ms and stream: {burst.num_chunks} chunks in {burst.seconds:.2f} s, "
        f"CPU {used_s:.2f} s, {1e6 * used_s / burst.num_chunks:.1f} s per million"
    )
    return used_s / burst.num_chunks


# The processes


@dataclass(frozen=True)
class Server:
    """A process, with its workers, that serves on a port."""

    port: int
    process: psutil.Process

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu_s(self) -> float:
        return float(sum(sum(process.cpu_times()[:2]) for process in self.processes()))


@contextmanager
def _server(role: str, argument: int, cores: Sequence[int] | None = None) -> Iterator[Server]:
    """Start a proxy before the engine port `argument`, or the fake engine with a gap of `argument` ms."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(_command(role, port, argument, Path(folder)))
        try:
            while True:
                assert process.poll() is None, f"{role} ended"
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            server = Server(port, psutil.Process(process.pid))
            for one in server.processes():
                one.cpu_affinity(cores)
            yield server
        finally:
            process.terminate()
            process.wait()


def _command(role: str, port: int, argument: int, folder: Path) -> list[str]:
    if role == "aiohttp":
        return [sys.executable, "-m", "benches.peers.aiohttp_proxy", str(port), f"{NAME}={argument}"]
    if role in DEBIAN_PROXIES:
        template = next((_ROOT / "benches" / "peers").glob(f"{role}.c*f*"))
        text = template.read_text(encoding="utf-8")
        for key, value in {"PORT": port, "ENGINE_PORT": argument, "FOLDER": folder, "MODEL": NAME}.items():
            text = text.replace(f"@{key}@", str(value))
        file = folder / template.name
        file.write_text(text, encoding="utf-8")
        return ["nginx", "-c", str(file), "-e", "stderr"] if role == "nginx" else ["haproxy", "-db", "-f", str(file)]
    return [sys.executable, "-m", "benches.gateway", role, str(port), str(argument)]


class Client:
    """A client process; it reads one order per line, because starting a process takes longer than most bursts."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def stream(self, port: int, num_streams: int, num_tokens: int = NUM_TOKENS) -> Burst:
        """Open streams at once and wait for their ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{port} {num_streams} {num_tokens}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client of port {port} failed with {num_streams} streams")
        return Burst(**json.loads(line))


@contextmanager
def _client_process(cores: Sequence[int] | None = None) -> Iterator[Client]:
    command = [sys.executable, "-m", "benches.gateway", "client"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            psutil.Process(process.pid).cpu_affinity(cores)
            yield Client(process)
        finally:
            process.kill()


async def _client() -> None:
    """Open streams as the lines of the standard input say, and print a Burst for each line."""
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
        async with asyncio.timeout(_STREAM_TIMEOUT_S):
            await asyncio.gather(*(stream.done for stream in streams))
    except TimeoutError:
        tails = [stream.tail for stream in streams if not stream.tail.endswith(_STREAM_END)]
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
        """The last bytes; the end of a stream may arrive in pieces."""
        self.start = self.first = 0.0
        prompt = random.choices(range(100, 49_000), k=32)
        options = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        self._body = json.dumps({"model": NAME, "prompt": prompt, **options}).encode()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        self.start = time.perf_counter()
        transport.write(f"{head}Content-Length: {len(self._body)}\r\n\r\n".encode() + self._body)

    def data_received(self, data: bytes) -> None:
        if not self.first and b"data: " in data:
            self.first = time.perf_counter()
        self.pieces.append(data)
        self.tail = (self.tail + data[-len(_STREAM_END) :])[-len(_STREAM_END) :]
        if self.tail == _STREAM_END:
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            answer = b"".join(self.pieces)[-300:]
            self.done.set_exception(error or ConnectionResetError(f"the stream was cut: {answer!r}"))


async def _gateway(port: int, engine_port: int) -> None:
    """Run the gateway as `slimserve serve` does, before an engine that another process started."""
    spec = EngineSpec(Path(), NAME, LaunchPlan(), Path(os.devnull), engine_port)
    engine = SupervisedEngine(spec, gateway_metrics(), print_status)
    engine.state = State.READY
    server = ProxyServer(Gateway([], {NAME: engine}, gateway_metrics()), Limits().max_body_bytes)
    await server.start(socket.create_server(("127.0.0.1", port)))
    await asyncio.Event().wait()


async def _fake(port: int, gap_ms: int) -> None:
    """Run an engine that emits a chunk on every stream each `gap_ms`, or as fast as it is read if that is 0."""
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: _FakeEngine(gap_ms / 1e3), "127.0.0.1", port, backlog=2048)
    await asyncio.Event().wait()


class _FakeEngine(asyncio.Protocol):
    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._num_left = 0
        self._is_paused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(b"}"):
            num_tokens = _NUM_TOKENS.search(self._received)
            assert num_tokens is not None
            self._received = b""
            self._num_left = int(num_tokens[1])
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
        event = _EVENT if self._num_left else b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n%b\r\n%b" % (len(event), event, b"" if self._num_left else b"0\r\n\r\n"))
        self._num_left -= 1
        if self._gap_s:
            self._loop.call_later(self._gap_s, self._emit)
        else:
            self._loop.call_soon(self._emit)


ROLES: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"client": _client, "gateway": _gateway, "fake": _fake}

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ROLES:
        uvloop.run(ROLES[sys.argv[1]](*map(int, sys.argv[2:])))
    else:
        main()
