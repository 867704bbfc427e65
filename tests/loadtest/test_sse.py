import json
import random

import pytest

from loadtest.sse import read_stream


def event(text: str = "", usage: int | None = None, **delta: str) -> bytes:
    body: dict[str, object] = {"choices": [{"delta": {"content": text, **delta}}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def test_tokens_arrive_when_their_line_is_whole_however_the_bytes_are_cut() -> None:
    whole = event("a", 1) + event("bc", 3) + event("", 3) + event("d", 4) + b"data: [DONE]\n\n"
    bounds = [len(event("a", 1)), len(event("a", 1) + event("bc", 3)), len(whole) - len(b"data: [DONE]\n\n")]
    numbers = random.Random(1)
    for _ in range(200):
        cuts = sorted(numbers.sample(range(1, len(whole)), 5))
        edges = [0, *cuts, len(whole)]
        pieces = [(float(index), whole[begin:end]) for index, (begin, end) in enumerate(zip(edges, edges[1:], strict=False))]
        answer = read_stream(pieces)
        assert (answer.error, answer.text, answer.output_tokens, answer.prompt_tokens) == (None, "abcd", 4, 7)
        # A line is whole with its line feed, one byte before the blank line ends the event.
        expected = [next(index for index, end in enumerate(edges[1:]) if end >= bound - 1) for bound in bounds]
        assert [(chunk.at_s, chunk.num_tokens) for chunk in answer.chunks] == list(zip(expected, (1, 2, 1), strict=True))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (event("a"), "stream ended early"),
        (b"data: [DONE]\n\n", "empty answer"),
        (event("a") + b'data: {"choices": [', "half an event at the end"),
        (event("a") + b"data: {broken}\n\n", "broken json"),
        (event("a") + b'data: {"choices": [{"text": "\xff"}]}\n\n', "invalid utf-8"),
        (event("a") + b'data: {"error": {"message": "x"}}\n\n', "error in stream"),
        (b"<html>no</html>\n", "broken event stream"),
        (b'data: {"choices": 3}\n\n', "broken json"),
    ],
)
def test_what_is_no_stream_is_counted_under_its_own_name(body: bytes, error: str) -> None:
    assert read_stream([(0.0, body)]).error == error


def test_comments_other_fields_and_carriage_returns_are_no_tokens() -> None:
    body = b": keep-alive\r\nevent: x\r\nid: 1\r\n" + event("a").replace(b"\n", b"\r\n") + b"data:[DONE]\r\n\r\n"
    answer = read_stream([(1.0, body)])
    assert (answer.error, answer.text, answer.output_tokens, answer.has_usage) == (None, "a", 1, False)


def test_the_chain_of_thought_is_told_from_the_answer_where_the_server_does() -> None:
    pieces = [(1.0, event(reasoning_content="hm")), (2.0, event("yes")), (3.0, b"data: [DONE]\n\n")]
    answer = read_stream(pieces)
    assert [chunk.is_reasoning for chunk in answer.chunks] == [True, False]
    assert (answer.reasoning, answer.text) == ("hm", "yes")
