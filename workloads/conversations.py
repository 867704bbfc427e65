"""Reads conversations: the rows of users' data files in all known dialects.

A row is read as one of these, or refused by its name with the way to convert it:

- OpenAI messages: `{"messages": [{"role": …, "content": …}, …]}`, with the fields of a request beside it;
- a prompt: `{"prompt": …}`, optionally with `completion`; both are texts or lists of messages;
- ShareGPT: `{"conversations": [{"from": "human", "value": …}, …]}`;
- Alpaca: `{"instruction": …, "input": …, "output": …}`;
- a chat request of an OpenAI batch file: `{"custom_id": …, "url": …, "body": {…}}`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.messages import Message, is_empty, kind_of, list_of, read_message, text_of
from slimserve.core.text import parse_json

REMEDY = 'write {"messages": [{"role": "user", "content": "…"}]} or {"prompt": "…"} on each line'
"""Remedy in the errors about rows that cannot be read."""
NUM_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens", "output_tokens", "output_len")
"""Fields for the largest number of tokens of a reply, by OpenAI's API and its benchmarks."""
# fmt: off
SHAPING_FIELDS = frozenset({
    "add_generation_prompt", "chat_template_kwargs", "continue_final_message", "documents", "function_call",
    "functions", "guided_choice", "guided_grammar", "guided_json", "guided_regex", "parallel_tool_calls",
    "reasoning_effort", "response_format", "structured_outputs", "tool_choice", "tools", "user",
})
"""Fields of a chat request that decide what is asked."""
SAMPLING_FIELDS = frozenset({
    "bad_words", "frequency_penalty", "ignore_eos", "include_reasoning", "length_penalty", "logit_bias", "logprobs",
    "min_p", "min_tokens", "prediction", "presence_penalty", "priority", "prompt_logprobs", "reasoning",
    "repetition_penalty", "seed", "skip_special_tokens", "stop", "stop_token_ids", "temperature", "thinking", "top_k",
    "top_logprobs", "top_p", "use_beam_search", "verbosity",
})
"""Fields of a chat request that decide how the answer is drawn and returned."""
# fmt: on
_REQUEST_FIELDS = SHAPING_FIELDS | SAMPLING_FIELDS
_OBJECT_FIELDS = SHAPING_FIELDS - {"reasoning_effort", "user"}
_SET_BY_LOAD_TEST = {"model", "messages", "stream", "stream_options", "n", *NUM_TOKENS_FIELDS}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Conversation:
    """One row of a file of conversations."""

    messages: tuple[Message, ...]
    raw_messages: tuple[dict[str, Any], ...]
    """The messages as the row has them, or as OpenAI's API takes them if the row is of another dialect."""
    max_tokens: int | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of a request, such as `tools` and `temperature`."""
    unread: tuple[str, ...] = ()
    """Keys of the row and its messages that say nothing to a model."""

    @property
    def has_reply(self) -> bool:
        """Whether the last message is a reply, and not the beginning of one that the model continues."""
        return self.messages[-1].role == "assistant" and not self.request.get("continue_final_message")

    def without_reply(self) -> Conversation:
        """Return the conversation without the replies at its end."""
        end = len(self.messages)
        while end and self.messages[end - 1].role == "assistant":
            end -= 1
        if not end:
            raise ValueError("has a reply and nothing before it")
        return replace(self, messages=self.messages[:end], raw_messages=self.raw_messages[:end])


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a row in one of the known dialects.

    Raises ValueError that says what is wrong with the row, or names its dialect and how to convert it.
    """
    if isinstance(body := row.get("body"), Mapping) and ("url" in row or "custom_id" in row):
        url = str(row.get("url") or "/v1/chat/completions")
        if not url.endswith("/chat/completions"):
            raise ValueError(f"is a batch request to {url[:80]}; only requests to /v1/chat/completions can be read")
        rest = [key for key in row if key not in {"body", "url", "method", "custom_id"} and not is_empty(row[key])]
        conversation = read_conversation(body)
        return replace(conversation, unread=(*conversation.unread, *rest))
    raw, used = _raw_messages(row)
    if not raw:
        raise ValueError("has no messages")
    if (system := row.get("system")) and raw[0].get("role") != "system":
        raw, used = [{"role": "system", "content": system}, *raw], used | {"system"}
    messages = tuple(map(read_message, raw))
    request = _request_of(row)
    rest = [key for key in row if key not in used and key not in request and not is_empty(row[key])]
    rest = [key for key in rest if key not in {*NUM_TOKENS_FIELDS, "extra_body"}]
    if isinstance(extra := row.get("extra_body"), Mapping):
        rest += [f"extra_body.{key}" for key in extra if key in _SET_BY_LOAD_TEST]
    within = [f"messages.{key}" for message in messages for key in message.unread]
    return Conversation(messages, tuple(raw), _num_tokens_of(row), request, tuple(dict.fromkeys([*rest, *within])))


def row_error(field_name: str, place: str, error: ValueError, remedy: str) -> UserError:
    """Return the error of a row that `read_conversation` refused; a conversion that it names replaces `remedy`."""
    problem, _, conversion = str(error).partition("; ")
    return UserError(field_name, place, problem, conversion or remedy)


def unread_line(unread: Iterable[Sequence[str]]) -> str:
    """Return the keys that conversations left unread with their number of rows, most frequent first; "" without."""
    counts = Counter(key for keys in unread for key in keys)
    return ", ".join(f"{key} ({count} {'rows' if count > 1 else 'row'})" for key, count in counts.most_common())


def _raw_messages(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the messages of a row as OpenAI's API takes them, and the keys that they come from."""
    if "messages" in row:
        if isinstance(row["messages"], Mapping):
            raise ValueError(
                "is an export of OpenRouter's chat, whose messages are an object; "
                "write them as a list of role and content"
            )
        return _message_list(row["messages"], "messages"), {"messages"}
    if "conversations" in row or "conversation" in row:
        key = "conversations" if "conversations" in row else "conversation"
        return [_from_sharegpt(turn) for turn in list_of(row[key], key)], {key}
    if "prompt" in row:
        prompt, used = row["prompt"], {"prompt"}
        if not isinstance(prompt, (str, list)):
            raise ValueError(f"has {kind_of(prompt)} as prompt, not a text")
        raw = [_user(prompt)] if isinstance(prompt, str) else _message_list(prompt, "prompt")
        completion = row.get("completion")
        if completion is not None:
            used.add("completion")
            is_text = isinstance(completion, str)
            raw += [_assistant(completion)] if is_text else _message_list(completion, "completion")
        return raw, used
    if "instruction" in row and "output" in row:
        instruction, more = text_of(row["instruction"], "instruction"), row.get("input")
        text = f"{instruction}\n{text_of(more, 'input')}" if more else instruction
        raw = []
        for pair in list_of(row.get("history") or [], "history"):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError("has a history that is not a list of pairs")
            raw += [_user(text_of(pair[0], "history")), _assistant(text_of(pair[1], "history"))]
        raw += [_user(text), _assistant(text_of(row["output"], "output"))]
        return raw, {"instruction", "input", "output", "history"}
    keys = ", ".join(map(str, row))[:200] or "none"
    raise ValueError(dialect_of(row) or f"is not a conversation (its keys are {keys})")


def dialect_of(row: Mapping[str, Any]) -> str | None:
    """Return the name of a known dialect that is no conversation with a reply, with its conversion; None if unknown."""
    return next((text for keys, text in _DIALECTS if keys <= row.keys()), None)


_DIALECTS: list[tuple[frozenset[str], str]] = [
    (
        frozenset({"chosen", "rejected"}),
        "is a preference pair (chosen, rejected); write the prompt as prompt and the chosen reply as completion",
    ),
    (
        frozenset({"custom_id", "response"}),
        "is an answer of an OpenAI batch, which lacks its prompt; join it with its request by custom_id",
    ),
    (
        frozenset({"custom_id", "body"}),
        "is a request of an OpenAI batch file, which has no reply; join it with the batch's answers by custom_id",
    ),
    (
        frozenset({"prompt", "output_tokens"}),
        "is a row of vLLM's custom benchmark dataset, which has no reply; add it as completion",
    ),
    (
        frozenset({"hash_ids"}),
        "is a line of a Mooncake trace, which has no text; use it for the times of a load test with --trace",
    ),
    (
        frozenset({"contents"}),
        "is a request of Gemini's API; write each of its contents as a message with role and content",
    ),
    (
        frozenset({"turns"}),
        "is a row of MT-Bench (turns); write each turn as a message with role and content",
    ),
    (
        frozenset({"instruction", "response"}),
        "is a row of Dolly; rename context to input and response to output",
    ),
    (frozenset({"question", "answer"}), "is a question with its answer; rename them to prompt and completion"),
    (frozenset({"question"}), "is a question alone; rename it to prompt"),
    (frozenset({"query", "response"}), "is a query with its response; rename them to prompt and completion"),
    (frozenset({"input", "output"}), "is an input with its output; rename them to prompt and completion"),
    (frozenset({"input_ids"}), "has token ids and no text; write its messages"),
    (frozenset({"text"}), 'is a plain text; write a workload file of kind = "text" for it'),
]
"""Keys of dialects that cannot be read as a conversation with a reply."""


def _message_list(value: Any, key: str) -> list[dict[str, Any]]:
    messages = list_of(value, key)
    if not all(isinstance(message, Mapping) for message in messages):
        wrong = next(message for message in messages if not isinstance(message, Mapping))
        raise ValueError(f"has {kind_of(wrong)} among its {key}, not a message with role and content")
    return messages


def _from_sharegpt(turn: Any) -> dict[str, Any]:
    """Return the message of a turn of ShareGPT: `from` and `value`, or `role` and `content` already."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"has a turn that is {kind_of(turn)}, not an object")
    if "from" not in turn:
        return dict(turn)
    role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise ValueError(f"has a turn from {str(turn['from'])[:40]!r}; write human, gpt, system, or a tool's roles")
    rest = {key: value for key, value in turn.items() if key not in {"from", "value"}}
    text = text_of(turn.get("value"), "value")
    if str(turn["from"]).lower() != "function_call":
        return {**rest, "role": role, "content": text}
    try:
        calls = parse_json(text)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError("has a function_call that is not a JSON object with name and arguments") from error
    return {**rest, "role": role, "content": None, "tool_calls": [_tool_call(one) for one in functions]}


def _tool_call(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": function["name"], "arguments": text}}


def _request_of(row: Mapping[str, Any]) -> dict[str, Any]:
    request = {key: row[key] for key in row if key in _REQUEST_FIELDS and row[key] is not None}
    if isinstance(extra := row.get("extra_body"), Mapping):
        request |= {key: value for key, value in extra.items() if key not in _SET_BY_LOAD_TEST}
    for key in _OBJECT_FIELDS & request.keys():  # datasets often hold tools as JSON text
        if isinstance(text := request[key], str) and text.lstrip().startswith(("[", "{")):
            try:
                request[key] = parse_json(text)
            except ValueError as error:
                raise ValueError(f"has {key} that are no JSON") from error
    if request.get("tools") == "":
        del request["tools"]
    if "tools" in request:
        if not all(isinstance(tool, Mapping) for tool in list_of(request["tools"], "tools")):
            raise ValueError("has a tool that is no object")
        if not request["tools"]:
            del request["tools"]
    return request


def _num_tokens_of(row: Mapping[str, Any]) -> int | None:
    given = {key: row[key] for key in NUM_TOKENS_FIELDS if row.get(key) is not None}
    if not given:
        return None
    for key, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or value != value or not 1 <= value < 2**31 or value != int(value):
            raise ValueError(f"has {str(value)[:40]!r} as {key}, not a number of tokens from 1")
    if len(set(given.values())) > 1:
        raise ValueError(f"has different numbers of tokens in {' and '.join(given)}")
    return int(next(iter(given.values())))


def check_sendable(conversation: Conversation) -> None:
    """Raise ValueError if a number of the conversation cannot be written as JSON of a request."""
    left: list[Any] = [dict(conversation.request), list(conversation.raw_messages)]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"has the number {one}, which JSON cannot hold")
        elif isinstance(one, int) and abs(one) > _LARGEST_INTEGER:
            raise ValueError("has an integer of more than 64 bits")


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
