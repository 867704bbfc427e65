import itertools
import json
import random

import pytest

from slimserve.core.messages import CHAIN_FIELDS
from slimserve.loadtest.sse import StreamedReply, events, read_stream

DONE = b"data: [DONE]\n\n"


def event(text: str = "", usage: int | None = None, **delta: str) -> bytes:
    body: dict[str, object] = {"choices": [{"delta": {"content": text, **delta}}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def final_usage(num_tokens: int) -> bytes:
    usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "prompt_tokens_details": {"cached_tokens": 3}}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


def read(*parts: bytes) -> StreamedReply:
    """Read the parts as pieces; piece i arrives at second i."""
    return read_stream(list(enumerate(parts)))


def test_events_do_not_depend_on_how_the_bytes_are_split_and_arrive_with_their_last_byte() -> None:
    parts = [
        event("a", 1),
        b": ping\n\n",
        event("bü中😀", 3).replace(b"\n", b"\r\n"),
        b'event: message\ndata: {"choices": [{"text":\ndata: "d"}], "usage": {"completion_tokens": 4}}\n\n',
        event("", 4),
        event("e", 6),
        DONE,
    ]
    stream_bytes = b"".join(parts)
    ends = [sum(map(len, parts[: index + 1])) for index in range(len(parts))]
    expected = list(events([(0.0, stream_bytes)]))
    numbers = random.Random(1)
    for _ in range(300):
        edges = [0, *sorted(numbers.sample(range(1, len(stream_bytes)), numbers.randint(0, 40))), len(stream_bytes)]
        cut = list(itertools.pairwise(edges))
        pieces = [(float(index), stream_bytes[begin:end]) for index, (begin, end) in enumerate(cut)]
        assert [data for _, data in events(pieces)] == [data for _, data in expected]
        answer = read_stream(pieces)
        assert (answer.error, answer.text, answer.output_tokens) == (None, "abü中😀de", 6)
        arrival_pieces = [
            next(index for index, edge in enumerate(edges[1:]) if edge >= ends[part]) for part in (0, 2, 3, 5)
        ]
        assert answer.chunks == list(zip(arrival_pieces, (1, 2, 1, 2), strict=True))


def test_a_stream_may_arrive_byte_by_byte() -> None:
    stream_bytes = event("ü", 1) + event("中", 2) + DONE
    answer = read(*(stream_bytes[index : index + 1] for index in range(len(stream_bytes))))
    assert (answer.error, answer.text, answer.output_tokens) == (None, "ü中", 2)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (event("a"), "stream ended early"),
        (b"", "stream ended early"),
        (DONE, "empty answer"),
        (event("") + final_usage(0) + DONE, "empty answer"),
        (event("a") + b'data: {"choices": [', "half an event at the end"),
        (event("a") + b'data: {"choices": []}\n', "half an event at the end"),
        (event("a") + b"dat", "half an event at the end"),
        (event("a") + b"data: {broken}\n\n" + DONE, "broken json"),
        (event("a") + b"data: \n\n" + DONE, "broken json"),
        (b'data: {"choices": 3}\n\n' + DONE, "broken json"),
        (event("a") + b'data: {"choices": [{"text": "\xff"}]}\n\n' + DONE, "invalid utf-8"),
        (event("a") + b'data: {"choices": [{"delta": {"content": "\xe2\x82"}}]}\n\n' + DONE, "invalid utf-8"),
        (event("a") + b"data: \xff\xfe\n\n" + DONE, "invalid utf-8"),
        (event("a") + b'data: {"error": {"message": "x"}}\n\n' + DONE, "error in stream"),
        (b"<html>no</html>\n", "broken event stream"),
        (b'{"choices": []}\n', "no reply in answer"),
        (b'{"choices": null}', "no reply in answer"),
        (b'{"choices": [{"finish_reason": "stop"}]}', "no reply in answer"),
        (b'{"choices": [{"message": {"content": ""}}]}', "empty answer"),
        (b'{"error": {"message": "no"}}', "error in answer"),
        (b'{"object": "error", "message": "no"}', "error in answer"),
        (b"[]", "no reply in answer"),
        (b'{"message": {"content": "ollama"}}\n{"done": true}\n', "broken json"),
        (b"pong", "half an event at the end"),
        (b"pong\n", "broken event stream"),
        (event("a") + b'event: error\ndata: {"message": "x"}\n\n', "error in stream"),
        (event("a") + b'data: {"object": "error", "message": "x"}\n\n' + DONE, "error in stream"),
        (event("a") + b'data: {"error": "x"}\n\n' + DONE, "error in stream"),
        (event("a") + b"event: error\ndata: x", "error in stream"),
        (event("a") + b"data: null\n\n" + DONE, "broken json"),
        (event("a") + b'data: {"choices": ["x"]}\n\n' + DONE, "broken json"),
    ],
)
def test_each_broken_stream_has_its_own_error(body: bytes, error: str) -> None:
    answer = read(body)
    assert answer.error == error
    assert answer.text == ("a" if body.startswith(event("a")) else ""), "text before the error is kept"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (event("a") + b'data: {"error": {"message": "out of memory", "code": 500}}\n\n' + DONE, "out of memory"),
        (event("a") + b'event: error\ndata: {"message": "prompt too long"}\n\n', "prompt too long"),
        (event("a") + b"event: error\ndata: overloaded\n\n", "overloaded"),
        (b'{"error": "no such model"}', "no such model"),
        (b"<html><head><title>Sign in</title></head></html>", "Sign in"),
        (b"upstream connect error\n", "upstream connect error"),
        (event("a") + b"data: {broken}\n\n" + DONE, "{broken}"),
    ],
)
def test_what_the_server_says_about_an_error_is_kept(body: bytes, sentence: str) -> None:
    assert read(body).sentence == sentence


def dialect(*choices: object, usage: object = "absent", **rest: object) -> bytes:
    document = {"choices": list(choices), **({} if usage == "absent" else {"usage": usage}), **rest}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("parts", "text", "reasoning", "counts"),
    [
        ([event("a"), event("b"), dialect(usage={"completion_tokens": 7})], "ab", "", (2, 7)),
        ([event("a"), b'data: {"choices": null, "usage": {"completion_tokens": 7}}\n\n'], "a", "", (1, 7)),
        ([event("a"), b'data: {"usage": {"completion_tokens": 7, "prompt_tokens": null}}\n\n'], "a", "", (1, 7)),
        ([dialect({"delta": {"content": "a"}}, usage=None)], "a", "", (1, 1)),
        ([dialect({"delta": {"content": "a"}}, usage={"completion_tokens": None})], "a", "", (1, 1)),
        ([dialect({"delta": {"content": "a"}}, usage={"completion_tokens": 1.0})], "a", "", (1, 1)),
        ([dialect({"delta": {"content": "a"}}, usage={"completion_tokens": "1"})], "a", "", (1, 1)),
        ([dialect({"delta": {"content": "a"}}, usage=[])], "a", "", (1, 1)),
        (
            [dialect({"delta": {"content": "a"}}, usage={"completion_tokens": 1, "prompt_tokens_details": 0})],
            "a",
            "",
            (1, 1),
        ),
        ([dialect({"delta": None, "finish_reason": "stop"}), event("a")], "a", "", (1, 1)),
        ([dialect({"message": {"content": "a"}})], "a", "", (1, 1)),
        ([dialect({"delta": {"content": [{"type": "text", "text": "a"}]}})], "a", "", (1, 1)),
        ([dialect({"delta": {"reasoning_content": "h", "reasoning": "h"}}), event("a")], "a", "h", (2, 2)),
        ([dialect({"delta": {"reasoning": "h", "reasoning_details": [{"text": "h"}]}}), event("a")], "a", "h", (2, 2)),
        ([dialect({"delta": {"content": "a", "tool_calls": []}, "finish_reason": 3})], "a", "", (1, 1)),
        ([dialect({"delta": {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}})], "", "", (1, 1)),
        ([dialect({"delta": {"function_call": {"arguments": "{"}}})] * 3, "", "", (3, 3)),
        ([dialect({"delta": {"refusal": "no"}})], "", "", (1, 1)),
        ([b'data: {"type": "ping"}\n\n', event("a")], "a", "", (1, 1)),
        ([b"event: ping\ndata: {}\n\n", b"retry: 3\nx-trace: 1\n\n", event("a")], "a", "", (1, 1)),
        ([b"\xef\xbb\xbf" + event("a")], "a", "", (1, 1)),
        ([event("a").replace(b"data: ", b"data:")], "a", "", (1, 1)),
        ([event("a").replace(b"\n", b"\r")], "a", "", (1, 1)),
        ([event("a").replace(b"\n", b"\r\n")], "a", "", (1, 1)),
        ([b'data: {"choices":\ndata: [{"text": "a"}]}\n\n'], "a", "", (1, 1)),
        ([event("a\u2028b")], "a\u2028b", "", (1, 1)),
    ],
)
def test_a_stream_is_read_in_the_dialects_of_servers(
    parts: list[bytes], text: str, reasoning: str, counts: tuple[int, int]
) -> None:
    answer = read(*parts, DONE)
    assert (answer.error, answer.text, answer.reasoning) == (None, text, reasoning)
    assert (sum(chunk.num_tokens for chunk in answer.chunks), answer.output_tokens) == counts


def test_an_answer_of_tool_calls_begins_with_its_first_call() -> None:
    call = dialect({"delta": {"tool_calls": [{"index": 0}]}})
    assert read(call, call, DONE).first_answer_s == 0
    assert read(event(reasoning="hm"), call, call, DONE).first_answer_s == 1


def test_a_stream_may_end_after_its_finish_reason_without_done() -> None:
    assert read(event("a"), dialect({"delta": {}, "finish_reason": "stop"})).error is None


@pytest.mark.parametrize("usage", [{"prompt_tokens": 7, "completion_tokens": 3}, None])
def test_a_complete_answer_instead_of_a_stream_has_no_times_of_tokens(usage: object) -> None:
    choice = {"message": {"content": "ab", "reasoning": "h"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": usage}).encode()
    answer = read(body[:9], body[9:])
    assert (answer.error, answer.text, answer.reasoning, answer.finish_reason) == (None, "ab", "h", "stop")
    assert (answer.chunks, answer.output_tokens) == ([], 3 if usage else 0)


def test_usual_events_and_all_others_are_read_alike() -> None:
    numbers = random.Random(5)
    values: list[object] = ["", "a", None, 3, [], ["x"], [{"type": "text", "text": "b"}], {"x": 1}, True]
    for _ in range(2000):
        keys = numbers.sample(["content", *CHAIN_FIELDS, "tool_calls", "refusal"], 2)
        delta = {key: numbers.choice(values) for key in keys}
        choice = {numbers.choice(["delta", "message"]): delta, "finish_reason": numbers.choice(["stop", None])}
        data = json.dumps({"choices": [choice]}).encode()
        usual, other = (
            read_stream([(0.0, b"data: " + data + b"\n\n" + DONE)]) for data in (data, data[:-1] + b', "object": 3}')
        )
        assert usual == other


def test_comments_other_fields_and_carriage_returns_are_ignored() -> None:
    answer = read(
        b": hi\r\nevent: x\r\nid: 1\r\nretry: 9\r\n" + event("a").replace(b"\n", b"\r\n") + b"data:[DONE]\r\n\r\n"
    )
    assert (answer.error, answer.text, answer.output_tokens) == (None, "a", 1)


def test_a_last_line_without_newline_ends_the_stream() -> None:
    assert read(event("a"), b"data: [DONE]\n").error is None
    assert read(event("a"), b"data: [DONE]").error is None


def test_without_usage_each_chunk_with_text_counts_as_a_token() -> None:
    answer = read(event(""), event("a"), event("b c"), event(reasoning="d"), DONE)
    assert answer.chunks == [(1, 1), (2, 1), (3, 1)]
    assert (answer.output_tokens, answer.has_usage) == (3, False)


def test_a_final_count_sets_the_total_and_adds_no_chunk() -> None:
    for last in ([event("c"), final_usage(9)], [event("c"), event("", 9)], [event("c"), event("", 9), final_usage(9)]):
        answer = read(event(""), event("a"), event("b"), *last, DONE)
        assert answer.chunks == [(1, 1), (2, 1), (3, 1)]
        assert (answer.output_tokens, answer.prompt_tokens, answer.has_usage) == (9, 7, True)


def test_a_count_with_each_chunk_gives_its_number_of_tokens() -> None:
    answer = read(event("", 0), event("a", 1), event("", 2), event("bcd", 5), event("", 5), final_usage(5), DONE)
    assert answer.chunks == [(1, 1), (2, 1), (3, 3)], "a token without text, such as half a character, is counted"
    assert (answer.output_tokens, answer.cached_tokens, answer.error) == (5, 3, None)


def test_null_fields_are_treated_as_absent() -> None:
    body = (
        b'data: {"choices": [{"delta": {"content": null, "reasoning": "x"}, "finish_reason": "stop"}], "usage": null, '
    )
    answer = read(body + b'"error": null}\n\n', DONE)
    assert (answer.error, answer.reasoning, answer.finish_reason) == (None, "x", "stop")


@pytest.mark.parametrize(
    ("parts", "first_answer"),
    [
        ([event("yes"), event("no")], 0),
        ([event(" "), event("no")], 0),
        ([event(reasoning_content="hm"), event(reasoning="so"), event("yes")], 2),
        ([event(reasoning="hm"), event("\n\n"), event("yes")], 2),
        ([event(reasoning="hm")], None),
        ([event("<think>"), event("hm"), event("</think>"), event("\n"), event("4"), event("2")], 4),
        ([event("<think>hm</th"), event("in"), event("k>\n"), event("42")], 3),
        ([event("<think>hm</think"), event(">4"), event("2")], 1),
        ([event("<think>hm</think>42")], 0),
        ([event("hm, as the prompt opened it"), event("</think>"), event("42")], 2),
        ([event("<think>a</think> b </think>"), event("c")], 1),
        ([event("<thi"), event("nk>"), event("hm")], None),
        ([event("<think>hm</think>"), event("\n ")], None),
        ([event("", 0)], None),
    ],
)
def test_the_first_answer_is_the_first_visible_text_after_the_chain_of_thought(
    parts: list[bytes], first_answer: int | None
) -> None:
    assert read(*parts, DONE).first_answer_s == first_answer
