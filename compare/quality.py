"""Quality through the served endpoint, so that what is deployed is what is judged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import httpx

from contracts.errors import UserError
from contracts.progress import Tick, progress
from loadtest.target import Target, auth_headers
from workloads.interface import Answer, ChatAnswer, ChatPrompt, Estimate, Prompt, ScoringPrompt, Workload

_CONCURRENCY = 8
_TIMEOUT_S = 600.0
_KEEPALIVE_S = 2.0
"""Shorter than the 5 s after which uvicorn closes an idle connection, which could race with a new request."""


def measure_quality(target: Target, workload: Workload, num_prompts: int) -> dict[str, Estimate]:
    """Ask the served model the workload's quality prompts, greedily, and judge the answers.

    Raises UserError naming the request that failed: a quality figure over some of the
    prompts would not be comparable.
    """
    prompts = workload.make_prompts("quality", num_prompts)
    with progress(f"quality {workload.name}, {target.model}", len(prompts), "prompts") as tick:
        answers = asyncio.run(_ask_all(target, prompts, tick))
    return workload.judge(prompts, answers)


async def _ask_all(target: Target, prompts: Sequence[Prompt], tick: Tick) -> list[Answer]:
    answers: dict[int, Answer] = {}
    waiting = asyncio.Semaphore(_CONCURRENCY)
    limits = httpx.Limits(keepalive_expiry=_KEEPALIVE_S)
    async with httpx.AsyncClient(
        base_url=target.url, headers=auth_headers(), timeout=_TIMEOUT_S, limits=limits
    ) as client:
        asker = _Asker(client, target.model)

        async def ask(index: int, prompt: Prompt) -> None:
            async with waiting:
                answers[index] = await asker.ask(prompt)
            tick(len(answers))

        await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts)))
    return [answers[index] for index in range(len(prompts))]


class _Asker:
    """Asks one model over one client; looks up each label's token once."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self._token_ids: dict[str, int] = {}

    async def ask(self, prompt: Prompt) -> Answer:
        if isinstance(prompt, ScoringPrompt):
            return await self._score(prompt)
        return await self._chat(prompt)

    async def _score(self, prompt: ScoringPrompt) -> Sequence[float]:
        labels = [await self._token_id(label) for label in prompt.labels]
        body = {"query": prompt.query, "items": prompt.items, "label_token_ids": labels}
        answer = await self._post("/generative_scoring", body)
        by_item = sorted(answer["data"], key=lambda entry: int(entry["index"]))
        return [float(entry["score"]) for entry in by_item]

    async def _chat(self, prompt: ChatPrompt) -> ChatAnswer:
        body = {"messages": prompt.messages, "max_tokens": prompt.max_tokens, "temperature": 0}
        answer = await self._post("/v1/chat/completions", body)
        text = answer["choices"][0]["message"]["content"] or ""
        return ChatAnswer(text, int(answer["usage"]["completion_tokens"]))

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

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
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
            raise UserError(
                "quality request", path, f"got no answer ({error!r})", "check that the server still runs"
            ) from error
        return cast("dict[str, Any]", response.json())
