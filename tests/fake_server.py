"""A fake vLLM server with fixed latencies; the model's name selects a fault.

It streams one chunk per entry of CHUNKS, the first after TTFT_S and the others GAP_S apart, and scores every item
0.25, items with the word "good" 0.75.
It accepts vLLM's command line, so that an Engine can start it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TTFT_S = 0.050
GAP_S = 0.020
SCORE_S = 0.040
CHUNKS = (1, 1, 1, 2, 1, 1, 1, 2, 1, 1)
"""Number of tokens of each streamed chunk."""
MODELS = ("good", "http-500", "broken-json", "cut", "empty", "error-event", "no-usage", "few-scores", "split-label")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            return self._answer(200, {})
        if os.environ.get("FAKE_KEY") and self.headers["Authorization"] != f"Bearer {os.environ['FAKE_KEY']}":
            return self._answer(401, {})
        if self.path == "/v1/models":
            names = os.environ.get("FAKE_MODELS", ",".join(MODELS)).split(",")
            return self._answer(200, {"data": [{"id": name} for name in names]})
        return self._answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] == "http-500":
            return self._answer(500, {"error": {"message": "requested by the test"}})
        if self.path == "/tokenize":
            return self._answer(200, {"tokens": [1, 2] if body["model"] == "split-label" else [len(body["prompt"])]})
        if self.path == "/generative_scoring":
            time.sleep(SCORE_S)
            num_items = len(body["items"]) - (body["model"] == "few-scores")
            scores = [{"index": index, "score": 0.25} for index in reversed(range(num_items))]
            return self._answer(200, {"data": scores, "usage": {"prompt_tokens": 100}})
        if self.path == "/v1/score":
            time.sleep(SCORE_S)
            num_items = len(body["items"]) - (body["model"] == "few-scores")
            is_first = [("good" in item) != (body["model"] == "wrong") for item in body["items"][:num_items]]
            pairs = [[0.75, 0.25] if first else [0.25, 0.75] for first in is_first]
            logprobs = [[-0.1 if "good" in label else -2.0 for label in body["labels"]]] * num_items
            return self._answer(200, {"scores": pairs, "logprobs": logprobs, "usage": {"prompt_tokens": 100}})
        if self.path == "/v1/completions":
            listed = [{" yes": -1.0, " no": -2.0}] if body["model"] == "good" else [{" maybe": -1.0}]
            choices = [{"index": index, "logprobs": {"top_logprobs": listed}} for index in range(len(body["prompt"]))]
            return self._answer(200, {"choices": choices[::-1]})
        if not body.get("stream"):
            choice = {"message": {"content": "<think>\n1\n</think>\n42"}}
            return self._answer(200, {"choices": [choice], "usage": {"completion_tokens": 7}})
        return self._stream(body["model"])

    def _answer(self, code: int, document: dict[str, Any]) -> None:
        text = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, model: str) -> None:
        next_s = time.perf_counter()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": self._usage(model, 0)})
        num_sent = 0
        for index, count in enumerate(() if model == "empty" else CHUNKS):
            next_s += GAP_S if index else TTFT_S
            time.sleep(max(0.0, next_s - time.perf_counter()))
            num_sent += count
            if model == "broken-json" and index == 3:
                self._chunk(b"data: {not json\n\n")
            elif model == "error-event" and index == 3:
                self._event({"error": {"message": "requested by the test"}})
            elif model == "cut" and index == 3:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            else:
                self._event({"choices": [{"delta": {"content": "x"}}], "usage": self._usage(model, num_sent)})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _usage(self, model: str, num_sent: int) -> dict[str, int] | None:
        return None if model == "no-usage" else {"prompt_tokens": 11, "completion_tokens": num_sent}

    def _event(self, document: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(document).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # as many clients may come at once as a real server lets in


def main() -> None:
    if os.environ.get("FAKE_DIES"):
        print("WARNING: may cause fd limit errors like `OSError: too many open files`\nProcess EngineCore:")
        print("Traceback (most recent call last):\n  File x\nValueError: the head size is odd")
        print("Traceback (most recent call last):\n  File y\nRuntimeError: failed. See root cause above.")
        sys.exit(3)
    if os.environ.get("FAKE_STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ.get("FAKE_CHILD"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    _Server(("127.0.0.1", port), _Handler).serve_forever()


if __name__ == "__main__":
    main()
