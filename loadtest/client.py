"""Asks one model: requests made of prompts before the load begins, and rows made of what came back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from slimserve.core.errors import UserError
from slimserve.loadtest.http_client import Exchange, HttpClient
from slimserve.loadtest.rows import Row
from slimserve.loadtest.sse import read_stream
from slimserve.workloads.interface import ChatPrompt, Prompt, ScoringPrompt

_NUM_LOGPROBS = 5
"""The most that every OpenAI-compatible server allows for completions."""
_PROBE = ScoringPrompt("Water is wet:", (" it is.",), (" yes", " no"), (True,), 0)


@dataclass(frozen=True)
class PreparedRequest:
    """One request, ready to be written."""

    kind: str
    prompt: int
    """Its number in the order of the run's seed."""
    path: str
    body: bytes
    num_items: int = 0
    labels: tuple[str, ...] = ()


class ModelClient:
    """One model behind one server. Call `prepare` before the load: it asks the server what it can do."""

    def __init__(self, url: str, model: str, headers: Mapping[str, str], timeout_s: float, endpoint: str) -> None:
        self._wire = HttpClient(url, headers, timeout_s)
        self._model = model
        self._endpoint = endpoint
        self._label_ids: dict[str, int] = {}
        self._counts_chunks = True

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Find the scoring endpoint and whether the server counts the tokens of each chunk.

        A server that answers nothing now is left to show its fault under load, under its name. Raises UserError
        where the endpoint is unknown.
        """
        if self._endpoint not in {"auto", *SCORING}:
            raise UserError("--endpoint", self._endpoint, "is unknown", f"choose from auto, {', '.join(SCORING)}")
        if any(isinstance(prompt, ScoringPrompt) for prompt in prompts):
            asked = [name for name in SCORING if name != "rerank"] if self._endpoint == "auto" else [self._endpoint]
            self._endpoint = next((name for name in asked if self._can_score(name)), asked[0])
        if any(isinstance(prompt, ChatPrompt) for prompt in prompts):
            body = self._chat_body(ChatPrompt(({"role": "user", "content": "Ready?"},), 1, "", "", "", {}), False)
            self._counts_chunks = self._wire.post("/v1/chat/completions", msgspec.json.encode(body)).status != 400

    def make_request(self, number: int, kind: str, prompt: Prompt, exact_tokens: bool) -> PreparedRequest:
        """The request that asks prompt `number`."""
        if isinstance(prompt, ChatPrompt):
            body = self._chat_body(prompt, exact_tokens)
            return PreparedRequest(kind, number, "/v1/chat/completions", msgspec.json.encode(body))
        scoring = SCORING[self._endpoint]
        body = {
            "model": self._model,
            **scoring.body(prompt, [self._label_ids.get(label, 0) for label in prompt.labels]),
        }
        return PreparedRequest(kind, number, scoring.path, msgspec.json.encode(body), len(prompt.items), prompt.labels)

    def send(self, request: PreparedRequest, scheduled_s: float, epoch: float) -> Row:
        """Ask and wait for the whole answer; `scheduled_s` counts from `epoch`, a moment of perf_counter. Never raises."""
        exchange = self._wire.post(request.path, request.body)
        if request.num_items:
            return self._score_row(request, exchange, scheduled_s, epoch)
        answer = read_stream(exchange.pieces) if exchange.status == 200 else None
        error = failure_of(exchange) or (answer.error if answer else None)
        return Row(
            scheduled_s=scheduled_s,
            sent_s=exchange.sent_s - epoch,
            end_s=exchange.end_s - epoch,
            arrivals=tuple((chunk.at_s - epoch, chunk.num_tokens) for chunk in answer.chunks) if answer else (),
            prompt_tokens=answer.prompt_tokens if answer else 0,
            output_tokens=answer.output_tokens if answer else 0,
            error=error,
            kind=request.kind,
            prompt=request.prompt,
            first_answer_s=answer.first_answer_s - epoch if answer and answer.first_answer_s is not None else None,
            cached_tokens=answer.cached_tokens if answer else None,
            finish_reason=answer.finish_reason if answer else None,
            text=_whole_text(answer.reasoning, answer.text) if answer else "",
        )

    def close(self) -> None:
        self._wire.close()

    def _score_row(self, request: PreparedRequest, exchange: Exchange, scheduled_s: float, epoch: float) -> Row:
        error = failure_of(exchange)
        scores: tuple[float, ...] = ()
        usage: dict[str, Any] = {}
        if error is None:
            try:
                answer = msgspec.json.decode(exchange.body)
                usage = answer.get("usage") or {}
                scores = tuple(SCORING[self._endpoint].scores(answer, request.labels))
                if len(scores) != request.num_items:
                    error = "wrong number of scores"
                elif not all(map(math.isfinite, scores)):
                    error = "label not among the log-probabilities"
            except (msgspec.MsgspecError, UnicodeDecodeError):
                error = "broken json"
            except (AttributeError, KeyError, TypeError, ValueError, IndexError):
                error = "no scores"
        return Row(
            scheduled_s=scheduled_s,
            sent_s=exchange.sent_s - epoch,
            end_s=exchange.end_s - epoch,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            num_items=request.num_items,
            error=error,
            kind=request.kind,
            prompt=request.prompt,
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            scores=scores if error is None else (),
        )

    def _chat_body(self, prompt: ChatPrompt, exact_tokens: bool) -> dict[str, Any]:
        counted = {"include_usage": True} | ({"continuous_usage_stats": True} if self._counts_chunks else {})
        body = {
            "model": self._model,
            "messages": prompt.messages,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": counted,
        }
        return body | ({"ignore_eos": True} if exact_tokens else {})

    def _can_score(self, endpoint: str) -> bool:
        if endpoint == "generative_scoring" and not self._find_label_ids():
            return False
        self_named = {"model": self._model, **SCORING[endpoint].body(_PROBE, list(self._label_ids.values()))}
        return self._wire.post(SCORING[endpoint].path, msgspec.json.encode(self_named)).status == 200

    def _find_label_ids(self) -> bool:
        """Whether the server tells the token of each label (vLLM's /tokenize)."""
        for label in _PROBE.labels:
            body = {"model": self._model, "prompt": label, "add_special_tokens": False}
            exchange = self._wire.post("/tokenize", msgspec.json.encode(body))
            try:
                tokens = msgspec.json.decode(exchange.body)["tokens"] if exchange.status == 200 else []
            except (msgspec.MsgspecError, KeyError, TypeError):
                tokens = []
            if len(tokens) != 1:
                return False
            self._label_ids[label] = tokens[0]
        return True


def failure_of(exchange: Exchange) -> str | None:
    """The kind of failure that the exchange itself shows; None where a whole answer with status 200 came."""
    return exchange.error or (None if exchange.status == 200 else f"http {exchange.status}")


@dataclass(frozen=True)
class Scoring:
    """A way to ask for scores: where, with what body, and how the first label's share is read per candidate."""

    path: str
    body: Callable[[ScoringPrompt, Sequence[int]], dict[str, Any]]
    scores: Callable[[dict[str, Any], Sequence[str]], list[float]]


def _completion_scores(answer: dict[str, Any], labels: Sequence[str]) -> list[float]:
    """From the log-probabilities of the next token; a label that is not listed counts as the least likely that is."""
    scores = []
    for choice in sorted(answer["choices"], key=lambda entry: int(entry["index"])):
        listed: dict[str, float] = choice["logprobs"]["top_logprobs"][0]
        if not set(listed) & set(labels):
            scores.append(math.nan)
            continue
        shares = [math.exp(listed.get(label, min(listed.values()))) for label in labels]
        scores.append(shares[0] / sum(shares))
    return scores


SCORING = {
    "score": Scoring(
        "/v1/score",
        lambda prompt, _: {
            "query": prompt.query,
            "items": prompt.items,
            "labels": prompt.labels,
            "apply_softmax": True,
        },
        lambda answer, _: [entry[0] for entry in answer["scores"]],
    ),
    "generative_scoring": Scoring(
        "/generative_scoring",
        lambda prompt, ids: {"query": prompt.query, "items": prompt.items, "label_token_ids": ids},
        lambda answer, _: [entry["score"] for entry in sorted(answer["data"], key=lambda entry: int(entry["index"]))],
    ),
    "completions": Scoring(
        "/v1/completions",
        lambda prompt, _: {
            "prompt": [prompt.query + item for item in prompt.items],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": _NUM_LOGPROBS,
        },
        _completion_scores,
    ),
    "rerank": Scoring(
        "/v1/rerank",
        lambda prompt, _: {"query": prompt.query, "documents": prompt.items},
        lambda answer, _: [
            entry["relevance_score"] for entry in sorted(answer["results"], key=lambda entry: int(entry["index"]))
        ],
    ),
}
"""In the order of preference; `rerank` puts a question of its own, so it is never chosen by itself."""


def _whole_text(reasoning: str, text: str) -> str:
    """What was generated, as the verifier reads it: a chain of thought that came apart goes back between its tags."""
    return f"<think>{reasoning}</think>{text}" if reasoning else text
