"""Divides the tokens of a training sequence into prompt, chain of thought and answer.

Sections are found in the text and mapped to tokens by the tokenizer's offsets, because think tags are rarely single
tokens. A token belongs to the section of its first character. Prompt and reply are tokenized separately, as a server
does, so that training and generation see the same tokens.

The think tags belong to the chain of thought, because the student must write them too. The answer follows the last
closing tag, as in the workload's verifier, and ends with the first stop token. Text that a chat template puts after the
stop token is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

from slimserve.core.chat_template import render_chat
from slimserve.core.errors import UserError
from slimserve.core.text import split_lines
from slimserve.workloads.interface import THINK_CLOSE, THINK_OPEN, ScoringPrompt

_MARKER = "SLIMSERVE-REPLY"
"""Stands for a reply in a rendered conversation, to find what the template writes after it."""


class Section(IntEnum):
    """The section of a token."""

    PROMPT = 0
    COT = 1
    ANSWER = 2


class Label(NamedTuple):
    """A label of a ranker's candidate, such as " yes" or " no"."""

    position: int
    first: int
    """Token of the label whose probability is the candidate's score."""
    second: int
    """Token of the other label."""
    share: float
    """Target probability of the first label: 1 or 0, or a soft label or grade between them."""


@dataclass(frozen=True)
class Example:
    """One training sequence."""

    name: str
    """Name in messages and files, unique within the source."""
    tokens: tuple[int, ...]
    sections: tuple[Section, ...]
    """Section of each token."""
    num_prompt: int = 0
    """Number of leading tokens that a model gets before it replies; 0 if it writes no reply."""
    teacher_prompt: tuple[int, ...] = ()
    """Prompt that the teacher reads in place of the first `num_prompt` tokens; empty if it reads the same ones."""
    labels: tuple[Label, ...] = ()
    """Labels in the order of their positions, if a ranker learns the sequence."""


def reply_sections(reply: str, is_open: bool = False) -> list[tuple[int, int, Section]]:
    """Return spans `(begin, end, section)` of a reply's characters, in order and without gaps.

    Everything up to the last closing tag is chain of thought, tags included. Without any tag, everything is answer. A
    chain that is never closed extends to the end. `is_open` says that the prompt opened it, as some templates do.
    """
    closed = reply.rfind(THINK_CLOSE)
    begin = closed + len(THINK_CLOSE) if closed >= 0 else 0
    reopened = reply.find(THINK_OPEN, begin)
    if closed < 0 and (is_open or reopened >= 0):
        return [(0, len(reply), Section.COT)]
    end = reopened if reopened >= 0 else len(reply)
    spans = [(0, begin, Section.COT), (begin, end, Section.ANSWER), (end, len(reply), Section.COT)]
    return [span for span in spans if span[0] < span[1]]


def chat_example(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    name: str,
    max_tokens: int,
    stop_tokens: Collection[int],
    *,
    request: Mapping[str, Any] | None = None,
    teacher_instruction: str = "",
) -> Example | None:
    """Return the example of a conversation whose last message is the reply to train on.

    The end is cut off after `max_tokens`; None if the prompt alone has as many. The stop token belongs to the reply's
    last section. `tools` and `chat_template_kwargs` of `request` reach the chat template. The teacher's prompt has
    `teacher_instruction` before the text of the last user message. Raises UserError if the template fails or leaves the
    reply out, or if the tokenizer reports no offsets.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("example", name, "does not end with an assistant message", "put the reply to train on last")
    prompt, rest = _render(tokenizer, messages, name, request or {})
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply_ids, offsets = _with_offsets(tokenizer, rest)
    stop = next((at for at, token in enumerate(reply_ids) if token in stop_tokens), None)
    if stop is not None:
        reply_ids, offsets = reply_ids[: stop + 1], offsets[: stop + 1]
    end = offsets[stop][0] if stop is not None else len(rest)
    spans = reply_sections(rest[:end], is_open=prompt.rstrip().endswith(THINK_OPEN))
    sections = [_section_at(begin, spans) for begin, _ in offsets]
    room = max_tokens - len(prompt_ids)
    if room <= 0 or not reply_ids:
        return None
    teacher_ids: list[int] = []
    if teacher_instruction:
        instructed, _ = _render(tokenizer, _instructed(messages, teacher_instruction, name), name, request or {})
        teacher_ids = tokenizer(instructed, add_special_tokens=False)["input_ids"]
    return Example(
        name,
        (*prompt_ids, *reply_ids[:room]),
        (*([Section.PROMPT] * len(prompt_ids)), *sections[:room]),
        len(prompt_ids),
        tuple(teacher_ids),
    )


def _instructed(messages: Sequence[Mapping[str, Any]], instruction: str, name: str) -> list[Mapping[str, Any]]:
    """Return the conversation with an instruction before the last user message's text.

    It is not a system message, because some templates have none and others fill it by default.
    """
    at = next((at for at in reversed(range(len(messages))) if messages[at]["role"] == "user"), None)
    if at is None:
        problem = "has no user message for loss.teacher_instruction"
        raise UserError("conversation", name, problem, "leave the conversation or the instruction out")
    content = messages[at]["content"]
    text = (
        f"{instruction}\n\n{content}"
        if isinstance(content, str)
        else [{"type": "text", "text": instruction}, *(content or ())]
    )
    return [*messages[:at], {**messages[at], "content": text}, *messages[at + 1 :]]


def sampled_example(tokenizer: Any, name: str, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> Example:
    """Return the example of a sampled reply with its own tokens; tokenizing its text could give other tokens.

    Each token has the section of its first character in the decoded reply.
    """
    ends = [len(tokenizer.decode(reply_ids[: at + 1])) for at in range(len(reply_ids))]
    reply = tokenizer.decode(reply_ids)
    spans = reply_sections(reply, is_open=tokenizer.decode(prompt_ids).rstrip().endswith(THINK_OPEN))
    sections = [_section_at(begin, spans) for begin in (0, *ends[:-1])] if reply_ids else []
    return Example(
        name,
        (*prompt_ids, *reply_ids),
        (*([Section.PROMPT] * len(prompt_ids)), *sections),
        len(prompt_ids),
    )


def label_example(tokenizer: Any, prompt: ScoringPrompt, name: str, max_tokens: int) -> Example:
    """Return the example of a history and its candidates with their true labels, cut off after `max_tokens`.

    Every label is an answer, those of the history too. A label is the end of a line that is one of the prompt's labels.
    Soft labels are those of the prompt's items; the history's labels are hard. Raises UserError if a label is not one
    token.
    """
    text, soft, begin = prompt.solved, {}, len(prompt.query)
    for item, share, true in zip(prompt.items, prompt.soft, prompt.truth, strict=True):
        end = begin + len(item) + len(prompt.labels[0 if true else 1])
        soft[end], begin = share, end + 1
    first_token, second_token = (label_token(tokenizer, label) for label in prompt.labels[:2])
    spans, begin = [], 0
    for line in split_lines(text, keepends=True):
        ending = next((label for label in prompt.labels if line.rstrip("\n").endswith(label)), None)
        if ending is not None:
            end = begin + len(line.rstrip("\n"))
            spans.append((end - len(ending.strip()), end, soft.get(end, float(ending == prompt.labels[0]))))
        begin += len(line)
    ids, offsets = _with_offsets(tokenizer, text, add_special_tokens=True)
    sections, labels, remaining = [], [], iter(spans)
    span = next(remaining, None)
    for position, (first, last) in enumerate(offsets[:max_tokens]):
        while span is not None and span[1] <= first:
            span = next(remaining, None)
        is_label = span is not None and first < span[1] and last > span[0]
        sections.append(Section.ANSWER if is_label else Section.PROMPT)
        if span is not None and is_label and ids[position] in {first_token, second_token}:
            labels.append(Label(position, first_token, second_token, span[2]))
    return Example(name, tuple(ids[:max_tokens]), tuple(sections), labels=tuple(labels))


def label_token(tokenizer: Any, label: str) -> int:
    """Return the token of a label; UserError if it is not one token."""
    tokens = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise UserError("label", label, f"has {len(tokens)} tokens in this model", "choose labels of one token")
    return int(tokens[0])


def with_soft_reply(tokenizer: Any, example: Example, soft_labels: Mapping[str, float]) -> Example | None:
    """Return a chat whose answer is one of two labels, with their probabilities; None if the answer was cut off.

    `soft_labels` gives each label's probability, the scored one's first. Raises UserError if the answer is neither of
    them, or if one of them is not one token.
    """
    answers = [at for at, section in enumerate(example.sections) if section is Section.ANSWER]
    written = {at: tokenizer.decode([example.tokens[at]], skip_special_tokens=True) for at in answers}
    positions = [at for at in answers if written[at].strip()]
    if not positions:
        return None
    text = written[positions[0]]
    whole = "".join(written.values()).strip()
    if len(positions) > 1 or whole not in soft_labels:
        why = f"{len(positions)} tokens in this model" if whole in soft_labels else "none of its soft_labels"
        problem = f"has the answer {whole[:40]!r}, which is {why}"
        raise UserError("conversation", example.name, problem, "answer with one label of one token, and nothing else")
    space = text[: len(text) - len(text.lstrip())]
    first, second = (label_token(tokenizer, space + label) for label in soft_labels)
    share = next(iter(soft_labels.values()))
    return replace(example, labels=(Label(positions[0], first, second, share),))


def text_example(tokenizer: Any, prompt: str, answer: str, name: str, max_tokens: int) -> Example | None:
    """Return the example of a plain text: a prompt without a chat template, and the answer that follows it.

    None if the prompt alone has at least `max_tokens` tokens. Without a prompt, the first token is the prompt.
    """
    ids, offsets = _with_offsets(tokenizer, prompt + answer, add_special_tokens=True)
    is_prompt = [last <= len(prompt) for _, last in offsets]
    if ids:
        is_prompt[0] = True
    if all(is_prompt[:max_tokens]):
        return None
    sections = [Section.PROMPT if one else Section.ANSWER for one in is_prompt]
    return Example(name, tuple(ids[:max_tokens]), tuple(sections[:max_tokens]))


def _render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], name: str, request: Mapping[str, Any]
) -> tuple[str, str]:
    """Return the prompt as a server renders it, and the reply with everything that the template adds after it.

    Some templates drop the chain of thought of a reply that they are given, as that of an earlier turn, or open the
    next one themselves. The reply is then written after the prompt as the model must generate it.
    """
    *before, reply = messages
    text = reply["content"] or ""
    if THINK_CLOSE in text and THINK_OPEN not in text.partition(THINK_CLOSE)[0]:  # the teacher's template opened it
        text = f"{THINK_OPEN}\n{text.lstrip()}"
        reply = {**reply, "content": text}
    if tokenizer.chat_template is None:
        if reply.get("tool_calls") or request.get("tools"):
            raise UserError("conversation", name, "has tools, and the model no chat template", "use a model for tools")
        return "".join(f"{message['content'] or ''}\n\n" for message in before), text + (tokenizer.eos_token or "")

    def render(conversation: Sequence[Mapping[str, Any]], is_prompt: bool = False) -> str:
        options = request.get("chat_template_kwargs")
        tools = request.get("tools") or ()
        return render_chat(tokenizer, conversation, name, tools=tools, options=options, add_generation_prompt=is_prompt)

    prompt, full = render(before, is_prompt=True), render([*before, reply])
    rest = full[len(prompt) :] if full.startswith(prompt) else ""
    is_open = prompt.rstrip().endswith(THINK_OPEN)
    if full.startswith(prompt) and _holds(rest, text) and (not is_open or THINK_OPEN in text or THINK_CLOSE in rest):
        return prompt, rest
    header = prompt.rstrip().removesuffix(THINK_OPEN)
    if reply["content"] is None and is_open and full.startswith(header):  # a tool call without a chain before it
        return prompt, f"\n{THINK_CLOSE}\n\n{full[len(header) :]}"
    marked = render([*before, {**reply, "content": _MARKER}])
    if _MARKER not in marked:
        raise UserError("conversation", name, "has a reply that the model's chat template leaves out", "correct it")
    return prompt, _continued(prompt, text) + marked.rpartition(_MARKER)[2]


def _holds(rendered: str, reply: str) -> bool:
    """Tell whether a rendered reply has the chain of thought and the answer of the original."""
    chain, close, answer = reply.rpartition(THINK_CLOSE)
    parts = (chain.strip().removeprefix(THINK_OPEN).strip(), close, answer.strip())
    return all(part in rendered for part in parts)


def _continued(prompt: str, reply: str) -> str:
    """Return what follows the prompt: the reply without the opening tag that the prompt has already.

    A reply without a chain of thought then closes an empty one.
    """
    if not prompt.rstrip().endswith(THINK_OPEN):
        return reply
    if THINK_OPEN not in reply and THINK_CLOSE not in reply:
        return f"\n{THINK_CLOSE}\n\n{reply}"
    rest = reply.lstrip().removeprefix(THINK_OPEN)
    return rest.lstrip("\n") if prompt.endswith("\n") else rest


def _with_offsets(tokenizer: Any, text: str, add_special_tokens: bool = False) -> tuple[list[int], list[Any]]:
    if not tokenizer.is_fast:
        raise UserError("tokenizer", type(tokenizer).__name__, "reports no token offsets", "use a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _section_at(position: int, spans: Sequence[tuple[int, int, Section]]) -> Section:
    """Return the section of a character; a stop token after the text belongs to the last section.

    A reply of a stop token alone is an empty answer.
    """
    last = spans[-1][2] if spans else Section.ANSWER
    return next((section for begin, end, section in spans if begin <= position < end), last)
