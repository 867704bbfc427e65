"""Training and validation examples from a workload or from a file of conversations.

A line of a JSONL file is one conversation: `{"messages": [{"role": …, "content": …}, …]}` with the reply to train on
last, or `{"prompt": …, "completion": …}`. A message's `reasoning_content`, which servers return, becomes the chain of
thought between think tags. `slimserve distill traces` writes such files from the replies of a served teacher.

A workload's examples come from its `calibration` split, because quality and load are measured on the others. A hash of
the user or the question assigns a tenth of them to validation, so that no user is in both.
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
from slimserve.core.text import read_jsonl
from slimserve.distill.models import stop_tokens
from slimserve.distill.sections import Example, chat_example, label_example, text_example
from slimserve.workloads import is_workload, load_workload, workload_names
from slimserve.workloads.interface import (
    ChatPrompt,
    ChoicePrompt,
    Prompt,
    ScoringPrompt,
    TextPrompt,
    hash_number,
    join_reply,
)

_VALIDATION_OF = 10
"""One of this many examples is for validation."""
_MAX_PROMPTS = 20_000
_REMEDY = 'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
_Conversation = tuple[str, str, list[dict[str, str]]]
"""Name, the text before the reply, and the messages."""


@dataclass(frozen=True)
class Examples:
    """The examples of a training."""

    training: list[Example]
    validation: list[Example]
    labels: tuple[int, ...] = ()
    """Tokens of a scoring workload's labels; empty for chats. Scores are probabilities of the first one."""
    groups: tuple[int, ...] = ()
    """User of each validation example, if the workload scores items."""
    num_too_long: int = 0
    """Number of examples that were skipped because their prompt alone is too long."""

    @property
    def sha256(self) -> str:
        """Hash of the training examples' tokens and sections."""
        content = repr([(one.tokens, one.sections) for one in self.training])
        return hashlib.sha256(content.encode()).hexdigest()


def load_examples(
    tokenizer: Any, directory: Path, source: str, num_training: int, num_validation: int, max_tokens: int, seed: int
) -> Examples:
    """Return at most `num_training` and `num_validation` examples of a source, in the order of `seed`.

    `directory` holds the student's configuration. Raises UserError if the source is unknown, a line is invalid, or no
    example is left.
    """
    stop = stop_tokens(directory, tokenizer)
    is_scoring = False
    split: tuple[list[Any], list[Any]] = ([], [])
    if is_workload(source):
        for prompt in load_workload(source).make_prompts(
            "calibration", _num_prompts(num_training, num_validation), seed
        ):
            is_scoring = isinstance(prompt, ScoringPrompt)
            split[_is_validation(_key(prompt))].append(prompt)
    else:
        conversations = list(_read_conversations(Path(source)))
        random.Random(seed).shuffle(conversations)
        for conversation in conversations:
            split[_is_validation(conversation[1])].append(conversation)
    num_too_long = 0

    def examples_of(items: list[Any], max_examples: int) -> list[tuple[Example, Any]]:
        nonlocal num_too_long
        examples: list[tuple[Example, Any]] = []
        for number, item in enumerate(items):
            if len(examples) == max_examples:
                break
            example: Example | None
            if isinstance(item, ScoringPrompt):
                example = label_example(tokenizer, item, f"{source}/{number}", max_tokens)
            elif isinstance(item, ChoicePrompt):
                answer = item.choices[item.truth]
                example = text_example(tokenizer, item.query, answer, f"{source}/{number}", max_tokens)
            elif isinstance(item, TextPrompt):
                example = text_example(tokenizer, "", item.text, f"{source}/{number}", max_tokens)
            elif isinstance(item, ChatPrompt):
                messages = [*item.messages, {"role": "assistant", "content": item.solution}]
                example = chat_example(tokenizer, messages, f"{source}/{number}", max_tokens, stop)
            else:
                example = chat_example(tokenizer, item[2], item[0], max_tokens, stop)
            if example is None:
                num_too_long += 1
            else:
                examples.append((example, item))
        return examples

    training, validation = examples_of(split[0], num_training), examples_of(split[1], num_validation)
    if not training or (num_validation and not validation):
        kind = "validation" if training else "training"
        raise UserError(
            "data.source",
            source,
            f"leaves no {kind} example ({num_too_long} prompts alone have more than {max_tokens} tokens)",
            "use more data, or raise data.max_tokens",
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


def _num_prompts(num_training: int, num_validation: int) -> int:
    """Return the number of prompts of which a tenth is enough for validation."""
    return min(_MAX_PROMPTS, 2 * max(num_training, _VALIDATION_OF * num_validation))


def _key(prompt: Prompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return prompt.messages[-1]["content"] if prompt.group is None else str(prompt.group)
    return str(prompt.group)


def _is_validation(key: str) -> bool:
    return hash_number(f"validation {key}") % _VALIDATION_OF == 0


def _label_token(tokenizer: Any, label: str) -> int:
    tokens = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise UserError("label", label, f"has {len(tokens)} tokens in this model", "choose labels of one token")
    return int(tokens[0])


def _read_conversations(file: Path) -> Iterator[_Conversation]:
    if file.suffix != ".jsonl" or not file.is_file():
        raise UserError(
            "data.source",
            file,
            "is neither a workload nor a JSONL file",
            f"choose from {', '.join(workload_names())}, or give the path of a .jsonl file",
        )
    for number, row in read_jsonl(file, "data.source", _REMEDY):
        if set(row) == {"question"}:  # `distill traces` found no correct reply to it
            continue
        name = f"{file}:{number}"
        try:
            messages = _messages(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("data.source", name, f"is not a conversation ({error!r})", _REMEDY) from error
        yield name, json.dumps(messages[:-1]), messages


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    if "messages" not in row:
        return [
            {"role": "user", "content": _text(row["prompt"])},
            {"role": "assistant", "content": _text(row["completion"])},
        ]
    messages = []
    for message in row["messages"]:
        content = join_reply(message.get("reasoning_content") or "", _text(message["content"]))
        messages.append({"role": _text(message["role"]), "content": content})
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("it does not end with an assistant message")
    return messages


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
