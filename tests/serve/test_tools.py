"""Tools, JSON schemas and reasoning on a real engine whose parsers the launch plan chose, alone and behind the gateway.

Random weights write no tool calls. Guided decoding with a named function or `required` forces the format.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from openai import OpenAI

from slimserve.core.hardware import probe_hardware
from slimserve.core.tokenizer import load_tokenizer
from slimserve.serve.launch.plan import Choice, LaunchPlan, plan_launch
from slimserve.serve.launch.process import Engine, EngineSpec, free_port
from tests.serve.http_servers import KEY, gateway

pytestmark = pytest.mark.engine

NAME = "thinker"
TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
"""The parts of Qwen3's template that matter here."""
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}
SCHEMA = CITY | {"additionalProperties": False}
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
"""Only a strict function has its arguments' schema enforced."""
QUESTION: Any = [{"role": "user", "content": "Weather?"}]
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def plan(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LaunchPlan]:
    directory = tmp_path_factory.mktemp("thinker") / NAME
    shutil.copytree(tiny_model, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory, plan_launch(directory, probe_hardware())


@pytest.fixture(scope="module")
def urls(plan: tuple[Path, LaunchPlan], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start one engine and a gateway in front of it; yield the URLs of both."""
    directory, planned = plan
    environment = (*planned.environment, Choice("SLIMSERVE_API_KEY", KEY, "for the test"))
    extra = ["--enforce-eager", "--kv-cache-memory-bytes", str(2**26), "--max-model-len", "1024"]
    # Random weights would write nothing but spaces between the tokens of a JSON document.
    extra += ["--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})]
    log = tmp_path_factory.mktemp("tools") / "engine.log"
    spec = EngineSpec(directory, NAME, LaunchPlan(planned.arguments, environment), log, free_port(), extra=tuple(extra))
    started, stopped, port = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with gateway({NAME: spec.port}, ["*"], directory) as listening:
            port.append(listening)
            started.set()
            await asyncio.to_thread(stopped.wait)

    with Engine(spec):
        thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
        thread.start()
        assert started.wait(30)
        try:
            yield {"engine": spec.url, "gateway": f"http://127.0.0.1:{port[0]}"}
        finally:
            stopped.set()
            thread.join(20)


def ask(url: str, stream: bool, **options: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """Return content, reasoning and tool calls (name and arguments) of a chat, joined if it is a stream."""
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300)
    options = {"model": NAME, "messages": QUESTION, "max_tokens": 64, "temperature": 0, **options}
    if not stream:
        message = client.chat.completions.create(**options).choices[0].message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        return message.content or "", getattr(message, "reasoning", None) or "", calls
    content, reasoning = "", ""
    parts: dict[int, tuple[str, str]] = {}
    for event in client.chat.completions.create(stream=True, **options):
        for choice in event.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            for call in choice.delta.tool_calls or []:
                name, arguments = parts.get(call.index, ("", ""))
                parts[call.index] = name + (call.function.name or ""), arguments + (call.function.arguments or "")
    return content, reasoning, list(parts.values())


def test_the_plan_chose_the_parsers_of_the_template(plan: tuple[Path, LaunchPlan]) -> None:
    arguments = {choice.name: choice.value for choice in plan[1].arguments}
    assert arguments["--reasoning-parser"] == "qwen3"
    assert arguments["--tool-call-parser"] == "hermes"
    assert "--enable-auto-tool-choice" in arguments


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["engine", "gateway"])
@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "weather"}}, "required"])
def test_a_tool_is_called_with_arguments_of_its_schema(
    urls: dict[str, str], plan: tuple[Path, LaunchPlan], way: str, stream: bool, choice: Any
) -> None:
    tokenizer = load_tokenizer(plan[0])
    # The grammar of a tool call allows spaces anywhere, and random weights would write nothing else.
    spaces = {str(token): -100 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}
    # `required` allows several calls, and random weights would begin one more until the tokens run out.
    ends = {"stop": ["</tool_call>"], "max_tokens": 256}
    options: Any = {"tools": TOOLS, "tool_choice": choice, "logit_bias": spaces, **ends}
    body = NO_THINKING | {"include_stop_str_in_output": True}
    _, _, calls = ask(urls[way], stream, extra_body=body, **options)
    assert calls
    name, arguments = calls[0]
    assert name == "weather"
    assert json.loads(arguments)["city"] in {"Paris", "Rome"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["engine", "gateway"])
def test_a_model_may_decide_not_to_call_a_tool(urls: dict[str, str], way: str, stream: bool) -> None:
    content, _, calls = ask(urls[way], stream, tools=TOOLS, tool_choice="auto", extra_body=NO_THINKING)
    assert content
    assert not calls


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["engine", "gateway"])
def test_an_answer_has_the_json_schema_of_the_request(urls: dict[str, str], way: str, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    content, _, _ = ask(urls[way], stream, response_format=wanted, extra_body=NO_THINKING)
    assert json.loads(content)["city"] in {"Paris", "Rome"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["engine", "gateway"])
def test_reasoning_is_apart_from_the_answer(urls: dict[str, str], way: str, stream: bool) -> None:
    content, reasoning, _ = ask(urls[way], stream)
    assert reasoning, "the prompt opens the reasoning, and random weights never close it"
    assert not content
    content, reasoning, _ = ask(urls[way], stream, extra_body=NO_THINKING)
    assert content
    assert not reasoning
