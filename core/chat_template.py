"""Renders conversations with a model's chat template, which is code of the model's author and may raise anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.text import parse_json

_RESERVED = {"", "add_generation_prompt", "chat_template", "conversation", "return_dict", "tokenize", "tools"}
_ROLES_OF_ALL_TEMPLATES = {"user", "assistant", "tool"}


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    name: str,
    *,
    tools: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a conversation in the chat template of `tokenizer`, as a server renders it.

    `options` are variables of the template, which requests send as `chat_template_kwargs`.

    Raises UserError that quotes the template and `name`s the conversation if the template raises, or if it leaves out
    the tools or a message.
    """
    variables = options if isinstance(options, Mapping) else {"": options} if options else {}
    if reserved := [key for key in variables if key in _RESERVED]:
        problem = f"has chat_template_kwargs that set {reserved[0] or 'no variables'}"
        raise UserError("conversation", name, problem, "give an object of the template's own variables")

    def rendered(conversation: Sequence[Mapping[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in conversation],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        )

    with_objects = [_with_objects(message, name) for message in messages]
    try:
        try:
            text = rendered(with_objects)
        except TypeError:  # some templates join the content or the arguments of a tool call as text
            text = rendered([{**message, "content": message.get("content") or ""} for message in messages])
    except Exception as error:  # jinja2 and the template's own raise_exception, or any fault in it
        number = getattr(error, "lineno", None)
        line = f" in line {number}" if number else ""
        problem = f"cannot be rendered by the model's chat template, which fails{line}: {error or repr(error)}"
        raise UserError("conversation", name, problem, _remedy(error, messages)) from error
    missing = [tool for tool in map(_name_of, tools) if tool not in text]
    if missing:
        problem = f"has the tool {missing[0]!r}, which the model's chat template leaves out"
        raise UserError("conversation", name, problem, "use a model for tools")
    for message in messages:
        content = message.get("content")
        if not all(call["function"]["name"] in text for call in message.get("tool_calls") or ()):
            problem = "has tool calls, which the model's chat template leaves out"
            raise UserError("conversation", name, problem, "use a model for tools, or write the calls into the content")
        if message["role"] not in _ROLES_OF_ALL_TEMPLATES and isinstance(content, str) and content.strip() not in text:
            problem = f"has a message of role {message['role']}, which the model's chat template leaves out"
            raise UserError("conversation", name, problem, "move its text into the user message")
    return text


def _remedy(error: Exception, messages: Sequence[Mapping[str, Any]]) -> str:
    if type(error).__name__ == "TemplateSyntaxError":
        return "correct the model's chat_template.jinja or tokenizer_config.json"
    if "system" in str(error).lower() and any(message["role"] == "system" for message in messages):
        return "move the system message into the user message"
    return "change the conversation so that the template accepts it, or correct the template"


def _with_objects(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a message whose tool calls have objects as arguments, as templates expect and as vLLM passes them."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"].get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments) if arguments.strip() else {}
            except ValueError as error:
                problem = "has a tool call whose arguments are no JSON"
                raise UserError("conversation", name, problem, "correct its arguments") from error
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _name_of(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
