"""Training data from a served teacher: its own replies, kept only if the workload's verifier accepts them.

This is rejection sampling: each problem is asked up to `num_tries` times, and the first correct reply that ended by
itself is kept. Replies are appended to the file as they arrive, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from slimserve.core.errors import UserError
from slimserve.core.openai_client import OpenAIClient, Target, ask_all
from slimserve.core.text import read_jsonl
from slimserve.distill.settings import TracesSettings
from slimserve.workloads import load_workload
from slimserve.workloads.interface import ChatPrompt, hash_number, join_reply

_CONCURRENCY = 16
_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class TraceCounts:
    """The counts of a run of `write_traces`."""

    num_problems: int
    """Number of problems, including those that earlier runs solved."""
    num_solved: int
    num_replies: int
    """Number of replies in this run, correct or not."""


def write_traces(target: Target, settings: TracesSettings) -> TraceCounts:
    """Ask the teacher `target` the workload's training problems and append correct replies to `settings.output`.

    A JSONL line without `messages` marks a problem that no try solved. Raises UserError if the workload has no
    verifier, the server fails, or the file does not hold traces.
    """
    workload, file = load_workload(settings.workload), settings.output
    prompts = workload.make_prompts("calibration", settings.num_problems, settings.seed)
    if not prompts or not isinstance(prompts[0], ChatPrompt):
        raise UserError(
            "--workload", settings.workload, "has no replies to verify", "choose a workload of chat prompts"
        )
    problems = cast("Sequence[ChatPrompt]", prompts)
    known = _read_known(file)
    num_replies = 0

    async def ask(client: OpenAIClient, problem: ChatPrompt) -> str | None:
        nonlocal num_replies
        for attempt in range(settings.num_tries):
            answer = await client.post(
                _PATH,
                {
                    "messages": problem.messages,
                    "temperature": settings.temperature,
                    "max_tokens": settings.max_tokens,
                    "seed": hash_number(f"{settings.seed} {attempt} {_question(problem)}") % 2**31,
                },
            )
            try:
                choice = answer["choices"][0]
                message, ended = choice["message"], choice["finish_reason"] == "stop"
            except (LookupError, TypeError) as error:
                raise UserError("request", _PATH, "was answered without a choice", "read the server's log") from error
            num_replies += 1
            reply = join_reply(message.get("reasoning_content") or "", message.get("content") or "")
            if ended and workload.is_correct(problem, reply):
                return reply
        return None

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:

        def write(problem: ChatPrompt, reply: str | None) -> None:
            row: dict[str, Any] = {"question": _question(problem)}
            if reply is not None:
                row["messages"] = [*problem.messages, {"role": "assistant", "content": reply}]
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()

        ask_all(
            target,
            f"replies of {target.model} to {workload.name}",
            [problem for problem in problems if _question(problem) not in known],
            ask,
            unit="problems",
            concurrency=_CONCURRENCY,
            on_result=write,
        )
    known = _read_known(file)
    return TraceCounts(len(problems), sum(known.get(_question(problem), False) for problem in problems), num_replies)


def _question(problem: ChatPrompt) -> str:
    return problem.messages[-1]["content"]


def _read_known(file: Path) -> dict[str, bool]:
    """Map the questions in the file to whether they were solved; delete a last line that a kill cut short."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        file.write_bytes(complete)
    rows = [row for _, row in read_jsonl(file, "--output", "name another file")]
    if not all("question" in row for row in rows):
        raise UserError("--output", file, "does not hold traces", "name another file")
    return {row["question"]: "messages" in row for row in rows}
