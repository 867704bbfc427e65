"""Malformed requests, and raw connections that send many of them at the same time."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

_PIPELINED = 8
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Request:
    """One request that is valid HTTP; its body may be anything."""

    path: str
    body: bytes = b""
    method: str = "POST"
    content_type: str = "application/json"
    id: str = ""

    def encode(self, key: str) -> bytes:
        id_line = f"X-Request-Id: {self.id}\r\n" if self.id else ""
        head = (
            f"{self.method} {self.path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n{id_line}"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    status: int
    headers: bytes
    body: bytes


def real_requests(model: str) -> list[tuple[str, dict[str, Any]]]:
    """Return one small valid request for every route of the server, and several for some."""
    hello = [{"role": "user", "content": "hello there"}]
    chat = {"model": model, "messages": hello, "max_tokens": 4, "temperature": 0.5, "stop": ["x"], "seed": 1, "n": 1}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    words = {"model": model, "prompt": "hello", "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True}
    ids = {"model": model, "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 4, "stream": True, "prompt_logprobs": 1}
    message_input = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    items = {"model": model, "query": "is it good?", "items": ["yes", "no"], "label_token_ids": [5, 6]}
    documents = {"model": model, "query": "cats", "documents": ["a cat", "a dog", {"text": "x"}], "top_n": 1}
    return [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {**chat, "tools": [tool], "tool_choice": "none", "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {**chat, "response_format": form}),
        ("/v1/chat/completions/batch", {**chat, "messages": [hello]}),
        ("/v1/completions", {**words, "logit_bias": {"5": 1.0}, "top_k": 5, "min_p": 0.1, "suffix": None}),
        ("/v1/completions", {**ids, "stop_token_ids": [3], "min_tokens": 1, "structured_outputs": {"choice": ["a"]}}),
        ("/v1/responses", {"model": model, "input": "hi", "max_output_tokens": 4}),
        ("/v1/responses", {"model": model, "input": message_input, "max_output_tokens": 4, "stream": True}),
        ("/v1/messages", {"model": model, "max_tokens": 4, "messages": hello}),
        ("/v1/messages/count_tokens", {"model": model, "messages": hello}),
        ("/v1/score", {**items, "apply_softmax": True, "item_first": False}),
        ("/generative_scoring", items),
        ("/v1/warm", {"model": model, "query": "is it good?", "history": ["a film"], "unknown_items": "text"}),
        ("/v1/rerank", {**documents, "return_documents": True}),
        ("/v2/rerank", documents),
        ("/rerank", documents),
        ("/tokenize", {"model": model, "prompt": "hi", "add_special_tokens": True}),
        ("/tokenize", {"model": model, "messages": hello}),
        ("/detokenize", {"model": model, "tokens": [1, 2, 3]}),
        ("/inference/v1/generate", {"model": model, "token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4}}),
        ("/invocations", {"model": model, "prompt": "hi", "max_tokens": 3}),
        ("/v1/systemone", {"model": model, "messages": hello}),
        ("/v1/responses/abc/cancel", {}),
        ("/scale_elastic_ep", {"new_data_parallel_size": 2}),
        ("/is_scaling_elastic_ep", {}),
        ("/ping", {}),
        ("/nowhere", {}),
    ]


_FIELD_NAMES = """
    best_of n logprobs top_logprobs prompt_logprobs max_tokens max_completion_tokens min_tokens temperature
    top_p top_k min_p seed stop stop_token_ids bad_words logit_bias repetition_penalty frequency_penalty
    presence_penalty stream stream_options echo suffix user structured_outputs response_format tools
    tool_choice chat_template chat_template_kwargs mm_processor_kwargs add_generation_prompt
    continue_final_message documents truncate_prompt_tokens allowed_token_ids logits_processors priority
    request_id prompt_embeds return_token_ids cache_salt kv_transfer_params vllm_xargs include_reasoning
    reasoning_effort thinking_token_budget skip_special_tokens use_beam_search sampling_params token_ids
    features data_parallel_rank repetition_detection logprob_token_ids metadata store background
    previous_response_id text reasoning truncation include top_n timeout_s instruction labels label_token_ids
    items query apply_chat_template item_first
"""
_FIELDS = _FIELD_NAMES.split()
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, 0.5, "", "x", "\0", "💥💥", "a" * 5000),
    *([], {}, [[]], [None], [{}], {"a": {"b": {"c": 1}}}, [1, 2, 3], ["a", "b"], [-1], [10**9], [2**63]),
    *({"role": "user"}, {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}, {"text": None}),
    *([{"type": "text", "text": "x"}], {"type": "json_object"}, {"regex": "(a+)+$"}, "((((", "<|im_start|>"),
    *("file:///etc/passwd", [["a"] * 50], {"type": "function", "function": {"name": "f"}}, "auto", "required"),
    *("@NAN@", "@INFINITY@", "@HUGE@", "@SURROGATE@", "@DEEP@"),
]
_WRITTEN = {
    '"@NAN@"': "NaN",
    '"@INFINITY@"': "-Infinity",
    '"@HUGE@"': "1" + "0" * 5000,
    "@SURROGATE@": "\\ud800",
    '"@DEEP@"': "[" * 90 + "]" * 90,
}
"""Replacements for values that json.dumps cannot write."""
_BODIES = [
    *(
        b"",
        b"null",
        b"NaN",
        b"-",
        b"1" * 6000,
        b"[" * 20000,
        b'{"a":' * 20000,
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
    ),
    *(b'"' + b'\\"' * 30000, b"[" * 99 + b"]" * 99, b'{"prompt":"\\ud800"}', b'{"model":1,"model":2,"prompt":"a"}'),
]
_CONTENT_TYPES = ["application/json"] * 12 + ["text/plain", "multipart/form-data; boundary=x", "", "*/*"]


def garbage(model: str, num: int, seed: int) -> Iterator[Request]:
    """Yield mutated valid requests (75%), valid requests with broken bytes (15%) and random bytes."""
    draw = random.Random(seed)
    seeds = real_requests(model)
    for _ in range(num):
        path, real = draw.choice(seeds)
        kind = draw.random()
        if kind < 0.75:
            body = _write(_mutate(copy.deepcopy(real), draw), draw)
        elif kind < 0.9:
            body = _break(_write(real, draw), draw)
        else:
            body = draw.choice([*_BODIES, draw.randbytes(draw.randint(0, 400))])
        method = "POST" if draw.random() < 0.97 else draw.choice(["PUT", "DELETE", "PATCH", "GET"])
        yield Request(path, body, method, draw.choice(_CONTENT_TYPES))


def with_each_text_replaced(body: Any, text: str) -> Iterator[Any]:
    """Yield copies of a JSON value, each with one string other than the model's name replaced by `text`."""
    if isinstance(body, str):
        yield text
    elif isinstance(body, dict | list):
        for key in list(body) if isinstance(body, dict) else range(len(body)):
            for value in with_each_text_replaced(body[key], text) if key != "model" else ():
                copied = copy.copy(body)
                copied[key] = value
                yield copied


async def send_all(port: int, key: str, requests: Sequence[Request], connections: int) -> list[tuple[Request, Answer]]:
    """Send all requests, several at a time on each connection, and return them with their answers."""
    waiting = iter(requests)
    done: list[tuple[Request, Answer]] = []

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while batch := list(islice(waiting, _PIPELINED)):
            writer.write(b"".join(request.encode(key) for request in batch))
            for index, request in enumerate(batch):
                answer = await asyncio.wait_for(read_answer(reader), _TIMEOUT_S)
                done.append((request, answer))
                if b"connection: close" in answer.headers:
                    writer.close()
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(b"".join(later.encode(key) for later in batch[index + 1 :]))
        writer.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    return done


async def send_one(port: int, key: str, request: Request) -> Answer:
    """Send a request on its own connection and return the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode(key))
        return await asyncio.wait_for(read_answer(reader), _TIMEOUT_S)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read one HTTP answer, chunked or with a Content-Length."""
    return await read_body(reader, (await reader.readuntil(b"\r\n\r\n")).lower())


async def read_body(reader: asyncio.StreamReader, head: bytes) -> Answer:
    """Read the body of an answer; `head` is its head in lower case."""
    body = b""
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:size]
        await reader.readline()
    elif b"content-length: " in head:
        body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    return Answer(int(head.split(None, 2)[1]), head, body)


def _mutate(value: Any, draw: random.Random) -> Any:
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if draw.random() < 0.45 and isinstance(value, dict):
            value[draw.choice(_FIELDS)] = copy.deepcopy(draw.choice(_VALUES))
            continue
        holders = [holder for holder in _containers(value) if holder]
        if not holders or draw.random() < 0.03:
            return copy.deepcopy(draw.choice(_VALUES))
        holder = draw.choice(holders)
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(_VALUES))
    return value


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _containers(child)


def _write(value: Any, draw: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    for name, written in _WRITTEN.items():
        text = text.replace(name, written)
    return text.encode()


def _break(body: bytes, draw: random.Random) -> bytes:
    broken = bytearray(body)
    for _ in range(draw.randint(1, 6)):
        position, kind = draw.randrange(len(broken) + 1), draw.random()
        if kind < 0.4:
            broken[position : position + 1] = draw.randbytes(1)
        elif kind < 0.7:
            broken[position:position] = draw.randbytes(draw.randint(1, 4))
        else:
            del broken[position : position + draw.randint(1, 8)]
    return bytes(broken)
