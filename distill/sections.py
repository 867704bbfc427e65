"""Which tokens of a training sequence are prompt, chain of thought and answer.

Found in the text, then carried over to tokens by the tokenizer's offsets, as think tags are rarely tokens of their own:
a token belongs to the section in which its first character lies. Prompt and reply are tokenized apart, as a server does
it, so that what is trained on is what is generated from.

The tags belong to the chain, for the student has to write them too. The answer is what follows the last closing tag,
by the rule of the workload's verifier. It ends with the first stop token; what a chat template puts after that is left
out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from slimserve.core.errors import UserError
from slimserve.workloads.interface import ScoringPrompt

OPEN, CLOSE = "<think>", "</think>"


class Section(IntEnum):
    """What a token is part of."""

    PROMPT = 0
    COT = 1
    ANSWER = 2


@dataclass(frozen=True)
class Example:
    """One training sequence."""

    name: str
    """Tells it from all others of its source, in messages and files."""
    tokens: tuple[int, ...]
    sections: tuple[Section, ...]
    """Of each token."""
    num_prompt: int = 0
    """Leading tokens that a model is given before it writes; 0 where it writes nothing."""


def reply_sections(reply: str, is_open: bool = False) -> list[tuple[int, int, Section]]:
    """Spans `(begin, end, section)` of a reply's characters, in order and without gaps.

    Everything up to the last closing tag is chain, tags included; without any tag everything is answer. A chain that is
    opened and never closed goes on to the end. `is_open`: the prompt has opened the chain, as some templates do.
    """
    closed = reply.rfind(CLOSE)
    begin = closed + len(CLOSE) if closed >= 0 else 0
    reopened = reply.find(OPEN, begin)
    if closed < 0 and (is_open or reopened >= 0):
        return [(0, len(reply), Section.COT)]
    end = reopened if reopened >= 0 else len(reply)
    spans = [(0, begin, Section.COT), (begin, end, Section.ANSWER), (end, len(reply), Section.COT)]
    return [span for span in spans if span[0] < span[1]]


def chat_example(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    name: str,
    max_tokens: int,
    stop_tokens: Collection[int],
) -> Example | None:
    """The example of a conversation whose last message is the reply to learn, cut on the right to `max_tokens`.

    The stop token after the reply is part of its last section. None where the prompt alone fills `max_tokens`. Raises
    UserError where the template does not show the reply as it is, or the tokenizer cannot say where a token begins.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("example", name, "does not end with an assistant's message", "give the reply to learn last")
    prompt, rest = _render(tokenizer, messages, name)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply_ids, offsets = _with_offsets(tokenizer, rest)
    stop = next((place for place, token in enumerate(reply_ids) if token in stop_tokens), None)
    if stop is not None:
        reply_ids, offsets = reply_ids[: stop + 1], offsets[: stop + 1]
    written = offsets[stop][0] if stop is not None else len(rest)
    spans = reply_sections(rest[:written], is_open=prompt.rstrip().endswith(OPEN))
    sections = [_section_at(begin, spans) for begin, _ in offsets]
    room = max_tokens - len(prompt_ids)
    if room <= 0 or not reply_ids:
        return None
    return Example(
        name,
        (*prompt_ids, *reply_ids[:room]),
        (*([Section.PROMPT] * len(prompt_ids)), *sections[:room]),
        len(prompt_ids),
    )


def sampled_example(tokenizer: Any, name: str, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> Example:
    """The example of a reply that a model wrote, with the tokens that it wrote: text would lose how it divided it.

    Each token's section is that of its first character in the decoded reply.
    """
    ends = [len(tokenizer.decode(reply_ids[: place + 1])) for place in range(len(reply_ids))]
    reply = tokenizer.decode(reply_ids)
    spans = reply_sections(reply, is_open=tokenizer.decode(prompt_ids).rstrip().endswith(OPEN))
    sections = [_section_at(begin, spans) for begin in (0, *ends[:-1])] if reply_ids else []
    return Example(
        name,
        (*prompt_ids, *reply_ids),
        (*([Section.PROMPT] * len(prompt_ids)), *sections),
        len(prompt_ids),
    )


def label_example(tokenizer: Any, prompt: ScoringPrompt, name: str, max_tokens: int) -> Example:
    """The example of a history with its candidates' true labels: every label, of the history too, is an answer.

    A line's last word is a label where it is one of the prompt's. Cut on the right to `max_tokens`.
    """
    text = prompt.solved
    labels, begin = [], 0
    for line in text.splitlines(keepends=True):
        found = next((label for label in prompt.labels if line.rstrip("\n").endswith(label)), None)
        if found is not None:
            end = begin + len(line.rstrip("\n"))
            labels.append((end - len(found.strip()), end))
        begin += len(line)
    ids, offsets = _with_offsets(tokenizer, text, add_special_tokens=True)
    sections, left = [], iter(labels)
    label = next(left, None)
    for first, last in offsets:
        while label is not None and label[1] <= first:
            label = next(left, None)
        is_label = label is not None and first < label[1] and last > label[0]
        sections.append(Section.ANSWER if is_label else Section.PROMPT)
    return Example(name, tuple(ids[:max_tokens]), tuple(sections[:max_tokens]))


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], name: str) -> tuple[str, str]:
    """The text before the reply, with what makes the model begin it, and the reply with what the template ends it."""
    reply = messages[-1]["content"]
    if tokenizer.chat_template is None:
        return "".join(f"{message['content']}\n\n" for message in messages[:-1]), reply + (tokenizer.eos_token or "")
    before = [dict(message) for message in messages[:-1]]
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*before, dict(messages[-1])], tokenize=False)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    # The template shows earlier messages in another way once there is a reply: what counts is what is generated from.
    at = whole.rfind(reply.strip())
    if not reply.strip() or at < 0:
        raise UserError(
            "chat template", name, "does not show the reply as it is", "give replies with their think tags as text"
        )
    return prompt, whole[at:]


def _with_offsets(tokenizer: Any, text: str, add_special_tokens: bool = False) -> tuple[list[int], list[Any]]:
    if not tokenizer.is_fast:
        raise UserError(
            "tokenizer", type(tokenizer).__name__, "does not tell where a token begins", "use a fast tokenizer"
        )
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


def _section_at(place: int, spans: Sequence[tuple[int, int, Section]]) -> Section:
    """That of the character at `place`; what comes after all, as a stop token, goes on with the last section."""
    return next((section for begin, end, section in spans if begin <= place < end), spans[-1][2] if spans else _EMPTY)


_EMPTY = Section.ANSWER
"""A reply of a stop token alone is an empty answer."""
