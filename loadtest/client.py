"""Prepares the requests of a load test from prompts, sends them to one model and turns the responses into rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from slimserve.core.errors import UserError
from slimserve.core.openai_client import count_of, server_sentence
from slimserve.loadtest.choices import CHOICE_PATH, choice_body, choice_logprobs
from slimserve.loadtest.http_client import Exchange, HttpClient
from slimserve.loadtest.rows import Row
from slimserve.loadtest.sse import read_stream
from slimserve.workloads.interface import ChatPrompt, ChoicePrompt, Prompt, ScoringPrompt, TextPrompt, join_reply

_NUM_LOGPROBS = 5
"""Largest number that every OpenAI-compatible server accepts for completions."""
_PROBE_TIMEOUT_S = 30.0
_REFUSED = {400, 422}
"""Statuses of a server that does not know an option of a request."""
_STREAM_OPTIONS: tuple[dict[str, Any], ...] = (
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream_options": {"include_usage": True}},
    {},
)
"""Options of a stream that make a server count tokens, those that count most first."""
_MAX_ERROR_BYTES = 65536
_MAX_SENTENCES = 200
"""Number of different explanations that are kept, since some servers write a request's id into each."""
_PROBE = ScoringPrompt("Water is wet:", (" it is.",), (" yes", " no"), (True,), 0)


@dataclass(frozen=True)
class PreparedRequest:
    """One request with its encoded body."""

    kind: str
    prompt: int
    """Number of the prompt in the order of the prompt seed."""
    path: str
    body: bytes
    num_items: int = 0
    labels: tuple[str, ...] = ()
    fixed_tokens: int = 0
    """Number of tokens of the answer, if the request fixes it; else 0."""
    num_choices: int = 0
    """Number of continuations whose log-probabilities are asked, for a ChoicePrompt; it counts as one item."""


class ModelClient:
    """Client of one model on one server. Call `prepare` before the load to probe what the server supports."""

    def __init__(self, url: str, model: str, headers: Mapping[str, str], timeout_s: float, endpoint: str) -> None:
        self.sentences: Counter[tuple[str, str]] = Counter()
        """Number of failures by kind and by the server's explanation."""
        self._http = HttpClient(url, headers, timeout_s)
        self._probe_http = HttpClient(url, headers, min(timeout_s, _PROBE_TIMEOUT_S))
        self._silence: Exchange | None = None
        """The exchange that a server left without an answer before the load."""
        self._model = model
        self._endpoint = endpoint
        self._label_ids: dict[str, int] = {}
        self._stream_options = _STREAM_OPTIONS[0]

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Find the scoring endpoint, and the options of a stream with which the server counts its tokens.

        A server that does not respond is not an error here; its failures are counted under load. Raises UserError for
        an unknown endpoint.
        """
        if self._endpoint not in {"auto", *SCORING}:
            raise UserError("--endpoint", self._endpoint, "is unknown", f"choose from auto, {', '.join(SCORING)}")
        if any(isinstance(prompt, ScoringPrompt) for prompt in prompts):
            is_auto = self._endpoint == "auto"
            choices = [name for name in SCORING if name != "rerank"] if is_auto else [self._endpoint]
            self._endpoint = next((name for name in choices if self._can_score(name)), choices[0])
        if any(isinstance(prompt, ChatPrompt) for prompt in prompts):
            probe = ChatPrompt(({"role": "user", "content": "Ready?"},), 1, "", "", "", {})
            self._find_stream_options(probe)
        elif any(isinstance(prompt, TextPrompt) for prompt in prompts):
            self._find_stream_options(TextPrompt("Ready?", 1, 0))
        self._probe_http.close()

    def make_request(self, number: int, kind: str, prompt: Prompt, exact_tokens: bool) -> PreparedRequest:
        """Return the request for prompt `number`."""
        if isinstance(prompt, ChatPrompt):
            body = self._chat_body(prompt, exact_tokens)
            fixed_tokens = prompt.max_tokens if exact_tokens else 0
            path = "/v1/chat/completions"
            return PreparedRequest(kind, number, path, msgspec.json.encode(body), fixed_tokens=fixed_tokens)
        if isinstance(prompt, ChoicePrompt):
            body = {"model": self._model, **choice_body(prompt)}
            num_choices = len(prompt.choices)
            return PreparedRequest(kind, number, CHOICE_PATH, msgspec.json.encode(body), 1, num_choices=num_choices)
        if isinstance(prompt, TextPrompt):
            body = {"prompt": prompt.text, **self._stream_body(prompt.num_tokens, exact_tokens)}
            fixed_tokens = prompt.num_tokens if exact_tokens else 0
            path = "/v1/completions"
            return PreparedRequest(kind, number, path, msgspec.json.encode(body), fixed_tokens=fixed_tokens)
        assert isinstance(prompt, ScoringPrompt)
        scoring = SCORING[self._endpoint]
        body = {
            "model": self._model,
            **scoring.body(prompt, [self._label_ids.get(label, 0) for label in prompt.labels]),
        }
        return PreparedRequest(kind, number, scoring.path, msgspec.json.encode(body), len(prompt.items), prompt.labels)

    def send(self, request: PreparedRequest, scheduled_s: float, epoch: float) -> Row:
        """Send a request and wait for the full response. Never raises.

        `scheduled_s` counts from `epoch`, a time of perf_counter.
        """
        exchange = self._http.post(request.path, request.body)
        read = self._score_row if request.num_items else self._stream_row
        try:
            row, sentence = read(request, exchange)
        except Exception as error:  # a server may answer anything, and one answer must not end the load
            row, sentence = Row(0.0, 0.0, 0.0, error=f"unreadable answer ({type(error).__name__})"), str(error)
        if row.error is not None and (len(self.sentences) < _MAX_SENTENCES or (row.error, sentence) in self.sentences):
            self.sentences[row.error, sentence] += 1
        return replace(
            row,
            scheduled_s=scheduled_s,
            sent_s=exchange.sent_s - epoch,
            end_s=exchange.end_s - epoch,
            arrivals=tuple((at_s - epoch, num_tokens) for at_s, num_tokens in row.arrivals),
            kind=request.kind,
            prompt=request.prompt,
            first_answer_s=row.first_answer_s - epoch if row.first_answer_s is not None else None,
            fixed_tokens=request.fixed_tokens,
        )

    def close(self) -> None:
        self._http.close()

    def _stream_row(self, request: PreparedRequest, exchange: Exchange) -> tuple[Row, str]:  # noqa: ARG002
        """Return the row of a streamed answer, with times of the exchange's clock, and the server's explanation."""
        failure = failure_of(exchange)
        if exchange.status != 200:
            return Row(0.0, 0.0, 0.0, error=failure), server_sentence(exchange.body)
        answer = read_stream(exchange.pieces)
        row = Row(
            *(0.0, 0.0, 0.0),
            arrivals=tuple(answer.chunks),
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            error=failure or answer.error,
            first_answer_s=answer.first_answer_s,
            cached_tokens=answer.cached_tokens,
            finish_reason=answer.finish_reason,
            text=join_reply(answer.reasoning, answer.text),
        )
        return row, "" if failure else answer.sentence

    def _score_row(self, request: PreparedRequest, exchange: Exchange) -> tuple[Row, str]:
        """Return the row of a score request, and the server's explanation if it failed."""
        error = failure_of(exchange)
        scores: tuple[float, ...] = ()
        usage: Any = None
        if error is None:
            try:
                answer = msgspec.json.decode(exchange.body)
                usage = answer.get("usage")
                if answer.get("error"):
                    raise ValueError("error")
                if request.num_choices:
                    scores = tuple(choice_logprobs(answer))
                else:
                    scores = tuple(map(float, SCORING[self._endpoint].scores(answer, request.labels)))
                if len(scores) != (request.num_choices or request.num_items):
                    error = "wrong number of scores"
                elif not all(map(math.isfinite, scores)):
                    error = "label not among the log-probabilities"
            except (msgspec.MsgspecError, UnicodeDecodeError):
                error = "broken json"
            except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
                error = "no scores"
        row = Row(
            *(0.0, 0.0, 0.0),
            prompt_tokens=count_of(usage, "prompt_tokens") or 0,
            num_items=request.num_items,
            error=error,
            cached_tokens=count_of(usage.get("prompt_tokens_details"), "cached_tokens")
            if isinstance(usage, dict)
            else None,
            scores=scores if error is None else (),
        )
        return row, server_sentence(exchange.body[:_MAX_ERROR_BYTES]) if error else ""

    def _chat_body(self, prompt: ChatPrompt, exact_tokens: bool) -> dict[str, Any]:
        body = {"messages": prompt.messages, **self._stream_body(prompt.max_tokens, exact_tokens)}
        # The fields of the user's row take precedence; the reader of rows keeps none that shape the stream.
        return {**body, **prompt.request}

    def _stream_body(self, max_tokens: int, exact_tokens: bool) -> dict[str, Any]:
        body = {
            "model": self._model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            **self._stream_options,
        }
        return body | ({"ignore_eos": True} if exact_tokens else {})

    def _find_stream_options(self, prompt: Prompt) -> None:
        for self._stream_options in _STREAM_OPTIONS:
            request = self.make_request(0, "", prompt, False)
            if self._probe(request.path, request.body).status not in _REFUSED:
                return
        self._stream_options = _STREAM_OPTIONS[0]  # refused for another reason

    def _probe(self, path: str, body: bytes) -> Exchange:
        """Send one request before the load; a server that did not answer one before is not asked again."""
        if self._silence is not None:
            return self._silence
        exchange = self._probe_http.post(path, body)
        if exchange.error and not exchange.status:
            self._silence = exchange
        return exchange

    def _can_score(self, endpoint: str) -> bool:
        if endpoint == "generative_scoring" and not self._find_label_ids():
            return False
        body = {"model": self._model, **SCORING[endpoint].body(_PROBE, list(self._label_ids.values()))}
        return self._probe(SCORING[endpoint].path, msgspec.json.encode(body)).status == 200

    def _find_label_ids(self) -> bool:
        """Look up the token id of each label with vLLM's /tokenize; false if a label is not one token."""
        for label in _PROBE.labels:
            body = {"model": self._model, "prompt": label, "add_special_tokens": False}
            exchange = self._probe("/tokenize", msgspec.json.encode(body))
            try:
                tokens = msgspec.json.decode(exchange.body)["tokens"] if exchange.status == 200 else []
            except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
                tokens = []
            if not isinstance(tokens, list) or len(tokens) != 1:
                return False
            self._label_ids[label] = tokens[0]
        return True


def failure_of(exchange: Exchange) -> str | None:
    """Return the kind of failure of an exchange; None for a complete response with status 200."""
    return exchange.error or (None if exchange.status == 200 else f"http {exchange.status}")


@dataclass(frozen=True)
class Scoring:
    """A scoring endpoint: its path, its request body, and the scores of its response in the order of the items."""

    path: str
    body: Callable[[ScoringPrompt, Sequence[int]], dict[str, Any]]
    scores: Callable[[dict[str, Any], Sequence[str]], list[float]]


def _completion_scores(answer: dict[str, Any], labels: Sequence[str]) -> list[float]:
    """Score each item by the next token's log-probabilities; an unlisted label gets the lowest listed one."""
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
"""Scoring endpoints in order of preference; `auto` never selects `rerank`, because it asks its own question."""
