"""Chat messages and rows: every known form of a chain of thought, all dialects, and what is said about the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest

from slimserve.core.errors import UserError
from slimserve.core.messages import read_answer, read_message
from slimserve.loadtest.client import ModelClient
from slimserve.loadtest.prompts import make_prompts
from slimserve.loadtest.settings import SuiteOptions
from slimserve.workloads.conversations import read_conversation
from slimserve.workloads.interface import ChatPrompt
from slimserve.workloads.kinds import load_workload_file

USER = {"role": "user", "content": "2 + 3?"}
THOUGHT = "<think>\nhm\n</think>\n5"
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

REPLIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "content alone": ({"content": "5"}, "5"),
    "vLLM since 0.12: reasoning": ({"content": "5", "reasoning": "hm"}, THOUGHT),
    "DeepSeek: reasoning_content": ({"content": "5", "reasoning_content": "hm"}, THOUGHT),
    "both, as vLLM for a while": ({"content": "5", "reasoning": "hm", "reasoning_content": "hm"}, THOUGHT),
    "an empty old field": ({"content": "5", "reasoning": "hm", "reasoning_content": None}, THOUGHT),
    "Ollama: thinking": ({"content": "5", "thinking": "hm"}, THOUGHT),
    "OpenRouter: reasoning_details": (
        {"content": "5", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        THOUGHT,
    ),
    "no parser: tags in the content": ({"content": THOUGHT}, THOUGHT),
    "tags in the content and the same chain beside it": ({"content": THOUGHT, "reasoning": "hm"}, THOUGHT),
    "cut off within the chain": ({"content": None, "reasoning": "hm"}, "<think>\nhm\n</think>\n"),
    "text parts": ({"content": [{"type": "text", "text": "5"}, {"type": "text", "text": "!"}]}, "5\n!"),
    "Responses API parts": ({"content": [{"type": "output_text", "text": "5"}]}, "5"),
    "Mistral: thinking parts": (
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "5"},
            ]
        },
        THOUGHT,
    ),
    "Anthropic: thinking blocks": (
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "5"}]},
        THOUGHT,
    ),
    "tool calls with null content": ({"content": None, "tool_calls": [CALL]}, None),
    "tool calls without content": ({"tool_calls": [CALL]}, None),
    "a function call of the old form": ({"content": None, "function_call": CALL["function"]}, None),
    "empty content": ({"content": ""}, ""),
}


@pytest.mark.parametrize(("reply", "text"), REPLIES.values(), ids=list(REPLIES))
def test_every_form_of_a_message_is_read_alike_from_files_and_servers(reply: dict[str, Any], text: str | None) -> None:
    message = {"role": "assistant", **reply}
    read = read_message(message).as_request()
    assert read["content"] == text
    assert [call["function"]["name"] for call in read.get("tool_calls", [])] == (["add"] if text is None else [])
    conversation = read_conversation({"messages": [USER, message]})
    assert conversation.messages[-1].as_request() == read
    assert conversation.has_reply
    ((served, reason),) = read_answer({"choices": [{"message": reply, "finish_reason": "stop"}]}, "/v1")
    assert (served.text, reason) == (text or "", "stop")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (None, "has a message that is null"),
        ("Hi", "has a message that is a text"),
        ({"content": "Hi"}, "without a role"),
        ({"role": 1, "content": "Hi"}, "without a role"),
        ({"role": "user"}, "of role user without content"),
        ({"role": "user", "content": 5}, "whose content is a number"),
        ({"role": "user", "content": [5]}, "whose content is a number"),
        ({"role": "user", "content": {"text": "Hi"}}, "whose content is an object"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "has null as text"),
        ({"role": "assistant", "content": "5", "reasoning": ["hm"]}, "has a list as reasoning"),
        ({"role": "assistant", "content": "5", "reasoning": "a", "thinking": "b"}, "two different chains of thought"),
        ({"role": "assistant", "content": THOUGHT, "reasoning": "oh"}, "in its content and another one beside it"),
        ({"role": "assistant", "content": None, "tool_calls": ["add"]}, "a tool call without a function"),
        ({"role": "assistant", "content": None, "tool_calls": {"a": 1}}, "has an object as tool_calls, not a list"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            "a content part of type image_url, and only texts can be used",
        ),
    ],
)
def test_a_message_that_is_none_is_named(message: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_message(message).as_request()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "ok",
        {},
        {"choices": None},
        {"choices": []},
        {"choices": {}},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "5", "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": "5", "reasoning": {}, "tool_calls": 1}}]},
        {"choices": [{"message": {"content": [{"type": "image_url"}]}}]},
        {"error": {"message": "overloaded"}},
    ],
)
def test_an_answer_of_a_foreign_server_without_a_message_is_one_error_line(answer: Any) -> None:
    with pytest.raises(UserError, match=r"request: '/v1/chat/completions' got an answer that cannot be read: it has"):
        read_answer(answer, "/v1/chat/completions")


ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str | None]]]] = {
    "prompt": ({"prompt": "a"}, [("user", "a")]),
    "vLLM custom": ({"prompt": "a", "output_tokens": 7}, [("user", "a")]),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    "TRL: lists": (
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "5"}]},
        [("user", "2 + 3?"), ("assistant", "5")],
    ),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
    "Alpaca with all": (
        {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]]},
        [("system", "s"), ("user", "d"), ("assistant", "e"), ("user", "a\nb"), ("assistant", "c")],
    ),
    "ShareGPT": (
        {"id": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "b"},
            ],
            "system": "s",
            "tools": json.dumps(TOOLS),
        },
        [("system", "s"), ("user", "a"), ("assistant", None), ("tool", "1"), ("assistant", "b")],
    ),
    "ShareGPT with roles": ({"conversations": [USER]}, [("user", "2 + 3?")]),
    "OpenAI batch": (
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [USER]}},
        [("user", "2 + 3?")],
    ),
    "Anthropic: system beside": ({"system": "s", "messages": [USER]}, [("system", "s"), ("user", "2 + 3?")]),
    "fine-tuning with tools": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS},
        [("user", "2 + 3?"), ("assistant", None)],
    ),
}


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=list(ROWS))
def test_rows_of_all_dialects_are_conversations(row: dict[str, Any], expected: list[tuple[str, str | None]]) -> None:
    conversation = read_conversation(row)
    assert [(message.role, message.content) for message in conversation.messages] == expected
    assert [raw["role"] for raw in conversation.raw_messages] == [role for role, _ in expected]
    if "tools" in row:
        assert conversation.request["tools"] == TOOLS


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "preferences": ({"chosen": "a", "rejected": "b"}, "is a preference pair .* as completion"),
    "batch answers": ({"custom_id": "1", "response": {"body": {}}}, "is an answer of an OpenAI batch"),
    "batch embeddings": ({"custom_id": "1", "url": "/v1/embeddings", "body": {"input": "a"}}, "is a batch request to"),
    "OpenRouter export": ({"version": "orpg.3.0", "messages": {"m1": {"content": "a"}}}, "is an export of OpenRouter"),
    "Mooncake": ({"timestamp": 0, "input_length": 9, "hash_ids": [1]}, "is a line of a Mooncake trace"),
    "Gemini": ({"contents": [{"role": "user", "parts": [{"text": "a"}]}]}, "is a request of Gemini's API"),
    "MT-Bench": ({"question_id": 1, "turns": ["a", "b"]}, "is a row of MT-Bench"),
    "Dolly": ({"instruction": "a", "context": "", "response": "b"}, "is a row of Dolly; rename"),
    "GSM8K": ({"question": "a", "answer": "b"}, "is a question with its answer; rename them to prompt and completion"),
    "ms-swift": ({"query": "a", "response": "b"}, "rename them to prompt and completion"),
    "plain text": ({"text": "a"}, "is a plain text"),
    "token ids": ({"input_ids": [1, 2]}, "has token ids and no text"),
    "nothing": ({}, r"is not a conversation \(its keys are none\)"),
    "unknown keys": ({"a": 1, "b": 2}, r"is not a conversation \(its keys are a, b\)"),
    "no messages": ({"messages": []}, "has no messages"),
    "messages of text": ({"messages": ["Hi"]}, "has a text among its messages"),
    "prompt of ids": ({"prompt": [1, 2]}, "has a number among its prompt"),
    "unknown speaker": ({"conversations": [{"from": "narrator", "value": "a"}]}, "has a turn from 'narrator'"),
    "tokens of text": ({"prompt": "a", "max_tokens": "seven"}, "has 'seven' as max_tokens"),
    "no tokens": ({"prompt": "a", "output_tokens": 0}, "has '0' as output_tokens"),
    "two numbers of tokens": ({"prompt": "a", "max_tokens": 1, "output_tokens": 2}, "has different numbers of tokens"),
    "tools of text": ({"prompt": "a", "tools": "add"}, "has a text as tools"),
    "broken tools": ({"prompt": "a", "tools": "[{"}, "has tools that are no JSON"),
}


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_rows_of_other_forms_are_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_conversation(row)


BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tools": ({"tools": TOOLS, "tool_choice": "required"}, {"tools": TOOLS, "tool_choice": "required"}, ""),
    "tools as text": ({"tools": json.dumps(TOOLS)}, {"tools": TOOLS}, ""),
    "temperature": ({"temperature": 0.7, "top_p": 0.9, "seed": 3}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}, ""),
    "max_tokens": ({"max_tokens": 7}, {"max_tokens": 7}, ""),
    "max_completion_tokens": ({"max_completion_tokens": 7}, {"max_tokens": 7}, ""),
    "vLLM custom": ({"output_tokens": 7}, {"max_tokens": 7}, ""),
    "pandas": ({"output_tokens": 7.0, "tools": None}, {"max_tokens": 7}, ""),
    "stop": ({"stop": ["\n"], "ignore_eos": True}, {"stop": ["\n"], "ignore_eos": True}, ""),
    "format": ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}, ""),
    "thinking": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        "",
    ),
    "extra_body": ({"extra_body": {"top_k": 5, "stream": False}}, {"top_k": 5}, r"extra_body.stream \(1 row\)"),
    "model and stream": ({"model": "gpt-4o", "stream": False}, {}, r"model \(1 row\), stream \(1 row\)"),
    "several answers": ({"n": 4}, {}, r"n \(1 row\)"),
    "names": ({"id": "x", "source": "y"}, {}, r"id \(1 row\), source \(1 row\)"),
}


@pytest.mark.parametrize(("beside", "sent", "said"), BESIDE.values(), ids=list(BESIDE))
def test_what_a_chat_row_says_is_sent_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], beside: dict[str, Any], sent: dict[str, Any], said: str
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [USER], **beside}))
    ((_, prompt),) = make_prompts("chat", SuiteOptions(data=str(file)), 1)
    client = ModelClient("http://127.0.0.1:1", "mine", {}, 1.0, "auto")
    body = json.loads(client.make_request(0, "chat", prompt, exact_tokens=False).body)
    standard = {"model": "mine", "messages": [USER], "stream": True, "temperature": 0, "max_tokens": 160}
    assert {key: value for key, value in body.items() if key != "stream_options"} == {**standard, **sent}
    line = capsys.readouterr().err
    assert re.search(said, line)
    assert bool(line) == bool(said)
    make_prompts("chat", SuiteOptions(data=str(file)), 1)
    assert capsys.readouterr().err == "", "once is enough"


def test_a_reply_at_the_end_of_a_chat_row_is_not_sent_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [USER, {"role": "assistant", "content": "5 and"}], "continue_final_message": True},
        {"prompt": "c"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    prompts = [cast("ChatPrompt", one) for _, one in make_prompts("chat", SuiteOptions(data=str(file)), 3)]
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["a", "5 and", "c"]
    assert "the replies at the end of 1 of 3 conversations are not sent" in capsys.readouterr().err


def test_pictures_and_tool_calls_of_a_chat_row_reach_the_server_as_they_are(tmp_path: Path) -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "5"}
    messages = [picture, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    ((_, prompt),) = make_prompts("chat", SuiteOptions(data=str(file)), 1)
    assert list(cast("ChatPrompt", prompt).messages) == messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "temperature": NaN}', "has the number nan, which JSON cannot hold"),
        ('{"prompt": "a", "temperature": 1e999}', "has the number inf"),
        ('{"prompt": "a", "seed": 99999999999999999999}', "has an integer of more than 64 bits"),
        ('{"prompt": "\\ud83d"}', "holds half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "has a reply and nothing before it"),
    ],
)
def test_a_bad_row_after_the_first_is_found_before_the_load_begins(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{row}\n')
    with pytest.raises(UserError, match=rf"chats.jsonl:2' {message}"):
        make_prompts("chat", SuiteOptions(data=str(file)), 1)


def test_messages_of_a_workload_file_keep_tools_and_parts_and_name_unused_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}]
    called = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "5"}]
    rows = [
        {"chat": parts, "answer": "5", "tools": TOOLS, "temperature": 0.5, "output_tokens": 9},
        {"chat": called, "answer": "5", "tools": json.dumps(TOOLS)},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "mine.toml"
    file.write_text(
        'kind = "generate"\ndata = "data.jsonl"\nmessages = "chat"\n[split]\ncalibration = 0\nquality = 1\nload = 0\n'
    )
    prompts = cast("list[ChatPrompt]", load_workload_file(file).make_prompts("quality", 2))
    assert all(prompt.request == {"tools": TOOLS} for prompt in prompts)
    by_length = {len(prompt.messages): prompt for prompt in prompts}
    assert by_length[1].messages == (USER,)
    assert by_length[3].messages[1]["tool_calls"] == [CALL]
    said = capsys.readouterr().err
    assert "not used, as the workload file decides for all rows: temperature (1 row), output_tokens (1 row)" in said
