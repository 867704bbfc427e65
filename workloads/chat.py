"""Chat: the user's own conversations as load, read from a JSONL file. They have no reference answers.

Each line is a conversation in one of the dialects of workloads/conversations.py. The fields of a request beside it,
such as `max_tokens`, `temperature` and `tools`, are sent with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status
from slimserve.core.text import read_jsonl
from slimserve.workloads.conversations import (
    REMEDY,
    Conversation,
    check_sendable,
    read_conversation,
    row_error,
    unread_line,
)
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
        """Return the first conversations of the file; UserError names the line that is not a conversation.

        A reply at the end of a conversation is not sent. Keys that are not sent are printed once per file.
        """
        # The text seeds the draws, so a different text would change every recorded load test.
        numbers, sizes = (
            random.Random(f"chats {options.prompt_seed}"),
            SizeDistribution("--max-tokens", options.max_tokens),
        )
        if not options.data:
            raise UserError("--data", "", "is missing", f"name a JSONL file and {REMEDY}")
        file = Path(options.data)
        state = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else (0, 0)
        return [
            ChatPrompt(
                messages=chat.raw_messages,
                max_tokens=chat.max_tokens or sizes.draw(numbers),
                kind=self.name,
                chain_of_thought="",
                answer="",
                entry={},
                request=chat.request,
            )
            for chat in _read_chats(file, state)[:num_prompts]
        ]


@lru_cache(maxsize=2)
def _read_chats(file: Path, state: tuple[int, int]) -> list[Conversation]:  # noqa: ARG001  # a changed file is read again
    """Return all conversations of a file, so that its last line is checked before a load test begins as well."""
    chats: list[Conversation] = []
    num_replies = 0
    for number, row in read_jsonl(file, "--data", REMEDY):
        try:
            chat = read_conversation(row)
            check_sendable(chat)
            num_replies += chat.has_reply
            chats.append(chat.without_reply() if chat.has_reply else chat)
        except ValueError as error:
            raise row_error("--data", f"{file}:{number}", error, REMEDY) from error
    if not chats:
        raise UserError("--data", file, "has no conversation", "write one JSON object per line")
    if num_replies:
        print_status(f"{file}: the replies at the end of {num_replies} of {len(chats)} conversations are not sent")
    if unread := unread_line(chat.unread for chat in chats):
        print_status(f"{file}: not sent, as the load test sets them or no server knows them: {unread}")
    return chats


WORKLOAD = Chat()
