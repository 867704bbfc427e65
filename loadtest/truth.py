"""A server whose every moment is known: what a load client says of it is the client's error.

    python -m loadtest.truth --port 9000 --ttft-ms 100 --gap-ms 20 --tokens 100

It answers streamed chats and completions with one token per chunk, the first `ttft` after the request's last byte and the
others `gap` apart, and scoring requests after `ttft`; as an M/D/1 queue, one request after the other, where `--service-ms` is given. It
freezes for `--stall-s` seconds, `--stall-at-s` after the first request. GET /truth says how late its own writes were.
Pin it to a core that the client does not use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from dataclasses import dataclass, field

import uvloop
from httptools import HttpParserError, HttpRequestParser

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_MODEL = "truth"


@dataclass
class Truth:
    """What the server does when; seconds."""

    ttft_s: float = 0.1
    gap_s: float = 0.02
    num_tokens: int = 100
    stall_at_s: float = float("inf")
    stall_s: float = 0.0
    service_s: float = 0.0
    """Above 0: requests are served one after the other, each for so long (an M/D/1 queue under Poisson arrivals)."""
    first_s: float = float("inf")
    """When the first request had come, in the loop's clock."""
    free_s: float = 0.0
    lags_s: list[float] = field(default_factory=list)
    """How late each write was."""

    def begin_of(self, now_s: float) -> float:
        """When the service of a request that has come now begins to show."""
        self.first_s = min(self.first_s, now_s)
        if not self.service_s:
            return now_s + self.ttft_s
        self.free_s = max(self.free_s, now_s) + self.service_s
        return self.free_s

    def thawed(self, at_s: float) -> float:
        """The same moment, or the end of the freeze that it falls into."""
        begin_s = self.first_s + self.stall_at_s
        return begin_s + self.stall_s if begin_s <= at_s < begin_s + self.stall_s else at_s

    def report(self) -> dict[str, float]:
        """Percentiles of the server's own lateness."""
        lags = sorted(self.lags_s) or [0.0]
        shares = {"lag_p50_ms": 0.5, "lag_p99_ms": 0.99, "lag_max_ms": 1.0}
        return {name: 1e3 * lags[min(len(lags) - 1, int(len(lags) * share))] for name, share in shares.items()} | {
            "num_writes": len(self.lags_s)
        }


class TruthProtocol(asyncio.Protocol):
    """One connection; a timer per token, each on its own moment, so that a late one makes no other late."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self._loop = asyncio.get_running_loop()
        self._parser = HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self._transport.abort()

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path, truth = self._url.decode(), self._truth
        if path == "/truth":
            self._answer(truth.report())
        elif path == "/v1/models":
            self._answer({"object": "list", "data": [{"id": _MODEL, "object": "model"}]})
        elif self._parser.get_method() != b"POST":
            self._answer({"status": "ok"})
        else:
            begin_s = truth.begin_of(self._loop.time())
            body = json.loads(self._body)
            if body.get("stream"):
                wanted = body.get("max_completion_tokens") or body.get("max_tokens") or truth.num_tokens
                self._schedule(begin_s, 0, int(wanted), "messages" in body)
            else:
                scores = [[0.5] * len(body.get("label_token_ids") or body.get("labels") or [0])]
                answer = {"scores": scores * len(body.get("items", ["x"])), "model": _MODEL, "usage": {"prompt_tokens": 1}}
                self._timer = self._loop.call_at(truth.thawed(begin_s), self._answer, answer)

    def _schedule(self, begin_s: float, number: int, num_tokens: int, is_chat: bool) -> None:
        at_s = self._truth.thawed(begin_s + number * self._truth.gap_s)
        self._timer = self._loop.call_at(at_s, self._emit, begin_s, at_s, number, num_tokens, is_chat)

    def _emit(self, begin_s: float, at_s: float, number: int, num_tokens: int, is_chat: bool) -> None:
        is_last = number == num_tokens - 1
        said = {"delta": {"content": " a"}} if is_chat else {"text": " a"}
        choice = {"index": 0, **said, "finish_reason": "length" if is_last else None}
        usage = {"prompt_tokens": 1, "completion_tokens": number + 1, "total_tokens": number + 2}
        event = f"data: {json.dumps({'id': 'x', 'choices': [choice], 'usage': usage})}\n\n".encode()
        if is_last:
            event += b"data: [DONE]\n\n"
        head = _HEAD if number == 0 else b""
        end = b"0\r\n\r\n" if is_last else b""
        self._truth.lags_s.append(self._loop.time() - at_s)
        self._transport.write(b"%b%x\r\n%b\r\n%b" % (head, len(event), event, end))
        if not is_last:
            self._schedule(begin_s, number + 1, num_tokens, is_chat)

    def _answer(self, body: object) -> None:
        text = json.dumps(body).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        self._transport.write(head % (len(text), text))


async def _serve(port: int, truth: Truth) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: TruthProtocol(truth), "127.0.0.1", port, backlog=2048
    )
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="a server of known latency")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ttft-ms", type=float, default=100.0)
    parser.add_argument("--gap-ms", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=100, help="where a request names no number")
    parser.add_argument("--stall-at-s", type=float, default=float("inf"))
    parser.add_argument("--stall-s", type=float, default=0.0)
    parser.add_argument("--service-ms", type=float, default=0.0)
    parser.add_argument("--core", type=int, help="run on this core alone")
    given = parser.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    truth = Truth(
        given.ttft_ms / 1e3, given.gap_ms / 1e3, given.tokens, given.stall_at_s, given.stall_s, given.service_ms / 1e3
    )
    uvloop.run(_serve(given.port, truth))


if __name__ == "__main__":
    main()
