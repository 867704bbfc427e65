"""Reasoning parser, tool-call parser and chat template of a model, chosen by its family and its chat template.

vLLM returns reasoning and tool calls as raw text unless its command names a parser of the model's format. The format
stands in the chat template: the tags around a tool call, and how the prompt opens or closes the reasoning. The tables
below map these to vLLM's parsers. A new model is one `ParserRule`; the first rule that fits is taken.

A parser that does not fit is worse than none. A reasoning parser on a model that does not reason hides the answer in
`reasoning`. A rule therefore also states how the rendered prompt must treat reasoning, and which tags must be single
tokens, because some parsers look them up in the vocabulary and fail without them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from slimserve.core.errors import UserError
from slimserve.core.model_config import read_json_object
from slimserve.core.text import read_text
from slimserve.serve.launch.choice import Choice

Reasoning = Literal["always", "by default", "on request", "never"]
"""Reasoning in a model's prompts: in all of them, unless `enable_thinking` is false, only if a template variable asks
for it, or in none."""
_OPEN, _CLOSE = "<think>", "</think>"
_THINKS: tuple[Reasoning, ...] = ("always", "by default", "on request")


@dataclass(frozen=True)
class ParserRule:
    """The parser of vLLM for chat templates with certain texts."""

    parser: str
    """Name under which vLLM registers the parser."""
    texts: tuple[str, ...] = ()
    """Texts that the template must all contain."""
    model_types: tuple[str, ...] = ()
    """Values of `model_type` in config.json; empty for any."""
    tokens: tuple[str, ...] = ()
    """Texts that must be single tokens of the vocabulary, because the parser needs their ids."""
    reasoning: tuple[Reasoning, ...] = ()
    """Treatments of reasoning that the rule accepts; empty for any."""


_THINK_TOKENS = (_OPEN, _CLOSE)
REASONING_RULES = (
    # Formats with tags of their own.
    ParserRule("mistral", ("[THINK]",), tokens=("[TOOL_CALLS]",)),
    ParserRule("seed_oss", ("<seed:think>",)),
    ParserRule("openai_gptoss", ("<|channel|>analysis",)),
    ParserRule("cohere_command3", ("<|START_THINKING|>",)),
    ParserRule("gemma4", ("<|channel>",)),
    ParserRule("plamo3", ("<|plamo:begin_think:plamo|>",)),
    ParserRule("granite", ("Here is my thought process",)),
    # Think tags with rules of one family.
    ParserRule("glm45", (_CLOSE,), ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), reasoning=_THINKS),
    ParserRule("hunyuan_a13b", (_CLOSE, "<answer>"), reasoning=_THINKS),
    ParserRule("ernie45", (_CLOSE,), ("ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe"), _THINK_TOKENS, _THINKS),
    ParserRule("olmo3", (_OPEN,), ("olmo3", "olmo_hybrid"), reasoning=_THINKS),
    ParserRule("nemotron_v3", (_CLOSE,), ("nemotron_h",), reasoning=_THINKS),
    ParserRule("minimax_m2", (_CLOSE,), ("minimax_m2",), _THINK_TOKENS, _THINKS),
    ParserRule("kimi_k2", (_CLOSE,), ("kimi_k2",), reasoning=_THINKS),
    # Think tags in general.
    ParserRule("qwen3", (_CLOSE,), reasoning=("by default",)),
    ParserRule("deepseek_v3", (_CLOSE,), tokens=_THINK_TOKENS, reasoning=("on request",)),
    ParserRule("deepseek_r1", (_OPEN,), tokens=_THINK_TOKENS, reasoning=("always",)),
    ParserRule("qwen3", (_OPEN,), reasoning=("always",)),
    # The first templates of R1 and its distilled models leave the opening tag to the model.
    ParserRule("deepseek_r1", (_CLOSE, "<｜Assistant｜>"), tokens=_THINK_TOKENS, reasoning=("never",)),
)
TOOL_RULES = (
    # Tags that only one format uses.
    ParserRule("mistral", ("[TOOL_CALLS]",), tokens=("[TOOL_CALLS]",)),
    ParserRule("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ParserRule(
        "deepseek_v3",
        ("<｜tool▁calls▁begin｜>", "```json"),
        tokens=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ParserRule("deepseek_v31", ("<｜tool▁calls▁begin｜>",), tokens=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")),
    ParserRule("deepseek_v32", ("<｜DSML｜function_calls>",)),
    ParserRule("deepseek_v4", ("<｜DSML｜tool_calls>",)),
    ParserRule("minimax_m2", ("<minimax:tool_call>",)),
    ParserRule("seed_oss", ("<seed:tool_call>",)),
    ParserRule("longcat", ("<longcat_tool_call>",)),
    ParserRule("dots", ("<dots_function_call>",)),
    ParserRule("lfm2", ("<|tool_call_start|>",), tokens=("<|tool_call_start|>", "<|tool_call_end|>")),
    ParserRule("functiongemma", ("<start_function_call>",)),
    ParserRule("gemma4", ("<|tool_call>",)),
    ParserRule("cohere_command3", ("<|START_ACTION|>",)),
    ParserRule("apertus", ("<|tools_prefix|>",)),
    ParserRule("internlm", ("<|action_start|>",)),
    ParserRule("plamo3", ("<|plamo:begin_tool_request:plamo|>",)),
    ParserRule("openai", ("<|channel|>", "<|constrain|>")),
    ParserRule("olmo3", ("<function_calls>",), ("olmo2", "olmo3", "olmo_hybrid")),
    ParserRule("phi4_mini_json", ("functools",)),
    ParserRule("phi4_mini_json", ("<|tool|>",), ("phi3",)),
    ParserRule("llama4_pythonic", ("<|python_start|>",)),
    ParserRule("llama3_json", ("<|python_tag|>",), tokens=("<|python_tag|>",)),
    ParserRule("llama3_json", ('{"name": function name, "parameters"',), tokens=("<|python_tag|>",)),
    ParserRule("granite", ("<|tool_call|>",), ("granite", "granitemoe", "granitemoeshared")),
    ParserRule("granite-20b-fc", ("<function_call>",), ("gpt_bigcode", "granite")),
    # <tool_call>, whose content tells the format.
    ParserRule("granite4", ("<tool_call>",), ("granitemoehybrid",)),
    ParserRule("step3p5", ("<tool_call>", "<function="), ("step3p5",)),
    ParserRule("qwen3_coder", ("<tool_call>", "<function=")),
    ParserRule("glm45", ("<tool_call>", "<arg_key>"), ("glm4_moe",)),
    ParserRule("glm47", ("<tool_call>", "<arg_key>")),
    ParserRule("ernie45", ("<tool_call>", "<response>"), tokens=_THINK_TOKENS),
    ParserRule("hermes", ("<tool_call>",)),
    # <tool_calls> around a list.
    ParserRule("jamba", ("<tool_calls>",), ("jamba",), tokens=("<tool_calls>", "</tool_calls>")),
    ParserRule("hunyuan_a13b", ("<tool_calls>",), ("hunyuan_v1_moe", "hunyuan_v1_dense")),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CHATML_FILE = Path("transformers_utils") / "chat_templates" / "template_chatml.jinja"
_QUESTION = [{"role": "user", "content": "Q"}]


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a model directory; a model may have a second one for tools."""

    source: str
    """Name of the file that holds them."""
    default: str
    """The template for a conversation without tools."""
    for_tools: str
    """The template for a conversation with tools, often the same."""

    @property
    def text(self) -> str:
        """Both templates."""
        return self.default if self.for_tools == self.default else self.default + self.for_tools


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model that the rules check."""

    directory: Path
    model_type: str
    template: ChatTemplate

    def fits(self, rule: ParserRule) -> bool:
        """Return whether a rule applies to this model."""
        return (
            all(text in self.template.text for text in rule.texts)
            and (not rule.model_types or self.model_type in rule.model_types)
            and (not rule.reasoning or self.reasoning in rule.reasoning)
            and all(self.has_token(token) for token in rule.tokens)
        )

    @cached_property
    def takes_tools(self) -> bool:
        """Tell whether the template shows the tools of a request to the model."""
        tool = {"name": "slimserve_probe", "description": "d", "parameters": {"type": "object", "properties": {}}}
        shown = self._rendered(tools=[{"type": "function", "function": tool}])
        return "slimserve_probe" in shown if shown is not None else "tools" in self.template.text

    @cached_property
    def reasoning(self) -> Reasoning:
        """Treatment of reasoning between think tags in the rendered prompt."""
        default = self._rendered() or ""
        on, off = self._rendered(enable_thinking=True) or "", self._rendered(enable_thinking=False) or ""
        if on != off and (_CLOSE in off or _OPEN in on or _CLOSE in self.template.text):
            return "by default" if default == on else "on request"
        if _is_open(default):
            return "always"
        requested = self._rendered(thinking=True) or ""
        return "on request" if requested != default and _is_open(requested) else "never"

    def has_token(self, token: str) -> bool:
        """Return whether a text is one token of the vocabulary."""
        return any(json.dumps(token, ensure_ascii=escaped) in self._vocabulary for escaped in (True, False))

    @cached_property
    def _vocabulary(self) -> str:
        files = [self.directory / name for name in _TOKENIZER_FILES]
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())

    def _rendered(self, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> str | None:
        """Return the prompt of a question; None if the template cannot be rendered."""
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {"bos_token": "", "eos_token": "", "unk_token": "", "pad_token": ""}
        try:
            rendered, _ = render_jinja_template(
                [_QUESTION],
                tools=list(tools) if tools else None,
                chat_template=self.template.for_tools if tools else self.template.default,
                add_generation_prompt=True,
                **special,
                **variables,
            )
        except Exception:  # a model's template may raise anything, and then nothing is known about it
            return None
        return str(rendered[0])


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """Return the chat templates of a model directory, in vLLM's order of files; None if it has none."""
    alone = directory / "chat_template.jinja"
    texts: dict[str, str] = {}
    source = ""
    if alone.is_file():
        texts["default"], source = read_text(alone, "chat template"), alone.name
        for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            texts[file.stem] = read_text(file, "chat template")
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = directory / name
        if texts or not file.is_file():
            continue
        given = read_json_object(file).get("chat_template")
        if isinstance(given, str) and given:
            texts, source = {"default": given}, name
        elif isinstance(given, list):
            named = [one for one in given if isinstance(one, dict)]
            texts = {str(one.get("name")): str(one.get("template")) for one in named if one.get("template")}
            source = name
    if not texts:
        return None
    default = texts.get("default") or next(iter(texts.values()))
    return ChatTemplate(source, default, texts.get("tool_use") or default)


def choose_parsers(
    directory: Path, config: Mapping[str, Any], extra: Sequence[str] = ()
) -> tuple[tuple[Choice, ...], tuple[str, ...]]:
    """Return the arguments for vLLM with their reasons, and warnings about what no parser fits.

    `extra` are the user's own arguments: their chat template is the one that is read. Raises UserError if a template
    cannot be read.
    """
    given = _value_of("--chat-template", extra)
    choices: list[Choice] = []
    template = _given_template(given) if given else read_chat_template(directory)
    if template is None:
        probe = ModelFacts(directory, "", ChatTemplate("", "", ""))
        file = _vllm_file(_CHATML_FILE)
        if file is None or not all(map(probe.has_token, _CHATML_TOKENS)):
            remedy = "-- --chat-template FILE adds one"
            return (), (f"the model has no chat template, so /v1/chat/completions is answered with 400; {remedy}",)
        reason = "the model has no chat template, and its vocabulary has ChatML's tokens"
        choices.append(Choice("--chat-template", str(file), reason))
        text = file.read_text(encoding="utf-8")
        template = ChatTemplate(file.name, text, text)
    facts = ModelFacts(directory, str(config.get("model_type")), template)
    warnings: list[str] = []
    reasoning = next((rule for rule in REASONING_RULES if facts.fits(rule)), None)
    if _value_of("--reasoning-parser", extra) is not None:
        pass  # the user's own choice
    elif reasoning is not None:
        choices.append(Choice("--reasoning-parser", reasoning.parser, _reason(reasoning, facts)))
    elif facts.reasoning != "never" or any(tag in template.text for tag in ("<|inner_prefix|>", "◁think▷")):
        warnings.append(_no_parser("chain of thought", "--reasoning-parser", template.source))
    tools = next((rule for rule in TOOL_RULES if facts.fits(rule)), None) if facts.takes_tools else None
    automatic = Choice("--enable-auto-tool-choice", "", "the model may choose a tool by itself")
    if _value_of("--tool-call-parser", extra) is not None:
        choices.append(automatic)
    elif tools is not None:
        choices += [Choice("--tool-call-parser", tools.parser, _reason(tools, facts)), automatic]
    elif facts.takes_tools:
        warnings.append(_no_parser("tool calls", "--tool-call-parser", template.source))
    return tuple(choices), tuple(warnings)


def _no_parser(what: str, flag: str, source: str) -> str:
    return f"no parser of vLLM fits the {what} in {source}, so clients get raw text; -- {flag} NAME chooses one"


def _reason(rule: ParserRule, facts: ModelFacts) -> str:
    parts = [f"{facts.template.source} has {', '.join(rule.texts)}"]
    if rule.model_types:
        parts.append(f"model_type is {facts.model_type}")
    if rule.reasoning and facts.reasoning != "never":
        parts.append(f"its prompts reason {facts.reasoning}")
    return "; ".join(parts)


def _is_open(prompt: str) -> bool:
    return prompt.rfind(_OPEN) > prompt.rfind(_CLOSE)


def _given_template(argument: str) -> ChatTemplate:
    """Return the template of `--chat-template`: a file, or the template itself as vLLM accepts it."""
    path = Path(argument)
    if "{" in argument:
        return ChatTemplate("the given template", argument, argument)
    if not path.is_file():
        raise UserError("--chat-template", argument, "does not exist", "give the path of a .jinja file")
    text = read_text(path, "chat template")
    return ChatTemplate(path.name, text, text)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of a flag, written as `--flag value` or `--flag=value`, with dashes or underscores."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else next(iter(arguments[index + 1 : index + 2]), None)
    return None


def _vllm_file(path: Path) -> Path | None:
    """Return a file of the installed vLLM, which is not imported; None if it has none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / path
    return file if file.is_file() else None
