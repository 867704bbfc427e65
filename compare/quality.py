"""Quality through the served endpoint, so that what is deployed is what is judged.

The raw answers are kept, one JSON line per prompt: figures, intervals and paired tests are computed from them, now and
when a later run compares itself with this one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
from pydantic import TypeAdapter

from slimserve.compare.results import TEXT
from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target, auth_headers
from slimserve.core.progress import ProgressCallback, print_status, progress
from slimserve.core.storage import write_atomically
from slimserve.loadtest.client import SCORING
from slimserve.workloads import load_workload
from slimserve.workloads.interface import Answer, ChatAnswer, ChatPrompt, Prompt, ScoringPrompt
from slimserve.workloads.metrics import MetricData
from slimserve.workloads.text import TextReading, make_documents, text_metrics

_CONCURRENCY = 8
_TIMEOUT_S = 600.0
_NUM_LISTED = 20
"""Log-probabilities per place, the most that vLLM gives by default."""
_CHARACTERS_PER_TOKEN = 6
"""More than any tokenizer needs for these texts; what is too much is cut off by tokens."""

_T = TypeVar("_T", Prompt, str)
KeptAnswer = tuple[float, ...] | ChatAnswer | TextReading
"""Scores of a slate, an answer in words, or log-probabilities of a text."""


@dataclass(frozen=True)
class Answers:
    """What one model said to a workload's quality prompts, in their order."""

    prompts_sha256: str
    """Of the prompts: answers to other ones cannot be paired."""
    answers: list[KeptAnswer]


def ask_quality(target: Target, workload: str, num_prompts: int, seed: int) -> Answers:
    """Ask the served model the workload's quality prompts, greedily.

    Raises UserError naming the request that failed: a quality figure over some of the
    prompts would not be comparable.
    """
    prompts = _prompts(workload, num_prompts, seed)
    answers = ask_prompts(target, f"quality {workload}, {target.model}", prompts)
    return Answers(_sha256_of([asdict(prompt) for prompt in prompts]), answers)


def ask_prompts(target: Target, title: str, prompts: Sequence[Prompt]) -> list[KeptAnswer]:
    """Scores or greedy answers of the served model, in the order of the prompts; UserError where one fails."""

    async def ask(asker: _Asker, prompt: Prompt) -> KeptAnswer:
        return await (asker.score(prompt) if isinstance(prompt, ScoringPrompt) else asker.chat(prompt))

    return _ask_all(target, title, prompts, ask)


def ask_text(target: Target, num_documents: int, num_tokens: int, seed: int) -> Answers:
    """Log-probabilities of held-out documents of `num_tokens` tokens; no answer where the server does not give them.

    It takes a server that counts tokens (`/tokenize`) and knows `prompt_logprobs`, as vLLM does.
    """
    documents = _documents(num_documents, num_tokens * _CHARACTERS_PER_TOKEN, seed)

    async def ask(asker: _Asker, document: str) -> KeptAnswer:
        return await asker.read(document, num_tokens)

    try:
        answers = _ask_all(target, f"quality {TEXT}, {target.model}", documents, ask)
    except _NotGivenError as error:
        print_status(
            f"{target.model}: no perplexity and no KL, as the server gives no log-probabilities of prompts ({error})"
        )
        return Answers("", [])
    return Answers(_sha256_of([cast("TextReading", answer).tokens for answer in answers]), answers)


def write_answers(file: Path, answers: Answers) -> None:
    """One line that names the prompts, then one line per prompt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompts_sha256": answers.prompts_sha256})]
    for number, answer in enumerate(answers.answers):
        held = {"scores": answer} if isinstance(answer, tuple) else asdict(answer)
        lines.append(json.dumps({"prompt": number, **held}))
    write_atomically(file, "\n".join(lines) + "\n")


def read_answers(file: Path) -> Answers:
    """The answers that write_answers left; UserError where the file is none."""
    try:
        head, *lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        return Answers(head["prompts_sha256"], [_answer_of(line) for line in lines])
    except (OSError, ValueError, KeyError) as error:
        raise UserError("answers", file, f"cannot be read ({error})", "measure again in another folder") from error


def quality_metrics(
    workload: str, num_prompts: int, seed: int, answers: Answers, reference: Answers | None = None
) -> dict[str, MetricData]:
    """The workload's figures; TEXT's KL and agreement need the reference's answers to the same text."""
    if workload == TEXT:
        pairs = reference is not None and reference.prompts_sha256 == answers.prompts_sha256
        theirs = cast("list[TextReading]", reference.answers) if reference and pairs else None
        return text_metrics(cast("list[TextReading]", answers.answers), theirs)
    prompts = _prompts(workload, num_prompts, seed)
    return load_workload(workload).metric_data(prompts, cast("list[Answer]", answers.answers))


@cache
def _prompts(workload: str, num_prompts: int, seed: int) -> list[Prompt]:
    """Every variant is asked the same ones, and making them takes a second."""
    return load_workload(workload).make_prompts("quality", num_prompts, seed)


_documents = cache(make_documents)


def _answer_of(line: dict[str, Any]) -> KeptAnswer:
    if "scores" in line:
        return tuple(line["scores"])
    line.pop("prompt")
    kind: Any = TextReading if "top" in line else ChatAnswer
    return cast("KeptAnswer", TypeAdapter(kind).validate_python(line))


def _sha256_of(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def _ask_all(
    target: Target, title: str, prompts: Sequence[_T], ask: Callable[[_Asker, _T], Awaitable[KeptAnswer]]
) -> list[KeptAnswer]:
    """Answers in the order of the prompts, eight requests at a time."""

    async def run(tick: ProgressCallback) -> list[KeptAnswer]:
        answers: dict[int, KeptAnswer] = {}
        waiting = asyncio.Semaphore(_CONCURRENCY)
        # A connection for each request: nothing is timed here, and a server may close a kept one just as it is used.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=target.url, headers=auth_headers(), timeout=_TIMEOUT_S, limits=limits
        ) as client:
            asker = _Asker(client, target.model)

            async def answer(number: int, prompt: _T) -> None:
                async with waiting:
                    answers[number] = await ask(asker, prompt)
                tick(len(answers))

            async with asyncio.TaskGroup() as group:
                for number, prompt in enumerate(prompts):
                    group.create_task(answer(number, prompt))
        return [answers[number] for number in range(len(prompts))]

    with progress(title, len(prompts), "prompts") as tick:
        try:
            return asyncio.run(run(tick))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


class _NotGivenError(Exception):
    """The server lacks what is asked of it."""


class _Asker:
    """Asks one model over one client; finds out once how it scores, and each label's token."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self._token_ids: dict[str, int] = {}
        self._scoring = ""
        self._finding = asyncio.Lock()

    async def score(self, prompt: ScoringPrompt) -> tuple[float, ...]:
        async with self._finding:
            self._scoring = self._scoring or await self._find_scoring(prompt)
        labels = [await self._token_id(label) for label in prompt.labels] if self._scoring == _STOCK else []
        scoring = SCORING[self._scoring]
        answer = await self._post(scoring.path, scoring.body(prompt, labels))
        scores = tuple(float(score) for score in scoring.scores(answer, prompt.labels))
        if len(scores) != len(prompt.items) or not all(map(math.isfinite, scores)):
            problem = f"brought {len(scores)} scores for {len(prompt.items)} items, or some that are no numbers"
            raise UserError("quality request", scoring.path, problem, "read the server's log")
        return scores

    async def chat(self, prompt: ChatPrompt) -> ChatAnswer:
        body = {"messages": prompt.messages, "max_tokens": prompt.max_tokens, "temperature": 0}
        answer = await self._post("/v1/chat/completions", body)
        text = answer["choices"][0]["message"]["content"] or ""
        return ChatAnswer(text, int(answer["usage"]["completion_tokens"]))

    async def read(self, document: str, num_tokens: int) -> TextReading:
        """Raises _NotGivenError where the server knows nothing of prompt_logprobs."""
        tokens = (await self._try_post("/tokenize", {"prompt": document, "add_special_tokens": False})).get("tokens")
        if not tokens:
            raise _NotGivenError("no /tokenize")
        tokens = tokens[:num_tokens]
        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": _NUM_LISTED}
        choices = (await self._try_post("/v1/completions", body)).get("choices") or [{}]
        places = (choices[0].get("prompt_logprobs") or [])[1:]
        if not places:
            raise _NotGivenError("no prompt_logprobs")
        tops = [{int(token): round(float(entry["logprob"]), 5) for token, entry in place.items()} for place in places]
        logprobs = tuple(top[token] for top, token in zip(tops, tokens[1:], strict=True))
        return TextReading(tuple(tokens), logprobs, tuple(tops))

    async def _find_scoring(self, prompt: ScoringPrompt) -> str:
        """Our /v1/score, else vLLM's own endpoint, else the log-probabilities of completions."""
        probe = ScoringPrompt(prompt.query, prompt.items[:1], prompt.labels, prompt.truth[:1], prompt.group)
        if "scores" in await self._try_post("/v1/score", SCORING["score"].body(probe, [])):
            return "score"
        stock = SCORING[_STOCK]
        try:
            labels = [await self._token_id(label) for label in prompt.labels]
        except UserError as error:
            if error.field == "label":
                raise
            labels = []
        if labels and "data" in await self._try_post(stock.path, stock.body(probe, labels)):
            return _STOCK
        return "completions"

    async def _token_id(self, label: str) -> int:
        if label not in self._token_ids:
            answer = await self._post("/tokenize", {"prompt": label, "add_special_tokens": False})
            tokens = answer["tokens"]
            if len(tokens) != 1:
                raise UserError(
                    "label", label, f"is {len(tokens)} tokens of {self._model}", "choose labels of one token each"
                )
            self._token_ids[label] = tokens[0]
        return self._token_ids[label]

    async def _try_post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, or nothing where the server does not know the path or the request."""
        try:
            response = await self._client.post(path, json={"model": self._model, **body})
            found = response.json() if response.status_code == 200 else {}
        except httpx.HTTPError as error:
            raise _no_answer(path, error) from error
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = await self._client.post(path, json={"model": self._model, **body})
            response.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise UserError(
                "quality request",
                path,
                f"was answered {error.response.status_code}: {error.response.text[:200]}",
                "read the server's log",
            ) from error
        except httpx.HTTPError as error:
            raise _no_answer(path, error) from error
        return cast("dict[str, Any]", response.json())


_STOCK = "generative_scoring"


def _no_answer(path: str, error: Exception) -> UserError:
    return UserError("quality request", path, f"got no answer ({error!r})", "check that the server still runs")
