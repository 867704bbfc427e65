"""Chat: the user's own conversations as load, read from a JSONL file. They have no reference answers.

Each line is `{"messages": [...]}` or `{"prompt": "…"}` and may have its own `max_tokens`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slimserve.core.errors import UserError
from slimserve.core.text import read_jsonl
from slimserve.workloads.interface import (
    Answer,
    ChatPrompt,
    LoadOptions,
    MetricData,
    Prompt,
    SizeDistribution,
    Split,
    Workload,
)

_LINE = 'write {"messages": [{"role": "user", "content": "…"}]} or {"prompt": "…"} on each line'


@dataclass(frozen=True)
class Chat(Workload):
    """Conversations of the file that `--data` names, in their order."""

    name: ClassVar[str] = "chat"
    primary_metric: ClassVar[str] = ""

    def make_prompts(self, split: Split, num_prompts: int, seed: int = 0) -> list[Prompt]:  # noqa: ARG002
        """Raise UserError: chats have no reference answers, so they cannot calibrate or evaluate a model."""
        raise UserError("workload", self.name, "has no reference answers", "use it with `slimserve loadtest` only")

    def metric_data(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, MetricData]:  # noqa: ARG002
        """Return no metrics: there is nothing to compare the answers with."""
        return {}

    def load_prompts(self, options: LoadOptions, num_prompts: int) -> list[Prompt]:
        """Return the first conversations of the file; UserError names the line that is not a conversation."""
        # The text seeds the draws, so a different text would change every recorded load test.
        numbers, sizes = (
            random.Random(f"chats {options.prompt_seed}"),
            SizeDistribution("--max-tokens", options.max_tokens),
        )
        if not options.data:
            raise UserError("--data", "", "is missing", f"name a JSONL file and {_LINE}")
        chats: list[Prompt] = []
        for number, row in read_jsonl(Path(options.data), "--data", _LINE):
            if len(chats) == num_prompts:
                break
            try:
                messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
                max_tokens = int(row.get("max_tokens") or sizes.draw(numbers))
                chats.append(ChatPrompt(tuple(messages), max_tokens, self.name, "", "", {}))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError("--data", f"{options.data}:{number}", "is not a conversation", _LINE) from error
        if not chats:
            raise UserError("--data", options.data, "has no conversation", "write one JSON object per line")
        return chats


WORKLOAD = Chat()
