"""The prompts of a suite in their order: the same for every server that is asked with the same options and seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from slimserve.core.errors import UserError
from slimserve.loadtest.settings import Sizes, SuiteOptions
from slimserve.workloads.interface import ChatPrompt, Prompt, ScoringPrompt, Workload
from slimserve.workloads.reasoning import Reasoning
from slimserve.workloads.recommendation import Recommendation

MOST_PROMPTS = 2000
"""Closed loops begin anew after so many, and say so."""


def make_prompts(suite: str, options: SuiteOptions, num_prompts: int) -> list[tuple[str, Prompt]]:
    """At most `num_prompts` prompts, each with its kind (the workload that judges its answer).

    They begin at `options.first_prompt` of the order of `options.prompt_seed`, and go round where that is near its end.
    """
    first = options.first_prompt
    known = _in_order(suite, options, first + num_prompts)
    if len(known) < first + num_prompts:
        first %= len(known)
        known = [*known[first:], *known[:first]]
        first = 0
    return known[first : first + num_prompts]


def _in_order(suite: str, options: SuiteOptions, num_prompts: int) -> list[tuple[str, Prompt]]:
    if suite == "recommendation":
        return [("recommendation", prompt) for prompt in _slates(options, num_prompts)]
    if suite == "reasoning":
        return [("reasoning", prompt) for prompt in _problems(options, num_prompts)]
    if suite == "chat":
        return [("chat", prompt) for prompt in _chats(options, num_prompts)]
    numbers = random.Random(f"mixed {options.prompt_seed}")
    kinds = ["recommendation" if numbers.random() < options.share else "reasoning" for _ in range(num_prompts)]
    left: dict[str, Iterator[Prompt]] = {
        "recommendation": iter(_slates(options, kinds.count("recommendation"))),
        "reasoning": iter(_problems(options, kinds.count("reasoning"))),
    }
    drawn = ((kind, next(left[kind], None)) for kind in kinds)
    return [(kind, prompt) for kind, prompt in drawn if prompt is not None]


def workload_of(kind: str, options: SuiteOptions) -> Workload | None:
    """Who judges answers of a kind; None for a user's chats, which have no truth."""
    if kind == "recommendation":
        return _recommendation(options)
    return Reasoning() if kind == "reasoning" else None


def _recommendation(options: SuiteOptions) -> Recommendation:
    return Recommendation(
        data=Path(options.data) if options.data else None,
        history_len=Sizes("--history", options.history).largest,
        num_candidates=Sizes("--candidates", options.candidates).largest,
    )


def _slates(options: SuiteOptions, num_prompts: int) -> list[ScoringPrompt]:
    """Slates with histories and candidates of drawn lengths; a repeat visit has another one's history."""
    numbers = random.Random(f"slates {options.prompt_seed}")
    history, candidates = Sizes("--history", options.history), Sizes("--candidates", options.candidates)
    drawn = cast("list[ScoringPrompt]", _recommendation(options).make_prompts("load", num_prompts, options.prompt_seed))
    if not drawn:
        remedy = "ask for shorter histories or fewer candidates"
        raise UserError("--history", options.history, "is longer than every member's", remedy)
    slates: list[ScoringPrompt] = []
    of_member: dict[int, list[ScoringPrompt]] = {}
    for slate in drawn:
        length, count = history.draw(numbers), candidates.draw(numbers)
        lines = slate.query.splitlines(keepends=True)
        cut = replace(slate, query="".join(lines[-length:]), items=slate.items[:count], truth=slate.truth[:count])
        earlier = of_member.setdefault(slate.group, [])
        if earlier and numbers.random() < options.repeat_visits:
            cut = replace(cut, query=numbers.choice(earlier).query)
        earlier.append(cut)
        slates.append(cut)
    return slates


def _problems(options: SuiteOptions, num_prompts: int) -> list[ChatPrompt]:
    numbers, sizes = random.Random(f"problems {options.prompt_seed}"), Sizes("--max-tokens", options.max_tokens)
    problems = cast("list[ChatPrompt]", Reasoning().make_prompts("load", num_prompts, options.prompt_seed))
    return [replace(problem, max_tokens=sizes.draw(numbers)) for problem in problems]


def _chats(options: SuiteOptions, num_prompts: int) -> list[ChatPrompt]:
    """A user's chats in their order: `messages`, or `prompt` for one message, and `max_tokens` if it has its own."""
    numbers, sizes = random.Random(f"chats {options.prompt_seed}"), Sizes("--max-tokens", options.max_tokens)
    if not options.data:
        raise UserError("--data", "", "is missing", "name a JSONL file with `messages` or `prompt` on each line")
    try:
        lines = Path(options.data).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--data", options.data, f"cannot be read ({error})", "name a JSONL file") from error
    chats: list[ChatPrompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or len(chats) == num_prompts:
            continue
        try:
            record = json.loads(line)
            messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
            wanted = int(record.get("max_tokens") or sizes.draw(numbers))
            chats.append(ChatPrompt(tuple(messages), wanted, "chat", "", "", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = 'write {"messages": [{"role": "user", "content": "…"}]} or {"prompt": "…"} on each line'
            raise UserError("--data", f"{options.data}:{number}", "is no chat", remedy) from error
    if not chats:
        raise UserError("--data", options.data, "has no chat", "write one JSON object per line")
    return chats
