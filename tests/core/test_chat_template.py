"""Chat templates that fail, that leave messages or tools out, and that want tool calls in one form or the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from slimserve.core.chat_template import render_chat
from slimserve.core.errors import UserError

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
EACH = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def tokenizer_of(template: str) -> Any:
    """Return an object that renders as a tokenizer of transformers does."""

    def apply(messages: list[Any], **options: Any) -> str:
        tools = options.pop("tools")
        options.pop("tokenize")
        texts, _ = render_jinja_template([messages], tools=tools, chat_template=template, **options)
        return str(texts[0])

    return SimpleNamespace(chat_template=template, apply_chat_template=apply)


@pytest.mark.parametrize(
    ("template", "messages", "options", "message"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            [SYSTEM, USER],
            {},
            "fails: System role not supported; move the system message into the user message",
        ),
        ("{{ raise_exception('Roles must alternate') }}", [USER, USER], {}, "Roles must alternate; change the conv"),
        ("{% for m in messages %}\n{{ m.content }", [USER], {}, "fails in line 2: .*; correct the model's chat_temp"),
        ("{% if %}", [USER], {}, "fails in line 1"),
        ("{{ messages[5].content }}", [USER], {}, "has no element 5"),
        ("{{ messages[0].content + 1 }}", [USER], {}, "can only concatenate"),
        ("{{ messages[0]['content'].nothing() }}", [USER], {}, "has no attribute 'nothing'"),
        ("{{ 1 // 0 }}", [USER], {}, "fails: .*zero"),
        (EACH, [USER], {"options": {"tokenize": True}}, "has chat_template_kwargs that set tokenize"),
        (EACH, [USER], {"tools": [TOOL]}, "has the tool 'add', which the model's chat template leaves out"),
        (EACH, [USER, CALLING], {}, "has tool calls, which the model's chat template leaves out"),
        (
            "{% for m in messages if m.role != 'developer' %}{{ m.content }}{% endfor %}",
            [{"role": "developer", "content": "Be short."}, USER],
            {},
            "has a message of role developer, which the model's chat template leaves out; move its text into the user",
        ),
        (
            "{{ messages[-1].tool_calls[0].function.name }}",
            [{**CALLING, "tool_calls": [{"function": {"name": "add", "arguments": "{a"}}]}],
            {},
            "has a tool call whose arguments are no JSON",
        ),
    ],
)
def test_a_template_that_fails_or_leaves_something_out_is_one_error_line(
    template: str, messages: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        render_chat(tokenizer_of(template), messages, "chats.jsonl:7", **options)
    assert "'chats.jsonl:7'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_conversation_is_rendered_with_its_tools_and_variables() -> None:
    template = "{{ tools[0].function.name }} {{ mode }} " + EACH + "{% if add_generation_prompt %}>{% endif %}"
    text = render_chat(
        tokenizer_of(template), [SYSTEM, USER], "x", tools=[TOOL], options={"mode": "fast"}, add_generation_prompt=True
    )
    assert text == "add fast system:Be short.;user:Hi;>"


def test_arguments_of_tool_calls_are_objects_or_text_as_the_template_wants() -> None:
    as_object = "{% set f = messages[-1].tool_calls[0].function %}{{ f.name }} {{ f.arguments.a }}"
    assert render_chat(tokenizer_of(as_object), [USER, CALLING], "x") == "add 1"
    as_text = "{% set f = messages[-1].tool_calls[0].function %}{{ f.name + f.arguments }}"
    assert render_chat(tokenizer_of(as_text), [USER, CALLING], "x") == 'add{"a": 1}'
