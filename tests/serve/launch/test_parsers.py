"""Tests of the choice of parsers and chat templates from a model's files."""

import json
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.core.hardware import Hardware
from slimserve.serve.launch.parsers import REASONING_RULES, TOOL_RULES, choose_parsers, read_chat_template
from slimserve.serve.launch.plan import plan_launch

CPU = Hardware(cpu="x", cores=(0, 1), memory_gib=24.0, isa=("avx512f",), gpus=())
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES = TOOLS + '{% if tools %}<tool_call>\n{"name": f, "arguments": a}\n</tool_call>{% endif %}' + TURNS + OPENING
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
ALWAYS = "{% if add_generation_prompt %}<think>\n{% endif %}"
ON_REQUEST = "{% if thinking %}<think>{% else %}</think>{% endif %}"
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "Mode: {{ '/think' if enable_thinking else '/no_think' }}"
    + TURNS
    + OPENING
    + "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}"
)


def chosen(directory: Path, template: str, model_type: str = "llama", tokens: tuple[str, ...] = ()) -> dict[str, str]:
    (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": token} for token in tokens]}))
    choices, warnings = choose_parsers(directory, {"model_type": model_type})
    return {choice.name: choice.value for choice in choices} | {"warnings": " | ".join(warnings)}


THINK = ("<think>", "</think>")
MISTRAL = ("[TOOL_CALLS]", "[THINK]")


@pytest.mark.parametrize(
    ("template", "model_type", "tokens", "reasoning", "tools"),
    [
        (HERMES + SWITCH, "qwen3", THINK, "qwen3", "hermes"),
        (HERMES, "qwen2", (), None, "hermes"),
        (SMOLLM3 + HERMES, "smollm3", (), "qwen3", "hermes"),
        (TOOLS + "<tool_call>\n<function=f>\n<parameter=x>" + TURNS + OPENING, "qwen3_next", (), None, "qwen3_coder"),
        (TURNS + OPENING + ALWAYS, "qwen3", THINK, "deepseek_r1", None),
        (TURNS + OPENING + ALWAYS, "phi3", (), "qwen3", None),
        (TURNS + "<｜Assistant｜>{{ x.split('</think>')[-1] if x else '' }}", "llama", THINK, "deepseek_r1", None),
        (TURNS + "<｜Assistant｜>" + ON_REQUEST, "deepseek_v3", THINK, "deepseek_v3", None),
        (TOOLS + SWITCH + "<tool_call>f\n<arg_key>x</arg_key>" + TURNS, "glm4_moe", (), "glm45", "glm45"),
        (TOOLS + "[TOOL_CALLS][THINK]" + TURNS, "mistral", MISTRAL, "mistral", "mistral"),
        (TOOLS + "[TOOL_CALLS]" + TURNS, "ministral", MISTRAL, None, "mistral"),
        (TOOLS + "<|python_tag|>" + TURNS, "llama", ("<|python_tag|>",), None, "llama3_json"),
        (
            TOOLS + 'Respond in the format {{ \'{"name": function name, "parameters": {}}\' }}' + TURNS,
            "llama",
            ("<|python_tag|>",),
            None,
            "llama3_json",
        ),
        (TOOLS + "<|tool|><|/tool|>" + TURNS, "phi3", (), None, "phi4_mini_json"),
        (TOOLS + "<|tool_call|>" + TURNS, "granite", (), None, "granite"),
        (TOOLS + "Here is my thought process: <|tool_call|>" + TURNS, "granite", (), "granite", "granite"),
        (TOOLS + "<tool_call>" + TURNS, "granitemoehybrid", (), None, "granite4"),
        (TOOLS + "<function_calls>" + TURNS, "olmo3", (), None, "olmo3"),
        (TOOLS + "<start_function_call>" + TURNS, "gemma3_text", (), None, "functiongemma"),
        (TOOLS + "<|tool_call_start|>" + TURNS, "lfm2", ("<|tool_call_start|>", "<|tool_call_end|>"), None, "lfm2"),
        (TOOLS + "<｜tool▁calls▁begin｜>```json" + TURNS, "deepseek_v3",
         ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), None, "deepseek_v3"),
    ],
)  # fmt: skip
def test_the_template_and_the_family_decide_the_parsers(
    tmp_path: Path, template: str, model_type: str, tokens: tuple[str, ...], reasoning: str | None, tools: str | None
) -> None:
    found = chosen(tmp_path, template, model_type, tokens)
    assert found.get("--reasoning-parser") == reasoning
    assert found.get("--tool-call-parser") == tools
    assert ("--enable-auto-tool-choice" in found) == (tools is not None)
    assert found["warnings"] == ""


@pytest.mark.parametrize(
    ("template", "tokens", "warning"),
    [
        (TOOLS + "<TOOLCALL>[]</TOOLCALL>" + TURNS, (), "tool calls"),
        (TOOLS + "<|python_tag|>" + TURNS, (), "tool calls"),  # its parser looks the tag up in the vocabulary
        (TURNS + "◁think▷", (), "chain of thought"),
    ],
)
def test_a_format_that_no_parser_reads_gets_none_and_one_warning(
    tmp_path: Path, template: str, tokens: tuple[str, ...], warning: str
) -> None:
    found = chosen(tmp_path, template, tokens=tokens)
    assert set(found) == {"warnings"}
    assert found["warnings"].count("no parser of vLLM fits") == 1
    assert warning in found["warnings"]
    assert "chat_template.jinja" in found["warnings"]


@pytest.mark.parametrize("template", [TURNS, "{{ raise_exception('no') }}", "{% if %}", "", "{{ 1 / 0 }}"])
def test_a_plain_or_a_broken_template_gets_no_parser_and_no_traceback(tmp_path: Path, template: str) -> None:
    assert set(chosen(tmp_path, template)) <= {"warnings"}


def test_a_template_that_never_reasons_gets_no_reasoning_parser_even_if_it_knows_the_tag(tmp_path: Path) -> None:
    """It would put every answer into `reasoning`."""
    history = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert "--reasoning-parser" not in chosen(tmp_path, history + OPENING, "qwen3", THINK)


def test_the_templates_of_every_file_are_read(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from config"}))
    found = read_chat_template(tmp_path)
    assert found is not None
    assert (found.text, found.source) == ("from config", "tokenizer_config.json")
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    found = read_chat_template(tmp_path)
    assert found is not None
    assert (found.default, found.for_tools) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("alone")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    found = read_chat_template(tmp_path)
    assert found is not None
    assert (found.default, found.for_tools, found.source) == ("alone", "more", "chat_template.jinja")


def test_a_model_without_a_template_gets_chatml_if_its_vocabulary_has_the_tokens_and_a_warning_if_not(
    tmp_path: Path,
) -> None:
    choices, warnings = choose_parsers(tmp_path, {"model_type": "qwen3"})
    assert choices == ()
    assert "has no chat template" in warnings[0]
    tokens = [{"content": "<|im_start|>"}, {"content": "<|im_end|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    choices, warnings = choose_parsers(tmp_path, {"model_type": "qwen3"})
    assert warnings == ()
    assert [choice.name for choice in choices] == ["--chat-template"]
    assert "<|im_start|>" in Path(choices[0].value).read_text()


@pytest.mark.parametrize("flag", ["--tool-call-parser", "--tool_call_parser"])
def test_what_the_user_passes_wins_and_is_shown_alone(tmp_path: Path, flag: str) -> None:
    chosen(tmp_path, HERMES + SWITCH, "qwen3", THINK)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    extra = [flag, "xlam", "--reasoning-parser=deepseek_r1"]
    plan = plan_launch(tmp_path, CPU, extra=extra)
    line = plan.command_line(extra)
    assert line[-3:] == extra
    assert "hermes" not in line
    assert "qwen3" not in line
    assert "--enable-auto-tool-choice" in line
    explained = plan.explain(extra)
    assert "hermes" not in explained
    assert "--no-enable-auto-tool-choice" in plan.command_line(["--no-enable-auto-tool-choice"])
    assert "--enable-auto-tool-choice" not in plan.command_line(["--no-enable-auto-tool-choice"])


def test_a_given_chat_template_is_the_one_that_is_read(tmp_path: Path) -> None:
    chosen(tmp_path, TURNS, "qwen3", THINK)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    given = tmp_path / "own.jinja"
    given.write_text(HERMES)
    plan = plan_launch(tmp_path, CPU, extra=["--chat-template", str(given)])
    assert {choice.name: choice.value for choice in plan.arguments}["--tool-call-parser"] == "hermes"
    inline = plan_launch(tmp_path, CPU, extra=["--chat-template", HERMES])
    assert {choice.name: choice.value for choice in inline.arguments}["--tool-call-parser"] == "hermes"
    with pytest.raises(UserError, match="does not exist"):
        plan_launch(tmp_path, CPU, extra=["--chat-template", "/nowhere.jinja"])


def test_every_choice_is_explained_by_what_the_template_has(tmp_path: Path) -> None:
    chosen(tmp_path, HERMES + SWITCH, "qwen3", THINK)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    explained = plan_launch(tmp_path, CPU).explain()
    assert "--tool-call-parser=hermes\n    chat_template.jinja has <tool_call>" in explained
    assert "--reasoning-parser=qwen3\n    chat_template.jinja has </think>; its prompts reason by default" in explained
    assert "--enable-auto-tool-choice\n    the model may choose a tool by itself" in explained


def test_no_rule_is_hidden_by_an_earlier_one() -> None:
    for rules in (REASONING_RULES, TOOL_RULES):
        for number, rule in enumerate(rules):
            for earlier in rules[:number]:
                is_hidden = (
                    all(any(text in own for own in rule.texts) for text in earlier.texts)
                    and (not earlier.model_types or set(rule.model_types) <= set(earlier.model_types) != set())
                    and bool(rule.model_types or not earlier.model_types)
                    and set(earlier.tokens) <= set(rule.tokens)
                    and (
                        not earlier.reasoning
                        or (bool(rule.reasoning) and set(rule.reasoning) <= set(earlier.reasoning))
                    )
                )
                assert not is_hidden, f"{rule} can never apply, because {earlier} does first"
