"""Training and validation examples from a workload or from a file of conversations.

A line of a JSONL file is one conversation with the reply to train on last, in one of the dialects of
workloads/conversations.py. A message's `reasoning`, which servers return, becomes the chain of thought between think
tags. `slimserve distill traces` writes such files from the replies of a served teacher.

Several workloads can be joined by `+`. A workload's examples come from its `calibration` split, because quality and
load are measured on the others. A hash of the user or the question assigns a tenth of them to validation, so that no
user is in both.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status
from slimserve.core.text import read_jsonl
from slimserve.distill.models import stop_tokens
from slimserve.distill.sections import Example, chat_example, label_example, text_example
from slimserve.workloads import is_workload, load_workload, workload_names
from slimserve.workloads.conversations import dialect_of, read_conversation, row_error, unread_line
from slimserve.workloads.interface import (
    ChatPrompt,
    ChoicePrompt,
    Prompt,
    ScoringPrompt,
    TextPrompt,
    hash_number,
)

_VALIDATION_OF = 10
"""One of this many examples is for validation."""
_MAX_PROMPTS = 20_000
_REMEDY = 'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
_USED_FIELDS = {"tools", "chat_template_kwargs"}
"""Fields of a request that shape the text of a conversation."""
_OWN_KEYS = {"question"}
"""Keys that `distill traces` writes for itself."""


@dataclass(frozen=True)
class Examples:
    """The examples of a training."""

    training: list[Example]
    validation: list[Example]
    labels: tuple[int, ...] = ()
    """Tokens of a scoring workload's labels; empty for chats. Scores are probabilities of the first one."""
    groups: tuple[int | None, ...] = ()
    """User of each validation example whose workload scores items; None for the others."""
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

    Of several sources, each gives an equal share, and the labels are those of the first one that scores items.
    `directory` holds the student's configuration. Raises UserError if a source is unknown, a line is invalid, or no
    example is left of one of them.
    """
    stop = stop_tokens(directory, tokenizer)
    sources = sources_of(source)
    shares = (-(-num_training // len(sources)), -(-num_validation // len(sources)))
    parts = [_load_source(tokenizer, stop, one, *shares, max_tokens, seed) for one in sources]
    labels = next((part.labels for part in parts if part.labels), ())
    return Examples(
        [example for part in parts for example in part.training],
        [example for part in parts for example in part.validation],
        labels,
        tuple(group if part.labels == labels else None for part in parts for group in part.groups),
        sum(part.num_too_long for part in parts),
    )


def sources_of(source: str) -> list[str]:
    """Return the workloads that `+` joins in a data source, or the one workload or file that it names."""
    names = source.split("+")
    return names if len(names) > 1 and all(map(is_workload, names)) else [source]


def _load_source(
    tokenizer: Any,
    stop: Collection[int],
    source: str,
    num_training: int,
    num_validation: int,
    max_tokens: int,
    seed: int,
) -> Examples:
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
            split[_is_validation(conversation.key)].append(conversation)
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
                name = f"{source}/{number}"
                example = chat_example(tokenizer, messages, name, max_tokens, stop, request=item.request)
            else:
                example = chat_example(tokenizer, item.messages, item.name, max_tokens, stop, request=item.request)
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
        tuple(item.group if is_scoring else None for _, item in validation),
        num_too_long,
    )


def _num_prompts(num_training: int, num_validation: int) -> int:
    """Return the number of prompts of which a tenth is enough for validation."""
    return min(_MAX_PROMPTS, 2 * max(num_training, _VALIDATION_OF * num_validation))


def _key(prompt: Prompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return prompt.question if prompt.group is None else str(prompt.group)
    return str(prompt.group)


def _is_validation(key: str) -> bool:
    return hash_number(f"validation {key}") % _VALIDATION_OF == 0


def _label_token(tokenizer: Any, label: str) -> int:
    tokens = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise UserError("label", label, f"has {len(tokens)} tokens in this model", "choose labels of one token")
    return int(tokens[0])


@dataclass(frozen=True)
class _Row:
    """A conversation of a file whose last message is the reply to train on."""

    name: str
    messages: list[dict[str, Any]]
    request: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The text before the reply, which decides whether the row is for validation."""
        return json.dumps(self.messages[:-1])


def _read_conversations(file: Path) -> Iterator[_Row]:
    if file.suffix != ".jsonl" or not file.is_file():
        remedy = f"choose from {', '.join(workload_names())}, or give the path of a .jsonl file"
        if file.suffix == ".json" and file.is_file():
            remedy = f"convert it: jq -c '.[]' {file.name} > {file.stem}.jsonl"
        raise UserError("data.source", file, "is neither a workload nor a JSONL file", remedy)
    unread: list[list[str]] = []
    for number, row in read_jsonl(file, "data.source", _REMEDY):
        if set(row) == {"question"}:  # `distill traces` found no correct reply to it
            continue
        name = f"{file}:{number}"
        try:
            conversation = read_conversation(row)
            if not conversation.has_reply:
                raise ValueError(dialect_of(row) or "is not a conversation that ends with an assistant message")
            if len(conversation.messages) == 1:
                raise ValueError("has a reply and nothing before it")
            if conversation.raw_messages[-1].get("weight") == 0:  # as OpenAI's fine-tuning leaves a reply out
                raise ValueError("has a reply of weight 0, and training uses the last reply; leave the row out")
            if isinstance(row.get("label"), bool):
                raise ValueError("is a rating of a reply (label); keep the rows of good replies, without the label")
            messages = [message.as_request() for message in conversation.messages]
        except ValueError as error:
            raise row_error("data.source", name, error, _REMEDY) from error
        of_requests = [key for key in conversation.request if key not in _USED_FIELDS]
        of_requests += ["max_tokens"] if conversation.max_tokens is not None else []
        unread.append([key for key in (*conversation.unread, *of_requests) if key not in _OWN_KEYS])
        yield _Row(name, messages, conversation.request)
    if keys := unread_line(unread):
        print_status(f"{file}: not used in training: {keys}")
