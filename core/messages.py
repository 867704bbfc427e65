"""Reads chat messages: those of data files, and those that chat servers answer.

Everything that reads a message uses `read_message`, so that a field that servers rename is known everywhere at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimserve.core.errors import UserError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
"""Tags around the chain of thought in a reply."""
CHAIN_FIELDS = ("reasoning", "reasoning_content", "thinking")
"""Fields of a message that hold its chain of thought, by server and age."""
_KNOWN_FIELDS = {
    "role",
    "content",
    *CHAIN_FIELDS,
    "reasoning_details",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
}


def join_reply(chain_of_thought: str, answer: str) -> str:
    """Return a reply with its chain of thought between think tags; without a chain, the answer alone."""
    return f"{THINK_OPEN}\n{chain_of_thought}\n{THINK_CLOSE}\n{answer}" if chain_of_thought else answer


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str | None
    """Text of the message, parts joined with line feeds; None beside tool calls."""
    reasoning: str = ""
    """The chain of thought, if it is apart from the content."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    further: Mapping[str, str] = field(default_factory=dict)
    """`name` and `tool_call_id`."""
    other_parts: tuple[str, ...] = ()
    """Types of the content's parts that are no text, such as image_url."""
    unread: tuple[str, ...] = ()
    """Further fields with a value."""

    @property
    def text(self) -> str:
        """The content with the chain of thought between think tags before it; ValueError if both have one."""
        content = self.content or ""
        if not self.reasoning or self.reasoning.strip() in content.partition(THINK_CLOSE)[0]:
            return content
        if THINK_OPEN in content or THINK_CLOSE in content:
            raise ValueError("has a chain of thought in its content and another one beside it")
        return join_reply(self.reasoning, content)

    def as_request(self) -> dict[str, Any]:
        """Return the message as servers and chat templates take it, with its chain of thought in the content.

        Raises ValueError if a part of its content is no text.
        """
        if self.other_parts:
            raise ValueError(f"has a content part of type {self.other_parts[0]}, and only texts can be used")
        is_null = self.content is None and not self.reasoning
        message: dict[str, Any] = {"role": self.role, "content": None if is_null else self.text, **self.further}
        return message | ({"tool_calls": list(self.tool_calls)} if self.tool_calls else {})


def read_message(value: Any) -> Message:
    """Return the message of an OpenAI object; ValueError says what is wrong with it.

    The content is a text, a list of parts, or null beside tool calls. The chain of thought is in `reasoning`,
    `reasoning_content`, `thinking`, `reasoning_details`, or in parts of these types.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"has a message that is {kind_of(value)}, not an object")
    role = value.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError("has a message without a role")
    content = value.get("content")
    texts, chains, other = _parts_of(content, role)
    reasoning = chain_of(value) or "\n".join(chains) or _details_of(value)
    calls = _tool_calls_of(value)
    if content is None and not calls and not reasoning:
        raise ValueError(f"has a message of role {role} without content")
    return Message(
        role=role,
        content=None if content is None else "\n".join(texts),
        reasoning=reasoning,
        tool_calls=tuple(calls),
        further={key: text_of(value[key], key) for key in ("name", "tool_call_id") if value.get(key)},
        other_parts=tuple(other),
        unread=tuple(str(key) for key in value if key not in _KNOWN_FIELDS and not is_empty(value[key])),
    )


def read_answer(answer: Any, path: str) -> list[tuple[Message, str | None]]:
    """Return the message and the finish reason of each choice of a chat server's answer.

    Raises UserError that names `path` if the answer has no choice with a message.
    """
    remedy = "check that the address is a server of OpenAI's chat API, and read its log"
    try:
        choices = answer["choices"]
        if not isinstance(choices, list) or not choices:
            raise ValueError("has no choices")
        results = []
        for choice in choices:
            if not isinstance(choice, Mapping) or not isinstance(choice.get("message"), Mapping):
                raise ValueError("has a choice without a message")
            given = choice["message"]
            content = "" if given.get("content") is None else given["content"]
            message = read_message({**given, "role": "assistant", "content": content})
            message.as_request()
            results.append((message, choice.get("finish_reason")))
    except (LookupError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else "has no choices"
        raise UserError("request", path, f"got an answer that cannot be read: it {reason}", remedy) from error
    return results


def list_of(value: Any, key: str) -> list[Any]:
    """Return a list; ValueError names the key that holds something else."""
    if not isinstance(value, list):
        raise ValueError(f"has {kind_of(value)} as {key}, not a list")
    return value


def text_of(value: Any, key: str) -> str:
    """Return a text; ValueError names the key that holds something else."""
    if not isinstance(value, str):
        raise ValueError(f"has {kind_of(value)} as {key}, not a text")
    return value


def is_empty(value: Any) -> bool:
    """Tell whether a value of JSON says nothing."""
    return value is None or value in ("", [], {})


def kind_of(value: Any) -> str:
    """Return what kind of JSON value it is, for error messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _parts_of(content: Any, role: str) -> tuple[list[str], list[str], list[str]]:
    """Return the texts, the chains of thought, and the types of all other parts of a content."""
    texts: list[str] = []
    chains: list[str] = []
    other: list[str] = []
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise ValueError(f"has a message of role {role} whose content is {kind_of(part)}, not a text or typed part")
        if kind in {"text", "input_text", "output_text"}:
            texts.append(text_of(part.get("text"), "text"))
        elif kind in {"thinking", "reasoning"}:
            chain = part.get(kind) or part.get("text")
            chains += _parts_of(chain, role)[0] if isinstance(chain, list) else [text_of(chain, kind)]
        else:
            other.append(kind)
    return texts, chains, other


def chain_of(value: Mapping[str, Any]) -> str:
    """Return the chain of thought of a message, or of one event of a stream, from the field that holds it."""
    named = {key: text_of(value[key], key) for key in CHAIN_FIELDS if value.get(key)}
    if len({chain.strip() for chain in named.values()}) > 1:
        raise ValueError(f"has two different chains of thought, in {' and '.join(named)}")
    return next(iter(named.values()), "")


def _details_of(value: Mapping[str, Any]) -> str:
    """Return the chain of thought in OpenRouter's `reasoning_details`."""
    details = value.get("reasoning_details") or []
    texts = [one.get("text") or one.get("summary") for one in details if isinstance(one, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _tool_calls_of(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = list_of(value.get("tool_calls") or [], "tool_calls")
    if function := value.get("function_call"):  # the form before tool calls
        calls = [*calls, {"type": "function", "function": function}]
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("has a tool call without a function and its name")
        if not isinstance(function.get("arguments", ""), (str, Mapping)):
            raise ValueError(f"has arguments of a tool call that are {kind_of(function['arguments'])}")
    return [dict(call) for call in calls]
