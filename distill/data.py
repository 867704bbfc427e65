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
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status
from slimserve.core.text import read_jsonl
from slimserve.distill.models import stop_tokens
from slimserve.distill.recipe import LossSettings
from slimserve.distill.sections import (
    Example,
    chat_example,
    label_example,
    label_token,
    text_example,
    with_soft_reply,
)
from slimserve.workloads import is_workload, load_workload, workload_files, workload_names
from slimserve.workloads.conversations import dialect_of, read_conversation, row_error, unread_line
from slimserve.workloads.interface import (
    ChatPrompt,
    ChoicePrompt,
    Prompt,
    ScoringPrompt,
    TextPrompt,
    hash_number,
)
from slimserve.workloads.item_tokens import item_tokens_of

_VALIDATION_OF = 10
"""One of this many examples is for validation."""
_MAX_PROMPTS = 20_000
_REMEDY = 'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
_USED_FIELDS = {"tools", "chat_template_kwargs"}
"""Fields of a request that shape the text of a conversation."""
_OWN_KEYS = {"question", "soft_labels"}
"""Keys that are no part of a conversation: what `distill traces` writes for itself, and the labels' probabilities."""


@dataclass(frozen=True)
class Examples:
    """The examples of a training."""

    training: list[Example]
    validation: list[Example]
    labels: tuple[int, ...] = ()
    """Tokens of a scoring workload's labels; empty for chats. Scores are probabilities of the first one."""
    groups: tuple[int | None, ...] = ()
    """User of each validation example whose workload scores items; None for the others."""
    training_groups: tuple[int | None, ...] = ()
    """The same of each training example."""
    num_too_long: int = 0
    """Number of examples that were skipped because their prompt alone is too long."""

    @property
    def sha256(self) -> str:
        """Hash of the training examples' tokens, sections and labels."""
        content = repr([(one.tokens, one.sections, one.labels) for one in self.training])
        return hashlib.sha256(content.encode()).hexdigest()


def load_examples(
    tokenizer: Any,
    directory: Path,
    source: str,
    num_training: int,
    num_validation: int,
    max_tokens: int,
    seed: int,
    teacher_instruction: str = "",
    adapt: Callable[[ScoringPrompt], Prompt] | None = None,
) -> Examples:
    """Return at most `num_training` and `num_validation` examples of a source, in the order of `seed`.

    Of several sources, each gives an equal share, and the labels are those of the first one that scores items.
    `directory` holds the student's configuration. In chats the teacher reads `teacher_instruction` too. `adapt` changes
    each prompt of a workload that scores items; the default gives it item tokens if the student has a catalogue. Raises
    UserError if a source is unknown, a line is invalid, or no example is left of one of them.
    """
    stop = stop_tokens(directory, tokenizer)
    sources = sources_of(source)
    shares = (-(-num_training // len(sources)), -(-num_validation // len(sources)))
    adapt = adapt or item_tokens_of(directory)
    parts = [
        _load_source(tokenizer, stop, one, *shares, max_tokens, seed, teacher_instruction, adapt) for one in sources
    ]
    labels = next((part.labels for part in parts if part.labels), ())
    return Examples(
        [example for part in parts for example in part.training],
        [example for part in parts for example in part.validation],
        labels,
        tuple(group if part.labels == labels else None for part in parts for group in part.groups),
        tuple(group for part in parts for group in part.training_groups),
        sum(part.num_too_long for part in parts),
    )


def check_data(examples: Examples, loss: LossSettings) -> None:
    """Raise UserError if the loss needs labels or conversations that the training examples do not have."""
    if loss.list_weight and not any(example.labels for example in examples.training):
        problem, remedy = "has no effect, because the data has no labels", "use candidate lists, or set it to 0"
        raise UserError("loss.list_weight", loss.list_weight, problem, remedy)
    if loss.teacher_instruction and not any(example.teacher_prompt for example in examples.training):
        problem = "has no effect, because the data has no conversations"
        raise UserError("loss.teacher_instruction", loss.teacher_instruction, problem, "use chats, or leave it out")


def check_source(source: str) -> None:
    """Raise UserError unless `source` is workloads or a JSONL file."""
    for one in sources_of(source):
        if is_workload(one):
            load_workload(one)
        elif Path(one).suffix != ".jsonl" or not Path(one).is_file():
            remedy = f"choose from {', '.join(workload_names())}, or give the path of a .jsonl file"
            if Path(one).suffix == ".json" and Path(one).is_file():
                remedy = f"convert it: jq -c '.[]' {Path(one).name} > {Path(one).stem}.jsonl"
            raise UserError("data.source", one, "is neither a workload nor a JSONL file", remedy)


def sources_of(source: str) -> list[str]:
    """Return the workloads that `+` joins in a data source, or the one workload or file that it names."""
    names = source.split("+")
    return names if len(names) > 1 and all(map(is_workload, names)) else [source]


def source_files(source: str) -> list[Path]:
    """Return the files whose content decides what a data source gives; none for built-in workloads."""
    files = [workload_files(one) if is_workload(one) else [Path(one)] for one in sources_of(source)]
    return [file for some in files for file in some if file.is_file()]


def _load_source(
    tokenizer: Any,
    stop: Collection[int],
    source: str,
    num_training: int,
    num_validation: int,
    max_tokens: int,
    seed: int,
    teacher_instruction: str,
    adapt: Callable[[ScoringPrompt], Prompt],
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
    make_chat = partial(
        chat_example,
        tokenizer,
        max_tokens=max_tokens,
        stop_tokens=stop,
        teacher_instruction=teacher_instruction,
    )

    def examples_of(items: list[Any], max_examples: int) -> list[tuple[Example, Any]]:
        nonlocal num_too_long
        examples: list[tuple[Example, Any]] = []
        for number, item in enumerate(items):
            if len(examples) == max_examples:
                break
            example: Example | None
            if isinstance(item, ScoringPrompt):
                adapted = adapt(item)
                assert isinstance(adapted, ScoringPrompt)
                if not (adapted.items or adapted.line_ids):  # none of its items is among those that are learned
                    continue
                example = label_example(tokenizer, adapted, f"{source}/{number}", max_tokens)
            elif isinstance(item, ChoicePrompt):
                answer = item.choices[item.truth]
                example = text_example(tokenizer, item.query, answer, f"{source}/{number}", max_tokens)
            elif isinstance(item, TextPrompt):
                example = text_example(tokenizer, "", item.text, f"{source}/{number}", max_tokens)
            elif isinstance(item, ChatPrompt):
                messages = [*item.messages, {"role": "assistant", "content": item.solution}]
                example = make_chat(messages, f"{source}/{number}", request=item.request)
            else:
                example = make_chat(item.messages, item.name, request=item.request)
                if example is not None and item.soft_labels:
                    example = with_soft_reply(tokenizer, example, item.soft_labels)
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
        labels = tuple(label_token(tokenizer, label) for label in prompt.labels)
    return Examples(
        [example for example, _ in training],
        [example for example, _ in validation],
        labels,
        tuple(item.group if is_scoring else None for _, item in validation),
        tuple(item.group if is_scoring else None for _, item in training),
        num_too_long,
    )


def _num_prompts(num_training: int, num_validation: int) -> int:
    """Return the number of prompts of which a tenth is enough for validation."""
    return min(_MAX_PROMPTS, 2 * max(num_training, _VALIDATION_OF * num_validation))


def _key(prompt: Prompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return prompt.question if prompt.group is None else str(prompt.group)
    return str(prompt.group)


def is_validation_user(group: int) -> bool:
    """Tell whether the examples of a user are for validation."""
    return _is_validation(str(group))


def _is_validation(key: str) -> bool:
    return hash_number(f"validation {key}") % _VALIDATION_OF == 0


@dataclass(frozen=True)
class _Row:
    """A conversation of a file whose last message is the reply to train on."""

    name: str
    messages: list[dict[str, Any]]
    request: Mapping[str, Any]
    soft_labels: Mapping[str, float]
    """Probabilities of two labels, one of which is the reply; empty for any other reply."""

    @property
    def key(self) -> str:
        """The text before the reply, which decides whether the row is for validation."""
        return json.dumps(self.messages[:-1])


def _read_soft_labels(value: Any) -> dict[str, float]:
    """Return the probabilities of a row's two labels, scaled to 1; ValueError if they are none."""
    if value is None:
        return {}
    numbers = list(value.values()) if isinstance(value, dict) else []
    is_valid = len(numbers) == 2 and all(
        isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 1 for one in numbers
    )
    if not is_valid or not 0.99 <= sum(numbers) <= 1.01:
        raise ValueError('has soft_labels that are not two probabilities; write {"yes": 0.8, "no": 0.2}')
    return {str(label): share / sum(numbers) for label, share in value.items()}


def _read_conversations(file: Path) -> Iterator[_Row]:
    check_source(str(file))
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
            soft_labels = _read_soft_labels(row.get("soft_labels"))
        except ValueError as error:
            raise row_error("data.source", name, error, _REMEDY) from error
        of_requests = [key for key in conversation.request if key not in _USED_FIELDS]
        of_requests += ["max_tokens"] if conversation.max_tokens is not None else []
        unread.append([key for key in (*conversation.unread, *of_requests) if key not in _OWN_KEYS])
        yield _Row(name, messages, conversation.request, soft_labels)
    if keys := unread_line(unread):
        print_status(f"{file}: not used in training: {keys}")
