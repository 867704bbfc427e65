"""Tests of sections against results written by hand, for odd tags, templates, multi-byte text and truncation."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from slimserve.core.errors import UserError
from slimserve.distill.sections import Section, chat_example, label_example, reply_sections, sampled_example
from slimserve.workloads.interface import ScoringPrompt

P, C, A = Section.PROMPT, Section.COT, Section.ANSWER
QUESTION = {"role": "user", "content": "What is 2 + 3?"}


def parts(reply: str, is_open: bool = False) -> list[tuple[str, Section]]:
    return [(reply[begin:end], section) for begin, end, section in reply_sections(reply, is_open)]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>a</think>5", [("<think>a</think>", C), ("5", A)]),
        ("a</think>5", [("a</think>", C), ("5", A)]),  # the template wrote the opening tag
        ("<think>a", [("<think>a", C)]),  # the tag is never closed
        ("so: <think>a", [("so: <think>a", C)]),
        ("5", [("5", A)]),
        ("<think>a</think>b<think>c</think>5", [("<think>a</think>b<think>c</think>", C), ("5", A)]),
        ("<think>a</think>5<think>b", [("<think>a</think>", C), ("5", A), ("<think>b", C)]),
        ("<think></think>", [("<think></think>", C)]),
        ("</think></think>5", [("</think></think>", C), ("5", A)]),
        ("", []),
    ],
)
def test_a_reply_is_divided_at_its_last_closing_tag(reply: str, expected: list[tuple[str, Section]]) -> None:
    assert parts(reply) == expected


def test_a_chain_of_thought_that_is_never_closed_covers_the_reply() -> None:
    assert parts("still at it", is_open=True) == [("still at it", C)]
    assert parts("done</think>5", is_open=True) == [("done</think>", C), ("5", A)]


def texts(tokenizer: Any, example: Any) -> dict[Section, str]:
    """Return the text of each section's tokens."""
    return {
        section: tokenizer.decode(
            [token for token, label in zip(example.tokens, example.sections, strict=True) if label is section]
        )
        for section in Section
    }


def test_a_conversation_has_prompt_chain_and_answer_with_its_stop_token(tokenizer: Any) -> None:
    reply = "<think>\n2 + 3 = 5. Né 💡\n</think>\n5"
    example = chat_example(tokenizer, [QUESTION, {"role": "assistant", "content": reply}], "x", 500, {2})
    assert example is not None
    text_of = texts(tokenizer, example)
    assert text_of[P].endswith("<|im_start|>assistant\n")
    assert "What is 2 + 3?" in text_of[P]
    # The ">" of the tag and the newline after it are one token; its first character decides its section.
    assert text_of[C].startswith("<think>")
    assert text_of[C].rstrip("\n") == "<think>\n2 + 3 = 5. Né 💡\n</think>"
    assert text_of[A].lstrip("\n") == "5<|im_end|>"
    assert example.tokens[-1] == 2, "the template's text after the stop token is left out"
    assert example.sections[example.num_prompt - 1] is P
    assert example.sections[example.num_prompt] is not P
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(example.tokens[: example.num_prompt]) == prompt, "a server would get the same prompt"


def test_a_stop_token_after_a_chain_that_never_ends_is_part_of_the_chain(tokenizer: Any) -> None:
    example = chat_example(tokenizer, [QUESTION, {"role": "assistant", "content": "<think>hm"}], "x", 500, {2})
    assert example is not None
    assert set(example.sections) == {P, C}
    assert example.tokens[-1] == 2


def test_an_empty_reply_is_an_empty_answer(tokenizer: Any) -> None:
    example = chat_example(tokenizer, [QUESTION, {"role": "assistant", "content": ""}], "x", 500, {2})
    assert example is not None
    assert example.sections[-1] is A
    assert example.tokens[example.num_prompt :] == (2,)


def test_truncation_keeps_the_sections_of_the_remaining_tokens(tokenizer: Any) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "<think>one two three</think>5"}]
    full = chat_example(tokenizer, messages, "x", 500, {2})
    assert full is not None
    for length in range(full.num_prompt + 1, len(full.tokens)):
        cut = chat_example(tokenizer, messages, "x", length, {2})
        assert cut is not None
        assert (cut.tokens, cut.sections) == (full.tokens[:length], full.sections[:length])
    assert chat_example(tokenizer, messages, "x", full.num_prompt, {2}) is None


def test_a_missing_template_and_templates_that_rewrite_turns_are_handled(tokenizer: Any) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "<think>a</think>5"}]
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    example = chat_example(plain, messages, "x", 500, {2})
    assert example is not None
    assert tokenizer.decode(example.tokens) == "What is 2 + 3?\n\n<think>a</think>5<|im_end|>"
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = (
        "{{ messages | length }}:{% for m in messages %}{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    example = chat_example(rewriting, [QUESTION, {"role": "assistant", "content": "hm"}], "x", 500, {2})
    assert example is not None
    assert tokenizer.decode(example.tokens) == "1:What is 2 + 3?|<think>\n</think>\n\nhm|"
    assert example.sections[-1] is A, "a reply without a chain closes the one that the prompt opened"
    swallowing = copy.deepcopy(tokenizer)
    swallowing.chat_template = (
        "{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    with pytest.raises(UserError, match="has a reply that the model's chat template leaves out"):
        chat_example(swallowing, messages, "x", 500, {2})


def test_every_label_of_a_history_is_an_answer(tokenizer: Any) -> None:
    prompt = ScoringPrompt(
        "Yes no (1990): yes\nA bad film: no\n", ("No yes:", "Amélie (2001):"), (" yes", " no"), (False, True), 1
    )
    example = label_example(tokenizer, prompt, "x", 500)
    assert tokenizer.decode(example.tokens) == "Yes no (1990): yes\nA bad film: no\nNo yes: no\nAmélie (2001): yes\n"
    answers = [
        tokenizer.decode([token])
        for token, section in zip(example.tokens, example.sections, strict=True)
        if section is A
    ]
    assert answers == [" yes", " no", " no", " yes"]
    cut = label_example(tokenizer, prompt, "x", 5)
    assert (cut.tokens, cut.labels) == (example.tokens[:5], ())


def test_labels_of_a_history_are_hard_and_those_of_its_candidates_soft(tokenizer: Any) -> None:
    items = ("No yes:", "Amélie (2001), it says no\nand yes:")
    prompt = ScoringPrompt("Yes: yes\nA bad film: no\n", items, (" yes", " no"), (False, True), 1, (), (0.25, 0.75))
    example = label_example(tokenizer, prompt, "x", 500)
    yes, no = (tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in (" yes", " no"))
    assert {label[1:3] for label in example.labels} == {(yes, no)}
    written = [(tokenizer.decode([example.tokens[label.position]]), label.share) for label in example.labels]
    # A line of an item that ends like a label counts as one, as in the history.
    assert written == [(" yes", 1.0), (" no", 0.0), (" no", 0.25), (" no", 0.0), (" yes", 0.75)]


def test_a_sampled_reply_keeps_its_own_tokens(tokenizer: Any) -> None:
    prompt = tokenizer("What is 2 + 3?")["input_ids"]
    # The tokenizer would divide this text differently.
    reply = [token for letter in "<think>né</think>5" for token in tokenizer(letter)["input_ids"]] + [2]
    example = sampled_example(tokenizer, "x", prompt, reply)
    assert example.tokens == (*prompt, *reply)
    text_of = texts(tokenizer, example)
    assert text_of[C] == "<think>né</think>"
    assert text_of[A] == "5<|im_end|>"
    assert sampled_example(tokenizer, "x", prompt, []).tokens == tuple(prompt)


ASSISTANT, END = "<|im_start|>assistant\n", "<|im_end|>"
TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}" + ASSISTANT + "{{ CONTENT }}" + END + "\n{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}" + END + "\n{% endif %}{% endfor %}"
)
WITHOUT_CHAIN = "(m.content or '').split('</think>')[-1].lstrip()"
ONE_CHAIN = (
    "{% if '</think>' in m.content and loop.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}\n</think>\n\n{% endif %}{{ REST }}"
)
OPENS = "{% if add_generation_prompt %}" + ASSISTANT + "<think>\n{% endif %}"
PLAIN = "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"
TEMPLATES = {
    "DeepSeek-R1 and QwQ": TURNS.replace("{{ CONTENT }}", "{{ " + WITHOUT_CHAIN + " }}" + CALLS) + OPENS,
    "DeepSeek-R1 before it opened the chain": TURNS.replace("{{ CONTENT }}", "{{ " + WITHOUT_CHAIN + " }}") + PLAIN,
    "Qwen3": TURNS.replace("{{ CONTENT }}", ONE_CHAIN.replace("REST", WITHOUT_CHAIN)) + PLAIN,
    "Qwen3-Thinking": TURNS.replace("{{ CONTENT }}", ONE_CHAIN.replace("REST", WITHOUT_CHAIN)) + OPENS,
    "SmolLM2": TURNS.replace("CONTENT", "m.content") + PLAIN,
    "opens the chain, and keeps the text of the reply": TURNS.replace("CONTENT", "m.content") + OPENS,
    "opens the chain without a line feed": TURNS.replace("CONTENT", WITHOUT_CHAIN)
    + OPENS.replace("<think>\n", "<think>"),
    "its history depends on what follows": "{{ messages | length }}" + TURNS.replace("CONTENT", WITHOUT_CHAIN) + OPENS,
}
STUDENT_REPLIES = {
    "a chain": ("<think>\n2 and 3.\n</think>\n5", "2 and 3.", "5"),
    "a chain whose opening tag the teacher's template wrote": ("2 and 3.\n</think>\n\n5", "2 and 3.", "5"),
    "a chain without line feeds": ("<think>2 and 3.</think>5", "2 and 3.", "5"),
    "no chain": ("5", "", "5"),
    "an empty chain": ("<think>\n</think>\n5", "", "5"),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize(("reply", "chain", "answer"), STUDENT_REPLIES.values(), ids=list(STUDENT_REPLIES))
def test_a_student_learns_the_chain_and_the_answer_whatever_its_template_does_with_earlier_chains(
    tokenizer: Any, template: str, reply: str, chain: str, answer: str
) -> None:
    student = copy.deepcopy(tokenizer)
    student.chat_template = template
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nold\n</think>\nHello"}]
    messages = [*earlier, QUESTION, {"role": "assistant", "content": reply}]
    example = chat_example(student, messages, "x", 500, {2})
    assert example is not None
    served = student.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert student.decode(example.tokens[: example.num_prompt]) == served
    text_of = texts(student, example)
    learned = served.rpartition("<|im_start|>")[2] + text_of[C] + text_of[A]
    is_open = "<think>" in served.rpartition("<|im_start|>")[2]
    num_chains = int(bool(chain) or "</think>" in reply or is_open)
    assert (learned.count("<think>"), learned.count("</think>")) == (num_chains, num_chains)
    body = learned.removeprefix("assistant\n").removesuffix(END)
    assert body.rpartition("</think>")[0].replace("<think>", "").strip() == chain
    assert body.rpartition("</think>")[2].strip() == answer
    assert text_of[A].strip() == f"{answer}{END}", "the answer ends with the stop token"
    assert "<think>\n\n\n" not in learned


def test_tool_calls_are_learned_as_the_template_writes_them(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    reply = {"role": "assistant", "content": None, "tool_calls": [call]}
    student = copy.deepcopy(tokenizer)
    student.chat_template = TEMPLATES["DeepSeek-R1 and QwQ"]
    example = chat_example(student, [QUESTION, reply], "x", 500, {2})
    assert example is not None
    assert texts(student, example)[A].strip() == f"[add]{END}"
    student.chat_template = TURNS.replace("{{ CONTENT }}", "{{ m.content or '' }}" + CALLS) + PLAIN
    example = chat_example(student, [QUESTION, reply], "x", 500, {2})
    assert example is not None
    assert student.decode(example.tokens[example.num_prompt :]) == f"[add]{END}"
    with pytest.raises(UserError, match="'x' has tool calls, which the model's chat template leaves out"):
        chat_example(tokenizer, [QUESTION, reply], "x", 500, {2})
    with pytest.raises(UserError, match="has the tool 'add', which"):
        answer = {"role": "assistant", "content": "5"}
        chat_example(tokenizer, [QUESTION, answer], "x", 500, {2}, request={"tools": [call]})
    student.chat_template = None
    with pytest.raises(UserError, match="has tools, and the model no chat template"):
        chat_example(student, [QUESTION, reply], "x", 500, {2})
