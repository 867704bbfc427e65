"""A client for one model behind an OpenAI-compatible server, used wherever answers matter and not their timing.

`find_target` checks that the server serves the model. `ask_all` sends many prompts with a bounded number of requests in
flight and returns the results in the order of the prompts. `read_replies` and `server_sentence` read what servers
answer, in the dialects of vLLM, SGLang, llama.cpp, gateways and hosted services. The load generator has its own HTTP
client, because it must timestamp every chunk (loadtest/http_client.py), and reads answers with these functions as well.
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import httpx

from slimserve.core.errors import UserError
from slimserve.core.messages import CHAIN_FIELDS
from slimserve.core.progress import progress

CONCURRENCY = 8
"""Requests in flight unless a caller says otherwise; a weak server may reset connections of many more at once."""
ENGINE_CONCURRENCY = 64
"""Chats in flight at a vLLM engine, which decodes them in one batch: 64 take less than a third of the time of 8."""
_CHECK_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 600.0
_NUM_SHOWN_CHARACTERS = 200
_NO_LIST_OF_MODELS = {404, 405, 501}
"""Statuses of a server that has no /v1/models."""
_OTHER_ANSWERS = {"tool_calls", "function_call", "refusal", "audio"}
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<(script|style).*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Target:
    """One model behind one OpenAI-compatible server."""

    url: str
    """Base URL without `/v1`."""
    model: str
    tokenizer: str | None = None
    """Directory of the model's tokenizer; None if it is not known, as for an external server."""


def auth_headers() -> dict[str, str]:
    """Return the API key of `VLLM_API_KEY`, the variable that vLLM's server also reads, as a header."""
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def find_target(url: str, model: str | None, option: str = "--model") -> Target:
    """Check that a server answers at `url` and serves `model`; None selects the only model that it serves.

    A server without a list of models (/v1/models) serves `model`, if it is given. Raises UserError otherwise; the error
    names `option` as the place to give a model.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UserError("url", url, "has no scheme", "write it as http://HOST:PORT")
    try:
        response = httpx.get(f"{base}/v1/models", headers=auth_headers(), timeout=_CHECK_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            "url",
            url,
            f"does not answer ({error})",
            "start the server with `slimserve serve MODEL` or check the address",
        ) from error
    served = _served_models(response)
    if served is not None and (model in served or (model is None and len(served) == 1)):
        return Target(base, model or served[0])
    if served is not None:
        remedy = f"give {option} {' or '.join(served)}" if served else "load a model into the server"
        raise UserError("model", model, f"is not served at {base}", remedy)
    status = response.status_code
    if status in {401, 403}:
        problem = f"answers {status} to /v1/models: {server_sentence(response.content)}"
        raise UserError("url", url, problem.removesuffix(": "), "set VLLM_API_KEY to its key")
    if not response.is_success and status not in _NO_LIST_OF_MODELS:
        problem = f"answers {status} to /v1/models: {server_sentence(response.content)}"
        raise UserError("url", url, problem.removesuffix(": "), "check that the server is ready and read its log")
    if model is not None:
        return Target(base, model)
    problem = f"answers {status} to /v1/models" if status != 200 else "does not answer /v1/models with a list of models"
    raise UserError("url", url, problem, f"give the model's name with {option}, or check that it speaks the OpenAI API")


def _served_models(response: httpx.Response) -> list[str] | None:
    """Return the names in a list of models; None if the answer is no such list."""
    try:
        entries = response.json()["data"] if response.is_success else None
        return [entry["id"] for entry in entries if isinstance(entry["id"], str)] if entries is not None else None
    except (ValueError, LookupError, TypeError):
        return None


class AnswerError(ValueError):
    """An answer is not that of an OpenAI-compatible server; the message says what is wrong with it."""


class Reply(NamedTuple):
    """One choice of a chat or completion, complete or, in a stream, the part that one event adds."""

    text: str = ""
    reasoning: str = ""
    """Chain of thought, if the server sends it apart from the text."""
    finish_reason: str | None = None
    has_tool_calls: bool = False
    """True if the model calls a tool, refuses, or answers in another way than by text."""


def read_replies(answer: object, is_complete: bool = False) -> list[Reply]:
    """Return the choices of a chat or completion, or of one event of a stream.

    Events may lack choices and messages, complete answers must have both. Raises AnswerError if they do not, if a part
    is not of the right type, or if the answer is an error.
    """
    if not isinstance(answer, dict):
        raise AnswerError("not an object")
    if answer.get("error") or answer.get("object") == "error":
        raise AnswerError("error")
    choices = answer.get("choices") or []
    if not isinstance(choices, list):
        raise AnswerError("choices are not a list")
    if is_complete and not choices:
        raise AnswerError("no choices")
    return [_read_reply(choice, is_complete) for choice in choices]


def _read_reply(choice: object, is_complete: bool) -> Reply:
    if not isinstance(choice, dict):
        raise AnswerError("a choice is not an object")
    message = choice.get("delta") or choice.get("message") or {}
    if is_complete and not message and not isinstance(choice.get("text"), str):
        raise AnswerError("a choice has no message")
    if not isinstance(message, dict):
        raise AnswerError("a message is not an object")
    content = message.get("content")
    text = choice.get("text") or content
    chains = [message[name] for name in CHAIN_FIELDS if message.get(name)]  # some servers send several, for old clients
    finish_reason = choice.get("finish_reason")
    return Reply(
        text if isinstance(text, str) else _joined(text, "text") if text else "",
        chains[0] if chains and isinstance(chains[0], str) else _joined(content, "thinking"),
        finish_reason if isinstance(finish_reason, str) else None,
        not _OTHER_ANSWERS.isdisjoint(message) and any(message.get(key) for key in _OTHER_ANSWERS),
    )


def _joined(content: object, kind: str) -> str:
    """Return a string as it is, and the parts of one kind of a list of content parts as one string."""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts = content if isinstance(content, list) else []
    texts = [part.get(kind) for part in parts if isinstance(part, dict) and part.get("type", "text") == kind]
    return "".join(_joined(text, "text") for text in texts)


def count_of(usage: object, name: str) -> int | None:
    """Return a number of tokens of a `usage` object; None if it is missing or no number."""
    value = usage.get(name) if isinstance(usage, dict) else None
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    return int(cast("float", value)) if is_count else None


def server_sentence(body: bytes) -> str:
    """Return what a server says in the body of a refusal, in one line: from JSON the message, from HTML the title."""
    text = body.decode(errors="replace").strip()
    try:
        message = _message_of(json.loads(text))
    except (ValueError, RecursionError):
        title = _TITLE.search(text)
        message = html.unescape(title[1] if title else _TAG.sub(" ", text))
    return _one_line(message)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _NUM_SHOWN_CHARACTERS else line[: _NUM_SHOWN_CHARACTERS - 2].rstrip() + " …"


def _message_of(document: object) -> str:
    """Return the message in an error document of OpenAI's, FastAPI's or a similar form."""
    if isinstance(document, list):
        return "; ".join(filter(None, map(_message_of, document[:3])))
    if not isinstance(document, dict) or not document:
        return document if isinstance(document, str) else json.dumps(document) if document else ""
    if isinstance(document.get("msg"), str):  # FastAPI: where, and what
        place = document.get("loc")
        where = ".".join(map(str, place[1:])) if isinstance(place, list) else ""
        return f"{where}: {document['msg']}" if where else document["msg"]
    for key in ("error", "message", "detail", "errors", "title", "reason"):
        if document.get(key):
            return _message_of(document[key])
    return json.dumps(document, ensure_ascii=False)


class OpenAIClient:
    """Sends JSON requests to one model. Every request names the model."""

    def __init__(self, target: Target, http: httpx.AsyncClient) -> None:
        self.target = target
        self._http = http

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON answer to a POST; UserError names the path and quotes the server if it fails."""
        response = await self._send(path, body)
        if response.status_code != 200:
            problem = f"failed with {response.status_code}: {server_sentence(response.content)}"
            raise UserError("request", path, problem, "read the server's log")
        try:
            answer = response.json()
        except ValueError as error:
            problem = f"was not answered with JSON but with {server_sentence(response.content)!r}"
            raise UserError("request", path, problem, "check the address of the server") from error
        if not isinstance(answer, dict):
            problem = f"was answered with JSON that is not an object: {_one_line(response.text)}"
            raise UserError("request", path, problem, "check the address of the server")
        if answer.get("error"):
            problem = f"was answered with an error: {server_sentence(response.content)}"
            raise UserError("request", path, problem, "read the server's log")
        return answer

    async def ask(self, path: str, body: Mapping[str, Any], read: Callable[[dict[str, Any]], R]) -> R:
        """Return what `read` makes of the JSON answer to a POST.

        UserError names the path and quotes the answer if `read` fails with one of the errors of looking up and
        converting values, because other servers may leave out or rename any part.
        """
        answer = await self.post(path, body)
        try:
            return read(answer)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            quote = server_sentence(json.dumps(answer, ensure_ascii=False).encode(errors="replace"))
            problem = f"was answered in another form than OpenAI's ({type(error).__name__}: {error}): {quote}"
            raise UserError("request", path, problem, "check that the server speaks the OpenAI API") from error

    async def try_post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON answer, or an empty dictionary if the server does not know the path or refuses the body."""
        response = await self._send(path, body)
        try:
            answer = response.json() if response.status_code == 200 else {}
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) and not answer.get("error") else {}

    async def _send(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            return await self._http.post(path, json={"model": self.target.model, **body})
        except httpx.HTTPError as error:
            raise UserError(
                "request",
                f"{self.target.url}{path}",
                f"was not answered ({error!r})",
                "check that the server runs and read its log",
            ) from error


def ask_all(
    target: Target,
    title: str,
    prompts: Sequence[P],
    ask: Callable[[OpenAIClient, P], Awaitable[R]],
    *,
    unit: str = "prompts",
    concurrency: int = CONCURRENCY,
    on_result: Callable[[P, R], None] | None = None,
) -> list[R]:
    """Ask every prompt with at most `concurrency` requests in flight; results come in the order of the prompts.

    `on_result` is called as soon as a result arrives, in order of arrival. The first error ends the run and is raised.
    """

    async def run(tick: Callable[[float], None]) -> list[R]:
        results: dict[int, R] = {}
        slots = asyncio.Semaphore(concurrency)
        # One connection per request: nothing is timed here, and a server may close an idle one as it is reused.
        limits = httpx.Limits(max_keepalive_connections=0)
        timeout_s = _REQUEST_TIMEOUT_S * max(1, concurrency / CONCURRENCY)  # each waits for the others in flight
        async with httpx.AsyncClient(
            base_url=target.url, headers=auth_headers(), timeout=timeout_s, limits=limits
        ) as http:
            client = OpenAIClient(target, http)

            async def answer(number: int, prompt: P) -> None:
                async with slots:
                    results[number] = await ask(client, prompt)
                if on_result is not None:
                    on_result(prompt, results[number])
                tick(len(results))

            async with asyncio.TaskGroup() as group:
                for number, prompt in enumerate(prompts):
                    group.create_task(answer(number, prompt))
        return [results[number] for number in range(len(prompts))]

    with progress(title, len(prompts), unit) as tick:
        try:
            return asyncio.run(run(tick))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
