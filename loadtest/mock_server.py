"""A mock server with an exact latency schedule, for `slimserve loadtest --calibrate`, the tests and the benchmarks.

    python -m slimserve.loadtest.mock_server --port 9000 --ttft-ms 100 --gap-ms 20 --tokens 100

It streams chats and completions with one token per chunk. The first token leaves `ttft` after the request's last byte
and the others follow `gap` apart; all other responses take `ttft`. With `--service-ms` it is an M/D/1 queue that serves
one request at a time. With `--stall-s` it freezes `--stall-at-s` after the first request, then sends what is overdue.
/metrics has vLLM's counters, and GET /lateness reports how late the server's own writes were (/lateness?reset clears
the samples). The first line of output is the server's URL.

The timers of asyncio and epoll have a resolution of 1 ms. So one loop sleeps until shortly before the next write and
then spins, which uses a full core under load; pin it to a core that the client does not use.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import heapq
import itertools
import json
import math
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from httptools import HttpParserError, HttpRequestParser
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from slimserve.core.parent_death import die_with_parent
from slimserve.core.statistics import percentile

MODEL = "mock"
PROMPT_TOKENS = 10
"""Number of tokens that the server reports for every prompt."""
SCORE = 0.5
"""Score of every candidate and label."""
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")
_ANCILLARY = socket.CMSG_SPACE(_TIMESPEC.size)
_READ_BYTES = 2**18
_SPIN_S = 0.002
"""Seconds of spinning before a write: epoll rounds up to 1 ms, and a core takes up to 0.1 ms to wake."""
_IDLE_S = 1.0
_NICENESS = -20
"""Priority on a pinned core; otherwise the scheduler would prefer other processes to one that spins."""
_KEPT_LAGS = 1_000_000
_JSON, _TEXT, _EVENTS = b"application/json", b"text/plain; version=0.0.4; charset=utf-8", b"text/event-stream"
# Buckets of vllm/v1/metrics/buckets.py.
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)


@dataclass(frozen=True)
class MockSchedule:
    """Latencies of the mock server in seconds."""

    ttft_s: float = 0.1
    gap_s: float = 0.02
    num_tokens: int = 100
    """Number of tokens of a stream, if the request does not set one."""
    service_s: float = 0.0
    """Above 0, requests are served one at a time for this long (an M/D/1 queue under Poisson arrivals)."""
    stall_at_s: float = float("inf")
    """Start of the freeze, counted from the first request."""
    stall_s: float = 0.0


class ResponseTimes:
    """Computes when the response to each request begins; requests must be given in order of arrival."""

    def __init__(self, schedule: MockSchedule) -> None:
        self._schedule = schedule
        self._stall_begin_s = float("inf")
        self._free_s = 0.0

    def begin_of(self, arrived_s: float) -> float:
        """Return the time of the first token for a request that arrived at this time."""
        if self._stall_begin_s == float("inf"):
            self._stall_begin_s = arrived_s + self._schedule.stall_at_s
        if not self._schedule.service_s:
            return arrived_s + self._schedule.ttft_s
        self._free_s = self.after_stall(max(self._free_s, arrived_s) + self._schedule.service_s)
        return self._free_s

    def after_stall(self, at_s: float) -> float:
        """Return the same time, or the end of the freeze if the time falls into it."""
        end_s = self._stall_begin_s + self._schedule.stall_s
        return end_s if self._stall_begin_s <= at_s < end_s else at_s


class MockServer:
    """One loop over the sockets and a heap of scheduled writes; a late write does not delay the others."""

    def __init__(self, schedule: MockSchedule, port: int = 0) -> None:
        self.schedule = schedule
        self.course = ResponseTimes(schedule)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._connections: dict[int, _Connection] = {}
        self._pending: list[tuple[float, int, _Answer]] = []
        self._order = itertools.count()
        self._lags_s: deque[float] = deque(maxlen=_KEPT_LAGS)
        self._registry = CollectorRegistry()
        self._requests = Counter("vllm:request_success", "", registry=self._registry)
        self._prompt_tokens = Counter("vllm:prompt_tokens", "", registry=self._registry)
        self._output_tokens = Counter("vllm:generation_tokens", "", registry=self._registry)
        self._ttft = _histogram("vllm:time_to_first_token_seconds", _TTFT_BUCKETS, self._registry)
        self._itl = _histogram("vllm:inter_token_latency_seconds", _ITL_BUCKETS, self._registry)
        self._e2e = _histogram("vllm:e2e_request_latency_seconds", _E2E_BUCKETS, self._registry)

    def run(self) -> None:
        """Serve until the process is killed."""
        while True:
            self._write_scheduled()
            wait_s = self._pending[0][0] - time.monotonic() if self._pending else _IDLE_S
            # One event at a time, because the order of readiness is the order of the queue.
            for descriptor, _ in self._epoll.poll(max(0.0, wait_s - _SPIN_S), 1):
                if descriptor == self._listener.fileno():
                    self._accept()
                elif not self._connections[descriptor].read():
                    self._epoll.unregister(descriptor)
                    self._connections.pop(descriptor).stream.close()

    def schedule_write(self, at_s: float, answer: _Answer) -> None:
        heapq.heappush(self._pending, (self.course.after_stall(at_s), next(self._order), answer))

    def metrics(self) -> bytes:
        return generate_latest(self._registry)

    def lateness(self, is_reset: bool) -> dict[str, float]:
        """Return percentiles of the delay of writes in milliseconds, and their number."""
        num_writes, lags = len(self._lags_s), list(self._lags_s) or [0.0]
        if is_reset:
            self._lags_s.clear()
        shares = {"lag_p50_ms": 0.5, "lag_p99_ms": 0.99, "lag_max_ms": 1.0}
        return {name: 1e3 * percentile(lags, share) for name, share in shares.items()} | {"num_writes": num_writes}

    def _accept(self) -> None:
        stream, _ = self._listener.accept()
        stream.setblocking(False)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._connections[stream.fileno()] = _Connection(stream, self)
        self._epoll.register(stream, select.EPOLLIN)

    def _write_scheduled(self) -> None:
        # Only the writes scheduled by now, so that requests are read in between even if many writes are overdue.
        now_s = time.monotonic()
        while self._pending and self._pending[0][0] <= now_s:
            at_s, _, answer = heapq.heappop(self._pending)
            written_s = time.monotonic()
            if not answer.connection.send(answer.chunks[answer.number]):
                continue
            self._lags_s.append(written_s - at_s)
            self._count(answer, written_s)
            answer.number += 1
            if answer.number < len(answer.chunks):
                self.schedule_write(answer.begin_s + answer.number * self.schedule.gap_s, answer)

    def _count(self, answer: _Answer, written_s: float) -> None:
        if answer.is_stream:
            self._output_tokens.inc()
            if answer.number:
                self._itl.observe(written_s - answer.written_s)
            else:
                self._ttft.observe(written_s - answer.arrived_s)
            answer.written_s = written_s
        if answer.number == len(answer.chunks) - 1:
            self._requests.inc()
            self._prompt_tokens.inc(PROMPT_TOKENS)
            self._e2e.observe(written_s - answer.arrived_s)


@dataclass(slots=True)
class _Answer:
    """The response to one request, written chunk by chunk."""

    connection: _Connection
    chunks: list[bytes]
    arrived_s: float
    begin_s: float
    is_stream: bool
    number: int = 0
    """Index of the next chunk."""
    written_s: float = 0.0
    """Time at which the previous chunk was written."""


class _Connection:
    """One client's socket with the parser of its requests."""

    def __init__(self, stream: socket.socket, server: MockServer) -> None:
        self.stream = stream
        self._server = server
        self._parser = HttpRequestParser(self)
        self._path = ""
        self._body = b""
        self._arrived_s = 0.0

    def read(self) -> bool:
        """Read the available data; return whether the connection is still open."""
        try:
            data, ancillary, _, _ = self.stream.recvmsg(_READ_BYTES, _ANCILLARY)
            self._arrived_s = time.monotonic()
            for _, _, stamp in ancillary:
                seconds, nanoseconds = _TIMESPEC.unpack(stamp)
                self._arrived_s -= time.time() - (seconds + nanoseconds * 1e-9)
            self._parser.feed_data(data)
        except (OSError, HttpParserError):
            return False
        return bool(data)

    def send(self, data: bytes) -> bool:
        """Send `data`; return whether the client accepted all of it."""
        try:
            return self.stream.send(data) == len(data)
        except OSError:
            return False

    # Callbacks of httptools.

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url.decode("latin-1"), b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        server, path = self._server, self._path
        if self._parser.get_method() == b"POST" and path != "/tokenize":
            body = json.loads(self._body)
            chunks, num_gaps = _answer_to(path, body, server.schedule)
            begin_s = server.course.begin_of(self._arrived_s) + num_gaps * server.schedule.gap_s
            server.schedule_write(begin_s, _Answer(self, chunks, self._arrived_s, begin_s, bool(body.get("stream"))))
        elif path == "/metrics":
            self.send(_response(server.metrics(), _TEXT))
        else:
            documents: dict[str, Any] = {
                "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 2**20}]},
                "/tokenize": {"tokens": [1], "count": 1, "max_model_len": 2**20},
                "/lateness": server.lateness(is_reset=path.endswith("?reset")) if path.startswith("/lateness") else {},
            }
            self.send(_response(json.dumps(documents.get(path.partition("?")[0], {})).encode()))


def _answer_to(path: str, body: dict[str, Any], schedule: MockSchedule) -> tuple[list[bytes], int]:
    """Return the chunks of a response, and the number of gaps between its start and its first chunk."""
    is_chat = path == "/v1/chat/completions"
    if not is_chat and path != "/v1/completions":
        num_items = len(body.get("items") or body.get("documents") or [0])
        return [_scores(num_items, len(body.get("label_token_ids") or body.get("labels") or [0]))], 0
    num_tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or schedule.num_tokens)
    if not body.get("stream"):
        return [_completion(is_chat, num_tokens)], num_tokens - 1
    options = body.get("stream_options") or {}
    has_usage_each, has_usage_last = bool(options.get("continuous_usage_stats")), bool(options.get("include_usage"))
    return _stream(is_chat, num_tokens, has_usage_each, has_usage_last), 0


@functools.lru_cache(maxsize=64)
def _stream(is_chat: bool, num_tokens: int, has_usage_each: bool, has_usage_last: bool) -> list[bytes]:
    """Return the chunks of a streamed response; cached, so that a scheduled write does no other work."""
    fixed = {
        "id": "mock",
        "object": "chat.completion.chunk" if is_chat else "text_completion",
        "created": 0,
        "model": MODEL,
    }
    chunks = []
    for number in range(1, num_tokens + 1):
        reason = "length" if number == num_tokens else None
        content = {"delta": {"role": "assistant", "content": " a"}} if is_chat else {"text": " a"}
        event = {**fixed, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}
        events: list[dict[str, Any]] = [event | {"usage": _usage(number)} if has_usage_each else event]
        if reason and has_usage_last:
            events.append({**fixed, "choices": [], "usage": _usage(number)})
        lines = [json.dumps(event) for event in events] + ["[DONE]"] * bool(reason)
        data = "".join(f"data: {line}\n\n" for line in lines).encode()
        chunks.append(b"%x\r\n%b\r\n" % (len(data), data))
    chunks[0] = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n%b" % (_EVENTS, chunks[0])
    chunks[-1] += b"0\r\n\r\n"
    return chunks


def _completion(is_chat: bool, num_tokens: int) -> bytes:
    content = (
        {"message": {"role": "assistant", "content": " a" * num_tokens}} if is_chat else {"text": " a" * num_tokens}
    )
    choice = {"index": 0, **content, "finish_reason": "length"}
    return _response(
        json.dumps({"id": "mock", "model": MODEL, "choices": [choice], "usage": _usage(num_tokens)}).encode()
    )


def _scores(num_items: int, num_labels: int) -> bytes:
    """Return one response that suits clients of /v1/score, /v1/rerank and vLLM's /generative_scoring."""
    answer = {
        "scores": [[SCORE] * num_labels] * num_items,
        "logprobs": [[math.log(SCORE)] * num_labels] * num_items,
        "results": [{"index": index, "relevance_score": SCORE} for index in range(num_items)],
        "data": [{"index": index, "object": "score", "score": SCORE} for index in range(num_items)],
    }
    return _response(json.dumps({"model": MODEL, "object": "list", **answer, "usage": _usage(0)}).encode())


def _usage(num_tokens: int) -> dict[str, int]:
    total = PROMPT_TOKENS + num_tokens
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": num_tokens, "total_tokens": total}


def _response(body: bytes, kind: bytes = _JSON) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)


def _histogram(name: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(name, "", buckets=buckets, registry=registry)


@dataclass(frozen=True)
class RunningMockServer:
    """A mock server in its own process."""

    url: str

    def lateness(self) -> dict[str, float]:
        """Return `lag_p50_ms`, `lag_p99_ms`, `lag_max_ms` and `num_writes` since the last call."""
        import httpx

        lateness: dict[str, float] = httpx.get(f"{self.url}/lateness?reset").raise_for_status().json()
        return lateness


@contextmanager
def running_mock_server(schedule: MockSchedule, core: int | None = None) -> Iterator[RunningMockServer]:
    """Run a mock server in another process on a free port, optionally pinned to a core; it ends with the context."""
    command = [
        *(sys.executable, "-m", "slimserve.loadtest.mock_server", "--tokens", str(schedule.num_tokens)),
        *("--ttft-ms", str(schedule.ttft_s * 1e3), "--gap-ms", str(schedule.gap_s * 1e3)),
        *("--service-ms", str(schedule.service_s * 1e3)),
        *("--stall-at-s", str(schedule.stall_at_s), "--stall-s", str(schedule.stall_s)),
        *(() if core is None else ("--core", str(core))),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the mock server did not start; its error message is above")
            yield RunningMockServer(url)
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="Mock server with an exact latency schedule.")
    parser.add_argument("--port", type=int, default=0, help="port; 0 selects a free one")
    parser.add_argument("--ttft-ms", type=float, default=100.0)
    parser.add_argument("--gap-ms", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=100, help="number of tokens, if the request sets none")
    parser.add_argument("--service-ms", type=float, default=0.0, help="serve one request at a time for this long")
    parser.add_argument("--stall-at-s", type=float, default=float("inf"), help="start of a freeze")
    parser.add_argument("--stall-s", type=float, default=0.0)
    parser.add_argument("--core", type=int, help="core to run on")
    arguments = parser.parse_args()
    die_with_parent()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
        with contextlib.suppress(OSError):  # only root may raise the priority
            os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    schedule = MockSchedule(
        ttft_s=arguments.ttft_ms / 1e3,
        gap_s=arguments.gap_ms / 1e3,
        num_tokens=arguments.tokens,
        service_s=arguments.service_ms / 1e3,
        stall_at_s=arguments.stall_at_s,
        stall_s=arguments.stall_s,
    )
    server = MockServer(schedule, arguments.port)
    sys.stdout.write(server.url + "\n")
    sys.stdout.flush()
    # A garbage collection would otherwise walk all imported objects in the middle of a stream.
    gc.freeze()
    server.run()


if __name__ == "__main__":
    main()
