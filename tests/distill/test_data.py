"""Tests of examples from workloads and files: the split into training and validation, and rejected lines."""

from __future__ import annotations

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
