"""Parses the server-sent events of a streamed answer; each event has the arrival time of its last byte.

The number of tokens per chunk is the server's own count if it sends one with each chunk (`continuous_usage_stats`).
Without it, each chunk with text counts as one token, because dividing a final count among the chunks would invent gaps.
The number of tokens of the answer is then the final count, or else the number of chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from slimserve.workloads.interface import THINK_CLOSE, THINK_OPEN

_OTHER_FIELDS = {b"event", b"id", b"retry"}


class StreamError(Exception):
    """A stream is not that of an OpenAI-compatible server; the message is the kind of failure."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event_of = msgspec.json.Decoder(_Event).decode
_NO_DELTA = _Delta()


class Chunk(NamedTuple):
    """Tokens that arrived together; the time is in the clock of the pieces."""

    at_s: float
    num_tokens: int


@dataclass
class StreamedReply:
    """One streamed answer."""

    chunks: list[Chunk] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    """Chain of thought, if the server sends it separately from the answer."""
    first_answer_s: float | None = None
    """Arrival time of the first non-space character after the chain of thought, or of the first token without a chain.
    None if the chain never ended."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str | None = None
    has_usage: bool = False
    """True if the server counted the answer's tokens."""
    error: str | None = None
    """Kind of failure; everything before it is kept."""


def read_stream(pieces: Iterable[tuple[float, bytes]]) -> StreamedReply:
    """Return the tokens of a streamed completion or chat from pieces of (arrival time in seconds, bytes).

    `error` of the reply is one of: stream ended early (no [DONE]), half an event at the end, empty answer, error in
    stream, broken json, invalid utf-8, broken event stream.
    """
    answer = StreamedReply()
    answer_parts: list[tuple[float, str]] = []
    thoughts: list[str] = []
    try:
        _read_events(pieces, answer, answer_parts, thoughts)
        if not answer.chunks:
            raise StreamError("empty answer")
    except StreamError as error:
        answer.error = str(error)
    answer.text, answer.reasoning = "".join(text for _, text in answer_parts), "".join(thoughts)
    answer.output_tokens = answer.output_tokens or sum(chunk.num_tokens for chunk in answer.chunks)
    answer.first_answer_s = _first_answer_s(answer, answer_parts)
    return answer


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the arrival time and data of each event, as the HTML standard defines them (section 9.2.6).

    An event arrives with the empty line after it; a last [DONE] needs none. Raises StreamError for bytes that are not
    an event stream.
    """
    rest = b""
    data: list[bytes] = []
    at_s = 0.0
    for at_s, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif line in {b"", b"\r"}:
                if data:
                    yield at_s, b"\n".join(data)
                    data = []
            elif line[:1] != b":" and line.strip().partition(b":")[0] not in _OTHER_FIELDS:
                raise StreamError("broken event stream")
    if rest.startswith(b"data:"):
        data.append(rest[5:].strip())
        rest = b""
    if data == [b"[DONE]"]:
        yield at_s, data[0]
    elif data or rest.strip():
        raise StreamError("half an event at the end")


def _read_events(
    pieces: Iterable[tuple[float, bytes]],
    answer: StreamedReply,
    answer_parts: list[tuple[float, str]],
    thoughts: list[str],
) -> None:
    """Fill `answer`, `answer_parts` and `thoughts` from the events up to [DONE]; StreamError if it is missing."""
    num_counted = 0
    is_counted_by_chunk: bool | None = None  # unknown until the first token
    for at_s, data in events(pieces):
        if data == b"[DONE]":
            return
        event = _decode(data)
        text = thought = ""
        for choice in event.choices:
            delta = choice.delta or _NO_DELTA
            text += choice.text or delta.content or ""
            thought += delta.reasoning_content or delta.reasoning or ""
            answer.finish_reason = choice.finish_reason or answer.finish_reason
        if text:
            answer_parts.append((at_s, text))
        if thought:
            thoughts.append(thought)
        usage = event.usage
        if usage is not None:
            answer.has_usage = True
            answer.prompt_tokens = usage.prompt_tokens
            answer.output_tokens = max(answer.output_tokens, usage.completion_tokens)
            if usage.prompt_tokens_details is not None:
                answer.cached_tokens = usage.prompt_tokens_details.cached_tokens
        # A count without a choice, or the first count after chunks without one, is the total and adds no token.
        if usage is not None and event.choices and is_counted_by_chunk is not False:
            num_tokens = usage.completion_tokens - num_counted
        else:
            num_tokens = int(bool(text or thought))
        if num_tokens > 0:
            if is_counted_by_chunk is None:
                is_counted_by_chunk = usage is not None
            num_counted += num_tokens
            answer.chunks.append(Chunk(at_s, num_tokens))
    raise StreamError("stream ended early")


def _decode(data: bytes) -> _Event:
    try:
        event = _event_of(data)
    except UnicodeDecodeError as error:
        raise StreamError("invalid utf-8") from error
    except msgspec.MsgspecError as error:
        raise StreamError("invalid utf-8" if _is_not_utf8(data) else "broken json") from error
    if event.error:
        raise StreamError("error in stream")
    return event


def _is_not_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def _first_answer_s(answer: StreamedReply, answer_parts: list[tuple[float, str]]) -> float | None:
    """The answer starts after the last closing tag, by the same rule as in the verifier."""
    tag_at = answer.text.rfind(THINK_CLOSE)
    if tag_at < 0 and not answer.reasoning:
        if answer.text.lstrip().startswith(THINK_OPEN) or not answer.chunks:
            return None
        return answer.chunks[0].at_s
    begin = tag_at + len(THINK_CLOSE) if tag_at >= 0 else 0
    first = len(answer.text) - len(answer.text[begin:].lstrip())
    end = 0
    for at_s, text in answer_parts:
        end += len(text)
        if end > first:
            return at_s
    return None
