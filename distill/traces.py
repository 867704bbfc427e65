"""A served teacher's own replies as training data, kept only where the workload's verifier finds them right.

Rejection sampling: each problem is asked up to `num_tries` times at a temperature, and the first right reply that ended
by itself is kept. Replies are appended to the file as they come, so the same command goes on where it was interrupted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target, auth_headers
from slimserve.core.progress import progress
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ChatPrompt, Workload, hash_number

_CONCURRENCY = 16
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Traces:
    """What came of it."""

    num_asked: int
    """Problems, those of earlier calls included."""
    num_kept: int
    num_replies: int
    """Of this call, right or wrong."""


def write_traces(
    target: Target,
    workload: str,
    num_problems: int,
    file: Path,
    *,
    temperature: float = 0.8,
    num_tries: int = 4,
    max_tokens: int = 512,
    seed: int = 0,
) -> Traces:
    """Ask the teacher `target` for replies to a workload's training problems; the right ones go to `file` as JSONL.

    A line without `messages` notes a problem that no try solved. Raises UserError where the workload has no verifier,
    or the server does not answer.
    """
    task = load_workload(workload)
    prompts = task.make_prompts("calibration", num_problems, seed)
    if not prompts or not isinstance(prompts[0], ChatPrompt):
        raise UserError("workload", workload, "has no replies to verify", "choose one of conversations, as reasoning")
    problems = cast("Sequence[ChatPrompt]", prompts)
    known = _known(file)
    left = [problem for problem in problems if problem.messages[-1]["content"] not in known]
    request = {"model": target.model, "temperature": temperature, "max_tokens": max_tokens}
    file.parent.mkdir(parents=True, exist_ok=True)
    asker = _Asker(target.url, request, num_tries, seed, file, task)
    asyncio.run(asker.ask_all(left, f"replies of {target.model} to {workload}"))
    known = _known(file)
    kept = sum(known.get(problem.messages[-1]["content"], False) for problem in problems)
    return Traces(len(problems), kept, asker.num_replies)


class _Asker:
    def __init__(
        self, url: str, request: dict[str, Any], tries: int, seed: int, file: Path, workload: Workload
    ) -> None:
        self._workload = workload
        self.num_replies = 0
        self._url = f"{url}/v1/chat/completions"
        self._request = request
        self._tries = tries
        self._seed = seed
        self._file = file

    async def ask_all(self, problems: Sequence[ChatPrompt], title: str) -> None:
        limit = asyncio.Semaphore(_CONCURRENCY)
        done = 0
        with progress(title, len(problems), "problems") as tick, self._file.open("a", encoding="utf-8") as out:
            async with httpx.AsyncClient(headers=auth_headers(), timeout=_TIMEOUT_S) as client:

                async def ask(problem: ChatPrompt) -> None:
                    nonlocal done
                    async with limit:
                        reply = await self._right_reply(client, problem)
                    row: dict[str, Any] = {"question": problem.messages[-1]["content"]}
                    if reply is not None:
                        row["messages"] = [*problem.messages, {"role": "assistant", "content": reply}]
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    out.flush()
                    done += 1
                    tick(done)

                try:
                    async with asyncio.TaskGroup() as group:
                        for problem in problems:
                            group.create_task(ask(problem))
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from errors

    async def _right_reply(self, client: httpx.AsyncClient, problem: ChatPrompt) -> str | None:
        for attempt in range(self._tries):
            seed = hash_number(f"{self._seed} {attempt} {problem.messages[-1]['content']}") % 2**31
            body = {**self._request, "messages": problem.messages, "seed": seed}
            try:
                response = await client.post(self._url, json=body)
                response.raise_for_status()
                choice = response.json()["choices"][0]
            except (httpx.HTTPError, ValueError, KeyError) as error:
                raise UserError(
                    "teacher", self._url, f"did not answer ({error!r})", "check the server; the same command goes on"
                ) from error
            self.num_replies += 1
            message = choice["message"]
            reply = message.get("content") or ""
            if message.get("reasoning_content"):
                reply = f"<think>\n{message['reasoning_content']}\n</think>\n{reply}"
            if choice["finish_reason"] == "stop" and self._workload.is_correct(problem, reply):
                return reply
        return None


def _known(file: Path) -> dict[str, bool]:
    """By question, whether a right reply was kept; a line cut short by a kill is taken off the file."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["question"]: "messages" in row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("output", file, f"is no file of traces ({error!r})", "name another one") from error
