"""Training data from a served teacher: its own replies, kept only if the workload's verifier accepts them.

This is rejection sampling: each problem is asked up to `num_tries` times, and the first correct reply that ended by
itself is kept. Replies are appended to the file as they arrive, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from slimserve.core.errors import UserError
from slimserve.core.messages import read_answer
from slimserve.core.openai_client import OpenAIClient, Target, ask_all
from slimserve.core.text import BadLine, json_problem, scan_jsonl
from slimserve.distill.settings import TracesSettings
from slimserve.workloads import load_workload
from slimserve.workloads.conversations import read_conversation
from slimserve.workloads.interface import THINK_CLOSE, ChatPrompt, hash_number

_CONCURRENCY = 16
_PATH = "/v1/chat/completions"
_REMEDY = "name another file"


@dataclass(frozen=True)
class TraceCounts:
    """The counts of a run of `write_traces`."""

    num_problems: int
    """Number of problems, including those that earlier runs solved."""
    num_solved: int
    num_replies: int
    """Number of replies in this run, correct or not."""
    num_chains: int
    """Number of solved problems whose reply has a chain of thought."""
    num_cut: int
    """Number of replies in this run that `max_tokens` cut off."""


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
    num_replies = num_cut = 0

    async def ask(client: OpenAIClient, problem: ChatPrompt) -> str | None:
        nonlocal num_replies, num_cut
        for attempt in range(settings.num_tries):
            answer = await client.post(
                _PATH,
                {
                    **problem.request,
                    "messages": problem.messages,
                    "temperature": settings.temperature,
                    "max_tokens": settings.max_tokens,
                    "seed": hash_number(f"{settings.seed} {attempt} {problem.question}") % 2**31,
                },
            )
            message, finish_reason = read_answer(answer, _PATH)[0]
            num_replies += 1
            num_cut += finish_reason == "length"
            if (
                finish_reason == "stop"
                and not json_problem(message.text)
                and workload.is_correct(problem, message.text)
            ):
                return message.text
        return None

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:

        def write(problem: ChatPrompt, reply: str | None) -> None:
            row: dict[str, Any] = {"question": problem.question}
            if reply is not None:
                row |= {**problem.request, "messages": [*problem.messages, {"role": "assistant", "content": reply}]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()

        ask_all(
            target,
            f"replies of {target.model} to {workload.name}",
            [problem for problem in problems if problem.question not in known],
            ask,
            unit="problems",
            concurrency=_CONCURRENCY,
            on_result=write,
        )
    known = _read_known(file)
    solved = [known[problem.question] for problem in problems if known.get(problem.question) is not None]
    num_chains = sum(THINK_CLOSE in str(reply) for reply in solved)
    return TraceCounts(len(problems), len(solved), num_replies, num_chains, num_cut)


def _read_known(file: Path) -> dict[str, str | None]:
    """Map the questions in the file to their replies, None if unsolved; delete a last line that a kill cut short.

    Raises UserError if the file holds something else, and leaves it as it is then.
    """
    if not file.is_file():
        return {}
    content = file.read_bytes()
    begin = content.rfind(b"\n") + 1
    known: dict[str, str | None] = {}
    for number, row in scan_jsonl(file, "--output", _REMEDY):
        if isinstance(row, BadLine) and number > content.count(b"\n") and content[begin:].startswith(b'{"question"'):
            os.truncate(file, begin)
            return known
        try:
            if isinstance(row, BadLine) or not isinstance(question := row.get("question"), str):
                raise ValueError("is not a trace")
            known[question] = read_conversation(row).messages[-1].text if "messages" in row else None
        except ValueError as error:
            raise UserError("--output", f"{file}:{number}", str(error), _REMEDY) from error
    if content[begin:].strip():
        with file.open("ab") as out:
            out.write(b"\n")
    return known
