"""Training and validation examples from a workload, or from a file of conversations.

A line of a JSONL file is one conversation: `{"messages": [{"role": …, "content": …}, …]}` with the reply to learn last,
or `{"prompt": …, "completion": …}`. A message's `reasoning_content`, as servers give it, becomes its chain between
think tags. `slimserve distill traces` writes such files from a served teacher's own replies.

A workload's training examples are of its `calibration` split: quality and load are judged on others. Validation takes
every tenth of them by a hash of the member or the question, so that no member's taste is in both.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.distill.models import stop_tokens
from slimserve.distill.sections import Example, chat_example, label_example
from slimserve.workloads import is_workload, load_workload, workload_names
from slimserve.workloads.interface import ChatPrompt, Prompt, ScoringPrompt, hash_number

_VALIDATION_OF = 10
_MOST_PROMPTS = 20_000
_Conversation = tuple[str, str, list[dict[str, str]]]
"""Name, what tells conversations of one question from others, and messages."""


@dataclass(frozen=True)
class Examples:
    """What a run learns from, and what it is validated on."""

    training: list[Example]
    validation: list[Example]
    labels: tuple[int, ...] = ()
    """Tokens of a scoring workload's labels, the first one being the score's; none for chats."""
    groups: tuple[int, ...] = ()
    """Whose each validation example is, for intervals; of scoring workloads."""
    num_too_long: int = 0
    """Left out, since their prompt alone was longer than allowed."""

    @property
    def sha256(self) -> str:
        """Hash of the training examples' tokens and sections."""
        told = repr([(one.tokens, one.sections) for one in self.training])
        return hashlib.sha256(told.encode()).hexdigest()


def load_examples(
    tokenizer: Any, directory: Path, source: str, num_training: int, num_validation: int, max_tokens: int, seed: int
) -> Examples:
    """At most so many examples of each kind, in the order of `seed`, as the student's tokenizer divides them.

    Raises UserError where the source is unknown, a line cannot be read, or no example is left.
    """
    stop = stop_tokens(directory, tokenizer)
    is_scoring = False
    chosen: tuple[list[Any], list[Any]] = ([], [])
    if is_workload(source):
        for prompt in load_workload(source).make_prompts("calibration", _most(num_training, num_validation), seed):
            is_scoring = isinstance(prompt, ScoringPrompt)
            chosen[_is_validation(_key(prompt))].append(prompt)
    else:
        conversations = list(_read_conversations(Path(source)))
        random.Random(seed).shuffle(conversations)
        for conversation in conversations:
            chosen[_is_validation(conversation[1])].append(conversation)
    num_too_long = 0

    def examples_of(items: list[Any], wanted: int) -> list[tuple[Example, Any]]:
        nonlocal num_too_long
        found: list[tuple[Example, Any]] = []
        for number, item in enumerate(items):
            if len(found) == wanted:
                break
            if isinstance(item, ScoringPrompt):
                example: Example | None = label_example(tokenizer, item, f"{source}/{number}", max_tokens)
            elif isinstance(item, ChatPrompt):
                messages = [*item.messages, {"role": "assistant", "content": item.solution}]
                example = chat_example(tokenizer, messages, f"{source}/{number}", max_tokens, stop)
            else:
                example = chat_example(tokenizer, item[2], item[0], max_tokens, stop)
            if example is None:
                num_too_long += 1
            else:
                found.append((example, item))
        return found

    training, validation = examples_of(chosen[0], num_training), examples_of(chosen[1], num_validation)
    if not training or (num_validation and not validation):
        kind = "validation" if training else "training"
        raise UserError(
            "data.source",
            source,
            f"leaves no {kind} example ({num_too_long} prompts alone have more than {max_tokens} tokens)",
            "give more data, or raise data.max_tokens",
        )
    labels: tuple[int, ...] = ()
    if is_scoring:
        prompt = training[0][1]
        labels = tuple(_label_token(tokenizer, label) for label in prompt.labels)
    return Examples(
        [example for example, _ in training],
        [example for example, _ in validation],
        labels,
        tuple(item.group for _, item in validation) if is_scoring else (),
        num_too_long,
    )


def _most(num_training: int, num_validation: int) -> int:
    """Prompts to draw so that a tenth of them are enough to validate on."""
    return min(_MOST_PROMPTS, 2 * max(num_training, _VALIDATION_OF * num_validation))


def _key(prompt: Prompt) -> str:
    return str(prompt.group) if isinstance(prompt, ScoringPrompt) else prompt.messages[-1]["content"]


def _is_validation(key: str) -> bool:
    return hash_number(f"validation {key}") % _VALIDATION_OF == 0


def _label_token(tokenizer: Any, label: str) -> int:
    tokens = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise UserError("label", label, f"is {len(tokens)} tokens of this model", "choose labels of one token each")
    return int(tokens[0])


def _read_conversations(file: Path) -> Iterator[_Conversation]:
    if file.suffix != ".jsonl" or not file.is_file():
        raise UserError(
            "data.source",
            file,
            "is neither a workload nor a file",
            f"choose from {', '.join(workload_names())}, or give the path of a .jsonl file",
        )
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError("data.source", file, f"is not UTF-8 ({error})", "convert it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{file}:{number}"
        try:
            row = json.loads(line)
            if set(row) == {"question"}:  # of which the teacher found no right reply
                continue
            messages = _messages(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "data.source",
                name,
                f"is no conversation ({error or type(error).__name__})",
                'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
            ) from error
        yield name, json.dumps(messages[:-1]), messages


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    if "messages" not in row:
        return [
            {"role": "user", "content": _text(row["prompt"])},
            {"role": "assistant", "content": _text(row["completion"])},
        ]
    messages = []
    for message in row["messages"]:
        content = _text(message["content"])
        if message.get("reasoning_content"):
            content = f"<think>\n{message['reasoning_content']}\n</think>\n{content}"
        messages.append({"role": _text(message["role"]), "content": content})
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("it does not end with an assistant's message")
    return messages


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
