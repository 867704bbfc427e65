"""Tests of examples from workloads and files: the split into training and validation, and rejected lines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from slimserve.core.errors import UserError
from slimserve.distill.data import load_examples
from slimserve.distill.sections import Section
from slimserve.workloads import load_workload


def test_reasoning_examples_have_all_sections_and_end_with_the_stop_token(tokenizer: Any, smollm2: Path) -> None:
    examples = load_examples(tokenizer, smollm2, "reasoning", 20, 3, 2048, 7)
    assert (len(examples.training), len(examples.validation)) == (20, 3)
    assert examples.labels == ()
    for example in (*examples.training, *examples.validation):
        assert set(example.sections) == set(Section)
        assert example.tokens[-1] == tokenizer.eos_token_id
    questions = [tokenizer.decode(one.tokens[: one.num_prompt]) for one in examples.training]
    assert not {tokenizer.decode(one.tokens[: one.num_prompt]) for one in examples.validation} & set(questions)
    quality = {prompt.messages[-1]["content"] for prompt in load_workload("reasoning").make_prompts("quality", 300)}  # type: ignore[union-attr]
    assert not [question for question in questions if question.rsplit("user\n", 1)[1].split("<|im_end|>")[0] in quality]


def test_users_in_validation_are_not_in_training(tokenizer: Any, smollm2: Path) -> None:
    examples = load_examples(tokenizer, smollm2, "recommendation", 10_000, 10_000, 2048, 0)
    prompts = load_workload("recommendation").make_prompts("calibration", 10_000)
    users = {prompt.group for prompt in prompts}
    assert set(examples.groups) < users
    assert len(examples.training) + len(examples.validation) == len(prompts)
    assert 0.03 < len(examples.validation) / len(prompts) < 0.2
    assert [tokenizer.decode([label]) for label in examples.labels] == [" yes", " no"]
    assert examples.training[0].sections.count(Section.ANSWER) == 40


def test_joined_workloads_give_equal_shares_and_only_scored_items_have_users(tokenizer: Any, smollm2: Path) -> None:
    examples = load_examples(tokenizer, smollm2, "reasoning+recommendation", 8, 4, 2048, 0)
    assert [one.name.split("/")[0] for one in examples.training] == ["reasoning"] * 4 + ["recommendation"] * 4
    assert [group is None for group in examples.groups] == [True, True, False, False]
    assert [tokenizer.decode([label]) for label in examples.labels] == [" yes", " no"]
    alone = load_examples(tokenizer, smollm2, "recommendation", 4, 2, 2048, 0)
    assert (examples.training[4:], examples.validation[2:]) == (alone.training, alone.validation)


def test_a_file_may_mix_all_forms_of_conversations(tokenizer: Any, smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"p{number}", "completion": "c"} for number in range(40)]
    rows.append({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]})
    reasoned = {"role": "assistant", "content": "5", "reasoning_content": "hm"}
    rows.append({"messages": [{"role": "user", "content": "v"}, reasoned]})
    rows.append({"question": "a question without a correct reply"})
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    examples = load_examples(tokenizer, smollm2, str(file), 100, 2, 64, 0)
    texts = [tokenizer.decode(one.tokens) for one in (*examples.training, *examples.validation)]
    assert any("<think>\nhm\n</think>\n5<|im_end|>" in text for text in texts)
    assert load_examples(tokenizer, smollm2, str(file), 100, 0, 64, 0).validation == []


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"prompt": 1, "completion": "c"}', '{"messages": [{"role": "user", "content": "u"}]}', "\xff"],
)
def test_an_invalid_line_is_named_in_the_error(tokenizer: Any, smollm2: Path, tmp_path: Path, line: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b'{"prompt": "p", "completion": "c"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"chats.jsonl:2' (is not|has a number as prompt)"):
        load_examples(tokenizer, smollm2, str(file), 10, 0, 64, 0)


def test_unknown_sources_and_too_long_prompts_are_refused(tokenizer: Any, smollm2: Path) -> None:
    with pytest.raises(UserError, match="is neither a workload nor a JSONL file"):
        load_examples(tokenizer, smollm2, "poetry", 10, 0, 64, 0)
    with pytest.raises(UserError, match=r"leaves no training example \(\d+ prompts alone have more than 8 tokens\)"):
        load_examples(tokenizer, smollm2, "reasoning", 10, 0, 8, 0)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALECTS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": (
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        "user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        },
        "user\nu\nv<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
    ),
    "Alpaca": (
        {"instruction": "u", "input": "v", "output": "a"},
        "user\nu\nv<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
            ]
        },
        "system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
    ),
    "TRL": (
        {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]},
        "user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
    ),
    "vLLM's reasoning": (
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "reasoning": "hm"}]},
        "<|im_start|>assistant\n<think>\nhm\n</think>\na<|im_end|>",
    ),
    "a call as the reply": (
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
        "<add><|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nadd(2)<|im_end|>",
    ),
    "a call before the reply": (
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
                {"role": "assistant", "content": "a"},
            ]
        },
        "assistant\nadd(2)<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": json.dumps([TOOL]),
        },
        "<add><|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nadd(2)<|im_end|>\n<|im_start|>tool\n2<|im_end|>",
    ),
}


@pytest.mark.parametrize(("row", "expected"), DIALECTS.values(), ids=list(DIALECTS))
def test_conversations_of_all_dialects_become_examples(
    tokenizer: Any, smollm2: Path, tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    student = copy.deepcopy(tokenizer)
    student.chat_template = TOOL_TEMPLATE
    file = tmp_path / "chats.jsonl"
    others = [{"prompt": f"p{number}", "completion": "c"} for number in range(30)]
    file.write_text("".join(json.dumps(one) + "\n" for one in (row, *others)))
    every = load_examples(student, smollm2, str(file), 99, len(others), 256, 0)
    assert len(every.training) + len(every.validation) == 1 + len(others)
    texts = [student.decode(one.tokens) for one in (*every.training, *every.validation)]
    assert sum(expected in text for text in texts) == 1
    assert all(text.endswith("<|im_end|>") for text in texts)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference pair"),
        (
            {"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "u"}]}},
            "is a request of an OpenAI batch file, which has no reply",
        ),
        ({"prompt": "a", "output_tokens": 5}, "is a row of vLLM's custom benchmark dataset, which has no reply"),
        ({"question": "a", "answer": "b"}, "rename them to prompt and completion"),
        ({"text": "a"}, 'write a workload file of kind = "text"'),
        ({"messages": {"m": {"role": "user"}}}, "is an export of OpenRouter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}]},
            "a content part of type image_url",
        ),
        ({"prompt": "a", "completion": "\ud83d"}, "half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "has a reply and nothing before it"),
        ({"prompt": "a", "completion": "b", "label": False}, "is a rating of a reply"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "has a reply of weight 0",
        ),
    ],
)
def test_a_row_that_cannot_train_is_refused_by_name_with_its_line(
    tokenizer: Any, smollm2: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' + json.dumps(row))
    with pytest.raises(UserError, match=rf"chats.jsonl:2' .*{message}") as error:
        load_examples(tokenizer, smollm2, str(file), 9, 0, 64, 0)
    assert "\n" not in str(error.value)


def test_keys_that_training_does_not_use_are_said_once(
    tokenizer: Any, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chats.jsonl"
    row = {"prompt": "a", "completion": "b", "temperature": 0.3, "max_tokens": 9, "tool_choice": "auto", "id": "x"}
    file.write_text("".join(json.dumps({**row, "prompt": f"a{number}"}) + "\n" for number in range(3)))
    load_examples(tokenizer, smollm2, str(file), 9, 0, 64, 0)
    said = capsys.readouterr().err
    assert "not used in training: id (3 rows), temperature (3 rows), tool_choice (3 rows), max_tokens (3 rows)" in said


def test_an_array_of_json_is_refused_with_its_conversion(tokenizer: Any, smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "alpaca.json"
    file.write_text("[]")
    with pytest.raises(UserError, match=r"convert it: jq -c '.\[\]' alpaca.json > alpaca.jsonl"):
        load_examples(tokenizer, smollm2, str(file), 9, 0, 64, 0)


def test_a_template_that_refuses_a_system_message_is_one_error_line(
    tokenizer: Any, smollm2: Path, tmp_path: Path
) -> None:
    student = copy.deepcopy(tokenizer)
    student.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    file = tmp_path / "chats.jsonl"
    roles = ("system", "user", "assistant")
    file.write_text(json.dumps({"messages": [{"role": role, "content": "a"} for role in roles]}))
    with pytest.raises(UserError, match=r"chats.jsonl:1' .* System role not supported; move the system message"):
        load_examples(student, smollm2, str(file), 9, 0, 64, 0)
