"""One request over HTTP, timed at the socket; runs under gevent, as Locust does.

Locust's FastHttpUser is not used for streams: its `iter_lines` reads in blocks of 1,024
bytes and hands nothing on until one is full, which hides the first tokens. The lines are
read here as they arrive, with the same library underneath.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError, HTTPSocketPoolResponse

from loadtest.rows import Row

_TIMEOUT_S = 300.0


class RequestFailedError(Exception):
    """A request that brought no good answer; the message is the kind under which it is counted."""


class TimedClient:
    """Posts JSON to one server over one kept-alive connection; times count from `epoch` (perf_counter)."""

    def __init__(self, url: str, headers: Mapping[str, str], epoch: float) -> None:
        self._http = HTTPClient.from_url(url, connection_timeout=_TIMEOUT_S, network_timeout=_TIMEOUT_S)
        self._prefix = url.rstrip("/").split("://", 1)[-1].partition("/")[2]
        self._headers = {"Content-Type": "application/json", **headers}
        self._epoch = epoch
        self._token_ids: dict[str, int] = {}

    def stream_chat(self, body: Mapping[str, Any]) -> Row:
        """Stream one chat completion; the server is asked to count the tokens of every chunk."""
        counted = {"include_usage": True, "continuous_usage_stats": True}
        request = {**body, "stream": True, "stream_options": counted}
        sent_s = self._now()
        arrivals: list[tuple[float, int]] = []
        prompt_tokens = output_tokens = 0
        error = None
        try:
            for event in self._events("/v1/chat/completions", request):
                usage = event.get("usage") or {}
                prompt_tokens = usage.get("prompt_tokens", prompt_tokens)
                new = usage.get("completion_tokens", output_tokens + bool(_has_text(event))) - output_tokens
                if new > 0:
                    arrivals.append((self._now(), new))
                    output_tokens += new
            if not arrivals:
                raise RequestFailedError("empty answer")
        except RequestFailedError as failure:
            error = str(failure)
        return Row(
            due_s=sent_s,
            sent_s=sent_s,
            end_s=self._now(),
            arrivals=tuple(arrivals),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            error=error,
        )

    def score(self, model: str, query: str, items: Sequence[str], labels: Sequence[str]) -> Row:
        """Score the candidates of one prompt with vLLM's /generative_scoring.

        Looks up the labels' token ids once per client, before the clock starts.
        """
        prompt_tokens, error = 0, None
        sent_s = self._now()
        try:
            label_ids = [self._token_id(model, label) for label in labels]
            sent_s = self._now()
            body = {"model": model, "query": query, "items": items, "label_token_ids": label_ids}
            answer = self._post("/generative_scoring", body)
            prompt_tokens = answer.get("usage", {}).get("prompt_tokens", 0)
            if len(answer.get("data", ())) != len(items):
                raise RequestFailedError("wrong number of scores")
        except RequestFailedError as failure:
            error = str(failure)
        return Row(
            due_s=sent_s,
            sent_s=sent_s,
            end_s=self._now(),
            prompt_tokens=prompt_tokens,
            num_items=len(items),
            error=error,
        )

    def _token_id(self, model: str, label: str) -> int:
        if label not in self._token_ids:
            request = {"model": model, "prompt": label, "add_special_tokens": False}
            tokens = self._post("/tokenize", request)["tokens"]
            if len(tokens) != 1:
                raise RequestFailedError(f"label {label!r} is not one token")
            self._token_ids[label] = tokens[0]
        return self._token_ids[label]

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        response = self._send(path, body)
        with _FailuresNamed():
            answer = json.loads(bytes(response.read()))
        if not isinstance(answer, dict):
            raise RequestFailedError("answer is no JSON object")
        return answer

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        response = self._send(path, body)
        with _FailuresNamed():
            while line := bytes(response.readline(b"\n")):
                if not line.startswith(b"data:"):
                    continue
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    response.read()
                    return
                event = json.loads(data)
                if "error" in event:
                    raise RequestFailedError("error in stream")
                yield event
        raise RequestFailedError("stream ended early")

    def _send(self, path: str, body: Mapping[str, Any]) -> HTTPSocketPoolResponse:
        full_path = f"/{self._prefix}{path}" if self._prefix else path
        with _FailuresNamed():
            response = self._http.request("POST", full_path, body=json.dumps(body), headers=self._headers)
        if response.get_code() != 200:
            with _FailuresNamed():
                response.read()
            raise RequestFailedError(f"http {response.get_code()}")
        return response

    def _now(self) -> float:
        return time.perf_counter() - self._epoch


class _FailuresNamed:
    """Turns what the socket, HTTP and JSON layers raise into RequestFailedError under one name each."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TimeoutError):
            raise RequestFailedError("timeout") from error
        if isinstance(error, HTTPConnectionClosed | ConnectionError):
            raise RequestFailedError("connection closed") from error
        if isinstance(error, HTTPParseError):
            raise RequestFailedError("broken http") from error
        if isinstance(error, ValueError):
            raise RequestFailedError("broken json") from error
        if isinstance(error, OSError):
            raise RequestFailedError("connection failed") from error


def _has_text(event: Mapping[str, Any]) -> bool:
    """Whether a chunk carries text, for servers that count no tokens per chunk."""
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"))
